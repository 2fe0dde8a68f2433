"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which costs more than the copy. A buffer is used again
once nothing outside holds its memory; the number of owners of its storage tells.
"""

from __future__ import annotations

import torch


def owners(tensor: torch.Tensor) -> int:
    """How many hold the memory of a tensor, this look at it included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class Outbox:
    """Buffers handed out before, for one shape at a time."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``value`` that shares no memory with anything the caller still holds."""
        if value.device.type != "cpu" or torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        self.buffers = [b for b in self.buffers if b.shape == value.shape and b.dtype == value.dtype]
        for buffer in self.buffers:
            if owners(buffer) == owners(torch.empty(1)):
                return buffer.copy_(value).detach()
        buffer = value.clone(memory_format=torch.contiguous_format)
        self.buffers = [buffer, *self.buffers[:1]]  # a loop holds the last result while it asks for the next
        return buffer.detach()
