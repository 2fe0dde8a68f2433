"""How many tokens a step frees and where: how far each sequence of the batch is, block by block.

Everything here is small and on the CPU. The sequences of a batch go on independently, each as it would alone.

Sources: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618) and its authors' code.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace

import torch

from dllm_compile.runtime.positions import sent

from .settings import Settings


@dataclass(frozen=True)
class Writable:
    """What one step may write.

    Attributes:
        candidates: ``[B, S]`` bool.
        count: ``[B]`` int64, how many of them; ``None`` leaves it to threshold, factor or share.
        most: the largest entry of ``count``, 1, or what :meth:`Progress.hold` holds it to.
        share: ``[B]`` float32, the probability of each candidate to be written (Dream's ``origin``).
        block: ``[B, S]`` bool, positions of the block that each sequence is at, for mechanisms that ask for it.
        waiting: ``[B, S]`` bool, masks of all blocks that are still to be filled, likewise.
    """

    candidates: torch.Tensor
    count: torch.Tensor | None = None
    most: int | None = None
    share: torch.Tensor | None = None
    block: torch.Tensor | None = None
    waiting: torch.Tensor | None = None

    def to(self, device: torch.device) -> Writable:
        """The same with its tensors on ``device``."""
        count = None if self.count is None else sent(self.count, device)
        share = None if self.share is None else sent(self.share, device)
        block = None if self.block is None else sent(self.block, device)
        waiting = None if self.waiting is None else sent(self.waiting, device)
        candidates = sent(self.candidates, device)
        return replace(self, candidates=candidates, count=count, share=share, block=block, waiting=waiting)


StepFunction = Callable[[torch.Tensor, Writable], "tuple[torch.Tensor, torch.Tensor | None]"]
"""Maps ids ``[B, S]`` and a writable on their device to new ids, and to positions ``[B, S]`` bool that mechanisms take
for the end of the response, if there are any that look for one."""


def quota(first: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    """LLaDA's counts ``[B]`` int64: equal parts of the ``first`` masks of a block, early steps take the remainder."""
    return (first // steps + (step < first % steps).long()) * (step < steps).long()


def fraction(step: torch.Tensor, steps: int, eps: float) -> torch.Tensor:
    """Dream's share ``[B]`` float32 of the masks: ``1 - s / t`` on ``linspace(1, eps)``; 1 last, 0 after that."""
    times = torch.linspace(1, eps, steps + 1)
    part = 1 - times[1:] / times[:-1]
    part[-1] = 1
    return torch.cat([part, torch.zeros(1)])[step.clamp(max=steps)]


def capped(first: torch.Tensor, left: torch.Tensor, step: torch.Tensor, steps: int) -> torch.Tensor:
    """Counts ``[B]`` int64 of Fast-dLLM's Dream without blocks: equal parts, plus the tokens that earlier steps did not
    write.
    """
    return torch.minimum(first // steps * (step + 1), first) - (first - left)


class Progress:
    """Where each sequence of a batch stands.

    Args:
        settings: of the generation.
        shape: ``(B, S)``, sequences and tokens of prompt and response.
        shift: whether the model is shifted: Dream's schedule by time, else LLaDA's quota, unless the settings say so.
        cached: whether later passes of a block run on its cache (matters to ``as_published`` alone).

    With ``as_published`` come the habits of Fast-dLLM's code: Dream's blocks begin with a pass that frees their first
    position alone and is step 0 of the schedule; a block is not checked before its second pass, but without a cache
    in LLaDA; Dream with a threshold and no blocks has a quota as a cap.
    """

    def __init__(self, settings: Settings, shape: tuple[int, ...], *, shift: bool, cached: bool = False) -> None:
        batch, tokens = shape
        self.settings, self.shift, self.prompt = settings, shift, tokens - settings.gen_length
        self.blocks = settings.blocks
        self.length = settings.gen_length // self.blocks
        self.steps = max((settings.steps or settings.gen_length) // self.blocks, 1)
        self.position = torch.arange(tokens)
        self.block, self.step, self.first = torch.zeros(3, batch, dtype=torch.int64)
        self.most = 1
        self.response: torch.Tensor | None = None  # what was masked at the first step
        self.end = torch.full_like(self.block, tokens)  # of each response, where it was found to end
        self.timed = shift if settings.schedule is None else settings.schedule == "time"
        published, blocked = settings.as_published, settings.block_length is not None
        self.leads = published and shift and blocked
        self.least = 2 if self.leads or (published and cached and not shift) else 1
        self.caps = published and shift and not blocked and settings.threshold is not None

    def writable(self, masked: torch.Tensor) -> Writable | None:
        """What the next step may write; ``None`` when all sequences are done.

        Args:
            masked: ``[B, S]`` bool on the CPU, what is masked before the step.
        """
        self.response = masked.clone() if self.response is None else self.response
        masked = masked & self.inside()
        left = self._advance(masked)
        live = self.block < self.blocks
        if not live.any():
            return None
        candidates = masked & self._reach() & live.unsqueeze(1)
        if self.settings.block is not None:
            candidates &= self.settings.block(masked, self.response, self.settings.block_length)
        if self.leads:
            candidates &= (self.step > 0).unsqueeze(1) | (self.position == self._start().unsqueeze(1))
        writable = self._count(candidates, left)
        if self.settings.asks:
            start = self.prompt + self.block * self.length
            block = self._reach() & (self.position >= start.unsqueeze(1))
            if self.settings.block is not None:
                block = self.settings.block(masked, self.response, self.settings.block_length)
            writable = replace(writable, block=block, waiting=masked)
        self.step = self.step + live.long()
        return writable

    def hold(self, masked: torch.Tensor) -> None:
        """Hold ``most`` at its largest from the first step on: a compiled step is then compiled once.

        Args:
            masked: ``[B, S]`` bool on the CPU, what is masked at the start.
        """
        trial, masked = copy(self), masked.clone()
        while (writable := trial.writable(masked)) is not None and writable.count is not None:
            self.most = max(self.most, int(writable.count.max()))
            masked &= ~writable.candidates | (writable.candidates.cumsum(1) > writable.count.unsqueeze(1))

    def _count(self, candidates: torch.Tensor, left: torch.Tensor) -> Writable:
        settings, waiting = self.settings, candidates.sum(1)
        step, planned = self.step, waiting if settings.block is None else left
        if settings.block is not None:
            step = step.clamp(max=self.steps - 1)  # where the block held fewer than were due, the last step is repeated
        if self.caps:
            count = capped(self.first, left, self.step, self.steps)
        elif settings.parallel:
            return Writable(candidates)
        elif self.timed or settings.remasking == "origin":
            share = fraction(step, self.steps, settings.eps)
            if settings.remasking == "origin":
                return Writable(candidates, share=share)
            count = (planned.float() * share).long()
        elif settings.block is not None:
            count = torch.where(self.step < self.steps, quota(self.first, step, self.steps), left)
        else:
            count = quota(self.first, step, self.steps)
        if self.leads:
            count = torch.where(self.step == 0, 1, count)
        if settings.skips:  # what was held back until the last step
            count = torch.where(self.step < self.steps, count, self.most)
        count = torch.minimum(count, waiting)
        return Writable(candidates, count, max(int(count.max()), self.most))

    def _advance(self, masked: torch.Tensor) -> torch.Tensor:
        """Move sequences past the blocks they are done with; masks ``[B]`` left in the blocks they are in."""
        while True:
            left = (masked & self._reach() & (self.position >= self._start().unsqueeze(1))).sum(1)
            self.first = torch.where(self.step == 0, left, self.first)
            if self.settings.holds_back or self.settings.block is not None:
                limit = torch.full_like(left, torch.iinfo(left.dtype).max)  # a step may write nothing; see ``decode``
            elif self.caps:
                limit = self.steps + self.first
            elif self.settings.parallel:
                limit = self.first.clamp(min=self.least)
            else:
                limit = torch.full_like(left, self.steps + int(self.leads)).clamp(min=self.least)
            tried = self.step >= self.least
            over = ((left == 0) & (tried | (self.step == 0))) | (tried & (self.step >= limit))
            over &= self.block < self.blocks
            if not over.any():
                return left
            self.block = self.block + over.long()
            self.step = self.step.masked_fill(over, 0)

    def inside(self) -> torch.Tensor:
        """Positions ``[B, S]`` bool before the end of each response."""
        return self.position < self.end.unsqueeze(1)

    def cut(self, ends: torch.Tensor | None) -> None:
        """End each response whose block has just begun with the block of the first of its ``ends``.

        Args:
            ends: ``[B, S]`` bool, as of the step behind the last :meth:`writable`; ``None`` where none are looked for.
        """
        if ends is None:
            return
        ends = ends.to(self.position.device)
        first = torch.where(ends, self.position, self.end.max()).amin(1)
        last = (first - self.prompt).div(self.length, rounding_mode="floor").clamp(min=0)
        found = ends.any(1) & (self.step == 1)  # its first step was counted
        end = torch.minimum(self.prompt + (last + 1) * self.length, self.end)
        self.end = torch.where(found, end, self.end)

    def _start(self) -> torch.Tensor:
        """First position ``[B]`` of each block; masks inside a prompt belong to the first block."""
        start = self.prompt + self.block * self.length
        return start if self.leads else torch.where(self.block == 0, 0, start)

    def _reach(self) -> torch.Tensor:
        """Positions ``[B, S]`` that a step may write: all before the end of the block, or the block alone."""
        end = self.prompt + (self.block + 1) * self.length
        inside: torch.Tensor = self.position < end.unsqueeze(1)
        if self.leads:
            inside &= self.position >= self._start().unsqueeze(1)
        return inside
