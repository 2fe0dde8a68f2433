"""ES-dLLM's early skipping (arXiv 2603.10088, and its authors' code): the deeper a layer, the fewer rows it computes.

    layers                      rows that they compute in a partial step
    before the first depth      those of ``cache``, such as the block
    from each depth on          the surest and most changed of those before: a share of the rows of the step

Behind the layer before a depth, with ``x`` the hidden state of a row there and ``x'`` the one it had when it was last
computed so far, the rows of the largest importance go on:

    d = mean |x - x'| / (rms(x') + 1e-6),  over all rows divided by max(1, max d)
    importance = w c + (1 - w) d,  c the probability of its likeliest token when it last had logits, 0 if decoded
                 + 2 for the two surest masks, + 5 for the leftmost mask, + 3 for tokens decoded since the step before

Of ``n`` rows at a share ``s``, ``max(int(s n), min(t + 2, b))`` go on, with ``t`` the tokens decoded since the step
before and ``b`` those of a block. Keys and values of the others stay those of the last step that computed them, and so
do their logits.

Its authors refresh by intervals alone, not where a block begins:

    cache     rows of a partial step
    rolling   the active block; at its first step, all from the leftmost token decoded in the step before to its end

At a refresh they leave out what is behind the active block; here every row is computed.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.mechanism import Facts, Mechanism, Option, RowRule, count, is_number
from dllm_compile.interface.plan import LayerRows, Skipping


def importance(rows: LayerRows) -> torch.Tensor:
    """The score ``[B, Q]`` of the formula above."""
    wide = torch.promote_types(rows.new.dtype, torch.float32)
    new, old = rows.new.to(wide), rows.old.to(wide)
    drift = (new - old).abs().mean(-1) / (old.square().mean(-1).sqrt() + 1e-6)
    drift = torch.where(rows.there, drift, 0.0)
    drift = drift / drift.amax(1, keepdim=True).clamp(min=1.0)
    weight = rows.options.confidence_weight
    sure = rows.confidence.to(wide)
    surest = torch.where(rows.masked, sure, -torch.inf).topk(min(2, sure.shape[1]), 1).indices
    two = torch.zeros_like(rows.masked).scatter(1, surest, True) & rows.masked
    leftmost = rows.masked & (rows.masked.cumsum(1) == 1)
    scores: torch.Tensor = weight * sure + (1 - weight) * drift + 2.0 * two + 5.0 * leftmost + 3.0 * rows.filled
    return scores


def counts(facts: Facts, rows: torch.Tensor) -> torch.Tensor:
    """How many of ``rows`` ``[B, S]`` go on at each depth, ``[B, n]`` int64; all at an unskipped step."""
    options, every = facts.options, rows.sum(1, keepdim=True)
    shares = (every.double() * torch.tensor(options.row_shares, dtype=torch.float64)).long()
    block = facts.blocks.active.sum(1, keepdim=True)
    going = torch.maximum(shares, torch.minimum(facts.call.written.sum(1, keepdim=True) + 2, block))
    interval = options.unskipped_interval
    return going if interval is None else torch.where(facts.blocks.calls % interval == 0, every, going)


def rolling(facts: Facts) -> torch.Tensor:
    """The active block; where it is another than before, also the rows from the first that was just filled on."""
    active, filled = facts.blocks.active, facts.call.filled & (facts.call.number > 0)
    before_end = active.flip(1).long().cummax(1).values.flip(1).bool()
    since = filled.long().cummax(1).values.bool() & before_end
    return active | (since & facts.blocks.moved)


def _shares(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(is_number(each) and 0 < each <= 1 for each in value)
        and list(value) == sorted(value, reverse=True)
    )


def _depths(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and bool(value)
        and all(is_number(each) and 0 < each < 1 for each in value)
        and list(value) == sorted(set(value))
    )


def _on(options: Any) -> bool:
    return options.row_shares is not None


def _as_many(options: Any) -> str | None:
    if options.row_shares is None or len(options.row_shares) == len(options.row_depths):
        return None
    return f"row_shares are {options.row_shares} at row_depths {options.row_depths}; give as many of both"


_PUBLISHED = {"method": "es-dllm", "block_length": 64}
_AUTHORS = {
    "llada-gsm8k": (16, 64),
    "llada-code": (4, 64),
    "llada-math": (8, 256),
    "dream-gsm8k": (8, 64),
    "dream-humaneval": (2, 64),
    "dream-mbpp": (2, 256),
    "dream-math": (4, 256),
}
"""Steps between those that skip nothing, and between refreshes, of the authors' scripts by model and task."""

MECHANISM = Mechanism(
    "early-skipping",
    "ES-dLLM, arXiv 2603.10088",
    options=(
        Option(
            "row_shares",
            None,
            fits=_shares,
            wanted="a tuple of falling shares of the rows, above 0 and up to 1, such as (0.5, 0.25)",
            meaning="shares of the rows of a partial step that layers compute from each of ``row_depths`` on; the rows "
            "whose hidden states changed most and those that are surest of their tokens. At 1 none is skipped",
        ),
        Option(
            "row_depths",
            (0.125, 0.25),
            fits=_depths,
            wanted="a tuple of rising shares of the layers, above 0 and below 1, such as (0.125, 0.25)",
            meaning="shares of the layers from which on ``row_shares`` apply",
            read=_on,
            beside="row_shares",
        ),
        Option(
            "confidence_weight",
            0.5,
            fits=lambda v: is_number(v) and 0 <= v <= 1,
            wanted="a weight from 0 to 1, such as 0.5",
            meaning="what confidence counts in the choice of these rows, against the change of hidden states (alpha)",
            read=_on,
            beside="row_shares",
        ),
        Option(
            "unskipped_interval",
            None,
            **count("16, or None"),
            meaning="steps from one whose layers all compute every row of the step to the next, at least 1; ``None`` "
            "for none but refreshes",
            synonyms=("block_update",),
            read=_on,
            beside="row_shares",
        ),
    ),
    switches=("row_shares",),
    rules=(
        RowRule(
            "rolling",
            rolling,
            "the active block, and at its first step, which is no refresh, also the rows from the first that was just "
            "filled on",
            through_blocks=True,
            in_blocks=True,
        ),
    ),
    skips=Skipping(lambda options: options.row_depths, counts, importance),
    checks=(_as_many,),
    neutral={"cache": "dual", "refresh_interval": 1, "row_shares": (0.5, 0.25)},
    methods={
        "es-dllm": {"cache": "rolling", "row_shares": (0.5, 0.25), "unskipped_interval": 16, "refresh_interval": 64}
    },
    presets={
        f"es-dllm/{name}": {**_PUBLISHED, "unskipped_interval": block, "refresh_interval": every}
        for name, (block, every) in _AUTHORS.items()
    },
)
