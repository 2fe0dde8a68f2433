"""Compile before the first request: the same generation on random tokens, at two prompt lengths."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .backend import stats
from .generate import generate
from .interface.mechanism import is_int
from .runtime import unit_code
from .runtime.session import sessions
from .sampler.check import embedded, kind_of
from .sampler.family import family
from .sampler.settings import merged


@dataclass(frozen=True)
class Warmed:
    """What :func:`warm` did.

    Attributes:
        seconds: how long it took.
        compiled: pieces of code that were compiled, by the step that they are for: stem, layers and head of each.
        steps: how often each kind of step ran.
    """

    seconds: float
    compiled: dict[str, int]
    steps: dict[str, int]

    def __str__(self) -> str:
        code = ", ".join(f"{count} for {name!r}" for name, count in self.compiled.items()) or "nothing new"
        steps = ", ".join(f"{count} {name!r}" for name, count in self.steps.items())
        return f"compiled in {self.seconds:.1f} s: {code}; steps: {steps}"


def warm(model: torch.nn.Module, prompt_length: int, gen_length: int = 128, batch: int = 1, **settings: Any) -> Warmed:
    """Compile all that :func:`generate` needs, for prompts and responses of any length and a batch such as this.

    It generates twice from random tokens, as Dynamo makes a graph for any length at the second length it sees. A batch
    of one has code of its own, and so have settings that make another step (a threshold, temperature, guidance).

    Args:
        model: see :func:`generate`.
        prompt_length: tokens of a prompt, such as those to come.
        gen_length: tokens of a response.
        batch: sequences of a call.
        settings: as :func:`generate` will be given: options of the backend, and how to sample.

    Returns:
        What was compiled; in a terminal the count also shows while it grows.

    Raises:
        TypeError, ValueError: as :func:`generate`, or a length that is no whole number of at least 1.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is {kind_of(model)}; give the module that generate will be given")
    for name, value in (("prompt_length", prompt_length), ("gen_length", gen_length), ("batch", batch)):
        if not is_int(value) or value < 1:
            raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
    tokens = embedded(model)
    if tokens is None or tokens < 2:
        raise ValueError("the model does not say how many tokens it embeds; call generate on a prompt of yours instead")
    known = merged(settings, settings.get("options"))
    mask_id = family(model, known.get("mask_id"), known.get("shift")).mask_id
    before, begun = Counter(stats(model)["steps"]), time.perf_counter()
    device = next(model.parameters()).device
    with _counted() as compiled:
        for length in (prompt_length, prompt_length + 1):
            ids = torch.randint(0, tokens - 1, (batch, length), generator=torch.Generator().manual_seed(length))
            ids += ids >= mask_id  # any token but the mask
            generate(model, ids.to(device), gen_length=gen_length, **settings)
    weights = {id(weight) for weight in model.parameters()}
    for session in sessions():
        if session.shares(weights):
            session.drop()
    steps = Counter(stats(model)["steps"]) - before
    return Warmed(time.perf_counter() - begun, dict(compiled), dict(steps))


@contextmanager
def _counted() -> Iterator[Counter[str]]:
    """Count what is compiled, and show it on a terminal."""
    compiled, shown = Counter[str](), sys.stderr.isatty()

    def note(name: str) -> None:
        compiled[name] += 1
        if shown:
            sys.stderr.write(f"\rdllm: compiled {compiled.total()}, the last for {name!r}\033[K")
            sys.stderr.flush()

    unit_code.LISTENERS.append(note)
    try:
        yield compiled
    finally:
        unit_code.LISTENERS.remove(note)
        if shown and compiled:
            print(file=sys.stderr)
