"""What every way to write a unit shares: its arguments, and where in the state and in one another rows are."""

from __future__ import annotations

import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from . import rows as row_ops
from .assignment import ACTIVE, KEYED, KEYS, PROMPT_SELECTED, RESPONSE, SALIENT, SELECTED, Assignment
from .axes import Axes
from .demand import COUNTED, find_demand
from .errors import GraphRefused
from .layout import Layout, opened
from .rows import ALL, NONE, RowSet
from .units import Unit


@dataclass(frozen=True)
class Choices:
    """How rows are chosen inside a unit.

    Attributes:
        pick: chooses the selected rows; see :func:`dllm_compile.kernels.row_change.pick_rows`.
        keep: chooses the entries to keep; see :func:`dllm_compile.kernels.kept_entries.kept_entries`.
        sparse: attention over kept entries and fresh rows; see
            :func:`dllm_compile.kernels.sparse_attention.sparse_attention`.
        attend: attention of all rows from the change of the salient ones, and how far each context turned; see
            :func:`dllm_compile.kernels.delta_attention.delta_attention`.
        turn: chooses the salient rows by that; see :func:`dllm_compile.kernels.salient_rows.salient_rows`.
    """

    pick: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, int, int], torch.Tensor] | None = None
    keep: Callable[..., torch.Tensor] | None = None
    sparse: Callable[..., torch.Tensor] | None = None
    attend: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None
    turn: Callable[..., tuple[torch.Tensor, torch.Tensor]] | None = None


class Writing(ABC):
    """A unit being written; see :func:`dllm_compile.core.emit.emit`."""

    def __init__(self, unit: Unit, axes: Axes, assignment: Assignment, choices: Choices) -> None:
        self.unit, self.axes, self.assignment, self.choices = unit, axes, assignment, choices
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
        names += ["index:written", "index:stored"] if ACTIVE in sets else []
        names += ["bound"] if self.assignment.salient else []
        names += ["index:block", "index:outside", "index:fresh"] if self.assignment.evict is not None else []
        names += [f"index:{s.name}@{parent.name}" for s, parent in COUNTED if s in sets and parent in sets]
        names += ["tokens", "batch", "selected", *(["entries"] if compact else [])]
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
            assert self.choices.pick is not None
            anchor = self.unit.attentions[0].value
            layout = self._layout(anchor)
            at = self.slot["index:response"]
            old = self._call(row_ops.read_rows, (self.state[anchor], self._written(anchor, RESPONSE)))
            fresh = self._raw(anchor)
            if self.computed[anchor] == ALL:
                fresh = self._call(row_ops.gather_rows, (fresh, at, layout))
            fresh = self._call(row_ops.rows_first, (fresh, layout, self.slot["batch"]))
            picked = self._call(self.choices.pick, (fresh, old, at, self._tokens(), self.slot["selected"]))
            self.chosen = picked, self._call(row_ops.positions_of, (picked, at, self.slot["counts"], self._tokens()))
        return self.chosen

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

    @abstractmethod
    def _raw(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` itself, on the rows it is computed for."""

    @abstractmethod
    def _on(self, node: torch.fx.Node, rows: RowSet) -> torch.fx.Node:
        """``node`` on exactly ``rows``."""

    @abstractmethod
    def _available(self, node: torch.fx.Node) -> torch.fx.Node:
        """``node`` on the rows that its state and the computed rows hold together."""
