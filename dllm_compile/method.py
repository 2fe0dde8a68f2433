"""From options to the schedule of a method."""

from __future__ import annotations

import torch

from .core.plan import Exact, Schedule, with_row_before
from .options import Options
from .passes.block_cache import BlockCache
from .passes.eviction import Eviction
from .passes.feature_cache import FeatureCache


def schedule(options: Options, response: torch.Tensor) -> Schedule:
    """The schedule of one sequence.

    Args:
        options: what the user chose.
        response: ``[B, S]`` bool, the rows of the response.
    """
    if options.method == "dllm-cache":
        rows = with_row_before(response) if options.shift else response
        return FeatureCache(rows, options.prompt_interval, options.response_interval, options.transfer_ratio)
    if options.method == "fast-dllm" and options.cache != "none":
        before = options.shift is not False
        return BlockCache(response, options.cache, options.block_length, options.refresh_interval, before)
    if options.method == "sparse-dllm":
        before = options.shift is not False
        return Eviction(response, options.keep_ratio, options.kernel_size, options.block_length, options.delay, before)
    return Exact()
