"""Write a unit again for the rows that a step computes.

    before:  a = norm(x) ; q, k, v = a Wq, a Wk, a Wv ; A = attention(q, k, v) Wo ; x = x + A        (all rows)
    after:   v' = norm(x[response]) Wv ; S = changed_rows(v', state.v) ; state.v[response] = v'
             q = a[S] Wq ; state.k[S] = a[S] Wk ; state.A[S] = attention(q, state.k, state.v) Wo
             x = x + state.A

An :class:`Assignment` gives the row set of each role. The rest follows: a value is computed for the rows its users ask
for, ``gather_rows`` stands where a user asks for fewer, ``merge_rows`` where a role's rows enter the state, and sizes
along the token axis are written anew. Nothing else of the unit changes.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from . import rows as row_ops
from .assignment import ACTIVE, KEYED, KEYS, PROMPT_SELECTED, RESPONSE, SALIENT, SELECTED, Assignment
from .axes import Axes, attention, attention_mask
from .demand import COUNTED, at_hand, find_demand, rows_read
from .errors import GraphRefused
from .graph import free_tokens
from .layout import position, resized
from .rows import ALL, NONE, RowSet
from .state import tokens
from .units import Unit


@dataclass
class Emitted:
    """A unit written for one assignment.

    Attributes:
        module: called with ``(stream, *inputs, *state, *indices)`` in the order of ``takes``; returns the outputs of
            the unit, then the picked rows ``[B, n]`` if there are any, or the salient ones and their number.
        takes: names of the arguments: ``"stream"``, ``"input:<i>"``, ``"state:<i>"``, ``"index:<set>"``,
            ``"index:<set>@<parent>"`` (positions counted in another set), ``"index:written"``, ``"counts"``,
            ``"bound"``.
        rows: the row set each live node was computed for; nodes that are not computed are missing.
        leaves: the row set of each output.
        turns: whether the last two outputs are the rows that are salient from here on, ``[B, K]`` places among the
            active ones, and how many a sequence has, ``[B]``.
    """

    module: torch.fx.GraphModule
    takes: list[str]
    rows: dict[torch.fx.Node, RowSet] = field(default_factory=dict)
    leaves: list[RowSet] = field(default_factory=list)
    turns: bool = False


@dataclass(frozen=True)
class Choices:
    """How rows are chosen inside a unit.

    Attributes:
        pick: chooses the selected rows; see :func:`dllm_compile.kernels.row_change.pick_rows`.
        keep: chooses the entries to keep; see :func:`dllm_compile.kernels.kept_entries.kept_entries`.
        attend: attention of all rows from the change of the salient ones, and how far each context turned; see
            :func:`dllm_compile.kernels.delta_attention.delta_attention`.
        turn: chooses the salient rows by that; see :func:`dllm_compile.kernels.salient_rows.salient_rows`.
    """

    pick: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor] | None = None
    keep: Callable[..., torch.Tensor] | None = None
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    turn: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


def emit(unit: Unit, axes: Axes, assignment: Assignment, sizes: dict[str, int], choices: Choices) -> Emitted:
    """Write ``unit`` for ``assignment``.

    Args:
        unit: a sealed unit.
        axes: what following the axes of its graph found.
        assignment: the row set of each role.
        sizes: rows in each named set that occurs (``"response"``, ``"selected"``, ...).
        choices: how the rows are chosen that are decided inside.

    Raises:
        GraphRefused: the unit has a shape that cannot be written for fewer rows.
    """
    return _Writer(unit, axes, assignment, sizes, choices).write()


class _Writer:
    def __init__(self, unit: Unit, axes: Axes, assignment: Assignment, sizes: dict[str, int], choices: Choices) -> None:
        self.unit, self.axes, self.assignment, self.sizes, self.choices = unit, axes, assignment, sizes, choices
        self.graph = torch.fx.Graph()
        self.kept = unit.anchors(assignment.keep)
        self.keys = set(unit.anchors(KEYS))
        demand = find_demand(unit, axes, assignment)
        self.anchors, self.computed, self.leaves = demand.anchors, demand.computed, demand.leaves
        self.env: dict[torch.fx.Node, torch.fx.Node] = {}
        self.narrowed: dict[tuple[torch.fx.Node, RowSet], torch.fx.Node] = {}
        self.places: dict[RowSet, torch.fx.Node] = {}
        self.chosen: tuple[torch.fx.Node, torch.fx.Node] | None = None
        self.changed: torch.fx.Node | None = None
        self.turned: torch.fx.Node | None = None
        self.inside = set(unit.nodes)
        self._placeholders()

    # -- arguments ----------------------------------------------------------------------------------------------

    def _placeholders(self) -> None:
        self.takes: list[str] = []
        self.slot: dict[str, torch.fx.Node] = {}
        names = [*(["stream"] if self.unit.stream is not None else [])]
        names += [f"input:{i}" for i in range(len(self.unit.inputs))]
        names += [f"state:{i}" for i in range(len(self.kept))]
        compact = self.assignment.compact and bool(self.keys)
        names += [f"state:{len(self.kept)}"] if compact else []
        sets = self.assignment.sets()
        handed = sets - {ALL, NONE, SELECTED, PROMPT_SELECTED, KEYED}
        names += [f"index:{name}" for name in sorted(s.name for s in handed)]
        names += ["index:prompt"] if PROMPT_SELECTED in sets else []
        names += ["index:response", "counts"] if self.assignment.pick else []
        names += ["index:response@keyed"] if RESPONSE in sets and compact else []
        names += ["index:written"] if ACTIVE in sets else []
        names += ["bound"] if self.assignment.salient else []
        names += ["index:block", "index:outside", "index:fresh"] if self.assignment.evict is not None else []
        names += [f"index:{s.name}@{parent.name}" for s, parent in COUNTED if s in sets and parent in sets]
        for name in dict.fromkeys(names):
            self.takes.append(name)
            self.slot[name] = self.graph.placeholder(re.sub(r"\W", "_", name))
        if self.unit.stream is not None:
            self.env[self.unit.stream] = self.slot["stream"]
        for i, node in enumerate(self.unit.inputs):
            self.env[node] = self.slot[f"input:{i}"]
        self.state = {n: self.slot[f"state:{i}"] for i, n in enumerate(self.kept)}
        self.entries = self.slot[f"state:{len(self.kept)}"] if compact else None

    def _index(self, rows: RowSet, parent: RowSet) -> torch.fx.Node:
        """Positions of ``rows`` counted in ``parent``."""
        if rows == SELECTED:
            picked, at = self._choose()
            if parent == RESPONSE:
                return picked
            return at
        if rows == PROMPT_SELECTED:
            return self._call(torch.cat, ([self.slot["index:prompt"], self._choose()[1]], 1))
        if rows == SALIENT:
            if parent == ACTIVE:
                return self.slot["index:salient"]
            return self._place(SALIENT, self.slot["index:active"], self._tokens())
        name = f"index:{rows.name}" if parent == ALL else f"index:{rows.name}@{parent.name}"
        if name not in self.slot:
            raise GraphRefused(f"rows {rows.name!r} cannot be found inside {parent.name!r}")
        return self.slot[name]

    def _place(self, rows: RowSet, index: torch.fx.Node, none: Any) -> torch.fx.Node:
        """``index`` of the active rows, for the salient among them."""
        key = RowSet(f"{rows.name}@{index.name}")
        if key not in self.places:
            self.places[key] = self._call(row_ops.pick_index, (index, self.slot["index:salient"], none))
        return self.places[key]

    def _written(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """Where in the state of ``node`` its ``rows`` are."""
        if node not in self.keys or rows not in (ACTIVE, SALIENT, RESPONSE, SELECTED):
            return self._index(rows, ALL)
        if rows == ACTIVE:
            return self.slot["index:written"]
        if rows == SALIENT:
            return self._place(SALIENT, self.slot["index:written"], self._call(row_ops.spare, (self.state[node],)))
        if self.entries is None:
            return self._index(rows, ALL)
        slots = self.slot["index:response@keyed"]
        if rows == RESPONSE:
            return slots
        none = self._call(row_ops.spare, (self.state[node],))
        return self._call(row_ops.positions_of, (self._choose()[0], slots, self.slot["counts"], none))

    def _choose(self) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Pick the selected rows once, by comparing the new values of the response with those of the last step."""
        if self.chosen is None:
            assert self.choices.pick is not None
            anchor = self.unit.attentions[0].value
            layout = self.axes.layout[anchor]
            at = self.slot["index:response"]
            old = self._call(row_ops.read_rows, (self.state[anchor], self._written(anchor, RESPONSE)))
            fresh = self._raw(anchor)
            if self.computed[anchor] == ALL:
                fresh = self._call(row_ops.gather_rows, (fresh, at, layout))
            fresh = self._call(row_ops.rows_first, (fresh, layout))
            picked = self._call(self.choices.pick, (fresh, old, at, self._tokens(), self.sizes["selected"]))
            self.chosen = picked, self._call(row_ops.positions_of, (picked, at, self.slot["counts"], self._tokens()))
        return self.chosen

    def _tokens(self) -> int:
        return tokens(self.axes.layout[self.unit.outputs[0]])

    # -- values -------------------------------------------------------------------------------------------------

    def write(self) -> Emitted:
        outs = [self._on(node, rows) for node, rows in zip(self.unit.outputs, self.leaves, strict=True)]
        for node, rows in self.anchors.items():
            if rows != NONE:
                self._available(node)  # a role nobody reads in this step still enters the state
        if self.assignment.pick:
            outs.append(self._choose()[1])
        if self.turned is not None:
            assert self.choices.turn is not None
            turned = self._call(
                self.choices.turn, (self.turned, self.slot["bound"], self.slot["index:active"], self._tokens())
            )
            outs += [self._call(operator.getitem, (turned, i)) for i in (0, 1)]
        if self.assignment.evict is not None and self.keys:
            self._evict()
        self.graph.output(tuple(outs))
        takes = self.takes
        for name, node in self.slot.items():
            if not node.users:
                self.graph.erase_node(node)
                takes = [t for t in takes if t != name]
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        return Emitted(module, takes, dict(self.computed), self.leaves, self.turned is not None)

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Node:
        return self.graph.call_function(target, args)

    def _on(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """``node`` on exactly ``rows``."""
        if node in self.anchors and rows not in (ALL, NONE) and rows == self.computed.get(node):
            return self._raw(node)  # the fresh rows alone
        base = self._available(node)
        have = self._has(node)
        if rows == have or node not in self.axes.live or position(self.axes.layout.get(node, ()), "T") is None:
            return base
        if (node, rows) not in self.narrowed:
            index = self._index(rows, have)
            self.narrowed[node, rows] = self._call(row_ops.gather_rows, (base, index, self.axes.layout[node]))
        return self.narrowed[node, rows]

    def _has(self, node: torch.fx.Node) -> RowSet:
        """Rows on which the value of ``node`` is at hand."""
        if node is self.unit.stream:
            return self.assignment.enter
        return at_hand(self.unit, self.assignment, node) if node in self.anchors else self.computed.get(node, ALL)

    def _available(self, node: torch.fx.Node) -> torch.fx.Node:
        if node in self.env:
            return self.env[node]
        if node not in self.anchors:
            return self._raw(node)
        rows, layout, state = self.anchors[node], self.axes.layout[node], self.state[node]
        if self.unit.attentions and node is self.unit.attentions[0].value:
            if self.assignment.pick:
                self._choose()  # compares with the state before it is overwritten
            if self.assignment.salient:
                self._change()
        if rows == NONE:
            value = self._call(row_ops.read_all, (state, layout))
        elif rows == ALL:
            value = self._call(row_ops.store_rows, (state, self._raw(node), layout))
        else:
            fresh = self._raw(node)
            if self.computed[node] != rows:
                fresh = self._call(row_ops.gather_rows, (fresh, self._index(rows, self.computed[node]), layout))
            value = self._call(row_ops.merge_rows, (state, self._written(node, rows), fresh, layout))
        self.env[node] = value
        return value

    def _raw(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` itself, on the rows it is computed for."""
        if (node, NONE) in self.narrowed:
            return self.narrowed[node, NONE]
        rows = self.computed.get(node, ALL)

        def operand(n: torch.fx.Node) -> torch.fx.Node:
            if n in self.axes.live:
                return self._on(n, rows_read(self.unit, self.axes, self.assignment, node, n, rows))
            return self._constant(n, node, rows)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
        if rows != ALL and node in self.axes.layout:
            args = free_tokens(node, args, self.axes.layout[node])
        if node.target is attention and self.assignment.keys == KEYED:
            args, kwargs = self._mask_keys(args, kwargs)
        if node.target is attention and self.assignment.salient:
            copied = self._delta(node, args, kwargs)
        else:
            copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copied.meta["stack_trace"] = node.meta.get("stack_trace", "")
        self.narrowed[node, NONE] = copied
        if node not in self.anchors:
            self.env[node] = copied
        return copied

    def _mask_keys(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of attention for the keys it reads: the mask follows them, and no row is attended to."""
        mask = attention_mask(args, kwargs)
        if mask is None and not self.assignment.gaps:
            return args, kwargs
        mask = self._call(row_ops.mask_keys, (mask, self.entries, self._tokens()))
        rest = {name: value for name, value in kwargs.items() if name != "attn_mask"}
        return (*args[:3], mask, *args[4:]), rest

    def _delta(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        """Contexts of the active rows: exact for the salient ones, their former ones and the change for the others."""
        assert self.choices.attend is not None
        att = self.unit.attentions[0]
        change = self._moved(att.value, node.args[2], self._change())  # type: ignore[arg-type]
        change = self._call(torch.transpose, (change, 1, 2))
        active, at = self.slot["index:active"], self.slot["index:salient"]
        former = self._call(row_ops.former_rows, (self.state[node], active, self.axes.layout[node]))
        given = (*args[:3], change, self._written(att.key, SALIENT), at, former)
        both = self._call(self.choices.attend, (*given, attention_mask(args, kwargs), kwargs.get("scale")))
        self.turned = self._call(operator.getitem, (both, 1))
        return self._call(operator.getitem, (both, 0))

    def _change(self) -> torch.fx.Node:
        """How far the values of the salient rows are from those in the state, before they enter it."""
        if self.changed is None:
            if len(self.unit.attentions) > 1:
                raise GraphRefused("a layer with several attention calls has no single context", self.unit.outputs[0])
            anchor = self.unit.attentions[0].value
            at, fresh = self._written(anchor, SALIENT), self._raw(anchor)
            self.changed = self._call(row_ops.changed_rows, (self.state[anchor], at, fresh, self.axes.layout[anchor]))
        return self.changed

    def _moved(self, start: torch.fx.Node, end: torch.fx.Node, value: torch.fx.Node) -> torch.fx.Node:
        """``value``, in place of ``start``, through the views and repeats up to ``end``."""
        if end is start:
            return value
        (before,) = [n for n in end.all_input_nodes if n in self.axes.live]
        moved = self._moved(start, before, value)
        args, kwargs = torch.fx.map_arg((end.args, end.kwargs), lambda n: moved if n is before else self._plain(n))
        args = free_tokens(end, args, self.axes.layout[end]) if end in self.axes.layout else args
        return self.graph.create_node(end.op, end.target, args, kwargs)

    def _evict(self) -> None:
        """Choose the entries to keep, and keep them and the rows that later steps compute."""
        assert self.choices.keep is not None
        assert self.assignment.evict is not None
        assert self.entries is not None
        call = self.unit.attentions[0].node
        query, key = (self._on(n, ALL) for n in call.args[:2])  # type: ignore[arg-type]
        mask = attention_mask(call.args, call.kwargs)
        mask = self._plain(mask) if isinstance(mask, torch.fx.Node) else None
        block, outside, fresh = (self.slot[f"index:{name}"] for name in ("block", "outside", "fresh"))
        chosen = (query, key, mask, block, outside, self.entries, fresh, *self.assignment.evict)
        at = self._call(self.choices.keep, chosen)
        self._call(torch.Tensor.copy_, (self.entries, at))
        for node in self.unit.anchors(KEYS):
            self._call(row_ops.keep_rows, (self.state[node], self._available(node), at, self.axes.layout[node]))

    def _constant(self, node: torch.fx.Node, user: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """A constant operand: whole, or the entries of the computed rows, or made anew at their number."""
        if rows not in (ALL, NONE) and user in self.axes.live:
            layout = self.axes.beside.get((user, node))
            if layout is not None:
                key = (node, RowSet(f"{rows.name}:{len(layout)}"))
                if key not in self.narrowed:
                    self.narrowed[key] = self._call(
                        row_ops.gather_rows, (self._plain(node), self._index(rows, ALL), layout)
                    )
                return self.narrowed[key]
            if user in self.axes.unproven and node in self.axes.made:
                if node.target is not torch.arange or len(node.args) != 1:
                    raise GraphRefused("a constant sized by the tokens cannot be made for fewer", node)
                (per_row,) = resized(self.axes.made[node], 1)
                count = self._call(torch.ops.aten.sym_size.int, (self._index(rows, ALL), 1))
                extent = self._call(operator.mul, (count, per_row))
                return self.graph.create_node("call_function", torch.arange, (extent,), node.kwargs)
        return self._plain(node)

    def _plain(self, node: torch.fx.Node) -> torch.fx.Node:
        if node not in self.env:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._plain)
            self.env[node] = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        return self.env[node]
