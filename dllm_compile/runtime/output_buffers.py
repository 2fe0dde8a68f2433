"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which takes several times as long as the copy. A storage
is used again when nothing outside holds any part of it, and is then written anew as a whole, so that what a caller
wrote, by whatever way, is gone. What holds a part counts either as an owner of the storage (tensors, views, arrays of
numpy, DLPack capsules, what autograd saved) or as a reference to its one Python object (``untyped_storage()``). A bare
address (``data_ptr()``) is no holder.
"""

from __future__ import annotations

import sys

import torch

from dllm_compile.compat import storage_owners


def _holders(storage: torch.UntypedStorage) -> tuple[int, int]:
    """Owners of a storage, and references to its Python object; those of the call included."""
    return storage_owners(storage), sys.getrefcount(storage)


def _storage(size: int) -> torch.UntypedStorage:
    return torch.UntypedStorage(size)  # type: ignore[no-untyped-call]


class OutputBuffers:
    """Storages handed out before, all of the same size.

    Attributes:
        storages: no more than two, as a loop holds the last result while it asks for the next.
    """

    def __init__(self) -> None:
        self.storages: list[torch.UntypedStorage] = []

    def bytes(self) -> int:
        """Bytes of the storages."""
        return sum(storage.nbytes() for storage in self.storages)

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``value`` that shares no memory with anything the caller still holds."""
        if value.device.type != "cpu" or torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        size = value.numel() * value.element_size()
        self.storages = [each for each in self.storages if each.nbytes() == size and not each.is_shared()]
        unheld = [_storage(0)]  # in a list too
        free = (i for i in range(len(self.storages)) if _holders(self.storages[i]) == _holders(unheld[0]))
        place = next(free, None)
        if place is None:
            place, self.storages = 0, [_storage(size), *self.storages[:1]]
        copy = torch.empty(0, dtype=value.dtype)
        copy.set_(self.storages[place], 0, value.shape)  # type: ignore[call-overload]
        return copy.copy_(value)
