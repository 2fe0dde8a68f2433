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
from .arguments import Attended, attention, attention_arguments, called
from .assignment import ACTIVE, KEYED, KEYS, PROMPT_SELECTED, RESPONSE, SALIENT, SELECTED, Assignment, Outside
from .axes import Axes
from .demand import COUNTED, at_hand, find_demand, rows_read
from .errors import GraphRefused
from .graph import open_sizes
from .layout import Layout, opened, position
from .rows import ALL, NONE, RowSet
from .state import outside_shape
from .units import MOVES, Unit


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
    return _Writer(unit, axes, assignment).write()


class _Writer:
    """A unit being written."""

    def __init__(self, unit: Unit, axes: Axes, assignment: Assignment) -> None:
        self.unit, self.axes, self.assignment = unit, axes, assignment
        self._check_calls()
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
        self.contexts: tuple[torch.fx.Node, ...] = ()  # of the active rows, now, before, and their similarity
        self.measured: torch.fx.Node | None = None
        self.inside = set(unit.nodes)
        self._placeholders()

    def _check_calls(self) -> None:
        """Attention that is several calls, or has other dimensions, stays as it is written, over all keys."""
        own = self.assignment
        others = (own.attend, own.evict, own.measure, own.outside, own.shared)
        if own.keys == ALL and not own.hides and all(each is None for each in others):
            return
        for each in self.unit.attentions:
            if each.scored:
                reason = "attention that is written by several calls reads all keys, and this method would change that"
                raise GraphRefused(reason, each.node)
            kinds = [[factor.kind for factor in dim] for dim in self.axes.layout[each.node]]
            if [kinds[0], *kinds[2:3], len(kinds)] != [["B"], ["T"], 4]:
                reason = "attention is not over [batch, heads, tokens, size], and this method would change its keys"
                raise GraphRefused(reason, each.node)

    def _placeholders(self) -> None:
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
        """Where in the state of ``node`` its ``rows`` are; the spare row for those that leave nothing behind."""
        if rows in (ACTIVE, SALIENT):
            at = self.slot["index:written" if node in self.keys else "index:stored"]
            return at if rows == ACTIVE else self._place(SALIENT, at, self._call(row_ops.spare, (self.state[node],)))
        if node not in self.keys or rows not in (RESPONSE, SELECTED) or self.entries is None:
            return self._index(rows, ALL)
        slots = self.slot["index:response@keyed"]
        if rows == RESPONSE:
            return slots
        none = self._call(row_ops.spare, (self.state[node],))
        return self._call(row_ops.positions_of, (self._choose()[0], slots, self.slot["counts"], none))

    def _choose(self) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Pick the selected rows once, by comparing the new values of the response with those of the last step."""
        if self.chosen is None:
            assert self.assignment.pick is not None
            anchor = self.unit.attentions[0].value
            layout = self._layout(anchor)
            at = self.slot["index:response"]
            old = self._call(row_ops.read_rows, (self.state[anchor], self._written(anchor, RESPONSE)))
            fresh = self._raw(anchor)
            if self.computed[anchor] == ALL:
                fresh = self._call(row_ops.gather_rows, (fresh, at, layout))
            fresh = self._call(row_ops.rows_first, (fresh, layout, self.slot["batch"]))
            given = fresh, old, at, self._tokens(), self.slot["selected"]
            picked = self._call(self.assignment.pick, (*given, *self._ranks(anchor)))
            self.chosen = picked, self._call(row_ops.positions_of, (picked, at, self.slot["counts"], self._tokens()))
        return self.chosen

    def _ranks(self, *nodes: torch.fx.Node) -> tuple[str, ...]:
        """The process group that an operation sums its statistic of values over; empty where each rank has all of them.

        Raises:
            GraphRefused: one of them differs between ranks, and is no shard.
        """
        found = {self.axes.shards.get(node) for node in nodes} - {None}
        if not found:
            return ()
        if found != {True} or self.axes.group is None:
            raise GraphRefused("rows are chosen by what differs between ranks, and is not a shard", nodes[0])
        return (self.axes.group,)

    def _tokens(self) -> torch.fx.Node:
        return self.slot["tokens"]

    def _batch(self, times: int) -> torch.fx.Node:
        batch = self.slot["batch"]
        return batch if times == 1 else self._call(operator.mul, (batch, times))

    def _layout(self, node: torch.fx.Node) -> Layout:
        """Layout of a value, for any number of tokens and sequences."""
        return opened(self.axes.layout[node])

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Node:
        return self.graph.call_function(target, args)

    def _plain(self, node: torch.fx.Node) -> torch.fx.Node:
        if node not in self.env:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._plain)
            self.env[node] = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        return self.env[node]

    # -- attention -----------------------------------------------------------------------------------------------------

    def _attention(self, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
        """An attention call: as it was, over the kept entries, or from the change of the salient values."""
        own = attention_arguments(node.args, node.kwargs).attn_mask
        if own in self.axes.live and self.axes.fake[own].shape[-2:-1] != (1,) and self.computed[node] != ALL:
            raise GraphRefused("an attention mask that is made of the tokens has a row for each query", node)
        if not self.assignment.masked:
            kwargs = {name: value for name, value in kwargs.items() if name != "attn_mask"}
        given = attention_arguments(args, kwargs)
        mask, entries = given.attn_mask, None
        if self.assignment.outside is not None:
            return self._in_two_parts(node, given, self.assignment.outside)
        if self.assignment.shared is not None:
            return self._beside_shared(node, given, *self.assignment.shared)
        if self.assignment.keys == KEYED:
            if mask is not None or self.assignment.gaps or self.assignment.hides:
                entries = self.entries if self.entries is None else self._seen(self.entries)
        elif self.assignment.alone:
            mask = self._among_active(own, mask)
            kwargs = {**kwargs, "attn_mask": mask} if mask is not None else kwargs
        elif self.assignment.hides:
            mask = self._call(row_ops.hide_keys, (mask, self.slot["visible"]))
            kwargs = {**kwargs, "attn_mask": mask}
        if self.assignment.measure is not None and self.measured is None:
            if self._ranks(node):
                raise GraphRefused("a mechanism measures the attention of all heads, and each rank has some", node)
            self.measured = self._call(self.assignment.measure, (*given[:2], mask, given.scale))
        if self.assignment.salient:
            mask = mask if entries is None else self._call(row_ops.mask_keys, (mask, entries, self._tokens()))
            return self._delta(node, args, mask, given.scale)
        if self.assignment.keys != KEYED:
            return self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        assert self.assignment.attend is not None
        return self._call(self.assignment.attend, (*given[:3], entries, self._tokens(), mask, given.scale))

    def _seen(self, positions: torch.fx.Node) -> torch.fx.Node:
        """Positions of keys; no row for those that are hidden."""
        if not self.assignment.hides:
            return positions
        return self._call(row_ops.visible_entries, (positions, self.slot["visible"], self._tokens()))

    def _among_active(self, own: Any, mask: Any) -> Any:
        """The mask of attention over the active rows alone.

        Args:
            own: the model's mask in its graph, if it has one.
            mask: what it is here: over the active keys where it is made of the tokens, else over all.
        """
        if mask is None and not self.assignment.hides:
            return None
        at = self._seen(self.slot["index:active"])
        if own not in self.axes.live:
            return self._call(row_ops.mask_keys, (mask, at, self._tokens()))
        there = self._call(operator.lt, (at, self._tokens()))
        return self._call(row_ops.hide_keys, (mask, there))

    def _in_two_parts(self, node: torch.fx.Node, given: Attended, outside: Outside) -> torch.fx.Node:
        """Attention over the keys computed now that enter the state, joined to what is kept of that over the others."""
        unit, attend = self.unit, self.assignment.attend
        assert attend is not None
        outside_shape(next(each for each in unit.attentions if each.node is node), self.axes)
        number = [each.node for each in unit.attentions].index(node)
        at, places = self.slot["index:stored"], self.slot["index:place"]
        held = [*self.held[2 * number : 2 * number + 2], places]
        own, more = given[:3], (self._tokens(), given.attn_mask, given.scale)
        if outside.renewed is None:
            kept = self._call(outside.kept, tuple(held))
        else:
            others = self._seen(self._call(row_ops.other_rows, (at, self._tokens())))
            part = self._both(self._call(attend, (*own, others, *more)))
            kept = self._call(outside.renewed, (*held, *part, self.slot["renew"]))
            read = attention_arguments(node.args, node.kwargs)
            pairs = zip(own[1:], (read.key, read.value), strict=True)
            gathered = [self._call(row_ops.gather_rows, (all_rows, at, self._layout(n))) for all_rows, n in pairs]
            own = own[0], *gathered
        part = self._both(self._call(attend, (*own, self._seen(at), *more)))
        return self._call(outside.joined, (*part, *self._both(kept), self.axes.fake[node].dtype))

    def _beside_shared(
        self, node: torch.fx.Node, given: Attended, attend_outside: Callable[..., Any], join: Callable[..., Any]
    ) -> torch.fx.Node:
        """Attention over the keys computed now, joined to that over the state of one sequence, which stays as it is."""
        attend, layer = self.assignment.attend, next(each for each in self.unit.attentions if each.node is node)
        assert attend is not None
        outside_shape(layer, self.axes)
        read = attention_arguments(node.args, node.kwargs)
        whole = [
            self._moved(start, end, self._call(row_ops.read_all, (self.state[start], self._layout(start))), int)
            for start, end in ((layer.key, read.key), (layer.value, read.value))
        ]
        at, more = self.slot["index:stored"], (self._tokens(), given.attn_mask, given.scale)
        others = self._seen(self._call(row_ops.other_rows, (at, self._tokens())))
        part = self._both(self._call(attend, (*given[:3], self._seen(at), *more)))
        kept = self._both(self._call(attend_outside, (given.query, *whole, others, *more)))
        return self._call(join, (*part, *kept, self.axes.fake[node].dtype))

    def _both(self, pair: torch.fx.Node) -> tuple[torch.fx.Node, torch.fx.Node]:
        return self._call(operator.getitem, (pair, 0)), self._call(operator.getitem, (pair, 1))

    def _delta(self, node: torch.fx.Node, args: tuple[Any, ...], mask: Any, scale: Any) -> torch.fx.Node:
        """Contexts of the active rows: exact for the salient ones, their former ones and the change for the others."""
        assert self.assignment.attend is not None
        att = self.unit.attentions[0]
        value = attention_arguments(node.args, node.kwargs).value
        change = self._moved(att.value, value, self._change(), linear=True)
        change = self._call(torch.transpose, (change, 1, 2))
        active, at = self.slot["index:active"], self.slot["index:salient"]
        former = self._call(row_ops.former_rows, (self.state[node], active, self._layout(node)))
        given = (*args[:3], change, self._written(att.key, SALIENT), at, former)
        both = self._call(self.assignment.attend, (*given, mask, scale, *self._ranks(node)))
        new, similarity = (self._call(operator.getitem, (both, i)) for i in (0, 1))
        self.contexts = new, former, similarity
        return new

    def _change(self) -> torch.fx.Node:
        """How far the values of the salient rows are from those in the state, before they enter it."""
        if self.changed is None:
            if len(self.unit.attentions) > 1:
                raise GraphRefused("a layer with several attention calls has no single context", self.unit.outputs[0])
            anchor = self.unit.attentions[0].value
            at, fresh, layout = self._written(anchor, SALIENT), self._raw(anchor), self._layout(anchor)
            if self.computed[anchor] != SALIENT:  # with the queries, by one projection
                fresh = self._call(row_ops.gather_rows, (fresh, self._index(SALIENT, self.computed[anchor]), layout))
            self.changed = self._call(row_ops.changed_rows, (self.state[anchor], at, fresh, layout))
        return self.changed

    def _moved(
        self,
        start: torch.fx.Node,
        end: torch.fx.Node,
        value: torch.fx.Node,
        sequences: Callable[[int], Any] | None = None,
        linear: bool = False,
    ) -> torch.fx.Node:
        """``value``, in place of ``start``, through the calls up to ``end``; ``sequences`` says sizes of so many times
        its sequences, where these are not those of the step.

        Raises:
            GraphRefused: a call on the way reads more than one value, or, where they have to be ``linear``, is none
                that only moves numbers.
        """
        if end is start:
            return value
        above = [n for n in end.all_input_nodes if n in self.axes.live]
        if len(above) != 1 or (linear and called(end) not in MOVES):
            raise GraphRefused("the values of attention are made of its keys, and not by views alone", end)
        (before,) = above
        moved = self._moved(start, before, value, sequences, linear)
        args, kwargs = torch.fx.map_arg((end.args, end.kwargs), lambda n: moved if n is before else self._plain(n))
        batch = self._batch if sequences is None else sequences
        args = open_sizes(end, args, self._layout(end), batch) if end in self.axes.layout else args
        return self.graph.create_node(end.op, end.target, args, kwargs)

    def _evict(self) -> None:
        """Choose the entries to keep, and keep them and the rows that later steps compute."""
        assert self.assignment.evict is not None
        assert self.entries is not None
        choose, *settings = self.assignment.evict
        call = self.unit.attentions[0].node
        given = attention_arguments(call.args, call.kwargs)
        rows = self.assignment.query
        query, key = self._on(given.query, rows), self._on(given.key, rows)
        own = given.attn_mask if self.assignment.masked else None
        mask = self._on(own, rows) if own in self.axes.live else None
        if mask is None and isinstance(own, torch.fx.Node):
            mask = self._constant(own, call, rows)
        if self.assignment.alone:
            mask = self._among_active(own, mask)
        elif self.assignment.hides:
            mask = self._call(row_ops.hide_keys, (mask, self.slot["visible"]))
        block, outside, fresh = (self.slot[f"index:{name}"] for name in ("block", "outside", "fresh"))
        ranks = self._ranks(given.query, given.key)
        at = self._call(choose, (query, key, mask, block, outside, self.entries, fresh, *settings, *ranks))
        positions = at
        if self.assignment.alone:  # chosen by their places among the active rows
            positions = self._call(row_ops.pick_index, (self.slot["index:active"], at, self._tokens()))
        self.graph.call_method("copy_", (self.entries, positions))
        for node in self.unit.anchors(KEYS):
            self._call(row_ops.keep_rows, (self.state[node], self._available(node), at, self._layout(node)))

    # -- values --------------------------------------------------------------------------------------------------------

    def write(self) -> Emitted:
        outs = [self._on(node, rows) for node, rows in zip(self.unit.outputs, self.leaves, strict=True)]
        for node, rows in self.anchors.items():
            if rows != NONE:
                self._available(node)  # a role nobody reads in this step still enters the state
        extras: dict[str, torch.fx.Node] = {}
        if self.assignment.pick is not None:
            extras["picked"] = self._choose()[1]
        if self.contexts:
            assert self.assignment.choose_salient is not None
            places = self.slot["index:active"], self.slot["index:stored"], self._tokens()
            given = *self.contexts, self.slot["bound"], *places, *self._ranks(self.unit.attentions[0].node)
            both = self._call(self.assignment.choose_salient, given)
            extras["salient"], extras["salient count"] = (self._call(operator.getitem, (both, i)) for i in (0, 1))
        if self.measured is not None:
            extras["measured"] = self.measured
        if self.assignment.judge is not None and self.unit.logits is not None:
            rows = self.leaves[0] if self.unit.leaving else ALL
            extras["judged"] = self._call(self.assignment.judge, (self._on(self.unit.logits, rows),))
        if self.assignment.evict is not None and self.keys:
            self._evict()
        self.graph.output((*outs, *extras.values()))
        takes = self.takes
        for name, node in self.slot.items():
            if not node.users and name not in ("tokens", "entries", "held"):  # the state has one more than those
                self.graph.erase_node(node)
                takes = [t for t in takes if t != name]
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        at = {name: len(outs) + i for i, name in enumerate(extras)}
        return Emitted(module, takes, dict(self.computed), self.leaves, at)

    def _on(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """``node`` on exactly ``rows``."""
        if node in self.anchors and rows not in (ALL, NONE) and rows == self.computed.get(node):
            return self._raw(node)  # the fresh rows alone
        if node in self.anchors and (self.computed.get(node), rows) == (SALIENT, ACTIVE):
            return self._beside(node)
        base = self._available(node)
        have = self._has(node)
        if rows == have or node not in self.axes.live or position(self.axes.layout.get(node, ()), "T") is None:
            return base
        if (node, rows) not in self.narrowed:
            index = self._index(rows, have)
            self.narrowed[node, rows] = self._call(row_ops.gather_rows, (base, index, self._layout(node)))
        return self.narrowed[node, rows]

    def _beside(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` on the active rows: fresh values for the salient rows (also those that are not written to the
        state), cached values for the others.
        """
        if (node, ACTIVE) not in self.narrowed:
            at = self.slot["index:active"], self._index(SALIENT, ACTIVE)
            fresh, layout = self._raw(node), self._layout(node)
            self.narrowed[node, ACTIVE] = self._call(row_ops.replace_rows, (self.state[node], *at, fresh, layout))
        return self.narrowed[node, ACTIVE]

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
        rows, layout, state = self.anchors[node], self._layout(node), self.state[node]
        if self.unit.attentions and node is self.unit.attentions[0].value:
            if self.assignment.pick is not None:
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
                value = self._on(n, rows_read(self.unit, self.axes, self.assignment, node, n, rows))
                return self._of_queries(node, n, value, rows)
            return self._constant(n, node, rows)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
        if node in self.axes.layout:
            args = open_sizes(node, args, self._layout(node), self._batch)
        if node.target is attention:
            copied = self._attention(node, args, kwargs)
        else:
            copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copied.meta["stack_trace"] = node.meta.get("stack_trace", "")
        self.narrowed[node, NONE] = copied
        if node not in self.anchors:
            self.env[node] = copied
        return copied

    def _of_queries(
        self, node: torch.fx.Node, read: torch.fx.Node, value: torch.fx.Node, rows: RowSet
    ) -> torch.fx.Node:
        """What ``node`` reads whole, for the queries of its rows alone; see :attr:`.axes.Axes.whole`."""
        layout = self.axes.beside.get((node, read))
        if layout is None or rows in (ALL, NONE):
            return value
        return self._call(row_ops.gather_rows, (value, self._index(rows, ALL), opened(layout)))

    def _constant(self, node: torch.fx.Node, user: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """A constant operand: whole, or the entries of the computed rows, or made anew at their number."""
        if rows not in (ALL, NONE) and user in self.axes.live:
            layout = self.axes.beside.get((user, node))
            if layout is not None:
                key = (node, RowSet(f"{rows.name}:{len(layout)}"))
                if key not in self.narrowed:
                    self.narrowed[key] = self._call(
                        row_ops.gather_rows, (self._plain(node), self._index(rows, ALL), opened(layout))
                    )
                return self.narrowed[key]
            if user in self.axes.unproven and node in self.axes.made:
                if node.target is not torch.arange or (len(node.args) > 1 and (node.args[0], *node.args[2:]) != (0,)):
                    raise GraphRefused("a constant sized by the tokens cannot be made for fewer", node)
                ((*factors,),) = opened(self.axes.made[node])
                several = prod(factor.size for factor in factors if factor.size)
                per_row = self._batch(several) if any((f.kind, f.size) == ("B", 0) for f in factors) else several
                count = self._call(torch.ops.aten.sym_size.int, (self._index(rows, ALL), 1))
                extent = self._call(operator.mul, (count, per_row))
                return self.graph.create_node("call_function", torch.arange, (extent,), node.kwargs)
        return self._plain(node)
