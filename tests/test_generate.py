"""``dllm_compile.generate``: equal to the loops it stands for, and to itself however it is called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from . import loops, models
from .sampling_loops import END, MASK, dream_at_random, ids, llada_at_random, parallel, run, seeded, start, toy

PUBLISHED_RULES = ("entropy", "topk_margin", "maskgit_plus")


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_greedy_generation_is_lladas_loop(data: st.DataObject) -> None:
    draw = data.draw
    block, blocks, prompt = draw(st.integers(1, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 8))
    steps, cfg = blocks * draw(st.integers(1, block)), draw(st.sampled_from([0.0, 0.7]))
    model, given_ids = toy(draw(st.integers(0, 9))), ids(draw(st.integers(1, 3)), prompt)
    more = {"steps": steps, "block_length": block, "cfg_scale": cfg}
    want = list(loops.llada(model, start(given_ids, block * blocks), prompt, mask_id=MASK, **more))
    got = run(model, given_ids, gen_length=block * blocks, **more)
    assert got.nfe == steps
    assert got.history is not None
    assert torch.equal(got.history, torch.stack([start(given_ids, block * blocks), *want]))


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_greedy_generation_is_dreams_loop(data: st.DataObject) -> None:
    draw = data.draw
    response, steps, alg = draw(st.integers(1, 20)), draw(st.integers(1, 30)), draw(st.sampled_from(PUBLISHED_RULES))
    model, given_ids = toy(draw(st.integers(0, 9))), ids(draw(st.integers(1, 3)), draw(st.integers(1, 8)))
    want = list(loops.dream(model, start(given_ids, response), steps=steps, alg=alg, mask_id=MASK))
    got = run(model, given_ids, max_new_tokens=response, steps=steps, alg=alg, shift=True)
    assert got.history is not None
    assert torch.equal(got.history[1:], torch.stack(want))


@pytest.mark.parametrize("remasking", ["low_confidence", "random"])
def test_a_temperature_draws_as_llada_does(remasking: str) -> None:
    model, prompt = toy(sharp=1.0), ids(2, 5)
    torch.manual_seed(5)
    want = llada_at_random(model, start(prompt, 12), 5, 6, 4, 0.8, remasking)
    more = {"gen_length": 12, "block_length": 4, "steps": 6, "temperature": 0.8, "remasking": remasking}
    assert torch.equal(run(model, prompt, generator=seeded(), **more).sequences, want)
    torch.manual_seed(5)
    assert torch.equal(run(model, prompt, **more).sequences, want)
    assert not torch.equal(run(model, prompt, generator=seeded(6), **more).sequences, want)


@pytest.mark.parametrize(
    ("alg", "how"),
    [
        ("entropy", {"top_p": 0.95, "top_k": None}),
        ("maskgit_plus", {"top_p": None, "top_k": 4}),
        ("topk_margin", {"top_p": 0.8, "top_k": 9}),
        ("entropy", {"top_p": 0.95, "top_k": None, "alg_temp": 0.5}),
        ("origin", {"top_p": 0.9, "top_k": None}),
    ],
)
def test_a_temperature_draws_as_dream_does(alg: str, how: dict[str, Any]) -> None:
    model, prompt = toy(sharp=0.5), ids(2, 5)
    torch.manual_seed(5)
    want = dream_at_random(model, start(prompt, 12), 7, alg, temperature=0.6, **how)
    more = {"gen_length": 12, "steps": 7, "alg": alg, "temperature": 0.6, "shift": True, **how}
    assert torch.equal(run(model, prompt, generator=seeded(), **more).sequences, want)
    assert not torch.equal(run(model, prompt, generator=seeded(6), **more).sequences, want)


RULES: list[tuple[dict[str, float], Callable[[int, float], bool]]] = [
    ({"threshold": 0.5}, lambda n, c: c >= 0.5),
    ({"threshold": 1.0}, lambda n, c: c >= 1.0),
    ({"factor": 1.0}, lambda n, c: (n + 1) * (1 - c) <= 1.0),
    ({"factor": 2.5}, lambda n, c: (n + 1) * (1 - c) <= 2.5),
]


@pytest.mark.parametrize(("rule", "believe"), RULES)
@pytest.mark.parametrize("block", [None, 5])
def test_sure_tokens_are_written_together_each_sequence_as_alone(
    rule: dict[str, float], believe: Callable[[int, float], bool], block: int | None
) -> None:
    model, prompts = toy(sharp=1.2), ids(4, 6)
    got = run(model, prompts, gen_length=20, block_length=block, **rule)
    calls = []
    for row, prompt in zip(got.sequences, prompts.split(1), strict=True):
        x = start(prompt, 20)
        calls.append(parallel(model, x, 6, block or 20, believe))
        assert torch.equal(row, x[0])
        alone = run(model, prompt, gen_length=20, block_length=block, **rule)
        assert alone.nfe == calls[-1]
        assert alone.tokens_per_forward == pytest.approx(20 / alone.nfe)
    assert got.nfe == max(calls)
    assert rule == {"threshold": 1.0} or 1 < got.nfe < 20


@pytest.mark.parametrize("remasking", ["low_confidence", "entropy", "topk_margin"])
def test_the_shifted_threshold_reads_the_row_before(remasking: str) -> None:
    model, prompt = toy(sharp=1.2), ids(2, 6)
    more = {"gen_length": 12, "block_length": 4, "threshold": -1.0 if remasking == "entropy" else 0.4}
    want = run(lambda x: torch.cat([model(x)[:, :1], model(x)[:, :-1]], 1), prompt, remasking=remasking, **more)
    got = run(model, prompt, remasking=remasking, shift=True, **more)
    assert torch.equal(got.sequences, want.sequences)


def test_steps_of_dream_go_by_block_where_there_are_blocks() -> None:
    got = run(toy(), ids(1, 4), gen_length=12, block_length=6, steps=6, shift=True, remasking="entropy")
    assert got.history is not None
    left = (got.history == MASK).sum(2)[:, 0]
    assert left.tolist() == [12, 11, 9, 6, 5, 3, 0]  # int(6 * .333), int(5 * .4995), the rest
    assert not (got.history[3, :, 4:10] == MASK).any()


def test_masks_in_a_prompt_are_filled_with_the_first_block() -> None:
    prompt = ids(2, 6)
    prompt[0, 2] = prompt[1, 4] = prompt[1, 5] = MASK
    got = run(toy(), prompt, gen_length=8, block_length=4)
    assert not (got.sequences == MASK).any()
    known = prompt != MASK
    assert torch.equal(got.sequences[:, :6][known], prompt[known])


@pytest.mark.parametrize("more", [{}, {"threshold": 0.9}, {"factor": 1.0}, {"shift": True, "block_length": 3}])
def test_a_model_that_prefers_the_mask_ends_all_the_same(more: dict[str, Any]) -> None:
    got = run(lambda x: torch.nn.functional.one_hot(torch.full_like(x, MASK)).double(), ids(2, 3), gen_length=6, **more)
    assert got.nfe == 6
    assert (got.sequences[:, 3:] == MASK).all()


@pytest.mark.parametrize("shift", [False, True])
def test_left_padding_changes_nothing(shift: bool) -> None:
    model = models.build("llama")
    prompts = [ids(1, n, seed=n) for n in (3, 7, 5)]
    padded = torch.cat([torch.nn.functional.pad(p, (7 - p.shape[1], 0)) for p in prompts])
    mask = torch.stack([(torch.arange(7) >= 7 - p.shape[1]).long() for p in prompts])
    more = {"gen_length": 8, "block_length": 4, "threshold": 0.2, "shift": shift, "mask_id": models.MASK}
    got = run(model, padded, attention_mask=mask, **more).sequences
    for row, prompt in zip(got, prompts, strict=True):
        alone = run(model, prompt, attention_mask=torch.ones_like(prompt), **more).sequences
        assert torch.equal(row[7:], alone[0, prompt.shape[1] :])
    assert not torch.equal(got, run(model, padded, **more).sequences)


def test_a_mask_of_ones_is_not_handed_on() -> None:
    seen: list[dict[str, Any]] = []

    def model(x: torch.Tensor, **more: Any) -> torch.Tensor:
        seen.append(more)
        return toy()(x)

    run(model, ids(2, 3), attention_mask=torch.ones(2, 3), gen_length=2)
    run(model, ids(1, 3), attention_mask=torch.tensor([[0, 1, 1]]), gen_length=2, shift=True)
    run(model, ids(1, 3), attention_mask=torch.tensor([[0, 1, 1]]), gen_length=2)
    assert seen[0] == seen[1] == {}
    assert seen[2]["attention_mask"].tolist() == [[[[i > 0 and j > 0 for j in range(5)] for i in range(5)]]]
    assert seen[2]["position_ids"].tolist() == [[1, 0, 1, 2, 3]]
    assert seen[4]["attention_mask"].tolist() == [[0, 1, 1, 1, 1]]


def test_an_end_stops_a_sequence_and_fills_the_rest() -> None:
    model, prompts = toy(seed=3, end=14.0), ids(3, 5)
    full = run(model, prompts, gen_length=16)
    got = run(model, prompts, gen_length=16, eos_id=END)
    assert got.nfe < full.nfe == 16
    for row, prompt in zip(got.sequences, prompts.split(1), strict=True):
        alone = run(model, prompt, gen_length=16, eos_token_id=[END])
        assert torch.equal(row, alone.sequences[0])
        assert alone.history is not None
        assert alone.history.shape[0] == alone.nfe + 1
        last = alone.history[-2, 0]
        end = (row == END).nonzero()[:, 0]
        end = int(end[end >= 5][0])
        assert (row[last == MASK] == END).all()
        assert not (row == MASK).any()
        reached = int((alone.history[-1, 0, : end + 1] != MASK).all())
        assert reached
