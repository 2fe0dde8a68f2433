"""Fast-dLLM++'s rule of unmasking against the formula written out, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Confidences
from dllm_compile.passes.frechet import jointly_likely
from dllm_compile.sampler.rules import by_rule, chosen

from .callers import build, start
from .models import MASK

pytestmark = pytest.mark.usefixtures("no_gradients_no_warnings")


def taken(sure: torch.Tensor, candidates: torch.Tensor, delta: float) -> torch.Tensor:
    """What ``generate`` writes for confidences ``[B, S]``."""
    told = dllm_compile.Options(frechet_delta=delta)
    return by_rule(lambda s, c, m, _: jointly_likely(Confidences(s, c, m, told)), sure, candidates, candidates)


def spelled_out(sure: list[float], delta: float) -> int:
    """How many of the confidences of one sequence: the largest ``n`` whose score is above ``delta``, or one."""
    c = sorted(sure, reverse=True)
    fit = [n for n in range(1, len(c) + 1) if sum(c[:n]) - (n - 1) - (1 - c[n - 1]) > delta]
    return max(fit, default=min(1, len(c)))


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(0, 1000), min_size=8, max_size=8), min_size=1, max_size=3),
    hidden=st.integers(0, 2**24 - 1),
    delta=st.integers(0, 99),
)
def test_it_takes_as_many_as_the_formula_says(rows: list[list[int]], hidden: int, delta: int) -> None:
    sure = torch.tensor(rows, dtype=torch.float64) / 1000 + torch.arange(8) * 1e-7  # no two alike
    candidates = torch.tensor([[hidden >> (8 * b + i) & 1 == 0 for i in range(8)] for b in range(len(rows))])
    got, bound = taken(sure, candidates, delta / 100 + 5e-5), delta / 100 + 5e-5  # no score is as large as the bound
    for b in range(len(rows)):
        mine = sure[b][candidates[b]].tolist()
        assert int(got[b].sum()) == spelled_out(mine, bound)
        assert not mine or sure[b][got[b]].min() >= sorted(mine)[-int(got[b].sum())]
    assert not (got & ~candidates).any()


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 9), level=st.integers(1, 999), bound=st.integers(1, 99))
def test_equal_confidences_give_the_rule_of_factors(count: int, level: int, bound: int) -> None:
    """Of equal confidences ``c`` it takes ``n`` while ``(n + 1)(1 - c) < 1 - delta``: Fast-dLLM's factor 1 - delta."""
    sure = torch.full((1, count), level / 1000 + 1e-7, dtype=torch.float64)
    candidates = torch.ones(1, count, dtype=torch.bool)
    # which of equal ones does not matter
    assert taken(sure, candidates, bound / 100).sum() == chosen(sure, candidates, factor=1 - bound / 100).sum()


@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"method": "sparse-dllm"}], ids=str)
def test_generate_writes_by_it_beside_any_cache(options: dict[str, Any]) -> None:
    model, prompt = build(), start(2)[:, :4]
    common = {"gen_length": 8, "mask_id": MASK, "shift": False, "return_dict": True, **options}
    common |= {"lowering": "eager"} if options else {}
    one = dllm_compile.generate(model, prompt, frechet_delta=0.999, **common)
    plain = dllm_compile.generate(model, prompt, steps=8, **common)
    some = dllm_compile.generate(model, prompt, frechet_delta=0.0, **{**common, "lowering": "eager"})
    assert one.nfe == plain.nfe == 8
    assert torch.equal(one.sequences, plain.sequences)
    assert some.nfe <= 8
    assert not (some.sequences == MASK).any()


@pytest.mark.shares_graphs
@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize("rule", [{}, {"threshold": 0.8}, {"factor": 1.0}, {"frechet_delta": 0.5}], ids=str)
def test_the_rule_of_a_preset_is_that_of_the_caller_if_he_names_one(rule: dict[str, Any]) -> None:
    model, prompt = build(), start(prompt=8)[:, :8]
    given: dict[str, Any] = {"gen_length": 64, "mask_id": MASK, "lowering": "eager", "shift": False}
    by_hand = {"cache": "decoded", "refresh_interval": 16, "block_length": 64, **(rule or {"frechet_delta": 0.25})}
    a, b = (dllm_compile.generate(model, prompt, **given, **how) for how in (by_hand, {"preset": "fastest", **rule}))
    assert torch.equal(a, b)
