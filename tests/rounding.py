"""How far apart two results are, in the one unit that does not depend on how large their numbers are."""

from __future__ import annotations

import torch


def roundings(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype | None = None) -> float:
    """The largest difference in roundings of the largest number; ``dtype`` is what it was made in, if not its own."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    return float((got - want).abs().max() / (torch.finfo(dtype or want.dtype).eps * want.abs().max()))
