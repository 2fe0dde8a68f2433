"""DyLLM's attention and its list of rows: the reference, Inductor and Triton against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch import config as functorch_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from dllm_compile.kernels.delta_attention import Arguments, Parts, delta_attention, reference
from dllm_compile.kernels.salient_rows import salient_rows

from .kernel_runs import DTYPES, EXAMPLES, buffers, built, grids, inductor, interpret, on_gpu
from .rounding import roundings


def exact(case: Arguments) -> Parts:
    """The definition, row by row, in float64."""
    q, k, v, change, context = (x.double() for x in (case.query, case.key, case.value, case.change, case.context))
    (batch, heads, rows, width), (groups, keys) = q.shape, k.shape[1:3]
    mask = torch.zeros((), dtype=torch.float64) if case.mask is None else case.mask
    bias = torch.where(mask, 0.0, -torch.inf) if mask.dtype == torch.bool else mask
    bias = bias.expand(batch, heads, rows, keys)
    scale = width**-0.5 if case.scale is None else case.scale
    new = context.clone()
    for b in range(batch):
        salient = set(case.at_queries[b].tolist())
        for h in range(heads):
            g = h * groups // heads
            for i in range(rows):
                p = (k[b, g] @ q[b, h, i] * scale + bias[b, h, i].double()).softmax(0).nan_to_num(0.0)
                if i in salient:
                    new[b, h, i] = p @ v[b, g]
                    continue
                for j, at in enumerate(case.at_keys[b].tolist()):
                    if 0 <= at < keys:
                        new[b, h, i] += p[at] * change[b, j, g]
    a, c = new.transpose(1, 2).flatten(2), context.transpose(1, 2).flatten(2)
    norms = (a * a).sum(2).clamp(min=1e-8).sqrt() * (c * c).sum(2).clamp(min=1e-8).sqrt()
    return new, (a * c).sum(2) / norms


def check(got: Parts, case: Arguments, halved: bool = False) -> None:
    """``got`` is the definition to some roundings: of scores, of weights, of sums, and at last of the contexts.

    They are of float32 at least, but the last ones, and those of the weights where these are ``halved`` for a product.
    """
    want, dtype = exact(case), case.query.dtype
    inner = torch.promote_types(dtype, torch.float32)
    assert (got[0].dtype, got[1].dtype) == (dtype, inner)
    rounding = torch.finfo(dtype).eps / 2 if dtype != inner else 0.0
    bound = 8 * torch.finfo(inner).eps + rounding * halved
    largest = max(float(x.abs().amax()) for x in (case.value, case.change, case.context) if x.numel())
    torch.testing.assert_close(got[0].double(), want[0], rtol=rounding, atol=bound * largest)
    torch.testing.assert_close(got[1].double(), want[1], rtol=0, atol=bound)


def make(
    batch: int = 2,
    groups: int = 2,
    share: int = 2,
    rows: int = 9,
    keys: int = 13,
    width: int = 8,
    out: int = 8,
    count: int = 4,
    gone: int = 1,
    mask: str = "none",
    layout: str = "tokens first",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Arguments:
    """Random rows of which the last ``gone`` are none, and of which some are no queries or no keys."""
    random = torch.Generator().manual_seed(seed)

    def numbers(heads: int, tokens: int, size: int) -> torch.Tensor:
        x = torch.randn(batch, tokens, heads, size, generator=random).to(dtype).transpose(1, 2)
        if layout == "every other":
            return torch.stack([x, x], -1).select(-1, 1)
        return x.contiguous() if layout == "heads first" else x

    def places(size: int) -> torch.Tensor:
        order = torch.stack([torch.randperm(max(size, count), generator=random)[:count] for _ in range(batch)])
        order[:, max(count - gone, 0) :] = size + seed % 3
        return torch.where((order == 0) & (seed % 2 == 1), -1, order)

    heads, many = groups * share, (batch, groups * share, rows, keys)
    allowed = torch.rand(many, generator=random) < 0.7
    allowed[:, :, rows // 2 : rows // 2 + 1] = False  # a row that sees nothing
    added = torch.where(allowed, torch.randn(many, generator=random), -torch.inf)
    masks = {
        "none": None,
        "bool": allowed,
        "keys": allowed[:, :1, -1:],
        "queries": allowed[:1, :1].transpose(2, 3).contiguous().transpose(2, 3),
        "two": allowed[0, 0],
        "added": added,
        "added keys": added[0, 0, -1:].to(dtype),
        "lowest": torch.where(allowed[:, :1], 0.0, torch.finfo(torch.float32).min),
    }
    query, key, value = numbers(heads, rows, width), numbers(groups, keys, width), numbers(groups, keys, out)
    change = numbers(groups, count, out).transpose(1, 2)
    return Arguments(query, key, value, change, places(keys), places(rows), numbers(heads, rows, out), masks[mask])


# -- the reference -----------------------------------------------------------------------------------------------------


@given(
    batch=st.integers(1, 3),
    groups=st.integers(1, 3),
    share=st.integers(1, 3),
    rows=st.integers(1, 9),
    keys=st.integers(1, 12),
    width=st.integers(1, 9),
    out=st.integers(1, 9),
    count=st.integers(0, 9),
    gone=st.integers(0, 2),
    mask=st.sampled_from(["none", "bool", "keys", "queries", "two", "added", "added keys", "lowest"]),
    layout=st.sampled_from(["tokens first", "heads first", "every other"]),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 999),
)
@EXAMPLES
def test_reference_equals_float64(scale: float | None, dtype: torch.dtype, count: int, rows: int, **sizes: int) -> None:
    case = make(dtype=dtype, rows=rows, count=min(count, rows), **sizes)._replace(scale=scale)
    check(delta_attention(*case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "bool", "added"])
def test_all_rows_salient_is_plain_attention(dtype: torch.dtype, mask: str) -> None:
    case = make(dtype=dtype, mask=mask)
    n = 9
    every = torch.arange(n).expand(2, -1)
    case = case._replace(change=torch.randn(2, n, 2, 8).to(dtype), at_keys=every, at_queries=every)
    spread = case.mask.double() if case.mask is not None and mask == "added" else case.mask
    query, key, value = (x.double() for x in case[:3])
    plain = F.scaled_dot_product_attention(query, key, value, spread, enable_gqa=True)
    assert roundings(exact(case)[0], plain) <= 8
    check(delta_attention(*case), case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("mask", ["none", "bool"])
def test_without_salient_rows_the_context_comes_back(dtype: torch.dtype, count: int, mask: str) -> None:
    case = make(dtype=dtype, count=count, gone=count, mask=mask)
    case = case._replace(change=torch.full_like(case.change, torch.nan))  # of rows that are none
    new, similarity = delta_attention(*case)
    assert torch.equal(new, case.context)
    assert roundings(similarity, torch.ones_like(similarity)) <= 2  # of two roots, a product and a quotient


@pytest.mark.parametrize("mask", ["bool", "added"])
def test_a_row_that_sees_nothing_is_alone(mask: str) -> None:
    case = make(mask=mask, rows=4, gone=0, count=2)
    case = case._replace(at_queries=torch.tensor([[2, 0], [3, 0]]))  # row 2 sees nothing: salient in the first alone
    new, similarity = delta_attention(*case)
    assert not new[0, :, 2].any()
    assert torch.equal(new[1, :, 2], case.context[1, :, 2])
    assert new.isfinite().all()
    assert similarity.isfinite().all()


def test_a_nan_stays_in_its_row() -> None:
    case = make(rows=4, mask="bool")
    case.query[0, 1, 3] = torch.nan
    new, similarity = delta_attention(*case)
    bad = torch.zeros(2, 4, 4, dtype=torch.bool)
    bad[0, 1, 3] = True
    assert torch.equal(new.isnan().all(3), bad)
    assert torch.equal(new.isnan().any(3), bad)
    assert torch.equal(similarity.isnan(), bad.any(1))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("query", torch.zeros(2, 4, 8)),
        ("query", torch.zeros(2, 4, 9, 8, dtype=torch.int64)),
        ("query", torch.zeros(2, 3, 9, 8)),
        ("query", torch.zeros(2, 4, 0, 8)),
        ("key", torch.zeros(2, 2, 13, 8).half()),
        ("key", torch.zeros(2, 2, 13, 7)),
        ("key", torch.zeros(2, 2, 0, 8)),
        ("value", torch.zeros(2, 2, 12, 8)),
        ("change", torch.zeros(2, 4, 1, 8)),
        ("context", torch.zeros(2, 4, 9, 1)),
        ("at_keys", torch.zeros(2, 4, dtype=torch.int32)),
        ("at_queries", torch.zeros(2, 3, dtype=torch.int64)),
        ("mask", torch.zeros(9, 12)),
        ("mask", torch.zeros(13, dtype=torch.int64)),
        ("mask", torch.zeros(1, 1, 1, 9, 13)),
    ],
)
def test_what_is_not_attention_is_refused(name: str, value: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"got torch\.\w+ \["):
        delta_attention(*make()._replace(**{name: value}))


# -- the op under the compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "mask", "count"),
    [(torch.float32, "none", 4), (torch.bfloat16, "keys", 0)],
)
def test_the_op_is_well_formed(dtype: torch.dtype, mask: str, count: int) -> None:
    torch.library.opcheck(torch.ops.dllm.delta_attention.default, tuple(make(dtype=dtype, mask=mask, count=count)))


def step(*case: torch.Tensor | float | None) -> Parts:
    new, similarity = delta_attention(*case)  # type: ignore[arg-type]
    return new * 2, similarity


@pytest.mark.parametrize(("dtype", "mask", "most"), [(torch.float32, "none", 5), (torch.bfloat16, "keys", 3)])
def test_inductor_compiles_once_for_two_rows_or_more(dtype: torch.dtype, mask: str, most: int) -> None:
    counter = CompileCounterWithBackend("inductor")
    with functorch_config.patch(enable_autograd_cache=False), torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend=counter)
        for count, graphs in ((4, 1), (2, 1), (9, 1), (0, 2), (1, 3))[:most]:
            case = make(dtype=dtype, mask=mask, count=count, seed=count)
            for x in case[3:6]:
                torch._dynamo.maybe_mark_dynamic(x, 1)
            new, similarity = compiled(*case)
            check((new / 2, similarity), case)
            assert counter.frame_count == graphs


def sliced(*case: torch.Tensor | float | None) -> Parts:
    """As ``step``, of a part of the mask that begins within it."""
    mask = case[7]
    assert isinstance(mask, torch.Tensor)
    return step(*case[:7], mask[..., 1:])


@pytest.mark.parametrize("mask", ["queries", "added"])
def test_inductor_keeps_the_weights_once_and_makes_numbers_of_a_mask_once(mask: str) -> None:
    case = make(rows=40, keys=70, width=16, out=16, mask=mask)
    assert case.mask is not None
    longer = case._replace(mask=torch.cat([case.mask[..., :1], case.mask], -1))
    (new, similarity), code = inductor(sliced, *longer)
    check((new / 2, similarity), case)
    assert sum(n >= 2 * 4 * 40 * 70 for n in buffers(code)) == 1  # the scores, which become the weights
    # a kernel is shown by its arguments for Python and in C++
    assert code.count("const bool*") == (0 if mask == "added" else 2)


# -- Triton ------------------------------------------------------------------------------------------------------------


SHAPES = (
    {},
    {"rows": 70, "keys": 70, "count": 40, "batch": 1, "groups": 1, "gone": 0},
    {"rows": 65, "keys": 3, "width": 20, "out": 5, "mask": "bool", "count": 2, "batch": 1},
    {"mask": "added", "layout": "every other", "seed": 1},
    {"mask": "keys", "count": 0, "layout": "heads first"},
    {"mask": "lowest", "count": 9, "gone": 0, "share": 1},
    {"rows": 1, "count": 1, "gone": 0},
    {"rows": 5, "keys": 200, "share": 7, "count": 3, "mask": "added", "batch": 1},
)


def interpreted() -> None:
    """The kernel against the definition."""
    from dllm_compile.kernels.delta_attention_triton import launch

    for dtype in (torch.float32, torch.float16):
        for shape in SHAPES:
            case = make(dtype=dtype, **shape)  # type: ignore[arg-type]
            check(launch(case), case, halved=dtype == torch.float16)
    case = make(mask="two", rows=4)._replace(scale=0.3)
    case.query[0, 1, 3] = torch.nan
    torch.testing.assert_close(launch(case), reference(case), equal_nan=True)
    nobody = Arguments(*(x[:0] for x in make()[:7]))
    assert launch(nobody)[1].shape == reference(nobody)[1].shape == (0, 9)


def test_the_interpreted_kernel_equals_float64() -> None:
    interpret(interpreted)


@pytest.mark.parametrize(
    ("capability", "kind", "size", "width", "mask", "scale", "part"),
    [
        (80, "fp32", 4, 256, "i1", "fp32", 0),
        (80, "bf16", 2, 64, None, "fp64", 2),
        (90, "bf16", 2, 128, "i1", "fp64", 1),
        (100, "fp16", 2, 256, "fp16", "fp32", 0),
    ],
)
def test_the_kernel_compiles(
    capability: int, kind: str, size: int, width: int, mask: str | None, scale: str, part: int
) -> None:
    """Called from Python its scale is a float32 number, called from Inductor's code a float64 one."""
    from dllm_compile.kernels.delta_attention_triton import delta_attention_kernel as kernel
    from dllm_compile.kernels.delta_attention_triton import tile_of

    tile = tile_of(width, width, size, 64)
    options = {name: tile.pop(name) for name in ("num_warps", "num_stages")}
    contiguous = dict.fromkeys((f"{name}_stride" for name in ("query", "key", "value", "change", "context")), 1)
    constants = {**tile, **contiguous, "mask_step": 1, "BOOL": mask == "i1"} | ({} if mask else {"mask": None})
    constants |= {"HEADS": 32, "GROUP": 4, "PASS": part} | ({} if part else {"acc": None, "parts": None})
    kinds = dict.fromkeys(("query", "key", "value", "change", "context", "new"), f"*{kind}")
    kinds |= dict.fromkeys(("at_keys", "counts"), "*i64") | {"mask": f"*{mask}", "order": "*i32"}
    kinds |= dict.fromkeys(("sums", "acc", "parts"), "*fp32")
    kinds |= {"scale": scale}
    compiled = built(kernel, kinds, constants, capability, options)
    assert compiled.metadata.shared <= 160 * 1024  # what a block may have on sm_80, the least of the three


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_cuda_tensors_take_the_kernel(dtype: torch.dtype) -> None:
    """Traced with tensors that have a device and no memory."""
    from dllm_compile.kernels.delta_attention_triton import launch

    case = make(dtype=dtype, mask="keys", rows=70, count=3)
    want = reference(case)
    with FakeTensorMode(allow_non_fake_inputs=True):
        away = tree_map_only(torch.Tensor, partial(torch.empty_like, device="cuda"), case)
        got = delta_attention(*away)
        assert [(v.shape, v.dtype) for v in got] == [(v.shape, v.dtype) for v in want]
        assert all(v.is_cuda for v in got)
        graph = make_fx(launch, _allow_non_fake_inputs=True)(away).graph
    assert grids(graph) == [[(12, 1, 1)]]  # 70 rows of 2 heads in 3 tiles, for 2 key heads of 2 sequences; 13 keys


def test_few_rows_and_many_keys_keep_every_multiprocessor_at_work() -> None:
    """32 queries of LLaDA: 32 tiles, for 132 multiprocessors of an H100."""
    from dllm_compile.kernels.delta_attention_triton import launch

    sizes = {"batch": 1, "groups": 32, "share": 1, "rows": 32, "keys": 1024, "width": 128, "out": 128}
    case = make(dtype=torch.bfloat16, **sizes)  # type: ignore[arg-type]
    with FakeTensorMode(allow_non_fake_inputs=True):
        away = tree_map_only(torch.Tensor, partial(torch.empty_like, device="cuda"), case)
        graph = make_fx(launch, _allow_non_fake_inputs=True)(away).graph
    assert grids(graph) == [[(32, 8, 1)], [(32, 1, 1)]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_equals_float64_on_a_gpu(dtype: torch.dtype) -> None:
    large = {"rows": 200, "keys": 300, "width": 64, "out": 128, "count": 30, "mask": "keys"}
    for shape in (*SHAPES, large):
        case = make(dtype=dtype, **shape)  # type: ignore[arg-type]
        away = on_gpu(case)
        for function in (delta_attention, torch.compile(delta_attention)):
            new, similarity = function(*away)
            check((new.cpu(), similarity.cpu()), case, halved=dtype.itemsize < 4)


# -- the list of rows --------------------------------------------------------------------------------------------------


@given(
    turns=st.lists(st.lists(st.sampled_from([0.5, 0.99, 1.0, torch.nan]), min_size=6, max_size=6), max_size=3),
    there=st.integers(0, 63),
    stored=st.integers(0, 63),
    bounds=st.lists(st.sampled_from([-1.0, 0.99, torch.inf]), min_size=3, max_size=3),
)
def test_salient_rows_are_those_that_drifted_or_are_not_stored(
    turns: list[list[float]], there: int, stored: int, bounds: list[float]
) -> None:
    similarity = torch.tensor(turns, dtype=torch.float64).view(-1, 6)
    active = torch.tensor([10 + 2 * i if there >> i & 1 else 99 for i in range(6)]).expand(len(turns), -1)
    threshold = torch.tensor(bounds[: len(turns)], dtype=torch.float64).view(-1, 1)
    lasting = torch.tensor([int(active[0, i]) if stored >> i & 1 else 99 for i in range(6)]) if turns else active
    got, counts = salient_rows(similarity < threshold, threshold, active, lasting.expand(len(turns), -1), 99)
    want = [
        [i for i in range(6) if there >> i & 1 and (turn[i] < bound or bound == torch.inf or not stored >> i & 1)]
        for turn, bound in zip(turns, bounds, strict=False)
    ]
    assert counts.tolist() == [len(row) for row in want]
    assert got.dtype == counts.dtype == torch.int64
    assert got.tolist() == [row + [6] * (6 - len(row)) for row in want]


def test_salient_rows_are_found_without_a_look() -> None:
    """Compiled whole: no number is read on the host, no shape depends on one."""

    def found(similarity: torch.Tensor, active: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return salient_rows(similarity < 0.5, torch.full((2, 1), 0.5), active, active, 20)

    similarity, active = torch.rand(2, 20, generator=torch.Generator().manual_seed(0)), torch.arange(20).expand(2, -1)
    got, want = torch.compile(found, fullgraph=True)(similarity, active), found(similarity, active)
    assert (want[1] > 3).all()
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])
