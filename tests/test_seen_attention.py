"""Attention that a model writes by several calls is cached as one; what is not seen to be attention is said."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers

import dllm_compile

from . import models
from .callers import METHODS, RESPONSE, fill, partial, start
from .models import CAUSAL_LM
from .test_block_causal import every, worst
from .test_properties import Model, Shape

CACHED = {"mask_id": models.MASK, "lowering": "eager", "cache": "dual", "block_length": 4}


class Blended(torch.nn.Module):
    """Rows meet in a mean, which is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(models.VOCABULARY, 8)
        self.head = torch.nn.Linear(8, models.VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        logits: torch.Tensor = self.head(x + x.cumsum(1).flip(1))
        return logits


def told(run: object) -> list[str]:
    """Warnings of this package while ``run`` is called."""
    assert callable(run)
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in found if str(each.message).startswith("dllm")]


@pytest.mark.parametrize("how", ["loop", "generate"])
def test_where_rows_meet_is_named_once(how: str) -> None:
    model = Blended().double().eval()

    def loop() -> None:
        call, x = torch.compile(model, backend="dllm", options=CACHED), start()
        for _ in range(3):
            x = fill(call(x), x)

    def generate() -> None:
        more = {name: value for name, value in CACHED.items() if name != "mask_id"}
        dllm_compile.generate(model, start()[:, :-RESPONSE], gen_length=RESPONSE, steps=4, mask_id=models.MASK, **more)

    said, *more = told(loop if how == "loop" else generate)
    assert not more
    assert "computes every row at every step: rows of its graph meet where no attention is seen (at node" in said
    assert "cumsum" in said


# -- one that is written by several calls -----------------------------------------------------------------------------

ONE_LAYER = {"num_hidden_layers": 1}
"""Keys and values are made of tokens alone then: steps that compute a block are exact in it, as is the rest of it."""
RELATIVE = {
    "relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_buckets": 4, "max_relative_positions": 16,
}  # fmt: skip
SLIDING = {"sliding_window": 4, "head_dim": 8}
BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "capped": ("Gemma2", {**CAUSAL_LM, **SLIDING, "attn_logit_softcapping": 2.0}),
    "sinks": ("GptOss", {**CAUSAL_LM, **SLIDING, "num_local_experts": 2, "num_experts_per_tok": 1}),
    "views": ("DebertaV2", {**models.SHAPE, "intermediate_size": 48}),
    "positions": ("DebertaV2", {**models.SHAPE, "intermediate_size": 48, **RELATIVE}),
    "shared positions": ("DebertaV2", {**models.SHAPE, "intermediate_size": 48, **RELATIVE, "share_att_key": True}),
}
ALL_ROWS = {"prompt_interval": 1, "response_interval": 100, "transfer_ratio": 1.0, "shift": False}
DUAL = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "shift": False}


def build(name: str, **more: Any) -> torch.nn.Module:
    """A random model, in float64 where its own code computes in that."""
    family, settings = BUILT[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**settings, **more})
    head = "ForMaskedLM" if family == "DebertaV2" else "ForCausalLM"
    model: torch.nn.Module = getattr(transformers, family + head)(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    return model.to(torch.float32 if name == "sinks" else torch.float64).eval()


def logits_of(call: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda ids: call(ids).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("name", "lowering"),
    [*((name, "eager") for name in BUILT), ("capped", "inductor")],
)
def test_blocks_of_one_layer_are_exact(name: str, lowering: str) -> None:
    """Gemma 2's own code takes the softmax in float32, GPT-OSS's computes in it: Inductor rounds these otherwise."""
    model = build(name, **ONE_LAYER)
    call = models.compiled_loop(model, **DUAL, lowering=lowering, dynamic=True if lowering == "inductor" else None)
    for prompt in (6, 9):  # the block begins where the prompt ends
        apart = worst(logits_of(call), logits_of(model), models.start(prompt, 8), every)
        assert apart < (1e-4 if name == "sinks" else 1e-5 if (name, lowering) == ("capped", "inductor") else 1e-9)
    assert partial(model) == 14
    assert dllm_compile.stats(model)["layers"]["cached"] == 14


@pytest.mark.parametrize("name", BUILT)
def test_partial_steps_that_compute_all_rows_equal_eager(name: str) -> None:
    model = build(name)
    call = models.compiled_loop(model, **ALL_ROWS)
    apart = worst(logits_of(call), logits_of(model), models.start(6, 8), every)
    assert apart < (1e-3 if name == "sinks" else 1e-9)
    assert partial(model) > 0
    assert dllm_compile.stats(model)["refused"] == []


@pytest.mark.parametrize("method", ["sparse", "dyllm", "flashblock"])
def test_a_method_that_changes_which_keys_are_read_computes_every_row(method: str) -> None:
    model = build("capped")
    call = models.compiled_loop(model, **METHODS[method])
    with pytest.warns(UserWarning, match="a layer cannot be written for fewer rows: attention that is written by"):
        apart = worst(logits_of(call), logits_of(model), models.start(6, 8), every)
    assert apart < 1e-9


class Residual(Model):
    """Adds the scores of the layer before to those of each."""

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        before: torch.Tensor | None = None
        for layer in self.layers:
            a = layer.norm_a(x)
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            scores = q @ k.transpose(2, 3)
            before = scores if before is None else scores + before
            x = x + layer.o((before.softmax(-1) @ v).transpose(1, 2).reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("options", [ALL_ROWS, DUAL], ids=["features", "dual"])
def test_scores_that_go_from_layer_to_layer_make_one_layer_and_it_is_said(options: dict[str, Any]) -> None:
    """Of the rows of features, the first layer is always full, and of a block, rows meet in it."""
    model = Model(Shape(layers=3, heads=2, groups=1, head_dim=4, seed=3))
    model.__class__ = Residual
    call = models.compiled_loop(model, **options)
    reason = "its 3 attention calls are one layer" if options is ALL_ROWS else "the rows of a layer depend on one anoth"
    with pytest.warns(UserWarning, match=f"computes every row at every step: {reason}") as said:
        assert worst(call, model, models.start(6, 8), every) < 1e-12
    assert len(said) == 1


class Written(Model):
    """Scores that hide later tokens in one of several ways."""

    how = "filled"

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        x, tokens = self.embed(ids), ids.shape[1]
        later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1)
        for layer in self.layers:
            a = layer.norm_a(x)
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            scores = torch.tanh(q @ k.transpose(2, 3))
            if self.how == "filled":
                shares = scores.masked_fill(later, -1e30).softmax(-1)
            elif self.how == "chosen":
                shares = torch.where(~later, scores, -1e30).softmax(-1)
            elif self.how == "added":
                shares = (scores + torch.zeros(tokens, tokens).double().masked_fill(later, -torch.inf)).softmax(-1)
            else:
                shares = scores * (~later).double()
            x = x + layer.o((shares @ v).transpose(1, 2).reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("how", ["filled", "chosen", "added", "times"])
def test_scores_that_hide_later_tokens_are_refused(how: str) -> None:
    model = Model(Shape(layers=1, heads=2, groups=1, head_dim=4, seed=3))
    model.__class__ = Written
    model.how = how  # type: ignore[assignment]
    call = models.compiled_loop(model, **METHODS["dllm-cache"], shift=False)
    with pytest.warns(UserWarning, match="the attention mask is causal"):
        assert worst(call, model, models.start(6, 8), every) < 1e-12


# -- einsum ------------------------------------------------------------------------------------------------------------

EQUATIONS = {
    "tokens first": ("bqhd,bkhd->bhqk", "bhqk,bkhd->bqhd"),
    "heads first": ("bhqd,bhkd->bhqk", "bhqk,bhkd->bhqd"),
    "dots": ("...qd, ...kd -> ...qk", "...qk, ...kd -> ...qd"),
    "heads last": ("bqhd,bkhd->bqhk", "bqhk,bkhd->bqhd"),
    "keys on the left": ("bhkd,bhqd->bhqk", "bhkd,bhqk->bhqd"),
    "groups": ("bgnqd,bgkd->bgnqk", "bgnqk,bgkd->bgnqd"),
    "groups, tokens first": ("bqgnd,bkgd->bgnqk", "bgnqk,bkgd->bqgnd"),
    "groups, keys on the left": ("bgkd,bgnqd->bgnqk", "bgkd,bgnqk->bgnqd"),
    "one group": ("bnqd,bkd->bnqk", "bnqk,bkd->bnqd"),
}
"""Of scores, and of what is made of them and the values."""


class Summed(Model):
    """Attention by ``einsum``; ``capped`` says that its scores are changed."""

    how, capped = "tokens first", False

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``."""
        x, (scores_of, mixed) = self.embed(ids), EQUATIONS[self.how]
        left, groups = "keys on the left" in self.how, "group" in self.how
        tokens_first = self.how.endswith(("tokens first", "heads last"))
        for layer in self.layers:
            a = layer.norm_a(x)
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            if groups:  # the first of every two heads serves both
                q, k, v = q.unflatten(1, (-1, 2)), k[:, ::2], v[:, ::2]
            if self.how == "one group":
                q, k, v = q[:, 0], k[:, 0], v[:, 0]
            elif tokens_first:
                q, k, v = (each.movedim(-2, 1) for each in (q, k, v))
            scores = torch.einsum(scores_of, *((k, q) if left else (q, k))) * 0.7
            shares = (torch.tanh(scores) if self.capped else scores).softmax(-1)
            out = torch.einsum(mixed, *((v, shares) if left else (shares, v)))
            out = out if tokens_first else out.movedim(-2, 1)
            x = x + layer.o(out.reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def summed(how: str, capped: bool, layers: int = 1) -> Model:
    model = Model(Shape(layers=layers, heads=2, groups=1, head_dim=4, seed=3))
    model.__class__ = Summed
    model.how, model.capped = how, capped  # type: ignore[assignment]
    return model


@pytest.mark.parametrize("capped", [False, True], ids=["plain", "capped"])
@pytest.mark.parametrize("how", EQUATIONS)
def test_attention_by_einsum_is_cached(how: str, capped: bool) -> None:
    """A block of one layer is exact, and so are partial steps of two layers that compute every row."""
    model = summed(how, capped)
    call = models.compiled_loop(model, **DUAL)
    assert worst(call, model, models.start(6, 8), every) < 1e-9
    assert partial(model) == 7
    model = summed(how, capped, layers=2)
    call = models.compiled_loop(model, prompt_interval=1, response_interval=100, transfer_ratio=1.0, shift=False)
    assert worst(call, model, models.start(6, 8), every) < 1e-9
    assert partial(model) > 0


@pytest.mark.parametrize("how", ["tokens first", "heads first", "dots", "keys on the left"])
def test_methods_that_change_which_keys_are_read_take_it_too(how: str) -> None:
    """It becomes one call, over whose keys a step may decide: with all of them kept, and attention in two parts."""
    for settings in ({"method": "sparse-dllm", "keep_ratio": 1.0}, {"method": "flashblock", "outside_interval": 1}):
        model = summed(how, capped=False)
        call = models.compiled_loop(model, **settings, block_length=8, shift=False)
        assert worst(call, model, models.start(6, 8), every) < 1e-9
        assert partial(model) > 0


# -- other dimensions --------------------------------------------------------------------------------------------------


class Shaped(Model):
    """Attention over ``[B * heads, S, h]``, or over ``[B, 1, heads, S, h]``, whose keys serve all heads."""

    dims = 3

    def forward(self, ids: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        for layer in self.layers:
            a = layer.norm_a(x)
            q, k, v = (layer.heads(each(a)) for each in (layer.q, layer.k, layer.v))
            if self.dims == 3:
                q, k, v = (each.reshape(-1, *each.shape[2:]) for each in (q, k, v))
            else:
                q, k, v = q.unsqueeze(1), k[:, :1].unsqueeze(1), v[:, :1].unsqueeze(1)
            out = ((q @ k.transpose(-2, -1)).softmax(-1) @ v).view(x.shape[0], -1, x.shape[1], 4)
            x = x + layer.o(out.transpose(1, 2).reshape(x.shape))
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("method", ["sparse", "dyllm", "streaming"])
@pytest.mark.parametrize("dims", [3, 5])
def test_keys_of_attention_with_other_dimensions_are_left_as_they_are(dims: int, method: str) -> None:
    model = Model(Shape(layers=2, heads=2, groups=1, head_dim=4, seed=3))
    model.__class__ = Shaped
    model.dims = dims  # type: ignore[assignment]
    call = models.compiled_loop(model, **METHODS[method])
    with pytest.warns(UserWarning, match="attention is not over .*, and this method would change its keys"):
        assert worst(call, model, models.start(6, 8), every) < 1e-9
