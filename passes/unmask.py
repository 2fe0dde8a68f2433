"""From logits to a decision without the logits: what a sampler does to a vocabulary becomes one value a row.

    before:  l = head(x) ; s = [l_0, l_0, l_1, ...] ; token = argmax s ; p = softmax s ; sure = p[token]
    after:   c = confidence(head(x)) ; token = shift(c.best) ; sure = shift(c.probability)

Two rewrites. Logits shifted by a row (Dream) are read unshifted, and what is made of each row is shifted instead, so
that the chain from the head on stays row by row. A softmax that only serves to be gathered at a token, to be maximized,
or for its entropy or its margin, becomes the ``confidence`` operation, which keeps nothing as wide as the vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import argument, attention, called
from dllm_compile.core.axes import Axes
from dllm_compile.core.axis_rules import RULES, Known
from dllm_compile.core.layout import Layout, holds, position
from dllm_compile.kernels.confidence import Confidence, confidence

Node = torch.fx.Node
_ALL = slice(None)
_CASTS = ("to", "double", "float", "type")


def unmask(graph: torch.fx.Graph, axes: Axes, follow: Callable[[], Axes]) -> Axes:
    """Rewrite ``graph`` in place.

    Args:
        graph: of any form; one that does not sample is left as it is.
        axes: of the graph.
        follow: follows the axes of the graph anew.

    Returns:
        The axes of the graph as it is now.
    """
    shifts = {node: whole for node in graph.nodes if (whole := _shifted(node, axes)) is not None}
    for node, whole in shifts.items():
        parts: Any = argument(node, 0, "tensors")
        node.replace_all_uses_with(whole)
        for gone in (node, *parts):
            graph.erase_node(gone)
    axes = follow() if shifts else axes
    for whole in shifts.values():
        _shift_late(graph, whole, axes)
    calls = [i for i, node in enumerate(graph.nodes) if node.target is attention]
    behind = list(graph.nodes)[max(calls, default=-1) + 1 :]
    fused = [_fuse(graph, node, axes) for node in behind if _is(node, "softmax")]
    if not shifts and not any(fused):
        return axes
    graph.eliminate_dead_code()
    graph.lint()
    return follow()


def _is(node: object, *names: str) -> bool:
    return isinstance(node, Node) and called(node) in names


# -- the shift --------------------------------------------------------------------------------------------------------


def _shifted(node: Node, axes: Axes) -> Node | None:
    """``l`` when the node is ``cat([l[:, :1], l[:, :-1]], 1)`` along the tokens of ``l``."""
    at_tokens = _is(node, "cat", "concat") and argument(node, 1, "dim", 0) == 1
    parts: Any = argument(node, 0, "tensors", ()) if at_tokens else ()
    if not isinstance(parts, (tuple, list)) or len(parts) != 2:
        return None
    first, rest = parts
    if not (_is(first, "getitem") and _is(rest, "getitem")):
        return None
    whole, ends = first.args[0], [_row_slice(part.args[1]) for part in (first, rest)]
    alone = rest.args[0] is whole and set(whole.users) == {first, rest} and {*first.users, *rest.users} == {node}
    return whole if alone and ends == [1, -1] and position(axes.layout.get(whole, ()), "T") == 1 else None


def _row_slice(index: object) -> int | None:
    """``e`` for the index ``[:, :e]``, whatever full slices follow."""
    if not isinstance(index, tuple) or len(index) < 2 or any(i not in (_ALL, Ellipsis) for i in (index[0], *index[2:])):
        return None
    rows = index[1]
    return rows.stop if isinstance(rows, slice) and rows.start in (None, 0) and rows.step is None else None


def _shift_late(graph: torch.fx.Graph, whole: Node, axes: Axes) -> None:
    """Shift what is computed from the rows of ``whole`` where that meets other rows, in place of ``whole`` itself."""
    chain = {whole}
    for user in graph.nodes:
        live = [n for n in user.all_input_nodes if n in axes.live]
        by_row = user.op != "output" and user not in axes.unproven and bool(live) and all(n in chain for n in live)
        if by_row and not any((user, n) in axes.beside for n in user.all_input_nodes):
            chain.add(user)
    for node in [n for n in chain if any(user not in chain for user in n.users)]:
        after = [user for user in node.users if user not in chain]
        with graph.inserting_after(node):
            rest = graph.call_function(operator.getitem, (node, (_ALL, slice(None, -1))))
            first = graph.call_function(operator.getitem, (node, (_ALL, slice(None, 1))))
        with graph.inserting_after(rest):
            moved = graph.call_function(torch.cat, ([first, rest], 1))
        for user in after:
            user.replace_input_with(node, moved)


# -- the softmax ------------------------------------------------------------------------------------------------------


def _fuse(graph: torch.fx.Graph, soft: Node, axes: Axes) -> bool:
    """Replace a softmax and everything that reads it, if all of that is known."""
    layout = axes.layout.get(soft, ())
    if len(layout) != 3 or argument(soft, 1, "dim") not in (-1, 2) or position(layout, "T") != 1:
        return False
    scores = argument(soft, 0, "input")
    logits = _uncast(scores, axes)
    sources = dict.fromkeys((soft, scores, logits))
    tokens = [n for source in sources for n in source.users if _is_last(n, "argmax")]
    readings: dict[Node, Reading] = {}
    for user in soft.users:
        found = _readings(user, soft, tokens, axes)
        if found is None:
            return False
        readings.update(found)
    with graph.inserting_after(logits):
        greedy = graph.call_function(confidence, (logits,))
    best = _measure(graph, greedy, greedy, "best")
    for node, (name, chosen) in readings.items():
        with graph.inserting_before(node):
            asked = greedy if chosen is None else graph.call_function(confidence, (logits, chosen))
            value = graph.call_function(operator.getitem, (asked, Confidence._fields.index(name)))
            if name != "best":
                value = graph.call_method("to", (value, axes.fake[soft].dtype))
            if axes.fake[node].dim() == 3:
                value = graph.call_method("unsqueeze", (value, -1))
        node.replace_all_uses_with(value)
    for node in tokens:
        node.replace_all_uses_with(best)
    return True


def _measure(graph: torch.fx.Graph, after: Node, of: Node, name: str) -> Node:
    with graph.inserting_after(after):
        return graph.call_function(operator.getitem, (of, Confidence._fields.index(name)))


def _uncast(node: Any, axes: Axes) -> Node:
    """The value before casts to a dtype that holds every value of its own."""
    while _is(node, *_CASTS) and isinstance(node.args[0], Node):
        narrow, wide = axes.fake[node.args[0]], axes.fake[node]
        holds_all = torch.promote_types(narrow.dtype, wide.dtype) == wide.dtype
        if not narrow.is_floating_point() or not holds_all or narrow.device != wide.device:
            break
        node = node.args[0]
    assert isinstance(node, Node)
    return node


def _is_last(node: object, *names: str) -> bool:
    """Whether a call reduces the vocabulary, keeping no dimension."""
    if not isinstance(node, Node) or not _is(node, *names):
        return False
    return argument(node, 1, "dim") in (-1, 2) and not argument(node, 2, "keepdim", False)


Reading = tuple[str, "Node | None"]


def _readings(user: Node, soft: Node, tokens: list[Node], axes: Axes) -> dict[Node, Reading] | None:
    """What ``user`` reads of the probabilities: by node, the measure, and the chosen token where it is not the
    likeliest.
    """
    if user in tokens:
        return {}
    if _is_last(user, "amax"):
        return {user: ("probability", None)}
    if _is_last(user, "max") and all(_is(part, "getitem") and part.args[1] in (0, 1) for part in user.users):
        return {part: (("probability", "best")[part.args[1]], None) for part in user.users}  # type: ignore[index]
    if _is(user, "gather") and argument(user, 1, "dim") in (-1, 2):
        index = argument(user, 2, "index")
        if not _is(index, "unsqueeze") or argument(index, 1, "dim") not in (-1, 2):
            return None
        token = argument(index, 0, "input")
        whole = axes.fake[token].shape == axes.fake[soft].shape[:-1]
        return {user: ("probability", None if token in tokens else token)} if whole else None
    if _is(user, "topk"):
        two = argument(user, 1, "k") == 2 and argument(user, 2, "dim", -1) in (-1, 2)
        ordered = argument(user, 3, "largest", True) is True and argument(user, 4, "sorted", True) is True
        return _margin(user) if two and ordered else None
    return _entropy(user, soft)


def _only(node: Node) -> Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _entropy(user: Node, soft: Node) -> dict[Node, Reading] | None:
    """``sum(p * log(p + 1e-10))``, from either of the two readers of ``p``."""
    node: Node | None = user
    if _is(user, "add"):
        log = _only(user)
        node = _only(log) if log is not None and _is(log, "log") else None
    if node is None or not _is(node, "mul") or node.kwargs or len(node.args) != 2:
        return None
    other = node.args[1] if node.args[0] is soft else node.args[0]
    inside: Any = argument(other, 0, "input") if isinstance(other, Node) and _is(other, "log") else None
    if soft not in node.args or not _is(inside, "add") or (*inside.args, *inside.kwargs.values()) != (soft, 1e-10):
        return None
    total = _only(node)
    return {total: ("entropy", None)} if total is not None and _is_last(total, "sum") else None


def _margin(two: Node) -> dict[Node, Reading] | None:
    """``t[..., 0] - t[..., 1]`` of the values ``t`` of a ``topk(p, 2)``."""
    values = _only(two)
    if values is None or not _is(values, "getitem") or values.args[1] != 0 or len(values.users) != 2:
        return None
    parts: dict[Any, Node] = {part.args[1]: part for part in values.users if _is(part, "getitem")}
    first, second = parts.get((Ellipsis, 0)), parts.get((Ellipsis, 1))
    if first is None or second is None:
        return None
    less = _only(first)
    if less is None or not _is(less, "sub") or less.args != (first, second) or less.kwargs:
        return None
    return {less: ("margin", None)} if _only(second) is less else None


def _confidence_rows(
    known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> list[Layout | None] | None:
    """The operation reads its rows one by one."""
    layout, chosen = known.of(args[0]), known.of(args[1])
    if layout is None or any(holds(layout[-1], kind) for kind in "BT") or (args[1] is not None and chosen is None):
        return None
    return [layout[:-1]] * len(outputs)


RULES[torch.ops.dllm.confidence] = _confidence_rows
