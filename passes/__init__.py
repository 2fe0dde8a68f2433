"""The compiler, top to bottom.

0. ``tensor_parallel``     what each rank of tensor parallelism holds, and the sums between ranks, as plain calls
   ``exported``            ATen calls, which ``torch.export`` writes, by the names that a model's code has for them
   ``flex_attention``      FlexAttention with a block mask as attention with a mask
1. ``fresh_buffers``       a buffer that is filled piece by piece as what is joined of the pieces
   ``normalize``           one spelling of calls, no in-place writes: everything behind it reads a functional graph
   ``einsum``              products of two values as matrix products
2. ``spelled_attention``   attention written by hand becomes one call: the anchor of all analysis
3. ``seeds``               the input the tokens enter by
4. (``core.axes.follow``)  where batch and tokens sit in every value
5. ``unmask``              in a graph that also samples: what is read of a vocabulary becomes one value a row
6. ``regions``             stem, layers, head and decision, and the roles in a layer
7. a mechanism each: its options, the row sets of the roles, and which rows those are. Schedules put them together, and
   ``core.emit`` writes them

   - rows                  ``feature_cache``, ``block_cache``, ``decoded_rows``, ``sliding_block``, ``vicinity``,
                           ``suffix_window``
   - rows of a layer       ``saliency``, ``early_skipping``
   - keys                  ``eviction``, ``flashblock``
   - what is written       ``falling_threshold``, ``frechet``, ``length_cut``

:func:`analyzed` runs 0 to 6. ``causal`` looks at the values of attention masks, and ``own_cache`` for keys and values
that the loop hands over, before all else. Passes never import each other; only this page names them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch.fx

from dllm_compile.compat import FakeTensorMode
from dllm_compile.core.axes import Axes, fake_like, follow
from dllm_compile.core.graph import fix_sizes
from dllm_compile.core.outline import Outline, outline
from dllm_compile.core.stand_ins import StandIns
from dllm_compile.core.units import Unit
from dllm_compile.debug import asked, keep, part, timed
from dllm_compile.passes.einsum import products
from dllm_compile.passes.exported import as_written
from dllm_compile.passes.flex_attention import as_masks
from dllm_compile.passes.fresh_buffers import fresh_buffers
from dllm_compile.passes.normalize import memory_handed_over, name_arguments, normalize
from dllm_compile.passes.regions import constants, regions
from dllm_compile.passes.seeds import find_seed, refuse_without_tokens
from dllm_compile.passes.spelled_attention import spelled_attention
from dllm_compile.passes.tensor_parallel import find_shards, localized, refuse_shards_between
from dllm_compile.passes.unmask import unmask


@dataclass(frozen=True)
class Analyzed:
    """What passes 0 to 6 found.

    Attributes:
        graph: normalized, its sizes numbers.
        args: fake arguments, one a placeholder.
        seed: the placeholder that the tokens enter by.
        axes: where batch and tokens sit in every value.
        units: stem, layers, head and decision, whichever there are.
        constants: values that several units read and that depend on no token.
        first: what hands the memory of inputs over, whatever the tokens are; ``None`` for nothing.
    """

    graph: torch.fx.Graph
    args: Sequence[Any]
    seed: torch.fx.Node
    axes: Axes
    units: list[Unit]
    constants: list[torch.fx.Node]
    first: Outline | None


def analyzed(
    module: torch.fx.GraphModule, given: Sequence[Any], halves: bool, stand_ins: StandIns | None = None
) -> Analyzed:
    """Passes 0 to 6 on a graph that Dynamo traced.

    Args:
        module: it stays as it is.
        given: arguments, real or fake, one a placeholder.
        halves: whether layers are cut behind their attention, too.
        stand_ins: analyze the graph at these sizes, for all sizes.

    Raises:
        GraphRefused: the compiler does not take the graph.
    """
    shown, sizes = (given, None) if stand_ins is None else (stand_ins.shown(module.graph, given), stand_ins.values)
    args = fake_like(shown, fake_mode := FakeTensorMode(), sizes)
    keep("traced", module)
    with timed("tensor_parallel"):
        plain = localized(module.graph)
    refuse_without_tokens(args)
    with timed("exported, flex_attention"):
        plain = as_masks(module, as_written(plain))
    with timed("fix sizes"):
        fixed = fix_sizes(plain, args, fake_mode, given, stand_ins)
    graph = fixed.graph
    with timed("normalize"):
        name_arguments(graph)
        handed = memory_handed_over(graph, fixed.written)
        first = outline(graph, handed) if handed else None
        for node in reversed(handed):
            graph.erase_node(node)
        fresh_buffers(*fixed)
        normalize(*fixed)
    with timed("einsum, spelled_attention"), fake_mode:
        products(graph, fixed.fake)
        spelled_attention(graph, fixed.fake)
    graph.lint()
    if asked():
        keep("normalized", part(graph.nodes, fixed.fake))
    with timed("seeds"):
        seed, layout = find_seed(graph, args)
    again = timed("follow axes")(partial(follow, graph, args, fake_mode, {seed.name: layout}))
    with timed("unmask"):
        axes = unmask(graph, again(), again)
    find_shards(graph, axes)
    with timed("regions"):
        units = regions(graph, axes, halves)
        refuse_shards_between(units, axes)
        return Analyzed(graph, args, seed, axes, units, constants(graph, units, axes), first)
