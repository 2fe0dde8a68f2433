"""Weights that are tensors of a class of their own, as quantizing tools make them; written here without a tool."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import return_and_correct_aliasing

import dllm_compile
from dllm_compile.runtime import unit_code

from . import models
from .test_graphs import NEUTRAL, Layer, Model, steps


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
    """Weights that print the same share no code where they are quantized by other numbers."""
    keys: list[set[str]] = []
    for factor in (1.0, 3.0):
        torch.manual_seed(0)
        m = Model([Layer(False) for _ in range(2)]).double().eval().requires_grad_(False)
        for layer in m.layers:
            layer.up.weight = nn.Parameter(Scaled(layer.up.weight.detach(), factor), requires_grad=False)  # type: ignore
        dllm_compile.reset()
        call = models.compiled_loop(m, **NEUTRAL)
        for got, want in zip(steps(call, count=3), steps(m, count=3), strict=True):
            torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
        assert not dllm_compile.stats(m)["refused"]
        keys.append({code.unit.key for code in unit_code._SHARED.values() if code.unit.is_layer})
    assert len(keys[0]) == 1
    assert keys[0].isdisjoint(keys[1])
