"""Which code an operation becomes on GPUs that are not NVIDIA's: the reference, and no Triton kernel of the package."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

from dllm_compile.kernels import operation
from dllm_compile.kernels import sparse_attention as sparse
from dllm_compile.kernels.confidence import confidence
from dllm_compile.kernels.delta_attention import delta_attention

from . import attention, guard

pytestmark = pytest.mark.skipif(bool(guard.missing()), reason=guard.missing() or "none")


def _confidence(x: torch.Tensor, at: torch.Tensor) -> Any:
    return confidence(x[:, :3, 0], at)


def _delta_attention(x: torch.Tensor, at: torch.Tensor) -> Any:
    return delta_attention(x, x, x, x[:, :, :3].transpose(1, 2), at, at, x)


def _sparse_attention(x: torch.Tensor, at: torch.Tensor) -> Any:
    return sparse.sparse_attention(x, x, x, None, x.shape[2])


def _plain_attention(query: Any, key: Any, value: Any, attn_mask: Any, scale: Any, enable_gqa: bool) -> torch.Tensor:
    return attention.call("math", query, key, value, attn_mask, scale, enable_gqa)


OPERATIONS = {"confidence": _confidence, "delta_attention": _delta_attention, "sparse_attention": _sparse_attention}
PLATFORMS = {"CUDA": ("cuda", None), "ROCm": ("cuda", "6.4"), "XPU": ("xpu", None)}
"""What tensors say, and the version of HIP that torch was built for."""


def kernels(function: Callable[..., Any], device: str) -> int:
    """Triton kernels in what Inductor would be handed of a function, traced on tensors without memory."""
    graphs: list[torch.fx.Graph] = []

    def keep(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(module.graph)
        return make_boxed_func(module.forward)

    guard.load()
    with FakeTensorMode(), torch.no_grad():
        x = torch.empty(2, 4, 16, 32, device=device)
        aot_function(function, keep)(x, torch.empty(2, 3, dtype=torch.int64, device=device))
    (graph,) = graphs
    assert not [node for node in graph.nodes if "dllm" in str(node.target)]  # each operation is seen into
    return sum("triton_kernel_wrapper" in str(node.target) for node in graph.nodes)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("platform", PLATFORMS)
def test_only_cuda_takes_the_triton_kernels(
    platform: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    device, version = PLATFORMS[platform]
    monkeypatch.setattr(torch.version, "hip", version)
    operation._say_once.cache_clear()
    if platform == "XPU":  # torch chooses a kernel there by code that only its builds for XPU have
        monkeypatch.setattr(sparse, "scaled_dot_product_attention", _plain_attention)
    with caplog.at_level(logging.INFO, operation.__name__):
        assert bool(kernels(OPERATIONS[name], device)) == (platform == "CUDA")
    said = [f"{platform}: Inductor compiles the references of the operations; their Triton kernels are for CUDA"]
    heard = [record.getMessage() for record in caplog.records if record.name == operation.__name__]
    assert heard == ([] if platform == "CUDA" else said)
