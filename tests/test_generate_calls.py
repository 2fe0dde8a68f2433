"""``dllm_compile.generate`` as it is called: streamers, results, transformers, mistakes, compilation."""

from __future__ import annotations

import gc
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import dllm_compile
from dllm_compile import Generated, denoise_step, generate
from dllm_compile.declared import reading
from dllm_compile.sampler.compiled import _COMPILED, compiled
from dllm_compile.sampler.family import Family, family
from dllm_compile.sampler.rules import chosen
from dllm_compile.sampler.settings import Settings
from dllm_compile.sampler.step import surest

from . import models
from .sampling_loops import END, MASK, Streamer, ids, run, seeded, start, toy


@pytest.mark.parametrize("more", [{}, {"block_length": 4, "threshold": 0.6}, {"eos_id": END}])
def test_a_streamer_gets_tokens_in_order(more: dict[str, Any]) -> None:
    streamer, prompt = Streamer(), ids(1, 5)
    got = generate(toy(seed=3, end=6.0), prompt, gen_length=16, mask_id=MASK, streamer=streamer, **more)
    assert isinstance(got, torch.Tensor)
    assert streamer.given[0] == prompt[0].tolist()
    assert [token for tokens in streamer.given for token in tokens] == got[0].tolist()
    assert all(streamer.given)
    assert len(streamer.given) > 2
    assert streamer.ended == 1


def test_results_are_read_by_attribute_and_by_key() -> None:
    got = generate(toy(), ids(2, 3), gen_length=4, mask_id=MASK, return_dict=True)
    assert isinstance(got, Generated)
    assert torch.equal(got["sequences"], got.sequences)
    assert got[0] is got.sequences
    assert dict(got).keys() == {"sequences", "nfe", "tokens_per_forward"}
    assert (got["nfe"], got["tokens_per_forward"]) == (4, 1.0)
    with pytest.raises(KeyError):
        got["history"]


@pytest.mark.parametrize(
    ("given_by_user", "said"),
    [
        ({"gen_lenght": 8}, "there is no argument 'gen_lenght'; did you mean 'gen_length'?"),
        ({"treshold": 0.9}, "did you mean 'threshold'?"),
        ({"prompt_intervall": 0.9}, "did you mean 'prompt_interval'?"),
        ({"schedule": "equals"}, "schedule is 'equals'; did you mean 'equal'? Valid: equal, time"),
        ({"schedule": "equal", "remasking": "origin"}, "remasking='origin' writes each token by chance"),
        ({"remasking": "low_confidenc"}, "remasking is 'low_confidenc'; did you mean 'low_confidence'? Valid: "),
        ({"alg": "entropi"}, "did you mean 'entropy'?"),
        ({"gen_length": 0}, "gen_length is 0; give a whole number of at least 1"),
        ({"steps": 2.0}, "steps is 2.0; give a whole number of at least 1"),
        ({"temperature": -1}, "temperature is -1; give a number of at least 0"),
        ({"temperature": None}, "temperature is None; give a number of at least 0"),
        ({"top_p": 0}, "top_p is 0; give a share above 0 and up to 1"),
        ({"threshold": "0.9"}, "threshold is '0.9'; give a confidence, such as 0.9"),
        ({"shift": 1}, "shift is 1; give True or False"),
        ({"mask_id": -5}, "mask_id is -5; give a token id"),
        ({"eos_id": "</s>"}, "eos_id is '</s>'; give a token id, or a tuple of them"),
        ({"gen_length": 10, "block_length": 4}, "gen_length 10 is no multiple of block_length 4; give 12"),
        ({"gen_length": 8, "block_length": 4, "steps": 5}, "steps 5 is no multiple of the number of blocks, 2; give 6"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold and factor are two rules for one thing; give one of them"),
        ({"threshold": 0.9, "alg": "origin"}, "remasking='origin' has no confidence to hold against a threshold"),
        ({"factor": 1.0, "alg_temp": 0.5}, "alg_temp draws a fixed number of positions, factor takes all"),
        ({"gen_length": 8, "options": {"gen_length": 8}}, "'gen_length' is given twice, once in options; give it once"),
        ({"method": "exact", "options": {"method": "exact"}}, "'method' is given twice, once in options"),
        ({"logits_processor": []}, "there is no argument 'logits_processor'"),
        ({"stop_strings": "."}, "stop_strings are '.', and there is no tokenizer"),
        ({"stopping_criteria": [len]}, "no token is known for what is behind; give eos_id"),
        ({"gen_length": 8, "max_new_tokens": 8}, "'gen_length' is given twice, once as 'max_new_tokens'; give it once"),
        ({"as_published": True, "temperature": 1.0}, "as_published repeats traces at temperature 0"),
        ({"method": "fast-dlm"}, "method is 'fast-dlm'; did you mean 'fast-dllm'?"),
        ({"streamer": Streamer()}, "a streamer follows one sequence, not 2"),
    ],
)
def test_mistakes_are_answered(given_by_user: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        generate(toy(), ids(2, 3), **{"mask_id": MASK, **given_by_user})
    assert said in str(caught.value)


def test_a_mask_that_cannot_be_told_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"nothing tells the mask token of a model of type 'llama'.*give mask_id"):
        generate(models.build("llama"), ids(1, 3))
    with pytest.raises(ValueError, match="nothing tells the mask token of a function"):
        generate(toy(), ids(1, 3))
    with pytest.raises(ValueError, match="give integer ids"):
        generate(toy(), torch.zeros(2, 3), mask_id=MASK)


@pytest.mark.parametrize(("kind", "mask", "shift"), [("llada", 126336, False), ("Dream", 151666, True)])
def test_known_kinds_of_models_need_no_facts(kind: str, mask: int, shift: bool) -> None:
    model = models.build("llama")
    model.config.model_type = kind
    assert family(model) == Family(mask, shift)
    model.config.mask_token_id = 3
    assert family(model) == Family(3, shift)
    assert family(model, 4, not shift) == Family(4, not shift)


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"remasking": "entropy", "shift": True},
        {"remasking": "random"},
        {"threshold": 0.3},
        {"factor": 1.0},
        {"temperature": 0.5},
    ],
)
def test_a_step_is_one_graph_and_stays_it(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, counter = models.build("llama"), CompileCounter()
    traced = torch.compile(surest, backend=counter, fullgraph=True)
    monkeypatch.setattr("dllm_compile.sampler.stepper.compiled", lambda *_: traced)
    more = {"gen_length": 8, "mask_id": models.MASK, **more}
    want = run(model, ids(1, 5), generator=seeded(), **more)
    got = run(model, ids(1, 5), generator=seeded(), lowering="eager", **more)
    assert torch.equal(got.sequences, want.sequences)
    assert counter.frame_count == 1


@pytest.mark.parametrize("method", ["exact", "dllm-cache"])
def test_guidance_compiles_the_model_alone(method: str) -> None:
    model = models.build("llama")
    more = {"gen_length": 8, "mask_id": models.MASK, "cfg_scale": 0.5}
    options = {"prompt_interval": 1, "response_interval": 1} if method == "dllm-cache" else {}
    want = run(model, ids(2, 5), **more)
    got = run(model, ids(2, 5), method=method, lowering="eager", **options, **more)
    assert torch.equal(got.sequences, want.sequences)
    seen = dllm_compile.stats(model)
    assert seen["steps"] == {"exact" if method == "exact" else "full": 8}
    assert not seen["refused"]


def test_a_step_leaves_its_input_alone() -> None:
    x = start(ids(2, 3), 5)
    before = x.clone()
    new = denoise_step(toy(), x, x == MASK, torch.tensor([1, 3]), 3, mask_id=MASK)
    assert torch.equal(x, before)
    assert (new == MASK).sum(1).tolist() == [4, 2]


def test_a_count_takes_the_surest_and_never_what_is_no_candidate() -> None:
    sure = torch.tensor([[0.9, 0.2, 0.7, 0.8], [0.1, 0.2, 0.3, 0.4]])
    candidates = torch.tensor([[True, True, True, False], [True, False, False, False]])
    taken = chosen(sure, candidates, torch.tensor([2, 2]), 2)
    assert taken.tolist() == [[True, False, True, False], [True, False, False, False]]
    none = torch.zeros_like(candidates)
    for rule in ({"threshold": 0.0}, {"factor": 9.0}):
        assert not chosen(sure, none, **rule).any()
    capped = chosen(sure, candidates, torch.tensor([2, 1]), 2, threshold=0.8)
    assert capped.tolist() == [[True, False, False, False], [True, False, False, False]]


@pytest.mark.parametrize("method", ["exact", "dllm-cache"])
@pytest.mark.parametrize(
    "more",
    [
        {"block_length": 4},
        {"threshold": 0.3, "block_length": 4},
        {"temperature": 0.6},
        {"temperature": 0.6, "top_p": 0.9, "shift": True},
        {"cfg_scale": 0.5},
    ],
)
def test_methods_with_nothing_to_reuse_change_nothing(method: str, more: dict[str, Any]) -> None:
    model, prompts = models.build("llama"), ids(2, 6)
    neutral = {"prompt_interval": 1, "response_interval": 1, "lowering": "eager", "mask_id": models.MASK}
    want = generate(model, prompts, gen_length=8, mask_id=models.MASK, generator=seeded(), **more)
    got = generate(model, prompts, gen_length=8, method=method, generator=seeded(), **neutral, **more)
    assert isinstance(want, torch.Tensor)
    assert torch.equal(got, want)


BLOCK = 4
READS: list[tuple[dict[str, Any], int]] = [
    ({"method": "fast-dllm", "cache": "prefix"}, BLOCK),
    ({"method": "fast-dllm", "cache": "dual", "shift": True}, BLOCK + 1),  # and the row before
    ({"method": "dllm-cache", "prompt_interval": 5, "response_interval": 3, "threshold": 0.3}, BLOCK),
    ({"method": "dyllm", "saliency_threshold": 0.9, "full_steps": 2, "factor": 1.0}, BLOCK),
    ({"method": "dkv-cache"}, BLOCK),
    ({"cache": "greedy", "remasking": "random"}, 2),  # those to be filled are known before the call; two at least
    ({"method": "dllm-cache", "frechet_delta": 0.5}, BLOCK),
    ({"method": "fast-dllm", "cache": "prefix", "temperature": 0.6, "top_p": 0.9}, BLOCK),  # drawn outside of the graph
]


@pytest.mark.parametrize(("more", "most"), READS, ids=str)
def test_the_head_runs_for_candidates_alone(more: dict[str, Any], most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"gen_length": 16, "block_length": BLOCK, "mask_id": models.MASK, "lowering": "eager", **more}
    model = models.build("llama")
    got = generate(model, ids(2, 6), generator=seeded(), **settings)
    fewer = dllm_compile.stats(model)
    torch.compiler.reset()
    monkeypatch.setattr(Settings, "reads_candidates", False)
    monkeypatch.setattr("dllm_compile.sampler.in_order.reading", lambda _: nullcontext())
    model = models.build("llama")
    want = generate(model, ids(2, 6), generator=seeded(), **settings)
    every = dllm_compile.stats(model)
    assert isinstance(got, torch.Tensor)
    assert torch.equal(got, want)  # type: ignore[arg-type]
    assert fewer["steps"] == every["steps"]
    calls = sum(fewer["steps"].values())
    first = 6 + 16 if "top_p" in more else 0  # whoever gets logits gets all of them once
    assert 0 < sum(fewer["logits"].values()) <= most * calls + first
    assert sum(fewer["logits"].values()) < sum(every["logits"].values())


@pytest.mark.parametrize(
    "more",
    [
        {"row_shares": (0.5,), "row_depths": (0.4,), "cache": "prefix"},
        {"length_cut": 0.5, "eos_id": END, "cache": "dual"},
    ],
    ids=str,
)
def test_the_head_runs_for_all_masks_where_they_are_looked_at(more: dict[str, Any]) -> None:
    settings = {"gen_length": 16, "block_length": BLOCK, "mask_id": models.MASK, "lowering": "eager", **more}
    model = models.build("llama")
    generate(model, ids(1, 6), **settings)
    assert dllm_compile.stats(model)["logits"]["full"] >= 16  # at the first call


def test_the_same_ids_are_computed_again_where_other_rows_are_read() -> None:
    model, x = models.build("llama"), models.start(6, 8)
    call, eager = models.compiled_loop(model, method="exact", shift=False), models.build("llama")
    first, second = (torch.zeros_like(x, dtype=torch.bool) for _ in range(2))
    first[:, 7:10] = second[:, 9:13] = True
    with torch.no_grad():
        call(x)
        x[:, 6] = 5
        want = eager(x).logits
        for rows in (first, second, first, None):
            with reading(rows):
                got = call(x).logits
            rows = x == models.MASK if rows is None else rows
            torch.testing.assert_close(got[rows], want[rows])
        steps = dllm_compile.stats(model)["steps"]
        with reading(first):
            call(x)
    assert steps == {"exact": 5}
    assert dllm_compile.stats(model)["steps"] == {"exact": 5, "repeat": 1}  # all that is read now was read before


def test_a_compiled_model_runs_as_it_is() -> None:
    model, prompts = models.build("llama"), ids(2, 6)
    want = generate(model, prompts, gen_length=8, mask_id=models.MASK)
    assert isinstance(want, torch.Tensor)
    got = generate(models.compiled_loop(model, method="exact"), prompts, gen_length=8, mask_id=models.MASK)
    assert torch.equal(got, want)


def test_what_is_compiled_is_kept_as_long_as_the_model() -> None:
    model = models.build("llama")
    options = {"method": "exact", "lowering": "eager"}
    first = compiled(denoise_step, model, options)
    assert compiled(denoise_step, model, dict(options)) is first
    assert compiled(denoise_step, model, {"method": "exact"}) is not first
    assert compiled(denoise_step, models.build("llama"), options) is not first
    generate(model, ids(1, 3), gen_length=2, mask_id=models.MASK, **options)
    gone = weakref.ref(model)
    del model
    torch._dynamo.reset()
    gc.collect()
    assert gone() is None
    assert not any(isinstance(key, torch.nn.Module) for key in _COMPILED)


def test_masks_in_a_prompt_are_refused_by_block_caches() -> None:
    prompt = ids(1, 6)
    prompt[:, 2] = models.MASK
    more = {"gen_length": 8, "block_length": 4, "mask_id": models.MASK, "lowering": "eager"}
    with pytest.raises(ValueError, match="the prompt holds the mask"):
        run(models.build("llama"), prompt, method="fast-dllm", cache="dual", **more)
