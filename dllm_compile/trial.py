"""Prove by trial that a unit's rows are independent."""

from __future__ import annotations

from typing import Any

import torch

from .core.assignment import EXACT, RESPONSE, Assignment
from .core.axes import Axes
from .core.emit import emit
from .core.errors import GraphRefused
from .core.layout import position
from .core.rows import ALL
from .core.state import allocate
from .core.units import Unit
from .core.writing import Choices

_PROBE = Assignment("probe", RESPONSE, ALL, ALL)


def rows_are_independent(unit: Unit, axes: Axes, stream: Any, inputs: list[Any]) -> bool:
    """Run a unit for all rows and for every third row, and compare those.

    Experts that sort tokens, or a custom kernel, are token-wise as a whole although single calls in them are not. The
    comparison is on the real weights and the real hidden state.

    Args:
        unit: a layer with calls whose rows may mix.
        axes: of its graph.
        stream: the residual stream, ``[B, S, d]``.
        inputs: the unit's other inputs.

    Returns:
        Whether the rows came out the same up to rounding.
    """
    layout = axes.layout[unit.outputs[0]]
    tokens = position(layout, "T")
    assert tokens is not None
    count = stream.shape[1]
    index = torch.arange(0, count, 3, device=stream.device).expand(stream.shape[0], -1)
    sizes = {"response": index.shape[1]}
    try:
        probe = emit(unit, axes, _PROBE, sizes, Choices())
    except GraphRefused:
        return False
    whole = emit(unit, axes, EXACT, sizes, Choices())
    state = allocate(unit.anchors(), axes, stream.device)
    values = {"stream": stream, "index:response": index}
    values |= {f"input:{i}": v for i, v in enumerate(inputs)} | {f"state:{i}": v for i, v in enumerate(state)}
    with torch.no_grad():
        want = whole.module(*[values[name] for name in whole.takes])[0]
        got = probe.module(*[values[name] for name in probe.takes])[0]
    want, got = want[:, index[0]].double(), got[:, index[0]].double()
    scale = want.abs().max().clamp(min=1e-12)
    return bool(((want - got).abs().max() / scale) < 50 * torch.finfo(stream.dtype).eps ** 0.75)
