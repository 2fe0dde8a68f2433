"""Fast-dLLM's block caches as row sets and a schedule (arXiv 2505.22618, and its authors' code where the two differ).

The response is cut into blocks; the active one is the first that still holds masks. When it changes, one full step
refreshes all keys and values. The steps behind it carry the residual stream of the active rows alone:

    cache     active rows                  keys and values
    dual      the block                    fresh for the block, kept for the rest
    prefix    the block to the end         fresh from the block on, kept before it

The row before the block, which predicts its first token where logits are shifted, is computed but not written: the
keys and values that others see stay those of the full step.
"""

from __future__ import annotations

import torch

from dllm_compile.core.assignment import ACTIVE, KEYS, Assignment
from dllm_compile.core.blocks import Blocks
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
        self.blocks = Blocks(response, block_length)
        self.cache, self.interval, self.before = cache, refresh_interval, before
        self.age = torch.zeros(response.shape[0], 1, dtype=torch.int64)  # steps since the last full one

    def next(self, call: Call) -> Plan:
        """Rows of the call; a repeated one does not count."""
        self.blocks.next(call)
        block = self.blocks.active
        if self.cache == "prefix":
            block = block.long().cummax(1).values.bool()
        edited = (call.changed & ~block).any(1, keepdim=True)  # elsewhere, where the rows of the block would miss it
        due = self.blocks.moved | edited
        if not call.repeat:
            self.age += 1
            if self.interval is not None:
                due |= self.age >= self.interval
        self.age[due] = 0
        if bool((due | self.blocks.done).all()):
            return Plan(FULL)
        written = block | due
        return Plan(BLOCK, active=with_row_before(written) if self.before else written, written=written)
