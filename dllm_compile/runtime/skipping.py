"""The rows of a partial step that go on into deeper layers: chosen on the device, at each depth of fewer rows.

The hidden states that enter the layer at a depth are kept, ``[B, S + 1, d]``, to compare those of the next step with.
What is computed behind is the same step for fewer active rows: the stream is gathered, and the positions of the active
rows, where they are written, which are salient and which are readable are those of the rows that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING

import torch

from dllm_compile.core.assignment import ACTIVE, KEYED
from dllm_compile.core.errors import naming
from dllm_compile.core.layout import opened
from dllm_compile.core.rows import (
    ALL,
    NONE,
    RowSet,
    gather_rows,
    pick_index,
    put_rows,
    rows_first,
    store_rows,
    take_rows,
)
from dllm_compile.core.state import allocate
from dllm_compile.core.units import Unit
from dllm_compile.interface.plan import LayerRows, Plan
from dllm_compile.kernels.confidence import confidence

if TYPE_CHECKING:
    from dllm_compile.options import Options

    from .graph_call import GraphCall
    from .step import Step

CONFIDENCE = "confidence"
"""The place of the confidences ``[B, S + 1]`` among the values that are kept of a sequence."""
CLOSE = 1e-9  # depths that differ by rounding alone are one


def judged(logits: torch.Tensor) -> torch.Tensor:
    """Confidence of rows: the probability ``[B, K]`` of the likeliest token of logits ``[B, K, V]``."""
    return confidence(logits).probability


def layers_at(depths: Sequence[float], layers: int) -> dict[int, int]:
    """By the number of a layer, the depth that applies from there on; where several would, the deepest.

    Args:
        depths: rising shares of the number of layers.
        layers: their number.
    """
    first = {max(ceil(depth * layers - CLOSE), 1): i for i, depth in enumerate(depths)}
    return {layer: i for layer, i in first.items() if layer < layers}


def widths(plan: Plan, multiple: int) -> dict[str, int]:
    """The number of rows that a step computes at each depth, by name: the most of any sequence, rounded up to
    ``multiple``, at least 2.
    """
    if plan.going is None:
        return {}
    most = plan.going.amax(0).tolist()
    return {f"going:{i}": max(-(-each // multiple) * multiple, 2) for i, each in enumerate(most)}


def going_on(score: torch.Tensor, there: torch.Tensor, counts: torch.Tensor, width: int) -> torch.Tensor:
    """Places of the rows that go on.

    Args:
        score: ``[B, Q]`` floating; of equal ones the first go on, and NaN is lowest.
        there: ``[B, Q]`` bool, which entries are rows.
        counts: ``[B, 1]`` int64, how many go on.
        width: how many places there are for them, at most ``Q``.

    Returns:
        ``[B, width]`` int64 places, rising, then ``Q`` for no row.
    """
    rows = score.shape[1]
    ranked = torch.where(there, score.nan_to_num(nan=-torch.inf), -torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices[:, :width]
    taken = (torch.arange(width, device=score.device) < counts) & there.gather(1, order)
    return torch.where(taken, order, rows).sort(1).values


def asked_score(score: object, what: str, rows: LayerRows) -> torch.Tensor:
    """Call a mechanism's ``score`` of rows, and check what it returns.

    Raises:
        FunctionFailed: it raises an exception, which is the cause of this one.
        ValueError: it says no floating ``[B, Q]``.
    """
    with naming(what):
        said = score(rows)  # type: ignore[operator]
    if not isinstance(said, torch.Tensor) or said.shape != rows.there.shape or not said.is_floating_point():
        found = f"{said.dtype} {list(said.shape)}" if isinstance(said, torch.Tensor) else f"a {type(said).__name__}"
        raise ValueError(f"{what}, and returned {found}; give a floating tensor {list(rows.there.shape)}")
    return said


def told(step: Step, new: torch.Tensor, old: torch.Tensor, sure: torch.Tensor, options: Options) -> LayerRows:
    """What a mechanism is told to score the active rows of a step.

    Args:
        step: in which not all rows go on.
        new: ``[B, Q, d]`` their hidden states.
        old: ``[B, S + 1, d]`` those kept of all rows.
        sure: ``[B, S + 1]`` confidences of all rows.
        options: what the user chose.
    """
    assert step.predicts is not None
    assert step.filled is not None
    active, tokens = step.indices["active"], step.shape[1]
    there, at = active < tokens, active.clamp(max=tokens - 1)
    masked, filled = (each.gather(1, at) & there for each in (step.predicts, step.filled))
    former = old.gather(1, at.unsqueeze(2).expand(-1, -1, old.shape[2]))
    return LayerRows(new, former, torch.where(masked, sure.gather(1, at), 0.0), masked, filled, there, options)


def narrowed(step: Step, places: torch.Tensor, spare: int) -> dict[str, torch.Tensor]:
    """The positions of a step's row sets, for some of its active rows.

    Args:
        step: its positions are those of more rows.
        places: ``[B, n]`` int64 among the active rows; their number for none.
        spare: where keys of no row are written.
    """
    indices, tokens = step.indices, step.shape[1]
    before, count = indices["active"].shape[1], places.shape[1]
    new = dict(indices)
    for name, none in (("active", tokens), ("stored", tokens), ("written", spare)):
        new[name] = pick_index(indices[name], places, none)
    readable = indices["readable"]
    if readable.shape[1]:
        flags = torch.zeros(len(places), tokens + 1, dtype=torch.bool, device=places.device)
        arrived = flags.scatter(1, readable, True).gather(1, new["active"]) & (new["active"] < tokens)
        at = _listed(arrived, min(readable.shape[1], count))
        new["readable"], new["readable@active"] = pick_index(new["active"], at, tokens), at
    if "salient" in indices:
        flags = torch.zeros(len(places), before + 1, dtype=torch.bool, device=places.device)
        left = flags.scatter(1, indices["salient"], True).gather(1, places) & (places < before)
        new["salient"] = _listed(left, max(min(indices["salient"].shape[1], count), 2))
    return new


def _listed(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Places ``[B, width]`` int64 of the true entries of ``rows`` ``[B, n]``, in order; then ``n``."""
    count = rows.shape[1]
    order = (~rows).long().sort(dim=1, stable=True).indices
    listed = torch.where(rows.gather(1, order), order, count)[:, :width]
    return torch.nn.functional.pad(listed, (0, width - listed.shape[1]), value=count)


def skip_rows(call: GraphCall, unit: Unit, number: int, which: int) -> None:
    """Keep the hidden states that enter a layer; where they and confidences are known of every row that is present,
    choose the rows that go on, and leave the step with these.

    Args:
        call: of a graph whose next unit is the layer; its values and positions are narrowed.
        unit: the layer.
        number: of the layer.
        which: the number of the depth that applies from there on.
    """
    step, kept = call.step, call.batch.kept
    stream, rows = unit.stream, call.values.rows(unit.stream)
    if stream is None or not call.program.has_rows(stream):
        return
    layout = opened(call.program.axes.layout[stream])
    value, place = call.values.env[stream], ("skipping", number)
    begins = place not in kept and (rows == ALL or call.rest.alone)  # every row that the sequences have
    if begins:
        call.batch.recordings.clear()
        (kept[place],) = allocate([stream], call.program.axes, step.shape, step.counts.device)
    old = kept.get(place)
    if old is None or (rows not in (ALL, ACTIVE)):
        return
    fresh = rows_first(value, layout, step.shape[0])
    chooses = not begins and step.going is not None and call.rest != call.full and "active" in step.indices
    at = step.indices["active"] if chooses or rows == ACTIVE else None
    places = None
    if chooses and CONFIDENCE in kept:
        new = fresh if rows == ACTIVE else take_rows(value, step.indices["active"], layout)
        places = _chosen(call, new.flatten(2), old.flatten(2), which)
    if rows == ALL:
        store_rows(old, value, layout)
    else:
        assert at is not None
        put_rows(old, at, fresh.to(old.dtype))
    if places is None:
        if chooses:
            call.batch.tell_unskipped()
        return
    for node in [n for n, have in call.values.have.items() if have == ACTIVE and n in call.values.env]:
        if node is not stream or node in call.program.results:
            call.values.whole(node)  # on the rows that were computed for it
    if rows == ACTIVE:
        call.values.env[stream] = gather_rows(value, places, layout)
    spare = step.entries if call.rest.keys == KEYED else step.shape[1]
    step.indices = narrowed(step, places, spare)
    call.selected[number] = step.indices["active"]
    call.costs.clear()  # of another number of rows


def _chosen(call: GraphCall, new: torch.Tensor, old: torch.Tensor, which: int) -> torch.Tensor:
    """Places ``[B, n]`` of the active rows that go on, by hidden states ``[B, Q, d]`` and ``[B, S + 1, d]``."""
    step, options = call.step, call.batch.options
    assert call.skips is not None
    assert step.going is not None
    given = told(step, new, old, call.batch.kept[CONFIDENCE], options)
    width = min(step.sizes[f"going:{which}"], given.there.shape[1])
    score = asked_score(call.skips.score, "a mechanism scores rows", given)
    return going_on(score, given.there, step.going[:, which : which + 1], width)


def keep_confidence(call: GraphCall, sure: torch.Tensor, leaves: RowSet) -> None:
    """Keep the confidences ``sure`` ``[B, K]`` of the rows ``leaves`` that a head was computed for."""
    step, kept = call.step, call.batch.kept
    if CONFIDENCE not in kept:
        call.batch.recordings.clear()
        with torch.inference_mode(False):
            kept[CONFIDENCE] = sure.new_zeros((step.shape[0], step.shape[1] + 1))
    if leaves == ALL:
        kept[CONFIDENCE][:, :-1].copy_(sure)
    elif leaves != NONE:
        kept[CONFIDENCE].scatter_(1, step.indices[leaves.name], sure)
