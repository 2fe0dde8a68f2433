"""A graph made ready to run: cut into units, each compiled once per variant and called for every layer like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.fx
from torch._subclasses.fake_tensor import FakeTensorMode

from .core.axes import Axes, fake_like, follow
from .core.emit import READABLE, Assignment, Emitted, emit
from .core.errors import GraphRefused
from .core.graph import fix_sizes, outline, output_node, placeholders
from .core.layout import position, size
from .core.state import allocate
from .core.units import Unit
from .kernels.row_change import pick_rows
from .lower import Compiled, lower
from .options import Options
from .passes import cut, normalized
from .passes.cache_reuse import EXACT, FULL, KEEP
from .passes.causal import refuse_causal_masks
from .passes.seeds import find_seed
from .session import Session, Step
from .trial import rows_are_independent

HEAD = Assignment("head", leave=READABLE, keep=False)


@dataclass
class Variant:
    """Compiled code of a unit for one assignment."""

    run: Compiled
    emitted: Emitted


class UnitCode:
    """All variants of one kind of unit, shared by every layer of that kind."""

    def __init__(self, unit: Unit, axes: Axes, options: Options) -> None:
        self.unit, self.axes, self.options = unit, axes, options
        self.variants: dict[Any, Variant] = {}
        self.narrows: bool | None = None if unit.mixing(axes) else True

    def emitted(self, assignment: Assignment, sizes: dict[str, int]) -> Emitted:
        """The unit written for an assignment, not compiled."""
        return emit(self.unit, self.axes, assignment, sizes, pick_rows)

    def variant(self, assignment: Assignment, step: Step, args: Arguments) -> Variant:
        """Compiled on first use."""
        names = {s.name for s in assignment.sets()}
        free = assignment.leave == READABLE
        key = (assignment.name, *(() if free else sorted((n, k) for n, k in step.sizes.items() if n in names)))
        if key not in self.variants:
            emitted = self.emitted(assignment, step.sizes)
            given = args.collect(emitted.takes)
            dynamic = [i for i, name in enumerate(emitted.takes) if free and name == "index:readable"]
            self.variants[key] = Variant(lower(emitted.module, given, self.options.lowering, dynamic), emitted)
        return self.variants[key]

    def chosen(self, assignment: Assignment, args: Arguments) -> Assignment:
        """The assignment itself, or ``full`` rows when this unit's rows turn out to depend on one another."""
        if assignment in (EXACT, FULL) or self.narrows:
            return assignment
        if self.narrows is None:
            self.narrows = rows_are_independent(self.unit, self.axes, args.stream, args.inputs)
        return assignment if self.narrows else FULL


@dataclass
class Arguments:
    """What one unit can be called with in one step."""

    stream: Any
    inputs: list[Any]
    state: list[torch.Tensor]
    step: Step

    def collect(self, takes: Sequence[str]) -> list[Any]:
        """Values in the order of the names."""
        out: list[Any] = []
        for name in takes:
            kind, _, which = name.partition(":")
            if kind == "stream":
                out.append(self.stream)
            elif kind == "input":
                out.append(self.inputs[int(which)])
            elif kind == "state":
                out.append(self.state[int(which)])
            elif kind == "index":
                out.append(self.step.indices[which])
            else:
                out.append(self.step.counts)
        return out


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
        self.vocabulary = _vocabulary(self.seed, self.axes)
        refuse_causal_masks(graph, self.axes, args)
        self.beside = [
            i
            for i, node in enumerate(names)
            if node is not self.seed and isinstance(args[i], torch.Tensor) and _belongs_to_sequence(node, args[i], self.shape)
        ]
        self.index = {node: i for i, node in enumerate(names)}
        self._code: dict[str, UnitCode] = {}
        self.codes = [self._code.setdefault(unit.key, UnitCode(unit, self.axes, options)) for unit in self.units]
        self.constants = [n for n in constants if self._read_later(n, constants)]
        self.prelude_reads = [n for n in names if any(user in constants for user in n.users)]
        self.prelude = outline(constants, self.prelude_reads, self.constants) if self.constants else None
        self.prelude_run: Compiled | None = None
        self.result = output_node(graph).args[0]
        if not self.units:
            raise GraphRefused("nothing here depends on the tokens")

    def _read_later(self, node: torch.fx.Node, constants: list[torch.fx.Node]) -> bool:
        return any(user not in constants for user in node.users)

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

    def first_layer(self, args: Sequence[Any]) -> Any:
        """Identity of the first layer: its kind and its weights."""
        given = dict(zip(self.index, args, strict=True))
        return _layer_key(self.layers[0], [given.get(n) for n in self.layers[0].inputs])

    def run(self, args: Sequence[Any], session: Session, step: Step) -> Any:
        """One call as part of ``step``."""
        env: dict[torch.fx.Node, Any] = dict(zip(self.index, args, strict=True))
        if step.repeat and self in session.outputs:
            return self._answer(session.outputs[self])
        if self.prelude is not None:
            given = [env[n] for n in self.prelude_reads]
            if self.prelude_run is None:
                self.prelude_run = lower(self.prelude, given, self.options.lowering)
            env.update(zip(self.constants, self.prelude_run(*given), strict=True))
        head = self.head(session.vocabulary)
        for unit, code in zip(self.units, self.codes, strict=True):
            if unit.attentions:
                self._layer(unit, code, env, session, step)
            elif unit is head:
                self._head(unit, code, env, session, step)
            else:
                self._plain(unit, code, env, session, step)
        results = {n: env[n] for n in output_node(self.graph).all_input_nodes}
        if head is not None or self.ids is not None:
            session.outputs[self] = results
        return self._answer(results)

    def _answer(self, results: dict[torch.fx.Node, Any]) -> Any:
        """The graph's outputs; a caller may write into them."""
        fresh = {n: v.clone() if isinstance(v, torch.Tensor) and n in self.axes.live else v for n, v in results.items()}
        return torch.fx.map_arg(self.result, lambda n: fresh[n])

    def _plain(self, unit: Unit, code: UnitCode, env: dict[torch.fx.Node, Any], session: Session, step: Step) -> None:
        """A unit that always runs for all rows."""
        args = Arguments(env.get(unit.stream) if unit.stream else None, [env[n] for n in unit.inputs], [], step)
        self._call(unit, code, EXACT, args, env)

    def _layer(self, unit: Unit, code: UnitCode, env: dict[torch.fx.Node, Any], session: Session, step: Step) -> None:
        inputs = [env[n] for n in unit.inputs]
        key = _layer_key(unit, inputs)
        assert unit.stream is not None
        args = Arguments(env[unit.stream], inputs, [], step)
        first = step.layer == 0
        position_in_model, step.layer = step.layer, step.layer + 1
        if step.assignment is EXACT or key in step.seen:
            self._call(unit, code, EXACT, args, env)
            return
        step.seen.add(key)
        if key not in session.layers:
            session.layers[key] = allocate(unit, self.axes, args.stream.device)
            assignment = FULL
        elif step.repeat:
            assignment = KEEP  # every row as it was: the same input gives the same output
        else:
            assignment = FULL if first else code.chosen(step.assignment, args)
        args.state = session.layers[key]
        picked = self._call(unit, code, assignment, args, env)
        if picked is not None:
            session.selected[position_in_model] = picked

    def _head(self, unit: Unit, code: UnitCode, env: dict[torch.fx.Node, Any], session: Session, step: Step) -> None:
        assert unit.stream is not None
        node = unit.outputs[0]
        args = Arguments(env[unit.stream], [env[n] for n in unit.inputs], [], step)
        index = step.indices["readable"]
        kept = session.logits.get(self)
        if kept is None or index.shape[1] > step.shape[1] * 0.9:
            self._call(unit, code, EXACT, args, env)
            rows = env[node]
            kept = session.logits[self] = rows.new_empty((rows.shape[0], rows.shape[1] + 1, *rows.shape[2:]))
            kept[:, :-1] = rows
        elif index.shape[1]:
            self._call(unit, code, HEAD, args, env)
            kept[torch.arange(index.shape[0], device=index.device).unsqueeze(1), index] = env[node]
        env[node] = kept[:, :-1]

    def _call(
        self, unit: Unit, code: UnitCode, assignment: Assignment, args: Arguments, env: dict[torch.fx.Node, Any]
    ) -> torch.Tensor | None:
        variant = code.variant(assignment, args.step, args)
        outs = variant.run(*args.collect(variant.emitted.takes))
        env.update(zip(unit.outputs, outs, strict=False))
        return outs[-1] if assignment.pick else None


def _layer_key(unit: Unit, inputs: list[Any]) -> Any:
    """State belongs to weights, not to graphs: one graph may serve every layer."""
    return unit.key, tuple(id(v) for v in inputs if isinstance(v, torch.nn.Parameter))


def _vocabulary(seed: torch.fx.Node, axes: Axes) -> int | None:
    """Rows of the table that token ids are looked up in."""
    tables = [user.args[1] for user in axes.live if user.target is torch.nn.functional.embedding]
    sizes = [axes.fake[table].shape[0] for table in tables if isinstance(table, torch.fx.Node)]
    return max(sizes) if sizes and not axes.fake[seed].is_floating_point() else None


def _belongs_to_sequence(node: torch.fx.Node, value: torch.Tensor, shape: tuple[int, int]) -> bool:
    """Masks and positions of this sequence; not weights, not tables of the model."""
    return not isinstance(value, torch.nn.Parameter) and value.dim() > 1 and value.shape[-1] == shape[1]
