"""FlashBlock as row sets (arXiv 2602.05305): attention over the keys outside of the block is kept.

Between two refreshes the keys outside of the rows that a step computes do not change, and what a row's attention over
them comes to changes little. The first partial step computes it, for each layer, head and row, and keeps it with its
log-sum-exp; those behind it attend to the keys that they compute themselves, and join both:

    step                     keys                     attention
    first behind a refresh   all, in two parts        exact but for rounding; that over those outside is kept
    behind it                computed in this step    joined to what is kept

The rows before those of the block, which are computed for samplers alone, attend likewise. No row reads their new keys;
their cached ones are outside. Where a sequence of a batch refreshes, the others go on with what is kept, and that one
keeps nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from dllm_compile.core.assignment import ACTIVE, Assignment, Outside
from dllm_compile.core.rows import ALL
from dllm_compile.interface.mechanism import Mechanism, Option, count, flag
from dllm_compile.kernels.attention_part import attention_part, joined, kept_part, renewed_part

READS = Outside(kept_part, joined)
RENEWS = Outside(kept_part, joined, renewed_part)


@cache
def renewing(partial: Assignment) -> Assignment:
    """The step ``partial``, computing attention over the keys outside in sequences that renew it, and keeping it."""
    return replace(partial, name="outside", keys=ALL, attend=attention_part, outside=RENEWS)


@cache
def inside(partial: Assignment) -> Assignment:
    """The step ``partial``, reading what is kept of attention over the keys outside, and none of these keys."""
    return replace(partial, name="inside", keys=ACTIVE, attend=attention_part, outside=READS)


def _goes_with(options: Any) -> str | None:
    if not options.keep_outside:
        return None
    if options.cache == "none":
        return "keep_outside keeps attention over keys outside of a block, and cache is 'none'; give cache='dual' too"
    for name in ("keep_ratio", *(options.saliency.switches if options.saliency is not None else ())):
        if getattr(options, name) is not None:
            return (
                f"{name} reads all keys that are left at every step, and keep_outside none outside of a block; "
                "leave out one of them"
            )
    return None


MECHANISM = Mechanism(
    "flashblock",
    "FlashBlock, arXiv 2602.05305",
    options=(
        Option(
            "keep_outside",
            False,
            **flag(),
            meaning="whether partial steps read the keys of their own rows alone, and keep what attention over the "
            "others comes to",
        ),
        Option(
            "outside_interval",
            None,
            **count("8, or None"),
            meaning="partial steps from one that computes attention over the others to the next, at least 1; ``None`` "
            "computes it once behind a refresh. At 1 all do, and ``keep_outside`` changes nothing",
            read=lambda options: options.keep_outside,
            beside="keep_outside=True",
        ),
    ),
    switches=("keep_outside",),
    neutral={"cache": "dual", "keep_outside": True, "refresh_interval": 1},
    methods={"flashblock": {"cache": "dual", "keep_outside": True}},
    presets={"flashblock": {"method": "flashblock", "block_length": 32}},
    checks=(_goes_with,),
)
