"""Sparse-dLLM's eviction as row sets (arXiv 2508.02558, and its authors' code where the two differ).

The last of the full steps that a block begins with chooses, in each layer, the share of the entries that its queries
look at most, among those that no later step computes. Only these are kept, until the next step that chooses. The steps
behind it read the kept entries and the rows computed since:

    step            rows      keys
    full            all       all, none kept
    evict           all       all; the best are kept
    behind it       fewer     kept, and fresh
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dllm_compile.core.assignment import KEYED, NOTHING, Assignment
from dllm_compile.interface.mechanism import Mechanism, Option, is_int, share_of
from dllm_compile.kernels.kept_entries import kept_and_fresh
from dllm_compile.kernels.sparse_attention import sparse_attention


def entries(fresh: torch.Tensor, keep_ratio: float) -> int:
    """How many of the entries beside the ``fresh`` rows ``[B, S]`` bool the longest sequence keeps, at least 2.

    At least 2, because code compiled for a dynamic number of rows does not take 0 or 1. A sequence that keeps fewer
    entries is padded with "no row".
    """
    return max(int(int((~fresh).sum(1).max()) * keep_ratio), 2)


def has_gaps(fresh: torch.Tensor, keep_ratio: float) -> bool:
    """Whether an index of kept entries or ``fresh`` rows ``[B, S]`` bool is padded: sequences have different numbers of
    them, or fewer than two.
    """
    counts = fresh.sum(1)
    uneven = bool((counts != counts[0]).any()) or int(counts[0]) < 2
    return uneven or int(int((~fresh[0]).sum()) * keep_ratio) < 2


def unkept(full: Assignment) -> Assignment:
    """A full step before the one that chooses the entries."""
    return replace(full, keep=NOTHING)


def evicting(full: Assignment, keep_ratio: float, kernel_size: int | None) -> Assignment:
    """The full step that chooses the entries to keep; see :func:`dllm_compile.kernels.kept_entries.kept_and_fresh`."""
    return replace(full, name="evict", evict=(kept_and_fresh, keep_ratio, kernel_size))


def evicted(partial: Assignment, gaps: bool) -> Assignment:
    """A step after the choice, which reads the kept entries; ``gaps``: their index is padded."""
    name = "sparse" if partial.name == "block" else partial.name
    return replace(partial, name=name, keys=KEYED, gaps=gaps, attend=partial.attend or sparse_attention)


def _is_of_something(options: Any) -> str | None:
    kept = options.prompt_interval, options.response_interval, options.saliency
    if options.keep_ratio is None or options.cache != "none" or kept != (None, None, None):
        return None
    return (
        f"keep_ratio is {options.keep_ratio!r}, a share of what a cache keeps; give cache='dual' or "
        "prompt_interval too, or method='sparse-dllm'"
    )


MECHANISM = Mechanism(
    "eviction",
    "Sparse-dLLM, arXiv 2508.02558",
    options=(
        Option(
            "keep_ratio",
            None,
            **share_of("entries outside of a block", 0.5),
            meaning="share of the entries that no step computes between two refreshes that is kept, 0 to 1",
        ),
        Option(
            "kernel_size",
            3,
            fits=lambda v: v is None or (is_int(v) and v % 2 == 1 and v > 0),
            wanted="an odd number such as 3, or None",
            meaning="window that their scores are pooled over, odd; ``None`` for none",
            read=lambda options: options.keep_ratio is not None,
            beside="keep_ratio",
        ),
    ),
    switches=("keep_ratio",),
    neutral={"cache": "dual", "keep_ratio": 0.5, "delay": 10**6},
    methods={"sparse-dllm": {"cache": "dual", "keep_ratio": 0.5}},
    presets={"sparse-dllm": {"method": "sparse-dllm", "block_length": 32}},
    checks=(_is_of_something,),
)
