"""LLaDA's sampling loop at temperature 0, plain PyTorch: what users run, and what the demo and the bench drive.

Source: arXiv 2502.09992; the quota of a block's early steps takes the remainder, confidence is the probability of the
best token in the dtype of the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch


def quota_loop(
    logits: Callable[[torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    prompt: int,
    response: int,
    block: int,
    mask_id: int,
    steps: int | None = None,
) -> Iterator[torch.Tensor]:
    """Unmask ``x`` in place, the most confident tokens of a block first; yields ``x`` after each step.

    Args:
        logits: maps ids ``[B, S]`` to logits ``[B, S, V]``.
        x: ``[B, prompt + response]`` int64, the response all ``mask_id``.
        prompt, response, block: tokens; ``block`` divides ``response``.
        mask_id: the mask token.
        steps: forward calls in all, a multiple of the number of blocks; one per token by default.
    """
    blocks = response // block
    per_block = (steps or response) // blocks
    for start in range(prompt, prompt + response, block):
        for i in range(per_block):
            count = block // per_block + (1 if i < block % per_block else 0)
            out = logits(x)[:, start : start + block]
            probability, best = out.softmax(-1).max(-1)
            here = x[:, start : start + block]
            confidence = torch.where(here == mask_id, probability, -1.0)
            at = confidence.topk(count, dim=1).indices
            here.scatter_(1, at, best.gather(1, at))
            yield x
