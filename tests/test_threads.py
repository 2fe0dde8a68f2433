"""Several threads on one compiled model: each loop goes as if it were alone, under load."""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch

import dllm_compile

from . import models
from .callers import EQUAL, METHODS, TOLERANCE, build, fill, off, partial, readable, start
from .models import MASK

TURNS = 4  # generations of each thread
STEPS = 6


@pytest.fixture(autouse=True)
def _no_warnings_and_many_switches() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        yield
    sys.setswitchinterval(interval)


def together(work: Callable[[int], None], threads: int) -> None:
    """Run ``work`` of each number on a thread of its own, all at once; the first failure is raised."""
    gate, failed = threading.Barrier(threads), []

    def run(number: int) -> None:
        try:
            gate.wait(30)
            with torch.no_grad():
                work(number)
        except BaseException as error:  # handed on below
            failed.append(error)

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert not any(worker.is_alive() for worker in workers)
    if failed:
        raise failed[0]


def prompts(thread: int, turn: int) -> torch.Tensor:
    return start(seed=1 + 10 * thread + turn)


@pytest.mark.parametrize(
    ("name", "form", "threads"),
    [("exact", "whole", 2), ("exact", "alone", 3), ("neutral", "whole", 3), ("neutral", "alone", 2)],
)
def test_threads_are_eager_at_neutral_settings(name: str, form: str, threads: int) -> None:
    model = build(form)
    call = models.compiled(model, **EQUAL[name])
    wrong: list[tuple[int, int, int, float]] = []

    def work(thread: int) -> None:
        for turn in range(TURNS):
            x = prompts(thread, turn)
            for step in range(STEPS):
                for _ in range(2):  # a repeat, too
                    worst = off(call(x), model(x), readable(x))
                    if worst > TOLERANCE:
                        wrong.append((thread, turn, step, worst))
                x = fill(model(x), x)

    together(work, threads)
    assert not wrong


def test_threads_that_compile_at_the_same_time() -> None:
    """Nothing was called before, and every thread has another shape."""
    model = build()
    call = models.compiled(model, **EQUAL["exact"])

    def work(thread: int) -> None:
        x = start(batch=1 + thread, seed=thread, prompt=5 + thread)
        for _ in range(4):
            assert off(call(x), model(x), readable(x)) < TOLERANCE
            x = fill(model(x), x)

    together(work, 3)


@pytest.mark.parametrize(
    ("name", "form"),
    [("dual", "whole"), ("dual", "alone"), ("dllm-cache", "whole"), ("dllm-cache", "alone"), ("sparse", "whole")],
)
def test_threads_cache_as_if_alone(name: str, form: str) -> None:
    threads = 3
    call = models.compiled_loop(build(form), **METHODS[name])
    wanted: dict[tuple[int, int], list[torch.Tensor]] = {}
    with torch.no_grad():
        for thread in range(threads):
            for turn in range(TURNS):
                x = prompts(thread, turn)
                wanted[thread, turn] = []
                for _ in range(STEPS):
                    logits = call(x).clone()
                    wanted[thread, turn].append(logits)
                    x = fill(logits, x)
    torch._dynamo.reset()
    model = build(form)
    plain = models.compiled(model, **METHODS[name])
    wrong: list[tuple[int, int, int, float]] = []

    def work(thread: int) -> None:
        call = models.in_a_loop(plain)  # where layers are alone no graph has the logits that would show it
        for turn in range(TURNS):
            x = prompts(thread, turn)
            for step, want in enumerate(wanted[thread, turn]):
                worst = off(call(x).clone(), want, x == MASK)
                if worst > TOLERANCE:
                    wrong.append((thread, turn, step, worst))
                x = fill(want, x)

    together(work, threads)
    assert not wrong
    assert partial(model) >= threads * TURNS * STEPS // 3  # sparse-dllm has two full steps a block


@pytest.mark.parametrize("name", ["neutral", "dual"])
def test_threads_on_one_prompt_each_with_its_own_word(name: str) -> None:
    """Best-of-n on threads: the ids alone could not tell the loops apart."""
    options = {**EQUAL, **METHODS}[name]
    model = build()
    call = models.compiled(model, **options)

    def loop(seed: int) -> list[torch.Tensor]:
        x, draw, out = start(), torch.Generator().manual_seed(seed), []
        with dllm_compile.loop():
            while (x == MASK).any():
                out.append(call(x).clone())
                x = fill(out[-1] + torch.rand(out[-1].shape, generator=draw, dtype=torch.float64) * 8, x)
        return out

    with torch.no_grad():
        wanted = [loop(seed) for seed in range(3)]
    got: dict[int, list[torch.Tensor]] = {}

    def work(thread: int) -> None:
        got[thread] = loop(thread)

    together(work, 3)
    for thread, want in enumerate(wanted):
        for step, (a, b) in enumerate(zip(got[thread], want, strict=True)):
            rows = torch.zeros(a.shape[:2], dtype=torch.bool)
            rows[:, 6 + step :] = True
            assert off(a, b, rows) < TOLERANCE


def test_words_are_of_their_thread() -> None:
    """One thread's ``exact_calls`` is nothing to another's loop."""
    model = build()
    call = models.compiled(model, **METHODS["dual"])
    x = start(seed=1)
    inside, done = threading.Event(), threading.Event()

    def scores() -> None:
        with torch.no_grad(), dllm_compile.exact_calls():
            inside.set()
            done.wait(60)

    other = threading.Thread(target=scores)
    other.start()
    assert inside.wait(60)
    try:
        with torch.no_grad():
            for _ in range(3):
                x = fill(call(x), x)
        assert partial(model) == 2
    finally:
        done.set()
        other.join(60)


def test_stats_and_reset_while_others_run() -> None:
    model = build()
    call = models.compiled(model, **EQUAL["neutral"])
    stop = threading.Event()

    def work(thread: int) -> None:
        if thread == 2:
            for turn in range(60):
                assert dllm_compile.stats(model)["sequences"] >= 0
                if turn % 10 == 9:
                    dllm_compile.reset()
            stop.set()
            return
        turn = 0
        while not stop.is_set() or turn < 2:
            x = prompts(thread, turn % 5)
            for _ in range(4):
                assert off(call(x), model(x), x == MASK) < TOLERANCE
                x = fill(model(x), x)
            turn += 1

    together(work, 3)
