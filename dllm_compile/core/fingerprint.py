"""A hash of what a part of a graph computes: parts with equal hashes share their compiled code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import FakeTensor, is_traceable_wrapper_subclass

from .axes import Axes
from .errors import GraphRefused
from .graph import open_sizes
from .layout import Layout, opened
from .sizes import form, of_constant, of_layout
from .stand_ins import Values, at_values, expressions


def fingerprint(
    nodes: Sequence[torch.fx.Node],
    inputs: Sequence[torch.fx.Node],
    outputs: Sequence[torch.fx.Node],
    axes: Axes,
    values: Values | None = None,
    forms: bool = True,
) -> str:
    """A hash that two parts share when one's compiled code can serve the other, of whatever length and batch.

    Args:
        nodes, inputs, outputs: the part.
        axes: of its graph.
        values: the sizes, where the graph was analyzed at stand-ins for them.
        forms: whether code counts as another where an input lies in memory in another way.

    Raises:
        GraphRefused: without ``values``, a number is computed from sizes, so that no code serves all of them.
    """
    name = {node: f"in{i}" for i, node in enumerate(inputs)}
    lines = [f"in{i} {_signature(node, axes, forms)}" for i, node in enumerate(inputs)]
    for i, node in enumerate(nodes):
        layout, args = axes.layout.get(node), node.args
        if layout is not None:
            args = open_sizes(node, args, opened(layout), "batch * {}".format)
        if values is None and expressions(args, node.kwargs):
            raise GraphRefused("a number here depends on the sizes of the inputs", node)
        args, kwargs = at_values((args, node.kwargs), values or {})
        args, kwargs = torch.fx.map_arg((args, kwargs), torch.fx.Proxy)  # type: ignore[arg-type]
        beside = [axes.beside.get((node, n)) for n in node.all_input_nodes]
        rows = [_rows(layout), *map(_kinds, beside)]
        how = "mixing " * (node in axes.unproven) + {None: "", True: "shard", False: "varying"}[axes.shards.get(node)]
        lines.append(f"n{i} {node.op} {target_name(node)} {_spell(args, name)} {_spell(kwargs, name)} {rows} {how}")
        name[node] = f"n{i}"
    lines.append(" ".join(name[node] for node in outputs))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _rows(layout: Layout | None) -> object:
    """The layout of a value that has rows, for any number of them; the number of dimensions of any other value, whose
    sizes follow from its operands.
    """
    if layout is None:
        return ""
    return opened(layout) if any(factor.kind for dim in layout for factor in dim) else len(layout)


def target_name(node: torch.fx.Node) -> str:
    """What a node calls, as text."""
    if isinstance(node.target, str):
        return node.target
    return f"{getattr(node.target, '__module__', '')}.{getattr(node.target, '__name__', node.target)}"


def _spell(value: Any, name: dict[torch.fx.Node, str]) -> str:
    if isinstance(value, torch.fx.Proxy):
        return name[value.node]
    if isinstance(value, (tuple, list)):
        return "(" + ",".join(_spell(v, name) for v in value) + ")"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{_spell(v, name)}" for k, v in sorted(value.items())) + "}"
    if isinstance(value, slice):
        return f"slice{_spell((value.start, value.stop, value.step), name)}"
    return repr(value)


def _kinds(layout: Layout | None) -> list[list[str]]:
    """Where rows and sequences are in a constant, and whether it has one entry for all of them."""
    return [[f.kind if f.size != 1 else f"one {f.kind}" for f in dim] for dim in layout or ()]


def _signature(node: torch.fx.Node, axes: Axes, forms: bool) -> str:
    value = axes.fake[node]
    if isinstance(value, FakeTensor):
        layout = axes.layout.get(node, axes.made.get(node))
        extents = of_layout(layout) if layout is not None else of_constant(value, *axes.size)
        return f"{type(value)} {value.dtype} {extents} {form(value) if forms else ''} {value.device}"
    return _parts(value)


def _parts(value: Any) -> str:
    """What a constant is, as text; of a tensor made of others, all that code compiled for it takes for granted."""
    if not isinstance(value, torch.Tensor):
        return repr(value)
    own = f"{type(value)} {value.dtype} {tuple(value.shape)} {form(value)} {value.device}"
    if not is_traceable_wrapper_subclass(value):
        return own
    names, context = value.__tensor_flatten__()
    return f"{own} {context} { {name: _parts(getattr(value, name)) for name in names} }"
