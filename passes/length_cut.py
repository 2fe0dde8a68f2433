"""A response is cut where the model is sure that it has ended: the length prediction of ODB-dLLM (arXiv 2511.21759).

At the first step of a block, which begins at position ``s``,

    E = masks whose likeliest token is an end of sequence, with a probability of at least ``length_cut``,
        behind the first ``min(128, rest)`` positions from ``s`` on, ``rest`` being all to the end

and if there are any, the response ends with the block of the first of them. What is behind is neither decoded nor
computed nor attended to any more.
"""

from __future__ import annotations

from typing import Any

import torch

from dllm_compile.interface.mechanism import Confidences, Facts, Mechanism, Option, is_number

AHEAD = 128
"""Positions from the beginning of a block that are not looked at."""


def sure_ends(told: Confidences) -> torch.Tensor:
    """The set ``E`` of each sequence, ``[B, S]`` bool."""
    place = torch.arange(told.masked.shape[1], device=told.masked.device)
    begin = torch.where(told.block, place, place.shape[0]).amin(1, keepdim=True)
    found: torch.Tensor = told.candidates & (told.sure >= told.options.length_cut) & (place >= begin + AHEAD)
    return found


def wanted(facts: Facts) -> torch.Tensor:
    """All rows ``[B, S]`` bool but those behind the cut."""
    return torch.ones_like(facts.masked) if facts.call.wanted is None else facts.call.wanted


def _has_blocks(options: Any) -> str | None:
    if options.length_cut is None:
        return None
    if options.sliding is not None:
        return "length_cut ends a response with a block, and sliding ones have no fixed ends; leave out one of them"
    if options.cache != "none":
        return None
    return (
        f"length_cut is {options.length_cut!r}, which leaves out what is behind a block, and there is no cache of "
        "blocks; give cache='dual' too"
    )


MECHANISM = Mechanism(
    "length-cut",
    "ODB-dLLM, arXiv 2511.21759",
    options=(
        Option(
            "length_cut",
            None,
            fits=lambda v: is_number(v) and 0 < v <= 1,
            wanted="a probability, such as 0.95, above 0 and up to 1",
            meaning="``generate`` ends a response with the block of the first mask that is an end of sequence with "
            "this probability, where a block begins 128 tokens before it or more; what is behind is in no step",
        ),
    ),
    switches=("length_cut",),
    ends=sure_ends,
    present=wanted,
    checks=(_has_blocks,),
)
