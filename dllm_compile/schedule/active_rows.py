"""The schedule of methods that compute a few rows of the residual stream between two refreshes.

Each sequence of a batch is at one of three levels, and the call is written for the rows of all of them:

    full       every row present       a block begins (and ``delay`` steps after it), or a refresh is due; without
                                       those that are as such a step would compute them, by the model's masks
    response   the response            where a prompt interval keeps the prompt longer than that
    partial    what the cache leaves   otherwise; with a saliency threshold, the salient ones among those
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch.nn.functional import pad

from dllm_compile.core.assignment import Assignment
from dllm_compile.core.errors import named
from dllm_compile.interface.mechanism import Facts, Rows, asked
from dllm_compile.interface.plan import Call, Plan, with_row_before
from dllm_compile.mechanisms import rule_of, turned_on
from dllm_compile.options import Options
from dllm_compile.passes.block_cache import BLOCK, FULL, of_present
from dllm_compile.passes.eviction import entries, evicted, evicting, has_gaps, unkept
from dllm_compile.passes.saliency import choosing, salient, with_contexts

from .blocks import blocks_of
from .refreshes import Refreshes

FIRST_WHOLE = 4  # so many steps of a sequence with saliency compute every row, whatever the interval is


class ActiveRows:
    """The schedule of one sequence.

    Args:
        options: what the user chose; ``cache``, ``keep_ratio`` and saliency say which rows, the intervals
            and steps when.
        response: ``[B, S]`` bool, the rows of the response.
    """

    first: Assignment | None = None

    def __init__(self, options: Options, response: torch.Tensor) -> None:
        self.options, self.rule = options, rule_of(options.cache)
        self.wide = bool(options.shift) and options.cache == "none"
        self.response = with_row_before(response) if self.wide else response
        self.before = options.shift is not False and not self.wide and not (options.shift and self.rule.shifts)
        self.since = torch.zeros_like(response)  # rows filled since the last call that computed every row
        self.mechanisms = turned_on(options)
        self.leaves_out = any(each.present is not None for each in self.mechanisms)
        self.stale = torch.ones_like(response)  # rows that a step of all rows may compute otherwise than they are kept
        self.current = torch.zeros_like(response)  # rows computed since a refresh; kept where rows may be left out
        self.blocks = blocks_of(options, response)
        full, self.part = FULL, BLOCK
        self.salient: Assignment | None = None  # a partial step that computes the salient of its rows
        if options.saliency is not None:
            self.bound = float(getattr(options, options.saliency.switches[0]))
            full, self.part = with_contexts(full), with_contexts(self.part)
            self.salient = salient(self.part, choosing(options.saliency))
        self.evict: Assignment | None = None
        if options.keep_ratio is not None:
            self.evict = evicting(full, options.keep_ratio, options.kernel_size)
            full = unkept(full)
        self.skipping = next(iter(turned_on(options, "skips")), None)
        self.skips = None if self.skipping is None else self.skipping.skips
        self.after_layer = self.rule.after_layer
        if self.after_layer is not None:
            measure = named(f"the rule {self.rule.name!r} measures layers", self.after_layer.measure)
            full, self.part = (replace(each, measure=measure) for each in (full, self.part))
        self.full = full
        self.variants: tuple[Assignment, ...] = self._variants()
        approximates = self.leaves_out or any(each.visible is not None for each in self.mechanisms)
        approximates |= options.keep_ratio is not None or options.keep_outside or self.salient is not None
        approximates |= self.skips is not None or self.after_layer is not None
        self.follows_changes = not approximates  # whether a partial step computes its rows in all layers, of all keys
        self.refreshes = Refreshes(options, response.shape[0])
        self.edited = torch.zeros(response.shape[0], 1, dtype=torch.bool)  # a change that no refresh has seen yet
        self.chosen: Plan | None = None  # the eviction whose entries are kept
        self.gaps = False
        self.follows = False  # whether contexts of this step's keys are kept
        self.settled = True

    def _variants(self) -> tuple[Assignment, ...]:
        partial = [self.part] if self.salient is None else [self.part, self.salient]
        whole = [self.full] if self.evict is None else [self.full, self.evict]
        if self.evict is not None:
            partial = [evicted(each, gaps=False) for each in partial]
        present = map(of_present, whole) if self.leaves_out and self.after_layer is None else ()
        return *whole, *present, *partial

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """New sequences refresh as at the start of a block. With eviction all sequences restart, since the kept entries
        were chosen in one step for the whole batch.
        """
        self.response = with_row_before(response) if self.wide else response
        self.blocks.begin_anew(rows, response)
        self.since, self.current = self.since & ~rows.unsqueeze(1), self.current & ~rows.unsqueeze(1)
        self.stale = self.stale | rows.unsqueeze(1)
        self.refreshes.begin_anew(rows)
        return self.options.keep_ratio is None

    def grow(self, response: torch.Tensor) -> None:
        """Append new tokens to the sequences, which refresh; ``response`` ``[B, S]`` bool is that of all tokens."""
        more = (0, response.shape[1] - self.response.shape[1])
        self.response = response
        self.since, self.current = (pad(each, more) for each in (self.since, self.current))
        self.stale, self.edited = pad(self.stale, more, value=True), torch.ones_like(self.edited)
        self.blocks.grow(response)

    def next(self, call: Call) -> Plan:
        """The plan of a call; one that repeats the ids before it counts, too."""
        self.blocks.next(call)
        self.since = self.since | (call.filled & (call.number > 0))
        self._note_changes(call)
        plan = self._planned(call)
        if self.follows_changes and not (call.repeat and plan.same):
            self._note_computed(call, plan)
        return replace(plan, warning=self.blocks.warning) if self.blocks.warning else plan

    def _planned(self, call: Call) -> Plan:
        part = self._partial(call)
        present = self._present(call)
        part = part if present is None else part & present
        full, response, why = self.refreshes.next(call.number, self._begins(call, part, present))
        self.since = self.since & ~(full | response)
        some = call.depends is not None and self.follows_changes
        if bool((full | self.blocks.done).all()) and not (some and bool((full & ~self.stale).any())):
            return replace(self._full(call, part, present), refresh=why)
        written = part | (full & self.stale if some else full) | (response & self.response)
        active = with_row_before(written) if self.before else written
        if some and why:  # of what is left as it is, logits may have been of no use when it was computed
            active = active | self._readable(call, written)
        if present is not None:
            written, active = written & present, active & present
            self.current = torch.where(full, present, self.current | written)
        exact = full | response
        same = self.settled and not bool(exact.any()) and call.filling is None
        self.settled = True
        plan = Plan(self.part, active=active, written=written, refreshed=exact, refresh=why, same=same, visible=present)
        if self.skips is not None:
            plan = replace(plan, going=self._going(call, active, exact))
        if self.salient is not None and self.follows and not bool(exact.all()):
            bound = torch.full((len(exact),), self.bound, dtype=torch.float32).masked_fill(exact[:, 0], torch.inf)
            first = active & (exact | call.changed | ~written)
            plan = replace(plan, assignment=self.salient, salient=first, bound=bound)
        self.follows = True
        if self.chosen is None:
            return plan
        assignment = evicted(plan.assignment, self.gaps)
        return replace(plan, assignment=assignment, fresh=self.chosen.fresh, kept=self.chosen.kept)

    def _readable(self, call: Call, written: torch.Tensor) -> torch.Tensor:
        """The rows ``[B, S]`` bool whose logits are read and that were computed or asked for."""
        rows = written if call.read is None else written | (call.read & call.masked)
        return rows if self.options.shift is False else with_row_before(rows)

    def _note_changes(self, call: Call) -> None:
        """Mark the rows as stale that depend on a changed token."""
        tokens = call.changed.shape[1]
        first = torch.where(call.changed, torch.arange(tokens), tokens).amin(1, keepdim=True)
        ends = torch.full_like(first, tokens) if call.depends is None else call.depends
        self.stale = self.stale | (ends > first)

    def _note_computed(self, call: Call, plan: Plan) -> None:
        """Mark the rows as no longer stale that a step computed and that depend on no row which is still stale."""
        if plan.written is None:
            self.stale = torch.zeros_like(self.stale)
            return
        tokens = self.stale.shape[1]
        left = torch.where(self.stale & ~plan.written, torch.arange(tokens), tokens).amin(1, keepdim=True)
        ends = torch.full_like(left, tokens) if call.depends is None else call.depends
        self.stale = self.stale & ~(plan.written & (ends <= left))

    def _partial(self, call: Call) -> torch.Tensor:
        """The rows ``[B, S]`` bool of a partial step."""
        options = self.options
        if options.cache == "none" and self.evict is None and self.salient is not None:
            due = call.number < FIRST_WHOLE or (call.number + 1) % options.whole_interval == 0
            if due or not options.response_only:
                return torch.ones_like(self.response)
        rows = self._said("rows", self.rule.rows, call, call.masked)
        for _, more in self._each("widens by rows", "widens", call, call.masked):
            rows = rows | more
        for _, some in self._each("narrows to rows", "narrows", call, call.masked):
            rows = rows & some
        return rows

    def _present(self, call: Call) -> torch.Tensor | None:
        """The rows ``[B, S]`` bool that are present; ``None`` where no mechanism leaves any out."""
        if not self.leaves_out:
            return None
        rows = torch.ones_like(call.masked)
        for _, some in self._each("says present rows", "present", call, call.masked):
            rows = rows & some
        return rows

    def _each(self, what: str, name: str, call: Call, like: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """For each mechanism that is on and has a function ``name``, its name and what the function says of the
        call.
        """
        for mechanism in self.mechanisms:
            function = getattr(mechanism, name)
            if function is not None:
                said = asked(f"the mechanism {mechanism.name!r} {what}", function, self._facts(call), like)
                yield mechanism.name, said

    def _going(self, call: Call, active: torch.Tensor, exact: torch.Tensor) -> torch.Tensor | None:
        """How many of the ``active`` rows ``[B, S]`` go on at each depth, ``[B, n]``; all of a sequence in ``exact``
        ``[B, 1]``.
        """
        assert self.skips is not None
        assert self.skipping is not None
        every = active.sum(1, keepdim=True).expand(-1, len(self.skips.depths(self.options)))
        what, counts = f"the mechanism {self.skipping.name!r} says how many rows go on", self.skips.counts
        said = asked(what, lambda facts: counts(facts, active), self._facts(call), every)
        going = torch.where(exact, every, torch.minimum(said.clamp(min=1), every))
        return None if bool((going == every).all()) else going

    def _facts(self, call: Call) -> Facts:
        return Facts(call, self.blocks, self.response, self.since, self.options)

    def _said(self, what: str, rows: Rows, call: Call, like: torch.Tensor) -> torch.Tensor:
        return asked(f"the rule {self.rule.name!r} says {what}", rows, self._facts(call), like)

    def _begins(self, call: Call, part: torch.Tensor, present: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """By reason, the sequences ``[B, 1]`` bool that have to refresh: they begin a block, were edited where no
        partial step sees it, have rows that no step has computed, or the rule says so.
        """
        missed = call.changed & ~part
        new = torch.zeros_like(part)
        if present is not None:
            missed &= present
            self.current = self.current & ~(call.changed & ~present)
            whole = self.salient is None and self.skips is None  # these compute a row in some layers alone
            computed = part if whole else new
            new = present & ~(self.current | computed)
        if self.rule.leaves_filled:
            missed &= ~call.filled
        if self.chosen is not None and self.chosen.fresh is not None:
            missed |= (call.changed | part) & ~self.chosen.fresh  # it has no place among the entries
        self.edited = self.edited | missed.any(1, keepdim=True)
        reasons = {"block": self.blocks.begun if self.rule.through_blocks else self.blocks.moved}
        if self.rule.refresh is not None:
            reasons["rule"] = self._said("refreshes", self.rule.refresh, call, self.blocks.moved)
        reasons |= self._each("says refreshes", "refresh", call, self.blocks.moved)
        reasons |= {"edit": self.edited, "present": new.any(1, keepdim=True)}
        reasons = {name: where & ~self.blocks.done for name, where in reasons.items()}
        for begins in reasons.values():
            self.edited = self.edited & ~begins
        return reasons

    def _full(self, call: Call, reach: torch.Tensor, present: torch.Tensor | None) -> Plan:
        """The plan of a call that computes every row that is present; the last of several such calls also chooses the
        entries to keep, beside rows within ``reach``.
        """
        self.follows = self.evict is None
        self.chosen = None
        plan = Plan(self.full, same=False, visible=present)
        if present is not None:
            self.current = present
        some = present is not None and not bool(present.all()) and self.after_layer is None
        if some:
            plan = replace(plan, assignment=of_present(self.full), active=present, written=present)
        if self.evict is None or bool((self.refreshes.left > 0).any()):
            return plan
        assert self.options.keep_ratio is not None
        if self.rule.reach is not None:
            reach = reach | self._said("reach", self.rule.reach, call, call.masked)
        for _, more in self._each("says reach", "reach", call, call.masked):
            reach = reach | more
        block, absent = self.blocks.active, torch.zeros_like(reach)
        if present is not None:
            reach, block, absent = reach & present, block & present, ~present
        self.settled, self.gaps = False, has_gaps(reach | absent, self.options.keep_ratio)
        kept = entries(reach | absent, self.options.keep_ratio)
        assignment = of_present(self.evict) if some else self.evict
        self.chosen = replace(plan, assignment=assignment, block=block, fresh=reach, kept=kept)
        return self.chosen
