"""Lower an FX module to something fast: the one file that calls Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Compiled = Callable[..., Any]
IN_ORDER = {"reorder_for_locality": False}
"""A read of the rows kept that moves behind their overwriting costs a copy of all of them, there and back."""


def _has_parts(value: object) -> bool:
    return is_traceable_wrapper_subclass(value)


def lower(
    module: torch.fx.GraphModule, args: Sequence[Any], how: str, free: Sequence[int] = (), writes: bool = False
) -> Compiled:
    """Compile ``module`` for arguments like ``args``.

    Args:
        module: a torch-level graph that returns a tuple.
        args: real arguments.
        how: ``"inductor"``, or ``"eager"`` to run the module as it is.
        free: arguments whose second dimension may differ from call to call.
        writes: whether it writes to its arguments.

    Returns:
        A function of the same arguments that returns the tuple.
    """
    if how == "eager":
        return module
    example = list(args)
    shapes = ShapeEnv(duck_shape=False)  # equal by chance is not equal
    if free:
        mode = FakeTensorMode(shape_env=shapes)
        for i, value in enumerate(args):
            if not isinstance(value, torch.Tensor):
                continue
            if _has_parts(value):  # a quantized weight: its parts have sizes of their own
                example[i] = mode.from_tensor(value, static_shapes=True)
            else:
                sizes = [DimDynamic.STATIC] * value.dim()
                if i in free and value.shape[1] < 2:
                    raise RuntimeError(f"code for any number of rows is compiled for 2 or more, not {value.shape[1]}")
                if i in free:
                    sizes[1] = DimDynamic.DYNAMIC
                example[i] = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with torch.no_grad():
        compiled = compile_fx(module, example, config_patches=IN_ORDER if writes else None)
    fixed = [str(symbol) for symbol, value in shapes.replacements.items() if value.is_number]
    if fixed:
        raise RuntimeError(f"code for any number of rows was compiled for one number of them: {', '.join(fixed)}")
    return compiled  # type: ignore[return-value]
