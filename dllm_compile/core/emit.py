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
from dataclasses import dataclass, field
from math import prod

import torch
import torch.fx

from . import rows as row_ops
from .arguments import attention
from .assignment import ACTIVE, KEYED, SALIENT, Assignment
from .attention_forms import AttentionForms
from .axes import Axes
from .demand import at_hand, rows_read
from .errors import GraphRefused
from .graph import open_sizes
from .layout import opened, position
from .rows import ALL, NONE, RowSet
from .units import Unit
from .writing import Choices


@dataclass
class Emitted:
    """A unit written for one assignment.

    Attributes:
        module: called with ``(stream, *inputs, *state, *indices)`` in the order of ``takes``; returns the outputs of
            the unit, then the picked rows ``[B, n]`` if there are any, or the salient ones and their number.
        takes: names of the arguments: ``"stream"``, ``"input:<i>"``, ``"state:<i>"``, ``"index:<set>"``,
            ``"index:<set>@<parent>"`` (positions counted in another set), ``"index:written"`` and
            ``"index:stored"`` (where the active rows are in the state of keys and of other roles), ``"counts"``,
            ``"bound"``, and the numbers ``"tokens"``, ``"batch"``, ``"selected"`` and ``"entries"``. Where entries are
            evicted, the last state has the positions of those kept.
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


def emit(unit: Unit, axes: Axes, assignment: Assignment, choices: Choices) -> Emitted:
    """Write ``unit`` for ``assignment``.

    Args:
        unit: a sealed unit.
        axes: what following the axes of its graph found.
        assignment: the row set of each role.
        choices: how the rows are chosen that are decided inside.

    Raises:
        GraphRefused: the unit has a shape that cannot be written for fewer rows.
    """
    return _Writer(unit, axes, assignment, choices).write()


class _Writer(AttentionForms):
    def write(self) -> Emitted:
        outs = [self._on(node, rows) for node, rows in zip(self.unit.outputs, self.leaves, strict=True)]
        for node, rows in self.anchors.items():
            if rows != NONE:
                self._available(node)  # a role nobody reads in this step still enters the state
        if self.assignment.pick:
            outs.append(self._choose()[1])
        if self.turned is not None:
            assert self.choices.turn is not None
            places = self.slot["index:active"], self.slot["index:stored"], self._tokens()
            turned = self._call(self.choices.turn, (self.turned, self.slot["bound"], *places))
            outs += [self._call(operator.getitem, (turned, i)) for i in (0, 1)]
        if self.assignment.evict is not None and self.keys:
            self._evict()
        self.graph.output(tuple(outs))
        takes = self.takes
        for name, node in self.slot.items():
            if not node.users and name not in ("tokens", "entries"):  # the state has one more than those
                self.graph.erase_node(node)
                takes = [t for t in takes if t != name]
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        return Emitted(module, takes, dict(self.computed), self.leaves, self.turned is not None)

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
        """``node`` on the active rows: the salient ones fresh, whether or not they enter the state, the others kept."""
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
        if node in self.axes.layout:
            args = open_sizes(node, args, self._layout(node), self._batch)
        if node.target is attention and self.assignment.salient:
            copied = self._delta(node, args, kwargs)
        elif node.target is attention and self.assignment.keys == KEYED:
            copied = self._sparse(args, kwargs)
        else:
            copied = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        copied.meta["stack_trace"] = node.meta.get("stack_trace", "")
        self.narrowed[node, NONE] = copied
        if node not in self.anchors:
            self.env[node] = copied
        return copied

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
