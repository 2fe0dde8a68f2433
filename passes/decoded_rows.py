"""dKV-Cache's rows (arXiv 2505.15781, and its authors' code where the two differ): what is masked, or was just filled.

cache       active rows                         keys and values
decoded     masked ones and those just filled   fresh for those, else kept
greedy      those just filled and filled next   fresh for those, else kept
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.mechanism import Facts, Mechanism, Option, RowRule, count
from dllm_compile.interface.plan import rows_before


def decoded(facts: Facts) -> torch.Tensor:
    """Masked rows, and those filled since the call before, once more.

    If logits are shifted, row ``i`` is no longer needed once token ``i + 1`` is filled, since its logits predict that
    token; otherwise once token ``i`` is filled.
    """
    call = facts.call
    unknown = call.masked | (call.filled & (call.number > 0))
    if not facts.options.shift:
        return unknown
    last = torch.arange(unknown.shape[1]) == unknown.shape[1] - 1  # predicts no token; computed twice by its authors
    return rows_before(unknown) | (last & (call.number == 1))


def greedy(facts: Facts) -> torch.Tensor:
    """Rows just filled, and masked ones around each that is filled next; all masked ones where that is not known."""
    call, told = facts.call, facts.call.filling
    return call.filled | (call.masked if told is None else told | around(told, call.masked, facts.options.window_size))


def around(rows: torch.Tensor, free: torch.Tensor, window: int) -> torch.Tensor:
    """The ``window`` rows of ``free`` ``[B, S]`` nearest to each of ``rows``, the left of two first, none for two."""
    tokens = rows.shape[1]
    place, free, taken = torch.arange(tokens), free & ~rows, torch.zeros_like(free)
    for sequence, at in rows.nonzero().tolist() if window else ():
        far = 2 * (place - at).abs() - (place < at).long()
        near = torch.where(free[sequence], far, 2 * tokens).argsort()[:window]
        taken[sequence, near] |= free[sequence, near]
        free &= ~taken
    return taken


def _keeps_its_keys(options: Any) -> str | None:
    if options.keep_ratio is None:
        return None
    return "keep_ratio drops keys of rows that cache='greedy' may compute later; leave out one of them"


MECHANISM = Mechanism(
    "decoded-rows",
    "dKV-Cache, arXiv 2505.15781",
    options=(
        Option(
            "window_size",
            0,
            **count("4", 0),
            meaning='masked rows that ``"greedy"`` computes around each row to be filled, at least 0',
            read=lambda options: options.cache == "greedy",
            beside="cache='greedy'",
        ),
    ),
    neutral={"cache": "decoded", "refresh_interval": 1},
    rules=(
        RowRule(
            "decoded",
            decoded,
            "the masked rows and those just filled",
            leaves_filled=True,
            shifts=True,
        ),
        RowRule(
            "greedy",
            greedy,
            "those just filled and those to be filled next, which :func:`dllm_compile.generate` tells (other loops do "
            "not: all masked rows)",
            needs_hint=True,
            refused=_keeps_its_keys,
        ),
    ),
    methods={"dkv-cache": {"cache": "decoded", "delay": 1, "refresh_interval": 8}},
    presets={
        "dkv-cache/greedy": {
            **{"method": "dkv-cache", "cache": "greedy", "delay": 0, "refresh_interval": 2},
            "window_size": 4,
        },
        "fastest": {"method": "dkv-cache", "delay": 0, "refresh_interval": 16, "block_length": 64},
    },
)
"""``fastest`` is the fastest that ``bench --search`` found within a point of eager's accuracy on both of its models,
and refreshes, for responses longer than theirs; :func:`dllm_compile.generate` adds ``frechet_delta=0.25`` to it.
"""
