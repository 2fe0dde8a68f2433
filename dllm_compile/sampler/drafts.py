"""Several steps of a loop from one call of the model: the next ids are guessed, and looked at together.

Source: FreeDave (arXiv 2510.00294, and its authors' code). From the logits of one state the loop is played on for
``count`` steps as if these logits stayed as they are. The states that it comes to are the drafts: one call of the model
makes the logits of all of them. The loop itself then goes on from one draft to the next for as long as they are the
states that it comes to by the logits of each; where it comes to another one, drafts are made anew. Its ids are those
of one call a state, token by token.

Of a block whose keys outside are kept, drafts share what is kept: a call computes the rows of the block of each.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from copy import copy
from typing import Any

import torch

from dllm_compile.declared import NoDrafts, drafting, exact_calls
from dllm_compile.interface.mechanism import Mechanism
from dllm_compile.mechanisms import rule_of, turned_on
from dllm_compile.options import Options

from .progress import Progress, Writable
from .rules import written
from .settings import Settings

Proposals = tuple[torch.Tensor, torch.Tensor]
"""The token proposed for each position, ``[N, S]`` int64, and how sure one is of it, ``[N, S]`` floating."""


class Drafts:
    """A step of the loop that calls the model only where the logits of a state are not known yet.

    Args:
        propose: maps ids ``[N, S]`` to :data:`Proposals`, by one call of the model.
        settings: how to sample, at temperature 0.
        progress: of the loop, one sequence.
        mask_id: the mask token.
        shared: whether what is kept of the sequence serves its drafts; else a call computes all rows of each.

    Attributes:
        forwards: calls of the model so far.
    """

    def __init__(
        self,
        propose: Callable[[torch.Tensor], Proposals],
        settings: Settings,
        progress: Progress,
        mask_id: int,
        shared: bool,
    ) -> None:
        assert settings.drafts is not None
        self.propose, self.settings, self.progress = propose, settings, progress
        self.mask_id, self.count, self.shared = mask_id, settings.drafts, shared
        self.forwards = 0
        self.block = -1  # that the last state was in
        self.states = torch.empty(0)  # ids [N, S] whose proposals are known
        self.known: Proposals = torch.empty(0), torch.empty(0)
        self.last: Proposals | None = None  # of the state before this one

    def __call__(self, x: torch.Tensor, writable: Writable) -> tuple[torch.Tensor, None]:
        """The next ids ``[1, S]``; no mechanism looks for an end."""
        at = self._place(x)
        if at is None:
            self.states, self.known = self._looked_at(x, writable)
            self.forwards += 1
            at = 0
        token, sure = self.known
        self.last, self.block = (token[at : at + 1], sure[at : at + 1]), int(self.progress.block)
        return self._write(x, writable, *self.last), None

    def _looked_at(self, x: torch.Tensor, writable: Writable) -> tuple[torch.Tensor, Proposals]:
        """Call the model on ``x`` and its drafts, or on ``x`` alone where no kept rows serve drafts; returns the states
        and their proposals.
        """
        states = self._drafts(x, writable)
        if not self.shared:
            with exact_calls():
                return states, self.propose(states)
        if len(states) > 1:
            try:
                with drafting():
                    return states, self.propose(states)
            except NoDrafts as why:
                warnings.warn(f"dllm: {why}: from here on a call looks at one state", stacklevel=2)
                self.count = 1
        return x, self.propose(x)

    def _place(self, x: torch.Tensor) -> int | None:
        """The number of ``x`` among the states whose proposals are known; ``None`` where it is none of them."""
        if self.states.shape[1:] != x.shape[1:] or self._moves(self.progress):
            return None
        found = (self.states == x).all(1)
        return int(found.long().argmax()) if bool(found.any()) else None

    def _moves(self, progress: Progress) -> bool:
        """Whether another block begins, whose first step computes every row."""
        return int(progress.block) != self.block

    def _drafts(self, x: torch.Tensor, writable: Writable) -> torch.Tensor:
        """``x`` and what the loop would come to from there by the proposals of the state before, ``[N, S]``."""
        states, trial = [x], copy(self.progress)
        while self.last is not None and not self._moves(trial) and len(states) < self.count:
            new = self._write(states[-1], writable, *self.last)
            ahead = trial.writable((new == self.mask_id).cpu())
            if ahead is None or self._moves(trial) or torch.equal(new, states[-1]):
                break
            states.append(new)
            writable = ahead.to(x.device)
        return torch.cat(states)

    def _write(self, x: torch.Tensor, writable: Writable, token: torch.Tensor, sure: torch.Tensor) -> torch.Tensor:
        how = self.settings
        counted = writable.count, writable.most, how.threshold, how.factor
        masked = x == self.mask_id if writable.waiting is None else writable.waiting
        rules: dict[str, Any] = {"rule": how.rule, "block": writable.block}
        rules |= {"allowed": how.allowed.rule} if how.allowed is not None else {}
        rules |= {"moved": how.moved.bound} if how.moved is not None else {}
        return torch.where(written(sure, writable.candidates, masked, *counted, **rules), token, x)


def check(settings: Settings, options: dict[str, Any], sequences: int, shift: bool) -> bool:
    """Refuse settings that drafts cannot repeat; returns whether drafts share the kept rows of the sequence.

    Raises:
        ValueError: several sequences, chance, guidance, or steps that depend on more than the tokens of a block.
    """
    if sequences != 1:
        raise ValueError(f"drafts are of one sequence, and there are {sequences}; leave drafts out, or split the batch")
    if settings.temperature or settings.cfg_scale or settings.draws_rows(shift) or settings.remasking == "random":
        raise ValueError("drafts repeat what is sure, at temperature 0 and without guidance; leave drafts out")
    if not options:
        return False
    backend = Options.of(options)
    others = [each.name for each in turned_on(backend) if each.name not in ALONE and not _only_chooses(each)]
    intervals = ("refresh_interval", "prompt_interval", "response_interval", "delay", "warmup_steps")
    others += [name for name in intervals if getattr(backend, name)]
    rule = rule_of(backend.cache)
    keeps = backend.cache != "none"
    if others or (keeps and (not rule.in_blocks or rule.through_blocks)):
        what = " and ".join(others) or f"cache={backend.cache!r}"
        raise ValueError(
            f"drafts need steps that depend on the tokens of the block alone, and so no {what}; give cache='dual' or "
            "'prefix' with a block_length, or leave drafts out"
        )
    return keeps


OTHERS = ("block", "widens", "narrows", "refresh", "visible", "salient", "skips", "present", "ends")
"""What a mechanism may say beside which tokens are written."""
ALONE = ("block-cache", "vicinity")
"""Mechanisms whose steps inside of a block depend on its tokens alone."""


def _only_chooses(mechanism: Mechanism) -> bool:
    """Whether a mechanism only decides which tokens are written."""
    chooses = [getattr(mechanism, name) for name in ("unmask", "candidates", "threshold")]
    others = [getattr(mechanism, name) for name in OTHERS]
    return chooses != [None] * 3 and not mechanism.rules and others == [None] * len(others)
