"""A part of a graph that depends on no tokens, as a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from .graph import placeholders
from .units import closure


@dataclass
class Outline:
    """What computes some values.

    Attributes:
        reads: placeholders of the graph, in the order in which ``run`` takes their values.
        run: returns the values, as a tuple.
    """

    reads: list[torch.fx.Node]
    run: torch.fx.GraphModule

    def __call__(self, given: Mapping[torch.fx.Node, Any]) -> tuple[Any, ...]:
        """The values, from those of the placeholders of the graph."""
        values: tuple[Any, ...] = self.run(*[given[node] for node in self.reads])
        return values


def outline(graph: torch.fx.Graph, outputs: Sequence[torch.fx.Node]) -> Outline:
    """Copy what computes the values of ``outputs``, nodes of ``graph`` that depend on no tokens."""
    needed, out = closure(outputs, set()), torch.fx.Graph()
    env: dict[torch.fx.Node, torch.fx.Node] = {}
    for node in graph.nodes:
        if node in needed:
            env[node] = out.node_copy(node, env.__getitem__)
    out.output(tuple(env[node] for node in outputs))
    return Outline([n for n in placeholders(graph) if n in needed], torch.fx.GraphModule(torch.nn.Module(), out))
