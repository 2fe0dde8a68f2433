"""``stats``: what ran, not what was planned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile.runtime.ids import mask_of_changes

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
