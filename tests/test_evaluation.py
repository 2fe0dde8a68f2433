"""lm-evaluation-harness on the embedded model: both of its commands, and the numbers of the class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dllm_compile import tiny

harness = pytest.importorskip("lm_eval", reason="needs the extra [eval]")

from dllm_compile.evaluation import DiffusionLM  # noqa: E402

ROOT = Path(__file__).parent.parent
TASKS = ROOT / "tests" / "lm_eval_tasks"
PROBLEMS = tiny.problems(2, seed=77)


def requests(*args: Any) -> list[Any]:
    return [SimpleNamespace(args=each) for each in args]


def model(**more: Any) -> DiffusionLM:
    return DiffusionLM("tiny", **{"mc_num": 4, "batch_size": 4, **more})


def test_both_kinds_of_task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    from datasets import config
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", tmp_path)
    result = harness.simple_evaluate(
        "dllm",
        {"pretrained": "tiny", "preset": "fastest", "lowering": "eager", "mc_num": 4, "check_greedy": False},
        tasks=["tiny_generate", "tiny_choice"],
        task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
        batch_size=4,
        bootstrap_iters=0,
    )
    assert result["results"]["tiny_generate"]["exact_match,none"] == 1
    assert result["results"]["tiny_choice"]["acc,none"] == 1


def test_the_command(tmp_path: Path) -> None:
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    words = "-m dllm_compile lm_eval --model dllm --model_args pretrained=tiny,preset=fastest,lowering=eager,mc_num=2"
    words += f" --tasks tiny_generate,tiny_choice --include_path {TASKS} --limit 1 --batch_size 2"
    done = subprocess.run(
        [sys.executable, *words.split()],
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [line for line in done.stdout.splitlines() if "exact_match" in line or "|acc" in line]
    assert len(rows) == 2
    assert all("|1|" in row.replace(" ", "").replace("1.0", "1") for row in rows), rows


def test_stop_strings_and_prompts_of_several_lengths() -> None:
    long, short = PROBLEMS[0], " ".join(PROBLEMS[1].prompt.split()[-40:])
    stop = long.answer.split()[5]
    given = {"until": [stop, ""], "max_gen_toks": tiny.RESPONSE_LENGTH}
    together = model(lowering="eager", method="exact").generate_until(requests((short, given), (long.prompt, given)))
    alone = model(lowering="eager", method="exact", batch_size=1)
    assert together == alone.generate_until(requests((short, given), (long.prompt, given)))
    assert together[1] == long.answer[: long.answer.index(stop)]


def test_a_loop_of_ones_own() -> None:
    seen = []

    def loop(model: Any, ids: torch.Tensor, *, gen_length: int, letter: int, **_: Any) -> torch.Tensor:
        seen.append(gen_length)
        return torch.nn.functional.pad(ids, (0, gen_length), value=letter)

    lm = model(loop=loop, letter=5)
    letter = lm.tokenizer.decode([5])
    assert lm.generate_until(requests((PROBLEMS[0].prompt, {"max_gen_toks": 3}))) == [" ".join([letter] * 3)]
    assert seen == [3]


def test_sampling_repeats_by_its_seed() -> None:
    asked = requests((PROBLEMS[0].prompt[-66:], {"max_gen_toks": 8, "do_sample": True, "temperature": 3.0}))
    texts = [model(seed=seed).generate_until(asked) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_likelihood_of_right_and_wrong() -> None:
    answer = PROBLEMS[0].answer.split()
    answer += [tiny.FILLER] * (tiny.RESPONSE_LENGTH - len(answer))
    right, wrong = " ".join(answer), " ".join(reversed(answer))
    (good, written), (bad, other) = model().loglikelihood(
        requests((PROBLEMS[0].prompt, f" {right}"), (PROBLEMS[0].prompt, f" {wrong}"))
    )
    assert good > -1 > bad
    assert (written, other) == (True, False)
    rolling = model().loglikelihood_rolling(requests((right,)))[0]
    assert rolling < good


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"mc_num": 0}, "mc_num is 0"),
        ({"dtype": "float3"}, "dtype is 'float3'"),
        ({"presett": "fastest"}, "did you mean 'preset'"),
    ],
)
def test_bad_arguments(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        model(**given)


def test_what_does_not_fit() -> None:
    length = tiny.PROMPT_LENGTH + tiny.RESPONSE_LENGTH
    with pytest.warns(UserWarning, match="cut to its last"):
        model().loglikelihood(requests((length * "_ ", "ba bi")))
    with pytest.raises(ValueError, match="no window"):
        model().loglikelihood_rolling(requests((length * "ba ",)))
