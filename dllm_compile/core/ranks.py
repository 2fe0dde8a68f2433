"""Values that differ between the ranks of tensor parallelism, and how ranks come to agree.

    q, k, v = a Wq, a Wk, a Wv     each rank has some columns of these weights, so the heads that they make
    A       = sum over ranks of attention(q, k, v) Wo          each has the rows of Wo that its heads meet
    x       = x + A                                            the same on every rank

A value is the same on all ranks, a *shard* (each rank has some of its features) or a *partial sum* (each rank has a
summand). A statistic over all features of a row is a sum over ranks of what each finds in its shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.fx

from dllm_compile.compat import all_gather, all_reduce, wait_tensor

Kind = Literal["shard", "partial", "columns", "rows", "other"]
"""``"columns"`` and ``"rows"`` are of weights: what each rank has of their outputs, and of their inputs."""
_linear = torch.nn.functional.linear


def local(weight: Any) -> torch.Tensor:
    """This rank's part of a ``DTensor``, as a plain tensor."""
    found: torch.Tensor = weight.to_local()
    return found


def summed(x: torch.Tensor, group: str) -> torch.Tensor:
    """The sum of ``x`` over the ranks of a process group, the same numbers on each; ``x`` stays as it is."""
    total: torch.Tensor = wait_tensor(all_reduce(x.contiguous(), "sum", group))
    return total


def largest(x: torch.Tensor, group: str) -> torch.Tensor:
    """The largest of each number of ``x`` over the ranks of a process group."""
    found: torch.Tensor = wait_tensor(all_reduce(x.contiguous(), "max", group))
    return found


def joined(x: torch.Tensor, count: int, group: str) -> torch.Tensor:
    """``x`` ``[..., d / count]`` of all ``count`` ranks side by side, ``[..., d]``."""
    every = wait_tensor(all_gather(x.contiguous(), count, group))
    return every.view(count, *x.shape).movedim(0, -2).flatten(-2)


def shard(x: torch.Tensor, rank: int, count: int) -> torch.Tensor:
    """The part ``[..., d / count]`` of ``x`` ``[..., d]`` that rank number ``rank`` of ``count`` has."""
    width = x.shape[-1] // count
    return x.narrow(-1, rank * width, width)


def looked_up(ids: torch.Tensor, table: torch.Tensor, rank: int, group: str) -> torch.Tensor:
    """Rows of a table that are shared by the ranks of a process group: each has ``V / count`` rows of it.

    Args:
        ids: ``[...]``, the same on every rank.
        table: ``[V / count, d]``, this rank's rows; those of rank 0 are the first.
        rank: of this process.
        group: the process group.

    Returns:
        ``[..., d]``, the same on every rank.
    """
    at = ids - rank * table.shape[0]
    mine = (at >= 0) & (at < table.shape[0])
    found = torch.nn.functional.embedding(at.where(mine, 0), table)
    return summed(found.where(mine.unsqueeze(-1), 0), group)


def looks_up(node: torch.fx.Node) -> bool:
    """Whether a node looks up rows of a table, ``args[1]``, by ids, ``args[0]``."""
    return node.target in (torch.nn.functional.embedding, looked_up)


def kinds(graph: torch.fx.Graph, fake: Mapping[torch.fx.Node, Any]) -> dict[torch.fx.Node, Kind]:
    """Which values of a graph differ between ranks, and how; every other value is the same on each rank.

    Args:
        graph: one whose ``DTensor`` values are weights alone, read by :func:`local`.
        fake: fake or example values of its placeholders.
    """
    found: dict[torch.fx.Node, Kind] = {}
    for node in graph.nodes:
        kind = _kind(node, found, fake)
        if kind is not None:
            found[node] = kind
    return found


def _kind(node: torch.fx.Node, found: dict[torch.fx.Node, Kind], fake: Mapping[torch.fx.Node, Any]) -> Kind | None:
    given = {found.get(operand) for operand in node.all_input_nodes}
    if node.op in ("placeholder", "output"):
        return None
    if node.target is local:
        return _kind_of_weight(fake[node.all_input_nodes[0]])
    if node.target is summed:
        return None if given == {"partial"} else "other"
    if node.target is joined:
        return None if given == {"shard"} else "other"
    if node.target is shard:
        return "shard" if given == {None} else "other"
    if node.target is looked_up:
        return None if [found.get(each) for each in node.all_input_nodes] == [None, "columns"] else "other"
    if node.target is torch.nn.functional.embedding and "rows" in given:
        return "shard" if [found.get(each) for each in node.all_input_nodes] == [None, "rows"] else "other"
    if node.target is _linear and given & {"columns", "rows"}:
        return _kind_of_linear(node, found)
    given.discard(None)
    if not given:
        return None
    return "shard" if given == {"shard"} else "other"


def _kind_of_weight(weight: Any) -> Kind | None:
    (placement,) = weight.placements
    if placement.is_replicate():
        return None
    if not placement.is_shard() or weight.dim() > 2:
        return "other"
    if weight.dim() == 1:
        return "shard"
    return "columns" if placement.dim == 0 else "rows"


def _kind_of_linear(node: torch.fx.Node, found: dict[torch.fx.Node, Kind]) -> Kind | None:
    """The kind of ``x W^T + b``: equal ``x`` with a column-parallel ``W`` give a shard, a sharded ``x`` with a
    row-parallel ``W`` a partial sum.
    """
    x, weight, *more = (found.get(each) if isinstance(each, torch.fx.Node) else "none" for each in node.args)
    bias = more[0] if more else "none"
    if (x, weight) == (None, None) and bias in (None, "none"):
        return None
    if (x, weight) == (None, "columns") and bias in ("shard", "none"):
        return "shard"
    return "partial" if (x, weight, bias) == ("shard", "rows", "none") else "other"


def is_collective(node: torch.fx.Node) -> bool:
    """Whether a node of a model's own graph makes ranks exchange values."""
    home = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and ("c10d" in home or home.startswith("torch.distributed."))
