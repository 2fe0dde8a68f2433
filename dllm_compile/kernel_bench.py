"""``bench --confidence``: one operation alone against what samplers write in its place."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from .kernels.confidence import confidence

ROWS, VOCABULARY, CALLS = 32, 126464, 40


def plain(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Best token and its probability by a float64 softmax, as samplers write it."""
    best = logits.argmax(-1)
    return best, torch.softmax(logits.double(), -1).gather(-1, best.unsqueeze(-1)).squeeze(-1)


def fused(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same by the operation."""
    found = confidence(logits)
    return found.best, found.probability


def milliseconds(call: Callable[[torch.Tensor], object], logits: torch.Tensor) -> float:
    """Median time of a call, once warm."""
    spent = []
    for _ in range(CALLS):
        begin = time.perf_counter()
        call(logits)
        spent.append(1000 * (time.perf_counter() - begin))
    return median(spent[CALLS // 4 :])


def main() -> None:
    """Measure and print."""
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    ours, theirs = milliseconds(torch.compile(fused), logits), milliseconds(plain, logits)
    print(f"confidence of {ROWS} rows of {VOCABULARY} float32 logits, {torch.get_num_threads()} threads")
    print(f"float64 softmax and gather {theirs:.2f} ms, compiled operation {ours:.2f} ms: {theirs / ours:.2f}x")
