"""Likelihood is never served from a cache, and no denoising loop loses its own.

Sources of the protocols: LLaDA (arXiv 2502.09992), ``get_log_likelihood`` and ``eval_llada``'s forward process.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm_compile

from . import loops, models, shared
from .callers import (
    EQUAL,
    METHODS,
    PARTIAL,
    PROMPT,
    RESPONSE,
    TOLERANCE,
    Whole,
    build,
    fill,
    off,
    partial,
    start,
    steps,
)
from .grids import in_turn
from .models import MASK

SAMPLES = 128
Call = Callable[[torch.Tensor], torch.Tensor]
Samples = list[torch.Tensor]

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]


def compiled(model: Whole, *, dynamic: bool = True, **options: Any) -> Call:
    """The model behind the backend: one graph for texts of all lengths, or one for each."""
    return shared.compiled(model, dynamic=dynamic, lowering="eager", mask_id=MASK, **options)


# -- samples ----------------------------------------------------------------------------------------------------------


def answer(model: Whole, target: int, seed: int = 1) -> torch.Tensor:
    """A prompt and an answer of random tokens, ``[1, PROMPT + target]``, none of them the model's own when asked."""
    x = start(1, seed, response=target)
    best = model(x).argmax(-1)
    other = torch.randint(3, MASK, x.shape, generator=torch.Generator().manual_seed(seed))
    other = torch.where(other == best, (other + 1) % (MASK - 3) + 3, other)
    return torch.where(x == MASK, other, x)


def own(model: Whole, target: int, seed: int = 1) -> torch.Tensor:
    """A prompt and the answer that the model gives from left to right."""
    x = start(1, seed, response=target)
    for _ in range(target):
        x = fill(model(x), x)
    return x


def uniform(x: torch.Tensor, count: int, batch: int = 1, seed: int = 0) -> Samples:
    """Copies with a uniform number of masks in the answer, each of a sequence of its own."""
    draw = torch.Generator().manual_seed(seed)
    target, out = x.shape[1] - PROMPT, []
    for _ in range(count // batch):
        y = x.repeat(batch, 1)
        for row in y:
            masks = int(torch.randint(1, target + 1, (), generator=draw))
            row[PROMPT + torch.randperm(target, generator=draw)[:masks]] = MASK
        out.append(y)
    return out


def stratified(x: torch.Tensor, count: int, batch: int = 1, seed: int = 0) -> Samples:
    """The official forward process: counts spread evenly over the batch behind a uniform first one."""
    draw = torch.Generator().manual_seed(seed)
    target, out = x.shape[1] - PROMPT, []
    for _ in range(count // batch):
        first = int(torch.randint(1, target + 1, (), generator=draw))
        counts = torch.linspace(float(first), first + (batch - 1) * (target / batch), steps=batch).round().long()
        counts = (counts - 1) % target + 1
        y = x.repeat(batch, 1)
        for row, masks in zip(y, counts.tolist(), strict=True):
            row[PROMPT + torch.randperm(target, generator=draw)[:masks]] = MASK
        out.append(y)
    return out


def forced(x: torch.Tensor) -> Samples:
    """Teacher forcing from left to right: the answer so far, and masks for what is to come."""
    out = []
    for place in range(PROMPT, x.shape[1]):
        y = x.clone()
        y[:, place:] = MASK
        out.append(y)
    return out


def one_at_a_time(x: torch.Tensor) -> Samples:
    """Pseudo-likelihood: every token of the answer masked alone."""
    out = []
    for place in range(PROMPT, x.shape[1]):
        y = x.clone()
        y[:, place] = MASK
        out.append(y)
    return out


def wrong(call: Call, model: Whole, samples: Samples) -> int:
    """Of these samples, those whose masked rows are not eager's."""
    batch = samples[0].shape[0]
    want = model(torch.cat(samples)).split(batch)
    return sum(off(call(x), w, x == MASK) > TOLERANCE for x, w in zip(samples, want, strict=True))


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("dllm-cache", (1, 3, 64)), ("dual", (2, 5, 16)), *((name, (8,)) for name in ("prefix", "sparse", "dyllm"))],
)
def test_monte_carlo_samples_one_at_a_time(name: str, lengths: tuple[int, ...]) -> None:
    model = build()
    call = compiled(model, **METHODS[name])
    got = {target: wrong(call, model, uniform(answer(model, target), SAMPLES)) for target in lengths}
    assert not any(got.values()), got


def test_monte_carlo_samples_of_dkv_cache() -> None:
    test_monte_carlo_samples_one_at_a_time("dkv-cache", (2, 4, 8))


@pytest.mark.parametrize("name", METHODS)
def test_monte_carlo_samples_in_batches(name: str) -> None:
    model = build()
    call = compiled(model, **METHODS[name])
    got = {}
    for protocol in (uniform, stratified):
        for target in (1, 16):
            samples = protocol(answer(model, target), SAMPLES // 2, batch=4)
            got[protocol.__name__, target] = wrong(call, model, samples)
    assert not any(got.values()), got


@pytest.mark.parametrize("target", [3, 24, 57])
def test_more_lengths(target: int) -> None:
    model = build()
    for name in ("dllm-cache", "dual"):
        call = compiled(model, **METHODS[name])
        assert wrong(call, model, stratified(answer(model, target), 64, seed=target)) == 0


def test_layers_alone() -> None:
    model = build("alone")
    call = compiled(model, **METHODS["dual"])
    for target in (4, 16):  # the mask is seen only where it ends a sequence twice; one seen is one known
        assert wrong(call, model, uniform(answer(model, target), 96)) == 0


@pytest.mark.parametrize("seed", range(2))
def test_answers_to_one_question_one_behind_the_other(seed: int) -> None:
    """Four answers of one length to one prompt, as multiple choice asks."""
    model = build()
    call = compiled(model, **METHODS["dllm-cache"])
    prompt = start(1, seed, response=4)
    for choice in range(4):
        x = torch.where(prompt == MASK, answer(model, 4, seed=10 + choice), prompt)
        assert wrong(call, model, uniform(x, 64, seed=seed)) == 0


@pytest.mark.parametrize("name", METHODS)
def test_one_token_a_call_masked_alone(name: str) -> None:
    model = build()
    call = compiled(model, **METHODS[name])
    got = {target: wrong(call, model, one_at_a_time(answer(model, target))) for target in (4, 16)}
    assert not any(got.values()), got


@pytest.mark.parametrize("name", METHODS)
def test_teacher_forcing(name: str) -> None:
    model = build()
    call = compiled(model, **METHODS[name])
    got = {target: wrong(call, model, forced(answer(model, target))) for target in (4, 16)}
    assert not any(got.values()), got


# -- the words --------------------------------------------------------------------------------------------------------


CASES = [*((name, "whole") for name in METHODS), ("dual", "alone")]


@pytest.mark.parametrize(("name", "form"), CASES)
def test_exact_calls_serve_nothing_whatever_the_answer(name: str, form: str) -> None:
    model = build(form)
    call = compiled(model, **METHODS[name])
    with dllm_compile.exact_calls():
        for x in (own(model, 6), answer(model, 6)):
            assert wrong(call, model, uniform(x, 64)) == 0
            assert wrong(call, model, uniform(x, 64, batch=4)) == 0
            assert wrong(call, model, forced(x)) == 0
            assert wrong(call, model, one_at_a_time(x)) == 0
    assert partial(model) == 0


@pytest.mark.parametrize("name", ["exact", "dual", "dllm-cache"])
def test_an_answer_that_ends_like_masks_where_the_mask_is_not_given(name: str) -> None:
    """Its last token is taken for the mask, where masks are not at the end, until it is seen to be filled."""
    warnings.filterwarnings("ignore", "dllm: this loop puts masks back")
    model = build()
    call = shared.compiled(model, lowering="eager", **{**EQUAL, **METHODS}[name])
    x = answer(model, 6)
    x[:, -2:] = x[:, -1:]
    samples = []
    for masks in ([0], [0, 5], [0, 4, 5], [0, 3, 4, 5]):
        samples.append(x.clone())
        samples[-1][:, [PROMPT + place for place in masks]] = MASK
    assert wrong(call, model, samples) == 0


@pytest.mark.parametrize("name", ["exact", "dual", "dllm-cache"])
def test_an_answer_of_one_token_behind_a_step_of_a_loop_where_the_mask_is_not_given(name: str) -> None:
    """Masks that are put back over that token are not the tokens that a mask is filled with."""
    warnings.filterwarnings("ignore", "dllm: this loop puts masks back")
    model = build()
    call = shared.compiled(model, lowering="eager", **{**EQUAL, **METHODS}[name])
    x = start(response=6)
    for _ in range(2):
        x = fill(call(x).clone(), x)
    samples = []
    for masks in ([4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4, 5]):
        samples.append(start(seed=2, response=6))
        samples[-1][:, PROMPT:] = 9
        samples[-1][:, [PROMPT + place for place in masks]] = MASK
    assert wrong(call, model, samples) == 0


@pytest.mark.parametrize(("name", "form"), CASES)
def test_exact_calls_leave_a_live_generation_alone(name: str, form: str) -> None:
    options = METHODS[name]
    x, wanted = start(), []
    call = compiled(build(form), **options)
    for _ in range(RESPONSE):
        wanted.append(call(x).clone())
        x = fill(wanted[-1], x)
    model = build(form)
    call = compiled(model, **options)
    scored = [answer(model, 5, seed=3), own(model, RESPONSE, seed=1)]
    x = start()
    for turn, want in enumerate(wanted):
        got = call(x).clone()
        assert off(got, want, x == MASK) < TOLERANCE
        before = steps(model)
        with dllm_compile.exact_calls():
            assert off(call(x), model(x), x == MASK) < TOLERANCE  # the ids of the generation itself, too
            for y in scored:
                assert wrong(call, model, uniform(y, 3, seed=turn)) == 0
        assert count(steps(model) - before) == 0
        x = fill(want, x)


def count(counted: Counter[str]) -> int:
    return sum(number for name, number in counted.items() if name in PARTIAL)


def test_exact_calls_inside_a_loop_and_a_loop_inside_exact_calls() -> None:
    model = build()
    call = compiled(model, **METHODS["dual"])
    x = start()
    with dllm_compile.loop():
        x = fill(call(x), x)
        with dllm_compile.exact_calls():
            assert wrong(call, model, uniform(own(model, 6), 32)) == 0
        before = partial(model)
        x = fill(call(x), x)
        assert partial(model) == before + 1
    with dllm_compile.exact_calls():
        before = partial(model)
        assert wrong(call, model, uniform(own(model, 6), 32)) == 0
        assert partial(model) == before


# -- loops that keep their cache --------------------------------------------------------------------------------------

Loop = Callable[[Call], Any]
LONG = 32


def low_confidence(call: Call) -> None:
    for _ in loops.llada(call, start(response=LONG), PROMPT, steps=LONG, block_length=4, mask_id=MASK):
        pass


def two_a_step(call: Call) -> None:
    for _ in loops.llada(call, start(response=LONG), PROMPT, steps=LONG // 2, block_length=LONG // 2, mask_id=MASK):
        pass


def one_block(call: Call) -> None:
    for _ in loops.llada(call, start(response=LONG), PROMPT, steps=LONG, block_length=LONG, mask_id=MASK):
        pass


def in_blocks(call: Call, draw: torch.Generator, temperature: float, remasking: str) -> None:
    """LLaDA's loop with Gumbel noise, ``[2, PROMPT + LONG]``, in blocks of 4."""
    x = start(response=LONG)
    for end in range(PROMPT + 4, x.shape[1] + 1, 4):
        while (x[:, :end] == MASK).any():
            logits = call(x)
            noise = -torch.log(torch.rand(logits.shape, generator=draw, dtype=torch.float64))
            best = (logits.exp() / noise**temperature).argmax(-1)
            sure = logits.softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
            if remasking == "random":
                sure = torch.rand(x.shape, generator=draw, dtype=torch.float64)
            candidates = x == MASK
            candidates[:, end:] = False
            x = x.clone()
            loops.free(x, candidates, sure, best, 1)


def random_order(call: Call) -> None:
    in_blocks(call, torch.Generator().manual_seed(1), 0.0, "random")


def temperature(call: Call) -> None:
    in_blocks(call, torch.Generator().manual_seed(2), 1.0, "low_confidence")


def temperature_and_random_order(call: Call) -> None:
    in_blocks(call, torch.Generator().manual_seed(3), 1.0, "random")


def left_to_right(call: Call) -> None:
    x = start(response=LONG)
    while (x == MASK).any():
        x = fill(call(x), x)


def edits(call: Call) -> None:
    """A hook replaces a token of what is decoded at every fourth step."""
    x, draw = start(response=LONG), torch.Generator().manual_seed(4)
    for turn in range(LONG):
        x = fill(call(x), x)
        if turn % 4 == 3:
            x[0, PROMPT + turn - 2] = int(torch.randint(3, MASK, (), generator=draw))


def remasks(call: Call) -> None:
    """A decoded token is masked again at every fourth step."""
    x, draw = start(response=LONG), torch.Generator().manual_seed(5)
    turn = 0
    while (x == MASK).any() and turn < 2 * LONG:
        x = fill(call(x), x)
        turn += 1
        if turn % 4 == 0:
            done = (x[0, PROMPT:] != MASK).nonzero()[:, 0]
            x[0, PROMPT + int(done[torch.randint(len(done), (), generator=draw)])] = MASK


def many_at_once(call: Call) -> None:
    """A threshold frees a number of tokens that differs by step."""
    x, turn = start(response=LONG), 0
    while (x == MASK).any():
        x = fill(call(x), x, 1 + turn % 3)
        turn += 1


def twice(call: Call) -> None:
    """The same prompt is answered again once the first answer is done."""
    left_to_right(call)
    left_to_right(call)


def one_prompt_behind_the_other(call: Call) -> None:
    for seed in range(4):
        x = start(seed=seed)
        while (x == MASK).any():
            x = fill(call(x), x)


LOOPS: dict[str, Loop] = {
    each.__name__: each
    for each in (low_confidence, two_a_step, one_block, random_order, temperature, temperature_and_random_order)
} | {each.__name__: each for each in (left_to_right, edits, remasks, many_at_once, twice, one_prompt_behind_the_other)}


def share(loop: Loop, options: dict[str, Any], word: bool) -> float:
    """The share of partial steps of a loop on a fresh compiled model."""
    model = build()
    call = compiled(model, dynamic=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some loops remask, or fill outside of the block
        if word:
            with dllm_compile.loop():
                loop(call)
        else:
            loop(call)
    return partial(model) / sum(steps(model).values())


@pytest.mark.parametrize(("loop", "name"), in_turn(LOOPS, ["dllm-cache", "dual"]))
def test_a_denoising_loop_keeps_its_cache(name: str, loop: str) -> None:
    told = share(LOOPS[loop], METHODS[name], word=True)
    assert told > 0.3
    assert share(LOOPS[loop], METHODS[name], word=False) >= 0.6 * told


@pytest.mark.parametrize("name", ["prefix", "sparse", "dyllm", "dkv-cache"])
def test_the_loop_of_llada_keeps_its_cache_under_every_method(name: str) -> None:
    test_a_denoising_loop_keeps_its_cache(name, "low_confidence")


def test_the_loop_of_dream_keeps_its_cache() -> None:
    def dream(call: Call) -> None:
        for _ in loops.dream(call, start(response=LONG), steps=LONG, alg="entropy", mask_id=MASK):
            pass

    for name in ("dllm-cache", "dyllm"):
        told = share(dream, {**METHODS[name], "shift": True}, word=True)
        assert share(dream, {**METHODS[name], "shift": True}, word=False) >= 0.6 * told > 0.15


def infilling() -> torch.Tensor:
    """Masks in the middle of a prompt, and none at its end."""
    x = start(response=16)
    x[:, -4:] = torch.arange(5, 9)
    x[:, PROMPT + 5] = 11
    return x


@pytest.mark.parametrize("name", METHODS)
def test_infilling_keeps_its_cache_in_a_loop_and_is_exact_without_the_word(name: str) -> None:
    model = build()
    call = compiled(model, **METHODS[name])
    x = infilling()
    warnings.filterwarnings("ignore", "dllm: these calls look like a denoising loop")
    while (x == MASK).any():
        logits = call(x).clone()
        assert off(logits, model(x), x == MASK) < TOLERANCE
        x = fill(logits, x)
    model = build()
    call = compiled(model, **METHODS[name])
    x, calls = infilling(), 0
    with dllm_compile.loop():
        while (x == MASK).any():
            x, calls = fill(call(x), x), calls + 1
    assert partial(model) >= 0.4 * calls  # sparse-dllm has two full steps a block


@pytest.mark.parametrize("name", ["dllm-cache", "dual"])
def test_a_compiled_step_keeps_its_cache(name: str) -> None:
    model = build()
    step = torch.compile(
        dllm_compile.denoise_step, backend="dllm", options={"lowering": "eager", "mask_id": MASK, **METHODS[name]}
    )
    x, draw = start(response=LONG), torch.Generator().manual_seed(0)
    count, calls = torch.ones(len(x), dtype=torch.int64), 0
    for end in range(PROMPT + 4, x.shape[1] + 1, 4):
        while (x[:, :end] == MASK).any():
            candidates = (x == MASK) & (torch.arange(x.shape[1]) < end)
            noise = torch.rand(*x.shape, models.VOCABULARY, generator=draw, dtype=torch.float64)
            x = step(model, x, candidates, count, 1, mask_id=MASK, temperature=1.0, noise=noise)
            calls += 1
    assert partial(model) >= 0.4 * calls  # sparse-dllm has two full steps a block


@pytest.mark.parametrize(
    ("settings", "name"),
    in_turn([{}, {"temperature": 1.0}, {"remasking": "random"}], ["dllm-cache", "dual"]),
    ids=["plain", "warm", "random"],
)
def test_generate_keeps_its_cache(name: str, settings: dict[str, Any]) -> None:
    model = build()
    prompt = start()[:, :PROMPT]
    options = {"block_length": 4, **METHODS[name]} if name == "dllm-cache" else METHODS[name]
    more = {"mask_id": MASK, "shift": False, "lowering": "eager", "gen_length": LONG, **options, **settings}
    dllm_compile.generate(model, prompt, generator=torch.Generator().manual_seed(0), **more)
    counted = steps(model)
    assert count(counted) >= 0.5 * sum(counted.values()) > 0
