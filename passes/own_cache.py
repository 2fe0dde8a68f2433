"""Keys and values that a loop keeps by itself: nothing is left for this package to cache.

    before:  k = cat([past_k, k], 2) ; past_k[:, :, 4:8] = k ; past_k.index_copy(2, at, k)     past_k is an input
    after:   (the graph as it is; every call of the model runs exactly)

A sampler with a cache of its own computes all rows where it fills that cache, and hands it over at the steps between. A
row that is approximated where it is filled is wrong in each of these.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import attention_arguments
from dllm_compile.core.graph import called, placeholders
from dllm_compile.core.units import closure

_JOINS = {"cat", "concat", "concatenate", "stack", "hstack", "vstack", "dstack", "row_stack", "column_stack"}
_WRITES = {"setitem", "copy", "where", "lerp", "put", "index_copy", "index_put", "index_add"} | {
    *("scatter", "scatter_add", "slice_scatter", "select_scatter", "masked_scatter"),
}
_PRODUCTS = {"matmul", "bmm"}
_PROJECTIONS = {"linear", "addmm", "conv1d"}  # keys are of tokens there, whatever was joined before


def keys_handed_over(graph: torch.fx.Graph, args: Sequence[Any]) -> torch.fx.Node | None:
    """The call that joins keys or values of attention to some that are an input of the graph; ``None`` for none.

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
        if _name(call) not in ("scaled_dot_product_attention", "softmax"):
            continue
        for node in _behind(call, weights, writes):
            if _name(node).removesuffix("_") not in _JOINS | _WRITES:
                continue
            behind = [closure([operand], set()) for operand in node.all_input_nodes]
            kept = [not (each & weights) and bool(each & inputs) for each in behind]
            made = [bool(each & weights) for each in behind]
            if any(kept) and any(made):
                return node
    return None


def _name(node: torch.fx.Node) -> str:
    """What a function, method or ATen call is called, without module and overload."""
    return called(node).partition(".")[0]


def _may_be_keys(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() >= 3 and value.is_floating_point()


def _writes(graph: torch.fx.Graph) -> dict[torch.fx.Node, list[torch.fx.Node]]:
    """What is written to each value in place; to a view, to what it is a view of, too."""
    found: dict[torch.fx.Node, list[torch.fx.Node]] = {}
    for node in graph.nodes:
        named = _name(node).endswith("_")
        base = node.args[0] if (node.target is operator.setitem or named) and node.args else None
        while isinstance(base, torch.fx.Node):
            found.setdefault(base, []).append(node)
            base = base.args[0] if base.args and base.op != "placeholder" else None
    return found


def _behind(
    call: torch.fx.Node, weights: set[torch.fx.Node], writes: dict[torch.fx.Node, list[torch.fx.Node]]
) -> Iterator[torch.fx.Node]:
    """What makes keys and values, back to where a weight is read; of attention by hand, what the product of its scores
    reads.
    """
    whole, seen = _name(call) != "softmax", {call}
    given = attention_arguments(call.args, call.kwargs) if whole else None
    starts = call.all_input_nodes if given is None else [given.key, given.value]
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
