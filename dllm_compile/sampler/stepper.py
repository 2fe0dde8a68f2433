"""From settings to the step that a loop repeats: compiled or not, drawn in one graph or in eager."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import torch

from .compiled import compiled
from .drafts import Drafts, check
from .draw import draw_step
from .family import Family, vocabulary
from .in_order import InOrder, any_order
from .progress import Progress, StepFunction, Writable
from .settings import Settings
from .step import Model, ending, guided_logits, proposals, read_logits, surest


def stepper(
    model: Model,
    x: torch.Tensor,
    kind: Family,
    settings: Settings,
    options: dict[str, Any],
    inputs: dict[str, Any],
    generator: torch.Generator | None,
    progress: Progress,
) -> StepFunction:
    """The step of one generation.

    Args:
        model: maps ids to logits.
        x: ``[B, S]`` int64, the ids at the start.
        kind: family of the model.
        settings: how to sample.
        options: of the backend; empty runs the model as it is.
        inputs: of the model, beside the ids.
        generator: source of random numbers.
        progress: of the loop.

    Raises:
        ValueError: the cache needs to be told what is filled, and confidence decides that after the call; or drafts
            cannot repeat such a loop.
    """
    if settings.drafts is not None:
        return _drafts(model, x, kind, settings, options, inputs, progress)
    uniform = partial(torch.rand, generator=generator, device=x.device)
    within = any_order(settings, options)
    settings = within or settings
    given = x != kind.mask_id if settings.cfg_scale > 0 else None
    fixed = {**inputs, "mask_id": kind.mask_id, "shift": kind.shift, "cfg_scale": settings.cfg_scale, "given": given}
    if settings.draws_rows(kind.shift):
        read = partial(compiled(read_logits, model, options) if options else read_logits, model)
        step = _drawn(partial(guided_logits, read, **fixed), kind.mask_id, settings, generator)
    else:
        columns = _columns(model, x, inputs) if settings.temperature > 0 else 0
        denoise = compiled(surest, model, options) if options and not settings.cfg_scale else surest
        if options and settings.cfg_scale:  # the model's ids are made inside of the step: compile the model alone
            model = partial(compiled(read_logits, model, options), model)
        fixed.update(remasking=settings.remasking, temperature=settings.temperature)
        fixed.update(threshold=settings.threshold, factor=settings.factor, **_of_mechanisms(settings))
        calls = count(1) if settings.skips and denoise is not surest else None

        def step(x: torch.Tensor, writable: Writable) -> tuple[torch.Tensor, torch.Tensor | None]:
            noise = uniform((*x.shape, columns), dtype=torch.float64) if columns else None
            draws = uniform(x.shape) if settings.remasking == "random" else None
            drawn: dict[str, Any] = {"noise": noise, "draws": draws}
            drawn.update(block=writable.block, waiting=writable.waiting)
            if calls is not None:
                drawn["stamp"] = torch.full((1,), next(calls), device=x.device)
            drawn.update(candidates=writable.candidates, count=writable.count, most=writable.most)
            new: tuple[torch.Tensor, torch.Tensor | None] = denoise(model, x, **drawn, **fixed)
            return new

    return step if within is None else InOrder(step, uniform)


def _drafts(
    model: Model,
    x: torch.Tensor,
    kind: Family,
    settings: Settings,
    options: dict[str, Any],
    inputs: dict[str, Any],
    progress: Progress,
) -> Drafts:
    """The step of a generation that looks at several states a call."""
    shared = check(settings, options, len(x), kind.shift)
    read: Callable[..., Any] = compiled(proposals, model, options) if options else proposals
    how = {"mask_id": kind.mask_id, "shift": kind.shift, "remasking": settings.remasking}

    def propose(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        given = {
            name: value.repeat(len(states), *(1 for _ in value.shape[1:]))
            if isinstance(value, torch.Tensor) and value.shape[:1] == (1,)
            else value
            for name, value in inputs.items()
        }
        found: tuple[torch.Tensor, torch.Tensor] = read(model, states, **how, **given)
        return found

    return Drafts(propose, settings, progress, kind.mask_id, shared)


def _drawn(
    read: Callable[..., torch.Tensor], mask_id: int, settings: Settings, generator: torch.Generator | None
) -> StepFunction:
    """A step that draws in eager, from the logits that ``read`` gives for ids."""

    def step(x: torch.Tensor, writable: Writable) -> tuple[torch.Tensor, torch.Tensor | None]:
        logits, masked = read(x), x == mask_id if writable.waiting is None else writable.waiting
        new = draw_step(logits, x, masked, writable, settings, generator)
        if settings.ends is None:
            return new, None
        return new, ending(logits, masked, settings.eos, settings.ends.rule, writable.block)

    return step


def _of_mechanisms(settings: Settings) -> dict[str, Any]:
    """What mechanisms say about which tokens are written, as arguments of a step."""
    said: dict[str, Any] = {"rule": settings.rule}
    said["allowed"] = settings.allowed.rule if settings.allowed is not None else None
    said["moved"] = settings.moved.bound if settings.moved is not None else None
    return said | ({} if settings.ends is None else {"ends": settings.ends.rule, "eos": settings.eos})


def _columns(model: Model, x: torch.Tensor, inputs: dict[str, Any]) -> int:
    """Width of the logits, for which noise is drawn; a model that does not tell is called once."""
    known = vocabulary(model)
    if known is None:
        with torch.no_grad():
            known = read_logits(model, x, **inputs).shape[-1]
    return known
