"""A small sharp model, settings of every method and checks, for tests that know the package by its public names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch

import dllm_compile

from . import models
from .models import MASK
from .test_layers_alone import WIDTH, Layer, LoopBroken, Model

PROMPT, RESPONSE = 6, 8
TOLERANCE = 1e-9
Call = Callable[[torch.Tensor], torch.Tensor]

EXACT: dict[str, Any] = {"method": "exact"}
NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}
NEUTRAL_BLOCKS: dict[str, Any] = {"cache": "dual", "block_length": 4, "refresh_interval": 1}
EQUAL = {"exact": EXACT, "neutral": NEUTRAL, "neutral-dual": NEUTRAL_BLOCKS}
"""Settings whose readable rows are eager's at every step."""

METHODS: dict[str, dict[str, Any]] = {
    "dllm-cache": {"prompt_interval": 16, "response_interval": 8, "transfer_ratio": 0.25},
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": 4},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": 4},
    "sparse": {"method": "sparse-dllm", "block_length": 4},
    "flashblock": {"method": "flashblock", "block_length": 4},
    "dyllm": {"method": "dyllm", "saliency_threshold": 0.9, "full_steps": 1},
    "dkv-cache": {"method": "dkv-cache"},
    "dsb": {"method": "dsb", "block_length": 4, "rows_before": 2},
    "es-dllm": {"method": "es-dllm", "block_length": 4, "row_shares": (0.5,), "row_depths": (0.3,)},
    "streaming": {"method": "streaming-dllm", "block_length": 4, "suffix_window": 1},
}
"""Every method, set so that on these models its partial steps are far from eager."""

PARTIAL = {
    *("response", "select", "keep", "values", "prompt", "prompt+select", "prompt+values"),
    *("block", "salient", "sparse", "sparse salient", "outside", "inside"),
}


class Gained(Layer):
    """A layer with a buffer, ``gain``, that its result is multiplied by."""

    gain: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", 1 + torch.rand(WIDTH) / 4)

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        return super().forward(x, bias)[0] * self.gain, None


class Whole(Model):
    """One graph; a head sharp enough that a token drawn at temperature 1 is mostly among the likeliest."""

    scale: torch.Tensor

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        torch.manual_seed(seed + 1)
        self.layers = torch.nn.ModuleList(Gained() for _ in self.layers)
        self.register_buffer("scale", 1 + torch.rand(WIDTH))
        self.head.weight.data.mul_(8)
        self.head.bias.data[MASK] = -100  # no sampler fills in the mask
        self.embed.register_forward_hook(lambda module, inputs, output: output * self.scale)


class Alone(Whole):
    """The same model; its layers are compiled one at a time, and nothing that sees the ids is."""

    forward = LoopBroken.forward


FORMS: dict[str, type[Whole]] = {"whole": Whole, "alone": Alone}


def build(form: str = "whole", seed: int = 0) -> Whole:
    """A model in float64."""
    model: Whole = FORMS[form](seed).double().eval()
    return model


def start(batch: int = 2, seed: int = 1, prompt: int = PROMPT, response: int = RESPONSE) -> torch.Tensor:
    """Random prompts and masks, ``[batch, prompt + response]``."""
    return models.start(prompt, response, batch, seed)


def fill(logits: torch.Tensor, x: torch.Tensor, count: int = 1) -> torch.Tensor:
    """A copy of ``x`` whose first ``count`` masks of each sequence hold the best tokens."""
    rows = (x == MASK) & ((x == MASK).cumsum(1) <= count)
    return torch.where(rows, logits.argmax(-1), x)


def readable(x: torch.Tensor) -> torch.Tensor:
    """Rows ``[B, S]`` bool that hold the mask, and the row before each."""
    masked = x == MASK
    return masked | torch.cat([masked[:, 1:], masked[:, :1] & False], 1)


def off(got: torch.Tensor, want: torch.Tensor, rows: torch.Tensor) -> float:
    """The largest difference in some rows; infinite where a number is none."""
    assert got.shape == want.shape
    assert rows.any()
    worst = (got - want)[rows].abs().max().item()
    return worst if worst == worst else float("inf")


def steps(model: torch.nn.Module) -> Counter[str]:
    """Steps of a model by name."""
    return Counter(dllm_compile.stats(model)["steps"])


def partial(model: torch.nn.Module) -> int:
    """Steps of a model that computed a part of its rows."""
    return sum(count for name, count in steps(model).items() if name in PARTIAL)


def unmasking(call: Call, x: torch.Tensor, most: int = RESPONSE) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Greedy, from left to right, one token a call: the ids and logits of each call."""
    for _ in range(most):
        logits = call(x).clone()
        yield x, logits
        x = fill(logits, x)
