"""Models whose loop, or whose buffers, keep keys and values: they are left alone."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .core.errors import describe
from .passes.own_cache import HandedOver
from .runtime.session import Session, sessions

_OF_A_LOOP = "the loop hands over keys and values of a cache of its own"
_OF_A_BUFFER = "keys or values that a buffer of the model holds are joined to those of the tokens"
_WEIGHTS: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of all such models


def leave_alone(args: Sequence[Any]) -> bool:
    """Run all calls of a model exactly from now on, those that fill its cache among them.

    Args:
        args: what a graph of it is called with.

    Returns:
        Whether nothing was known of the model.
    """
    weights = [a for a in args if isinstance(a, torch.nn.Parameter)]
    new = [weight for weight in weights if weight not in _WEIGHTS]
    _WEIGHTS.update(dict.fromkeys(new))
    for session in sessions() if new else ():
        if is_left_alone(session):
            session.drop()
    return len(new) == len(weights)


def tell(joins: HandedOver) -> str:
    """Say which keys a graph is called with, and that its model is left alone; returns the reason."""
    reason, more = (_OF_A_BUFFER if joins.buffer else _OF_A_LOOP), ""
    if not joins.buffer:
        more = ". For a loop that hands over none (use_cache=False), call dllm_compile.reset() first"
    reason = f"{reason} (at {describe(joins.join)})"
    warnings.warn(
        f"dllm: {reason}, so this model is left alone: its calls run on plain Inductor, exactly, and nothing is "
        f"cached{more}",
        stacklevel=3,
    )
    return reason


def is_left_alone(session: Session) -> bool:
    """Whether a session's model was given to :func:`leave_alone`."""
    return bool(len(_WEIGHTS)) and session.is_of(_WEIGHTS)


def forget() -> None:
    """Leave no model alone any more."""
    _WEIGHTS.clear()
