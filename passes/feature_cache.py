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

from typing import Any

import torch

from dllm_compile.core.assignment import NOTHING, PROMPT, PROMPT_SELECTED, RESPONSE, SELECTED, Assignment
from dllm_compile.core.rows import NONE
from dllm_compile.interface.mechanism import Mechanism, Option, interval, share_of
from dllm_compile.interface.plan import AfterLayer, Call, Plan, Skipping, with_row_before
from dllm_compile.kernels.row_change import pick_rows

FULL = Assignment("full")
FIRST = Assignment("full", keep=NOTHING)  # the first layer: always computed, so never kept
KEEP = Assignment("keep", NONE, NONE, NONE)  # a share of 0: nothing between two refreshes

_VARIANTS = (
    FULL,
    Assignment("response", RESPONSE, RESPONSE, RESPONSE),
    Assignment("select", SELECTED, SELECTED, RESPONSE, pick=pick_rows),
    Assignment("prompt+select", PROMPT_SELECTED, PROMPT_SELECTED, pick=pick_rows),
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
    after_layer: AfterLayer | None = None
    skips: Skipping | None = None

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
        self.owed: frozenset[str] = frozenset()  # refreshes that fell on repeated calls, which compute nothing
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
        """The plan of a call; one that repeats the ids before it counts, but leaves its refreshes to the next."""
        if self.anew:
            self.anew = False
            return Plan(FULL, self.selected, refresh=("block",))
        intervals = {"prompt": self.prompt_interval, "response": self.response_interval}
        why = {name for name, each in intervals.items() if each and due(each, call.number)} | self.owed
        self.owed = frozenset(why if call.repeat else ())
        response = "response" in why
        prompt = "prompt" in why if self.prompt_interval else response  # with nothing before it there is none to keep
        assignment = variant(1, 1 if prompt else 2, 1 if response else 2, self.most)
        return Plan(assignment, self.selected, refresh=tuple(sorted(why)) if call.number else ("block",))


def share(options: Any) -> float:
    """The option ``transfer_ratio``, or 0.25 where it is not given."""
    return 0.25 if options.transfer_ratio is None else float(options.transfer_ratio)


def _intervals(options: Any) -> bool:
    return (options.prompt_interval, options.response_interval) != (None, None)


def _rows_are_chosen_once(options: Any) -> str | None:
    if options.transfer_ratio is None or (options.cache == "none" and options.saliency is None):
        return None
    other = "a cache of blocks" if options.cache != "none" else options.saliency.switches[0]
    return f"transfer_ratio and {other} both choose the rows of a step; leave out one of them"


_AUTHORS = {
    "llada-instruct-gsm8k": (50, 7),
    "llada-instruct-gpqa": (50, 6),
    "llada-instruct-math": (50, 1),
    "llada-instruct-mbpp": (100, 5),
    "llada-instruct-humaneval": (50, 8),
    "llada-instruct-longbench": (100, 8),
    "llada-base-gsm8k": (25, 5),
    "llada-base-gpqa": (100, 8),
    "dream-instruct-gsm8k": (25, 2),
    "dream-base-gsm8k": (100, 8),
}
"""Intervals that the paper's authors recommend by model and task. The transfer ratio is 0.25 in all of them."""

MECHANISM = Mechanism(
    "feature-cache",
    "dLLM-Cache, arXiv 2506.06295",
    options=(
        Option(
            "prompt_interval",
            None,
            **interval(),
            meaning="steps between refreshes of the prompt (K_p), at least 1; -1 refreshes always",
            synonyms=("prompt_interval_steps",),
        ),
        Option(
            "response_interval",
            None,
            **interval(),
            meaning="steps between refreshes of the whole response (K_r), at least 1; -1 refreshes always",
            synonyms=("gen_interval", "gen_interval_steps", "response_interval_steps"),
        ),
        Option(
            "transfer_ratio",
            None,
            **share_of("response", 0.25),
            meaning="share of the response recomputed in the steps between (rho), 0 to 1; 0 recomputes none; ``None`` "
            "for 0.25. Only without a cache of blocks and without saliency, which choose rows themselves",
            read=_intervals,
            beside="prompt_interval or response_interval",
            yields=("cache", "saliency_threshold"),
        ),
    ),
    switches=("prompt_interval", "response_interval"),
    neutral={"prompt_interval": 1, "response_interval": 1},
    methods={"dllm-cache": {"prompt_interval": 50, "response_interval": 7, "transfer_ratio": 0.25}},
    presets={
        f"dllm-cache/{name}": {"prompt_interval": prompt, "response_interval": response}
        for name, (prompt, response) in _AUTHORS.items()
    },
    checks=(_rows_are_chosen_once,),
)
