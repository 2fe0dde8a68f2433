"""Layers whose rows meet outside of their attention are found by trial, whichever role they meet in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import models
from .callers import partial
from .models import MASK
from .test_block_causal import every, worst
from .test_properties import Model, Shape

SHAPE = Shape(layers=1, heads=2, groups=1, head_dim=4, seed=3)
DUAL = {"method": "fast-dllm", "cache": "dual", "shift": False}
Mix = Callable[[torch.Tensor], torch.Tensor]

OVER_TOKENS: dict[str, Mix] = {
    "sum": lambda x: x.cumsum(-2),
    "mean": lambda x: x - x.mean(-2, keepdim=True),
    "roll": lambda x: x.roll(1, -2),
    "softmax": lambda x: x.softmax(-2),
    "pool": lambda x: F.avg_pool1d(x.flatten(0, -3).transpose(1, 2), 3, 1, 1).transpose(1, 2).view(x.shape),
}
OVER_SEQUENCES: dict[str, Mix] = {"mean": lambda x: x + x.mean(0, keepdim=True), "flip": lambda x: x.flip(0)}


class Mixed(Model):
    """What a role is made of, ``[B, heads, S, head_dim]``, or the input of a layer, is mixed."""

    role, mix, several = "k", staticmethod(OVER_TOKENS["sum"]), False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``; nothing in the first layer's stream tells masks from each other."""
        x = self.embed(ids)
        for layer in self.layers:
            a = layer.norm_a(x)
            a = self.mix(a) if self.role == "a" else a
            parts = {name: layer.heads(getattr(layer, name)(a)) for name in "qkv"}
            if self.role in parts:
                parts[self.role] = self.mix(parts[self.role])
            q, k, v = parts["q"], parts["k"], parts["v"]
            if self.several:
                out = torch.tanh(q @ k.transpose(2, 3)).softmax(-1) @ v
            else:
                out = F.scaled_dot_product_attention(q, k, v)
            out = self.mix(out) if self.role == "out" else out
            x = x + layer.o(out.transpose(1, 2).reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def build(role: str, mix: Mix, several: bool = False, layers: int = 1) -> Model:
    model = Model(replace(SHAPE, layers=layers))
    model.__class__ = Mixed
    model.role, model.mix, model.several = role, mix, several  # type: ignore[assignment]
    return model


def see_that_all_is_computed(model: Model, ids: torch.Tensor, block_length: int) -> None:
    """Every step of a loop is as in eager, and the reason is told once."""
    call = models.compiled_loop(model, **DUAL, block_length=block_length)
    with pytest.warns(UserWarning, match="the rows of a layer depend on one another in more than its att") as told:
        apart = worst(call, model, ids, every)
    assert apart < 1e-9
    assert partial(model) == 0
    assert len(told) == 1


@pytest.mark.parametrize("several", [False, True], ids=["one call", "several calls"])
@pytest.mark.parametrize("role", ["k", "v", "a"])
@pytest.mark.parametrize("how", OVER_TOKENS)
def test_keys_and_values_that_hold_other_tokens_are_refused(how: str, role: str, several: bool) -> None:
    """Steps that compute all keys are right, and those that compute a block's alone are not."""
    see_that_all_is_computed(build(role, OVER_TOKENS[how], several), models.start(6, 8), 8)


def test_where_layers_run_one_by_one_it_is_said_of_those_that_rows_meet_in() -> None:
    """dLLM-Cache carries all rows from layer to layer, so that the other layers compute fewer."""
    model = build("k", OVER_TOKENS["sum"], layers=3)
    call = models.compiled_loop(model, prompt_interval=8, response_interval=4, transfer_ratio=0.5, shift=False)
    with pytest.warns(UserWarning, match="every row of some layers at every step: the rows of a layer dep") as told:
        assert worst(call, model, models.start(6, 8), every) < 1e-9
    assert len(told) == 1


@pytest.mark.parametrize("role", ["v", "out"])
def test_rows_that_meet_are_found_among_masks_alone(role: str) -> None:
    """Where there is no prompt all rows of the first call are alike, and each is the mean of all."""
    see_that_all_is_computed(build(role, OVER_TOKENS["mean"]), torch.full((1, 8), MASK), 4)


@pytest.mark.parametrize("role", ["q", "k", "out"])
@pytest.mark.parametrize("how", OVER_SEQUENCES)
def test_rows_of_sequences_that_meet_are_refused(how: str, role: str) -> None:
    ids = models.start(6, 8)
    ids[1, 2:] = MASK  # the blocks of the sequences are at different places
    see_that_all_is_computed(build(role, OVER_SEQUENCES[how]), ids, 4)


# -- two products with the same scores --------------------------------------------------------------------------------


class Twice(Model):
    """The shares of one attention, times values and times values that are made of keys and more."""

    first = "v"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        for layer in self.layers:
            a = layer.norm_a(x)
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            shares = torch.tanh(q @ k.transpose(2, 3)).softmax(-1)
            out = shares @ v + shares @ (k + v) if self.first == "v" else shares @ (k + v) + shares @ v
            x = x + layer.o(out.transpose(1, 2).reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("first", ["v", "k + v"])
def test_one_of_two_products_with_the_same_scores_is_refused_alone(first: str) -> None:
    model = Model(SHAPE)
    model.__class__ = Twice
    model.first = first  # type: ignore[assignment]
    see_that_all_is_computed(model, models.start(6, 8), 8)
    assert dllm_compile.stats(model)["refused"] == []


# -- what is made of the ids alone, and one row for all ---------------------------------------------------------------


class Told(Model):
    """A layer is told how many masks there are, or how many tokens stand before each row; a head adds the first row."""

    how = "share"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``; keys and values know nothing of it."""
        x, masks = self.embed(ids), (ids == MASK).to(torch.float64)
        for layer in self.layers:
            a = layer.norm_a(x)
            told = masks.mean(1)[:, None, None] if self.how == "share" else (1 - masks).cumsum(1).unsqueeze(-1) / 9
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            out = F.scaled_dot_product_attention(q * told.unsqueeze(1), k, v)
            x = x + layer.o(out.transpose(1, 2).reshape(x.shape)) * (1 + told)
        x = self.norm(x)
        logits: torch.Tensor = self.head(x + x[:, :1] if self.how == "first" else x)
        return logits


def told(how: str) -> Model:
    model = Model(SHAPE)
    model.__class__ = Told
    model.how = how  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("how", ["share", "count"])
def test_what_a_layer_reads_of_all_ids_is_of_all_in_partial_steps_too(how: str) -> None:
    """Every third row of 6 tokens and 12 masks has the share of masks of all: a trial of these alone is fooled."""
    model = told(how)
    call = models.compiled_loop(model, **DUAL, block_length=12)
    assert worst(call, model, models.start(6, 12), every) < 1e-9
    assert partial(model) == 11


def test_one_row_that_a_head_adds_to_all_is_no_branch_of_a_layer() -> None:
    model = told("first")
    call = models.compiled_loop(model, method="dyllm", full_steps=99)
    assert worst(call, model, models.start(6, 8), every) < 1e-9
