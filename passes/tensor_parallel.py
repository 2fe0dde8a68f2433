"""Make a graph of ``DTensor`` values one of what each rank holds of them, and of the sums and joins between ranks.

    before:  h = from_local(x, R) ; y = linear(h, W: Shard(0)) ; q = to_local(y)         q, k, v, and the MLP's first
             h = from_local(A, Shard(-1)) ; y = linear(h, W: Shard(1)) ; y = redistribute(y, R) ; z = to_local(y)
    after:   q = linear(x, local(W))
             z = summed(linear(A, local(W)), group)

             y = linear(A, to_local(W)) ; s = wait(all_reduce(y)) ; y.copy_(s)
    after:   y = summed(linear(A, local(W)), group)

``parallelize_module`` writes the first, at hooks of the modules that it shards; transformers, too, with gradients, and
the second without. What is behind the pass reads plain
tensors, and :func:`dllm_compile.core.ranks.kinds` says which of them are shards. A placement is never guessed: Dynamo's
example of each value says it, and what a graph calls a shard, a sum or a whole must have been made as one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import is_dtensor
from dllm_compile.core.arguments import called
from dllm_compile.core.axes import Axes, linear
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.graph import output_node
from dllm_compile.core.ranks import is_collective, joined, kinds, local, looked_up, shard, summed
from dllm_compile.core.units import Unit

WHOLE, SHARD, PARTIAL = "whole", "shard", "partial"
UNTOLD = "ranks exchange values here, and what each of them holds cannot be told"


def localized(graph: torch.fx.Graph) -> torch.fx.Graph:
    """A copy of a graph as Dynamo traced it, without ``DTensor`` values but for weights; itself, where it has none.

    Raises:
        GraphRefused: ranks exchange values in a way that is not known here, or a value is laid out in another way than
            by its features over one dimension of ranks.
    """
    shared = any(is_dtensor(node.meta.get("example_value")) for node in graph.nodes)
    for node in graph.nodes:
        if is_collective(node) and not (shared and called(node) in {"from_local", *_EXCHANGES}):
            raise GraphRefused(UNTOLD, node)
    if not shared:
        return graph
    return _Localizer(graph).write()


def find_shards(graph: torch.fx.Graph, axes: Axes) -> None:
    """Note in ``axes`` which values are shards, and the process group whose ranks hold them.

    Args:
        graph: normalized, behind :func:`localized`.
        axes: of the graph.

    Raises:
        GraphRefused: the graph returns what differs between ranks.
    """
    groups = {node.args[-1] for node in graph.nodes if node.target in (summed, joined)}
    found = kinds(graph, axes.fake)
    if not groups and not found:
        return
    for node in output_node(graph).all_input_nodes:
        if node in found:
            raise GraphRefused("what the graph returns differs between ranks: give output_layouts=Replicate()", node)
    if len(groups) != 1:
        raise GraphRefused("ranks hold different values, and nothing joins them", next(iter(found), None))
    axes.group = str(*groups)
    axes.shards = {node: kind == "shard" for node, kind in found.items() if node in axes.live}


def refuse_shards_between(units: Iterable[Unit], axes: Axes) -> None:
    """Check that what goes from a unit to another is the same on every rank.

    Raises:
        GraphRefused: a hidden state is a shard.
    """
    for node in (n for unit in units for n in (unit.stream, *unit.outputs) if n is not None):
        if node in axes.shards:
            raise GraphRefused("what goes from a layer to the next differs between ranks", node)


class _Localizer:
    """A graph being rewritten.

    Attributes:
        env: the new node of each old one; of a ``DTensor``, what this rank has of it.
        bias: what is to be added to a partial sum once it is summed.
        looked_up: lookups whose ranks' partial sums are summed where they are made.
        said: nodes of the new graph that the old one says something of: what each rank has, and where it is said.
    """

    def __init__(self, graph: torch.fx.Graph) -> None:
        self.old, self.graph = graph, torch.fx.Graph()
        self.env: dict[torch.fx.Node, torch.fx.Node] = {}
        self.bias: dict[torch.fx.Node, torch.fx.Node] = {}
        self.looked_up: set[torch.fx.Node] = set()
        self.said: list[tuple[torch.fx.Node, str, torch.fx.Node]] = []
        self.groups: set[str] = set()

    def write(self) -> torch.fx.Graph:
        for node in self.old.nodes:
            given = [each for each in node.all_input_nodes if is_dtensor(_example(each))]
            exchange = _EXCHANGES.get(called(node))
            if exchange is not None:
                self.env[node] = exchange(self, node)
                continue
            if node.op == "placeholder" or not (given or is_dtensor(_example(node))):
                self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
                continue
            value = _example(node) if is_dtensor(_example(node)) else _example(given[0])
            self._look_at(value, node)
            rule = _RULES.get(called(node).removeprefix("prim").lstrip(" _"))
            if rule is None:
                raise GraphRefused("a call of sharded values that the compiler does not know", node)
            self.env[node] = rule(self, node)
        self._check()
        return self.graph

    def _look_at(self, value: Any, node: torch.fx.Node) -> None:
        """Check that a value is laid out over one dimension of ranks, in equal parts."""
        mesh = value.device_mesh
        if mesh.ndim != 1:
            raise GraphRefused(f"a value is laid out over {mesh.ndim} dimensions of ranks", node)
        self.groups.add(mesh.get_group().group_name)
        if len(self.groups) > 1:
            raise GraphRefused("values are laid out over different groups of ranks", node)
        (placement,), count = value.placements, mesh.size()
        if placement.is_shard():
            whole, part = (each.shape[placement.dim] for each in (value, _local(value)))
            if whole % count or part * count != whole:
                raise GraphRefused(f"{whole} features are laid out over {count} ranks in unequal parts", node)

    def _check(self) -> None:
        """Check that what each rank has of a value is of the kind that the graph says."""
        examples = {node: node.meta.get("example_value") for node in self.graph.nodes}
        found = kinds(self.graph, examples)
        for node, said, where in self.said:
            made = found.get(node, WHOLE)
            if made != said and called(where) == "all_reduce":
                raise GraphRefused(UNTOLD, where)
            if made != said:
                raise GraphRefused(f"what each rank has here is said to be {said}, and was made as {made}", where)

    def _call(self, node: torch.fx.Node, target: Callable[..., Any], args: tuple[Any, ...]) -> torch.fx.Node:
        """A call of the new graph in the place of ``node``."""
        made = self.graph.call_function(target, args)
        made.meta = dict(node.meta)
        if is_dtensor(made.meta.get("example_value")):
            made.meta["example_value"] = _local(made.meta["example_value"])
        return made

    def all_reduce(self, node: torch.fx.Node) -> torch.fx.Node:
        """A sum that the model itself asks for, of a projection of what each rank has."""
        args: Any = node.args
        x, how, group = args
        if how != "sum" or x.target is not linear or [called(user) for user in node.users] != ["wait_tensor"]:
            raise GraphRefused(UNTOLD, node)
        self.groups.add(group)
        if len(self.groups) > 1:
            raise GraphRefused("values are laid out over different groups of ranks", node)
        made = self._call(node, summed, (self.env[x], group))
        self.said.append((made, WHOLE, node))
        return made

    def wait_tensor(self, node: torch.fx.Node) -> torch.fx.Node:
        """The sum itself: ``all_reduce`` is written as a call that waits."""
        (begun,) = node.all_input_nodes
        if called(begun) != "all_reduce":
            raise GraphRefused(UNTOLD, node)
        return self.env[begun]

    def copy_(self, node: torch.fx.Node) -> torch.fx.Node:
        """``torch.distributed.all_reduce`` writes the sum over its summand; from then on that is the sum."""
        x, *more = node.all_input_nodes
        (begun,) = more[0].all_input_nodes if more and called(more[0]) == "wait_tensor" else (None,)
        if begun is None or begun.args[0] is not x:
            return self.graph.node_copy(node, self.env.__getitem__)
        if any(user in self.env for user in x.users if user is not begun):
            raise GraphRefused("what ranks sum in place is read before, perhaps by a view", node)
        self.env[x] = self.env[more[0]]
        return self.env[x]

    def from_local(self, node: torch.fx.Node) -> torch.fx.Node:
        """``DTensor.from_local``: the value is what the rank has, as it is."""
        if _checks(node):
            raise GraphRefused("from_local(run_check=True) makes ranks exchange values", node)
        x, placed = node.all_input_nodes[0], _placed(_example(node), node)
        if is_dtensor(_example(x)) or _local(_example(node)).shape != _example(x).shape:
            raise GraphRefused("from_local is called in a way that the compiler does not know", node)
        self.said.append((self.env[x], placed, node))
        return self.env[x]

    def to_local(self, node: torch.fx.Node) -> torch.fx.Node:
        """``DTensor.to_local``: of a weight, what :func:`local` reads."""
        (x,) = node.all_input_nodes
        if x.op == "placeholder":
            return self._call(node, local, (self.env[x],))
        if _placed(_example(x), node) == PARTIAL:
            raise GraphRefused("a partial sum is handed on as it is", node)
        return self.env[x]

    def redistribute(self, node: torch.fx.Node) -> torch.fx.Node:
        """``DTensor.redistribute``: a sum, a join, or a part of what every rank has."""
        x = node.all_input_nodes[0]
        if x.op == "placeholder":
            raise GraphRefused("a weight is redistributed at every call", node)
        if _example(node).dtype != _example(x).dtype:
            raise GraphRefused("redistribute changes the dtype", node)
        mesh = _example(x).device_mesh
        group, count = mesh.get_group().group_name, mesh.size()
        before, behind = _placed(_example(x), node), _placed(_example(node), node)
        if before == behind:
            return self.env[x]
        if x in self.looked_up and behind == WHOLE:
            return self.env[x]
        if before == PARTIAL and behind == WHOLE and x not in self.looked_up:
            total = self._call(node, summed, (self.env[x], group))
            return total if x not in self.bias else self._call(node, torch.add, (total, self.bias[x]))
        if before == SHARD and behind == WHOLE:
            return self._call(node, joined, (self.env[x], count, group))
        if before == WHOLE and behind == SHARD:
            return self._call(node, shard, (self.env[x], mesh.get_local_rank(), count))
        raise GraphRefused(f"what each rank has is made {behind} from {before}", node)

    def embedding(self, node: torch.fx.Node) -> torch.fx.Node:
        """Rows of a table that is shared by rows (each rank has some tokens) or by features."""
        given: list[Any] = [*node.args, None, None]
        ids, weight, _, most = given[:4]
        if node.kwargs or most is not None or weight.op != "placeholder" or not is_dtensor(_example(weight)):
            raise GraphRefused("a lookup in a shared table that the compiler does not know", node)
        table, (placement,) = self._part(node, weight), _example(weight).placements
        if not placement.is_shard(0):
            made = self._call(node, torch.nn.functional.embedding, (self.env[ids], table))
            self.said.append((made, _placed(_example(node), node), node))
            return made
        if not is_dtensor(_example(ids)) or _placed(_example(ids), node) != WHOLE:
            raise GraphRefused("a lookup in a shared table that the compiler does not know", node)
        mesh = _example(weight).device_mesh
        rank, group = mesh.get_local_rank(), mesh.get_group().group_name
        made = self._call(node, looked_up, (self.env[ids], table, rank, group))
        self.said.append((made, WHOLE, node))
        self.looked_up.add(node)
        return made

    def linear(self, node: torch.fx.Node) -> torch.fx.Node:
        """A projection: the same of what each rank has. The bias of a partial sum is added to the sum."""
        given: list[Any] = list(node.args)
        if node.kwargs or not all(each is None or is_dtensor(_example(each)) for each in given):
            raise GraphRefused("a projection of sharded and of other values", node)
        x, weight, bias = (*given, None)[:3]
        parts = [self._part(node, each) for each in (x, weight)]
        placed = _placed(_example(node), node)
        if bias is not None and placed == PARTIAL:
            self.bias[node] = self._part(node, bias)
        elif bias is not None:
            parts.append(self._part(node, bias))
        made = self._call(node, linear, tuple(parts))
        self.said.append((made, placed, node))
        if node in self.bias:
            self.said.append((self.bias[node], WHOLE, node))
        return made

    def _part(self, node: torch.fx.Node, value: Any) -> torch.fx.Node:
        """What this rank has of an argument of ``node``."""
        if value.op != "placeholder":
            return self.env[value]
        self._look_at(_example(value), node)
        made = self._call(node, local, (self.env[value],))
        made.meta["example_value"] = _local(_example(value))
        return made


_RULES: dict[str, Callable[[_Localizer, torch.fx.Node], torch.fx.Node]] = {
    "from_local": _Localizer.from_local,
    "to_local": _Localizer.to_local,
    "redistribute": _Localizer.redistribute,
    "linear": _Localizer.linear,
    "embedding": _Localizer.embedding,
}
_EXCHANGES: dict[str, Callable[[_Localizer, torch.fx.Node], torch.fx.Node]] = {
    "all_reduce": _Localizer.all_reduce,
    "wait_tensor": _Localizer.wait_tensor,
    "copy_": _Localizer.copy_,
}


def _example(node: torch.fx.Node) -> Any:
    """A value as Dynamo shows it."""
    return node.meta.get("example_value")


def _local(value: Any) -> Any:
    with torch.no_grad():
        return value.to_local()


def _placed(value: Any, node: torch.fx.Node) -> str:
    """What each rank has of a ``DTensor`` that is no weight.

    Raises:
        GraphRefused: it is laid out otherwise than by its features, or reduced otherwise than by a sum.
    """
    (placement,) = value.placements
    if placement.is_replicate():
        return WHOLE
    if placement.is_partial() and placement.reduce_op == "sum":
        return PARTIAL
    if placement.is_shard() and type(placement).__name__ == "Shard" and placement.dim % value.dim() == value.dim() - 1:
        return SHARD
    raise GraphRefused(f"a value is laid out over ranks as {placement}, not by its features", node)


def _checks(node: torch.fx.Node) -> bool:
    """Whether ``from_local`` checks that ranks agree. Until torch 2.12, what it is called with is in its closure."""
    args, kwargs = node.args[1:], dict(node.kwargs)
    if inspect.isfunction(node.target) and node.target.__closure__:
        held = inspect.getclosurevars(node.target).nonlocals
        args, kwargs = held.get("args_as_value", ()), held.get("kwargs_as_value", {})
    return bool(kwargs.get("run_check", args[2] if len(args) > 2 else False))
