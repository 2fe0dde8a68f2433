"""Refuse causal attention that arrives as a mask.

Tracing can turn a bidirectional model into a causal one (a remote model does so when it gets no 4-D mask), and a model
may simply be causal. Then later tokens do not change earlier rows and none of our methods applies.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import attention, attention_arguments
from dllm_compile.core.axes import Axes
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.outline import Outline, outline

Mask = tuple[torch.fx.Node, Outline]


def masks_of(graph: torch.fx.Graph, axes: Axes) -> list[Mask]:
    """The attention masks of a graph that depend on no tokens: an attention call that reads each, and what computes
    it.
    """
    calls = [node for node in graph.nodes if node.target is attention]
    masks = {attention_arguments(node.args, node.kwargs).attn_mask: node for node in calls}
    return [
        (call, outline(graph, [mask]))
        for mask, call in masks.items()
        if isinstance(mask, torch.fx.Node) and mask not in axes.live and axes.fake[mask].dim() >= 2
    ]


def refuse_causal_masks(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> None:
    """Compute attention masks, and look above their diagonals.

    Args:
        masks: of a graph.
        given: the value of each placeholder of the graph.

    Raises:
        GraphRefused: a mask lets no token see a later one.
    """
    for call, mask in masks:
        with torch.no_grad():
            (value,) = mask(given)
        if is_causal(value):
            raise GraphRefused(
                "the attention mask is causal; set is_causal=False in the config, or pass a full mask", call
            )


def is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask ``[..., Q, K]`` (bool: may attend; float: added) hides every later token from every token."""
    if mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = allowed.triu(1).any()
    earlier = allowed.tril(-1).any()
    return bool(earlier & ~later)
