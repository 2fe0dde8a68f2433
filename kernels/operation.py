"""Register a function as an operation of torch whose body compilers see."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from dllm_compile.compat import LOG_OF_OPERATIONS, likely

log = logging.getLogger(__name__)
Function = TypeVar("Function", bound=Callable[..., object])


def operation(name: str, annotated: Callable[..., object]) -> Callable[[Function], Function]:
    """Register a function as ``dllm::name``, with the arguments and results that ``annotated`` names.

    It gets them by place, without the last ones where they are the defaults.
    """

    def register(function: Function) -> Function:
        function.__signature__ = inspect.signature(annotated)  # type: ignore[attr-defined]
        log = logging.getLogger(LOG_OF_OPERATIONS)
        before, log.disabled = log.disabled, True  # it warns of no kernels; they are imported when one is launched
        function.__wrapped__ = repr  # type: ignore[attr-defined]  # has no source; torch imports Inductor to search one
        try:
            torch.library.triton_op(f"dllm::{name}", function, mutates_args=())
        finally:
            log.disabled = before
            del function.__wrapped__  # type: ignore[attr-defined]
        return function

    return register


def on_cuda(tensor: torch.Tensor) -> bool:
    """Whether a tensor is on a GPU of NVIDIA: the Triton kernels here are for those. On ROCm, whose tensors call
    themselves CUDA's, and on XPU, Inductor compiles the reference.
    """
    if tensor.is_cuda and torch.version.hip is not None:
        _say_once("ROCm")
    elif tensor.device.type == "xpu":
        _say_once("XPU")
    return tensor.is_cuda and torch.version.hip is None


@cache
def _say_once(platform: str) -> None:
    log.info("%s: Inductor compiles the references of the operations; their Triton kernels are for CUDA", platform)


def expected(number: int | torch.SymInt) -> int:
    """The value of a size, to choose tiles by. For a symbolic size, the value at compile time, without specializing the
    code to it.
    """
    return number if isinstance(number, int) else likely(number)
