"""Attention over some of the tokens: those whose keys and values were kept, and those that are fresh.

    out = softmax(scale q k^T + mask[positions]) v        over the entries that a query sees

An *entry* is a key and a value in a buffer, and the position of their token. Kept and fresh entries are in one buffer,
in any order, so that nothing is concatenated. An entry without a row, at ``tokens`` or beyond, is seen by nobody, but
what it holds must be finite: its weight is 0, and 0 * NaN is NaN.

A query that sees no entry is 0, as in ``scaled_dot_product_attention`` (torch 2.13, CPU): its mask is False or -inf.
The least finite number is no such mask: a query that has it everywhere attends all the same, there as here.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import register_flop_formula

from dllm_compile.core.rows import mask_keys
from dllm_compile.kernels.operation import on_cuda, operation

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Arguments(NamedTuple):
    """Arguments of the operation; see ``sparse_attention``."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    positions: torch.Tensor | None
    tokens: int
    mask: torch.Tensor | None = None
    scale: float | None = None


def sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    positions: torch.Tensor | None,
    tokens: int,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention of each query over the entries at ``positions``. Has no gradient.

    Args:
        query: ``[B, H, Q, h]`` float64, float32, bfloat16 or float16, of any strides, like the next two.
        key: ``[B, Hkv, E, h]`` of the same dtype; ``H`` is a multiple of ``Hkv``.
        value: ``[B, Hkv, E, h_v]`` of the same dtype.
        positions: ``[B, E]`` int64, 0 or more, of the entries; ``tokens`` or more for "no row". ``None`` where every
            entry is there, and entry ``e`` is at ``e``.
        tokens: the token count ``S``, at least 1.
        mask: ``[B or 1, H or 1, Q or 1, S]`` or its last dimensions; bool (may attend), or added: of the
            query's dtype, or float32 for one of half the size. Without ``positions``, ``E`` is ``S``.
        scale: of the scores, ``1 / sqrt(h)`` by default.

    Returns:
        ``[B, H, Q, h_v]`` of the query's dtype.
    """
    if mask is not None:
        mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    check(Arguments(query, key, value, positions, tokens, mask, scale))
    out: torch.Tensor = torch.ops.dllm.sparse_attention(query, key, value, positions, tokens, mask, scale)
    return out


def check(given: Arguments) -> None:
    """Raise ``ValueError`` unless the arguments fit each other; a mask has four dimensions here."""
    query, key, value, positions, tokens, mask, _ = given
    _check_entries(query, key, value, positions)
    if tokens < 1:
        raise ValueError(f"tokens is at least 1; got {tokens}")
    if mask is not None:
        _check_mask(query, mask, tokens)
        if positions is None and key.shape[2] != tokens:
            raise ValueError(
                f"a mask over {tokens} tokens needs the positions of the entries; got {key.shape[2]} entries"
            )


def _check_entries(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor | None) -> None:
    """Raise ``ValueError`` unless the four fit each other."""
    three = (query, key, value)
    if query.dtype not in DTYPES or any(x.dtype != query.dtype or x.dim() != 4 for x in three):
        given = ", ".join(f"{x.dtype} {[*x.shape]}" for x in three)
        raise ValueError(f"query, key and value are [B, heads, rows, h] of one floating dtype; got {given}")
    if key.shape[:3] != value.shape[:3] or query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        given = ", ".join(str([*x.shape]) for x in three)
        raise ValueError(f"query, key and value are [B, H, Q, h], [B, Hkv, E, h] and [B, Hkv, E, h_v]; got {given}")
    if min(query.shape[3], value.shape[3], query.shape[1], key.shape[1]) < 1 or query.shape[1] % key.shape[1]:
        given = f"H {query.shape[1]}, Hkv {key.shape[1]}, h {query.shape[3]}, h_v {value.shape[3]}"
        raise ValueError(f"heads have a size, and H is a multiple of Hkv; got {given}")
    if positions is not None and (positions.dtype != torch.int64 or positions.shape != (key.shape[0], key.shape[2])):
        wanted = [key.shape[0], key.shape[2]]
        raise ValueError(f"positions are int64 {wanted}; got {positions.dtype} {[*positions.shape]}")


def _check_mask(query: torch.Tensor, mask: torch.Tensor, tokens: int) -> None:
    """Raise ``ValueError`` unless ``mask`` is one for ``query`` over ``tokens``."""
    wanted = [torch.bool, query.dtype]
    if query.dtype in (torch.bfloat16, torch.float16):  # torch 2.13 misreads it for float64, from 16 keys on
        wanted.append(torch.float32)
    if mask.dtype not in wanted:
        raise ValueError(f"a mask for {query.dtype} is one of {wanted}; got {mask.dtype}")
    full = (*query.shape[:3], tokens)
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape[:3], full[:3], strict=True))
    if not fits or mask.shape[3] != tokens:
        raise ValueError(f"a mask is {[*full]}, where all but the last may be 1; got {[*mask.shape]}")


def reference(given: Arguments) -> torch.Tensor:
    """The op: torch's attention, which on a CPU reads a buffer of any strides, and shared heads, where they are.

    Arguments and result as for ``sparse_attention``.
    """
    query, key, value, positions, tokens, mask, scale = given
    if positions is not None:
        mask = mask_keys(mask, positions, tokens)
    return scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)


def has_kernel(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether the Triton kernels attend by such queries ``[B, H, Q, h]`` to values ``[B, Hkv, E, h_v]``."""
    return on_cuda(query) and query.dtype != torch.float64 and max(query.shape[3], value.shape[3]) <= 256


@operation("sparse_attention", sparse_attention)
def _sparse_attention(*arguments: Any) -> torch.Tensor:
    """``reference`` on a CPU, and for what the Triton kernels do not take; else those, on CUDA."""
    given = Arguments(*arguments)
    if not has_kernel(given.query, given.value):
        return reference(given)
    from dllm_compile.kernels.sparse_attention_triton import launch

    return launch(given)


@register_flop_formula(torch.ops.dllm.sparse_attention)
def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **more: object
) -> int:
    """FLOPs of a call by the shapes of its arguments, two a multiply-add."""
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])
