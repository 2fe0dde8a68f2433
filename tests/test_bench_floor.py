"""``bench --floor``: what a step computes by products and attention is found, and the same is timed alone."""

from __future__ import annotations

from collections import Counter
from unittest import mock

import torch

from dllm_compile.bench import floor
from dllm_compile.bench.model import Setting, contenders, job_of, random_model

SMALL = Setting(layers=2, width=32, mlp=48, heads=4, vocabulary=64, prompt=24, response=32, block=8, cache_block=8)


def test_products_inside_of_attention_are_not_counted_twice() -> None:
    linear, rows = torch.nn.Linear(4, 6), torch.randn(1, 2, 5, 4)
    call = lambda: linear(torch.nn.functional.scaled_dot_product_attention(rows, rows, rows))  # noqa: E731
    work = floor.work_of(call)
    assert Counter(name for name, _ in work) == {"aten::scaled_dot_product_attention": 1, "aten::addmm": 1}
    assert dict(work)["aten::addmm"] == ((10, 4), (4, 6))


def test_a_step_of_a_block_is_timed_beside_its_own_products() -> None:
    dual = next(each for each in contenders(SMALL) if each.name == "fast-dllm dual")
    model, job = random_model(SMALL), job_of(SMALL)
    asked = []
    with mock.patch.object(floor, "alone", lambda work: asked.append(work) or (lambda: None)):
        (kind, took, _), *_ = floor.partial_steps(dual, model, dual.within(job))
    assert kind == "block"
    assert took > 0
    rows = {shapes[0][0] for name, shapes in asked[-1] if name == "aten::mm"}
    assert rows <= {8, 9, 2, 1}  # a block and the row before it; those that are still masked reach the head
    counts = Counter(name for name, _ in asked[-1])
    assert counts == {"aten::mm": 2 * 7 + 1, "aten::scaled_dot_product_attention": 2}
    floor.alone(asked[-1])()
