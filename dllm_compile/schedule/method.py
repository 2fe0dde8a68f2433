"""From options to the schedule of a sequence."""

from __future__ import annotations

import torch

from dllm_compile.interface.plan import Exact, Schedule, with_row_before
from dllm_compile.mechanisms import turned_on
from dllm_compile.options import Options
from dllm_compile.passes.feature_cache import FeatureCache, share

from .active_rows import ActiveRows
from .kept_outside import KeptOutside
from .prompt_eviction import PromptEviction
from .visible_keys import VisibleKeys


def response_of(options: Options, response: torch.Tensor) -> torch.Tensor:
    """The rows ``[B, S]`` bool that count as the response: also the one before it, if samplers read that for it."""
    return with_row_before(response) if options.shift else response


def schedule(options: Options, response: torch.Tensor) -> Schedule:
    """The schedule of one sequence.

    Args:
        options: what the user chose.
        response: ``[B, S]`` bool, the rows of the response.
    """
    hiding = [each for each in turned_on(options) if each.visible is not None or each.present is not None]
    steps = _rows(options, response)
    steps = VisibleKeys(steps, hiding, options, response) if hiding else steps
    return KeptOutside(steps, options.outside_interval, response) if options.keep_outside else steps


def _rows(options: Options, response: torch.Tensor) -> Schedule:
    """The schedule of the rows, whatever keys they read."""
    if options.cache != "none" or options.saliency is not None:
        return ActiveRows(options, response)
    if options.prompt_interval is None and options.response_interval is None:
        return Exact()
    intervals = options.prompt_interval or 1, options.response_interval or 1
    features = FeatureCache(response, *intervals, share(options), bool(options.shift))
    if options.keep_ratio is None:
        return features
    return PromptEviction(features, response_of(options, response), options.keep_ratio, options.kernel_size)
