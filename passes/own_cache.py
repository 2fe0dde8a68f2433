"""Keys and values that a loop keeps by itself: nothing is left for this package to cache.

    before:  k = cat([past_k, k], 2) ; past_k.index_copy(2, at, k) ; past_k * (1 - m) + k * m     past_k is an input
    after:   (the graph as it is; every call of the model runs exactly)

A sampler with a cache of its own computes all rows where it fills that cache, and hands it over at the steps between. A
row that is approximated where it is filled is wrong in each of these. A sum counts if what is handed over is as large
as the keys: a table of positions mostly is one for all sequences or heads.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import of_module
from dllm_compile.core.arguments import argument, attention_arguments, called
from dllm_compile.core.graph import placeholders
from dllm_compile.core.stand_ins import expr_of
from dllm_compile.core.units import closure

_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack"}
_WRITES = {"setitem", "copy", "where", "lerp", "put", "index_copy", "index_put", "index_add"} | {
    *("scatter", "scatter_add", "slice_scatter", "select_scatter", "masked_scatter"),
}
_SUMS = {"add", "iadd", "sub", "isub", "rsub", "subtract", "addcmul", "addcdiv", "maximum", "minimum"}
_PRODUCTS = {"matmul", "bmm", "baddbmm", "einsum"}
_PROJECTIONS = {"linear", "addmm", "conv1d"}  # keys are of tokens there, whatever was joined before


@dataclass(frozen=True)
class HandedOver:
    """Keys or values of attention that are an input of a graph.

    Attributes:
        join: the call that joins them to those of the tokens.
        buffer: whether they are a buffer of the model.
    """

    join: torch.fx.Node
    buffer: bool


def keys_handed_over(graph: torch.fx.Graph, args: Sequence[Any]) -> HandedOver | None:
    """The keys or values of attention that are an input of the graph; ``None`` for none.

    Args:
        graph: as Dynamo traced it.
        args: arguments, real or fake, one a placeholder.
    """
    given = dict(zip(placeholders(graph), args, strict=True))
    weights = {node for node, value in given.items() if isinstance(value, torch.nn.Parameter)}
    inputs = {node for node, value in given.items() if node not in weights and _may_be_keys(value)}
    if not inputs:
        return None
    writes = _writes(graph)
    for call in graph.nodes:
        if _name(call) not in ("scaled_dot_product_attention", "flex_attention", "softmax"):
            continue
        for node in _behind(call, weights, writes):
            if _name(node).removesuffix("_") not in _JOINS | _WRITES | _SUMS:
                continue
            behind = {operand: closure([operand], set()) for operand in node.all_input_nodes}
            kept = [o for o, each in behind.items() if not (each & weights) and each & inputs and _as_large(o, node)]
            if kept and any(each & weights for each in behind.values()):
                return HandedOver(node, all(map(of_module, behind[kept[0]] & inputs)))
    return None


def _as_large(kept: torch.fx.Node, node: torch.fx.Node) -> bool:
    """Whether ``kept`` is as large as the result of ``node``, where that is a sum; true for any other call."""
    if _name(node).removesuffix("_") not in _SUMS:
        return True
    shown = [each.meta.get("example_value") for each in (kept, node)]
    sizes = [list(map(expr_of, each.shape)) for each in shown if isinstance(each, torch.Tensor)]
    return len(sizes) < 2 or sizes[0] == sizes[1]


def _name(node: torch.fx.Node) -> str:
    """What a function, method or ATen call is called, without module and overload."""
    return called(node).partition(".")[0]


def _may_be_keys(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _writes(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """For each value, what is written to it in place; writes to a view count for the value that it is a view of,
    too.
    """
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        named = _name(node).endswith("_")
        base = node.args[0] if (node.target is operator.setitem or named) and node.args else None
        while isinstance(base, torch.fx.Node):
            found.setdefault(base, []).append(node)
            base = base.args[0] if base.args and base.op != "placeholder" else None
    return found


def _keys_and_values(call: torch.fx.Node) -> tuple[Any, Any]:
    if _name(call) == "flex_attention":  # as a function, or as the operation that Dynamo makes of it
        return argument(call, 1, "key"), argument(call, 2, "value")
    given = attention_arguments(call.args, call.kwargs)
    return given.key, given.value


def _behind(
    call: torch.fx.Node, weights: set[torch.fx.Node], writes: dict[torch.fx.Node, list[torch.fx.Node]]
) -> Iterator[torch.fx.Node]:
    """What makes keys and values, back to where a weight is read; of attention by hand, what the product of its scores
    reads.
    """
    whole, seen = _name(call) != "softmax", {call}
    starts = list(_keys_and_values(call)) if whole else call.all_input_nodes
    todo = [(node, whole) for node in starts]
    while todo:
        node, inside = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        if inside:
            yield node
            if _name(node) in _PRODUCTS:
                continue
        if not weights.intersection(node.all_input_nodes) and _name(node) not in _PROJECTIONS:
            inside = inside or _name(node) in _PRODUCTS
            todo += [(each, inside) for each in (*node.all_input_nodes, *writes.get(node, ()))]
