"""What ``scaled_dot_product_attention`` becomes on CUDA, for graphs lowered where torch has no CUDA to choose for it.

The rules are those of ``aten/src/ATen/native/transformers/cuda/sdp_utils.cpp``, for GPUs of capability 8.0 and more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

aten = torch.ops.aten
HALF = (torch.bfloat16, torch.float16)


@dataclass(eq=False)
class Chosen:
    """A stand-in for the function, and what it chose: ``"flash"``, ``"efficient"`` or ``"math"`` for each call."""

    names: list[str] = field(default_factory=list)

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attention, by the kernel that CUDA would take."""
        assert not is_causal
        assert not dropout_p
        name = pick(query, key, value, attn_mask, enable_gqa)
        self.names.append(name)
        return call(name, query, key, value, attn_mask, scale, enable_gqa)

    __name__ = "scaled_dot_product_attention"


def pick(query: Any, key: Any, value: Any, mask: Any, shared: bool) -> str:
    """The kernel for a call; ``shared`` where query heads may share key heads."""
    width, out = query.shape[-1], value.shape[-1]
    dense = all(each.stride(-1) == 1 for each in (query, key, value))
    fits = dense and (query.shape[1] == key.shape[1] or shared)
    half = query.dtype in HALF
    if mask is None and half and width == out and width <= 256 and fits:
        return "flash"
    multiple = 8 if half else 4
    even = width % multiple == 0 and out % multiple == 0
    return "efficient" if query.dtype != torch.float64 and even and fits else "math"


def call(name: str, query: Any, key: Any, value: Any, mask: Any, scale: float | None, shared: bool) -> torch.Tensor:
    """A call of that kernel, with the bias that it takes in place of a mask."""
    out: torch.Tensor
    if name == "math":
        more = {"scale": scale, "enable_gqa": shared}
        out = aten._scaled_dot_product_attention_math(query, key, value, mask, 0.0, False, None, **more)[0]
    elif name == "flash":
        out = aten._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)[0]
    else:
        bias = mask
        if mask is not None:
            if mask.dtype == torch.bool:
                bias = torch.where(mask, 0.0, -torch.inf).to(query.dtype)
            keys = bias.shape[-1]
            if not isinstance(keys, int) or keys % 16:  # it wants rows that begin at multiples of 16
                bias = torch.nn.functional.pad(bias, (0, (16 - keys % 16) % 16))[..., :keys]
            bias = bias.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if key.shape[1] != query.shape[1]:
            key, value = (each.repeat_interleave(query.shape[1] // each.shape[1], 1) for each in (key, value))
        out = aten._scaled_dot_product_efficient_attention(query, key, value, bias, False, 0.0, False, scale=scale)[0]
    return out
