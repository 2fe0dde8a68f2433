"""Write FlexAttention that changes no scores as attention with a mask.

    before:  o = flex_attention(q, k, v, score_mod, (Q, K, some, which, full, which, ..., mask_mod), scale)[0]
    after:   mask = listed(full, which) | listed(some, which) & mask_mod(b, h, i, j)       [B or 1, H or 1, Q, K] bool
             o = attention(q, k, v, attn_mask=mask, scale=scale)

A block mask lists, for each block of queries, the blocks of keys that are seen in full and those in which a function
decides; the others are hidden. The function is written for one query and one key. If it only calls what works entry by
entry, it is right for tensors of all of them: ``i`` is ``arange(Q)[:, None]``, and ``j`` is ``arange(K)``.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import OpOverload
from dllm_compile.core.arguments import argument, attention, called
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.graph import output_node, placeholders

_FLEX = torch.ops.higher_order.flex_attention
_BY_ENTRY = {
    *("add", "sub", "mul", "floordiv", "floor_divide", "mod", "remainder", "neg", "abs", "minimum", "maximum", "clamp"),
    *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "xor", "invert", "__and__", "__or__", "__xor__", "__invert__"),
    *("logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not"),
    *("where", "to", "bool", "int", "long", "ones_like", "zeros_like", "full_like", "clone"),
}
_ADVICE = 'a model of transformers is cached with attn_implementation="sdpa"'
_NEW = {"new_ones", "new_zeros"}
Node = torch.fx.Node


def as_masks(module: torch.fx.GraphModule, graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a graph without FlexAttention; itself, where it has none.

    Args:
        module: that the graph is of, with the functions of its block masks.
        graph: the graph.

    Raises:
        GraphRefused: scores are changed by more than a mask, the log-sum-exp is read, the function of a mask calls
            what does not work entry by entry, or the graph makes its block mask itself.
    """
    if not any(node.target is _FLEX for node in graph.nodes):
        return graph
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    written: dict[Any, Node] = {}  # masks that are the same for several layers
    for node in [node for node in copy.nodes if node.target is _FLEX]:
        _rewrite(copy, module, node, written)
    for node in copy.nodes:
        if called(node) == "_vmap_increment_nesting":
            reason = "the block mask of flex_attention is made in the graph: make it outside of what is compiled"
            raise GraphRefused(f"{reason}; {_ADVICE}", node)
    copy.eliminate_dead_code()
    return copy


def _rewrite(graph: torch.fx.Graph, module: torch.fx.GraphModule, node: Node, written: dict[Any, Node]) -> None:
    query, key, value, score_mod, blocks, scale, _, score_reads, mask_reads = node.args
    mask_mod = getattr(module, str(blocks[-1].target))  # type: ignore[index,union-attr]
    score = getattr(module, str(score_mod.target)).graph  # type: ignore[union-attr]
    if output_node(score).args[0] is not placeholders(score)[0] or score_reads:
        raise GraphRefused(f"flex_attention changes its scores, and only masks are followed; {_ADVICE}", node)
    results = [user for user in node.users if user.target is operator.getitem]
    if len(results) < len(node.users) or any(user.args[1] != 0 and user.users for user in results):
        raise GraphRefused(f"more than the result of flex_attention is read; {_ADVICE}", node)
    known = mask_mod.code, tuple(blocks[:-1]), tuple(mask_reads)  # type: ignore[index,arg-type]
    with graph.inserting_before(node):
        if known not in written:
            written[known] = _mask(graph, node, mask_mod.graph)
        given = {"attn_mask": written[known], "scale": scale, "enable_gqa": True}
        attended = graph.call_function(attention, (query, key, value), given)
    for result in results:
        if result.args[1] == 0:
            attended.meta = dict(result.meta)
            result.replace_all_uses_with(attended)
        graph.erase_node(result)
    graph.erase_node(node)


def _mask(graph: torch.fx.Graph, node: Node, function: torch.fx.Graph) -> Node:
    """Which keys each query sees, where ``graph`` inserts nodes now."""
    query, blocks, reads = node.args[0], node.args[4], node.args[8]
    queries, keys, some, which, full, which_full = blocks[:6]  # type: ignore[index,misc]
    device = query.meta["example_value"].device  # type: ignore[union-attr]

    def places(count: Any, *shape: int) -> Node:
        return graph.call_method("view", (graph.call_function(torch.arange, (count,), {"device": device}), *shape))

    def size(dim: int) -> Node:
        return graph.call_method("size", (query, dim))

    def by_token(block: Node) -> Node:
        for dim, count, width in ((-2, queries, blocks[-3]), (-1, keys, blocks[-2])):  # type: ignore[index]
            at = graph.call_function(operator.floordiv, (places(count, -1), width))
            block = graph.call_function(torch.index_select, (block, dim, at))
        return block

    inputs = placeholders(function)
    values: dict[Node, Any] = dict(zip(inputs[4:], reads, strict=True))  # type: ignore[arg-type]
    if inputs[0].users:
        values[inputs[0]] = places(size(0), -1, 1, 1, 1)
    if inputs[1].users:
        values[inputs[1]] = places(size(1), -1, 1, 1)
    values |= {inputs[2]: places(queries, -1, 1), inputs[3]: places(keys, -1)}
    for each in function.nodes:
        if each.op not in ("placeholder", "output"):
            values[each] = _by_entry(graph, each, values, node)
    said = values[output_node(function).args[0]]  # type: ignore[index]
    seen = graph.call_function(operator.and_, (by_token(_listed(graph, some, which, device)), said))
    if full is not None:
        seen = graph.call_function(operator.or_, (by_token(_listed(graph, full, which_full, device)), seen))
    return seen


def _listed(graph: torch.fx.Graph, count: Any, which: Any, device: torch.device) -> Node:
    """Whether a block of keys is among those listed for a block of queries, ``[B or 1, H or 1, Q blocks, K blocks]``.

    Args:
        graph: where nodes are inserted.
        count: ``[B or 1, H or 1, Q blocks]``, how many entries of each list count.
        which: ``[B or 1, H or 1, Q blocks, K blocks]``, the lists.
        device: of the result.
    """

    def call(function: Any, *args: Any) -> Node:
        return graph.call_function(function, args)

    blocks = graph.call_function(torch.arange, (graph.call_method("size", (which, -1)),), {"device": device})
    counts = call(torch.unsqueeze, call(operator.lt, blocks, call(torch.unsqueeze, count, -1)), -1)
    found = call(operator.eq, call(torch.unsqueeze, which, -1), blocks)
    return call(torch.any, call(operator.and_, found, counts), -2)


def _by_entry(graph: torch.fx.Graph, call: Node, values: dict[Node, Any], node: Node) -> Node:
    """One call of the function of a mask, on tensors of all queries and keys."""
    name = call.target.overloadpacket.__name__ if isinstance(call.target, OpOverload) else called(call)
    name = name.rpartition(".")[2]
    args, kwargs = torch.fx.node.map_arg((call.args, call.kwargs), values.__getitem__)
    if name in ("getitem", "index"):
        index = args[1] if isinstance(args[1], (tuple, list)) else (args[1],)
        if all(isinstance(each, (int, Node)) for each in index):
            return graph.call_function(operator.getitem, (args[0], tuple(index)))
    elif name in _BY_ENTRY or (name in _NEW and not argument(call, 1, "size")):
        return graph.create_node(call.op, call.target, args, kwargs)
    raise GraphRefused(f"the mask of flex_attention calls {name}, which is not followed; {_ADVICE}", node)
