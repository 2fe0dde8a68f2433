"""Models that attend to earlier blocks and their own: a block-causal mask; and loops that keep keys by themselves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from transformers import DynamicCache

import dllm_compile

from . import models
from .callers import METHODS, NEUTRAL, fill
from .grids import in_turn
from .models import MASK
from .test_properties import Model, Shape, turned

PREFIX_TOKENS = 2
BLOCK, PROMPT, RESPONSE = 3, 9, 12  # no window has as many tokens as the model has a width
SHAPE = Shape(layers=3, heads=4, groups=2, head_dim=4, seed=5)
SMALL = Shape(layers=1, heads=2, groups=1, head_dim=4, seed=3)
DUAL = {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK}
PREFIX = {**DUAL, "cache": "prefix"}
NEUTRAL_DUAL = {**DUAL, "refresh_interval": 1}
Call = Callable[[torch.Tensor], torch.Tensor]


def block_causal(tokens: int, block: int = BLOCK) -> torch.Tensor:
    """``[S, S]`` bool: a token sees its own block of ``block`` and those before."""
    number = torch.arange(tokens) // block
    return number[:, None] >= number


def forms(seen: torch.Tensor, batch: int) -> dict[str, torch.Tensor]:
    """A mask ``[S, S]`` as callers spell it."""
    added = torch.zeros(seen.shape, dtype=torch.float64)
    return {
        "one": seen[None, None],
        "flat": seen,
        "each": seen[None, None].repeat(batch, 1, 1, 1),
        "added": added.masked_fill(~seen, torch.finfo(added.dtype).min)[None, None],
        "infinite": added.masked_fill(~seen, -torch.inf)[None, None],
    }


class Given(Model):
    """Is handed its mask."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        angles = torch.arange(ids.shape[1])[:, None] * self.get_buffer("rates")
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


class Made(Given):
    """Makes its mask of its number of tokens."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        number = torch.arange(ids.shape[1]) // BLOCK
        return super().forward(ids, (number[:, None] >= number)[None, None])


def build(kind: type[Model] = Given, shape: Shape = SHAPE) -> Model:
    model = Model(shape)
    model.__class__ = kind
    return model


def compiled(model: torch.nn.Module, **options: Any) -> Callable[..., Any]:
    """``model`` with this backend; all calls are one loop."""
    return models.compiled_loop(model, **{"shift": False, **options})


def written(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The leftmost mask of each sequence filled, never by the mask."""
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    return fill(logits, ids)


def in_block(ids: torch.Tensor) -> torch.Tensor:
    """Masked rows ``[B, S]`` bool of the first block that has some."""
    masked = ids == MASK
    number = torch.arange(ids.shape[1]) // BLOCK
    return masked & (number == number[masked.int().argmax(1)][:, None])


def worst(call: Call, eager: Call, ids: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest difference from eager in some rows of any step of a loop."""
    found = 0.0
    with torch.no_grad():
        while bool((ids == MASK).any()):
            got, want = call(ids), eager(ids)
            found = max(found, float((got - want)[rows(ids)].abs().max()))
            ids = written(want, ids)
    return found


def every(ids: torch.Tensor) -> torch.Tensor:
    """All masked rows."""
    return ids == MASK


NEUTRAL_SETTINGS: dict[str, dict[str, Any]] = {
    "features": NEUTRAL,
    "dual": NEUTRAL_DUAL,
    "decoded": {"cache": "decoded", "refresh_interval": 1},
    "sparse": {"method": "sparse-dllm", "block_length": BLOCK, "delay": 99},
    "dyllm": {"method": "dyllm", "full_steps": 99},
}


@pytest.mark.shares_graphs
@pytest.mark.parametrize("settings", NEUTRAL_SETTINGS.values(), ids=NEUTRAL_SETTINGS)
@pytest.mark.parametrize("kind", [Given, Made])
def test_neutral_settings_equal_eager(kind: type[Model], settings: dict[str, Any]) -> None:
    model = build(kind)
    mask = block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **settings)
    ids = models.start(PROMPT - 1, RESPONSE + 1)  # the first block has one token of the response
    assert worst(lambda x: call(x, mask), lambda x: model(x, mask), ids, every) < 1e-9


@pytest.mark.shares_graphs
@pytest.mark.parametrize("form", forms(block_causal(2), 1))
def test_any_spelling_of_the_mask_equals_eager(form: str) -> None:
    model = build()
    mask = forms(block_causal(PROMPT + RESPONSE), 2)[form]
    call = compiled(model, **NEUTRAL_DUAL)
    assert worst(lambda x: call(x, mask), lambda x: model(x, mask), models.start(PROMPT, RESPONSE), every) < 1e-9


EXACT_IN_BLOCK: dict[str, dict[str, Any]] = {
    "dual": DUAL,
    "prefix": PREFIX,
    "response": {"prompt_interval": 99, "response_interval": 1},
    "select": {"prompt_interval": 99, "response_interval": 99, "transfer_ratio": 1.0},
    "sparse": {"method": "sparse-dllm", "block_length": BLOCK, "keep_ratio": 1.0},
    "streaming": {"method": "streaming-dllm", "block_length": BLOCK, "suffix_window": 0},
}
"""Settings whose partial steps compute all that has changed of what a block sees, if blocks are those of the mask."""


@pytest.mark.shares_graphs
@pytest.mark.parametrize("settings", EXACT_IN_BLOCK.values(), ids=EXACT_IN_BLOCK)
def test_partial_steps_read_the_mask_of_their_rows(settings: dict[str, Any]) -> None:
    model = build()
    mask = block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **settings)
    off = worst(lambda x: call(x, mask), lambda x: model(x, mask), models.start(PROMPT, RESPONSE), in_block)
    assert off < 1e-9
    assert dllm_compile.stats(model)["layers"]["cached"] > 0


@pytest.mark.shares_graphs
@pytest.mark.parametrize("name", ["llama", "qwen3", "llama-eager"])
@pytest.mark.parametrize("form", ["one", "added"])
def test_models_of_transformers_take_such_a_mask(name: str, form: str) -> None:
    model, mask = models.build(name), forms(block_causal(PROMPT + RESPONSE), 2)[form]
    if mask.is_floating_point():
        mask = torch.where(mask < 0, -1e30, 0.0).to(models.dtype_of(name))
    elif name == "llama-eager":
        pytest.skip("it adds its mask")
    for settings, rows in ((NEUTRAL_DUAL, every), (DUAL, in_block)):
        call = compiled(model, **settings)
        off = worst(
            lambda x, call=call: call(input_ids=x, attention_mask=mask).logits,  # type: ignore[misc]
            lambda x: model(input_ids=x, attention_mask=mask).logits,
            models.start(PROMPT, RESPONSE),
            rows,
        )
        assert off < (1e-4 if name == "llama-eager" else 1e-9)


def test_blocks_of_one_token_are_a_causal_mask() -> None:
    model, ids = build(), models.start(PROMPT, RESPONSE)
    mask = block_causal(PROMPT + RESPONSE, 1)[None, None]
    with pytest.warns(UserWarning, match="the attention mask is causal"), torch.no_grad():
        assert torch.equal(compiled(model, **DUAL)(ids, mask), model(ids, mask))


# -- what a refresh computes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Given, Made])
def test_a_refresh_leaves_finished_blocks_as_they_are(kind: type[Model]) -> None:
    model, ids = build(kind), models.start(PROMPT, RESPONSE)
    mask = block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **DUAL)
    assert worst(lambda x: call(x, mask), lambda x: model(x, mask), ids, in_block) < 1e-9
    found = dllm_compile.stats(model)
    assert found["refreshes"] == {"block": 4}
    assert found["steps"] == {"full": 1, "block": RESPONSE - 1}
    behind = 4 * BLOCK + 3 * BLOCK + 2 * BLOCK  # with the block that was filled, whose last token is new
    assert found["rows"] == {"full": PROMPT + RESPONSE, "block": 8 * BLOCK + behind}


def test_a_refresh_leaves_finished_blocks_as_they_are_through_inductor() -> None:
    model, ids = build(Given, SMALL), models.start(PROMPT, 2 * BLOCK)
    mask = block_causal(PROMPT + 2 * BLOCK)[None, None]
    call = compiled(model, **PREFIX, lowering="inductor")
    assert worst(lambda x: call(x, mask), lambda x: model(x, mask), ids, every) < 1e-9
    assert dllm_compile.stats(model)["refreshes"] == {"block": 2}
    assert dllm_compile.stats(model)["rows"] == {"full": 15, "block": 3 * 6 + 2 * 3}


def some_mask(kind: str, tokens: int, batch: int, seed: int) -> torch.Tensor:
    """``[B, 1, S, S]`` bool in which a row sees itself, and others."""
    drawn = torch.rand(batch, 1, tokens, tokens, generator=torch.Generator().manual_seed(seed))
    place = torch.arange(tokens)
    near = (place[:, None] - place).abs() <= 2
    seen = {
        "blocks": block_causal(tokens, 5) & (drawn < 0.9),
        "before": (place[:, None] >= place) & (drawn < 0.3)
        | (place[:, None] + place == 1),  # the first two see each other
        "chain": (place[:, None] + 1 == place).expand_as(drawn),  # by many layers a row depends on the last
        "texts": (place[:, None] // 7 == place // 7).expand_as(drawn),
        "window": near & block_causal(tokens),
        "padding": block_causal(tokens) & (place >= torch.tensor([[[[0]]], [[[3]]]])),
        "any": drawn < 0.5,
    }[kind]
    return seen | (place[:, None] == place)


def edited_loop(call: Callable[..., Any], eager: Callable[..., Any], shift: bool | None, edits: bool) -> None:
    """Compare readable rows with eager where tokens are filled anywhere in a block, several at a time, and edited; all
    rows, once it is known that the loop ``edits``.
    """
    ids, draw = models.start(PROMPT, RESPONSE), torch.Generator().manual_seed(7)
    for step in range(9):
        got, want = call(ids), eager(ids)
        rows = (ids == MASK) | (F.pad(ids == MASK, (0, 1))[:, 1:] & (shift is not False))
        rows |= torch.tensor(edits or step > 4)
        torch.testing.assert_close(got[rows], want[rows], atol=1e-9, rtol=0)
        ids, begin = ids.clone(), PROMPT + step // 3 * BLOCK
        for row in ids:
            row[begin + torch.randint(BLOCK, (2,), generator=draw)] = torch.randint(MASK, (2,), generator=draw)
        if step == 4:
            ids[:, PROMPT + 1] = 5
        if step % 3 == 2:
            block = ids[:, begin : begin + BLOCK]
            block[block == MASK] = 9


@pytest.mark.shares_graphs
@pytest.mark.filterwarnings("ignore:dllm. this loop writes other tokens")
@pytest.mark.parametrize(("cache", "shift"), [("dual", False), ("dual", None), ("decoded", None)])
def test_whatever_a_mask_hides_neutral_settings_equal_eager(cache: str, shift: bool | None) -> None:
    model = build(shape=Shape(layers=2, heads=4, groups=2, head_dim=4, seed=5))
    given = {"cache": cache, "block_length": BLOCK if cache == "dual" else None, "refresh_interval": 1}
    call, before = compiled(model, **given, shift=shift), 0
    for kind in ("blocks", "before", "chain", "texts", "window", "padding", "any"):
        mask = some_mask(kind, PROMPT + RESPONSE, 2, 3)
        with torch.no_grad():
            called, eager = (lambda ids, mask=mask, f=each: f(ids, mask) for each in (call, model))
            edited_loop(called, eager, shift, edits=kind != "blocks")
        computed = dllm_compile.stats(model)["rows"].get("block", 0)
        assert (computed > before) == (kind not in ("any", "chain")), kind
        before = computed


@pytest.mark.parametrize("how", ["another", "in place", "unseen"])
def test_a_large_mask_that_comes_to_show_more_is_read_anew(how: str) -> None:
    """At each call all of its numbers are compared: what lies before the block is kept by its word."""
    model, tokens = build(), 258
    mask = block_causal(tokens)[None, None]
    call = compiled(model, **NEUTRAL_DUAL)
    ids = models.start(tokens - 6, 6, 1)
    with torch.no_grad():
        for step in range(6):
            got, want = call(ids, mask), model(ids, mask)
            torch.testing.assert_close(got[ids == MASK], want[ids == MASK], atol=1e-9, rtol=0)
            ids = written(want, ids)
            if step == 2:
                assert dllm_compile.stats(model)["rows"] == {"full": tokens, "block": 2 * 6}
                mask = mask.clone() if how == "another" else mask
                (mask.data if how == "unseen" else mask)[..., 8, 256] = True


@pytest.mark.filterwarnings("ignore:dllm. this loop puts masks back")
def test_logits_that_come_to_be_read_are_those_of_now() -> None:
    """A loop that puts masks back reads the logits of filled tokens, in blocks that are finished too."""
    model, ids = build(), models.start(PROMPT, RESPONSE)
    mask = block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **NEUTRAL_DUAL)
    with torch.no_grad():
        for step in range(8):
            got, want = call(ids, mask), model(ids, mask)
            rows = torch.ones_like(ids, dtype=torch.bool) if step > 5 else ids == MASK
            torch.testing.assert_close(got[rows], want[rows], atol=1e-9, rtol=0)
            ids = written(want, ids)
            if step == 5:
                ids[:, PROMPT] = MASK


# -- a window that grows by a block -----------------------------------------------------------------------------------


def windows(call: Call, eager: Call, ids: torch.Tensor, rows: Callable[[torch.Tensor], torch.Tensor]) -> float:
    """The largest difference from eager in some rows of a loop that shows the model no block before its time."""
    found, tokens = 0.0, ids.shape[1]
    begin = int((ids == MASK).int().argmax(1).min()) // BLOCK * BLOCK
    with torch.no_grad():
        for end in range(begin + BLOCK, tokens + 1, BLOCK):
            while bool((ids[:, :end] == MASK).any()):
                got, want = call(ids[:, :end].clone()), eager(ids[:, :end])
                found = max(found, float((got - want)[rows(ids[:, :end])].abs().max()))
                ids = torch.cat([written(want, ids[:, :end]), ids[:, end:]], 1)
    return found


GROWING: dict[str, dict[str, Any]] = {
    "dual": DUAL,
    "prefix": PREFIX,
    "one block": {"cache": "dual"},
    "neutral": NEUTRAL_DUAL,
}


@pytest.mark.parametrize("settings", GROWING.values(), ids=GROWING)
@pytest.mark.parametrize("kind", [Given, Made])
def test_a_growing_window_goes_on_with_its_sequence(kind: type[Model], settings: dict[str, Any]) -> None:
    """The first block has one token of the response, and two windows of a size follow each other nowhere."""
    model, tokens = build(kind), PROMPT + RESPONSE
    mask = block_causal(tokens)[None, None]
    call = compiled(model, **settings)

    def run(model: Any) -> Call:
        return lambda ids: model(ids, mask[..., : ids.shape[1], : ids.shape[1]])

    ids = models.start(PROMPT - 1, RESPONSE + 1)
    assert windows(run(call), run(model), ids, every) < 1e-9
    found = dllm_compile.stats(model)
    assert found["sequences"] == 1
    assert found["steps"] == {"full": 1, "block": RESPONSE}
    assert found["rows"]["full"] == PROMPT  # no step computes the prompt again
    if settings["cache"] == "dual" and "refresh_interval" not in settings:
        assert found["refreshes"] == {"block": 5}
        assert found["rows"]["block"] == 4 * (2 * BLOCK) + 4 * (BLOCK - 1) * BLOCK


def test_a_second_loop_on_the_same_prompt_is_a_sequence_of_its_own() -> None:
    """At its last window it is where the first one was, but for masks."""
    model, mask = build(), block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **DUAL)

    def run(model: Any) -> Call:
        return lambda ids: model(ids, mask[..., : ids.shape[1], : ids.shape[1]])

    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for number in (1, 2):
            assert windows(run(call), run(model), models.start(PROMPT, RESPONSE), every) < 1e-9
            found = dllm_compile.stats(model)
            assert found["sequences"] == number
            assert found["steps"] == {"full": number, "block": number * (RESPONSE - 1)}


class Gained(Made):
    """Its logits are multiplied by a number that it is handed."""

    def forward(self, ids: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Logits ``[B, S, V]``."""
        return super().forward(ids) * gain


@pytest.mark.parametrize(("rising", "sequences"), [(False, 1), (True, 2)])
def test_what_only_the_head_reads_has_to_stay_for_a_window_to_go_on(rising: bool, sequences: int) -> None:
    """So do floats, such as the epsilon of a norm, that ``dynamic=True`` makes inputs."""
    model = build(Gained, SMALL)
    call = compiled(model, **DUAL, dynamic=True)

    def run(model: Any) -> Call:
        return lambda ids: model(ids, torch.tensor(float(ids.shape[1] if rising else 1)))

    assert windows(run(call), run(model), models.start(PROMPT, 2 * BLOCK), every) < 1e-9
    found = dllm_compile.stats(model)
    assert (found["sequences"], found["steps"]["full"]) == (sequences, sequences)


def test_a_growing_window_goes_on_through_inductor() -> None:
    model, mask = build(Given, SMALL), block_causal(PROMPT + 2 * BLOCK)[None, None]
    call = compiled(model, **DUAL, lowering="inductor")

    def run(model: Any) -> Call:
        return lambda ids: model(ids, mask[..., : ids.shape[1], : ids.shape[1]])

    assert windows(run(call), run(model), models.start(PROMPT, 2 * BLOCK), every) < 1e-9
    found = dllm_compile.stats(model)
    assert (found["sequences"], found["steps"]) == (1, {"full": 1, "block": 2 * BLOCK - 1})


def test_a_growing_window_of_a_model_of_transformers_goes_on() -> None:
    model, mask = models.build("qwen3"), block_causal(PROMPT + RESPONSE)[None, None]
    call = compiled(model, **DUAL)

    def run(model: Any) -> Call:
        def logits(ids: torch.Tensor) -> torch.Tensor:
            seen, places = mask[..., : ids.shape[1], : ids.shape[1]], torch.arange(ids.shape[1])[None]
            out: torch.Tensor = model(input_ids=ids, attention_mask=seen, position_ids=places).logits
            return out

        return logits

    assert windows(run(call), run(model), models.start(PROMPT, RESPONSE), every) < 1e-9
    assert dllm_compile.stats(model)["sequences"] == 1


class Stretched(Given):
    """Its positions depend on how many there are."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        tokens = ids.shape[1]
        angles = torch.arange(tokens)[:, None] / torch.arange(tokens).amax() * self.get_buffer("rates")
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), mask)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


def unproven(how: str, tokens: int, all_tokens: int) -> torch.Tensor:
    """``[1, 1, S, S]`` bool, the mask of a window of which nothing proves that it goes on with the one before."""
    seen = block_causal(all_tokens)[:tokens, :tokens].clone()
    if how == "bidirectional":
        seen[:] = True
    elif how == "one row looks ahead":
        seen[2, -1] = True
    elif how == "another prefix":
        seen[:3, 1] = tokens % 2 == 0
    return seen[None, None]


@pytest.mark.parametrize("how", ["bidirectional", "one row looks ahead", "another prefix", "stretched"])
def test_without_proof_a_longer_window_is_a_new_sequence(how: str) -> None:
    model, tokens = build(Stretched if how == "stretched" else Given), PROMPT + RESPONSE
    call = compiled(model, **NEUTRAL_DUAL)

    def run(model: Any) -> Call:
        return lambda ids: model(ids, unproven(how, ids.shape[1], tokens))

    assert windows(run(call), run(model), models.start(PROMPT, RESPONSE), every) < 1e-9
    assert dllm_compile.stats(model)["sequences"] == 4


@pytest.mark.parametrize("settings", [DUAL, METHODS["dllm-cache"]], ids=["dual", "features"])
def test_a_mask_that_is_causal_in_a_later_loop_is_refused_then(settings: dict[str, Any]) -> None:
    """Partial steps of these settings are far from eager, and a graph that is refused is as eager."""
    model, tokens = build(), PROMPT + RESPONSE
    call = compiled(model, **settings)
    full, causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool), block_causal(tokens, 1)[None, None]
    worst(lambda x: call(x, full), lambda x: model(x, full), models.start(PROMPT, RESPONSE), every)
    assert dllm_compile.stats(model)["refused"] == []
    with pytest.warns(UserWarning, match="the attention mask is causal") as told:
        later = worst(lambda x: call(x, causal), lambda x: model(x, causal), models.start(PROMPT, RESPONSE), every)
    assert later < 1e-12
    assert len(told) == 1


# -- loops with a cache of their own ----------------------------------------------------------------------------------

Pairs = list[tuple[torch.Tensor, torch.Tensor]]
ALL_KEYS = {
    tokens: create_block_mask(lambda b, h, i, j: j >= 0, None, None, tokens, PROMPT + RESPONSE, "cpu")
    for tokens in (BLOCK, PROMPT + RESPONSE)
}
"""Block masks that hide nothing, by the number of queries."""


class Own(Model):
    """Takes keys and values of the tokens before its own, and returns those of all."""

    how = "joined"

    def forward(self, ids: torch.Tensor, past: Pairs | None = None, at: int = 0) -> tuple[torch.Tensor, Pairs]:
        """Logits ``[B, S, V]`` of ``ids``, which begin at ``at``."""
        tokens, x, pairs = ids.shape[1], self.embed(ids), []
        angles = (torch.arange(tokens) + at)[:, None] * self.get_buffer("rates")
        for number, layer in enumerate(self.layers):
            a = layer.norm_a(x)
            q, k = (turned(layer.heads(each(a)), angles.cos(), angles.sin()) for each in (layer.q, layer.k))
            k, v = k, layer.heads(layer.v(a))
            if past is not None:
                k, v = (self.put(kept, new, at) for kept, new in zip(past[number], (k, v), strict=True))
            pairs.append((k, v))
            k, v = (each.repeat_interleave(layer.shape.groups, 1) for each in (k, v))
            if self.how == "by hand":
                out = torch.softmax(q @ k.transpose(2, 3) / layer.shape.head_dim**0.5, -1) @ v
            elif self.how == "flex":
                out = cast(torch.Tensor, flex_attention(q, k, v, block_mask=ALL_KEYS[tokens]))
            else:
                out = F.scaled_dot_product_attention(q, k, v)
            x = x + layer.o(out.transpose(1, 2).reshape(x.shape))
            m = layer.norm_m(x)
            x = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        return self.head(self.norm(x)), pairs

    def put(self, kept: torch.Tensor, new: torch.Tensor, at: int) -> torch.Tensor:
        """Keys or values with ``new`` ones from ``at`` on."""
        end = at + new.shape[2]
        if self.how in ("joined", "by hand", "flex"):
            return torch.cat([kept[:, :, :at], new, kept[:, :, end:]], 2)
        if self.how == "stacked":
            parts = [kept[:, :, :at], new, kept[:, :, end:]]
            return torch.hstack([each.transpose(1, 2) for each in parts]).transpose(1, 2)
        if self.how == "chosen":
            place = torch.arange(kept.shape[2])[:, None]
            return kept.where((place < at) | (place >= end), F.pad(new, (0, 0, at, kept.shape[2] - end)))
        if self.how in ("blended", "moved", "added"):
            place = torch.arange(kept.shape[2])[:, None]
            m = ((place >= at) & (place < end)).to(kept.dtype)
            new = F.pad(new, (0, 0, at, kept.shape[2] - end))
            if self.how == "moved":
                return torch.addcmul(kept, m, new - kept)
            return kept * (1 - m) + (new * m if self.how == "blended" else new)
        if self.how == "copied":
            return kept.index_copy(2, torch.arange(at, end), new)
        if self.how == "aten":
            return torch.ops.aten.index_copy(kept, 2, torch.arange(at, end), new)  # type: ignore[no-any-return]
        kept[:, :, at:end] = new
        return kept


def blocks(ids: torch.Tensor, call: Any, again: Any) -> list[torch.Tensor]:
    """Logits of each step of a loop that fills its cache where a block begins, by ``call`` of all ids; ``again`` gets
    those of the block, what ``call`` returned, and where the block begins.
    """
    seen = []
    for begin in range(PROMPT, ids.shape[1], BLOCK):
        logits, kept = call(ids.clone())
        seen.append(logits.clone())
        ids = written(logits, ids)
        while bool((ids[:, begin : begin + BLOCK] == MASK).any()):
            part = again(ids[:, begin : begin + BLOCK].clone(), kept, begin)
            seen.append(part.clone())
            ids[:, begin : begin + BLOCK] = written(part, ids[:, begin : begin + BLOCK])
    return seen


def copied(kept: Pairs) -> Pairs:
    return [(k.clone(), v.clone()) for k, v in kept]


def own_loop(call: Any) -> list[torch.Tensor]:
    """The loop of a model that is handed keys and values."""
    return blocks(models.start(PROMPT, RESPONSE), call, lambda ids, kept, at: call(ids, copied(kept), at)[0])


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *in_turn(
            [
                *("joined", "written", "copied", "by hand", "stacked", "chosen", "aten", "blended", "moved", "added"),
                "flex",
            ],
            ["dllm-cache", "dual"],
        ),
        ("inductor", "dual"),
    ],
)
def test_a_loop_with_a_cache_of_its_own_is_left_alone_and_told_once(how: str, method: str) -> None:
    options = {"dllm-cache": METHODS["dllm-cache"], "dual": DUAL}[method]
    model, lowering = build(Own, SMALL), "inductor" if how == "inductor" else "eager"
    model.how = how.replace("inductor", "joined")  # type: ignore[assignment]
    call = compiled(model, **options, lowering=lowering)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            for got, want in zip(own_loop(call), own_loop(model), strict=True):
                torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    said = [str(each.message) for each in told if str(each.message).startswith("dllm")]
    assert len(said) == 1
    assert "the loop hands over keys and values of a cache of its own (at node" in said[0]
    found = dllm_compile.stats(model)
    assert found["steps"] == {"full": 1}  # before any keys were handed over
    assert found["state_bytes"] == 0
    assert len(found["refused"]) == 1


class Prefixed(Own):
    """Each layer has keys and values in front of those of the tokens, which the model holds in buffers."""

    def forward(self, ids: torch.Tensor, past: Pairs | None = None, at: int = 0) -> tuple[torch.Tensor, Pairs]:
        """Logits ``[B, S, V]`` of ``ids``."""
        given = [self.get_buffer(f"prefix{i}").expand(len(ids), -1, -1, -1) for i in range(2 * len(self.layers))]
        return super().forward(ids, list(zip(given[::2], given[1::2], strict=True)), PREFIX_TOKENS)


def test_keys_of_a_buffer_are_not_said_to_be_those_of_a_loop() -> None:
    model = build(Prefixed, SMALL)
    for i in range(2 * SMALL.layers):
        prefix = torch.randn(1, SMALL.heads // SMALL.groups, PREFIX_TOKENS, SMALL.head_dim, dtype=torch.float64)
        model.register_buffer(f"prefix{i}", prefix)
    call = compiled(model, **DUAL)
    ids = models.start(PROMPT, RESPONSE)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"keys or values that a buffer of the model holds") as told:
        assert worst(lambda x: call(x)[0], lambda x: model(x)[0], ids, every) < 1e-12
    assert len(told) == 1
    assert "the loop" not in str(told[0].message)


class Placed(Own):
    """Adds a table of positions, which the caller hands over, to the keys, and not the keys of other tokens."""

    def put(self, kept: torch.Tensor, new: torch.Tensor, at: int) -> torch.Tensor:
        """Keys or values with their positions."""
        return new + kept[:, :, : new.shape[2]]


def test_a_table_that_is_added_to_keys_is_no_cache() -> None:
    model = build(Placed, SMALL)
    call = compiled(model, **DUAL)
    keys, values = (torch.randn(1, 1, PROMPT + RESPONSE, SMALL.head_dim, dtype=torch.float64) for _ in range(2))
    past, ids = [(keys, values)] * SMALL.layers, models.start(PROMPT, RESPONSE)
    with torch.no_grad():
        for i in range(BLOCK):
            got, want = call(ids, past)[0], model(ids, past)[0]
            if i == 0:
                torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
            ids = written(want, ids)
    assert dllm_compile.stats(model)["steps"] == {"full": 1, "block": BLOCK - 1}


def test_behind_a_reset_a_loop_that_hands_over_none_is_cached() -> None:
    model = build(Own)
    call = compiled(model, **DUAL)
    with torch.no_grad(), pytest.warns(UserWarning, match="a cache of its own"):
        own_loop(call)
    dllm_compile.reset()
    ids = models.start(PROMPT, RESPONSE)
    with torch.no_grad():
        for _ in range(BLOCK):
            ids = written(call(ids)[0], ids)
    assert dllm_compile.stats(model)["steps"] == {"full": 2, "block": BLOCK - 1}  # one of the loop before


@pytest.mark.filterwarnings("ignore:.*past_key_values. is deprecated")
def test_a_cache_of_transformers_is_one_of_the_loop() -> None:
    model = models.build("llama-cache")
    call = compiled(model, **METHODS["dllm-cache"])

    def loop(model: Any) -> list[torch.Tensor]:
        def whole(ids: torch.Tensor) -> tuple[torch.Tensor, Any]:
            out = model(input_ids=ids, use_cache=True)
            return out.logits, out.past_key_values

        def part(ids: torch.Tensor, kept: Any, at: int) -> torch.Tensor:
            past = DynamicCache()
            for number, layer in enumerate(kept.layers):
                past.update(layer.keys[:, :, :at].clone(), layer.values[:, :, :at].clone(), number)
            logits: torch.Tensor = model(input_ids=ids, past_key_values=past, use_cache=True).logits
            return logits

        return blocks(models.start(PROMPT, RESPONSE), whole, part)

    with torch.no_grad(), pytest.warns(UserWarning, match="a cache of its own"):
        got = loop(call)
    with torch.no_grad():
        for a, b in zip(got, loop(model), strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
