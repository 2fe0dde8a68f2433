"""``warm`` compiles what the first request would have compiled."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._dynamo.utils import counters

import dllm_compile
from dllm_compile.runtime import unit_code

from . import models
from .models import MASK

SETTINGS: dict[str, Any] = {
    "method": "fast-dllm",
    "cache": "dual",
    "block_length": 4,
    "lowering": "eager",
    "mask_id": MASK,
}


def frames() -> int:
    return int(counters["frames"]["ok"])


@pytest.mark.parametrize("batch", [1, 2])
def test_nothing_is_compiled_behind_it(batch: int) -> None:
    model = models.build("llama", num_hidden_layers=2)
    told = dllm_compile.warm(model, 9, 8, batch, **SETTINGS)
    assert {"full", "block", "head"} <= told.compiled.keys()
    assert told.steps.keys() == {"full", "block"}
    assert "'block'" in str(told)
    assert dllm_compile.stats(model)["state_bytes"] == 0
    before = frames()
    with mock.patch.object(unit_code, "lower", side_effect=AssertionError):
        for prompt, response in ((13, 8), (21, 12)):
            dllm_compile.generate(model, models.start(prompt, 0, batch), gen_length=response, **SETTINGS)
    assert frames() == before
    again = dllm_compile.warm(model, 9, 8, batch, **SETTINGS)
    assert not again.compiled
    assert "nothing new" in str(again)


def test_what_it_cannot_do_is_said() -> None:
    model = models.build("llama", num_hidden_layers=1)
    for given, sentence in (
        ({"prompt_length": 0}, "prompt_length is 0; give a whole number of at least 1"),
        ({"prompt_length": 4, "batch": True}, "batch is True; give a whole number of at least 1"),
        ({"prompt_length": 4, "gen_length": 2.0}, "gen_length is 2.0; give a whole number of at least 1"),
        ({"prompt_length": 4, "method": "duel"}, "method is 'duel'; did you mean"),
    ):
        with pytest.raises(ValueError) as caught:
            dllm_compile.warm(model, **{"mask_id": MASK, **given})
        assert sentence in str(caught.value)
    with pytest.raises(ValueError, match="does not say how many tokens it embeds"):
        dllm_compile.warm(torch.nn.Linear(3, 3), 4, mask_id=0)
    with pytest.raises(TypeError, match="give the module that generate will be given"):
        dllm_compile.warm(len, 4, mask_id=0)  # type: ignore[arg-type]
