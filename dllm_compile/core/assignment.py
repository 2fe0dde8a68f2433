"""Assignments: the rows that each role of a unit is computed for in one kind of step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from .rows import ALL, RowSet

RESPONSE = RowSet("response")
SELECTED = RowSet("selected", RESPONSE)
PROMPT = RowSet("prompt")
PROMPT_SELECTED = RowSet("prompt+selected")
ACTIVE = RowSet("active")
SALIENT = RowSet("salient", ACTIVE)
KEYED = RowSet("keyed")
READABLE = RowSet("readable")

Operation = Callable[..., Any]
NOTHING: frozenset[str] = frozenset()
KEYS = frozenset({"key", "value"})
FEATURES = KEYS | {"attended", "mlp"}
CONTEXTS = KEYS | {"context", "mlp"}


@dataclass(frozen=True)
class Outside:
    """The operations of attention in two parts: over the keys that a step computes, and over the others (the keys
    outside), which is kept between steps.

    Attributes:
        kept: the operation that reads it; see :func:`dllm_compile.kernels.attention_part.kept_part`.
        joined: the operation that joins both; see :func:`dllm_compile.kernels.attention_part.joined`.
        renewed: the operation that keeps what is computed over the keys outside now, where the step says so; see
            :func:`dllm_compile.kernels.attention_part.renewed_part`. ``None`` where nothing outside is read.
    """

    kept: Operation
    joined: Operation
    renewed: Operation | None = None


@dataclass(frozen=True)
class Assignment:
    """Row set of each role in one variant of a step.

    Attributes:
        name: of the variant.
        query: rows that attend; also the rows of the branch with attention.
        key, value: rows whose key and value are computed.
        mlp: rows of the branches without attention; those of ``query`` if ``None``.
        enter, leave: rows of the residual stream that come in, and of the outputs that go on.
        keep: the roles whose computed rows are written to the state: ``NOTHING``, ``KEYS``, ``FEATURES``, ``CONTEXTS``.
        keys: rows that attention reads: all; ``KEYED``, the entries kept by eviction and the rows computed since; or
            ``ACTIVE``, those computed now: where attention over the others is kept (``outside``), or as of a sequence
            that has no others.
        gaps: whether the index of the kept entries may be padded.
        hides: whether attention reads only the keys that the step says are visible.
        masked: whether attention reads the model's own masks; ``False`` where these hide nothing, which is cheaper.
        pick: the operation that chooses ``SELECTED`` from the values, now and before; ``None`` where none are chosen.
            See :func:`dllm_compile.kernels.row_change.pick_rows`.
        attend: the operation that attends in place of the model's own call: over ``KEYED``, see
            :func:`dllm_compile.kernels.sparse_attention.sparse_attention`; where rows are ``SALIENT``, from the change
            of their values, see :func:`dllm_compile.kernels.delta_attention.delta_attention`.
        choose_salient: the operation that chooses the salient rows of what follows. It gets their contexts, now and
            before, what else ``attend`` returned, the bound, and where the active rows are; see
            :func:`dllm_compile.kernels.salient_rows.salient_rows`. It, ``pick``, ``attend`` and ``evict`` get the
            process group as a last argument where what they choose by is sharded over its ranks.
        evict: the operation that chooses the entries to keep, from queries and keys, and its settings; see
            :func:`dllm_compile.kernels.kept_entries.kept_and_fresh`.
        judge: called with the logits ``[B, K, V]`` of a head, see :attr:`dllm_compile.core.units.Unit.logits`; what it
            returns, ``[B, K]``, is a further output of the head.
        measure: called with the query ``[B, H, Q, h]``, key ``[B, Hkv, K, h]``, mask and scale of the first attention
            call of a layer; what it returns is a further output of the layer.
        outside: attention in two parts, by ``attend``, which is then
            :func:`dllm_compile.kernels.attention_part.attention_part`. ``None`` for one over all ``keys``.
        shared: the operations that attend to the keys outside where several sequences read those of one, and that join
            this to attention over the keys of their own, which enter no state; see
            :func:`dllm_compile.kernels.attention_part.shared_part`.
    """

    name: str
    query: RowSet = ALL
    key: RowSet = ALL
    value: RowSet = ALL
    mlp: RowSet | None = None
    enter: RowSet = ALL
    leave: RowSet = ALL
    keep: frozenset[str] = FEATURES
    keys: RowSet = ALL
    gaps: bool = False
    hides: bool = False
    masked: bool = True
    pick: Operation | None = None
    attend: Operation | None = None
    choose_salient: Operation | None = None
    evict: tuple[Any, ...] | None = None
    measure: Operation | None = None
    outside: Outside | None = None
    judge: Operation | None = None
    shared: tuple[Operation, Operation] | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """The hash of all fields, computed once: every layer of every step asks for it."""
        return hash(tuple(getattr(self, each.name) for each in fields(self)))

    @cached_property
    def salient(self) -> bool:
        """Whether the layer computes ``SALIENT`` rows, and chooses those of what follows by how far the contexts
        drifted.
        """
        return SALIENT in self.sets()

    @cached_property
    def compact(self) -> bool:
        """Whether keys and values are kept for the entries alone that eviction chose, and for rows computed since."""
        return self.evict is not None or self.keys == KEYED

    @cached_property
    def alone(self) -> bool:
        """Whether attention reads the rows of this step and nothing that is kept of an earlier one."""
        return self.keys == ACTIVE and self.outside is None

    @cached_property
    def computes_all(self) -> bool:
        """Whether every row is computed from the ids of this call alone, so that the result is exact."""
        rows = {self.query, self.key, self.value, self.enter, self.keys, *([self.mlp] if self.mlp is not None else [])}
        return rows == {ALL} and self.pick is None and not self.hides

    @cached_property
    def reads_kept(self) -> bool:
        """Whether a layer that runs this reads rows kept of an earlier step."""
        return bool(self.keep) and not self.alone and {self.query, self.key, self.value, self.keys} != {ALL}

    @cached_property
    def stored(self) -> frozenset[str]:
        """The roles whose rows enter the state as they are computed; eviction writes keys and values itself."""
        return self.keep if self.evict is None and self.shared is None else self.keep - KEYS

    def sets(self) -> set[RowSet]:
        """The row sets that occur, with their parents."""
        named = {self.query, self.key, self.value, self.enter, self.leave, self.keys}
        named |= ({self.mlp} if self.mlp is not None else set()) | ({SELECTED} if self.pick is not None else set())
        return named | {s.parent for s in named if s.parent is not None}


EXACT = Assignment("exact", keep=NOTHING)
