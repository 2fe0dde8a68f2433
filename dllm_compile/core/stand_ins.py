"""Sizes that Dynamo left open, and the numbers that a graph is analyzed at in their place.

    traced:    view(x, s0 * s1, 64) ; arange(s1)      for any batch s0 and any number of tokens s1
    analyzed:  view(x, 253, 64)     ; arange(23)      at 11 and 23; the numbers 253 and 23 remember their expressions

The stand-ins are primes that cannot be mistaken for another number of the graph, so what is found at them holds at all
sizes that Dynamo's guards allow. Another size costs the value of each expression, and no analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
import torch.fx
from torch.fx.node import map_aggregate

from dllm_compile.compat import tree_leaves

from .errors import GraphRefused

Values = Mapping[sympy.Symbol, int]
LEAST, TRIED = 11, 2000
"""The smallest stand-in, and how far beyond the size that Dynamo saw one is looked for."""


class Computed(int):
    """A number that a graph computes from open sizes, as it is at the stand-ins."""

    expr: sympy.Expr

    @staticmethod
    def of(value: int, expr: sympy.Expr) -> Computed:
        """The value of an expression in Dynamo's symbols."""
        number = Computed(value)
        number.expr = expr
        return number


def expr_of(size: int | torch.SymInt) -> sympy.Expr:
    """A size in Dynamo's symbols."""
    return sympy.expand(size.node.expr) if isinstance(size, torch.SymInt) else sympy.Integer(size)


def value_of(expr: sympy.Expr, values: Values) -> int:
    """The value of an expression at given sizes."""
    return int(expr.xreplace(values))


def at_values(value: Any, values: Values) -> Any:
    """``value``, such as the arguments of a node, with its numbers that depend on open sizes computed anew for the
    sizes ``values``.
    """
    return replaced(value, lambda number: value_of(number.expr, values))


def replaced(value: Any, change: Callable[[Computed], Any]) -> Any:
    """``value``, such as the arguments of a node, with ``change`` applied to each number that is computed from open
    sizes.
    """
    return map_aggregate(value, lambda leaf: change(leaf) if isinstance(leaf, Computed) else leaf)


def expressions(*values: Any) -> list[sympy.Expr]:
    """The expressions of the numbers among ``values``, such as the arguments of a node, that are computed from open
    sizes.
    """
    found: list[Computed] = []
    replaced(values, found.append)
    return [number.expr for number in found]


@dataclass(frozen=True)
class StandIns:
    """The open sizes of a graph, and a number for each.

    Attributes:
        places: of each symbol: an input, and the dimension of it that it is the size of, -1 for the input itself.
        values: the stand-ins.
    """

    places: Mapping[sympy.Symbol, tuple[int, int]]
    values: Values

    @staticmethod
    def of(graph: torch.fx.Graph) -> StandIns | None:
        """Stand-ins for the sizes that are open in a graph as Dynamo traced it; ``None`` where no size is open, or
        none can be chosen: a size is that of no input, or Dynamo's guards leave too few sizes.
        """
        inputs = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
        sizes = [(i, dim, size) for i, value in enumerate(inputs) for dim, size in _sizes(value)]
        places: dict[sympy.Symbol, tuple[int, int]] = {}
        for i, dim, size in sizes:
            if isinstance(size.node.expr, sympy.Symbol):
                places.setdefault(size.node.expr, (i, dim))
        if not places or any(size.node.expr.free_symbols - places.keys() for _, _, size in sizes):
            return None
        shapes = sizes[0][2].node.shape_env
        fixed = _numbers(graph)
        values: dict[sympy.Symbol, int] = {}
        for symbol, (i, dim) in sorted(places.items(), key=lambda item: item[1]):
            range_of = shapes.var_to_range[symbol]
            fitting = (
                n
                for n in _primes_near(_seen(inputs[i], dim))
                if range_of.lower <= n <= range_of.upper and n not in values.values() and is_apart(n, fixed)
            )
            found = next(fitting, None)
            if found is None:
                return None
            values[symbol] = found
        if any(guard.expr.xreplace(values) != sympy.true for guard in shapes.guards if _is_of(guard.expr, values)):
            return None
        return StandIns(places, values)

    def read(self, args: Sequence[Any]) -> Values:
        """The sizes that the arguments of a call have."""
        return {s: int(args[i]) if dim < 0 else args[i].shape[dim] for s, (i, dim) in self.places.items()}

    def shown(self, graph: torch.fx.Graph, args: Sequence[Any]) -> list[Any]:
        """``args`` with Dynamo's example of each input that has open sizes in its place."""
        inputs = [node.meta.get("example_value") for node in graph.nodes if node.op == "placeholder"]
        return [shown if any(_sizes(shown)) else arg for shown, arg in zip(inputs, args, strict=True)]

    def computed(self, node: torch.fx.Node, value: Any) -> Any:
        """The value of a node that is a number, or several, with the expressions of those computed from open sizes.

        Raises:
            GraphRefused: it is unknown how a number is computed, or it is not a whole one.
        """
        return self._computed(node, value, node.meta.get("example_value"))

    def _computed(self, node: torch.fx.Node, value: Any, shown: Any) -> Any:
        if isinstance(value, (tuple, list)) and isinstance(shown, (tuple, list)) and len(value) == len(shown):
            return tuple(self._computed(node, *both) for both in zip(value, shown, strict=True))
        if isinstance(shown, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            expr = shown.node.expr
            if not expr.free_symbols & self.places.keys():
                return value
            if isinstance(shown, torch.SymInt) and expr.free_symbols <= self.places.keys():
                return Computed.of(value, expr)
        elif type(value) is type(shown) and not isinstance(value, (tuple, list)):
            return value
        raise GraphRefused("a number is computed from sizes in a way that nobody can follow", node)


def whole_numbers(value: Any) -> set[int]:
    """The whole numbers among the arguments of a node that are not computed from open sizes."""
    leaves: list[Any] = []
    map_aggregate(value, leaves.append)
    return {leaf for leaf in leaves if type(leaf) is int}


def is_apart(prime: int, numbers: set[int]) -> bool:
    """Whether no number of ``numbers`` can have been computed from a size ``prime``: none is a multiple of it, plus or
    minus 1.
    """
    return not any(n >= prime - 1 and n % prime in (0, 1, prime - 1) for n in map(abs, numbers))


def _is_of(expr: sympy.Expr, values: Values) -> bool:
    return bool(expr.free_symbols) and expr.free_symbols <= values.keys()


def _sizes(value: Any) -> Iterator[tuple[int, torch.SymInt]]:
    """The open sizes of an input as Dynamo shows it, by dimension; strides are products of them."""
    if isinstance(value, torch.SymInt):
        yield -1, value
    elif isinstance(value, torch.Tensor):
        sizes: Sequence[Any] = value.shape
        yield from ((dim, size) for dim, size in enumerate(sizes) if isinstance(size, torch.SymInt))


def _seen(value: Any, dim: int) -> int:
    size = value if dim < 0 else value.shape[dim]
    return int(size.node.hint) if size.node.has_hint() else LEAST


def _numbers(graph: torch.fx.Graph) -> set[int]:
    """All whole numbers that a graph calls with, and all sizes in it that are not open."""
    found: set[int] = set()
    for node in graph.nodes:
        shown = tree_leaves(node.meta.get("example_value"))
        sizes = [tuple(value.shape) if isinstance(value, torch.Tensor) else value for value in shown]
        found |= whole_numbers((node.args, node.kwargs, sizes))
    return found


def _primes_near(size: int) -> Iterator[int]:
    """Primes, the nearest below ``size`` first, since a larger one may index past a table of positions; then larger."""
    yield from (n for n in range(size, LEAST - 1, -1) if sympy.isprime(n))
    yield from (n for n in range(max(size + 1, LEAST), size + TRIED) if sympy.isprime(n))
