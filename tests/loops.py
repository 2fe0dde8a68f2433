"""Plain sampling loops, as users write them: LLaDA's blocks and Dream's whole-response schedule, greedy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

Logits = Callable[[torch.Tensor], torch.Tensor]


def quota(masks: int, steps: int) -> list[int]:
    """Tokens freed at each step of a block: the early steps take the remainder."""
    return [masks // steps + (1 if i < masks % steps else 0) for i in range(steps)]


def free(x: torch.Tensor, candidates: torch.Tensor, confidence: torch.Tensor, best: torch.Tensor, count: int) -> None:
    """Write the ``count`` most confident candidates of each row into ``x``."""
    confidence = torch.where(candidates, confidence, -torch.inf)
    for row in range(x.shape[0]):
        at = torch.topk(confidence[row], count).indices
        x[row, at] = best[row, at]


def llada(
    logits: Logits,
    x: torch.Tensor,
    prompt: int,
    *,
    steps: int,
    block_length: int,
    mask_id: int,
    cfg_scale: float = 0.0,
    alg: str = "low_confidence",
) -> Iterator[torch.Tensor]:
    """LLaDA's loop at temperature 0, by confidence or ``alg="entropy"``. Yields ``x`` after each step."""
    blocks = (x.shape[1] - prompt) // block_length
    prompt_index = x != mask_id
    for block in range(blocks):
        end = prompt + (block + 1) * block_length
        masks = int((x[:, end - block_length : end] == mask_id).sum(1).max())
        for count in quota(masks, steps // blocks):
            mask = x == mask_id
            if cfg_scale > 0:
                blank = torch.where(prompt_index, mask_id, x)
                conditional, unconditional = logits(torch.cat([x, blank])).chunk(2)
                out = unconditional + (cfg_scale + 1) * (conditional - unconditional)
            else:
                out = logits(x)
            best = out.argmax(-1)
            probs = out.softmax(-1)
            confidence = probs.gather(-1, best.unsqueeze(-1)).squeeze(-1)
            if alg == "entropy":
                confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
            mask[:, end:] = False
            free(x, mask, confidence, best, count)
            yield x.clone()


def dream(
    logits: Logits, x: torch.Tensor, *, steps: int, alg: str, mask_id: int, eps: float = 1e-3
) -> Iterator[torch.Tensor]:
    """Dream's loop at temperature 0. Yields ``x`` after each step."""
    times = torch.linspace(1, eps, steps + 1)
    for i in range(steps):
        mask = x == mask_id
        out = logits(x)
        out = torch.cat([out[:, :1], out[:, :-1]], 1)
        probs = out.softmax(-1)
        top, best = probs.max(-1)
        if alg == "entropy":
            confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
        elif alg == "topk_margin":
            two = probs.topk(2, -1).values
            confidence = two[..., 0] - two[..., 1]
        else:
            confidence = top
        masks = mask.sum() / mask.shape[0]
        count = int(masks * (1 - times[i + 1] / times[i])) if i < steps - 1 else int(masks)
        free(x, mask, confidence, best, count)
        yield x.clone()
