"""The far masked suffix is neither computed nor read: Streaming-dLLM's window, and others that leave rows out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Facts, Mechanism, Option
from dllm_compile.interface.mechanism import count
from dllm_compile.mechanisms import register, tables, unregister

from . import models
from .composed import ByHand
from .models import MASK
from .streaming_model import Streaming
from .test_block_cache import filled
from .test_properties import EXAMPLES, SHAPES, Batch, Model, Shape, batches, fresh
from .under_way import under_way

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]
PROMPT, RESPONSE, BLOCK = 4, 12, 3
SHAPE = Shape(layers=2, heads=4, groups=2, head_dim=4, seed=1)
FEW = settings(EXAMPLES, max_examples=6)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    yield
    for name in tables().registered:
        unregister(name)


def block_of(ids: torch.Tensor) -> int:
    """The first block ``[L]`` that has masks."""
    return (int((ids == MASK).nonzero()[0, 0]) - PROMPT) // BLOCK


def start(batch: int = 1, seed: int = 0) -> torch.Tensor:
    return models.start(PROMPT, RESPONSE, batch, seed)


def surest(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """A copy of ``ids`` ``[L]`` whose surest mask in the active block is filled."""
    ids, number = ids.clone(), block_of(ids)
    begin = PROMPT + number * BLOCK
    sure = logits[begin : begin + BLOCK, :MASK].softmax(-1).amax(-1)
    at = begin + int(torch.where(ids[begin : begin + BLOCK] == MASK, sure, -1).argmax())
    ids[at] = logits[at, :MASK].argmax()
    return ids


def off(plain: Streaming, ids: torch.Tensor, got: torch.Tensor) -> float:
    """How far logits ``[L, V]`` are from the plain model's, at the masks that it computes."""
    want = plain(ids, block_of(ids))
    masks = [(place, row) for place, row in enumerate(plain.rows) if ids[row] == MASK]
    places, rows = (list(each) for each in zip(*masks, strict=True))
    return float((got[rows] - want[places]).abs().max())


@pytest.mark.parametrize("shift", [False, None, True])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
@pytest.mark.parametrize("window", [0, 2, 5])
def test_every_step_is_that_of_a_plain_model(window: int, cache: str, shift: bool | None) -> None:
    model, ids = Model(SHAPE), start()
    call = fresh(model, cache=cache, block_length=BLOCK, suffix_window=window, shift=shift)
    plain = Streaming(model, PROMPT, RESPONSE, BLOCK, window, cache == "dual")
    for _ in range(RESPONSE):
        got = call(ids)
        assert off(plain, ids[0], got[0]) < 1e-9
        ids = surest(ids[0], got[0]).unsqueeze(0)


def test_every_step_is_that_of_a_plain_model_through_inductor() -> None:
    model, ids = Model(Shape(1, 2, 1, 4, 3)), start(2, 5)
    call = fresh(model, cache="prefix", block_length=BLOCK, suffix_window=2, lowering="inductor")
    plain = [Streaming(model, PROMPT, RESPONSE, BLOCK, 2, dual=False) for _ in ids]
    for number in range(2 * BLOCK):
        got = call(ids)
        assert max(map(off, plain, ids, got)) < 1e-9, number
        ids = torch.stack([surest(*each) for each in zip(ids, got, strict=True)])


@FEW
@given(SHAPES, st.integers(0, 6), st.integers(1, 3), st.sampled_from(["prefix", "dual"]), st.integers(0, 99))
def test_sequences_of_a_batch_are_at_blocks_of_their_own(
    shape: Shape, window: int, batch: int, cache: str, seed: int
) -> None:
    """Each as the plain model has it alone, some in a full step while others are inside a block, until one is done."""
    model, ids = Model(shape), start(batch, seed)
    call = fresh(model, cache=cache, block_length=BLOCK, suffix_window=window)
    plain = [Streaming(model, PROMPT, RESPONSE, BLOCK, window, cache == "dual") for _ in ids]
    while bool((ids == MASK).any(1).all()):
        got = call(ids)
        assert max(map(off, plain, ids, got)) < 1e-9
        for row in range(batch):
            for _ in range(1 + row):  # the others are faster
                begin = block_of(ids[row]) if (ids[row] == MASK).any() else -1
                if begin == plain[row].at:
                    ids[row] = surest(ids[row], got[row])


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_a_window_as_long_as_the_suffix_is_the_cache_without_it(cache: str) -> None:
    model = Model(SHAPE)
    given = {"cache": cache, "block_length": BLOCK}
    answers: list[list[torch.Tensor]] = []
    for more in ({}, {"suffix_window": RESPONSE - BLOCK - 1}):
        call = fresh(model, **given, **more)
        answers.append([call(ids).clone() for ids in filled(start(2), BLOCK, [1, 2])])
        steps = dllm_compile.stats(model)["steps"]
        assert steps.keys() == {"full", "block"}
    for a, b in zip(*answers, strict=True):
        assert torch.equal(a, b)


def test_only_the_near_rows_are_computed() -> None:
    """In the first call too, which has nothing kept to read from; ``W`` of ``explain`` is the number."""
    model, ids = Model(SHAPE), start()
    call = fresh(model, cache="dual", block_length=BLOCK, suffix_window=2, shift=False)
    for _ in range(BLOCK + 1):
        ids = surest(ids[0], call(ids)[0]).unsqueeze(0)
    stats = dllm_compile.stats(model)
    first = PROMPT + BLOCK + 2 + 1
    assert stats["steps"] == {"present": 2, "block": 2}
    assert stats["rows"] == {"present": first + first + BLOCK, "block": 2 * BLOCK}
    assert stats["layers"] == {"cached": 2 * 2, "seen": 4 * 2}
    assert stats["refreshes"] == {"block": 2}
    found = dllm_compile.explain(model, start(), mask_id=MASK, cache="dual", block_length=BLOCK, suffix_window=2)
    assert found.lengths["W"] == first
    assert found.relative["present"] < found.relative["full"] * first / (PROMPT + RESPONSE)
    assert "no step computes or reads the rows that suffix-window leaves out" in str(found)


def test_a_token_that_is_given_far_behind_is_there() -> None:
    """Infilling: what is behind the window and no mask is read, wherever it is."""
    model, ids = Model(SHAPE), start()
    ids[0, [-4, -1]] = 7
    there = torch.ones_like(ids)
    there[0, PROMPT + BLOCK :] = torch.tensor([0, 0, 0, 0, 0, 1, 0, 1, 1])  # the last mask is the tail
    call = fresh(model, cache="dual", block_length=BLOCK, suffix_window=0)
    block = slice(PROMPT, PROMPT + BLOCK)
    torch.testing.assert_close(call(ids)[0, block], model(ids, there)[0, block])
    assert dllm_compile.stats(model)["rows"] == {"present": int(there.sum())}


# -- beside other mechanisms ------------------------------------------------------------------------------------------


def near_rows(number: int, window: int) -> list[int]:
    end = PROMPT + (number + 1) * BLOCK
    return sorted({*range(min(end + window, PROMPT + RESPONSE)), PROMPT + RESPONSE - 1})


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_eviction_keeps_a_share_of_the_rows_that_are_there(cache: str, delay: int) -> None:
    model, ids, window = Model(SHAPE), start()[0], 3
    given = {"cache": cache, "block_length": BLOCK, "suffix_window": window, "shift": False}
    call = fresh(model, keep_ratio=0.4, kernel_size=None, delay=delay, **given)  # pooled scores have ties
    plain, at, age = ByHand(model, len(ids)), -1, 0
    for _ in range(RESPONSE):
        number = block_of(ids)
        at, age = number, (age + 1 if number == at else 0)
        near, begin = near_rows(number, window), PROMPT + number * BLOCK
        rows = [row for row in near if row >= begin and (row < begin + BLOCK or cache == "prefix")]
        if age <= delay:
            plain.seen = [torch.isin(torch.arange(len(ids)), torch.tensor(near)) for _ in plain.seen]
            plain.compute(ids, near)
            if age == delay:
                plain.evict(range(begin, begin + BLOCK), rows, 0.4, among=near)
        else:
            plain.compute(ids, rows)
        got = call(ids.unsqueeze(0))[0]
        masks = (ids == MASK) & torch.isin(torch.arange(len(ids)), torch.tensor(rows))
        assert (got - plain.logits)[masks].abs().max() < 1e-9
        ids = surest(ids, got)
    assert dllm_compile.stats(model)["steps"]["evict present"] == 2  # behind the other blocks nothing is far


def test_saliency_compares_with_rows_that_are_there() -> None:
    model, ids, window = Model(SHAPE), start()[0], 2
    given = {"cache": "prefix", "block_length": BLOCK, "saliency_threshold": 0.97, "full_steps": 1}
    call = fresh(model, **given, suffix_window=window, shift=False)
    plain, at, before = ByHand(model, len(ids)), -1, ids
    fewer = 0
    for _ in range(RESPONSE):
        number = block_of(ids)
        near = near_rows(number, window)
        rows = [row for row in near if row >= PROMPT + number * BLOCK]
        if number != at:
            plain.seen = [torch.isin(torch.arange(len(ids)), torch.tensor(near)) for _ in plain.seen]
            plain.compute(ids, near)
        else:
            plain.compute(ids, rows, changed=(ids != before).nonzero()[:, 0].tolist(), bound=0.97)
            fewer += len(plain.salient[1]) < len(rows)
        at, before = number, ids
        got = call(ids.unsqueeze(0))[0]
        masks = (ids == MASK) & torch.isin(torch.arange(len(ids)), torch.tensor(rows))
        assert (got - plain.logits)[masks].abs().max() < 1e-9
        ids = surest(ids, got)
    assert fewer > 2
    assert dllm_compile.stats(model)["steps"].keys() == {"present", "full", "salient"}


@pytest.mark.parametrize(
    "beside",
    [
        {"cache": "dual", "prompt_interval": 4},
        {"cache": "decoded", "refresh_interval": 3},
        {"cache": "prefix", "keep_ratio": 0.5, "saliency_threshold": 0.9, "full_steps": 1},
        {"cache": "dual", "keep_ratio": 0.5, "prompt_interval": 5, "delay": 0},
        {"cache": "dual", "saliency_threshold": 0.9, "full_steps": 2, "prompt_interval": 3},
        {"cache": "dual", "keep_outside": True},
        {"cache": "dual", "rows_before": 2, "rows_behind": 2},
        {"cache": "rolling", "row_shares": (0.5,), "row_depths": (0.5,)},
    ],
    ids=str,
)
def test_absent_tokens_have_no_part_in_any_method(beside: dict[str, Any]) -> None:
    """What is left out throughout may hold any token."""
    register(
        Mechanism(
            "not-the-first",
            "a test",
            options=(Option("gone", None, **count("1")),),
            switches=("gone",),
            present=lambda facts: (torch.arange(facts.masked.shape[1]) > 0).expand_as(facts.masked),
        )
    )
    model, answers = Model(SHAPE), []
    call = fresh(model, gone=1, suffix_window=1, block_length=BLOCK, **beside)
    for first in (5, 6):
        ids = start(2, 3)
        ids[:, 0] = first
        with dllm_compile.loop():
            for _ in range(RESPONSE):
                ids = torch.stack([surest(*each) for each in zip(ids, call(ids), strict=True)])
        answers.append(ids[:, 1:])
    assert torch.equal(*answers)
    assert dllm_compile.stats(model)["layers"]["cached"] > 0


# -- any mechanism that leaves rows out -------------------------------------------------------------------------------


def leaving_out(rows: Callable[[Facts], torch.Tensor]) -> None:
    register(
        Mechanism(
            "leaving-out", "a test", options=(Option("out", None, **count("1")),), switches=("out",), present=rows
        )
    )


@EXAMPLES
@given(SHAPES, batches(ragged=True), st.sampled_from([None, True, False]), st.data())
def test_a_full_step_is_eager_on_the_rows_that_are_there(
    shape: Shape, batch: Batch, shift: bool | None, data: st.DataObject
) -> None:
    """Any rows of a batch, with padding that the model's own mask hides: eager is asked with all others hidden."""
    ids = batch.ids()
    drawn = data.draw(st.lists(st.booleans(), min_size=ids.numel(), max_size=ids.numel()), "present")
    present = torch.tensor(drawn).view(ids.shape)
    present[:, batch.prompts[0] // 2] = True  # at least one, which is no padding
    own = batch.extra().get("mask", torch.ones_like(ids))
    present[own.sum(1) == own.shape[1], 0] = True
    leaving_out(lambda _: present)
    model = Model(shape)
    call = fresh(model, cache="dual", refresh_interval=1, out=1, shift=shift)
    some = bool((present & own.bool()).any(1).all())
    for _ in range(2 if some else 0):
        got, want = call(ids, **batch.extra()), model(ids, present.long() * own)
        torch.testing.assert_close(got[present], want[present])
    if some and not bool(present.all()):
        assert dllm_compile.stats(model)["rows"] == {"present": 2 * max(int(present.sum(1).max()), 2)}


def test_rows_that_come_back_are_computed_before_they_are_read() -> None:
    """Every other row of the prompt is there in odd calls only, in which no row rule computes it."""
    leaving_out(lambda facts: facts.response | (facts.call.number % 2 == 1) | (torch.arange(16) % 2 == 0))
    model, ids = Model(SHAPE), start()
    call = fresh(model, cache="dual", out=1)
    call(ids)
    ids[0, PROMPT] = 7
    torch.testing.assert_close(call(ids)[ids == MASK], model(ids)[ids == MASK])
    assert dllm_compile.stats(model)["refreshes"] == {"block": 1, "present": 1}


def test_rows_that_come_into_the_block_are_computed_by_every_layer() -> None:
    """Also where deeper layers skip rows of the block: attention reads no keys that nobody has computed."""
    skipping = {"row_shares": (0.3,), "row_depths": (0.5,), "block_length": BLOCK}
    call = fresh(Model(SHAPE), cache="dual", sliding="constant", refresh_tokens=99, suffix_window=0, **skipping)
    ids = start()
    for number in range(RESPONSE - BLOCK):
        call(ids)
        for keys, *_ in under_way().layers.values():
            assert keys[0, : PROMPT + number + BLOCK].abs().amax((1, 2)).min() > 0, number
        ids = ids.clone()
        ids[0, PROMPT + number] = 7


@pytest.mark.parametrize("name", ["llama", "qwen3-moe", "modernbert", "esm", "llama-cache", "roberta"])
def test_any_model_leaves_rows_out(name: str) -> None:
    """Experts and windows of attention too; what cannot be narrowed computes every row."""
    model, ids = models.build(name, num_hidden_layers=2), start(2)
    leaving_out(lambda facts: ~facts.masked | (facts.masked.cumsum(1) <= 2))
    call = models.compiled_loop(model, cache="dual", refresh_interval=1, out=1)
    mask = (ids != MASK) | ((ids == MASK).cumsum(1) <= 2)
    for _ in range(2):
        got, want = call(input_ids=ids).logits, model(input_ids=ids, attention_mask=mask.long()).logits
        torch.testing.assert_close(got[mask], want[mask], atol=1e-5, rtol=1e-5)
    assert under_way().stats.rows["present"]


def test_it_needs_a_cache_of_blocks() -> None:
    leaving_out(lambda facts: facts.masked)
    with pytest.raises(ValueError, match="'leaving-out' leaves out rows of a cache of blocks; give cache='dual' too"):
        dllm_compile.Options(out=1, prompt_interval=3)
    for beside in ({}, {"prompt_interval": 3}, {"saliency_threshold": 0.9}):
        with pytest.raises(ValueError, match="suffix_window is 4, tokens behind the active block, and there are no bl"):
            dllm_compile.Options(suffix_window=4, **beside)
