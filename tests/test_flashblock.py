"""FlashBlock: each step against a plain model of it, and against the cache that it is a mechanism beside."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Mechanism, Option
from dllm_compile.interface.mechanism import count
from dllm_compile.mechanisms import register, unregister

from . import models, shared
from .flashblock_model import FlashBlock
from .models import MASK, start
from .test_block_cache import filled
from .test_properties import EXAMPLES, SHAPES, Batch, Model, Shape, batches, fresh
from .under_way import under_way

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]
SHAPE = Shape(layers=2, heads=4, groups=2, head_dim=4, seed=3)


def plains(model: Model, batch: Batch, block: int, interval: int | None = None, shift: bool | None = None) -> Any:
    """A plain model for each sequence."""
    ids, extra = batch.ids(), batch.extra()
    hidden = [extra["mask"][row] == 0 if extra else None for row in range(len(ids))]
    return [FlashBlock(model, x, block, interval, shift is not False, hidden[row]) for row, x in enumerate(ids)]


def follow(call: Any, plain: list[FlashBlock], calls: Iterator[torch.Tensor], **extra: Any) -> float:
    """Compare the readable logits of each call; returns how far the plain model came from the exact one."""
    drift = 0.0
    for number, ids in enumerate(calls):
        got = call(ids, **extra)
        exact = plain[0].model(ids, **extra)
        for row, each in enumerate(plain):
            want, at = each.step(ids[row]), each.readable(ids[row])
            if at:
                torch.testing.assert_close(got[row][at], want[at], rtol=0, atol=1e-9, msg=f"call {number}, row {row}")
                drift = max(drift, float((exact[row] - want)[at].abs().max()))
    return drift


@settings(EXAMPLES, max_examples=20)
@given(
    shape=SHAPES,
    batch=batches(ragged=True),
    block=st.integers(2, 9),
    interval=st.sampled_from([None, 1, 2, 3]),
    counts=st.tuples(*[st.integers(1, 3)] * 3),
    shift=st.sampled_from([None, False]),
)
def test_every_step_equals_the_plain_model(
    shape: Shape, batch: Batch, block: int, interval: int | None, counts: tuple[int, ...], shift: bool | None
) -> None:
    """Sequences of a batch are at different blocks, padded on the left, and fill different numbers of tokens."""
    model = Model(shape)
    options = {"method": "flashblock", "block_length": block, "outside_interval": interval, "shift": shift}
    calls = filled(batch.ids(), block, list(counts[: len(batch.prompts)]), batch.seed)
    follow(fresh(model, **options), plains(model, batch, block, interval, shift), calls, **batch.extra())


def test_the_default_lowering() -> None:
    model, batch = Model(SHAPE), Batch([5, 5], [3, 0], 9, 1)
    call = fresh(model, method="flashblock", block_length=4, lowering="inductor")
    plain = plains(model, batch, 4)
    assert follow(call, plain, filled(batch.ids(), 4, [1, 2], 0), **batch.extra()) > 1e-3
    assert plain[0].kinds[:5] == ["full", "outside", "inside", "inside", "full"]
    assert plain[1].kinds[:4] == ["full", "outside", "full", "outside"]
    assert under_way().stats.steps == {"full": 3, "outside": 4, "inside": 2}


def test_what_is_kept_is_of_the_first_partial_step() -> None:
    """The whole plan of one sequence, and that what is kept is a part of the result."""
    model, batch = Model(SHAPE), Batch([5], [0], 8, 1)
    call, plain = fresh(model, method="flashblock", block_length=4), plains(model, batch, 4)
    assert follow(call, plain, filled(batch.ids(), 4, [1], 0)) > 1e-3
    assert plain[0].kinds == ["full", "outside", "inside", "inside"] * 2
    assert under_way().stats.steps == {"full": 2, "outside": 2, "inside": 4}
    contexts, totals = under_way().layers[1][-2:]
    rows = plain[0].outside[1]
    torch.testing.assert_close(contexts[0, :5], rows[0])
    torch.testing.assert_close(totals[0, :5], rows[1])


BESIDE: dict[str, dict[str, Any]] = {
    "dual": {"cache": "dual"},
    "prefix": {"cache": "prefix"},
    "refreshes": {"cache": "dual", "refresh_interval": 3},
    "refreshes of the response": {"cache": "dual", "refresh_interval": 3, "prompt_interval": 5},
    "delay": {"cache": "dual", "delay": 1},
    "decoded": {"cache": "decoded", "refresh_interval": 4},
    "suffix window": {"cache": "dual", "suffix_window": 1},
    "suffix window, prefix": {"cache": "prefix", "suffix_window": 1, "refresh_interval": 3},
    "sliding block": {"method": "dsb", "rows_before": 2},
    "vicinity": {"method": "dinfer", "rows_before": 1, "rows_behind": 2, "warmup_steps": 1},
    "keys": {"cache": "dual", "seen": 3},
    "rows": {"cache": "dual", "some": 3},
}


@pytest.fixture
def _others() -> Iterator[None]:
    """Mechanisms that hide keys, another number of them at each step, and narrow rows."""
    register(
        Mechanism(
            "test-keys",
            "a test",
            options=(Option("seen", None, **count("2")),),
            switches=("seen",),
            visible=lambda facts: ~facts.masked | (facts.masked.cumsum(1) <= facts.options.seen),
        )
    )
    register(
        Mechanism(
            "test-rows",
            "a test",
            options=(Option("some", None, **count("2")),),
            switches=("some",),
            narrows=lambda facts: (facts.masked & (facts.masked.cumsum(1) <= facts.options.some)) | facts.call.filled,
        )
    )
    yield
    unregister("test-keys")
    unregister("test-rows")


@pytest.mark.usefixtures("_others")
@pytest.mark.parametrize("beside", BESIDE.values(), ids=BESIDE)
def test_computed_at_every_step_it_changes_nothing(beside: dict[str, Any]) -> None:
    """Attention in two parts is attention: to rounding, each step is that of the cache alone."""
    model = Model(SHAPE)
    calls = list(filled(start(7, 8, 2), 4, [1, 2], 0))
    block = {} if beside.get("cache") == "decoded" else {"block_length": 4}
    runs = []
    for more in ({}, {"keep_outside": True, "outside_interval": 1}):
        call = fresh(model, **beside, **block, **more)
        runs.append([call(ids).clone() for ids in calls])
    assert "outside" in under_way().stats.steps
    for ids, a, b in zip(calls, *runs, strict=True):
        torch.testing.assert_close(a[ids == MASK], b[ids == MASK], rtol=0, atol=1e-9)


@pytest.mark.usefixtures("_others")
@pytest.mark.parametrize("beside", [{"seen": 3}, {"some": 3}], ids=str)
def test_what_is_kept_is_not_used_for_other_keys_or_rows(beside: dict[str, Any]) -> None:
    """Every step hides other keys, or computes other rows: each computes attention over those outside anew."""
    model = Model(SHAPE)
    calls = list(filled(start(7, 8, 1), 8, [1], 0))
    got, want = (fresh(model, cache="dual", **beside, **more) for more in ({"keep_outside": True}, {}))
    for ids in calls:
        a = got(ids)
    steps = dict(under_way().stats.steps)
    assert ("inside" in steps) == ("seen" in beside)  # at the last steps all masks are visible
    for ids in calls:
        b = want(ids)
    torch.testing.assert_close(a[calls[-1] == MASK], b[calls[-1] == MASK], rtol=0, atol=1e-9 if "some" in beside else 9)


def test_an_edit_outside_is_seen_at_once() -> None:
    warnings.filterwarnings("ignore", "dllm: this loop writes other tokens")
    model, ids = Model(SHAPE), start(6, 8, 2)
    call = fresh(model, method="flashblock", block_length=4)
    plain = [FlashBlock(model, x, 4) for x in ids]
    for number in range(8):
        edited = number == 6
        if edited:
            ids[0, 10] = 9  # a filled token of the block: computed at every step
            ids[1, 7] = 9  # of the block before: the sequence refreshes
        got = call(ids)
        for row in range(2):
            want, at = plain[row].step(ids[row], edited and row == 1), plain[row].readable(ids[row])
            torch.testing.assert_close(got[row][at], want[at], rtol=0, atol=1e-9)
        for row in range(2):
            ids[row, (ids[row] == MASK).nonzero()[0, 0]] = 10 + number
    assert plain[0].kinds == ["full", "outside", "inside", "inside"] * 2
    assert plain[1].kinds == ["full", "outside", "inside", "inside", "full", "outside", "full", "outside"]


def test_the_same_ids_again_cost_nothing() -> None:
    model, calls = Model(SHAPE), list(filled(start(6, 8, 1), 4, [1], 0))
    call, once = (fresh(model, method="flashblock", block_length=4) for _ in range(2))
    twice = [call(each).clone() for ids in calls for each in (ids, ids)]
    assert under_way().stats.steps == {"full": 2, "outside": 2, "inside": 4, "repeat": 8}
    for number, ids in enumerate(calls):
        want = once(ids)
        assert torch.equal(twice[2 * number], twice[2 * number + 1])
        torch.testing.assert_close(twice[2 * number][ids == MASK], want[ids == MASK], rtol=0, atol=1e-9)


def test_a_smaller_batch_and_a_new_sequence_go_on() -> None:
    """One sequence ends and is left out; another is replaced by a new one."""
    model, ids = Model(SHAPE), start(5, 6, 3)
    call, plain = fresh(model, method="flashblock", block_length=3), [FlashBlock(model, x, 3) for x in ids]

    def compare() -> None:
        got = call(ids)
        for row, each in enumerate(plain):
            want, at = each.step(ids[row]), each.readable(ids[row])
            torch.testing.assert_close(got[row][at], want[at], rtol=0, atol=1e-9)

    def fill() -> torch.Tensor:
        new = ids.clone()
        for x in new:
            x[(x == MASK).nonzero()[0, 0]] = 11
        return new

    for _ in range(2):
        compare()
        ids = fill()
    ids, plain = ids[[0, 2]], [plain[0], plain[2]]
    compare()
    ids = fill()
    ids[1] = start(5, 6, 1, 8)[0]
    plain[1] = FlashBlock(model, ids[1], 3)
    for _ in range(2):
        compare()
        ids = fill()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    """Of one block, at every step near the same in float64."""
    single = Model(SHAPE).to(dtype)
    double = Model(SHAPE)
    double.load_state_dict(single.state_dict())
    single.register_buffer("rates", double.get_buffer("rates").to(dtype))
    double.register_buffer("rates", single.get_buffer("rates").double())
    calls = list(filled(start(6, 8, 2), 8, [1, 1], 0))
    got, want = (
        [call(ids).clone() for ids in calls] for call in (fresh(each, method="flashblock") for each in (single, double))
    )
    for ids, a, b in zip(calls, got, want, strict=True):
        masked = ids == MASK
        scale = float(b[masked].abs().max())
        assert (a[masked].double() - b[masked]).abs().max() < 40 * torch.finfo(dtype).eps * scale


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_models_of_transformers_equal_the_cache_where_nothing_is_kept_for_long(name: str) -> None:
    """Grouped heads, a mask that pads, and rows that are shifted."""
    model = models.build(name)
    calls = list(filled(start(7, 8, 2), 4, [1, 2], 0))
    mask = torch.ones_like(calls[0])
    mask[0, :3] = 0
    runs = []
    for more in ({"cache": "dual"}, {"method": "flashblock", "outside_interval": 1}):
        call = fresh(model, block_length=4, **more)
        runs.append([call(ids, attention_mask=mask).logits.clone() for ids in calls])
    for ids, a, b in zip(calls, *runs, strict=True):
        torch.testing.assert_close(a[ids == MASK], b[ids == MASK], rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"keep_outside": True}, "and cache is 'none'; give cache='dual' too"),
        ({"method": "flashblock", "keep_ratio": 0.5}, "keep_ratio reads all keys that are left at every step"),
        ({"method": "flashblock", "saliency_threshold": 0.9}, "saliency_threshold reads all keys that are left"),
        ({"cache": "dual", "outside_interval": 2}, "give keep_outside=True too"),
        ({"method": "flashblock", "outside_interval": 0}, "give a whole number of at least 1"),
    ],
    ids=str,
)
def test_what_has_no_meaning_is_refused(given: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        dllm_compile.Options.of(given)


@pytest.mark.parametrize("interval", [None, 1])
def test_generate_with_a_threshold(interval: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is kept goes with any number of tokens a call; where it is kept for no step, the tokens are the cache's."""
    if interval == 1:  # the other is traced as generate does it
        shared.steps_of_generate(monkeypatch)
    model, prompt = models.build("llama"), start(7, 1, 2)[:, :7]
    more: dict[str, Any] = {"gen_length": 16, "block_length": 8, "threshold": 0.5, "lowering": "eager", "mask_id": MASK}
    dual = dllm_compile.generate(model, prompt, method="fast-dllm", cache="dual", **more)
    dllm_compile.reset()
    got = dllm_compile.generate(model, prompt, method="flashblock", outside_interval=interval, **more)
    assert not bool((got == MASK).any())
    if interval == 1:
        assert torch.equal(got, dual)
    assert ("inside" in dllm_compile.stats(model)["steps"]) == (interval is None)
