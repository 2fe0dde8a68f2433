"""Follow the batch and token axes of a graph from its seed to its outputs.

The graph is run node by node on fake tensors; a dispatch mode sees the ATen calls under each node and carries a layout
(``layout.py``) along. Element-wise calls are known by their tag, calls with a ``dim`` argument by their schema, and the
few that move axes by the rules below, so the spelling of a model does not matter. An unknown call keeps sizes where
they can be told and makes its result *unproven*: the rows of such a value are not known to be independent, and a pass
that wants fewer of them has to prove it by running both.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import FakeTensor, FakeTensorMode, TorchDispatchMode, schema, storage_id, tree_leaves, tree_map

from .arguments import attention, attention_arguments, called
from .axis_rules import RULES, Known, along, elementwise, note_constant
from .errors import GraphRefused
from .layout import Factor, Layout, holds, plain, size
from .once import Once
from .ranks import joined, looked_up, summed
from .stand_ins import Values, value_of

linear = torch.nn.functional.linear


@dataclass
class Axes:
    """Where batch and tokens are in each value of a graph, and what else running it on fake tensors showed.

    Attributes:
        mode: the mode of the fake tensors.
        size: sequences and tokens of the seed, 0 where there is none.
        fake: value of each node on fake tensors (tensors, numbers, tuples of them).
        layout: of each node that is a tensor depending on the seed.
        live: nodes that depend on the seed.
        unproven: live nodes that call something whose rows may mix.
        beside: for a live node, the layouts of its constant operands that have a token axis, at the node's rank, and of
            those that it reads whole.
        made: constants sized by the token count that an unproven node writes or reads by position; an input, such as a
            weight, is as large by chance, or else a trial shows it.
        whole: live operands that a node reads every row of, whichever it is computed for, with the node: keys and
            values of attention that is written by several calls, and masks that are made of the tokens.
        random: nodes that draw random numbers, live or not.
        shards: live nodes whose value differs between the ranks of tensor parallelism: whether it is a shard, see
            :mod:`dllm_compile.core.ranks`, or something unknown.
        group: the process group of these ranks.
        shares: the operand in whose memory a node's value lies; nodes that are alike may have one fake value.
    """

    mode: FakeTensorMode
    size: tuple[int, int] = (0, 0)
    fake: dict[torch.fx.Node, Any] = field(default_factory=dict)
    layout: dict[torch.fx.Node, Layout] = field(default_factory=dict)
    live: dict[torch.fx.Node, None] = field(default_factory=dict)
    unproven: set[torch.fx.Node] = field(default_factory=set)
    beside: dict[tuple[torch.fx.Node, torch.fx.Node], Layout] = field(default_factory=dict)
    made: dict[torch.fx.Node, Layout] = field(default_factory=dict)
    whole: set[tuple[torch.fx.Node, torch.fx.Node]] = field(default_factory=set)
    random: dict[torch.fx.Node, None] = field(default_factory=dict)
    shards: dict[torch.fx.Node, bool] = field(default_factory=dict)
    group: str | None = None
    shares: dict[torch.fx.Node, torch.fx.Node] = field(default_factory=dict)


class _Follow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Carries layouts through the ATen calls made while it is active."""

    def __init__(self, known: Known) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.unproven = False
        self.random = False
        self.sized: dict[int, Layout] = {}
        self.given: set[int] = set()  # memory of the operands of the node at hand

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.random |= torch.Tag.nondeterministic_seeded in func.tags
        out = func(*args, **kwargs)
        leaves = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if any(id(leaf) in self.known.layout for leaf in leaves):
            self.follow(func, args, kwargs, leaves, out)
        return out

    def follow(self, func: Any, args: Any, kwargs: Any, leaves: list[torch.Tensor], out: Any) -> None:
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        written = [leaf for leaf in leaves if schema(func).is_mutable and any(o is leaf for o in outputs)]
        if any(storage_id(leaf) in self.given for leaf in written):
            raise GraphRefused(f"{func} changes a value that depends on the tokens in place")
        rule = RULES.get(func.overloadpacket) or (elementwise if torch.Tag.pointwise in func.tags else along)
        found = rule(self.known, func, args, kwargs, outputs)
        for i, output in enumerate(outputs):
            layout = found[i] if found is not None else None
            self.unproven |= layout is None
            self.known.tag(output, layout if layout is not None else self.guess(leaves, output))

    def guess(self, leaves: Iterable[torch.Tensor], output: torch.Tensor) -> Layout:
        """Guess the layout of what a call without a rule returns: that of an input of the same shape, or of the same
        but for the last dimension; else each dimension that is as large as a token dimension of an input is taken for
        one.
        """
        known = [(leaf, self.known.layout[id(leaf)]) for leaf in leaves if id(leaf) in self.known.layout]
        token_dims = [dim for _, layout in known for dim in layout if holds(dim, "T")]
        for leaf in leaves:
            if (
                id(leaf) not in self.known.layout
                and leaf.dim() == 1
                and any(leaf.shape[0] == size(d) for d in token_dims)
            ):
                self.sized[id(leaf)] = (next(d for d in token_dims if leaf.shape[0] == size(d)),)
        for leaf, layout in known:
            if leaf.shape == output.shape:
                return layout
        for leaf, layout in known:
            if layout and leaf.shape[:-1] == output.shape[:-1] and not any(holds(layout[-1], kind) for kind in "BT"):
                return (*layout[:-1], plain(output.shape[-1]))
        out: list[tuple[Factor, ...]] = []
        for extent in output.shape:
            match = next((d for d in token_dims if size(d) == extent), None)
            out.append(match if match and not any(holds(d, "T") for d in out) else plain(extent))
        return tuple(out)


def _role_call(mode: _Follow, node: torch.fx.Node, args: Any, kwargs: Any) -> torch.Tensor | None:
    """Linear, attention and sums over ranks stay whole: their weights may be of any class, and kernels differ."""
    if node.target is linear:
        x, weight = args[0], args[1]
        layout = mode.known.of(x)
        if layout is None or mode.known.of(weight) is not None or holds(layout[-1], "T"):
            return None
        out: torch.Tensor = x.new_empty((*x.shape[:-1], weight.shape[0]))
        mode.known.tag(out, (*layout[:-1], plain(weight.shape[0])))
        return out
    if node.target is attention:
        given = attention_arguments(args, kwargs)
        query, value = given.query, given.value
        layout = mode.known.of(query)
        if layout is None:
            return None
        attended: torch.Tensor = query.new_empty((*query.shape[:-1], value.shape[-1]))
        mode.known.tag(attended, (*layout[:-1], plain(value.shape[-1])))
        mask = given.attn_mask
        if isinstance(mask, torch.Tensor):
            note_constant(mode.known, mask, (*layout[:-1], plain(mask.shape[-1])))
            if mode.known.of(mask) is not None:
                mode.known.whole.add(id(mask))
        return attended
    if len(args) == 2 and called(node) in ("matmul", "bmm"):
        return _product(mode, node, *args)
    if node.target in (summed, joined):
        layout = mode.known.of(args[0])
        if layout is None:
            return None
        count = args[1] if node.target is joined else 1
        exchanged: torch.Tensor = args[0].new_empty((*args[0].shape[:-1], args[0].shape[-1] * count))
        mode.known.tag(exchanged, (*layout[:-1], plain(exchanged.shape[-1])))
        return exchanged
    if node.target is looked_up:
        ids, table = args[0], args[1]
        layout = mode.known.of(ids)
        if layout is None or mode.known.of(table) is not None:
            return None
        rows: torch.Tensor = table.new_empty((*ids.shape, table.shape[1]))
        mode.known.tag(rows, (*layout, plain(table.shape[1])))
        return rows
    return None


def _product(mode: _Follow, node: torch.fx.Node, left: Any, right: Any) -> torch.Tensor | None:
    """Run a product of queries and keys, or of scores and values; its rows are those on the left. ``None`` for any
    other product.
    """
    rows, read = mode.known.of(left), mode.known.of(right)
    if rows is None or read is None or left is right or len(rows) != len(read) or len(rows) < 3:
        return None
    tokens, width = rows[-2:]
    scores = read[-1] == tokens and not any(holds(read[-2], kind) for kind in "BT")
    mixed = read[-2] == tokens and width == plain(size(tokens)) and not any(holds(read[-1], kind) for kind in "BT")
    plain_width = not any(holds(width, kind) for kind in "BT")
    if [f.kind for f in tokens] != ["T"] or rows[:-2] != read[:-2] or not plain_width or not (scores or mixed):
        return None
    out: torch.Tensor = run_node(node, (left, right), {})
    mode.known.tag(out, (*rows[:-1], plain(out.shape[-1])))
    mode.known.whole.add(id(right))
    return out


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
    for batch, tokens, *_ in seeds.values():
        axes.size = size(batch), size(tokens)
    mode = _Follow(Known())
    once = Once(mode.known.of)
    feed = iter(inputs)
    with fake_mode, torch.no_grad():
        for node in graph.nodes:
            if node.op == "output":
                break
            if node.op == "placeholder":
                value = next(feed)
                if node.name in seeds:
                    mode.known.tag(value, seeds[node.name])
                    axes.live[node] = None
            else:
                found = once.get(node, axes.fake, partial(_step, mode, node, axes))
                value = found.value
                _note(axes, node, found)
            axes.fake[node] = value
            layout = mode.known.of(value)
            if layout is not None:
                axes.layout[node] = layout
    return axes


def _note(axes: Axes, node: torch.fx.Node, found: _Found) -> None:
    operands = node.all_input_nodes
    if found.live:
        axes.live[node] = None
    if found.unproven:
        axes.unproven.add(node)
    if found.random:
        axes.random[node] = None
    axes.beside.update({(node, operands[i]): layout for i, layout in found.beside})
    axes.whole.update((node, operands[i]) for i in found.whole)
    axes.made.update({operands[i]: layout for i, layout in found.made if operands[i].op != "placeholder"})
    if found.shares is not None:
        axes.shares[node] = operands[found.shares]


@dataclass(frozen=True)
class _Found:
    """The result of running one node; its operands are numbered as in ``all_input_nodes``."""

    value: Any
    live: bool
    unproven: bool = False
    random: bool = False
    beside: tuple[tuple[int, Layout], ...] = ()
    made: tuple[tuple[int, Layout], ...] = ()
    whole: tuple[int, ...] = ()
    shares: int | None = None


def _step(mode: _Follow, node: torch.fx.Node, axes: Axes) -> _Found:
    """Run one node; see which of its constant operands have a token axis."""
    args, kwargs = torch.fx.map_arg((node.args, node.kwargs), lambda n: axes.fake[n])
    operands = node.all_input_nodes
    live = any(n in axes.live for n in operands)
    mode.random = mode.unproven = False
    mode.known.beside.clear()
    mode.known.whole.clear()
    mode.sized.clear()
    value = _role_call(mode, node, args, kwargs) if live else None
    if value is None:
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        mode.given = {storage_id(leaf) for leaf in given} if live else set()
        try:
            with mode:
                value = run_node(node, args, kwargs)
        except GraphRefused as refusal:
            raise GraphRefused(refusal.reason, node) from refusal
    if live and isinstance(value, torch.Tensor) and mode.known.of(value) is None:
        raise GraphRefused("the tokens cannot be followed through this call", node)
    constants = [(i, id(axes.fake[operand])) for i, operand in enumerate(operands) if operand not in axes.live and live]
    whole = [(i, id(axes.fake[n])) for i, n in enumerate(operands) if n in axes.live]
    whole = [(i, key) for i, key in whole if key in mode.known.whole]
    return _Found(
        value,
        live,
        live and mode.unproven,
        _draws(mode, node),
        tuple((i, mode.known.beside[key]) for i, key in [*constants, *whole] if key in mode.known.beside),
        tuple((i, mode.sized[key]) for i, key in constants if key in mode.sized),
        tuple(i for i, _ in whole),
        next((i for i, operand in enumerate(operands) if _share(value, axes.fake[operand])), None),
    )


def _share(a: Any, b: Any) -> bool:
    """Whether two values share memory."""
    stores = [{storage_id(leaf) for leaf in tree_leaves(each) if isinstance(leaf, torch.Tensor)} for each in (a, b)]
    return not stores[0].isdisjoint(stores[1])


def _draws(mode: _Follow, node: torch.fx.Node) -> bool:
    """Whether random numbers were drawn; kernels of attention count as seeded whether they drop out or not."""
    return mode.random and (node.target is not attention or bool(attention_arguments(node.args, node.kwargs).dropout_p))


def run_node(node: torch.fx.Node, args: Any, kwargs: Any) -> Any:
    """Call what a node calls."""
    if node.op == "call_method":
        return getattr(args[0], str(node.target))(*args[1:], **kwargs)
    if node.op == "call_function":
        assert callable(node.target)
        return node.target(*args, **kwargs)
    raise GraphRefused(f"a {node.op} node is not something the compiler reads", node)


def fake_like(values: Sequence[Any], fake_mode: FakeTensorMode, sizes: Values | None) -> list[Any]:
    """Fake arguments of a call, with fixed sizes.

    Args:
        values: the arguments, or what Dynamo shows a backend in their place.
        fake_mode: makes them.
        sizes: of the symbols in what Dynamo shows; without it, its sizes are as they are now.

    Raises:
        GraphRefused: the value of such a size is not known yet.
    """

    def shown(value: Any) -> Any:
        extents, strides = ([_number(n, sizes) for n in of] for of in (value.shape, value.stride()))
        with fake_mode:
            out = torch.empty_strided(extents, strides, dtype=value.dtype, device=value.device)
        return torch.nn.Parameter(out, requires_grad=False) if isinstance(value, torch.nn.Parameter) else out

    def one(value: Any) -> Any:
        if isinstance(value, FakeTensor):
            return shown(value)
        if isinstance(value, torch.Tensor):
            return fake_mode.from_tensor(value, static_shapes=True)
        return _number(value, sizes) if isinstance(value, torch.SymInt) else value

    return [tree_map(one, value) for value in values]


def _number(size: int | torch.SymInt, sizes: Values | None) -> int:
    if not isinstance(size, torch.SymInt):
        return size
    if sizes is not None and size.node.expr.free_symbols <= sizes.keys():
        return value_of(size.node.expr, sizes)
    if sizes is not None or not size.node.has_hint():
        raise GraphRefused("a size depends on the values of a tensor")
    return int(size.node.hint)
