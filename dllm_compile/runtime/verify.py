"""``options={"verify": k}``: run the traced graph as it was, in eager, beside every k-th step; note the difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.compat import address, tree_leaves

from .batch import Batch
from .program import Program
from .session import Session
from .step import Step


def compare(
    module: torch.fx.GraphModule, program: Program, args: Sequence[Any], result: Any, batch: Batch, step: Step
) -> None:
    """Compare ``result`` with ``module(*args)`` and note it in the stats of the model.

    A model that arrives as several graphs is followed from one to the next by the memory of the hidden state it passes
    on, so that the last graph is compared with what an uncached step would have given. Logits are compared on the rows
    a sampler can read.
    """
    if program.ids is not None:
        batch.shadow.clear()
    given = list(args)
    at = program.index[program.seed]
    given[at] = batch.shadow.get(address(given[at]), (None, given[at]))[1]
    with torch.no_grad():
        want = module(*given)
    for got, exact in zip(tree_leaves(result), tree_leaves(want), strict=True):
        if not isinstance(got, torch.Tensor):
            continue
        if program.decision is not None and got.dim() == 2 and got.dtype == torch.int64:
            _note_tokens(got, exact, batch.session, step)
        elif batch.session.vocabulary is not None and got.dim() == 3 and got.shape[-1] >= batch.session.vocabulary:
            _note(got, exact, batch.session, step)
        else:
            batch.shadow[address(got)] = (got, exact)


def _note(got: torch.Tensor, exact: torch.Tensor, session: Session, step: Step) -> None:
    rows = torch.zeros(got.shape[0], got.shape[1] + 1, dtype=torch.bool, device=got.device)
    rows.scatter_(1, step.indices["readable"], True)
    rows = rows[:, :-1]
    error = (got - exact).abs().amax(-1)[rows]
    stats = session.stats
    stats.max_logit_error = max(stats.max_logit_error, error.max().item() if error.numel() else 0.0)
    _note_flips((got.argmax(-1) != exact.argmax(-1)) & rows, session, step)


def _note_tokens(got: torch.Tensor, exact: torch.Tensor, session: Session, step: Step) -> None:
    """Of a whole step: its new ids."""
    _note_flips(got != exact, session, step)


def _note_flips(flips: torch.Tensor, session: Session, step: Step) -> None:
    stats = session.stats
    stats.checked += 1
    stats.token_flips += int(flips.sum())
    for row in flips.any(1).nonzero().flatten().tolist():
        stats.first_divergence.setdefault(row, step.number)
