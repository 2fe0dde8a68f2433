"""Mechanisms from outside that hide keys from attention, or narrow the rows of a step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Facts, Mechanism, Option
from dllm_compile.interface.mechanism import Rows, count
from dllm_compile.mechanisms import register, tables, unregister

from . import shared
from .models import MASK, VOCABULARY
from .test_properties import EXAMPLES, Model, Shape

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]
PROMPT, RESPONSE = 4, 6
TOKENS = PROMPT + RESPONSE


def near(facts: Facts) -> torch.Tensor:
    """All keys but masked ones far behind the first mask."""
    place = torch.arange(TOKENS)
    first = torch.where(facts.masked, place, TOKENS).amin(1, keepdim=True)
    return ~facts.masked | (place < first + facts.options.suffix)


def odd(facts: Facts) -> torch.Tensor:
    """Keys at odd places, and the prompt."""
    place = torch.arange(TOKENS).expand_as(facts.masked)
    return (place % 2 == 1) | ~facts.response


def few(facts: Facts) -> torch.Tensor:
    """The first masked rows, and those decided just now."""
    return (facts.masked & (facts.masked.cumsum(1) <= facts.options.few)) | facts.call.filled


def mechanism(name: str, option: str, **rows: Rows) -> Mechanism:
    """One that is on where an option is given."""
    return Mechanism(name, "a test", options=(Option(option, None, **count("2")),), switches=(option,), **rows)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(mechanism("near-keys", "suffix", visible=near))
    register(mechanism("odd-keys", "odd", visible=odd))
    register(mechanism("few-rows", "few", narrows=few))
    yield
    for name in tables().registered:
        unregister(name)


def start(batch: int, seed: int) -> torch.Tensor:
    ids = torch.randint(0, VOCABULARY - 1, (batch, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[ids == MASK] = 0
    ids[:, PROMPT:] = MASK
    return ids


def filled(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """The first mask of each sequence becomes a token."""
    ids = ids.clone()
    at = (ids == MASK).int().argmax(1)
    row = torch.arange(len(ids))
    ids[row, at] = logits[row, at, :MASK].argmax(-1)
    return ids


def seen(ids: torch.Tensor, suffix: int | None = None, odd: int | None = None) -> torch.Tensor:
    """Keys ``[B, S]`` that the mechanisms leave."""
    masked, place = ids == MASK, torch.arange(TOKENS)
    keys = torch.ones_like(masked)
    if suffix is not None:
        first = torch.where(masked, place, TOKENS).amin(1, keepdim=True)
        keys &= ~masked | (place < first + suffix)
    if odd is not None:
        keys &= (place % 2 == 1) | (place < PROMPT)
    return keys


@EXAMPLES
@given(
    suffix=st.none() | st.integers(1, RESPONSE + 1),
    odd=st.none() | st.just(1),
    batch=st.integers(1, 2),
    seed=st.integers(0, 99),
)
def test_steps_of_every_row_read_the_visible_keys_alone(
    suffix: int | None, odd: int | None, batch: int, seed: int
) -> None:
    """A model that takes a mask says what attention over fewer keys is; several mechanisms intersect."""
    model, ids = Model(Shape(2, 2, 1, 4, seed % 3)), start(batch, seed)
    given = {name: value for name, value in (("suffix", suffix), ("odd", odd)) if value is not None}
    options = {"cache": "dual", "refresh_interval": 1, **given}
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **options)
    loop = dllm_compile.loop()
    for _ in range(RESPONSE):
        want, masked = model(ids, seen(ids, **given)), ids == MASK
        with loop:
            got = call(ids)
        torch.testing.assert_close(got[masked], want[masked])
        ids = filled(ids, want)


SPARSE_BLOCKS: dict[str, Any] = {"cache": "dual", "keep_ratio": 0.5}


@pytest.mark.parametrize(
    ("lowering", "beside"),
    [
        ("inductor", SPARSE_BLOCKS),
        ("eager", SPARSE_BLOCKS),
        ("eager", {"cache": "dual"}),
        ("eager", {"saliency_threshold": 0.9, "full_steps": 1}),
        ("eager", {"prompt_interval": 3, "response_interval": 2}),
        ("eager", {"prompt_interval": 3, "response_interval": 2, "keep_ratio": 0.5}),
    ],
    ids=str,
)
def test_hidden_keys_have_no_part_in_any_method(lowering: str, beside: dict[str, Any]) -> None:
    """What is hidden throughout may hold any token: the answers are the same."""
    model, ids, other = Model(Shape(2, 2, 1, 4, 1)), start(1, 3), start(1, 3)
    other[0, 0] = ids[0, 0] % (MASK - 1) + 1
    first = lambda facts: torch.arange(TOKENS).expand_as(facts.masked) > 0  # noqa: E731
    register(mechanism("not-the-first", "hidden", visible=first))
    call = shared.compiled(model, lowering=lowering, mask_id=MASK, shift=False, hidden=1, **beside)
    answers = []
    for x in (ids, other):
        with dllm_compile.loop():
            for _ in range(RESPONSE):
                got = call(x)
                x = filled(x, got)
        answers.append(x[:, 1:])
    assert torch.equal(*answers)
    assert dllm_compile.stats(model)["layers"]["cached"] > 0


@pytest.mark.parametrize("beside", [{"cache": "dual"}, {"prompt_interval": 3, "response_interval": 2}], ids=str)
def test_the_step_that_evicts_reads_the_visible_keys_alone(beside: dict[str, Any]) -> None:
    model, ids = Model(Shape(2, 2, 1, 4, 1)), start(2, 3)
    delay = {"delay": 0} if "cache" in beside else {}
    call = shared.compiled(model, lowering="eager", mask_id=MASK, keep_ratio=0.5, suffix=2, **delay, **beside)
    with dllm_compile.loop():
        got = call(ids)
    assert "evict" in dllm_compile.stats(model)["steps"]
    masked = ids == MASK
    torch.testing.assert_close(got[masked], model(ids, seen(ids, suffix=2))[masked])


def test_narrowed_rows_are_those_that_are_computed() -> None:
    model, ids = Model(Shape(2, 2, 1, 4, 1)), start(1, 3)
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, cache="dual", few=2)
    rows, loop = [], dllm_compile.loop()
    for _ in range(4):
        before = dllm_compile.stats(model)["rows"].get("block", 0)
        with loop:
            ids = filled(ids, call(ids))
        rows.append(dllm_compile.stats(model)["rows"].get("block", 0) - before)
    assert rows == [0, 3, 3, 3]


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="'few-rows' narrows the rows of a cache of blocks; give cache='dual' too"):
        dllm_compile.Options(few=2)
    with pytest.raises(ValueError, match="says rows, keys or tokens, and nothing switches it on"):
        register(replace(mechanism("never", "never", visible=odd), switches=()))


def test_a_sequence_without_a_key_is_an_error() -> None:
    register(mechanism("nothing", "nothing", visible=lambda facts: facts.masked & False))
    model = Model(Shape(1, 2, 1, 4, 1))
    call = shared.compiled(model, lowering="eager", mask_id=MASK, cache="dual", nothing=1)
    with pytest.raises(
        ValueError, match=r"the mechanism 'nothing' hides every key of the sequences \[0\]; leave at least one"
    ):
        call(start(1, 3))


def test_explain_names_what_hides_keys() -> None:
    found = dllm_compile.explain(Model(Shape(1, 2, 1, 4, 1)), start(1, 3), mask_id=MASK, cache="dual", suffix=2)
    assert "attention reads only the keys that near-keys leave visible" in str(found)
