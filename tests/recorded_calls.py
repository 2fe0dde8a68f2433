"""A graph that replays on the CPU stands in for CUDA's, so that what a recorded call reads is all its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dllm_compile.runtime import recordings
from dllm_compile.runtime.output_buffers import OutputBuffers

from .under_way import all_under_way


def rows() -> list[torch.Tensor]:
    """All that sessions keep between steps."""
    return [t for s in all_under_way() for group in (*s.layers.values(), s.kept.values()) for t in group]


READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}


class Unread(TorchDispatchMode):
    """No value reaches the host: on CUDA that would end a recording."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in READS, f"{func} reads a value of the device"
        return func(*args, **(kwargs or {}))


class Graph:
    """What is recorded leaves no trace; a replay does it, and fills what the recording returned."""

    played = 0

    def __init__(self, body: Callable[[], Any]) -> None:
        before = [row.clone() for row in rows()]
        with Unread():
            self.body, self.made = body, body()
        for row, value in zip(rows(), before, strict=True):
            row.copy_(value)

    def pool(self) -> None:
        """CUDA's alone."""

    def replay(self) -> None:
        Graph.played += 1
        made = self.body()
        for node, value in self.made.results.items():
            value.copy_(made.results[node])
        for value, now in zip(self.made.salient_counts, made.salient_counts, strict=True):
            value.copy_(now)
        for layer, index in self.made.selected.items():
            index.copy_(made.selected[layer])


def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record calls as on CUDA: their salient rows are not counted on the host, and logits are copied whole."""

    def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Graph]:
        graph = Graph(body)
        return graph.made, graph

    monkeypatch.setattr(recordings, "possible", lambda device: True)
    monkeypatch.setattr(recordings, "capture", capture)
    monkeypatch.setattr(OutputBuffers, "copy", lambda self, value, rows=None: value.clone())
    monkeypatch.setattr(Graph, "played", 0)
