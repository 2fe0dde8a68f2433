"""State tensors: rows kept between steps, one tensor a role."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.fx

from .axes import Axes
from .errors import GraphRefused
from .layout import Layout
from .units import Attention


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
    """Allocate zeros for the rows of each of ``nodes``, ``[B, S + 1, ...]``.

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


def allocate_outside(
    attentions: Iterable[Attention], axes: Axes, batch: int, rows: int, device: torch.device
) -> list[torch.Tensor]:
    """Allocate zeros for attention over the keys outside, two tensors an attention call.

    Returns:
        Contexts ``[B, rows + 1, H, h_v]`` and log-sum-exps ``[B, rows + 1, H]`` of each, float64 where attention is,
        else float32.
    """
    out: list[torch.Tensor] = []
    with torch.inference_mode(False):
        for each in attentions:
            heads, width, dtype = outside_shape(each, axes)
            out.append(torch.zeros((batch, rows + 1, heads, width), dtype=dtype, device=device))
            out.append(torch.zeros((batch, rows + 1, heads), dtype=dtype, device=device))
    return out


def outside_shape(attention: Attention, axes: Axes) -> tuple[int, int, torch.dtype]:
    """Heads, size of their contexts, and dtype of attention over the keys outside.

    Raises:
        GraphRefused: attention is not over ``[B, H, S, h]``.
    """
    layout, made = axes.layout[attention.node], axes.fake[attention.node]
    if [[factor.kind for factor in dim] for dim in layout] != [["B"], [""], ["T"], [""]]:
        raise GraphRefused("attention is not over [batch, heads, tokens, size], so none of it is kept", attention.node)
    return made.shape[1], made.shape[3], torch.promote_types(made.dtype, torch.float32)


def grown(state: torch.Tensor, rows: int) -> torch.Tensor:
    """A copy of ``state`` ``[B, K + 1, ...]`` with ``rows`` rows and the spare one; what is new is zero."""
    with torch.inference_mode(False):
        more = state.new_zeros((state.shape[0], rows + 1, *state.shape[2:]))
        more[:, : state.shape[1] - 1] = state[:, :-1]
    return more
