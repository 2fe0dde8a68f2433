"""Code is made once, for prompts and responses of any length and for any batch of two or more."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import dllm_compile
from dllm_compile import unit_code

from . import models
from .models import MASK
from .rounding import roundings

FIRST = (9, 8, 2), (11, 8, 2), (11, 8, 3)
"""Prompt, response and batch of the loops that make code: Dynamo traces a second time when a size changes."""
THEN = (14, 12, 3), (7, 16, 2), (21, 8, 5), (4, 5, 2)
METHODS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "dllm-cache": {"prompt_interval": 4, "response_interval": 2, "transfer_ratio": 0.5},
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": 4},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": 4},
    "sparse": {"method": "sparse-dllm", "block_length": 4},
    "dyllm": {"method": "dyllm", "full_steps": 2},
    "dkv-cache": {"method": "dkv-cache", "refresh_interval": 2},
}


def logits(model: torch.nn.Module, size: tuple[int, int, int], calls: int, **options: Any) -> list[torch.Tensor]:
    """Logits of the masked rows at each call of a loop that fills one token a call, from the left."""
    prompt, response, batch = size
    call, x, out = models.compiled_loop(model, **options), models.start(prompt, response, batch), []
    with torch.no_grad():
        for step in range(calls):
            out.append(call(x).logits[x == MASK].clone())
            x[:, prompt + step] = 3
    return out


@pytest.mark.parametrize("name", ["llama", "qwen2", "modernbert", "esm", "roberta", "olmoe"])
@pytest.mark.parametrize("method", ["dual", "dllm-cache"])
def test_another_length_makes_no_code(name: str, method: str) -> None:
    makes_no_code(name, method)


@pytest.mark.parametrize("method", [name for name in METHODS if name not in ("dual", "dllm-cache")])
def test_another_length_makes_no_code_under_any_method(method: str) -> None:
    makes_no_code("llama", method)


def makes_no_code(name: str, method: str) -> None:
    model, made = models.build(name, num_hidden_layers=2), mock.Mock(side_effect=unit_code.lower)
    with mock.patch.object(unit_code, "lower", made):
        for size in FIRST:
            logits(model, size, 5, **METHODS[method])
        assert made.called
        made.reset_mock()
        for size in THEN:
            logits(model, size, 5, **METHODS[method])
        assert not made.called
    assert not dllm_compile.stats(model)["refused"]


@pytest.mark.parametrize(("method", "name"), [("dual", "llama"), ("dllm-cache", "qwen2")])
def test_inductor_makes_code_for_any_length(method: str, name: str) -> None:
    """As the same graphs do without it, up to norms in float32, also at lengths that the code was not made at."""
    model = models.build(name, num_hidden_layers=2)
    options, sizes = METHODS[method], [*FIRST, *THEN]
    want = [logits(model, size, 5, **options) for size in sizes]
    torch._dynamo.reset()
    for size, wanted in zip(sizes, want, strict=True):
        got = logits(model, size, 5, **options, lowering="inductor")
        assert all(roundings(a, b, torch.float32) <= 32 for a, b in zip(got, wanted, strict=True)), size
