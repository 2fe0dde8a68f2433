"""One call of a denoising loop: the rows that it computes, and the history of its sequences up to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

from dllm_compile.core.assignment import Assignment
from dllm_compile.interface.plan import Schedule

from .evidence import Evidence
from .positions import Places, span, unpacked
from .unchanged import Inputs

IN_MEMORY = ("counts", "bound", "visible", "renew", "going", "predicts", "filled")
"""The tensors of a step that lie in one piece of memory with the positions of its row sets."""


@dataclass(frozen=True)
class Past:
    """The history of a batch after one call. Immutable: replaced by a new one when the next call has run.

    Attributes:
        ids: ``[B, S]`` int64 of that call, on the CPU.
        on_device: the same on the device of the model.
        number: calls that the schedule was shown, from 0; -1 for none.
        schedule: as these calls left it.
        caller: the graph that was called.
        evidence: whether the sequence is a denoising loop.
        missed: whether the last calls ran exactly, in doubt, without the schedule.
        history: ids of the last few calls that differ.
        read: ``[B, S]`` bool, the positions that only were read of its logits; ``None`` for all.
        notes: by layer, what was noted behind it before this call; see ``interface.plan.AfterLayer``.
    """

    ids: torch.Tensor
    on_device: torch.Tensor
    number: int
    schedule: Schedule
    caller: object
    evidence: Evidence
    missed: bool
    history: tuple[torch.Tensor, ...]
    read: torch.Tensor | None = None
    notes: Mapping[Any, Any] = field(default_factory=dict)


@dataclass
class Step:
    """One forward call of a denoising loop: the rows to compute, and what has run of it so far.

    Attributes:
        past: what the sequence has seen once this call has run.
        repeat: the ids are those of the previous call, so its results are too.
        assignment: rows that layers compute; the schedule may say otherwise of the first.
        indices: positions ``[B, K]`` of each row set, on the device of the ids; ``S`` stands for "no row".
        sizes: ``K`` of each row set.
        shape: sequences ``B`` and tokens ``S``.
        counts: ``[B, 1]`` int64, rows each sequence may select.
        bound: ``[B, 1]`` float32, the similarity below which a row of a sequence is salient.
        visible: ``[B, S]`` bool, keys that attention reads where the others are hidden.
        renew: ``[B, 1]`` bool, sequences that compute attention over the keys outside anew, where that is kept.
        going: ``[B, n]`` int64, active rows of each sequence that go on at each depth; ``None`` where all do.
        predicts: ``[B, S]`` bool, rows that predict a mask; ``None`` where all rows go on.
        filled: ``[B, S]`` bool, rows whose masks were filled, or tokens edited, since the step before; ``None`` where
            all rows go on.
        layer: how many layers have run in this step.
        depth: how many of them had attention: one that is cut behind it counts once.
        seen: the layers that have run.
        counted: the name that ``stats`` has counted the step by.
        delivered: whether the caller has its result; an interrupt may come between the two.
        head_inputs: inputs that only the head reads.
        own: whether at least one layer ran the variant that was planned, rather than falling back to computing every
            row.
        anew: the cached rows are invalid for this step: the remaining layers compute every row.
        inputs: by ``id``, tensors of graphs behind the first that were compared with those of the step before.
        noted: by layer, what was noted behind it in this step.
        refresh: why sequences refresh.
        deeper_rows: a layer was followed by the decision that those behind it compute every row.
        memory: one piece of memory that holds all tensors above; see :func:`.positions.packed`.
        places: where in it each of them lies.
        timed: whether a graph of this step has run; see :meth:`.session.Session.took`.
        compiled: whether any code was compiled in this step.
        returned: positions ``[B, K]`` of the rows of logits that a sampler may read, computed now or before; ``None``
            for all. They differ more often than what the layers read, so that no recording has them.
    """

    past: Past
    repeat: bool
    assignment: Assignment
    indices: dict[str, torch.Tensor]
    sizes: dict[str, int]
    shape: tuple[int, int]
    counts: torch.Tensor
    bound: torch.Tensor | None = None
    visible: torch.Tensor | None = None
    renew: torch.Tensor | None = None
    going: torch.Tensor | None = None
    predicts: torch.Tensor | None = None
    filled: torch.Tensor | None = None
    layer: int = 0
    depth: int = 0
    seen: set[Any] = field(default_factory=set)
    counted: str | None = None
    delivered: bool = False
    head_inputs: Inputs | None = None
    own: bool = False
    anew: bool = False
    inputs: dict[int, torch.Tensor] = field(default_factory=dict)
    noted: dict[Any, Any] = field(default_factory=dict)
    refresh: tuple[str, ...] = ()
    deeper_rows: bool = False
    memory: torch.Tensor | None = None
    places: Places = ()
    returned: torch.Tensor | None = None
    timed: bool = False
    compiled: bool = False

    @classmethod
    def of(
        cls,
        memory: torch.Tensor,
        places: Places,
        past: Past,
        repeat: bool,
        assignment: Assignment,
        sizes: dict[str, int],
        shape: tuple[int, int],
    ) -> Step:
        """A step whose tensors lie in ``memory`` at ``places``; see :func:`.positions.packed`."""
        indices = unpacked(memory, places)
        returned = indices.pop("returned", None)
        if returned is not None:  # it lies last
            places = places[:-1]
            memory = memory[: span(places)]
        more: dict[str, Any] = {name: indices.pop(name) for name in IN_MEMORY if name in indices}
        step = cls(past, repeat, assignment, indices, sizes, shape, **more)
        step.memory, step.places, step.returned = memory, places, returned
        return step

    def elsewhere(self, memory: torch.Tensor) -> Step:
        """The same step, before any of its layers ran, with its positions, counts and bound in other memory."""
        return Step.of(memory, self.places, self.past, self.repeat, self.assignment, self.sizes, self.shape)

    @property
    def number(self) -> int:
        """Calls since the sequence began, from 0."""
        return self.past.number

    @cached_property
    def entries(self) -> int:
        """Keys that are kept where others are evicted, and those of rows computed since."""
        return self.sizes["kept"] + self.sizes.get("fresh", 0)
