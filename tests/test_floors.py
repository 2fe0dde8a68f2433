"""``explain --shape``: closed forms equal sums by hand, and what is printed and documented is what is computed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_compile import __main__ as command
from dllm_compile.bench import floors
from dllm_compile.bench.floors import GPUS, LAUNCHES, Floor, Gpu
from dllm_compile.bench.model import SHAPES, Setting
from dllm_compile.options import Options
from dllm_compile.runtime import cost
from dllm_compile.runtime.program import Program
from dllm_compile.schedule.method import schedule

from . import models
from .test_explain import COMBINED
from .test_properties import Model, Shape

pytestmark = pytest.mark.shares_graphs
PAGE = (Path(__file__).parent.parent / "docs" / "measuring.md").read_text()

SMALL = Setting(layers=3, width=32, mlp=48, heads=4, kv_heads=2, vocabulary=128, response=16, block=8, cache_block=8)
TOKENS, WIDTH, KEYS, MLP = 40, 32, 16, 48  # keys and values are of 2 heads of 8
READABLE = 5  # in the middle of the last block 4 tokens are masked; the row before them may be read too
HALF = 2  # bytes of a bfloat16


def products(queries: int, keys: int, values: int, mlp: int) -> int:
    """FLOPs of the products of a layer, by the rows that each computes."""
    return 2 * WIDTH * (2 * queries * WIDTH + keys * KEYS + values * KEYS + 3 * mlp * MLP)


def attention(rows: int, keys: int) -> int:
    return 2 * 2 * rows * keys * WIDTH


def head(rows: int) -> int:
    return 2 * rows * WIDTH * 128


WHOLE = products(40, 40, 40, 40) + attention(40, 40)
SALIENT = products(16, 1, 1, 1) + 2 * 16 * 40 * WIDTH + 2 * (40 + 16) * WIDTH
BY_HAND: dict[str, tuple[str, int, int, int, int, int]] = {
    # step, FLOPs, numbers of state that are read or written, numbers that are kept, rows of logits, launches
    "exact": ("exact", 3 * WHOLE + head(5), 0, 0, 5, 3 * 13),
    "dllm-cache": (
        "select",  # 4 of 16 rows; the first layer computes all and keeps nothing
        WHOLE + 2 * (products(4, 4, 16, 4) + attention(4, 40)) + head(5),
        2 * (40 * 2 * KEYS + 16 * KEYS + 40 * 2 * WIDTH),  # of the values of the response, those before are read too
        2 * 41 * (2 * KEYS + 2 * WIDTH),
        5,
        13 + 2 * 20,
    ),
    "fast-dllm-dual": (
        "block",  # 8 rows, and the one before
        3 * (products(9, 9, 9, 9) + attention(9, 40)) + head(5),
        3 * 40 * 2 * KEYS,
        3 * 41 * 2 * KEYS,
        5,
        3 * 13,
    ),
    "sparse-dllm": (
        "sparse",  # of 31 others, 15 are kept
        3 * (products(9, 9, 9, 9) + attention(9, 24)) + head(5),
        3 * 24 * 2 * KEYS,
        3 * (25 * 2 * KEYS + 24 * 8 // HALF),
        5,
        3 * 14,
    ),
    "flashblock": (
        "inside",  # of 4 heads, contexts and log-sum-exps in float32
        3 * (products(9, 9, 9, 9) + attention(9, 9)) + head(5),
        3 * (9 * 2 * KEYS + 9 * (WIDTH + 4) * 4 // HALF),
        3 * (41 * 2 * KEYS + 10 * (WIDTH + 4) * 4 // HALF),
        5,
        3 * 14,
    ),
    "es-dllm": (
        "block",  # from the second layer on a quarter of the rows, or those of two tokens and the one just filled
        products(9, 9, 9, 9) + attention(9, 40) + 2 * (products(3, 3, 3, 3) + attention(3, 40)) + head(3),
        3 * 40 * 2 * KEYS + 2 * 9 * WIDTH,  # and hidden states that enter the second layer, before and now
        3 * 41 * 2 * KEYS + 41 * (WIDTH + 4 // HALF),  # and confidences in float32
        3,
        3 * 13,
    ),
    "dyllm": (
        "salient",  # a row of 16
        3 * SALIENT + head(4),
        3 * (40 * 2 * KEYS + 1 * KEYS + 16 * 2 * WIDTH + 16 * WIDTH),
        3 * 41 * (2 * KEYS + 2 * WIDTH),
        4,
        3 * (21 + 9),
    ),
}


@pytest.fixture(scope="module")
def small() -> dict[tuple[str, str], Floor]:
    """The floors of a model of three layers, by method and step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES, "small", SMALL)
        patch.setitem(LAUNCHES, "small", LAUNCHES["llada-8b"])
        found = list(floors.floors("small", GPUS["h100"], [TOKENS], floors.methods(SMALL)))
    return {(floor.method, floor.step): floor for floor in found}


@pytest.mark.parametrize("method", BY_HAND)
def test_a_step_costs_what_is_summed_by_hand(small: dict[tuple[str, str], Floor], method: str) -> None:
    step, flops, moved, kept, rows, launches = BY_HAND[method]
    floor = small[method, step]
    assert floor.flops == flops
    assert floor.state == HALF * moved
    assert floor.kept == HALF * kept
    assert floor.logits == HALF * rows * 128
    assert floor.launches == launches + 1 + 2
    layer = 2 * WIDTH * WIDTH + 2 * WIDTH * KEYS + 3 * WIDTH * MLP + 2 * WIDTH
    assert floor.read == HALF * (3 * layer + WIDTH + 128 * WIDTH)
    assert floor.weights == floor.read + HALF * 128 * WIDTH  # the table of embeddings


@pytest.mark.parametrize("options", COMBINED, ids=str)
def test_rows_of_the_state_are_counted_for_any_combination(options: dict[str, Any]) -> None:
    """No more than all that a layer keeps twice over: what was there, and what is there now."""
    ids, found = models.start(7, 8), []

    def keep(module: torch.fx.GraphModule, inputs: list[Any]) -> torch.fx.GraphModule:
        found.append((module, inputs))
        return module

    torch.compile(Model(Shape(layers=1, heads=2, groups=1, head_dim=4, seed=0)), backend=keep)(ids)
    ((module, inputs),) = found
    chosen = Options.of({**options, "mask_id": models.MASK})
    with torch.no_grad():
        program = Program(module, inputs, chosen)
    method = schedule(chosen, ids == models.MASK)
    rows = {cost.B: 2, cost.S: 15, cost.P: 7, cost.G: 8, cost.N: 2, cost.A: 4, cost.T: 3, cost.E: 5, cost.F: 4}
    for assignment in method.variants:
        for unit in program.layers:
            moved = cost.state_traffic(unit, program.axes, assignment).subs(rows)
            kept = cost.state_bytes(unit, program.axes, method.variants).subs(rows)
            assert (moved > 0) == bool(assignment.keep)
            assert moved <= 2 * kept


def test_the_longest_term_is_the_floor() -> None:
    gpu = Gpu(memory=100.0, bandwidth=1.0, flops=1.0, launch=1.0)
    floor = Floor("m", "s", 8, weights=30, read=20, state=3, logits=2, flops=7, kept=4, launches=24, gpu=gpu)
    assert floor.terms == {"bandwidth": 25.0, "FLOPs": 7.0, "launches": 24.0}
    assert (floor.seconds, floor.binds, floor.memory) == (25.0, "bandwidth", 34)
    more = floor.at(11)
    assert more.terms == {"bandwidth": 75.0, "FLOPs": 77.0, "launches": 24.0}
    assert (more.seconds, more.binds, more.memory) == (77.0, "FLOPs", 74)


@pytest.mark.parametrize(("memory", "flops", "batch"), [(64.0, 0, 64), (64.0, 10, 16), (9.0, 10, 8), (0.5, 10, None)])
def test_the_best_batch_is_the_smallest_that_costs_a_sequence_no_more(
    memory: float, flops: int, batch: int | None
) -> None:
    """A step takes 100 for the weights and 1 a sequence, or 10 a sequence where arithmetic counts."""
    gpu = Gpu(memory=memory, bandwidth=1.0, flops=1.0, launch=1.0)
    floor = Floor("m", "s", 8, weights=0, read=100, state=1, logits=0, flops=flops, kept=1, launches=0, gpu=gpu)
    best = floor.best
    assert (best and best.batch) == batch


def printed(capsys: pytest.CaptureFixture[str], *flags: str) -> list[str]:
    """Lines that the command prints."""
    command.main(["explain", *flags])
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("shape", LAUNCHES)
def test_every_combination_is_printed_and_no_weights_are_made(
    shape: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, devices = floors.random_model, set()

    def noted(*args: Any, **more: Any) -> Any:
        model = real(*args, **more)
        devices.update(parameter.device.type for parameter in model.parameters())
        return model

    monkeypatch.setattr(floors, "random_model", noted)
    floors._graph.cache_clear()
    lines = [line.split() for line in printed(capsys, "--shape", shape, "--device", "h200")]
    assert devices == {"meta"}
    rows = [(line[0], line[1], line[2], line[3]) for line in lines if line and re.fullmatch(r"[\d,]+", line[0])]
    steps = [("exact", "exact"), ("dllm-cache", "select"), ("dllm-cache", "response"), ("fast-dllm-prefix", "block")]
    steps += [("fast-dllm-dual", "block"), ("sparse-dllm", "sparse"), ("flashblock", "inside"), ("dyllm", "salient")]
    steps += [("dkv-cache", "block")]
    wanted = {(n, b, *step) for n in ("1,024", "4,096", "16,384") for b in ("1", "8") for step in steps}
    assert wanted <= set(rows)


def test_the_page_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--shape llada-8b --device h100 --length 1024 --batch 1"
    assert f"explain {flags}" in PAGE
    assert "\n".join(printed(capsys, *flags.split())) in PAGE


def test_the_page_has_the_launches() -> None:
    assert len({*map(frozenset, LAUNCHES.values())}) == 1
    for part, step in LAUNCHES["llada-8b"]:
        counts = " | ".join(str(counts[part, step]) for counts in LAUNCHES.values())
        assert f"| {part} | {step} | {counts} |" in PAGE
