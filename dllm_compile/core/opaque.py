"""Modules that are one call in a graph: nothing looks into them, and they run in eager.

    before:  scores = router(x) ; where(chosen == 0) ; ...        the graph breaks, as sizes depend on values
    after:   out, scores = by_row(x, weights, number, form)       ``[B, S, d]`` to one entry a row

Only a module whose rows are independent may become one, see ``prepare``: the call is row-wise by rule, and so
runs for whichever rows a step computes. Its weights are arguments, so that they are watched as all others are. Its
number is one, too, and no literal, so that layers which are alike share their code.
"""

from __future__ import annotations

import copyreg
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from math import prod
from typing import Any, cast

import torch
import torch.fx
from torch.utils.flop_counter import register_flop_formula

from dllm_compile.compat import storage_id

from .layout import Layout, plain

_NUMBERS = count()
_MODULES: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()
_ATTRIBUTE = "one_call_in_graphs"


@dataclass(frozen=True)
class Form:
    """The tensors that a module returns for ``[B, S, d]``.

    Attributes:
        flat: of each tensor whether its rows lie in one dimension, ``[B S, ...]``, and not in two.
        rest: of each the sizes of its other dimensions.
        dtypes: of each.
        flops: of one row.
    """

    flat: tuple[bool, ...]
    rest: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    flops: int

    def text(self) -> str:
        """The form as an argument of a call in a graph."""
        named = (str(dtype).removeprefix("torch.") for dtype in self.dtypes)
        parts = zip(self.flat, self.rest, named, strict=True)
        outs = (f"{'n' if flat else 'bs'} {dtype} {' '.join(map(str, rest))}" for flat, rest, dtype in parts)
        return ";".join([str(self.flops), *outs])

    @staticmethod
    @cache
    def of_text(text: str) -> Form:
        """The form that :meth:`text` wrote."""
        flops, *outs = text.split(";")
        words = [out.split() for out in outs]
        return Form(
            tuple(word[0] == "n" for word in words),
            tuple(tuple(map(int, word[2:])) for word in words),
            tuple(getattr(torch, word[1]) for word in words),
            int(flops),
        )

    def shapes(self, batch: Any, tokens: Any) -> list[tuple[Any, ...]]:
        """Shapes of the tensors, for these numbers of sequences and of tokens."""
        rows = [(batch * tokens,) if flat else (batch, tokens) for flat in self.flat]
        return [(*lead, *rest) for lead, rest in zip(rows, self.rest, strict=True)]


@dataclass(frozen=True)
class OneCall:
    """What an opaque module was tried with, and what it returned.

    Attributes:
        number: int64 ``[1]``, which module it is.
        width, dtype: of the rows that it was tried with.
        form: of what it returns, as :meth:`Form.text` writes it.
        nested: what it returns, with the number of a tensor in place of each; tuples, numbers, and ``None``.
    """

    number: torch.nn.Parameter
    width: int
    dtype: torch.dtype
    form: str
    nested: Any


def make_opaque(module: torch.nn.Module, width: int, dtype: torch.dtype, form: Form, nested: Any) -> None:
    """Make a module one call in the graphs that Dynamo traces in inference, and nowhere else.

    A copy of it, pickled or deep, is of its former class.

    Args:
        module: whose rows are independent. Its class becomes one that is made of its own.
        width, dtype: of rows that it takes.
        form, nested: what it returns.
    """
    which = next(_NUMBERS)
    _MODULES[which] = module
    number = torch.nn.Parameter(torch.tensor([which]), requires_grad=False)
    vars(module)[_ATTRIBUTE] = OneCall(number, width, dtype, form.text(), nested)
    module.__class__ = _opaque_class(cast("Any", type(module)))


def calls_opaque(node: torch.fx.Node) -> bool:
    """Whether a node of a graph calls an opaque module."""
    return node.target in (torch.ops.dllm.by_row, torch.ops.dllm.by_row.default)


def is_opaque(module: torch.nn.Module) -> bool:
    """Whether a module was made opaque."""
    return _ATTRIBUTE in vars(module)


@cache
def _opaque_class(own: Any) -> Any:
    """A class like ``own`` whose forward is one call where Dynamo traces it."""

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and not self.training and not torch.is_grad_enabled():
            call, given = vars(self)[_ATTRIBUTE], [*args, *more.values()]
            if _fits(call, given):
                weights = [*self.parameters(), *self.buffers()]
                outs = torch.ops.dllm.by_row(given[0], weights, call.number, call.form)
                return _nest(call.nested, outs)
        return own.forward(self, *args, **more)

    def reduce(self: Any, protocol: Any) -> Any:
        made, (_, *args), *state = cast("tuple[Any, Any, Any]", own.__reduce_ex__(self, protocol))
        if made is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"a prepared {own.__name__} cannot be copied: copy the model first, then prepare it")
        kept = {name: value for name, value in state[0].items() if name != _ATTRIBUTE}
        return (object.__new__, (own, *args), kept, *state[1:])

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "__doc__": own.__doc__}
    return type(own.__name__, (own,), {**names, "forward": forward, "__reduce_ex__": reduce})


def _fits(call: OneCall, given: Sequence[Any]) -> bool:
    """Whether an opaque module is called as in its trial: with ``[B, S, d]`` alone."""
    if len(given) != 1 or not isinstance(given[0], torch.Tensor):
        return False
    return given[0].dim() == 3 and given[0].shape[-1] == call.width and given[0].dtype == call.dtype


def _nest(nested: Any, outs: Sequence[torch.Tensor]) -> Any:
    if isinstance(nested, tuple):
        return tuple([_nest(each, outs) for each in nested])
    return None if nested is None else outs[nested]


def flat_outputs(value: Any) -> tuple[list[torch.Tensor], Any] | None:
    """The tensors that a module returned, as a list, and its nested tuples with the number of each tensor in its place;
    ``None`` where it returned something else.
    """
    outs: list[torch.Tensor] = []

    def numbered(each: Any) -> Any:
        if isinstance(each, torch.Tensor):
            outs.append(each)
            return len(outs) - 1
        if each is None:
            return None
        if type(each) is tuple:
            return tuple([numbered(part) for part in each])
        raise TypeError

    try:
        return outs, numbered(value)
    except TypeError:
        return None


@torch.library.custom_op("dllm::by_row", mutates_args=())
def by_row(x: torch.Tensor, weights: list[torch.Tensor], number: torch.Tensor, form: str) -> list[torch.Tensor]:
    """Call an opaque module.

    Args:
        x: ``[B, S, d]``.
        weights: its parameters and buffers, which it holds itself.
        number: which module; on the CPU, so that reading it waits for no device.
        form: of what it returns.

    Returns:
        Its tensors, in memory of their own.

    Raises:
        RuntimeError: there is no such module any more, or it returned something else than when it was tried.
    """
    module = _MODULES.get(int(number))
    if module is None:
        raise RuntimeError("dllm: a module that a graph calls is gone with the model that was prepared")
    found = flat_outputs(type(module).__mro__[1].forward(module, x))  # type: ignore[attr-defined]
    wanted = Form.of_text(form)
    made = [(tuple(out.shape), out.dtype) for out in found[0]] if found is not None else []
    if found is None or made != [*zip(wanted.shapes(*x.shape[:2]), wanted.dtypes, strict=True)]:
        raise RuntimeError(f"dllm: {type(module).__name__} returned {made}, not what it did when it was prepared")
    taken, outs = {storage_id(x), *map(storage_id, weights)}, []
    for out in found[0]:
        outs.append(out.clone() if storage_id(out) in taken else out.contiguous())
        taken.add(storage_id(outs[-1]))
    return outs


@by_row.register_fake
def _(x: torch.Tensor, weights: list[torch.Tensor], number: torch.Tensor, form: str) -> list[torch.Tensor]:
    made = Form.of_text(form)
    shapes = made.shapes(*x.shape[:2])
    return [x.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, made.dtypes, strict=True)]


@register_flop_formula(torch.ops.dllm.by_row)
def _flops(x: Any, weights: Any, number: Any, form: str, **_: Any) -> int:
    return int(prod(x[:2])) * Form.of_text(form).flops


def layouts(entering: Layout, form: str) -> list[Layout]:
    """Where the rows are in what a module makes of ``[B, S, d]``."""
    (batch, tokens, _), made = entering, Form.of_text(form)
    leads: list[Layout] = [((*batch, *tokens),) if flat else (batch, tokens) for flat in made.flat]
    return [(*lead, *map(plain, rest)) for lead, rest in zip(leads, made.rest, strict=True)]
