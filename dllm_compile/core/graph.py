"""Torch-level FX graphs: copy them with fixed sizes, and take sizes out of calls again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
import torch.fx

from dllm_compile.compat import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    TorchDispatchMode,
    get_unwrapped,
    is_functorch_wrapped_tensor,
    schema,
    storage_id,
    tree_any,
    tree_leaves,
)

from .arguments import called
from .axes import Axes, run_node
from .errors import GraphRefused
from .layout import Dim, Layout, is_open, opened
from .once import Once
from .stand_ins import StandIns, expr_of, is_apart, whole_numbers


def placeholders(graph: torch.fx.Graph) -> list[torch.fx.Node]:
    """The inputs of a graph, in order."""
    return [node for node in graph.nodes if node.op == "placeholder"]


def output_node(graph: torch.fx.Graph) -> torch.fx.Node:
    """The output node of a graph."""
    node: torch.fx.Node = next(node for node in reversed(graph.nodes) if node.op == "output")
    return node


def has_tensor(value: Any) -> bool:
    """Whether a value is or holds a tensor."""
    return bool(tree_any(lambda leaf: isinstance(leaf, torch.Tensor), value))


def numbers(graph: torch.fx.Graph) -> list[int]:
    """Inputs that are read as numbers: Dynamo hands a float that may change over as a tensor, and reads its item."""
    return [i for i, node in enumerate(placeholders(graph)) if any(_reads_number(user) for user in node.users)]


def _reads_number(node: torch.fx.Node) -> bool:
    return node.op == "call_method" and node.target == "item"


class Fixed(NamedTuple):
    """A graph whose sizes are numbers.

    Attributes:
        graph: the copy.
        fake: the fake value of each of its nodes.
        written: the nodes that change a tensor in place, whatever they call.
    """

    graph: torch.fx.Graph
    fake: dict[torch.fx.Node, Any]
    written: set[torch.fx.Node]


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees whether any ATen call, or custom one, writes to memory of the operands of a node."""

    supports_higher_order_operators = True  # such as FlexAttention, which have no schema
    operands: frozenset[int] = frozenset()
    written = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = schema(func)
        if known is not None and known.is_mutable:
            given = {**dict(zip([a.name for a in known.arguments], args, strict=False)), **(kwargs or {})}
            changed = [given.get(a.name) for a in known.arguments if a.alias_info is not None and a.alias_info.is_write]
            self.written |= not self.operands.isdisjoint(_storages(changed))
        return func(*args, **(kwargs or {}))


def _storages(values: Any) -> frozenset[int]:
    found = set()
    for value in tree_leaves(values):
        while isinstance(value, torch.Tensor) and is_functorch_wrapped_tensor(value):
            value = get_unwrapped(value)  # inside of a ``vmap``
        if isinstance(value, torch.Tensor):
            found.add(storage_id(value))
    return frozenset(found)


def fix_sizes(
    graph: torch.fx.Graph,
    inputs: Sequence[Any],
    fake_mode: FakeTensorMode,
    given: Sequence[Any],
    stand_ins: StandIns | None,
) -> Fixed:
    """Copy ``graph`` with every number that is computed from sizes or scalars replaced by its value for ``inputs``.

    A graph that Dynamo traced with symbolic sizes becomes one with fixed sizes; placeholders stay as they are, so that
    the copy is called with the same arguments.

    Args:
        graph: as Dynamo made it.
        inputs: fake tensors and numbers, one a placeholder.
        fake_mode: the mode of the fake tensors.
        given: what ``inputs`` stand for, to read the numbers of.
        stand_ins: the sizes of ``inputs``, where they stand for any; numbers that are computed of them are
            :class:`dllm_compile.core.stand_ins.Computed` then.

    Raises:
        GraphRefused: a size or a number depends on the values of a tensor, or, with ``stand_ins``, it is unknown how
            a number is computed from sizes.
    """
    found = _fixed(graph, inputs, fake_mode, given, stand_ins, Once())
    if found.written:  # who else sees a write is told by shared memory
        return _fixed(graph, inputs, fake_mode, given, stand_ins, Once(off=True))
    return found


def _fixed(
    graph: torch.fx.Graph,
    inputs: Sequence[Any],
    fake_mode: FakeTensorMode,
    given: Sequence[Any],
    stand_ins: StandIns | None,
    once: Once,
) -> Fixed:
    inputs_of = placeholders(graph)
    scalars = {inputs_of[i]: given[i].item() for i in numbers(graph) if i < len(given) and _is_known(given[i])}
    out = torch.fx.Graph()
    env: dict[torch.fx.Node, Any] = {}
    fake: dict[torch.fx.Node, Any] = {}
    written: set[torch.fx.Node] = set()
    feed = iter(inputs)

    def run(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
        watch.operands = _storages((args, kwargs))
        value = run_node(node, args, kwargs)
        if watch.written:
            written.add(node)
            watch.written = False
        return value

    def number(node: torch.fx.Node) -> Any:
        value = tuple(fake[node]) if isinstance(fake[node], torch.Size) else fake[node]
        return value if stand_ins is None else stand_ins.computed(node, value)

    with fake_mode, torch.no_grad(), _Watch() as watch:  # type: ignore[no-untyped-call]
        for node in graph.nodes:
            if node.op == "placeholder":
                copied = out.node_copy(node)
                fake[node] = next(feed)
                env[node] = copied if has_tensor(fake[node]) or not node.users else number(node)
            elif node.op == "output":
                out.output(torch.fx.map_arg(node.args[0], lambda n: env[n]))
            else:
                args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: fake[n])
                try:
                    if _reads_number(node) and node.args[0] in scalars:
                        fake[node] = scalars[node.args[0]]
                    else:
                        fake[node] = once.get(node, fake, partial(run, node, args, kwargs))
                except (DataDependentOutputException, DynamicOutputShapeException) as error:
                    raise GraphRefused("a size or a number here depends on the values of a tensor", node) from error
                if has_tensor(fake[node]) or fake[node] is None or not _is_literal(fake[node]):
                    copied = out.node_copy(node, lambda n: env[n])
                    env[node] = copied
                else:
                    env[node] = number(node)
    copies = {node: copied for node, copied in env.items() if isinstance(copied, torch.fx.Node)}
    values = {copied: fake[node] for node, copied in copies.items()}
    return Fixed(out, values, {copies[node] for node in written if node in copies})


def _is_known(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) and value.device.type == "cpu"


def _is_literal(value: Any) -> bool:
    if isinstance(value, (tuple, list, torch.Size)):
        return all(map(_is_literal, value))
    return isinstance(value, (int, float, bool, str, torch.dtype, torch.device))


def refuse_unfollowed(
    nodes: Iterable[torch.fx.Node],
    handed: Collection[torch.fx.Node],
    axes: Axes,
    seed: torch.fx.Node,
    sizes: Iterable[int],
) -> None:
    """Check that what was found of a graph at stand-ins for its sizes holds at any sizes.

    Where code is written by the layout of a value, the value must be as large as that says, in Dynamo's symbols too,
    and no number may have come from the stand-ins unnoticed, by arithmetic of ours.

    Args:
        nodes: of the graph, all that run.
        handed: those that are kept, or handed from a part of the graph to another.
        axes: of the graph.
        seed: the input that the tokens enter by.
        sizes: the stand-ins.

    Raises:
        GraphRefused: an extent or a number may be another at another size.
    """
    batch, tokens = seed.meta["example_value"].shape[:2]
    for node in nodes:
        layout, shown = axes.layout.get(node), node.meta.get("example_value")
        written = node in handed or called(node) in _SIZED_METHODS
        if layout is not None and written and isinstance(shown, torch.Tensor):
            wanted = [expr_of(extent_of(dim, batch, tokens)) for dim in layout]
            if wanted != [expr_of(size) for size in shown.shape]:
                raise GraphRefused("an extent here is computed from the sizes of the inputs", node)
        args = node.args if layout is None else open_sizes(node, node.args, opened(layout), str)
        found = whole_numbers((args, node.kwargs))
        if not all(is_apart(size, found) for size in sizes):
            raise GraphRefused("a number here may have been computed from the sizes of the inputs", node)


def extent_of(dim: Dim, batch: Any, tokens: Any) -> Any:
    """The extent of a dimension, for these numbers of sequences and of tokens."""
    return prod({"B": batch, "T": tokens}.get(factor.kind, factor.size) for factor in dim)


def replace_call(node: torch.fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Turn a node into another call in place, so that its name, users and source line stay."""
    node.op = "call_function"
    node.target = target
    node.args = args
    node.kwargs = {}


_SIZED_METHODS = {"view", "reshape", "expand", "broadcast_to", "unflatten"}


def open_sizes(
    node: torch.fx.Node, args: tuple[Any, ...], layout: Layout, batch: Callable[[int], Any]
) -> tuple[Any, ...]:
    """Take the numbers of tokens and of sequences out of the sizes among the arguments of ``node``.

    The dimension of the tokens becomes -1, and a -1 elsewhere the size it stood for, so that one code serves any.

    Args:
        node: any call.
        args: its arguments.
        layout: of its result, with the sizes that may be any open.
        batch: gives the number of sequences times a number.
    """
    name = called(node)
    if name not in _SIZED_METHODS:
        return args
    first = 2 if name == "unflatten" else 1
    if len(args) <= first:  # named by keywords
        return args
    packed = isinstance(args[first], (tuple, list, torch.Size))
    given = list(args[first]) if packed else list(args[first:])
    if not all(isinstance(each, (int, torch.fx.Node)) for each in given):  # view(dtype)
        return args
    offset = args[1] % (len(layout) - len(given) + 1) if name == "unflatten" else 0
    dims = layout[offset : offset + len(given)]
    if not any(is_open(dim) and given[i] != -1 for i, dim in enumerate(dims)):
        return args

    def extent(dim: Dim) -> Any:
        several = prod(factor.size for factor in dim if factor.size)
        return batch(several) if is_open(dim) else several

    tokens = [any(factor.kind == "T" and not factor.size for factor in dim) for dim in dims]
    given = [-1 if any_number else extent(dim) for any_number, dim in zip(tokens, dims, strict=True)]
    return (*args[:first], tuple(given)) if packed else (*args[:first], *given)
