"""Which rows a step recomputes between two refreshes: block caches as row sets.

    cache       active rows                         keys and values                      source
    dual        the block                           fresh for the block, else kept       Fast-dLLM, arXiv 2505.22618
    prefix      the block to the end                fresh from the block on, else kept   Fast-dLLM
    decoded     masked ones and those just filled   fresh for those, else kept           dKV-Cache, arXiv 2505.15781
    greedy      those just filled and filled next   fresh for those, else kept           dKV-Cache
    none        the response                        fresh for it, kept for the prompt

and, where the two differ, the code of their authors. The steps between two refreshes carry the residual stream of the
active rows alone. Unless samplers are known to read the row of a token itself, the row before one of these is computed
too. It leaves nothing behind: what others see of it is as old as if it had not been computed.
"""

from __future__ import annotations

import torch

from dllm_compile.core.assignment import ACTIVE, KEYS, Assignment
from dllm_compile.core.blocks import Blocks
from dllm_compile.core.plan import Call, rows_before

FULL = Assignment("full", keep=KEYS)
BLOCK = Assignment("block", ACTIVE, ACTIVE, ACTIVE, enter=ACTIVE, leave=ACTIVE, keep=KEYS)


def recomputed(
    cache: str, blocks: Blocks, response: torch.Tensor, call: Call, shift: bool | None = False, window: int = 0
) -> torch.Tensor:
    """Rows ``[B, S]`` bool that a step between two refreshes computes.

    Args:
        cache: ``"dual"``, ``"prefix"``, ``"decoded"``, ``"greedy"`` or ``"none"``.
        blocks: where the sequences are.
        response: ``[B, S]`` bool, the rows of the response.
        call: what happened.
        shift: of ``"decoded"``: whether a row is done with when the token behind it is known, as its logits are of that
            one; else when its own is.
        window: of ``"greedy"``: masked rows around each that is filled next.
    """
    if cache == "dual":
        return blocks.active
    if cache == "prefix":
        return blocks.active.long().cummax(1).values.bool()
    if cache == "none":
        return response
    if cache == "greedy":
        told = call.filling
        return call.filled | (call.masked if told is None else told | around(told, call.masked, window))
    unknown = call.masked | (call.filled & (call.number > 0))  # what was filled since the call before: once more
    if not shift:
        return unknown
    last = torch.arange(unknown.shape[1]) == unknown.shape[1] - 1  # predicts no token; computed twice by its authors
    return rows_before(unknown) | (last & (call.number == 1))


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
