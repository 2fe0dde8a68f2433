"""The embedded model, the commands and the examples, as a user runs them."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor_config

from dllm_compile import __main__ as command
from dllm_compile import tiny
from dllm_compile.bench import bench, compatibility, demo, frontier, heat, speed
from dllm_compile.bench import kernels as kernel_bench
from dllm_compile.bench import lengths as length_bench
from dllm_compile.bench import model as bench_model
from dllm_compile.bench import shape as shape_bench
from dllm_compile.bench.command import Parser
from dllm_compile.bench.contest import Contender, Row, finish, play
from dllm_compile.bench.table import cells

ROOT = Path(__file__).parent.parent


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("task", tiny.TASKS)
def test_answers_follow_from_prompts(task: str) -> None:
    problem = tiny.make_problem(random.Random(5), task)
    prompt, answer = problem.prompt.split(), problem.answer.split()
    assert len(prompt) == tiny.PROMPT_LENGTH
    assert 48 <= len(answer) <= tiny.RESPONSE_LENGTH
    filler = [tiny.FILLER] * (tiny.RESPONSE_LENGTH - len(answer))
    assert tiny.is_exact(problem, " ".join(answer + filler))
    assert not tiny.is_exact(problem, " ".join([*answer[:-1], answer[0], *filler]))
    assert {*prompt, *answer} <= {*tiny.VOCABULARY}
    if task == "lookup":
        assert {*answer} <= {*prompt[: tiny.PROMPT_LENGTH - tiny.RESPONSE_LENGTH]}


def test_the_embedded_model_is_small_and_solves_held_out_problems() -> None:
    model, tokenizer = tiny.load()
    assert sum(p.numel() for p in model.parameters()) < 4_000_000
    assert sum(path.stat().st_size for path in tiny.WEIGHTS.iterdir()) < 12_000_000
    problems = tiny.problems(4, seed=21)
    jobs = demo.jobs_of(problems, tokenizer, model.config.mask_token_id, 4, 32)
    row, results = play(Contender("eager"), model, jobs)
    demo.score(row, results, problems, tokenizer)
    assert row.accuracy is not None
    assert row.accuracy >= 3 / 4
    assert row.forwards == tiny.RESPONSE_LENGTH


def only(
    entrants: Callable[..., list[Contender]], *names: str, eager: tuple[str, ...] = ()
) -> Callable[..., list[Contender]]:
    """Those of the entrants, as each is compiled anew; some of them as their graphs are, without Inductor."""

    def quick(each: Contender) -> Contender:
        return replace(each, options={**(each.options or {}), "lowering": "eager"}) if each.name in eager else each

    return lambda *given: [quick(each) for each in entrants(*given) if each.name in names]


def test_demo_writes_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["eager", "inductor", "dllm-cache", "fast-dllm prefix", "fast-dllm dual", "sparse-dllm", "dyllm"]
    parallel = ["threshold, eager", *(f"{name} + threshold" for name in ("dual", "sparse", "dyllm", "es-dllm"))]
    assert [each.name for each in demo.contenders(32)] == [*fixed, *parallel, "fastest"]
    names = "eager", "fast-dllm dual", "dual + threshold"
    monkeypatch.setattr(demo, "contenders", only(demo.contenders, *names, eager=names[1:]))  # examples use Inductor
    target, run, trusted = tmp_path / "demo.json", demo.run, list[bool]()

    def noted(*args: Any, **more: Any) -> Any:
        trusted.append(inductor_config.cpp.vec_isa_ok)  # what compiles first is not of this backend
        return run(*args, **more)

    monkeypatch.setattr(demo, "run", noted)
    demo.main(["--problems", "1", "--batch", "1", "--json", str(target)])
    assert trusted == [True]
    rows = {row["name"]: row for row in json.loads(target.read_text())["rows"]}
    assert tuple(rows) == names
    assert all(rows[name]["forwards"] == tiny.RESPONSE_LENGTH for name in names[:-1])
    assert rows["dual + threshold"]["fewer"] > 2
    assert rows["fast-dllm dual"]["flops"] < 0.6
    assert set(rows["fast-dllm dual"]["steps"]) == {"full", "block"}
    assert "x inductor" in capsys.readouterr().out


def test_demo_times_plain_inductor_for_a_few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the second of two batches; the first counts for accuracy alone. Its tokens are what it has written."""
    monkeypatch.setattr(Contender, "compiled", lambda self, model, mask_id: model)  # what is compiled is not the point
    eager, plain = demo.run(2, 1, 32, entrants=[Contender("eager"), Contender("inductor", plain=True)], few=4)
    assert (eager.forwards, plain.forwards) == (tiny.RESPONSE_LENGTH, 4)
    assert (len(eager.right), len(plain.right), plain.accuracy, plain.same_tokens) == (2, 0, None, 1.0)
    assert eager.tokens == tiny.problems(2, demo.HELD_OUT_SEED)[1].tokens
    assert plain.fewer == pytest.approx(1.0)
    assert cells(plain)[1:3] == ("-", "-")


def test_points_beyond_eager_are_paired_by_problem() -> None:
    answers = [True, True, True, False], [True, False, True, True], [True, False, False, False]
    rows = [Row(str(i), tokens=4, seconds=1.0, forwards=4, right=right) for i, right in enumerate(answers)]
    found = [(row.gain, round(row.gain_error, 1)) for row in finish(rows)]
    assert found == [(0, 0), (0, 40.8), (-50, 28.9)]


def test_bench_runs_on_a_small_shape(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names = "inductor", "dllm-cache", "fast-dllm dual"
    monkeypatch.setattr(bench, "contenders", only(bench.contenders, *names, eager=names[1:]))  # above: test_shape_bench
    shape = ["--layers", "2", "--width", "64", "--mlp", "96", "--heads", "4", "--vocabulary", "128"]
    lengths = ["--prompt", "24", "--response", "16", "--baseline-steps", "4", "--prompt-interval", "8"]
    bench.main([*shape, *lengths, "--cache-block", "8"])
    text = capsys.readouterr().out
    assert "dual: a block step takes" in text
    assert "realised speed-up over FLOP reduction" in text


def test_bench_times_each_operation_alone(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name, size in {"VOCABULARY": 1000, "HEADS": 2, "KEYS": 64, "RESPONSE": 16, "SALIENT": 3, "BLOCK": 4}.items():
        monkeypatch.setattr(kernel_bench, name, size)
    monkeypatch.setitem(shape_bench.COPIED, "cpu", 1 << 16)
    bench.main(["--kernels"])
    _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["confidence", "sparse attention", "delta attention"]
    assert all(re.search(r": operation [0-9.]+ ms, .* [0-9.]+x, [0-9.]+ of copy bandwidth$", line) for line in lines)
    for what, _, calls in kernel_bench.operations(torch.device("cpu")):
        exact = {"dense"} if what.startswith("delta") else set()  # which it is only near to
        ours = calls["operation"]()
        for way in calls.keys() - exact:
            torch.testing.assert_close(ours, calls[way](), check_dtype=False)


def test_a_new_length_makes_no_code(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Plain Inductor, whose line promises nothing, is measured at one size."""

    def fewer(setting: Any, options: Any, *sizes: Any) -> length_bench.Found:
        return measure(setting, options, *(sizes if options else [sizes[0][:1]] * 2))

    measure = length_bench.measure
    monkeypatch.setattr(length_bench, "measure", fewer)
    setting = bench_model.Setting(layers=1, width=64, mlp=96, heads=4, vocabulary=128)
    sizes = ((9, 8, 2), (11, 8, 2), (11, 8, 3), (14, 12, 3), (7, 16, 5)), ((21, 8, 2), (6, 8, 4))
    length_bench.main(setting, *sizes)
    _, plain, ours = capsys.readouterr().out.splitlines()
    assert plain.startswith("inductor")
    assert "then 0 frames of Dynamo and 0 graphs of Inductor" in ours


def test_what_many_sequences_hold_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    setting = bench_model.Setting(layers=1, width=64, mlp=96, heads=4, vocabulary=128)
    length_bench.held(4, setting, parts=2)
    *_, half, whole = capsys.readouterr().out.splitlines()
    assert (half.split()[0], whole.split()[0]) == ("2", "4")


def test_the_plot_is_drawn_from_rows(tmp_path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    series = frontier.entrants()
    names = [each.name for points in series.values() for _, each in points]
    rows = [Row(name, accuracy=0.9 - 0.01 * (i % 3), vs_eager=1.0 + i % 5) for i, name in enumerate(names)]
    frontier.draw(rows, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    lines = {line.get_label(): line for line in pyplot.gca().lines}
    assert {name: len(lines[name].get_xydata()) for name in series} == {n: len(points) for n, points in series.items()}
    assert len({lines[name].get_marker() for name in series}) == len(series)
    assert lines["Pareto front"].get_xydata().tolist() == [[5.0, 90.0]]
    axes = pyplot.gca()
    axes.figure.canvas.draw()  # the file has another resolution
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the lines to their points
    assert all(axes.bbox.count_contains([box.min, box.max]) == 2 for box in boxes)
    assert len(boxes) == sum(bool(label) for points in series.values() for label, _ in points)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_speeds_are_drawn_by_length(tmp_path: Path) -> None:
    from matplotlib import pyplot
    from matplotlib.text import Text

    names = [*shape_bench.entrants(speed.SMALL)]
    rows = [
        speed.Speed(name, prompt, [50.0 + i % 2, 40.0, 60.0 + i])  # ends that lie on one another
        for i, name in enumerate(names)
        for prompt in (64, 1024, 256)
    ]
    speed.draw(rows, "speeds", str(tmp_path / "speeds.png"))
    assert (tmp_path / "speeds.png").read_bytes().startswith(b"\x89PNG")
    axes = pyplot.gca()
    lines = [each.lines for each in axes.containers]
    assert [each.get_label() for each in axes.containers] == names
    assert len({line.get_marker() for line, _, _ in lines}) == len(names)
    for i, (line, _, (bars,)) in enumerate(lines):
        assert line.get_xydata().tolist() == [[prompt, 50.0 + i % 2] for prompt in (64, 256, 1024)]
        assert [bar[:, 1].tolist() for bar in bars.get_segments()] == [[40.0, 60.0 + i]] * 3
    assert [text.get_text() for text in axes.texts] == sorted(names, key=lambda n: (names.index(n) % 2, n))
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # without the line to the end
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_places_are_moved_apart_as_little_as_needed() -> None:
    assert speed.spread([1.0, 5.0, 9.0], 2.0) == [1.0, 5.0, 9.0]
    assert speed.spread([3.0, 3.0, 3.0], 1.0) == [2.0, 3.0, 4.0]
    assert speed.spread([], 1.0) == []


def test_speeds_are_measured_at_each_length() -> None:
    setting = bench_model.Setting(
        layers=2, width=32, mlp=48, heads=4, vocabulary=64, response=8, block=4, baseline_steps=3
    )
    dual = {"method": "fast-dllm", "cache": "dual", "block_length": 4, "shift": False, "lowering": "eager"}
    found = [*speed.measured(setting, (5, 9), 3, [Contender("eager"), Contender("dual", dual)])]
    assert [(row.name, row.prompt) for row in found] == [("eager", 5), ("eager", 9), ("dual", 5), ("dual", 9)]
    assert all(len(row.tokens_per_second) == 3 and min(row.tokens_per_second) > 0 for row in found)


def test_rows_of_layers_are_drawn(tmp_path: Path) -> None:
    from matplotlib import pyplot

    setting = bench_model.Setting(layers=3, width=32, mlp=48, heads=4, vocabulary=64, prompt=8, response=8)
    job = bench_model.job_of(setting)
    options = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5, "shift": False}
    found = heat.ran(bench_model.random_model(setting), job.ids, job.mask_id, 8, options)
    heat.draw(found, "rows", str(tmp_path / "rows.png"))
    shown = pyplot.gca().images[0].get_array().tolist()
    assert shown == [[16] * 8, *[[16, 4, 4, 4, 8, 4, 4, 4]] * 2]  # the first layer, then those that refresh and select


def test_what_no_other_setting_beats() -> None:
    points = [(1.0, 90.0), (2.0, 90.0), (3.0, 80.0), (2.5, 70.0), (4.0, 10.0), (0.5, 95.0)]
    assert frontier.pareto(points) == [(0.5, 95.0), (2.0, 90.0), (3.0, 80.0), (4.0, 10.0)]
    assert 0 < frontier.standard_error(1.0, 32) < frontier.standard_error(0.5, 32)


def test_commands_say_what_is_wrong(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        command.main(["demos"])
    assert left.value.code not in (0, None)
    assert "demo, bench, explain" in capsys.readouterr().err


def test_help_lists_the_commands() -> None:
    text = run("-m", "dllm_compile", "--help")
    abouts = {"demo": demo.ABOUT, "bench": bench.ABOUT, "explain": command.ABOUT, "lm_eval": command.ABOUT_LM_EVAL}
    abouts["models"] = compatibility.ABOUT
    for name, about in abouts.items():
        assert f"  {name:<8} {about}\n" in text


@pytest.mark.parametrize("name", ["demo", "bench", "explain", "models"])
def test_each_flag_says_what_it_is(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Parser] = []

    def parse(self: Parser, *_: Any) -> None:
        asked.append(self)
        raise SystemExit(0)

    monkeypatch.setattr(Parser, "parse_known_args", parse)
    with pytest.raises(SystemExit):
        command.main([name])
    assert [flag.option_strings for flag in asked[0]._actions if not flag.help] == []
    assert len(asked[0]._actions) > 4
    assert asked[0].format_help()


EXAMPLES = {
    "explain": "FLOPs full",
    "llada": "answer:",
    "dream": "answer:",
    "sliding_window": "answer:",
    "elastic": "answer:",
}


def test_examples_are_short() -> None:
    for example in EXAMPLES:
        lines = len((ROOT / "examples" / f"{example}.py").read_text().splitlines())
        assert lines <= {"elastic": 150}.get(example, 60), example


def test_the_explain_command_and_the_examples_run() -> None:
    """One after another in a process that is none of pytest's, as each start of one takes longer than most of them.

    Those of ``model.compile`` with Inductor, those of ``generate`` without: ``test_elastic`` runs one of them with it.
    """
    command = "sys.argv[1:] = ['explain']; runpy.run_module('dllm_compile', run_name='__main__')"
    uncompiled = "dllm_compile.generate = functools.partial(dllm_compile.generate, lowering='eager')"
    examples = "[(print('---'), runpy.run_path(f'examples/{e}.py', run_name='__main__')) for e in names]"
    imports = "import functools, runpy, sys, torch, dllm_compile; torch.set_num_threads(1)"
    quick = "from tests import quick_inductor; quick_inductor.begin()"
    code = f"{imports}; {quick}; {uncompiled}; names = {[*EXAMPLES]}; {command}; del sys.argv[1:]; {examples}"
    explained, *texts = run("-c", code).split("---\n")
    assert "layers: 6 of 1 kind" in explained
    for (example, word), text in zip(EXAMPLES.items(), texts, strict=True):
        assert word in text, example


def test_loop_fills_every_mask_and_keeps_the_prompt() -> None:
    model, tokenizer = tiny.load()
    job = demo.jobs_of(tiny.problems(1, seed=2), tokenizer, model.config.mask_token_id, 1, tiny.RESPONSE_LENGTH)[0]
    _, (ids,) = play(Contender("eager"), model, [job])
    assert not (ids == job.mask_id).any()
    assert torch.equal(ids[:, : tiny.PROMPT_LENGTH], job.ids[:, : tiny.PROMPT_LENGTH])
