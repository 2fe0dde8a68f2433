"""A new buffer that is filled piece by piece becomes a concatenation of the pieces.

    before:  k = x.new_empty(B, H, S, 12) ; k[..., :8].copy_(a) ; k[..., 8:].copy_(b)
    after:   k = cat([a, b], 3)

That holds where each entry is written once before anything is read, and the pieces lie side by side in one dimension.
Every other buffer stays as it is, and writes to a view of it are refused by ``normalize``.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import storage_id
from dllm_compile.core.arguments import called

_MAKES = {"empty", "zeros", "ones", "full"}
_MADE = {*_MAKES, *(f"new_{name}" for name in _MAKES), *(f"{name}_like" for name in _MAKES)}
Node = torch.fx.Node


@dataclass(frozen=True)
class _Piece:
    """A write: its node, what is written, and the view that it is written to; ``view`` is ``None`` for an index."""

    write: Node
    source: Node
    view: Node | None
    target: torch.Tensor


def fresh_buffers(graph: torch.fx.Graph, fake: dict[Node, Any], written: set[Node]) -> int:
    """Rewrite ``graph`` in place; returns how many buffers were replaced.

    Args:
        graph: a copy whose sizes are numbers.
        fake: fake value of each node, no two nodes with one value; those of new nodes are added.
        written: the nodes that change a tensor in place, whatever they call; those that are replaced are taken out.
    """
    if not written:
        return 0
    found = 0
    for node in list(graph.nodes):
        if node.op in ("call_function", "call_method") and called(node) in _MADE and not node.kwargs.get("out"):
            found += _join(graph, node, fake, written)
    return found


def _join(graph: torch.fx.Graph, buffer: Node, fake: dict[Node, Any], written: set[Node]) -> bool:
    order = {node: i for i, node in enumerate(graph.nodes)}
    pieces = _pieces(buffer, fake)
    dim = _joined_in(buffer, fake, pieces)
    if dim is None:
        return False
    last = max((piece.write for piece in pieces), key=order.__getitem__)
    if not _alone(buffer, pieces, order[last], order, fake, written):
        return False
    with graph.inserting_after(last):
        sources = [piece.source for piece in pieces]
        joined = graph.call_function(torch.cat, (sources, dim))
    joined.meta = dict(last.meta)
    fake[joined] = fake[buffer]
    for user in list(buffer.users):
        if order[user] > order[last]:
            user.replace_input_with(buffer, joined)
    for piece in pieces:
        graph.erase_node(piece.write)
        written.discard(piece.write)
        if piece.view is not None:
            graph.erase_node(piece.view)
    graph.erase_node(buffer)
    return True


def _pieces(buffer: Node, fake: dict[Node, Any]) -> list[_Piece]:
    """Writes of tensors to views of a buffer, or to places of it, by where in memory they begin."""
    found = []
    for user in buffer.users:
        if user.target is operator.setitem and user.args[0] is buffer and len(user.all_input_nodes) == 2:
            found.append(_Piece(user, user.args[2], None, fake[buffer][user.args[1]]))  # type: ignore[arg-type]
            continue
        write = next(iter(user.users), None)
        copies = write is not None and called(write) == "copy_" and len(write.args) == 2 and not write.users
        if copies and len(user.users) == 1 and write.args[0] is user:  # type: ignore[union-attr]
            found.append(_Piece(write, write.args[1], user, fake[user]))  # type: ignore[arg-type,union-attr]
    return sorted(found, key=lambda piece: piece.target.storage_offset())


def _joined_in(buffer: Node, fake: dict[Node, Any], pieces: list[_Piece]) -> int | None:
    """The dimension in which pieces lie side by side and are the whole of a buffer, whatever sizes Dynamo left open;
    ``None`` where they do not, or a write changes the sizes or the dtype of what it writes.
    """
    whole, shown = fake[buffer], buffer.meta.get("example_value")
    targets = [piece.target for piece in pieces]
    if len(pieces) < 2 or not isinstance(shown, torch.Tensor):
        return None
    for piece in pieces:
        source = fake.get(piece.source) if isinstance(piece.source, Node) else None
        form = piece.target.shape, whole.dtype, whole.device
        if not isinstance(source, torch.Tensor) or (source.shape, source.dtype, source.device) != form:
            return None
        if storage_id(piece.target) != storage_id(whole):  # indices that are no slices
            return None
    ranks = {each.dim() for each in targets} | {shown.dim()}
    apart = [i for i in range(whole.dim()) if ranks == {whole.dim()} and targets[0].shape[i] != whole.shape[i]]
    if len(apart) != 1 or not isinstance(shown.shape[apart[0]], int):
        return None
    (dim,) = apart
    at, sizes = whole.storage_offset(), [*whole.shape]
    for each in targets:
        sizes[dim] = each.shape[dim]
        if [*each.shape] != sizes or each.stride() != whole.stride() or each.storage_offset() != at:
            return None
        at += each.shape[dim] * whole.stride(dim)
    return dim if sum(each.shape[dim] for each in targets) == whole.shape[dim] else None


def _alone(
    buffer: Node, pieces: list[_Piece], last: int, order: dict[Node, int], fake: dict[Node, Any], written: set[Node]
) -> bool:
    """Whether nothing reads a buffer before the last write, and no source is changed from its write to there."""
    own = {buffer, *(piece.write for piece in pieces), *(piece.view for piece in pieces)}
    memory = storage_id(fake[buffer])
    sources = {storage_id(fake[piece.source]) for piece in pieces}
    for node, place in order.items():
        value = fake.get(node)
        if place > last or node in own:
            continue
        if isinstance(value, torch.Tensor) and storage_id(value) == memory:
            return False
        if any(operand in own for operand in node.all_input_nodes):
            return False
        if node in written or node.target is operator.setitem:
            changed = [fake.get(operand) for operand in node.all_input_nodes]
            if any(isinstance(each, torch.Tensor) and storage_id(each) in sources for each in changed):
                return False
    return memory not in sources
