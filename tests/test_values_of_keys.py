"""Layers whose values are made of their keys, or keys of values, by more than views."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import models
from .callers import METHODS, partial
from .test_block_causal import every, worst
from .test_properties import Model, Shape

SHAPE = Shape(layers=2, heads=4, groups=2, head_dim=4, seed=5)
ALL_ROWS = {"prompt_interval": 1, "response_interval": 100, "transfer_ratio": 1.0}
"""Partial steps that compute every row."""


class OneProjection(Model):
    """Keys ``y`` and values ``norm(y)``, or the other way round, or values of ``y`` and the hidden state."""

    how = "values of keys"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        for layer in self.layers:
            a = layer.norm_a(x)
            q, y = layer.heads(layer.q(a)), layer.heads(layer.k(a))
            k, v = y, F.layer_norm(y, y.shape[-1:])
            if self.how == "keys of values":
                k, v = v, k
            elif self.how == "of more":
                v = v + layer.heads(layer.v(a))
            k, v = (each.repeat_interleave(layer.shape.groups, 1) for each in (k, v))
            x = x + layer.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape))
            m = layer.norm_m(x)
            x = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def largest(how: str, **options: Any) -> tuple[float, torch.nn.Module]:
    """The largest difference from eager in a loop, and the model."""
    model = Model(SHAPE)
    model.__class__ = OneProjection
    model.how = how  # type: ignore[assignment]
    call = models.compiled_loop(model, shift=False, **options)
    return worst(call, model, models.start(8, 8), every), model


@pytest.mark.parametrize("how", ["values of keys", "keys of values"])
def test_partial_steps_that_compute_all_rows_equal_eager(how: str) -> None:
    apart, model = largest(how, **ALL_ROWS)
    assert apart < 1e-9
    assert partial(model) > 0


@pytest.mark.parametrize("how", ["values of keys", "keys of values"])
@pytest.mark.parametrize("method", ["dllm-cache", "dual", "sparse", "flashblock"])
def test_methods_run_partial_steps(how: str, method: str) -> None:
    _, model = largest(how, **METHODS[method])
    assert partial(model) > 0
    assert dllm_compile.stats(model)["refused"] == []


def test_a_change_of_values_is_not_followed_through_more_than_views() -> None:
    with pytest.warns(
        UserWarning, match="for fewer rows: the values of attention are made of its keys, and not by views"
    ):
        apart, _ = largest("values of keys", **METHODS["dyllm"])
    assert apart < 1e-9


def test_values_of_keys_and_more_are_refused() -> None:
    with pytest.warns(UserWarning, match="are made of its keys and more, and keys are kept"):
        apart, _ = largest("of more", **METHODS["dllm-cache"])
    assert apart < 1e-9
