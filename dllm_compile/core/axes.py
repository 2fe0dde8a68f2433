"""Follow the batch and token axes of a graph from its seed to its outputs.

The graph is run node by node on fake tensors; a dispatch mode sees the ATen calls under each node and carries a layout
(``layout.py``) along. Element-wise calls are known by their tag, calls with a ``dim`` argument by their schema, and the
few that move axes by the rules below, so the spelling of a model does not matter. A call nobody knows keeps sizes where
they can be told and makes its result *unproven*: the rows of such a value are not known to be independent, and a pass
that wants fewer of them has to prove it by running both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from .errors import GraphRefused
from .layout import Factor, Layout, holds, plain, position, regroup, size

aten = torch.ops.aten
linear = torch.nn.functional.linear
attention = torch.nn.functional.scaled_dot_product_attention


@dataclass
class Axes:
    """What following the axes found.

    Attributes:
        mode: the mode of the fake tensors.
        fake: value of each node on fake tensors (tensors, numbers, tuples of them).
        layout: of each node that is a tensor depending on the seed.
        live: nodes that depend on the seed.
        unproven: live nodes that call something whose rows may mix.
        beside: for a live node, the layouts of its constant operands that have a token axis, at the node's rank.
        made: constants sized by the token count that an unproven node writes or reads by position.
    """

    mode: FakeTensorMode
    fake: dict[torch.fx.Node, Any] = field(default_factory=dict)
    layout: dict[torch.fx.Node, Layout] = field(default_factory=dict)
    live: dict[torch.fx.Node, None] = field(default_factory=dict)
    unproven: set[torch.fx.Node] = field(default_factory=set)
    beside: dict[tuple[torch.fx.Node, torch.fx.Node], Layout] = field(default_factory=dict)
    made: dict[torch.fx.Node, Layout] = field(default_factory=dict)


class _Follow(TorchDispatchMode):
    """Carries layouts through the ATen calls made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.layout: dict[int, Layout] = {}
        self.unproven = False
        self.keep: list[Any] = []  # ids are only unique while their tensors live
        self.beside: dict[int, Layout] = {}
        self.sized: dict[int, Layout] = {}

    def tag(self, tensor: torch.Tensor, layout: Layout) -> None:
        self.keep.append(tensor)
        self.layout[id(tensor)] = layout

    def of(self, value: Any) -> Layout | None:
        return self.layout.get(id(value)) if isinstance(value, torch.Tensor) else None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(id(leaf) in self.layout for leaf in leaves):
            self.follow(func, args, kwargs, leaves, out)
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, leaves: list[torch.Tensor], out: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable and any(id(o) == id(leaf) for o in outputs for leaf in leaves):
            raise GraphRefused(f"{func} changes a value that depends on the tokens in place")
        rule = _RULES.get(func.overloadpacket) or (_elementwise if torch.Tag.pointwise in func.tags else _along)
        found = rule(self, func, args, kwargs, outputs)
        for i, output in enumerate(outputs):
            layout = found[i] if found is not None else None
            self.unproven |= layout is None
            self.tag(output, layout if layout is not None else self.guess(leaves, output))

    def guess(self, leaves: Iterable[torch.Tensor], output: torch.Tensor) -> Layout:
        """Sizes of an unknown call: those of an input of the same shape, or the input's token dimension."""
        known = [(leaf, self.layout[id(leaf)]) for leaf in leaves if id(leaf) in self.layout]
        token_dims = [dim for _, layout in known for dim in layout if holds(dim, "T")]
        for leaf in leaves:
            if id(leaf) not in self.layout and leaf.dim() == 1 and any(leaf.shape[0] == size(d) for d in token_dims):
                self.sized[id(leaf)] = (next(d for d in token_dims if leaf.shape[0] == size(d)),)
        for leaf, layout in known:
            if leaf.shape == output.shape:
                return layout
        out: list[tuple[Factor, ...]] = []
        for extent in output.shape:
            match = next((d for d in token_dims if size(d) == extent), None)
            out.append(match if match and not any(holds(d, "T") for d in out) else plain(extent))
        return tuple(out)


Rule = Callable[[_Follow, Any, Any, Any, list[torch.Tensor]], Sequence[Layout | None] | None]


def _elementwise(
    mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> Sequence[Layout | None] | None:
    """Broadcasting calls: each output dimension takes the factors of the operand that fills it."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return [_broadcast(mode, operands, output) for output in outputs]


def _broadcast(mode: _Follow, operands: Sequence[torch.Tensor], output: torch.Tensor) -> Layout | None:
    rank = output.dim()
    out = [plain(extent) for extent in output.shape]
    for operand in operands:
        for i, dim in enumerate(mode.of(operand) or ()):
            j = rank - operand.dim() + i
            if size(dim) == output.shape[j] and (holds(dim, "T") or holds(dim, "B")):
                if out[j] != plain(output.shape[j]) and out[j] != dim:
                    return None
                out[j] = dim
    for operand in operands:
        layout = mode.of(operand)
        for i, extent in enumerate(operand.shape):
            wanted = out[rank - operand.dim() + i]
            if layout is not None and holds(wanted, "T") and extent != 1 and layout[i] != wanted:
                return None  # tokens against something else of the same size
        if layout is None:
            _note_constant(mode, operand, tuple(out))
    return tuple(out)


def _note_constant(mode: _Follow, operand: torch.Tensor, out: Layout) -> None:
    """Remember that a constant has one entry a token where the result has its tokens."""
    shape = (1,) * (len(out) - operand.dim()) + tuple(operand.shape)
    token = position(out, "T")
    if operand.dim() == 0 or token is None or shape[token] != size(out[token]) or shape[token] == 1:
        return
    layout: list[tuple[Factor, ...]] = []
    for extent, dim in zip(shape, out, strict=True):
        if extent == size(dim):
            layout.append(dim)
        else:
            layout.append((Factor("B", 1),) if holds(dim, "B") else plain(extent))
    if position(tuple(layout), "B") is None:
        return
    mode.keep.append(operand)
    mode.beside[id(operand)] = tuple(layout)


def _along(
    mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> Sequence[Layout | None] | None:
    """Calls with a ``dim``: softmax, means, top-k. Row-wise unless they run along the batch or the tokens."""
    layout = mode.of(args[0]) if args and isinstance(args[0], torch.Tensor) else None
    given = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
    dims = given.get("dim", next((a.default_value for a in func._schema.arguments if a.name == "dim"), None))
    others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.Tensor)]
    if layout is None or dims is None or others:
        return None
    rank = len(layout)
    along = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    if not along or any(holds(layout[d], kind) for d in along for kind in "BT"):
        return None
    found: list[Layout | None] = []
    for output in outputs:
        if output.dim() == rank:
            found.append(tuple(plain(output.shape[i]) if i in along else dim for i, dim in enumerate(layout)))
        elif output.dim() == rank - len(along):
            found.append(tuple(dim for i, dim in enumerate(layout) if i not in along))
        else:
            found.append(None)
    return found


def _same(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    return [mode.of(args[0]) for _ in outputs]


def _view(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    layout = mode.of(args[0])
    return None if layout is None else [regroup(layout, output.shape) for output in outputs]


def _expand(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout, shape = mode.of(args[0]), outputs[0].shape
    assert layout is not None
    new = len(shape) - len(layout)
    old = [dim if size(dim) == shape[new + i] else plain(shape[new + i]) for i, dim in enumerate(layout)]
    return [(*[plain(extent) for extent in shape[:new]], *old)]


def _permute(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = mode.of(args[0])
    assert layout is not None
    rank = len(layout)
    order = list(range(rank))
    if func.overloadpacket is aten.permute:
        order = [d % rank for d in args[1]]
    elif func.overloadpacket is aten.t:
        order.reverse()
    else:
        a, b = args[1] % rank, args[2] % rank
        order[a], order[b] = order[b], order[a]
    return [tuple(layout[i] for i in order)]


def _unsqueeze(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = mode.of(args[0])
    assert layout is not None
    at = args[1] % (len(layout) + 1)
    return [(*layout[:at], plain(1), *layout[at:])]


def _squeeze(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = mode.of(args[0])
    assert layout is not None
    dims = range(len(layout)) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {d % len(layout) for d in dims if size(layout[d]) == 1}
    if any(holds(layout[d], "B") for d in gone):
        return [regroup(layout, outputs[0].shape)]
    return [tuple(dim for i, dim in enumerate(layout) if i not in gone)]


def _slice(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``slice``, ``split`` and ``split_with_sizes``: fine along other dimensions, or when they cut nothing."""
    layout = mode.of(args[0])
    assert layout is not None
    at = args[1] if func.overloadpacket is aten.slice else (args[2] if len(args) > 2 else kwargs.get("dim", 0))
    at %= len(layout)
    cut = any(output.shape[at] != size(layout[at]) for output in outputs)
    if cut and (holds(layout[at], "T") or holds(layout[at], "B")):
        return None
    if not cut:
        return [layout for _ in outputs]
    return [(*layout[:at], plain(output.shape[at]), *layout[at + 1 :]) for output in outputs]


def _select(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``select`` and ``unbind`` drop a dimension."""
    layout = mode.of(args[0])
    assert layout is not None
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(layout)
    if holds(layout[at], "T") or holds(layout[at], "B"):
        return None
    return [(*layout[:at], *layout[at + 1 :]) for _ in outputs]


def _cat(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    parts = [part for part in args[0] if part.numel()]  # caches begin empty
    known = [layout for layout in map(mode.of, parts) if layout is not None]
    stacked = func.overloadpacket is aten.stack
    rank = len(known[0]) + int(stacked)
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    first = known[0] if not stacked else (*known[0][:at], plain(1), *known[0][at:])
    out = (*first[:at], plain(outputs[0].shape[at]), *first[at + 1 :])
    if holds(first[at], "T") or holds(first[at], "B") or len(known) != len(parts):
        return None
    same = all(layout[:at] + layout[at + int(not stacked) :] == out[:at] + out[at + 1 :] for layout in known)
    return [out] if same else None


def _matmul(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``mm``, ``addmm``, ``bmm`` with rows on the left and a constant on the right."""
    left, right = (args[1], args[2]) if func.overloadpacket in (aten.addmm, aten.baddbmm) else (args[0], args[1])
    layout = mode.of(left)
    if layout is None or mode.of(right) is not None or holds(layout[-1], "T") or holds(layout[-1], "B"):
        return None
    return [(*layout[:-1], plain(outputs[0].shape[-1]))]


def _embedding(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    layout = mode.of(args[1])
    return None if layout is None or mode.of(args[0]) is not None else [(*layout, plain(outputs[0].shape[-1]))]


def _norm(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """Layer and root-mean-square norms over trailing dimensions."""
    layout = mode.of(args[0])
    if layout is None or any(holds(dim, k) for dim in layout[len(layout) - len(args[1]) :] for k in "BT"):
        return None
    return [tuple(d if size(d) == n else plain(n) for d, n in zip(layout, o.shape, strict=True)) for o in outputs]


def _gather(mode: _Follow, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    source, index = mode.of(args[0]), mode.of(args[2])
    if source is None or index is None or len(source) != len(index):
        return None
    at = args[1] % len(source)
    fine = all(a == b for i, (a, b) in enumerate(zip(source, index, strict=True)) if i != at)
    return [index] if fine and not holds(source[at], "T") and not holds(source[at], "B") else None


_RULES: dict[Any, Rule] = {
    **dict.fromkeys((aten.view, aten._unsafe_view, aten.reshape, aten._reshape_alias), _view),
    **dict.fromkeys((aten.clone, aten._to_copy, aten.detach, aten.alias, aten.lift_fresh, aten.empty_like), _same),
    **dict.fromkeys((aten.zeros_like, aten.ones_like, aten.full_like), _same),
    **dict.fromkeys((aten.permute, aten.transpose, aten.t), _permute),
    **dict.fromkeys((aten.slice, aten.split, aten.split_with_sizes), _slice),
    **dict.fromkeys((aten.select, aten.unbind), _select),
    **dict.fromkeys((aten.cat, aten.stack), _cat),
    **dict.fromkeys((aten.mm, aten.addmm, aten.bmm, aten.baddbmm), _matmul),
    **dict.fromkeys((aten.native_layer_norm, aten._fused_rms_norm), _norm),
    aten.expand: _expand,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.embedding: _embedding,
    aten.gather: _gather,
}


def _role_call(mode: _Follow, node: torch.fx.Node, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Linear and attention stay whole: their weights may be of any class, their kernels differ by device."""
    if node.target is linear:
        x, weight = args[0], args[1]
        layout = mode.of(x)
        if layout is None or mode.of(weight) is not None or holds(layout[-1], "T"):
            return None
        out = x.new_empty((*x.shape[:-1], weight.shape[0]))
        mode.tag(out, (*layout[:-1], plain(weight.shape[0])))
        return out
    if node.target is attention:
        query, value = args[0], args[2]
        layout = mode.of(query)
        if layout is None:
            return None
        out = query.new_empty((*query.shape[:-1], value.shape[-1]))
        mode.tag(out, (*layout[:-1], plain(value.shape[-1])))
        mask = kwargs.get("attn_mask", args[3] if len(args) > 3 else None)
        if isinstance(mask, torch.Tensor) and mode.of(mask) is None:
            _note_constant(mode, mask, (*layout[:-1], plain(mask.shape[-1])))
        return out
    return None


def follow(graph: torch.fx.Graph, inputs: Sequence[Any], fake_mode: FakeTensorMode, seeds: dict[str, Layout]) -> Axes:
    """Run ``graph`` on fake ``inputs`` and follow the axes that the placeholders named in ``seeds`` start.

    Args:
        graph: a functional torch-level graph whose sizes are numbers.
        inputs: fake tensors or plain values, one a placeholder, made by ``fake_mode``.
        seeds: layout of each placeholder that holds the tokens or what was made of them.

    Raises:
        GraphRefused: a node changes a value that depends on the tokens in place.
    """
    axes = Axes(fake_mode)
    mode = _Follow()
    feed = iter(inputs)
    with fake_mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                value = next(feed)
                if node.name in seeds:
                    mode.tag(value, seeds[node.name])
                    axes.live[node] = None
            else:
                value = _step(mode, node, axes)
            axes.fake[node] = value
            layout = mode.of(value)
            if layout is not None:
                axes.layout[node] = layout
    return axes


def _step(mode: _Follow, node: torch.fx.Node, axes: Axes) -> Any:
    """Run one node; remember which of its constant operands have a token axis."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: axes.fake[n])
    live = any(n in axes.live for n in node.all_input_nodes)
    if not live:
        return run_node(node, args, kwargs)
    axes.live[node] = None
    mode.beside.clear()
    mode.sized.clear()
    mode.unproven = False
    value = _role_call(mode, node, args, kwargs)
    if value is None:
        try:
            with mode:
                value = run_node(node, args, kwargs)
        except GraphRefused as refusal:
            raise GraphRefused(refusal.reason, node) from refusal
    if isinstance(value, torch.Tensor) and mode.of(value) is None:
        raise GraphRefused("the tokens cannot be followed through this call", node)
    if mode.unproven:
        axes.unproven.add(node)
    for operand in node.all_input_nodes:
        if operand in axes.live:
            continue
        if id(axes.fake[operand]) in mode.beside:
            axes.beside[node, operand] = mode.beside[id(axes.fake[operand])]
        if id(axes.fake[operand]) in mode.sized:
            axes.made[operand] = mode.sized[id(axes.fake[operand])]
    return value


def run_node(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    """Call what a node calls."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    raise GraphRefused(f"a {node.op} node is not something the compiler reads", node)


def fake_like(values: Sequence[Any], fake_mode: FakeTensorMode) -> list[Any]:
    """Fake stand-ins for real call arguments, with fixed sizes."""

    def one(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return fake_mode.from_tensor(value, static_shapes=True)
        return value

    return [tree_map(one, value) for value in values]
