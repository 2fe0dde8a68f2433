"""``explain --shape``: the least that a step of each method reads, computes and launches, and the time that it takes.

Nothing is run, and no weights exist: the model is traced on PyTorch's ``meta`` device. A step takes at least the
longest of

    bandwidth   weights, each read once (few rows of the table of embeddings are, so that it does not count, unless it
                is tied to the head); rows kept between steps, read or written once; logits of the readable rows,
                written once
    FLOPs       of the rows that it computes
    launches    of generated code, one after another, in a call that is recorded as a CUDA graph

Not in it: activations, the host, the copies of logits for the caller, and that no kernel is as fast as the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

import sympy
import torch

from dllm_compile.core.assignment import EXACT, Assignment
from dllm_compile.core.axes import Axes
from dllm_compile.core.units import Unit
from dllm_compile.explain import assigned, skips_rows
from dllm_compile.interface.plan import Call, Plan, Schedule
from dllm_compile.options import Options
from dllm_compile.runtime import cost
from dllm_compile.runtime.positions import positions_of_call
from dllm_compile.runtime.program import Program
from dllm_compile.runtime.skipping import layers_at, widths
from dllm_compile.schedule.method import response_of, schedule

from .model import SHAPES, Setting, random_model
from .shape import entrants, weight_bytes


@dataclass(frozen=True)
class Gpu:
    """What a device can do at best.

    Attributes:
        memory: bytes.
        bandwidth: bytes a second.
        flops: of dense products in bfloat16, a second.
        launch: seconds from one launch of a recorded call to the next, where kernels do nothing.
    """

    memory: float
    bandwidth: float
    flops: float
    launch: float


GPUS = {"h100": Gpu(80e9, 3.35e12, 989.4e12, 1.3e-6), "h200": Gpu(141e9, 4.8e12, 989.4e12, 1.3e-6)}
"""The SXM modules. Memory, bandwidth and FLOPs (half of those with sparsity): NVIDIA's data sheets. Launch: measured on
an H100 with CUDA graphs, Hazy Research, "Look Ma, No Bubbles!", 2025-05-27; the H200 has the same chip."""

LAUNCHES = {
    "llada-8b": {
        ("stem", "exact"): 1,
        ("layer", "exact"): 13,
        ("layer", "block"): 13,
        ("layer", "block, some keys hidden"): 14,
        ("layer", "select"): 20,
        ("layer", "response"): 15,
        ("layer", "sparse"): 14,
        ("layer", "inside"): 14,
        ("attention", "salient"): 21,
        ("mlp", "salient"): 9,
        ("head", "head"): 2,
    },
    "dream-7b": {
        ("stem", "exact"): 1,
        ("layer", "exact"): 14,
        ("layer", "block"): 14,
        ("layer", "block, some keys hidden"): 17,
        ("layer", "select"): 21,
        ("layer", "response"): 16,
        ("layer", "sparse"): 15,
        ("layer", "inside"): 15,
        ("attention", "salient"): 21,
        ("mlp", "salient"): 9,
        ("head", "head"): 2,
    },
}
"""Launches of each part of a model for the step that it runs: kernels, products, and calls by name, each as one.
``tests/cuda_without_gpu/test_lowering.py`` counts them in the code that is generated for a sequence of 1,024 tokens."""

TRACED = 3, 61
"""Sequences and tokens of the trace; what is counted in it is for one row."""
MOST = 1024
"""Sequences that a best batch has at most."""
ENOUGH = 1.1
"""A batch is good where a sequence takes at most this times what it takes in the largest batch."""


@dataclass(frozen=True)
class Run:
    """What a part of a model does in a step.

    Attributes:
        unit: the part; one stands for all layers like it.
        assignment: of the rows that it computes.
        times: how many layers it stands for.
        name: what it is counted by in ``LAUNCHES``.
        active: the number of active rows there.
    """

    unit: Unit
    assignment: Assignment
    times: int
    name: tuple[str, str]
    active: sympy.Symbol = cost.A


class Traced:
    """A model of a published size, as a method sees it.

    Args:
        setting: of the model. Two of its layers are traced: the first, and one for all others.
        options: of the method.
    """

    def __init__(self, setting: Setting, options: Options) -> None:
        self.setting, self.options = setting, options
        module, inputs = _graph(replace(setting, layers=2))
        self.program = Program(module, inputs, options)

    def runs(self, method: Schedule, assignment: Assignment) -> Iterator[Run]:
        """The parts of a step."""
        layers = self.program.layers
        for unit in self.program.units:
            chosen = assigned(self.program, unit, assignment, method.first or assignment)
            part = "stem" if unit.stream is None else "head"
            where: Iterable[tuple[int, sympy.Symbol]] = [(1, cost.A)]
            if unit.is_layer:
                mlp = any(not branch.attends for branch in unit.branches)
                part = "mlp" if not unit.attentions else "layer" if mlp else "attention"
                chosen = chosen if chosen.keep else EXACT
                if unit not in layers[: len(layers) // 2]:
                    where = self._behind_first(method if skips_rows(assignment) else None)
            name = f"{chosen.name}, some keys hidden" if chosen.hides else chosen.name
            for times, active in where:
                yield Run(unit, chosen, times, (part, name), active)

    def _depths(self, method: Schedule | None) -> dict[int, int]:
        """By the number of a layer from which on fewer rows are computed, which of the depths that is."""
        if method is None or method.skips is None:
            return {}
        return layers_at(method.skips.depths(self.options), self.setting.layers)

    def _behind_first(self, method: Schedule | None) -> Iterator[tuple[int, sympy.Symbol]]:
        """The layers behind the first: how many there are for each number of active rows."""
        begin, active = 1, cost.A
        for layer, which in [*self._depths(method).items(), (self.setting.layers, 0)]:
            if layer > begin:
                yield layer - begin, active
            begin, active = layer, cost.going(which)

    def _summed(self, of: Callable[[Unit, Axes, Assignment], sympy.Expr], runs: list[Run]) -> sympy.Expr:
        axes = self.program.axes
        return _sum(run.times * of(run.unit, axes, run.assignment).subs(cost.A, run.active) for run in runs)

    def flops(self, runs: list[Run]) -> sympy.Expr:
        """FLOPs of a step, in the symbols of :mod:`dllm_compile.runtime.cost`."""
        return self._summed(cost.flops, runs)

    def traffic(self, runs: list[Run], method: Schedule) -> sympy.Expr:
        """Bytes of kept rows that a step reads or writes: hidden states at a depth, too, before and now."""
        depths = self._depths(method if any(skips_rows(run.assignment) for run in runs if run.unit.is_layer) else None)
        entering = [cost.A, *map(cost.going, depths.values())]
        hidden = _sum(2 * cost.B * rows * self._row for rows in entering[:-1])
        return self._summed(cost.state_traffic, runs) + hidden

    def kept(self, runs: list[Run], method: Schedule) -> sympy.Expr:
        """Bytes kept between steps: of layers, and where rows are skipped hidden states at each depth, confidences."""
        layers = [run for run in runs if run.unit.is_layer and not (method.first and self.program.is_first(run.unit))]
        found = _sum(run.times * cost.state_bytes(run.unit, self.program.axes, method.variants) for run in layers)
        depths = self._depths(method)
        each = len(depths) * self._row + torch.float32.itemsize if depths else 0
        return sympy.expand(found + cost.B * (cost.S + 1) * each)

    @cached_property
    def _row(self) -> int:
        """Bytes of a hidden state."""
        stream = self.program.layers[-1].stream
        assert stream is not None
        made = self.program.axes.fake[stream]
        return int(made.shape[-1] * made.element_size())

    @cached_property
    def logits(self) -> sympy.Expr:
        """Bytes of the logits of the readable rows."""
        node = self.program.logits(self.program.vocabulary)
        assert node is not None
        made = self.program.axes.fake[node]
        return cost.B * cost.R * made.shape[-1] * made.element_size()


def _sum(terms: Iterator[sympy.Expr]) -> sympy.Expr:
    return sympy.expand(sum(terms, sympy.Integer(0)))


@cache
def _graph(setting: Setting) -> tuple[torch.fx.GraphModule, list[Any]]:
    """What Dynamo makes of a model on the meta device."""
    found: list[tuple[torch.fx.GraphModule, list[Any]]] = []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        found.append((module, inputs))
        return module

    torch.compiler.reset()
    with torch.no_grad():
        model: Any = torch.compile(random_model(setting, device="meta"), backend=keep, dynamic=False)
        model(torch.zeros(TRACED, dtype=torch.int64, device="meta"))
    torch.compiler.reset()
    (graph,) = found
    return graph


# -- which rows a step computes ----------------------------------------------------------------------------------------

Numbers = dict[sympy.Symbol, int]
"""One for each symbol of :mod:`dllm_compile.runtime.cost`."""


def steps(options: Options, prompt: int, response: int, block: int) -> tuple[Schedule, dict[Assignment, Numbers]]:
    """The schedule of a method, and the partial steps that it plans in the middle of a generation.

    Blocks before the middle are filled, and from there on a token a call, from a quarter of a block to three quarters
    of it. Of the steps of one kind, the one with the median number of rows stands for all. A tenth of the response is
    taken to be salient.

    Args:
        options: of the method.
        prompt, response: tokens.
        block: tokens of a block of the loop.

    Returns:
        The schedule, and by the row sets of a step the number of rows in each, for one sequence.
    """
    masked = torch.arange(prompt + response).unsqueeze(0) >= prompt
    method, answer = schedule(options, masked), response_of(options, masked)
    begin = prompt + response // block // 2 * block
    filled = [*range(prompt, begin, block), *range(begin, begin + max(3 * block // 4, 1))]
    depths = len(method.skips.depths(options)) if method.skips is not None else 0
    seen: dict[Assignment, list[Numbers]] = {}
    before = masked
    for number, tokens in enumerate(filled):
        now = masked & (torch.arange(prompt + response) >= tokens)
        call = Call(number, False, now, before & ~now, before & ~now)
        plan, before = method.next(call), now
        rows = positions_of_call(call, plan, answer, options.shift, now, 1, False)
        step = plan.assignment
        whole = step.computes_all or step.evict is not None or "prompt" in plan.refresh
        if tokens >= begin + block // 4 and (not whole or len(method.variants) == 1):
            seen.setdefault(step, []).append(_numbers(plan, rows, answer, depths))
    return method, {each: _middle(numbers) for each, numbers in seen.items()}


def _middle(steps: list[Numbers]) -> Numbers:
    """Of the steps of one kind the one with the median number of rows, and among equals of those that go on."""

    def rows(step: Numbers) -> list[int]:
        return [step[cost.A], *(count for symbol, count in step.items() if symbol.name[1:].isdecimal())]

    return sorted(steps, key=rows)[len(steps) // 2]


def _numbers(plan: Plan, rows: dict[str, torch.Tensor], answer: torch.Tensor, depths: int) -> Numbers:
    tokens, response = answer.shape[1], int(answer.sum())
    active, readable = (rows[name].shape[1] if name in rows else tokens for name in ("active", "readable"))
    going = [widths(plan, 1).get(f"going:{i}", active) for i in range(depths)]
    return {
        cost.B: 1,
        cost.S: tokens,
        cost.P: tokens - response,
        cost.G: response,
        cost.N: int(plan.selected.max()) if plan.selected is not None else 0,
        cost.A: active,
        cost.T: max(response // 10, 1),
        cost.E: plan.kept,
        cost.F: rows["fresh"].shape[1] if "fresh" in rows else 0,
        cost.R: readable,
        **{cost.going(i): count for i, count in enumerate(going)},
    }


# -- what it costs -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Floor:
    """The least that one kind of step of a method costs.

    Attributes:
        method, step: their names.
        tokens, batch: of a sequence, and sequences.
        weights, read: bytes of all weights, and of those that a step reads.
        state, logits: bytes that are read or written for each sequence.
        flops: for each sequence.
        kept: bytes of the rows that are kept of each sequence.
        launches: of the step.
        gpu: the device.
    """

    method: str
    step: str
    tokens: int
    weights: int
    read: int
    state: int
    logits: int
    flops: int
    kept: int
    launches: int
    gpu: Gpu
    batch: int = 1

    def at(self, batch: int) -> Floor:
        """The same for so many sequences."""
        return replace(self, batch=batch)

    @property
    def terms(self) -> dict[str, float]:
        """Seconds that each resource needs."""
        moved = self.read + self.batch * (self.state + self.logits)
        return {
            "bandwidth": moved / self.gpu.bandwidth,
            "FLOPs": self.batch * self.flops / self.gpu.flops,
            "launches": self.launches * self.gpu.launch,
        }

    @property
    def seconds(self) -> float:
        """At least."""
        return max(self.terms.values())

    @property
    def binds(self) -> str:
        """The resource that needs longest."""
        return max(self.terms, key=self.terms.__getitem__)

    @property
    def memory(self) -> int:
        """Bytes of the weights and of what is kept of all sequences."""
        return self.weights + self.batch * self.kept

    @property
    def best(self) -> Floor | None:
        """In the smallest batch, a power of two, in which a sequence takes at most ``ENOUGH`` times what it takes in
        the largest one that fits; ``None`` where not even one sequence does.
        """
        every = [self.at(1 << i) for i in range(MOST.bit_length())]
        fitting = [floor for floor in every if floor.memory <= self.gpu.memory]
        enough = ENOUGH * fitting[-1].seconds / fitting[-1].batch if fitting else 0.0
        return next((floor for floor in fitting if floor.seconds / floor.batch <= enough), None)


def methods(setting: Setting) -> dict[str, Options]:
    """Options of each method by name: of those of ``bench --shape``, and of those that it leaves out."""
    mask, blocks = {"mask_id": setting.vocabulary - 1}, {"block_length": setting.cache_block}
    found = {name: each.options for name, each in entrants(setting).items() if each.options}
    found = {"exact": {"method": "exact"}, **found, "dkv-cache": {"method": "dkv-cache", **blocks}}
    return {name: Options.of({**options, **mask}) for name, options in found.items()}


def floors(shape: str, gpu: Gpu, lengths: list[int], chosen: dict[str, Options]) -> Iterator[Floor]:
    """Each kind of partial step of each method for one sequence, length by length.

    Args:
        shape: a name in ``LAUNCHES``.
        gpu: the device.
        lengths: tokens of a sequence, prompt and response.
        chosen: options of methods by name.
    """
    setting = SHAPES[shape]
    whole = random_model(setting, device="meta")
    weights, read = sum(parameter.nbytes for parameter in whole.parameters()), weight_bytes(whole)
    traced = {name: Traced(setting, options) for name, options in chosen.items()}
    for tokens in lengths:
        for name, model in traced.items():
            plan, found = steps(model.options, tokens - setting.response, setting.response, setting.cache_block)
            for assignment, numbers in found.items():
                runs = list(model.runs(plan, assignment))
                numbers[cost.R] = min([numbers[cost.R], *(numbers[run.active] for run in runs if run.active != cost.A)])
                yield Floor(
                    method=name,
                    step=assignment.name,
                    tokens=tokens,
                    weights=weights,
                    read=read,
                    state=int(model.traffic(runs, plan).subs(numbers)),
                    logits=int(model.logits.subs(numbers)),
                    flops=int(model.flops(runs).subs(numbers)),
                    kept=int(model.kept(runs, plan).subs(numbers)),
                    launches=sum(run.times * LAUNCHES[shape][run.name] for run in runs),
                    gpu=gpu,
                )


# -- the command -------------------------------------------------------------------------------------------------------

LENGTHS, BATCHES = [1024, 4096, 16384], [1, 8]
HEAD = f"{'tokens':>7}{'batch':>6}  {'method':<17}{'step':<10}{'GB state':>9}{'logits':>8}{'TFLOP':>8}{'launches':>9}"
HEAD += f"{'ms: bandwidth':>15}{'FLOPs':>8}{'launches':>9}{'at least':>9}  {'binds':<10}{'tokens/s':>9}{'GB held':>9}"


def line(floor: Floor) -> str:
    """A row of the table; a batch that the device has no memory for has no speed."""
    ms = [1000 * seconds for seconds in (*floor.terms.values(), floor.seconds)]
    state, logits = (floor.batch * each / 1e9 for each in (floor.state, floor.logits))
    fits = floor.memory <= floor.gpu.memory
    return (
        f"{floor.tokens:>7,}{floor.batch:>6}  {floor.method:<17}{floor.step:<10}{state:>9.2f}{logits:>8.3f}"
        f"{floor.batch * floor.flops / 1e12:>8.2f}{floor.launches:>9}{ms[0]:>15.2f}{ms[1]:>8.2f}{ms[2]:>9.2f}"
        f"{ms[3]:>9.2f}  {floor.binds if fits else 'memory':<10}"
        f"{f'{floor.batch / floor.seconds:,.0f}' if fits else '-':>9}{floor.memory / 1e9:>9.1f}"
    )


def main(shape: str, device: str, lengths: list[int], batches: list[int], method: str | None = None) -> None:
    """Print the floors of each method, or of one, for each length and batch, and for the best batch of each."""
    setting, gpu = SHAPES[shape], GPUS[device]
    chosen = {name: each for name, each in methods(setting).items() if method in (None, each.method)}
    found = list(floors(shape, gpu, lengths, chosen))
    print(
        f"{shape} on one {device}: {gpu.bandwidth / 1e12:.2f} TB/s, {gpu.flops / 1e12:.0f} TFLOP/s, "
        f"{1e6 * gpu.launch:.1f} us a launch, {gpu.memory / 1e9:.0f} GB\n"
        f"{found[0].weights / 1e9:.1f} GB of weights, of which a step reads {found[0].read / 1e9:.1f} GB: "
        f"{1000 * found[0].read / gpu.bandwidth:.2f} ms\n"
        f"a response of {setting.response} tokens in blocks of {setting.cache_block}, half of it filled; a tenth of it "
        "is salient; one token a step"
    )
    for tokens in lengths:
        mine = [floor for floor in found if floor.tokens == tokens]
        for batch in batches:
            print("", HEAD, *[line(floor.at(batch)) for floor in mine], sep="\n")
        best = [floor.best for floor in mine]
        print(f"best batch (the smallest within {ENOUGH - 1:.0%} of the speed of the largest that fits):")
        print(*[line(floor) for floor in best if floor is not None], sep="\n")
