"""State tensors: rows kept between steps, one tensor a role."""

from __future__ import annotations

import torch

from .axes import Axes
from .layout import Layout, position
from .units import Unit


def shape(layout: Layout, tokens: int) -> tuple[int, ...]:
    """``[B, S + 1, ...]`` for a value with this layout: one spare row takes what belongs to no row."""
    factors = [factor for dim in layout for factor in dim]
    batch = next(f.size for f in factors if f.kind == "B")
    return (batch, tokens + 1, *(f.size for f in factors if f.kind == ""))


def allocate(unit: Unit, axes: Axes, device: torch.device) -> list[torch.Tensor]:
    """Zeroed state of one layer, in the order of ``unit.anchors()``."""
    out = []
    for node in unit.anchors():
        layout = axes.layout[node]
        tokens = next(f.size for dim in layout for f in dim if f.kind == "T")
        assert position(layout, "B") is not None
        out.append(torch.zeros(shape(layout, tokens), dtype=axes.fake[node].dtype, device=device))
    return out
