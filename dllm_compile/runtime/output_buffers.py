"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which takes several times as long as the copy. A storage
is used again when nothing outside holds any part of it, and is then written anew as a whole, so that what a caller
wrote, by whatever way, is gone. What holds a part counts either as an owner of the storage (tensors, views, arrays of
numpy, DLPack capsules, what autograd saved) or as a reference to its one Python object (``untyped_storage()``). A bare
address (``data_ptr()``) is no holder.

On a GPU the memory is cheap and the copy is not: 259 MB for 1,024 tokens of LLaDA, as long as a step of a large batch.
There a storage that is used again gets the rows that a sampler may read, and in the others has what it had.
"""

from __future__ import annotations

import sys

import torch

from dllm_compile.compat import storage_owners


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Owners of a storage, and references to its Python object; those of the call included."""
    return storage_owners(storage), sys.getrefcount(storage)


def _storage(size: int, device: torch.device) -> torch.UntypedStorage:
    return torch.UntypedStorage(size, device=device)  # type: ignore[no-untyped-call]


def _over(storage: torch.UntypedStorage, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    """A new tensor whose memory is that storage."""
    made = torch.empty(0, dtype=dtype, device=storage.device)
    return made.set_(storage, 0, shape)  # type: ignore[call-overload,no-any-return]


class OutputBuffers:
    """Storages handed out before, all of the same size.

    Attributes:
        storages: no more than two, as a loop holds the last result while it asks for the next.
    """

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []
        self.kind: tuple[torch.device, torch.dtype, torch.Size] | None = None

    def bytes(self) -> int:
        """Bytes of the storages."""
        return sum(storage.nbytes() for storage in self.storages)

    def copy(self, value: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """A contiguous copy of ``value`` that shares no memory with anything the caller still holds.

        Args:
            value: ``[B, S, ...]`` where ``rows`` are given.
            rows: positions ``[B, K]`` int64 of the rows that are read, ``S`` for no row. On a GPU the others may be
                those of an earlier copy, with what its caller wrote there. ``None`` for all.
        """
        if torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        kind, size = (value.device, value.dtype, value.shape), value.numel() * value.element_size()
        on_host = value.device.type == "cpu"
        if not on_host and kind != self.kind:  # another dtype's bits may be NaN
            self.storages = []
        self.kind = kind
        self.storages = [each for each in self.storages if each.nbytes() == size and not (on_host and each.is_shared())]
        unheld = [_storage(0, value.device)]  # in a list too
        free = (i for i in range(len(self.storages)) if _holders(self.storages[i]) == _holders(unheld[0]))
        place = next(free, None)
        if place is None:
            place, rows, self.storages = 0, None, [_storage(size, value.device), *self.storages[:1]]
        copy = _over(self.storages[place], value.dtype, value.shape)
        if rows is None or on_host:
            return copy.copy_(value)
        batch = torch.arange(value.shape[0], device=value.device).unsqueeze(1)
        at = rows.clamp(max=value.shape[1] - 1)  # the last row in place of none
        return copy.index_put_((batch, at), value[batch, at])
