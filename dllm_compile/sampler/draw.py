"""Dream's random steps: they draw for the masked rows alone, a number that depends on values, so they run in eager.

Source: ``DreamGenerationMixin._sample`` (arXiv 2508.15487). Random numbers are asked for in the same order and shapes,
so the same generator gives the same tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from .progress import Writable
from .rules import confidence, filtered, written
from .settings import Settings


def draw_step(
    logits: torch.Tensor,
    x: torch.Tensor,
    masked: torch.Tensor,
    writable: Writable,
    settings: Settings,
    generator: torch.Generator | None,
) -> torch.Tensor:
    """Write some of the candidates, drawn at random where the temperature is above 0.

    Args:
        logits: ``[B, S, V]``, row ``i`` predicts token ``i``.
        x: ``[B, S]`` int64.
        masked: ``[B, S]`` bool, positions that hold the mask.
        writable: candidates and how many of them, on the device of ``x``.
        settings: of the generation.
        generator: source of the random numbers; ``None`` for PyTorch's own.

    Returns:
        ``[B, S]`` int64, a new tensor.
    """
    rows = writable.candidates
    if writable.share is not None:
        drawn = torch.rand(int(rows.sum()), generator=generator, device=x.device)
        share = writable.share.unsqueeze(1).expand_as(rows)[rows]
        rows = rows.masked_scatter(rows, drawn < share)
    token = torch.zeros_like(x)
    probability = filtered(logits[rows], settings.temperature, settings.top_p, settings.top_k).softmax(-1)
    token[rows] = picked = draw(probability, settings.temperature, generator)
    if writable.share is not None:
        return torch.where(rows, token, x)
    if settings.remasking == "random":
        sure = torch.rand(x.shape, generator=generator, device=x.device)
    else:
        sure = torch.full(x.shape, -torch.inf, dtype=logits.dtype, device=x.device)
        sure[rows] = confidence(probability, picked, settings.remasking)
    if settings.alg_temp:
        taken = lottery(sure, writable, settings.alg_temp, generator)
    else:
        counted = writable.count, writable.most, settings.threshold, settings.factor
        allowed = settings.allowed.rule if settings.allowed is not None else None
        moved = settings.moved.bound if settings.moved is not None else None
        asked: dict[str, Any] = {"block": writable.block, "rule": settings.rule, "allowed": allowed, "moved": moved}
        taken = written(sure, rows, masked, *counted, **asked)
    return torch.where(taken, token, x)


def draw(probability: torch.Tensor, temperature: float, generator: torch.Generator | None) -> torch.Tensor:
    """A token for each row ``[N, V]`` of probabilities: ``[N]`` int64; the likeliest at temperature 0."""
    if temperature == 0 or not len(probability):
        return probability.argmax(-1)
    normal = probability / probability.sum(-1, keepdim=True)  # as torch.distributions.Categorical has it
    return torch.multinomial(normal, 1, replacement=True, generator=generator).squeeze(-1)


def lottery(
    sure: torch.Tensor, writable: Writable, temperature: float, generator: torch.Generator | None
) -> torch.Tensor:
    """Positions ``[B, S]`` bool drawn without replacement, in proportion to ``softmax(confidence / temperature)``."""
    assert writable.count is not None
    weight = torch.where(writable.candidates, sure / temperature, -torch.inf).softmax(-1)
    taken = torch.zeros_like(writable.candidates)
    for count in set(writable.count.tolist()):
        rows = writable.count == count
        if count:
            taken[rows] = taken[rows].scatter(1, torch.multinomial(weight[rows], count, generator=generator), True)
    return taken & writable.candidates
