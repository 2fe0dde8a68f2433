"""Which rows each role of a unit computes: what a method is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .rows import ALL, NONE, RowSet

RESPONSE = RowSet("response")
SELECTED = RowSet("selected", RESPONSE)
PROMPT = RowSet("prompt")
PROMPT_SELECTED = RowSet("prompt+selected")
ACTIVE = RowSet("active")
KEYED = RowSet("keyed")
READABLE = RowSet("readable")

NOTHING: frozenset[str] = frozenset()
KEYS = frozenset({"key", "value"})
FEATURES = KEYS | {"branch"}


@dataclass(frozen=True)
class Assignment:
    """Row set of each role in one variant of a step.

    Attributes:
        name: of the variant.
        query: rows that attend; also the rows of each branch.
        key, value: rows whose key and value are computed.
        enter, leave: rows of the residual stream that come in, and of the outputs that go on.
        keep: the roles whose computed rows are written to the state: ``NOTHING``, ``KEYS`` or ``FEATURES``.
        pick: whether ``SELECTED`` is chosen here, from the values.
        keys: rows that attention reads: all, or ``KEYED``, the entries kept by eviction and the fresh rows.
        gaps: whether some of those may be no rows.
        evict: share and pooling window, where the entries to keep are chosen here, from queries and keys.
    """

    name: str
    query: RowSet = ALL
    key: RowSet = ALL
    value: RowSet = ALL
    enter: RowSet = ALL
    leave: RowSet = ALL
    keep: frozenset[str] = FEATURES
    pick: bool = False
    keys: RowSet = ALL
    gaps: bool = False
    evict: tuple[float, int | None] | None = None

    @cached_property
    def fixed(self) -> bool:
        """Whether one code serves any sequence: each row set is all, none, or one of any number of rows."""
        return self.evict is None and self.sets() <= {ALL, NONE, READABLE, ACTIVE}

    def sets(self) -> set[RowSet]:
        """The row sets that occur, with their parents."""
        named = {self.query, self.key, self.value, self.enter, self.leave, self.keys} | (
            {SELECTED} if self.pick else set()
        )
        return named | {s.parent for s in named if s.parent is not None}


EXACT = Assignment("exact", keep=NOTHING)
