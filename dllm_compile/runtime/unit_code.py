"""Compiled code of a unit: one a variant, called for every layer of its kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

import torch

from dllm_compile import compat
from dllm_compile.core.assignment import KEYS, Assignment
from dllm_compile.core.axes import Axes
from dllm_compile.core.emit import Emitted, emit
from dllm_compile.core.errors import GraphRefused, refusing
from dllm_compile.core.rows import ALL
from dllm_compile.core.sizes import BATCH, TOKENS, Extent, Size, of_constant, of_layout
from dllm_compile.core.units import Unit
from dllm_compile.debug import compiling, keep, labelled

from .lower import Code, SizesFixed, lower
from .step import Step
from .trial import rows_are_independent


class Variant:
    """Compiled code of a unit for one assignment, and where its arguments lie among :class:`Arguments`."""

    def __init__(self, name: str, code: Code, emitted: Emitted, pick: Pick) -> None:
        self.code, self.pick, self.name = code, pick, name
        self.rows = emitted.leaves
        self.computed = emitted.rows
        self.work: list[tuple[tuple[str, ...], float]] | None = None  # what it costs, once someone asked
        self.extras = emitted.extras

    def __call__(self, given: Arguments) -> Any:
        """Run it; returns the unit's outputs, then ``extras``."""
        with labelled("{}", self.name):
            return self.code.run(*self.pick(given.flat))


class Arguments:
    """Everything that a unit may be called with in one step, in a flat list."""

    SAME = {"written": "active", "stored": "active", "place": "active", "readable@active": "readable"}
    SETS = (
        *("response", "prompt", "response@keyed", "readable", "active", "written", "stored", "salient"),
        *("readable@active", "block", "outside", "fresh", "place"),
    )
    FIXED = (
        "stream",
        "counts",
        "bound",
        "visible",
        "renew",
        TOKENS,
        BATCH,
        "selected",
        "entries",
        "held",
        *[f"index:{name}" for name in SETS],
    )

    def __init__(self, stream: Any, inputs: Sequence[Any], step: Step, tokens: int | None = None) -> None:
        self.stream, self.inputs = stream, inputs
        batch, every = step.shape
        sets = map(step.indices.get, self.SETS)
        numbers = tokens or every, batch, step.sizes["selected"], step.entries, step.sizes["held"]
        self.flat = [stream, step.counts, step.bound, step.visible, step.renew, *numbers, *sets, *inputs]

    def pick(self, names: Sequence[str]) -> Pick:
        """A function that takes the arguments of these names out of ``flat``."""
        take = itemgetter(*map(self.slot, names))
        return take if len(names) > 1 else lambda flat: (take(flat),)

    def slot(self, name: str) -> int:
        """The place in ``flat`` of an argument of an emitted unit."""
        if name in self.FIXED:
            return self.FIXED.index(name)
        kind, _, which = name.partition(":")
        return len(self.FIXED) + int(which) + (len(self.inputs) if kind == "state" else 0)


MOST = 32
"""Codes that are kept of a unit for one assignment: more than one where some size had to be compiled as a number."""
Pick = Callable[[Sequence[Any]], tuple[Any, ...]]
_SHARED: dict[tuple[str, int, str], UnitCode] = {}
LISTENERS: list[Callable[[str], None]] = []  # called with the name of a step whenever code is compiled for it


def shared(unit: Unit, axes: Axes, lowering: str) -> UnitCode:
    """The code of a unit, made once for all layers of its kind, of whatever graph."""
    return _SHARED.setdefault((unit.key, unit.leaving, lowering), UnitCode(unit, axes, lowering))


def forget() -> None:
    """Drop all code."""
    _SHARED.clear()


class UnitCode:
    """All variants of one kind of unit.

    Attributes:
        unit, axes: a unit of this kind and its graph; its keys and layouts are those of all of them.
        mixing: whether something in it is not known to treat rows one by one.
        by_token: whether it is a stem that makes each row of that row's token alone, so that it runs for some rows as
            for a shorter sequence.
        narrows: whether it may run for fewer rows; ``None`` until it was tried.
    """

    def __init__(self, unit: Unit, axes: Axes, lowering: str) -> None:
        self.unit, self.axes, self.lowering = unit, axes, lowering
        self.variants: dict[Assignment, list[Variant]] = {}
        self.fixed: dict[Assignment, set[str]] = {}  # sizes that cannot be left open
        self.written: dict[tuple[Assignment, ...], str | None] = {}
        self.mixing = unit.mixing(axes)
        alone = axes.group is None  # a trial might end otherwise on other ranks
        self.narrows: bool | None = True if not self.mixing else None if alone else False
        beside = any((node, n) in axes.beside for node in unit.nodes for n in node.all_input_nodes)
        live = [node.op for node in unit.inputs if node in axes.live]
        self.by_token = live == ["placeholder"] and len(unit.outputs) == 1 and not (beside or self.mixing)

    def variant(self, assignment: Assignment, step: Step, given: Arguments) -> Variant:
        """The code for an assignment; compiled on first use, for any sizes of two or more."""
        known = self.variants.get(assignment)
        if known and known[-1].code.serves(known[-1].pick(given.flat)):
            return known[-1]
        found = self._found(assignment, given)
        if found is None:
            with compat.compile_lock, refusing(f"compiled for the step {assignment.name!r}"):  # as Dynamo
                found = self._found(assignment, given) or self._compile(assignment, step, given)
        return found

    def _found(self, assignment: Assignment, given: Arguments) -> Variant | None:
        known = self.variants.get(assignment)
        if not known:
            return None
        args = known[0].pick(given.flat)
        return next((each for each in reversed(known) if each.code.serves(args)), None)

    def _compile(self, assignment: Assignment, step: Step, given: Arguments) -> Variant:
        """Compile for any sizes; those that the compiler cannot leave open, as found by trying, are fixed."""
        fixed = self.fixed.setdefault(assignment, set())
        while True:
            emitted = emit(self.unit, self.axes, assignment)
            pick = given.pick(emitted.takes)
            args = pick(given.flat)
            writes = any(name.startswith("state:") for name in emitted.takes)
            extents = [self._extents(n, value, assignment, step) for n, value in zip(emitted.takes, args, strict=True)]
            keep(f"{self.unit.name}-{assignment.name}", emitted.module)
            try:
                with compiling(self.unit.name, assignment.name):
                    code = lower(emitted.module, args, self.lowering, extents, writes, fixed)
                break
            except SizesFixed as found:
                fixed |= found.names
            except Exception:
                names = {
                    name for sizes in extents for each in sizes or () if isinstance(each, Size) for name in each.names
                }
                if fixed >= names:
                    raise
                fixed |= names  # the compiler fails with symbols; what it does without them is to be seen
        variants = self.variants.setdefault(assignment, [])
        step.compiled = True
        del variants[: 1 - MOST]
        variants.append(Variant(f"{self.unit.name} for {assignment.name}", code, emitted, pick))
        for listener in LISTENERS:
            listener(assignment.name)
        return variants[-1]

    def narrow(self, given: Arguments) -> bool:
        """Whether the unit may run for fewer rows: known, or tried once on real values."""
        if self.narrows is None:
            with refusing("tried for fewer rows"):
                self.narrows = rows_are_independent(self.unit, self.axes, given.stream, list(given.inputs))
        return self.narrows

    def writable(self, variants: tuple[Assignment, ...]) -> bool:
        """Whether the unit can be written for each of ``variants``."""
        return self.why_not_written(variants) is None

    def why_not_written(self, variants: tuple[Assignment, ...]) -> str | None:
        """Why the unit cannot be written for one of ``variants``, ``None`` where it can; found out once."""
        if variants not in self.written:
            with refusing("written for fewer rows"):
                self.written[variants] = next(filter(None, map(self._refusal, variants)), None)
        return self.written[variants]

    def _refusal(self, assignment: Assignment) -> str | None:
        try:
            emit(self.unit, self.axes, assignment)
        except GraphRefused as refusal:
            return str(refusal)
        return None

    def _extents(self, name: str, value: Any, assignment: Assignment, step: Step) -> tuple[Extent, ...] | None:
        """The sizes of an argument: names for those that may be others at another call, numbers for the rest."""
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
            return of_layout(layout) if layout is not None else of_constant(value, *step.shape, name)
        if kind == "index":
            return Size((BATCH,)), Size((Arguments.SAME.get(which, which),))
        if name == "visible":
            return Size((BATCH,)), Size((TOKENS,))
        if kind != "state":
            return Size((BATCH,)), 1
        keys, at = self.unit.anchors(KEYS), int(which)
        last = len(self.unit.anchors(assignment.keep))
        if assignment.compact and at == last:
            return Size((BATCH,)), Size(("entries",))
        if at > last or (at == last and not assignment.compact):
            return (Size((BATCH,)), Size(("held",), 1, 1), *map(int, value.shape[2:]))
        rows = Size(("entries" if assignment.compact and at < len(keys) else TOKENS,), 1, 1)
        if assignment.shared is not None:
            return (1, rows, *map(int, value.shape[2:]))
        return (Size((BATCH,)), rows, *map(int, value.shape[2:]))
