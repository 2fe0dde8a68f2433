"""What tells the steps of a denoising loop from samples of a likelihood, judged on numbers."""

from __future__ import annotations

import math

import pytest
import torch

from dllm_compile.runtime.evidence import STEPS, Evidence, Expected, begins_masked

MASK, TOKENS, VOCABULARY = 99, 24, 100


def start(response: int = 18) -> torch.Tensor:
    ids = torch.randint(0, MASK, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    ids[:, TOKENS - response :] = MASK
    return ids


def logits(seed: int = 1) -> torch.Tensor:
    out = torch.randn(1, TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 3
    out[..., MASK] = -100.0
    return out


def judged(ids: torch.Tensor, new: torch.Tensor, out: torch.Tensor, known: Evidence) -> Evidence:
    before = ids == MASK
    places = before.any(0).nonzero()
    expected = Expected(out, max(int(places[0]) - 1, 0), int(places[-1]) + 1)
    return known.after(before, new == MASK, expected.compare(new, ids, MASK).tolist(), VOCABULARY)


@pytest.mark.parametrize("shifted", [False, True])
def test_the_surest_token_of_the_model_shows_a_loop(shifted: bool) -> None:
    ids, out = start(), logits()
    row = torch.cat([out[:, :1], out[:, :-1]], 1) if shifted else out
    sure = torch.where(ids == MASK, row.softmax(-1).amax(-1), 0)
    new = ids.clone()
    new[0, sure.argmax()] = row[0, sure.argmax()].argmax()
    known = Evidence(False, begins=True)
    assert judged(ids, new, out, known).is_loop
    assert judged(ids, new, out, Evidence(False, begins=True, shift=shifted)).is_loop
    assert not judged(ids, new, out, Evidence(False, begins=True, shift=not shifted)).is_loop


def test_tokens_that_are_not_the_models_do_not() -> None:
    ids, out = start(), logits()
    known, order = Evidence(False, begins=False), torch.randperm(18, generator=torch.Generator().manual_seed(3))
    for place in (TOKENS - 18 + order[:12]).tolist():
        new = ids.clone()
        new[0, place] = out[0, place].argsort()[VOCABULARY // 2]
        known, ids = judged(ids, new, out, known), new
        assert not known.is_loop
    assert known.fills == 12


def test_tokens_drawn_by_the_models_probabilities_show_a_loop_in_the_end() -> None:
    draw = torch.Generator().manual_seed(5)
    ids, known = start(), Evidence(False, begins=True, scores=True)
    for seed, place in enumerate(range(TOKENS - 18, TOKENS)):
        out = logits(seed)
        new = ids.clone()
        new[0, place] = torch.multinomial(out[0, place].softmax(-1), 1, generator=draw)
        known, ids = judged(ids, new, out, known), new
    assert known.is_loop


def test_a_short_response_needs_more_than_one_token() -> None:
    ids, out = start(), logits()
    sure = torch.where(ids == MASK, out.softmax(-1).amax(-1), 0)
    new = ids.clone()
    new[0, sure.argmax()] = out[0, sure.argmax()].argmax()
    assert not judged(ids, new, out, Evidence(False, begins=True, short=True)).is_loop
    both = sure.topk(2).indices[0]
    new[0, both] = out[0, both].argmax(-1)
    assert judged(ids, new, out, Evidence(False, begins=True, short=True)).is_loop


@pytest.mark.parametrize("order", ["left to right", "any"])
def test_calls_that_only_fill_show_a_loop_unless_they_read_from_left_to_right(order: str) -> None:
    known, masked = Evidence(False, begins=True), start() == MASK
    for step in range(STEPS):
        now = masked.clone()
        now[0, TOKENS - 18 + (step if order == "left to right" else 17 - 2 * step)] = False
        known, masked = known.after(masked, now, None, VOCABULARY), now
        assert known.is_loop == (step + 1 == STEPS and order == "any")
    assert not Evidence(False, begins=False, fills=STEPS, in_order=False).is_loop
    assert Evidence(True, begins=False).is_loop


def test_what_begins_fully_masked() -> None:
    row = torch.tensor([[5, 6, MASK, MASK, MASK]])
    for text, want in (
        (row, True),
        (torch.tensor([[5, 6, MASK, 3, MASK]]), False),
        (torch.tensor([[5, 6, MASK, MASK, 0]]), True),  # padded on the right
        (torch.tensor([[5, MASK, MASK, 7, 0]]), False),  # more text behind
        (torch.tensor([[5, 6, 7, 8, 9]]), False),
        (torch.full((1, 5), MASK), True),
        (torch.cat([row, torch.tensor([[5, MASK, MASK, MASK, MASK]])]), True),
        (torch.cat([row, torch.tensor([[5, MASK, 3, MASK, MASK]])]), False),
    ):
        assert begins_masked(text == MASK, text) == want


def test_log_probabilities_are_those_of_the_tokens() -> None:
    ids, out = start(), logits()
    new = ids.clone()
    new[0, -1], new[0, -3] = 4, 5
    found = Expected(out, TOKENS - 19, TOKENS).compare(new, ids, MASK).tolist()
    p = out.log_softmax(-1)[0]
    assert found[0] == 2
    assert math.isclose(found[3], float(p[-1, 4] + p[-3, 5]), rel_tol=1e-9)
    assert math.isclose(found[6], float(p[-2, 4] + p[-4, 5]), rel_tol=1e-9)
