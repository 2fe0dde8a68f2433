"""Translate the arguments that transformers' ``generate`` hands to a custom loop into those of
:func:`dllm_compile.generate`, or refuse them.

transformers (from 4.56 on) prepares a call for autoregressive decoding. What it adds for that is left out; whatever the
user asked for is done or refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch

from .settings import names

REFUSED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("num_beams", "num_beam_groups", "repetition_penalty", "encoder_repetition_penalty"), (1,)),
    **dict.fromkeys(("typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("penalty_alpha", "diversity_penalty", "min_p", "top_h", "epsilon_cutoff", "eta_cutoff"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_new_tokens", "min_length"), (0,)),
    **dict.fromkeys(("bad_words_ids", "sequence_bias", "suppress_tokens", "begin_suppress_tokens"), ([], {})),
    **dict.fromkeys(("renormalize_logits", "remove_invalid_values", "use_mtp"), (False,)),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), (False,)),
    **dict.fromkeys(("forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "watermarking_config"), ()),
    **dict.fromkeys(("exponential_decay_length_penalty", "constraints", "force_words_ids", "dola_layers"), ()),
    **dict.fromkeys(("prompt_lookup_num_tokens", "assistant_early_exit"), ()),
}
"""Fields of a ``GenerationConfig`` that the loops do not do, with the values beside ``None`` that ask for nothing."""

WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
}
"""Logits processors that the loops have of their own, and the fields that transformers makes them of."""

CACHES = ("cache", "past_key_values")
"""Keys and values of earlier tokens: ``cache`` since transformers 5.24, which is a name of ours, too."""

OF_DECODING = {*CACHES, "use_cache", "cache_position", "position_ids", "logits_to_keep", "num_logits_to_keep"}
OF_DECODING |= {"logits_processor", "synced_gpus"}
"""What transformers adds for loops of its own, and is left out."""


def taken(
    given: dict[str, Any], config: Any, ids: torch.Tensor, attention_mask: torch.Tensor | None, streamer: Any
) -> tuple[dict[str, Any], Any]:
    """Arguments of ours among those of transformers, and the streamer.

    Args:
        given: names and values beside the ones that :func:`dllm_compile.generate` names.
        config: the ``GenerationConfig``.
        ids: ``[B, P]`` int64.
        attention_mask: ``[B, P]``, 0 at padding, or ``None``.
        streamer: as handed over. transformers gives it the prompt, and hands it to no custom loop from 4.57 on.

    Raises:
        TypeError: ``config`` is none.
        ValueError: something was asked for that the loops do not do.
    """
    if not hasattr(config, "return_dict_in_generate"):
        of = type(config).__name__
        raise TypeError(f"generation_config is a {of}; give a GenerationConfig of transformers, or settings by name")
    caller, known = _caller(), names()
    _check_fields(config, bool(caller))
    _check_processors(given.get("logits_processor") or (), config)
    for name in ("assistant_model", "synced_gpus"):
        if caller.get(name):
            raise ValueError(f"generate has no {name}; leave it out")
    if caller.get("kwargs_has_attention_mask") is False and attention_mask is not None:
        _check_made(attention_mask, config)
    kept = {name: given[name] for name in CACHES if hasattr(given.get(name), "get_seq_length")}
    own = {name: value for name, value in given.items() if name in known and name not in kept}
    bound = getattr(caller.get("custom_generate"), "keywords", {})  # by functools.partial; a call's go before them
    if "cache" in kept and "cache" in bound:
        own["cache"] = bound["cache"]
    others = {name: value for name, value in given.items() if name in kept or name not in own}
    _check_inputs(others, ids, attention_mask)
    if caller.get("streamer") is not None:
        streamer = _Begun(caller["streamer"])
    return own, streamer


def _caller() -> dict[str, Any]:
    """Local names of the ``generate`` of transformers that is under way, as it hands on only some; or nothing."""
    frame = inspect.currentframe()
    while frame is not None:
        of = frame.f_globals.get("__name__")
        if of == "transformers.generation.utils" and "custom_generate" in frame.f_code.co_varnames:
            return frame.f_locals
        frame = frame.f_back
    return {}


def _check_fields(config: Any, expanded: bool) -> None:
    """Refuse what a configuration asks for in vain; ``expanded``: transformers repeated the prompts as it asks for."""
    refused = REFUSED if expanded else {**REFUSED, "num_return_sequences": (1,), "token_healing": (False,)}
    for name, neutral in refused.items():
        value = getattr(config, name, None)
        if value is not None and value not in neutral:
            neutral_value = neutral[0] if neutral else None
            raise ValueError(
                f"{name} is {value!r} in the generation_config, and generate does not do that; give {neutral_value!r}"
            )


def _check_processors(processors: Iterable[Any], config: Any) -> None:
    """Refuse logits processors but those that transformers makes of ``temperature``, ``top_k`` and ``top_p``."""
    for each in processors:
        kind = type(each).__name__
        field = WARPERS.get(kind)
        if field is None or not config.do_sample or getattr(each, field, None) != getattr(config, field):
            raise ValueError(
                f"logits_processor holds a {kind}, and generate runs none: tokens are not written one after another; "
                "leave it out" + (f", and give {field} with do_sample=True" if field else "")
            )


def _check_made(mask: torch.Tensor, config: Any) -> None:
    """Refuse a mask that transformers made of a token that is padding and more."""
    if bool((mask[:, :-1] > mask[:, 1:]).any()):
        raise ValueError(
            f"input_ids hold the padding token {config.pad_token_id} behind other tokens, and transformers made an "
            "attention_mask that hides it; give one, such as torch.ones_like(input_ids)"
        )


def _check_inputs(others: dict[str, Any], ids: torch.Tensor, mask: torch.Tensor | None) -> None:
    """Refuse inputs of the model beside ids and padding, and keys and values of tokens before the prompt."""
    for name, value in others.items():
        if value is not None and name not in OF_DECODING:
            raise ValueError(
                f"generate hands the model token ids and an attention_mask, and nothing else: leave out {name}"
            )
    for name in CACHES:
        held: Any = others.get(name)
        length = int(held.get_seq_length() if hasattr(held, "get_seq_length") else len(held or ()))
        if length:
            raise ValueError(
                f"{name} holds {length} tokens, and generate starts from none: a denoising loop changes what keys "
                "and values are made of; leave it out, and give the whole prompt"
            )
    positions = others.get("position_ids")
    if positions is not None and not _usual(positions, ids, mask):
        raise ValueError("position_ids count other than the tokens do, and generate hands none on; leave them out")


def _usual(positions: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether positions count all tokens, or those that are no padding, as transformers makes them."""
    if positions.shape[-1] != ids.shape[1] or positions.dim() > 2:
        return False
    present = torch.ones_like(ids) if mask is None else mask.long()
    counted = (positions == present.cumsum(1) - 1) | (present == 0)
    return bool(counted.all()) or bool((positions == torch.arange(ids.shape[1], device=ids.device)).all())


class _Begun:
    """A streamer that has been given the prompt."""

    def __init__(self, streamer: Any) -> None:
        self.streamer, self.prompt = streamer, True

    def put(self, value: torch.Tensor) -> None:
        """Hand on every value but the first, which is the prompt."""
        if not self.prompt:
            self.streamer.put(value)
        self.prompt = False

    def end(self) -> None:
        """End the stream."""
        self.streamer.end()
