"""What attention masks hide, where they depend on no tokens: later tokens, which is refused, or nothing.

Tracing can turn a bidirectional model into a causal one (a remote model does so when it gets no 4-D mask), and a model
may simply be causal. Then later tokens do not change earlier rows and none of our methods applies. A mask that hides
nothing, as of a batch without padding, costs a GPU its fastest attention, and is left out.
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


def masks_of(graph: torch.fx.Graph, axes: Axes) -> tuple[list[Mask], bool]:
    """The attention masks of a graph that depend on no tokens: an attention call that reads each, and what computes
    it; and whether there are no others.
    """
    calls = [node for node in graph.nodes if node.target is attention]
    masks = {attention_arguments(node.args, node.kwargs).attn_mask: node for node in calls}
    nodes = {mask: call for mask, call in masks.items() if isinstance(mask, torch.fx.Node)}
    found = [(call, outline(graph, [mask])) for mask, call in nodes.items() if mask not in axes.live]
    return found, len(found) == len(nodes)


def refuse_causal_masks(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> None:
    """Compute attention masks, and look above their diagonals.

    Args:
        masks: of a graph.
        given: the value of each placeholder of the graph.

    Raises:
        GraphRefused: a mask lets no token see a later one.
    """
    for call, value in _values(masks, given):
        if is_causal(value):
            raise GraphRefused(
                "the attention mask is causal; set is_causal=False in the config (transformers reads it from 5.2 on), "
                "or pass a full mask",
                call,
            )


def hide(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> bool:
    """Whether attention masks hide a key from a row, or add to a score; reads a truth value of each.

    Args:
        masks: of a graph, one or more.
        given: the value of each placeholder of the graph.
    """
    found = _values(masks, given)
    return any(bool(~value.all() if value.dtype == torch.bool else value.any()) for _, value in found)


def _values(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> list[tuple[torch.fx.Node, torch.Tensor]]:
    with torch.no_grad():
        return [(call, *mask(given)) for call, mask in masks]


def is_causal(mask: torch.Tensor) -> bool:
    """Whether a mask ``[..., Q, K]`` (bool: may attend; float: added) hides every later token from every token."""
    if mask.dim() < 2 or mask.shape[-1] != mask.shape[-2] or mask.shape[-1] < 2:
        return False
    allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = allowed.triu(1).any()
    earlier = allowed.tril(-1).any()
    return bool(earlier & ~later)
