"""Which rows each role of a unit computes: what a method is."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from .rows import ALL, NONE, RowSet

RESPONSE = RowSet("response")
SELECTED = RowSet("selected", RESPONSE)
PROMPT = RowSet("prompt")
PROMPT_SELECTED = RowSet("prompt+selected")
READABLE = RowSet("readable")


@dataclass(frozen=True)
class Assignment:
    """Row set of each role in one variant of a step.

    Attributes:
        name: of the variant.
        query: rows that attend; also the rows of each branch that is not ``value`` or ``key``.
        key, value: rows whose key and value are computed.
        enter, leave: rows of the residual stream that come in, and of the first output.
        keep: whether computed rows are written to the state.
        pick: whether ``SELECTED`` is chosen here, from the values.
    """

    name: str
    query: RowSet = ALL
    key: RowSet = ALL
    value: RowSet = ALL
    enter: RowSet = ALL
    leave: RowSet = ALL
    keep: bool = True
    pick: bool = False

    @cached_property
    def fixed(self) -> bool:
        """Whether one code serves any sequence: it computes all rows, none, or any number of readable ones."""
        return self.sets() <= {ALL, NONE, READABLE}

    def sets(self) -> set[RowSet]:
        """The row sets that occur, with their parents."""
        named = {self.query, self.key, self.value, self.enter, self.leave} | ({SELECTED} if self.pick else set())
        return named | {s.parent for s in named if s.parent is not None}
