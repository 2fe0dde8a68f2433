"""Statements of a caller about the calls it makes: whether they are a denoising loop, which positions they fill and
read, and what their ids are.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import TracebackType
from typing import Any

import torch

_NOW = threading.local()


class Declared:
    """A context manager whose statement about the calls applies inside its ``with`` block, on this thread; of nested
    blocks the innermost applies.

    It may be entered any number of times, one after another.
    """

    def __enter__(self) -> Declared:
        _NOW.words = (*_words(), self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _NOW.words = _words()[:-1]


class Loop(Declared):
    """What :func:`loop` returns."""


class ExactCalls(Declared):
    """What :func:`exact_calls` returns."""


def loop() -> Loop:
    """Say that the calls made inside belong to one denoising loop, whatever their ids look like.

    Needed where the ids do not show it: infilling, a start that is partly filled, or two loops on the same prompt whose
    calls take turns. Each object has sequences of its own, so that the second of two loops never goes on with rows of
    the first::

        first, second = dllm_compile.loop(), dllm_compile.loop()
        while ...:
            with first:
                x = step(model(x), x)
            with second:
                y = step(model(y), y)
    """
    return Loop()


def exact_calls() -> ExactCalls:
    """Say that the calls made inside are no denoising loop: likelihood, scoring, encoding.

    They run without any cache, and sequences that are under way go on behind them as if nothing had been called.
    """
    return ExactCalls()


def declared() -> Declared | None:
    """The innermost :func:`loop` or :func:`exact_calls` that is active on this thread; ``None`` outside of any."""
    words = _words()
    return words[-1] if words else None


def _words() -> tuple[Declared, ...]:
    words: tuple[Declared, ...] = getattr(_NOW, "words", ())
    return words


class NoDrafts(ValueError):
    """A call inside of :func:`drafting` is of no sequence that has something kept for it."""


@contextmanager
def _saying(what: str, value: Any) -> Iterator[None]:
    """Say something of the calls made inside, on this thread."""
    before = getattr(_NOW, what, None)
    setattr(_NOW, what, value)
    try:
        yield
    finally:
        setattr(_NOW, what, before)


def drafting() -> AbstractContextManager[None]:
    """Say that the calls made inside, on this thread, are of drafts: ids ``[D, S]``, possible next ids of one sequence
    whose last call was made in the same :func:`loop`. They read what is kept of it, and leave nothing behind.

    A call raises :class:`NoDrafts` where there is no such sequence, or its next step would not compute its block alone.
    """
    return _saying("drafts", True)


def drafts() -> bool:
    """Whether a call made now is of drafts."""
    return bool(getattr(_NOW, "drafts", False))


def _said(what: str, shape: torch.Size) -> torch.Tensor | None:
    rows: torch.Tensor | None = getattr(_NOW, what, None)
    return rows if rows is not None and rows.shape == shape else None


def filling(rows: torch.Tensor) -> AbstractContextManager[None]:
    """Say that the positions ``rows`` ``[B, S]`` bool are filled from the calls made inside, on this thread."""
    return _saying("filled", rows.cpu())


def to_be_filled(shape: torch.Size) -> torch.Tensor | None:
    """The positions ``[B, S]`` bool that are filled from a call made now; ``None`` where the caller does not say."""
    return _said("filled", shape)


def wanting(rows: torch.Tensor) -> AbstractContextManager[None]:
    """Say that all but the positions ``rows`` ``[B, S]`` bool are of no use any more, on this thread."""
    return _saying("wanted", rows.cpu())


def wanted(shape: torch.Size) -> torch.Tensor | None:
    """The positions ``[B, S]`` bool that are still of use; ``None`` where the caller does not say."""
    return _said("wanted", shape)


def reading(rows: torch.Tensor | None) -> AbstractContextManager[None]:
    """Say that of the logits of the calls made inside, on this thread, only those are read that predict the positions
    ``rows`` ``[B, S]`` bool; ``None`` says nothing.
    """
    return _saying("read", None if rows is None else rows.cpu())


def to_be_read(shape: torch.Size) -> torch.Tensor | None:
    """The positions ``[B, S]`` bool whose logits are read of a call made now; ``None`` where the caller does not
    say.
    """
    return _said("read", shape)


def known_ids(ids: torch.Tensor, host: torch.Tensor | None) -> AbstractContextManager[None]:
    """Say what the ids of the calls made inside are, on this thread, so that the device need not be read again.

    It also says that weights and inputs are what they were at the call before, but for writes that PyTorch counts.

    Args:
        ids: ``[B, S]`` int64, the tensor that the model is called with.
        host: the same on the host; ``None`` says nothing.
    """
    return _saying("ids", None if host is None else (ids, host))


def ids_on_host(ids: torch.Tensor) -> torch.Tensor | None:
    """The host's copy of ``ids`` that :func:`known_ids` was given with this very tensor; ``None`` without one."""
    said: tuple[torch.Tensor, torch.Tensor] | None = getattr(_NOW, "ids", None)
    return said[1] if said is not None and said[0] is ids else None
