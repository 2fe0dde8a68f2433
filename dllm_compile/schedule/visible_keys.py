"""Steps whose attention reads the keys that mechanisms say are visible, and no others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import torch

from dllm_compile.core.assignment import Assignment
from dllm_compile.interface.mechanism import Facts, Mechanism, asked
from dllm_compile.interface.plan import AfterLayer, Call, Plan, Schedule, Skipping
from dllm_compile.options import Options

from .blocks import blocks_of


@cache
def _hiding(assignment: Assignment) -> Assignment:
    return replace(assignment, hides=True)


def _reads_every(active: torch.Tensor | None, visible: torch.Tensor) -> bool:
    """Whether all active rows are visible, as many, and more than one, of each sequence: then no index has gaps."""
    assert active is not None
    counts = active.sum(1)
    return not bool((active & ~visible).any()) and bool((counts == counts[0]).all()) and int(counts[0]) > 1


class VisibleKeys:
    """Another schedule's steps, with fewer keys.

    Args:
        steps: the schedule that says which rows are computed.
        mechanisms: whose ``visible`` keys intersect, with the rows that ``steps`` says are there.
        options: what the user chose.
        response: ``[B, S]`` bool, the rows of the response.
    """

    def __init__(
        self, steps: Schedule, mechanisms: Sequence[Mechanism], options: Options, response: torch.Tensor
    ) -> None:
        self.steps, self.names, self.options = steps, tuple(each.name for each in mechanisms), options
        self.functions = tuple((each.name, each.visible) for each in mechanisms if each.visible is not None)
        alone = (each for each in steps.variants if each.alone)
        self.variants: tuple[Assignment, ...] = (*map(_hiding, steps.variants), *alone)
        self.first: Assignment | None = _hiding(steps.first) if steps.first is not None else None
        self.after_layer: AfterLayer | None = steps.after_layer
        self.skips: Skipping | None = steps.skips
        self.response, self.since = response, torch.zeros_like(response)
        self.blocks = blocks_of(options, response)
        self.before: torch.Tensor | None = None  # the visible keys of the last call

    def next(self, call: Call) -> Plan:
        """Rows and keys of the call."""
        self.blocks.next(call)
        self.since = self.since | (call.filled & (call.number > 0))
        facts = Facts(call, self.blocks, self.response, self.since, self.options)
        visible = torch.ones_like(call.masked)
        for name, function in self.functions:
            visible = visible & asked(f"the mechanism {name!r} says visible keys", function, facts, visible)
        plan = self.steps.next(call)
        visible = visible if plan.visible is None else visible & plan.visible
        if not bool(visible.any(1).all()):
            lost = (~visible.any(1)).nonzero().flatten().tolist()
            who = "the mechanism" if len(self.names) == 1 else "the mechanisms"
            hides = "hides" if len(self.names) == 1 else "together hide"
            names = " and ".join(map(repr, self.names))
            raise ValueError(f"{who} {names} {hides} every key of the sequences {lost}; leave at least one visible")
        if plan.active is None or plan.assignment.alone:
            self.since = torch.zeros_like(self.since)
        same = plan.same and self.before is not None and torch.equal(visible, self.before)
        self.before = visible
        shown = plan.assignment.alone and _reads_every(plan.active, visible)
        return replace(
            plan, assignment=plan.assignment if shown else _hiding(plan.assignment), visible=visible, same=same
        )

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """As the schedule whose steps these are."""
        self.response, self.before = response, None
        self.blocks.begin_anew(rows, response)
        self.since = self.since & ~rows.unsqueeze(1)
        return self.steps.begin_anew(rows, response)
