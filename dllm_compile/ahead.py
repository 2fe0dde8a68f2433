"""What a sampler tells of the call that it is about to make: the positions it will fill from it, if it knows them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_NOW = threading.local()


@contextmanager
def filling(rows: torch.Tensor) -> Iterator[None]:
    """Tell the calls made inside, on this thread, that the positions ``rows`` ``[B, S]`` bool are filled from them."""
    before = getattr(_NOW, "rows", None)
    _NOW.rows = rows.cpu()
    try:
        yield
    finally:
        _NOW.rows = before


def told(shape: torch.Size) -> torch.Tensor | None:
    """The positions ``[B, S]`` bool that are filled from this call; ``None`` where nobody says."""
    rows: torch.Tensor | None = getattr(_NOW, "rows", None)
    return rows if rows is not None and rows.shape == shape else None
