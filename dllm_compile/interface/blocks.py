"""Which block each sequence of a batch is at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .plan import Call


@dataclass(frozen=True)
class Masks:
    """What a mechanism that says where the block is (``Mechanism.block``) is told, on the CPU.

    Attributes:
        masked: ``[B, S]`` bool, the rows of the response that hold the mask.
        response: ``[B, S]`` bool, the rows that held it when the sequence began.
        length: tokens of a block, at least 1; as many as there are rows where the user gives none.
        options: what the user chose, by name.
    """

    masked: torch.Tensor
    response: torch.Tensor
    length: int
    options: Any


FindBlock = Callable[[torch.Tensor, torch.Tensor, int | None], torch.Tensor]
"""From masked rows and the response, ``[B, S]`` bool each, and the length of a block to its rows ``[B, S]`` bool."""


class Blocks:
    """Blocks of a response; the active one is the first that still holds masks.

    A loop that fills a token outside of the active block has no blocks. It would be handed logits of the last full step
    for the rows it may choose from, so from then on the whole response counts as one block.

    Args:
        response: ``[B, S]`` bool, the rows of the response.
        length: tokens of a block; ``None`` takes the whole response as one.
        find: where the block is at each call, if a mechanism says so. It then never moves to another block: its rows
            change as the mechanism says.

    Attributes:
        active: ``[B, S]`` bool, the rows of the active block.
        moved: ``[B, 1]`` bool, whether a sequence is at another block than at the call before.
        begun: ``[B, 1]`` bool, whether it is at its first block since it is new.
        done: ``[B, 1]`` bool, whether nothing of a sequence is masked.
        calls: ``[B, 1]`` int64, calls of each sequence before this one.
        warning: what to tell the user of the last call.
    """

    def __init__(self, response: torch.Tensor, length: int | None, find: FindBlock | None = None) -> None:
        self.response, self.length, self.find = response, length, find
        self.warning: str | None = None
        self.at = torch.full((response.shape[0], 1), -1)
        self.calls = torch.full((response.shape[0], 1), -1)
        self.active = torch.zeros_like(response)
        self._number()

    def _number(self) -> None:
        rank = self.response.cumsum(1) - 1
        self.block = torch.where(self.response, rank // (self.length or rank.shape[1]), -1)

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> None:
        """Start the sequences in ``rows`` (``[B]`` bool) again; ``response`` ``[B, S]`` is that of the whole batch."""
        self.response = response
        self._number()
        self.at = self.at.masked_fill(rows.unsqueeze(1), -1)
        self.calls = self.calls.masked_fill(rows.unsqueeze(1), -1)

    def grow(self, response: torch.Tensor) -> None:
        """The response has new tokens behind its last, whose blocks begin with the first of them."""
        old = self.response.shape[1]
        more = (0, response.shape[1] - old)
        rank = response[:, old:].cumsum(1) - 1
        new = self.block.max() + 1 + rank // (self.length or rank.shape[1])
        self.response, self.active = response, torch.nn.functional.pad(self.active, more)
        self.block = torch.cat([self.block, torch.where(response[:, old:], new, -1)], 1)

    def next(self, call: Call) -> None:
        """Take in one call: see which block each sequence is at."""
        self.warning = None
        self.calls = self.calls + 1
        if call.number and bool((call.filled & self.response & ~self.active & (self.at >= 0)).any()):
            self._give_up()
        if self.find is not None:
            self._follow(call, self.find)
            return
        beyond = self.block.max() + 1
        ahead = torch.where(call.masked & self.response, self.block, beyond).amin(1, keepdim=True)
        self.done = ahead == beyond
        at = torch.where(self.done, self.at, ahead)  # a finished sequence stays where it is
        self.moved, self.begun = at != self.at, (self.at < 0) & (at >= 0)
        self.at = at
        self.active = (self.block == at) & self.response  # a sequence without a response is at no block

    def _follow(self, call: Call, find: FindBlock) -> None:
        """Take in one call where a mechanism says the rows of the one block that a sequence has."""
        masked = call.masked & self.response
        self.done = ~masked.any(1, keepdim=True)
        self.active = find(masked, self.response, self.length)
        self.moved = self.begun = (self.at < 0) & ~self.done
        self.at = torch.where(self.moved, 0, self.at)

    def _give_up(self) -> None:
        """The loop does not use these blocks: from now on treat the whole response as one block, and warn."""
        self.warning = (
            f"dllm: a token outside of the active block of {self.length} was filled, so this loop has no such blocks; "
            "the whole response is recomputed from here on. Give the loop's block_length, or use method='dllm-cache'"
        )
        self.length = self.find = None
        self._number()
        self.at = torch.full_like(self.at, -1)
