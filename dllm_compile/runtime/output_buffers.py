"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which takes several times as long as the copy. A storage
is used again when nothing outside holds any part of it, and is then written anew as a whole, so that what a caller
wrote, by whatever way, is gone. What holds a part counts either as an owner of the storage (tensors, views, arrays of
numpy, DLPack capsules, what autograd saved) or as a reference to its one Python object (``untyped_storage()``). A bare
address (``data_ptr()``) is no holder.

On a GPU the copy of all logits takes as long as a step of a large batch (259 MB for 1,024 tokens of LLaDA). There only
the rows that a sampler may read are copied into memory that is used again, and the others keep what an earlier copy put
there; where PyTorch counted a write of the caller since, all rows are copied.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from dllm_compile.compat import storage_owners, version
from dllm_compile.core.rows import put_rows, words


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Owners of a storage, and references to its Python object; those of the call included."""
    return storage_owners(storage), sys.getrefcount(storage)


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]


def _over(storage: torch.UntypedStorage, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """A new tensor whose memory is that storage."""
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]


class _Memory:
    """A storage, and a tensor over all of it: the tensors that are handed out count their writes with it."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.storage = _storage(size, device)
        self.tensor = _over(self.storage, torch.uint8, [size])
        self.written = -1  # the count of writes behind the last copy

    def over(self, value: torch.Tensor) -> torch.Tensor:
        """The tensor, in the form of ``value``."""
        if (self.tensor.dtype, self.tensor.shape) != (value.dtype, value.shape):
            self.tensor, self.written = _over(self.storage, value.dtype, value.shape), -1
        return self.tensor


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

    @staticmethod
    def copies_rows(device: torch.device) -> bool:
        """Whether rows that no sampler reads are left as they are."""
        return device.type != "cpu"

    def copy(self, value: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous copy of ``value`` that shares no memory with anything the caller still holds.

        Args:
            value: ``[B, S, ...]`` where ``rows`` are given.
            rows: positions ``[B, K]`` int64 of the rows that are read, ``S`` for no row, in whose place the last one is
                copied; the others may be those of an earlier copy. ``None`` for all.
        """
        if torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        size, device = value.numel() * value.element_size(), value.device
        self.memory = [
            each
            for each in self.memory
            if (each.storage.nbytes(), each.tensor.device) == (size, device) and not self._is_shared(each.storage)
        ]
        unheld = [_Memory(0, device)]  # in a list too
        free = (i for i in range(len(self.memory)) if _holders(self.memory[i].storage) == _holders(unheld[0].storage))
        place = next(free, None)
        if place is None:
            place, self.memory = 0, [_Memory(size, device), *self.memory[:1]]
        memory = self.memory[place]
        copy = memory.over(value)
        if rows is None or memory.written != version(copy) or not self.copies_rows(device):
            copy.copy_(value)
        else:
            at, given = rows.clamp(max=value.shape[1] - 1), words(value)  # the last row in place of none
            put_rows(copy, at, given.gather(1, at.unsqueeze(2).expand(-1, -1, given.shape[2])).view(value.dtype))
        memory.written = version(copy)
        return copy.detach()

    @staticmethod
    def _is_shared(storage: torch.UntypedStorage) -> bool:
        """Whether other processes have it; on a GPU that is asked of the tensor, which is kept out of sight."""
        return storage.device.type == "cpu" and storage.is_shared()
