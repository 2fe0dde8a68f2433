"""The graphs that one call of a model runs, where its graph was broken into several."""

from __future__ import annotations

import threading

import torch

from dllm_compile.compat import address

from .batch import Batch
from .step import Step


class Chain:
    """The graphs that run in one call of a model, each on the hidden state that the one before returned, and the step
    of the loop that this call is.

    Attributes:
        found: the batch of sequences and its step; ``None`` where the call is no step of a denoising loop.
        passed: hidden states that the last graph returned; they are kept so that no other tensor can have their memory.
    """

    def __init__(self) -> None:
        self.found: tuple[Batch, Step] | None = None
        self.passed: list[torch.Tensor] = []

    def deliver(self) -> None:
        """Mark the step as delivered. Must be the last statement of a call: if an interrupt comes earlier, the next
        call with these ids returns the result of this step.
        """
        if self.found is not None:
            self.found[1].delivered = True

    def hands_on(self, stream: torch.Tensor) -> bool:
        """Whether ``stream`` is what the last graph returned."""
        return any(address(t) == address(stream) and t.shape == stream.shape for t in self.passed)


_CURRENT = threading.local()


def enter(chain: Chain | None) -> None:
    """Make this the chain that graphs without ids may belong to, on this thread."""
    _CURRENT.chain = chain


def current() -> Chain | None:
    """The chain that was begun last on this thread."""
    return getattr(_CURRENT, "chain", None)
