"""The standing search finds what is wrong, cuts it down, and finds nothing where nothing is."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from . import fuzz
from .fuzz_cases import FEATURES, Case, draw
from .fuzz_run import Run, attempt
from .fuzz_shrink import shrink
from .models import MASK

PLAIN: Case = {"model": {"name": "plain"}, "options": {"method": "exact", "mask_id": "MASK"}, "kind": "neutral"}
LOOP = [op for n in range(4) for op in (["call", 0, "", ""], ["fill", 0, n, 1, "best", 0])]


def answering(monkeypatch: pytest.MonkeyPatch, backend: Callable[[Any], Callable[..., Any]]) -> None:
    """Put another function of the model in the place of the compiled one."""
    monkeypatch.setattr(Run, "_compiled", lambda run, function: backend(function))


def stale(model: Any) -> Callable[..., Any]:
    """Gives the logits of the first call with ids of a shape at every later one."""
    seen: dict[Any, Any] = {}

    def call(x: torch.Tensor, **inputs: Any) -> Any:
        if x.shape not in seen:
            seen[x.shape] = model(x, **inputs)
        return seen[x.shape].clone()

    return call


def test_a_case_is_a_function_of_its_seed() -> None:
    cases = [draw(3, index, inductor) for index in range(30) for inductor in (False, True)]
    assert cases == [draw(3, index, inductor) for index in range(30) for inductor in (False, True)]
    assert cases == json.loads(json.dumps(cases))
    assert len({json.dumps(case) for case in cases}) == len(cases)
    assert {case["kind"] for case in cases} == {"neutral", "lossy", "streams"}


@pytest.mark.parametrize("feature", FEATURES)
def test_what_is_left_out_is_in_no_case(feature: str) -> None:
    def ops(without: tuple[str, ...]) -> str:
        return json.dumps([draw(5, index, False, without)["ops"] for index in range(40)])

    assert ops(()) != ops((feature,))


def test_the_model_itself_is_right_about_every_case(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, lambda model: model)
    calls = 0
    for index in range(12):
        wrong, made = attempt(draw(1, index, False, ("grad",)))
        assert wrong is None, f"case {index}: {wrong}"
        calls += made
    assert calls > 200


def test_a_stale_answer_is_found_and_cut_down(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, stale)
    model = {"name": "plain", "layers": 3, "bias": True, "attention": "spelled"}
    case = {**PLAIN, "model": model, "dtype": "float32", "ops": [["start", 0, 5, 3, 6, 8, "left", "plain"], *LOOP]}
    wrong, _ = attempt(case)
    assert wrong is not None
    assert wrong.what == "wrong readable rows"
    small, again = shrink(case, wrong, 60.0)
    assert again.what == wrong.what
    assert small["model"] == {"name": "plain"}
    assert [op[0] for op in small["ops"]] == ["start", "call", "fill", "call"]
    assert small["ops"][0][3:7] == [1, 1, 2, "none"]
    assert attempt(json.loads(json.dumps(small)))[0] is not None


@pytest.mark.parametrize("hold", ["write", "data", "numpy", "hold", "storage", "view"])
def test_memory_that_is_handed_out_twice_is_found(monkeypatch: pytest.MonkeyPatch, hold: str) -> None:
    def same_memory(model: Any) -> Callable[..., Any]:
        memory: list[torch.Tensor] = []

        def call(x: torch.Tensor, **inputs: Any) -> torch.Tensor:
            out = model(x, **inputs)
            memory.append(out)
            read = x.eq(MASK)
            read[:, :-1] |= read[:, 1:].clone()
            memory[0][read] = out[read]
            return memory[0]

        return call

    answering(monkeypatch, same_memory)
    ops = [["start", 0, 5, 1, 6, 8, "none", "plain"], ["call", 0, hold, ""], *LOOP[1:]]
    wrong, _ = attempt({**PLAIN, "ops": ops})
    assert wrong is not None
    kept = hold in ("hold", "storage", "view")
    assert wrong.what == (f"held {hold} was written into" if kept else "what a caller wrote came back")


def test_a_crash_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashing(model: Any) -> Callable[..., Any]:
        def call(x: torch.Tensor, **inputs: Any) -> Any:
            if x.shape[0] > 1:
                raise IndexError("out of range")
            return model(x, **inputs)

        return call

    answering(monkeypatch, crashing)
    threads = [["threads", [["start", 0, 5, 1, 2, 4], ["call", 0]], [["start", 1, 5, 2, 2, 4], ["call", 1]]]]
    wrong, _ = attempt({**PLAIN, "ops": threads})
    assert wrong is not None
    assert wrong.what == "crash IndexError"
    small, _ = shrink({**PLAIN, "ops": threads}, wrong, 60.0)
    assert small["ops"] == [["start", 1, 1, 2, 1, 2], ["call", 1]]


def test_streams_that_share_rows_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    answering(monkeypatch, stale)
    first = [["start", 0, 5, 1, 6, 4, "none", "plain"], *LOOP]
    second = [[op[0], 1, *op[2:]] for op in [["start", 0, 6, 1, 6, 4, "none", "plain"], *LOOP]]
    both = [op for pair in zip(first, second, strict=True) for op in pair]
    wrong, _ = attempt({**PLAIN, "kind": "streams", "ops": both})
    assert wrong is not None  # the second begins with rows of the first
    assert wrong.what == "wrong readable rows"


def test_the_command_ends_with_status_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    answering(monkeypatch, stale)
    assert fuzz.main(["--seconds", "5", "--seed", "2", "--failures", "1", "--shrink", "5", "--without", "grad"]) == 1
    said = capsys.readouterr().out
    case = said.partition("--case '")[2].partition("'")[0]
    assert fuzz.main(["--case", case]) == 1
    answering(monkeypatch, lambda model: model)
    assert fuzz.main(["--case", case]) == 0
    assert fuzz.main(["--seconds", "1", "--seed", "2", "--without", "grad,dropout"]) == 0
    assert "0 failures" in capsys.readouterr().out


EXACT = {"method": "exact", "mask_id": "MASK"}
LOSSY = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5, "mask_id": "MASK"}
START = ["start", 0, 1, 1, 3, 6]
CALL = ["call", 0, "", ""]


def filled(seed: int) -> list[Any]:
    return ["fill", 0, seed, 1, "best", 0]


def case(ops: list[Any], options: dict[str, Any] = EXACT, kind: str = "neutral", **model: Any) -> Case:
    return {"model": {"name": "plain", **model}, "options": options, "kind": kind, "ops": ops}


ONCE: dict[str, Case] = {
    **{
        f"weights written: {how}": case([START, CALL, ["weights", how, 3], CALL])
        for how in ("data", "data=", "vector", "buffer", "numpy", "copy", "inplace", "replace")
    },
    "weights written in mid-sequence": case(
        [START, CALL, filled(0), CALL, ["weights", "data", 3], filled(1), CALL], LOSSY, "lossy", layers=2
    ),
    "two sets of plain weights": case([START, ["functional", 0, 1], ["functional", 0, 2]], LOSSY, "lossy", layers=2),
    "another condition": case(
        [START, CALL, filled(0), CALL, ["cond", 0, 5], filled(1), CALL], LOSSY, "lossy", layers=2, cond="vector"
    ),
    "gradients": case([START, ["grad", 0, 1]], {**EXACT, "lowering": "inductor"}),
    "dropout": case([START, ["dropout", 0, 1]], dropout=0.2),
    "a second output": case([START, CALL, filled(0), CALL], second=True),
    "memory that is held": case([START, ["call", 0, "storage", ""], filled(0), CALL, filled(1), CALL]),
    "memory that was written": case([START, ["call", 0, "data", ""], filled(0), CALL, filled(1), CALL]),
    "attention by keywords": case([START, CALL], attention="keywords"),
}
"""What the search, or an attack by hand, found wrong once."""


@pytest.mark.parametrize("name", ONCE)
def test_what_was_wrong_once_is_right(name: str) -> None:
    wrong, calls = attempt(ONCE[name])
    assert wrong is None, wrong
    assert calls
