"""What the backend did: counts of steps by variant, and the drift that ``verify`` measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counters of one session.

    Attributes:
        sequences: generations seen.
        steps: forward calls by the name of the variant that ran; ``"repeat"`` served the previous logits.
        rows: residual-stream rows of those calls, a sequence, all told; logits rows likewise in ``logits``.
        salient: rows that layers of saliency steps found salient, the most of a batch, all told; only on a CPU.
        salient_layers: how many layers that were.
        spills: saliency steps that ran again with every row, as a layer had more salient ones than there was room for.
        checked: steps that ``verify`` compared.
        max_logit_error: largest absolute difference of a readable logit, over all checks.
        token_flips: masked positions whose best token differed, over all checks.
        first_divergence: step of the first flip, by row of the batch.
    """

    sequences: int = 0
    steps: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    logits: Counter[str] = field(default_factory=Counter)
    salient: int = 0
    salient_layers: int = 0
    spills: int = 0
    checked: int = 0
    max_logit_error: float = 0.0
    token_flips: int = 0
    first_divergence: dict[int, int] = field(default_factory=dict)

    def count(self, step: Any) -> None:
        """Note a step."""
        name = "repeat" if step.repeat else step.assignment.name
        self.steps[name] += 1
        self.rows[name] += step.sizes.get("active", step.shape[1])
        self.logits[name] += step.sizes["readable"]

    def as_dict(self) -> dict[str, Any]:
        """Plain data, for printing and JSON."""
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in vars(self).items()}

    def add(self, other: Stats) -> None:
        """Fold another session's counters in."""
        self.sequences += other.sequences
        self.steps.update(other.steps)
        self.rows.update(other.rows)
        self.logits.update(other.logits)
        self.salient += other.salient
        self.salient_layers += other.salient_layers
        self.spills += other.spills
        self.checked += other.checked
        self.max_logit_error = max(self.max_logit_error, other.max_logit_error)
        self.token_flips += other.token_flips
        for row, step in other.first_divergence.items():
            self.first_divergence[row] = min(step, self.first_divergence.get(row, step))
