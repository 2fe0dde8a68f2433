"""A block that slides (DSB) and a window around the block (dInfer), against a plain model and beside the rest."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Options
from dllm_compile.debug import Ran, steps
from dllm_compile.interface.blocks import Masks
from dllm_compile.mechanisms import find_block
from dllm_compile.passes.sliding_block import sliding_block
from dllm_compile.runtime import unit_code
from dllm_compile.sampler.progress import Progress
from dllm_compile.sampler.settings import Settings

from . import callers, dsb_model, models, shared
from .callers import TOLERANCE, off
from .models import MASK

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]

PROMPT, RESPONSE = 9, 21
DSB: dict[str, Any] = {"method": "dsb", "block_length": 6, "rows_before": 4}


def llama() -> Any:
    """Sure enough that a step fills several tokens, and never of a mask."""
    model: Any = models.build("llama", num_hidden_layers=2)
    weight = model.lm_head.weight
    model.lm_head = torch.nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype)
    model.lm_head.weight.data = 3 * weight.data
    model.lm_head.bias.data = torch.where(torch.arange(len(weight)) == MASK, -100.0, 0.0).double()
    return model


def start(batch: int = 1, seed: int = 1, prompt: int = PROMPT, response: int = RESPONSE) -> torch.Tensor:
    return models.start(prompt, response, batch, seed)


def rows_of(ran: Ran, tokens: int) -> torch.Tensor:
    """Which rows ``[tokens]`` bool a step of one sequence computed."""
    if "active" not in ran.rows:
        return torch.ones(tokens, dtype=torch.bool)
    return torch.zeros(tokens + 1, dtype=torch.bool).index_fill(0, ran.rows["active"][0], True)[:-1]


# -- the plain model -------------------------------------------------------------------------------------------------

PLAIN = [
    {"block": 6, "window": 4, "threshold": 0.7},
    {"block": 6, "window": 0, "threshold": 0.5},
    {"block": 4, "window": 40, "threshold": 0.5},
    {"block": 5, "window": 2, "constant": True},
    {"block": 1, "window": 3},
    {"block": 64, "window": 3, "threshold": 0.7},
]


def as_options(how: dict[str, Any]) -> dict[str, Any]:
    sliding = "constant" if how.get("constant") else "greedy"
    return {"method": "dsb", "sliding": sliding, "block_length": how["block"], "rows_before": how["window"]}


@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize("how", PLAIN, ids=str)
def test_generate_repeats_the_plain_model_step_by_step(how: dict[str, Any]) -> None:
    model, ids = llama(), start()
    plain = list(dsb_model.sample_dsb(model, ids[0], MASK, prompt=PROMPT, **how))
    with steps() as ran:
        out = dllm_compile.generate(
            model,
            ids[:, :PROMPT],
            gen_length=RESPONSE,
            mask_id=MASK,
            shift=False,
            threshold=how.get("threshold", 0.9),
            output_history=True,
            lowering="eager",
            **as_options(how),
        )
    assert out.nfe == len(plain) == len(ran)
    assert len(plain) < RESPONSE or how["block"] == 1
    for number, (step, mine) in enumerate(zip(plain, ran, strict=True)):
        assert torch.equal(rows_of(mine, ids.shape[1]), step.run), f"rows of step {number}"
        assert torch.equal(out.history[number + 1, 0], step.ids), f"tokens after step {number}"
    assert how["block"] == 1 or not all(step.run.all() for step in plain)


@pytest.mark.parametrize("how", PLAIN, ids=str)
def test_the_logits_of_each_step_are_those_of_the_plain_model(how: dict[str, Any]) -> None:
    """In a loop of one's own: the rows follow the ids."""
    model, x, worst = llama(), start(), 0.0
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, **as_options(how))
    with dllm_compile.loop():
        for step in dsb_model.sample_dsb(model, x[0], MASK, prompt=PROMPT, **how):
            got, want = call(x).logits[0], torch.zeros(x.shape[1], models.VOCABULARY, dtype=torch.float64)
            want[step.run] = step.logits
            assert off(got, want, step.run & (x[0] == MASK)) < TOLERANCE
            worst = max(worst, off(got, model(x).logits[0], step.run & (x[0] == MASK)))
            x = step.ids.unsqueeze(0)
    assert worst > 1e-3 or how["block"] == 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_the_greedy_block_is_as_long_as_the_authors_count(data: st.DataObject) -> None:
    """Of ``d`` tokens filled in it, it ends ``block + d`` behind the prompt: where its number of masks does."""
    prompt, response, block = (data.draw(st.integers(low, 12)) for low in (0, 1, 1))
    tokens, masked, end = prompt + response, torch.arange(prompt + response) >= prompt, min(prompt + block, 99)
    first = masked.clone()
    while masked.any():
        at = masked.nonzero()[:, 0].tolist()
        told = Masks(masked[None], first[None], block, Options(sliding="greedy"))
        want = (torch.arange(tokens) >= at[0]) & (torch.arange(tokens) < end)
        assert torch.equal(sliding_block(told)[0], want)
        inside = [i for i in at if i < end]
        masked[data.draw(st.lists(st.sampled_from(inside), min_size=1, unique=True))] = False
        end = prompt + block + int((first & ~masked).sum())


# -- windows ---------------------------------------------------------------------------------------------------------


def test_no_window_around_fixed_blocks_is_the_dual_cache() -> None:
    model, calls = llama(), loop_in_blocks(start(2))
    dual = shared.compiled(model, lowering="eager", mask_id=MASK, cache="dual", block_length=7)
    none = {"rows_before": 0, "rows_behind": 0, "warmup_steps": 0}
    other = shared.compiled(model, lowering="eager", mask_id=MASK, cache="dual", block_length=7, **none)
    want = run(dual, calls)
    dllm_compile.reset()
    for got, wanted in zip(run(other, calls), want, strict=True):
        assert torch.equal(got, wanted)


def loop_in_blocks(ids: torch.Tensor, block: int = 7, seed: int = 0) -> list[torch.Tensor]:
    """Calls of a loop that fills two tokens a step, of each block in turn."""
    generator, x, calls = torch.Generator().manual_seed(seed), ids.clone(), []
    while (x == MASK).any():
        calls.append(x.clone())
        for row in x:
            at = (row == MASK).nonzero()[:, 0]
            at = at[(at - PROMPT) // block == (at[0] - PROMPT) // block]
            chosen = at[torch.randperm(len(at), generator=generator)[:2]]
            row[chosen] = torch.randint(8, MASK, (len(chosen),), generator=generator)
    return calls


def run(call: Any, calls: list[torch.Tensor]) -> list[torch.Tensor]:
    with dllm_compile.loop():
        return [call(x).logits.clone() for x in calls]


@pytest.mark.parametrize(
    ("window", "rows"),
    [
        ({"rows_before": 3}, lambda s, e: (s - 3, e)),
        ({"rows_behind": 4}, lambda s, e: (s, e + 4)),
        ({"rows_before": 100, "rows_behind": 100}, lambda s, e: (0, PROMPT + RESPONSE)),
        ({"cache": "prefix", "rows_before": 2}, lambda s, e: (s - 2, PROMPT + RESPONSE)),
    ],
    ids=["before", "behind", "all", "prefix"],
)
def test_a_window_of_rows_is_computed_beside_the_block(window: dict[str, Any], rows: Any) -> None:
    model, calls = llama(), loop_in_blocks(start())
    call = shared.compiled(
        model, lowering="eager", mask_id=MASK, shift=False, **{"cache": "dual", "block_length": 7, **window}
    )
    with steps() as ran:
        run(call, calls)
    partial = [(x, step) for x, step in zip(calls, ran, strict=True) if "active" in step.rows]
    assert len(partial) >= 6
    for x, step in partial:
        begin = PROMPT + 7 * ((int((x[0] == MASK).long().argmax()) - PROMPT) // 7)
        first, end = rows(begin, begin + 7)
        place = torch.arange(x.shape[1])
        assert torch.equal(rows_of(step, x.shape[1]), (place >= first) & (place < end))


def test_the_first_steps_of_a_sequence_are_full() -> None:
    model, calls = llama(), loop_in_blocks(start())
    call = shared.compiled(
        model, lowering="eager", mask_id=MASK, method="dinfer", block_length=7, warmup_steps=2, shift=False
    )
    with steps() as ran:
        run(call, calls)
    full = [step.name == "full" for step in ran]
    assert full[:4] == [True, True, True, False]
    assert dllm_compile.stats(model)["refreshes"] == {"block": 3, "vicinity": 2}


def test_a_new_sequence_of_a_batch_is_warmed_up_alone() -> None:
    model, x = llama(), start(2)
    call = shared.compiled(model, lowering="eager", mask_id=MASK, cache="dual", warmup_steps=2, shift=False)
    begun = start(1, seed=5)
    wide: list[list[int]] = []
    with dllm_compile.loop(), steps() as ran:
        for number in range(8):
            x = callers.fill(call(x).logits, x)
            if number == 4:
                x[1] = begun
    for step in ran:
        rows = step.rows.get("active")
        wide.append([x.shape[1]] * 2 if rows is None else [int((row < x.shape[1]).sum()) for row in rows])
    first, second = ([count == x.shape[1] for count in each] for each in zip(*wide, strict=True))
    assert first == [True] * 3 + [False] * 5
    assert sum(second) == 6


# -- beside the rest -------------------------------------------------------------------------------------------------

BESIDE: list[dict[str, Any]] = [
    {},
    {"shift": True},
    {"rows_behind": 3, "refresh_tokens": 4},
    {"refresh_interval": 3, "sliding": "constant"},
    {"cache": "prefix", "method": None},
    {"cache": "decoded", "method": None, "delay": 0},
    {"keep_ratio": 0.5, "shift": True},
    {"keep_ratio": 0.3, "sliding": "constant", "rows_behind": 2},
    {"saliency_threshold": 0.9, "full_steps": 1},
    {"keep_ratio": 0.5, "saliency_threshold": 0.9, "full_steps": 1},
    {"prompt_interval": 3},
]


def sliding_loop(ids: torch.Tensor, sliding: str, block: int, seed: int = 0) -> list[torch.Tensor]:
    """Calls of a loop that fills one or two tokens a step, within the block."""
    generator, x, calls, options = torch.Generator().manual_seed(seed), ids.clone(), [], Options(sliding=sliding)
    while (x == MASK).any():
        calls.append(x.clone())
        inside = sliding_block(Masks(x == MASK, ids == MASK, block, options)) & (x == MASK)
        for row, candidates in zip(x, inside, strict=True):
            at = candidates.nonzero()[:, 0]
            chosen = at[
                torch.randperm(len(at), generator=generator)[: int(torch.randint(1, 3, (), generator=generator))]
            ]
            row[chosen] = torch.randint(8, MASK, (len(chosen),), generator=generator)
    return calls


@pytest.mark.parametrize("more", BESIDE, ids=str)
def test_it_goes_with_other_mechanisms_and_a_batch_is_its_sequences(more: dict[str, Any]) -> None:
    options = {"shift": False, **DSB, "sliding": "greedy", **more}
    options = {name: value for name, value in options.items() if value is not None}
    model, calls = llama(), sliding_loop(start(2), options["sliding"], DSB["block_length"])
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **options)
    together = run(call, calls)
    stats = dllm_compile.stats(model)
    assert sum(count for name, count in stats["steps"].items() if name not in ("full", "evict")) >= 4
    assert "edit" not in stats["refreshes"]  # no row came as a surprise
    for row in range(0 if "keep_ratio" in more else 2):  # with it, sequences refresh together
        dllm_compile.reset()
        for x, got, want in zip(calls, run(call, [x[row : row + 1] for x in calls]), together, strict=True):
            masked = x[row] == MASK
            assert not masked.any() or off(got[0], want[row], masked) < TOLERANCE


@pytest.mark.usefixtures("generate_shares_graphs")
def test_evicting_nothing_is_dsb() -> None:
    model, ids = llama(), start()
    common = {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "lowering": "eager", "threshold": 0.6}
    plain = dllm_compile.generate(model, ids[:, :PROMPT], output_history=True, **common, **DSB)
    kept = dllm_compile.generate(
        model, ids[:, :PROMPT], output_history=True, **common, **DSB, keep_ratio=1.0, kernel_size=None, delay=0
    )
    assert torch.equal(plain.history, kept.history)


def test_it_runs_the_code_that_a_cache_of_fixed_blocks_made() -> None:
    """What Inductor makes of that is seen in ``test_block_cache`` and ``test_drafts``."""
    model, ids, made = llama(), start(), list[str]()
    common = {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "threshold": 0.6, "lowering": "eager"}
    unit_code.LISTENERS.append(made.append)
    try:
        dllm_compile.generate(model, ids[:, :PROMPT], **common, cache="dual", block_length=7)
        assert {"full", "block", "head"} <= {*made}
        made.clear()
        for sliding in ("greedy", "constant"):
            dllm_compile.generate(model, ids[:, :PROMPT], **common, **{**DSB, "sliding": sliding})
    finally:
        unit_code.LISTENERS.remove(made.append)
    assert made == []
    assert dllm_compile.stats(model)["refreshes"]["sliding-block"]


def test_a_loop_in_fixed_blocks_is_served_without_surprise() -> None:
    model, calls = llama(), loop_in_blocks(start(2), block=6)
    run(shared.compiled(model, lowering="eager", mask_id=MASK, **DSB), calls)
    assert dllm_compile.stats(model)["refreshes"].keys() <= {"block", "sliding-block"}


def test_a_loop_without_blocks_is_told_and_has_current_logits() -> None:
    model, x = llama(), start()
    call = shared.compiled(model, lowering="eager", mask_id=MASK, shift=False, **DSB)
    with dllm_compile.loop(), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        call(x)
        x[0, -1] = 9
        assert off(call(x).logits, model(x).logits, x == MASK) < TOLERANCE
        x[0, -3] = 9
        call(x)
    assert len([each for each in said if "outside of the active block of 6" in str(each.message)]) == 1
    assert dllm_compile.stats(model)["rows"]["block"] == RESPONSE + DSB["rows_before"]


# -- the sampler -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize(
    "more", [{"sliding": "greedy", "threshold": 0.9}, {"sliding": "constant", "steps": 7, "schedule": "time"}], ids=str
)
def test_generate_writes_into_the_block_alone_until_all_is_filled(more: dict[str, Any]) -> None:
    """Without a cache as well, in lengths that are no multiple of the block."""
    model, ids = llama(), start(2)
    common = {"gen_length": RESPONSE, "block_length": 4, "mask_id": MASK, "shift": False, "lowering": "eager"}
    out = dllm_compile.generate(model, ids[:, :PROMPT], **common, output_history=True, **more)
    options = Options(sliding=more["sliding"])
    for before, after in zip(out.history[:-1], out.history[1:], strict=True):
        inside = sliding_block(Masks(before == MASK, ids == MASK, 4, options))
        assert not ((before != after) & ~inside).any()
        assert (before != after).any()
    assert not (out.sequences == MASK).any()


def writes(settings: Settings, tokens: int) -> Iterator[int]:
    """How many tokens each step may write, where it writes the last of its candidates."""
    progress, masked = Progress(settings, (1, tokens), shift=False), torch.ones(1, tokens, dtype=torch.bool)
    while (writable := progress.writable(masked)) is not None:
        assert writable.count is not None
        count = int(writable.count)
        at = writable.candidates[0].nonzero()[:, 0]
        masked[0, at[len(at) - count :]] = False
        yield count


def test_what_a_block_has_no_room_for_is_written_behind_the_planned_steps() -> None:
    find = find_block(Options(sliding="constant"))
    assert list(writes(Settings(gen_length=10, block_length=3, steps=4, block=find), 10)) == [3, 3, 2, 1, 1]
    assert list(writes(Settings(gen_length=10, block_length=4, steps=4, block=find), 10)) == [3, 1, 2, 2, 2]
    assert list(writes(Settings(gen_length=10, block_length=1, steps=2, block=find), 10)) == [1] * 10


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"sliding": "both"}, 'sliding is \'both\'; give "greedy" or "constant"'),
        ({"sliding": "greedy", "refresh_tokens": 3}, "refresh_tokens is 3, but no mechanism reads it; give sliding="),
        ({"cache": "dual", "refresh_tokens": 3}, "refresh_tokens is 3, but no mechanism reads it; give sliding="),
        ({"rows_before": 3}, "the mechanism 'vicinity' widens the rows of a cache of blocks; give cache='dual' too"),
    ],
    ids=str,
)
def test_what_nothing_reads_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        Options(**options)
    assert str(caught.value).startswith(said)


def test_a_loop_of_ones_own_without_a_cache_has_no_use_for_it() -> None:
    call = shared.compiled(callers.build(), lowering="eager", mask_id=MASK, sliding="greedy")
    with pytest.raises(ValueError, match=r"does not ask it: call dllm_compile\.generate, or leave out"):
        call(callers.start())


def test_traces_in_fixed_blocks_are_not_repeated_in_others() -> None:
    with pytest.raises(ValueError, match="as_published repeats traces in fixed blocks; leave it out"):
        dllm_compile.generate(
            callers.build(), callers.start()[:, :6], gen_length=8, mask_id=MASK, threshold=0.9, as_published=True, **DSB
        )


def test_a_model_that_proposes_the_mask_alone_does_not_run_for_ever() -> None:
    """Fixed blocks have a last step; one that slides moves on where something was written."""

    def only_masks(input_ids: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full_like(input_ids, MASK), MASK + 1).double()

    how = {"gen_length": 4, "block_length": 2, "threshold": 0.9, "mask_id": MASK, "shift": False}
    given = torch.tensor([[5, 6]])
    assert dllm_compile.generate(only_masks, given, **how).tolist() == [[5, 6, MASK, MASK, MASK, MASK]]
    with pytest.raises(RuntimeError, match="proposes the mask for every candidate of the block"):
        dllm_compile.generate(only_masks, given, sliding="constant", **how)
