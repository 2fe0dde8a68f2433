"""Facts about a model that a sampler needs: its mask token, which row predicts which token, how it takes padding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .check import check_inputs, takes
from .step import Model


@dataclass(frozen=True)
class Family:
    """What a sampler needs to know of a kind of model.

    Attributes:
        mask_id: token id of the mask.
        shift: row ``i - 1`` of the logits predicts token ``i``.
    """

    mask_id: int
    shift: bool


KNOWN = {"llada": Family(126336, False), "dream": Family(151666, True)}
"""By ``config.model_type`` in lower case. The id in the config itself goes first."""


def family(model: Model, mask_id: int | None = None, shift: bool | None = None) -> Family:
    """The family of a model.

    Args:
        model: its ``config`` is read, where it has one.
        mask_id, shift: overrule what the config says; a kind of model that is not known is taken as not shifted.

    Raises:
        ValueError: nothing tells the mask token.
    """
    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    known = KNOWN.get(kind.lower())
    if mask_id is None:
        mask_id = getattr(config, "mask_token_id", None)
    if mask_id is None and known is not None:
        mask_id = known.mask_id
    if mask_id is None:
        of = f"a model of type {kind!r}" if kind else f"a {type(model).__name__}"
        raise ValueError(
            f"nothing tells the mask token of {of}: it has no config.mask_token_id; "
            "give mask_id, the token id of the mask, such as 126336 for LLaDA"
        )
    if shift is None:
        shift = known.shift if known is not None else False
    return Family(int(mask_id), shift)


def model_inputs(model: Model, attention_mask: torch.Tensor | None, length: int, shift: bool) -> dict[str, Any]:
    """Inputs of the model beside the ids.

    Without padding there is no mask at all: LLaDA's forward then traces to one graph. A shifted model gets what
    Dream's sampler gives it, pairs of tokens that are both there and positions that count from the first token.

    Args:
        model: asked whether it takes ``use_cache``, which is then turned off.
        attention_mask: ``[B, P]``, 0 at padding; the response is never padding. ``None`` for none.
        length: ``S``, tokens of prompt and response.
        shift: whether the model is shifted.

    Returns:
        ``attention_mask`` ``[B, S]`` int64, or ``[B, 1, S, S]`` bool with ``position_ids`` ``[B, S]`` int64.

    Raises:
        ValueError: there is padding, and the model has no input for it.
    """
    inputs: dict[str, Any] = {"use_cache": False} if takes(model, "use_cache") else {}
    if attention_mask is None or bool((attention_mask != 0).all()):
        return inputs
    present = torch.nn.functional.pad(attention_mask.long(), (0, length - attention_mask.shape[1]), value=1)
    inputs["attention_mask"] = present
    if shift:
        there = present.bool()
        inputs["attention_mask"] = (there.unsqueeze(1) & there.unsqueeze(2)).unsqueeze(1)
        inputs["position_ids"] = (present.cumsum(1) - 1).masked_fill(~there, 1)
    check_inputs(model, inputs)
    return inputs


def vocabulary(model: Model) -> int | None:
    """Columns of the model's logits, where its output embedding tells; ``None`` where not."""
    ask = getattr(model, "get_output_embeddings", None)
    weight = getattr(ask() if ask is not None else None, "weight", None)
    return int(weight.shape[0]) if isinstance(weight, torch.Tensor) else None
