"""Mechanisms together: neutral values are exact, sequences of a batch are apart, and no combination fails."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Options
from dllm_compile.runtime.ids import readable_rows

from . import loops, models
from .models import MASK
from .test_block_cache import filled
from .test_properties import EXAMPLES, SHAPES, Batch, Model, Shape, batches, fresh
from .under_way import UnderWay, under_way

pytestmark = pytest.mark.shares_graphs

STEPS, BLOCK = 6, 3
SHAPE = Shape(layers=2, heads=4, groups=2, head_dim=4, seed=2)
BATCH = Batch([5, 5], [0, 2], 6, 7)
FEW = settings(EXAMPLES, max_examples=5)

NEUTRAL: dict[str, dict[str, Any]] = {
    "intervals": {"prompt_interval": 1, "response_interval": 1},
    "dual": {"cache": "dual", "refresh_interval": 1},
    "prefix": {"cache": "prefix", "refresh_interval": 1},
    "decoded": {"cache": "decoded", "refresh_interval": 1},
    "sliding": {"cache": "dual", "sliding": "greedy", "refresh_interval": 1},
    "window": {"cache": "dual", "rows_before": 2, "rows_behind": 1, "refresh_interval": 1},
    "rolling": {"cache": "rolling", "refresh_interval": 1},
    "keep": {"keep_ratio": 0.5, "delay": STEPS},
    "saliency": {"saliency_threshold": 0.9, "full_steps": STEPS},
    "skipping": {"row_shares": (0.5,), "row_depths": (0.5,), "refresh_interval": 1},
    "suffix": {"cache": "dual", "suffix_window": STEPS, "refresh_interval": 1},
}
"""Each computes every row at every step of a sequence of ``STEPS`` calls."""

REUSING: dict[str, dict[str, Any]] = {
    "intervals": {"prompt_interval": 4, "response_interval": 3},
    "dual": {"cache": "dual"},
    "prefix": {"cache": "prefix"},
    "decoded": {"cache": "decoded"},
    "sliding": {"cache": "dual", "sliding": "greedy", "refresh_tokens": 4},
    "window": {"cache": "dual", "rows_before": 2, "rows_behind": 1},
    "rolling": {"cache": "rolling"},
    "keep": {"keep_ratio": 0.5, "delay": 0},
    "saliency": {"saliency_threshold": 0.9, "full_steps": 1},
    "skipping": {"row_shares": (0.5,), "row_depths": (0.5,)},
    "suffix": {"cache": "prefix", "suffix_window": 1},
}
CACHES = {"dual", "prefix", "decoded", "sliding", "window", "rolling", "suffix"}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def session() -> UnderWay:
    """The one that has just been called."""
    return under_way()


def possible(names: tuple[str, ...]) -> bool:
    """Whether these mechanisms make sense together: one cache at most, something to keep a share of, and steps of
    which rows can be skipped.
    """
    steps = bool({*CACHES, "saliency"} & set(names))
    return len(CACHES & set(names)) <= 1 and names != ("keep",) and (steps or "skipping" not in names)


def joined(*parts: dict[str, Any]) -> dict[str, Any]:
    """All of these options and nothing else, in blocks."""
    return alone({"block_length": BLOCK, **{k: v for part in parts for k, v in part.items()}})


def alone(options: dict[str, Any]) -> dict[str, Any]:
    """These mechanisms and no other, without what none of them reads."""
    options = {name: value for name, value in options.items() if name not in unread(options)}
    if {"cache", "keep_ratio", "saliency_threshold"} & options.keys():
        return options
    intervals = {"prompt_interval": None, "response_interval": None}
    return {**intervals, **options} if intervals.keys() & options.keys() else {"method": "exact", **options}


def unread(options: dict[str, Any]) -> set[str]:
    """Options that nothing reads beside the others, as documented."""
    caches, salient = options.get("cache", "none") != "none", "saliency_threshold" in options
    intervals = bool({"prompt_interval", "response_interval"} & options.keys())
    out = {"transfer_ratio"} if caches or salient or not intervals else set()
    out |= set() if caches else {"block_length"}
    out |= set() if caches or salient else {"refresh_interval", "delay"}
    keeps = "keep_ratio" in options and (caches or salient or intervals)
    out |= set() if keeps else {"keep_ratio", "kernel_size"}
    out |= set() if salient else {"full_steps"}
    return out | (set() if salient and not caches and not keeps else {"response_only"})


def drift(model: Model, batch: Batch, options: dict[str, Any], dream: bool = False, block: int = BLOCK) -> float:
    """The largest difference of a readable logit in an unmodified loop, from the model as it is."""
    call, extra, worst = fresh(model, **options), batch.extra(), 0.0

    def logits(x: torch.Tensor) -> torch.Tensor:
        nonlocal worst
        got = call(x, **extra)
        want: torch.Tensor = model(x, **extra)
        worst = max(worst, float((got - want)[readable_rows(x == MASK, options.get("shift"))].abs().max()))
        return want

    x, steps = batch.ids(), batch.response
    how = {"steps": steps, "mask_id": MASK}
    loop = (
        loops.dream(logits, x, alg="entropy", **how)
        if dream
        else loops.llada(logits, x, batch.prompts[0], block_length=block, **how)
    )
    assert sum(1 for _ in loop) == steps
    assert session().number == steps - 1
    return worst


# -- neutral ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names", [names for n in (1, 2) for names in itertools.combinations(NEUTRAL, n) if possible(names)], ids="+".join
)
def test_neutral_values_equal_eager_alone_and_in_pairs(names: tuple[str, ...]) -> None:
    assert drift(Model(SHAPE), BATCH, joined(*(NEUTRAL[name] for name in names))) < 1e-9


@pytest.mark.parametrize(
    ("neutral", "others"),
    [
        ("intervals", ("dual", "keep", "saliency")),
        ("dual", ("saliency",)),
        ("prefix", ("keep", "saliency")),
        ("decoded", ("keep",)),
        ("keep", ("dual", "saliency")),
        ("saliency", ("prefix", "keep")),
        ("saliency", ("intervals",)),
    ],
)
def test_one_neutral_value_turns_the_others_off(neutral: str, others: tuple[str, ...]) -> None:
    """Each refreshes everything at each step, whatever the others reuse without it."""
    options = joined(*(REUSING[name] for name in others), NEUTRAL[neutral])
    assert drift(Model(SHAPE), BATCH, options) < 1e-9
    without = {k: v for k, v in options.items() if k not in NEUTRAL[neutral] or k in ("cache", "keep_ratio", "delay")}
    assert drift(Model(SHAPE), BATCH, joined(without, {"delay": 0})) > 1e-4


@pytest.mark.parametrize("names", [("dual", "keep", "saliency"), ("intervals", "keep")])
def test_neutral_values_equal_eager_through_inductor(names: tuple[str, ...]) -> None:
    options = joined(*(NEUTRAL[name] for name in names), {"lowering": "inductor"})
    assert drift(Model(Shape(1, 2, 1, 4, 3)), BATCH, options) < 1e-9


@FEW
@given(SHAPES, batches(), st.data())
def test_neutral_values_equal_eager_in_any_number_and_loop(shape: Shape, batch: Batch, data: st.DataObject) -> None:
    names = tuple(data.draw(st.lists(st.sampled_from(list(NEUTRAL)), min_size=2, max_size=4, unique=True)))
    assume(possible(names))
    options = joined(*(NEUTRAL[name] for name in names))
    late = {"delay": batch.response, "full_steps": batch.response}
    options |= {name: value for name, value in late.items() if name in options}
    dream = data.draw(st.booleans(), "dream")
    lengths = [n for n in range(1, batch.response + 1) if batch.response % n == 0]
    block = data.draw(st.sampled_from(lengths), "block length")
    if "block_length" in options:
        options["block_length"] = None if dream else block
    options["shift"] = data.draw(st.sampled_from([None, True] if dream else [None, False]), "shift")
    assert drift(Model(shape), batch, options, dream, block) < 1e-9


@pytest.mark.parametrize("name", ["llama", "modernbert", "esm", "roberta"])
def test_with_every_token_new_and_every_row_salient_any_model_is_as_eager(name: str) -> None:
    """Fused projections, windows and heads with a bias too; the response is the whole sequence."""
    model, ids = models.build(name, num_hidden_layers=2), torch.full((1, 12), MASK)
    neutral = {"saliency_threshold": 1.0, "full_steps": 2, "response_only": False, "shift": False}
    call = models.compiled_loop(model, **neutral)
    for number in range(6):
        assert (call(input_ids=ids).logits - model(input_ids=ids).logits)[ids == MASK].abs().max() < 1e-9
        ids = torch.arange(12).unsqueeze(0) * 4 + 3 + number
        ids[0, 2 * number : 2 * number + 2] = MASK
    assert session().stats.steps == {"full": 2, "salient": 4}


@pytest.mark.parametrize("name", ["qwen3", "modernbert", "esm"])
def test_the_one_new_row_of_an_only_layer_is_as_eager(name: str) -> None:
    """Its context is exact, whatever the others lack; a mask in place of a token is a row that a sampler reads."""
    model, ids = models.build(name, num_hidden_layers=1), torch.full((1, 12), MASK)
    call = models.compiled_loop(model, saliency_threshold=1.0, full_steps=2)
    for number in range(4):
        got, want = call(input_ids=ids).logits, model(input_ids=ids).logits
        assert (got - want)[:, 4 + number if number > 1 else 0].abs().max() < 1e-9
        assert number < 2 or (got - want)[ids == MASK].abs().max() > 1e-4
        if number == 0:
            ids = torch.arange(12).unsqueeze(0) * 4 + 3
            ids[0, :2] = MASK
        else:
            ids = ids.clone()
            ids[0, 5 + number] = MASK  # the row that the next call is asked for
    assert session().stats.steps == {"full": 2, "salient": 2}


# -- batches ----------------------------------------------------------------------------------------------------------

APART: list[tuple[str, ...]] = [
    *((name,) for name in REUSING if name not in ("keep", "skipping")),
    ("dual", "skipping"),
    ("rolling", "skipping"),
    ("prefix", "skipping"),
    ("suffix", "skipping"),
    ("dual", "saliency", "skipping"),
    ("intervals", "dual"),
    ("intervals", "saliency"),
    ("dual", "saliency"),
    ("prefix", "saliency"),
    ("decoded", "saliency"),
    ("intervals", "prefix", "saliency"),
]


@pytest.mark.parametrize("names", APART, ids="+".join)
def test_each_row_of_a_batch_equals_the_sequence_alone(names: tuple[str, ...]) -> None:
    """At different blocks, with prompts of different lengths and padding, until each is done."""
    options = joined(*(REUSING[name] for name in names), {"refresh_interval": 4} if "decoded" in names else {})
    model, batch = Model(SHAPE), Batch([6, 4, 6], [2, 0, 0], 6, 3)
    extra, calls = batch.extra(), list(filled(batch.ids(), BLOCK, [1, 2, 3]))
    call = fresh(model, **options)
    together = [call(x, **extra).clone() for x in calls]
    eager = max(float((got - model(x, **extra))[x == MASK].abs().max()) for got, x in zip(together, calls, strict=True))
    assert eager > 1e-4  # something is reused
    alone, compared = fresh(model, **options), 0
    for row in range(len(batch.prompts)):
        dllm_compile.reset()
        only = {name: value[row : row + 1] for name, value in extra.items()}
        for x, want in zip(calls, together, strict=True):
            masked = x[row] == MASK
            if masked.any():
                got = alone(x[row : row + 1], **only)[0]
                assert (got - want[row])[masked].abs().max() < 1e-9, (row, compared)
                compared += 1
    assert compared > len(calls)


# -- anything ---------------------------------------------------------------------------------------------------------

ANY = st.fixed_dictionaries(
    {},
    optional={
        "prompt_interval": st.sampled_from([-1, 1, 2, 3, 50]),
        "response_interval": st.sampled_from([-1, 1, 2, 3, 7]),
        "transfer_ratio": st.sampled_from([0.0, 0.05, 0.5, 1.0]),
        "cache": st.sampled_from(["dual", "prefix", "decoded", "rolling", "none"]),
        "block_length": st.sampled_from([1, 2, 3, 5]),
        "refresh_interval": st.integers(1, 4),
        "delay": st.integers(0, 2),
        "keep_ratio": st.sampled_from([0.0, 0.2, 0.5, 1.0]),
        "kernel_size": st.sampled_from([None, 1, 5]),
        "saliency_threshold": st.sampled_from([-1.0, 0.0, 0.9, 0.999, 1.0]),
        "full_steps": st.integers(1, 4),
        "response_only": st.booleans(),
        "row_shares": st.sampled_from([(0.5, 0.25), (1.0, 0.4)]),
        "shift": st.booleans(),
    },
)


def taken(given: dict[str, Any]) -> dict[str, Any]:
    """The options without those that are refused beside the others, as documented."""
    if given.get("cache", "none") == "none" and "saliency_threshold" not in given:
        given = {name: value for name, value in given.items() if name != "row_shares"}
    refused = {name for name in unread(given) & given.keys() if given[name] is not None}
    for name in refused:
        others = {other: value for other, value in given.items() if other not in refused}
        with pytest.raises(ValueError, match=rf"^{name} "):
            Options.of({**alone(others), name: given[name]})
    return alone(given)


@settings(EXAMPLES, max_examples=10)
@given(SHAPES, batches(ragged=True), ANY, st.integers(1, 3), st.booleans())
def test_any_combination_runs(shape: Shape, batch: Batch, options: dict[str, Any], count: int, repeats: bool) -> None:
    """The first call is eager's, a repeated one gives the same unless it refreshes, and all of them are finite."""
    options = taken(options)
    model, extra = Model(shape), batch.extra()
    call, served = fresh(model, **options), 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", category=UserWarning)
        for number, x in enumerate(filled(batch.ids(), options.get("block_length"), [count] * len(batch.prompts))):
            rows = readable_rows(x == MASK, options.get("shift"))
            got = call(x, **extra).clone()
            assert got[rows].isfinite().all()
            if number == 0 or is_whole():
                assert (got - model(x, **extra))[rows].abs().max() < 1e-9
            if not repeats:
                continue
            again = call(x, **extra)
            assert again[rows].isfinite().all()
            step = session().step
            assert step is not None
            if step.repeat:
                assert torch.equal(again[rows], got[rows])
                served += 1
            elif is_whole():
                assert (again - model(x, **extra))[rows].abs().max() < 1e-9


def is_whole() -> bool:
    """Whether the last call computed everything."""
    step = session().step
    assert step is not None
    return step.assignment.name in ("exact", "full", "evict") and not step.repeat


@FEW
@given(SHAPES, batches(), ANY)
def test_any_combination_keeps_as_many_bytes_as_explained(shape: Shape, batch: Batch, options: dict[str, Any]) -> None:
    options = taken(options)
    model, ids = Model(shape), batch.ids()
    found = dllm_compile.explain(model, ids, mask_id=MASK, **options, **batch.extra())
    call = fresh(model, **options)
    for _ in range(1 + max(options.get("delay", 1), options.get("full_steps", 4)) + 1):
        call(ids, **batch.extra())
        kept = sum(t.numel() * t.element_size() for layer in session().layers.values() for t in layer)
        if kept:
            break
    if not kept and "evict" in found.variants:
        assert found.lengths["E"] == 0  # each block ends, or begins anew, before anything is chosen
        return
    values = {symbol: found.lengths[symbol.name] for symbol in found.state_bytes.free_symbols}
    assert kept == int(found.state_bytes.subs(values))
