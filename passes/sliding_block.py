"""A block that slides: it begins at the first mask at every call (DSB, arXiv 2602.05992, and its authors' code).

With ``s`` the first mask of a response of ``G`` tokens behind a prompt of ``P``, and ``d`` tokens filled so far:

    sliding     block                             rows of a partial step        every row
    greedy      s to P + block_length + d         the block, and those it has   at the first call, and once
    constant    s to s + block_length             moved over since the call     ``refresh_tokens`` were filled
                (neither beyond P + G)            before                        since the last such call

Between two calls that fill tokens of the block alone, the greedy block holds the first ``block_length`` masks. Keys
and values outside of the rows are those of the last call that computed them. ``rows_before`` (vicinity) adds the
authors' window of rows before the block, of tokens that were filled lately.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.blocks import Masks
from dllm_compile.interface.mechanism import Facts, Mechanism, Option, count

KINDS = ("greedy", "constant")


def up_to_mask(masked: torch.Tensor, count: int) -> torch.Tensor:
    """Positions ``[B, S]`` bool up to the mask number ``count`` of ``masked`` ``[B, S]``; all if there are no more."""
    rank = masked.cumsum(1)
    return (rank < count) | (masked & (rank == count)) | (masked.sum(1, keepdim=True) <= count)


def from_first(rows: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` bool, positions from the first of ``rows`` ``[B, S]`` on."""
    return rows.long().cummax(1).values.bool()


def sliding_block(told: Masks) -> torch.Tensor:
    """The block ``[B, S]`` bool; none where nothing is masked."""
    open_rows = from_first(told.masked) & told.response
    if told.options.sliding == "greedy":
        return open_rows & up_to_mask(told.masked, told.length)
    return open_rows & (open_rows.cumsum(1) <= told.length)


def moved_over(facts: Facts) -> torch.Tensor:
    """Rows before the block that were in it at the call before: those from its former first mask on."""
    behind = from_first(facts.blocks.active)
    before = from_first((facts.masked | facts.call.filled) & facts.response)
    return before & ~behind & facts.response


def refresh_tokens(options: Any) -> int | None:
    """Tokens to be filled before every row is computed; ``None`` for never."""
    tokens: int | None = options.block_length if options.refresh_tokens is None else options.refresh_tokens
    return tokens


def filled_enough(facts: Facts) -> torch.Tensor:
    """Sequences ``[B, 1]`` bool that have filled so many tokens since every row was computed."""
    tokens = refresh_tokens(facts.options)
    filled = facts.since.sum(1, keepdim=True)
    return filled >= (tokens or filled.max() + 1)


def reach(facts: Facts) -> torch.Tensor:
    """Rows ``[B, S]`` bool of the blocks that may come before the next refresh.

    At such a call fewer than ``refresh_tokens`` are filled, so that its first ``block_length`` masks are among the
    first ``block_length + refresh_tokens - 1`` of now. A constant block lies within the greedy one.
    """
    tokens, length = refresh_tokens(facts.options), facts.options.block_length
    masked = facts.masked & facts.response
    rows = from_first(masked) & facts.response
    return rows if tokens is None or length is None else rows & up_to_mask(masked, length + tokens - 1)


MECHANISM = Mechanism(
    "sliding-block",
    "DSB, arXiv 2602.05992",
    options=(
        Option(
            "sliding",
            None,
            fits=lambda v: v in KINDS,
            wanted='"greedy" or "constant"',
            meaning="the active block begins at the first mask at every call: ``block_length`` masks "
            '(``"greedy"``), or so many tokens (``"constant"``); ``generate`` writes into it alone',
        ),
        Option(
            "refresh_tokens",
            None,
            **count("32, or None"),
            meaning="tokens filled between full steps where the block slides, at least 1; ``None`` for "
            "``block_length``",
            read=lambda options: options.sliding is not None and options.cache != "none",
            beside="sliding='greedy' and cache='dual'",
        ),
    ),
    switches=("sliding",),
    block=sliding_block,
    widens=moved_over,
    reach=reach,
    refresh=filled_enough,
    neutral={"cache": "dual", "sliding": "greedy", "refresh_interval": 1},
    methods={"dsb": {"cache": "dual", "sliding": "greedy", "rows_before": 24}},
    presets={
        "dsb": {"method": "dsb", "block_length": 32},
        "dsb/constant": {"method": "dsb", "sliding": "constant", "block_length": 32},
    },
)
