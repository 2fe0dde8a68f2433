"""The values of one call of a graph: what its units computed for some rows, and all rows of what is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.layout import opened
from dllm_compile.core.rows import ALL, NONE, RowSet, put_rows, read_all, rows_first, store_rows
from dllm_compile.core.state import allocate

from .batch import Batch
from .output_buffers import OutputBuffers
from .program import Program
from .step import Step


class CallValues:
    """Values of the nodes of a graph, each on the rows that it was computed for.

    Args:
        env: the arguments of the call, by placeholder.
        layer: the key of the graph's first layer: where one graph serves many layers, each has values of its own.
        narrows: whether the residual stream may be computed for fewer rows.

    Attributes:
        env: the values that are still to be read.
        have: the row set of each value that a unit computed.
        stored: values whose every row is kept, up to date.
        head: the unit that makes logits, if the graph has one.
    """

    def __init__(
        self, program: Program, env: dict[torch.fx.Node, Any], batch: Batch, step: Step, layer: Any, narrows: bool
    ) -> None:
        self.program, self.env, self.batch, self.step = program, env, batch, step
        self.layer, self.narrows = layer, narrows
        self.head = program.head(batch.session.vocabulary)
        self.have: dict[torch.fx.Node, RowSet] = {}
        self.stored: set[torch.fx.Node] = set()

    def put(self, nodes: Sequence[torch.fx.Node], values: Sequence[Any], rows: Sequence[RowSet]) -> None:
        """Add what a unit returned: the value and row set of each of ``nodes``; more values may follow."""
        for node, value, at in zip(nodes, values, rows, strict=False):
            self.env[node], self.have[node] = value, at

    def rows(self, node: torch.fx.Node | None) -> RowSet:
        """The row set that a value was computed for; all rows of what no unit computed."""
        return ALL if node is None else self.have.get(node, ALL)

    def whole(self, node: torch.fx.Node) -> Any:
        """All rows of a value: those computed in this call, and kept ones for the rest."""
        value, rows = self.env[node], self.have.get(node)
        if rows is None or not self.may_narrow(node) or (rows == ALL and node in self.program.read_whole):
            return value
        layout = opened(self.program.axes.layout[node])  # of a program at other sizes
        kept = self.kept(node)
        if kept is None:
            self.batch.recordings.clear()
            (kept,) = allocate([node], self.program.axes, self.step.shape, self.step.counts.device)
            self.batch.kept[self._key(node)] = kept
        if node not in self.stored and rows == ALL:
            store_rows(kept, value, layout)
        elif node not in self.stored and rows != NONE:
            put_rows(kept, self.step.indices[rows.name], rows_first(value, layout, kept.shape[0]).to(kept.dtype))
        self.stored.add(node)
        return read_all(kept, layout)

    def may_narrow(self, node: torch.fx.Node) -> bool:
        """Whether a value has rows, and may be computed for some of them only."""
        of_head = self.head is not None and node in self.head.outputs[: self.head.leaving]
        return (of_head or self.narrows) and self.program.has_rows(node)

    def kept(self, node: torch.fx.Node) -> torch.Tensor | None:
        """All rows ``[B, S + 1, ...]`` of a value as earlier calls left them; ``None`` where none are kept."""
        return self.batch.kept.get(self._key(node))

    def _key(self, node: torch.fx.Node) -> Any:
        return self.program.origin.get(node, node), self.layer

    def returned(self, results: dict[torch.fx.Node, Any], step: Step) -> Any:
        """The graph's outputs, as copies: a caller may write into them without spoiling what is kept.

        Args:
            results: the value of each output, of this step or of one like it that was recorded.
            step: this one, which says the rows of logits that are read.
        """
        live, logits = self.program.axes.layout, self.program.logits(self.batch.session.vocabulary)
        by_row = logits is not None and [[f.kind for f in dim] for dim in live[logits]] == [["B"], ["T"], [""]]

        def copy(node: torch.fx.Node, value: Any) -> Any:
            buffers = self.batch.output_buffers.setdefault(self._key(node), OutputBuffers())
            return buffers.copy(value, step.returned if node is logits and by_row else None)

        copies = {node: copy(node, value) if node in live else value for node, value in results.items()}
        return torch.fx.map_arg(self.program.result, lambda n: copies[n])
