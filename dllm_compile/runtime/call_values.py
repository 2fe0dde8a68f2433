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
from .shared_rows import SharedRows
from .step import Step

BY_ROW = [["B"], ["T"], [""]]
"""The kinds of the dimensions of logits ``[B, S, V]``."""


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
        logits: its output ``[B, S, V]`` for a sampler, if it has one.
        shared: the same where callers share the rows that are kept.
    """

    def __init__(
        self, program: Program, env: dict[torch.fx.Node, Any], batch: Batch, step: Step, layer: Any, narrows: bool
    ) -> None:
        self.program, self.env, self.batch, self.step = program, env, batch, step
        self.layer, self.narrows = layer, narrows
        self.head, logits = program.head(batch.session.vocabulary), program.logits(batch.session.vocabulary)
        by_row = logits is not None and [[f.kind for f in dim] for dim in program.axes.layout[logits]] == BY_ROW
        self.logits = logits if by_row else None
        self.shared = self.logits if batch.session.shares_logits(step.counts.device) else None
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
        if node is self.shared and rows is not None:
            return self._shared(node, value, rows)
        if rows is None or not self.may_narrow(node) or (rows == ALL and node in self.program.read_whole):
            return value
        layout = opened(self.program.axes.layout[node])  # of a program at other sizes
        kept = self.batch.kept.get(self._key(node))
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

    def _shared(self, node: torch.fx.Node, value: Any, rows: RowSet) -> torch.Tensor:
        """All rows of the logits that callers share."""
        key, every = self._key(node), self.batch.shared
        if key not in every:
            width = self.program.axes.layout[node][-1][0].size
            every[key] = SharedRows((*self.step.shape, width), self.program.axes.fake[node].dtype)
        if node not in self.stored and rows == ALL:
            every[key].put_all(value)
            self.env[node] = every[key].rows  # or ``value`` would hold that memory, so that a write copied it
        elif node not in self.stored and rows != NONE:
            every[key].put(value, self.step.indices[rows.name])
        self.stored.add(node)
        return every[key].rows

    def may_narrow(self, node: torch.fx.Node) -> bool:
        """Whether a value has rows, and may be computed for some of them only."""
        of_head = self.head is not None and node in self.head.outputs[: self.head.leaving]
        return (of_head or self.narrows) and self.program.has_rows(node)

    def kept(self, node: torch.fx.Node) -> torch.Tensor | None:
        """All rows of a value as earlier calls left them; ``None`` where none are kept."""
        key = self._key(node)
        if key in self.batch.shared:
            return self.batch.shared[key].rows
        kept = self.batch.kept.get(key)
        return None if kept is None else read_all(kept, opened(self.program.axes.layout[node]))

    def _key(self, node: torch.fx.Node) -> Any:
        return self.program.origin.get(node, node), self.layer

    def returned(self, results: dict[torch.fx.Node, Any], step: Step) -> Any:
        """The graph's outputs, as copies: a caller may write into them without spoiling what is kept.

        Args:
            results: the value of each output, of this step or of one like it that was recorded.
            step: this one, which says the rows of logits that are read.
        """
        live = self.program.axes.layout

        def copy(node: torch.fx.Node, value: Any) -> Any:
            if node is self.shared:
                return self.batch.shared[self._key(node)].hand_out()
            buffers = self.batch.output_buffers.setdefault(self._key(node), OutputBuffers())
            return buffers.copy(value, step.returned if node is self.logits else None)

        copies = {node: copy(node, value) if node in live else value for node, value in results.items()}
        return torch.fx.map_arg(self.program.result, lambda n: copies[n])
