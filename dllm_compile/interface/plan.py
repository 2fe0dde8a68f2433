"""What a schedule is told about a forward call, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass, field, is_dataclass
from functools import cached_property
from typing import Any, Protocol

import torch

from dllm_compile.core.assignment import EXACT, Assignment


@dataclass(frozen=True)
class Call:
    """One forward call, read off its ids on the host.

    Attributes:
        number: calls since the sequence began, from 0.
        repeat: the ids are those of the call before.
        masked: ``[B, S]`` bool, positions that hold the mask.
        filled: ``[B, S]`` bool, positions that held it at the call before and do not now.
        changed: ``[B, S]`` bool, positions that hold another token than at the call before.
        filling: ``[B, S]`` bool, positions that the sampler fills from this call; ``None`` where it does not say.
        notes: by layer, what :class:`AfterLayer` noted at the last step that ran the layer.
        wanted: ``[B, S]`` bool, positions that are of use to the sampler; ``None`` where it does not say.
        read: ``[B, S]`` bool, positions whose logits the sampler reads; ``None`` where it does not say.
        depends: ``[B, S]`` int64, of each row one past the last token that it depends on, by the model's attention
            masks; ``None`` where every row may depend on all, or logits of all rows are read.
    """

    number: int
    repeat: bool
    masked: torch.Tensor
    filled: torch.Tensor
    changed: torch.Tensor
    filling: torch.Tensor | None = None
    notes: Mapping[Any, Any] = field(default_factory=dict)
    wanted: torch.Tensor | None = None
    read: torch.Tensor | None = None
    depends: torch.Tensor | None = None

    @property
    def written(self) -> torch.Tensor:
        """``[B, S]`` bool, positions that hold another token than at the call before, and no mask."""
        return self.changed & ~self.masked

    @cached_property
    def rewrites(self) -> bool:
        """Whether a mask or another token was written over a token that was there at the call before."""
        return bool((self.changed & ~self.filled).any())

    @cached_property
    def remasks(self) -> bool:
        """Whether a mask was written over a token that was there at the call before."""
        return self.rewrites and bool((self.changed & self.masked).any())


@dataclass(frozen=True)
class Measured:
    """What was measured in one layer of a step.

    Attributes:
        layer: its number, from 0; in a model that is traced layer by layer too.
        values: what :attr:`AfterLayer.measure` returned.
        rows: ``[B, Q]`` int64, the position of each row that attended; ``S`` for no row.
        tokens: ``S``.
        note: what was noted of this layer at the last step that ran it; ``None`` for none.
        options: what the user chose, by name.
    """

    layer: int
    values: Any
    rows: torch.Tensor
    tokens: int
    note: Any
    options: Any


@dataclass(frozen=True)
class AfterLayer:
    """What happens behind each layer of a step: measure its attention, and decide about the layers that follow.

    The hidden states that leave each layer are kept, so that layers behind it can compute every row in mid-step: the
    rows of this step as they are, the others as they left it last.

    Attributes:
        measure: called with the query ``[B, H, Q, h]`` of the rows that the step computes, the key ``[B, Hkv, S, h]``,
            the mask and the scale of the layer's attention, as they go into ``scaled_dot_product_attention``. It is
            compiled with the layer. See :func:`dllm_compile.attention_weights`.
        decide: called with :class:`Measured`; returns what to note of the layer for the next step, and which sequences
            ``[B]`` bool want all rows computed in the layers behind it (one of the batch is enough), or ``None``. What
            it returns is read on the host, once a layer.
    """

    measure: Callable[..., Any]
    decide: Callable[[Measured], tuple[Any, torch.Tensor | None]]


@dataclass(frozen=True)
class LayerRows:
    """What a mechanism is told of the rows that enter a layer, of which some are skipped from there on.

    ``B`` sequences, ``Q`` rows that the step still computes, in order, ``d`` numbers of the hidden state.

    Attributes:
        new: ``[B, Q, d]``, the hidden states that the layer before leaves.
        old: ``[B, Q, d]``, those of the last step that computed the row so far.
        confidence: ``[B, Q]`` floating, the probability of the likeliest token in the last logits of the row; 0 for a
            row that predicts no mask.
        masked: ``[B, Q]`` bool, rows that predict a mask: those that hold it, or with ``shift=True`` the ones before.
        filled: ``[B, Q]`` bool, rows whose own mask was filled since the call before, or whose token is another one.
        there: ``[B, Q]`` bool, ``False`` for the padding of a sequence with fewer rows.
        options: what the user chose, by name.
    """

    new: torch.Tensor
    old: torch.Tensor
    confidence: torch.Tensor
    masked: torch.Tensor
    filled: torch.Tensor
    there: torch.Tensor
    options: Any


@dataclass(frozen=True)
class Skipping:
    """Rows of a partial step that go on only as far as some layer: the deeper a layer, the fewer rows it computes.

    A row that is skipped keeps the keys and values, and the logits, of the last step that computed them. How many go on
    is known on the host before the step runs; which ones, is decided on the device and never read back.

    Attributes:
        depths: of the options, in rising order, as shares of the number of layers above 0 and below 1: from the first
            layer at or behind that depth on, fewer rows are computed. The hidden states that enter it are kept.
        counts: of the facts of a partial step and its rows ``[B, S]`` bool, how many of each sequence go on at each of
            the depths, ``[B, n]`` int64 for ``n`` depths. At least one does; as many as there are skip none.
        score: called with :class:`LayerRows` at each depth; returns ``[B, Q]`` floating. The rows with the highest
            score go on, of equals the first; NaN is lowest.
    """

    depths: Callable[[Any], tuple[float, ...]]
    counts: Callable[[Any, torch.Tensor], torch.Tensor]
    score: Callable[[LayerRows], torch.Tensor]


@dataclass(frozen=True)
class Plan:
    """The rows that a call computes, and what else its step needs.

    Attributes:
        assignment: row sets of the layers.
        selected: rows each sequence may select where ``SELECTED`` is picked, ``[B]`` int64.
        active: ``[B, S]`` bool, the rows of ``ACTIVE``.
        written: ``[B, S]`` bool, the active rows that are written to the state. The other active rows are computed only
            because a sampler reads their logits: they are computed exactly, and their keys and values are not visible
            to other rows.
        salient: ``[B, S]`` bool, those that are salient in the first layer.
        bound: ``[B]`` float, the saliency threshold of each sequence: after attention, rows are salient if the cosine
            of their context with the cached one is smaller.
        block: ``[B, S]`` bool, the rows whose queries choose the entries to keep, where they are chosen.
        fresh: ``[B, S]`` bool, the rows that are never evicted, because later steps compute them.
        kept: entries that a sequence keeps of the others.
        visible: ``[B, S]`` bool, the keys that attention reads where the assignment hides the others.
        refreshed: ``[B, 1]`` bool, the sequences that refresh in this call, where not all do.
        held: ``[B, S]`` bool, the active rows of which attention over the keys outside is kept.
        renew: ``[B, 1]`` bool, the sequences that compute that anew in this call.
        going: ``[B, n]`` int64, how many of the active rows go on at each depth of :class:`Skipping`; ``None`` where
            all do.
        refresh: why sequences refresh, see :attr:`dllm_compile.runtime.stats.Stats.refreshes`; empty where none does.
        same: whether the ids of the call before would give its result again.
        warning: what to tell the user where the plan is followed.
    """

    assignment: Assignment
    selected: torch.Tensor | None = None
    active: torch.Tensor | None = None
    written: torch.Tensor | None = None
    salient: torch.Tensor | None = None
    bound: torch.Tensor | None = None
    block: torch.Tensor | None = None
    fresh: torch.Tensor | None = None
    kept: int = 0
    visible: torch.Tensor | None = None
    refreshed: torch.Tensor | None = None
    held: torch.Tensor | None = None
    renew: torch.Tensor | None = None
    going: torch.Tensor | None = None
    refresh: tuple[str, ...] = ()
    same: bool = True
    warning: str | None = None


def with_row_before(rows: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` bool rows, and the one before each: it predicts their token where logits are shifted."""
    return rows | rows_before(rows)


def rows_before(rows: torch.Tensor) -> torch.Tensor:
    """The row before each of ``rows``, ``[B, S]`` bool."""
    return torch.cat([rows[:, 1:], rows[:, :1] & False], 1)


class Schedule(Protocol):
    """Decides which rows each call of a batch computes, from the calls seen so far."""

    variants: tuple[Assignment, ...]
    """What it may answer; the first refreshes everything."""

    first: Assignment | None
    """Row sets of the first layer, where they are always the same."""

    after_layer: AfterLayer | None
    """What is measured behind each layer, if anything is."""

    skips: Skipping | None
    """Which rows go on into deeper layers, where not all do."""

    def next(self, call: Call) -> Plan:
        """Rows of a call; every call of the sequence is shown in order, repeated ones too."""

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """Some sequences of the batch were replaced by new ones, which the next call computes whole.

        Args:
            rows: ``[B]`` bool, which ones.
            response: ``[B, S]`` bool, the responses of all of them.

        Returns:
            Whether the others go on; else all begin anew.
        """


def copied(schedule: Any, change: Callable[[torch.Tensor], torch.Tensor] | None = None) -> Any:
    """A copy of a schedule, or of a part of it, that is told of one more call.

    Args:
        schedule: all its tensors are ``[B, ...]``, an entry a sequence.
        change: made to each of its tensors; without it they are shared, since a schedule puts others in their places
            and never writes into one.
    """
    new = copy(schedule)
    parts = vars(new)
    for name, each in parts.items():
        if isinstance(each, torch.Tensor):
            parts[name] = each if change is None else change(each)
        elif hasattr(each, "__dict__") and (not is_dataclass(each) or isinstance(each, Plan)):
            parts[name] = copied(each, change)
    return new


class Exact:
    """The schedule that computes every row at every call and keeps nothing."""

    variants: tuple[Assignment, ...] = (EXACT,)
    first: Assignment | None = None
    after_layer: AfterLayer | None = None
    skips: Skipping | None = None

    def next(self, call: Call) -> Plan:
        """The same plan for every call."""
        return Plan(EXACT)

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> bool:
        """The other sequences go on: nothing is kept that could be wrong."""
        return True
