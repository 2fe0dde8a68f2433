"""What a variant of a step costs, in closed form.

A token-wise call costs the same for every row, so its count for all ``S`` rows, taken once with
``torch.utils.flop_counter`` on fake tensors, gives it for any number of rows. Attention costs ``2 (h + h_v)`` FLOPs
per query row, key row and query head. ``MEANING`` says what the symbols stand for.
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

from dllm_compile import compat
from dllm_compile.compat import TorchDispatchMode
from dllm_compile.core import rows as row_ops
from dllm_compile.core.arguments import attention, attention_arguments
from dllm_compile.core.assignment import EXACT, KEYS, Assignment
from dllm_compile.core.axes import Axes, linear, run_node
from dllm_compile.core.demand import at_hand
from dllm_compile.core.emit import emit
from dllm_compile.core.rows import ALL, RowSet
from dllm_compile.core.state import outside_shape, shape
from dllm_compile.core.units import Attention, Unit

B, S, P, G, N, A, T, E, F, R, W = sympy.symbols("B S P G n A s E F R W", positive=True, integer=True)
MEANING = {
    "B": "sequences",
    "S": "tokens of each",
    "P": "tokens of the prompt",
    "G": "tokens of the response",
    "R": "readable rows",
    "n": "selected rows",
    "A": "active rows",
    "s": "salient rows",
    "E": "entries kept by eviction",
    "F": "entries of fresh rows beside them",
    "W": "rows that are present where a full step leaves some out",
}
"""Of symbols. ``A1``, ``A2`` and so on are active rows from each depth on, where deeper layers skip some."""
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


def going(which: int) -> sympy.Symbol:
    """The symbol for the number of active rows from depth number ``which`` on."""
    return sympy.Symbol(f"A{which + 1}", positive=True, integer=True)


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
        if assignment.outside is not None and assignment.keys == ALL:  # and over those computed in the step
            found[rows, rows] = Fraction(heads * query.shape[-1])
            mixed.append((rows, rows))
        if assignment.shared is not None:  # and over those of the sequence that these are drafts of
            found[rows, ALL.name] = Fraction(heads * query.shape[-1])
            mixed.append((rows, ALL.name))
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
        counter = Counter()  # type: ignore[no-untyped-call]
        with compat.compile_lock, axes.mode, counter, torch.no_grad():  # fake tensors are of one thread at a time
            run_node(node, args, kwargs)
        count = counter.flops
    node.meta["flops"] = found = Fraction(count, _extent(axes, "T") * _extent(axes, "B"))
    return found


class Counter(TorchDispatchMode):  # type: ignore[no-untyped-call]
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
    for each in unit.attentions if any(variant.outside is not None for variant in variants) else ():
        total += B * (A + 1) * _outside_bytes(each, axes)
    return total


def _outside_bytes(attention: Attention, axes: Axes) -> int:
    """Bytes of a row that is kept of attention over the keys outside."""
    heads, width, dtype = outside_shape(attention, axes)
    return heads * (width + 1) * dtype.itemsize


def state_traffic(unit: Unit, axes: Axes, assignment: Assignment) -> sympy.Expr:
    """Bytes of the rows kept between steps that a unit reads or writes at least.

    Each row counts once for each operation, and a row that is written is not read again from memory: attention over
    keys of which some are new costs as many rows as there are keys.
    """
    emitted, kept = emit(unit, axes, assignment), unit.anchors(assignment.keep)
    names = dict(zip(emitted.module.graph.find_nodes(op="placeholder"), emitted.takes, strict=True))
    total = sympy.Integer(0)
    for state, name in names.items():
        kind, _, which = name.partition(":")
        if kind != "state" or int(which) >= len(kept):
            continue
        node = kept[int(which)]
        _, _, *rest = shape(axes.layout[node], 1, 1)
        every = ROWS[at_hand(unit, assignment, node).name]
        rows = sum((_moved(user, every, names) for user in state.users), sympy.Integer(0))
        total += B * rows * prod(rest) * axes.fake[node].element_size()
    if assignment.outside is not None:
        times = 2 if assignment.outside.renewed is not None else 1
        total += sum(B * A * times * _outside_bytes(each, axes) for each in unit.attentions)
    return sympy.expand(total)


def _moved(call: torch.fx.Node, every: sympy.Expr, names: dict[torch.fx.Node, str]) -> sympy.Expr:
    """Rows of its state that an operation of :mod:`dllm_compile.core.rows` reads or writes.

    Args:
        call: of the operation, whose first argument is the state.
        every: rows that the state holds.
        names: of the arguments of the written unit.
    """
    if call.target is row_ops.spare:
        return sympy.Integer(0)
    if call.target is row_ops.keep_rows:
        return E + F
    if call.target in (row_ops.read_all, row_ops.store_rows):
        return every
    if call.target is row_ops.merge_rows:
        return every if call.users else _indexed(call.args[1], names)
    if call.target is row_ops.replace_rows:
        return _indexed(call.args[1], names) - _indexed(call.args[2], names)
    assert call.target in (row_ops.read_rows, row_ops.former_rows, row_ops.changed_rows), call.target
    return _indexed(call.args[1], names)


def _indexed(index: Any, names: dict[torch.fx.Node, str]) -> sympy.Expr:
    """How many rows of a sequence an index names."""
    if index.target is row_ops.pick_index:
        return _indexed(index.args[1], names)
    name = names[index].removeprefix("index:").partition("@")[0]
    return ROWS["active" if name in ("written", "stored") else name]


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
