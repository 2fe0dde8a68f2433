"""Rules of the samplers, row by row: the proposed token, its confidence, and which rows are written.

Sources: LLaDA (arXiv 2502.09992), Dream (arXiv 2508.15487), threshold and factor of Fast-dLLM (arXiv 2505.22618).
Shapes: ``B`` sequences, ``S`` tokens, ``V`` vocabulary; ``...`` is ``B, S`` or any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

RULES = ("low_confidence", "random", "entropy", "topk_margin", "maskgit_plus", "origin")


def gumbel(logits: torch.Tensor, noise: torch.Tensor, temperature: float) -> torch.Tensor:
    """LLaDA's noised logits ``exp(l) / (-log u) ** temperature``: their largest entry is a draw of the token.

    Args:
        logits: ``[..., V]``.
        noise: ``[..., V]`` float64, uniform in [0, 1).
        temperature: above 0; 1 draws from the softmax.

    Returns:
        ``[..., V]`` float64.
    """
    return logits.double().exp() / (-torch.log(noise)) ** temperature


def filtered(logits: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Logits ``[..., V]`` over the temperature (where above 0), all but the likeliest tokens at the dtype's lowest.

    ``top_p`` keeps the fewest tokens that hold more than this share, and is none at 1; ``top_k`` keeps so many, more
    where the last is as likely as others.
    """
    lowest = torch.finfo(logits.dtype).min
    if temperature > 0:
        logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) > top_p
        dropped = torch.cat([torch.zeros_like(before[..., :1]), before[..., :-1]], -1)
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), lowest)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1]), -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, lowest)
    return logits


def confidence(probability: torch.Tensor, token: torch.Tensor, remasking: str) -> torch.Tensor:
    """Confidence of each row, larger where it is surer.

    Args:
        probability: ``[..., V]``.
        token: ``[...]`` int64, the token proposed.
        remasking: ``"entropy"`` is the sum of ``p log(p + 1e-10)``, 0 at most; ``"topk_margin"`` the largest less the
            second probability; any other the probability of ``token``.

    Returns:
        ``[...]``, the dtype of ``probability``.
    """
    if remasking == "entropy":
        return (probability * torch.log(probability + 1e-10)).sum(-1)
    if remasking == "topk_margin":
        two = probability.topk(2, -1).values
        return two[..., 0] - two[..., 1]
    return probability.gather(-1, token.unsqueeze(-1)).squeeze(-1)


Rule = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From confidence ``[B, S]``, and ``[B, S]`` bool each, candidates, masked positions and those of the block, to the
positions to write, ``[B, S]`` bool."""
Bound = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, "torch.Tensor | None"], torch.Tensor]
"""From a threshold ``[B, 1]`` and what a rule gets to another threshold."""


@dataclass(frozen=True)
class Allowed:
    """A function that joins the positions that several mechanisms say, and the names of these."""

    names: tuple[str, ...]
    rule: Rule


@dataclass(frozen=True)
class Moved:
    """A function that lets several mechanisms change the threshold, and the options that turn these on."""

    options: tuple[str, ...]
    bound: Bound


def _surest(sure: torch.Tensor) -> torch.Tensor:
    """``[B, S]`` bool, the surest of each sequence."""
    return torch.zeros_like(sure, dtype=torch.bool).scatter(1, sure.topk(1, 1).indices, True)


def by_rule(
    rule: Rule, sure: torch.Tensor, candidates: torch.Tensor, masked: torch.Tensor, block: torch.Tensor | None = None
) -> torch.Tensor:
    """Which candidates ``[B, S]`` bool to write by a mechanism's rule: those it says; the surest where it says none."""
    sure = torch.where(candidates, sure, -torch.inf)
    best = _surest(sure)
    taken = rule(sure, candidates, masked, block) & candidates
    return taken | (best & candidates & ~taken.any(1, keepdim=True))


def written(
    sure: torch.Tensor,
    candidates: torch.Tensor,
    masked: torch.Tensor,
    count: torch.Tensor | None = None,
    most: int | None = None,
    threshold: float | None = None,
    factor: float | None = None,
    *,
    block: torch.Tensor | None = None,
    rule: Rule | None = None,
    allowed: Rule | None = None,
    moved: Bound | None = None,
) -> torch.Tensor:
    """Which candidates ``[B, S]`` bool to write: by a mechanism's ``rule``, or as :func:`chosen` says.

    Where mechanisms restrict the candidates, ``allowed`` says those that are left; where they change the threshold,
    ``moved`` says to what. ``block`` ``[B, S]`` bool are the positions of the block, which these may ask for.
    """
    if allowed is not None:
        candidates = candidates & allowed(torch.where(candidates, sure, -torch.inf), candidates, masked, block)
    if rule is not None:
        return by_rule(rule, sure, candidates, masked, block)
    bound: float | torch.Tensor | None = threshold
    if moved is not None and threshold is not None:
        told = torch.where(candidates, sure, -torch.inf), candidates, masked, block
        bound = moved(torch.full_like(sure[:, :1], threshold), *told)
    return chosen(sure, candidates, count, most, bound, factor)


def chosen(
    sure: torch.Tensor,
    candidates: torch.Tensor,
    count: torch.Tensor | None = None,
    most: int | None = None,
    threshold: float | torch.Tensor | None = None,
    factor: float | None = None,
) -> torch.Tensor:
    """Which candidates to write: the ``count`` surest, of these the surest one and all at or above ``threshold``.

    With a factor ``f`` instead, the ``n`` surest of a sequence with the largest ``n`` whose last confidence ``c`` has
    ``(n + 1)(1 - c) <= f``, at least one. Ties are broken as ``torch.topk`` breaks them.

    Args:
        sure: ``[B, S]`` confidence.
        candidates: ``[B, S]`` bool, the positions to choose from.
        count: ``[B]`` int64; ``None`` for all candidates.
        most: the largest entry of ``count``; required with it.
        threshold, factor: in the unit of ``sure``; ``None`` for none. A threshold may be ``[B, 1]``.

    Returns:
        ``[B, S]`` bool.
    """
    sure = torch.where(candidates, sure, -torch.inf)
    none = torch.zeros_like(candidates)
    if factor is not None:
        ordered, order = sure.sort(-1, descending=True)
        rank = torch.arange(sure.shape[1], device=sure.device)
        believed = (rank == 0) | (ordered >= 1 - factor / (rank + 2))
        return none.scatter(1, order, believed) & candidates
    taken = candidates
    if count is not None:
        assert most is not None
        order = sure.topk(most, 1).indices
        kept = torch.arange(most, device=sure.device) < count.unsqueeze(1)
        taken = none.scatter(1, order, kept) & candidates
    if threshold is not None:
        best = _surest(sure)
        taken = taken & (best | (sure >= threshold))
    return taken
