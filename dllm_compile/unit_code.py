"""Compiled code of a unit: one a variant, called for every layer of its kind."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
from torch._dynamo.convert_frame import compile_lock

from .batch import Step
from .core.assignment import KEYS, Assignment
from .core.axes import Axes
from .core.emit import Emitted, emit
from .core.errors import GraphRefused, refusing
from .core.rows import ALL
from .core.sizes import BATCH, TOKENS, Extent, Size, of_constant, of_layout
from .core.units import Unit
from .core.writing import Choices
from .kernels.delta_attention import delta_attention
from .kernels.kept_entries import kept_and_fresh
from .kernels.row_change import pick_rows
from .kernels.salient_rows import salient_rows
from .kernels.sparse_attention import sparse_attention
from .lower import Code, SizeFixed, lower
from .trial import rows_are_independent


class Variant:
    """Compiled code of a unit for one assignment, and where its arguments lie in a call's values."""

    def __init__(self, code: Code, emitted: Emitted, values: Values) -> None:
        self.run, self.assumes = code
        self.served: set[tuple[int, ...]] = set()
        self.rows = emitted.leaves
        self.computed = emitted.rows
        self.work: list[tuple[tuple[str, ...], float]] | None = None  # what it costs, once someone asked
        self.turns = emitted.turns
        pick = itemgetter(*[values.slot(name) for name in emitted.takes])
        self.pick = pick if len(emitted.takes) > 1 else lambda flat: (pick(flat),)

    def serves(self, step: Step) -> bool:
        """Whether the code is good for the sizes of a step."""
        if self.assumes is None or step.lengths in self.served:
            return True
        good = self.assumes({**step.numbers, BATCH: step.shape[0], TOKENS: step.shape[1]})
        if good:
            if len(self.served) == SERVED:
                self.served.clear()
            self.served.add(step.lengths)
        return good

    def __call__(self, values: Values) -> Any:
        """Run it; returns the unit's outputs, then the picked rows if there are any."""
        return self.run(*self.pick(values.flat))


class Values:
    """All that one unit can be called with in one step, in a flat list."""

    SAME = {"written": "active", "stored": "active", "readable@active": "readable"}
    SETS = (
        *("response", "prompt", "response@keyed", "readable", "active", "written", "stored", "salient"),
        *("readable@active", "block", "outside", "fresh"),
    )
    FIXED = ("stream", "counts", "bound", TOKENS, BATCH, "selected", "entries", *[f"index:{name}" for name in SETS])

    def __init__(self, stream: Any, inputs: Sequence[Any], state: Sequence[torch.Tensor], step: Step) -> None:
        self.stream, self.inputs = stream, inputs
        batch, tokens = step.shape
        sets = map(step.indices.get, self.SETS)
        numbers = tokens, batch, step.sizes["selected"], step.entries
        self.flat = [stream, step.counts, step.bound, *numbers, *sets, *inputs, *state]

    def slot(self, name: str) -> int:
        """Where an argument of an emitted unit lies."""
        if name in self.FIXED:
            return self.FIXED.index(name)
        kind, _, which = name.partition(":")
        return len(self.FIXED) + int(which) + (len(self.inputs) if kind == "state" else 0)


CHOICES = Choices(pick_rows, kept_and_fresh, sparse_attention, delta_attention, salient_rows)

SERVED = 1000
"""Sizes that a variant remembers to be good for."""
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
        self.for_one: set[Any] = set()  # kinds of calls whose code cannot be written for any size
        self.written: dict[tuple[Assignment, ...], bool] = {}
        self.mixing = unit.mixing(axes)
        self.narrows: bool | None = None if self.mixing else True

    def variant(self, assignment: Assignment, step: Step, values: Values) -> Variant:
        """Compiled on first use, for any sizes of two or more."""
        found = self._found(assignment, step)
        if found is None:
            with compile_lock, refusing(f"compiled for the step {assignment.name!r}"):  # as Dynamo
                found = self._found(assignment, step) or self._compile(assignment, step, values)
        return found

    def _found(self, assignment: Assignment, step: Step) -> Variant | None:
        found = self.variants.get((assignment, step.small))
        return found if found and found.serves(step) else self.variants.get((assignment, step.lengths))

    def _compile(self, assignment: Assignment, step: Step, values: Values) -> Variant:
        """Compile for any sizes, and where that is not possible, or did not make code for these, for these alone."""
        emitted = emit(self.unit, self.axes, assignment, CHOICES)
        args = [values.flat[values.slot(name)] for name in emitted.takes]
        writes = any(name.startswith("state:") for name in emitted.takes)
        extents: list[tuple[Extent, ...] | None] = []
        key: Any = assignment, step.small
        if key not in self.variants and key not in self.for_one:
            extents = [self._extents(n, value, assignment, step) for n, value in zip(emitted.takes, args, strict=True)]
        try:
            code = lower(emitted.module, args, self.lowering, extents, writes)
        except SizeFixed:
            self.for_one.add(key)
            code = lower(emitted.module, args, self.lowering, (), writes)
        if not extents or key in self.for_one:
            key = assignment, step.lengths
        found = self.variants[key] = Variant(code, emitted, values)
        return found

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
            emit(self.unit, self.axes, assignment, CHOICES)
        except GraphRefused:
            return False
        return True

    def _extents(self, name: str, value: Any, assignment: Assignment, step: Step) -> tuple[Extent, ...] | None:
        """Which sizes of an argument may be others at another call."""
        kind, _, which = name.partition(":")
        if not isinstance(value, torch.Tensor):
            return (Size((name,)),)
        if name == "stream":
            assert self.unit.stream is not None
            enter = assignment.enter
            return of_layout(self.axes.layout[self.unit.stream], TOKENS if enter == ALL else enter.name)
        if kind == "input":
            node = self.unit.inputs[int(which)]
            layout = self.axes.layout.get(node, self.axes.made.get(node))
            return of_layout(layout) if layout is not None else of_constant(value, *step.shape)
        if kind == "index":
            return Size((BATCH,)), Size((Values.SAME.get(which, which),))
        if kind != "state":
            return Size((BATCH,)), 1
        keys, at = self.unit.anchors(KEYS), int(which)
        last = len(self.unit.anchors(assignment.keep))
        if assignment.compact and at == last:
            return Size((BATCH,)), Size(("entries",))
        rows = Size(("entries" if assignment.compact and at < len(keys) else TOKENS,), 1, 1)
        return (Size((BATCH,)), rows, *map(int, value.shape[2:]))
