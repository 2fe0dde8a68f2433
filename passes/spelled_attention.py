"""Attention written by hand becomes one call.

    before:  softmax(q @ k.transpose(-1, -2) * scale + mask, -1) @ v
    after:   scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

The later passes anchor on that call. The result is the same up to rounding.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import argument, attention
from dllm_compile.core.stand_ins import Computed

_MATMUL = (torch.matmul, torch.bmm, operator.matmul)
_SOFTMAX = (torch.softmax, torch.nn.functional.softmax)


HIDES = -1e4
"""A score that is filled in where a mask is hides the key if it is no larger: then adding it to the score does, too."""


@dataclass
class _Scores:
    """What stands between the query-key product and the softmax."""

    query: torch.fx.Node
    key: torch.fx.Node
    scale: float = 1.0
    mask: torch.fx.Node | None = None
    masked: tuple[torch.fx.Node, float] | None = None


def spelled_attention(graph: torch.fx.Graph, fake: dict[torch.fx.Node, Any]) -> int:
    """Rewrite ``graph`` in place; returns how many attentions were found."""
    found = 0
    for node in list(graph.nodes):
        if not _is_call(node, _MATMUL, "matmul", "bmm") or len(node.args) != 2:
            continue
        softmax = _behind(node.args[0])
        if softmax is None or not _is_call(softmax, _SOFTMAX, "softmax") or not _last_dim(softmax, fake):
            continue
        scores = _read_scores(softmax.args[0], fake)
        if scores is not None:
            _rewrite(graph, node, scores, fake)
            found += 1
    graph.eliminate_dead_code()
    return found


def _is_call(node: Any, functions: tuple[Any, ...], *methods: str) -> bool:
    return isinstance(node, torch.fx.Node) and (
        node.target in functions or (node.op == "call_method" and node.target in methods)
    )


def _behind(node: Any) -> torch.fx.Node | None:
    """Look through casts and through dropout that does nothing."""
    while isinstance(node, torch.fx.Node):
        if (node.op == "call_method" and node.target in ("to", "type_as", "float", "contiguous")) or (
            node.target is torch.nn.functional.dropout and _dropout_is_off(node)
        ):
            node = node.args[0]
        else:
            return node
    return None


def _dropout_is_off(node: torch.fx.Node) -> bool:
    return not argument(node, 2, "training", True) or bool(argument(node, 1, "p", 0.5) == 0.0)


def _is_fixed(value: Any) -> bool:
    """Whether a value is a number, the same at all sizes."""
    return isinstance(value, (int, float)) and not isinstance(value, Computed)


def _last_dim(softmax: torch.fx.Node, fake: dict[torch.fx.Node, Any]) -> bool:
    dim = argument(softmax, 1, "dim")
    return isinstance(dim, int) and dim in (-1, fake[softmax].dim() - 1)


def _read_scores(node: Any, fake: dict[torch.fx.Node, Any]) -> _Scores | None:
    scale, mask, masked = 1.0, None, None
    while True:
        node = _behind(node)
        if node is None or len(node.args) < 2 or node.kwargs:  # a rounding_mode, an alpha
            return None
        left, right = node.args[0], node.args[1]
        if _is_call(node, _MATMUL, "matmul", "bmm"):
            key = _untransposed(right, fake)
            if key is None or not isinstance(left, torch.fx.Node):
                return None
            return _Scores(left, key, scale, mask, masked)
        if node.target in (operator.mul, torch.mul) and _is_fixed(right):
            scale *= right
        elif node.target in (operator.truediv, torch.div) and _is_fixed(right):
            scale /= right
        elif node.target in (operator.add, torch.add) and isinstance(right, torch.fx.Node) and mask is None:
            if scale != 1.0 or masked is not None:
                return None
            mask = right
        elif node.op == "call_method" and node.target == "masked_fill" and masked is None and scale == 1.0:
            if not _is_fixed(node.args[2]) or node.args[2] > HIDES or mask is not None:
                return None
            masked = (right, float(node.args[2]))
        else:
            return None
        node = left


def _untransposed(node: Any, fake: dict[torch.fx.Node, Any]) -> torch.fx.Node | None:
    """The key behind ``key.transpose(-1, -2)``."""
    if not isinstance(node, torch.fx.Node) or not isinstance(node.args[0], torch.fx.Node):
        return None
    rank = fake[node].dim()
    if _is_call(node, (torch.transpose,), "transpose"):
        dims = {d % rank for d in node.args[1:3]}
        return node.args[0] if dims == {rank - 1, rank - 2} else None
    return None


def _rewrite(graph: torch.fx.Graph, node: torch.fx.Node, scores: _Scores, fake: dict[torch.fx.Node, Any]) -> None:
    value = node.args[1]
    dtype = fake[scores.query].dtype
    with graph.inserting_before(node):
        mask = scores.mask
        if scores.masked is not None:
            where, fill = scores.masked
            zeros = graph.call_function(torch.zeros_like, (where,), {"dtype": dtype})
            mask = graph.call_method("masked_fill", (zeros, where, fill))
        elif mask is not None and fake[mask].dtype not in (torch.bool, dtype):
            mask = graph.call_method("to", (mask, dtype))
        call = graph.call_function(
            attention, (scores.query, scores.key, value), {"attn_mask": mask, "scale": float(scores.scale)}
        )
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    fake[call] = fake[node]
    graph.erase_node(node)
