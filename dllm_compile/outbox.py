"""Copies for the caller, in memory used again.

A step returns logits of the size of the whole vocabulary, copied so that the caller may write into them. Fresh memory
of that size is mapped, faulted in and unmapped at every step, which costs more than the copy. A buffer is used again
once nothing outside holds its memory; the number of owners of its storage tells. If nobody wrote into it, which its
version tells, only the rows that changed since are copied. A caller who writes by ``numpy()`` or ``data`` goes around
the version: such writes stay in rows that are not computed anew.
"""

from __future__ import annotations

import torch

Rows = torch.Tensor | None
"""``[B, K]`` int64 rows that changed; ``None`` for all. A row past the last stands for the last."""


def owners(tensor: torch.Tensor) -> int:
    """How many hold the memory of a tensor, this look at it included."""
    return int(torch._C._storage_Use_Count(tensor.untyped_storage()._cdata))


class _Buffer:
    """Memory handed out before.

    Attributes:
        tensor: the memory.
        version: of ``tensor`` when it was handed out.
        behind: what changed since.
    """

    def __init__(self, value: torch.Tensor) -> None:
        self.tensor = value.clone(memory_format=torch.contiguous_format)
        self.version = self.tensor._version
        self.behind: list[Rows] = []

    def catch_up(self, value: torch.Tensor) -> None:
        """Make the buffer equal to ``value``."""
        changed = [rows for rows in self.behind if rows is not None]
        if len(changed) < len(self.behind) or self.tensor._version != self.version:
            self.tensor.copy_(value)
        else:
            for sequence, begin, end in _runs(changed, value.shape[:2]):
                self.tensor[sequence, begin:end] = value[sequence, begin:end]
        self.version, self.behind = self.tensor._version, []


def _runs(changed: list[torch.Tensor], size: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """Sequence, first row and end of each run of rows that changed at all: steps mostly change the same ones."""
    seen = torch.zeros(size[0], size[1] + 2, dtype=torch.int8)
    for rows in changed:
        seen.scatter_(1, rows.clamp(max=size[1] - 1) + 1, 1)
    edges = seen.diff(dim=1).nonzero().tolist()
    return [(sequence, begin, end) for (sequence, begin), (_, end) in zip(edges[::2], edges[1::2], strict=True)]


class Outbox:
    """Buffers handed out before, for one shape at a time."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []

    def changed(self, rows: Rows) -> None:
        """Note that these rows of the value are no longer those copied last."""
        for buffer in self.buffers:
            buffer.behind.append(rows)

    def bytes(self) -> int:
        """Bytes of the buffers."""
        return sum(buffer.tensor.nbytes for buffer in self.buffers)

    def copy(self, value: torch.Tensor) -> torch.Tensor:
        """A contiguous copy of ``value`` that shares no memory with anything the caller still holds."""
        if value.device.type != "cpu" or torch.is_inference_mode_enabled():
            return value.clone(memory_format=torch.contiguous_format)
        fits = [b for b in self.buffers if b.tensor.shape == value.shape and b.tensor.dtype == value.dtype]
        for buffer in fits:
            if owners(buffer.tensor) == owners(torch.empty(1)):
                buffer.catch_up(value)
                return buffer.tensor.detach()
        self.buffers = [_Buffer(value), *fits[:1]]  # a loop holds the last result while it asks for the next
        return self.buffers[0].tensor.detach()
