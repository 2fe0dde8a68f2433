"""A threshold that falls while a block is filled: Streaming-dLLM's (arXiv 2601.17917, and its authors' code).

    threshold * (1 - a * (1 - r))

with ``r`` the share of masks among the tokens of the block, of the window behind it and of the tail (see
:mod:`dllm_compile.passes.suffix_window`; all that is behind the block where there is no window). At the start of a
block, ``r`` is 1.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.mechanism import Confidences, Mechanism, Option, share_of


def falling(told: Confidences) -> torch.Tensor:
    """The threshold ``[B, 1]`` of a step."""
    place = torch.arange(told.masked.shape[1], device=told.masked.device)
    end = torch.where(told.block, place + 1, 0).amax(1, keepdim=True)
    ahead, window = told.masked & (place >= end), told.options.suffix_window
    if window is not None:
        last = torch.where(ahead, place, 0).amax(1, keepdim=True)
        ahead = ahead & ((ahead.cumsum(1) <= window) | (place == last))
    rows = told.block | ahead
    share = (rows & told.masked).sum(1, keepdim=True).double() / rows.sum(1, keepdim=True).clamp(min=1)
    lower: torch.Tensor = told.threshold.double() * (1 - told.options.threshold_fall * (1 - share))
    return lower.to(told.threshold.dtype)


def _is_filled(options: Any) -> str | None:
    if options.threshold_fall is None or options.sliding is None:
        return None
    return "threshold_fall is by how far a block is filled, and sliding ones move on instead; leave out one of them"


MECHANISM = Mechanism(
    "falling-threshold",
    "Streaming-dLLM, arXiv 2601.17917",
    options=(
        Option(
            "threshold_fall",
            None,
            **share_of("threshold", 0.3),
            meaning="share of its ``threshold`` that ``generate`` takes off as the masks of a block, and of the window "
            "behind it, are filled, 0 to 1",
        ),
    ),
    switches=("threshold_fall",),
    threshold=falling,
    checks=(_is_filled,),
)
