"""Generation: the sampling loops of LLaDA, Dream and Fast-dLLM on any masked-diffusion model, compiled or not."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .declared import loop
from .interface.mechanism import Confidences, Mechanism, asked
from .mechanisms import RENEWED, rule_of, tables, turned_on
from .options import Options, check_vocabulary
from .sampler.check import check_call, check_range, embedded
from .sampler.decode import Generated, decode
from .sampler.family import Family, family, model_inputs
from .sampler.progress import Progress
from .sampler.rules import Allowed, Rule
from .sampler.settings import SETTINGS, SYNONYMS, Settings, names, option_names, settings_of
from .sampler.step import Model
from .sampler.stepper import stepper


def generate(
    model: Model,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    method: str | None = None,
    streamer: Any = None,
    return_dict: bool = False,
    output_history: bool = False,
    generator: torch.Generator | None = None,
    generation_config: Any = None,
    **settings: Any,
) -> torch.Tensor | Generated:
    """Generate responses by a masked-diffusion language model.

    Also a ``custom_generate`` of transformers: ``model.generate(ids, custom_generate=dllm_compile.generate, ...)``,
    which hands no streamer on (5.23).

    Args:
        model: maps ids ``[B, S]`` to logits ``[B, S, V]``, bare or as ``.logits``; compiled or not.
        input_ids: ``[B, P]`` integer prompts, padded on the left; ``P`` may be 0. Masks in them are filled with the
            first block.
        attention_mask: ``[B, P]`` of 0 and 1 in any dtype, 0 at padding, which is on the left. It has no columns for
            the response, and is not given to the model where nothing is padding.
        method: a method of the backend to compile the model by; ``None`` runs it as it is, unless an option of the
            backend is given, such as ``preset``.
        streamer: ``put`` gets the prompt, then tokens in order as soon as no mask is before them; then ``end``. For one
            sequence, as in transformers.
        return_dict: return :class:`Generated`.
        output_history: keep the ids after each call; implies ``return_dict``.
        generator: source of random numbers; ``None`` for PyTorch's own.
        generation_config: of transformers, which gives it; fills in what is not said otherwise.
        settings: fields of :class:`dllm_compile.sampler.settings.Settings`, their synonyms, and options of the backend.

    Returns:
        ``[B, P + gen_length]`` int64, or :class:`Generated`.

    Raises:
        TypeError: an argument is of another kind, or the model returns no logits.
        ValueError: an unknown name, a value out of range, a mask token that nobody knows, or ids that the model does
            not embed.
    """
    if generation_config is not None:
        settings, return_dict = _of_transformers(settings, generation_config, return_dict)
    others = {"return_dict": return_dict, "output_history": output_history, "streamer": streamer}
    check_call(model, input_ids, attention_mask, {**others, "generator": generator})
    how, options = settings_of(settings, generation_config, input_ids.shape[1])
    kind = family(model, how.mask_id, how.shift)
    _check_tokens(model, kind.mask_id, how.eos)
    cached = False
    if method is not None or options:
        how, options, cached = _for_backend(how, options, method, kind)
        _refuse_masks(input_ids, kind.mask_id, cached)
    x = torch.nn.functional.pad(input_ids.long(), (0, how.gen_length), value=kind.mask_id)
    progress, how = _progress(how, x == kind.mask_id, kind.shift, cached, bool(options))
    inputs = model_inputs(model, attention_mask, x.shape[1], kind.shift)
    step = stepper(model, x, kind, how, options, inputs, generator)
    with loop():
        result = decode(x, input_ids.shape[1], kind.mask_id, how.eos, step, progress, streamer, output_history)
    return result if return_dict or output_history else result.sequences


def _progress(
    settings: Settings, masked: torch.Tensor, shift: bool, cached: bool, compiled: bool
) -> tuple[Progress, Settings]:
    """The initial :class:`Progress` of the batch, and the settings, changed where the published loop uses others (with
    ``as_published``).
    """
    progress = Progress(settings, masked.shape, shift=shift, cached=cached)
    if compiled:
        progress.hold(masked.cpu())
    if progress.leads and cached and not settings.parallel:
        settings = replace(settings, remasking="entropy")
    return progress, settings


def _of_transformers(settings: dict[str, Any], config: Any, return_dict: bool) -> tuple[dict[str, Any], bool]:
    """Settings that are ours among what transformers hands over, and whether it or the caller wants a dict.

    transformers has checked the names, and added inputs of its own loops.
    """
    if not hasattr(config, "return_dict_in_generate"):
        of = type(config).__name__
        raise TypeError(f"generation_config is a {of}; give a GenerationConfig of transformers, or settings by name")
    _warn_of_processors(settings.get("logits_processor") or ())
    known = names()
    own = {name: value for name, value in settings.items() if name in known}
    return own, return_dict or bool(config.return_dict_in_generate)


def _check_tokens(model: Model, mask_id: int, eos: tuple[int, ...]) -> None:
    """Refuse a mask or an end that the model does not embed."""
    tokens = embedded(model)
    check_vocabulary(mask_id, tokens)
    if eos:
        check_range("eos_id", min(eos), max(eos), tokens)


def _refuse_masks(prompt: torch.Tensor, mask_id: int, cached: bool) -> None:
    if cached and bool((prompt == mask_id).any()):
        raise ValueError(
            f"the prompt holds the mask {mask_id}, and block caches count blocks from the first mask; "
            "fill it, or give method='dllm-cache'"
        )


def _for_backend(
    settings: Settings, options: dict[str, Any], method: str | None, kind: Family
) -> tuple[Settings, dict[str, Any], bool]:
    """Settings and options of the backend with the same blocks, and whether a block has a cache of its own."""
    options = {**options, "mask_id": kind.mask_id, "shift": kind.shift}
    if method is not None:
        options["method"] = method
    backend = Options.of(options)
    if backend.reads("block_length"):
        if settings.block_length is not None:
            options["block_length"] = settings.block_length
        backend = Options.of(options)
        settings = replace(settings, block_length=backend.block_length)
    chooser = next((each for each in turned_on(backend) if each.unmask is not None), None)
    restricting = tuple(each for each in turned_on(backend) if each.candidates is not None)
    if chooser is not None or restricting:
        rule = None if chooser is None else _rule(chooser.unmask, f"{chooser.name!r} says tokens to write", backend)
        settings = replace(settings, rule=rule, allowed=_allowed(restricting, backend) if restricting else None)
    return settings, options, rule_of(backend.cache).in_blocks and backend.keep_ratio is None


@cache
def _rule(function: Callable[[Confidences], torch.Tensor], what: str, options: Options) -> Rule:
    """A mechanism's function of :class:`Confidences` with the user's options.

    It is the same function for the same arguments, as it is traced.

    Args:
        function: of the mechanism.
        what: which mechanism says what, as in "'name' says tokens to write".
        options: what the user chose.
    """
    every, what = torch.ones(2, 5, dtype=torch.bool), f"the mechanism {what}"
    asked(what, function, Confidences(torch.rand(2, 5), every, every, options), every)
    values = SimpleNamespace(**{name: getattr(options, name) for name in tables().options})

    def rule(sure: torch.Tensor, candidates: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        told = Confidences(sure, candidates, masked, values)
        return function(told) if torch.compiler.is_compiling() else asked(what, function, told, candidates)

    return rule


@cache
def _allowed(mechanisms: tuple[Mechanism, ...], options: Options) -> Allowed:
    """The candidates that all ``mechanisms`` leave."""
    rules = [_rule(each.candidates, f"{each.name!r} says candidates", options) for each in mechanisms]

    def rule(sure: torch.Tensor, candidates: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
        for each in rules:
            candidates = candidates & each(sure, candidates, masked)
        return candidates

    return Allowed(tuple(each.name for each in mechanisms), rule)


def _warn_of_processors(processors: Iterable[Any]) -> None:
    """Say which of transformers' logits processors play no part here."""
    names = [type(each).__name__ for each in processors]
    lost = [name for name in names if name not in ("TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper")]
    if lost:
        warnings.warn(f"dllm: generate runs no logits processors, so these are left out: {lost}", stacklevel=3)


PLAIN = inspect.signature(generate)
"""The arguments that :func:`generate` names itself."""


def _signature() -> inspect.Signature:
    """All names of :func:`generate`, but ``attention_mask`` and names of transformers' own.

    transformers hands over what it finds here as it was given, and ``attention_mask`` once more as it prepared it;
    other names that neither it nor the model knows it refuses.
    """
    own = [p for name, p in PLAIN.parameters.items() if name not in ("attention_mask", "settings")]
    keyword = inspect.Parameter.KEYWORD_ONLY
    own_settings = [each for each in fields(Settings) if each.name in SETTINGS]
    more = [inspect.Parameter(each.name, keyword, default=each.default) for each in own_settings]
    known = {*PLAIN.parameters, "max_new_tokens", "eos_token_id"}
    other = [name for name in (*SYNONYMS, *option_names()) if name not in known]
    more += [inspect.Parameter(name, keyword, default=None) for name in other]
    return PLAIN.replace(parameters=[*own, *more, PLAIN.parameters["settings"]])


def _sign() -> None:
    generate.__signature__ = _signature()  # type: ignore[attr-defined]


_sign()
RENEWED.append(_sign)
