"""Time several ways to run one model with one loop: what ``demo`` and ``bench`` share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

from . import backend
from .explain import explain
from .loop import quota_loop

Make = Callable[[torch.nn.Module], Callable[..., Any]]
Show = Callable[[torch.Tensor], None]


@dataclass(frozen=True)
class Job:
    """One generation.

    Attributes:
        ids: ``[B, prompt + response]`` int64, the response masked.
        prompt, response, block: tokens.
        mask_id: the mask token.
    """

    ids: torch.Tensor
    prompt: int
    response: int
    block: int
    mask_id: int


@dataclass
class Row:
    """What one contender did.

    Attributes:
        tokens: response tokens that count, padding excluded.
        seconds: wall time of the timed forwards, sampling included.
        forwards: timed forward calls.
        compile_seconds: time of the first generation beyond what the same forwards take once compiled.
        accuracy: share of problems answered exactly, where answers are known.
        same_tokens: share of response tokens equal to those of the first contender.
        flops: FLOPs of an average step relative to a full step.
    """

    name: str
    tokens: float = 0.0
    seconds: float = 0.0
    forwards: int = 0
    compile_seconds: float = 0.0
    accuracy: float | None = None
    same_tokens: float = 1.0
    flops: float = 1.0
    tokens_per_second: float = 0.0
    vs_eager: float = 1.0
    vs_inductor: float = 1.0
    steps: dict[str, int] = field(default_factory=dict)


def contenders(**options: Any) -> dict[str, Make]:
    """Eager, plain Inductor, and the backend with ``options``."""
    return {
        "eager": lambda model: model,
        "inductor": lambda model: torch.compile(model),
        "dllm-cache": lambda model: torch.compile(model, backend=backend.dllm, options=options),
    }


def generate(
    call: Callable[..., Any], job: Job, limit: int | None = None, show: Show | None = None
) -> tuple[torch.Tensor, float, int]:
    """One generation with the plain loop: ids, seconds, forwards."""
    ids = job.ids.clone()
    count = 0
    with torch.no_grad():
        begin = time.perf_counter()
        for x in quota_loop(lambda i: call(i).logits, ids, job.prompt, job.response, job.block, job.mask_id):
            count += 1
            if show is not None:
                show(x)
            if limit is not None and count >= limit:
                break
        seconds = time.perf_counter() - begin
    return ids, seconds, count


def play(
    name: str,
    make: Make,
    model: torch.nn.Module,
    jobs: Iterable[Job],
    warm: int,
    limit: int | None,
    show: Show | None = None,
) -> tuple[Row, list[torch.Tensor]]:
    """Warm one contender up on ``warm`` forwards, then time it on every job.

    Args:
        name, make, model: the contender.
        jobs: generations, all of one shape.
        warm: forwards before the timed ones; enough to compile every variant.
        limit: forwards timed in each job, all by default.
        show: called after each step with the ids.
    """
    torch._dynamo.reset()
    jobs = list(jobs)
    call = make(model)
    row = Row(name)
    _, first, warmed = generate(call, jobs[0], warm)
    before = Counter(backend.stats(model)["steps"])
    results = []
    for job in jobs:
        ids, seconds, count = generate(call, job, limit, show)
        results.append(ids)
        row.seconds += seconds
        row.forwards += count
    row.compile_seconds = max(0.0, first - warmed * row.seconds / row.forwards)
    row.steps = dict(Counter(backend.stats(model)["steps"]) - before)
    return row, results


def relative_flops(row: Row, model: torch.nn.Module, job: Job, options: dict[str, Any]) -> float:
    """FLOPs of an average step of ``row``, from the closed forms, relative to a full step of the plain model."""
    if not row.steps:
        return 1.0
    names = {**options, "mask_id": job.mask_id}
    relative = explain(model, job.ids, **names).relative
    work = sum(relative.get(name, relative["full"]) * n for name, n in row.steps.items() if name != "repeat")
    return work / sum(row.steps.values())


def finish(rows: list[Row]) -> list[Row]:
    """Fill in speeds and ratios; the first row is eager, the second plain Inductor."""
    for row in rows:
        row.tokens_per_second = row.tokens / row.seconds
    for row in rows:
        row.vs_eager = row.tokens_per_second / rows[0].tokens_per_second
        row.vs_inductor = row.tokens_per_second / rows[min(1, len(rows) - 1)].tokens_per_second
    return rows
