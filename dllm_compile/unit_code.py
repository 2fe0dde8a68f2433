"""Compiled code of a unit: one a variant, called for every layer of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch._dynamo.convert_frame import compile_lock

from .batch import Step
from .core.assignment import ACTIVE, KEYS, Assignment
from .core.axes import Axes
from .core.emit import Emitted, emit
from .core.errors import GraphRefused, refusing
from .core.units import Unit
from .core.writing import Choices
from .kernels.delta_attention import delta_attention
from .kernels.kept_entries import kept_and_fresh
from .kernels.row_change import pick_rows
from .kernels.salient_rows import salient_rows
from .kernels.sparse_attention import sparse_attention
from .lower import Compiled, lower
from .trial import rows_are_independent


class Variant:
    """Compiled code of a unit for one assignment, and where its arguments lie in a call's values."""

    def __init__(self, run: Compiled, emitted: Emitted, values: Values) -> None:
        self.run = run
        self.rows = emitted.leaves
        self.computed = emitted.rows
        self.work: list[tuple[tuple[str, ...], float]] | None = None  # what it costs, once someone asked
        self.turns = emitted.turns
        pick = itemgetter(*[values.slot(name) for name in emitted.takes])
        self.pick = pick if len(emitted.takes) > 1 else lambda flat: (pick(flat),)

    def __call__(self, values: Values) -> Any:
        """Run it; returns the unit's outputs, then the picked rows if there are any."""
        return self.run(*self.pick(values.flat))


class Values:
    """All that one unit can be called with in one step, in a flat list."""

    FREE = ("readable", "active", "written", "stored", "salient", "readable@active", "block", "outside", "fresh")
    SETS = ("response", "prompt", "response@keyed", *FREE)
    FIXED = ("stream", "counts", "bound", *[f"index:{name}" for name in SETS])

    def __init__(self, stream: Any, inputs: Sequence[Any], state: Sequence[torch.Tensor], step: Step) -> None:
        self.stream, self.inputs = stream, inputs
        self.flat = [stream, step.counts, step.bound, *map(step.indices.get, self.SETS), *inputs, *state]

    def slot(self, name: str) -> int:
        """Where an argument of an emitted unit lies."""
        if name in self.FIXED:
            return self.FIXED.index(name)
        kind, _, which = name.partition(":")
        return len(self.FIXED) + int(which) + (len(self.inputs) if kind == "state" else 0)


CHOICES = Choices(pick_rows, kept_and_fresh, sparse_attention, delta_attention, salient_rows)

_SHARED: dict[tuple[str, int, str], UnitCode] = {}


def shared(unit: Unit, axes: Axes, lowering: str) -> UnitCode:
    """The code of a unit, made once for all layers of its kind, of whatever graph."""
    return _SHARED.setdefault((unit.key, unit.leaving, lowering), UnitCode(unit, axes, lowering))


def forget() -> None:
    """Drop all code."""
    _SHARED.clear()


class UnitCode:
    """All variants of one kind of unit."""

    def __init__(self, unit: Unit, axes: Axes, lowering: str) -> None:
        self.unit, self.axes, self.lowering = unit, axes, lowering
        self.variants: dict[Any, Variant] = {}
        self.written: dict[tuple[Assignment, ...], bool] = {}
        self.mixing = unit.mixing(axes)
        self.narrows: bool | None = None if self.mixing else True

    def variant(self, assignment: Assignment, step: Step, values: Values) -> Variant:
        """Compiled on first use; the head serves any number of rows, a layer those it was compiled for."""
        key = assignment if assignment.fixed else (assignment, step.signature)
        found = self.variants.get(key)
        if found is None:
            with (
                compile_lock,
                refusing(f"compiled for the step {assignment.name!r}"),
            ):  # one thread at a time, as Dynamo
                found = self.variants.get(key) or self._compile(assignment, step, values)
                self.variants[key] = found
        return found

    def _compile(self, assignment: Assignment, step: Step, values: Values) -> Variant:
        emitted = emit(self.unit, self.axes, assignment, step.sizes, CHOICES)
        args = [values.flat[values.slot(name)] for name in emitted.takes]
        free = [i for i, name in enumerate(emitted.takes) if self._any_number(name, assignment)]
        writes = any(name.startswith("state:") for name in emitted.takes)
        return Variant(lower(emitted.module, args, self.lowering, free, writes), emitted, values)

    def narrow(self, values: Values) -> bool:
        """Whether the unit may run for fewer rows: known, or tried once on real values."""
        if self.narrows is None:
            with refusing("tried for fewer rows"):
                self.narrows = rows_are_independent(self.unit, self.axes, values.stream, list(values.inputs))
        return self.narrows

    def writable(self, variants: tuple[Assignment, ...]) -> bool:
        """Whether the unit can be written for each of ``variants``; found out once."""
        if variants not in self.written:
            with refusing("written for fewer rows"):
                self.written[variants] = all(map(self._can_write, variants))
        return self.written[variants]

    def _can_write(self, assignment: Assignment) -> bool:
        try:
            emit(self.unit, self.axes, assignment, {"selected": 1}, CHOICES)
        except GraphRefused:
            return False
        return True

    def _any_number(self, name: str, assignment: Assignment) -> bool:
        """Whether an argument's rows differ in number from call to call."""
        kind, _, which = name.partition(":")
        if kind == "state":
            keys = self.unit.anchors(KEYS)  # the first of what is kept
            last = len(self.unit.anchors(assignment.keep))
            return assignment.compact and (int(which) < len(keys) or int(which) == last)
        return (kind == "index" and which in Values.FREE) or (name == "stream" and assignment.enter == ACTIVE)
