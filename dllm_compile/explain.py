"""``explain``: what the compiler found in a model, what each variant of a step computes, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
import torch

from .backend import Backend
from .core.arguments import called
from .core.assignment import EXACT, Assignment
from .core.axes import Axes
from .core.demand import find_demand
from .core.rows import NONE
from .core.units import Unit
from .interface.plan import Call, Plan, Schedule
from .mechanisms import turned_on
from .options import Options, all_names, check_vocabulary
from .passes.block_cache import full_steps
from .passes.feature_cache import share
from .runtime import cost
from .runtime.graph_call import HEAD
from .runtime.ids import infer_mask_id
from .runtime.program import Program
from .runtime.skipping import layers_at, widths
from .sampler.check import check_ids, check_inputs, check_model, check_range, embedded
from .schedule.method import schedule

_COLOURS = "blue", "yellow", "green", "red", "magenta", "cyan"
"""Of row sets in a terminal, in the order in which they are met."""
_HEADS = "variant", "query", "key", "value", "FLOPs relative to eager"


@dataclass(frozen=True)
class Value:
    """A value of a layer that depends on the tokens.

    Attributes:
        name: of its node in the graph.
        operation: what computes it.
        reads: names of the values of the layer that it is computed from.
        rows: by the name of a variant, the row set it is computed for; ``none`` where it is not computed.
    """

    name: str
    operation: str
    reads: tuple[str, ...]
    rows: dict[str, str]


@dataclass
class Explanation:
    """What ``explain`` found.

    Attributes:
        graphs: a description of each graph that Dynamo handed over, in order.
        refused: graphs that run on plain Inductor, with the reason.
        flops: closed form per variant of a whole step, in the symbols of :mod:`dllm_compile.runtime.cost`.
        relative: the same relative to an eager step, which computes logits of all rows, for the given lengths, half of
            the response still masked and a tenth of it salient.
        state_bytes: closed form of what is kept between steps.
        peak_bytes: by variant, about so many bytes beyond the weights, for the same lengths: what is kept, and the
            values of the unit that needs most. Temporaries of operations, and logits handed out, come on top.
        lengths: the lengths that ``relative`` is for.
        variants: of a step, by name.
        first: the variant of the first layer, where it is always the same.
        more: a sentence for whatever else happens in a step.
        layers: by the name of a kind of layer, its values in order.
    """

    graphs: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    flops: dict[str, sympy.Expr] = field(default_factory=dict)
    relative: dict[str, float] = field(default_factory=dict)
    state_bytes: sympy.Expr = field(default_factory=lambda: sympy.Integer(0))
    peak_bytes: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    variants: dict[str, Assignment] = field(default_factory=dict)
    first: str | None = None
    more: list[str] = field(default_factory=list)
    layers: dict[str, list[Value]] = field(default_factory=dict)

    def __str__(self) -> str:
        rows = [[name, *cells] for name, cells in self._rows().items()]
        lines = [f"{a:<15}{b:<17}{c:<17}{d:<10}{e}" for a, b, c, d, e in [_HEADS, *rows]] if rows else []
        return "\n".join([*self._above(), *([""] if lines else []), *lines, *self._below()])

    def __rich__(self) -> Any:
        """The same for ``rich.print``: a table with a colour for each row set, and bars."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        table = Table(*_HEADS, title="kinds of steps, and the rows that they compute")
        rows = self._rows()
        names = [*dict.fromkeys(name for *sets, _ in rows.values() for name in sets)]
        colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
        for name, (*sets, relative) in rows.items():
            bar = "\N{FULL BLOCK}" * round(20 * min(self.relative[name], 1.5))
            table.add_row(name, *(Text(each, colours[each]) for each in sets), f"{relative} {bar}")
        above, below = Text("\n".join(self._above())), Text("\n".join(self._below()))
        return Group(above, *([table] if self.variants else []), below)

    def _above(self) -> list[str]:
        """Lines before the table."""
        return [*self.graphs, *(f"runs on plain Inductor: {reason}" for reason in self.refused)]

    def _rows(self) -> dict[str, tuple[str, str, str, str]]:
        """Of the table, by the name of a variant."""
        return {
            name: (a.query.name, a.key.name, a.value.name, f"{self.relative[name]:.3f}")
            for name, a in self.variants.items()
        }

    def _below(self) -> list[str]:
        """Lines behind the table."""
        lines = []
        if self.variants:
            first = f"the first layer is always {self.first}; " if self.first else ""
            lines.append(f"({first}the head computes the readable rows)")
        lines += self.more
        lines += ["", *[f"FLOPs {name} = {expression}" for name, expression in self.flops.items()]]
        lines.append(f"state bytes = {self.state_bytes}")
        lines += [f"peak bytes {name} ~ {count}" for name, count in self.peak_bytes.items()]
        at = self.meanings()
        return [*lines, f"at {', '.join(at)}"] if at else lines

    def meanings(self) -> list[str]:
        """What the symbols of the formulas stand for, each with its number, as in ``"S = 320 (tokens of each)"``."""
        formulas = (*self.flops.values(), self.state_bytes)
        read = {symbol.name for formula in formulas for symbol in formula.free_symbols}
        return [
            f"{name} = {value} ({cost.MEANING.get(name, 'active rows of deeper layers')})"
            for name, value in self.lengths.items()
            if name in read
        ]


def explain(model: torch.nn.Module, example_ids: torch.Tensor, /, **options: Any) -> Explanation:
    """Trace a model once and say what the backend would do with it.

    Args:
        model: any module that maps ids ``[B, S]`` to logits; it runs once, uncompiled.
        example_ids: ``[B, S]`` ids of a first denoising call, the response still masked.
        options: as for ``torch.compile``; keywords that are no option are passed to the model (``attention_mask``).

    Raises:
        TypeError: the model cannot be called, or the ids are no tensor.
        ValueError: a bad option, ids that the model does not embed, an input that it does not take, or nothing masked.
    """
    check_model(model)
    check_ids("example_ids", example_ids)
    names = all_names()
    given = {name: value for name, value in options.items() if name in names or not isinstance(value, torch.Tensor)}
    extra = {name: value for name, value in options.items() if name not in given}
    chosen = Options.of({**given, "lowering": "eager"})
    check_inputs(model, extra)
    host, tokens = example_ids.cpu(), embedded(model)
    check_vocabulary(chosen.mask_id, tokens)
    if host.numel():
        check_range("example_ids", int(host.min()), int(host.max()), tokens)
    mask_id = chosen.mask_id if chosen.mask_id is not None else infer_mask_id(host)
    if mask_id is None or not bool((host == mask_id).any()):
        which = "no id that ends every sequence twice" if mask_id is None else f"no mask {mask_id}"
        raise ValueError(
            f"example_ids hold {which}; give the ids of a first call, its response all masks, and mask_id where they "
            "do not end with it"
        )
    backends: list[Backend] = []

    def collect(module: torch.fx.GraphModule, inputs: list[Any]) -> Backend:
        backends.append(Backend(module, chosen))
        return backends[-1]

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=collect)(example_ids, **extra)
    torch.compiler.reset()
    out = Explanation()
    for backend in backends:
        out.refused += backend.refused
        for session in backend.sessions:
            session.drop()
    found = (program for backend in backends for program in backend.programs.known.values())
    programs = [program for program in found if program is not None]
    out.graphs += map(_describe, programs)
    _add_costs(out, programs, example_ids, chosen)
    return out


def _describe(program: Program) -> str:
    lines = [
        f"graph with {len(program.graph.nodes)} nodes, tokens enter by {program.seed.name!r}, "
        f"[B, S] = {list(program.size)}"
    ]
    kinds: dict[str, int] = {}
    for unit in program.layers:
        kinds[unit.key] = kinds.get(unit.key, 0) + 1
    lines.append(f"  layers: {len(program.layers)} of {len(kinds)} kind(s); parts in all: {len(program.units)}")
    seen: set[str] = set()
    for unit in program.layers:
        if unit.key in seen:
            continue
        seen.add(unit.key)
        calls = [each.node.name for each in unit.attentions]
        lines.append(f"  layer kind x{kinds[unit.key]}: attention {', '.join(calls)}")
        lines += [f"    keys kept at {a.key.name!r}, values at {a.value.name!r}" for a in unit.attentions]
        lines += [
            f"    branch {'with' if b.attends else 'without'} attention kept at {b.node.name!r}" for b in unit.branches
        ]
        if unit.mixing(program.axes):
            lines.append("    has calls whose rows may mix; narrowed only after a trial on the real weights")
    head, logits = program.head(program.vocabulary), program.logits(program.vocabulary)
    rows = "every row" if program.reads_all(program.vocabulary) else "readable rows"
    lines.append(
        f"  head: {(logits or head.outputs[0]).name!r}, computed for {rows}" if head else "  head: none in this graph"
    )
    if logits in program.results:
        lines.append(
            f"    the loop gets logits of all rows, and each softmax or argmax of it is over {program.vocabulary} "
            "tokens a row; generate, or a compiled step with denoise_step, makes them of readable rows alone"
        )
    return "\n".join(lines)


def _values(unit: Unit, axes: Axes, variants: dict[str, Assignment]) -> list[Value]:
    """The values of a layer, with the rows that each variant computes."""
    computed = {name: find_demand(unit, axes, variant).computed for name, variant in variants.items()}
    live = [node for node in unit.nodes if node in axes.live]
    return [
        Value(
            node.name,
            called(node),
            tuple(operand.name for operand in node.all_input_nodes if operand in axes.live),
            {name: found.get(node, NONE).name for name, found in computed.items()},
        )
        for node in live
    ]


def _add_costs(out: Explanation, programs: list[Program], ids: torch.Tensor, options: Options) -> None:
    mask_id = options.mask_id if options.mask_id is not None else infer_mask_id(ids.cpu())
    masked = ids.cpu() == mask_id if mask_id is not None else torch.zeros(ids.shape, dtype=torch.bool)
    response, tokens = int(masked.sum(1).max()), ids.shape[1]
    method = schedule(options, masked)
    nothing = masked & False
    calls = options.full_steps + full_steps(options) + 4
    plans = [method.next(Call(i, False, masked, nothing, nothing)) for i in range(calls)]
    out.lengths = {"B": ids.shape[0], "S": tokens, "P": tokens - response, "G": response, "R": response // 2 + 1}
    out.lengths |= {"n": int(response * share(options)), "s": max(response // 10, 1), **_rows_of(plans, tokens)}
    out.lengths |= _going(plans, len(method.skips.depths(options)), out.lengths["A"]) if method.skips else {}
    present = "W" in out.lengths
    if not any(program.layers for program in programs):
        return
    out.variants = {variant.name: variant for variant in method.variants}
    kinds = {unit.name: (unit, program.axes) for program in programs for unit in program.layers}
    out.layers = {name: _values(unit, axes, out.variants) for name, (unit, axes) in kinds.items()}
    out.first = method.first.name if method.first else None
    skipped = _skipped(programs, method, options)
    out.more += _also(method, options, skipped, out.lengths)
    for name, assignment in out.variants.items():
        fewer = skipped if skips_rows(assignment) else {}
        work = sum((_step(p, assignment, method.first or assignment, fewer) for p in programs), sympy.Integer(0))
        out.flops[name] = sympy.expand(work.subs(cost.A, cost.W) if assignment.alone and present else work)
    layers = [(u, p) for p in programs for u in p.layers if method.first is None or not p.is_first(u)]
    out.state_bytes = sympy.expand(
        sum((cost.state_bytes(u, p.axes, method.variants) for u, p in layers), sympy.Integer(0))
    )
    numbers = {sympy.Symbol(k, positive=True, integer=True): v for k, v in out.lengths.items()}
    whole = out.flops[method.variants[0].name].subs({**numbers, cost.R: tokens})
    kept = int(out.state_bytes.subs(numbers))
    for name, assignment in out.variants.items():
        left = {cost.R: min(numbers[cost.R], numbers[cost.going(max(skipped.values()))])} if skipped else {}
        sizes = {**numbers, **left} if skips_rows(assignment) else numbers
        out.relative[name] = float(out.flops[name].subs(sizes) / whole)
        runs = [(u, p, assigned(p, u, assignment, method.first or assignment)) for p in programs for u in p.units]
        sizes = {**numbers, cost.A: numbers[cost.W]} if assignment.alone and present else numbers
        out.peak_bytes[name] = kept + max(cost.live_bytes(u, p.axes, chosen, sizes) for u, p, chosen in runs)


def _rows_of(plans: list[Plan], tokens: int) -> dict[str, int]:
    """Numbers of rows in some steps of sequences of so many tokens, by the names that formulas have for them."""
    rows = [(plan.assignment.alone, int(plan.active.sum(1).max())) for plan in plans if plan.active is not None]
    active, present = [count for alone, count in rows if not alone], [count for alone, count in rows if alone]
    fresh = [max(int(plan.fresh.sum(1).max()), 2) for plan in plans if plan.fresh is not None]
    found = {"A": min(active, default=tokens), "E": max(plan.kept for plan in plans), "F": max(fresh, default=0)}
    return found | ({"W": present[0]} if present else {})


def _going(plans: list[Plan], depths: int, active: int) -> dict[str, int]:
    """The fewest rows that some steps compute from each depth on; where none skips any, all that are ``active``."""
    found = [[*widths(plan, 1).values()] for plan in plans if plan.going is not None]
    return {f"A{i + 1}": count for i, count in enumerate(min(found, default=[active] * depths))}


def _also(method: Schedule, options: Options, skipped: dict[int, int], lengths: dict[str, int]) -> list[str]:
    """Sentences about what happens in a step beside what the rows of its variant tell."""
    said = []
    if method.after_layer is not None:
        measure, decide = (
            getattr(f, "__name__", repr(f)) for f in (method.after_layer.measure, method.after_layer.decide)
        )
        said.append(f"behind each layer: {measure}, then {decide} may have deeper layers compute every row")
    if method.skips is not None and not skipped:
        depths = ", ".join(f"{depth:g}" for depth in method.skips.depths(options))
        said.append(f"from depth {depths} on, layers compute fewer rows in partial steps; FLOPs are of all rows")
    for layer, which in skipped.items():
        said.append(
            f"in partial steps, layer {layer} and those behind it compute A{which + 1} = "
            f"{lengths[f'A{which + 1}']} of the A = {lengths['A']} rows"
        )
    leaving = [each.name for each in turned_on(options, "present")]
    if leaving:
        said.append(f"no step computes or reads the rows that {' or '.join(leaving)} leaves out")
    hiding = [each.name for each in turned_on(options, "visible")]
    if hiding:
        said.append(f"attention reads only the keys that {' and '.join(hiding)} leave visible")
    return said


def assigned(program: Program, unit: Unit, assignment: Assignment, first: Assignment) -> Assignment:
    """What a unit runs in a step: the layers as assigned, the head on readable rows."""
    if unit.is_layer:
        return first if program.is_first(unit) else assignment
    return HEAD if unit is program.head(program.vocabulary) else EXACT


def skips_rows(assignment: Assignment) -> bool:
    """Whether deeper layers of a step may skip some of the rows that layers before them compute."""
    return not (assignment.computes_all or assignment.alone or assignment.evict is not None)


def _skipped(programs: list[Program], method: Schedule, options: Options) -> dict[int, int]:
    """By the number of a layer from which on fewer rows are computed, which of the depths that is; none where layers
    come in graphs of their own, so that their number is not known.
    """
    if method.skips is None or len(programs) != 1 or programs[0].ids is None:
        return {}
    return layers_at(method.skips.depths(options), programs[0].depth)


def _step(program: Program, assignment: Assignment, first: Assignment, skipped: dict[int, int]) -> sympy.Expr:
    """FLOPs of one step through a graph.

    Args:
        program: the graph.
        assignment, first: what layers run, and the first one.
        skipped: by the number of a layer with attention, which of the depths applies from there on.
    """
    total, depth, rows = sympy.Integer(0), 0, cost.A
    memo: dict[tuple[str, Assignment], sympy.Expr] = {}
    for unit in program.units:
        chosen = assigned(program, unit, assignment, first)
        key = (unit.key, chosen)
        if key not in memo:
            memo[key] = cost.flops(unit, program.axes, chosen)
        if unit.is_layer and unit.attentions:
            rows, depth = cost.going(skipped[depth]) if depth in skipped else rows, depth + 1
        total += memo[key].subs(cost.A, rows) if unit.is_layer else memo[key]
    return total
