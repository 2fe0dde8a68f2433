"""How each ATen call moves the batch and token axes: the rules that ``axes.follow`` applies.

A rule gets the layouts known so far, the call and its outputs, and returns a layout for each output, or ``None`` where
rows may mix. Element-wise calls are known by their tag and calls with a ``dim`` by their schema; the rest is the table
at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dllm_compile.compat import schema, tree_leaves

from . import opaque
from .layout import Factor, Layout, holds, plain, position, regroup, size

aten = torch.ops.aten


class Known:
    """Layouts of the tensors met so far, by identity.

    Attributes:
        beside: layouts of constants that met tokens element-wise in the node at hand.
        whole: operands that the node at hand reads every row of, by identity.
    """

    def __init__(self) -> None:
        self.layout: dict[int, Layout] = {}
        self.beside: dict[int, Layout] = {}
        self.whole: set[int] = set()
        self.keep: list[torch.Tensor] = []  # an identity is unique only while its tensor lives

    def tag(self, tensor: torch.Tensor, layout: Layout) -> None:
        """Remember the layout of a tensor."""
        self.keep.append(tensor)
        self.layout[id(tensor)] = layout

    def of(self, value: Any) -> Layout | None:
        """Layout of a value; ``None`` for constants and for anything that is no tensor."""
        return self.layout.get(id(value)) if isinstance(value, torch.Tensor) else None

    def must(self, value: Any) -> Layout:
        """Layout of a value that has one."""
        layout = self.of(value)
        assert layout is not None
        return layout


Rule = Callable[[Known, Any, Any, Any, list[torch.Tensor]], Sequence[Layout | None] | None]


def elementwise(
    known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> Sequence[Layout | None] | None:
    """Broadcasting calls: each output dimension takes the factors of the operand that fills it."""
    operands = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    return [_broadcast(known, operands, output) for output in outputs]


def _broadcast(known: Known, operands: Sequence[torch.Tensor], output: torch.Tensor) -> Layout | None:
    rank = output.dim()
    out = [plain(extent) for extent in output.shape]
    by_key = _of_keys(known, operands, rank)
    for operand in operands:
        for i, dim in enumerate(by_key.get(id(operand), known.of(operand)) or ()):
            j = rank - operand.dim() + i
            if size(dim) == output.shape[j] and (holds(dim, "T") or holds(dim, "B")):
                if out[j] != plain(output.shape[j]) and out[j] != dim:
                    return None
                out[j] = dim
    for operand in operands:
        layout = by_key.get(id(operand), known.of(operand))
        for i, extent in enumerate(operand.shape):
            wanted = out[rank - operand.dim() + i]
            if layout is not None and holds(wanted, "T") and extent != 1 and layout[i] != wanted:
                return None  # tokens against something else of the same size
        if layout is None:
            note_constant(known, operand, tuple(out))
    for operand in operands:
        layout = by_key.get(id(operand))
        if layout is not None:
            known.whole.add(id(operand))
            if position(layout, "T") is not None:
                known.beside[id(operand)] = layout
    return tuple(out)


def _of_keys(known: Known, operands: Sequence[torch.Tensor], rank: int) -> dict[int, Layout]:
    """Operands whose tokens are the keys of scores: those have their tokens in the dimension before the last, and as
    many entries in the last, where these have theirs. All of their rows are read; in the dimension of the queries they
    have an entry for each, or one for all.

    Returns:
        The layout of each as one of scores, by identity.
    """
    scores = [layout for layout in map(known.of, operands) if layout is not None and len(layout) == rank > 2]
    tokens = {layout[-2] for layout in scores if holds(layout[-2], "T") and layout[-1] == plain(size(layout[-2]))}
    found: dict[int, Layout] = {}
    if len(tokens) == 1:
        (dim,) = tokens
        for operand in operands:
            layout = known.of(operand) or ()
            if layout and layout[-1] == dim and len(dim) == 1:
                queries = [dim if each == plain(size(dim)) else each for each in layout[-2:-1]]
                found[id(operand)] = (*layout[:-2], *queries, plain(size(dim)))
    return found


def note_constant(known: Known, operand: torch.Tensor, out: Layout) -> None:
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
    known.keep.append(operand)
    known.beside[id(operand)] = tuple(layout)


def along(
    known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> Sequence[Layout | None] | None:
    """Calls with a ``dim``: softmax, means, top-k. Row-wise unless they run along the batch or the tokens."""
    layout = known.of(args[0]) if args and isinstance(args[0], torch.Tensor) else None
    given = dict(zip([a.name for a in schema(func).arguments], args, strict=False)) | kwargs
    dims = given.get("dim", next((a.default_value for a in schema(func).arguments if a.name == "dim"), None))
    others = [leaf for leaf in tree_leaves((args[1:], kwargs)) if isinstance(leaf, torch.Tensor)]
    if layout is None or dims is None or others:
        return None
    rank = len(layout)
    over = {d % rank for d in ([dims] if isinstance(dims, int) else dims)}
    if not over or any(holds(layout[d], kind) for d in over for kind in "BT"):
        return None
    found: list[Layout | None] = []
    for output in outputs:
        if output.dim() == rank:
            found.append(tuple(plain(output.shape[i]) if i in over else dim for i, dim in enumerate(layout)))
        elif output.dim() == rank - len(over):
            found.append(tuple(dim for i, dim in enumerate(layout) if i not in over))
        else:
            found.append(None)
    return found


def _same(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    return [known.of(args[0]) for _ in outputs]


def _view(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    layout = known.of(args[0])
    return None if layout is None else [regroup(layout, output.shape) for output in outputs]


def _expand(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout, shape = known.must(args[0]), outputs[0].shape
    new = len(shape) - len(layout)
    old = [dim if size(dim) == shape[new + i] else plain(shape[new + i]) for i, dim in enumerate(layout)]
    return [(*[plain(extent) for extent in shape[:new]], *old)]


def _repeat(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``repeat``: row-wise where neither the batch nor the tokens are repeated."""
    layout, times = known.must(args[0]), args[1]
    new = len(times) - len(layout)
    if any(n != 1 and (holds(dim, "T") or holds(dim, "B")) for n, dim in zip(times[new:], layout, strict=True)):
        return None
    old = [dim if n == 1 else plain(size(dim) * n) for n, dim in zip(times[new:], layout, strict=True)]
    return [(*map(plain, times[:new]), *old)]


def _permute(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = known.must(args[0])
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


def _unsqueeze(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = known.must(args[0])
    at = args[1] % (len(layout) + 1)
    return [(*layout[:at], plain(1), *layout[at:])]


def _squeeze(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None]:
    layout = known.must(args[0])
    dims = range(len(layout)) if len(args) == 1 else [args[1]] if isinstance(args[1], int) else args[1]
    gone = {d % len(layout) for d in dims if size(layout[d]) == 1}
    if any(holds(layout[d], "B") for d in gone):
        return [regroup(layout, outputs[0].shape)]
    return [tuple(dim for i, dim in enumerate(layout) if i not in gone)]


def _slice(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``slice``, ``split`` and ``split_with_sizes``: row-wise along other dimensions, or where they cut nothing."""
    layout = known.must(args[0])
    at = args[1] if func.overloadpacket is aten.slice else (args[2] if len(args) > 2 else kwargs.get("dim", 0))
    at %= len(layout)
    cut = any(output.shape[at] != size(layout[at]) for output in outputs)
    if cut and (holds(layout[at], "T") or holds(layout[at], "B")):
        return None
    if not cut:
        return [layout for _ in outputs]
    return [(*layout[:at], plain(output.shape[at]), *layout[at + 1 :]) for output in outputs]


def _select(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``select`` and ``unbind`` drop a dimension."""
    layout = known.must(args[0])
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(layout)
    if holds(layout[at], "T") or holds(layout[at], "B"):
        return None
    return [(*layout[:at], *layout[at + 1 :]) for _ in outputs]


def _cat(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    parts = [part for part in args[0] if part.numel()]  # caches begin empty
    layouts = [layout for layout in map(known.of, parts) if layout is not None]
    stacked = func.overloadpacket is aten.stack
    rank = len(layouts[0]) + int(stacked)
    at = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % rank
    first = layouts[0] if not stacked else (*layouts[0][:at], plain(1), *layouts[0][at:])
    out = (*first[:at], plain(outputs[0].shape[at]), *first[at + 1 :])
    if holds(first[at], "T") or holds(first[at], "B") or (stacked and len(layouts) != len(parts)):
        return None
    for part in parts:  # constants, such as a score for no key
        if known.of(part) is None:
            if any(n != size(dim) for i, (n, dim) in enumerate(zip(part.shape, out, strict=True)) if i != at):
                return None
            note_constant(known, part, tuple(plain(n) if i == at else out[i] for i, n in enumerate(part.shape)))
    same = all(layout[:at] + layout[at + int(not stacked) :] == out[:at] + out[at + 1 :] for layout in layouts)
    return [out] if same else None


def _matmul(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """``mm``, ``addmm``, ``bmm`` with rows on the left and a constant on the right."""
    left, right = (args[1], args[2]) if func.overloadpacket in (aten.addmm, aten.baddbmm) else (args[0], args[1])
    layout = known.of(left)
    if layout is None or known.of(right) is not None or holds(layout[-1], "T") or holds(layout[-1], "B"):
        return None
    return [(*layout[:-1], plain(outputs[0].shape[-1]))]


def _embedding(
    known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]
) -> list[Layout | None] | None:
    layout = known.of(args[1])
    return None if layout is None or known.of(args[0]) is not None else [(*layout, plain(outputs[0].shape[-1]))]


def _norm(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    """Layer and root-mean-square norms over trailing dimensions."""
    layout = known.of(args[0])
    if layout is None or any(holds(dim, k) for dim in layout[len(layout) - len(args[1]) :] for k in "BT"):
        return None
    return [tuple(d if size(d) == n else plain(n) for d, n in zip(layout, o.shape, strict=True)) for o in outputs]


def _gather(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> list[Layout | None] | None:
    source, index = known.of(args[0]), known.of(args[2])
    if source is None or (index is not None and len(source) != len(index)):
        return None
    at = args[1] % len(source)
    if index is None:  # a constant one, with an entry for each row
        shape = args[2].shape
        out = tuple(plain(n) if i == at else dim for i, (n, dim) in enumerate(zip(shape, source, strict=True)))
        if [size(dim) for dim in out] != [*shape] or any(holds(source[at], kind) for kind in "BT"):
            return None
        note_constant(known, args[2], out)
        return [out] if id(args[2]) in known.beside else None
    fine = all(a == b for i, (a, b) in enumerate(zip(source, index, strict=True)) if i != at)
    return [index] if fine and not holds(source[at], "T") and not holds(source[at], "B") else None


def _opaque(known: Known, func: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> Sequence[Layout] | None:
    """A module that is one call in the graph; a trial found its rows to be independent."""
    layout, weights = known.of(args[0]), any(known.of(weight) is not None for weight in args[1])
    if layout is None or weights or [[factor.kind for factor in dim] for dim in layout] != [["B"], ["T"], [""]]:
        return None
    return opaque.layouts(layout, args[3])


RULES: dict[Any, Rule] = {
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
    aten.repeat: _repeat,
    aten.unsqueeze: _unsqueeze,
    aten.squeeze: _squeeze,
    aten.embedding: _embedding,
    aten.gather: _gather,
    torch.ops.dllm.by_row: _opaque,
}
