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
from math import prod
from typing import Any

import torch
import torch.fx

from . import rows as row_ops
from .arguments import attention
from .assignment import ACTIVE, KEYED, KEYS, PROMPT_SELECTED, RESPONSE, SALIENT, SELECTED, Assignment
from .axes import Axes
from .demand import COUNTED, at_hand, find_demand, rows_read
from .emit_attention import check_attention, write_attention, write_eviction
from .errors import GraphRefused
from .graph import open_sizes
from .layout import Layout, opened, position
from .rows import ALL, NONE, RowSet
from .units import Unit


@dataclass
class Emitted:
    """A unit written for one assignment.

    Attributes:
        module: called with ``(stream, *inputs, *state, *indices)`` in the order of ``takes``; returns the outputs of
            the unit, then what ``extras`` names.
        takes: names of the arguments: ``"stream"``, ``"input:<i>"``, ``"state:<i>"``, ``"index:<set>"``,
            ``"index:<set>@<parent>"`` (positions counted in another set), ``"index:written"`` and
            ``"index:stored"`` (where the active rows are in the state of keys and of other roles), ``"counts"``,
            ``"bound"``, ``"visible"``, ``"renew"``, and the numbers ``"tokens"``, ``"batch"``, ``"selected"``,
            ``"entries"`` and ``"held"``. Where entries are evicted, the state behind those of the roles has the
            positions of those kept. The last ones are of attention over the keys outside, where that is kept;
            ``"index:place"`` is where the active rows are in them.
        rows: the row set each live node was computed for; nodes that are not computed are missing.
        leaves: the row set of each output.
        extras: where further outputs are: ``"picked"``, the rows ``[B, n]`` of ``SELECTED``; ``"salient"``, the rows
            that are salient from here on, ``[B, K]`` places among the active ones, and ``"salient count"``, how many a
            sequence has, ``[B]``; ``"measured"``, what the operation of the assignment measured at the first attention;
            ``"judged"``, what that of a head said of its logits.
    """

    module: torch.fx.GraphModule
    takes: list[str]
    rows: dict[torch.fx.Node, RowSet] = field(default_factory=dict)
    leaves: list[RowSet] = field(default_factory=list)
    extras: dict[str, int] = field(default_factory=dict)


def emit(unit: Unit, axes: Axes, assignment: Assignment) -> Emitted:
    """Write ``unit`` for ``assignment``.

    Args:
        unit: a sealed unit.
        axes: what following the axes of its graph found.
        assignment: the row set of each role, and the operations that choose rows inside.

    Raises:
        GraphRefused: the unit has a shape that cannot be written for fewer rows.
    """
    return Writer(unit, axes, assignment).write()


class Writer:
    """A unit being written.

    Attributes:
        env: the written value of each node, on the rows of :meth:`_has`.
        fresh: the same on the rows that are computed.
        narrowed: the same on other rows.
        slot: the arguments, by the names in ``takes``.
        state: the state of each value that is kept.
        entries: positions of the kept entries; ``None`` where none are evicted.
        held: what is kept of attention over the keys outside, two tensors an attention call.
        contexts: of the active rows, now and before, and their similarity; where rows are salient.
        measured: what the assignment's operation measured at the first attention call.
    """

    def __init__(self, unit: Unit, axes: Axes, assignment: Assignment) -> None:
        self.unit, self.axes, self.assignment = unit, axes, assignment
        check_attention(unit, axes, assignment)
        self.graph = torch.fx.Graph()
        self.kept = unit.anchors(assignment.keep)
        self.keys = set(unit.anchors(KEYS))
        demand = find_demand(unit, axes, assignment)
        self.anchors, self.computed, self.leaves = demand.anchors, demand.computed, demand.leaves
        self.env: dict[torch.fx.Node, torch.fx.Node] = {}
        self.narrowed: dict[tuple[torch.fx.Node, RowSet], torch.fx.Node] = {}
        self.fresh: dict[torch.fx.Node, torch.fx.Node] = {}
        self.places: dict[torch.fx.Node, torch.fx.Node] = {}
        self.chosen: tuple[torch.fx.Node, torch.fx.Node] | None = None  # see :meth:`choose`
        self.changed: torch.fx.Node | None = None  # see :meth:`change`
        self.contexts: tuple[torch.fx.Node, ...] = ()
        self.measured: torch.fx.Node | None = None
        self._placeholders()

    def _placeholders(self) -> None:
        """Make the arguments that :class:`Emitted` describes."""
        self.takes: list[str] = []
        self.slot: dict[str, torch.fx.Node] = {}
        names = [*(["stream"] if self.unit.stream is not None else [])]
        names += [f"input:{i}" for i in range(len(self.unit.inputs))]
        names += [f"state:{i}" for i in range(len(self.kept))]
        compact = self.assignment.compact and bool(self.keys)
        names += [f"state:{len(self.kept)}"] if compact else []
        held = range(2 * len(self.unit.attentions) if self.assignment.outside is not None else 0)
        held_at = [f"state:{len(self.kept) + compact + i}" for i in held]
        names += held_at
        sets = self.assignment.sets()
        handed = sets - {ALL, NONE, SELECTED, PROMPT_SELECTED, KEYED}
        names += [f"index:{name}" for name in sorted(s.name for s in handed)]
        names += ["index:prompt"] if PROMPT_SELECTED in sets else []
        names += ["index:response", "counts"] if self.assignment.pick is not None else []
        names += ["index:response@keyed"] if RESPONSE in sets and compact else []
        names += ["index:written", "index:stored"] if ACTIVE in sets else []
        names += ["bound"] if self.assignment.salient else []
        names += ["visible"] if self.assignment.hides else []
        names += ["index:place"] if held else []
        names += ["renew"] if self.assignment.outside is not None and self.assignment.outside.renewed else []
        names += ["index:block", "index:outside", "index:fresh"] if self.assignment.evict is not None else []
        names += [f"index:{s.name}@{parent.name}" for s, parent in COUNTED if s in sets and parent in sets]
        names += ["tokens", "batch", "selected", *(["entries"] if compact else []), *(["held"] if held else [])]
        for name in dict.fromkeys(names):
            self.takes.append(name)
            self.slot[name] = self.graph.placeholder(re.sub(r"\W", "_", name))
        if self.unit.stream is not None:
            self.env[self.unit.stream] = self.slot["stream"]
        for i, node in enumerate(self.unit.inputs):
            self.env[node] = self.slot[f"input:{i}"]
        self.state = {n: self.slot[f"state:{i}"] for i, n in enumerate(self.kept)}
        self.entries = self.slot[f"state:{len(self.kept)}"] if compact else None
        self.held = [self.slot[name] for name in held_at]
        self.tokens = self.slot["tokens"]

    def write(self) -> Emitted:
        """Write the outputs, then what enters the state without being read, then the further outputs."""
        outs = [self.on(node, rows) for node, rows in zip(self.unit.outputs, self.leaves, strict=True)]
        for node, rows in self.anchors.items():
            if rows != NONE:
                self.available(node)  # a role nobody reads in this step still enters the state
        extras: dict[str, torch.fx.Node] = {}
        if self.assignment.pick is not None:
            extras["picked"] = self.choose()[1]
        if self.contexts:
            assert self.assignment.choose_salient is not None
            places = self.slot["index:active"], self.slot["index:stored"], self.tokens
            given = *self.contexts, self.slot["bound"], *places, *self.ranks(self.unit.attentions[0].node)
            both = self.call(self.assignment.choose_salient, given)
            extras["salient"], extras["salient count"] = self.pair(both)
        if self.measured is not None:
            extras["measured"] = self.measured
        if self.assignment.judge is not None and self.unit.logits is not None:
            rows = self.leaves[0] if self.unit.leaving else ALL
            extras["judged"] = self.call(self.assignment.judge, (self.on(self.unit.logits, rows),))
        if self.assignment.evict is not None and self.keys:
            write_eviction(self)
        self.graph.output((*outs, *extras.values()))
        takes = self.takes
        for name, node in self.slot.items():
            if not node.users and name not in ("tokens", "entries", "held"):  # the state has one more than those
                self.graph.erase_node(node)
                takes = [t for t in takes if t != name]
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        at = {name: len(outs) + i for i, name in enumerate(extras)}
        return Emitted(module, takes, dict(self.computed), self.leaves, at)

    # -- values on rows ------------------------------------------------------------------------------------------------

    def on(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """The value of ``node`` on exactly ``rows``: gathered where it is available on more."""
        if node in self.anchors and rows not in (ALL, NONE) and rows == self.computed.get(node):
            return self.raw(node)  # the fresh rows alone
        if node in self.anchors and (self.computed.get(node), rows) == (SALIENT, ACTIVE):
            return self._beside(node)
        base = self.available(node)
        have = self._has(node)
        if rows == have or node not in self.axes.live or position(self.axes.layout.get(node, ()), "T") is None:
            return base
        if (node, rows) not in self.narrowed:
            index = self.index(rows, have)
            self.narrowed[node, rows] = self.call(row_ops.gather_rows, (base, index, self.layout(node)))
        return self.narrowed[node, rows]

    def available(self, node: torch.fx.Node) -> torch.fx.Node:
        """The value of ``node`` on the rows of :meth:`_has`. Rows of a kept value are written to the state here."""
        if node in self.env:
            return self.env[node]
        if node not in self.anchors:
            return self.raw(node)
        rows, layout, state = self.anchors[node], self.layout(node), self.state[node]
        if self.unit.attentions and node is self.unit.attentions[0].value:
            if self.assignment.pick is not None:
                self.choose()  # compares with the state before it is overwritten
            if self.assignment.salient:
                self.change()
        if rows == NONE:
            value = self.call(row_ops.read_all, (state, layout))
        elif rows == ALL:
            value = self.call(row_ops.store_rows, (state, self.raw(node), layout))
        else:
            fresh = self.raw(node)
            if self.computed[node] != rows:
                fresh = self.call(row_ops.gather_rows, (fresh, self.index(rows, self.computed[node]), layout))
            value = self.call(row_ops.merge_rows, (state, self.written(node, rows), fresh, layout))
        self.env[node] = value
        return value

    def raw(self, node: torch.fx.Node) -> torch.fx.Node:
        """Compute ``node``, on the rows it is computed for."""
        if node in self.fresh:
            return self.fresh[node]
        rows = self.computed.get(node, ALL)

        def operand(n: torch.fx.Node) -> torch.fx.Node:
            if n in self.axes.live:
                value = self.on(n, rows_read(self.unit, self.axes, self.assignment, node, n, rows))
                return self.of_queries(node, n, value, rows)
            return self.constant(n, node, rows)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
        if node in self.axes.layout:
            args = open_sizes(node, args, self.layout(node), self.batch)
        if node.target is attention:
            copied = write_attention(self, node, args, kwargs)
        else:
            copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copied.meta["stack_trace"] = node.meta.get("stack_trace", "")
        self.fresh[node] = copied
        if node not in self.anchors:
            self.env[node] = copied
        return copied

    def constant(self, node: torch.fx.Node, user: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """A constant that ``user`` reads for ``rows``: whole; or its entries of these rows, where it has one for each
        token; or an ``arange`` over the tokens made for as many as there are rows.

        Raises:
            GraphRefused: it is made of the number of tokens in another way.
        """
        if rows not in (ALL, NONE) and user in self.axes.live:
            layout = self.axes.beside.get((user, node))
            if layout is not None:
                key = (node, RowSet(f"{rows.name}:{len(layout)}"))
                if key not in self.narrowed:
                    self.narrowed[key] = self.call(
                        row_ops.gather_rows, (self.plain(node), self.index(rows, ALL), opened(layout))
                    )
                return self.narrowed[key]
            if user in self.axes.unproven and node in self.axes.made:
                if node.target is not torch.arange or (len(node.args) > 1 and (node.args[0], *node.args[2:]) != (0,)):
                    raise GraphRefused("a constant sized by the tokens cannot be made for fewer", node)
                ((*factors,),) = opened(self.axes.made[node])
                several = prod(factor.size for factor in factors if factor.size)
                per_row = self.batch(several) if any((f.kind, f.size) == ("B", 0) for f in factors) else several
                count = self.call(torch.ops.aten.sym_size.int, (self.index(rows, ALL), 1))
                extent = self.call(operator.mul, (count, per_row))
                return self.graph.create_node("call_function", torch.arange, (extent,), node.kwargs)
        return self.plain(node)

    def of_queries(self, node: torch.fx.Node, read: torch.fx.Node, value: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """``value``, of which ``node`` reads every key (see :attr:`.axes.Axes.whole`), for the queries in ``rows``."""
        layout = self.axes.beside.get((node, read))
        if layout is None or rows in (ALL, NONE):
            return value
        return self.call(row_ops.gather_rows, (value, self.index(rows, ALL), opened(layout)))

    def _beside(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` on the active rows: the computed values of the salient ones (also those that are not written to the
        state), the kept values of the others.
        """
        if (node, ACTIVE) not in self.narrowed:
            at = self.slot["index:active"], self.index(SALIENT, ACTIVE)
            fresh, layout = self.raw(node), self.layout(node)
            self.narrowed[node, ACTIVE] = self.call(row_ops.replace_rows, (self.state[node], *at, fresh, layout))
        return self.narrowed[node, ACTIVE]

    def _has(self, node: torch.fx.Node) -> RowSet:
        """The rows that :meth:`available` returns."""
        if node is self.unit.stream:
            return self.assignment.enter
        return at_hand(self.unit, self.assignment, node) if node in self.anchors else self.computed.get(node, ALL)

    # -- positions -----------------------------------------------------------------------------------------------------

    def index(self, rows: RowSet, parent: RowSet) -> torch.fx.Node:
        """The positions ``[B, K]`` of ``rows`` among those of ``parent``.

        Raises:
            GraphRefused: no argument says them.
        """
        if rows == SELECTED:
            picked, at = self.choose()
            return picked if parent == RESPONSE else at
        if rows == PROMPT_SELECTED:
            return self.call(torch.cat, ([self.slot["index:prompt"], self.choose()[1]], 1))
        if rows == SALIENT:
            if parent == ACTIVE:
                return self.slot["index:salient"]
            return self._place(self.slot["index:active"], self.tokens)
        name = f"index:{rows.name}" if parent == ALL else f"index:{rows.name}@{parent.name}"
        if name not in self.slot:
            raise GraphRefused(f"rows {rows.name!r} cannot be found inside {parent.name!r}")
        return self.slot[name]

    def written(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """The rows ``[B, K]`` of the state of ``node`` that its ``rows`` are written to; the spare row for those that
        are not kept.
        """
        if rows in (ACTIVE, SALIENT):
            at = self.slot["index:written" if node in self.keys else "index:stored"]
            return at if rows == ACTIVE else self._place(at, self.call(row_ops.spare, (self.state[node],)))
        if node not in self.keys or rows not in (RESPONSE, SELECTED) or self.entries is None:
            return self.index(rows, ALL)
        slots = self.slot["index:response@keyed"]
        if rows == RESPONSE:
            return slots
        none = self.call(row_ops.spare, (self.state[node],))
        return self.call(row_ops.positions_of, (self.choose()[0], slots, self.slot["counts"], none))

    def _place(self, index: torch.fx.Node, none: Any) -> torch.fx.Node:
        """``index`` ``[B, Q]`` of the active rows, at the salient ones; ``none`` where an entry is no row."""
        if index not in self.places:
            self.places[index] = self.call(row_ops.pick_index, (index, self.slot["index:salient"], none))
        return self.places[index]

    def choose(self) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Pick the selected rows, once, by comparing the new values of the response with those of the last step.

        Returns:
            ``[B, n]`` int64 each: their places in the response, and their positions.
        """
        if self.chosen is None:
            assert self.assignment.pick is not None
            anchor = self.unit.attentions[0].value
            layout = self.layout(anchor)
            at = self.slot["index:response"]
            old = self.call(row_ops.read_rows, (self.state[anchor], self.written(anchor, RESPONSE)))
            fresh = self.raw(anchor)
            if self.computed[anchor] == ALL:
                fresh = self.call(row_ops.gather_rows, (fresh, at, layout))
            fresh = self.call(row_ops.rows_first, (fresh, layout, self.slot["batch"]))
            given = fresh, old, at, self.tokens, self.slot["selected"]
            picked = self.call(self.assignment.pick, (*given, *self.ranks(anchor)))
            self.chosen = picked, self.call(row_ops.positions_of, (picked, at, self.slot["counts"], self.tokens))
        return self.chosen

    def change(self) -> torch.fx.Node:
        """The values of the salient rows minus those in the state, computed once, before they are written to it.

        Raises:
            GraphRefused: the layer has several attention calls.
        """
        if self.changed is None:
            if len(self.unit.attentions) > 1:
                raise GraphRefused("a layer with several attention calls has no single context", self.unit.outputs[0])
            anchor = self.unit.attentions[0].value
            at, fresh, layout = self.written(anchor, SALIENT), self.raw(anchor), self.layout(anchor)
            if self.computed[anchor] != SALIENT:  # with the queries, by one projection
                fresh = self.call(row_ops.gather_rows, (fresh, self.index(SALIENT, self.computed[anchor]), layout))
            self.changed = self.call(row_ops.changed_rows, (self.state[anchor], at, fresh, layout))
        return self.changed

    # -- parts of the written graph ------------------------------------------------------------------------------------

    def ranks(self, *nodes: torch.fx.Node) -> tuple[str, ...]:
        """The process group over which an operation has to sum what it computes from ``nodes``; empty where each rank
        has all of them.

        Raises:
            GraphRefused: one of them differs between ranks, and is no shard.
        """
        found = {self.axes.shards.get(node) for node in nodes} - {None}
        if not found:
            return ()
        if found != {True} or self.axes.group is None:
            raise GraphRefused("rows are chosen by what differs between ranks, and is not a shard", nodes[0])
        return (self.axes.group,)

    def batch(self, times: int) -> torch.fx.Node:
        """The number of sequences, ``times`` over."""
        batch = self.slot["batch"]
        return batch if times == 1 else self.call(operator.mul, (batch, times))

    def layout(self, node: torch.fx.Node) -> Layout:
        """Layout of a value, for any number of tokens and sequences."""
        return opened(self.axes.layout[node])

    def call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Node:
        """A call of the written graph."""
        return self.graph.call_function(target, args)

    def pair(self, value: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
        """The two entries of a tuple that a call returns."""
        return self.call(operator.getitem, (value, 0)), self.call(operator.getitem, (value, 1))

    def plain(self, node: torch.fx.Node) -> torch.fx.Node:
        """Copy ``node``, which depends on no token, and what it is computed from."""
        if node not in self.env:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self.plain)
            self.env[node] = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        return self.env[node]
