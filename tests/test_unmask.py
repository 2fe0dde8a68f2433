"""Whole denoising steps behind the backend: the model, the arithmetic of the sampler and the choice in one graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile.options import Options
from dllm_compile.program import Program
from dllm_compile.session import Session, sessions

from . import models

PROMPT, RESPONSE = 9, 8
MASK, VOCABULARY = models.MASK, models.VOCABULARY
NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}
Step = Callable[..., Any]


def blocks_of_four(x: torch.Tensor) -> torch.Tensor:
    """Masks of the first block of each sequence that has any."""
    block = (torch.arange(x.shape[1]) - PROMPT).div(4, rounding_mode="floor")
    masked = x == MASK
    first = torch.where(masked, block, 99).amin(1, keepdim=True)
    return masked & (block == first)


def chosen(sure: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    sure = torch.where(candidates, sure, -torch.inf)
    return torch.zeros_like(candidates).scatter(1, sure.topk(count, 1).indices, True) & candidates


def llada(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """As LLaDA's loop writes it: the mask is read before the model runs, probabilities are float64."""
    masked = x == MASK
    logits = model(x).logits
    x0 = torch.argmax(logits, dim=-1)
    p = F.softmax(logits.to(torch.float64), dim=-1)
    x0_p = torch.squeeze(torch.gather(p, dim=-1, index=torch.unsqueeze(x0, -1)), -1)
    x0 = torch.where(masked, x0, x)
    return torch.where(chosen(x0_p, candidates & masked, count), x0, x)


def dream(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """As Dream's loop writes it: shifted logits, entropy."""
    logits = model(x).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    probs = torch.softmax(logits, dim=-1)
    sure, x0 = probs.max(dim=-1)
    entropy = torch.sum(probs * torch.log(probs + 1e-10), dim=-1)
    return torch.where(chosen(entropy + 0 * sure, candidates, count), x0, x)


def margin(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    logits = model(x).logits
    logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    probs = logits.softmax(-1)
    two = probs.topk(2, dim=-1).values
    return torch.where(chosen(two[..., 0] - two[..., 1], candidates, count), probs.argmax(-1), x)


def above(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """A threshold alone: every operation behind the model is row by row, but ids come in."""
    logits = model(x).logits
    sure, x0 = logits.softmax(-1).max(-1)
    return torch.where(candidates & (sure > 0.2 / count), x0, x)


def own_rule(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
    """A measure that nobody knows: it stays as written, on the rows that can be read."""
    logits = model(x).logits
    sure = logits.sigmoid().amax(-1) - logits.logsumexp(-1).tanh()
    return torch.where(chosen(sure, candidates, count), logits.argmax(-1), x)


NARROW: dict[str, Step] = {"llada": llada, "dream": dream, "margin": margin, "above": above, "own": own_rule}
SHIFTED = ("dream", "margin")


def session() -> Session:
    return next(s for s in sessions() if s.number >= 0)


def play(
    step: Step, name: str, options: dict[str, Any], count: int = 1, calls: int = 8
) -> tuple[list[torch.Tensor], list[torch.Tensor], Step]:
    """The ids after each call: compiled, and by eager from the same ids."""
    model, x = models.build(name), models.start(PROMPT, RESPONSE)
    run = torch.compile(step, backend="dllm", options={"mask_id": MASK, "lowering": "eager", **options})
    got, want = [], []
    with torch.no_grad():
        for _ in range(calls):
            candidates = blocks_of_four(x)
            want.append(step(model, x, candidates, count))
            x = run(model, x, candidates, count)
            got.append(x)
    return got, want, run


@pytest.mark.parametrize("options", [{"method": "exact"}, NEUTRAL], ids=["exact", "neutral"])
@pytest.mark.parametrize("rule", NARROW)
def test_a_step_equals_eager_and_keeps_nothing_as_wide_as_the_vocabulary(rule: str, options: dict[str, Any]) -> None:
    got, want, _ = play(NARROW[rule], "llama", {**options, "shift": rule in SHIFTED})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert session().kept
    assert all(VOCABULARY not in kept.shape for kept in session().kept.values())
    assert not dllm_compile.stats()["refused"]


@pytest.mark.parametrize("name", ["qwen2", "modernbert", "esm", "qwen3-moe"])
@pytest.mark.parametrize("rule", ["llada", "dream"])
def test_steps_of_other_models(rule: str, name: str) -> None:
    got, want, _ = play(NARROW[rule], name, {**NEUTRAL, "shift": rule in SHIFTED}, count=2, calls=4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("rule", ["llada", "dream"])
def test_block_caches_decide_as_the_plain_loop_does_on_the_same_logits(rule: str, cache: str) -> None:
    """The fused step against the same cache behind a model compiled alone, with the arithmetic in eager."""
    options = {"method": "fast-dllm", "cache": cache, "block_length": 4, "shift": rule in SHIFTED}
    got, _, _ = play(NARROW[rule], "qwen2", options)
    assert session().stats.steps == {"full": 2, "block": 6}
    torch._dynamo.reset()
    model, x = models.build("qwen2"), models.start(PROMPT, RESPONSE)
    alone = models.compiled(model, **options)
    with torch.no_grad():
        for ids in got:
            x = NARROW[rule](alone, x, blocks_of_four(x), 1)
            assert torch.equal(x, ids)


@pytest.mark.parametrize("rule", ["llada", "dream"])
def test_compiled_by_inductor(rule: str) -> None:
    got, want, _ = play(NARROW[rule], "llama", {**NEUTRAL, "lowering": "inductor", "shift": rule in SHIFTED})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_same_ids_decided_on_again_run_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = models.build("llama"), models.start(PROMPT, RESPONSE)
    run = torch.compile(llada, backend="dllm", options={"mask_id": MASK, "lowering": "eager", **NEUTRAL})
    with torch.no_grad():
        x = run(model, x, blocks_of_four(x), 1)
        run(model, x, blocks_of_four(x), 1)
        others = x.eq(MASK) & ~blocks_of_four(x)
        monkeypatch.setattr("dllm_compile.run._Call._layer", None)
        got = run(model, x, others, 1)
    assert session().stats.steps == {"full": 2, "repeat": 1}
    assert torch.equal(got, llada(model, x, others, 1))
    assert not torch.equal(got, x)


def test_another_number_to_free_goes_on_with_the_same_sequence() -> None:
    model, x = models.build("llama"), models.start(PROMPT, RESPONSE)
    options = {"mask_id": MASK, "lowering": "eager", "method": "fast-dllm", "cache": "dual", "block_length": 4}
    run = torch.compile(llada, backend="dllm", options=options)
    with torch.no_grad():
        for count in (1, 2, 1, 2, 2):
            x = run(model, x, blocks_of_four(x), count)
    assert session().stats.sequences == 1
    assert session().stats.steps == {"full": 2, "block": 3}


def test_a_step_that_also_returns_its_logits_is_right() -> None:
    def both(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = model(x).logits
        sure, best = logits.softmax(-1).max(-1)
        return torch.where(chosen(sure, candidates, 1), best, x), logits

    model, x = models.build("llama"), models.start(PROMPT, RESPONSE)
    run = torch.compile(both, backend="dllm", options={"mask_id": MASK, "lowering": "eager", **NEUTRAL})
    with torch.no_grad():
        for _ in range(5):
            masked = x == MASK
            want = both(model, x, blocks_of_four(x))
            x, logits = run(model, x, blocks_of_four(x))
            assert torch.equal(x, want[0])
            torch.testing.assert_close(logits[masked], want[1][masked], rtol=1e-12, atol=1e-12)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.sampled_from(["low_confidence", "entropy", "topk_margin"]),
    st.booleans(),
    st.sampled_from([None, 0.05, 0.5]),
    st.lists(st.integers(0, 3), min_size=2, max_size=2),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_denoise_step_means_the_same_compiled(
    remasking: str, shift: bool, threshold: float | None, count: list[int], dtype: torch.dtype, seed: int
) -> None:
    torch._dynamo.reset()
    model, x = models.build("qwen2", dtype, seed), models.start(PROMPT, RESPONSE, seed=seed)
    how: dict[str, Any] = {"mask_id": MASK, "shift": shift, "remasking": remasking, "threshold": threshold}
    options = {"mask_id": MASK, "lowering": "eager", "shift": shift, **NEUTRAL}
    run = torch.compile(dllm_compile.denoise_step, backend="dllm", options=options)
    with torch.no_grad():
        for _ in range(4):
            inputs = (x, blocks_of_four(x), torch.tensor(count), max(count))
            want = dllm_compile.denoise_step(model, *inputs, **how)
            x = run(model, *inputs, **how)
            assert torch.equal(x, want)


@pytest.mark.parametrize("rule", ["llada", "dream", "margin", "above"])
def test_no_probability_of_a_word_is_left(rule: str) -> None:
    graphs = []

    def collect(module: torch.fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            graphs.append(Program(module, args, Options(mask_id=MASK, lowering="eager")).graph)
            return module(*args)

        return run

    x = models.start(PROMPT, RESPONSE)
    with torch.no_grad():
        torch.compile(NARROW[rule], backend=collect)(models.build("llama"), x, blocks_of_four(x), 1)
    (graph,) = graphs
    names = [getattr(node.target, "__name__", node.target) for node in graph.nodes]
    assert "confidence" in names
    assert "softmax" not in names[names.index("confidence") :]
