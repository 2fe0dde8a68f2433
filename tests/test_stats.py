"""``stats``: what ran, not what was planned."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile.runtime.ids import mask_of_changes
from dllm_compile.runtime.unit_code import LISTENERS

from . import callers, models
from .test_explain import counted
from .test_layers_alone import LAYERS, LoopBroken

pytestmark = pytest.mark.shares_graphs

PROMPT, RESPONSE, STEPS = 9, 8, 6
CACHED: dict[str, Any] = {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.5}
DUAL: dict[str, Any] = {"method": "fast-dllm", "cache": "dual", "block_length": 4}


def seen(model: torch.nn.Module, **options: Any) -> dict[str, Any]:
    call, x = models.compiled_loop(model, **options), models.start(PROMPT, RESPONSE)
    with torch.no_grad():
        for step in range(STEPS):
            call(x)
            x[:, PROMPT + step] = 5
    return dllm_compile.stats(model)


@pytest.mark.parametrize(
    ("options", "layers"), [(CACHED, 1), (DUAL, LAYERS), ({"saliency_threshold": 0.9, "full_steps": 1}, LAYERS)]
)
def test_layers_that_hold_no_rows_are_no_partial_step(options: dict[str, Any], layers: int) -> None:
    """The first layer of dLLM-Cache is always computed, and layers of the same weights cannot tell rows apart."""
    model = LoopBroken().double().eval()
    model.layers = torch.nn.ModuleList([model.layers[0]] * layers)
    found = seen(model, **options)
    assert found["layers"] == {"cached": 0, "seen": layers * STEPS}
    assert found["steps"] == {"full": STEPS}
    assert found["rows"] == {"full": STEPS * (PROMPT + RESPONSE)}
    assert found["flops_skipped"] < 0.2  # the head's alone


def test_layers_cached_of_layers_seen() -> None:
    found = seen(models.build("llama"), **CACHED)
    assert found["steps"] == {"full": 1, "select": STEPS - 1}
    assert found["layers"] == {"cached": 2 * (STEPS - 1), "seen": 3 * STEPS}  # the first is computed at every step
    assert found["graphs_per_step"] == 1
    found = seen(models.build("qwen2"), **DUAL)
    assert found["steps"] == {"full": 2, "block": STEPS - 2}
    assert found["layers"] == {"cached": 3 * (STEPS - 2), "seen": 3 * STEPS}


@pytest.mark.parametrize("options", [{"cache": "dual", "block_length": 4}, CACHED])
def test_flops_skipped_are_those_counted(options: dict[str, Any]) -> None:
    """One step of each variant, counted by PyTorch while it ran, against what the session noted of that step."""
    model, noted = models.build("llama"), {}
    call, x = models.compiled_loop(model, **options), models.start(21, 16)
    with torch.no_grad():
        for step in range(6):
            before = dllm_compile.stats(model)
            call(x)
            after = dllm_compile.stats(model)
            name = next(n for n in after["steps"] if after["steps"][n] != before["steps"].get(n))
            noted[name] = after["flops"] - before["flops"] if step else noted.get(name)
            x[:, 21 + step] = 7
    for name, (flops, _) in counted("llama", options).items():
        assert noted[name] == pytest.approx(flops, rel=0.01)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"cache": "dual", "block_length": 4, "refresh_interval": 3}, {"block": 2, "interval": 1}),
        ({"cache": "dual", "keep_ratio": 0.5}, {"block": 1, "steps": 1}),
        ({"cache": "dual", "block_length": 4, "edit": 5}, {"block": 2, "edit": 1}),
        ({"saliency_threshold": 0.9, "full_steps": 3, "response_interval": 4}, {"block": 1, "steps": 2, "response": 1}),
        ({"cache": "dual", "prompt_interval": 4, "refresh_interval": 5}, {"block": 1, "prompt": 1, "interval": 1}),
        ({"prompt_interval": 2, "response_interval": 3}, {"block": 1, "prompt": 2, "response": 1}),
    ],
    ids=str,
)
def test_refreshes_by_their_reason(options: dict[str, Any], wanted: dict[str, int]) -> None:
    options = dict(options)
    edited = options.pop("edit", None)
    model, x = callers.build(), models.start(PROMPT, RESPONSE, 1)
    call = models.compiled_loop(model, **options)
    with torch.no_grad():
        for step in range(STEPS):
            if step == edited:
                x[:, PROMPT] = 4  # of the block before
            call(x)
            x[:, PROMPT + step] = 5
    assert dllm_compile.stats(model)["refreshes"] == wanted


def test_a_repeat_skips_everything() -> None:
    model, x = models.build("llama"), models.start(PROMPT, RESPONSE)
    call = models.compiled_loop(model, method="exact")
    with torch.no_grad():
        for _ in range(4):
            call(x)
    found = dllm_compile.stats(model)
    assert found["steps"] == {"exact": 1, "repeat": 3}
    assert found["flops_skipped"] == pytest.approx(0.75)


REST = 0.02  # seconds


@torch._dynamo.disable
def rest() -> None:
    time.sleep(REST)


class Slow(LoopBroken):
    """Rests before each layer, between two graphs."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            rest()
            x, _ = layer(x, None)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def timed(model: torch.nn.Module, rests: tuple[float, ...], loops: int = 1) -> tuple[dict[str, Any], list[float]]:
    """Loops whose calls take turns, each of which rests before it calls again: stats, when the first call began, and
    when each ended.
    """
    calls = [models.compiled_loop(model, method="exact") for _ in range(loops)]
    xs = [models.start(PROMPT, RESPONSE, seed=i) for i in range(loops)]
    times = [time.perf_counter()]
    with torch.no_grad():
        for step, seconds in enumerate((0, *rests)):
            for call, x in zip(calls, xs, strict=True):
                time.sleep(seconds)
                call(x)
                times.append(time.perf_counter())
                x[:, PROMPT + step] = 5
    return dllm_compile.stats(model), times


@pytest.mark.parametrize("loops", [1, 2])
def test_time_outside_of_the_model_is_what_the_loop_rests(loops: int) -> None:
    rests = (0.0, 3 * REST, 0.0, 2 * REST)
    found, (_, first, *_, last) = timed(models.build("llama"), rests, loops)
    inside, outside = found["seconds_inside"], found["seconds_outside"]
    assert inside > 0
    assert outside >= loops * sum(rests)
    assert inside + outside <= last - first  # loops in turns wait for one another, and no moment counts twice
    assert found["time_outside"] == outside / (inside + outside)


def test_what_a_model_does_between_two_of_its_graphs_is_inside() -> None:
    found, (begin, *_, last) = timed(Slow().double().eval(), (0.0, REST))
    assert found["graphs_per_step"] > 1
    layers = found["layers"]["seen"] // found["sequences"] // sum(found["steps"].values())
    assert found["seconds_inside"] >= (layers - 1) * REST * 2  # no graph runs before the first rest
    assert found["seconds_inside"] + found["seconds_outside"] <= last - begin


def test_no_time_is_counted_of_one_call_nor_of_one_that_compiles() -> None:
    found, _ = timed(models.build("llama"), ())
    assert (found["seconds_inside"], found["seconds_outside"], found["time_outside"]) == (0, 0, 0)
    model, x = models.build("llama"), models.start(PROMPT, RESPONSE)
    call, spent = models.compiled_loop(model, **DUAL), 0.0
    torch.compiler.reset()
    with torch.no_grad():
        for step in range(3):
            compiles, before = bool(compiled_by(lambda: call(x))), spent
            assert compiles == (step < 2), step
            found = dllm_compile.stats(model)
            spent = found["seconds_inside"] + found["seconds_outside"]
            assert (spent > before) != compiles, step
            x[:, PROMPT + step] = 5


def compiled_by(call: Callable[[], Any]) -> list[str]:
    """Names of the steps that code is compiled for in a call."""
    found: list[str] = []
    LISTENERS.append(found.append)
    try:
        call()
    finally:
        LISTENERS.remove(found.append)
    return found


def test_the_mask_is_what_changed_rows_had_in_common() -> None:
    before = torch.tensor([[4, 7, 9, 9, 0], [5, 9, 9, 0, 0]])  # padded on the right
    now = before.clone()
    now[0, 2], now[1, 1] = 3, 6
    assert mask_of_changes(before, now) == 9
    assert mask_of_changes(before, before) is None
    now[0, 0] = 8  # an edit beside them
    assert mask_of_changes(before, now) is None
    edited = before.clone()
    edited[0, 1] = 8  # the only 7 there is
    assert mask_of_changes(before, edited) is None
    assert mask_of_changes(before, now[:, :4]) is None
    again = torch.where(before == 9, 1, before)
    assert mask_of_changes(before, again) == 9
    assert mask_of_changes(before, again, known=1) is None  # masked again
