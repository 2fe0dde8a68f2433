"""Each kernel: the reference against float64, Inductor and Triton against the reference."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from dllm_compile.kernels.confidence import Confidence, confidence, reference

from .kernel_runs import DTYPES, EXAMPLES, buffers, built, grids, inductor, interpret, without_triton

INF, NAN = torch.inf, torch.nan


def exact(logits: torch.Tensor, chosen: torch.Tensor | None) -> Confidence:
    """The definitions, each by itself, in float64."""
    x = logits.double()
    p = x.softmax(-1)
    best = x.argmax(-1)
    others = p.scatter(-1, best[..., None], 0.0).amax(-1)
    maximum = x.gather(-1, best[..., None])[..., 0]
    picked = p.gather(-1, (best if chosen is None else chosen)[..., None])[..., 0]
    return Confidence(best, maximum, picked, -torch.special.entr(p).sum(-1), p.amax(-1) - others)


def check(got: Confidence, want: Confidence, columns: int, terms: int = 0) -> None:
    """``got`` is ``want`` to the rounding of its dtype: a few operations, and ``terms`` summed one after another."""
    got, want = Confidence(*got), Confidence(*want)
    assert torch.equal(got.best, want.best)
    assert torch.equal(torch.nan_to_num(got.maximum.double(), 7.0), torch.nan_to_num(want.maximum.double(), 7.0))
    bound = torch.finfo(got.maximum.dtype).eps * (16 + terms)
    scales = (1.0, 1 + math.log(columns), 1.0)
    for a, b, scale in zip(got[2:], want[2:], scales, strict=True):
        assert (a.dtype, a.shape) == (got.maximum.dtype, b.shape)
        torch.testing.assert_close(a.double(), b.double(), rtol=0, atol=bound * scale, equal_nan=True)


def hard_rows(columns: int, dtype: torch.dtype) -> torch.Tensor:
    """``[3, 5, columns]``: plain, tied, nearly emptied, emptied rows, and rows with an infinity or a NaN."""
    x = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(columns)) * 3
    x[0, 0, : columns - 1] = -INF
    x[0, 1] = 1.5
    x[0, 2] = -INF
    x[0, 3, columns // 2] = NAN
    x[0, 4, columns - 1] = INF
    x[1, 0] = x[1, 0].round()
    x[1, 1] = NAN
    x[1, 2, ::2] = -INF
    return x.to(dtype)


# -- the reference -----------------------------------------------------------------------------------------------------


@given(
    lead=st.lists(st.integers(0, 3), max_size=3),
    columns=st.integers(1, 200),
    dtype=st.sampled_from(DTYPES),
    ties=st.booleans(),
    spread=st.sampled_from([0.0, 1.0, 30.0]),
    gone=st.integers(0, 199),
    dense=st.sampled_from([None, -1, -2]),
    choose=st.booleans(),
    seed=st.integers(0, 999),
)
@EXAMPLES
def test_reference_equals_float64(
    lead: list[int],
    columns: int,
    dtype: torch.dtype,
    ties: bool,
    spread: float,
    gone: int,
    dense: int | None,
    choose: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, columns, generator=random) * spread
    x = x.round() if ties else x
    x[..., torch.randperm(columns, generator=random)[: min(gone, columns - 1)]] = -INF
    chosen = torch.randint(columns, lead, generator=random) if choose else None
    x = x.to(dtype)
    if dense is not None:  # every other row, or every other column, of a larger tensor
        x = torch.stack([x, x], dense).select(dense, 0)
    check(confidence(x, chosen), exact(x, chosen), columns)


@pytest.mark.parametrize("spread", [0.0, 1.0, 3.0, 10.0])
def test_entropy_is_dreams_to_its_epsilon(spread: float) -> None:
    x = torch.randn(4, 126464, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * spread
    x[0, 1000:] = -INF
    p = x.softmax(-1)
    difference = (p * torch.log(p + 1e-10)).sum(-1) - confidence(x).entropy
    assert difference.min() >= -1e-12
    assert difference.max() <= 126464e-10 + 1e-12


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 2, 9])
def test_a_bad_row_is_alone(dtype: torch.dtype, columns: int) -> None:
    x = hard_rows(columns, dtype)
    got = confidence(x)
    bad = ~x.double().softmax(-1).isfinite().all(-1)
    check(Confidence(*(v[~bad] for v in got)), exact(x[~bad], None), columns)
    assert all(v[bad].isnan().all() for v in got[2:])
    has_nan = x.isnan().any(-1)
    assert torch.equal(got.maximum.isnan(), has_nan)
    assert torch.equal(got.best, torch.where(has_nan, 0, x.argmax(-1)))


def test_a_lone_column_is_certain() -> None:
    for x in (torch.tensor([3.0]), torch.tensor([-INF, -8.0, -INF])):
        assert [float(v) for v in confidence(x)] == [float(x.argmax()), float(x.max()), 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("logits", "chosen"),
    [
        (torch.zeros(()), None),
        (torch.zeros(2, 0), None),
        (torch.zeros(2, 3, dtype=torch.int64), None),
        (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 3), torch.zeros(2, 1, dtype=torch.int64)),
    ],
)
def test_what_is_not_rows_is_refused(logits: torch.Tensor, chosen: torch.Tensor | None) -> None:
    with pytest.raises(ValueError, match="got torch"):
        confidence(logits, chosen)


def test_they_run_without_triton_and_in_silence() -> None:
    code = """
from dllm_compile.kernels.confidence import confidence
from dllm_compile.kernels.sparse_attention import sparse_attention
x = torch.ones(1, 1, 1, 1)
print(confidence(torch.tensor([1.0, 2.0])).best.item(), sparse_attention(x, x, x, None, 1).item())
"""
    assert without_triton(code) == "1 1.0"


# -- the op under the compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("choose", [False, True])
def test_the_op_is_well_formed(dtype: torch.dtype, choose: bool) -> None:
    chosen = torch.tensor([[3, 0], [6, 2]]) if choose else None
    torch.library.opcheck(torch.ops.dllm.confidence.default, (torch.randn(2, 2, 7).to(dtype), chosen))


Step = Callable[[torch.Tensor, torch.Tensor], Confidence]
STEPS: dict[str, Step] = {
    "whole": lambda x, chosen: confidence(x),
    "scaled rows": lambda x, chosen: confidence(x[:, 1:] / 2, chosen[:, 1:]),
    "masked rows": lambda x, chosen: confidence(torch.where(x == 1.5, -INF, x)[1:, :3], chosen[1:, :3]),
}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor_fuses_the_reference_and_keeps_no_row(name: str, dtype: torch.dtype) -> None:
    step = STEPS[name]
    x, chosen = hard_rows(5003, dtype), torch.randint(5003, (3, 5))
    got, code = inductor(step, x, chosen)
    check(got, step(x, chosen), 5003, terms=5003 // 4)
    sizes = buffers(code)
    assert len(sizes) >= 5  # the outputs, at least
    assert max(sizes) <= 15
    assert "make_unique" not in code  # how Inductor's loops ask for memory of their own
    assert code.count("cpp_fused") == 2  # one kernel: its definition and its call


# -- Triton ------------------------------------------------------------------------------------------------------------


def interpreted() -> None:
    """Kernels against references, in memory that is NaN wherever nobody wrote."""
    from dllm_compile.kernels.confidence_triton import launch

    for dtype in DTYPES:
        for columns in (1, 2, 63, 9001):
            x = torch.full((3, 7, columns + 5), NAN, dtype=dtype)[:, 1:6, 2:-3]
            x.copy_(hard_rows(columns, dtype))
            chosen = torch.randint(columns, (3, 5))
            cases = [(x[:2], chosen[:2]), (x[1], None)]
            if columns == 63 and dtype == torch.float32:
                cases += [
                    (x[1, 0], chosen[1, 0]),
                    (x[:, 2:], chosen[:, 2:]),
                    (x[:, :0], chosen[:, :0]),
                    (x.transpose(0, 1), chosen.T),
                    (x.mT.contiguous().mT, chosen),
                    (x.expand(2, 3, 5, 63).transpose(1, 2), None),
                ]
            for rows, picks in cases:
                check(launch(rows, picks), reference(rows, picks), columns)
    assert launch(torch.zeros(2, 3), torch.tensor([-1, 3]))[2].isnan().all()


def test_the_interpreted_kernels_equal_the_references() -> None:
    interpret(interpreted)


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize(
    ("logits", "sums", "columns"),
    [("fp32", "fp32", 126464), ("bf16", "fp32", 126464), ("fp64", "fp64", 1)],
)
def test_the_kernels_compile(capability: int, logits: str, sums: str, columns: int) -> None:
    import triton

    from dllm_compile.kernels.confidence_triton import merge_kernel, part_kernel, tile_of

    pointers = {"logits": f"*{logits}", "chosen": "*i64", "first": "*i32", "best_out": "*i64"}
    pointers |= dict.fromkeys(("sums", "maximum_out", "probability_out", "entropy_out", "margin_out"), f"*{sums}")
    tile, warps = tile_of(columns)
    tiles = triton.next_power_of_2(triton.cdiv(columns, tile))
    for kernel, constants, count in (
        (part_kernel, {"TILE": tile, "column_stride": 1}, warps),
        (part_kernel, {"TILE": tile}, warps),
        (merge_kernel, {"TILES": tiles}, 1),
        (merge_kernel, {"TILES": tiles, "chosen": None}, 1),
    ):
        built(kernel, pointers, constants, capability, {"num_warps": count})


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_tensors_take_the_kernels(dtype: torch.dtype) -> None:
    """Traced with tensors that have a device and no memory."""
    from dllm_compile.kernels.confidence_triton import launch

    want = reference(torch.zeros(2, 3, 9001, dtype=dtype), torch.zeros(2, 3, dtype=torch.int64))
    with FakeTensorMode():
        x = torch.empty(2, 3, 9001, dtype=dtype, device="cuda")
        chosen = torch.empty(2, 3, dtype=torch.int64, device="cuda")
        for picks in (chosen, None):
            got = confidence(x, picks)
            assert [(v.shape, v.dtype) for v in got] == [(v.shape, v.dtype) for v in want]
            assert all(v.is_cuda for v in got)
    graph = make_fx(launch, _allow_non_fake_inputs=True)(x, chosen).graph
    assert grids(graph) == [[(6, 3, 1)], [(6, 1, 1)]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernels_equal_the_references_on_a_gpu(dtype: torch.dtype) -> None:
    for columns in (1, 63, 9001, 126464):
        x, chosen = hard_rows(columns, dtype)[:, 1:], torch.randint(columns, (3, 4))
        for call in (confidence, torch.compile(confidence)):
            for picks in (None, chosen):
                got = call(x.cuda(), None if picks is None else picks.cuda())
                check(Confidence(*(v.cpu() for v in got)), confidence(x, picks), columns)
