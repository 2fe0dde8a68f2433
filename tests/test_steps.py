"""The step machine: what a call means is read off its ids, and no call is answered with another's results."""

from __future__ import annotations

import gc
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile.passes.feature_cache import variant
from dllm_compile.runtime.ids import infer_mask_id, labels, positions, readable_rows
from dllm_compile.runtime.session import Session, sessions

from . import loops, models
from .under_way import UnderWay, all_under_way

pytestmark = pytest.mark.shares_graphs

NEUTRAL: dict[str, Any] = {"prompt_interval": 1, "response_interval": 1}
CACHED: dict[str, Any] = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5}
PROMPT, RESPONSE = 5, 8
UNMASKED = list(range(3, 3 + RESPONSE))


class Pair:
    """A small model beside itself behind the backend."""

    def __init__(self, dtype: torch.dtype = torch.float64, seed: int = 0, causal: bool = False, **options: Any) -> None:
        self.model = models.build("llama", dtype, seed, num_hidden_layers=2, is_causal=causal)
        self.call = models.compiled_loop(self.model, **options)

    def got(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = self.call(input_ids=ids, **more).logits
        return logits

    def want(self, ids: torch.Tensor, **more: Any) -> torch.Tensor:
        logits: torch.Tensor = self.model(input_ids=ids, **more).logits
        return logits

    def check(self, ids: torch.Tensor, everywhere: bool = False, **more: Any) -> torch.Tensor:
        """One call; its rows of masked tokens, or all rows, equal eager's."""
        got, want = self.got(ids, **more), self.want(ids, **more)
        rows = torch.ones_like(ids, dtype=torch.bool) if everywhere else ids == models.MASK
        assert rows.any()
        assert got.shape == want.shape
        assert (got - want)[rows].abs().max() < 1e-9
        return got


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    EARLIER.clear()
    EARLIER.update(sessions())
    with torch.no_grad():
        yield


def started() -> UnderWay:
    """The batch of sequences that was called last, in the only session that has any."""
    (session,) = [s for s in set(sessions()) - EARLIER if s.batches]
    return UnderWay(session, session.batches[-1])


def sequences() -> int:
    """Sequences begun by the sessions of this test: earlier ones were reset."""
    return sum(s.stats.sequences for s in set(sessions()) - EARLIER)


EARLIER: set[Session] = set()


def begin(seed: int = 1, batch: int = 1, prompt: int = PROMPT, response: int = RESPONSE) -> torch.Tensor:
    return models.start(prompt, response, batch, seed)


def unmask(ids: torch.Tensor, *places: int) -> torch.Tensor:
    """A copy of ``ids`` with tokens at these places of the response."""
    out = ids.clone()
    for i in places:
        out[:, PROMPT + i] = UNMASKED[i]
    return out


def plain_warnings(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "dllm" in str(w.message)]


# -- the same call, another sequence ----------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [CACHED, NEUTRAL, {"method": "exact"}], ids=["cached", "neutral", "exact"])
def test_no_change_repeats_the_logits_to_the_bit(options: dict[str, Any]) -> None:
    pair, x = Pair(**options), begin()
    pair.got(x)
    x = unmask(x, 2)
    once = pair.got(x).clone()
    assert torch.equal(pair.got(x), once)
    assert torch.equal(pair.got(x), once)
    assert started().stats.steps["repeat"] == 2
    assert sum(started().stats.steps.values()) == 4
    assert started().stats.sequences == 1


@pytest.mark.parametrize(
    "other",
    [begin(seed=2), begin(seed=2, prompt=3), begin(seed=2, response=5), begin(seed=2, batch=3)],
    ids=["same-length", "shorter-prompt", "shorter-response", "larger-batch"],
)
def test_a_second_prompt_starts_a_sequence(other: torch.Tensor) -> None:
    pair, x = Pair(**CACHED), begin()
    pair.check(x, everywhere=True)
    pair.got(unmask(x, 2))
    pair.check(other, everywhere=True)
    assert started().number == 0
    assert sequences() == 2
    assert len(started().layers) == 1  # of two; the first is always computed


def test_the_same_prompt_again_starts_a_sequence() -> None:
    pair, x = Pair(**CACHED), begin()
    first = pair.check(x, everywhere=True)
    pair.got(unmask(x, 2))
    pair.got(unmask(x, 2, 3))
    assert torch.equal(pair.check(x, everywhere=True), first)
    assert started().stats.sequences == 2
    assert started().number == 0


def test_the_first_call_twice_then_a_step_stays_one_sequence() -> None:
    pair, x = Pair(**NEUTRAL), begin()
    pair.check(x)
    pair.check(x)
    pair.check(unmask(x, 2))
    assert started().stats.sequences == 1
    assert started().stats.steps == {"full": 2, "repeat": 1}


def test_another_attention_mask_starts_a_sequence() -> None:
    pair, x = Pair(**CACHED), begin(batch=2)
    hidden = torch.ones_like(x)
    hidden[1, :2] = 0
    pair.check(x, everywhere=True, attention_mask=torch.ones_like(x))
    pair.check(x, attention_mask=hidden)
    assert started().stats.sequences == 2
    pair.got(unmask(x, 2), attention_mask=hidden)
    assert started().stats.sequences == 2


def test_an_attention_mask_changed_in_place_starts_a_sequence() -> None:
    pair, x = Pair(**CACHED), begin(batch=2)
    hidden = torch.ones_like(x)
    hidden[0, :1] = 0
    pair.check(x, attention_mask=hidden)
    hidden[1, :2] = 0
    pair.check(x, attention_mask=hidden)
    assert started().stats.sequences == 2


# -- edits ------------------------------------------------------------------------------------------------------------


def test_an_edited_prompt_token_is_exact_at_that_step() -> None:
    pair, x = Pair(**CACHED), begin()
    pair.got(x)
    x = unmask(x, 2)
    pair.got(x)
    x[0, 1] += 1
    pair.check(x, everywhere=True)
    assert started().stats.sequences == 2
    pair.got(unmask(x, 3))
    assert started().number == 1


def test_edited_and_remasked_response_tokens_equal_eager_under_neutral_settings() -> None:
    pair, x = Pair(**NEUTRAL), begin(batch=2)
    pair.check(x)
    x = unmask(x, 2, 3)
    pair.check(x)
    x[:, PROMPT + 2] += 7
    pair.check(x)
    x[1, PROMPT + 3] = models.MASK
    pair.check(x)
    x[0, PROMPT + 2] = models.MASK
    x[0, PROMPT + 5] = 9
    pair.check(x)
    assert started().stats.sequences == 1


def test_an_edited_response_token_changes_cached_logits() -> None:
    pair, x = Pair(**CACHED), begin()
    pair.got(x)
    x = unmask(x, 2, 3)
    before = pair.got(x)
    x[0, PROMPT + 2] += 7
    after = pair.got(x)
    masked = x == models.MASK
    assert started().stats.steps == {"full": 1, "select": 2}
    assert not torch.isclose(before[masked], after[masked]).all(-1).any()


def test_a_remasked_token_can_be_read_again() -> None:
    pair, x = Pair(**CACHED), begin()
    old = pair.got(x)[0, PROMPT + 2]
    pair.got(unmask(x, 2, 3))
    pair.got(unmask(x, 2, 3, 4))
    row = pair.got(unmask(x, 3, 4))[0, PROMPT + 2]
    assert started().stats.steps == {"full": 1, "select": 3}
    assert row.isfinite().all()
    assert not torch.isclose(row, old).any()


def remasked(answer: torch.Tensor, copies: int, generator: torch.Generator) -> torch.Tensor:
    """LLaDA's likelihood estimate: copies of one text, each with its own share of the response masked at random."""
    length = answer.shape[1] - PROMPT
    first = int(torch.randint(1, length + 1, (), generator=generator))
    counts = torch.linspace(first, first + (copies - 1) * length / copies, copies).round().long()
    counts = (counts - 1) % length + 1
    out = answer.repeat(copies, 1)
    for row, count in enumerate(counts.tolist()):
        out[row, PROMPT + torch.randperm(length, generator=generator)[:count]] = models.MASK
    return out


@pytest.mark.parametrize("copies", [1, 4])
def test_copies_masked_anew_are_never_served_from_the_cache(copies: int) -> None:
    pair, generator = Pair(**CACHED), torch.Generator().manual_seed(3)
    pair.call = models.compiled(pair.model, **CACHED)  # nobody says that these are no loop
    answer = torch.randint(3, models.MASK, (1, PROMPT + 12), generator=generator)
    draws = [remasked(answer, copies, generator) for _ in range(6)]
    for draw in draws:
        pair.check(draw)
    steps = started().stats.steps
    assert steps["full"] + steps["exact"] == len(draws)


# -- what is masked ---------------------------------------------------------------------------------------------------


def test_nothing_masked_equals_eager_on_all_rows() -> None:
    pair, x = Pair(**CACHED), unmask(begin(), *range(RESPONSE))
    pair.check(x, everywhere=True)
    x[0, 1] += 1
    pair.check(x, everywhere=True)
    assert all(not s.layers for s in all_under_way())


@pytest.mark.parametrize("options", [CACHED, NEUTRAL], ids=["cached", "neutral"])
def test_a_finished_response_equals_eager_on_all_rows(options: dict[str, Any]) -> None:
    pair, x = Pair(**options), begin()
    pair.got(x)
    pair.got(unmask(x, 0, 1, 2, 3))
    pair.check(unmask(x, *range(RESPONSE)), everywhere=True)


def test_the_mask_is_inferred_from_the_first_call() -> None:
    pair, x = Pair(**NEUTRAL, mask_id=None), begin()
    for step in range(3):
        pair.check(unmask(x, *range(step)))
    assert started().mask_id == models.MASK
    assert started().stats.sequences == 1


def test_a_call_that_shows_no_mask_runs_exactly() -> None:
    pair, x = Pair(**CACHED, mask_id=None), begin()
    pair.check(unmask(x, *range(RESPONSE)), everywhere=True)
    assert not all_under_way(EARLIER)
    pair.check(x, everywhere=True)
    assert started().mask_id == models.MASK


def test_a_mask_inferred_once_is_kept_for_calls_that_do_not_end_in_it() -> None:
    pair, x = Pair(**NEUTRAL, mask_id=None), begin()
    pair.check(x)
    other = unmask(begin(seed=4), RESPONSE - 2, RESPONSE - 1)
    pair.check(other, everywhere=True)
    assert started().mask_id == models.MASK
    assert started().stats.sequences == 2


def test_guidance_halves_share_the_response_of_the_conditional_half() -> None:
    pair, x = Pair(**CACHED), begin(batch=2)
    blank = x.clone()
    blank[:, :PROMPT] = models.MASK
    pair.got(torch.cat([x, blank]))
    want = torch.zeros(4, PROMPT + RESPONSE, dtype=torch.bool)
    want[:, PROMPT:] = True
    assert torch.equal(started().response, want)
    pair.got(torch.cat([unmask(x, 2), unmask(blank, 2)]))
    assert started().stats.steps == {"full": 1, "select": 1}


def test_guidance_equals_eager_under_neutral_settings() -> None:
    pair = Pair(**NEUTRAL)
    steps = 0
    for _ in loops.llada(pair.check, begin(), PROMPT, steps=4, block_length=4, mask_id=models.MASK, cfg_scale=1.5):
        steps += 1
    assert steps == 4
    assert started().stats.steps == {"full": 4}


# -- who owns what ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [NEUTRAL, CACHED, {"method": "exact"}], ids=["neutral", "cached", "exact"])
def test_writing_into_the_logits_spoils_nothing(options: dict[str, Any]) -> None:
    pair, start = Pair(**options), begin()
    xs = [start, unmask(start, 2), unmask(start, 2), unmask(start, 2, 3), unmask(start, 2, 3)]
    clean = [pair.got(x).clone() for x in xs]
    dllm_compile.reset()
    for x, want in zip(xs, clean, strict=True):
        got = pair.got(x)
        assert torch.equal(got, want)
        got.fill_(torch.nan)


def test_ids_changed_in_place_are_seen() -> None:
    pair, x = Pair(**NEUTRAL), begin()
    for place in range(4):
        pair.check(x)
        x[0, PROMPT + place] = UNMASKED[place]
    assert started().stats.steps == {"full": 4}


@pytest.mark.parametrize("reset", [dllm_compile.reset, torch._dynamo.reset], ids=["ours", "dynamo"])
def test_reset_frees_the_state(reset: Callable[[], None]) -> None:
    pair, x = Pair(**CACHED), begin()
    pair.got(x)
    pair.got(unmask(x, 2))
    session = started()
    kept = [weakref.ref(t) for state in session.layers.values() for t in state]
    kept += [weakref.ref(each.rows) for each in session.shared.values()]
    assert len(kept) > 4
    reset()
    assert not session.layers
    assert not session.outputs
    assert not session.shared
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    pair.check(unmask(x, 2), everywhere=True)


def test_dynamo_frees_the_state_at_every_reset() -> None:
    pair, x = Pair(**CACHED), begin()
    for _ in range(2):
        pair.got(x)
        session = started()
        assert session.layers
        torch._dynamo.reset()
        assert not session.layers


def test_the_state_dies_with_the_model() -> None:
    pair, x = Pair(**CACHED), begin()
    pair.got(x)
    session = started()
    kept = [weakref.ref(t) for state in session.layers.values() for t in state]
    model = weakref.ref(pair.model)
    assert kept
    del pair
    gc.collect()
    assert model() is None
    assert [ref() for ref in kept] == [None] * len(kept)


@pytest.mark.parametrize("options", [NEUTRAL, {"method": "exact"}], ids=["neutral", "exact"])
def test_interleaved_models_do_not_share_state(options: dict[str, Any]) -> None:
    one, two, x = Pair(**options), Pair(seed=5, **options), begin()
    for step in range(4):
        one.check(unmask(x, *range(step)))
        two.check(unmask(x, *range(step)))


def test_interleaved_models_cache_as_if_they_were_alone() -> None:
    x = begin()
    alone: list[list[torch.Tensor]] = []
    for seed in (0, 5):
        pair = Pair(seed=seed, **CACHED)
        alone.append([pair.got(unmask(x, *range(step))).clone() for step in range(4)])
        dllm_compile.reset()
    one, two = Pair(seed=0, **CACHED), Pair(seed=5, **CACHED)
    for step in range(4):
        now = unmask(x, *range(step))
        rows = now == models.MASK
        assert (one.got(now) - alone[0][step])[rows].abs().max() < 1e-9
        assert (two.got(now) - alone[1][step])[rows].abs().max() < 1e-9


@pytest.mark.parametrize("options", [NEUTRAL, CACHED], ids=["neutral", "cached"])
def test_changed_weights_are_not_answered_with_old_logits(options: dict[str, Any]) -> None:
    pair, x = Pair(**options), begin()
    pair.check(x)
    for parameter in pair.model.parameters():
        parameter.mul_(1.5)
    pair.check(x)


class Normed(torch.nn.Module):
    """Two attention layers behind PyTorch's own root-mean-square norms."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(models.VOCABULARY, 16)
        self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(16) for _ in range(3))
        self.query = torch.nn.Linear(16, 16)
        self.head = torch.nn.Linear(16, models.VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        *layers, last = self.norms
        for norm in layers:
            a = norm(x).unsqueeze(1)
            x = x + torch.nn.functional.scaled_dot_product_attention(self.query(a), a, a).squeeze(1)
        logits: torch.Tensor = self.head(last(x))
        return logits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_model_with_the_rms_norm_of_pytorch_is_cached(dtype: torch.dtype) -> None:
    model, x = Normed().to(dtype), begin(batch=2)
    call = models.compiled_loop(model, **NEUTRAL)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for step in range(3):
            now = unmask(x, *range(step))
            got, want, rows = call(now), model(now), now == models.MASK
            assert (got - want)[rows].abs().max() <= 8 * torch.finfo(dtype).eps * want.abs().max()
    assert started().stats.steps == {"full": 3}
    assert len(started().layers) == 1  # of two: the first is computed at every step


class Timed(torch.nn.Module):
    """A denoiser that is told the noise level, one number a sequence."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(models.VOCABULARY, 16)
        self.head = torch.nn.Linear(16, models.VOCABULARY)

    def forward(self, ids: torch.Tensor, noise: torch.Tensor | None = None) -> torch.Tensor:
        hidden = self.embed(ids)
        if noise is not None:
            hidden = hidden * noise[:, None, None]
        logits: torch.Tensor = self.head(torch.tanh(hidden))
        return logits


def test_a_model_without_attention_equals_eager() -> None:
    model, x = Timed().double(), begin(batch=2)
    call = models.compiled_loop(model, **CACHED)
    for step in range(4):
        now = unmask(x, *range(step))
        rows = now == models.MASK
        assert (call(now) - model(now))[rows].abs().max() < 1e-9
    assert started().stats.sequences == 1


def test_the_same_ids_at_another_noise_level_are_computed_again() -> None:
    model, x = Timed().double(), begin(batch=2)
    call = models.compiled_loop(model, **NEUTRAL)
    for level in (1.0, 0.5, 0.25):
        noise = torch.full((2,), level, dtype=torch.float64)
        rows = x == models.MASK
        assert (call(x, noise) - model(x, noise))[rows].abs().max() < 1e-9


# -- not for the cache ------------------------------------------------------------------------------------------------


def test_gradients_run_plain_with_one_warning() -> None:
    pair, x = Pair(**CACHED), begin()
    with torch.enable_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            pair.model.zero_grad()
            got = pair.check(unmask(x, *range(step)), everywhere=True)
            torch.autograd.backward(got.square().sum())
            gradients = [p.grad.clone() for p in pair.model.parameters() if p.grad is not None]
            pair.model.zero_grad()
            torch.autograd.backward(pair.want(unmask(x, *range(step))).square().sum())
            wanted = [p.grad for p in pair.model.parameters() if p.grad is not None]
            assert len(gradients) == len(wanted) > 4
            assert all(torch.allclose(a, b) for a, b in zip(gradients, wanted, strict=True))
    (said,) = plain_warnings(caught)
    assert "gradients are on" in said
    pair.check(x)
    assert started().stats.sequences == 1


def test_a_causal_model_runs_plain_with_one_warning() -> None:
    pair, x = Pair(causal=True, **CACHED), begin()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(3):
            pair.check(unmask(x, *range(step)), everywhere=True)
    (said,) = plain_warnings(caught)
    assert "causal" in said
    assert not [s for s in all_under_way() if s.layers]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_lower_precisions_run_and_stay_close(dtype: torch.dtype) -> None:
    pair, x = Pair(dtype, **NEUTRAL), begin(batch=2)
    for step in range(4):
        now = unmask(x, *range(step))
        got, want, rows = pair.got(now), pair.want(now), now == models.MASK
        assert got.dtype == dtype
        assert (got - want)[rows].abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_lower_precisions_cache(dtype: torch.dtype) -> None:
    pair, x = Pair(dtype, **CACHED), begin(batch=2)
    for step in range(5):
        now = unmask(x, *range(step))
        assert pair.got(now)[now == models.MASK].isfinite().all()
    assert started().stats.steps == {"full": 1, "select": 3, "response": 1}
    assert {t.dtype for state in started().layers.values() for t in state} == {dtype}


# -- small parts ------------------------------------------------------------------------------------------------------

ROWS = st.integers(1, 3).flatmap(
    lambda tokens: st.lists(st.lists(st.booleans(), min_size=4 * tokens, max_size=4 * tokens), min_size=1, max_size=4)
)


@given(ROWS)
def test_positions_lists_the_rows_in_order(rows: list[list[bool]]) -> None:
    tokens = len(rows[0])
    got = positions(torch.tensor(rows))
    wanted = [[i for i, there in enumerate(row) if there] for row in rows]
    most = max(map(len, wanted))
    assert got.dtype == torch.int64
    assert got.is_contiguous()
    assert got.tolist() == [row + [tokens] * (most - len(row)) for row in wanted]


@given(ROWS, st.sampled_from([None, True, False]))
def test_readable_rows_are_the_masked_and_those_before(rows: list[list[bool]], shift: bool | None) -> None:
    got = readable_rows(torch.tensor(rows), shift).tolist()
    before = shift is not False
    wanted = [[there or (before and i + 1 < len(row) and row[i + 1]) for i, there in enumerate(row)] for row in rows]
    assert got == wanted


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([[4, 5, 9, 9]], 9),
        ([[4, 5, 6, 9]], None),
        ([[4, 5, 9, 9], [9, 9, 9, 9]], 9),
        ([[4, 5, 9, 9], [4, 5, 8, 8]], None),
        ([[4, 5, 9, 9], [4, 5, 8, 9]], None),
        ([[9]], None),
        ([[9, 9]], 9),
    ],
)
def test_infer_mask_id_reads_the_end_of_every_sequence(ids: list[list[int]], mask: int | None) -> None:
    assert infer_mask_id(torch.tensor(ids)) == mask


INTERVALS = st.one_of(st.just(-1), st.integers(1, 12))


@settings(max_examples=300)
@given(st.integers(0, 60), INTERVALS, INTERVALS, st.one_of(st.none(), st.integers(0, 5)))
def test_variant_follows_the_definition(
    step: int, prompt_interval: int, response_interval: int, selected: int | None
) -> None:
    refresh_prompt = prompt_interval == -1 or step % prompt_interval == 0
    refresh_response = response_interval == -1 or step % response_interval == 0
    got = variant(step, prompt_interval, response_interval, selected)
    # which of the two parts of the sequence each role computes, and how many of its rows
    rows = {
        "all": ("all", "all"),
        "none": ("", ""),
        "prompt": ("all", ""),
        "response": ("", "all"),
        "selected": ("", "some"),
        "prompt+selected": ("all", "some"),
    }
    some = "" if not selected else "some"
    query = ("all" if refresh_prompt else "", "all" if refresh_response else some)
    value = (query[0], "all" if refresh_response or selected is not None else "")
    assert rows[got.query.name] == query
    assert rows[got.key.name] == query
    assert rows[got.value.name] == value
    assert got.keep
    assert (got.pick is not None) == (some != "" and not refresh_response)
    if step == 0:
        assert got.name == "full"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_labels_tell_rows_apart_and_know_equal_ones(dtype: torch.dtype) -> None:
    rows = torch.randn(20000, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
    hidden = torch.stack([rows, rows.flip(0)])
    got = labels(hidden)
    assert got.shape == hidden.shape[:2]
    assert got.dtype == torch.int64
    assert (got >= 0).all()
    assert torch.equal(got[0], got[1].flip(0))
    assert len(set(map(tuple, rows.tolist()))) == rows.shape[0] == len(set(got[0].tolist()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_labels_see_small_changes_that_cancel(dtype: torch.dtype) -> None:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    words = torch.ones(1, 8, dtype=dtype).view(kind).repeat(3, 1)
    words[1, 0] += 3
    words[1, 1] -= 1
    words[2, 2] += 7
    words[2, 3] -= 5
    got = labels(words.view(dtype).unsqueeze(0))[0]
    assert len(set(got.tolist())) == 3
