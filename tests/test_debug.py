"""What the compiler tells of its work when it is asked, and that it does nothing of the kind else."""

from __future__ import annotations

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dllm_compile import debug
from dllm_compile.core.errors import refusing
from dllm_compile.runtime import program

from . import models
from .test_graphs import PARTIAL, model, steps

PASSES = [
    "tensor_parallel",
    "exported, flex_attention",
    "fix sizes",
    "normalize",
    "einsum, spelled_attention",
    "seeds",
    "follow axes",
    "unmask",
    "regions",
]
UNIT = r"(layer|part)-[0-9a-f]{8}"


def run() -> None:
    """Steps of a model of three layers that are alike."""
    steps(models.compiled(model(), **PARTIAL))


def check_lines(lines: list[str]) -> None:
    """Each pass once, in order and with its time; then the variants of each unit."""
    said = [re.fullmatch(r"(.+): \d+\.\d+ m?s", line) for line in lines]
    assert None not in said
    names = [found[1] for found in said if found is not None]
    assert names[: len(PASSES)] == PASSES
    compiled = [re.fullmatch(rf"compile {UNIT} for (\w+)", name) for name in names[len(PASSES) :]]
    assert [found[2] for found in compiled if found is not None and found[1] == "layer"] == [
        *("exact", "full", "select", "response")
    ]
    assert None not in compiled


def test_a_folder_gets_graphs_in_order_and_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    monkeypatch.setenv("DLLM_DEBUG", str(folder))
    run()
    check_lines((folder / "log.txt").read_text().splitlines())
    files = sorted(folder.glob("*.py"))
    names = [file.name for file in files]
    assert [int(name[:4]) for name in names] == list(range(len(names)))
    wanted = ["traced", "normalized", *[UNIT] * 3, f"{UNIT}-exact", f"{UNIT}-exact", f"{UNIT}-full"]
    assert all(re.fullmatch(rf"\d+-{each}\.py", name) for each, name in zip(wanted, names, strict=False))
    text = {name[5:-3]: file.read_text() for name, file in zip(names, files, strict=True)}
    (layer,) = (name for name in text if re.fullmatch(r"layer-\w+", name))
    assert "test_graphs.py" in text["traced"]  # lines of the model
    calls = {
        name: len(re.findall(r"\n +\w+[^#\n]*= torch\S*scaled_dot_product_attention\(", each))
        for name, each in text.items()
    }
    assert (calls["traced"], calls["normalized"], calls[layer]) == (3, 3, 1)
    assert '"f64[2, 17, 32]"' in text[layer]  # sizes beside the values
    assert "merge_rows" not in text[f"{layer}-full"]
    assert "merge_rows" in text[f"{layer}-response"]
    for name, each in text.items():
        compile(each, name, "exec")


def test_a_second_run_writes_behind_the_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLLM_DEBUG", str(tmp_path))
    (tmp_path / "0000-traced.py").write_text("the first")
    with torch.no_grad():
        models.compiled(model())(models.start(4, 4))
    assert (tmp_path / "0000-traced.py").read_text() == "the first"
    assert (tmp_path / "0001-traced.py").exists()


def test_a_folder_asks_for_errors_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DLLM_DEBUG", str(tmp_path))
    with pytest.raises(ZeroDivisionError), refusing("analyzed"):
        raise ZeroDivisionError


def test_a_logger_gets_times_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    with caplog.at_level(logging.DEBUG, logger="dllm_compile"):
        run()
    check_lines([record.getMessage() for record in caplog.records if record.name == "dllm_compile"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("value", ["", "0", "1"])
def test_nothing_is_said_or_written_unasked(
    value: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[object] = []
    monkeypatch.setattr(program, "part", lambda *_: written.append("part"))
    monkeypatch.setattr(debug, "trace_structured", lambda *_, **__: written.append("trace"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DLLM_DEBUG", value)
    with caplog.at_level(logging.INFO, logger="dllm_compile"):
        run()
    assert [record for record in caplog.records if record.name.startswith("dllm_compile")] == written == []
    assert list(tmp_path.iterdir()) == []


def test_what_torch_asks_for_in_the_environment(tmp_path: Path) -> None:
    """``TORCH_LOGS`` is read while torch is imported, so the package must be importable then."""
    code = """
import torch
model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Linear(4, 9)).eval()
call = torch.compile(model, backend="dllm", options={"lowering": "eager", "mask_id": 8})
with torch.no_grad():
    call(torch.tensor([[1, 2, 8, 8]]))
"""
    asked = {"TORCH_LOGS": "+dllm_compile", "TORCH_TRACE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ, **asked}
    )
    assert done.returncode == 0, done.stderr
    assert [name for name in PASSES if f"] [0/0] {name}: " not in done.stderr] == []
    assert re.search(r"compile part-\w+ for exact: ", done.stderr)
    (trace,) = tmp_path.iterdir()
    artifacts = re.findall(r'"artifact": \{"name": "dllm_(\w+)', trace.read_text())
    assert artifacts[:2] == ["traced", "normalized"]
    assert "part" in artifacts


class Terminal(io.StringIO):
    """Standard error as a terminal."""

    def isatty(self) -> bool:
        return True


def on_a_terminal(monkeypatch: pytest.MonkeyPatch, replaced: bool = False) -> str:
    """What a terminal is sent while code is compiled."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    if not replaced:
        monkeypatch.setattr(sys, "__stderr__", terminal)
    run()
    return terminal.getvalue()


def test_a_terminal_shows_what_is_compiled_and_forgets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    sent = on_a_terminal(monkeypatch)
    lines = sent.split("\r\x1b[K")
    assert (lines[0], lines[-1]) == ("", "")
    said = [re.fullmatch(rf"dllm: compiling {UNIT} for (\w+) \((\d+) before in \d+ s\) \.\.\.", x) for x in lines[1::2]]
    assert None not in said
    assert [found[2] for found in said if found is not None and found[1] == "layer"] == [
        *("exact", "full", "select", "response")
    ]
    numbers = [int(found[3]) for found in said if found is not None]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert {*lines[2::2]} == {""}  # each is wiped off


@pytest.mark.parametrize("off", ["by the environment", "something took its place"])
def test_a_terminal_is_left_alone(off: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if off == "by the environment":
        monkeypatch.setenv("DLLM_PROGRESS", "0")
    assert on_a_terminal(monkeypatch, replaced=off != "by the environment") == ""


def test_a_profiler_sees_steps_layers_and_variants() -> None:
    call = models.compiled(model(), **PARTIAL)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        steps(call)
    events = [event for event in profile.events() if event.name.startswith("dllm: ")]
    names = [event.name.removeprefix("dllm: ") for event in sorted(events, key=lambda e: e.time_range.start)]
    ran = [name for name in names if name.startswith("step ")]
    assert ran[:3] == ["step 0, full", "step 1, select", "step 2, select"]
    second = names[names.index(ran[1]) : names.index(ran[2])]
    assert [name for name in second if name.startswith("layer ")] == ["layer 0", "layer 1", "layer 2"]
    variants = [name for name in second if re.fullmatch(rf"{UNIT} for \w+", name)]
    assert sum("for select" in name for name in variants) == 2  # the first layer runs in full
    assert "head" in second


def test_without_a_profiler_no_label_is_written() -> None:
    class Unwritable:
        def __format__(self, _: str) -> str:
            raise AssertionError("the label was written")

    with debug.labelled("step {}", Unwritable()):
        pass
