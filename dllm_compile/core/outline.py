"""A part of a graph that depends on no tokens, as a module of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
import torch.fx

from .graph import placeholders
from .stand_ins import Values, expressions, replaced, value_of
from .units import closure


@dataclass(frozen=True)
class Outline:
    """A module that computes some values of a graph.

    Attributes:
        reads: placeholders of the graph, in the order in which ``run`` takes their values.
        exprs: the numbers computed from open sizes that ``run`` takes behind them.
        run: returns the values, as a tuple.
        numbers: the values of ``exprs``.
    """

    reads: list[torch.fx.Node]
    exprs: tuple[sympy.Expr, ...]
    run: torch.fx.GraphModule
    numbers: tuple[int, ...] = ()

    def at(self, sizes: Values) -> Outline:
        """The same with ``numbers``, at these sizes."""
        return replace(self, numbers=tuple(value_of(expr, sizes) for expr in self.exprs))

    def __call__(self, given: Mapping[torch.fx.Node, Any]) -> tuple[Any, ...]:
        """The values, from those of the placeholders of the graph."""
        values: tuple[Any, ...] = self.run(*[given[node] for node in self.reads], *self.numbers)
        return values


def outline(graph: torch.fx.Graph, outputs: Sequence[torch.fx.Node]) -> Outline:
    """Copy what computes the values of ``outputs``, nodes of ``graph`` that depend on no tokens."""
    needed, out = closure(outputs, set()), torch.fx.Graph()
    reads = [node for node in placeholders(graph) if node in needed]
    env = {node: out.node_copy(node) for node in reads}
    used = [expr for node in graph.nodes if node in needed for expr in expressions(node.args, node.kwargs)]
    numbers = {expr: out.placeholder(f"number_{i}") for i, expr in enumerate(dict.fromkeys(used))}
    for node in graph.nodes:
        if node in needed and node not in env:
            env[node] = copied = out.node_copy(node, env.__getitem__)
            copied.args, copied.kwargs = replaced((copied.args, copied.kwargs), lambda number: numbers[number.expr])
    out.output(tuple(env[node] for node in outputs))
    return Outline(reads, tuple(numbers), torch.fx.GraphModule(torch.nn.Module(), out))
