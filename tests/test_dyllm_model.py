"""The plain model of DyLLM, against the model itself and what METHODS.md says of its settings."""

from __future__ import annotations

import pytest
import torch

from . import golden_models
from .dyllm_model import DyLLM

PROMPT, LENGTH, MASK = 9, 24, 199
RESPONSE = torch.arange(LENGTH) >= PROMPT
EVERYWHERE = torch.ones(LENGTH, dtype=torch.bool)
SINGLE = 2e-5
"""Norms are taken in float32 whatever the model's type, so sums in another order differ by this much in the logits."""


@pytest.fixture(scope="module", params=["llada_a", "llada_g", "dream_a"])
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return golden_models.model(request.param)


def plain(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    return out


def tokens(count: int, freed: int = 2) -> list[torch.Tensor]:
    """Token vectors of a generation that frees some positions of the response a step, in random order."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(0, MASK, (LENGTH,), generator=draw)
    order = PROMPT + torch.randperm(LENGTH - PROMPT, generator=draw)
    out = [torch.where(RESPONSE, MASK, ids)]
    for step in range(1, count):
        out.append(out[-1].clone())
        at = order[(step - 1) * freed : step * freed]
        out[-1][at] = ids[at]
    return out


def other_tokens(count: int) -> list[torch.Tensor]:
    """Token vectors of which each has no token in common with the one before."""
    draw = torch.Generator().manual_seed(4)
    first = torch.randint(0, MASK, (LENGTH,), generator=draw)
    return [(first + 7 * step) % MASK for step in range(count)]


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_full_steps_are_the_model(model: torch.nn.Module) -> None:
    method = DyLLM(model, RESPONSE, threshold=0.99, full_steps=4)
    for ids in tokens(4):
        assert far(method.step(ids.unsqueeze(0)), plain(model, ids)) < 1e-10
    assert [step.kind for step in method.steps] == ["full"] * 4


def test_kinds_of_steps(model: torch.nn.Module) -> None:
    method, always = DyLLM(model, RESPONSE, 0.99, 0), DyLLM(model, RESPONSE, 0.99, 5, response_only=False)
    for ids in tokens(9, freed=1):
        method.step(ids)
        always.step(ids)
    assert [s.kind for s in method.steps] == ["full", *["whole"] * 3, *["response"] * 3, "whole", "response"]
    rare = DyLLM(model, RESPONSE, 0.99, 0, whole_interval=9)
    for ids in tokens(9, freed=1):
        rare.step(ids)
    assert [s.kind for s in rare.steps] == ["full", *["whole"] * 3, *["response"] * 4, "whole"]
    assert [s.kind for s in always.steps] == ["full"] * 5 + ["whole"] * 4


def test_rows_of_a_response_step(model: torch.nn.Module) -> None:
    alone, shifted = DyLLM(model, RESPONSE, 0.99, 4), DyLLM(model, RESPONSE, 0.99, 4, before=True)
    last = {method: [method.step(ids) for ids in tokens(5)][-2:] for method in (alone, shifted)}
    for method, first in ((alone, PROMPT), (shifted, PROMPT - 1)):
        assert method.steps[-1].rows.tolist() == list(range(first, LENGTH))
        old, new = last[method]
        assert torch.equal(old[:first], new[:first])
        assert (old[first:] != new[first:]).any(1).all()


def test_everything_salient_everywhere_is_the_model(model: torch.nn.Module) -> None:
    """Neutral only if the first layer starts from all rows and all rows are computed."""
    method = DyLLM(model, EVERYWHERE, threshold=2.0, full_steps=1, response_only=False)
    for ids in other_tokens(7):
        assert far(method.step(ids), plain(model, ids)) < SINGLE
    assert all(len(positions) == LENGTH for step in method.steps[1:] for positions in step.salient)


@pytest.mark.parametrize("response_only", [True, False])
def test_everything_salient_is_not_neutral_otherwise(model: torch.nn.Module, response_only: bool) -> None:
    method = DyLLM(model, RESPONSE, threshold=2.0, full_steps=4, response_only=response_only)
    for ids in tokens(6):
        out = method.step(ids)
    want = plain(model, ids)
    assert (out - want)[RESPONSE].norm() > 1e-2 * want[RESPONSE].norm()


def test_same_tokens_again_change_nothing(model: torch.nn.Module) -> None:
    method = DyLLM(model, RESPONSE, threshold=0.999, full_steps=2)
    for ids in tokens(7):
        out = method.step(ids)
        again = method.step(ids)
        if method.steps[-1].kind == "full":
            assert torch.equal(out, again)
            continue
        computed = method.steps[-2].rows if method.steps[-2].kind != "full" else method.all_rows
        assert far(out[computed], again[computed]) < SINGLE
        assert all(len(positions) == 0 for positions in method.steps[-1].salient)


def test_a_low_threshold_freezes(model: torch.nn.Module) -> None:
    """After the full steps the first layer alone goes on, and only its keys, values and contexts."""
    method = DyLLM(model, RESPONSE, threshold=-1.0, full_steps=4)
    history = tokens(9)
    for ids in history[:4]:
        method.step(ids)
    frozen = [[state.clone() for state in states] for states in (method.k, method.v, method.context, method.mlp)]
    for ids in history[4:]:
        method.step(ids)
    changed = (history[-1] != history[3]).nonzero()[:, 0]
    for now, then in zip((method.k, method.v, method.context, method.mlp), frozen, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(now[1:], then[1:], strict=True))
    for first, old in ((method.k[0], frozen[0][0]), (method.v[0], frozen[1][0])):
        assert torch.equal((first != old).flatten(1).any(1).nonzero()[:, 0], changed)
    assert torch.equal(method.mlp[0], frozen[3][0])
    assert [len(s) for step in method.steps[4:] for s in step.salient[1:]] == [0] * 5 * len(method.mlp)


def test_what_the_first_layer_approximates(model: torch.nn.Module) -> None:
    """Salient contexts are exact; the others lack the old values under the change of the attention, no more."""
    old, new = tokens(2, freed=5)
    method, truth = DyLLM(model, RESPONSE, 0.99, 1), DyLLM(model, RESPONSE, 0.99, 1)
    method.step(old)
    k, v = method.k[0].clone(), method.v[0].clone()
    method.step(new)
    truth.step(new)
    layer, rows, parts = method.parts.layers[0], method.all_rows, method.parts
    with torch.no_grad():
        queries = [parts.query(layer, layer.input_layernorm(parts.embed(ids)), rows) for ids in (old, new)]
        moved = parts.weights(queries[1], truth.k[0]) - parts.weights(queries[0], k)
        lost = parts.mix(moved, v)
    lost[method.steps[-1].salient[0]] = 0
    assert far(method.context[0] + lost, truth.context[0]) < 1e-12
    assert lost.abs().max() > 1e-3


def test_salient_sets_follow_the_threshold(model: torch.nn.Module) -> None:
    """They begin with the new tokens and the higher the threshold the larger they get."""
    history = tokens(6)
    sizes = []
    for threshold in (0.9, 0.99, 0.999):
        method = DyLLM(model, RESPONSE, threshold, full_steps=1)
        for ids in history:
            method.step(ids)
        for step, before, now in zip(method.steps[1:], history, history[1:], strict=False):
            assert torch.equal(step.salient[0], (now != before).nonzero()[:, 0])
            assert len(step.salient) == len(method.parts.layers) + 1
            assert all(torch.isin(positions, step.rows).all() for positions in step.salient)
        sizes.append(sum(len(positions) for step in method.steps for positions in step.salient[1:]))
    assert sizes[0] < sizes[1] < sizes[2]
