"""DyLLM through the backend: equal to a plain model of it at every step, neutral where it should be, and composed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import Contexts, Mechanism, Option, tiny
from dllm_compile.interface.mechanism import is_number
from dllm_compile.mechanisms import register, unregister
from dllm_compile.quota_loop import quota_loop
from dllm_compile.runtime import session
from dllm_compile.runtime.session import Session

from . import callers, golden_models, models
from .dyllm_model import DyLLM
from .grids import pairwise
from .models import in_a_loop
from .rounding import roundings
from .under_way import under_way

pytestmark = pytest.mark.shares_graphs

MASK_IDS = {"llada_a": 255, "llada_g": 239, "dream_a": 255}


def steps_of(prompt: int, response: int, mask_id: int, calls: int, each: int = 1, seed: int = 0) -> list[torch.Tensor]:
    """Ids of the calls of a loop that fills random tokens at random places."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randint(0, mask_id, (1, prompt + response), generator=draw)
    x[:, prompt:] = mask_id
    out = [x.clone()]
    order = torch.randperm(response, generator=draw) + prompt
    for i in range(calls - 1):
        at = order[i * each : (i + 1) * each]
        x[0, at] = torch.randint(0, mask_id, at.shape, generator=draw)
        out.append(x.clone())
    return out


@pytest.mark.parametrize(
    ("threshold", "name", "response_only", "shift"),
    pairwise([0.99, 0.9, 0.999999, -1.0], ["llada_a", "llada_g", "dream_a"], [True, False], [None, True]),
)
def test_every_step_equals_the_plain_model(
    name: str, threshold: float, response_only: bool, shift: bool | None
) -> None:
    model, mask_id = golden_models.model(name), MASK_IDS[name]
    calls = steps_of(11, 14, mask_id, 13)
    plain = DyLLM(model, calls[0][0] == mask_id, threshold, 3, response_only, before=bool(shift))
    options: dict[str, Any] = {"saliency_threshold": threshold, "full_steps": 3, "response_only": response_only}
    dllm_compile.reset()
    compiled = models.compiled_loop(model, **options, method="dyllm", mask_id=mask_id, shift=shift)
    with torch.no_grad():
        for i, ids in enumerate(calls):
            want, got = plain.step(ids), compiled(ids).logits[0]
            rows = (ids[0] == mask_id).nonzero()[:, 0] - int(bool(shift))
            assert roundings(got[rows], want[rows]) <= 8, f"step {i}"
    assert dllm_compile.stats(model)["steps"]["salient"] == len(calls) - 3


# -- a measure from outside -------------------------------------------------------------------------------------------


class Moved(DyLLM):
    """Rows are salient where their contexts moved by more than the threshold."""

    def _turned(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return (new - old).square().sum(-1).sqrt() > self.threshold


def moved(contexts: Contexts) -> torch.Tensor:
    """The same of all heads."""
    return (contexts.new - contexts.old).square().sum((1, 3)).sqrt() > contexts.bound


@pytest.fixture
def drift() -> Iterator[Mechanism]:
    """DyLLM with another measure."""
    option = Option("drift", None, is_number, "a distance, such as 0.1", meaning="how far a context may move")
    says = {"options": (option,), "switches": ("drift",), "methods": {"drift": {"drift": 0.1}}}
    neutral = {"drift": 0.1, "full_steps": 10**6}
    yield register(Mechanism("drift", "a test", salient=moved, neutral=neutral, **says))  # type: ignore[arg-type]
    unregister("drift")


@pytest.mark.usefixtures("drift")
@pytest.mark.parametrize(("bound", "name"), [(0.05, "llada_a"), (0.3, "llada_g"), (1e9, "dream_a")])
def test_every_step_of_another_measure_equals_its_plain_model(bound: float, name: str) -> None:
    model, mask_id = golden_models.model(name), MASK_IDS[name]
    calls = steps_of(11, 14, mask_id, 9)
    plain = Moved(model, calls[0][0] == mask_id, bound, 3)
    dllm_compile.reset()
    compiled = models.compiled_loop(model, method="drift", drift=bound, full_steps=3, mask_id=mask_id)
    with torch.no_grad():
        for i, ids in enumerate(calls):
            want, got = plain.step(ids), compiled(ids).logits[0]
            rows = (ids[0] == mask_id).nonzero()[:, 0]
            assert roundings(got[rows], want[rows]) <= 8, f"step {i}"
    sizes = [len(rows) for step in plain.steps for rows in step.salient[1:]]
    share = sum(sizes) / sum(len(step.rows) * len(plain.mlp) for step in plain.steps if step.salient)
    assert share == 0 if bound > 1 else 0.1 < share < 0.95
    assert dllm_compile.stats(model)["steps"]["salient"] == len(calls) - 3


@pytest.mark.usefixtures("drift")
def test_another_measure_under_inductor_finds_the_same_rows() -> None:
    got: list[list[torch.Tensor]] = []
    found = []
    for lowering in "eager", "inductor":
        model = callers.build()
        call = models.compiled_loop(model, drift=0.2, full_steps=1, lowering=lowering)
        with torch.no_grad():
            got.append([call(ids)[ids == models.MASK] for ids in steps_of(6, 8, models.MASK, 5)])
        found.append(dllm_compile.stats(model)["salient"])
    assert found[0] == found[1]
    torch.testing.assert_close(got[1], got[0], rtol=1e-9, atol=1e-9)
    assert found[0] > 0


def test_its_neutral_setting_equals_eager(drift: Mechanism) -> None:
    model, mask_id = golden_models.model("llada_a"), MASK_IDS["llada_a"]
    dllm_compile.reset()
    compiled = models.compiled_loop(model, **(drift.neutral or {}), mask_id=mask_id)
    with torch.no_grad():
        for ids in steps_of(11, 14, mask_id, 5):
            want, got = model(ids).logits, compiled(ids).logits
            assert roundings(got[ids == mask_id], want[ids == mask_id]) <= 8


def test_two_measures_of_saliency_are_refused_and_what_one_says_is_checked(drift: Mechanism) -> None:
    with pytest.raises(ValueError, match="saliency_threshold and drift each decide which rows are salient"):
        dllm_compile.Options(drift=0.1, saliency_threshold=0.9)
    for wrong, said in (lambda c: c.cosine, "says salient rows of torch.float"), (lambda c: c.rows, "AttributeError"):
        register(replace(drift, salient=wrong))
        model, mask_id = golden_models.model("llada_a"), MASK_IDS["llada_a"]
        dllm_compile.reset()
        options = {"drift": 0.1, "full_steps": 1, "mask_id": mask_id, "lowering": "eager"}
        compiled = in_a_loop(torch.compile(model, backend="dllm", options=options))
        with torch.no_grad(), pytest.raises((ValueError, RuntimeError), match=f"the mechanism 'drift' .*{said}"):
            [compiled(ids) for ids in steps_of(11, 14, mask_id, 2)]


@pytest.mark.parametrize("whole_interval", [1, 3, 8])
def test_the_prompt_is_computed_in_the_first_four_steps_and_every_so_many(whole_interval: int) -> None:
    model, mask_id = golden_models.model("llada_a"), MASK_IDS["llada_a"]
    calls = steps_of(11, 14, mask_id, 10)
    plain = DyLLM(model, calls[0][0] == mask_id, 0.99, 1, whole_interval=whole_interval)
    options: dict[str, Any] = {"full_steps": 1, "whole_interval": whole_interval, "mask_id": mask_id}
    dllm_compile.reset()
    compiled = models.compiled_loop(model, method="dyllm", **options)
    with torch.no_grad():
        for ids in calls:
            want, got = plain.step(ids), compiled(ids).logits[0]
            rows = (ids[0] == mask_id).nonzero()[:, 0]
            assert roundings(got[rows], want[rows]) <= 8
            if plain.steps[-1].kind != "full":  # the response is behind the row before it
                assert under_way().step.sizes["active"] == len(plain.steps[-1].rows) + (
                    plain.steps[-1].kind == "response"
                )
    wholes = {i + 1 for i, step in enumerate(plain.steps) if step.kind == "whole"}
    assert wholes == {2, 3, 4, *(t for t in range(5, 11) if t % whole_interval == 0)}


def test_more_salient_rows_than_room_run_the_step_again_with_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where the number of salient rows is not read before the step ends."""
    model, mask_id = golden_models.model("llada_a"), MASK_IDS["llada_a"]
    calls = steps_of(11, 14, mask_id, 9)
    monkeypatch.setattr(
        Session, "salient_capacity", lambda self, step: self.salient_capacities.get(step.sizes.get("active"), 2)
    )
    monkeypatch.setattr(session, "LEAST_CAPACITY", 2)

    def run(threshold: float, **more: Any) -> list[torch.Tensor]:
        dllm_compile.reset()
        options = {"method": "dyllm", "saliency_threshold": threshold, "mask_id": mask_id, "shift": False, **more}
        compiled = models.compiled_loop(model, **options)
        with torch.no_grad():
            return [compiled(ids).logits[ids == mask_id].clone() for ids in calls]

    got = run(0.999)
    overflows = dllm_compile.stats(model)["overflows"]
    assert 0 < overflows < 5
    assert max(rows for each in session.sessions() for rows in each.salient_capacities.values()) > 2
    every = run(0.999, response_interval=1)
    exact = [step for step in range(4, 9) if torch.equal(got[step], every[step])]
    assert len(exact) >= 1


def test_fewer_rows_are_salient_as_the_threshold_falls() -> None:
    """On the embedded model, along the path that its own eager decoding takes."""
    model, tokenizer = tiny.load()
    mask_id = model.config.mask_token_id
    prompts = tiny.encode(tiny.problems(4, 3), tokenizer)
    x = torch.cat([prompts, torch.full((4, tiny.RESPONSE_LENGTH), mask_id)], 1)
    calls = [x.clone()]
    with torch.no_grad():
        loop = quota_loop(lambda ids: model(ids).logits, x, tiny.PROMPT_LENGTH, tiny.RESPONSE_LENGTH, 32, mask_id)
        calls += [state.clone() for _, state in zip(range(8), loop, strict=False)]

        def salient(threshold: float) -> int:
            dllm_compile.reset()
            compiled = models.compiled_loop(model, method="dyllm", saliency_threshold=threshold, mask_id=mask_id)
            before: int = dllm_compile.stats(model)["salient"]
            for ids in calls:
                compiled(ids)
            return dllm_compile.stats(model)["salient"] - before

        counts = [salient(threshold) for threshold in (0.9, 0.98, 0.995, 0.9995)]
    assert 0 < counts[0] < counts[1] < counts[2] < counts[3]
