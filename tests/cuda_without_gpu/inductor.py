"""Inductor for CUDA on a machine without it: fake tensors in, Triton source and cubins out. Nothing is launched.

What is put in place of PyTorch's is what Inductor asks a driver: the number and the properties of devices.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._dynamo import device_interface
from torch._functorch import config as functorch_config
from torch._inductor import async_compile, graph
from torch._inductor import config as inductor_config
from torch._inductor import utils as inductor_utils
from torch._inductor.codecache import PyCodeCache
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.hints import DeviceProperties
from torch.utils import _triton as triton_utils

from . import guard

DEVICE = torch.device("cuda", 0)
MULTIPROCESSORS = 132


@dataclass
class Kernel:
    """A Triton kernel that Inductor generated, or one of ours that it compiles.

    Attributes:
        name, source: as Inductor gave it.
        configs: how many ways of compiling it there are to choose from on the device.
        compiled: of those, how many were compiled here.
    """

    name: str
    source: str
    configs: int = 0
    compiled: int = 0


@dataclass
class Seen:
    """What Inductor generated.

    Attributes:
        kernels: in order.
        codes: Python of each graph.
    """

    kernels: list[Kernel] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)


_BUILT: dict[tuple[str, int, bool], tuple[int, int]] = {}


def properties(capability: int) -> Any:
    """Of an H100, or of an A100 or a B200 for their capabilities."""
    shared = {80: 166912}.get(capability, 232448)
    return SimpleNamespace(
        name="pretended",
        major=capability // 10,
        minor=capability % 10,
        multi_processor_count=MULTIPROCESSORS,
        total_memory=80 << 30,
        regs_per_multiprocessor=65536,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=49152,
        shared_memory_per_block_optin=shared,
        L2_cache_size=50 << 20,
        gcnArchName="",
    )


def _answers(capability: int) -> list[tuple[Any, str, Any]]:
    """What is asked of a driver, and what it would say."""
    device = properties(capability)
    cuda = device_interface.CudaInterface
    both: dict[str, Any] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_, **__: device,
        "synchronize": lambda *_: None,
    }
    found = [(where, name, value) for where in (torch.cuda, cuda) for name, value in both.items()]
    found += [
        (torch.cuda, "get_device_capability", lambda *_: divmod(capability, 10)),
        (torch.cuda, "is_bf16_supported", lambda *_, **__: True),
        (torch.cuda, "_lazy_init", lambda: None),
        (torch.cuda, "get_rng_state", lambda *_: torch.zeros(16, dtype=torch.uint8)),
        (torch.cuda, "set_rng_state", lambda *_: None),
        (cuda, "get_compute_capability", staticmethod(lambda *_: capability)),
        (cuda, "is_triton_capable", staticmethod(lambda *_: True)),
        (cuda, "is_bf16_supported", staticmethod(lambda *_, **__: True)),
        (cuda, "get_raw_stream", staticmethod(lambda _: 0)),
        (cuda.Worker, "get_device_properties", staticmethod(lambda *_: device)),
        (cuda.Worker, "current_device", staticmethod(lambda: 0)),
        (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
        (torch.version, "cuda", "12.8"),
        (triton_helpers, "set_driver_to_gpu", lambda: None),
        (joint_graph, "lazy_init", lambda *_: None),
        (post_grad, "lazy_init", lambda *_: None),
    ]
    for name in ("exchange_device", "maybe_exchange_device"):
        found += [(torch.cuda, f"_{name}", lambda _: 0), (cuda, name, staticmethod(lambda _: 0))]
    real = device_interface.get_interface_for_device
    found.append((device_interface, "get_interface_for_device", lambda d: cuda if "cuda" in str(d) else real(d)))
    return found


def _forget_answers() -> None:
    """Drop what PyTorch remembers of the device."""
    DeviceProperties.create.cache_clear()
    for module in (inductor_utils, triton_utils):
        for function in vars(module).values():
            if callable(getattr(function, "cache_clear", None)) and not isinstance(function, type):
                function.cache_clear()


@contextlib.contextmanager
def pretend(capability: int = 90, every: bool = False) -> Iterator[Seen]:
    """Inductor lowers for a GPU that is not there.

    Args:
        capability: of the GPU.
        every: compile each kernel in every way that it could be tuned to, not in the first one alone.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    guard.load()
    joint_graph.lazy_init(torch.device("cpu"))  # traces patterns on real tensors
    post_grad.lazy_init()  # by the very arguments that Inductor gives, or it would happen twice
    seen = Seen()

    def triton(_: Any, name: str, source: str, device_str: str = "cuda") -> Any:
        seen.kernels.append(Kernel(name, source, *built(name, source, capability, every)))
        return SimpleNamespace(run=None)

    target = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda *_: 0,
        get_active_torch_device=lambda: DEVICE,
    )
    with contextlib.ExitStack() as stack:
        for where, name, value in _answers(capability):
            stack.enter_context(mock.patch.object(where, name, value, create=True))
        stack.enter_context(mock.patch.object(async_compile.AsyncCompile, "triton", triton))
        keep = staticmethod(seen.codes.append)
        stack.enter_context(mock.patch.object(graph.GraphLowering, "save_output_code", keep))
        no_caches = {"fx_graph_cache": False, "fx_graph_remote_cache": False, "compile_threads": 1}
        stack.enter_context(inductor_config.patch(shape_padding=False, joint_graph_constant_folding=False, **no_caches))
        stack.enter_context(functorch_config.patch(enable_autograd_cache=False))
        before = driver._active
        driver.set_active(target)
        _forget_answers()
        try:
            yield seen
        finally:
            driver._active = before
            _forget_answers()


class _Done(Exception):
    """A kernel was compiled; what Inductor does then needs a device."""


def built(name: str, source: str, capability: int, every: bool) -> tuple[int, int]:
    """Compile a kernel to a cubin, by the path that Inductor takes; the same source is compiled once.

    Returns:
        The ways of compiling it, and in how many it was compiled.
    """
    key = hashlib.sha256(source.replace(name, "kernel").encode()).hexdigest(), capability, every
    if key not in _BUILT:
        tuned = getattr(PyCodeCache.load(source), name)
        chosen = tuned.configs if every else tuned.configs[:1]
        for config in chosen:
            _cubin(tuned, config)
        _BUILT[key] = len(tuned.configs), len(chosen)
    return _BUILT[key]


def _cubin(tuned: Any, config: Any) -> None:
    import triton

    real, made = triton.compile, []

    def keep(*args: Any, **more: Any) -> None:
        made.append(real(*args, **more))
        raise _Done

    log = logging.getLogger("torch._inductor.runtime.triton_heuristics")
    before, log.disabled = log.disabled, True
    try:
        with mock.patch.object(triton, "compile", keep), contextlib.suppress(_Done):
            tuned._precompile_config(config)
    finally:
        log.disabled = before
    if not made[-1].asm["cubin"]:
        raise AssertionError("no cubin")
