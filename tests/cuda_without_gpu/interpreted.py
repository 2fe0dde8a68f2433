"""Inductor's code for CUDA, run on a CPU: Triton kernels by Triton's interpreter, everything else by ATen.

For a process with ``TRITON_INTERPRET=1``, which is read where triton is imported. What Inductor generated is executed
as it is, with its own grids and ways to tune each kernel. New memory is NaN, or the largest integer. The interpreter
runs one program of a grid after the other, so that a race between them is only seen as a result that depends on their
order.
"""

# mypy: disallow-untyped-decorators=False

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import torch
import triton
import triton.language as tl
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import PyCodeCache
from torch._inductor.runtime import triton_helpers, triton_heuristics
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

KINDS: dict[str, tuple[Any, Any]] = {
    "i32": (np.int32, tl.int32),
    "i64": (np.int64, tl.int64),
    "fp32": (np.float32, tl.float32),
    "fp64": (np.float64, tl.float64),
}


@triton.jit
def _exp(x: tl.tensor) -> tl.tensor:
    return tl.exp(x)


@triton.jit
def _rsqrt(x: tl.tensor) -> tl.tensor:
    return tl.rsqrt(x)


LIBDEVICE = SimpleNamespace(exp=_exp, rsqrt=_rsqrt)
"""In place of the library of CUDA's mathematical functions, those that are called here."""


@dataclass
class Kernel:
    """A kernel where Inductor expects one that it tunes.

    Attributes:
        function: as Triton's interpreter takes it.
        configs: ways to tune it.
        of_triton, of_inductor: what Inductor knows of it.
        small: whether the smallest tiles are taken, or else the largest.
    """

    function: Any
    configs: list[Any]
    of_triton: dict[str, Any]
    of_inductor: dict[str, Any]
    small: ClassVar[bool] = False

    def run(self, *args: Any, stream: int) -> None:
        """Launch it: scalars are of the types that its signature names, as they would be on a GPU."""
        config = (min if self.small else max)(self.configs, key=lambda each: math.prod(each.kwargs.values()))
        annotations = self.function.fn.__annotations__
        names = [name for name in self.function.arg_names if annotations.get(name) is not tl.constexpr]
        names += self.of_inductor.get("extra_launcher_args", [])
        given = dict(zip(names, args, strict=True))
        constants = {**self.of_triton["constants"], **config.kwargs}
        grid = triton_heuristics.GridExpr.from_meta(self.of_inductor, config).eval_slow({**given, **constants})
        kinds = self.of_triton["signature"]
        values = [
            constants[name] if name in constants else _typed(given[name], kinds[name])
            for name in self.function.arg_names
        ]
        self.function.run(*values, grid=grid, warmup=False)


def _typed(value: Any, kind: str) -> Any:
    if isinstance(value, torch.Tensor):
        return value
    of_numpy, of_triton = KINDS[kind]
    return tl.tensor(TensorHandle(np.array([value], dtype=of_numpy), of_triton), of_triton)


def _kernels(_: Any, configs: list[Any], *, triton_meta: Any, inductor_meta: Any, **more: Any) -> Any:
    """In place of ``cached_autotune``, which gives a kernel its launchers."""
    return lambda function: Kernel(function, configs, triton_meta, inductor_meta)


def _empty(size: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    made = torch.empty_strided(size, stride, dtype=dtype)
    return made.fill_(torch.nan if dtype.is_floating_point else dtype == torch.bool or torch.iinfo(dtype).max)


def _attention(query: Any, key: Any, value: Any, bias: Any, *_: Any, scale: float | None = None) -> Any:
    """In place of CUDA's memory-efficient attention, with the strides of its result."""
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    nothing = query.new_empty(0)
    return out.transpose(1, 2).contiguous().transpose(1, 2), nothing, nothing, nothing


def _backwards(self: Any, x: int, y: int, z: int) -> None:
    self.grid_idx = tuple(size - 1 - at for size, at in zip(self.grid_dim, (x, y, z), strict=True))


@contextlib.contextmanager
def _no_device() -> Any:
    with contextlib.ExitStack() as stack:
        for where, name, value in [
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
            (torch.cuda, "_DeviceGuard", lambda _: contextlib.nullcontext()),
            (torch.cuda, "set_device", lambda _: None),
            (triton_helpers, "set_driver_to_gpu", lambda: None),
            (triton_helpers, "libdevice", LIBDEVICE),
            (triton_heuristics, "cached_autotune", _kernels),
            (AsyncCompile, "triton", lambda _, name, source, **__: getattr(PyCodeCache.load(source), name)),
        ]:
            stack.enter_context(mock.patch.object(where, name, value, create=True))
        yield


def outputs(code: str, args: list[Any], backwards: bool = False) -> list[Any]:
    """What Inductor's code of a graph returns.

    Args:
        code: Python that it generated.
        args: tensors on the CPU and numbers; what it writes to is written to.
        backwards: of the ways to tune a kernel, take that of the smallest tiles, not of the largest, and run the many
            programs from the last to the first.
    """
    with _no_device(), contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(Kernel, "small", backwards))
        if backwards:
            stack.enter_context(mock.patch.object(InterpreterBuilder, "set_grid_idx", _backwards))
        module: dict[str, Any] = {"__name__": "generated"}
        exec(code, module)
        module["empty_strided_cuda"] = _empty
        call: Callable[..., Any] = module["call"]
        return list(call([*args]))


def run(path: str) -> None:
    """Do the calls saved in a file, each with its ``code``, ``before``, its arguments, and ``backwards``.

    The file then holds what each returned, and its arguments as they were then.
    """
    library = torch.library.Library("aten", "IMPL")
    library.impl("_scaled_dot_product_efficient_attention", _attention, "CPU")
    done = []
    for call in torch.load(path):
        args = [value.clone() if isinstance(value, torch.Tensor) else value for value in call["before"]]
        done.append({"outputs": outputs(call["code"], args, call["backwards"]), "after": args})
    torch.save(done, path)
