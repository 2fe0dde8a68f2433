"""The schedule of methods that compute a few rows of the residual stream between two refreshes.

Each sequence of a batch is at one of three levels, and the call is written for the rows of all of them:

    full       every row               a block begins (and ``delay`` steps after it), or a refresh is due
    response   the response            where a prompt interval keeps the prompt longer than that
    partial    what the cache leaves   otherwise; with a saliency threshold, the salient ones among those
"""

from __future__ import annotations

from typing import Any

import torch

from .core.assignment import Assignment
from .core.blocks import Blocks
from .core.plan import Call, Plan, with_row_before
from .options import Options
from .passes.block_cache import BLOCK, FULL, recomputed
from .passes.eviction import entries, evicted, evicting, has_gaps, unkept
from .passes.feature_cache import due
from .passes.saliency import salient, with_contexts

WHOLE = 4  # DyLLM's authors compute every row in the first steps, and every so many steps


class ActiveRows:
    """The schedule of one sequence.

    Args:
        options: what the user chose; ``cache``, ``keep_ratio`` and ``saliency_threshold`` say which rows, the intervals
            and steps when.
        response: ``[B, S]`` bool, the rows of the response.
    """

    first: Assignment | None = None

    def __init__(self, options: Options, response: torch.Tensor) -> None:
        self.options = options
        wide = bool(options.shift) and options.cache == "none"
        self.response = with_row_before(response) if wide else response
        self.before = options.shift is not False and not wide and options.cache != "decoded"
        self.blocks = Blocks(response, None if options.cache == "none" else options.block_length)
        self.bound = options.saliency_threshold
        full, self.part = FULL, BLOCK
        if self.bound is not None:
            full, self.part = with_contexts(full), with_contexts(self.part)
        self.evict: Assignment | None = None
        if options.keep_ratio is not None:
            self.evict = evicting(full, options.keep_ratio, options.kernel_size)
            full = unkept(full)
        self.full = full
        self.variants: tuple[Assignment, ...] = self._variants()
        sequences = response.shape[0]
        self.age = torch.zeros(sequences, 1, dtype=torch.int64)  # steps since a refresh began
        self.left = torch.zeros(sequences, 1, dtype=torch.int64)  # full steps still to come
        self.edited = torch.zeros(sequences, 1, dtype=torch.bool)  # a change that no refresh has seen yet
        self.kept: dict[str, Any] = {}  # of a plan: what the last eviction left
        self.gaps = False
        self.follows = False  # whether contexts of this step's keys are kept
        self.settled = True

    def _variants(self) -> tuple[Assignment, ...]:
        partial = (self.part,) if self.bound is None else (self.part, salient(self.part))
        if self.evict is None:
            return self.full, *partial
        return self.full, self.evict, *(evicted(each, gaps=False) for each in partial)

    def next(self, call: Call) -> Plan:
        """Rows of the call; a repeated one counts."""
        self.blocks.next(call)
        part = self._partial(call)
        full, respond = self._levels(call, part)
        self.left = (self.left - 1).clamp(min=0)
        done = self.blocks.done
        if bool((full | done).all()):
            return self._full(part)
        written = part | full | (respond & self.response)
        active = with_row_before(written) if self.before else written
        exact = full | respond
        same = self.settled and not bool(exact.any()) and call.filling is None
        self.settled = True
        plan: dict[str, Any] = {"active": active, "written": written, "same": same, **self.kept}
        assignment = self.part
        if self.bound is not None and self.follows and not bool(exact.all()):
            assignment = salient(self.part)
            plan["salient"] = active & (exact | call.changed)
            bound = torch.full((len(exact),), self.bound, dtype=torch.float32)
            plan["bound"] = bound.masked_fill(exact[:, 0], torch.inf)
        self.follows = True
        if self.evict is not None:
            assignment = evicted(assignment, self.gaps)
        return Plan(assignment, **plan)

    def _partial(self, call: Call) -> torch.Tensor:
        """Rows of a partial step."""
        options = self.options
        whole = options.cache == "none" and self.evict is None and self.bound is not None
        if whole and (not options.response_only or call.number < WHOLE or (call.number + 1) % WHOLE == 0):
            return torch.ones_like(self.response)
        return recomputed(options.cache, self.blocks, self.response, call, options.shift, options.window_size)

    def _levels(self, call: Call, part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Which sequences, ``[B, 1]`` bool, compute all rows, and which all of the response."""
        options, number = self.options, call.number
        missed = call.changed & ~part  # where no partial step would see it
        if options.cache == "decoded":
            missed &= ~call.filled
        if self.kept:
            missed |= call.changed & ~self.kept["fresh"]  # it has no place among the entries
        self.edited |= missed.any(1, keepdim=True)
        start = (self.blocks.moved | self.edited) & ~self.blocks.done
        self.edited &= ~start
        prompt = options.prompt_interval is not None and due(options.prompt_interval, number)
        respond = torch.full_like(
            start, options.response_interval is not None and due(options.response_interval, number)
        )
        self.age += 1
        again = start.clone()
        if options.refresh_interval is not None:
            again |= self.age >= options.refresh_interval
        if self.evict is not None:  # kept entries are of one step: all sequences of a batch begin anew
            start |= (again | prompt | respond).any()
            again |= start
            self.kept = {} if bool(start.any()) else self.kept
        self.age[again] = 0
        self.left[again | prompt] = self.left[again | prompt].clamp(min=1)
        self.left[start] = self.left[start].clamp(min=options.full_steps_of_a_block)
        warm = self.bound is not None and number < options.full_steps
        if warm:
            self.left = self.left.clamp(min=1 if number + 1 == options.full_steps else 2)
        full = self.left > 0
        if options.prompt_interval is None or prompt or warm or self.evict is not None:
            return full, respond & ~full
        return torch.zeros_like(full), respond | full

    def _full(self, part: torch.Tensor) -> Plan:
        """A call that computes every row; the last of several chooses what is kept."""
        self.follows = self.evict is None
        if self.evict is None or bool((self.left > 0).any()):
            return Plan(self.full, same=False)
        assert self.options.keep_ratio is not None
        self.kept = {"fresh": part, "kept": entries(part, self.options.keep_ratio)}
        self.gaps = has_gaps(part, self.options.keep_ratio)
        self.settled = False
        return Plan(self.evict, block=self.blocks.active, same=False, **self.kept)
