"""Sparse-dLLM: what is kept, what the block reads, and what that saves. The authors' traces are in ``test_golden``."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile.kernels.kept_entries import kept_entries
from dllm_compile.passes.eviction import entries, has_gaps

from . import models, small_model
from .grids import in_turn
from .rounding import roundings
from .under_way import UnderWay, under_way

pytestmark = pytest.mark.shares_graphs

PROMPT, RESPONSE, BLOCK = 9, 8, 4
SINGLE = torch.float32  # transformers takes norms and rotary tables in it: another order of operations shows there
EVICT: dict[str, Any] = {"method": "sparse-dllm", "block_length": BLOCK}


def session() -> UnderWay:
    return under_way()


def logits_of(model: torch.nn.Module, x: torch.Tensor, mask: torch.Tensor | None, **options: Any) -> list[torch.Tensor]:
    """Logits of each call while the tokens of ``x`` are freed from left to right."""
    call, x = models.compiled_loop(model, **options), x.clone()
    given = {} if mask is None else {"attention_mask": mask}
    out = []
    with torch.no_grad():
        for step in range(RESPONSE):
            out.append(call(input_ids=x, **given).logits.clone())
            x[:, x.shape[1] - RESPONSE + step] = 3 + step
    return out


def readable(step: int) -> slice:
    """Masked rows of the active block at a step, counted from the end."""
    return slice(step - RESPONSE, (step // BLOCK + 1) * BLOCK - RESPONSE or None)


def near(got: list[torch.Tensor], want: list[torch.Tensor], dtype: torch.dtype | None = None) -> list[bool]:
    """At which steps the logits agree; ``dtype`` as of ``roundings``."""
    pairs = enumerate(zip(got, want, strict=True))
    return [roundings(a[:, readable(step)], b[:, readable(step)], dtype) <= 8 for step, (a, b) in pairs]


@pytest.mark.parametrize(
    ("name", "padded"), in_turn(["llama", "qwen2", "qwen3", "modernbert", "esm", "olmoe"], [True, False])
)
def test_a_delay_of_a_whole_block_equals_eager(name: str, padded: bool) -> None:
    model, x = models.build(name, num_hidden_layers=2), models.start(PROMPT, RESPONSE)
    mask = torch.ones_like(x) if padded else None
    if mask is not None:
        mask[0, :2] = 0
    got = logits_of(model, x, mask, **EVICT, delay=BLOCK)
    dllm_compile.reset()
    assert all(near(got, logits_of(model, x, mask, method="exact")))


@pytest.mark.parametrize("name", ["llama", "qwen2", "modernbert"])
def test_a_padded_row_of_a_batch_equals_the_row_alone(name: str) -> None:
    model, x = models.build(name, num_hidden_layers=2), models.start(PROMPT, RESPONSE)
    options = {**EVICT, "kernel_size": None}  # pooling makes ties, whose order may differ
    alone = logits_of(model, x[:1, 2:], None, **options)
    assert session().stats.steps == {"full": 2, "evict": 2, "sparse": 4}
    dllm_compile.reset()
    mask = torch.ones_like(x)
    mask[0, :2] = 0
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    call, ids = models.compiled_loop(model, **options), x.clone()
    placed = {} if name == "modernbert" else {"position_ids": position_ids}  # rotations are relative either way
    together = []
    with torch.no_grad():
        for step in range(RESPONSE):
            together.append(call(input_ids=ids, attention_mask=mask, **placed).logits[:1].clone())
            ids[:, ids.shape[1] - RESPONSE + step] = 3 + step
    assert all(near(together, alone, SINGLE if name == "modernbert" else None))  # only there are tables of other places
    kept = [layer[-1][0] for layer in session().layers.values()]
    assert all((positions >= 2).all() for positions in kept)
    counts = {int((positions < x.shape[1]).sum()) for positions in kept}
    seen = PROMPT - 2 + RESPONSE - BLOCK  # in layers with a sliding window a block sees fewer
    assert max(counts) == seen // 2 + BLOCK
    assert (len(counts) > 1) == (name == "modernbert")


@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_full_steps_are_exact_and_sparse_ones_are_not(ratio: float) -> None:
    """Not even with everything kept: the entries stay as they were at the second step of the block."""
    model, x = models.build("qwen2", num_hidden_layers=2), models.start(PROMPT, RESPONSE)
    got = logits_of(model, x, None, **EVICT, keep_ratio=ratio, shift=False)
    dllm_compile.reset()
    late = logits_of(model, x, None, **EVICT, keep_ratio=ratio)  # the row before the block is computed, and not read
    assert all(near(got, late))
    dllm_compile.reset()
    exact = logits_of(model, x, None, method="exact")
    assert near(got, exact) == [step % BLOCK < 2 for step in range(RESPONSE)]


def test_what_is_evicted_takes_no_memory() -> None:
    model, x = models.build("llama", num_hidden_layers=2), models.start(200, RESPONSE)

    def kept(**options: Any) -> int:
        dllm_compile.reset()
        logits_of(model, x, None, **options)
        return sum(t.numel() * t.element_size() for layer in session().layers.values() for t in layer)

    dense = kept(method="fast-dllm", cache="dual", block_length=BLOCK)
    assert kept(**EVICT, keep_ratio=0.5) < 0.55 * dense
    assert kept(**EVICT, keep_ratio=0.25) < 0.3 * dense


def test_a_shorter_last_block_has_code_of_its_own() -> None:
    model, x = small_model.build(layers=1), models.start(PROMPT, 6)

    def run(lowering: str) -> list[torch.Tensor]:
        dllm_compile.reset()
        call, ids = models.compiled_loop(model, **EVICT, delay=0, lowering=lowering), x.clone()
        out = []
        with torch.no_grad():
            for step in range(6):
                out.append(call(input_ids=ids).logits[:, PROMPT + step].clone())
                ids[:, PROMPT + step] = 3 + step
        return out

    want = run("eager")
    assert session().stats.steps == {"evict": 2, "sparse": 4}
    for got, expected in zip(run("inductor"), want, strict=True):
        assert roundings(got, expected) <= 8


def test_threshold_decoding_runs_on_kept_entries() -> None:
    model, prompt = models.build("qwen2", num_hidden_layers=2), models.start(PROMPT, RESPONSE)[:, :PROMPT]
    more = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": models.MASK, "lowering": "eager"}
    out = dllm_compile.generate(model, prompt, method="sparse-dllm", threshold=0.4, return_dict=True, **more)
    assert isinstance(out, dllm_compile.Generated)
    assert not (out.sequences == models.MASK).any()
    assert out.nfe <= RESPONSE


def test_a_model_that_returns_its_keys_gets_them() -> None:
    model, x = models.build("llama-cache", num_hidden_layers=2), models.start(PROMPT, RESPONSE)
    got = logits_of(model, x, None, **EVICT)
    dllm_compile.reset()
    assert all(near(got, logits_of(models.build("llama", num_hidden_layers=2), x, None, **EVICT)))


def test_explain_counts_kept_entries() -> None:
    model, x = models.build("llama", num_hidden_layers=2), models.start(PROMPT, RESPONSE)
    found = dllm_compile.explain(model, x, mask_id=models.MASK, **EVICT, shift=False)
    assert found.lengths["E"] == (PROMPT + RESPONSE - BLOCK) // 2
    assert found.relative["sparse"] < found.relative["evict"] <= 1
    with dllm_compile.loop():
        logits_of(model, x, None, **EVICT)
    values = {symbol: found.lengths[symbol.name] for symbol in found.state_bytes.free_symbols}
    allocated = sum(t.numel() * t.element_size() for layer in session().layers.values() for t in layer)
    assert int(found.state_bytes.subs(values)) == allocated


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from([None, 1, 3, 5]),
    st.integers(0, 99),
)
def test_kept_entries_follow_the_formula(
    batch: int, heads: tuple[int, int], block: int, rest: int, ratio: float, window: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = block + rest + 1
    query = torch.randn(batch, heads[0], tokens, 8, generator=generator, dtype=torch.float64)
    key = torch.randn(batch, heads[1], tokens, 8, generator=generator, dtype=torch.float64)
    start = seed % (tokens - block + 1)
    inside = torch.arange(start, start + block)
    outside = torch.tensor([i for i in range(tokens) if i not in inside.tolist()], dtype=torch.int64)
    hidden = torch.zeros(batch, tokens, dtype=torch.bool)
    hidden[0, outside[: seed % 2]] = True
    mask = ~hidden[:, None, None, :].expand(-1, 1, tokens, -1)
    most = int(len(outside) * ratio)
    got = kept_entries(query, key, mask, inside.expand(batch, -1), outside.expand(batch, -1), most, ratio, window)
    for row in range(batch):
        free = [j for j in outside.tolist() if not hidden[row, j]]
        score = []
        for j in free:
            per_head = [query[row, h, inside].mean(0) @ key[row, h * heads[1] // heads[0], j] for h in range(heads[0])]
            score.append(float(sum(per_head) / heads[0]))
        reach = (window or 1) // 2
        pooled = [max(score[max(0, i - reach) : i + reach + 1]) for i in range(len(score))]
        count = int(len(free) * ratio)
        chosen = [j for j in got[row].tolist() if j < tokens]
        assert len(chosen) == len(set(chosen)) == count
        worst = min((pooled[free.index(j)] for j in chosen), default=float("inf"))
        left = max((pooled[i] for i, j in enumerate(free) if j not in chosen), default=-float("inf"))
        assert worst >= left - 8 * torch.finfo(torch.float64).eps * max(map(abs, score), default=0.0)


@pytest.mark.parametrize("heads", [(), (1,), (4,), (1, 4)], ids=str)
def test_a_mask_of_any_rank_hides_the_entries(heads: tuple[int, ...]) -> None:
    """A window of tokens ``[S, S]``, a bias of each head ``[H, S, S]``."""
    key = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    places = torch.arange(9)
    near = ((places - places[:, None]).abs() <= 3).expand(*heads, 9, 9)
    kept = kept_entries(key, key, near, places[None, :2].expand(2, -1), places[None, 2:].expand(2, -1), 7, 1.0, None)
    assert [sorted(row) for row in kept.tolist()] == [[2, 3, 4, 9, 9, 9, 9]] * 2


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("keep_ratio", 1.5, "from 0 to 1"),
        ("keep_ratio", True, "from 0 to 1"),
        ("kernel_size", 2, "odd"),
        ("kernel_size", 0, "odd"),
        ("delay", -1, "at least 0"),
    ],
)
def test_bad_options_are_answered(name: str, value: Any, wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        dllm_compile.Options.of({**EVICT, name: value})


@pytest.mark.parametrize(("outside", "ratio"), [(90, 0.7), (170, 0.7), (180, 0.35), (100, 0.29), (3, 0.5), (2, 0.0)])
def test_entries_are_counted_as_the_kernel_counts_them(outside: int, ratio: float) -> None:
    """In float32, 90 * 0.7 is 63 and not 62: a slot without an entry, which no mask would hide."""
    fresh = torch.arange(outside + 8).expand(2, -1) < 8
    count, most = int(outside * ratio), entries(fresh, ratio)
    assert most == max(count, 2)
    assert has_gaps(fresh, ratio) == (count < 2)
    query, key = torch.randn(2, 2, outside + 8, 4), torch.randn(2, 1, outside + 8, 4)
    index = torch.arange(outside + 8).expand(2, -1)
    kept = kept_entries(query, key, None, index[:, :8], index[:, 8:], most, ratio, None)
    assert (kept < outside + 8).sum(1).tolist() == [count, count]
