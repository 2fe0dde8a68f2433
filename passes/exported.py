"""Write the ATen calls of an exported module as the calls that a model's own code makes.

    before:  x = aten.embedding(W, ids) ; y = aten.slice(x, 2, 0, 4) ; aten._assert_tensor_metadata(y) ; aten.neg(y)
    after:   x = embedding(ids, W)      ; y = x[:, :, 0:4]           ;                                   neg(y)

``torch.export`` keeps attention, linear layers and embeddings whole, and what is behind this pass knows them by the
names that Python code has for them. PyTorch makes its functions and methods of the signatures of the ATen calls, so
that the arguments stay as they are, but for the few below. A call without such a name stays as it is.
"""

from __future__ import annotations

import operator
import sys
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import OpOverload
from dllm_compile.core.arguments import attention, canonical
from dllm_compile.core.axes import linear

_NAMED = {"linear": linear, "scaled_dot_product_attention": attention}
_SAME = {"alias", "detach_", "lift_fresh"}
_METHODS = {"view", "reshape", "expand", "repeat", "permute", "to", "contiguous"}


def as_written(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a graph whose ATen calls are written as Python code writes them; the graph itself, where it has
    none.
    """
    if not any(aten_name(node) for node in graph.nodes):
        return graph
    copy = torch.fx.Graph()
    copy.output(copy.graph_copy(graph, {}))
    for node in list(copy.nodes):
        name = aten_name(node)
        if name.startswith("_assert_") and not node.users:
            copy.erase_node(node)
        elif name in _SAME:
            node.replace_all_uses_with(node.all_input_nodes[0])
            copy.erase_node(node)
        elif name:
            canonical(node)
            _rewrite(node, name)
    return copy


def aten_name(node: torch.fx.Node) -> str:
    """What an ATen call is called, without its overload; the empty string for any other node."""
    target = node.target
    return target.overloadpacket.__name__ if isinstance(target, OpOverload) and target.namespace == "aten" else ""


def _rewrite(node: torch.fx.Node, name: str) -> None:
    """Give one call its name in Python, in place."""
    args: list[Any] = list(node.args)
    kwargs: dict[str, Any] = dict(node.kwargs)
    if name == "embedding":  # what is behind the ids concerns gradients
        node.target, node.args, node.kwargs = torch.nn.functional.embedding, (args[1], args[0]), {}
    elif name == "layer_norm":
        node.target, node.args = torch.nn.functional.layer_norm, tuple(args[:5])
        node.kwargs = {key: value for key, value in kwargs.items() if key != "cudnn_enable"}
    elif name == "slice":
        node.target, node.args, node.kwargs = operator.getitem, (args[0], _sliced(args, kwargs)), {}
    elif name == "index":
        index = tuple(slice(None) if each is None else each for each in args[1])
        node.target, node.args = operator.getitem, (args[0], index)
    elif name in _METHODS:
        node.op, node.target = "call_method", name
        if name != "to" and len(args) == 2 and isinstance(args[1], (list, tuple)):
            args = [args[0], *args[1]]
        node.args = tuple(args)
        node.kwargs = {key: value for key, value in kwargs.items() if key not in ("layout", "pin_memory")}
    else:
        found: Any = _NAMED.get(name) or getattr(torch, name, None)
        if found is not None:
            node.target = found
        elif hasattr(torch.Tensor, name):
            node.op, node.target = "call_method", name


def _sliced(args: list[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """The index of ``x[..., start:end:step, ...]`` along one dimension."""
    names = ("dim", "start", "end", "step")
    given = {"dim": 0, "start": None, "end": None, "step": 1, **kwargs, **dict(zip(names, args[1:], strict=False))}
    dim, end = given["dim"], given["end"]
    cut = slice(given["start"], None if isinstance(end, int) and end == sys.maxsize else end, given["step"])
    if dim < 0:
        return (..., cut, *[slice(None)] * (-dim - 1))
    return (*[slice(None)] * dim, cut)
