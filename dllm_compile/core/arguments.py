"""What a node calls, and its arguments by name, whether they were written by position, by keyword or as in NumPy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.fx

from dllm_compile.compat import OpOverloadPacket, schema

attention = torch.nn.functional.scaled_dot_product_attention
_OTHER_NAMES = {"axis": "dim", "keepdims": "keepdim", "input": "self", "x": "self", "x1": "self", "x2": "other"}


def called(node: torch.fx.Node) -> str:
    """The name of the function or method that a node calls, without its module."""
    return str(getattr(node.target, "__name__", node.target))


class Attended(NamedTuple):
    """Arguments of ``scaled_dot_product_attention``, in the order of its signature."""

    query: Any
    key: Any
    value: Any
    attn_mask: Any = None
    dropout_p: Any = 0.0
    is_causal: Any = False
    scale: Any = None
    enable_gqa: Any = False


def attention_arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Attended:
    """Arguments of a ``scaled_dot_product_attention`` call."""
    return Attended(*args, **kwargs)


def argument(node: torch.fx.Node, place: int, name: str, default: Any = None) -> Any:
    """One argument of a canonical call, see :func:`canonical`: the ``place``-th, or that called ``name``."""
    return node.args[place] if len(node.args) > place else node.kwargs.get(name, default)


def canonical(node: torch.fx.Node) -> bool:
    """Rewrite the arguments of a call in place: those without a default by position; the others as they were, or by the
    name that they have in the signature.

    Of attention all but query, key and value are keywords, and only those that are not their default.

    Returns:
        Whether something changed. A call whose signature is not known stays as it is.
    """
    if node.target is attention:
        read = attention_arguments(node.args, node.kwargs)
        more = [name for name in Attended._fields[3:] if getattr(read, name) != Attended._field_defaults[name]]
        before, node.args = (node.args, node.kwargs), read[:3]
        node.kwargs = {name: getattr(read, name) for name in more}
        return before != (node.args, node.kwargs)
    if not node.kwargs or node.op not in ("call_function", "call_method"):
        return False
    given = set(node.kwargs)
    for names, required in _signatures(node.op, node.target):
        called = {name: _own_name(name, names) for name in given}
        if len(node.args) > len(names) or None in called.values() or set(names[: len(node.args)]) & {*called.values()}:
            continue
        kwargs = {str(called[name]): value for name, value in node.kwargs.items()}
        args = list(node.args)
        while len(args) < required and names[len(args)] in kwargs:
            args.append(kwargs.pop(names[len(args)]))
        if len(args) < required:
            continue
        changed = kwargs.keys() != node.kwargs.keys()
        node.args, node.kwargs = tuple(args), kwargs
        return changed
    return False


def _own_name(name: str, names: Sequence[str]) -> str | None:
    """The name that a signature has for a keyword; ``None`` where it has none."""
    if name in names:
        return name
    other = _OTHER_NAMES.get(name)
    return other if other in names else None


@cache
def _signatures(op: str, target: Any) -> list[tuple[tuple[str, ...], int]]:
    """For each form of a call, the names of its parameters, and how many of them come first, without default and by
    position.
    """
    if op == "call_function":
        try:
            parameters = list(inspect.signature(target).parameters.values())
        except (TypeError, ValueError):
            pass
        else:
            if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
                return []
            free = [p.default is p.empty and p.kind is not p.KEYWORD_ONLY for p in parameters]
            return [(tuple(p.name for p in parameters), _leading(free))]
    packet = getattr(torch.ops.aten, target if isinstance(target, str) else getattr(target, "__name__", ""), None)
    if not isinstance(packet, OpOverloadPacket):
        return []
    out = []
    for overload in packet.overloads():  # type: ignore[no-untyped-call]
        parameters = schema(getattr(packet, overload)).arguments
        if not any(p.is_out for p in parameters):
            free = [not p.has_default_value() and not p.kwarg_only for p in parameters]
            out.append((tuple(p.name for p in parameters), _leading(free)))
    return out


def _leading(free: Sequence[bool]) -> int:
    return next((i for i, one in enumerate(free) if not one), len(free))
