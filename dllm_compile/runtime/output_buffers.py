"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which takes several times as long as the copy. A storage
is used again when nothing outside holds any part of it, and is then written anew as a whole, so that what a caller
wrote, by whatever way, is gone. What holds a part counts either as an owner of the storage (tensors, views, arrays of
numpy, DLPack capsules, what autograd saved) or as a reference to its one Python object (``untyped_storage()``). A bare
address (``data_ptr()``) is no holder.

The copy of all logits may take longer than the step: 259 MB for 1,024 tokens of LLaDA in bfloat16, more on a GPU than a
step of a large batch. So there only the rows that a sampler may read are copied into memory that is used again, and the
others keep what an earlier copy put there, never what a caller made of them: where PyTorch counted a write of the
caller since, all rows are copied. On a CPU a caller reads the rows that are kept; see :mod:`.shared_rows`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Protocol

import torch

from dllm_compile.compat import storage_owners, version
from dllm_compile.core.rows import put_rows, words


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Owners of a storage, and references to its Python object; those of the call included."""
    return storage_owners(storage), sys.getrefcount(storage)


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]


def over(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A new tensor whose memory is that storage."""
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]


class _Memory:
    """A storage, and a tensor over all of it: the tensors that are handed out count their writes with it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.storage = _storage(size, device)
        self.tensor = over(self.storage, torch.uint8, [size])
        self.written = -1  # the count of writes behind the last copy

    def over(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor, in the form of ``value``."""
        if (self.tensor.dtype, self.tensor.shape) != (value.dtype, value.shape):
            self.tensor, self.written = over(self.storage, value.dtype, value.shape), -1
        return self.tensor

    def filled(self, value: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The tensor with ``value`` in it; with ``rows`` of it alone, if the caller is not known to have written."""
        copy = self.over(value)
        if rows is None or self.written != version(copy):
            copy.copy_(value)
        else:
            _put(copy, value, rows)
        self.written = version(copy)
        return copy


def _put(copy: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy ``rows`` of ``value``, the last one in place of none."""
    at, given = rows.clamp(max=value.shape[1] - 1), words(value)
    put_rows(copy, at, given.gather(1, at.unsqueeze(2).expand(-1, -1, given.shape[2])).view(value.dtype))


class OutputBuffers:
    """Memory handed out before, all of the same size.

    Attributes:
        memory: no more than two, as a loop holds the last result while it asks for the next.
    """

    def __init__(self) -> None:
        self.memory: list[_Memory] = []

    def bytes(self) -> int:
        """Bytes of the storages."""
        return sum(each.storage.nbytes() for each in self.memory)

    def copy(self, value: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous copy of ``value`` that the caller may write into without changing anything else.

        Args:
            value: ``[B, S, ...]`` where ``rows`` are given.
            rows: positions ``[B, K]`` int64 of the rows that are read, ``S`` for no row, in whose place the last one is
                copied; the others may be those of an earlier copy. For a device that counts every write, unlike a CPU.
                ``None`` for all.
        """
        if torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        size, device = value.numel() * value.element_size(), value.device
        self.memory = [
            each
            for each in self.memory
            if (each.storage.nbytes(), each.tensor.device) == (size, device) and not self._is_shared(each.storage)
        ]
        place = next((i for i, each in enumerate(self.memory) if is_free(each)), None)
        if place is None:
            place, self.memory = 0, [_Memory(size, device), *self.memory[:1]]
        return self.memory[place].filled(value, rows).detach()

    @staticmethod
    def _is_shared(storage: torch.UntypedStorage) -> bool:
        """Whether other processes have it; on a GPU that is asked of the tensor, which is kept out of sight."""
        return storage.device.type == "cpu" and storage.is_shared()


class HandedOut(Protocol):
    """A storage and the one tensor of it that is not the caller's."""

    storage: torch.UntypedStorage
    tensor: torch.Tensor


def is_free(memory: HandedOut) -> bool:
    """Whether the memory that was handed out is held by nothing outside."""
    unheld = _Memory(0, torch.device("cpu"))
    return _holders(memory.storage) == _holders(unheld.storage)
