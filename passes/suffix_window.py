"""Streaming-dLLM's suffix window with a tail (arXiv 2601.17917, and its authors' code).

While a block is decoded, the masked tokens far behind it say little but how long the response may become. So a sequence
has, in full steps too, only

    [0, e)      all up to the end of the active block
    [e, e + w)  a window of ``w`` tokens of the response behind it
    the tail    the last token of the response that the sampler wants, at its own position: it tells the length

and every token behind the window that is no mask. The others are neither computed nor attended to. A block begins with
a full step, so that rows are computed where the window has come to them. With a window as long as the rest it is the
cache of blocks that it is given beside; its authors run it on ``cache="prefix"``.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.mechanism import Facts, Mechanism, Option, count


def near(facts: Facts) -> torch.Tensor:
    """The rows ``[B, S]`` bool of a sequence, but masked ones behind the window."""
    place = torch.arange(facts.masked.shape[1])
    end = torch.where(facts.blocks.active, place + 1, 0).amax(1, keepdim=True)
    response = facts.response if facts.call.wanted is None else facts.response & facts.call.wanted
    suffix = response & (place >= end)
    last = torch.where(response, place, -1).amax(1, keepdim=True)
    far = suffix & (suffix.cumsum(1) > facts.options.suffix_window) & (place < last)
    absent: torch.Tensor = far & facts.masked
    return ~absent


def _has_blocks(options: Any) -> str | None:
    if options.suffix_window is None or options.cache != "none":
        return None
    return (
        f"suffix_window is {options.suffix_window!r}, tokens behind the active block, and there are no blocks; give "
        "cache='prefix' too, or method='streaming-dllm'"
    )


MECHANISM = Mechanism(
    "suffix-window",
    "Streaming-dLLM, arXiv 2601.17917",
    options=(
        Option(
            "suffix_window",
            None,
            **count("96", 0),
            meaning="tokens behind the active block that are computed and attended to, at least 0, and with them the "
            "last of the response; masks behind them are left out of every step",
        ),
    ),
    switches=("suffix_window",),
    present=near,
    neutral={"cache": "dual", "suffix_window": 10**6, "refresh_interval": 1},
    methods={"streaming-dllm": {"cache": "prefix", "suffix_window": 96}},
    presets={"streaming-dllm": {"method": "streaming-dllm", "block_length": 32, "threshold_fall": 0.3}},
    checks=(_has_blocks,),
)
"""With the preset :func:`dllm_compile.generate` takes a threshold of 0.9."""
