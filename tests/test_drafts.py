"""Drafts (FreeDave): the ids are those of the loop without them, token by token, from fewer calls of the model."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile.debug import steps
from dllm_compile.declared import NoDrafts, drafting
from dllm_compile.sampler.drafts import Drafts
from dllm_compile.sampler.progress import Progress
from dllm_compile.sampler.settings import Settings

from . import callers, models, shared
from .callers import TOLERANCE, off
from .models import MASK
from .test_sliding_block import PROMPT, llama, rows_of, start

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]

RESPONSE, BLOCK = 21, 7
COMMON: dict[str, Any] = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": MASK, "lowering": "eager"}
PLAIN: dict[str, Any] = {"shift": False, "steps": RESPONSE}


def both(model: Any, ids: torch.Tensor, drafts: int, **how: Any) -> tuple[Any, Any]:
    """What is generated without drafts, and with them; ids after each step."""
    common = {**COMMON, **how, "output_history": True}
    without = dllm_compile.generate(model, ids[:, :PROMPT], **common)
    return without, dllm_compile.generate(model, ids[:, :PROMPT], drafts=drafts, **common)


# -- the loop --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize(
    ("drafts", "how"),
    [
        (1, {"cache": "dual", **PLAIN}),
        (4, {"cache": "dual", "shift": True, "threshold": 0.6}),
        (3, {"cache": "prefix", "shift": False, "threshold": 0.9}),
        (4, {"cache": "dual", "shift": False, "frechet_delta": 0.5, "rows_before": 2, "rows_behind": 3}),
        (4, {"cache": "dual", "shift": True, "steps": 9, "remasking": "entropy"}),
        (4, {"method": "exact", **PLAIN}),
    ],
    ids=str,
)
def test_the_ids_after_each_step_are_those_without_drafts(drafts: int, how: dict[str, Any]) -> None:
    without, found = both(llama(), start(), drafts, **how)
    assert torch.equal(found.history, without.history)
    assert found.nfe <= without.nfe


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_fewer_calls_make_the_same_ids(lowering: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if lowering == "inductor":  # in eager it is traced as generate does it
        shared.steps_of_generate(monkeypatch)
    model, ids = llama(), start()
    common = {**COMMON, **PLAIN, "cache": "dual", "output_history": True}
    without = dllm_compile.generate(model, ids[:, :PROMPT], **common)
    found = dllm_compile.generate(model, ids[:, :PROMPT], **{**common, "lowering": lowering, "drafts": 4})
    assert torch.equal(found.history, without.history)
    assert found.nfe <= 14 < without.nfe == RESPONSE
    assert dllm_compile.stats(model)["steps"]["drafts"] >= 6


def test_without_a_compiler_too() -> None:
    model, ids = llama(), start()
    common = {"gen_length": RESPONSE, "mask_id": MASK, "shift": False, "output_history": True}
    without = dllm_compile.generate(model, ids[:, :PROMPT], **common)
    found = dllm_compile.generate(model, ids[:, :PROMPT], drafts=5, **common)
    assert torch.equal(found.history, without.history)
    assert found.nfe < without.nfe == RESPONSE
    assert found.tokens_per_forward == RESPONSE / found.nfe


@pytest.mark.usefixtures("generate_shares_graphs")
def test_an_end_that_is_written_is_seen_between_two_states_of_one_call() -> None:
    model, ids = llama(), start()
    whole = dllm_compile.generate(model, ids[:, :PROMPT], **COMMON, **PLAIN, cache="dual")
    without, found = both(model, ids, 4, cache="dual", eos_id=int(whole[0, PROMPT + 2]), **PLAIN)
    assert len(without.history) <= RESPONSE
    assert torch.equal(found.history, without.history)


@pytest.mark.usefixtures("generate_shares_graphs")
def test_a_padded_prompt_is_padded_for_each_draft() -> None:
    model, ids = llama(), start()
    mask = torch.ones(1, PROMPT, dtype=torch.int64)
    mask[0, :3] = 0
    without, found = both(model, ids, 4, cache="dual", attention_mask=mask, **PLAIN)
    assert torch.equal(found.history, without.history)
    assert found.nfe < without.nfe


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 4), st.booleans())
def test_whatever_the_model_says_the_loop_is_the_same(seed: int, drafts: int, per_step: int, sure: bool) -> None:
    """A model that is a table of chance: proposals of a state depend on all of its ids."""
    tokens, block = 12, 6
    how = {"threshold": 0.7} if sure else {"steps": -(-block // per_step) * 2}
    asked = itertools.count()

    def propose(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        next(asked)
        found = [torch.Generator().manual_seed(seed + hash(tuple(row.tolist())) % 2**20) for row in states]
        token = [torch.randint(0, 2, (tokens,), generator=each) for each in found]
        return torch.stack(token), torch.stack([torch.rand(tokens, generator=each) for each in found])

    def played(count: int) -> tuple[list[list[int]], int]:
        settings = Settings(gen_length=tokens, block_length=block, drafts=count, **how)
        progress, x, out = Progress(settings, (1, tokens), shift=False), torch.full((1, tokens), 9), []
        step = Drafts(propose, settings, progress, 9, shared=False)
        while (writable := progress.writable(x == 9)) is not None:
            x = step(x, writable)
            out.append(x[0].tolist())
        return out, step.forwards

    (plain, calls), (found, fewer) = played(1), played(drafts)
    assert found == plain
    assert calls == len(plain) >= fewer


# -- one call --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [False, True, None])
@pytest.mark.parametrize("options", [{"cache": "dual"}, {"cache": "prefix", "rows_before": 2}], ids=str)
def test_logits_of_drafts_are_those_of_a_step_each_and_leave_nothing_behind(
    options: dict[str, Any], shift: bool | None
) -> None:
    model, x = llama(), start()
    call = shared.compiled(model, lowering="eager", mask_id=MASK, block_length=BLOCK, shift=shift, **options)
    drafts = x.repeat(3, 1)
    for number, at in enumerate((1, 4, 0)):
        drafts[number:, PROMPT + at] = 9 + number
    with dllm_compile.loop(), steps() as ran:
        call(x)
        held = dllm_compile.stats(model)["state_bytes"]
        with drafting():
            got = call(drafts).logits.clone()
            again = call(drafts).logits.clone()
        assert dllm_compile.stats(model)["state_bytes"] == held
        for row, each in zip(got, drafts, strict=True):
            want = call(each[None]).logits[0]
            block = (each == MASK) & (torch.arange(len(each)) < PROMPT + BLOCK)
            read = block if shift is False else torch.cat([block[1:], block[:1] & False])
            assert off(row, want, read) < TOLERANCE
            assert off(row, model(each[None]).logits[0], read) > 1e-3  # something is reused
    assert torch.equal(got, again)
    assert [each.name for each in ran][:3] == ["full", "drafts", "drafts"]
    assert rows_of(ran[1], x.shape[1]).sum() < x.shape[1]


def test_grouped_heads_and_other_models() -> None:
    for name in ("qwen3", "modernbert"):
        model, x = models.build(name, num_hidden_layers=2), start()
        call = models.compiled_loop(model, cache="dual", block_length=BLOCK, shift=False)
        call(input_ids=x)
        drafts = x.repeat(2, 1)
        drafts[:, PROMPT + 2], drafts[1, PROMPT] = 9, 10
        with drafting():
            got = call(input_ids=drafts).logits.clone()
        for row, each in zip(got, drafts, strict=True):
            block = (each == MASK) & (torch.arange(len(each)) < PROMPT + BLOCK)
            assert off(row, call(input_ids=each[None]).logits[0], block) < TOLERANCE


def test_drafts_of_nothing_are_refused() -> None:
    model, x = llama(), start()
    call = shared.compiled(model, lowering="eager", mask_id=MASK, cache="dual", block_length=BLOCK, shift=False)
    with dllm_compile.loop(), drafting(), pytest.raises(NoDrafts, match="drafts are of a sequence whose next step"):
        call(x.repeat(2, 1))


def test_a_model_of_several_graphs_is_called_for_one_state_at_a_time() -> None:
    """Its layers are compiled one by one, so that nothing that sees the ids is."""
    model, ids = callers.build("alone"), callers.start(1)
    common = {"gen_length": 8, "block_length": 4, "mask_id": MASK, "shift": False, "steps": 8, "cache": "dual"}
    want = dllm_compile.generate(model, ids[:, :6], lowering="eager", **common)
    with pytest.warns(UserWarning, match="there is none: from here on a call looks at one state"):
        got = dllm_compile.generate(model, ids[:, :6], lowering="eager", drafts=3, **common)
    assert torch.equal(got, want)


# -- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"drafts": 0}, "drafts is 0; give a whole number of at least 1"),
        ({"temperature": 0.5}, "drafts repeat what is sure, at temperature 0 and without guidance"),
        ({"cfg_scale": 1.0}, "drafts repeat what is sure"),
        ({"remasking": "random"}, "drafts repeat what is sure"),
        ({"cache": "decoded"}, "drafts need steps that depend on the tokens of the block alone, and so no cache='deco"),
        ({"cache": "dual", "keep_ratio": 0.5}, "and so no eviction"),
        ({"cache": "dual", "refresh_interval": 3}, "and so no refresh_interval"),
        ({"method": "dsb"}, "and so no sliding-block"),
        ({"method": "dllm-cache"}, "drafts need steps"),
        ({"method": "dyllm"}, "and so no saliency"),
    ],
    ids=str,
)
def test_what_drafts_cannot_repeat_is_refused(how: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dllm_compile.generate(
            callers.build(), callers.start(1)[:, :6], **{"gen_length": 8, "mask_id": MASK, "drafts": 3, **how}
        )


def test_drafts_are_of_one_sequence() -> None:
    with pytest.raises(ValueError, match="drafts are of one sequence, and there are 2; leave drafts out"):
        dllm_compile.generate(callers.build(), callers.start(2)[:, :6], gen_length=8, mask_id=MASK, drafts=3)
