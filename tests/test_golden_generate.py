"""Traces of the authors' samplers, repeated by ``dllm_compile.generate`` call by call."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile.runtime.batch import Batch
from dllm_compile.runtime.session import Session
from dllm_compile.runtime.step import Step

from . import golden_models

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("generate_shares_graphs")]

LLADA, DREAM = golden_models.names("llada_fastdllm"), golden_models.names("dream_fastdllm")
VANILLA = golden_models.names("llada_vanilla") + golden_models.names("dream_vanilla")
DKV = ("enable_cache", "use_cache", "cache_type", "shift_type")
CACHES = {"generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}


def cache(trace: golden_models.Trace) -> str | None:
    """Fast-dLLM's cache that a trace was recorded with."""
    if trace.meta.get("function") == "block":
        return "dual" if trace.settings["dual_cache"] else "prefix"
    return CACHES.get(trace.meta.get("function", ""))


def arguments(trace: golden_models.Trace) -> dict[str, Any]:
    """What a trace was recorded with, under the authors' names."""
    unknown = ("dual_cache", "logits_eos_inf", "confidence_eos_eot_inf", *DKV)
    given = {name: value for name, value in trace.settings.items() if name not in unknown}
    if "_dyllm__" in trace.name:
        del given["algorithm"], given["ignore_eos"], given["temperature"], given["confidence_threshold"]
        given["saliency_threshold"] = given.pop("threshold")
        return {**given, "mask_id": trace.mask_id}
    if trace.name.startswith("dream"):
        given["shift"] = True
        if given["alg"] != "confidence_threshold":
            given.pop("threshold", None)
    return {**given, "mask_id": trace.mask_id, "as_published": "vanilla" not in trace.name}


def repeat(name: str, **options: Any) -> None:
    trace = golden_models.trace(name)
    model = golden_models.model(trace.meta["model"])
    prompt = trace.tensors["prompt"].long()
    result = dllm_compile.generate(model, prompt, output_history=True, **{**arguments(trace), **options})
    assert result.nfe == int(trace.tensors["nfe"])
    for step, (got, want) in enumerate(zip(result.history, trace.tensors["tokens"].long(), strict=True)):
        assert torch.equal(got, want), f"tokens before call {step}"
    assert torch.equal(result.sequences, result.history[-1])


@pytest.mark.parametrize("name", [n for n in VANILLA + LLADA + DREAM if cache(golden_models.trace(n)) is None])
def test_plain_generation_repeats_its_authors_code(name: str) -> None:
    repeat(name)


@pytest.mark.parametrize("name", golden_models.names("dream_sparse"))
def test_evicting_generation_repeats_its_authors_code(name: str) -> None:
    repeat(name, method="sparse-dllm", lowering="eager")


CACHED = [n for n in LLADA + DREAM if cache(golden_models.trace(n)) is not None]
FIXED = [n for n in LLADA if n in CACHED and golden_models.trace(n).settings.get("threshold") is None]


# of those that a plain loop replays too, in test_golden, a dual and a prefix cache
@pytest.mark.parametrize("name", [n for n in CACHED if n not in FIXED or n in FIXED[::3]])
def test_cached_generation_repeats_its_authors_code(name: str) -> None:
    repeat(name, method="fast-dllm", cache=cache(golden_models.trace(name)), lowering="eager")


def decoded_options(trace: golden_models.Trace) -> dict[str, Any]:
    """What dKV-Cache's functions are called here; the intervals have names that are known."""
    if trace.meta.get("function") == "greedy":
        return {"method": "dkv-cache", "cache": "greedy", "delay": 0}
    if trace.name.startswith("llada"):
        return {"method": "dkv-cache"}
    if trace.settings["cache_type"] == "decoded":
        return {"method": "dkv-cache", "delay": 0}
    return {"method": "dllm-cache", "prompt_interval": 10**6, "response_interval": 1, "cache_steps": None}


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[Step]:
    """Steps of all calls of compiled models."""
    seen: list[Step] = []
    begin = Session.begin

    def noted(*given: Any) -> tuple[Batch, Step] | None:
        found = begin(*given)
        if found is not None:
            seen.append(found[1])
        return found

    monkeypatch.setattr(Session, "begin", noted)
    return seen


GREEDY = [name for name in golden_models.names("llada_dkv") if "greedy" in name]
DECODED = [name for name in golden_models.names("llada_dkv") if name not in GREEDY]


# of those that a plain loop replays too, one fewer
@pytest.mark.parametrize("name", [*GREEDY, *DECODED[::2], *golden_models.names("dream_dkv")])
def test_dkv_generation_repeats_its_authors_code(name: str, steps: list[Step], monkeypatch: pytest.MonkeyPatch) -> None:
    trace = golden_models.trace(name)
    draws = iter(trace.tensors.get("random_draws", ()))
    monkeypatch.setattr(torch, "rand", lambda *_, **__: next(draws))
    repeat(name, **decoded_options(trace), lowering="eager")
    assert next(draws, None) is None
    for at, (step, want) in enumerate(zip(steps, trace.tensors["rows"].bool(), strict=True)):
        assert torch.equal(golden_models.computed(step, want.shape[0]), want), f"rows computed at call {at}"


# of those that a plain loop replays too, every second
@pytest.mark.parametrize("name", golden_models.names("llada_dyllm")[::2])
def test_dyllm_generation_repeats_its_authors_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    salient = golden_models.noted_salient(monkeypatch)
    repeat(name, method="dyllm", lowering="eager")
    for step in range(int(golden_models.trace(name).tensors["nfe"])):
        golden_models.check_salient(golden_models.trace(name), salient, step)


@pytest.mark.parametrize("name", [name for name in golden_models.names("dream_dyllm") if name.endswith("_whole")])
def test_dyllm_generation_on_dream_repeats_its_authors_code(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other trace takes the first token of the response from its own row, which no shifted model means."""
    salient = golden_models.noted_salient(monkeypatch)
    repeat(name, method="dyllm", shift=True, schedule="equal", remasking="entropy", lowering="eager")
    for step in range(int(golden_models.trace(name).tensors["nfe"])):
        golden_models.check_salient(golden_models.trace(name), salient, step)
