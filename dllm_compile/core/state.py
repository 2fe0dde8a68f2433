"""State tensors: rows kept between steps, one tensor a role."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx

from .axes import Axes
from .layout import Layout


def shape(layout: Layout, batch: int, rows: int) -> tuple[int, ...]:
    """``[B, rows + 1, ...]`` for a value with this layout: one spare row takes what belongs to no row."""
    return (batch, rows + 1, *(factor.size for dim in layout for factor in dim if factor.kind == ""))


def allocate(
    nodes: Iterable[torch.fx.Node],
    axes: Axes,
    size: tuple[int, int],
    device: torch.device,
    compact: Sequence[torch.fx.Node] = (),
    rows: int = 0,
) -> list[torch.Tensor]:
    """Zeroed rows ``[B, S + 1, ...]`` of each of ``nodes``.

    Args:
        nodes: values of a unit.
        axes: of its graph.
        size: sequences ``B`` and tokens ``S``.
        device: where the rows are kept.
        compact: those of ``nodes`` that have ``rows`` rows instead of ``S``; then a last tensor has their positions,
            ``[B, rows]`` int64.
        rows: entries kept by eviction, and rows that are computed after it.
    """
    out: list[torch.Tensor] = []
    with torch.inference_mode(False):  # a later call may write to it outside of inference mode
        for node in nodes:
            extent = shape(axes.layout[node], size[0], rows if node in compact else size[1])
            out.append(torch.zeros(extent, dtype=axes.fake[node].dtype, device=device))
        if compact:
            out.append(torch.zeros((out[0].shape[0], rows), dtype=torch.int64, device=device))
    return out
