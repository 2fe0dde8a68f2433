"""Layouts, rows and the row-change statistic."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dllm_compile.core.layout import Factor, Layout, holds, opened, plain, position, regroup, size
from dllm_compile.core.rows import (
    ALL,
    NONE,
    RowSet,
    gather_rows,
    join,
    merge_rows,
    read_all,
    read_rows,
    rows_back,
    rows_first,
    store_rows,
)
from dllm_compile.core.state import shape
from dllm_compile.kernels.row_change import pick_rows, row_change

B, T = Factor("B", 2), Factor("T", 5)


def sizes(layout: Layout) -> tuple[int, ...]:
    return tuple(size(dim) for dim in layout)


def resized(layout: Layout, tokens: int) -> tuple[int, ...]:
    """Sizes of the same tensor computed for so many rows."""
    return tuple(prod(tokens if f.kind == "T" else f.size for f in dim) for dim in layout)


# -- layouts -----------------------------------------------------------------------------------------------------------


def test_a_layout_tells_where_batch_and_tokens_are() -> None:
    layout: Layout = ((B, T), plain(6))
    assert sizes(layout) == (10, 6)
    assert position(layout, "B") == position(layout, "T") == 0
    assert position((plain(3), (B,), (T,)), "T") == 2
    assert position((plain(3),), "T") is None
    assert holds((B, T), "T")
    assert not holds(plain(5), "T")


@pytest.mark.parametrize(
    ("layout", "view", "wanted"),
    [
        (((B,), (T,), plain(6)), (10, 6), ((B, T), plain(6))),
        (((B, T), plain(6)), (2, 5, 6), ((B,), (T,), plain(6))),
        (((B,), (T,), plain(6)), (2, 5, 3, 2), ((B,), (T,), plain(3), plain(2))),
        (((B,), (T,), plain(3), plain(2)), (2, 5, 6), ((B,), (T,), plain(6))),
        (((B,), (T,)), (10,), ((B, T),)),
        (((B,), (T,), plain(6)), (2, 30), ((B,), (T, Factor("", 6)))),
        (((B,), (T,), plain(6)), (2, 15, 2), ((B,), (T, Factor("", 3)), plain(2))),
        (((B,), (T,), plain(6)), (1, 2, 5, 6), (plain(1), (B,), (T,), plain(6))),
        (((B,), (T,), plain(6)), (2, 5, 1, 6), ((B,), (T,), plain(1), plain(6))),
        (((B,), (T,), plain(6)), (2, 5, 6, 1), ((B,), (T,), plain(6), plain(1))),
        (((B,), plain(1), (T,)), (2, 5), ((B,), (T,))),
    ],
)
def test_a_view_regroups_the_factors(layout: Layout, view: tuple[int, ...], wanted: Layout) -> None:
    assert regroup(layout, view) == wanted


@pytest.mark.parametrize(
    ("layout", "view"),
    [
        (((B,), (Factor("T", 6),), plain(4)), (2, 3, 2, 4)),
        (((Factor("B", 4),), (T,)), (2, 2, 5)),
        (((B,), (T,), plain(6)), (5, 2, 6)),
        (((B, T), plain(6)), (5, 2, 6)),
        (((B,), (T,)), (2, 6)),
        (((B,), (T,)), (2,)),
        (((B,), (T,)), (2, 5, 2)),
    ],
    ids=["tokens", "batch", "exchanged", "merged", "too-many", "too-few", "another-size"],
)
def test_a_view_that_splits_batch_or_tokens_is_refused(layout: Layout, view: tuple[int, ...]) -> None:
    assert regroup(layout, view) is None


def test_tokens_are_kept_apart_from_a_width_of_the_same_size() -> None:
    layout: Layout = ((B,), (T,), plain(5))
    assert regroup(layout, (10, 5)) == ((B, T), plain(5))
    assert regroup(((B,), plain(5), (T,)), (10, 5)) == ((B, Factor("", 5)), (T,))


@st.composite
def layouts(draw: st.DrawFn, width: int = 4) -> Layout:
    """One dimension each for batch and tokens, or both in one; other factors anywhere."""
    batch, tokens = Factor("B", draw(st.integers(1, 4))), Factor("T", draw(st.integers(2, 5)))
    others = [(Factor("", n),) for n in draw(st.lists(st.integers(2, width), max_size=2))]
    parts = [(batch, tokens), *others] if draw(st.booleans()) else [(batch,), (tokens,), *others]
    return tuple(draw(st.permutations(parts)))


@given(layouts())
def test_regroup_to_single_factors_and_back_is_the_identity(layout: Layout) -> None:
    apart = tuple(factor.size for dim in layout for factor in dim)
    split = regroup(layout, apart)
    assert split is not None
    assert sizes(split) == apart
    assert regroup(split, sizes(layout)) == layout


@given(layouts(), st.data())
def test_regroup_agrees_with_where_a_view_puts_the_tokens(layout: Layout, data: st.DataObject) -> None:
    """A tensor that holds its token number tells along which dimensions of a view it varies."""
    factors = [factor for dim in layout for factor in dim]
    cuts = data.draw(st.lists(st.booleans(), min_size=len(factors) - 1, max_size=len(factors) - 1))
    view, extent = [], factors[0].size
    for factor, cut in zip(factors[1:], cuts, strict=True):
        if cut:
            view.append(extent)
            extent = factor.size
        else:
            extent *= factor.size
    view.append(extent)
    got = regroup(layout, view)
    assert got is not None
    assert sizes(got) == tuple(view)
    at = next(i for i, factor in enumerate(factors) if factor.kind == "T")
    number = torch.arange(factors[at].size).view([-1 if i == at else 1 for i in range(len(factors))])
    number = number.expand([factor.size for factor in factors]).reshape(sizes(layout)).reshape(view)
    for i, dim in enumerate(got):
        varies = bool((number != number.select(i, 0).unsqueeze(i)).any())
        assert varies == holds(dim, "T")


@given(layouts())
def test_a_view_to_the_same_sizes_changes_nothing(layout: Layout) -> None:
    assert regroup(layout, sizes(layout)) == layout


def test_a_batch_of_one_survives_views() -> None:
    one = Factor("B", 1)
    layout: Layout = ((one,), (T,), plain(6))
    assert regroup(layout, (1, 5, 2, 3)) == ((one,), (T,), plain(2), plain(3))
    merged = regroup(layout, (5, 6))
    assert merged is not None
    assert position(merged, "B") == position(merged, "T") == 0
    assert regroup(merged, (1, 5, 6)) == layout


# -- rows --------------------------------------------------------------------------------------------------------------


def test_row_sets_know_what_holds_them() -> None:
    response, other = RowSet("response"), RowSet("prompt")
    selected = RowSet("selected", response)
    assert selected.within(response)
    assert selected.within(ALL)
    assert not response.within(selected)
    assert NONE.within(selected)
    assert not ALL.within(selected)
    assert join(selected, response) == join(response, selected) == response
    assert join(selected, NONE) == selected
    assert join(selected, other) == ALL


def numbered(layout: Layout, seed: int = 0) -> torch.Tensor:
    return torch.randn(sizes(layout), dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def batch_of(layout: Layout) -> int:
    return next(f.size for dim in layout for f in dim if f.kind == "B")


def tokens_of(layout: Layout) -> int:
    return next(f.size for dim in layout for f in dim if f.kind == "T")


@st.composite
def cases(draw: st.DrawFn) -> tuple[Layout, torch.Tensor]:
    """A layout and ``[B, K]`` distinct positions in order; the shorter ones end in "no row"."""
    layout = draw(layouts())
    tokens = tokens_of(layout)
    rows = [sorted(draw(st.sets(st.integers(0, tokens - 1)))) for _ in range(batch_of(layout))]
    most = max(1, *map(len, rows)) if len(rows) > 1 else max(1, len(rows[0]))
    return layout, torch.tensor([row + [tokens] * (most - len(row)) for row in rows])


@given(cases())
def test_rows_first_and_back_is_the_identity(case: tuple[Layout, torch.Tensor]) -> None:
    layout, _ = case
    x = numbered(layout)
    rows = rows_first(x, layout)
    assert rows.shape[:2] == (batch_of(layout), tokens_of(layout))
    assert torch.equal(rows_back(rows, layout), x)
    assert torch.equal(rows_first(x, opened(layout), batch_of(layout)), rows)
    assert torch.equal(rows_back(rows, opened(layout)), x)


@given(cases())
def test_gather_rows_takes_the_rows_and_keeps_the_layout(case: tuple[Layout, torch.Tensor]) -> None:
    layout, index = case
    x = numbered(layout)
    got = gather_rows(x, index, layout)
    assert got.shape == resized(layout, index.shape[1])
    whole, part = rows_first(x, layout), rows_first(got, layout)
    for b in range(index.shape[0]):
        for k, row in enumerate(index[b].tolist()):
            assert torch.equal(part[b, k], whole[b, min(row, whole.shape[1] - 1)])


@given(cases())
def test_merge_writes_the_gathered_rows_and_keeps_the_others(case: tuple[Layout, torch.Tensor]) -> None:
    layout, index = case
    tokens = tokens_of(layout)
    old, new = numbered(layout, 1), numbered(layout, 2)
    state = torch.zeros(shape(layout, batch_of(layout), tokens), dtype=torch.float64)
    assert store_rows(state, old, layout) is old
    assert torch.equal(read_all(state, layout), old)
    got = merge_rows(state, index, gather_rows(new, index, layout), layout)
    written = torch.zeros(index.shape[0], tokens + 1, dtype=torch.bool).scatter_(1, index, True)[:, :tokens]
    rows, before, after = rows_first(got, layout), rows_first(old, layout), rows_first(new, layout)
    assert got.shape == old.shape
    assert torch.equal(rows[written], after[written])
    assert torch.equal(rows[~written], before[~written])
    assert torch.equal(read_all(state, layout), got)


@given(cases())
def test_gathering_what_was_merged_gives_it_back(case: tuple[Layout, torch.Tensor]) -> None:
    layout, index = case
    tokens = tokens_of(layout)
    state = torch.zeros(shape(layout, batch_of(layout), tokens), dtype=torch.float64)
    fresh = numbered(layout, 3)
    fresh = gather_rows(fresh, index, layout)
    merged = merge_rows(state, index, fresh, layout)
    again = gather_rows(merged, index, layout)
    there = index < tokens
    assert torch.equal(rows_first(again, layout)[there], rows_first(fresh, layout)[there])
    assert torch.equal(read_rows(state, index)[there], rows_first(fresh, layout)[there])


@given(cases())
def test_rows_that_do_not_exist_are_written_to_the_spare_row_alone(case: tuple[Layout, torch.Tensor]) -> None:
    layout, index = case
    tokens = tokens_of(layout)
    state = torch.zeros(shape(layout, batch_of(layout), tokens), dtype=torch.float64)
    nowhere = torch.full_like(index, tokens)
    got = merge_rows(state, nowhere, gather_rows(numbered(layout) + 9, nowhere, layout), layout)
    assert not got.any()
    assert state[:, tokens].any()


@given(cases())
def test_a_constant_without_a_batch_is_read_by_every_sequence(case: tuple[Layout, torch.Tensor]) -> None:
    """Rotary tables are ``[1, T, d]`` or ``[T, d]``: their layout has a batch of 1."""
    layout, index = case
    table = tuple(tuple(Factor("B", 1) if f.kind == "B" else f for f in dim) for dim in layout)
    x = numbered(table)
    got = gather_rows(x, index, table)
    rows = rows_first(x, table)[0]
    assert got.shape == resized(layout, index.shape[1])
    assert torch.equal(rows_first(got, layout), rows[index.clamp(max=rows.shape[0] - 1)])


def test_a_constant_of_lower_rank_counts_its_missing_dimensions_as_one() -> None:
    table = torch.randn(5, 6)
    layout: Layout = ((Factor("B", 1),), (T,), plain(6))
    index = torch.tensor([[0, 4], [1, 1], [3, 5]])
    assert torch.equal(gather_rows(table, index, layout), table[index.clamp(max=4)])
    four: Layout = ((Factor("B", 1),), plain(1), (T,), plain(6))
    assert torch.equal(gather_rows(table, index, four), table[index.clamp(max=4)].unsqueeze(1))


@pytest.mark.parametrize(
    "layout",
    [((B,), (T,), plain(6)), ((B,), plain(3), (T,), plain(6)), ((B, T), plain(6)), (plain(6), (B, T))],
    ids=["tokens-at-1", "tokens-at-2", "merged", "merged-last"],
)
def test_rows_of_the_layouts_that_models_have(layout: Layout) -> None:
    x = numbered(layout)
    index = torch.tensor([[3, 0], [1, 4]])
    state = torch.zeros(shape(layout, 2, 5), dtype=torch.float64)
    got = merge_rows(state, index, gather_rows(x, index, layout), layout)
    apart = rows_first(x, layout).clone()
    apart[0, [1, 2, 4]] = 0
    apart[1, [0, 2, 3]] = 0
    assert torch.equal(got, rows_back(apart, layout))


def test_state_has_a_spare_row_and_no_merged_dimensions() -> None:
    assert shape(((B,), (T,), plain(6)), 2, 5) == (2, 6, 6)
    assert shape(((B,), plain(3), (T,), plain(6)), 2, 5) == (2, 6, 3, 6)
    assert shape(((B, T), plain(6)), 2, 5) == (2, 6, 6)


# -- which rows changed ------------------------------------------------------------------------------------------------


def pairs(dtype: torch.dtype, *inner: int, count: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    new, noise = (torch.randn(2, count, *inner, dtype=torch.float64, generator=generator) for _ in range(2))
    return new.to(dtype), (new + 0.3 * noise).to(dtype)


@pytest.mark.parametrize("inner", [(8,), (2, 4), (2, 2, 3)])
def test_row_change_is_the_cosine_over_the_whole_row(inner: tuple[int, ...]) -> None:
    new, old = pairs(torch.float64, *inner)
    got = row_change(new, old)
    wanted = torch.nn.functional.cosine_similarity(new.flatten(2), old.flatten(2), dim=-1, eps=1e-8)
    assert got.shape == (2, 7)
    assert got.dtype == torch.float64
    assert (got - wanted).abs().max() < 1e-14


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_row_change_of_lower_precisions_is_taken_in_float32(dtype: torch.dtype) -> None:
    new, old = pairs(dtype, 2, 64)
    got = row_change(new, old)
    wanted = torch.nn.functional.cosine_similarity(new.double().flatten(2), old.double().flatten(2), dim=-1)
    assert got.dtype == torch.float32
    assert (got - wanted).abs().max() < 1e-6


def test_row_change_of_large_halves_does_not_overflow() -> None:
    new = torch.full((1, 1, 64), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert row_change(new, new).item() == pytest.approx(1.0, abs=1e-6)


def test_row_change_of_zero_rows_is_zero() -> None:
    zero = torch.zeros(1, 2, 4)
    assert torch.equal(row_change(zero, zero), torch.zeros(1, 2))
    assert torch.equal(row_change(zero, torch.ones(1, 2, 4)), torch.zeros(1, 2))


@given(st.integers(1, 7), st.integers(0, 50))
def test_pick_rows_takes_those_that_turned_most_in_order(count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(3, 7, 5, dtype=torch.float64, generator=generator) for _ in range(2))
    response = torch.arange(4, 11).expand(3, -1)
    got = pick_rows(new, old, response, 11, count)
    cosine = torch.nn.functional.cosine_similarity(new, old, dim=-1)
    assert got.shape == (3, count)
    assert got.dtype == torch.int64
    assert torch.equal(got, cosine.argsort(1)[:, :count])


@given(st.lists(st.integers(0, 7), min_size=1, max_size=4), st.integers(0, 50))
def test_rows_that_do_not_exist_are_picked_last(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    new = torch.randn(len(lengths), 7, 5, generator=generator)
    old = -new  # every row turned as far as it can, those that do not exist too
    slot = torch.arange(7).expand(len(lengths), -1)
    response = torch.where(slot < torch.tensor(lengths).unsqueeze(1), slot + 2, 9)
    got = pick_rows(new, old, response, 9, 7)
    for row, length in enumerate(lengths):
        assert sorted(got[row, :length].tolist()) == list(range(length))
        assert prod(int(i) + 1 for i in got[row]) == prod(range(1, 8))  # each row once
