"""Which block each sequence of a batch is at."""

from __future__ import annotations

import torch

from .plan import Call


class Blocks:
    """Blocks of a response; the active one is the first that still holds masks.

    A loop that fills a token outside of the active block has no blocks. It would be handed logits of the last full step
    for the rows it may choose from, so from then on the whole response counts as one block.

    Args:
        response: ``[B, S]`` bool, the rows of the response.
        length: tokens of a block; ``None`` takes the whole response as one.

    Attributes:
        active: ``[B, S]`` bool, the rows of the active block.
        moved: ``[B, 1]`` bool, whether a sequence is at another block than at the call before.
        done: ``[B, 1]`` bool, whether nothing of a sequence is masked.
        warning: what to tell the user of the last call.
    """

    def __init__(self, response: torch.Tensor, length: int | None) -> None:
        self.response, self.length = response, length
        self.warning: str | None = None
        self.at = torch.full((response.shape[0], 1), -1)
        self._number()

    def _number(self) -> None:
        rank = self.response.cumsum(1) - 1
        self.block = torch.where(self.response, rank // (self.length or rank.shape[1]), -1)

    def begin_anew(self, rows: torch.Tensor, response: torch.Tensor) -> None:
        """Start the sequences in ``rows`` (``[B]`` bool) again; ``response`` ``[B, S]`` is that of the whole batch."""
        self.response = response
        self._number()
        self.at = self.at.masked_fill(rows.unsqueeze(1), -1)

    def next(self, call: Call) -> None:
        """Follow one call."""
        self.warning = None
        if call.number and bool((call.filled & self.response & (self.block != self.at) & (self.at >= 0)).any()):
            self._give_up()
        beyond = self.block.max() + 1
        ahead = torch.where(call.masked & self.response, self.block, beyond).amin(1, keepdim=True)
        self.done = ahead == beyond
        at = torch.where(self.done, self.at, ahead)  # a finished sequence stays where it is
        self.moved = at != self.at
        self.at = at
        self.active = (self.block == at) & self.response  # a sequence without a response is at no block

    def _give_up(self) -> None:
        """The loop does not use these blocks: from now on treat the whole response as one block, and warn."""
        self.warning = (
            f"dllm: a token outside of the active block of {self.length} was filled, so this loop has no such blocks; "
            "the whole response is recomputed from here on. Give the loop's block_length, or use method='dllm-cache'"
        )
        self.length = None
        self._number()
        self.at = torch.full_like(self.at, -1)
