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

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx

from . import rows as row_ops
from .assignment import PROMPT_SELECTED, RESPONSE, SELECTED, Assignment
from .axes import Axes, attention
from .errors import GraphRefused
from .graph import free_tokens
from .layout import position, resized
from .rows import ALL, NONE, RowSet, join
from .units import Unit


@dataclass
class Emitted:
    """A unit written for one assignment.

    Attributes:
        module: called with ``(stream, *inputs, *state, *indices)`` in the order of ``takes``; returns the outputs of
            the unit, then the picked rows ``[B, n]`` if there are any.
        takes: names of the arguments: ``"stream"``, ``"input:<i>"``, ``"state:<i>"``, ``"index:<set>"``, ``"counts"``.
        rows: the row set each live node was computed for; nodes that are not computed are missing.
    """

    module: torch.fx.GraphModule
    takes: list[str]
    rows: dict[torch.fx.Node, RowSet] = field(default_factory=dict)


Pick = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor]


def emit(unit: Unit, axes: Axes, assignment: Assignment, sizes: dict[str, int], pick: Pick | None = None) -> Emitted:
    """Write ``unit`` for ``assignment``.

    Args:
        unit: a sealed unit.
        axes: what following the axes of its graph found.
        assignment: the row set of each role.
        sizes: rows in each named set that occurs (``"response"``, ``"selected"``, ...).
        pick: chooses the selected rows; see :func:`dllm_compile.kernels.row_change.pick_rows`.

    Raises:
        GraphRefused: the unit has a shape that cannot be written for fewer rows.
    """
    return _Writer(unit, axes, assignment, sizes, pick).write()


class _Writer:
    def __init__(
        self, unit: Unit, axes: Axes, assignment: Assignment, sizes: dict[str, int], pick: Pick | None
    ) -> None:
        self.unit, self.axes, self.assignment, self.sizes, self.pick = unit, axes, assignment, sizes, pick
        self.graph = torch.fx.Graph()
        self.anchors = self._anchor_rows()
        self.computed = self._demand()
        self.env: dict[torch.fx.Node, torch.fx.Node] = {}
        self.narrowed: dict[tuple[torch.fx.Node, RowSet], torch.fx.Node] = {}
        self.chosen: tuple[torch.fx.Node, torch.fx.Node] | None = None
        self.inside = set(unit.nodes)
        self._placeholders()

    # -- which rows ---------------------------------------------------------------------------------------------

    def _anchor_rows(self) -> dict[torch.fx.Node, RowSet]:
        if not self.assignment.keep:
            return {}
        rows: dict[torch.fx.Node, RowSet] = {}
        for att in self.unit.attentions:
            rows[att.key] = join(rows.get(att.key, NONE), self.assignment.key)
            rows[att.value] = join(rows.get(att.value, NONE), self.assignment.value)
        for branch in self.unit.branches:
            rows[branch.node] = self.assignment.query
        return rows

    def _demand(self) -> dict[torch.fx.Node, RowSet]:
        """Rows each live node is computed for: what its users ask for, or what its role says."""
        wanted: dict[torch.fx.Node, RowSet] = {}
        for i, node in enumerate(self.unit.outputs):
            wanted[node] = join(wanted.get(node, NONE), self.assignment.leave if i == 0 else ALL)
        computed: dict[torch.fx.Node, RowSet] = {}
        live = [node for node in self.unit.nodes if node in self.axes.live]
        for node in reversed(live):
            rows = self.anchors.get(node, wanted.get(node, NONE))
            if rows == NONE:
                continue
            computed[node] = rows
            for operand in node.all_input_nodes:
                if operand in self.axes.live:
                    asked = ALL if self._reads_all(node, operand) else rows
                    wanted[operand] = join(wanted.get(operand, NONE), asked)
        for node in live:
            for operand in node.all_input_nodes:
                if node in computed and operand in computed and operand not in self.axes.layout:
                    computed[node] = computed[operand]  # parts of a split have the rows of the whole
        enter = self.assignment.enter
        if self.unit.stream is not None and not wanted.get(self.unit.stream, NONE).within(enter):
            raise GraphRefused(f"rows outside {enter.name!r} of the residual stream are needed", self.unit.stream)
        return computed

    def _reads_all(self, node: torch.fx.Node, operand: torch.fx.Node) -> bool:
        """Attention reads every key and value; a call without a token axis reads every row."""
        if node.target is attention:
            return operand is not node.args[0]
        layout = self.axes.layout.get(node)
        no_tokens = layout is not None and position(layout, "T") is None
        return no_tokens and self.axes.layout.get(operand) is not None and not self.unit.mixing(self.axes)

    # -- arguments ----------------------------------------------------------------------------------------------

    def _placeholders(self) -> None:
        self.takes: list[str] = []
        self.slot: dict[str, torch.fx.Node] = {}
        names = [*(["stream"] if self.unit.stream is not None else [])]
        names += [f"input:{i}" for i in range(len(self.unit.inputs))]
        names += [f"state:{i}" for i in range(len(self.unit.anchors()) if self.assignment.keep else 0)]
        sets = self.assignment.sets()
        names += [
            f"index:{s.name}"
            for s in sorted(sets, key=lambda s: s.name)
            if s not in (ALL, NONE, SELECTED, PROMPT_SELECTED)
        ]
        names += ["index:prompt"] if PROMPT_SELECTED in sets else []
        names += ["index:response", "counts"] if self.assignment.pick else []
        for name in dict.fromkeys(names):
            self.takes.append(name)
            self.slot[name] = self.graph.placeholder(name.replace(":", "_").replace("+", "_"))
        if self.unit.stream is not None:
            self.env[self.unit.stream] = self.slot["stream"]
        for i, node in enumerate(self.unit.inputs):
            self.env[node] = self.slot[f"input:{i}"]
        self.state = {n: self.slot[f"state:{i}"] for i, n in enumerate(self.unit.anchors()) if self.assignment.keep}

    def _index(self, rows: RowSet, parent: RowSet) -> torch.fx.Node:
        """Positions of ``rows`` counted in ``parent``."""
        if rows == SELECTED:
            picked, at = self._choose()
            if parent == RESPONSE:
                return picked
            return at
        if rows == PROMPT_SELECTED:
            return self._call(torch.cat, ([self.slot["index:prompt"], self._choose()[1]], 1))
        if parent != ALL:
            raise GraphRefused(f"rows {rows.name!r} cannot be found inside {parent.name!r}")
        return self.slot[f"index:{rows.name}"]

    def _choose(self) -> tuple[torch.fx.Node, torch.fx.Node]:
        """Pick the selected rows once, by comparing the new values of the response with those of the last step."""
        if self.chosen is None:
            assert self.pick is not None
            anchor = self.unit.attentions[0].value
            layout = self.axes.layout[anchor]
            at = self.slot["index:response"]
            old = self._call(row_ops.read_rows, (self.state[anchor], at))
            fresh = self._raw(anchor)
            if self.computed[anchor] == ALL:
                fresh = self._call(row_ops.gather_rows, (fresh, at, layout))
            fresh = self._call(row_ops.rows_first, (fresh, layout))
            picked = self._call(self.pick, (fresh, old, at, self._tokens(), self.sizes["selected"]))
            self.chosen = picked, self._call(row_ops.positions_of, (picked, at, self.slot["counts"], self._tokens()))
        return self.chosen

    def _tokens(self) -> int:
        layout = self.axes.layout[self.unit.attentions[0].value]
        return next(f.size for dim in layout for f in dim if f.kind == "T")

    # -- values -------------------------------------------------------------------------------------------------

    def write(self) -> Emitted:
        outs = [self._on(node, self.assignment.leave if i == 0 else ALL) for i, node in enumerate(self.unit.outputs)]
        for node, rows in self.anchors.items():
            if rows != NONE:
                self._available(node)  # a role nobody reads in this step still enters the state
        if self.assignment.pick:
            outs.append(self._choose()[1])
        self.graph.output(tuple(outs))
        module = torch.fx.GraphModule(torch.nn.Module(), self.graph)
        takes = self.takes
        for name, node in self.slot.items():
            if not node.users:
                self.graph.erase_node(node)
                takes = [t for t in takes if t != name]
        module.recompile()
        return Emitted(module, takes, dict(self.computed))

    def _call(self, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Node:
        return self.graph.call_function(target, args)

    def _on(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """``node`` on exactly ``rows``."""
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
        return ALL if node in self.anchors else self.computed.get(node, ALL)

    def _available(self, node: torch.fx.Node) -> torch.fx.Node:
        if node in self.env:
            return self.env[node]
        if node not in self.anchors:
            return self._raw(node)
        rows, layout, state = self.anchors[node], self.axes.layout[node], self.state[node]
        if self.assignment.pick and node is self.unit.attentions[0].value:
            self._choose()  # compares with the state before it is overwritten
        if rows == NONE:
            value = self._call(row_ops.read_all, (state, layout))
        elif rows == ALL:
            value = self._call(row_ops.store_rows, (state, self._raw(node), layout))
        else:
            fresh, index = self._raw(node), self._index(rows, ALL)
            if self.computed[node] != rows:
                fresh = self._call(row_ops.gather_rows, (fresh, self._index(rows, self.computed[node]), layout))
            value = self._call(row_ops.merge_rows, (state, index, fresh, layout))
        self.env[node] = value
        return value

    def _raw(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` itself, on the rows it is computed for."""
        if (node, NONE) in self.narrowed:
            return self.narrowed[node, NONE]
        rows = self.computed.get(node, ALL)

        def operand(n: torch.fx.Node) -> torch.fx.Node:
            if n in self.axes.live:
                return self._on(n, ALL if self._reads_all(node, n) else rows)
            return self._constant(n, node, rows)

        args, kwargs = torch.fx.map_arg((node.args, node.kwargs), operand)
        if rows != ALL and node in self.axes.layout:
            args = free_tokens(node, args, self.axes.layout[node])
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
                        row_ops.gather_rows, (self._plain(node), self._index(rows, ALL), layout)
                    )
                return self.narrowed[key]
            if user in self.axes.unproven and node in self.axes.made:
                (extent,) = resized(self.axes.made[node], self.sizes[rows.name])
                if node.target is not torch.arange or len(node.args) != 1:
                    raise GraphRefused("a constant sized by the tokens cannot be made for fewer", node)
                return self.graph.create_node("call_function", torch.arange, (extent,), node.kwargs)
        return self._plain(node)

    def _plain(self, node: torch.fx.Node) -> torch.fx.Node:
        if node not in self.env:
            args, kwargs = torch.fx.map_arg((node.args, node.kwargs), self._plain)
            self.env[node] = self.graph.create_node(node.op, node.target, args, kwargs, node.name)
        return self.env[node]
