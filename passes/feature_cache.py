"""dLLM-Cache as row sets and a schedule (arXiv 2506.06295, and its authors' code where the two differ).

Per layer the keys, values, attention-branch and MLP-branch rows are kept. A step refreshes the prompt, the response,
both or neither; when the response is not due, the rows whose values turned most are. The residual stream is never
cached, and the first layer is always full.

    variant          query, key, branches    value       when (step s counted from 0)
    full             all                     all         prompt and response due
    response         response                response    response due
    prompt+select    prompt and selected     all         prompt due
    select           selected                response    neither due
"""

from __future__ import annotations

import torch

from dllm_compile.core.assignment import NOTHING, PROMPT, PROMPT_SELECTED, RESPONSE, SELECTED, Assignment
from dllm_compile.core.plan import Call, Plan, with_row_before
from dllm_compile.core.rows import NONE

FULL = Assignment("full")
FIRST = Assignment("full", keep=NOTHING)  # the first layer: always computed, so never kept
KEEP = Assignment("keep", NONE, NONE, NONE)  # a share of 0: nothing between two refreshes

_VARIANTS = (
    FULL,
    Assignment("response", RESPONSE, RESPONSE, RESPONSE),
    Assignment("select", SELECTED, SELECTED, RESPONSE, pick=True),
    Assignment("prompt+select", PROMPT_SELECTED, PROMPT_SELECTED, pick=True),
    Assignment("values", NONE, NONE, RESPONSE),  # a share that rounds to no row still replaces the values
    Assignment("prompt+values", PROMPT, PROMPT),
    KEEP,
    Assignment("prompt", PROMPT, PROMPT, PROMPT),
)
VARIANTS = {variant.name: variant for variant in _VARIANTS}


def due(interval: int, step: int) -> bool:
    """Whether something refreshed every ``interval`` steps is due at ``step`` (from 0); -1 means always."""
    return interval == -1 or step % interval == 0


def variant(step: int, prompt_interval: int, response_interval: int, selected: int | None) -> Assignment:
    """Rows that layers behind the first compute at ``step``; the first layer is always ``full``.

    Args:
        step: forward calls since the sequence began, from 0.
        prompt_interval, response_interval: steps between refreshes, at least 1, or -1 for every step.
        selected: rows picked when the response is not due; ``None`` for a transfer ratio of 0.
    """
    prompt, response = due(prompt_interval, step), due(response_interval, step)
    if response:
        return VARIANTS["full" if prompt else "response"]
    partial = "keep" if selected is None else "select" if selected else "values"
    if not prompt:
        return VARIANTS[partial]
    return VARIANTS["prompt" if partial == "keep" else f"prompt+{partial}"]


class FeatureCache:
    """The schedule of one sequence.

    Args:
        response: ``[B, S]`` bool, the rows of the response.
        prompt_interval, response_interval, transfer_ratio: see :class:`dllm_compile.Options`.
        shift: whether the row before the response counts as part of it.
    """

    first: Assignment | None = FIRST

    def __init__(
        self,
        response: torch.Tensor,
        prompt_interval: int,
        response_interval: int,
        transfer_ratio: float,
        shift: bool = False,
    ) -> None:
        self.intervals, self.transfer_ratio, self.shift = (prompt_interval, response_interval), transfer_ratio, shift
        self._follow(response)
        self.anew = False  # whether a sequence of the batch begins
        partial = ("select", "prompt+select") if transfer_ratio > 0 else ("keep", "prompt")
        self.variants = tuple(VARIANTS[name] for name in ("full", "response", *partial))

    def _follow(self, response: torch.Tensor) -> None:
        rows = with_row_before(response) if self.shift else response
        self.selected = (rows.sum(1).double() * self.transfer_ratio).long()
        self.most = int(self.selected.max()) if self.transfer_ratio > 0 else None
        self.prompt_interval = self.intervals[0] if bool((~rows).any()) else 0
        self.response_interval = self.intervals[1]

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """The next call computes every row of all; the others keep their intervals."""
        self._follow(response)
        self.anew = True
        return True

    def next(self, call: Call) -> Plan:
        """Rows of the call; a repeated one counts."""
        if self.anew:
            self.anew = False
            return Plan(FULL, self.selected)
        if self.prompt_interval:
            assignment = variant(call.number, self.prompt_interval, self.response_interval, self.most)
        elif due(self.response_interval, call.number):
            assignment = FULL  # with nothing before the response there is no prompt to refresh or to keep
        else:
            assignment = variant(1, 2, 2, self.most)
        return Plan(assignment, self.selected)
