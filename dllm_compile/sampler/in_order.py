"""A random order that is drawn when a block begins, so that a call can be told what will be filled from it.

Source: dKV-Cache-Greedy (arXiv 2505.15781), which computes those rows and few others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dllm_compile.declared import filling, reading
from dllm_compile.mechanisms import rule_of
from dllm_compile.options import Options

from .progress import StepFunction, Writable
from .rules import chosen
from .settings import Settings


class InOrder:
    """A step whose candidates are narrowed beforehand to those it fills.

    Args:
        step: writes all of its candidates.
        uniform: draws numbers of a shape; the largest of a block go first.
    """

    def __init__(self, step: StepFunction, uniform: Callable[[torch.Size], torch.Tensor]) -> None:
        self.step, self.uniform = step, uniform
        self.open: torch.Tensor | None = None  # candidates of the last writable: within a block they only grow fewer
        self.draws = torch.empty(0)

    def __call__(self, x: torch.Tensor, writable: Writable) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the model and write."""
        new = writable.candidates if self.open is None else writable.candidates & ~self.open
        begins = new.any(1, keepdim=True)
        if bool(begins.any()):
            drawn = self.uniform(x.shape)
            self.draws = drawn if self.open is None else torch.where(begins, drawn, self.draws)
        self.open = writable.candidates
        rows = chosen(self.draws, writable.candidates, writable.count, writable.most)
        with filling(rows), reading(rows):
            return self.step(x, replace(writable, candidates=rows))


def any_order(settings: Settings, options: dict[str, Any]) -> Settings | None:
    """Settings of the step within :class:`InOrder`; ``None`` where the cache need not be told what is filled.

    Raises:
        ValueError: it needs to, and confidence decides that after the call.
    """
    cache = Options.of(options).cache if options else "none"
    if not rule_of(cache).needs_hint:
        return None
    if settings.remasking != "random" or settings.parallel:
        raise ValueError(
            f"cache={cache!r} computes the rows that are filled next, and confidence is known too late for that; "
            "give remasking='random' without a threshold or factor, or cache='decoded'"
        )
    return replace(settings, remasking="low_confidence")
