"""What a variant of a step costs, in closed form.

A token-wise call costs the same for every row, so its count for all ``S`` rows, taken once with
``torch.utils.flop_counter`` on fake tensors, gives it for any number of rows. Attention costs ``2 (h + h_v)`` FLOPs
per query row, key row and query head. Symbols: ``B`` batch, ``S`` tokens, ``P`` prompt, ``G`` response, ``n``
selected rows, ``A`` active rows, ``s`` salient rows, ``E`` entries kept by eviction, ``F`` those of fresh rows beside
them, ``R`` readable rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import sympy
import torch
import torch.fx
from torch.utils.flop_counter import FlopCounterMode

from .core.arguments import attention, attention_arguments
from .core.assignment import KEYS, Assignment
from .core.axes import Axes, linear, run_node
from .core.emit import emit
from .core.rows import RowSet
from .core.state import shape
from .core.units import Unit
from .unit_code import CHOICES

B, S, P, G, N, A, T, E, F, R = sympy.symbols("B S P G n A s E F R", positive=True, integer=True)
ROWS = {
    "all": S,
    "none": sympy.Integer(0),
    "response": G,
    "prompt": P,
    "selected": N,
    "prompt+selected": P + N,
    "active": A,
    "salient": T,
    "keyed": E + F,
    "readable": R,
}


def flops(unit: Unit, axes: Axes, assignment: Assignment) -> sympy.Expr:
    """FLOPs of a unit for an assignment, as an expression in the symbols above (a multiply-add counts as 2)."""
    computed = emit(unit, axes, assignment, {"selected": 1}, CHOICES).rows
    total = sympy.Integer(0)
    for node in unit.nodes:
        if node in computed:
            total += _node(node, axes, computed[node], assignment)
    return sympy.expand(total)


def _node(node: torch.fx.Node, axes: Axes, rows: RowSet, assignment: Assignment) -> sympy.Expr:
    tokens, batch = _extent(axes, "T"), _extent(axes, "B")
    if node.target is attention:
        given = attention_arguments(node.args, node.kwargs)
        query, value = axes.fake[given.query], axes.fake[given.value]
        heads = query.numel() // (query.shape[-1] * query.shape[-2] * batch)
        keys = ROWS[assignment.keys.name]
        mixed = T * (keys + ROWS[rows.name]) if assignment.salient else ROWS[rows.name] * keys
        return 2 * B * heads * (query.shape[-1] * ROWS[rows.name] * keys + value.shape[-1] * mixed)
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


def state_bytes(unit: Unit, axes: Axes, variants: Sequence[Assignment]) -> sympy.Expr:
    """Bytes kept between steps for one layer of this kind by a method that has these variants."""
    kept = unit.anchors(frozenset().union(*(variant.keep for variant in variants)))
    keys = unit.anchors(KEYS)
    compact = bool(keys) and any(variant.compact for variant in variants)
    total = 8 * B * (E + F) if compact else sympy.Integer(0)
    for node in kept:
        _, _, *rest = shape(axes.layout[node], 1)
        rows = E + F if compact and node in keys else S
        total += B * (rows + 1) * prod(rest) * axes.fake[node].element_size()
    return total


def live_bytes(unit: Unit, axes: Axes, assignment: Assignment, lengths: dict[sympy.Symbol, int]) -> int:
    """Most bytes of a unit's values that are alive at once, before fusion, without temporaries of operations.

    Views take nothing.

    Args:
        unit, axes: a unit and its graph.
        assignment: for which rows it runs.
        lengths: a number for each symbol.
    """
    computed = emit(unit, axes, assignment, {"selected": 1}, CHOICES).rows
    order = [n for n in unit.nodes if n in computed and isinstance(axes.fake[n], torch.Tensor)]
    place = {n: i for i, n in enumerate(order)}
    made: dict[int, tuple[int, float]] = {}
    last: dict[int, int] = {}
    for i, node in enumerate(order):
        store = axes.fake[node].untyped_storage()
        rows = ROWS[computed[node].name] if node in axes.layout else S
        share = float(rows.subs(lengths)) / _extent(axes, "T")
        made.setdefault(store._cdata, (i, store.nbytes() * share))
        ends = [place[user] for user in node.users if user in place]
        ends += [len(order)] if node in unit.outputs else []
        last[store._cdata] = max([last.get(store._cdata, i), i, *ends])
    alive = (sum(b for at, (first, b) in made.items() if first <= i <= last[at]) for i in range(len(order)))
    return int(max(alive, default=0.0))


def _extent(axes: Axes, kind: str) -> int:
    return next(f.size for layout in axes.layout.values() for dim in layout for f in dim if f.kind == kind)
