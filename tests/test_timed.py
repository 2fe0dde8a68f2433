"""Runs that count are those in which nothing is compiled."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from dllm_compile.bench import contest
from dllm_compile.bench.contest import Contender, Job, play
from dllm_compile.bench.means import gained, standard_error
from dllm_compile.bench.timed import MOST_RUNS, Run, Timed, compiled
from dllm_compile.runtime import unit_code

from . import models

PROMPT, RESPONSE = 6, 8


def job(seed: int) -> Job:
    ids = torch.randint(0, models.MASK, (2, PROMPT + RESPONSE), generator=torch.Generator().manual_seed(seed))
    ids[:, PROMPT:] = models.MASK
    return Job(ids, PROMPT, RESPONSE, RESPONSE, models.MASK)


def test_a_run_that_compiles_is_not_the_one_that_is_timed() -> None:
    """The first run of a key, and each in which code is made, up to a limit."""
    timed, ran = Timed(), list[float]()

    def run(compiles: int) -> Run:
        ran.append(float(len(ran)))
        if len(ran) <= compiles:
            for listener in unit_code.LISTENERS:
                listener("block")
        return Run(torch.zeros(1), 10.0 - len(ran), 0)

    assert (timed("a", lambda: run(2))[0].seconds, len(ran)) == (7.0, 3)
    assert (timed("a", lambda: run(2)), len(ran)) == ((Run(torch.zeros(1), 6.0, 0), 0.0), 4)
    ran.clear()
    assert timed("b", lambda: run(1))[1] == 1.0
    ran.clear()
    timed("c", lambda: run(99))
    assert len(ran) == MOST_RUNS


def test_a_shorter_first_run_counts_by_its_forwards() -> None:
    """One of 2 forwards that takes as long as 5 of the run that counts spent the time of 3 on compiling."""
    whole, part = Run(torch.zeros(1), 4.0, 8), Run(torch.zeros(1), 2.5, 2)
    assert Timed()("a", lambda: whole, lambda: part) == (whole, 1.5)


def test_graphs_of_dynamo_are_seen_whoever_compiles_them() -> None:
    function = torch.compile(lambda x: x + 1, backend="eager")
    for count, shape in ((1, (2, 3)), (0, (2, 3)), (1, (4, 3)), (0, (5, 3))):
        with compiled() as made:
            function(torch.zeros(shape))
        assert len(made) == count


@pytest.mark.parametrize("how", ["loop", "generate"])
def test_what_only_a_later_job_needs_is_compiled_in_no_run_that_counts(
    monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The first job fills all masks in one call, a full step; the second one by one, which needs steps of the block."""
    jobs, ran = [job(0), job(1)], list[tuple[float, int]]()
    options = {"method": "fast-dllm", "cache": "dual", "block_length": RESPONSE, "shift": False, "lowering": "eager"}

    def fill(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, mask_id: int) -> Iterator[torch.Tensor]:
        at_once = torch.equal(x[:, :PROMPT], jobs[0].ids[:, :PROMPT])
        while bool((x == mask_id).any()):
            new = (x == mask_id) & (at_once | ((x == mask_id).cumsum(1) == 1))
            x.copy_(torch.where(new, call(x)[..., : models.MASK].argmax(-1), x))
            yield x

    def generated(model: torch.nn.Module, given: Job, settings: dict[str, Any]) -> Run:
        at_once = torch.equal(given.ids, jobs[0].ids)
        return inner(model, given, {**settings, "threshold": 0.0 if at_once else 1.0})

    def noted(name: str) -> Callable[..., Run]:
        original: Callable[..., Run] = getattr(contest, name)

        def run(*given: Any, **more: Any) -> Run:
            with compiled() as made:
                found = original(*given, **more)
            ran.append((found.seconds, len(made)))
            return found

        return run

    monkeypatch.setattr(contest, "looped", noted("looped"))
    inner = noted("_generated")
    monkeypatch.setattr(contest, "_generated", generated)
    settings = {"threshold": 1.0} if how == "generate" else None
    row, _ = play(Contender("dual", options, settings=settings, loop=fill), models.build("llama"), jobs)
    assert row.forwards == 1 + RESPONSE
    assert row.steps == {"full": 2, "block": RESPONSE - 1}
    made = [count for _, count in ran]
    assert [bool(count) for count in made] == [True, False, True, False]
    counted = {each["seconds"] for each in row.jobs}
    assert counted == {ran[1][0], ran[3][0]}
    assert row.compile_seconds > 0


def test_what_computes_every_row_warms_up_in_few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = models.build("llama"), list[int]()
    monkeypatch.setattr(model, "forward", lambda x, call=model.forward: (calls.append(len(x)), call(x))[1])
    row, _ = play(Contender("eager"), model, [job(0), job(1)])
    assert (row.forwards, len(calls), row.every_kind) == (2 * RESPONSE, contest.FIRST_FORWARDS + 2 * RESPONSE, 1)


def test_the_standard_error_of_paired_differences() -> None:
    assert gained([1, 1, 0], [1, 0, 0]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert gained([True], [False]) == (1.0, None)
    assert standard_error([0.0, 2.0]) == 1.0


def test_showing_is_not_timed() -> None:
    shown = list[int]()

    def show(x: torch.Tensor) -> None:
        shown.append(int((x == models.MASK).sum()))
        time.sleep(1.0)

    row, _ = play(Contender("eager"), models.build("llama"), [job(0)], 2, show)
    assert shown == [2 * (RESPONSE - 1), 2 * (RESPONSE - 2)]
    assert row.seconds < 2.0


def test_the_first_of_several_jobs_may_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs once, and its result is there; tokens of the demo are those of the jobs that were timed."""
    model, calls = models.build("llama"), list[int]()
    monkeypatch.setattr(model, "forward", lambda x, call=model.forward: (calls.append(len(x)), call(x))[1])
    jobs = [job(0), job(1)]
    row, results = play(Contender("eager"), model, jobs, compile_first=True)
    assert (row.forwards, len(calls), len(row.jobs)) == (RESPONSE, 2 * RESPONSE, 1)
    assert [torch.equal(a[:, :PROMPT], b.ids[:, :PROMPT]) for a, b in zip(results, jobs, strict=True)] == [True] * 2
    alone, _ = play(Contender("eager"), model, jobs[:1], compile_first=True)
    assert (alone.forwards, len(alone.jobs)) == (RESPONSE, 1)
