"""Time several ways to run one model: what ``demo``, ``bench`` and the plot share."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from dllm_compile import backend
from dllm_compile.generate import generate
from dllm_compile.quota_loop import quota_loop
from dllm_compile.runtime.memory import peak_bytes
from dllm_compile.sampler.decode import Generated

from .means import gained
from .timed import Run, Timed, drop_state

Show = Callable[[torch.Tensor], None]
Loop = Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, int], Iterator[torch.Tensor]]
"""A sampling loop: from a function of ids ``[B, S]`` to logits, the ids, whose masks it fills in place, and the mask
token to the same ids after each step."""
FIRST_FORWARDS = 2
"""Of a model that has one kind of step, before the timed ones."""


@dataclass(frozen=True)
class Job:
    """One generation.

    Attributes:
        ids: ``[B, prompt + response]`` int64, the response masked.
        prompt, response, block: tokens. The response is behind the prompt; where contenders have loops of their own, it
            may be anywhere.
        mask_id: the mask token.
    """

    ids: torch.Tensor
    prompt: int
    response: int
    block: int
    mask_id: int


@dataclass(frozen=True)
class Contender:
    """A way to run a model.

    Attributes:
        name: of its row.
        options: of this backend; ``None`` for the model as it is.
        plain: whether to compile by Inductor alone.
        steps: forward calls of the plain loop; ``None`` for one a token.
        settings: of ``dllm_compile.generate``, which then takes the place of the plain loop.
        loop: what fills the masks in place of the plain loop, which is LLaDA's.
    """

    name: str
    options: dict[str, Any] | None = None
    plain: bool = False
    steps: int | None = None
    settings: dict[str, Any] | None = None
    loop: Loop | None = None

    def filling(
        self, logits: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, job: Job
    ) -> Iterator[torch.Tensor]:
        """The steps of the loop on the ids ``x`` of a job."""
        if self.loop is not None:
            return self.loop(logits, x, job.mask_id)
        return quota_loop(logits, x, job.prompt, job.response, job.block, job.mask_id, self.steps)

    def compiled(self, model: torch.nn.Module, mask_id: int) -> Callable[..., Any]:
        """The model as the plain loop calls it."""
        if self.options is not None:
            return torch.compile(model, backend=backend.dllm, options={"mask_id": mask_id, **self.options})
        return torch.compile(model) if self.plain else model

    def within(self, job: Job) -> Job:
        """The job in blocks of the length that the options say, where they say one."""
        return replace(job, block=(self.options or {}).get("block_length", job.block))


@dataclass
class Row:
    """What one contender did.

    Attributes:
        tokens: response tokens that count, padding excluded.
        seconds: wall time of the timed forwards, sampling included.
        forwards: timed forward calls.
        jobs: seconds, seconds on a processor (``cpu``), and forwards of each job.
        compile_seconds: by how much generations that do not count, as something was compiled in them, took longer.
        accuracy: share of problems answered exactly, where answers are known.
        right: which problems are.
        gain, gain_error: points of accuracy beyond the first contender's, paired by problem, and its standard error,
            ``None`` of one problem.
        same_tokens: share of response tokens equal to those of the first contender.
        flops: FLOPs of an average step relative to a full step, as they were counted.
        tokens_per_second, vs_eager, vs_inductor: speed, and the same relative to the baselines.
        cheaper, fewer: how much of ``vs_eager`` is from the cost of a forward, and how much from their number.
        milliseconds: median time of a forward by variant.
        state_bytes: bytes of rows kept of layers behind the timed forwards.
        peak_bytes: most bytes of tensors at once, weights included and compilation aside; 0 where not asked for.
        every_kind: forwards of a job behind which each kind of step that it has had run.
        salient: rows that an average layer of a saliency step found salient.
        steps, rows, logits: forwards by variant, and their rows of the stream and of the logits (see ``Stats``).
    """

    name: str
    tokens: float = 0.0
    seconds: float = 0.0
    forwards: int = 0
    compile_seconds: float = 0.0
    accuracy: float | None = None
    right: list[bool] = field(default_factory=list)
    gain: float = 0.0
    gain_error: float | None = None
    same_tokens: float = 1.0
    flops: float = 1.0
    tokens_per_second: float = 0.0
    vs_eager: float = 1.0
    vs_inductor: float = 1.0
    cheaper: float = 1.0
    fewer: float = 1.0
    state_bytes: int = 0
    peak_bytes: int = 0
    every_kind: int = 0
    salient: float = 0.0
    jobs: list[dict[str, float]] = field(default_factory=list)
    milliseconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    logits: dict[str, int] = field(default_factory=dict)


def wait(device: torch.device) -> None:
    """Return once the device has done what it was given, as a clock must; a CPU always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def looped(
    call: Callable[..., Any],
    model: torch.nn.Module,
    job: Job,
    contender: Contender,
    limit: int | None = None,
    show: Show | None = None,
) -> Run:
    """The contender's loop, without what it takes to show it, and to look a variant up, half a millisecond in a large
    model.

    Args:
        call: maps ids to logits, as ``.logits``.
        model: what ``call`` runs.
        job: the generation.
        contender: whose loop it is.
        limit: forwards to stop behind; ``None`` for all.
        show: called after each step with the ids.
    """
    run = Run(job.ids.clone(), 0.0, 0)
    seen, beside, beside_cpu = Counter(backend.stats(model)["steps"]), 0.0, 0.0

    def timed(ids: torch.Tensor) -> torch.Tensor:
        nonlocal seen, beside, beside_cpu
        wait(ids.device)
        begin = time.perf_counter()
        logits: torch.Tensor = call(ids).logits
        wait(ids.device)
        end, end_cpu = time.perf_counter(), time.process_time()
        now = Counter(backend.stats(model)["steps"])
        kind = next(iter(now - seen), "plain")
        run.every_kind = run.every_kind if kind in run.calls else run.forwards + 1
        run.calls.setdefault(kind, []).append(end - begin)
        seen, beside = now, beside + time.perf_counter() - end
        beside_cpu += time.process_time() - end_cpu
        return logits

    loop = contender.filling(timed, run.ids, job)
    with torch.no_grad():
        wait(run.ids.device)
        begin, begin_cpu = time.perf_counter(), time.process_time()
        for x in loop:
            run.forwards += 1
            if show is not None:
                end, end_cpu = time.perf_counter(), time.process_time()
                show(x)
                beside += time.perf_counter() - end
                beside_cpu += time.process_time() - end_cpu
            if run.forwards == limit:
                break
        wait(run.ids.device)
        run.seconds = time.perf_counter() - begin - beside
        run.cpu = time.process_time() - begin_cpu - beside_cpu
    return run


def _generated(model: torch.nn.Module, job: Job, settings: dict[str, Any]) -> Run:
    """``dllm_compile.generate``."""
    lengths = {"gen_length": job.response, "block_length": job.block, "mask_id": job.mask_id}
    wait(job.ids.device)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    out = generate(model, job.ids[:, : job.prompt], return_dict=True, **{**lengths, **settings})
    assert isinstance(out, Generated)
    wait(out.sequences.device)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
    return Run(out.sequences, seconds, out.nfe, cpu=cpu)


def play(
    contender: Contender,
    model: torch.nn.Module,
    jobs: Iterable[Job],
    limit: int | None = None,
    show: Show | None = None,
    memory: bool = False,
    compile_first: bool = False,
) -> tuple[Row, list[torch.Tensor]]:
    """Time one contender on every job, in runs in which nothing is compiled; see :class:`Timed`.

    Args:
        contender: the contender.
        model: whom it runs.
        jobs: generations; the first of each shape also runs before it is timed, as does one that compiles something.
        limit: forwards timed in each job, all by default.
        show: called after each step with the ids.
        memory: also count the peak of memory. On CUDA that costs nothing; else in one more run, as counting takes time.
        compile_first: the first of several jobs runs once and is not timed.

    Returns:
        What is known of the jobs that were timed, and what each job ended with.
    """
    torch.compiler.reset()
    jobs = list(jobs)
    device = jobs[0].ids.device
    call = contender.compiled(model, jobs[0].mask_id)
    one_kind = contender.options is None and contender.settings is None

    def run(job: Job, limit: int | None, show: Show | None) -> Run:
        if memory and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        before = backend.stats(model)
        if contender.settings is not None:
            found = _generated(model, job, {**contender.settings, **(contender.options or {})})
        else:
            found = looped(call, model, job, contender, limit, show)
        found.before, found.after = before, backend.stats(model)
        return found

    timed, runs, compiling, apart = Timed(), list[Run](), 0.0, list[torch.Tensor]()
    few = min(limit or FIRST_FORWARDS, FIRST_FORWARDS) if one_kind else limit
    if compile_first and len(jobs) > 1:
        apart.append(timed.beforehand(jobs[0].ids.shape, partial(run, jobs[0], limit, show)).ids)
    for job in jobs[len(apart) :]:
        found, spent = timed(job.ids.shape, partial(run, job, limit, show), partial(run, job, few, None))
        runs.append(found)
        compiling += spent
    row = _row(contender.name, runs)
    row.compile_seconds = compiling
    if memory and device.type == "cuda":
        row.peak_bytes = max(each.after["peak_bytes"] for each in runs)
    elif memory:
        drop_state()
        weights = sum(parameter.nbytes for parameter in model.parameters())
        row.peak_bytes = weights + peak_bytes(lambda: run(jobs[0], row.every_kind or limit, None), device)
    return row, [*apart, *(each.ids for each in runs)]


def _row(name: str, runs: list[Run]) -> Row:
    """What clocks and counters say of the runs that count."""
    row = Row(name, seconds=sum(r.seconds for r in runs), forwards=sum(r.forwards for r in runs))
    row.jobs = [{"seconds": each.seconds, "cpu": each.cpu, "forwards": each.forwards} for each in runs]
    row.every_kind = max(each.every_kind for each in runs)
    calls: dict[str, list[float]] = {}
    for each in runs:
        for variant, spent in each.calls.items():
            calls.setdefault(variant, []).extend(spent)
        for kind in ("steps", "rows", "logits"):
            counts = Counter(getattr(row, kind)) + (Counter(each.after[kind]) - Counter(each.before[kind]))
            getattr(row, kind).update(counts)
    row.milliseconds = {variant: 1000 * median(spent) for variant, spent in calls.items()}

    def more(counter: str) -> float:
        return float(sum(each.after[counter] - each.before[counter] for each in runs))

    row.salient = more("salient") / max(more("salient_layers"), 1)
    row.flops = more("flops") / max(more("flops_whole"), 1.0) if row.steps else 1.0
    row.state_bytes = runs[-1].after["state_bytes"]
    return row


def finish(rows: list[Row]) -> list[Row]:
    """Fill in speeds and ratios; the first row is eager, the second plain Inductor."""
    for row in rows:
        row.tokens_per_second = row.tokens / row.seconds
    for row in rows:
        row.vs_eager = row.tokens_per_second / rows[0].tokens_per_second
        row.vs_inductor = row.tokens_per_second / rows[min(1, len(rows) - 1)].tokens_per_second
        row.cheaper = (rows[0].seconds / rows[0].forwards) / (row.seconds / row.forwards)
        row.fewer = (rows[0].forwards / rows[0].tokens) / (row.forwards / row.tokens)
        if row.right:
            row.gain, row.gain_error = gained(*[[100.0 * each for each in one.right] for one in (row, rows[0])])
    return rows
