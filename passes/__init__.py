"""The compiler, top to bottom.

1. ``normalize``           one spelling of calls, no in-place writes: everything behind it reads a functional graph
2. ``spelled_attention``   attention written by hand becomes one call: the anchor of all analysis
3. ``seeds``               the input the tokens enter by
4. (``core.axes.follow``)  where batch and tokens sit in every value
5. ``unmask``              in a graph that also samples: what is read of a vocabulary becomes one value a row
6. ``regions``             stem, layers, head and decision, and the roles in a layer
7. ``feature_cache``, ``block_cache``, ``decoded_rows``, ``eviction``, ``saliency``   a mechanism each: its options,
                           row sets of the roles, and which rows those are; schedules put them together, and
                           ``core.emit`` writes them

Passes never import each other; only this page names them all.
"""

from __future__ import annotations

import torch.fx

from dllm_compile.core.axes import Axes
from dllm_compile.core.graph import Fixed
from dllm_compile.core.units import Unit
from dllm_compile.debug import timed
from dllm_compile.passes.normalize import name_arguments, normalize
from dllm_compile.passes.regions import constants, regions
from dllm_compile.passes.spelled_attention import spelled_attention


def normalized(fixed: Fixed) -> torch.fx.Graph:
    """Passes 1 and 2, in place, on a graph whose sizes are numbers."""
    graph = fixed.graph
    with timed("normalize"):
        name_arguments(graph)
        normalize(*fixed)
    with timed("spelled_attention"):
        spelled_attention(graph, fixed.fake)
    graph.lint()
    return graph


def cut(graph: torch.fx.Graph, axes: Axes, halves: bool = False) -> tuple[list[Unit], list[torch.fx.Node]]:
    """Pass 6: the units of a graph, and the constants that several of them read."""
    with timed("regions"):
        units = regions(graph, axes, halves)
        return units, constants(graph, units, axes)
