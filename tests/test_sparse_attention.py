"""Attention over entries: the reference, Inductor and Triton against float64."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from dllm_compile.kernels.sparse_attention import DTYPES, Arguments, reference, sparse_attention

from .kernel_runs import EXAMPLES, buffers, built, grids, inductor, interpret, on_gpu

INF, NAN = torch.inf, torch.nan
MASKS = ("none", "bool", "added", "float32", "keys")


def framed(x: torch.Tensor) -> torch.Tensor:
    """``x`` within a larger tensor whose other elements are NaN, or the largest."""
    fill = NAN if x.dtype.is_floating_point else True if x.dtype == torch.bool else torch.iinfo(x.dtype).max
    frame = torch.full([n + 3 for n in x.shape], fill, dtype=x.dtype)
    inner = frame[tuple(slice(1, n + 1) for n in x.shape)]
    return inner.copy_(x)


def mask_of(kind: str, shape: tuple[int, ...], dtype: torch.dtype, random: torch.Generator) -> torch.Tensor | None:
    """A mask that hides a third of the tokens, and all of them from the first query; or ``None``."""
    if kind == "none":
        return None
    shape = (shape[0], 1, 1, shape[3]) if kind == "keys" else shape
    seen = torch.rand(shape, generator=random) > 0.33
    seen[:, :, :1] &= shape[2] == 1
    if kind in ("bool", "keys"):
        return framed(seen)
    dtype = torch.float32 if kind == "float32" and dtype != torch.float64 else dtype
    added = torch.randn(shape, generator=random).to(dtype)
    hidden = -INF if kind == "float32" else torch.finfo(dtype).min
    return framed(added.masked_fill(~seen, hidden))


def case(
    batch: int = 1,
    kv_heads: int = 2,
    group: int = 1,
    queries: int = 4,
    entries: int = 9,
    head: int = 16,
    width: int | None = None,
    dtype: torch.dtype = torch.float32,
    spare: int = 3,
    there: bool = False,
    mask: str = "none",
    shared: int = 0,
    scale: float | None = None,
    seed: int = 0,
) -> Arguments:
    """Random arguments: buffers ``[B, E, Hkv, h]``, of which ``spare`` or fewer entries are no row.

    ``there``: no positions. ``shared``: the bits say which of the mask's leading dimensions are 1.
    """
    random = torch.Generator().manual_seed(seed)

    def buffer(*shape: int) -> torch.Tensor:
        return framed(torch.randn(shape, generator=random).to(dtype)).transpose(1, 2)

    tokens = max(entries, 1) if there else entries + 4
    query = buffer(batch, queries, kv_heads * group, head)
    key = buffer(batch, entries, kv_heads, head)
    value = buffer(batch, entries, kv_heads, head if width is None else width)
    positions = torch.stack([torch.randperm(tokens, generator=random) for _ in range(batch)])[:, :entries]
    positions[:, : min(spare, entries)] = tokens + torch.arange(min(spare, entries)) % 2
    full = (batch, kv_heads * group, queries)
    sizes = (*(1 if shared >> i & 1 else n for i, n in enumerate(full)), tokens)
    entry = None if there and entries else framed(positions)
    return Arguments(query, key, value, entry, tokens, mask_of(mask, sizes, dtype, random), scale)


def exact(asked: Arguments) -> torch.Tensor:
    """The definition in float64, entry by entry."""
    query, key, value, positions, tokens, mask, scale = asked
    group, entries = query.shape[1] // key.shape[1], key.shape[2]
    keys, values = (x.double().repeat_interleave(group, 1) for x in (key, value))
    score = query.double() @ keys.mT * (query.shape[3] ** -0.5 if scale is None else scale)
    at = torch.arange(entries).expand(query.shape[0], -1) if positions is None else positions
    seen = (at < tokens)[:, None, None].expand_as(score)
    if mask is not None:
        full = mask.expand(*score.shape[:3], tokens)
        column = torch.stack([full[b][..., at[b].clamp(max=tokens - 1)] for b in range(len(at))])
        seen = seen & column if mask.dtype == torch.bool else seen & (column > -INF)
        score = score if mask.dtype == torch.bool else score + column.double()
    score = score.masked_fill(~seen, -INF)
    return score.softmax(-1).masked_fill(~seen, 0.0) @ values


def check(got: torch.Tensor, asked: Arguments) -> None:
    """``got`` is the definition to some roundings: of scores, of weights, and of the result."""
    want = exact(asked)
    assert (got.dtype, got.shape) == (asked.query.dtype, want.shape)
    largest = float(asked.value.double().abs().amax()) if asked.value.numel() else 0.0
    bound = 8 * torch.finfo(got.dtype).eps * largest
    torch.testing.assert_close(got.double(), want, rtol=0, atol=bound)


# -- the reference -----------------------------------------------------------------------------------------------------


@given(
    sizes=st.tuples(*(st.integers(*r) for r in ((1, 3), (1, 3), (1, 4), (0, 9), (0, 20), (1, 33)))),
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
    check(sparse_attention(*asked), asked)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", ["none", "bool", "added", "float32"])
def test_a_query_that_sees_nothing_is_zero(dtype: torch.dtype, mask: str) -> None:
    """Without a row at all, and where the mask hides the rows that there are, as torch's own attention has it."""
    none = case(dtype=dtype, spare=9, mask=mask)
    assert torch.equal(sparse_attention(*none), torch.zeros_like(none.query))
    hidden = case(dtype=dtype, there=True, mask="bool")
    assert hidden.mask is not None
    hidden.mask.fill_(False)
    added = torch.zeros(hidden.mask.shape, dtype=dtype).masked_fill(~hidden.mask, -INF)
    for mask_given in (hidden.mask, added):
        asked = hidden._replace(mask=mask_given)
        plain = torch.nn.functional.scaled_dot_product_attention(*asked[:3], attn_mask=mask_given)
        assert torch.equal(plain, torch.zeros_like(plain))
        assert torch.equal(sparse_attention(*asked), plain)


def test_what_is_not_attention_is_refused() -> None:
    q, k = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    at = torch.zeros(2, 5, dtype=torch.int64)
    refused: list[tuple[str, tuple[object, ...]]] = [
        ("one floating dtype; got", (q, k.half(), k, at, 9)),
        ("one floating dtype; got", (q.long(), k.long(), k.long(), at, 9)),
        ("one floating dtype; got", (q[0], k, k, at, 9)),
        (r"h_v\]; got .*\[2, 2, 5, 8\], \[2, 2, 4, 8\]", (q, k, k[:, :, 1:], at, 9)),
        (r"h_v\]; got", (q[1:], k, k, at, 9)),
        (r"h_v\]; got", (q[..., 1:], k, k, at, 9)),
        ("a multiple of Hkv; got H 3, Hkv 2", (q[:, 1:], k, k, at, 9)),
        ("heads have a size, .* h 0", (q[..., :0], k[..., :0], k, at, 9)),
        (r"int64 \[2, 5\]; got torch.int32", (q, k, k, at.int(), 9)),
        (r"int64 \[2, 5\]; got .* \[2, 4\]", (q, k, k, at[:, 1:], 9)),
        ("at least 1; got 0", (q, k, k, at, 0)),
        ("torch.float32 is one of .*; got torch.float16", (q, k, k, at, 9, torch.zeros(1, 1, 1, 9).half())),
        (
            "torch.float64 is one of .*; got torch.float32",
            (*(x.double() for x in (q, k, k)), at, 9, torch.zeros(1, 1, 1, 9)),
        ),
        (r"a mask is \[2, 4, 3, 9\], .*; got \[1, 1, 4, 9\]", (q, k, k, at, 9, torch.zeros(4, 9))),
        (r"a mask is .*; got \[1, 2, 1, 9\]", (q, k, k, at, 9, torch.zeros(1, 2, 1, 9))),
        (r"a mask is .*; got \[1, 1, 1, 5\]", (q, k, k, at, 9, torch.zeros(1, 1, 1, 5))),
        ("over 9 tokens needs the positions .*; got 5 entries", (q, k, k, None, 9, torch.zeros(1, 1, 1, 9))),
    ]
    for sentence, arguments in refused:
        with pytest.raises(ValueError, match=sentence):
            sparse_attention(*arguments)  # type: ignore[arg-type]


# -- the op under the compiler -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["none", "bool", "added"])
@pytest.mark.parametrize("there", [False, True])
def test_the_op_is_well_formed(mask: str, there: bool) -> None:
    torch.library.opcheck(torch.ops.dllm.sparse_attention.default, tuple(case(group=2, mask=mask, there=there)))


@pytest.mark.parametrize(
    ("there", "mask", "dtype"),
    [
        (False, "none", torch.float32),
        (False, "keys", torch.bfloat16),
        (True, "none", torch.bfloat16),
        (True, "none", torch.float32),
        (True, "keys", torch.float32),
    ],
)
def test_inductor_reads_the_buffer_where_it_is(there: bool, mask: str, dtype: torch.dtype) -> None:
    asked = case(1, 2, 3, 8, 120, 16, dtype=dtype, there=there, mask=mask)

    def step(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        out = sparse_attention(query, keys.transpose(1, 2), values.transpose(1, 2), *asked[3:])
        return out.transpose(1, 2).flatten(2)

    arguments = (asked.query, asked.key.transpose(1, 2), asked.value.transpose(1, 2))
    got, code = inductor(step, *arguments)
    check(got.unflatten(2, (6, 16)).transpose(1, 2), asked)
    assert code.count("_scaled_dot_product_flash_attention_for_cpu.default(") == 1
    assert "cat" not in re.findall(r"[a-z]+", code)
    sizes = buffers(code)
    assert max(sizes, default=0) <= 8 * 120  # no key, no value, and a mask that its heads share
    if there and mask == "none":
        assert sizes == []
        assert "cpp_fused" not in code


# -- Triton ------------------------------------------------------------------------------------------------------------


def interpreted() -> None:
    """Kernels against the definition, in one split and in many.

    No bfloat16: the interpreter multiplies its bits as integers.
    """
    from dllm_compile.kernels import sparse_attention_triton as kernels

    cases = [
        case(1, 2, 1, 1, 1, 16, mask="bool", spare=0),
        case(2, 1, 7, 33, 131, 16, mask="bool", scale=0.3),
        case(1, 2, 7, 5, 77, 32, mask="added", shared=2, dtype=torch.float16),
        case(1, 2, 1, 33, 97, 24, 40, dtype=torch.float16),
        case(2, 1, 2, 5, 131, 20, mask="keys", spare=70),
        case(1, 1, 2, 3, 70, 64, 8, mask="added"),
        case(1, 2, 1, 3, 65, 16, there=True, mask="float32", dtype=torch.float16),
        case(1, 1, 1, 3, 65, 17, there=True),
        case(1, 1, 1, 3, 30, 256, 3),
        case(1, 1, 2, 3, 70, 16, spare=70, mask="keys"),
        case(2, 1, 2, 3, 70, 16, mask="bool", shared=5, dtype=torch.float16),
        case(queries=0),
        case(entries=0),
    ]
    for programs, some in ((264, cases), (1, cases[:6])):
        kernels.PROGRAMS = programs
        for asked in some:
            got = kernels.launch(asked)
            check(got, asked)
            check(reference(asked), asked)
            assert got.transpose(1, 2).is_contiguous()
    strange = case(1, 1, 1, 2, 4, 16, spare=0, mask="bool", shared=4)
    assert strange.positions is not None
    strange.positions.copy_(torch.tensor([[-1, 2**62, -(2**62), 8]]))
    assert torch.equal(kernels.launch(strange), torch.zeros(1, 1, 2, 16))


def test_the_interpreted_kernels_equal_float64() -> None:
    interpret(interpreted)


@pytest.mark.parametrize(
    ("capability", "dtype", "head", "mask", "positions"),
    [  # each dtype for each GPU, and for each GPU one with a mask and one without
        *((capability, "fp16", 32, "fp16", True) for capability in (80, 100)),
        (90, "fp16", 32, None, False),
        *((capability, "bf16", 128, None, False) for capability in (80, 100)),
        (90, "bf16", 64, "i1", True),
        *((capability, "fp32", 16, "i1", False) for capability in (80, 100)),
        (90, "fp32", 16, None, True),
    ],
)
def test_the_kernels_compile(capability: int, dtype: str, head: int, mask: str | None, positions: bool) -> None:
    from dllm_compile.kernels.sparse_attention_triton import merge_kernel, part_kernel, tile_of

    split = mask is not None
    tile, d, v = tile_of(head, head, 16 if split else 64, 4 if dtype == "fp32" else 2)  # a mask is slow to compile
    pointers = dict.fromkeys(("query", "key", "value"), f"*{dtype}") | {"positions": "*i64", "mask": f"*{mask}"}
    pointers |= {"out": "*fp32" if split else f"*{dtype}", "acc": "*fp32", "sums": "*fp32", "scale": "fp32"}
    constants = dict.fromkeys(("query_d", "key_d", "value_d", "mask_s", "position_e"), 1)
    constants |= {"heads": 28, "GROUP": 7, "HEAD": head, "WIDTH": head, "SPLIT": split, "MASK_ROWS": dtype != "fp16"}
    constants |= {"M": tile.rows, "N": tile.entries, "D": d, "V": v}
    absent = {"mask": mask is None, "positions": not positions, "sums": not split}
    constants |= {name: None for name, gone in absent.items() if gone}
    part = (part_kernel, constants, {"num_warps": tile.warps, "num_stages": tile.stages})
    merge = (merge_kernel, {"WIDTH": head, "SPLITS": 64, "V": v}, {"num_warps": 4})
    for kernel, known, options in (part, merge) if split else (part,):
        wide = [n for n in kernel.arg_names if n not in known and n[-2:] in ("_b", "_h", "_q", "_e")]
        compiled = built(kernel, pointers, known, capability, options, wide)
        assert compiled.metadata.shared <= 99 * 1024


@pytest.mark.parametrize("dtype", DTYPES)
def test_cuda_tensors_take_the_kernels(dtype: torch.dtype) -> None:
    """Traced with tensors that have a device and no memory; float64, and heads too wide, take the reference."""
    from dllm_compile.kernels.sparse_attention_triton import launch

    with FakeTensorMode(allow_non_fake_inputs=True):
        query = torch.empty(2, 32, 28, 128, dtype=dtype, device="cuda").transpose(1, 2)
        key = torch.empty(2, 1000, 4, 128, dtype=dtype, device="cuda").transpose(1, 2)
        at = torch.empty(2, 1000, dtype=torch.int64, device="cuda")
        mask = torch.empty(2, 1, 1, 2000, dtype=torch.bool, device="cuda")
        got = sparse_attention(query, key, key, None, 1000)
        assert (got.shape, got.dtype, got.is_cuda) == (query.shape, dtype, True)
        wide = torch.empty(1, 1, 1, 257, dtype=dtype, device="cuda")
        assert sparse_attention(wide, wide, wide, None, 1).shape == wide.shape
    if dtype == torch.float64:
        return
    given = Arguments(query, key, key, at, 2000, mask)
    graph = make_fx(launch, _allow_non_fake_inputs=True)(given).graph
    assert grids(graph) == [[(56, 4, 1) if dtype == torch.float32 else (32, 8, 1)], [(2 * 32 * 28, 1, 1)]]


def test_one_code_serves_any_number_of_rows_and_entries() -> None:
    from dllm_compile.kernels.sparse_attention_triton import launch

    shapes = ShapeEnv(duck_shape=False)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    free = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * 2])
    rows, entries = (
        mode.from_tensor(torch.empty(2, count, heads, 64, device="meta"), symbolic_context=free).size(1)
        for count, heads in ((40, 4), (900, 2))
    )
    with mode:
        query = torch.empty(2, rows, 4, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
        key = torch.empty(2, entries, 2, 64, dtype=torch.bfloat16, device="cuda").transpose(1, 2)
    graph = make_fx(launch, _allow_non_fake_inputs=True)(Arguments(query, key, key, None, 2000)).graph
    assert not shapes.replacements
    assert all(isinstance(first, torch.fx.Node) for ((first, *_),) in grids(graph))  # computed from the free sizes


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mask", MASKS)
def test_the_kernels_equal_float64_on_a_gpu(dtype: torch.dtype, mask: str) -> None:
    torch.compiler.reset()
    shapes = ((1, 32, 1, 32, 700, 128), (1, 4, 7, 33, 1301, 128), (2, 2, 1, 1, 9, 16), (2, 1, 8, 300, 515, 64))
    for shape in (*shapes, (1, 2, 2, 17, 100, 256), (2, 2, 3, 40, 77, 96, 80)):
        asked = case(*shape, dtype=dtype, mask=mask, shared=6)
        check(sparse_attention(*on_gpu(asked)).cpu(), asked)
        asked = case(*shape, dtype=dtype, mask=mask)
        check(sparse_attention(*on_gpu(asked)).cpu(), asked)
        check(torch.compile(sparse_attention)(*on_gpu(asked)).cpu(), asked)
    for asked in (case(there=True, mask=mask, dtype=dtype), case(entries=0, dtype=dtype), case(spare=9, dtype=dtype)):
        check(sparse_attention(*on_gpu(asked)).cpu(), asked)
