"""A mechanism from outside that decides which tokens a step of ``generate`` writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import Confidences, Mechanism, Option
from dllm_compile.interface.mechanism import is_number
from dllm_compile.mechanisms import register, tables, unregister

from .callers import build, start
from .models import MASK

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]


def surest_together(told: Confidences) -> torch.Tensor:
    """As many of the surest as are jointly likely: the sum of their confidences less ``n - 1`` stays above ``joint``.

    After the bound of Fréchet for ``P(A and B)``, with the slack of the last one counted for all (arXiv 2606.02955).
    """
    ordered, order = told.sure.double().sort(-1, descending=True)
    rank = torch.arange(ordered.shape[1])
    score = ordered.cumsum(-1) - rank - (1 - ordered)
    return torch.zeros_like(told.candidates).scatter(1, order, score > told.options.joint)


JOINT = Option(
    "joint", None, lambda v: is_number(v) and 0 <= v < 1, "a probability, such as 0.25", "bound of the profile"
)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    register(Mechanism("joint", "a test", options=(JOINT,), switches=("joint",), unmask=surest_together))
    yield
    for name in tables().registered:
        unregister(name)


@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize("options", [{}, {"cache": "dual"}, {"method": "dllm-cache"}], ids=str)
def test_generate_writes_what_the_rule_says(options: dict[str, Any]) -> None:
    """Through Inductor a rule is seen to do so in ``test_frechet``."""
    model, prompt = build(), start(2)[:, :4]
    common = {"gen_length": 8, "mask_id": MASK, "shift": False, "return_dict": True, **options}
    lowering = {"lowering": "eager"} if options else {}  # an option alone would ask for the default method
    one = dllm_compile.generate(model, prompt, joint=0.99, **common, lowering="eager")
    all_at_once = dllm_compile.generate(model, prompt, joint=0.0, **common, lowering="eager")
    plain = dllm_compile.generate(model, prompt, steps=8, **common, **lowering)
    assert one.nfe == plain.nfe == 8
    assert torch.equal(one.sequences, plain.sequences)
    assert all_at_once.nfe <= 8
    assert not (all_at_once.sequences == MASK).any()


def test_a_second_generation_traces_nothing() -> None:
    model, prompt = build(), start(1)[:, :4]
    common = {"gen_length": 8, "mask_id": MASK, "shift": False, "cache": "dual", "joint": 0.3, "lowering": "eager"}
    first = dllm_compile.generate(model, prompt, **common)
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(dllm_compile.generate(model, prompt, **common), first)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before


def test_a_drawn_step_follows_the_rule_too() -> None:
    model, prompt = build(), start(1)[:, :4]
    common = {"gen_length": 8, "mask_id": MASK, "shift": True, "temperature": 0.5, "lowering": "eager", "cache": "dual"}
    made = dllm_compile.generate(model, prompt, joint=0.99, return_dict=True, **common)
    assert made.nfe == 8


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        (lambda told: told.sure, r"torch.float32 \[2, 5\]"),
        (lambda told: told.candidates[0], r"torch.bool \[5\]"),
        (lambda told: None, "a NoneType"),
    ],
)
def test_what_a_rule_returns_is_checked_before_anything_is_traced(rule: Any, said: str) -> None:
    flag = Option("wrong", None, is_number, "a number", "a rule that errs")
    register(Mechanism("wrong", "a test", options=(flag,), switches=("wrong",), unmask=rule))
    with pytest.raises(ValueError, match=f"the mechanism 'wrong' says tokens to write of {said}"):
        dllm_compile.generate(build(), start(1)[:, :4], gen_length=4, mask_id=MASK, wrong=0.3)


@pytest.mark.parametrize("tried", [5, 8], ids=["as it is tried", "in a drawn step"])
def test_what_a_rule_raises_names_it(tried: int) -> None:
    def fails(told: Confidences) -> torch.Tensor:
        if told.sure.shape[1] != tried:
            return told.candidates
        raise KeyError("window")

    flag = Option("wrong", None, is_number, "a number", "a rule that errs")
    register(Mechanism("wrong", "a test", options=(flag,), switches=("wrong",), unmask=fails))
    said = "the mechanism 'wrong' says tokens to write by a function that raised KeyError: 'window'"
    with pytest.raises(RuntimeError, match=said):
        dllm_compile.generate(
            build(), start(1)[:, :4], gen_length=4, mask_id=MASK, wrong=0.3, top_k=3, lowering="eager"
        )


# -- which candidates there are ---------------------------------------------------------------------------------------


def ahead(told: Confidences) -> torch.Tensor:
    """The first masked tokens, as the blocks that slide of DSB have them (arXiv 2602.05992)."""
    return told.masked & (told.masked.cumsum(1) <= told.options.ahead)


def restrict(name: str, candidates: Any = ahead) -> None:
    option = Option(name, None, is_number, "a number", "masked tokens that may be written")
    register(Mechanism(name, "a test", options=(option,), switches=(name,), candidates=candidates))


@pytest.mark.usefixtures("generate_shares_graphs")
@pytest.mark.parametrize("how", [{"threshold": 2.0}, {"factor": 0.0}, {"joint": 0.99}], ids=str)
@pytest.mark.parametrize("more", [{}, {"cache": "dual", "refresh_interval": 1}, {"top_k": 3}], ids=str)
def test_the_surest_is_one_of_the_candidates_that_are_left(how: dict[str, Any], more: dict[str, Any]) -> None:
    """Where a step writes the surest alone, it is the first mask, or one of the first two of the masked tokens."""
    restrict("ahead")
    common = {"gen_length": 8, "mask_id": MASK, "shift": False, "return_dict": True, "output_history": True, **how}
    for window in 1, 2:
        made = dllm_compile.generate(build(), start(2)[:, :4], ahead=window, lowering="eager", **common, **more)
        assert made.nfe == 8
        wrote = [(now != before).nonzero() for before, now in zip(made.history, made.history[1:], strict=False)]
        masks = made.history == MASK
        allowed = masks & (masks.cumsum(2) <= window)
        assert all(len(rows) == 2 and allowed[i][tuple(rows.T)].all() for i, rows in enumerate(wrote))


def test_a_sequence_without_candidates_waits() -> None:
    """The first of two, until the other is done: then nothing holds it back."""

    def other_first(told: Confidences) -> torch.Tensor:
        waits = torch.arange(2).unsqueeze(1) < told.masked[1].any()
        return told.candidates & ~waits

    restrict("ahead", other_first)
    common = {"gen_length": 8, "mask_id": MASK, "shift": False, "return_dict": True, "cache": "dual", "threshold": 2.0}
    made = dllm_compile.generate(build(), start(2)[:, :4], ahead=1, lowering="eager", block_length=4, **common)
    assert made.nfe == 16
    assert not (made.sequences == MASK).any()


def test_a_loop_that_waits_for_ever_ends() -> None:
    restrict("none", lambda told: told.candidates & False)
    with pytest.raises(RuntimeError, match=r"nothing was written in 64 calls in a row: .*the mechanism 'none'"):
        dllm_compile.generate(
            build(), start(1)[:, :4], gen_length=4, mask_id=MASK, threshold=0.9, none=1, lowering="eager"
        )


def test_several_mechanisms_leave_what_each_of_them_leaves() -> None:
    restrict("ahead")
    restrict("last", lambda told: told.masked & (told.masked.flip(1).cumsum(1).flip(1) <= told.options.last))
    common = {"gen_length": 4, "mask_id": MASK, "factor": 0.0, "output_history": True, "lowering": "eager"}
    made = dllm_compile.generate(build(), start(1)[:, :4], ahead=3, last=2, **common)
    (at,) = (made.history[1] != made.history[0])[0].nonzero()
    assert int(at) == 4 + 2  # of four masks the third is among the first three and the last two


def test_a_fixed_number_of_tokens_cannot_be_held_back() -> None:
    restrict("ahead")
    with pytest.raises(ValueError, match=r"ahead may hold tokens back.*give threshold or factor"):
        dllm_compile.generate(build(), start(1)[:, :4], gen_length=4, mask_id=MASK, ahead=2)


# -- a loop of one's own ----------------------------------------------------------------------------------------------


def test_a_loop_of_ones_own_is_told_that_nobody_asks_the_rule() -> None:
    said = "joint is 0.3, by which the mechanism 'joint' decides which tokens dllm_compile.generate writes"
    call = torch.compile(build(), backend="dllm", options={"cache": "dual", "joint": 0.3, "lowering": "eager"})
    with pytest.raises(ValueError, match=rf"{said}.*: call dllm_compile.generate, or leave out joint"):
        call(start(1))
    hides = {"visible": lambda facts: facts.masked | True, "unmask": surest_together}
    register(Mechanism("joint", "a test", options=(JOINT,), switches=("joint",), **hides))
    call = torch.compile(build(), backend="dllm", options={"joint": 0.3, "mask_id": MASK, "lowering": "eager"})
    with pytest.warns(UserWarning, match=rf"{said}.*only its other parts apply here"):
        call(start(1))


def test_two_choosers_are_refused() -> None:
    model, prompt = build(), start(1)[:, :4]
    with pytest.raises(ValueError, match="a mechanism decides which tokens are written, and so does threshold"):
        dllm_compile.generate(model, prompt, gen_length=4, mask_id=MASK, joint=0.3, threshold=0.9)
    other = Option("other", None, is_number, "a number", "another bound")
    register(Mechanism("other", "a test", options=(other,), switches=("other",), unmask=surest_together))
    with pytest.raises(ValueError, match="joint and other each decide which tokens are written; leave out all but one"):
        dllm_compile.generate(model, prompt, gen_length=4, mask_id=MASK, joint=0.3, other=0.3)
