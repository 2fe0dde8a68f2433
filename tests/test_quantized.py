"""Weights of fewer bits: by the tools that are installed, and what such layers do, written here without a tool."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import dllm_compile
from dllm_compile.bench.quantized import TOOLS, linears
from dllm_compile.runtime import unit_code

from . import models
from .test_graphs import NEUTRAL, PARTIAL, Layer, Model, steps

TOKENS = 17
"""Of a call that ``steps`` makes."""

# -- tools ------------------------------------------------------------------------------------------------------------


def _largest(got: list[torch.Tensor], want: list[torch.Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(got, want, strict=True))


def _model() -> torch.nn.Module:
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    return models.build("llama", torch.float32, **sizes).requires_grad_(False)


def _check_model(m: torch.nn.Module, lowering: str, most: float = 1e-4) -> None:
    """Neutral equals eager, as it is written; so does a full step as it is lowered, but for ``most``; both layers run
    partial steps.
    """

    def run(call: Any) -> list[torch.Tensor]:
        return steps(lambda ids: call(input_ids=ids).logits, count=3)

    want = run(m)
    assert _largest(run(models.compiled_loop(m, **NEUTRAL)), want) < 1e-4
    dual = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "shift": False}
    got = run(models.compiled_loop(m, lowering=lowering, **dual))
    assert _largest(got[:1], want[:1]) < most
    said = dllm_compile.stats(m)
    assert not said["refused"]
    assert said["layers"] == {"seen": 12, "cached": 4}  # of the loops together: all but the first of the partial steps


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TOOLS)
def test_a_quantized_model_is_cached_and_equals_itself_in_eager(name: str) -> None:
    pytest.importorskip(TOOLS[name].package)
    m = _model()
    TOOLS[name].quantize(m, linears(m))
    _check_model(m, "eager" if name.startswith("torchao") else "inductor")


@pytest.mark.filterwarnings("ignore")
def test_all_kinds_of_quantized_weights_go_through_inductor() -> None:
    """One layer has all of torchao's, as each costs a minute to compile."""
    pytest.importorskip(TOOLS["torchao int4"].package)
    m = _model()
    ways = {"self_attn": "torchao int8", "gate_proj": "torchao int8 dynamic", "": "torchao int4"}
    found = linears(m)
    for part, name in ways.items():
        TOOLS[name].quantize(m, {n: found.pop(n) for n in list(found) if part in n})
    _check_model(m, "inductor", most=0.2)


# -- without a tool ---------------------------------------------------------------------------------------------------


def _replaced(make: Callable[[nn.Linear], nn.Module], dtype: torch.dtype = torch.float64) -> Model:
    """A model of two layers with another module for each linear one of them."""
    torch.manual_seed(0)
    m = Model([Layer(False) for _ in range(2)]).to(dtype).eval().requires_grad_(False)
    for layer in m.layers:
        for name, each in list(layer.named_children()):
            if isinstance(each, nn.Linear):
                setattr(layer, name, make(each))
    return m


def _check(m: Model, *, cached: bool = True, atol: float = 1e-12) -> None:
    """Neutral equals eager; and whether layers take partial steps."""
    call = models.compiled_loop(m, **NEUTRAL)
    for got, want in zip(steps(call, count=3), steps(m, count=3), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=atol)
    steps(models.compiled_loop(m, **PARTIAL), count=3)
    said = dllm_compile.stats(m)
    assert not said["refused"]
    assert bool(said["layers"]["cached"]) == cached


class Unpacked(nn.Module):
    """Two weights of 4 bits a byte, put side by side at every call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        levels = linear.weight.mul(16).round().clamp(-8, 7).add(8).to(torch.uint8)
        half = len(levels) // 2
        self.packed = nn.Parameter(levels[:half] << 4 | levels[half:], requires_grad=False)
        self.scale = torch.tensor(1 / 16, dtype=linear.weight.dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, width = self.packed.shape
        weight = torch.empty(2 * half, width, dtype=x.dtype)
        weight[:half] = (self.packed & 0xF0) >> 4
        weight[half:] = self.packed & 0x0F
        weight -= 8
        return x @ (weight * self.scale).t()


def test_weights_that_are_unpacked_by_assignment_are_no_concern_of_the_cache() -> None:
    _check(_replaced(Unpacked))


class Clipped(nn.Module):
    """Sets the items of a tensor that a mask names to a number, and others to numbers of another dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x)
        out[out > 0.4] = 0.4
        low = out < -0.4
        out[low] = torch.full((), -0.5, dtype=torch.float16)
        return out


def test_items_may_be_assigned_by_a_mask() -> None:
    _check(_replaced(Clipped))


class HandsOver(nn.Module):
    """Makes its weight's memory that of another tensor at every call, and reads that one."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros_like(linear.weight), requires_grad=False)
        self.kept, self.bias = linear.weight.detach().clone(), linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = F.linear(x, self.kept, self.bias)
        self.weight.data = self.kept
        return out


def test_a_weight_may_be_handed_other_memory_at_every_call() -> None:
    m = _replaced(HandsOver)
    _check(m)
    first: Any = m.layers[0]
    assert first.q.weight.data_ptr() == first.q.kept.data_ptr()
    other = _replaced(HandsOver)
    plain = [each.clone() for each in steps(other, count=1)]
    with torch.no_grad():
        call = models.compiled_loop(other, **PARTIAL)
        steps(call, count=3)
        for layer in other.layers:
            layer.up.kept.mul_(-1)  # type: ignore[union-attr,operator]
        changed = steps(call, count=1)
    torch.testing.assert_close(changed, steps(other, count=1), rtol=0, atol=1e-12)
    assert _largest(changed, plain) > 1e-3


class Shared(nn.Module):
    """Writes to an input that nothing else reads, in memory that another one is read from before."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear, self.scale = linear, torch.ones(8, dtype=linear.weight.dtype)
        self.part = self.scale[:1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.linear(x) * self.scale[0]
        self.part.add_(1)
        return out


def test_numbers_that_are_written_to_an_input_are_not_written_earlier() -> None:
    got = steps(models.compiled_loop(_replaced(Shared), **NEUTRAL), count=3)
    want = steps(_replaced(Shared), count=3)
    assert _largest(got, want) < 1e-12


@torch.library.custom_op("dllm_tests::coded", mutates_args=())
def coded(x: torch.Tensor, weight: torch.Tensor, code: torch.Tensor, mixes: bool) -> torch.Tensor:
    """``x`` [..., K], half, times rows [N, K] of numbers that ``code`` [E] lists; ``mixes`` takes their mean off."""
    torch._check(x.dtype == torch.float16, lambda: "half alone")
    out = x.double() @ code[weight.long()].double().t()
    return (out - out.mean(-2, keepdim=True) if mixes else out).half()


@coded.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, code: torch.Tensor, mixes: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], len(weight)))


class Coded(nn.Module):
    """A linear layer by an operation that nobody knows, which has a kernel for one dtype."""

    def __init__(self, linear: nn.Linear, mixes: bool) -> None:
        super().__init__()
        self.mixes = mixes
        self.code = torch.linspace(-0.4, 0.4, TOKENS).half()  # as many as there are tokens, by chance
        self.index = nn.Parameter(
            linear.weight.mul(16).round().clamp(-8, 8).add(8).to(torch.uint8), requires_grad=False
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return coded(x.half(), self.index, self.code, self.mixes).to(x.dtype)


@pytest.mark.parametrize("mixes", [False, True])
def test_an_unknown_operation_on_packed_weights_is_tried(mixes: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        _check(_replaced(lambda linear: Coded(linear, mixes), torch.float32), cached=not mixes, atol=1e-6)


class Scaled(torch.Tensor):
    """A weight that is a tensor times a number, of which its text says nothing."""

    inner: torch.Tensor
    factor: float

    @staticmethod
    def __new__(cls, inner: torch.Tensor, factor: float) -> Scaled:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined]
        made.inner, made.factor = inner, factor
        return made  # type: ignore[no-any-return]

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return "Scaled"

    def __tensor_flatten__(self) -> tuple[list[str], float]:
        return ["inner"], self.factor

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, torch.Tensor], factor: float, *_: Any) -> Scaled:
        return cls(inner["inner"], factor)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            made = cls(func(args[0].inner), args[0].factor)
            return return_and_correct_aliasing(func, args, kwargs or {}, made)
        plain = [each.inner * each.factor if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


def test_code_for_one_quantized_weight_is_not_taken_for_another() -> None:
    keys: list[set[str]] = []
    for factor in (1.0, 3.0):
        m = _replaced(lambda linear: linear)
        for layer in m.layers:
            layer.up.weight = nn.Parameter(Scaled(layer.up.weight.detach(), factor), requires_grad=False)  # type: ignore
        dllm_compile.reset()
        _check(m)
        keys.append({code.unit.key for code in unit_code._SHARED.values() if code.unit.is_layer})
    assert len(keys[0]) == 1
    assert keys[0].isdisjoint(keys[1])
