"""What the backend keeps of the sequences that are under way, for tests that look inside."""

from __future__ import annotations

from typing import Any

from dllm_compile.runtime.batch import Batch
from dllm_compile.runtime.session import Session, sessions
from dllm_compile.runtime.stats import Stats
from dllm_compile.runtime.step import Step


class UnderWay:
    """One batch of sequences that is under way, and the session of its model."""

    def __init__(self, session: Session, batch: Batch) -> None:
        self.session, self.batch = session, batch

    @property
    def stats(self) -> Stats:
        return self.session.stats

    @property
    def step(self) -> Step:
        assert self.batch.last is not None
        return self.batch.last

    @property
    def number(self) -> int:
        assert self.batch.past is not None
        return self.batch.past.number

    def __getattr__(self, name: str) -> Any:
        """``layers``, ``kept``, ``response``, ... of the batch."""
        return getattr(self.batch, name)


def all_under_way(earlier: set[Session] | None = None) -> list[UnderWay]:
    """All batches of sequences that are under way, of sessions that are not among the ``earlier`` ones."""
    found = [UnderWay(each, batch) for each in set(sessions()) - (earlier or set()) for batch in each.batches]
    return sorted(found, key=lambda each: each.number)


def under_way(number: int | None = None) -> UnderWay:
    """The one that was called last; with a ``number``, the one that has been called so often, from 0."""
    if number is None:
        return UnderWay(*next((each, each.batches[-1]) for each in sessions() if each.batches))
    return next(each for each in all_under_way() if each.number == number)
