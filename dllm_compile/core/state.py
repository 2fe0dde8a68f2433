"""State tensors: rows kept between steps, one tensor a role."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.fx

from .axes import Axes
from .layout import Layout


def shape(layout: Layout, tokens: int) -> tuple[int, ...]:
    """``[B, S + 1, ...]`` for a value with this layout: one spare row takes what belongs to no row."""
    factors = [factor for dim in layout for factor in dim]
    batch = next(f.size for f in factors if f.kind == "B")
    return (batch, tokens + 1, *(f.size for f in factors if f.kind == ""))


def allocate(nodes: Iterable[torch.fx.Node], axes: Axes, device: torch.device) -> list[torch.Tensor]:
    """Zeroed rows of each of ``nodes``."""
    with torch.inference_mode(False):  # a later call may write to it outside of inference mode
        return [_zeros(axes, node, device) for node in nodes]


def allocate_entries(
    nodes: Iterable[torch.fx.Node], axes: Axes, device: torch.device, count: int
) -> list[torch.Tensor]:
    """``count`` entries ``[B, count, ...]`` of each of ``nodes``, then their positions ``[B, count]`` int64."""
    out: list[torch.Tensor] = []
    with torch.inference_mode(False):
        for node in nodes:
            batch, _, *rest = shape(axes.layout[node], 1)
            out.append(torch.zeros((batch, count, *rest), dtype=axes.fake[node].dtype, device=device))
        out.append(torch.zeros((out[0].shape[0], count), dtype=torch.int64, device=device))
    return out


def _zeros(axes: Axes, node: torch.fx.Node, device: torch.device) -> torch.Tensor:
    layout = axes.layout[node]
    tokens = next(f.size for dim in layout for f in dim if f.kind == "T")
    return torch.zeros(shape(layout, tokens), dtype=axes.fake[node].dtype, device=device)
