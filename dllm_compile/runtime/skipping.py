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

from dllm_compile.core.errors import naming
from dllm_compile.core.rows import pick_index
from dllm_compile.interface.plan import LayerRows, Plan
from dllm_compile.kernels.confidence import confidence

if TYPE_CHECKING:
    from dllm_compile.options import Options

    from .batch import Step

CONFIDENCE = "confidence"
"""The place of the confidences ``[B, S + 1]`` among the values that are kept of a sequence."""
CLOSE = 1e-9  # depths that differ by rounding alone are one


def judged(logits: torch.Tensor) -> torch.Tensor:
    """Probability ``[B, K]`` of the likeliest token of logits ``[B, K, V]``."""
    return confidence(logits).probability


def layers_at(depths: Sequence[float], layers: int) -> dict[int, int]:
    """By the number of a layer, which of the depths applies from it on; of several the deepest.

    Args:
        depths: rising shares of the number of layers.
        layers: their number.
    """
    first = {max(ceil(depth * layers - CLOSE), 1): i for i, depth in enumerate(depths)}
    return {layer: i for layer, i in first.items() if layer < layers}


def widths(plan: Plan, multiple: int) -> dict[str, int]:
    """Rows that a step computes at each depth, by a name: the most of any sequence, a multiple, and two at least."""
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
    """What a mechanism's function says of the rows.

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
    """What the choice is made of, for the active rows of a step.

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
    """Positions of the row sets of a step for the active rows at some places.

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
