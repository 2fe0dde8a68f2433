"""Attention over a part of the keys with its log-sum-exp: the reference, Inductor and Triton against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dllm_compile.kernels.attention_part import Part, attention_part, joined, kept_part, reference, renewed_part
from dllm_compile.kernels.sparse_attention import DTYPES, Arguments

from .kernel_runs import EXAMPLES, grids, inductor, interpret
from .test_sparse_attention import MASKS, case, exact

INF = torch.inf


def total(asked: Arguments) -> torch.Tensor:
    """The log-sum-exps ``[B, H, Q]`` by their definition in float64."""
    query, key, _, positions, tokens, mask, scale = asked
    keys = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    score = query.double() @ keys.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    at = torch.arange(key.shape[2]).expand(query.shape[0], -1) if positions is None else positions
    if mask is not None:
        full = mask.expand(*score.shape[:3], tokens)
        column = torch.stack([full[b][..., at[b].clamp(max=tokens - 1)] for b in range(len(at))])
        is_bool = mask.dtype == torch.bool
        score = score.masked_fill(~column, -INF) if is_bool else score + column.double()
    return score.masked_fill((at >= tokens)[:, None, None], -INF).logsumexp(-1)


def check(got: Part, asked: Arguments) -> None:
    """``got`` is the definition to some roundings of the scores, of the weights, and of the result."""
    context, sums = got
    want, wanted = exact(asked), total(asked)
    dtype = torch.promote_types(asked.query.dtype, torch.float32)
    assert (context.dtype, sums.dtype) == (dtype, dtype)
    assert (context.shape, sums.shape) == (want.shape, wanted.shape)
    largest = float(asked.value.double().abs().amax()) if asked.value.numel() else 0.0
    eps = torch.finfo(asked.query.dtype).eps
    torch.testing.assert_close(context.double(), want, rtol=0, atol=8 * eps * largest)
    torch.testing.assert_close(sums.double(), wanted, rtol=4 * eps, atol=32 * torch.finfo(dtype).eps)


@given(
    sizes=st.tuples(*(st.integers(*r) for r in ((1, 3), (1, 3), (1, 4), (1, 9), (1, 20), (1, 33)))),
    width=st.one_of(st.none(), st.integers(1, 33)),
    dtype=st.sampled_from(DTYPES),
    spare=st.integers(0, 20),
    there=st.booleans(),
    mask=st.sampled_from(MASKS),
    shared=st.integers(0, 7),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 999),
)
@settings(EXAMPLES, max_examples=200)
def test_reference_equals_float64(
    sizes: tuple[int, ...],
    width: int | None,
    dtype: torch.dtype,
    spare: int,
    there: bool,
    mask: str,
    shared: int,
    scale: float | None,
    seed: int,
) -> None:
    asked = case(*sizes, width, dtype, spare, there, mask, shared, scale, seed)
    check(attention_part(*asked), asked)


@given(
    group=st.integers(1, 3),
    entries=st.integers(2, 30),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
    mask=st.sampled_from(MASKS),
    width=st.sampled_from([None, 5]),
    seed=st.integers(0, 999),
)
@EXAMPLES
def test_two_parts_joined_are_attention_over_both(
    group: int, entries: int, share: float, dtype: torch.dtype, mask: str, width: int | None, seed: int
) -> None:
    """Any split of the keys, an empty one too, where no query sees anything of one part or of both."""
    asked = case(2, 2, group, 4, entries, 8, width, dtype, 0, mask=mask, seed=seed)
    assert asked.positions is not None
    one = torch.rand(2, entries, generator=torch.Generator().manual_seed(seed)) < share
    parts = [
        attention_part(*asked._replace(positions=torch.where(some, asked.positions, asked.tokens))[:7])
        for some in (one, ~one)
    ]
    got = joined(*parts[0], *parts[1], dtype=dtype)
    assert got.dtype == dtype
    largest = float(asked.value.double().abs().amax())
    rows = slice(1 if mask == "added" else 0, None)  # the first has the least finite number everywhere
    want, atol = exact(asked)[:, :, rows], 16 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(got[:, :, rows].double(), want, rtol=0, atol=atol)


def test_only_the_sequences_that_renew_keep_what_is_new() -> None:
    contexts, totals = torch.randn(2, 4, 3, 5), torch.randn(2, 4, 3)
    before, places = contexts.clone(), torch.tensor([[2, 0, 3], [1, 3, 0]])  # 3: no row
    context, sums = torch.randn(2, 3, 3, 5), torch.randn(2, 3, 3)
    got = renewed_part(contexts, totals, places, context, sums, torch.tensor([[True], [False]]))
    assert torch.equal(got[0][0], context[0])
    assert torch.equal(got[1][0], sums[0])
    assert torch.equal(contexts[0, [2, 0]], context[0, :, :2].transpose(0, 1))
    assert torch.equal(contexts[0, 1], before[0, 1])  # at no place
    assert torch.equal(contexts[1, :3], before[1, :3])
    assert torch.equal(got[0][1, :, 0], before[1, 1])
    assert torch.equal(got[1][1, :, 1], sums[1, :, 1])  # of which nothing is kept
    again = kept_part(contexts, totals, places)
    assert torch.equal(again[0][0, :, :2], context[0, :, :2])
    assert bool((again[1][0, :, 2] == -INF).all())


def test_what_is_not_attention_is_refused() -> None:
    query, key, value, *more = case(entries=9)
    with pytest.raises(ValueError, match="H is a multiple of Hkv"):
        attention_part(query[:, :1], key, value, *more)
    with pytest.raises(ValueError, match="tokens is at least 1; got 0"):
        attention_part(query, key, value, None, 0)


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_the_op_is_well_formed(mask: str) -> None:
    torch.library.opcheck(torch.ops.dllm.attention_part.default, tuple(case(group=2, mask=mask)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_has_one_fused_attention(dtype: torch.dtype) -> None:
    asked = case(1, 2, 3, 8, 120, 16, dtype=dtype, mask="keys")

    def step(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> Part:
        return attention_part(query, key, value, *asked[3:])

    got, code = inductor(step, *asked[:3])
    check(got, asked)
    assert code.count("_scaled_dot_product_flash_attention_for_cpu.default(") == 1


def interpreted() -> None:
    """The kernel against the definition, in one split and in many; no bfloat16, see :mod:`.test_sparse_attention`."""
    from dllm_compile.kernels import sparse_attention_triton as kernels

    cases = [
        case(2, 1, 7, 33, 131, 16, mask="bool", scale=0.3),
        case(1, 2, 1, 33, 97, 24, 40, dtype=torch.float16),
        case(1, 1, 2, 3, 70, 64, 8, mask="added"),
        case(1, 1, 2, 3, 70, 16, spare=70, mask="keys"),
        case(1, 2, 1, 3, 65, 16, there=True, mask="float32", dtype=torch.float16),
        case(entries=0),
    ]
    for programs, some in ((264, cases), (1, cases[:4])):
        kernels.PROGRAMS = programs
        for asked in some:
            check(kernels.launch_part(asked), asked)
            if asked.key.shape[2]:
                check(reference(asked), asked)


def test_the_interpreted_kernel_equals_float64() -> None:
    interpret(interpreted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_tensors_take_the_kernel(dtype: torch.dtype) -> None:
    """Traced with tensors that have a device and no memory; float64, and heads too wide, take the reference."""
    from dllm_compile.kernels.sparse_attention_triton import launch_part

    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 32, 28, 128, dtype=dtype, device="cuda").transpose(1, 2)
        key = torch.empty(2, 1000, 4, 128, dtype=dtype, device="cuda").transpose(1, 2)
        at = torch.empty(2, 1000, dtype=torch.int64, device="cuda")
        context, sums = attention_part(query, key, key, None, 1000)
        assert (context.shape, sums.shape, sums.is_cuda) == (query.shape, query.shape[:3], True)
        wide = torch.empty(1, 1, 1, 257, dtype=dtype, device="cuda")
        assert attention_part(wide, wide, wide, None, 1)[0].shape == wide.shape
    if dtype == torch.float64:
        return
    graph = make_fx(launch_part, _allow_non_fake_inputs=True)(Arguments(query, key, key, at, 2000)).graph
    assert grids(graph) == [[(56, 4, 1) if dtype == torch.float32 else (32, 8, 1)]]
