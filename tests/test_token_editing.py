"""Samplers that write other tokens over those they have filled, as LLaDA2.1's does where it is sure of another one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from . import models
from .callers import EQUAL, FORMS, METHODS, PROMPT, TOLERANCE, Call, build, off, partial, start
from .models import MASK

pytestmark = pytest.mark.shares_graphs
RESPONSE, BLOCK = 16, 4
SURE = 0.5
"""The probability above which a token is written over another one."""


class Turn(NamedTuple):
    """A call of the loop: its ids and logits, and the tokens that it writes over others, ``[B, S]`` bool."""

    ids: torch.Tensor
    logits: torch.Tensor
    edited: torch.Tensor


def editing(call: Call, x: torch.Tensor, fills: int = 1, most: int = 3) -> Iterator[Turn]:
    """Blocks: fill the surest masks, write surer tokens over filled ones; go on without masks until none is edited."""
    place = torch.arange(x.shape[1])
    for begin in range(PROMPT, x.shape[1], BLOCK):
        inside = ((place >= begin) & (place < begin + BLOCK)).expand_as(x)
        behind = 0
        while behind < most:
            logits = call(x).clone()
            probability, best = logits.softmax(-1).max(-1)
            masked = inside & (x == MASK)
            surest = probability.masked_fill(~masked, -1.0).topk(fills, -1).indices
            filled = masked & torch.zeros_like(masked).scatter(1, surest, True)
            edited = inside & ~masked & (best != x) & (probability > SURE)
            yield Turn(x, logits, edited)
            x = torch.where(filled | edited, best, x)
            behind += not masked.any()
            if not masked.any() and not edited.any():
                break


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        yield


def everywhere(x: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(x, dtype=torch.bool)


def begun() -> torch.Tensor:
    return start(response=RESPONSE)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", EQUAL)
def test_edits_are_those_of_eager(name: str, form: str) -> None:
    model = build(form)
    call = models.compiled_loop(model, readable="all", **EQUAL[name])
    edits = 0
    for got, want in zip(editing(call, begun()), editing(model, begun()), strict=True):
        assert torch.equal(got.ids, want.ids)
        assert off(got.logits, want.logits, everywhere(got.ids)) < TOLERANCE
        edits += int(want.edited.sum())
    assert edits > 5


@pytest.mark.parametrize("name", EQUAL)
def test_a_loop_that_edits_is_told_once_and_served_from_then_on(name: str) -> None:
    """A call without masks has current logits in any case: by these the first token is edited."""
    model = build()
    call = models.compiled_loop(model, **EQUAL[name])
    told = False
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for turn in editing(call, begun()):
            said = [str(each.message) for each in caught if "writes other tokens over those" in str(each.message)]
            told |= bool(said)
            if told or not (turn.ids == MASK).any():
                assert off(turn.logits, model(turn.ids), everywhere(turn.ids)) < TOLERANCE
    assert len(said) == 1


@pytest.mark.parametrize("name", EQUAL)
def test_a_call_without_masks_has_current_logits(name: str) -> None:
    model = build()
    call = models.compiled_loop(model, **EQUAL[name])
    x = start()
    for place in range(PROMPT, x.shape[1]):
        best = call(x)[:, place].argmax(-1)
        x = x.clone()
        x[:, place] = best
    assert off(call(x), model(x), everywhere(x)) < TOLERANCE
    assert off(call(x), model(x), everywhere(x)) < TOLERANCE  # a repeat


@pytest.mark.parametrize("name", METHODS)
def test_the_row_of_an_edited_token_is_computed(name: str) -> None:
    """In partial steps, too: its logits answer to the token that stands there now."""
    model = build()
    call = models.compiled_loop(model, readable="all", **METHODS[name])
    warnings.filterwarnings("ignore", "dllm: a token outside of the active block")
    before, seen = None, 0
    for turn in editing(call, begun()):
        if before is not None and before.edited.any():
            moved = (turn.logits != before.logits).any(-1)
            assert moved[before.edited].all()
            seen += 1
        before = turn
    assert seen
    assert partial(model)
