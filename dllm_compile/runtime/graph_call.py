"""One call of a graph, as part of a step: which variant each unit runs, and on which rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
import torch.fx

from dllm_compile.core.assignment import (
    ACTIVE,
    EXACT,
    FEATURES,
    KEYED,
    KEYS,
    NOTHING,
    PROMPT_SELECTED,
    READABLE,
    Assignment,
)
from dllm_compile.core.errors import describe, naming
from dllm_compile.core.rows import ALL, NONE, RowSet
from dllm_compile.core.state import allocate, allocate_outside, grown
from dllm_compile.core.units import Unit, weights_key
from dllm_compile.debug import labelled
from dllm_compile.interface.plan import Measured
from dllm_compile.passes.causal import values_of
from dllm_compile.passes.feature_cache import KEEP

from .batch import Batch
from .call_values import CallValues
from .cost import terms
from .program import Program
from .recordings import COUNTED, DECIDED, EAGER, PARTS, RANKS
from .skipping import judged, keep_confidence, layers_at, skip_rows
from .stats import Tally
from .step import Step
from .unit_code import Arguments, UnitCode, Variant

HEAD = Assignment("head", leave=READABLE, keep=NOTHING)
STEM = Assignment("stem", leave=ACTIVE, keep=NOTHING)
TAIL = Assignment("tail", leave=ACTIVE, keep=NOTHING)
MOST = 0.9  # with more of the rows readable than this, the head computes all: nothing to gather, one code


@cache
def _entering(assignment: Assignment, rows: RowSet) -> Assignment:
    """The assignment for a stream that is at hand on ``rows``."""
    return assignment if assignment.enter == rows else replace(assignment, enter=rows)


@cache
def _judging(assignment: Assignment) -> Assignment:
    """The assignment of a head that also says how sure each row is."""
    return replace(assignment, judge=judged)


@cache
def _unmasked(assignment: Assignment) -> Assignment:
    """The assignment where attention masks hide nothing."""
    return replace(assignment, masked=False)


@cache
def _exact(wanted: Assignment) -> Assignment:
    """Every row, nothing kept: of the keys that ``wanted`` reads, where some are hidden."""
    return replace(EXACT, name="visible", hides=True) if wanted.hides else EXACT


def _rows_meet(code: UnitCode) -> str:
    """Why a layer cannot run for fewer rows."""
    where = next((f" (at {describe(node)})" for node in code.unit.mixing_nodes(code.axes)), "")
    return f"the rows of a layer depend on one another in more than its attention{where}"


class GraphCall:
    """One call of a graph, as part of a step.

    Attributes:
        values: what the units computed.
        keys: of each layer: its number in a whole model, else its weights, since one graph may serve every layer.
        results: the value of each output of the graph, once all units have run.
        full: the variant that computes every row.
        rest, first: the variants that the layers run, and the first of them.
        narrows: whether the residual stream may be computed for fewer rows.
        masked: whether an attention mask hides something.
        only_decides: whether the ids are those of the call before, and only the decision has to run.
        capacity: salient rows that a layer has memory for, where the host does not count them; else ``None``.
        salient_counts: salient rows of each layer, on the device, where the host does not count them.
        most_salient: salient rows of any layer, where the host counts them.
        skips: which rows go on into deeper layers, where not all do.
        skipping: by the number of a layer with attention, which of its depths applies from there on.
        selected: rows that each layer chose, by its number.
        computed: how many rows a sequence each layer computed, by its number, with those that pad an index.
    """

    def __init__(self, program: Program, args: Sequence[Any], batch: Batch, step: Step) -> None:
        self.program, self.batch, self.step = program, batch, step
        env: dict[torch.fx.Node, Any] = dict(zip(program.index, args, strict=True))
        plans = step.past.schedule
        if program.ids is not None:
            self.keys: dict[int, Any] = {id(unit): i for i, unit in enumerate(program.layers)}
        else:
            self.keys = {id(unit): weights_key(unit, [env.get(n) for n in unit.inputs]) for unit in program.layers}
        self.narrows = batch.narrows(plans)
        self.values = CallValues(program, env, batch, step, next(iter(self.keys.values()), None), self.narrows)
        self.results: dict[torch.fx.Node, Any] = {}
        self.tally = Tally()
        self.selected: dict[int, torch.Tensor] = {}
        self.computed: dict[int, int] = {}
        self.capacity = batch.session.salient_capacity(step)
        self.salient_counts: list[torch.Tensor] = []
        self.most_salient = 0
        self.measured: tuple[int, Assignment, Any] | None = None  # of the layer that has just run
        self.after_layer = None if step.repeat else plans.after_layer
        self.skips = None if step.repeat else plans.skips
        self.skipping: dict[int, int] = {}
        if self.skips is not None:
            whole = program.ids is not None and self.values.head is not None
            depths = self.skips.depths(batch.options)
            self.skipping = layers_at(depths, program.depth if whole else batch.session.depth)
        self.masked = not program.masks or self._masked(env)
        self.costs: dict[Variant, float] = {}  # FLOPs of a variant, for the rows that the step computes now
        self.full = plans.variants[0]
        self.rest = step.assignment
        self.first = plans.first or self.rest
        if self._masks_differ(env):
            step.anew = batch.stale = True
        if step.anew or step.deeper_rows or (step.assignment.enter != ALL and not self._can_narrow()):
            self.first = self.rest = self.full
        decides = step.repeat and program.decision is not None
        self.only_decides = decides and all(self.values.kept(n) is not None for n in self._read())

    # -- what the step runs --------------------------------------------------------------------------------------------

    def _masked(self, env: dict[torch.fx.Node, Any]) -> bool:
        """Whether a mask hides something from attention, which the host reads once for the inputs of a sequence."""
        known, place = self.batch.masked, (self.program.signature, self.step.layer)
        if place not in known:
            known[place] = self.program.masked(env)
        return known[place]

    def _masks_differ(self, env: dict[torch.fx.Node, Any]) -> bool:
        """Whether an attention mask that is made of the tokens is another than at the call before: rows that are kept
        were made with that.
        """
        if not self.program.token_masks:
            return False
        place, kept = (self.program.signature, self.step.layer), self.batch.token_masks
        old, kept[place] = kept.get(place), [value for _, value in values_of(self.program.token_masks, env)]
        return self.step.number > 0 and (old is None or not all(map(torch.equal, old, kept[place])))

    def _can_narrow(self) -> bool:
        """Whether the planned step, whose residual stream has fewer rows, can read what it needs of the other rows."""
        if not self.step.assignment.alone:
            return self._known() and self._rows_are_kept()
        layers = [code for unit, code in zip(self.program.units, self.program.codes, strict=True) if unit.is_layer]
        variants = self.step.past.schedule.variants  # a layer that was never called is first tried on every row
        return self._once() and all(code.narrows and code.writable(variants) for code in layers)

    def _once(self) -> bool:
        """Whether each layer runs once in a step."""
        keys = set(self.keys.values())
        return len(keys) == len(self.keys) and not keys & (self.step.seen | self.batch.session.tied)

    def _known(self) -> bool:
        """Whether each layer has rows kept and runs once in a step, so that rows that are not computed can be read."""
        return self._once() and set(self.keys.values()) <= self.batch.layers.keys()

    def _read(self) -> list[torch.fx.Node]:
        """What the decision and the caller read of layers and head."""
        decision = self.program.decision
        read = [*self.program.results, *(decision.inputs if decision is not None else [])]
        units = [*self.program.layers, *([self.values.head] if self.values.head is not None else [])]
        made = {n for unit in units for n in unit.outputs}
        return [n for n in dict.fromkeys(read) if n in made]

    def _rows_are_kept(self) -> bool:
        """Whether all rows are kept of what is read and may be computed for fewer; of drafts nothing is read so."""
        narrowed = [n for n in self._read() if self.values.may_narrow(n)]
        return self.batch.drafts_of is not None or all(self.values.kept(n) is not None for n in narrowed)

    def kept_results(self) -> dict[torch.fx.Node, Any] | None:
        """Results of layers traced alone whose inputs are those of the step before, where all of them are kept."""
        layers_alone = bool(self.keys) and self.values.head is None
        if not layers_alone or not self._known() or self._read() != list(self.program.results):
            return None
        found = {n: self.values.kept(n) for n in self.program.results}
        if any(rows is None for rows in found.values()):
            return None
        self.step.seen |= set(self.keys.values())
        self.step.layer += len(self.keys)
        return found

    def is_partial(self) -> bool:
        """Whether the layers compute fewer rows than all."""
        step = self.step
        whole = step.repeat or step.assignment.evict is not None or self.rest.alone
        return not whole and self.full not in (step.assignment, self.rest)

    def unrecordable(self) -> str | None:
        """Why the launches of a partial step cannot be recorded; ``None`` where they can."""
        if self.program.ids is None or self.values.head is None:
            return PARTS
        if self.program.group is not None:
            return RANKS
        if self.after_layer is not None:
            return DECIDED
        if self.program.opaque:
            return EAGER
        return COUNTED if self.capacity is None and self.step.assignment.salient else None

    def overflowed(self) -> bool:
        """Whether a layer had more salient rows than its capacity; the capacity is then larger from the next step
        on.
        """
        session, step = self.batch.session, self.step
        if self.capacity is None and step.assignment.salient:
            session.grow_salient_capacity(step, 2 * self.most_salient)
        counts: list[int] = torch.stack(self.salient_counts).tolist() if self.salient_counts else []  # one read a step
        if self.capacity is None or (most := max(counts, default=0)) <= self.capacity:
            session.stats.salient += sum(counts)
            session.stats.salient_layers += len(counts)
            return False
        session.grow_salient_capacity(step, most)
        self.batch.recordings.clear()  # they have the old one
        session.stats.overflows += 1
        return True

    # -- units ---------------------------------------------------------------------------------------------------------

    def compute(self) -> None:
        """Run all units; a value is dropped behind its last reader."""
        program, env, have = self.program, self.values.env, self.values.have
        if program.prelude is not None:
            env.update(zip(program.constants, program.prelude(env), strict=True))
        for unit, code, dead in zip(program.units, program.codes, program.dead, strict=True):
            self.unit(unit, code)
            for node in dead:
                env.pop(node, None)
        self.results = {n: self.values.whole(n) if n in have else env[n] for n in program.results}
        env.clear()  # a recording keeps the call, and is not to keep the model

    def unit(self, unit: Unit, code: UnitCode) -> None:
        """Run one unit; where only the decision has to run, not the layers and the head, whose outputs are kept."""
        outs: Sequence[Any]
        if self.only_decides and (unit.is_layer or unit is self.values.head):
            outs, rows = [None] * len(unit.outputs), [NONE] * len(unit.outputs)
        elif unit.is_layer:
            with labelled("layer {}", self.step.layer):
                outs, rows = self._layer(unit, code)
        elif unit is self.values.head:
            with labelled("head"):
                outs, rows = self._head(unit, code)
        else:
            outs, rows = self._other(unit, code)
        self.values.put(unit.outputs, outs, rows)
        if self.measured is not None:
            measured, self.measured = self.measured, None
            self._measured(unit, *measured)

    def _arguments(self, unit: Unit) -> Arguments:
        env, have = self.values.env, self.values.have
        inputs = [self.values.whole(n) if n in have else env[n] for n in unit.inputs]
        return Arguments(env[unit.stream] if unit.stream is not None else None, inputs, self.step)

    def _head(self, unit: Unit, code: UnitCode) -> tuple[Sequence[Any], list[RowSet]]:
        """Run the head on the readable rows; on all rows of its input if an output other than logits is read. The other
        rows come from the cache.
        """
        rows, readable = self.values.rows(unit.stream), self.step.indices["readable"]
        given = self._arguments(unit)
        wanted = _entering(HEAD, rows)
        new = self.values.kept(unit.outputs[0]) is None and not self.program.chooses
        every = self.program.reads_all(self.batch.session.vocabulary)
        if rows == ALL and (every or new or readable.shape[1] > self.step.shape[1] * MOST):
            wanted = EXACT
        elif every:
            wanted = _entering(TAIL, rows)
        elif not readable.shape[1]:
            return [None] * unit.leaving, [NONE] * unit.leaving
        wanted = wanted if self.skips is None or unit.logits is None else _judging(wanted)
        variant = code.variant(wanted, self.step, given)
        self._count(code, variant, wanted)
        outs = variant(given)
        if "judged" in variant.extras:
            keep_confidence(self, outs[variant.extras["judged"]], variant.rows[0] if unit.leaving else ALL)
        return outs, variant.rows

    def _other(self, unit: Unit, code: UnitCode) -> tuple[Sequence[Any], list[RowSet]]:
        """Run a stem, a tail that is no head, or a unit whose rows mix."""
        assignment = EXACT
        if unit.stream is None and self.first.enter == ACTIVE and not code.mixing:
            if code.by_token:
                return self._embedded(unit, code)
            assignment = STEM
        elif self.values.rows(unit.stream) == ACTIVE and not code.mixing:
            assignment = _entering(TAIL, ACTIVE)
        elif unit.stream is not None:
            self.values.env[unit.stream] = self.values.whole(unit.stream)
        given = self._arguments(unit)
        variant = code.variant(assignment, self.step, given)
        if unit.stream is not None:
            self._count(code, variant, assignment)
        return variant(given), variant.rows

    def _embedded(self, unit: Unit, code: UnitCode) -> tuple[Sequence[Any], list[RowSet]]:
        """Run a stem that reads tokens alone on the active tokens, by the code for whole sequences."""
        active, tokens = self.step.indices["active"], self.step.shape[1]
        inputs = self._arguments(unit).inputs
        ids = [n in self.program.axes.live for n in unit.inputs]
        at = active.clamp(max=tokens - 1)
        inputs = [value.gather(1, at) if is_ids else value for value, is_ids in zip(inputs, ids, strict=True)]
        given = Arguments(None, inputs, self.step, active.shape[1])
        return code.variant(EXACT, self.step, given)(given), [ACTIVE]

    # -- layers --------------------------------------------------------------------------------------------------------

    def _layer(self, unit: Unit, code: UnitCode) -> tuple[Sequence[Any], list[RowSet]]:
        step = self.step
        number, step.layer = step.layer, step.layer + 1
        if unit.attentions:
            which, step.depth = self.skipping.get(step.depth), step.depth + 1
            if which is not None:
                skip_rows(self, unit, number, which)
        given = self._arguments(unit)
        assignment = self._assigned(unit, code, self.rest if number else self.first, given)
        given.flat += self._state(unit, assignment)
        if unit.attentions and assignment.keep and assignment.outside is None:  # the keys outside may be others now
            self.batch.without_outside.add(self.keys[id(unit)])
        variant = code.variant(assignment if self.masked else _unmasked(assignment), step, given)
        if unit.attentions:
            self.tally.layer(assignment, step.assignment)
        self._count(code, variant, assignment)
        rows = assignment.query if unit.attentions or assignment.mlp is None else assignment.mlp
        self.computed[number] = 0 if rows == NONE else self._number(rows.name)
        outs, extras = variant(given), variant.extras
        if "picked" in extras:
            self.selected[number] = outs[extras["picked"]]
        if "salient" in extras:
            self._take_salient(outs[extras["salient"]], outs[extras["salient count"]])
        if "measured" in extras:
            self.measured = number, assignment, outs[extras["measured"]]
        if self.narrows and (step.number == 0 or code.narrows is None):
            self._check(code, given)
        return outs, variant.rows

    def _assigned(self, unit: Unit, code: UnitCode, wanted: Assignment, given: Arguments) -> Assignment:
        """The assignment that a layer runs: ``wanted``, where the rows that it reads are kept; else one that computes
        every row.
        """
        key = self.keys[id(unit)]
        if key in self.step.seen:
            self.batch.session.tied.add(key)  # what ran in this step already has no rows of its own
        if key in self.step.seen or not (wanted.keep or wanted.alone):
            return _exact(wanted)
        self.step.seen.add(key)
        if wanted.alone:
            return _entering(wanted, self.values.rows(unit.stream))
        if wanted.evict is None and key not in self.batch.layers:
            wanted = self.full
        elif self.step.repeat and wanted != self.full and wanted.keep >= FEATURES:
            wanted = replace(KEEP, keys=wanted.keys)  # every row as it was: the same input gives the same output
        elif wanted.enter == ALL and wanted.evict is None and wanted != self.full and not code.narrow(given):
            wanted = self.full
            self.batch.tell_whole(_rows_meet(code), " of some layers")
        if not wanted.keep:
            return _exact(wanted)
        return wanted if wanted.enter == ALL else _entering(wanted, self.values.rows(unit.stream))

    def _check(self, code: UnitCode, given: Arguments) -> None:
        """Check that a layer can run for fewer rows; else compute all rows from the next call on."""
        reason = code.why_not_written(self.step.past.schedule.variants)
        if not code.narrow(given):
            self.batch.run_whole(_rows_meet(code))
        elif reason is not None:
            self.batch.run_whole(f"a layer cannot be written for fewer rows: {reason}")

    def _state(self, unit: Unit, assignment: Assignment) -> list[torch.Tensor]:
        """The state tensors of a layer; allocated where there are none, or where they have another number of
        entries.
        """
        if not assignment.keep:
            return []
        key, step, layers = self.keys[id(unit)], self.step, self.batch.layers
        compact = unit.anchors(KEYS) if assignment.compact else []
        rows = step.entries
        if key in layers and (not compact or layers[key][-1].shape[1] == rows):
            return self._with_outside(unit, assignment)
        layers.pop(key, None)  # free the old ones first
        self.batch.recordings.clear()
        anchors, size = unit.anchors(assignment.keep), step.shape
        layers[key] = allocate(anchors, self.program.axes, size, step.counts.device, compact, rows)
        return self._with_outside(unit, assignment)

    def _with_outside(self, unit: Unit, assignment: Assignment) -> list[torch.Tensor]:
        """The state tensors of a layer. Those of attention over the keys outside get as many rows as the step has
        places for.
        """
        state = self.batch.layers[self.keys[id(unit)]]
        if assignment.outside is None:
            return state
        rows, first = self.step.sizes["held"], len(unit.anchors(assignment.keep))
        held = state[first:]
        if not held:
            state += allocate_outside(
                unit.attentions, self.program.axes, self.step.shape[0], rows, self.step.counts.device
            )
        elif held[0].shape[1] <= rows:
            state[first:] = [grown(each, rows) for each in held]
        else:
            return state
        self.batch.recordings.clear()
        return state

    def _take_salient(self, places: torch.Tensor, counts: torch.Tensor) -> None:
        """Take over the rows that a layer found salient: its MLP, and the next layer's keys and values, are computed
        for these.
        """
        capacity = self.capacity
        if capacity is None:
            capacity = int(counts.max())
            self.most_salient = max(self.most_salient, capacity)
            self.batch.session.stats.salient += capacity
            self.batch.session.stats.salient_layers += 1
        else:
            self.salient_counts.append(counts.max())
        self.step.indices["salient"] = places[:, : max(capacity, 2)].contiguous()
        self.costs.clear()  # of another number of rows

    def _measured(self, unit: Unit, number: int, assignment: Assignment, values: Any) -> None:
        """Let the rule decide by what a layer measured whether the layers behind it compute every row."""
        assert self.after_layer is not None
        step, key, (stream,) = self.step, self.keys[id(unit)], unit.outputs[:1]
        partial = assignment.query != ALL
        rows = step.indices[assignment.query.name] if partial else torch.arange(step.shape[1]).expand(step.shape)
        rows = rows.to(step.counts.device)
        note = step.past.notes.get(key)
        given = Measured(number, values, rows, step.shape[1], note, self.batch.options)
        with naming(f"the rule {self.batch.options.cache!r} decides behind layer {number}"):
            step.noted[key], wanted = self.after_layer.decide(given)
        every = self.values.whole(stream)  # at every step, so that what is kept is up to date
        if partial and wanted is not None and bool(wanted.any()):
            self.values.put([stream], [every.contiguous()], [ALL])
            self.rest, step.deeper_rows = self.full, True
            self.batch.session.stats.refreshes["after_layer"] += 1
            step.indices["readable"] = step.indices["readable later"]
            self.costs.clear()  # of another number of rows

    # -- what it costs -------------------------------------------------------------------------------------------------

    def _count(self, code: UnitCode, variant: Variant, assignment: Assignment) -> None:
        """Add the FLOPs of a unit, for the rows that it is called for."""
        known = self.costs.get(variant)
        if known is None:
            if variant.work is None:
                found = terms(code.unit, code.axes, assignment, variant.computed)
                variant.work = [(names, float(count)) for names, count in found.items()]
            rows = sum(count * prod(map(self._number, names)) for names, count in variant.work)
            self.costs[variant] = known = rows * self.step.shape[0]
        self.tally.flops += known

    def _number(self, name: str) -> int:
        """The number of rows a sequence in the row set ``name``, with those that pad its index; all rows for any other
        name.
        """
        sizes = self.step.sizes
        if name in self.step.indices:
            return self.step.indices[name].shape[1]
        if name == KEYED.name:
            return self.step.entries
        if name == PROMPT_SELECTED.name:
            return sizes["prompt"] + sizes["selected"]
        return sizes.get(name, self.step.shape[1])
