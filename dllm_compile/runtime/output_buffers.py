"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which takes several times as long as the copy. A storage
is used again when nothing outside holds any part of it, and is then written anew as a whole, so that what a caller
wrote, by whatever way, is gone. What holds a part counts either as an owner of the storage (tensors, views, arrays of
numpy, DLPack capsules, what autograd saved) or as a reference to its one Python object (``untyped_storage()``). A bare
address (``data_ptr()``) is no holder.

The copy of all logits may take longer than the step: 259 MB for 1,024 tokens of LLaDA in bfloat16, more on a GPU than a
step of a large batch; on a processor 1 GB for 2,112 tokens in float32, as much as 32 rows of four layers. So only the
rows that a sampler may read are copied into memory that is used again, and the others keep what an earlier copy put
there, never what a caller made of them:

    on a GPU    where PyTorch counted a write of the caller since, all rows are copied
    on a CPU    the memory itself is never handed out, but a tensor that shares it until somebody writes into it, by
                whatever way (PyTorch's copy-on-write storages): the writer then gets memory of his own. numpy and
                compiled code ask for memory to write into even where they read; for a caller who was seen to do so,
                all rows are copied, as above
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import torch

from dllm_compile.compat import is_shared_until_written, shared_until_written, storage_owners, version
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

    def filled(self, value: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """The tensor with ``value`` in it; with ``rows`` of it alone, if the caller is not known to have written."""
        copy = self.over(value)
        if rows is None or self.written != version(copy):
            copy.copy_(value)
        else:
            _put(copy, value, rows)
        self.written = version(copy)
        return copy


class _Apart:
    """Memory that no caller can write into, and what was handed out for it.

    Attributes:
        own: the memory, ``[B, S, ...]``.
        tensor, storage: of what was handed out: they share the memory of ``own`` until somebody writes into them.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self.own = torch.empty_like(value, memory_format=torch.contiguous_format)
        self.tensor: torch.Tensor | None = None
        self.storage = _storage(0, value.device)

    def touched(self) -> bool:
        """Whether somebody asked for memory to write into."""
        return self.tensor is not None and not is_shared_until_written(self.tensor)

    def filled(self, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A tensor with ``value`` in it; once there is an earlier one, only those ``rows`` are of this one."""
        first, self.tensor = self.tensor is None, None
        self.storage = _storage(0, value.device)  # what is held no more is not copied
        if first:
            self.own.copy_(value)
        else:
            _put_runs(self.own, value, rows)
        self.tensor = shared_until_written(self.own)
        self.storage = self.tensor.untyped_storage()
        return self.tensor


def _put(copy: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> None:
    """Copy ``rows`` of ``value``, the last one in place of none."""
    at, given = rows.clamp(max=value.shape[1] - 1), words(value)
    put_rows(copy, at, given.gather(1, at.unsqueeze(2).expand(-1, -1, given.shape[2])).view(value.dtype))


def _put_runs(copy: torch.Tensor, value: torch.Tensor, rows: torch.Tensor) -> None:
    """The same on a CPU, consecutive rows at once: an index takes ten times as long."""
    for into, given, at in zip(copy, value, rows.clamp(max=value.shape[1] - 1).tolist(), strict=True):
        for begin, end in _runs(at):
            into[begin:end].copy_(given[begin:end])


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Begin and end of each run of consecutive numbers."""
    begin = 0
    for i in range(1, len(numbers) + 1):
        if i == len(numbers) or numbers[i] != numbers[i - 1] + 1:
            yield numbers[begin], numbers[i - 1] + 1
            begin = i


class OutputBuffers:
    """Memory handed out before, all of the same size.

    Attributes:
        memory: no more than two, as a loop holds the last result while it asks for the next.
        apart: the same for rows on a CPU; ``None`` once the caller was seen to write.
    """

    def __init__(self) -> None:
        self.memory: list[_Memory] = []
        self.apart: list[_Apart] | None = []

    def bytes(self) -> int:
        """Bytes of the storages."""
        return sum(each.storage.nbytes() for each in self.memory) + sum(each.own.nbytes for each in self.apart or ())

    @staticmethod
    def keeps_apart(device: torch.device) -> bool:
        """Whether rows are copied into memory that no caller can write into."""
        return device.type == "cpu"

    def copy(self, value: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous copy of ``value`` that the caller may write into without changing anything else.

        Args:
            value: ``[B, S, ...]`` where ``rows`` are given.
            rows: positions ``[B, K]`` int64 of the rows that are read, ``S`` for no row, in whose place the last one is
                copied; the others may be those of an earlier copy. ``None`` for all.
        """
        if torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        if rows is not None and self.keeps_apart(value.device):
            if self.apart is not None and any(each.touched() for each in self.apart):
                self.apart = None
            if self.apart is not None:
                self.memory = []
                return self._apart(value, rows, self.apart)
            rows = None
        size, device = value.numel() * value.element_size(), value.device
        self.memory = [
            each
            for each in self.memory
            if (each.storage.nbytes(), each.tensor.device) == (size, device) and not self._is_shared(each.storage)
        ]
        place = next((i for i, each in enumerate(self.memory) if _is_free(each)), None)
        if place is None:
            place, self.memory = 0, [_Memory(size, device), *self.memory[:1]]
        return self.memory[place].filled(value, rows).detach()

    def _apart(self, value: torch.Tensor, rows: torch.Tensor, memory: list[_Apart]) -> torch.Tensor:
        memory[:] = [each for each in memory if (each.own.shape, each.own.dtype) == (value.shape, value.dtype)]
        place = next((i for i, each in enumerate(memory) if _is_free(each)), None)
        if place is None:
            place, memory[:] = 0, [_Apart(value), *memory[:1]]
        return memory[place].filled(value, rows).detach()

    @staticmethod
    def _is_shared(storage: torch.UntypedStorage) -> bool:
        """Whether other processes have it; on a GPU that is asked of the tensor, which is kept out of sight."""
        return storage.device.type == "cpu" and storage.is_shared()


def _is_free(memory: _Memory | _Apart) -> bool:
    """Whether the memory that was handed out is held by nothing outside."""
    unheld = _Memory(0, torch.device("cpu"))
    return _holders(memory.storage) == _holders(unheld.storage)
