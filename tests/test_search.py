"""The search over settings: on evaluators whose best setting is known, and small ones on models."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dllm_compile import tiny
from dllm_compile.bench import antibody, bench, search_command
from dllm_compile.bench.contest import Contender
from dllm_compile.bench.search import GOES_ON, REFUSED, SLOW, WRONG, Evaluated, Row, rungs, search
from dllm_compile.options import Options

from .test_antibody import small_batches, small_bert

EAGER = "eager", {"speed": 1.0, "right": 1.0}
BATCHES = [range(i, i + 8) for i in range(0, 128, 8)]


def analytic(setting: Mapping[str, Any], problems: Sequence[int]) -> Evaluated:
    """A setting answers an even share of any problems, and from one problem on, if it says so, none."""
    share, end = setting["right"], setting.get("until", 128)
    right = [int((i + 1) * share) > int(i * share) and i < end for i in problems]
    seconds = random.Random(f"{setting} {problems}").uniform(1, 1 + setting.get("noise", 0.0))
    seconds *= len(problems) / setting["speed"]
    return Evaluated(right, len(problems), 2 * seconds, seconds, 3.0)


def found(candidates: Mapping[str, Any], evaluate: Any = analytic, **how: Any) -> tuple[list[Row], list[list[Row]]]:
    """The ranking, and how settings stood behind each rung."""
    told: list[list[Row]] = []
    return search(candidates, evaluate, EAGER, BATCHES, tell=told.append, **how), told


def test_the_known_best_is_found() -> None:
    settings = {f"right {i}": {"speed": 2 + i / 10, "right": 1.0} for i in range(30)}
    settings |= {f"wrong {i}": {"speed": 6 + i, "right": 0.5} for i in range(30)}
    ranking, told = found(settings)
    best = ranking[0]
    assert best.name == "right 29"
    assert (best.tokens_per_second, best.ratio, best.ratio_error) == pytest.approx((4.9 / 2, 4.9, 0.0))
    assert (best.difference, best.error, best.problems, best.compile_seconds) == (0, 0, 128, 48)
    assert [row.name for row in ranking] == ["right 29", "right 28", "right 27", "right 26", "eager"]
    assert Counter(row.verdict for row in told[0]) == {WRONG: 30, SLOW: 15, GOES_ON: 16}  # those and the baseline
    assert [len(rows) - 1 for rows in told] == [60, 15, 8, 4, 4]
    assert [max(row.problems for row in rows) for rows in told] == [8, 16, 32, 64, 128]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_returned_is_within_the_bound_and_nothing_within_it_is_faster(seed: int) -> None:
    """Where speeds are without noise, and no setting that is right in the end is dropped for its answers before."""
    draw = random.Random(seed)
    settings = {
        f"{i}": {
            "speed": draw.uniform(1.1, 9),
            "right": draw.choice((1.0, 1.0, 0.99, 0.97, 0.6)),
            "until": draw.choice((128, 128, 100, 60)),
        }
        for i in range(draw.randrange(1, 40))
    }
    ranking, _ = found(settings, bound=0.02, finalists=draw.randrange(1, 5), seed=seed, first=draw.choice((1, 3, 16)))

    def share(setting: Mapping[str, Any]) -> float:
        return sum(sum(analytic(setting, batch).right) for batch in BATCHES) / 128

    within = {name: setting for name, setting in settings.items() if share(setting) >= 0.98}
    assert all(row.name in within or row.name == "eager" for row in ranking)
    assert all(row.right == pytest.approx(share(row.setting)) for row in ranking)
    assert ranking[0].name == max(within, key=lambda name: within[name]["speed"], default="eager")


def test_noise_in_time_changes_no_bound_and_the_seed_decides_all() -> None:
    draw = random.Random(3)
    settings = {
        f"{i}": {"speed": draw.uniform(2, 3), "right": draw.choice((1.0, 0.95)), "noise": 1.0} for i in range(24)
    }
    ranking, told = found(settings)
    assert all(row.difference >= -0.01 for row in ranking)
    assert ranking[0].ratio_error is not None
    assert 0.0 < ranking[0].ratio_error < 1.0
    assert found(settings) == (ranking, told)


def test_settings_that_faster_ones_put_out_come_back_where_those_were_wrong() -> None:
    settings = {"best": {"speed": 3.0, "right": 1.0}, "right": {"speed": 2.0, "right": 1.0}}
    settings |= {f"late {i}": {"speed": 5.0 + i, "right": 1.0, "until": 70} for i in range(10)}
    ranking, told = found(settings, finalists=2)
    assert [row.name for row in ranking] == ["best", "eager"]
    assert {row.name for row in told[0] if row.verdict == SLOW} >= {"best", "right"}
    assert "right" not in {row.name for row in told[-1]}  # slower than what was found
    assert {row.verdict for row in told[-1]} == {GOES_ON, WRONG}
    ranking, _ = found({name: each for name, each in settings.items() if name.startswith("late")})
    assert [row.name for row in ranking] == ["eager"]


def test_all_settings_run_on_a_batch_before_the_next_one_and_no_batch_twice() -> None:
    calls: list[tuple[float, int]] = []

    def evaluate(setting: Mapping[str, Any], problems: Sequence[int]) -> Evaluated:
        calls.append((setting["speed"], problems[0]))
        return analytic(setting, problems)

    found({f"{i}": {"speed": 2.0 + i, "right": 1.0} for i in range(8)}, evaluate, finalists=1)
    assert max(Counter(calls).values()) == 1
    assert [begin for _, begin in calls] == sorted(begin for _, begin in calls)
    assert Counter(speed for speed, _ in calls) == {
        **{1.0: 16, 9.0: 16, 8.0: 4, 7.0: 2, 6.0: 2},
        **dict.fromkeys((2.0, 3.0, 4.0, 5.0), 1),
    }


def test_rungs_double_and_the_last_takes_all() -> None:
    assert rungs(16, 1) == [1, 2, 4, 8, 16]
    assert rungs(11, 3) == [3, 6, 11]
    assert rungs(2, 2) == [2]


def test_what_a_model_refuses_is_out_with_its_sentence() -> None:
    def evaluate(setting: Mapping[str, Any], problems: Sequence[int]) -> Evaluated:
        if setting["speed"] == 7.0:
            raise ValueError("this model has no seven")
        return analytic(setting, problems)

    ranking, told = found({"seven": {"speed": 7.0, "right": 1.0}, "two": {"speed": 2.0, "right": 1.0}}, evaluate)
    (seven,) = [row for rows in told for row in rows if row.name == "seven"]
    assert (seven.verdict, seven.why, seven.problems) == (REFUSED, "this model has no seven", 0)
    assert ranking[0].name == "two"
    with pytest.raises(ValueError, match="seven: this model has no seven"):
        search({}, evaluate, ("seven", {"speed": 7.0, "right": 1.0}), BATCHES)


# -- the settings ------------------------------------------------------------------------------------------------------


def test_candidates_are_drawn_by_the_seed_and_are_all_allowed() -> None:
    def meaning(setting: Mapping[str, Any]) -> Any:
        return search_command.resolved(setting, 64, 8)

    drawn = search_command.drawn(60, 5, meaning)
    assert len(drawn) == 60
    assert drawn == search_command.drawn(60, 5, meaning) != search_command.drawn(60, 6, meaning)
    meant = [meaning(setting) for setting in drawn.values()]
    assert len({(how, Options.of(options) if options else None) for how, options in meant}) == 60
    assert {bool(options) for _, options in meant} == {True, False}
    assert not any("drafts" in setting for setting in drawn.values())
    alone = search_command.drawn(400, 0, lambda setting: search_command.resolved(setting, 64))
    parts = {name for parts in search_command.AXES.values() for part in parts for name in part}
    assert parts <= {name for setting in alone.values() for name in setting}
    with pytest.raises(ValueError, match="keep_outside"):
        search_command.resolved({"cache": "dual", "keep_outside": True, "keep_ratio": 0.5, "threshold": 0.9}, 64)


def test_what_only_generate_does_is_not_drawn_for_stretches() -> None:
    drawn = search_command.drawn(200, 0, search_command.of_stretches)
    assert not any({"drafts", "sliding"} & {*setting} or setting.get("preset") == "dsb" for setting in drawn.values())
    assert {"cache", "method", "keep_ratio", "threshold_fall"} <= {name for each in drawn.values() for name in each}


def test_presets_are_compared_as_they_are_and_with_a_threshold() -> None:
    def meaning(setting: Mapping[str, Any]) -> Any:
        return search_command.resolved(setting, 64, 8)

    chosen = search_command.compared(["fast-dllm/dual", "fast-dllm++", "fastest"], meaning)
    parallel = "fast-dllm/dual, threshold 0.9"  # the others say which tokens are written
    assert [*chosen] == ["fast-dllm/dual", "fast-dllm++", "fastest", parallel]
    chosen = search_command.compared(search_command.published(), meaning)
    assert {"sparse-dllm", "dyllm, threshold 0.9"} <= {*chosen}
    with pytest.raises(ValueError, match="fastset"):
        search_command.compared(["fastset"], meaning)


def test_what_a_search_ranked_is_compared_on_another_model(tmp_path: Path) -> None:
    """With the preset that is the fastest so far; what the other model has no loop for is left out."""
    settings = [{"preset": "es-dllm", "row_shares": [0.5, 0.25]}, search_command.BASELINE[1], {"drafts": 4}]
    path = tmp_path / "ranking.json"
    path.write_text(json.dumps({"ranking": [{"setting": each} for each in settings]}))
    found = search_command.ranked(str(path), search_command.of_stretches)
    assert [*found.values()] == [{"preset": "fastest"}, {"preset": "es-dllm", "row_shares": (0.5, 0.25)}]


# -- the models --------------------------------------------------------------------------------------------------------


DUAL: dict[str, Any] = {"cache": "dual", "block_length": 32, "lowering": "eager"}
CANDIDATES = {
    "dual, threshold": {**DUAL, "threshold": 0.9},
    "all at once": {**DUAL, "threshold": 0.0},
    "two rules": {"cache": "dual", "frechet_delta": 0.25, "threshold": 0.9},
}


def check(ranking: list[Row], told: list[list[dict[str, Any]]], bound: float) -> None:
    """What holds of a search over ``CANDIDATES`` on two batches of four, whatever the model answers."""
    assert [max(row["problems"] for row in rows) for rows in told[:2]] == [4, 8]
    assert {row["name"] for row in told[0]} == {"eager", *CANDIDATES}
    assert {row["name"]: row["verdict"] for row in told[0]}["two rules"] == REFUSED
    assert all(row["problems"] == 4 for row in told[0] if row["verdict"] != REFUSED)
    (eager,) = [row for row in ranking if row.name == "eager"]
    assert (eager.difference, eager.ratio) == (0, 1)
    assert all(row.problems == 8 and row.right >= eager.right - bound - 1e-9 for row in ranking)
    assert [row.ratio for row in ranking] == sorted((row.ratio for row in ranking), reverse=True)
    out = {row["name"] for rows in told for row in rows if row["verdict"] != GOES_ON}
    assert out | {row.name for row in ranking} == {"eager", *CANDIDATES}
    assert not out & {row.name for row in ranking}


def test_a_search_on_the_embedded_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is supposed of what it answers."""
    evaluate, problems, path = search_command.embedded(), tiny.problems(8, 2), tmp_path / "search.json"

    def write(report: dict[str, Any]) -> None:
        path.write_text(json.dumps(report, allow_nan=False))

    halves, few_calls = [problems[:4], problems[4:]], ("eager", {"block_length": 32, "threshold": 0.9})
    ranking = search_command.run(evaluate, CANDIDATES, halves, few_calls, write, bound=0.1, finalists=2)
    text, report = capsys.readouterr().out, json.loads(path.read_text())
    check(ranking, report["rungs"], 0.1)
    assert [row["name"] for row in report["ranking"]] == [row.name for row in ranking]
    assert "rung 1: 4 problems, 4 settings" in text
    assert "two rules: a mechanism decides which tokens are written, and so does threshold" in text


def test_a_search_on_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(antibody, "load", small_bert)
    told: list[list[Row]] = []
    evaluate, batches = search_command.antibodies(), small_batches(8, 4)
    settings = {name: {**setting, "block_length": 8} for name, setting in CANDIDATES.items()}
    base = search_command.BASELINE
    ranking = search(settings, evaluate, base, batches, bound=1.0, finalists=2, tell=told.append)
    check(ranking, [[vars(row) for row in rows] for rows in told], 1.0)
    assert {row.name for row in ranking} == {"eager", "dual, threshold", "all at once"}


def test_stretches_are_filled_as_the_rows_of_bench_antiberty_fill_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right answers of a setting are those of the contender of the same options."""
    monkeypatch.setattr(antibody, "load", small_bert)
    evaluate, model, (batch,) = search_command.antibodies(), small_bert(), small_batches(4, 4)
    options = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "shift": False, "lowering": "eager"}
    hows: tuple[dict[str, Any], ...] = {"threshold": 0.5, "threshold_fall": 0.5}, {"frechet_delta": 0.1}
    of_loops: tuple[dict[str, Any], ...] = {"threshold": 0.5, "fall": 0.5}, {"delta": 0.1}
    for how, of_loop in zip(hows, of_loops, strict=True):
        contender = Contender("", options, loop=partial(antibody.fill, block=8, **of_loop))
        theirs, _ = antibody.measure(contender, model, [batch])
        mine = evaluate({"cache": "dual", "block_length": 8, "lowering": "eager", **how}, batch)
        assert mine.right == theirs.recovered
        assert mine.tokens == theirs.row.tokens


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_takes_its_own_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr(search_command, "embedded", lambda: analytic)
    monkeypatch.setattr(search_command, "antibodies", lambda: analytic)
    monkeypatch.setattr(search_command, "require", lambda *_: None)
    monkeypatch.setattr(antibody, "batches", small_batches)
    monkeypatch.setattr(search_command, "run", lambda *how, write, **named: given.append((*how, named)))
    few = ["--problems", "20", "--first", "8", "--batch", "4", "--candidates", "3", "--seed", "1"]
    bench.main(["--search", *few])
    bench.main(["--antiberty", "--search", *few, "--bound", "0.02"])
    for (_, candidates, batches, named), bound in zip(given, (0.01, 0.02), strict=True):
        assert (len(candidates), len(batches)) == (3, 5)
        assert named == {"bound": bound, "first": 2, "finalists": 4, "seed": 1}
    assert isinstance(given[1][2][0], antibody.Batch)
    ends = ["--first", "16", "--problems", "8"]
    no_settings = ["--ranked", "none.json"], ["--presets", "none"]
    for wrong in (*no_settings, ["--first", "3"], ["--bound", "2"], ["--problems", "12"], ends):
        with pytest.raises(SystemExit) as left:
            bench.main(["--search", *wrong])
        assert left.value.code == 2
