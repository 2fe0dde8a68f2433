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
from dllm_compile.runtime.program import Program

from . import models, shared, small_model
from .grids import in_turn
from .rounding import roundings
from .under_way import UnderWay, under_way

pytestmark = pytest.mark.shares_graphs

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


def built(name: str) -> torch.nn.Module:
    """A model of two layers: what is decided lies behind the last."""
    return small_model.build() if name == "small" else models.build(name, num_hidden_layers=2)


def session() -> UnderWay:
    return under_way()


def play(
    step: Step, name: str, options: dict[str, Any], count: int = 1, calls: int = 8
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.nn.Module]:
    """The ids after each call, compiled and by eager from the same ids; and the model, which the session lives with."""
    model, x = built(name), models.start(PROMPT, RESPONSE)
    run = shared.compiled(step, **{"mask_id": MASK, "lowering": "eager", **options})
    got, want = [], []
    with torch.no_grad():
        for _ in range(calls):
            candidates = blocks_of_four(x)
            want.append(step(model, x, candidates, count))
            x = run(model, x, candidates, count)
            got.append(x)
    return got, want, model


@pytest.mark.parametrize("options", [{"method": "exact"}, NEUTRAL], ids=["exact", "neutral"])
@pytest.mark.parametrize("rule", NARROW)
def test_a_step_equals_eager_and_keeps_nothing_as_wide_as_the_vocabulary(rule: str, options: dict[str, Any]) -> None:
    got, want, _model = play(NARROW[rule], "llama", {**options, "shift": rule in SHIFTED})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert session().kept
    assert all(VOCABULARY not in kept.shape for kept in session().kept.values())
    assert not dllm_compile.stats()["refused"]


@pytest.mark.parametrize(("name", "rule"), in_turn(["qwen2", "modernbert", "esm", "qwen3-moe"], ["llada", "dream"]))
def test_steps_of_other_models(name: str, rule: str) -> None:
    got, want, _model = play(NARROW[rule], name, {**NEUTRAL, "shift": rule in SHIFTED}, count=2, calls=4)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("cache", ["dual", "prefix"])
@pytest.mark.parametrize("rule", ["llada", "dream"])
def test_block_caches_decide_as_the_plain_loop_does_on_the_same_logits(rule: str, cache: str) -> None:
    """The fused step against the same cache behind a model compiled alone, with the arithmetic in eager."""
    options = {"method": "fast-dllm", "cache": cache, "block_length": 4, "shift": rule in SHIFTED}
    got, _, _model = play(NARROW[rule], "llama", options)
    assert session().stats.steps == {"full": 2, "block": 6}
    dllm_compile.reset()
    model, x = built("llama"), models.start(PROMPT, RESPONSE)
    alone = models.compiled_loop(model, **options)
    with torch.no_grad():
        for ids in got:
            x = NARROW[rule](alone, x, blocks_of_four(x), 1)
            assert torch.equal(x, ids)


@pytest.mark.parametrize("rule", ["llada", "dream"])
def test_compiled_by_inductor(rule: str) -> None:
    got, want, _model = play(NARROW[rule], "small", {**NEUTRAL, "lowering": "inductor", "shift": rule in SHIFTED})
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_the_same_ids_decided_on_again_run_no_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("llama"), models.start(PROMPT, RESPONSE)
    run = models.compiled(llada, **NEUTRAL)
    with torch.no_grad():
        x = run(model, x, blocks_of_four(x), 1)
        run(model, x, blocks_of_four(x), 1)
        others = x.eq(MASK) & ~blocks_of_four(x)
        monkeypatch.setattr("dllm_compile.runtime.graph_call.GraphCall._layer", None)
        got = run(model, x, others, 1)
    assert session().stats.steps == {"full": 2, "repeat": 1}
    assert torch.equal(got, llada(model, x, others, 1))
    assert not torch.equal(got, x)


def test_another_number_to_free_goes_on_with_the_same_sequence() -> None:
    def step(model: torch.nn.Module, x: torch.Tensor, candidates: torch.Tensor, count: int) -> torch.Tensor:
        return llada(model, x, candidates, count)  # what Dynamo remembers of other tests' numbers is not of this one

    model, x = small_model.build(), models.start(PROMPT, RESPONSE)
    options = {"mask_id": MASK, "lowering": "eager", "method": "fast-dllm", "cache": "dual", "block_length": 4}
    run = torch.compile(step, backend="dllm", options=options)
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

    model, x = small_model.build(), models.start(PROMPT, RESPONSE)
    run = torch.compile(both, backend="dllm", options={"mask_id": MASK, "lowering": "eager", **NEUTRAL})
    with torch.no_grad():
        for _ in range(5):
            masked = x == MASK
            want = both(model, x, blocks_of_four(x))
            x, logits = run(model, x, blocks_of_four(x))
            assert torch.equal(x, want[0])
            assert roundings(logits[masked], want[1][masked]) <= 8


@pytest.mark.parametrize("returned", [1, 2])
def test_what_is_returned_of_shifted_logits_is_shifted(returned: int) -> None:
    """Where nothing of the step mixes rows behind the shift."""

    def step(model: torch.nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits = model(x).logits
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
        sure, best = logits.softmax(-1).max(-1)
        return (best, sure)[:returned]

    model, x = small_model.build(), models.start(PROMPT, RESPONSE)
    run = torch.compile(step, backend="dllm", options={"mask_id": MASK, "lowering": "eager", **NEUTRAL})
    with torch.no_grad():
        for _ in range(3):
            masked, want = x == MASK, step(model, x)
            got = run(model, x)
            assert torch.equal(got[0][masked], want[0][masked])
            assert returned == 1 or roundings(got[1][masked], want[1][masked]) <= 8
            x = torch.where(masked & (masked.cumsum(1) == 1), want[0], x)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
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
    model, x = small_model.build(dtype, seed), models.start(PROMPT, RESPONSE, seed=seed)
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
        torch.compile(NARROW[rule], backend=collect)(small_model.build(layers=1), x, blocks_of_four(x), 1)
    (graph,) = graphs
    names = [getattr(node.target, "__name__", node.target) for node in graph.nodes]
    assert "confidence" in names
    assert "softmax" not in names[names.index("confidence") :]


def squares(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return (p * p).sum(-1)


def expected(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return (p * torch.arange(p.shape[-1])).sum(-1)


def cross_entropy(logits: torch.Tensor) -> torch.Tensor:
    p, q = logits.softmax(-1), (2 * logits).softmax(-1)
    return (q * torch.log(p + 1e-10)).sum(-1)


def another_epsilon(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    return (p * torch.log(p + 0.5)).sum(-1)


def negative_margin(logits: torch.Tensor) -> torch.Tensor:
    two = logits.softmax(-1).topk(2, dim=-1).values
    best, second = two[..., 0], two[..., 1]
    return second - best


def least_likely(logits: torch.Tensor) -> torch.Tensor:
    two = logits.softmax(-1).topk(2, dim=-1, largest=False).values
    return two[..., 0] - two[..., 1]


def over_rows(logits: torch.Tensor) -> torch.Tensor:
    return logits.softmax(1).amax(-1)


def of_another(logits: torch.Tensor) -> torch.Tensor:
    best = (-logits).argmax(-1)
    return F.softmax(input=logits, dim=-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)


def three_rows(logits: torch.Tensor) -> torch.Tensor:
    p = logits.softmax(-1)
    few = p.gather(-1, logits.argmax(-1)[:, :3].unsqueeze(-1)).squeeze(-1)
    return torch.cat(tensors=[few, p.amax(-1)[:, 3:]], dim=1)


LOOKALIKES = (
    *(squares, expected, cross_entropy, another_epsilon, negative_margin),
    *(least_likely, over_rows, of_another, three_rows),
)


@pytest.mark.parametrize("measure", LOOKALIKES)
def test_what_only_looks_like_a_known_measure_keeps_its_meaning(
    measure: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return measure(model(x).logits)

    model, x = small_model.build(layers=1), models.start(PROMPT, RESPONSE)
    run = torch.compile(step, backend="dllm", options={"mask_id": MASK, "lowering": "eager", "method": "exact"})
    with torch.no_grad():
        assert roundings(run(model, x), step(model, x)) <= 8


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_confidence_that_is_returned_keeps_its_dtype(dtype: torch.dtype) -> None:
    def step(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).logits.softmax(-1).amax(-1)

    model, x = small_model.build(dtype, layers=1), models.start(PROMPT, RESPONSE)
    run = torch.compile(step, backend="dllm", options={"mask_id": MASK, "lowering": "eager", "method": "exact"})
    with torch.no_grad():
        got, want = run(model, x), step(model, x)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=torch.finfo(dtype).eps, atol=0)  # float32 until it is rounded


def test_two_graphs_of_one_model_never_answer_for_each_other() -> None:
    """A plain call and one with hidden states, on the same ids, step by step."""
    model, x = small_model.build(), models.start(PROMPT, RESPONSE)

    def plain(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return model(x).logits

    def twice(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * model(x).logits

    options = {"mask_id": MASK, "lowering": "eager", **NEUTRAL}
    one, two = (
        torch.compile(plain, backend="dllm", options=options),
        torch.compile(twice, backend="dllm", options=options),
    )
    with torch.no_grad():
        for step in range(5):
            masked = x == MASK
            assert roundings(one(model, x)[masked], plain(model, x)[masked]) <= 8
            assert roundings(two(model, x)[masked], twice(model, x)[masked]) <= 8
            x[:, PROMPT + step] = 5


def test_a_graph_that_joins_in_the_middle_of_a_block_returns_no_zeros() -> None:
    model, x = small_model.build(), models.start(PROMPT, RESPONSE)

    def twice(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 2 * model(x).logits

    options = {"mask_id": MASK, "lowering": "eager", "method": "fast-dllm", "cache": "dual", "block_length": 4}
    one = torch.compile(model, backend="dllm", options=options)
    two = torch.compile(twice, backend="dllm", options=options)
    with torch.no_grad():
        one(x)
        x[:, PROMPT] = 5
        assert roundings(two(model, x), twice(model, x)) <= 8


def test_an_error_in_the_middle_of_a_step_leaves_nothing_half_written(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = built("llama"), models.start(PROMPT, RESPONSE)
    run = models.compiled_loop(model, **NEUTRAL)
    with torch.no_grad():
        run(x)
        x[:, PROMPT] = 5
        with monkeypatch.context() as broken:
            broken.setattr("dllm_compile.runtime.graph_call.GraphCall._head", lambda *_: 1 // 0)
            with pytest.raises(ZeroDivisionError):
                run(x)
        masked = x == MASK
        assert roundings(run(x).logits[masked], model(x).logits[masked]) <= 8


def test_verify_counts_the_tokens_of_whole_steps() -> None:
    got, want, _model = play(llada, "llama", {"method": "fast-dllm", "cache": "dual", "block_length": 4, "verify": 1})
    flips = sum(int((a != b).sum()) for a, b in zip(got, want, strict=True))
    seen = session().stats
    assert (seen.checked, seen.token_flips) == (8, flips)
