"""Layers that code outside of any graph cuts in two, between their attention and their MLP."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import models
from .callers import EQUAL, METHODS, TOLERANCE, fill, off, partial, readable, start
from .models import MASK
from .test_layers_alone import Layer, Model

LOSSY = ("dllm-cache", "dual", "dyllm")
SEEN: list[torch.Tensor] = []
"""What the attention parts of the layers gave in the call at hand."""


class Gate(torch.nn.Module):
    """Makes each row of that row alone, or takes the mean of all; outside of the graph, if ``cut``."""

    def __init__(self, cut: bool = True, mixes: bool = False) -> None:
        super().__init__()
        self.cut, self.mixes = cut, mixes

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.cut:
            torch._dynamo.graph_break()
        return x - x.mean(1, keepdim=True) if self.mixes else x * x.mean(-1, keepdim=True).sigmoid()


@torch.compiler.disable
def outside(gate: Gate, x: torch.Tensor) -> torch.Tensor:
    SEEN.append(x.clone())
    return gate(x)  # type: ignore[no-any-return]


class Gated(Layer):
    """``cut``: the gate is called by a function that Dynamo does not trace."""

    def __init__(self, gate: Gate, cut: bool) -> None:
        super().__init__()
        self.gate, self.cut = gate, cut

    def attended(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        q, k, v = (t.view(batch, tokens, 2, -1).transpose(1, 2) for t in self.qkv(self.norm_a(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x + self.out(attended.transpose(1, 2).reshape(batch, tokens, width))

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(F.gelu(self.up(self.norm_m(x))))

    def forward(self, x: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, None]:
        x = self.attended(x)
        x = outside(self.gate, x) if self.cut else self.gate(x)
        return self.rest(x), None


def build(gate: Gate, cut: bool) -> Model:
    model = Model()
    torch.manual_seed(3)
    model.layers = torch.nn.ModuleList(Gated(gate, cut) for _ in model.layers)
    model.head.weight.data.mul_(8)
    model.head.bias.data[MASK] = -100
    return model.double().eval()


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("error", message="dllm")
        yield


@pytest.mark.parametrize("mixes", [False, True])
@pytest.mark.parametrize("name", EQUAL)
def test_neutral_settings_equal_eager(name: str, mixes: bool) -> None:
    """Whatever happens between the parts."""
    model = build(Gate(mixes=mixes), cut=True)
    warnings.filterwarnings("ignore", "dllm: a graph broke at ")
    call = models.compiled_loop(model, **EQUAL[name])
    x = start()
    while (x == MASK).any():
        got = call(x).clone()
        assert off(got, model(x), readable(x)) < TOLERANCE
        x = fill(got, x)


@pytest.mark.parametrize("name", LOSSY)
def test_parts_behind_the_first_compute_every_row(name: str) -> None:
    """Nothing shows that what they are given comes of the step; the first knows, and caches its layer."""
    model = build(Gate(), cut=True)
    warnings.filterwarnings("ignore", "dllm: a graph broke at ")
    call = models.compiled_loop(model, **METHODS[name])
    x = start()
    while (x == MASK).any():
        SEEN.clear()
        logits = call(x).clone()
        given = [layer.rest(layer.gate(seen)) for layer, seen in zip(model.layers, SEEN, strict=True)]
        for layer, before, seen in zip(model.layers[1:], given, SEEN[1:], strict=False):
            assert off(seen, layer.attended(before), torch.ones_like(x, dtype=torch.bool)) < TOLERANCE
        assert off(logits, model.head(model.norm(given[-1])), readable(x)) < TOLERANCE
        x = fill(logits, x)
    assert partial(model) or name == "dllm-cache"  # which computes every row of the first


def test_the_line_that_cuts_is_named_once() -> None:
    lines, first = inspect.getsourcelines(Gated.forward)
    line = first + next(i for i, text in enumerate(lines) if "outside(" in text)
    call = models.compiled_loop(build(Gate(), cut=True), **METHODS["dual"])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        x = start()
        for _ in range(3):
            x = fill(call(x).clone(), x)
    said = [str(each.message) for each in caught if str(each.message).startswith("dllm: ")]
    assert [f"{__file__}:{line} " in each for each in said] == [True]


@pytest.mark.parametrize("name", LOSSY)
def test_a_module_of_its_own_that_breaks_can_be_prepared(name: str) -> None:
    """So what the manual says to do: the layer is whole, and cached as one that breaks nowhere."""
    own = build(Gate(), cut=False)
    cut, whole = dllm_compile.prepare(own, start()), build(Gate(cut=False), cut=False)
    calls = [models.compiled_loop(each, **METHODS[name]) for each in (cut, whole)]
    x = start()
    while (x == MASK).any():
        got, want = (call(x).clone() for call in calls)
        assert off(got, want, readable(x)) < TOLERANCE
        x = fill(want, x)
    assert partial(cut) == partial(whole) > 0
    assert dllm_compile.stats(cut)["layers"] == dllm_compile.stats(whole)["layers"]
