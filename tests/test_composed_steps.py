"""Mechanisms together, each step against the same transformer with its state kept by hand."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from dllm_compile.runtime.ids import readable_rows

from .composed import ByHand
from .models import MASK, start
from .test_block_cache import Further, filled
from .test_properties import Model, Shape, fresh
from .under_way import UnderWay, under_way

pytestmark = pytest.mark.shares_graphs

PROMPT, RESPONSE, BLOCK, RATIO = 7, 8, 4, 0.5
TOKENS = PROMPT + RESPONSE
SHAPE = Shape(layers=2, heads=4, groups=2, head_dim=4, seed=11)
RESPONDING = range(PROMPT, TOKENS)
DUAL: dict[str, Any] = {"cache": "dual", "block_length": BLOCK}
KEEP: dict[str, Any] = {"keep_ratio": RATIO, "kernel_size": None}  # pooling makes ties, whose order may differ


@pytest.fixture(autouse=True)
def _no_gradients_no_warnings() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: this loop puts masks back")
        yield


def session() -> UnderWay:
    """The one that has just been called."""
    return under_way()


def block_of(ids: torch.Tensor) -> list[int]:
    """Positions of the first block with masks."""
    first = int((ids == MASK).nonzero()[0, 0])
    begin = first - (first - PROMPT) % BLOCK
    return list(range(begin, begin + BLOCK))


def freed(seed: int = 0) -> list[torch.Tensor]:
    """Ids ``[1, S]`` of the calls of a loop that fills one token a step, block by block."""
    return list(filled(start(PROMPT, RESPONSE, 1), BLOCK, [1], seed))


def changed(calls: list[torch.Tensor], number: int) -> list[int]:
    """Rows that hold another token than at the call before."""
    rows: list[int] = (calls[number] != calls[number - 1])[0].nonzero()[:, 0].tolist()
    return rows


def run(calls: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    """Logits ``[S, V]`` of each call."""
    call = fresh(Model(replace(SHAPE, layers=3)), **options)
    return [call(ids)[0].clone() for ids in calls]


def readable(ids: torch.Tensor, shift: bool | None = None, inside: bool = True) -> torch.Tensor:
    """``[S]`` bool: rows that a sampler can read; those of other blocks are read by none."""
    masked = ids == MASK
    if inside:
        masked[:, block_of(ids[0])[-1] + 1 :] = False
    return readable_rows(masked, shift)[0]


def apart(got: torch.Tensor, want: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest difference of these rows."""
    return float((got - want)[rows].abs().max())


def follows(
    calls: list[torch.Tensor], step: Callable[[ByHand, int, torch.Tensor], None], **options: Any
) -> dict[str, int]:
    """Compare each call with what ``step`` does by hand; it is told the number of the call and the ids ``[S]``.

    Returns:
        Steps by variant.
    """
    by_hand, model = ByHand(Model(SHAPE), TOKENS), Model(SHAPE)
    call, shift, drift = fresh(model, **options), options.get("shift"), 0.0
    for number, ids in enumerate(calls):
        got = call(ids)[0]
        step(by_hand, number, ids[0])
        rows = readable(ids, shift, inside="cache" in options and options["cache"] != "decoded")
        assert apart(got, by_hand.logits, rows) < 1e-9, number
        drift = max(drift, apart(got, model(ids)[0], rows))
    assert drift > 1e-4  # else the reference shows nothing
    return dict(session().stats.steps)


# -- kept entries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{}, {"shift": False}, {"refresh_interval": 2}, {"cache": "prefix"}], ids=str)
def test_keeping_every_entry_at_once_is_the_cache_alone(more: dict[str, Any]) -> None:
    calls = freed()
    got = run(calls, **{**DUAL, "keep_ratio": 1.0, "delay": 0, **more})
    want = run(calls, **{**DUAL, **more})
    for ids, a, b in zip(calls, got, want, strict=True):
        assert apart(a, b, readable(ids, more.get("shift"))) < 1e-9


@pytest.mark.parametrize(
    ("prompt", "response", "same", "share"), [(4, 2, 4, 0.5), (3, 1, 3, 0.0), (3, 2, 3, 0.05), (3, 2, 3, 0.5)]
)
def test_keeping_every_entry_of_the_prompt_is_the_intervals_alone(
    prompt: int, response: int, same: int, share: float
) -> None:
    """From a step at which both are due to one at which the prompt alone is: eviction refreshes both."""
    calls = freed()
    intervals = {"prompt_interval": prompt, "response_interval": response, "transfer_ratio": share}
    got, want = run(calls, **intervals, keep_ratio=1.0), run(calls, **intervals)
    for number, (ids, a, b) in enumerate(zip(calls, got, want, strict=True)):
        near = apart(a, b, (ids == MASK)[0]) < 1e-9
        assert near == (number % math.lcm(prompt, response) < same)


def test_prompt_entries_are_chosen_at_each_refresh_of_the_prompt() -> None:
    """The response is computed at each step over its own keys and those of the prompt that were kept."""
    calls, chosen = freed(), []

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        if number % 3 == 0:
            by_hand.full(ids)
            by_hand.evict(RESPONDING, RESPONDING, RATIO)
            by_hand.seen[0][:] = True  # the first layer is always full
        else:
            by_hand.compute(ids, RESPONDING, first_full=True)
        kept = [layer[-1][0].tolist() for layer in session().layers.values()]
        for positions, seen in zip(kept, by_hand.seen[1:], strict=True):
            most = int(PROMPT * RATIO)
            assert sorted(positions[:most]) == [i for i in range(PROMPT) if seen[i]]
            assert positions[most:] == list(RESPONDING)
        chosen.append([sorted(positions) for positions in kept])

    call, by_hand = fresh(Model(SHAPE), prompt_interval=3, response_interval=1, **KEEP), ByHand(Model(SHAPE), TOKENS)
    for number, ids in enumerate(calls):
        got = call(ids)[0]
        step(by_hand, number, ids[0])
        assert apart(got, by_hand.logits, (ids == MASK)[0]) < 1e-9, number
    assert chosen[0] == chosen[1] == chosen[2]
    assert chosen[3] == chosen[4] == chosen[5]
    assert chosen[0] != chosen[3]


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("shift", [False, None])
def test_decoded_rows_beside_kept_entries(delay: int, shift: bool | None) -> None:
    """What no later step computes is what was decoded before the step that chooses, and the prompt."""
    calls = freed(3)

    def rows(ids: torch.Tensor, number: int) -> list[int]:
        return sorted({i for i in RESPONDING if ids[i] == MASK} | set(changed(calls, number) if number else []))

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        since = number % 5  # steps since a refresh began
        if since > delay:
            unknown = rows(ids, number)
            before = {i - 1 for i in unknown} - {*unknown} if shift is None else set[int]()
            by_hand.compute(ids, sorted({*unknown, *before}), sorted(before))
            return
        by_hand.full(ids)
        if since == delay:
            by_hand.evict(RESPONDING, rows(ids, number), RATIO)
            kept = int((TOKENS - len(rows(ids, number))) * RATIO)
            assert session().step is not None
            assert session().step.sizes["kept"] == max(kept, 2)  # type: ignore[union-attr]

    follows(calls, step, cache="decoded", delay=delay, refresh_interval=5, shift=shift, **KEEP)


# -- saliency ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cache", "bound", "shift"),
    [
        ("dual", 0.9, None),
        ("dual", 0.999, False),
        ("dual", 1.0, None),
        ("dual", -1.0, False),
        ("prefix", 0.9, False),
        ("prefix", 1.0, None),
    ],
)
def test_salient_rows_of_a_block(cache: str, bound: float, shift: bool | None) -> None:
    calls = freed()
    block: list[int] = []
    sizes = []

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        rows = block_of(ids)
        if rows != block:
            block[:] = rows
            by_hand.full(ids)
            return
        written = list(range(rows[0], TOKENS)) if cache == "prefix" else rows
        before = [] if shift is False else [rows[0] - 1]
        outside = [i for i in range(TOKENS) if i not in written]
        old = [keys[outside].clone() for keys in by_hand.keys]
        by_hand.compute(ids, [*before, *written], before, changed(calls, number), bound)
        assert all(torch.equal(a, b[outside]) for a, b in zip(old, by_hand.keys, strict=True))
        assert all(before == [i for i in layer if i not in written] for layer in by_hand.salient)
        assert all(set(layer) <= {*before, *written} for layer in by_hand.salient)
        sizes.append(sum(map(len, by_hand.salient[1:])))

    options = {"cache": cache, "block_length": BLOCK, "saliency_threshold": bound, "full_steps": 1, "shift": shift}
    assert follows(calls, step, **options) == {"full": 2, "salient": 6}
    most = {"dual": 6 * 4, "prefix": 3 * 8 + 3 * 4}[cache] + 6 * (shift is None)
    assert (sum(sizes) == SHAPE.layers * most) == (bound == 1.0)
    assert (sum(sizes) == (6 * SHAPE.layers if shift is None else 0)) == (bound == -1.0)


def test_with_every_token_new_and_every_row_salient_a_block_is_computed_as_without() -> None:
    calls: list[torch.Tensor] = []
    for number in range(5):  # the mask goes round, so that each token of the block changes at each call
        calls.append(start(PROMPT, RESPONSE, 1) if not calls else calls[-1].clone())
        calls[-1][0, PROMPT : PROMPT + BLOCK] = torch.arange(BLOCK) * 7 + 3 + number
        calls[-1][0, PROMPT + number % BLOCK] = MASK
    calls.insert(0, start(PROMPT, RESPONSE, 1))  # what is masked here is the response
    options = {**DUAL, "shift": False, "delay": 1}
    got = run(calls, **options, saliency_threshold=1.0, full_steps=2)
    want = run(calls, **options)
    for ids, a, b in zip(calls, got, want, strict=True):
        assert apart(a, b, readable(ids, False)) < 1e-9


@pytest.mark.parametrize(
    "more", [{}, {"cache": "prefix"}, {"saliency_threshold": 0.99}, {"saliency_threshold": 1.0}], ids=str
)
def test_the_same_tokens_right_after_a_full_step_give_the_same_logits(more: dict[str, Any]) -> None:
    """Although they are computed again: an input that belongs to no sequence has another value."""
    call = fresh(Further(SHAPE), **{**DUAL, **({"full_steps": 1} if "saliency_threshold" in more else {}), **more})
    ids = start(PROMPT, RESPONSE, 1)
    first = call(ids, number=torch.tensor(1.0)).clone()
    for number in (2.0, 3.0):
        again = call(ids, number=torch.tensor(number))
        assert apart(again[0], first[0], readable(ids)) < 1e-9
    assert "repeat" not in session().stats.steps
    assert session().stats.steps["salient" if "saliency_threshold" in more else "block"] == 2


@pytest.mark.parametrize("bound", [0.99, 1.0])
@pytest.mark.parametrize("delay", [0, 1])
def test_saliency_begins_anew_on_the_entries_that_eviction_leaves(delay: int, bound: float) -> None:
    calls = freed(1)
    options = {**DUAL, **KEEP, "delay": delay}

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        rows, since = block_of(ids), number % BLOCK
        if since <= delay:
            by_hand.full(ids)
            if since == delay:
                by_hand.evict(rows, rows, RATIO)
            return
        exact = since == delay + 1  # contexts kept before are those of all keys
        by_hand.compute(ids, [rows[0] - 1, *rows], [rows[0] - 1], None if exact else changed(calls, number), bound)

    follows(calls, step, **options, saliency_threshold=bound, full_steps=1)
    both, alone = run(calls, **options, saliency_threshold=bound, full_steps=1), run(calls, **options)
    for number, (ids, a, b) in enumerate(zip(calls, both, alone, strict=True)):
        assert (apart(a, b, readable(ids)) < 1e-9) == (number % BLOCK <= delay + 1)


# -- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "response", "cache"),
    [(99, None, "dual"), (None, 2, "dual"), (5, None, "prefix"), (6, 3, "dual"), (3, 1, "prefix"), (5, 3, "prefix")],
)
def test_a_block_begins_on_the_cached_prompt(prompt: int | None, response: int | None, cache: str) -> None:
    """Where an interval keeps the prompt, the response alone is computed anew."""
    calls = freed(2)

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        rows, begins = block_of(ids), number % BLOCK == 0
        respond = response is not None and number % response == 0
        if number == 0 or (prompt is None and begins) or (prompt is not None and number % prompt == 0):
            by_hand.full(ids)
        elif begins or respond:
            by_hand.compute(ids, [PROMPT - 1, *RESPONDING], [PROMPT - 1])
        else:
            written = list(range(rows[0], TOKENS)) if cache == "prefix" else rows
            by_hand.compute(ids, [rows[0] - 1, *written], [rows[0] - 1])

    more = {"prompt_interval": prompt, "response_interval": response}
    follows(calls, step, cache=cache, block_length=BLOCK, **more)


@pytest.mark.parametrize("bound", [0.99, 1.0])
def test_intervals_refresh_what_saliency_left_behind(bound: float) -> None:
    calls = freed(4)

    def step(by_hand: ByHand, number: int, ids: torch.Tensor) -> None:
        whole = number < 4 or number % 4 == 3  # then the prompt is computed, too
        rows = range(TOKENS) if whole else RESPONDING
        if number % 5 == 0:
            by_hand.full(ids)
        elif number % 3 == 0:
            by_hand.compute(ids, rows)
        else:
            by_hand.compute(ids, rows, (), changed(calls, number), bound)

    intervals = {"prompt_interval": 5, "response_interval": 3}
    follows(calls, step, **intervals, saliency_threshold=bound, full_steps=1, shift=False)
