"""Cut the graph at its attention calls into stem, layers and head.

    before:  ids -> embedding -> [norm, qkv, attention, out, add, norm, mlp, add] x N -> norm, lm_head -> logits
    after:   stem | layer | layer | ... | head, with the keys, values and branch outputs of each layer named

A cut is a place where a single token-dependent value is alive: the residual stream. Nothing is rewritten here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

import torch
import torch.fx

from dllm_compile.compat import tree_leaves
from dllm_compile.core.arguments import argument, attention, attention_arguments, called
from dllm_compile.core.axes import Axes, linear
from dllm_compile.core.errors import GraphRefused, TokensUnseen
from dllm_compile.core.graph import output_node
from dllm_compile.core.layout import position
from dllm_compile.core.products import Scored, scored_attention, scores_of
from dllm_compile.core.stand_ins import expressions
from dllm_compile.core.units import MOVES, Attention, Branch, Unit, closure, of_tokens
from dllm_compile.debug import log
from dllm_compile.kernels.confidence import confidence

_ADDS = (operator.add, torch.add)
_PRODUCTS = (operator.mul, torch.mul)
_QUOTIENTS = (operator.truediv, torch.div)


def regions(graph: torch.fx.Graph, axes: Axes, halves: bool) -> list[Unit]:
    """Units of ``graph`` in the order they run. A graph without attention is one unit.

    Args:
        graph: normalized, with every attention call in one spelling.
        axes: what following its axes found.
        halves: whether to cut a layer behind the branch that attends too, where one value alone is alive there.

    Raises:
        GraphRefused: attention is causal, something draws random numbers, or tokens cannot be followed.
    """
    live = [node for node in graph.nodes if node in axes.live]
    scored = scored_attention(live, axes)
    calls = [node for node in live if node.target is attention or node in scored]
    for node in calls:
        if node not in scored:
            _check_attention(node, axes)
    cuts = _cuts(live, axes)
    if live and _is_stream(live[-1], axes) and (not cuts or cuts[-1][1] is not live[-1]):
        cuts.append((len(live) - 1, live[-1]))  # a layer traced alone hands its stream to the caller
    segments = _segments(live, cuts)
    groups = _group(segments, calls, axes, halves)
    if groups:
        groups[-1:] = _split_tail(groups[-1], calls, axes)
    units = [_unit(nodes, entering, leaving, axes, halves, scored) for nodes, entering, leaving in groups]
    _check_random(graph, units, axes)
    _place_constants(graph, units, axes)
    return [unit.seal(axes) for unit in units]


def _check_attention(node: torch.fx.Node, axes: Axes) -> None:
    given = attention_arguments(node.args, node.kwargs)
    if given.is_causal:
        raise GraphRefused(
            "attention is causal: a token's row does not depend on later ones, so caching is not ours", node
        )
    if given.dropout_p:
        raise GraphRefused("attention drops out at random; call model.eval()", node)
    for name in given._fields[:3]:
        layout = axes.layout.get(getattr(given, name))
        if layout is None or position(layout, "T") != len(layout) - 2 or position(layout, "B") is None:
            join = _join_of(given.query, axes)
            if name == "query" and join is not None:
                reason = (
                    "the rows of the tokens are joined to others here, such as those of an image; join them outside of "
                    "what is compiled, and call that with inputs_embeds"
                )
                raise TokensUnseen(reason, join)
            raise TokensUnseen(f"the tokens of attention's {name} cannot be followed back to the input", node)
    if (node, given.attn_mask) in axes.whole and not of_tokens(given.attn_mask):
        axes.whole.discard((node, given.attn_mask))


def _join_of(query: torch.fx.Node, axes: Axes) -> torch.fx.Node | None:
    """The call behind a query that joins the tokens to something else, in their own dimension."""
    for node in closure([query], set()):
        if node.target in (torch.cat, torch.concat, torch.concatenate):
            at = argument(node, 1, "dim", 0)
            layouts = [axes.layout[part] for part in node.all_input_nodes if part in axes.layout]
            if any(position(layout, "T") == at % len(layout) for layout in layouts):
                return node
    return None


def _check_random(graph: torch.fx.Graph, units: list[Unit], axes: Axes) -> None:
    """Only the decision, which runs at every call, may draw: its numbers are never kept."""
    decides = len(units) > 1 and units[-1].stream is None
    kept = units[:-1] if decides else units
    drawn = closure([n for unit in kept for n in unit.nodes], set())
    for node in graph.nodes:
        if node in axes.random and (not decides or node in drawn):
            raise GraphRefused("random numbers are drawn here; call model.eval(), or draw outside of the model", node)


Cut = tuple[int, torch.fx.Node]


def _cuts(live: list[torch.fx.Node], axes: Axes) -> list[Cut]:
    """Places (index into ``live``, the one value alive behind it)."""
    order = {node: i for i, node in enumerate(live)}
    last = {n: max((order[u] for u in n.users if u in order), default=-1) for n in live}
    cuts: list[Cut] = []
    alive: set[torch.fx.Node] = set()
    for i, node in enumerate(live):
        alive = {n for n in alive if last[n] > i}
        if last[node] > i and not _is_side_value(node, axes):
            alive.add(node)
        if len(alive) == 1:
            (only,) = alive
            if _is_stream(only, axes) and (not cuts or cuts[-1][1] is not only):
                cuts.append((i, only))
    return cuts


def _is_stream(node: torch.fx.Node, axes: Axes) -> bool:
    layout = axes.layout.get(node)
    if layout is None or len(layout) != 3 or not axes.fake[node].is_floating_point():
        return False
    return [tuple(f.kind for f in dim) for dim in layout] == [("B",), ("T",), ("",)]


def _is_side_value(node: torch.fx.Node, axes: Axes) -> bool:
    """Ids, what compares or counts them, and masks made of them: cheap, and no part of the residual stream."""
    value = axes.fake[node]
    small = isinstance(value, torch.Tensor) and (value.dim() <= 2 or value.dtype == torch.bool)
    masks = any((user, node) in axes.whole and user.target is attention for user in node.users)
    return (small and not value.is_floating_point()) or masks


Segment = tuple[list[torch.fx.Node], "torch.fx.Node | None", "torch.fx.Node | None"]


def _segments(live: list[torch.fx.Node], cuts: list[Cut]) -> list[Segment]:
    """Cut the nodes at ``cuts``: the nodes between two neighboring cuts, with the stream that enters and leaves."""
    out: list[Segment] = []
    start, entering = 0, None
    for at, node in cuts:
        nodes = [n for n in live[start : at + 1] if n.op != "placeholder"]
        if nodes:
            out.append((nodes, entering, node))
        start, entering = at + 1, node
    rest = live[start:]
    if rest:
        out.append((rest, entering, None))
    return out


def _group(segments: list[Segment], calls: list[torch.fx.Node], axes: Axes, halves: bool) -> list[Segment]:
    """Join segments into stem, layers (each from one attention to before the next, or in two parts) and head."""
    attends = [any(n in calls for n in nodes) for nodes, _, _ in segments]
    starts = [i for i, has in enumerate(attends) if has]
    if not starts:
        return [_joined(segments)] if segments else []
    ends = [*starts[1:], 0]
    ends[-1] = _last_layer_end(segments, starts, axes)
    groups = [_joined(segments[: starts[0]])] if starts[0] else []
    for a, b in zip(starts, ends, strict=True):
        parts = [segments[a : a + 1], segments[a + 1 : b]] if halves else [segments[a:b]]
        groups += [_joined(part) for part in parts if part]
    if ends[-1] < len(segments):
        groups.append(_joined(segments[ends[-1] :]))
    return groups


def _last_layer_end(segments: list[Segment], starts: list[int], axes: Axes) -> int:
    """The last layer is as long as the one before it; an only layer ends at its last residual add."""
    first = starts[-1]
    if len(starts) > 1:
        length = starts[-1] - starts[-2]
        if first + length <= len(segments):
            return first + length
    end = first + 1
    for i in range(first + 1, len(segments)):
        if _added(segments[i], axes):
            end = i + 1
    return end


def _split_tail(segment: Segment, calls: list[torch.fx.Node], axes: Axes) -> list[Segment]:
    """Cut a head from the decision behind it.

    The head is what is made of the stream row by row. What also reads ids, constants that have an entry a token (they
    may change from call to call) or other rows is the decision, and runs for all rows.
    """
    nodes, entering, leaving = segment
    if entering is None or leaving is not None or any(n in calls for n in nodes):
        return [segment]
    by_row = {entering}
    for node in nodes:
        live = [n for n in node.all_input_nodes if n in axes.live]
        beside = any((node, n) in axes.beside or (node, n) in axes.whole for n in node.all_input_nodes)
        if node not in axes.unproven and node not in axes.random and not beside and all(n in by_row for n in live):
            by_row.add(node)
    if all(node in by_row for node in nodes):
        return [segment]
    edge = [n for n in nodes if n in by_row and any(user not in by_row for user in n.users)]
    wide = {n for n in closure(edge, {entering}) if n in nodes}
    head = [n for n in nodes if n in wide]
    rest = [n for n in nodes if n not in wide]
    return [(head, entering, None), (rest, None, None)] if head else [segment]


def _joined(segments: list[Segment]) -> Segment:
    return [n for nodes, _, _ in segments for n in nodes], segments[0][1], segments[-1][2]


def _added(segment: Segment, axes: Axes) -> list[torch.fx.Node]:
    """What is added to ``entering``, or to a multiple of it, where the segment ends in a sum of it and values made of
    it, in any order; empty where it does not. What is made of ids alone is at hand for all rows, and left out.
    """
    nodes, entering, leaving = segment
    if leaving is None or entering is None:
        return []
    found = _addends(leaving, set(nodes))
    made = [node for node in found if node in axes.live and entering in closure([node], set())]
    rest = [node for node in made if _unscaled(node, axes) is not entering]
    return rest if len(rest) == len(made) - 1 else []


def _unscaled(node: torch.fx.Node, axes: Axes) -> torch.fx.Node:
    """What a multiple is one of; factors that depend on no token may be numbers or tensors."""
    while node.target in (*_PRODUCTS, *_QUOTIENTS):
        factors = [each for each in node.args if isinstance(each, torch.fx.Node) and each in axes.live]
        if len(factors) != 1 or (node.target in _QUOTIENTS and factors[0] is not node.args[0]):
            break
        (node,) = factors
    return node


def _addends(node: torch.fx.Node, inside: set[torch.fx.Node]) -> list[torch.fx.Node]:
    """What a sum of any number is made of; a part that is read elsewhere, too, is one."""
    if node.target not in _ADDS or len(node.args) != 2 or node.kwargs:
        return [node]
    out: list[torch.fx.Node] = []
    for each in node.args:
        if isinstance(each, torch.fx.Node):
            out += _addends(each, inside) if each in inside and len(each.users) == 1 else [each]
    return out


def _attended(node: torch.fx.Node, leaving: torch.fx.Node, inside: set[torch.fx.Node], axes: Axes) -> torch.fx.Node:
    """The last value that is made of attention's output ``node`` and no other row by row: what a layer keeps that ends
    in no sum with its stream; ``leaving`` where there is none.
    """
    found = leaving
    while node in inside and node is not leaving:
        users = [user for user in node.users if user in axes.live]
        beside = [each for user in users for each in user.all_input_nodes if each in axes.live and each is not node]
        if len(users) != 1 or beside or users[0] in axes.unproven:
            break
        (node,) = users
        found = node if _is_stream(node, axes) else found
    return found


def _unit(
    nodes: list[torch.fx.Node],
    entering: torch.fx.Node | None,
    leaving: torch.fx.Node | None,
    axes: Axes,
    halves: bool,
    scored: Scored,
) -> Unit:
    inside = set(nodes)
    read_outside = [
        n
        for n in nodes
        if n is not leaving and any(u not in inside and (u in axes.live or u.op == "output") for u in n.users)
    ]
    unit = Unit(nodes, entering, [*([leaving] if leaving is not None else []), *read_outside])
    found = [_attention(n, axes) for n in nodes if n.target is attention]
    several = [_several(n, axes, scored, inside) for n in nodes if n in scored]
    unit.attentions = sorted([*found, *filter(None, several)], key=lambda each: nodes.index(each.node))
    if unit.attentions or (halves and entering is not None and leaving is not None):
        unit.branches = _branches(nodes, entering, leaving, axes, {each.node for each in unit.attentions})
    elif leaving is None and entering is not None:
        _logits_first(unit)
    if entering is not None and not unit.is_layer:
        unit.logits = _logits(unit, axes)
    return unit


def _logits_first(unit: Unit) -> None:
    """Of the outputs of a tail, put those made of its last projection first: only they may leave for fewer rows."""
    projections = [n for n in unit.nodes if n.target is linear]
    if projections:
        made = {n: projections[-1] in closure([n], set()) for n in unit.outputs}
        unit.outputs.sort(key=lambda n: not made[n])
        unit.leaving = sum(made.values())


def _logits(unit: Unit, axes: Axes) -> torch.fx.Node | None:
    """The value that the probabilities are computed from: what ``confidence`` reads; else the widest output; else what
    the best token is found in, without noise.
    """
    wide = [n for n in unit.nodes if n in axes.live and _is_stream(n, axes)]
    read = [n.all_input_nodes[0] for n in unit.nodes if n.target is confidence]
    leaving = sorted((n for n in unit.outputs[: unit.leaving] if n in wide), key=lambda n: -axes.fake[n].shape[-1])
    found = [n for n in (*read, *leaving) if n in wide]
    if found:
        return found[0]
    best = next((n for n in unit.nodes if called(n) == "argmax"), None)
    node = next((n for n in wide if best is not None and n in best.all_input_nodes), None)
    start = next((n for n in reversed(unit.nodes) if n.target is linear and n in wide), None)
    at: torch.fx.Node | None = node
    while at is not None and at is not start:
        before = at.all_input_nodes
        at = before[0] if len(before) == 1 and before[0] in wide else None
    return node if at is not None else start


def _branches(
    nodes: list[torch.fx.Node],
    entering: torch.fx.Node | None,
    leaving: torch.fx.Node | None,
    axes: Axes,
    calls: set[torch.fx.Node],
) -> list[Branch]:
    """What the layer adds to the stream, one an addend; what attention alone makes where nothing is added."""
    cuts = [(nodes.index(n), n) for _, n in _cuts([entering, *nodes] if entering else nodes, axes) if n is not entering]
    if leaving is not None:
        cuts.append((len(nodes) - 1, leaving))
    out: list[Branch] = []
    for inside, before, after in _segments(nodes, cuts):
        attends = [n for n in inside if n in calls]
        found = _added((inside, before or entering, after), axes)
        if not found and attends and after is not None:
            found = [_attended(attends[0], after, set(inside), axes) if len(attends) == 1 else after]
        out += [Branch(node, bool(attends)) for node in found if _is_stream(node, axes)]
    return out  # one row that is added to all is kept for none


def _several(node: torch.fx.Node, axes: Axes, scored: Scored, inside: set[torch.fx.Node]) -> Attention | None:
    """An attention of several calls; ``None`` where its keys and values cannot be kept, and its rows may mix.

    Calls that belong to another one, too, such as the scores of two products with values, stay part of that.
    """
    try:
        found = _attention(node, axes, scored[node], inside)
        if {found.key, found.value} <= inside:
            return found
    except GraphRefused as refusal:
        log.info("attention of several calls is not kept: %s", refusal)
    axes.unproven.add(node)
    shared = {each for product, between in scored.items() if product is not node for each in between}
    own = {node, *scored[node]} - shared
    axes.whole = {(reader, read) for reader, read in axes.whole if reader not in own}
    return None


def _attention(
    node: torch.fx.Node,
    axes: Axes,
    scored: tuple[torch.fx.Node, ...] = (),
    inside: AbstractSet[torch.fx.Node] = frozenset(),
) -> Attention:
    query: torch.fx.Node | None
    if scored:
        scores = scores_of(scored, axes)
        query, keys, values = scores.args[0], scores.args[1], node.args[1]  # type: ignore[assignment]
    else:
        given = attention_arguments(node.args, node.kwargs)
        query, keys, values = given.query, given.key, given.value
    kept = _narrowest(keys, axes, inside), _narrowest(values, axes, inside)
    whole = [operand for each in scored for operand in each.all_input_nodes if (each, operand) in axes.whole]
    if any(_narrowest(each, axes, inside) not in kept for each in whole):
        raise GraphRefused("attention reads all rows of more than its keys and values", node)
    while query is not None:
        if query in kept:
            raise GraphRefused("the queries of attention are its keys or values, which are kept for more rows", node)
        above = [n for n in query.all_input_nodes if n in axes.live]
        moves = called(query) in MOVES
        query = above[0] if moves and len(above) == 1 else None
    key, value = kept
    if _made_of(value, key, axes):
        return Attention(node, key, key, scored)  # values are made of the kept keys again
    if key is not value and key in closure([value], set()):
        raise GraphRefused(
            "the values of attention are made of its keys and more, and keys are kept for fewer rows", node
        )
    return Attention(node, value if _made_of(key, value, axes) else key, value, scored)


def _made_of(value: torch.fx.Node, other: torch.fx.Node, axes: Axes) -> bool:
    """Whether a value is made of one other alone, row by row."""
    between = {n for n in closure([value], {other}) if n in axes.live}
    fed = all(any(operand in between or operand is other for operand in n.all_input_nodes) for n in between)
    return fed and value is not other and not between & axes.unproven


def _narrowest(node: object, axes: Axes, inside: AbstractSet[torch.fx.Node]) -> torch.fx.Node:
    """Walk up through calls that only move or repeat data, and between nodes ``inside`` through all that are made of
    one value row by row, up to a projection; the smallest tensor there is the one worth keeping.
    """
    assert isinstance(node, torch.fx.Node)
    best = node
    while called(node) in MOVES or (node in inside and node.target is not linear and node not in axes.unproven):
        parents = [n for n in node.all_input_nodes if n in axes.live]
        if len(parents) != 1 or parents[0] not in axes.layout or (inside and parents[0] not in inside):
            break
        node = parents[0]
        layout = axes.layout[node]
        rows = position(layout, "B") is not None and position(layout, "T") is not None
        if rows and axes.fake[node].numel() <= axes.fake[best].numel():
            best = node
    return best


def _place_constants(graph: torch.fx.Graph, units: list[Unit], axes: Axes) -> None:
    """A constant that one unit alone uses is computed there; the others are left to ``constants``.

    So are those that have as many entries as there are tokens or sequences, since code of a unit serves any number, and
    those that the graph returns.
    """
    returned = closure([n for n in output_node(graph).all_input_nodes if n not in axes.live], set())
    wanted: dict[torch.fx.Node, set[int]] = {}
    for i, unit in enumerate(units):
        for node in closure(unit.nodes, set()):
            if node not in axes.live and node.op != "placeholder":
                wanted.setdefault(node, set()).add(i)
    order = {node: i for i, node in enumerate(graph.nodes)}
    sized = _sized(wanted, axes)
    for node in graph.nodes:
        users = wanted.get(node, set())
        if len(users) == 1 and node not in sized and node not in returned:
            units[next(iter(users))].nodes.append(node)
    for unit in units:
        unit.nodes.sort(key=lambda n: order[n])


def _sized(nodes: Iterable[torch.fx.Node], axes: Axes) -> set[torch.fx.Node]:
    """Constants with an extent that is the number of tokens or of sequences, or that are computed with it, and all they
    are made of.
    """
    numbers = {n for n in axes.size if n > 1}
    made = [
        node
        for node in nodes
        if node in axes.made
        or expressions(node.args, node.kwargs)
        or any(isinstance(leaf, torch.Tensor) and numbers & {*leaf.shape} for leaf in tree_leaves(axes.fake[node]))
    ]
    return closure(made, set())


def constants(graph: torch.fx.Graph, units: list[Unit], axes: Axes) -> list[torch.fx.Node]:
    """Constants that no single unit owns: computed once a step, before the units."""
    owned = {n for unit in units for n in unit.nodes}
    needed = closure([n for unit in units for n in unit.nodes] + list(output_node(graph).all_input_nodes), set())
    return [
        n
        for n in graph.nodes
        if n in needed and n not in owned and n.op not in ("placeholder", "output") and n not in axes.live
    ]
