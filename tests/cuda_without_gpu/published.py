"""Models of published sizes, lowered for CUDA: the parts that ``explain --shape`` counts, without weights."""

from __future__ import annotations

from dataclasses import replace
from math import prod
from types import SimpleNamespace
from typing import Any

import torch

from dllm_compile.bench import floors
from dllm_compile.bench.model import SHAPES
from dllm_compile.core.assignment import KEYS, Assignment
from dllm_compile.core.emit import emit
from dllm_compile.core.layout import Layout
from dllm_compile.core.state import outside_shape
from dllm_compile.core.state import shape as shape_of_state
from dllm_compile.core.units import Unit
from dllm_compile.runtime import cost
from dllm_compile.runtime.lower import lower
from dllm_compile.runtime.unit_code import UnitCode

from . import attention, drive, inductor
from .counts import Counts, counted
from .device import Pretended, on_device

TOKENS = 1024


def launches(shape: str) -> dict[tuple[str, str], set[Counts]]:
    """What each part of a model launches in each kind of partial step, for one sequence of ``TOKENS`` tokens."""
    setting = SHAPES[shape]
    lowered: dict[tuple[str, Assignment], tuple[tuple[str, str], Counts]] = {}
    for options in floors.methods(setting).values():
        model = floors.Traced(setting, options)
        method, found = floors.steps(options, TOKENS - setting.response, setting.response, setting.cache_block)
        for assignment, sizes in found.items():
            for run in model.runs(method, assignment):
                head = run.name == ("head", "head")
                chosen = replace(run.assignment, enter=assignment.leave) if head else run.assignment
                if (run.unit.key, chosen) not in lowered:
                    counts = _lowered(run.unit, model, chosen, sizes)
                    lowered[run.unit.key, chosen] = run.name, counts
    out: dict[tuple[str, str], set[Counts]] = {}
    for name, counts in lowered.values():
        out.setdefault(name, set()).add(counts)
    return out


def _lowered(unit: Unit, model: floors.Traced, assignment: Assignment, sizes: floors.Numbers) -> Counts:
    """A unit, written for some rows and lowered as at run time."""
    axes, emitted = model.program.axes, emit(unit, model.program.axes, assignment)
    mode, chosen = Pretended(), attention.Chosen()
    with mode:
        args = [_argument(name, unit, model, assignment, sizes) for name in emitted.takes]
        code, step = UnitCode(unit, axes, "inductor"), SimpleNamespace(shape=(1, TOKENS))
        pairs = zip(emitted.takes, args, strict=True)
        extents = [code._extents(name, value, assignment, step) for name, value in pairs]  # type: ignore[arg-type]
        writes = any(name.startswith("state:") for name in emitted.takes)
        with mode.left(), drive.named_on_the_host(), inductor.pretend() as seen:
            lower(drive.on_cuda(emitted.module, chosen), args, "inductor", extents, writes)
    (text,) = seen.codes
    return counted(text)


def _argument(name: str, unit: Unit, model: floors.Traced, assignment: Assignment, sizes: floors.Numbers) -> Any:
    """An argument of a written unit: a tensor that says ``cuda:0`` and holds nothing, or a number."""
    axes, (kind, _, which) = model.program.axes, name.partition(":")

    def rows_of(name: str) -> int:
        return int(cost.ROWS[name].subs(sizes))

    def made(size: Any, dtype: torch.dtype = torch.int64) -> Any:
        return on_device(torch.empty(size, dtype=dtype, device="meta"))

    if kind == "input":
        node = unit.inputs[int(which)]
        value, layout = axes.fake[node], axes.layout.get(node)
        if layout is not None:
            return made(_sized(layout, TOKENS), value.dtype)
        if node.op == "placeholder":
            return on_device(torch.nn.Parameter(value.to("meta"), requires_grad=False))
        batch, tokens = floors.TRACED
        return made([{batch: 1, tokens: TOKENS}.get(n, n) for n in value.shape], value.dtype)
    if kind == "state":
        kept, entries = unit.anchors(assignment.keep), rows_of("keyed")
        beyond = int(which) - len(kept)
        if beyond == 0 and assignment.compact:
            return made((1, entries))
        if beyond >= 0:
            held, beyond = unit.attentions, beyond - assignment.compact
            heads, width, dtype = outside_shape(held[beyond // 2], axes)
            return made((1, rows_of("active") + 1, heads, *([width] if beyond % 2 == 0 else [])), dtype)
        node = kept[int(which)]
        compact = assignment.compact and node in unit.anchors(KEYS)
        return made(shape_of_state(axes.layout[node], 1, entries if compact else TOKENS), axes.fake[node].dtype)
    if kind == "index":
        same = {"written": "active", "stored": "active", "place": "active"}
        place = which.partition("@")[0]
        return made((1, rows_of(same.get(place, place))))
    if name == "stream":
        assert unit.stream is not None
        return made(_sized(axes.layout[unit.stream], rows_of(assignment.enter.name)), axes.fake[unit.stream].dtype)
    tensors = {"counts": torch.int64, "bound": torch.float32, "renew": torch.bool}
    if name in tensors:
        return made((1, 1), tensors[name])
    if name == "visible":
        return made((1, TOKENS), torch.bool)
    numbers = {"tokens": TOKENS, "batch": 1, "selected": sizes[cost.N], "entries": rows_of("keyed")}
    return {**numbers, "held": rows_of("active")}[name]


def _sized(layout: Layout, rows: int) -> list[int]:
    """The size of a value of one sequence with so many rows."""
    return [prod({"B": 1, "T": rows}.get(factor.kind, factor.size) for factor in dim) for dim in layout]
