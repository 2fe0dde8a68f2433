"""dKV-Cache-Greedy: rows that a sampler tells beforehand, in an order that it draws when a block begins."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import generate
from dllm_compile.declared import filling, to_be_filled
from dllm_compile.passes.decoded_rows import around
from dllm_compile.sampler.in_order import InOrder
from dllm_compile.sampler.progress import Writable

from . import dkv_model, golden_models, loops
from .sampling_loops import MASK, ids, run, toy
from .under_way import under_way

pytestmark = pytest.mark.shares_graphs

MODEL = "llada_b"


def rows(text: str) -> torch.Tensor:
    return torch.tensor([[sign == "x" for sign in line] for line in text.split()])


@pytest.mark.parametrize("window", [0, 1, 3, 20])
def test_windows_are_those_of_the_plain_model(window: int) -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(20):
        free = torch.rand(2, 16, generator=draw) < 0.6
        next_ones = free & (torch.rand(2, 16, generator=draw) < 0.3)
        got = next_ones | around(next_ones, free, window)
        for sequence in range(2):
            at = next_ones[sequence].nonzero()[:, 0].tolist()
            token = torch.where(free[sequence], 9, 0)
            assert torch.equal(got[sequence], dkv_model.llada_greedy([token], 9, [], at, window))


def test_what_is_told_is_told_inside_alone_and_for_its_shape() -> None:
    outer, inner = rows("x."), rows(".x")
    with filling(outer):
        with contextlib.suppress(KeyError), filling(inner):
            assert torch.equal(to_be_filled(inner.shape), inner)  # type: ignore[arg-type]
            raise KeyError
        assert torch.equal(to_be_filled(outer.shape), outer)  # type: ignore[arg-type]
        assert to_be_filled(torch.Size([2, 2])) is None
    assert to_be_filled(outer.shape) is None


def test_each_sequence_draws_when_its_block_begins() -> None:
    draws = iter([torch.tensor([[0.1, 0.2, 0.3, 0.4]] * 2), torch.tensor([[0.9, 0.8, 0.9, 0.8]] * 2)])
    seen: list[torch.Tensor] = []

    def step(x: torch.Tensor, turn: Writable) -> torch.Tensor:
        seen.append(turn.candidates)
        assert torch.equal(to_be_filled(x.shape), turn.candidates)  # type: ignore[arg-type]
        return x

    in_order, x, one = InOrder(step, lambda shape: next(draws)), torch.zeros(2, 4), torch.ones(2, dtype=torch.int64)
    for candidates in ("xx.. xxx.", "x... xx..", "..xx x..."):  # the first sequence goes on to its second block
        in_order(x, Writable(rows(candidates), one, 1))
    assert [turn.tolist() for turn in seen] == [rows(t).tolist() for t in (".x.. ..x.", "x... .x..", "..x. x...")]


@pytest.mark.parametrize("more", [{}, {"block_length": 4, "steps": 4}])
def test_every_mask_is_filled_as_it_would_be_alone(more: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With a refresh at every step the cache is none, so what each step fills is what the model then says."""
    model, prompt = toy(), ids(2, 3)
    options: dict[str, Any] = {"cache": "greedy", "refresh_interval": 1, "lowering": "eager", "remasking": "random"}
    history = run(Whole(model), prompt, gen_length=8, **options, **more).history
    assert history is not None
    for before, after in itertools.pairwise(history):
        filled = before != after
        assert bool((before[filled] == MASK).all())
        assert torch.equal(after[filled], model(before).argmax(-1)[filled])
    assert not bool((history[-1] == MASK).any())


class Whole(torch.nn.Module):
    """A function as a module."""

    def __init__(self, function: loops.Logits) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


@pytest.mark.parametrize("more", [{}, {"remasking": "entropy"}, {"remasking": "random", "threshold": 0.9}], ids=str)
def test_confidence_comes_too_late(more: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="give remasking='random' without a threshold or factor, or cache='decoded'"):
        generate(toy(), ids(1, 3), gen_length=4, mask_id=MASK, method="dkv-cache", cache="greedy", **more)


def test_a_loop_that_tells_nothing_gets_all_masked_rows() -> None:
    trace = golden_models.trace("llada_dkv__llada_b__decode_p37_g64_b16_s32_c8")
    seen: dict[str, list[torch.Tensor]] = {"greedy": [], "decoded": []}
    for cache, computed in seen.items():
        options: dict[str, Any] = {"cache": cache, "refresh_interval": 4, "shift": False, "lowering": "eager"}
        compiled = torch.compile(golden_models.model(MODEL), backend="dllm", options=options)
        dllm_compile.reset()
        with torch.no_grad():
            for number, tokens in enumerate(trace.tensors["tokens"][:7].long()):
                compiled(input_ids=tokens)
                computed.append(golden_models.computed(under_way(number).step, tokens.shape[1]))
    assert all(map(torch.equal, seen["greedy"], seen["decoded"]))
    assert not bool(seen["greedy"][2].all())
