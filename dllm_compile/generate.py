"""Generation: the sampling loops of LLaDA, Dream and Fast-dLLM on any masked-diffusion model, compiled or not."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch

from .declared import loop
from .interface.mechanism import Confidences, Mechanism, asked
from .mechanisms import RENEWED, find_block, rule_of, tables, turned_on
from .options import Options, check_vocabulary
from .sampler.check import check_call, check_range, embedded
from .sampler.decode import Generated, decode
from .sampler.family import Family, family, model_inputs
from .sampler.handed import taken
from .sampler.progress import Progress
from .sampler.rules import Allowed, Moved, Rule
from .sampler.settings import SETTINGS, SYNONYMS, Settings, merged, option_names, settings_of
from .sampler.step import Model
from .sampler.stepper import stepper
from .sampler.stops import Stopping, Stops, stopping_of


def generate(
    model: Model,
    input_ids: torch.Tensor,
    *,
    attention_mask: torch.Tensor | None = None,
    method: str | None = None,
    options: Mapping[str, Any] | None = None,
    stopping_criteria: Iterable[Any] | None = None,
    stop_strings: str | list[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    return_dict: bool = False,
    output_history: bool = False,
    generator: torch.Generator | None = None,
    generation_config: Any = None,
    **settings: Any,
) -> torch.Tensor | Generated:
    """Generate responses by a masked-diffusion language model.

    Also a ``custom_generate`` of transformers: ``model.generate(ids, custom_generate=dllm_compile.generate, ...)``.

    Args:
        model: maps ids ``[B, S]`` to logits ``[B, S, V]``, bare or as ``.logits``; compiled or not.
        input_ids: ``[B, P]`` integer prompts, padded on the left; ``P`` may be 0. Masks in them are filled with the
            first block.
        attention_mask: ``[B, P]`` of 0 and 1 in any dtype, 0 at padding, which is on the left. It has no columns for
            the response, and is not given to the model where nothing is padding.
        method: of the backend; ``None`` runs the model as it is, unless an option is given, such as ``preset``.
        options: more of ``settings``: a place for names that transformers takes for itself, such as ``cache``.
        stopping_criteria: as in transformers. A response ends with the first tokens that one of them is true of; they
            are asked as soon as no mask is before these. What is behind becomes ``pad_token_id``, or else ``eos_id``.
        stop_strings, tokenizer: texts that end a response, and what looks for them.
        streamer: ``put`` gets the prompt, then tokens in order as soon as no mask is before them; then ``end``. For one
            sequence, as in transformers.
        return_dict, output_history: return :class:`Generated`; with the ids after each call.
        generator: source of random numbers; ``None`` for PyTorch's own.
        generation_config: of transformers; fills in what is not said otherwise.
        settings: fields of :class:`dllm_compile.sampler.settings.Settings`, their synonyms, and options of the backend.

    Returns:
        ``[B, P + gen_length]`` int64, or :class:`Generated`.

    Raises:
        TypeError: an argument is of another kind, or the model returns no logits.
        ValueError: an unknown name, a value out of range, something that no loop does, an unknown mask token,
            or ids that the model does not embed.
    """
    if generation_config is not None:
        settings, streamer = taken(settings, generation_config, input_ids, attention_mask, streamer)
        return_dict = return_dict or bool(generation_config.return_dict_in_generate)
    settings = merged(settings if method is None else {**settings, "method": method}, options)
    others = {"output_history": output_history, "streamer": streamer, "generator": generator}
    check_call(model, input_ids, attention_mask, {**others, "return_dict": return_dict})
    stopping = stopping_of(stopping_criteria, stop_strings, tokenizer, generation_config)
    how, more = settings_of(settings, generation_config, input_ids.shape[1])
    result = _run(model, input_ids, attention_mask, how, more, stopping, **others)
    return result if return_dict or output_history else result.sequences


def _run(
    model: Model,
    prompt: torch.Tensor,
    attention_mask: torch.Tensor | None,
    how: Settings,
    options: dict[str, Any],
    stopping: Stopping | None,
    *,
    output_history: bool,
    streamer: Any,
    generator: torch.Generator | None,
) -> Generated:
    """:func:`generate`, of arguments that are read: settings, options of the backend, and stopping criteria."""
    kind = family(model, how.mask_id, how.shift)
    _check_tokens(model, kind.mask_id, how.eos)
    cached = False
    if options:
        how, options, cached = for_backend(how, options, kind)
        _refuse_masks(prompt, kind.mask_id, cached)
    how.check_blocks()
    x = torch.nn.functional.pad(prompt.long(), (0, how.gen_length), value=kind.mask_id)
    stops = None if stopping is None else Stops(stopping, how.eos, x, prompt.shape[1])
    progress, how = _progress(how, x == kind.mask_id, kind.shift, cached, bool(options))
    inputs = model_inputs(model, attention_mask, x.shape[1], kind.shift)
    step = stepper(model, x, kind, how, options, inputs, generator, progress)
    with loop():
        return decode(x, prompt.shape[1], kind.mask_id, how.eos, step, progress, streamer, output_history, stops)


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


def for_backend(settings: Settings, options: dict[str, Any], kind: Family) -> tuple[Settings, dict[str, Any], bool]:
    """Settings and options of the backend with the same blocks, and whether a block has a cache of its own."""
    options = {**options, "mask_id": kind.mask_id, "shift": kind.shift}
    backend = Options.of(options)
    if backend.reads("block_length"):
        if settings.block_length is not None:
            options["block_length"] = settings.block_length
        backend = Options.of(options)
        settings = replace(settings, block_length=backend.block_length)
    find = find_block(backend)
    if find is not None:
        settings = replace(settings, block=find)
    for each in turned_on(backend, "unmask"):
        settings = replace(settings, rule=_rule(each.unmask, f"{each.name!r} says tokens to write", backend))
    if restricting := turned_on(backend, "candidates"):
        rule = _joined(restricting, backend, "candidates", every=True)
        settings = replace(settings, allowed=Allowed(tuple(each.name for each in restricting), rule))
    if moving := turned_on(backend, "threshold"):
        settings = replace(settings, moved=_moved(moving, backend))
    if ending := turned_on(backend, "ends"):
        settings = replace(settings, ends=Allowed(_switches(ending), _joined(ending, backend, "ends", every=False)))
    if skipping := turned_on(backend, "skips"):
        settings = replace(settings, skips=tuple(each.name for each in skipping))
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
    asked(what, function, Confidences(torch.rand(2, 5), every, every, options, every), every)
    values = _named(options)

    def rule(
        sure: torch.Tensor, candidates: torch.Tensor, masked: torch.Tensor, block: torch.Tensor | None
    ) -> torch.Tensor:
        told = Confidences(sure, candidates, masked, values, block)
        return function(told) if torch.compiler.is_compiling() else asked(what, function, told, candidates)

    return rule


def _named(options: Options) -> SimpleNamespace:
    """All options by name, for functions that are traced."""
    return SimpleNamespace(**{name: getattr(options, name) for name in tables().options})


def _switches(mechanisms: tuple[Mechanism, ...]) -> tuple[str, ...]:
    """The options that turn ``mechanisms`` on, in the order of all."""
    on = {name for each in mechanisms for name in each.switches}
    return tuple(name for name in tables().switches if name in on)


@cache
def _joined(mechanisms: tuple[Mechanism, ...], options: Options, what: str, every: bool) -> Rule:
    """The positions that ``mechanisms`` say by their function ``what``: those that any of them says, or that every one
    says of the candidates that the ones before it left.
    """
    rules = [_rule(getattr(each, what), f"{each.name!r} says {what}", options) for each in mechanisms]

    def rule(
        sure: torch.Tensor, candidates: torch.Tensor, masked: torch.Tensor, block: torch.Tensor | None
    ) -> torch.Tensor:
        found = torch.zeros_like(candidates)
        for each in rules:
            said = each(sure, candidates, masked, block)
            found = found | said
            candidates = candidates & said if every else candidates
        return candidates if every else found

    return rule


@cache
def _moved(mechanisms: tuple[Mechanism, ...], options: Options) -> Moved:
    """The threshold, as one of ``mechanisms`` after the other changes it."""
    values, every = _named(options), torch.ones(2, 5, dtype=torch.bool)
    said = [(f"the mechanism {each.name!r} says a threshold", each.threshold) for each in mechanisms]
    functions = [(what, function) for what, function in said if function is not None]

    def bound(
        threshold: torch.Tensor,
        sure: torch.Tensor,
        candidates: torch.Tensor,
        masked: torch.Tensor,
        block: torch.Tensor | None,
    ) -> torch.Tensor:
        for what, function in functions:
            told = Confidences(sure, candidates, masked, values, block, threshold)
            tracing = torch.compiler.is_compiling()
            threshold = function(told) if tracing else asked(what, function, told, threshold)
        return threshold

    bound(torch.ones(2, 1), torch.rand(2, 5), every, every, every)
    return Moved(_switches(mechanisms), bound)


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
