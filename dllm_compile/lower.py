"""Lower an FX module to something fast: the one file that calls Inductor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.fx
from torch._dynamo.source import ConstantSource
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .core.sizes import Extent, Size, order

Compiled = Callable[..., Any]
IN_ORDER = {"reorder_for_locality": False}
"""A read of the rows kept that moves behind their overwriting costs a copy of all of them, there and back."""


class Code(NamedTuple):
    """Compiled code.

    Attributes:
        run: takes the arguments, returns the tuple.
        serves: whether sizes, by name, are such as the compiler took for granted; ``None`` where it took none.
    """

    run: Compiled
    serves: Callable[[Mapping[str, int]], bool] | None = None


class SizeFixed(RuntimeError):
    """Code for any size turned out to be for one."""


def lower(
    module: torch.fx.GraphModule,
    args: Sequence[Any],
    how: str,
    extents: Sequence[tuple[Extent, ...] | None] = (),
    writes: bool = False,
) -> Code:
    """Compile ``module`` for arguments like ``args``.

    Args:
        module: a torch-level graph that returns a tuple.
        args: real arguments, tensors and numbers.
        how: ``"inductor"``, or ``"eager"`` to run the module as it is.
        extents: of each tensor its extents, and of each number itself; ``None`` for those that never change. Numbers
            of the same name are the same at every call; those below 2 never change. Without any, all sizes are fixed.
        writes: whether it writes to its arguments.

    Returns:
        A function of the same arguments that returns the tuple, and for which sizes it is good.

    Raises:
        SizeFixed: one of the sizes that may be any was compiled as a number.
    """
    if how == "eager":
        return Code(module)
    shapes = ShapeEnv(duck_shape=False)  # equal by chance is not equal
    numbers: dict[str, Any] = {}
    example = _examples(args, extents, shapes, numbers) if extents else list(args)
    with torch.no_grad():
        compiled = compile_fx(module, example, config_patches=IN_ORDER if writes else None)
    fixed = [str(symbol) for symbol, value in shapes.replacements.items() if value.is_number]
    if fixed:
        raise SizeFixed(f"code for any size was compiled for one: {', '.join(fixed)}")
    symbols = {name: number.node.expr for name, number in numbers.items() if isinstance(number, torch.SymInt)}
    assumed = [guard.expr for guard in shapes.guards]

    def serves(sizes: Mapping[str, int]) -> bool:
        values = {symbol: sizes[name] for name, symbol in symbols.items()}
        return all(bool(expression.xreplace(values)) for expression in assumed)

    return Code(compiled, serves if assumed else None)  # type: ignore[arg-type]


def _examples(
    args: Sequence[Any], extents: Sequence[tuple[Extent, ...] | None], shapes: ShapeEnv, numbers: dict[str, Any]
) -> list[Any]:
    """Fake arguments whose sizes are symbols, one for each name; they are added to ``numbers``."""
    mode = FakeTensorMode(shape_env=shapes)
    for value, given in zip(args, extents, strict=True):
        actual = value.shape if isinstance(value, torch.Tensor) else (value,)
        for extent, size in zip(given or (), actual, strict=bool(given)):
            if isinstance(extent, Size) and len(extent.names) == 1 and extent.names[0] not in numbers:
                numbers[extent.names[0]] = _symbol(shapes, extent.names[0], (size - extent.plus) // extent.times)

    def number(extent: Extent) -> Any:
        if isinstance(extent, int):
            return extent
        return prod([numbers[name] for name in extent.names], start=extent.times) + extent.plus

    out: list[Any] = []
    for value, given in zip(args, extents, strict=True):
        if isinstance(value, torch.Tensor) and (given is None or is_traceable_wrapper_subclass(value)):
            out.append(mode.from_tensor(value, static_shapes=True))
        elif isinstance(value, torch.Tensor):
            assert given is not None
            sizes = [number(extent) for extent in given]
            strides = _strides(value, sizes)
            with mode:
                out.append(torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device))
        else:
            out.append(number(given[0]) if given else value)
    return out


def _symbol(shapes: ShapeEnv, name: str, value: int) -> Any:
    if value < 2:
        return value
    source = ConstantSource(f"number_of_{''.join(c if c.isalnum() else '_' for c in name)}")
    symbol = shapes.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    return shapes.create_symintnode(symbol, hint=value, source=source)


def _strides(value: torch.Tensor, sizes: Sequence[Any]) -> list[Any]:
    """Strides of ``value``, where it is packed, for other sizes."""
    strides: list[Any] = list(value.stride())
    expected, actual = 1, 1
    for i in reversed(order(value)[0]):
        if value.stride(i) == 0:
            continue
        strides[i] = expected if value.stride(i) == actual else value.stride(i)
        expected, actual = strides[i] * sizes[i], value.stride(i) * value.shape[i]
    for i, extent in enumerate(value.shape):
        if extent <= 1:  # nobody steps along it
            strides[i] = expected
    return strides
