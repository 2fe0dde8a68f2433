"""Sparse-dLLM as row sets and a schedule (arXiv 2508.02558, and its authors' code where the two differ).

A block begins with full steps. The last of these, ``delay`` steps in, chooses in each layer the share of the entries
outside of the block that its queries look at most; only these are kept. The steps behind it carry the residual stream
of the block alone, whose queries read the kept entries and the block's own fresh ones:

    step of the block    variant    rows      keys
    before ``delay``     full       all       all, none kept
    ``delay``            evict      all       all; the best are kept
    behind it            sparse     block     kept, and fresh

The row before the block, which predicts its first token where logits are shifted, is computed, and nobody reads its
fresh key. All sequences of a batch are at the same step: a new block of one begins anew for all.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dllm_compile.core.assignment import ACTIVE, KEYED, NOTHING, Assignment
from dllm_compile.core.blocks import Blocks
from dllm_compile.core.plan import Call, Plan, with_row_before

FULL = Assignment("full", keep=NOTHING)
SPARSE = Assignment("sparse", ACTIVE, ACTIVE, ACTIVE, enter=ACTIVE, leave=ACTIVE, keep=NOTHING, keys=KEYED)


class Eviction:
    """The schedule of one sequence.

    Args:
        response: ``[B, S]`` bool, the rows of the response.
        keep_ratio, kernel_size: see :func:`dllm_compile.kernels.kept_entries.kept_entries`.
        block_length: tokens of a block; ``None`` takes the whole response as one.
        delay: full steps of a block before the one that chooses.
        before: whether a sampler may read the row before a block.
    """

    first: Assignment | None = None

    def __init__(
        self,
        response: torch.Tensor,
        keep_ratio: float,
        kernel_size: int | None,
        block_length: int | None,
        delay: int,
        before: bool,
    ) -> None:
        self.blocks = Blocks(response, block_length)
        self.ratio, self.delay, self.before = keep_ratio, delay, before
        self.evict = Assignment("evict", keep=NOTHING, evict=(keep_ratio, kernel_size))
        self.variants: tuple[Assignment, ...] = (FULL, self.evict, SPARSE)
        self.step = self.kept = 0

    def next(self, call: Call) -> Plan:
        """Rows of the call; repeated ones count, since the kept entries replace the others at a fixed step."""
        self.blocks.next(call)
        block = self.blocks.active
        self.step += 1
        edited = (call.changed & ~block).any(1, keepdim=True)
        if bool(((self.blocks.moved | edited) & ~self.blocks.done).any()):
            self.step = 0
        if self.step < self.delay:
            return Plan(FULL)
        if self.step == self.delay:
            self.kept = int((~block).sum(1).max() * self.ratio)
            return Plan(self.evict, block=block, kept=self.kept, same=False)
        active = with_row_before(block) if self.before else block
        gaps = bool((active != block).any()) or len(set(block.sum(1).tolist())) > 1 or block.shape[0] > 1
        sparse = replace(SPARSE, gaps=gaps)
        return Plan(sparse, active=active, written=block, kept=self.kept, same=self.step > self.delay + 1)
