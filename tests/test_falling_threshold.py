"""Streaming-dLLM's falling threshold: against the formula, and with its cache and early end against a plain sampler."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Confidences, Mechanism, Option
from dllm_compile.interface.mechanism import is_number
from dllm_compile.mechanisms import register, unregister
from dllm_compile.passes.falling_threshold import falling

from . import models
from .models import MASK
from .streaming_model import generated
from .test_properties import Model, Shape

pytestmark = pytest.mark.usefixtures("no_gradients_no_warnings")
PROMPT, RESPONSE, BLOCK = 4, 18, 6
THRESHOLD = 0.6


def build() -> Model:
    """One that is sure of some tokens."""
    model = Model(Shape(layers=2, heads=4, groups=2, head_dim=4, seed=3))
    model.head.weight.data.mul_(2)
    return model


@settings(max_examples=100, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=3),
    window=st.none() | st.integers(0, 9),
    fall=st.integers(0, 10),
)
def test_it_is_the_formula(sizes: list[tuple[int, int]], window: int | None, fall: int) -> None:
    """Sequences at their blocks, so many of whose 4 tokens are filled; responses of 16 behind prompts of 2."""
    masked = torch.zeros(len(sizes), 18, dtype=torch.bool)
    block = torch.zeros_like(masked)
    want = []
    for row, (number, filled) in enumerate(sizes):
        begin, end = 2 + 4 * number, 6 + 4 * number
        block[row, begin:end], masked[row, begin + filled :] = True, True
        behind = 18 - end if window is None else len({*range(end, min(end + window, 18)), *([17] if end < 18 else [])})
        ratio = (4 - filled + behind) / (4 + behind)
        want.append(0.9 * (1 - fall / 10 * (1 - ratio)))
    told = dllm_compile.Options(threshold_fall=fall / 10, suffix_window=window, cache="dual" if window else "prefix")
    sure, bound = torch.rand(masked.shape, dtype=torch.float64), torch.full((len(sizes), 1), 0.9, dtype=torch.float64)
    got = falling(Confidences(sure, masked, masked, told, block, bound))
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float64).unsqueeze(1))


@pytest.mark.parametrize(
    ("cache", "window", "fall"),
    [
        ("prefix", 3, 0.8),
        ("prefix", 3, 0.4),
        ("dual", 4, 0.8),
        ("prefix", None, 0.4),
    ],
)
def test_generate_writes_the_tokens_of_a_plain_sampler(cache: str, window: int | None, fall: float) -> None:
    """Step by step; the second time a token that ends the second block is an end of sequence."""
    model, ids = build(), models.start(PROMPT, RESPONSE, 1)
    plain = partial(generated, model, ids[0], PROMPT, BLOCK, window, cache == "dual", THRESHOLD)
    want = plain(fall)
    assert len(want) < len(plain(0.0))  # it does something
    given: dict[str, Any] = {"cache": cache, "block_length": BLOCK, "lowering": "eager", "threshold_fall": fall}
    given |= {} if window is None else {"suffix_window": window}
    given |= {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "threshold": THRESHOLD}
    eos = int(want[-1][PROMPT + 2 * BLOCK - 1])
    for end in (None, eos):
        want = plain(fall, end)
        got = dllm_compile.generate(model, ids[:, :PROMPT], **given, eos_id=end, output_history=True)
        assert torch.equal(got.history[1:, 0], torch.stack(want))
    assert len(want) < len(plain(fall))


def test_a_fall_of_0_is_the_threshold() -> None:
    model, prompt = build().float(), models.start(PROMPT, RESPONSE, 2)[:, :PROMPT]
    given: dict[str, Any] = {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "threshold": THRESHOLD}
    given |= {"cache": "dual", "block_length": BLOCK, "lowering": "eager", "output_history": True}
    a, b = (dllm_compile.generate(model, prompt, **given, **more) for more in ({}, {"threshold_fall": 0}))
    assert torch.equal(a.history, b.history)
    assert a.nfe < RESPONSE


def test_several_mechanisms_change_the_threshold_one_after_the_other() -> None:
    """Half of it, for any number of them; a drawn step asks them, too."""
    half = Option("half", None, lambda v: is_number(v), "a number", "factor of the threshold")
    register(Mechanism("halved", "a test", options=(half,), switches=("half",), threshold=lambda t: t.threshold / 2))
    model, prompt = build(), models.start(PROMPT, RESPONSE, 1)[:, :PROMPT]
    given: dict[str, Any] = {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "output_history": True}
    given |= {"block_length": BLOCK, "cache": "dual", "lowering": "eager"}
    try:
        for more in ({}, {"top_k": 1, "remasking": "maskgit_plus"}):
            a = dllm_compile.generate(model, prompt, threshold=0.6, threshold_fall=0.0, **given, **more)
            b = dllm_compile.generate(model, prompt, threshold=1.2, threshold_fall=0.0, half=1, **given, **more)
            assert torch.equal(a.history, b.history)
            assert a.nfe < RESPONSE
    finally:
        unregister("halved")


def test_it_needs_a_threshold_and_a_loop_that_asks() -> None:
    model, prompt = build(), models.start(PROMPT, RESPONSE, 1)[:, :PROMPT]
    for more in ({}, {"factor": 0.5}):
        with pytest.raises(ValueError, match="threshold_fall changes the threshold from step to step, and there is no"):
            dllm_compile.generate(model, prompt, gen_length=RESPONSE, mask_id=MASK, threshold_fall=0.3, **more)
    with pytest.raises(ValueError, match=r"threshold_fall is 0\.3, by which the mechanism 'falling-threshold' decides"):
        torch.compile(model, backend="dllm", options={"threshold_fall": 0.3, "mask_id": MASK})(prompt)


def test_the_preset_is_what_its_authors_recommend() -> None:
    model, prompt = build(), models.start(PROMPT, 64, 1)[:, :PROMPT]
    given: dict[str, Any] = {"gen_length": 64, "mask_id": MASK, "lowering": "eager", "shift": False}
    by_hand = {"cache": "prefix", "block_length": 32, "suffix_window": 96, "threshold": 0.9, "threshold_fall": 0.3}
    a, b = (dllm_compile.generate(model, prompt, **given, **more) for more in (by_hand, {"preset": "streaming-dllm"}))
    assert torch.equal(a, b)
