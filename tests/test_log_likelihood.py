"""The Monte Carlo likelihood of an answer, held against every mask that there is."""

from __future__ import annotations

import itertools
from math import comb

import pytest
import torch

from dllm_compile.likelihood import answer_masks, is_greedy, log_likelihood
from tests import small_model
from tests.small_model import Small

MASK = 8
PROMPT, ANSWER = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 2, 5]])


def table(ids: torch.Tensor) -> torch.Tensor:
    """Logits ``[B, S, 9]`` in float64 that depend on every token."""
    draw = torch.Generator().manual_seed(0)
    own, other = torch.randn(2, 9, 9, generator=draw, dtype=torch.float64)
    place = torch.randn(64, 9, generator=draw, dtype=torch.float64)[: ids.shape[1]]
    return own[ids] + place + (other[ids] * place.exp()).sum(1, keepdim=True)


def exhaustive(shift: bool) -> float:
    """The expectation that the samples estimate."""
    total, length = 0.0, ANSWER.shape[1]
    for masks in itertools.product([False, True], repeat=length):
        count = sum(masks)
        if count:
            hidden = torch.tensor([masks])
            x = torch.cat([PROMPT, ANSWER.masked_fill(hidden, MASK)], 1)
            logits = table(x).log_softmax(-1)[0, PROMPT.shape[1] - shift :]
            found = sum(logits[i, ANSWER[0, i]] for i in range(length) if masks[i])
            total += float(found) * length / count / comb(length, count) / length
    return total


@pytest.mark.parametrize("shift", [False, True])
def test_many_samples_come_to_the_expectation(shift: bool) -> None:
    got = log_likelihood(table, PROMPT, ANSWER, samples=30000, batch_size=8, mask_id=MASK, shift=shift)
    assert abs(got - exhaustive(shift)) < 0.03 * abs(exhaustive(shift))


def test_batches_change_nothing_and_seeds_do() -> None:
    got = [
        log_likelihood(table, PROMPT, ANSWER, samples=5, batch_size=size, seed=seed, mask_id=MASK)
        for size, seed in ((1, 3), (4, 3), (64, 3), (1, 4))
    ]
    assert got[0] == pytest.approx(got[1], abs=1e-9) == pytest.approx(got[2], abs=1e-9)
    assert abs(got[0] - got[3]) > 1e-6


def test_numbers_of_masks_are_spread_evenly() -> None:
    assert sorted(answer_masks(5, 10, 0).sum(1).tolist()) == sorted([*range(1, 6)] * 2)


def test_greedy_is_what_the_model_writes() -> None:
    written = torch.full_like(ANSWER, MASK)
    for _ in range(ANSWER.shape[1]):
        sure, best = table(torch.cat([PROMPT, written], 1))[:, PROMPT.shape[1] :].softmax(-1).max(-1)
        place = int(sure.masked_fill(written != MASK, -1).argmax())
        written[0, place] = best[0, place]
    assert is_greedy(table, PROMPT, written, mask_id=MASK)
    for place in range(ANSWER.shape[1]):
        other = written.clone()
        other[0, place] = (other[0, place] + 1) % MASK
        assert not is_greedy(table, PROMPT, other, mask_id=MASK)


@pytest.mark.parametrize("cache", ["dual", "prefix"])
def test_a_compiled_model_computes_every_row(cache: str) -> None:
    model: Small = small_model.build()
    options = {"cache": cache, "block_length": 2, "mask_id": MASK, "lowering": "eager"}
    call = torch.compile(model, backend="dllm", options=options)
    more = {"samples": 16, "batch_size": 2, "mask_id": MASK, "shift": False}
    want = log_likelihood(model, PROMPT, ANSWER, **more)
    assert log_likelihood(call, PROMPT, ANSWER, **more) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize(
    ("prompt", "answer", "more", "said"),
    [
        (PROMPT, ANSWER[:, :0], {}, "at least one token"),
        (PROMPT.repeat(2, 1), ANSWER, {}, "one sequence each"),
        (PROMPT[:, :0], ANSWER, {"shift": True}, "nothing predicts the first"),
        (PROMPT, ANSWER, {"samples": 0}, "samples is 0"),
    ],
)
def test_bad_arguments(prompt: torch.Tensor, answer: torch.Tensor, more: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        log_likelihood(table, prompt, answer, **{"mask_id": MASK, **more})
