"""Write the attention calls of a unit for the keys that a step reads, and the choice of keys to keep.

``write_attention`` replaces one call. By the assignment it is

    over all keys                the model's own call, its mask perhaps with fewer keys
    over the kept entries        ``sparse_attention``
    over the active rows         the model's own call: the others are absent
    over these and the others    two calls of ``attention_part``, joined; the second may be kept from an earlier step
    with salient rows            ``delta_attention``: the former context, plus what the change of some values adds

Functions get the :class:`.emit.Writer` of the unit, which says the value of a node on the rows asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.fx

from . import rows as row_ops
from .arguments import Attended, attention_arguments, called
from .assignment import KEYED, KEYS, SALIENT, Assignment, Outside
from .axes import Axes
from .errors import GraphRefused
from .graph import open_sizes
from .rows import ALL
from .state import outside_shape
from .units import MOVES, Unit

if TYPE_CHECKING:
    from .emit import Writer


def check_attention(unit: Unit, axes: Axes, assignment: Assignment) -> None:
    """Check that the attention calls of a unit can be written for an assignment.

    Raises:
        GraphRefused: the assignment changes keys or the call, and attention is several calls or has other dimensions.
    """
    own = assignment
    others = (own.attend, own.evict, own.measure, own.outside, own.shared)
    if own.keys == ALL and not own.hides and all(each is None for each in others):
        return
    for each in unit.attentions:
        if each.scored:
            reason = "attention that is written by several calls reads all keys, and this method would change that"
            raise GraphRefused(reason, each.node)
        kinds = [[factor.kind for factor in dim] for dim in axes.layout[each.node]]
        if [kinds[0], *kinds[2:3], len(kinds)] != [["B"], ["T"], 4]:
            reason = "attention is not over [batch, heads, tokens, size], and this method would change its keys"
            raise GraphRefused(reason, each.node)


def write_attention(w: Writer, node: torch.fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.fx.Node:
    """Write an attention call: as it was, over the kept entries, in two parts, or from the change of the salient
    values.
    """
    own = attention_arguments(node.args, node.kwargs).attn_mask
    if own in w.axes.live and (node, own) not in w.axes.whole and w.computed[node] != ALL:
        raise GraphRefused("an attention mask is made of hidden states", node)
    if not w.assignment.masked:
        kwargs = {name: value for name, value in kwargs.items() if name != "attn_mask"}
    given = attention_arguments(args, kwargs)
    mask, entries = given.attn_mask, None
    if w.assignment.outside is not None:
        return _in_two_parts(w, node, given, w.assignment.outside)
    if w.assignment.shared is not None:
        return _beside_shared(w, node, given, *w.assignment.shared)
    if w.assignment.keys == KEYED:
        if mask is not None or w.assignment.gaps or w.assignment.hides:
            entries = None if w.entries is None else _seen(w, w.entries)
    elif w.assignment.alone:
        mask = _among_active(w, mask)
        kwargs = {**kwargs, "attn_mask": mask} if mask is not None else kwargs
    elif w.assignment.hides:
        mask = w.call(row_ops.hide_keys, (mask, w.slot["visible"]))
        kwargs = {**kwargs, "attn_mask": mask}
    if w.assignment.measure is not None and w.measured is None:
        if w.ranks(node):
            raise GraphRefused("a mechanism measures the attention of all heads, and each rank has some", node)
        w.measured = w.call(w.assignment.measure, (*given[:2], mask, given.scale))
    if w.assignment.salient:
        mask = mask if entries is None else w.call(row_ops.mask_keys, (mask, entries, w.tokens))
        return _delta(w, node, args, mask, given.scale)
    if w.assignment.keys != KEYED:
        return w.graph.create_node(node.op, node.target, args, kwargs, node.name)
    assert w.assignment.attend is not None
    return w.call(w.assignment.attend, (*given[:3], entries, w.tokens, mask, given.scale))


def _seen(w: Writer, positions: torch.fx.Node) -> torch.fx.Node:
    """``positions`` of keys with those that are hidden replaced by "no row"."""
    if not w.assignment.hides:
        return positions
    return w.call(row_ops.visible_entries, (positions, w.slot["visible"], w.tokens))


def _among_active(w: Writer, mask: Any) -> Any:
    """The mask of attention over the active rows alone, of ``mask`` over all keys, if there is one."""
    if mask is None and not w.assignment.hides:
        return None
    return w.call(row_ops.mask_keys, (mask, _seen(w, w.slot["index:active"]), w.tokens))


def _in_two_parts(w: Writer, node: torch.fx.Node, given: Attended, outside: Outside) -> torch.fx.Node:
    """Attention over the keys that are computed now and enter the state, joined to the kept attention over the
    others.
    """
    unit, attend = w.unit, w.assignment.attend
    assert attend is not None
    outside_shape(next(each for each in unit.attentions if each.node is node), w.axes)
    number = [each.node for each in unit.attentions].index(node)
    at, places = w.slot["index:stored"], w.slot["index:place"]
    held = [*w.held[2 * number : 2 * number + 2], places]
    own, more = given[:3], (w.tokens, given.attn_mask, given.scale)
    if outside.renewed is None:
        kept = w.call(outside.kept, tuple(held))
    else:
        others = _seen(w, w.call(row_ops.other_rows, (at, w.tokens)))
        part = w.pair(w.call(attend, (*own, others, *more)))
        kept = w.call(outside.renewed, (*held, *part, w.slot["renew"]))
        read = attention_arguments(node.args, node.kwargs)
        pairs = zip(own[1:], (read.key, read.value), strict=True)
        gathered = [w.call(row_ops.gather_rows, (all_rows, at, w.layout(n))) for all_rows, n in pairs]
        own = own[0], *gathered
    part = w.pair(w.call(attend, (*own, _seen(w, at), *more)))
    return w.call(outside.joined, (*part, *w.pair(kept), w.axes.fake[node].dtype))


def _beside_shared(
    w: Writer, node: torch.fx.Node, given: Attended, attend_outside: Callable[..., Any], join: Callable[..., Any]
) -> torch.fx.Node:
    """Attention over the keys that are computed now, joined to that over the state of one sequence, which is not
    written to.
    """
    attend, layer = w.assignment.attend, next(each for each in w.unit.attentions if each.node is node)
    assert attend is not None
    outside_shape(layer, w.axes)
    read = attention_arguments(node.args, node.kwargs)
    whole = [
        _moved(w, start, end, w.call(row_ops.read_all, (w.state[start], w.layout(start))), int)
        for start, end in ((layer.key, read.key), (layer.value, read.value))
    ]
    at, more = w.slot["index:stored"], (w.tokens, given.attn_mask, given.scale)
    others = _seen(w, w.call(row_ops.other_rows, (at, w.tokens)))
    part = w.pair(w.call(attend, (*given[:3], _seen(w, at), *more)))
    kept = w.pair(w.call(attend_outside, (given.query, *whole, others, *more)))
    return w.call(join, (*part, *kept, w.axes.fake[node].dtype))


def _delta(w: Writer, node: torch.fx.Node, args: tuple[Any, ...], mask: Any, scale: Any) -> torch.fx.Node:
    """Contexts of the active rows: exact for the salient ones; for the others their former ones, plus the change."""
    assert w.assignment.attend is not None
    att = w.unit.attentions[0]
    value = attention_arguments(node.args, node.kwargs).value
    change = _moved(w, att.value, value, w.change(), linear=True)
    change = w.call(torch.transpose, (change, 1, 2))
    active, at = w.slot["index:active"], w.slot["index:salient"]
    former = w.call(row_ops.former_rows, (w.state[node], active, w.layout(node)))
    given = (*args[:3], change, w.written(att.key, SALIENT), at, former)
    new, similarity = w.pair(w.call(w.assignment.attend, (*given, mask, scale, *w.ranks(node))))
    w.contexts = new, former, similarity
    return new


def _moved(
    w: Writer,
    start: torch.fx.Node,
    end: torch.fx.Node,
    value: torch.fx.Node,
    sequences: Callable[[int], Any] | None = None,
    linear: bool = False,
) -> torch.fx.Node:
    """Repeat the calls from ``start`` to ``end`` on ``value`` in place of ``start``.

    Args:
        w: the writer.
        start: a value that is kept.
        end: what the attention call reads, made of ``start`` alone.
        value: what takes the place of ``start``.
        sequences: the size of ``n`` times the sequences of ``value``, by ``n``; ``None``: as many as the step has.
        linear: refuse calls that do more than move numbers.

    Raises:
        GraphRefused: a call on the way reads more than one value, or is not ``linear``.
    """
    if end is start:
        return value
    above = [n for n in end.all_input_nodes if n in w.axes.live]
    if len(above) != 1 or (linear and called(end) not in MOVES):
        raise GraphRefused("the values of attention are made of its keys, and not by views alone", end)
    (before,) = above
    moved = _moved(w, start, before, value, sequences, linear)
    args, kwargs = torch.fx.map_arg((end.args, end.kwargs), lambda n: moved if n is before else w.plain(n))
    batch = w.batch if sequences is None else sequences
    args = open_sizes(end, args, w.layout(end), batch) if end in w.axes.layout else args
    return w.graph.create_node(end.op, end.target, args, kwargs)


def write_eviction(w: Writer) -> None:
    """Choose the entries to keep; write them, and the rows that later steps compute, to the state of keys and
    values.
    """
    assert w.assignment.evict is not None
    assert w.entries is not None
    choose, *settings = w.assignment.evict
    call = w.unit.attentions[0].node
    given = attention_arguments(call.args, call.kwargs)
    rows = w.assignment.query
    query, key = w.on(given.query, rows), w.on(given.key, rows)
    own = given.attn_mask if w.assignment.masked else None
    mask = None
    if isinstance(own, torch.fx.Node):
        live = own in w.axes.live
        mask = w.of_queries(call, own, w.on(own, ALL), rows) if live else w.constant(own, call, rows)
    if w.assignment.alone:
        mask = _among_active(w, mask)
    elif w.assignment.hides:
        mask = w.call(row_ops.hide_keys, (mask, w.slot["visible"]))
    block, outside, fresh = (w.slot[f"index:{name}"] for name in ("block", "outside", "fresh"))
    ranks = w.ranks(given.query, given.key)
    at = w.call(choose, (query, key, mask, block, outside, w.entries, fresh, *settings, *ranks))
    positions = at
    if w.assignment.alone:  # chosen by their places among the active rows
        positions = w.call(row_ops.pick_index, (w.slot["index:active"], at, w.tokens))
    w.graph.call_method("copy_", (w.entries, positions))
    for node in w.unit.anchors(KEYS):
        w.call(row_ops.keep_rows, (w.state[node], w.available(node), at, w.layout(node)))
