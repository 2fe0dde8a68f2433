"""``bench --floor``: what a step computes by products and attention is found, and the same is timed alone."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dllm_compile.bench import bench, floor
from dllm_compile.bench.floor import Spent
from dllm_compile.bench.model import Setting, contenders, job_of, random_model

SMALL = Setting(layers=2, width=32, mlp=48, heads=4, vocabulary=64, prompt=24, response=32, block=8, cache_block=8)


def test_products_inside_of_attention_are_not_counted_twice() -> None:
    linear, rows = torch.nn.Linear(4, 6), torch.randn(1, 2, 5, 4)
    call = lambda: linear(torch.nn.functional.scaled_dot_product_attention(rows, rows, rows))  # noqa: E731
    work = floor.work_of(call)
    assert Counter(name for name, _ in work) == {"aten::scaled_dot_product_attention": 1, "aten::addmm": 1}
    assert dict(work)["aten::addmm"] == ((10, 4), (4, 6))


@pytest.mark.parametrize("made", [floor.of_generate, floor.of_own_loop])
def test_a_step_of_a_block_is_timed_beside_its_own_products(made: Any) -> None:
    dual = next(each for each in contenders(SMALL) if each.name == "fast-dllm dual")
    model, job = random_model(SMALL), job_of(SMALL)
    asked = []
    with mock.patch.object(floor, "alone", lambda work: asked.append(work) or (lambda: None)):
        (kind, took, _), *_ = floor.partial_steps(dual, model, dual.within(job), made)
    assert kind == "block"
    assert took.cpu > 0
    rows = {shapes[0][0] for name, shapes in asked[-1] if name == "aten::mm"}
    assert rows <= {8, 9, 2, 1}  # a block and the row before it; those that are still masked reach the head
    counts = Counter(name for name, _ in asked[-1])
    assert counts == {"aten::mm": 2 * 7 + 1, "aten::scaled_dot_product_attention": 2}
    floor.alone(asked[-1])()


def test_works_share_weights_and_products_of_a_work_do_not() -> None:
    """A head with fewer rows at each step is another work each time."""
    floor._given.cache_clear()
    made = []
    for rows in (3, 5):
        product = "aten::mm", ((rows, 4), (4, 6))
        floor.alone((product, product))()
        made.append(floor._given.cache_info().misses)
    assert made == [4, 6]  # two weights, and what each of two products multiplies with


def test_a_line_has_medians_by_both_clocks() -> None:
    times = [(Spent(30.0, 4.0), Spent(10.0, 2.0)), (Spent(20.0, 9.0), Spent(10.0, 3.0)), (Spent(9.0, 5.0), Spent(9, 2))]
    assert floor.line(2048, "dual", "block", times).split() == (
        ["2,048", "dual", "block", "5.0", "2.0", "2.50", "20.0", "10.0", "2.00", "(3", "steps)"]
    )


def test_the_command_measures_what_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of a folder, some rows, some prompts, some steps."""
    random_model(SMALL).config.save_pretrained(tmp_path)
    monkeypatch.setattr(floor, "SETTING", SMALL)
    asked: list[tuple[str, int, int]] = []

    def steps(contender, model, job, made):  # type: ignore[no-untyped-def]
        assert made is floor.of_generate
        asked.append((contender.name, job.prompt, model.config.hidden_size))
        return (("block", Spent(2.0, 2.0), Spent(1.0, 1.0)) for _ in range(9))

    monkeypatch.setattr(floor, "partial_steps", steps)
    few = ["--methods", "dyllm", "fast-dllm dual", "--prompts", "8", "24", "--steps", "3"]
    bench.main(["--floor", *few, "--model", str(tmp_path)])
    assert asked == [(name, prompt, 32) for prompt in (8, 24) for name in ("fast-dllm dual", "dyllm")]
    *_, last = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r" +24  dyllm +block +2.0 +1.0 +2.00 +2.0 +1.0 +2.00  \(3 steps\)", last)
    bench.main(["--floor", "--prompts", "8"])
    assert [name for name, *_ in asked[4:]] == floor.names()
    for wrong in (["--methods", "dul"], ["--prompts", "0"], ["--steps"]):
        with pytest.raises(SystemExit) as left:
            bench.main(["--floor", *wrong])
        assert left.value.code == 2
