"""Which rows a step recomputes between two refreshes: block caches as row sets.

    cache       active rows                         keys and values                      source
    dual        the block                           fresh for the block, else kept       Fast-dLLM, arXiv 2505.22618
    prefix      the block to the end                fresh from the block on, else kept   Fast-dLLM
    decoded     masked ones and those just filled   fresh for those, else kept           dKV-Cache, arXiv 2505.15781
    none        the response                        fresh for it, kept for the prompt

and, where the two differ, the code of their authors. The steps between two refreshes carry the residual stream of the
active rows alone. The row before a block, which predicts its first token where logits are shifted, is computed but not
written: the keys and values that others see stay those of the full step.
"""

from __future__ import annotations

import torch

from dllm_compile.core.assignment import ACTIVE, KEYS, Assignment
from dllm_compile.core.blocks import Blocks
from dllm_compile.core.plan import Call, rows_before, with_row_before

FULL = Assignment("full", keep=KEYS)
BLOCK = Assignment("block", ACTIVE, ACTIVE, ACTIVE, enter=ACTIVE, leave=ACTIVE, keep=KEYS)


def recomputed(
    cache: str, blocks: Blocks, response: torch.Tensor, call: Call, shift: bool | None = False
) -> torch.Tensor:
    """Rows ``[B, S]`` bool that a step between two refreshes computes.

    Args:
        cache: ``"dual"``, ``"prefix"``, ``"decoded"`` or ``"none"``.
        blocks: where the sequences are.
        response: ``[B, S]`` bool, the rows of the response.
        call: what happened.
        shift: of ``"decoded"``: whether a row is done with when the token behind it is known, as its logits are of that
            one; ``None`` for both that and its own.
    """
    if cache == "dual":
        return blocks.active
    if cache == "prefix":
        return blocks.active.long().cummax(1).values.bool()
    if cache == "none":
        return response
    unknown = call.masked | call.filled  # at the call before: what was filled is computed once more
    if not shift:
        return unknown if shift is False else with_row_before(unknown)
    last = torch.arange(unknown.shape[1]) == unknown.shape[1] - 1  # predicts no token; computed twice by its authors
    return rows_before(unknown) | (last & (call.number == 1))
