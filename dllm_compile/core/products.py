"""Attention that a model writes as several calls: scores, whatever is done to them, and their product with values.

    s = matmul(q, k.transpose(-1, -2)) ; p = softmax(tanh(s / 50) * 50 + mask, -1) ; o = matmul(p, v)

A row of ``o`` is made of its row of ``q`` and of all rows of ``k`` and ``v``, as ``axes`` has found out call by call.
Here such calls are joined: they are one attention of a layer, with keys and values that are cached.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.fx

from .arguments import attention, called
from .axes import Axes, linear
from .layout import holds

Node = torch.fx.Node
Scored = dict[Node, tuple[Node, ...]]
"""Of each product with values, the calls that make what is on its left, from the product of queries and keys on."""


def scored_attention(live: Sequence[Node], axes: Axes) -> Scored:
    """The attentions among ``live`` nodes that are written as several calls, in the order of the graph.

    Calls that read whole values elsewhere are no attention: their rows count as unproven from here on.
    """
    reads: dict[Node, list[Node]] = {}
    for node, operand in axes.whole:
        if node.target is not attention:
            reads.setdefault(node, []).append(operand)
    order = {node: i for i, node in enumerate(live)}
    found: Scored = {}
    for node in live:
        if node in reads and _is_product(node) and not _is_scores(node, axes):
            between = _behind(node, reads, axes)
            if sum(_is_scores(each, axes) for each in between if each in reads) == 1:
                found[node] = tuple(sorted(between, key=order.__getitem__))
    known = {*found, *(each for between in found.values() for each in between)}
    for node, operands in reads.items():
        if node not in known:
            axes.unproven.add(node)
            axes.whole.difference_update((node, operand) for operand in operands)
    return found


def scores_of(between: Sequence[Node], axes: Axes) -> Node:
    """The product of queries and keys among the calls of an attention."""
    return next(node for node in between if any(node is reader for reader, _ in axes.whole) and _is_scores(node, axes))


def _is_scores(node: Node, axes: Axes) -> bool:
    """Whether the rows that a product reads whole are in the last dimension of its right side, as those of keys are."""
    right = node.args[1] if _is_product(node) else None
    layout = axes.layout.get(right) if isinstance(right, Node) and (node, right) in axes.whole else None
    return layout is not None and holds(layout[-1], "T")


def _is_product(node: Node) -> bool:
    return called(node) in ("matmul", "bmm") and len(node.args) == 2


def _behind(product: Node, reads: dict[Node, list[Node]], axes: Axes) -> set[Node]:
    """Calls that make the left side of a product, back to one of queries and keys, a projection, or another product."""
    seen: set[Node] = set()
    todo = [product.args[0]]
    while todo:
        node = todo.pop()
        if not isinstance(node, Node) or node in seen or node not in axes.live or node.op == "placeholder":
            continue
        if node.target is linear or (node in reads and _is_product(node) and not _is_scores(node, axes)):
            continue
        seen.add(node)
        if not (node in reads and _is_scores(node, axes)):
            todo += node.all_input_nodes
    return seen
