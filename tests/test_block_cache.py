"""Fast-dLLM's block caches against the definition: a plain transformer, and any model with its keys kept by hand."""

from __future__ import annotations

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.lower import Code
from dllm_compile.runtime.session import Session, sessions

from . import models, shared
from .models import MASK
from .test_layers_alone import FORMS, LoopBroken, mask_of
from .test_properties import EXAMPLES, SHAPES, Batch, Model, Shape, batches, fresh, turned

CACHES = ("prefix", "dual")
SHAPE = Shape(layers=3, heads=4, groups=2, head_dim=4, seed=5)
METHOD: dict[str, Any] = {"method": "fast-dllm"}
Call = Callable[[torch.Tensor], torch.Tensor]
EARLIER: set[Session] = set()
FEW = settings(EXAMPLES, max_examples=4)
pytestmark = pytest.mark.shares_graphs


@pytest.fixture(autouse=True)
def _no_gradients_no_warnings() -> Iterator[None]:
    EARLIER.clear()
    EARLIER.update(sessions())
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        warnings.filterwarnings("ignore", "dllm: this loop (puts masks back|writes other tokens)")
        yield


def compiled(model: torch.nn.Module, **options: Any) -> Call:
    """As ``fresh``, with graphs that Dynamo may have traced in an earlier test; calls of other sizes get their own."""
    return models.in_a_loop(shared.compiled(model, lowering="eager", mask_id=MASK, **options))


# -- the definition ---------------------------------------------------------------------------------------------------


class Blocks:
    """When a sequence is computed in full, and which rows at the other steps; lists of positions, one sequence.

    Args:
        first: ids ``[S]`` of the first call.
        cache, block_length, refresh_interval, shift: as the options.
        places: positions of the response; by default what ``first`` masks.
    """

    def __init__(
        self,
        first: torch.Tensor,
        cache: str,
        block_length: int | None = None,
        refresh_interval: int | None = None,
        shift: bool | None = None,
        places: list[int] | None = None,
    ) -> None:
        self.cache, self.interval, self.shift, self.tokens = cache, refresh_interval, shift, len(first)
        self.places = places or (first == MASK).nonzero()[:, 0].tolist()
        length = block_length or len(self.places)
        self.blocks = [self.places[i : i + length] for i in range(0, len(self.places), length)]
        self.active: list[int] = []
        self.since = 0

    def readable(self, ids: torch.Tensor) -> list[int]:
        """Masked positions of the response, and the one before each where a sampler may read that."""
        masked = {i for i in self.places if ids[i] == MASK}
        before = {i - 1 for i in masked if i} if self.shift is not False else set()
        return sorted(masked | before)

    def next(self, ids: torch.Tensor) -> tuple[list[int], list[int]]:
        """Rows whose keys and values are computed and kept, and rows only looked at."""
        active = next((block for block in self.blocks if any(ids[i] == MASK for i in block)), [])
        self.since += 1
        if active and (active != self.active or self.since == self.interval):
            self.active, self.since = active, 0
            return list(range(self.tokens)), []
        rows = list(range(active[0], self.tokens)) if active and self.cache == "prefix" else active
        before = [i - 1 for i in rows if i and i - 1 not in rows] if self.shift is not False else []
        return rows, before


class Plain:
    """One sequence of a plain transformer, its keys and values in a list."""

    def __init__(self, model: Model, first: torch.Tensor, *how: Any, hidden: torch.Tensor | None = None) -> None:
        self.model, self.blocks = model, Blocks(first, *how)
        self.layers: list[Any] = list(model.layers)
        self.last: torch.Tensor | None = None
        shape, tokens = self.layers[0].shape, len(first)
        self.seen = torch.ones(tokens, dtype=torch.bool) if hidden is None else ~hidden
        keys = (shape.heads // shape.groups, tokens, shape.head_dim)
        self.keys = [torch.zeros(keys, dtype=torch.float64) for _ in self.layers]
        self.values = [torch.zeros(keys, dtype=torch.float64) for _ in self.layers]
        self.logits = torch.full((tokens, models.VOCABULARY), torch.nan, dtype=torch.float64)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[S, V]``; rows that are not computed keep theirs."""
        if self.last is None or not torch.equal(ids, self.last):
            self.last = ids.clone()
            rows, before = self.blocks.next(ids)
            if rows:
                self._compute(ids, sorted([*rows, *before]), before)
        return self.logits

    def _compute(self, ids: torch.Tensor, rows: list[int], unwritten: list[int]) -> None:
        at = torch.tensor(rows)
        writes = torch.tensor([i not in unwritten for i in rows])
        angles = at[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed(ids[at])
        for layer, keys, values in zip(self.layers, self.keys, self.values, strict=True):
            size, groups = layer.shape.head_dim, layer.shape.groups
            a = layer.norm_a(x)
            q, k, v = (to(a).unflatten(-1, (-1, size)).transpose(0, 1) for to in (layer.q, layer.k, layer.v))
            keys[:, at[writes]] = turned(k, cos, sin)[:, writes]
            values[:, at[writes]] = v[:, writes]
            scores = turned(q, cos, sin) @ keys.repeat_interleave(groups, 0).mT / size**0.5
            weights = scores.masked_fill(~self.seen, -torch.inf).softmax(-1)
            x = x + layer.o((weights @ values.repeat_interleave(groups, 0)).transpose(0, 1).flatten(1))
            m = layer.norm_m(x)
            x = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        self.logits[at] = self.model.head(self.model.norm(x))


class ByHand:
    """A batch of any model: a full forward whose attention reads the keys and values that the definition keeps."""

    def __init__(self, call: Call, first: torch.Tensor, *how: Any) -> None:
        self.call, self.blocks = call, [Blocks(row, *how) for row in first]
        self.kept: list[list[torch.Tensor]] = []
        self.logits = torch.empty(0)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``; rows that are not computed keep theirs."""
        written, computed = torch.zeros_like(ids, dtype=torch.bool), torch.zeros_like(ids, dtype=torch.bool)
        for row, blocks in enumerate(self.blocks):
            rows, before = blocks.next(ids[row])
            written[row, rows] = True
            computed[row, [*rows, *before]] = True
        attention, layers, kept = F.scaled_dot_product_attention, iter(self.kept), []

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **more: Any) -> torch.Tensor:
            if self.kept:
                k, v = (
                    torch.where(written[:, None, :, None], *pair) for pair in zip((k, v), next(layers), strict=True)
                )
            kept.append([k, v])
            return attention(q, k, v, *args, **more)

        with mock.patch.object(F, "scaled_dot_product_attention", attend):
            logits = self.call(ids)
        self.kept = kept
        assert kept
        self.logits = logits if not self.logits.numel() else torch.where(computed[..., None], logits, self.logits)
        return self.logits


def filled(ids: torch.Tensor, block: int | None, counts: list[int], seed: int = 0) -> Iterator[torch.Tensor]:
    """Calls of a loop that gives row ``b`` of the batch ``counts[b]`` tokens a step, in its first block with masks."""
    rng, x = random.Random(seed), ids.clone()
    places = [(row == MASK).nonzero()[:, 0].tolist() for row in ids]
    while bool((x == MASK).any()):
        yield x.clone()
        for row, at, count in zip(x, places, counts, strict=True):
            parts = [at[i : i + (block or len(at))] for i in range(0, len(at), block or len(at))]
            left = [[i for i in part if row[i] == MASK] for part in parts]
            inside = next((part for part in left if part), [])
            for i in rng.sample(inside, min(count, len(inside))):
                row[i] = rng.randrange(8, MASK)


def follow(call: Callable[..., torch.Tensor], plains: list[Plain], calls: Iterator[torch.Tensor], **extra: Any) -> int:
    """Compare the readable logits of each call, row by row of the batch; returns how many calls there were."""
    number = 0
    for number, x in enumerate(calls, 1):
        got = call(x, **extra)
        for row, plain in enumerate(plains):
            want, at = plain.step(x[row]), plain.blocks.readable(x[row])
            assert not at or (got[row] - want)[at].abs().max() < 1e-9, (number, row)
    return number


def same(got: torch.Tensor, want: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether the logits of masked tokens are equal up to rounding."""
    masked = ids == MASK
    exact = 1e-9 if want.dtype == torch.float64 else 1e-4 * float(want.abs().max())
    return bool((got - want)[masked].abs().max() < exact)


def plains_of(model: Model, ids: torch.Tensor, extra: dict[str, torch.Tensor], *how: Any) -> list[Plain]:
    hidden = [None if not extra else extra["mask"][row] == 0 for row in range(len(ids))]
    return [Plain(model, ids[row], *how, hidden=hidden[row]) for row in range(len(ids))]


def start(batch: int = 1, seed: int = 1, prompt: int = 5, response: int = 8) -> torch.Tensor:
    return models.start(prompt, response, batch, seed)


def put(ids: torch.Tensor, *places: int, token: int = 7) -> torch.Tensor:
    """A copy with a token at these places of the response of :func:`start`."""
    out = ids.clone()
    out[:, [5 + i for i in places]] = token
    return out


def counted(what: str) -> dict[str, int]:
    """Counters of this test's sessions."""
    total: Counter[str] = Counter()
    for session in set(sessions()) - EARLIER:
        total.update(getattr(session.stats, what))
    return dict(total)


# -- equal to the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("block", "shift"), [(1, None), (3, False), (None, True)])
@pytest.mark.parametrize("cache", CACHES)
def test_every_step_equals_the_plain_model(cache: str, block: int | None, shift: bool | None) -> None:
    model, batch = Model(SHAPE), Batch([6, 4, 6], [2, 0, 0], 8, 3)
    ids, extra = batch.ids(), batch.extra()
    call = compiled(model, **METHOD, cache=cache, block_length=block, shift=shift)
    plains = plains_of(model, ids, extra, cache, block, None, shift)
    assert follow(call, plains, filled(ids, block, [1, 2, 3]), **extra) >= 8


@FEW
@given(SHAPES, batches(ragged=True), st.data())
def test_any_loop_with_blocks_equals_the_plain_model(shape: Shape, batch: Batch, data: st.DataObject) -> None:
    cache, block = data.draw(st.sampled_from(CACHES)), data.draw(st.sampled_from([1, 2, 4, 5, None]))
    interval, shift = data.draw(st.sampled_from([None, 1, 2, 3])), data.draw(st.sampled_from([None, True, False]))
    counts = [data.draw(st.integers(1, 3)) for _ in batch.prompts]
    model, ids, extra = Model(shape), batch.ids(), batch.extra()
    call = fresh(model, **METHOD, cache=cache, block_length=block, refresh_interval=interval, shift=shift)
    plains = plains_of(model, ids, extra, cache, block, interval, shift)
    follow(call, plains, filled(ids, block, counts, batch.seed), **extra)


@pytest.mark.parametrize("cache", CACHES)
def test_masks_inside_the_prompt_are_blocks_too(cache: str) -> None:
    model, ids = Model(SHAPE), start()
    ids[0, 2], ids[0, 8] = MASK, 9
    follow(
        compiled(model, **METHOD, cache=cache, block_length=2), [Plain(model, ids[0], cache, 2)], filled(ids, 2, [1])
    )


@pytest.mark.parametrize("cache", CACHES)
def test_guidance_halves_equal_the_plain_model(cache: str) -> None:
    model, ids = Model(SHAPE), start()
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    blank = ids.clone().fill_(MASK)
    plains = [Plain(model, half[0], cache, 4, None, None, list(range(5, 13))) for half in (ids, blank)]
    calls = (torch.cat([x, torch.where(ids == MASK, x, MASK)]) for x in filled(ids, 4, [1]))
    assert follow(call, plains, calls) == 8
    assert counted("steps") == {"full": 2, "block": 6}


@pytest.mark.parametrize(
    ("name", "cache"), [(name, CACHES[i % 2]) for i, name in enumerate(models.BUILD) if name != "llama-eager"]
)
def test_every_model_equals_its_forward_with_keys_kept_by_hand(name: str, cache: str) -> None:
    model, ids = models.build(name, num_hidden_layers=2), start(2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    compiled = models.compiled_loop(model, **METHOD, cache=cache, block_length=4)
    by_hand = ByHand(lambda x: model(input_ids=x, attention_mask=mask).logits, ids, cache, 4)
    apart = 0.0
    for x in filled(ids, 4, [1, 2]):
        got, want = compiled(input_ids=x, attention_mask=mask).logits, by_hand.step(x)
        assert same(got, want, x)
        apart = max(apart, float((got - model(input_ids=x, attention_mask=mask).logits)[x == MASK].abs().max()))
    assert apart > 1e-3
    assert counted("steps")["block"]


@pytest.mark.parametrize(("form", "cache"), [(form, CACHES[i % 2]) for i, form in enumerate(FORMS)])
def test_layers_traced_alone_equal_keys_kept_by_hand(form: str, cache: str) -> None:
    model, ids = FORMS[form][0]().double().eval(), start(2)
    mask = mask_of(form, ids)
    call = models.compiled_loop(model, **METHOD, cache=cache, block_length=4)
    by_hand = ByHand(lambda x: model(x, mask), ids, cache, 4)
    for x in filled(ids, 4, [1, 2]):
        assert same(call(x, mask), by_hand.step(x), x)
    assert counted("rows") == {"full": 2 * 13, "block": 13 + (9 + 9 + 3 * 5 if cache == "prefix" else 5 * 5)}


# -- equal to eager ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.BUILD)
def test_a_refresh_at_every_step_equals_eager(name: str) -> None:
    model, ids = models.build(name, num_hidden_layers=2 if name == "modernbert" else 1), start(2)
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    call = models.compiled_loop(model, **METHOD, cache="dual", block_length=2, refresh_interval=1)
    for x in list(filled(ids, 2, [1, 3]))[:4]:
        assert same(call(input_ids=x, attention_mask=mask).logits, model(input_ids=x, attention_mask=mask).logits, x)


@FEW
@given(SHAPES, batches(ragged=True), st.sampled_from(CACHES))
def test_neutral_settings_equal_eager(shape: Shape, batch: Batch, cache: str) -> None:
    model, extra = Model(shape), batch.extra()
    call = compiled(model, **METHOD, block_length=2, cache=cache, refresh_interval=1)
    for x in filled(batch.ids(), 2, [1, 2, 3][: len(batch.prompts)], batch.seed):
        assert (call(x, **extra) - model(x, **extra))[x == MASK].abs().max() < 1e-9


# -- loops that differ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_a_loop_without_blocks_is_told_once_and_then_served_the_whole_response(cache: str) -> None:
    model, ids = Model(SHAPE), start(2)
    call = compiled(model, **METHOD, cache=cache, block_length=2)
    call(ids)
    x = put(ids, 6)
    with pytest.warns(UserWarning, match="outside of the active block of 2") as told:
        assert same(call(x), model(x), x)
    assert len(told) == 1
    plains = [Plain(model, row, cache, None, None, None, list(range(5, 13))) for row in x]
    calls = [put(x, *places) for places in ([], [2], [2, 5], [2, 5, 0], [2, 5, 0, 1, 3])]
    follow(call, plains, iter(calls))
    assert counted("rows") == {"full": 26, "repeat": 9, "block": 4 * 9}


@pytest.mark.parametrize("cache", CACHES)
def test_a_token_masked_again_goes_back_to_its_block_in_full(cache: str) -> None:
    model, ids = Model(SHAPE), start()
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    for x in (ids, put(ids, 0, 1, 2, 3), put(ids, 0, 1, 2, 3, 5)):
        call(x)
    back = put(ids, 0, 2, 3, 5)
    assert same(call(back), model(back), back)
    on = put(ids, 0, 1, 2, 3, 5)
    assert same(call(on), model(on), on)
    assert counted("steps") == {"full": 4, "block": 1}


@pytest.mark.parametrize(("cache", "back"), [("prefix", False), ("dual", False), ("dual", True)])
def test_an_edited_token_outside_of_the_active_rows_is_exact_at_that_step(cache: str, back: bool) -> None:
    model, ids = Model(SHAPE), start()
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    calls = [ids, put(ids, 0, 1, 2, 3), put(ids, 0, 1, 2, 3, 4)]
    for x in [*calls, put(ids, 1, 2, 3, 4)] if back else calls:
        call(x)
    edited = x.clone()
    edited[:, 5 + 4 if back else 5 + 1] = 9
    assert same(call(edited), model(edited), edited)


@pytest.mark.parametrize("cache", CACHES)
def test_a_sequence_without_a_response_costs_nothing(cache: str) -> None:
    model, ids = Model(SHAPE), start(2)
    ids[0, 5:] = 9
    call = compiled(model, **METHOD, cache=cache, block_length=8)
    plain = Plain(model, ids[1], cache, 8)
    for x in filled(ids, 8, [1, 1]):
        assert (call(x)[1] - plain.step(x[1]))[plain.blocks.readable(x[1])].abs().max() < 1e-9
    assert counted("rows") == {"full": 13, "block": 7 * 9}


def test_a_finished_sequence_costs_nothing_when_blocks_are_given_up() -> None:
    model, ids = Model(SHAPE), start(2, prompt=16)
    call = compiled(model, **METHOD, cache="dual", block_length=4)
    call(ids)
    x = ids.clone()
    x[0, 16:], x[1, 23] = 7, 7
    with pytest.warns(UserWarning, match="outside of the active block"):
        call(x)
    x[1, 22] = 7
    call(x)
    assert counted("rows") == {"full": 2 * 24, "block": 9}


# -- one call after another -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", CACHES)
def test_a_row_of_a_batch_equals_the_row_alone(cache: str) -> None:
    model, batch = Model(SHAPE), Batch([5, 3, 5], [0, 0, 2], 8, 1)
    ids, extra = batch.ids(), batch.extra()
    options = {**METHOD, "cache": cache, "block_length": 3, "refresh_interval": 2}
    call = compiled(model, **options)
    calls = list(filled(ids, 3, [1, 2, 4]))
    together = [call(x, **extra).clone() for x in calls]
    alone = compiled(model, **options)
    for row in range(3):
        dllm_compile.reset()
        only = {"mask": extra["mask"][row : row + 1]}
        for x, want in zip(calls, together, strict=True):
            x = x[row : row + 1]
            if bool((x == MASK).any()):
                assert same(alone(x, **only), want[row : row + 1], x)


@pytest.mark.parametrize("cache", CACHES)
def test_a_repeat_gives_the_same_logits_to_the_bit(cache: str) -> None:
    model, ids = Model(SHAPE), start(2)
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    plains = [Plain(model, row, cache, 4, None) for row in ids]
    for x in filled(ids, 4, [1, 2]):
        once = call(x).clone()
        follow(call, plains, iter([x]))
        assert torch.equal(call(x), once)
    assert counted("steps")["repeat"] == 16


@pytest.mark.parametrize("form", FORMS)
def test_a_repeat_of_layers_traced_alone_gives_the_same_logits_to_the_bit(form: str) -> None:
    model, ids = FORMS[form][0]().double().eval(), start(2)
    call, mask = models.compiled_loop(model, **METHOD, cache="dual", block_length=4), mask_of(form, ids)
    for x in filled(ids, 4, [1, 1]):
        once = call(x, mask).clone()
        assert torch.equal(call(x, mask), once)


@pytest.mark.parametrize(
    ("cache", "between"), [("prefix", "nothing"), ("dual", "reset"), ("prefix", "dynamo"), ("dual", "finished")]
)
def test_a_second_sequence_is_as_if_it_were_the_first(cache: str, between: str) -> None:
    model, ids, second = Model(SHAPE), start(2), start(2, seed=2)
    call = fresh(model, **METHOD, cache=cache, block_length=4)
    for x in list(filled(ids, 4, [1, 2]))[:6]:
        call(x)
    if between == "finished":
        x = put(ids, *range(8))
        assert (call(x) - model(x)).abs().max() < 1e-9
    elif between != "nothing":
        (dllm_compile if between == "reset" else torch._dynamo).reset()
    follow(call, [Plain(model, row, cache, 4) for row in second], filled(second, 4, [2, 1]))


@pytest.mark.parametrize("cache", CACHES)
def test_an_edited_prompt_starts_a_sequence(cache: str) -> None:
    model, ids = Model(SHAPE), start()
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    for x in (ids, put(ids, 1), put(ids, 1, 2)):
        call(x)
    edited = put(ids, 1, 2)
    edited[0, 2] += 1
    assert same(call(edited), model(edited), edited)
    assert sum(s.stats.sequences for s in set(sessions()) - EARLIER) == 2


# -- what is handed out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", ["dual"])
def test_logits_hidden_states_and_keys_may_be_written_to(cache: str) -> None:
    model: Any = models.build("llama", use_cache=True)
    ids = start(2)
    mine = models.compiled_loop(model, **METHOD, cache=cache, block_length=4)
    by_hand = ByHand(lambda x: model(input_ids=x, use_cache=False).logits, ids, cache, 4)
    for x in filled(ids, 4, [1, 2]):
        out = mine(input_ids=x, output_hidden_states=True)
        assert same(out.logits, by_hand.step(x), x)
        assert same(model.lm_head(out.hidden_states[-1]), out.logits, x)
        kept = [t for layer in out.past_key_values.layers for t in (layer.keys, layer.values)]
        assert len(kept) == 6
        for tensor in (out.logits, *out.hidden_states, *kept):
            tensor.fill_(torch.nan)


class Spoiled(LoopBroken):
    """Writes into what its layers returned, once the next layer has read it."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.drop(self.embed(ids))
        seen = []
        for layer in self.layers:
            torch._dynamo.graph_break()
            x, _ = layer(x, None)
            seen.append(x)
        logits: torch.Tensor = self.head(self.norm(x))
        torch._dynamo.graph_break()
        for hidden in seen:
            hidden.fill_(torch.nan)
        return logits


@pytest.mark.parametrize("cache", CACHES)
def test_what_layers_traced_alone_return_may_be_written_to(cache: str) -> None:
    model, ids = Spoiled().double().eval(), start(2)
    call = models.compiled_loop(model, **METHOD, cache=cache, block_length=4)
    by_hand = ByHand(model, ids, cache, 4)
    for x in filled(ids, 4, [1, 2]):
        assert same(call(x), by_hand.step(x), x)
        assert same(call(x), by_hand.logits, x)
    assert counted("steps")["block"]


class Extras(Model):
    """Returns more than its logits."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None] * self.get_buffer("rates")
        x = embedded = self.embed(ids)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin(), None)
        logits = self.head(self.norm(x))
        best = logits.max(-1).values
        return {"logits": logits, "embedded": embedded, "norms": x.norm(dim=-1), "mean": x.mean(1), "best": best}


@pytest.mark.parametrize("cache", ["prefix"])
def test_further_outputs_are_those_of_the_kept_rows(cache: str) -> None:
    model, ids = Extras(SHAPE), start(2)
    call = compiled(model, **METHOD, cache=cache, block_length=4)
    by_hand = ByHand(lambda x: model(x)["logits"], ids, cache, 4)
    for x in filled(ids, 4, [1, 2]):
        got: Any = call(x)
        assert same(got["logits"], by_hand.step(x), x)
        assert torch.equal(got["embedded"], model.embed(x))
        masked = x == MASK
        assert torch.equal(got["best"][masked], got["logits"].max(-1).values[masked])
        assert got["norms"].shape == x.shape
        assert got["mean"].shape == (2, SHAPE.width)
        for value in (got["logits"], got["embedded"], got["norms"], got["mean"]):
            value.fill_(torch.nan)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "rows"), [(None, 5), (False, 4)])
@pytest.mark.parametrize("cache", CACHES)
def test_a_step_inside_a_block_computes_its_rows(cache: str, shift: bool | None, rows: int) -> None:
    model, ids = Model(SHAPE), start(2, response=12)
    call = compiled(model, **METHOD, cache=cache, block_length=4, shift=shift)
    for x in filled(ids, 4, [1, 1]):
        call(x)
    assert counted("steps") == {"full": 3, "block": 9}
    behind = 3 * 8 + 3 * 4 if cache == "prefix" else 0
    assert counted("rows") == {"full": 3 * 17, "block": 9 * rows + behind}


@pytest.mark.parametrize("cache", CACHES)
def test_code_does_not_grow_with_the_number_of_blocks(cache: str) -> None:
    model, ids = Model(SHAPE), start(2, response=24)
    made: list[Any] = []

    def noted(module: Any, *args: Any) -> Code:
        made.append(args)
        return Code(module)

    with mock.patch.object(unit_code, "lower", noted):
        call = fresh(model, **METHOD, cache=cache, block_length=4)
        for x in filled(ids, 4, [1, 3]):
            call(x)
    assert counted("steps")["block"] > 12
    assert len(made) <= 7  # stem, layer and head, in full and for active rows, and a head for few readable ones


class Further(Model):
    """Has an input that does not belong to the sequence."""

    def forward(
        self, ids: torch.Tensor, mask: torch.Tensor | None = None, number: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert number is not None
        return super().forward(ids, mask) + number * 0


def test_inductor_serves_any_number_of_rows() -> None:
    model, batch = Further(Shape(layers=2, heads=2, groups=1, head_dim=4, seed=1)), Batch([3, 2], [1, 0], 8, 1)
    ids, extra = batch.ids(), batch.extra()
    for cache, block, shift in (("prefix", 3, False), ("dual", 3, None), ("dual", 1, False)):
        EARLIER.update(sessions())
        call = fresh(model, **METHOD, cache=cache, block_length=block, shift=shift, lowering="inductor")
        plains = plains_of(model, ids, extra, cache, block, None, shift)
        for x in filled(ids, block, [1, 2 if block > 1 else 1]):
            for number in (1.0, 2.0):  # the second call is no repeat: it runs the rows of the block again
                follow(call, plains, iter([x]), **extra, number=torch.tensor(number))
    assert counted("rows") == {"full": 9 * 11, "block": 9 * 2}  # of the last loop: one row, and one that is none
