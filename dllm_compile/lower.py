"""Lower an FX module to something fast: the one file that calls Inductor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.fx
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

Compiled = Callable[..., Any]


def lower(module: torch.fx.GraphModule, args: Sequence[Any], how: str, free: Sequence[int] = ()) -> Compiled:
    """Compile ``module`` for arguments like ``args``.

    Args:
        module: a torch-level graph that returns a tuple; it may write to its arguments.
        args: real arguments.
        how: ``"inductor"``, or ``"eager"`` to run the module as it is.
        free: arguments whose second dimension may differ from call to call.

    Returns:
        A function of the same arguments that returns the tuple.
    """
    if how == "eager":
        return module
    example = list(args)
    if free:
        mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))  # equal by chance is not equal
        for i, value in enumerate(args):
            if isinstance(value, torch.Tensor):
                sizes = [DimDynamic.STATIC] * value.dim()
                if i in free:
                    sizes[1] = DimDynamic.DYNAMIC
                example[i] = mode.from_tensor(value, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with torch.no_grad():
        return compile_fx(module, example)  # type: ignore[return-value]
