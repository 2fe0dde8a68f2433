"""Run one call of a graph as part of a step: compute it, replay it, or return what is kept of the call before."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.fx

from dllm_compile.debug import note_step
from dllm_compile.passes.saliency import thorough

from .batch import Batch
from .graph_call import GraphCall
from .program import Program
from .recordings import note
from .step import Step


def run(program: Program, args: Sequence[Any], batch: Batch, step: Step) -> Any:
    """Call ``program`` with the arguments of its graph; returns the graph's outputs."""
    if program.first is not None:
        with torch.no_grad():
            program.first(dict(zip(program.index, args, strict=True)))
    call, stats = GraphCall(program, args, batch, step), batch.session.stats
    whole = program.flops / (1 if batch.drafts_of is None else len(step.past.ids))  # a full step of the one sequence
    if step.repeat and program in batch.outputs and program.decision is None:
        stats.ran(step, call.tally, whole)
        return call.values.returned(batch.outputs[program], step)
    if step.repeat and (kept := call.kept_results()) is not None:
        stats.ran(step, call.tally, whole)
        return call.values.returned(kept, step)
    layer, depth, seen, indices = step.layer, step.depth, set(step.seen), step.indices
    if not (batch.session.records and call.is_partial() and batch.drafts_of is None):
        call.compute()
    elif (why := call.unrecordable()) is not None:
        note(stats.cuda_graphs, why)
        call.compute()
    else:
        kind = step.assignment, tuple(step.sizes.items()), call.capacity
        record = partial(_made, program, batch)
        call = batch.recordings.run(program, kind, record, args, step, stats.cuda_graphs)
    if call.overflowed():  # what it wrote is among the active rows, which now are all written anew
        step.assignment, step.layer, step.depth, step.seen = thorough(step.assignment), layer, depth, seen
        step.indices, step.going = indices, None  # none is skipped: all that is kept of them is written
        first, call = call, _made(program, batch, args, step)
        call.tally.flops += first.tally.flops
    stats.ran(step, call.tally, whole)
    note_step(step.number, step.assignment.name, step.indices, call.selected, call.computed)
    results = call.results
    if call.values.head is not None or program.ids is not None:
        if program.ids is not None and not step.repeat:
            batch.outputs.clear()  # graphs behind made theirs of other ids, and may not all be called this time
        batch.outputs[program] = results
    elif not call.values.stored:
        results = {n: v.clone() if n in program.exports else v for n, v in results.items()}
        return torch.fx.map_arg(program.result, lambda n: results[n])
    return call.values.returned(results, step)


def _made(program: Program, batch: Batch, args: Sequence[Any], step: Step) -> GraphCall:
    call = GraphCall(program, args, batch, step)
    call.compute()
    return call
