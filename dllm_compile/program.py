"""A graph made ready to run: cut into units, each compiled once per variant and called for every layer like it."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .core.assignment import READABLE, Assignment
from .core.axes import Axes, fake_like, follow
from .core.emit import Emitted, emit
from .core.errors import GraphRefused
from .core.graph import fix_sizes, outline, output_node, placeholders
from .core.layout import position, size
from .core.state import allocate
from .core.units import Unit
from .kernels.row_change import pick_rows
from .lower import Compiled, lower
from .options import Options
from .outbox import Outbox
from .passes import cut, normalized
from .passes.cache_reuse import EXACT, FULL, KEEP
from .passes.causal import refuse_causal_masks
from .passes.seeds import find_seed
from .session import Session, Step
from .trial import rows_are_independent

HEAD = Assignment("head", leave=READABLE, keep=False)


class Variant:
    """Compiled code of a unit for one assignment, and where its arguments lie in a call's values."""

    def __init__(self, run: Compiled, emitted: Emitted, values: Values) -> None:
        self.run = run
        self.rows = emitted.rows
        pick = itemgetter(*[values.slot(name) for name in emitted.takes])
        self.pick = pick if len(emitted.takes) > 1 else lambda flat: (pick(flat),)

    def __call__(self, values: Values) -> Any:
        """Run it; returns the unit's outputs, then the picked rows if there are any."""
        return self.run(*self.pick(values.flat))


class Values:
    """All that one unit can be called with in one step, in a flat list."""

    FIXED = ("stream", "counts", "index:response", "index:prompt", "index:readable")

    def __init__(self, stream: Any, inputs: Sequence[Any], state: Sequence[torch.Tensor], step: Step) -> None:
        indices = step.indices
        self.stream, self.inputs = stream, inputs
        fixed = (stream, step.counts, indices["response"], indices["prompt"], indices["readable"])
        self.flat = [*fixed, *inputs, *state]

    def slot(self, name: str) -> int:
        """Where an argument of an emitted unit lies."""
        if name in self.FIXED:
            return self.FIXED.index(name)
        kind, _, which = name.partition(":")
        return len(self.FIXED) + int(which) + (len(self.inputs) if kind == "state" else 0)


class UnitCode:
    """All variants of one kind of unit, shared by every layer of that kind."""

    def __init__(self, unit: Unit, axes: Axes, options: Options) -> None:
        self.unit, self.axes, self.options = unit, axes, options
        self.variants: dict[Any, Variant] = {}
        self.narrows: bool | None = None if unit.mixing(axes) else True

    def variant(self, assignment: Assignment, step: Step, values: Values) -> Variant:
        """Compiled on first use; the head serves any number of rows, a layer those it was compiled for."""
        key = assignment.name if assignment.fixed else (assignment.name, step.signature)
        found = self.variants.get(key)
        if found is None:
            emitted = emit(self.unit, self.axes, assignment, step.sizes, pick_rows)
            args = [values.flat[values.slot(name)] for name in emitted.takes]
            free = [i for i, name in enumerate(emitted.takes) if name == "index:readable"]
            found = Variant(lower(emitted.module, args, self.options.lowering, free), emitted, values)
            self.variants[key] = found
        return found

    def chosen(self, assignment: Assignment, values: Values) -> Assignment:
        """The assignment itself, or ``full`` when this unit's rows turn out to depend on one another."""
        if self.narrows or assignment in (EXACT, FULL):
            return assignment
        if self.narrows is None:
            self.narrows = rows_are_independent(self.unit, self.axes, values.stream, list(values.inputs))
        return assignment if self.narrows else FULL


class Program:
    """One graph at one set of input shapes.

    Attributes:
        units: stem, layers and head, whichever the graph has.
        ids: the placeholder that holds token ids, if the graph has it.
    """

    def __init__(self, module: torch.fx.GraphModule, args: Sequence[Any], options: Options) -> None:
        self.options = options
        fake_mode = FakeTensorMode()
        fake = fake_like(args, fake_mode)
        graph = normalized(fix_sizes(module.graph, fake, fake_mode), fake, fake_mode)
        self.graph = graph
        names = placeholders(graph)
        self.seed, layout = find_seed(graph, args)
        self.axes = follow(graph, fake, fake_mode, {self.seed.name: layout})
        self.shape = (layout[0][0].size, layout[1][0].size)
        self.units, constants = cut(graph, self.axes)
        self.ids = self.seed if not args[names.index(self.seed)].is_floating_point() else None
        self.layers = [unit for unit in self.units if unit.attentions]
        self.exports = {node for unit in self.layers for node in unit.outputs[1:]}
        self.vocabulary = _vocabulary(self.seed, self.axes)
        refuse_causal_masks(graph, self.axes, args)
        self.beside = [
            i
            for i, node in enumerate(names)
            if node is not self.seed
            and isinstance(args[i], torch.Tensor)
            and _belongs_to_sequence(node, args[i], self.shape)
        ]
        self.index = {node: i for i, node in enumerate(names)}
        self._code: dict[str, UnitCode] = {}
        self.codes = [self._code.setdefault(unit.key, UnitCode(unit, self.axes, options)) for unit in self.units]
        self.constants = [n for n in constants if any(user not in constants for user in n.users)]
        self.prelude_reads = [n for n in names if any(user in constants for user in n.users)]
        self.prelude = outline(constants, self.prelude_reads, self.constants) if self.constants else None
        self.prelude_run: Compiled | None = None
        self.result = output_node(graph).args[0]
        self.outbox: dict[torch.fx.Node, Outbox] = {}
        self.results = output_node(graph).all_input_nodes
        if not self.units:
            raise GraphRefused("nothing here depends on the tokens")

    def head(self, vocabulary: int | None) -> Unit | None:
        """The unit whose first output a sampler reads: it is as wide as the vocabulary.

        A graph of its own could also be a norm that sits between two layers, whose every row is needed.
        """
        last = self.units[-1]
        if last.attentions or last.stream is None or not last.outputs or vocabulary is None:
            return None
        layout = self.axes.layout.get(last.outputs[0], ())
        readable = position(layout, "T") is not None and position(layout, "B") is not None
        return last if readable and size(layout[-1]) >= vocabulary and not last.mixing(self.axes) else None

    def first_weights(self, args: Sequence[Any]) -> list[torch.Tensor]:
        """Parameters of the first layer."""
        given = [args[self.index[n]] for n in self.layers[0].inputs if n in self.index]
        return [a for a in given if isinstance(a, torch.nn.Parameter)]

    def run(self, args: Sequence[Any], session: Session, step: Step) -> Any:
        """One call as part of ``step``."""
        if step.repeat and self in session.outputs:
            return self._answer(session.outputs[self], True)
        env: dict[torch.fx.Node, Any] = dict(zip(self.index, args, strict=True))
        if self.prelude is not None:
            given = [env[n] for n in self.prelude_reads]
            if self.prelude_run is None:
                self.prelude_run = lower(self.prelude, given, self.options.lowering)
            env.update(zip(self.constants, self.prelude_run(*given), strict=True))
        head = self.head(session.vocabulary)
        for unit, code in zip(self.units, self.codes, strict=True):
            inputs = [env[n] for n in unit.inputs]
            stream = env[unit.stream] if unit.stream is not None else None
            if unit.attentions:
                outs = self._layer(
                    unit, code, Values(stream, inputs, self._state(unit, inputs, session, step), step), session, step
                )
            elif unit is head:
                outs = self._head(code, Values(stream, inputs, (), step), session, step)
            else:
                values = Values(stream, inputs, (), step)
                outs = code.variant(EXACT, step, values)(values)
            env.update(zip(unit.outputs, outs, strict=False))
        results = {n: env[n] for n in self.results}
        kept = head is not None or self.ids is not None
        if kept:
            session.outputs[self] = results
        return self._answer(results, kept)

    def _answer(self, results: dict[torch.fx.Node, Any], kept: bool) -> Any:
        """The graph's outputs; a caller may write into them without spoiling what is kept."""
        mine = self.axes.layout if kept else self.exports
        fresh = {n: self.outbox.setdefault(n, Outbox()).copy(v) if n in mine else v for n, v in results.items()}
        return torch.fx.map_arg(self.result, lambda n: fresh[n])

    def _state(self, unit: Unit, inputs: list[Any], session: Session, step: Step) -> list[torch.Tensor]:
        """Rows kept of the layer that these weights are, nothing when it keeps none or has run in this step."""
        key = _layer_key(unit, inputs)
        step.fresh = False
        if step.assignment is EXACT or key in step.seen:
            return []
        step.seen.add(key)
        if key not in session.layers:
            step.fresh = True
            session.layers[key] = allocate(unit, self.axes, step.counts.device)
        return session.layers[key]

    def _layer(self, unit: Unit, code: UnitCode, values: Values, session: Session, step: Step) -> Any:
        number, step.layer = step.layer, step.layer + 1
        if len(values.flat) == len(values.FIXED) + len(values.inputs):
            assignment = EXACT
        elif step.fresh:
            assignment = FULL
        elif step.repeat:
            assignment = KEEP  # every row as it was: the same input gives the same output
        else:
            assignment = code.chosen(step.assignment, values) if number else FULL
        outs = code.variant(assignment, step, values)(values)
        if assignment.pick:
            session.selected[number] = outs[-1]
        return outs

    def _head(self, code: UnitCode, values: Values, session: Session, step: Step) -> list[Any]:
        """Logits of the readable rows, merged into those kept of the other rows."""
        index = step.indices["readable"]
        kept = session.logits.get(self)
        if kept is None or index.shape[1] > step.shape[1] * 0.9:
            outs = list(code.variant(EXACT, step, values)(values))
            if kept is None:
                batch, tokens, *rest = outs[0].shape
                with torch.inference_mode(False):
                    kept = torch.empty(batch, tokens + 1, *rest, dtype=outs[0].dtype, device=outs[0].device)
                session.logits[self] = kept
            kept[:, :-1] = outs[0]
            return [kept[:, :-1], *outs[1:]]
        if not index.shape[1]:
            return [kept[:, :-1]]
        outs = list(code.variant(HEAD, step, values)(values))
        kept[torch.arange(index.shape[0], device=index.device).unsqueeze(1), index] = outs[0]
        return [kept[:, :-1], *outs[1:]]


def _layer_key(unit: Unit, inputs: list[Any]) -> Any:
    """State belongs to weights, not to graphs: one graph may serve every layer."""
    return unit.key, tuple(
        [id(v) for v in inputs if type(v) is torch.nn.Parameter or isinstance(v, torch.nn.Parameter)]
    )


def _vocabulary(seed: torch.fx.Node, axes: Axes) -> int | None:
    """Rows of the table that token ids are looked up in."""
    if axes.fake[seed].is_floating_point():
        return None
    looked_up = [user for user in axes.live if user.target is torch.nn.functional.embedding]
    looked_up.sort(key=lambda user: user.args[0] is not seed)  # positions may be computed from ids and looked up too
    table = looked_up[0].args[1] if looked_up else None
    return int(axes.fake[table].shape[0]) if isinstance(table, torch.fx.Node) else None


def _belongs_to_sequence(node: torch.fx.Node, value: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Masks and positions of this sequence; not weights, not tables of the model."""
    return not isinstance(value, torch.nn.Parameter) and value.dim() > 1 and value.shape[-1] == shape[1]
