"""A part of a graph that depends on no tokens, as a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
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


def outline(
    graph: torch.fx.Graph,
    outputs: Sequence[torch.fx.Node],
    origin: Mapping[torch.fx.Node, torch.fx.Node] = MappingProxyType({}),
) -> Outline:
    """Copy what computes the values of some nodes.

    Args:
        graph: one whose sizes are numbers.
        outputs: nodes of it that depend on no tokens.
        origin: of nodes of ``graph``, those of a graph whose sizes are symbols. What that one computes of sizes is
            computed in the copy too, unless it takes tokens, so that the copy serves other sizes.
    """
    needed, out = closure(outputs, set()), torch.fx.Graph()
    inputs = {origin.get(node, node): node for node in placeholders(graph)}
    shown = {*inputs, *origin.values()}
    env: dict[torch.fx.Node, torch.fx.Node] = {}  # by nodes of both graphs
    read: dict[torch.fx.Node, torch.fx.Node] = {}

    def copied(node: torch.fx.Node) -> torch.fx.Node:
        if node in inputs and node not in env:
            with out.inserting_before():
                env[node] = out.placeholder(node.name)
            read[env[node]] = inputs[node]
        elif node not in env and node in shown:
            raise KeyError(node)
        elif node not in env:
            env[node] = out.node_copy(node, copied)
        return env[node]

    for node in graph.nodes:
        if node not in needed:
            continue
        old = origin.get(node, node)
        if node.op == "placeholder":
            env[node] = copied(old)
            continue
        if (old.op, old.target) != (node.op, node.target):  # a pass wrote it
            old = node
        try:
            env[node] = out.node_copy(old, env.__getitem__ if old is node else copied)
        except KeyError:  # a size is read of tokens
            env[node] = out.node_copy(node, env.__getitem__)
        env[old] = env[node]
    out.output(tuple(env[node] for node in outputs))
    module = torch.fx.GraphModule(torch.nn.Module(), out)
    return Outline([read[node] for node in placeholders(out)], module)
