"""Values of one call of a graph: on which rows each is at hand, and where all of its rows are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.layout import position
from dllm_compile.core.rows import ALL, NONE, RowSet, merge_rows, read_all, store_rows
from dllm_compile.core.state import allocate
from dllm_compile.core.units import weights_key

from .batch import Batch, Step
from .outbox import Outbox
from .program import Program


class Held:
    """What a call has.

    Attributes:
        env: values by node.
        have: the rows that each is on; all of them where it is missing.
        stored: values whose every row is kept, up to date.
        head: the unit that makes logits, if the graph has one.
        keys: of each layer: its number in a whole model, else its weights, since one graph may serve every layer.
    """

    def __init__(self, program: Program, args: Sequence[Any], batch: Batch, step: Step) -> None:
        self.program, self.batch, self.step = program, batch, step
        env: dict[torch.fx.Node, Any] = dict(zip(program.index, args, strict=True))
        self.env = env
        self.have: dict[torch.fx.Node, RowSet] = {}
        self.stored: set[torch.fx.Node] = set()
        self.head = program.head(batch.session.vocabulary)
        if program.ids is not None:
            self.keys: dict[int, Any] = {id(unit): i for i, unit in enumerate(program.layers)}
        else:
            self.keys = {id(unit): weights_key(unit, [env.get(n) for n in unit.inputs]) for unit in program.layers}

    def answer(self, results: dict[torch.fx.Node, Any]) -> Any:
        """The graph's outputs, from the value of each, which a caller may write into without spoiling what is kept."""
        live = self.program.axes.layout
        copies = {node: self._outbox(node).copy(value) if node in live else value for node, value in results.items()}
        return torch.fx.map_arg(self.program.result, lambda n: copies[n])

    def _slot(self, node: torch.fx.Node) -> torch.Tensor | None:
        return self.batch.kept.get(self._slot_key(node))

    def _slot_key(self, node: torch.fx.Node) -> Any:
        """Where all rows of a value are kept: by its unit, and by the weights where a graph is one layer of many."""
        first = next(iter(self.keys.values()), None)
        return self.program.origin.get(node, node), first

    def _outbox(self, node: torch.fx.Node) -> Outbox:
        return self.batch.outboxes.setdefault(self._slot_key(node), Outbox())

    def _widens(self, node: torch.fx.Node) -> bool:
        """Whether a value may be computed for some rows only, and has rows."""
        layout = self.program.axes.layout.get(node, ())
        narrowed = self.head is not None and node in self.head.outputs[: self.head.leaving]
        return (narrowed or self.batch.narrows(self.step.past.schedule)) and None not in (
            position(layout, "T"),
            position(layout, "B"),
        )

    def whole(self, node: torch.fx.Node) -> Any:
        """All rows of a value: those just computed, beside those kept of the others."""
        value, rows = self.env[node], self.have.get(node)
        if rows is None or not self._widens(node):
            return value
        layout = self.program.axes.layout[node]
        kept = self._slot(node)
        if kept is None:
            self.batch.tapes.clear()
            (kept,) = allocate([node], self.program.axes, self.step.shape, self.step.counts.device)
            self.batch.kept[self._slot_key(node)] = kept
        if node not in self.stored and rows == ALL:
            store_rows(kept, value, layout)
        elif node not in self.stored and rows != NONE:
            merge_rows(kept, self.step.indices[rows.name], value, layout)
        self.stored.add(node)
        return read_all(kept, layout)
