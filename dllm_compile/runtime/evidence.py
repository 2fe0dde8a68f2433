"""Whether calls that look like the steps of a denoising loop are steps of one.

A Monte Carlo estimate of a likelihood calls the model on one text again and again, each time with other masks. Where
the masks of a sample lie among those of the last one, its ids look like a step that filled the rest. So a sequence that
nobody declared is *in doubt* at first, and its calls compute every row. One that began fully masked behind a prompt is
taken for a loop once one of these shows; any other (infilling, a start that is partly filled) has to be declared:

- *it writes what the model said*. Against the null hypothesis that the tokens filled have nothing to do with the model
  (each has a chance of ``1/V`` to be the best), two others are held as log likelihood ratios, for rows that predict
  their own token and, as Dream's do, the next one: greedy (the best token with a chance of 0.9) and drawn (by the
  model's probabilities). Where a single token was filled, a surer place than those masked before it, as a sampler by
  confidence takes, tells too;
- *it goes on as loops do*: ``STEPS`` calls filled masks and did nothing else, not from left to right as teacher forcing
  does, on a prompt whose runs were not begun anew before.

A likelihood of an answer that the model itself would give cannot be told from a loop; ``exact_calls()`` says it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from dllm_compile.kernels.confidence import confidence

STEPS = 4
"""Calls that fill masks before a run of them counts as a loop. The chance that five independent samples of masks of one
text lie within each other, the first with all masks, is at most 1e-3, at 5 to 8 tokens."""
SHORT = 16
"""Tokens of a response below which a single token that fits is not enough."""
_HIT, _LEADS = 0.9, 2.0


@dataclass(frozen=True)
class Evidence:
    """How certain it is that calls are a denoising loop; see the head of this file.

    Attributes:
        declared: the caller said that it is a loop, or the graph that is called fills the masks itself.
        begins: it began fully masked behind a prompt.
        scores: an earlier run of calls on the same prompt stopped before all masks were filled, as in likelihood
            scoring.
        shift: which row predicts a token, if that is known; see :class:`dllm_compile.Options`.
        short: the response has fewer than ``SHORT`` tokens.
        fills: calls so far that filled masks.
        in_order: each of them filled the leftmost masks.
        ratios: log likelihood ratios of greedy and drawn tokens, by rows of their own and by rows before.
        sure: whether a likelihood ratio passed its threshold for being a loop.
    """

    declared: bool
    begins: bool
    scores: bool = False
    shift: bool | None = None
    short: bool = False
    fills: int = 0
    in_order: bool = True
    ratios: tuple[float, ...] = (0.0, 0.0, 0.0, 0.0)
    sure: bool = False

    @property
    def is_loop(self) -> bool:
        """Whether the calls are taken for the steps of a denoising loop."""
        goes_on = self.fills >= STEPS and not self.in_order and not self.scores
        return self.declared or (self.begins and (self.sure or goes_on))

    def after(self, before: torch.Tensor, masked: torch.Tensor, found: list[float] | None, vocabulary: int) -> Evidence:
        """The evidence after one more call that filled masks.

        Args:
            before, masked: ``[B, S]`` bool, what was masked before the call, and is now.
            found: what :meth:`Expected.compare` found, as numbers; ``None`` where nothing was expected.
            vocabulary: tokens there are.
        """
        filled = before & ~masked
        leftmost = bool((filled | ~before).long().cummin(1).values.bool().eq(filled | ~before).all())
        more = replace(self, fills=self.fills + 1, in_order=self.in_order and leftmost)
        if found is None:
            return more
        count, every = found[0], math.log(max(vocabulary, 2))
        ratios = list(self.ratios)
        for i, (hits, leads, drawn) in enumerate((found[1:4], found[4:7])):
            ratios[i] += hits * (math.log(_HIT) + every) + (count - hits) * math.log(1 - _HIT)
            if count == hits == 1:
                ratios[i] += _LEADS if leads == 1 else -_LEADS
            ratios[2 + i] += drawn + count * every
        rows = {None: (0, 1), False: (0,), True: (1,)}[self.shift]
        best = max(ratios[i + kind] for i in rows for kind in (0, 2))
        bar = 1.8 * every if self.short else 0.9 * every + 1.5
        return replace(more, ratios=tuple(ratios), sure=self.sure or best >= bar)


class Expected:
    """Logits that the loop was given, to compare the tokens that it fills next with.

    Args:
        logits: ``[B, S, V]``, as they were returned; read again at the next call.
        begin, end: the rows from the one before the first masked token to the last masked one.
    """

    def __init__(self, logits: torch.Tensor, begin: int, end: int) -> None:
        self.rows = slice(begin, end)
        self.logits = logits[:, self.rows]
        read = confidence(self.logits)
        self.best = read.best
        self.total = read.maximum - read.probability.log()  # log of the sum of exp(logits)
        self.measures = torch.stack([read.probability, read.entropy, read.margin])

    def compare(self, ids: torch.Tensor, before: torch.Tensor, mask_id: int) -> torch.Tensor:
        """Compare the tokens that were filled with the expected ones.

        Args:
            ids: ``[B, S]`` int64, of this call.
            before: ``[B, S]`` int64, of the call that returned the logits.
            mask_id: the mask token.

        Returns:
            ``[7]`` float64: tokens filled, then for rows that predict their own token, and for rows that predict the
            next one: how many are the best token, how many stand at a surer place than all those masked before it by
            any measure, and the sum of their log probabilities.
        """
        ids, before = ids[:, self.rows], before[:, self.rows]
        masked = before == mask_id
        filled = masked & (ids != mask_id)
        found = [filled.sum()]
        for shift in (False, True):
            given = (self.logits, 1), (self.best, 1), (self.total, 1), (self.measures, 2)
            logits, best, total, measures = (_row_before(*each) if shift else each[0] for each in given)
            sure = torch.where(masked, measures, -torch.inf)
            leads = (sure >= sure.cummax(-1).values).any(0) & filled
            drawn = logits.gather(-1, ids.clamp(max=logits.shape[-1] - 1).unsqueeze(-1)).squeeze(-1) - total
            found += [((ids == best) & filled).sum(), leads.sum(), torch.where(filled, drawn, 0).sum()]
        return torch.stack([each.double() for each in found])


def _row_before(values: torch.Tensor, dim: int) -> torch.Tensor:
    """Along ``dim`` the entry before each, and the first for itself."""
    first, rest = values.narrow(dim, 0, 1), values.narrow(dim, 0, values.shape[dim] - 1)
    return torch.cat([first, rest], dim)


def begins_masked(masked: torch.Tensor, ids: torch.Tensor) -> bool:
    """Whether each sequence is a prompt, then masks only, then at most a run of one token (padding).

    Args:
        masked: ``[B, S]`` bool.
        ids: ``[B, S]`` int64.
    """
    place = torch.arange(masked.shape[1])
    first = torch.where(masked, place, masked.shape[1]).amin(1, keepdim=True)
    last = torch.where(masked, place, -1).amax(1, keepdim=True)
    inside = (place >= first) & (place <= last)
    behind = place > last
    padded = ~behind | (ids == ids[:, -1:])
    return bool((masked == inside).all() and padded.all() and masked.any())
