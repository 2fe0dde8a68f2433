"""What attention masks hide, where they depend on no tokens: all later tokens, which is refused, some, or nothing.

Tracing can turn a bidirectional model into a causal one (a remote model does so when it gets no 4-D mask), and a model
may simply be causal. Then later tokens do not change earlier rows and none of our methods applies. A mask that hides
nothing, as of a batch without padding, costs a GPU its fastest attention, and is left out. Between the two are masks
that hide the blocks behind a token's own: what comes later never changes the rows of an earlier block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile.core.arguments import attention, attention_arguments
from dllm_compile.core.axes import Axes
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.outline import Outline, outline
from dllm_compile.core.units import Unit

Mask = tuple[torch.fx.Node, Outline]
HIDDEN = -1e9
"""What is added to the score of a key that has no weight: no two scores of a model are so far apart."""
HIDES = -1e4
"""What is added to the score of a key that is left as it is, is larger."""
LAYERS = 64
"""Rounds in which rows come to depend on what those that they see depend on; a mask that takes more is not followed."""


def masks_of(graph: torch.fx.Graph, axes: Axes) -> tuple[list[Mask], bool]:
    """The attention masks of a graph that depend on no tokens: an attention call that reads each, and what computes
    it; and whether there are no others.
    """
    calls = [node for node in graph.nodes if node.target is attention]
    masks = {attention_arguments(node.args, node.kwargs).attn_mask: node for node in calls}
    nodes = {mask: call for mask, call in masks.items() if isinstance(mask, torch.fx.Node)}
    found = [(call, outline(graph, [mask])) for mask, call in nodes.items() if mask not in axes.live]
    return found, len(found) == len(nodes)


def token_masks(graph: torch.fx.Graph, axes: Axes) -> list[Mask]:
    """The attention masks of a graph that are made of the tokens and have a row for each query."""
    read = {mask: call for call, mask in axes.whole if call.target is attention and (call, mask) in axes.beside}
    return [(read[node], outline(graph, [node])) for node in graph.nodes if node in read]


def score_masks(units: Iterable[Unit], graph: torch.fx.Graph, axes: Axes) -> list[Mask]:
    """What depends on no tokens and may hide keys in attention that is written by several calls: whatever has an entry
    for each query and key.
    """
    tokens = axes.size[1]
    found: dict[torch.fx.Node, torch.fx.Node] = {}
    for each in (each for unit in units for each in unit.attentions):
        for node in each.scored:
            for operand in node.all_input_nodes:
                value = axes.fake[operand]
                masks = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.dtype == torch.bool)
                if operand not in axes.live and masks and value.shape[-2:] == (tokens, tokens):
                    found[operand] = each.node
    return [(call, outline(graph, [mask])) for mask, call in found.items()]


def all_masked(graph: torch.fx.Graph) -> bool:
    """Whether every attention call of a graph reads a mask, if there are any."""
    calls = [node for node in graph.nodes if node.target is attention]
    return all(attention_arguments(node.args, node.kwargs).attn_mask is not None for node in calls)


def refuse_causal_masks(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> None:
    """Compute attention masks, and look above their diagonals.

    Args:
        masks: of a graph.
        given: the value of each placeholder of the graph.

    Raises:
        GraphRefused: a mask lets no token see a later one.
    """
    for call, value in values_of(masks, given):
        if is_causal(value) or (call.target is not attention and _hides_later(value)):
            raise GraphRefused(
                "the attention mask is causal; set is_causal=False in the config (transformers reads it from 5.2 on), "
                "or pass a full mask",
                call,
            )


def _hides_later(mask: torch.Tensor) -> bool:
    """Whether a mask that scores are filled by where it holds, or are multiplied with, hides every later token."""
    if mask.dtype == torch.bool:
        return is_causal(~mask)
    return bool(((mask == 0) | (mask == 1)).all()) and is_causal(mask != 0)


def hide(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> bool:
    """Whether attention masks hide a key from a row, or add to a score; reads a truth value of each.

    Args:
        masks: of a graph, one or more.
        given: the value of each placeholder of the graph.
    """
    found = values_of(masks, given)
    return any(bool(~value.all() if value.dtype == torch.bool else value.any()) for _, value in found)


def depends_on(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any], size: tuple[int, int]) -> torch.Tensor | None:
    """How far each row of a model depends on tokens, if these are the masks of all its attention calls.

    A row depends on what it sees, and on what that depends on, in any number of layers. A key counts as hidden where
    adding to its score leaves it no weight at all, in a row with keys that are left as they are.

    Args:
        masks: of a graph, one or more.
        given: the value of each placeholder of the graph.
        size: sequences ``B`` and tokens ``S``.

    Returns:
        ``[B, S]`` int64 on the CPU: of each row, one past the last token that it depends on. ``None`` where that is the
        last of all for every row, and for a mask of other sizes.
    """
    batch, tokens = size
    sees: torch.Tensor | None = None
    for _, value in values_of(masks, given):
        if value.dim() < 2 or value.shape[-1] != tokens or value.shape[-2] not in (1, tokens):
            return None
        seen = value if value.dtype == torch.bool else value > max(torch.finfo(value.dtype).min / 2, HIDDEN)
        plain = seen if value.dtype == torch.bool else value > HIDES
        seen = seen | ~plain.any(-1, keepdim=True)  # where all keys are hidden alike, none is
        each = seen.dim() == 4 and seen.shape[0] in (1, batch)
        seen = seen.flatten(1, -3).any(1) if each else seen.reshape(1, -1, *seen.shape[-2:]).any(1)
        sees = seen if sees is None else sees | seen
    if sees is None:
        return None
    ends = torch.arange(1, tokens + 1, dtype=torch.int32, device=sees.device).expand(len(sees), tokens)
    for _ in range(LAYERS):
        further = torch.maximum(ends, torch.where(sees, ends.unsqueeze(1), 0).amax(-1))
        if torch.equal(further, ends):
            return None if bool((ends == tokens).all()) else ends.cpu().long().expand(batch, tokens)
        ends = further
    return None


def values_of(masks: Sequence[Mask], given: Mapping[torch.fx.Node, Any]) -> list[tuple[torch.fx.Node, torch.Tensor]]:
    """Attention masks of a graph, each with a call that reads it, for the values of its placeholders."""
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
