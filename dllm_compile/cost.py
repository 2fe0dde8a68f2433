"""What a variant of a step costs, in closed form.

A token-wise call costs the same for every row, so its count for all ``S`` rows, taken once with
``torch.utils.flop_counter`` on fake tensors, gives it for any number of rows. Attention costs ``2 (h + h_v)`` FLOPs
per query row, key row and query head. Symbols: ``B`` batch, ``S`` tokens, ``P`` prompt, ``G`` response, ``n``
selected rows, ``A`` active rows, ``R`` readable rows.
"""

from __future__ import annotations

import sympy
import torch
import torch.fx
from torch.utils.flop_counter import FlopCounterMode

from .core.assignment import Assignment
from .core.axes import Axes, attention, linear, run_node
from .core.emit import emit
from .core.rows import RowSet
from .core.state import shape
from .core.units import Unit
from .kernels.row_change import pick_rows

B, S, P, G, N, A, R = sympy.symbols("B S P G n A R", positive=True, integer=True)
ROWS = {
    "all": S,
    "none": sympy.Integer(0),
    "response": G,
    "prompt": P,
    "selected": N,
    "prompt+selected": P + N,
    "active": A,
    "readable": R,
}


def flops(unit: Unit, axes: Axes, assignment: Assignment) -> sympy.Expr:
    """FLOPs of a unit for an assignment, as an expression in the symbols above (a multiply-add counts as 2)."""
    computed = emit(unit, axes, assignment, {"selected": 1}, pick_rows).rows
    total = sympy.Integer(0)
    for node in unit.nodes:
        if node in computed:
            total += _node(node, axes, computed[node])
    return sympy.expand(total)


def _node(node: torch.fx.Node, axes: Axes, rows: RowSet) -> sympy.Expr:
    tokens, batch = _extent(axes, "T"), _extent(axes, "B")
    if node.target is attention:
        query, value = axes.fake[node.args[0]], axes.fake[node.args[2]]  # type: ignore[index]
        heads = query.numel() // (query.shape[-1] * query.shape[-2] * batch)
        return 2 * B * heads * (query.shape[-1] + value.shape[-1]) * ROWS[rows.name] * S
    if node.target is linear:
        x, weight = axes.fake[node.args[0]], axes.fake[node.args[1]]  # type: ignore[index]
        count = 2 * (x.numel() // x.shape[-1]) * weight.shape[0] * weight.shape[1]
    else:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: axes.fake[n])
        counter = FlopCounterMode(display=False)
        with axes.mode, counter, torch.no_grad():
            run_node(node, args, kwargs)
        count = counter.get_total_flops()
    return sympy.Rational(count, tokens * batch) * B * ROWS[rows.name]


def state_bytes(unit: Unit, axes: Axes, keep: frozenset[str]) -> sympy.Expr:
    """Bytes kept between steps for one layer of this kind that keeps the roles ``keep``."""
    total = sympy.Integer(0)
    for node in unit.anchors(keep):
        _, _, *rest = shape(axes.layout[node], 1)
        width = 1
        for extent in rest:
            width *= extent
        total += B * (S + 1) * width * axes.fake[node].element_size()
    return total


def _extent(axes: Axes, kind: str) -> int:
    return next(f.size for layout in axes.layout.values() for dim in layout for f in dim if f.kind == kind)
