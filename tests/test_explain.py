"""Closed-form costs equal counted FLOPs; verify and stats report what happened."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import dllm_compile
from dllm_compile import Options
from dllm_compile.backend import Backend

from . import models

OPTIONS = {"prompt_interval": 3, "response_interval": 4, "transfer_ratio": 0.5}
PROMPT, RESPONSE = 21, 16


def counted(name: str) -> dict[str, list[int]]:
    """FLOPs of real steps by variant, with attention as plain matrix products, and the readable rows of each."""
    ids = models.start(PROMPT, RESPONSE)
    out: dict[str, list[int]] = {}

    def counting(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        backend = Backend(module, Options.of({**OPTIONS, "lowering": "eager", "mask_id": models.MASK}))

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:  # around the graph: outside, Dynamo would not compile
                result = backend(*args)
            (session,) = backend.mine
            step = session.step
            assert step is not None
            if step.number:
                out[step.assignment.name] = [counter.get_total_flops(), step.sizes["readable"]]
            return result

        return run

    call = torch.compile(models.build(name), backend=counting)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        for step in range(6):
            call(input_ids=ids)
            ids[:, PROMPT + step] = 7
    return out


@pytest.mark.parametrize("name", ["llama", "qwen3", "modernbert", "esm"])
def test_closed_form_is_within_a_percent_of_counted_flops(name: str) -> None:
    ids = models.start(PROMPT, RESPONSE)
    explained = dllm_compile.explain(models.build(name), ids, mask_id=models.MASK, **OPTIONS)
    lengths = {**explained.lengths}
    seen = counted(name)
    assert {"select", "response", "prompt+select"} <= set(seen)
    for variant, (flops, readable) in seen.items():
        lengths["R"] = readable
        values = {symbol: lengths[symbol.name] for symbol in explained.flops[variant].free_symbols}
        assert math.isclose(float(explained.flops[variant].subs(values)), flops, rel_tol=0.01), variant


def test_state_bytes_are_those_allocated() -> None:
    model, ids = models.build("qwen2"), models.start(9, 8)
    explained = dllm_compile.explain(model, ids, mask_id=models.MASK)
    values = {symbol: explained.lengths[symbol.name] for symbol in explained.state_bytes.free_symbols}
    call = models.compiled(model)
    with torch.no_grad():
        logits = call(input_ids=ids).logits
    kept = dllm_compile.stats(model)["state_bytes"]
    spare_row = logits.numel() // ids.shape[1] * logits.element_size()
    assert kept == int(explained.state_bytes.subs(values)) + logits.numel() * logits.element_size() + spare_row


def test_explain_reads_as_text_and_names_the_roles() -> None:
    text = str(dllm_compile.explain(models.build("llama"), models.start(9, 8), mask_id=models.MASK))
    words = ("first layer is always full", "layers: 3 of 1 kind")
    for word in (*words, "keys kept at", "branch without attention", "select", "FLOPs response ="):
        assert word in text


def test_explain_says_why_a_causal_model_is_left_alone() -> None:
    model = models.build("llama", is_causal=True)
    explained = dllm_compile.explain(model, models.start(9, 8), mask_id=models.MASK)
    assert not explained.variants
    assert any("causal" in reason for reason in explained.refused)
    assert "runs on plain Inductor" in str(explained)


def test_verify_reports_the_drift() -> None:
    model, ids = models.build("llama"), models.start(9, 8)
    drifting = models.compiled(model, verify=2, prompt_interval=50, response_interval=7, transfer_ratio=0.25)
    with torch.no_grad():
        for step in range(6):
            worst = (drifting(input_ids=ids).logits - model(input_ids=ids).logits).abs()[ids == models.MASK].max()
            if step == 4:
                reported = dllm_compile.stats(model)["max_logit_error"]
                assert reported >= worst.item() - 1e-9
            ids[:, 9 + step] = 5
    found = dllm_compile.stats(model)
    assert found["checked"] == 3
    assert found["max_logit_error"] > 1e-3


def test_verify_finds_nothing_at_neutral_settings() -> None:
    model, ids = models.build("qwen3"), models.start(9, 8)
    call = models.compiled(model, verify=1, prompt_interval=1, response_interval=1)
    with torch.no_grad():
        for step in range(4):
            call(input_ids=ids)
            ids[:, 9 + step] = 5
    found = dllm_compile.stats(model)
    assert found["checked"] == 4
    assert found["max_logit_error"] < 1e-9
    assert found["token_flips"] == 0
    assert not found["first_divergence"]
