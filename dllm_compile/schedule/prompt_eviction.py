"""dLLM-Cache with fewer keys: of the prompt, which steps between two refreshes never compute, a share is kept.

The response keeps all its entries, since any of its rows may be selected. A step at which the prompt is due refreshes
everything and chooses anew.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from dllm_compile.core.assignment import Assignment
from dllm_compile.core.rows import ALL
from dllm_compile.interface.plan import AfterLayer, Call, Plan, Skipping
from dllm_compile.passes.eviction import entries, evicted, evicting, has_gaps, unkept
from dllm_compile.passes.feature_cache import FULL, FeatureCache


class PromptEviction:
    """The schedule of one sequence.

    Args:
        features: dLLM-Cache's schedule of it.
        response: ``[B, S]`` bool, the rows of the response; their queries choose.
        keep_ratio, kernel_size: see :func:`dllm_compile.kernels.kept_entries.kept_entries`.
    """

    after_layer: AfterLayer | None = None
    skips: Skipping | None = None

    def __init__(
        self, features: FeatureCache, response: torch.Tensor, keep_ratio: float, kernel_size: int | None
    ) -> None:
        self.features, self.response = features, response
        self.first: Assignment | None = features.first
        self.gaps = has_gaps(response, keep_ratio)
        self.kept = entries(response, keep_ratio)
        self.evict = evicting(FULL, keep_ratio, kernel_size)
        partial = [evicted(each, self.gaps) for each in features.variants if not _reads_prompt(each)]
        self.variants: tuple[Assignment, ...] = (unkept(FULL), self.evict, *partial)

    def next(self, call: Call) -> Plan:
        """The plan of a call; one that repeats the ids before it counts, too."""
        plan = replace(self.features.next(call), fresh=self.response, kept=self.kept)
        if _reads_prompt(plan.assignment):
            self.features.owed = frozenset()  # it is computed in this call, repeated or not
            return replace(plan, assignment=self.evict, block=self.response, same=False)
        return replace(plan, assignment=evicted(plan.assignment, self.gaps))

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """All sequences begin anew: the kept entries were chosen in one step for the whole batch."""
        return False


def _reads_prompt(assignment: Assignment) -> bool:
    """Whether the prompt is computed, too."""
    return assignment.query == ALL or assignment.query.name.startswith("prompt")
