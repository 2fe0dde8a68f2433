"""Fast-dLLM's block caches as row sets and a schedule (arXiv 2505.22618, and its authors' code where the two differ).

The response is cut into blocks; the active one is the first that still holds masks. When it changes, one full step
refreshes all keys and values. The steps behind it carry the residual stream of the active rows alone:

    cache     active rows                  keys and values
    dual      the block                    fresh for the block, kept for the rest
    prefix    the block to the end         fresh from the block on, kept before it

The row before the block, which predicts its first token where logits are shifted, is computed but not written: the
keys and values that others see stay those of the full step.

A loop that fills a token outside of the active block has no blocks. It would be handed logits of the last full step
for the rows it may choose from, so from then on the whole response counts as one block.
"""

from __future__ import annotations

import warnings

import torch

from dllm_compile.core.assignment import ACTIVE, KEYS, Assignment
from dllm_compile.core.plan import Call, Plan, with_row_before

FULL = Assignment("full", keep=KEYS)
BLOCK = Assignment("block", ACTIVE, ACTIVE, ACTIVE, enter=ACTIVE, leave=ACTIVE, keep=KEYS)


class BlockCache:
    """The schedule of one sequence.

    Args:
        response: ``[B, S]`` bool, the rows of the response.
        cache: ``"dual"`` or ``"prefix"``.
        block_length: tokens of a block; ``None`` takes the whole response as one.
        refresh_interval: steps between full steps inside a block; ``None`` for none, 1 for always.
        before: whether a sampler may read the row before a block.
    """

    variants: tuple[Assignment, ...] = (FULL, BLOCK)
    first: Assignment | None = None

    def __init__(
        self, response: torch.Tensor, cache: str, block_length: int | None, refresh_interval: int | None, before: bool
    ) -> None:
        self.response, self.cache, self.interval, self.before = response, cache, refresh_interval, before
        self.length = block_length
        rank = response.cumsum(1) - 1
        self.block = torch.where(response, rank // (block_length or response.shape[1]), -1)
        self.at = torch.full((response.shape[0], 1), -1)  # block of each sequence
        self.age = torch.zeros_like(self.at)  # steps of each sequence since its last full one

    def next(self, call: Call) -> Plan:
        """Rows of the call; a repeated one does not count."""
        if call.number and bool((call.filled & self.response & (self.block != self.at)).any()):
            self._without_blocks()
        ahead = torch.where(call.masked & self.response, self.block, self.block.max() + 1).amin(1, keepdim=True)
        at = torch.where(ahead > self.block.max(), self.at, ahead)  # a finished sequence stays where it is
        block = (self.block == at) & self.response  # a sequence without a response is at no block
        if self.cache == "prefix":
            block = block.long().cummax(1).values.bool()
        edited = (call.changed & ~block).any(1, keepdim=True)  # elsewhere, where the rows of the block would miss it
        due = (at != self.at) | edited
        if not call.repeat:
            self.age += 1
            if self.interval is not None:
                due |= self.age >= self.interval
        self.at = at
        self.age[due] = 0
        if bool((due | (ahead > self.block.max())).all()):
            return Plan(FULL)
        written = block | due
        return Plan(BLOCK, active=with_row_before(written) if self.before else written, written=written)

    def _without_blocks(self) -> None:
        """The loop fills tokens of any block: keep all of the response alive."""
        warnings.warn(
            f"dllm: a token outside of the active block of {self.length} was filled, so this loop has no such blocks; "
            "the whole response is recomputed from here on. Give the loop's block_length, or use method='dllm-cache'",
            stacklevel=2,
        )
        self.length = None
        self.block = torch.where(self.response, 0, -1)
        self.at = torch.full_like(self.at, -1)
