"""What a variant of a step costs, in closed form.

A token-wise call costs the same for every row, so its count for all ``S`` rows, taken once with
``torch.utils.flop_counter`` on fake tensors, gives it for any number of rows. Attention costs ``2 (h + h_v)`` FLOPs
per query row, key row and query head. Symbols: ``B`` batch, ``S`` tokens, ``P`` prompt, ``G`` response, ``n``
selected rows, ``A`` active rows, ``s`` salient rows, ``E`` entries kept by eviction, ``F`` those of fresh rows beside
them, ``R`` readable rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

import sympy
import torch
import torch.fx
from torch.utils.flop_counter import flop_registry

from dllm_compile.compat import TorchDispatchMode, compile_lock
from dllm_compile.core.arguments import attention, attention_arguments
from dllm_compile.core.assignment import EXACT, KEYS, Assignment
from dllm_compile.core.axes import Axes, linear, run_node
from dllm_compile.core.emit import emit
from dllm_compile.core.rows import ALL, RowSet
from dllm_compile.core.state import shape
from dllm_compile.core.units import Unit

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


Terms = dict[tuple[str, ...], Fraction]
"""FLOPs a sequence as a sum: a coefficient times the number of rows of each set that is named."""


def flops(unit: Unit, axes: Axes, assignment: Assignment) -> sympy.Expr:
    """FLOPs of a unit for an assignment, as an expression in the symbols above (a multiply-add counts as 2)."""
    computed = emit(unit, axes, assignment).rows
    found = terms(unit, axes, assignment, computed).items()
    products = (sympy.Rational(count) * B * prod(ROWS[name] for name in names) for names, count in found)
    return sympy.expand(sum(products, sympy.Integer(0)))


def terms(unit: Unit, axes: Axes, assignment: Assignment, computed: dict[torch.fx.Node, RowSet]) -> Terms:
    """What a unit costs.

    Args:
        unit, axes: a unit and its graph.
        assignment: for which rows it runs.
        computed: rows of each node that is computed, as it was written for the assignment.
    """
    total: Terms = {}
    for node in unit.nodes:
        if node in computed:
            for names, count in _node(node, axes, computed[node].name, assignment).items():
                total[names] = total.get(names, Fraction(0)) + count
    return {names: count for names, count in total.items() if count and "none" not in names}


def whole(unit: Unit, axes: Axes) -> Terms:
    """What a unit costs for all rows."""
    return terms(unit, axes, EXACT, dict.fromkeys(unit.nodes, ALL))


def _node(node: torch.fx.Node, axes: Axes, rows: str, assignment: Assignment) -> Terms:
    if node.target is attention:
        given = attention_arguments(node.args, node.kwargs)
        query, value = axes.fake[given.query], axes.fake[given.value]
        heads = 2 * query.numel() // (query.shape[-1] * query.shape[-2] * _extent(axes, "B"))
        keys = assignment.keys.name
        found: Terms = {(rows, keys): Fraction(heads * query.shape[-1])}
        mixed: list[tuple[str, ...]] = [("salient", keys), ("salient", rows)] if assignment.salient else [(rows, keys)]
        for names in mixed:
            found[names] = found.get(names, Fraction(0)) + heads * value.shape[-1]
        return found
    return {(rows,): _by_row(node, axes)}


def _by_row(node: torch.fx.Node, axes: Axes) -> Fraction:
    """FLOPs for one row of a call that is token-wise; counted once."""
    if "flops" in node.meta:
        return node.meta["flops"]  # type: ignore[no-any-return]
    if node.target is linear:
        x, weight = axes.fake[node.args[0]], axes.fake[node.args[1]]  # type: ignore[index]
        count = 2 * (x.numel() // x.shape[-1]) * weight.shape[0] * weight.shape[1]
    else:
        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: axes.fake[n])
        counter = _Counter()  # type: ignore[no-untyped-call]
        with compile_lock, axes.mode, counter, torch.no_grad():  # fake tensors are of one thread at a time
            run_node(node, args, kwargs)
        count = counter.flops
    node.meta["flops"] = found = Fraction(count, _extent(axes, "T") * _extent(axes, "B"))
    return found


class _Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts as ``torch.utils.flop_counter`` does, without its hooks on all modules, which other threads would see."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = flop_registry.get(func.overloadpacket)
        if formula is None and func.namespace == "aten":
            with self:
                made_of = func.decompose(*args, **kwargs)
            if made_of is not NotImplemented:
                return made_of
        out = func(*args, **kwargs)
        self.flops += formula(*args, **kwargs, out_val=out) if formula is not None else 0
        return out


def state_bytes(unit: Unit, axes: Axes, variants: Sequence[Assignment]) -> sympy.Expr:
    """Bytes kept between steps for one layer of this kind by a method that has these variants."""
    kept = unit.anchors(frozenset().union(*(variant.keep for variant in variants)))
    keys = unit.anchors(KEYS)
    compact = bool(keys) and any(variant.compact for variant in variants)
    total = 8 * B * (E + F) if compact else sympy.Integer(0)
    for node in kept:
        _, _, *rest = shape(axes.layout[node], 1, 1)
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
    computed = emit(unit, axes, assignment).rows
    order = [n for n in unit.nodes if n in computed and isinstance(axes.fake[n], torch.Tensor)]
    place = {n: i for i, n in enumerate(order)}
    made: dict[torch.fx.Node, tuple[int, float]] = {}
    last: dict[torch.fx.Node, int] = {}
    for i, node in enumerate(order):
        owner = node
        while axes.shares.get(owner) in place:
            owner = axes.shares[owner]
        nbytes = axes.fake[owner].untyped_storage().nbytes()
        rows = ROWS[computed[node].name] if node in axes.layout else S
        share = float(rows.subs(lengths)) / _extent(axes, "T")
        made.setdefault(owner, (i, nbytes * share))
        ends = [place[user] for user in node.users if user in place]
        ends += [len(order)] if node in unit.outputs else []
        last[owner] = max([last.get(owner, i), i, *ends])
    alive = (sum(b for at, (first, b) in made.items() if first <= i <= last[at]) for i in range(len(order)))
    return int(max(alive, default=0.0))


def _extent(axes: Axes, kind: str) -> int:
    return next(f.size for layout in axes.layout.values() for dim in layout for f in dim if f.kind == kind)
