"""The plain model of dKV-Cache against traces of its authors' code, and its rules against the traces' tokens alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from . import dkv_model as dkv
from . import golden_models

TRACES = golden_models.names("llada_dkv") + golden_models.names("dream_dkv")
GREEDY = [name for name in TRACES if "__greedy" in name]
SINGLE = 2e-5
"""Norms are taken in float32 whatever the model's type, so sums in another order differ by this much in the logits."""


def sample(trace: golden_models.Trace, **other: int) -> Iterator[dkv.Step]:
    """The generation that a trace recorded, or one with other settings."""
    model = golden_models.model(trace.meta["model"])
    ids, settings = trace.tensors["tokens"][0, 0].long(), {**trace.settings, **other}
    if trace.name.startswith("dream"):
        return dkv.sample_dream(model, ids, trace.mask_id, settings)
    if trace.meta["function"] == "greedy":
        draws = trace.tensors["random_draws"][:, 0]
        return dkv.sample_llada_greedy(model, ids, trace.mask_id, settings, draws)
    return dkv.sample_llada_decode(model, ids, trace.mask_id, settings)


def rule(trace: golden_models.Trace) -> dkv.Rule:
    """Rows to run as a function of token vectors and settings."""
    settings, mask_id = trace.settings, trace.mask_id
    if trace.name.startswith("dream"):
        return dkv.dream_rule(mask_id, settings)
    length, reload = settings["block_length"], settings["cache_reloading_step"]
    return lambda history: dkv.llada_decode(history, mask_id, length, reload)


def test_all_traces_are_here() -> None:
    assert len(TRACES) == 8
    assert len(GREEDY) == 2


@pytest.mark.parametrize("name", TRACES)
def test_repeats_the_authors_code(name: str) -> None:
    trace, calls, compared = golden_models.trace(name), 0, 0
    tokens, rows = trace.tensors["tokens"][:, 0].long(), trace.tensors["rows"].bool()
    for step in sample(trace):
        assert torch.equal(step.run, rows[calls]), f"rows given at step {calls}"
        assert torch.equal(step.ids, tokens[calls + 1]), f"tokens after step {calls}"
        want = trace.tensors.get(f"logits_step_{calls}")
        if want is not None:
            assert (step.logits - want[0]).abs().max() < 1e-4
            compared += 1
        calls += 1
    assert calls == int(trace.tensors["nfe"]) == len(rows)
    assert compared == sum(key.startswith("logits_step_") for key in trace.tensors) == 4


@pytest.mark.parametrize("name", [name for name in TRACES if name not in GREEDY])
def test_rows_follow_from_tokens_and_settings(name: str) -> None:
    """Nothing of the sampler but the token vectors before each call is needed."""
    trace = golden_models.trace(name)
    history = list(trace.tensors["tokens"][:, 0].long())
    for step, given in enumerate(trace.tensors["rows"].bool()):
        assert torch.equal(rule(trace)(history[: step + 1]), given), f"step {step}"


@pytest.mark.parametrize("name", GREEDY)
def test_greedy_rows_follow_from_tokens_and_what_is_about_to_be_freed(name: str) -> None:
    """Of the draws only the positions freed by the present step are needed, in their order (here there is one)."""
    trace = golden_models.trace(name)
    settings, history = trace.settings, list(trace.tensors["tokens"][:, 0].long())
    for step, given in enumerate(trace.tensors["rows"].bool()):
        at = dkv.step_in_block(history[: step + 1], trace.mask_id, settings["block_length"])
        want = torch.ones_like(given)
        if at % settings["cache_reloading_step"]:
            freed, freeing = (changed(history, when) for when in (step - 1, step))
            assert len(freeing) == 1
            want = dkv.llada_greedy(history[: step + 1], trace.mask_id, freed, freeing, settings["window_size"])
        assert torch.equal(want, given), f"step {step}"


def changed(history: dkv.History, step: int) -> list[int]:
    """Positions that a step wrote."""
    out: list[int] = (history[step + 1] != history[step]).nonzero()[:, 0].tolist()
    return out


@pytest.mark.parametrize("name", [name for name in TRACES if "prefill" not in name])
def test_refreshing_always_is_the_model(name: str) -> None:
    trace = golden_models.trace(name)
    steps = sample(trace, cache_reloading_step=1, cache_steps=1)
    model, ids = golden_models.model(trace.meta["model"]), trace.tensors["tokens"][0, 0].long()
    for _, step in zip(range(4), steps, strict=False):
        with torch.no_grad():
            want = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
        assert step.run.all()
        assert (step.logits - want).abs().max() < SINGLE
        ids = step.ids


def test_windows_take_turns() -> None:
    free = torch.tensor([1, 1, 0, 0, 1, 1, 1, 1, 1, 1], dtype=torch.bool)
    ids = torch.where(free, 9, 0)
    assert rows_around(ids, [4], 3) == [1, 4, 5, 6]  # right, (taken) left, right: 5, then 6 before 1
    assert rows_around(ids, [4, 8], 2) == [4, 5, 6, 7, 8, 9]
    assert rows_around(ids, [1], 20) == [0, 1, 4, 5, 6, 7, 8, 9]


def rows_around(ids: torch.Tensor, freeing: list[int], window: int) -> list[int]:
    out: list[int] = dkv.llada_greedy([ids], 9, [], freeing, window).nonzero()[:, 0].tolist()
    return out
