"""A model that takes a third of the time to trace of what transformers' models take, for tests of what is behind it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .test_properties import Model, Shape


class Output(NamedTuple):
    """As models of transformers return their logits."""

    logits: torch.Tensor


class Small(Model):
    """The model of :mod:`tests.test_properties`, called as one of transformers is."""

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """Logits ``[B, S, V]``."""
        return Output(super().forward(input_ids, attention_mask))


def build(dtype: torch.dtype = torch.float64, seed: int = 0, layers: int = 2) -> Small:
    """A random one."""
    model: Small = Small(Shape(layers=layers, heads=2, groups=1, head_dim=4, seed=seed)).to(dtype).eval()
    return model
