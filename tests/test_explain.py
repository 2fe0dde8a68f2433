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
from dllm_compile.mechanisms import METHODS
from dllm_compile.runtime import cost
from dllm_compile.runtime.memory import peak_bytes

from . import models, small_model
from .test_properties import Model, Shape
from .under_way import UnderWay, under_way

pytestmark = pytest.mark.shares_graphs

OPTIONS = {"prompt_interval": 3, "response_interval": 4, "transfer_ratio": 0.5}
PROMPT, RESPONSE = 21, 16
SKIPPING: dict[str, Any] = {"cache": "dual", "block_length": 8, "row_shares": (0.5, 0.4), "row_depths": (0.3, 0.6)}
SPARSE: dict[str, Any] = {"cache": "dual", "block_length": 4, "keep_ratio": 0.5}
COMBINED: tuple[dict[str, Any], ...] = (
    *({"method": name} for name in METHODS),
    {"prompt_interval": 3},
    {"prompt_interval": 4, "response_interval": 2, "keep_ratio": 0.5, "cache": "none"},
    {"prompt_interval": 4, "response_interval": 3, "keep_ratio": 0.25, "transfer_ratio": 0.0},
    {"cache": "dual", "block_length": 4, "prompt_interval": 4},
    {"cache": "prefix", "block_length": 4, "refresh_interval": 3, "shift": False},
    {"cache": "decoded", "shift": True, "keep_ratio": 0.5},
    SPARSE,
    {**SPARSE, "delay": 0, "prompt_interval": 3, "shift": False},
    {**SPARSE, "refresh_interval": 3},
    {**SPARSE, "refresh_interval": 2},
    {**SPARSE, "block_length": 1, "delay": 0, "keep_ratio": 1.0},
    {**SPARSE, "saliency_threshold": 0.9, "full_steps": 1},
    {"saliency_threshold": 0.9, "full_steps": 3},
    {"saliency_threshold": 0.9, "full_steps": 2, "response_only": False},
    {"saliency_threshold": 0.9, "full_steps": 1, "keep_ratio": 0.0},
    {"saliency_threshold": 0.9, "full_steps": 2, "prompt_interval": 4, "response_interval": 3},
    {"saliency_threshold": 0.9, "full_steps": 1, "cache": "prefix", "block_length": 4},
)


def session() -> UnderWay:
    """The one that has just been called."""
    return under_way()


def build(name: str) -> torch.nn.Module:
    """A model by name."""
    return small_model.build() if name == "small" else models.build(name)


def counted(name: str, options: dict[str, Any]) -> dict[str, tuple[int, dict[str, int]]]:
    """FLOPs of real steps by variant, with attention as plain matrix products, and the rows of each."""
    ids = models.start(PROMPT, RESPONSE)
    out: dict[str, tuple[int, dict[str, int]]] = {}

    def counting(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        backend = Backend(module, Options.of({**options, "lowering": "eager", "mask_id": models.MASK}))

        def run(*args: Any) -> Any:
            with FlopCounterMode(display=False) as counter:  # around the graph: outside, Dynamo would not compile
                result = backend(*args)
            (session,) = backend.sessions
            step = session.batches[-1].last
            assert step is not None
            if step.number:
                out[step.assignment.name] = counter.get_total_flops(), step.sizes
            return result

        return run

    call = torch.compile(build(name), backend=counting)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), dllm_compile.loop():
        for step in range(6):
            call(input_ids=ids)
            ids[:, PROMPT + step] = 7
    return out


@pytest.mark.parametrize(
    ("name", "options", "variants"),
    [
        ("small", OPTIONS, {"select", "response", "prompt+select"}),
        ("modernbert", OPTIONS, {"select", "response", "prompt+select"}),
        ("small", {"cache": "dual", "block_length": 4}, {"full", "block"}),
        ("qwen3", {"cache": "prefix", "block_length": 4, "prompt_interval": 5, "shift": False}, {"full", "block"}),
        ("esm", {"cache": "decoded"}, {"block"}),
        ("small", {"cache": "dual", "keep_ratio": 0.5, "block_length": 4}, {"full", "evict", "sparse"}),
        ("small", {**OPTIONS, "keep_ratio": 0.5}, {"select", "response", "evict"}),
        ("small", SKIPPING, {"block"}),
        ("qwen3", {**SKIPPING, "cache": "prefix", "row_shares": (0.3,), "row_depths": (0.6,)}, {"block"}),
    ],
    ids=lambda value: "+".join(sorted(value)) if isinstance(value, set) else str(value),
)
def test_closed_form_is_within_a_percent_of_counted_flops(
    name: str, options: dict[str, Any], variants: set[str]
) -> None:
    ids = models.start(PROMPT, RESPONSE)
    explained = dllm_compile.explain(build(name), ids, mask_id=models.MASK, **options)
    seen = counted(name, options)
    assert variants <= seen.keys() <= explained.flops.keys()
    symbols = {"R": "readable", "A": "active", "E": "kept", "F": "fresh", "A1": "going:0", "A2": "going:1"}
    for variant, (flops, sizes) in seen.items():
        lengths = {**explained.lengths, **{short: sizes[long] for short, long in symbols.items() if long in sizes}}
        values = {symbol: lengths[symbol.name] for symbol in explained.flops[variant].free_symbols}
        values[cost.R] = min(count for symbol, count in values.items() if symbol.name in ("R", "A1", "A2"))
        assert math.isclose(float(explained.flops[variant].subs(values)), flops, rel_tol=0.01), variant


def test_state_bytes_are_those_allocated() -> None:
    model, ids = models.build("qwen2"), models.start(9, 8)
    explained = dllm_compile.explain(model, ids, mask_id=models.MASK)
    values = {symbol: explained.lengths[symbol.name] for symbol in explained.state_bytes.free_symbols}
    call = models.compiled_loop(model)
    with torch.no_grad():
        logits = call(input_ids=ids).logits
    stats = dllm_compile.stats(model)
    assert stats["state_bytes"] == int(explained.state_bytes.subs(values))
    assert stats["logits_bytes"] == logits.nbytes  # kept, and handed out
    assert stats["peak_bytes"] > stats["state_bytes"]


def test_peak_bytes_are_bounds() -> None:
    """What a step holds at once beyond the weights, measured, is below what is explained."""
    model, x = small_model.build(), models.start(9, 8)
    found = dllm_compile.explain(model, x, mask_id=models.MASK, method="fast-dllm", cache="dual", block_length=4)
    call = models.compiled_loop(model, method="fast-dllm", cache="dual", block_length=4, lowering="eager")
    with torch.no_grad():
        call(input_ids=x)
        x[:, 9] = 3
        call(input_ids=x)  # the first step of the block's own code is behind it
        x[:, 10] = 3
        block = peak_bytes(lambda: call(input_ids=x))
    assert block > 0
    assert (
        block + dllm_compile.stats(model)["state_bytes"]
        <= found.peak_bytes["block"] + 3 * x.numel() * models.VOCABULARY * 8
    )
    assert found.peak_bytes["block"] < found.peak_bytes["full"]


@pytest.mark.parametrize("options", COMBINED[1::2], ids=str)
def test_any_combination_allocates_and_runs_what_is_explained(options: dict[str, Any]) -> None:
    model, ids = Model(Shape(layers=2, heads=2, groups=1, head_dim=4, seed=0)), models.start(7, 8)
    found = dllm_compile.explain(model, ids, mask_id=models.MASK, **options)
    values = {symbol: found.lengths[symbol.name] for symbol in found.state_bytes.free_symbols}
    wanted = int(found.state_bytes.subs(values))
    assert list(found.relative) == list(found.flops) == list(found.variants)
    assert all(share <= 1 for share in found.relative.values())
    call, kept = models.compiled_loop(model, **options), 0
    with torch.no_grad():
        for step in range(8):
            call(ids)
            current = session()
            assert current.step is not None
            assert current.step.assignment.name in found.variants
            kept = sum(t.numel() * t.element_size() for layer in current.layers.values() for t in layer)
            later = options == {"method": "flashblock"} and not step  # it keeps more from the first partial step on
            assert kept in (wanted, 0) or (later and 0 < kept < wanted), step
            ids[:, 7 + step] = 5
    assert kept == wanted


@pytest.mark.parametrize("options", COMBINED[::2], ids=str)
def test_lengths_are_those_of_the_steps_between_two_refreshes(options: dict[str, Any]) -> None:
    model, ids = Model(Shape(layers=1, heads=2, groups=1, head_dim=4, seed=0)), models.start(7, 8)
    found = dllm_compile.explain(model, ids, mask_id=models.MASK, **options).lengths
    call, sizes = models.compiled_loop(model, **options), []
    with torch.no_grad():
        for _ in range(13):
            call(ids)
            step = session().step
            assert step is not None
            sizes.append(step.sizes)
    assert (found["B"], found["S"], found["P"], found["G"]) == (2, 15, 7, 8)
    assert found["A"] == min(each.get("active", 15) for each in sizes)
    assert found["E"] == max(each["kept"] for each in sizes)
    assert found["F"] == max(each.get("fresh", 0) for each in sizes)
    assert found["n"] == int(8 * options.get("transfer_ratio", 0.25))


def test_explain_reads_as_text_and_names_the_roles() -> None:
    text = str(dllm_compile.explain(models.build("llama"), models.start(9, 8), mask_id=models.MASK))
    words = ("first layer is always full", "layers: 3 of 1 kind")
    for word in (*words, "keys kept at", "branch without attention", "select", "FLOPs response ="):
        assert word in text


def test_explain_says_what_chooses_tokens_for_readable_rows_alone() -> None:
    x = models.start(9, 8)
    loop = dllm_compile.explain(models.build("llama"), x, mask_id=models.MASK)
    assert f"each softmax or argmax of it is over {models.VOCABULARY} tokens a row; generate, or" in str(loop)
    base = dllm_compile.explain(models.build("llama").model, x, mask_id=models.MASK)  # hidden states, no logits
    assert "softmax" not in str(base)


def test_explain_says_how_many_rows_deeper_layers_compute() -> None:
    ids = models.start(PROMPT, RESPONSE)
    found = dllm_compile.explain(build("small"), ids, mask_id=models.MASK, **SKIPPING)
    active = found.lengths["A"]
    assert [found.lengths[name] for name in ("A1", "A2")] == [active // 2, int(0.4 * active)]
    rows = f"in partial steps, layer 1 and those behind it compute A1 = {active // 2} of the A = {active} rows"
    assert rows in found.more
    dual = {name: value for name, value in SKIPPING.items() if not name.startswith("row_")}
    every = dllm_compile.explain(build("small"), ids, mask_id=models.MASK, **dual)
    assert found.flops["full"] == every.flops["full"]
    assert found.relative["block"] < every.relative["block"]


def test_explain_says_why_a_causal_model_is_left_alone() -> None:
    model = models.build("llama", is_causal=True)
    explained = dllm_compile.explain(model, models.start(9, 8), mask_id=models.MASK)
    assert not explained.variants
    assert any("causal" in reason for reason in explained.refused)
    assert "runs on plain Inductor" in str(explained)


def test_verify_reports_the_drift() -> None:
    model, ids = small_model.build(), models.start(9, 8)
    drifting = models.compiled_loop(model, verify=2, prompt_interval=50, response_interval=7, transfer_ratio=0.25)
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
    model, ids = small_model.build(), models.start(9, 8)
    call = models.compiled_loop(model, verify=1, prompt_interval=1, response_interval=1)
    with torch.no_grad():
        for step in range(4):
            call(input_ids=ids)
            ids[:, 9 + step] = 5
    found = dllm_compile.stats(model)
    assert found["checked"] == 4
    assert found["max_logit_error"] < 1e-9
    assert found["token_flips"] == 0
    assert not found["first_divergence"]
