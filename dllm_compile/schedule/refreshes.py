"""Which sequences of a batch compute every row in a call, and which all of their response."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dllm_compile.options import Options
from dllm_compile.passes.block_cache import full_steps
from dllm_compile.passes.feature_cache import due

NEVER = 2**62


class Refreshes:
    """The refreshes of the sequences of a batch.

    A sequence refreshes where a block begins, and ``delay`` steps more; where its last refresh is old, or the prompt is
    due; and in the first steps of a method with saliency. Where entries are evicted all sequences do so together, as
    the kept entries are of one step.

    Args:
        options: the intervals and steps.
        sequences: how many there are.

    Attributes:
        left: ``[B, 1]`` int64, full steps that are still to come.
    """

    def __init__(self, options: Options, sequences: int) -> None:
        self.options, self.salient = options, options.saliency is not None
        self.age = torch.zeros(sequences, 1, dtype=torch.int64)  # calls since the last refresh
        self.left = torch.zeros(sequences, 1, dtype=torch.int64)

    def next(
        self, number: int, reasons: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[str, ...]]:
        """Which sequences, ``[B, 1]`` bool, compute all rows, which others all of the response, and why.

        Args:
            number: calls since the sequences began, from 0.
            reasons: ``[B, 1]`` bool each, sequences that begin as at a block, by the reason.
        """
        options, together = self.options, self.options.keep_ratio is not None
        begins = torch.stack([*reasons.values()]).any(0)
        prompt = options.prompt_interval is not None and due(options.prompt_interval, number)
        response = options.response_interval is not None and due(options.response_interval, number)
        self.age = self.age + 1
        old = self.age >= (options.refresh_interval or NEVER)
        anew = begins | old
        if together and (prompt or response or bool(anew.any())):
            begins = anew = torch.ones_like(begins)
        self.age = self.age.masked_fill(anew, 0)
        self._at_least(1, anew | prompt)
        self._at_least(full_steps(options), begins)
        warm = self.salient and number < options.full_steps
        if warm:
            self._at_least(1 if number + 1 == options.full_steps else 2, torch.ones_like(begins))
        full = self.left > 0
        self.left = (self.left - 1).clamp(min=0)
        due_now = {"interval": old, "prompt": torch.full_like(old, prompt), "response": torch.full_like(old, response)}
        why = _first({**reasons, **due_now}, full | response)
        if options.prompt_interval is None or prompt or warm or together:
            return full, ~full & response, why
        return torch.zeros_like(full), full | response, why  # the prompt is kept for longer

    def begin_anew(self, rows: torch.Tensor) -> None:
        """Some sequences, ``[B]`` bool, are new ones."""
        if self.salient:
            self._at_least(self.options.full_steps, rows.unsqueeze(1))

    def _at_least(self, steps: int, where: torch.Tensor) -> None:
        self.left = torch.where(where, self.left.clamp(min=steps), self.left)


def _first(reasons: Mapping[str, torch.Tensor], refreshed: torch.Tensor) -> tuple[str, ...]:
    """Of each ``refreshed`` sequence the first of the ``reasons``, "steps" where none holds; ``[B, 1]`` bool each."""
    names = []
    for name, where in (*reasons.items(), ("steps", refreshed)) if bool(refreshed.any()) else ():
        if bool((refreshed & where).any()):
            names.append(name)
        refreshed = refreshed & ~where
    return tuple(names)
