"""``bench --shape``: what it measures, what it writes, what it refuses; and that clocks wait for the device."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dllm_compile.bench import bench, contest
from dllm_compile.bench import model as bench_model
from dllm_compile.bench import shape as shape_bench
from dllm_compile.bench.contest import Contender, Job, Row, play
from dllm_compile.bench.model import SHAPES, Setting, job_of, random_model

PARAMETERS = {"llada-8b": 8.02e9, "dream-7b": 7.62e9}
SMALL = ["--shape", "tiny", "--layers", "1", "--width", "32", "--mlp", "48", "--block", "8", "--cache-block", "8"]
SMALL += ["--prompt-interval", "8", "--baseline-steps", "4"]
FIGURES = {
    *("vs_eager", "vs_inductor", "over_floor", *shape_bench.FIELDS),
    *("contender", "prompt", "response", "batch", "tokens_per_call"),
}


def uncompiled(setting: Setting) -> list[Contender]:
    """Who takes part, with graphs that are run as they are."""
    found = []
    for each in bench_model.contenders(setting):
        options = None if each.options is None else {**each.options, "lowering": "eager"}
        found.append(replace(each, options=options, plain=False))
    return found


@pytest.fixture
def measure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Runs the command without Inductor; gives what it wrote, and the rows of that."""
    monkeypatch.setattr(shape_bench, "contenders", uncompiled)
    monkeypatch.setitem(shape_bench.COPIED, "cpu", 1 << 20)

    def run(*flags: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        target = tmp_path / "rows.json"
        bench.main([*SMALL, *flags, "--json", str(target)])
        report = json.loads(target.read_text())
        return report, report["rows"]

    return run


# -- what it measures --------------------------------------------------------------------------------------------------


def test_a_tiny_model_is_measured_from_end_to_end(measure: Any, capsys: pytest.CaptureFixture[str]) -> None:
    methods = ["eager", "inductor", "fast-dllm-dual"]
    report, rows = measure("--lengths", "16,16", "8,8", "--per-call", "1", "4", "--methods", *methods)
    names = ["eager", "inductor", "fast-dllm dual", "fast-dllm dual"]
    assert [row["contender"] for row in rows] == names * 2
    assert [(row["prompt"], row["response"], row["batch"]) for row in rows] == [(16, 16, 1)] * 4 + [(8, 8, 1)] * 4
    assert [row["tokens_per_call"] for row in rows[:4]] == [1, 1, 1, 4]
    assert [row["forwards"] for row in rows[:4]] == [4, 4, 16, 4]
    assert all(row.keys() >= FIGURES for row in rows)
    assert all(row["tokens"] == row["forwards"] * row["tokens_per_call"] for row in rows)
    assert [i for i, row in enumerate(rows) if "warm_compile_seconds" in row] == [2]
    assert all(row["vs_eager"] > 0 and row["vs_inductor"] > 0 for row in rows if row["contender"] not in names[:2])
    weights = report["floor"]["weight_bytes"]
    assert all(row["peak_bytes"] > weights for row in rows)
    assert all((row["state_bytes"] > 0) == (row["contender"] not in names[:2]) for row in rows)
    dual = rows[2]
    assert set(dual["milliseconds"]) == set(dual["over_floor"]) == {"full", "block"}
    floor = report["floor"]["milliseconds"]
    assert dual["over_floor"]["block"] == pytest.approx(dual["milliseconds"]["block"] / floor)
    assert "fast-dllm dual" in capsys.readouterr().out


def test_the_report_says_how_it_came_about(measure: Any) -> None:
    report, rows = measure("--lengths", "8,8", "--batches", "2", "--methods", "eager", "fast-dllm-dual", "--steps", "3")
    assert report["command"].startswith("python -m dllm_compile bench --shape tiny --layers 1")
    assert report.keys() >= {"shape", "setting", "grid", "python", "triton", "device", "threads", "parameters"}
    assert (report["torch"], report["dtype"], report["grid"]["device"]) == (torch.__version__, "float32", "cpu")
    assert report["setting"]["layers"] == 1
    assert report["floor"]["copy_bytes_per_second"] > 1e8
    assert [(row["batch"], row["forwards"], row["tokens"]) for row in rows[:2]] == [(2, 4, 8), (2, 3, 6)]
    assert all(row["vs_inductor"] is None and row["vs_eager"] for row in rows)


def test_who_runs_out_of_memory_has_a_row_that_says_so(
    measure: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def short(contender: Contender, *rest: Any, **more: Any) -> tuple[Row, list[torch.Tensor]]:
        if contender.name in ("inductor", "dyllm"):
            raise torch.OutOfMemoryError("no more")
        return play(contender, *rest, **more)

    monkeypatch.setattr(shape_bench, "play", short)
    flags = ("--lengths", "8,8", "--per-call", "1", "--methods", "eager", "inductor", "dyllm", "dllm-cache")
    _, rows = measure(*flags)
    assert [row.get("out_of_memory") for row in rows] == [None, "no more", "no more", None]
    assert [row["vs_inductor"] for row in rows] == [None] * 4
    assert rows[3]["vs_eager"] > 0
    assert capsys.readouterr().out.count("out of memory") == 2


def test_other_errors_are_not_taken_for_it(measure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **more: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(shape_bench, "play", broken)
    with pytest.raises(RuntimeError, match="broken"):
        measure("--lengths", "8,8")


# -- sizes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PARAMETERS)
def test_shapes_are_the_published_sizes(name: str) -> None:
    model = random_model(SHAPES[name], device="meta")
    count = sum(p.numel() for p in model.parameters())
    assert count == pytest.approx(PARAMETERS[name], rel=1e-3)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    table = SHAPES[name].vocabulary * SHAPES[name].width
    assert shape_bench.weight_bytes(model) == 2 * (count - table)
    assert torch.get_default_dtype() == torch.float32


def test_a_table_that_is_the_head_too_is_read_in_every_step() -> None:
    model = random_model(replace(SHAPES["tiny"], layers=1))
    model.lm_head.weight = model.model.embed_tokens.weight
    assert shape_bench.weight_bytes(model) == sum(p.nbytes for p in model.parameters())


# -- clocks and counts -------------------------------------------------------------------------------------------------


def small_job() -> tuple[Any, Job]:
    setting = replace(SHAPES["tiny"], layers=1, width=32, mlp=48, prompt=8, response=8, block=8)
    return random_model(setting), job_of(setting, batch=2)


def test_clocks_wait_for_the_device_before_and_after_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    model, job = small_job()
    events: list[str] = []
    monkeypatch.setattr(contest, "wait", lambda device: events.append("wait"))
    monkeypatch.setattr(model, "forward", lambda x, call=model.forward: (events.append("call"), call(x))[1])
    play(Contender("eager"), model, [job], 2)
    once = ["wait", "call", "wait"]
    assert events == 2 * ["wait", *once, *once, "wait"]


def test_waiting_synchronises_cuda_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    for name in ("cpu", "cuda:1"):
        contest.wait(torch.device(name))
    assert asked == [torch.device("cuda:1")]


def test_memory_is_counted_on_request_with_the_weights() -> None:
    model, job = small_job()
    weights, logits = sum(p.nbytes for p in model.parameters()), 4 * job.ids.numel() * SHAPES["tiny"].vocabulary
    row, _ = play(Contender("eager"), model, [job], 1, memory=True)
    assert weights + logits < row.peak_bytes < weights + 20 * logits
    assert play(Contender("eager"), model, [job], 1)[0].peak_bytes == 0


def test_depth_compares_layers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    compared = []

    def compiled(contender: Contender, model: Any, *rest: Any) -> tuple[Row, list[torch.Tensor]]:
        compared.append(model.config.num_hidden_layers)
        return Row(contender.name, compile_seconds=len(compared)), []

    monkeypatch.setattr(shape_bench, "play", compiled)
    bench.main(["--depth"])
    assert compared == [2, 8, 32, 8, 32]
    assert "8 layers 2.0 s, 32 layers 3.0 s, 1.50x" in capsys.readouterr().out


# -- what it refuses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--shape", "llada"], "invalid choice: 'llada'"),
        (["--shape", "tiny", "--methods", "fast"], "invalid choice: 'fast'"),
        (["--shape", "tiny", "--kind", "Bert"], "invalid choice: 'Bert'"),
        (["--shape", "tiny", "--lengths", "12"], "'12' is no pair such as 256,256"),
        (["--shape", "tiny", "--lengths", "12,0"], "'0' is no whole number of at least 1"),
        (["--shape", "tiny", "--batches", "0"], "'0' is no whole number of at least 1"),
        (["--shape", "tiny", "--lengths", "8,40"], "40 tokens is no multiple of a block of 32"),
        (["--shape", "tiny", "--per-call", "3"], "a block of 32 tokens cannot be freed 3 at a time"),
        (["--shape", "tiny", "--prompt", "8"], "give --lengths"),
        (["--per-call", "2"], "--per-call goes with --shape"),
        (["--saliency", "--device", "cuda"], "--device cuda"),
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        bench.main(flags)
    assert said in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_tiny_model_is_measured_on_a_gpu(measure: Any) -> None:
    report, rows = measure("--device", "cuda", "--lengths", "16,16", "--per-call", "1", "4")
    assert report["dtype"] == "bfloat16"
    assert all("out_of_memory" not in row and row["peak_bytes"] > report["floor"]["weight_bytes"] for row in rows)
