"""Block caches as row sets: which rows a step between two refreshes computes.

    cache       active rows               keys and values                      source
    dual        the block                 fresh for the block, else kept       Fast-dLLM, arXiv 2505.22618
    prefix      the block to the end      fresh from the block on, else kept   Fast-dLLM
    none        the response              fresh for it, kept for the prompt

and further rules, each in the file of its mechanism. The steps between two refreshes carry the residual stream of the
active rows alone. Unless samplers are known to read the row of a token itself, the row before one of these is computed
too. Its keys and values are not cached: other rows see its old ones, as if it had not been computed.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import torch

from dllm_compile.core.assignment import ACTIVE, KEYS, Assignment
from dllm_compile.interface.mechanism import Facts, Mechanism, Option, RowRule, count
from dllm_compile.kernels.attention_part import attention_part, joined, shared_part

FULL = Assignment("full", keep=KEYS)
BLOCK = Assignment("block", ACTIVE, ACTIVE, ACTIVE, enter=ACTIVE, leave=ACTIVE, keep=KEYS)


@cache
def of_drafts(partial: Assignment) -> Assignment:
    """The step ``partial`` for several possible next ids of one sequence, whose keys and values they share.

    Between two refreshes of a block these depend on its tokens alone, and so do the keys and values of all rows that
    are computed: nothing has to be kept.
    """
    return replace(partial, name="drafts", keys=ACTIVE, attend=attention_part, shared=(shared_part, joined), keep=KEYS)


def of_present(full: Assignment) -> Assignment:
    """The full step ``full`` for a sequence of which some rows are left out: its active rows attend to one another
    alone.
    """
    name = "present" if full.name == "full" else f"{full.name} present"
    rows = replace(full, name=name, query=ACTIVE, key=ACTIVE, value=ACTIVE, enter=ACTIVE, leave=ACTIVE)
    return replace(rows, keys=ACTIVE)


def block(facts: Facts) -> torch.Tensor:
    """The active block."""
    return facts.blocks.active


def block_to_end(facts: Facts) -> torch.Tensor:
    """The active block and all that is behind it."""
    return facts.blocks.active.long().cummax(1).values.bool()


def response(facts: Facts) -> torch.Tensor:
    """The response."""
    return facts.response


RESPONSE_ROWS = RowRule("none", response, "as the other mechanisms say")


def _has_cache(options: Any) -> bool:
    return bool(options.cache != "none")


def _has_refreshes(options: Any) -> bool:
    return _has_cache(options) or options.saliency is not None


def full_steps(options: Any) -> int:
    """Full steps that a block begins with."""
    return 1 + (options.delay if options.delay is not None else int(options.keep_ratio is not None))


MECHANISM = Mechanism(
    "block-cache",
    "Fast-dLLM, arXiv 2505.22618",
    options=(
        Option(
            "cache",
            "none",
            meaning="rows computed between two refreshes",
        ),
        Option(
            "block_length",
            None,
            **count("32, or None"),
            meaning="tokens of a block of the sampling loop, at least 1; ``None`` takes the response as one block",
            synonyms=("block_size",),
            read=_has_cache,
            beside="cache, such as cache='dual',",
        ),
        Option(
            "refresh_interval",
            None,
            **count("8, or None"),
            meaning="steps between full steps inside a block, at least 1; ``None`` for none. Beside a "
            "``prompt_interval`` they are of the response alone until the prompt is due",
            synonyms=("cache_reloading_step", "cache_steps", "prompt_update"),
            read=_has_refreshes,
            beside="cache or saliency_threshold",
        ),
        Option(
            "delay",
            None,
            **count("1", 0),
            meaning="full steps of a block before the one whose keys are kept, at least 0; ``None`` for 1 with "
            "``keep_ratio``, else 0",
            read=_has_refreshes,
            beside="cache or saliency_threshold",
        ),
    ),
    switches=("cache",),
    neutral={"cache": "dual", "refresh_interval": 1},
    rules=(
        RowRule("prefix", block_to_end, "the active block and all behind it", in_blocks=True),
        RowRule("dual", block, "the active block", in_blocks=True),
    ),
    methods={"fast-dllm": {"cache": "prefix"}},
    presets={
        "fast-dllm": {"method": "fast-dllm", "cache": "prefix", "block_length": 32},
        "fast-dllm/dual": {"method": "fast-dllm", "cache": "dual", "block_length": 32},
    },
)
"""The block length is that of the authors' scripts."""
