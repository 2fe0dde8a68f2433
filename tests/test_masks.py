"""An attention mask that hides nothing is none, for as long as it does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.program import Program

from .test_properties import MASK, Model, Shape

FAST_DLLM = {"method": "fast-dllm", "cache": "dual", "block_length": 4, "shift": False}
SPARSE = {"method": "sparse-dllm", "keep_ratio": 0.5, "block_length": 4, "shift": False}


def masked() -> set[bool]:
    """Whether layers were written with their masks, without, or both."""
    return {a.masked for code in unit_code._SHARED.values() if code.unit.is_layer for a in code.variants}


class Masked(Model):
    """Makes its mask ``[B, 1, S, S]`` in one of several ways."""

    kind = "keys"

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.get_buffer("rates")
        tokens, x = ids.shape[1], self.embed(ids)
        if self.kind == "sizes":  # as transformers 5.17 makes it where it is traced
            seen = (torch.arange(tokens)[None, None, :, None] >= 0).expand(1, 1, tokens, tokens)
        else:
            assert mask is not None
            seen = mask.bool()[:, None, None, :].expand(-1, 1, tokens, tokens)
        if self.kind == "added":
            seen = torch.where(seen, 0.0, -1e9).to(x.dtype)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), seen)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def built(kind: str | None) -> Model:
    """A random model; without ``kind`` it has no mask."""
    model = Model(Shape(layers=2, heads=2, groups=1, head_dim=4, seed=0))
    if kind is not None:
        model.__class__ = Masked
        model.kind = kind  # type: ignore[assignment]
    return model


def generated(call: Any, *mask: torch.Tensor) -> list[torch.Tensor]:
    """Logits of the masked rows of the block at each of eight steps, which fill one token from the left each."""
    ids = torch.arange(3, 13).repeat(2, 1) % 9 + 3
    ids[1, 0], ids = 30, torch.cat([ids, torch.full((2, 8), MASK)], 1)
    rows, loop = [], dllm_compile.loop()
    with torch.no_grad():
        for at in range(10, 18):
            with loop:
                logits = call(ids, *mask)
            rows.append(logits[:, at : at + 4 - (at - 10) % 4].clone())
            ids = ids.clone()
            ids[:, at] = 2 + at % 3
    return rows


@pytest.mark.parametrize("options", [FAST_DLLM, SPARSE], ids=["fast-dllm", "sparse-dllm"])
@pytest.mark.parametrize("kind", ["sizes", "keys", "added"])
def test_a_mask_that_hides_nothing_is_left_out(kind: str, options: dict[str, Any]) -> None:
    more = {**options, "mask_id": MASK, "lowering": "eager"}
    plain = torch.compile(built(None), backend="dllm", options=more)
    call = torch.compile(built(kind), backend="dllm", options=more)
    ones = () if kind == "sizes" else (torch.ones(2, 18, dtype=torch.int64),)
    want = generated(plain)
    torch.compiler.reset()
    got = generated(call, *ones)
    assert masked() == {False}
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


class Whole(Masked):
    """Takes its mask ``[B, 1, S, S]`` as it is."""

    breaks = False

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.get_buffer("rates")
        x = self.embed(ids)
        if self.breaks:
            torch._dynamo.graph_break()
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
            if self.breaks:
                torch._dynamo.graph_break()
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.filterwarnings("ignore:dllm. a graph broke")
@pytest.mark.parametrize("size", [24, 260])  # of the larger mask, not all numbers are compared at each step
@pytest.mark.parametrize("layered", [False, True])
@pytest.mark.parametrize("how", ["another", "in place", "unseen"])
def test_one_that_comes_to_hide_a_key_hides_it_at_once(how: str, layered: bool, size: int) -> None:
    model = Model(Shape(layers=3, heads=2, groups=1, head_dim=4, seed=0))
    model.__class__, model.breaks = Whole, layered  # type: ignore[assignment]
    neutral = {"prompt_interval": 1, "response_interval": 1, "shift": False, "mask_id": MASK, "lowering": "eager"}
    call = torch.compile(model, backend="dllm", options=neutral)
    ids = torch.randint(3, MASK, (1, size), generator=torch.Generator().manual_seed(0))
    ids[:, -8:] = MASK
    mask = torch.ones(1, 1, size, size, dtype=torch.bool)
    with torch.no_grad(), dllm_compile.loop():
        for at in range(size - 8, size - 1):
            got, want = call(ids, mask)[:, at:], model(ids, mask)[:, at:]
            torch.testing.assert_close(got, want, atol=1e-9, rtol=0)
            ids = ids.clone()
            ids[:, at] = 2 + at % 3
            if at == size - 6:
                mask = mask.clone() if how == "another" else mask
                (mask.data if how == "unseen" else mask)[..., 1] = False


@pytest.mark.parametrize("options", [FAST_DLLM, SPARSE], ids=["fast-dllm", "sparse-dllm"])
@pytest.mark.parametrize("kind", ["keys", "added"])
def test_one_that_hides_a_key_is_read_whatever_the_one_before_hid(kind: str, options: dict[str, Any]) -> None:
    more = {**options, "mask_id": MASK, "lowering": "eager"}
    ones = torch.ones(2, 18, dtype=torch.int64)
    hides = ones.clone()
    hides[0, :2] = 0
    model = built(kind)
    call = torch.compile(model, backend="dllm", options=more)
    first = generated(call, ones)
    assert masked() == {False}
    got = generated(call, hides)
    assert masked() == {False, True}
    again = generated(call, ones)
    torch.compiler.reset()
    want = generated(torch.compile(model, backend="dllm", options=more), hides)
    for a, b, c, d in zip(got, want, first, again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(c, d)
        assert (a - c)[0].abs().max() > 1e-6


def test_each_sequence_looks_at_its_mask_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a size, whose graph is made then, and the next."""
    looks, check = [], Program.check
    monkeypatch.setattr(Program, "check", lambda program, args: looks.append(check(program, args)))
    call = torch.compile(built("keys"), backend="dllm", options={**FAST_DLLM, "mask_id": MASK, "lowering": "eager"})
    for sequences in (1, 2):
        generated(call, torch.ones(2, 18, dtype=torch.int64))
        assert len(looks) == sequences


class OfTokens(Model):
    """Makes its mask ``[B, 1, S, S]`` of its tokens: 1 is hidden from all others, or stands between texts."""

    kind = "hidden"

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        tokens = ids.shape[1]
        angles = torch.arange(tokens, device=ids.device)[:, None] * self.get_buffer("rates")
        seen, x = self.seen(ids), self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), seen)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits

    def seen(self, ids: torch.Tensor) -> torch.Tensor:
        tokens = ids.shape[1]
        there = (ids != 1)[:, None, None, :].expand(-1, 1, tokens, tokens)
        itself = torch.eye(tokens, dtype=torch.bool)
        text = (ids == 1).cumsum(1)
        if self.kind == "keys":
            return (ids != 1)[:, None, None, :]
        if self.kind == "texts":
            return (text[:, :, None] == text[:, None, :])[:, None]
        if self.kind == "added":
            return (
                torch.where(there | itself, 0.0, -1e9).double() + (text[:, :, None] * text[:, None, :])[:, None] * 0.1
            )
        if self.kind == "masks":
            return (ids != MASK)[:, None, None, :] | itself
        if self.kind == "causal":
            return there & torch.ones(tokens, tokens, dtype=torch.bool).tril()
        return there


def of_tokens(kind: str, layers: int = 2) -> Model:
    """A random model with ``layers``."""
    model = Model(Shape(layers=layers, heads=2, groups=1, head_dim=4, seed=0))
    model.__class__, model.kind = OfTokens, kind  # type: ignore[assignment]
    return model


def generated_apart(call: Any, **more: Any) -> list[torch.Tensor]:
    """:func:`generated` on a prompt with two tokens 1, at other places in each sequence."""
    return generated(lambda ids: call(ids.index_put((torch.arange(2), torch.tensor([4, 7])), torch.tensor(1))), **more)


EXACT_IN_BLOCK = {
    "neutral": {"prompt_interval": 1, "response_interval": 100, "transfer_ratio": 1.0, "shift": False},
    "dual": FAST_DLLM,
    "streaming": {"method": "streaming-dllm", "block_length": 4, "suffix_window": 8, "shift": False},
}
"""Settings whose partial steps equal eager in the block, if a layer's keys and values are made of tokens alone."""


@pytest.mark.parametrize(
    ("kind", "name"),
    [*((kind, "dual") for kind in ("keys", "hidden", "texts", "added")), ("texts", "neutral"), ("texts", "streaming")],
)
def test_one_that_is_made_of_the_tokens_is_read_on_the_rows_of_a_step(kind: str, name: str) -> None:
    model = of_tokens(kind, layers=2 if name == "neutral" else 1)
    call = torch.compile(model, backend="dllm", options={**EXACT_IN_BLOCK[name], "mask_id": MASK, "lowering": "eager"})
    for a, b in zip(generated_apart(call), generated_apart(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    found = dllm_compile.stats(model)
    assert found["steps"]["full"] <= 2  # one a block
    assert found["layers"]["cached"] >= 6


@pytest.mark.parametrize("method", ["sparse-dllm", "dyllm", "flashblock"])
def test_one_that_is_made_of_the_tokens_is_as_one_that_is_handed_over(method: str) -> None:
    """Far from eager, and the same."""
    options = {"method": method, "shift": False, "mask_id": MASK, "lowering": "eager"}
    options |= {"full_steps": 1, "saliency_threshold": 0.9} if method == "dyllm" else {"block_length": 4}
    model, handed = of_tokens("texts"), of_tokens("texts")
    seen, handed.__class__ = model.seen, Whole
    call, other = (torch.compile(each, backend="dllm", options=options) for each in (model, handed))
    got, want = generated_apart(call), generated_apart(lambda ids: other(ids, seen(ids)))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert max(float((a - b).abs().max()) for a, b in zip(got, generated_apart(model), strict=True)) > 1e-3
    mine, others = (dllm_compile.stats(each) for each in (model, handed))
    assert mine["rows"] == others["rows"]


def test_layers_behind_the_first_read_it_on_the_rows_of_a_step() -> None:
    model = of_tokens("texts", layers=3)
    call = torch.compile(model, backend="dllm", options={**FAST_DLLM, "mask_id": MASK, "lowering": "eager"})
    generated_apart(call)
    assert dllm_compile.stats(model)["rows"] == {"full": 2 * 18, "block": 6 * 4}


@pytest.mark.parametrize("options", [FAST_DLLM, SPARSE], ids=["fast-dllm", "sparse-dllm"])
def test_one_that_is_another_at_each_step_computes_every_row(options: dict[str, Any]) -> None:
    """What is kept of rows was made with the mask before."""
    model = of_tokens("masks")
    call = torch.compile(model, backend="dllm", options={**options, "mask_id": MASK, "lowering": "eager"})
    for a, b in zip(generated(call), generated(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_one_that_is_made_of_the_tokens_and_causal_is_refused() -> None:
    model = of_tokens("causal")
    call = torch.compile(model, backend="dllm", options={**FAST_DLLM, "mask_id": MASK, "lowering": "eager"})
    with pytest.warns(UserWarning, match="the attention mask is causal"):
        got = generated(call)
    for a, b in zip(got, generated(model), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
