"""Normalize: one spelling for what the later passes read.

    before:  x += y ; inv[perm] = arange ; w[:8] = low ; _enter_autocast(enabled=False) ; linear(input=x, weight=w)
    after:   x = x + y ; inv = index_put(inv, (perm,), arange) ; w = assigned(w, slice(8), low) ; (gone) ; linear(x, w)

Numbers are unchanged. What has no functional spelling is refused.
"""

from __future__ import annotations

import inspect
import operator
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import ENTER_AUTOCAST, EXIT_AUTOCAST, NO_EFFECT, is_erased, storage_id
from dllm_compile.core.arguments import called, canonical
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.graph import output_node, replace_call

_IN_PLACE = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
}


def name_arguments(graph: torch.fx.Graph) -> int:
    """Give every call whose signature is known its arguments in one form, see ``canonical``; returns how many changed.

    What runs behind it may read by position whatever has no default.
    """
    return sum(canonical(node) for node in graph.nodes)


def memory_handed_over(graph: torch.fx.Graph, written: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """Nodes that make the memory of one input that of another (``w.data = kept``), and all that is made of the result.

    Some layers do so with their weights at every call. No token has a part in it, and nothing else reads such an input,
    so it may be done before all else. No number is written: inputs that share memory hold what they held.

    Args:
        graph: a copy whose sizes are numbers.
        written: the nodes that change a tensor in place.

    Returns:
        The nodes, in the order of the graph.
    """
    found: set[torch.fx.Node] = set()
    for node in written:
        base = node.args[0] if node.args else None
        if isinstance(base, torch.fx.Node) and base.op == "placeholder":
            behind = _behind(node)
            read = {each for reader in behind for each in reader.all_input_nodes} - behind
            alone = all(each.op == "placeholder" for each in read) and behind >= base.users.keys()
            if alone and output_node(graph) not in behind and all(map(_hands_over, behind & written)):
                found |= behind
    return [node for node in graph.nodes if node in found]


def _hands_over(node: torch.fx.Node) -> bool:
    """Whether a node is ``x.set_(y)``."""
    return called(node) == "set_" and len(node.args) == 2


def _behind(node: torch.fx.Node) -> set[torch.fx.Node]:
    """All nodes that are computed from one, itself included."""
    seen, todo = set(), [node]
    while todo:
        each = todo.pop()
        if each not in seen:
            seen.add(each)
            todo.extend(each.users)
    return seen


def normalize(graph: torch.fx.Graph, fake: dict[torch.fx.Node, Any], written: set[torch.fx.Node]) -> int:
    """Rewrite ``graph`` in place; returns how many nodes changed.

    Args:
        graph: a copy whose sizes are numbers.
        fake: fake value of each node, to tell which nodes share memory.
        written: the nodes that change a tensor in place, whatever they call.

    Raises:
        GraphRefused: a node changes an input in place, or a view of a value that is used later, or in a way that has
            no functional spelling; or autocast is on.
    """
    changed = 0
    for node in list(graph.nodes):
        name = called(node)
        if is_erased(node):
            continue
        if name in NO_EFFECT:
            if name == ENTER_AUTOCAST:
                _check_autocast(node)
            changed += _drop(graph, node)
        elif node.op == "call_method" and name in ("type_as", "to") and _follows_a_tensor(node):
            other = fake[node.args[1]]
            node.target, node.args = "to", (node.args[0],)
            node.kwargs = {"dtype": other.dtype, "device": other.device}
            changed += 1
        elif name == "narrow" and fake[node].shape == fake[node.args[0]].shape:
            node.replace_all_uses_with(node.args[0])  # it cuts nothing, and would of fewer rows
            graph.erase_node(node)
            changed += 1
        elif node in written or node.target in _IN_PLACE or node.target is operator.setitem:
            _make_functional(node, fake)
            changed += 1
    graph.eliminate_dead_code()
    return changed


def _check_autocast(node: torch.fx.Node) -> None:
    device = str(node.args[0])
    if (len(node.args) > 2 and node.args[2] and node.args[2] is not None) or torch.is_autocast_enabled(device):
        raise GraphRefused("autocast is on; call the model in the dtype of its weights instead", node)


def _drop(graph: torch.fx.Graph, node: torch.fx.Node) -> int:
    for user in list(node.users):
        if getattr(user.target, "__name__", "") != EXIT_AUTOCAST:
            return 0
        graph.erase_node(user)
    graph.erase_node(node)
    return 1


def _follows_a_tensor(node: torch.fx.Node) -> bool:
    """Whether a node is ``table.type_as(x)``, which reads the dtype of ``x`` and not its rows."""
    return len(node.args) > 1 and isinstance(node.args[1], torch.fx.Node)


def _make_functional(node: torch.fx.Node, fake: dict[torch.fx.Node, Any]) -> None:
    base = node.args[0] if node.args else None
    if not isinstance(base, torch.fx.Node):
        raise GraphRefused("a tensor is changed in place", node)
    if not isinstance(fake[base], torch.Tensor):  # numbers have no memory to share
        if node.target in _IN_PLACE:
            replace_call(node, _IN_PLACE[node.target], node.args)
            return
        raise GraphRefused("an item of something that is not a tensor is assigned", node)
    _check_unshared(node, base, fake)
    if node.target is operator.setitem:
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        values = [fake[each] if isinstance(each, torch.fx.Node) else each for each in (*index, node.args[2])]
        if all(isinstance(each, torch.Tensor) for each in values) and values[-1].dtype == fake[base].dtype:
            replace_call(node, torch.index_put, (base, index, node.args[2]))
        else:
            replace_call(node, assigned, node.args)
        fake[node] = fake[base]
    elif node.target in _IN_PLACE:
        replace_call(node, _IN_PLACE[node.target], node.args)
    else:
        _call_functional(node)
    for user in list(base.users):
        if node < user:
            user.replace_input_with(base, node)


def assigned(x: torch.Tensor, index: Any, value: Any) -> torch.Tensor:
    """``x`` with ``x[index] = value``, of the same shape; ``x`` stays as it is."""
    out = x.clone()
    out[index] = value
    return out


def _call_functional(node: torch.fx.Node) -> None:
    """``x.f_()`` becomes ``x.f()``, ``torch.f_(x)`` becomes ``torch.f(x)``, and ``inplace=True`` becomes ``False``."""
    name = called(node)
    if node.op == "call_method" and hasattr(torch.Tensor, name[:-1]) and name not in ("copy_", "set_", "resize_"):
        node.target = name[:-1]
        return
    for home in (torch, torch.nn.functional):
        if node.op == "call_function" and name.endswith("_") and getattr(home, name, None) is node.target:
            functional = getattr(home, name[:-1], None)
            if functional is not None:
                node.target = functional
                return
    if node.op == "call_function" and getattr(node.target, "__module__", None) == torch.nn.functional.__name__:
        given = inspect.signature(node.target).bind(*node.args, **node.kwargs)  # type: ignore[arg-type]
        if given.arguments.get("inplace"):
            given.arguments["inplace"] = False
            node.args, node.kwargs = given.args, given.kwargs
            return
    raise GraphRefused(f"{name} changes a tensor in place", node)


def _check_unshared(node: torch.fx.Node, base: torch.fx.Node, fake: dict[torch.fx.Node, Any]) -> None:
    """Nothing but ``base`` itself may see the write: no input, no other view used later."""
    storage = storage_id(fake[base])
    later = False
    for other in node.graph.nodes:
        later = later or other is node
        value = fake.get(other)
        if not isinstance(value, torch.Tensor) or other in (base, node) or storage_id(value) != storage:
            continue
        if other.op == "placeholder":
            raise GraphRefused("an input is changed in place", node)
        order = {n: i for i, n in enumerate(node.graph.nodes)}
        if order[other] < order[node] and any(order[user] > order[node] for user in other.users):
            raise GraphRefused("a tensor is changed in place while a view of it is still in use", node)
    if base.op == "placeholder":
        raise GraphRefused("an input is changed in place", node)
