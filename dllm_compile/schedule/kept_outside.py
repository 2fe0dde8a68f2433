"""A schedule whose steps keep attention over the keys outside: those that partial steps do not compute."""

from __future__ import annotations

from dataclasses import replace

import torch

from dllm_compile.core.assignment import Assignment
from dllm_compile.core.rows import ALL
from dllm_compile.interface.plan import AfterLayer, Call, Plan, Schedule, Skipping
from dllm_compile.passes.flashblock import inside, renewing


class KeptOutside:
    """Another schedule's steps. The first one behind a refresh computes attention over the keys outside, and keeps it.

    A sequence computes it anew where anything that it depends on may have changed: the keys outside (behind a refresh),
    which keys these are, which of them are visible, and the rows that attend.

    Args:
        steps: the schedule that says which rows are computed.
        interval: partial steps between two that compute it, at least 1; ``None`` for as many as there are.
        response: ``[B, S]`` bool, the rows of the response.
    """

    def __init__(self, steps: Schedule, interval: int | None, response: torch.Tensor) -> None:
        self.steps, self.interval = steps, interval
        self.variants: tuple[Assignment, ...] = (
            *steps.variants,
            *(
                made(each)
                for each in steps.variants
                if each.query != ALL and not each.alone
                for made in (renewing, inside)
            ),
        )
        self.first: Assignment | None = steps.first
        self.after_layer: AfterLayer | None = steps.after_layer
        self.skips: Skipping | None = steps.skips
        none = torch.zeros_like(response)
        self.rows, self.inner, self.outer = none, none, none  # that attend; computed keys; visible keys outside
        self.age = torch.zeros(len(response), 1, dtype=torch.int64)  # partial steps since it was computed

    def next(self, call: Call) -> Plan:
        """The plan of a call, and which sequences compute attention over the keys outside anew."""
        plan = self.steps.next(call)
        if plan.active is None or plan.written is None or plan.refreshed is None:
            self.rows = torch.zeros_like(self.rows)
            return plan
        if call.repeat and plan.same:
            return plan  # served from what the last call gave
        held = plan.active & ~plan.refreshed
        outer = ~plan.written if plan.visible is None else ~plan.written & plan.visible
        now, before = (held, plan.written, outer), (self.rows, self.inner, self.outer)
        same = torch.stack([(a == b).all(1) for a, b in zip(now, before, strict=True)]).all(0).unsqueeze(1)
        self.age = self.age + 1
        renew = ~plan.refreshed & ~(same & (self.age < (self.interval or self.age + 1)))
        self.age = self.age.masked_fill(renew, 0)
        self.rows, self.inner, self.outer = now
        if bool(plan.refreshed.all()):
            return plan
        made = renewing if bool((renew | plan.refreshed).any()) else inside
        same_result = plan.same and made is inside
        return replace(plan, assignment=made(plan.assignment), held=held, renew=renew, same=same_result)

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """As the schedule whose steps these are."""
        self.rows = self.rows & ~rows.unsqueeze(1)
        return self.steps.begin_anew(rows, response)
