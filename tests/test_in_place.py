"""Writes in place inside of a model, and what a model returns beside its logits, are as in eager."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import models
from .callers import TOLERANCE, build, fill, start

Made = tuple[torch.Tensor, ...]

pytestmark = pytest.mark.usefixtures("no_gradients_no_warnings")


@torch.library.custom_op("dllm_tests::add_one_", mutates_args={"x"})
def add_one_(x: torch.Tensor) -> None:
    x.add_(1)


@add_one_.register_fake
def _(x: torch.Tensor) -> None:
    pass


def constant() -> torch.Tensor:
    return torch.arange(models.VOCABULARY) / 8 - 3


def of_a_constant(write: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Made]:
    def after(logits: torch.Tensor) -> Made:
        made = constant()
        write(made)
        return (logits + made,)

    return after


def of_logits(write: Callable[[torch.Tensor], Any]) -> Callable[[torch.Tensor], Made]:
    def after(logits: torch.Tensor) -> Made:
        twice = logits * 2
        write(twice)
        return logits + twice, twice

    return after


def returned(logits: torch.Tensor) -> Made:
    made = constant()
    return logits + made, made


def returned_and_made(logits: torch.Tensor) -> Made:
    made = constant()
    return logits + made, made + 1


SERVED: dict[str, Callable[[torch.Tensor], Any]] = {
    "relu_": torch.relu_,
    "leaky_relu_": lambda x: F.leaky_relu(x, 0.5, inplace=True),
    "by position": lambda x: F.leaky_relu(x, 0.5, True),
    "method": lambda x: x.clamp_(max=1.0),
    "operator": lambda x: operator.imul(x, 2),
}
REFUSED: dict[str, Callable[[torch.Tensor], Any]] = {
    "out": lambda x: torch.add(x, 1, out=x),
    "custom": add_one_,
    "foreach": lambda x: torch._foreach_add_([x], 1),
    "view": lambda x: x[..., 3:].mul_(2),
}


@pytest.mark.parametrize("how", SERVED)
def test_a_write_is_as_in_eager(how: str) -> None:
    assert not refused(of_a_constant(SERVED[how]), lowering="eager")
    assert not refused(of_logits(SERVED[how]), lowering="eager")


@pytest.mark.parametrize("how", REFUSED)
def test_a_write_that_has_no_other_spelling_is_refused(how: str) -> None:
    warnings.filterwarnings("ignore", "dllm: this graph runs on plain Inductor")
    for of in (of_a_constant, of_logits):
        assert any("in place" in reason for reason in refused(of(REFUSED[how]), lowering="eager"))


def filled(logits: torch.Tensor, write: Callable[[torch.Tensor, torch.Tensor], Any]) -> Made:
    """A new buffer as large as the logits, which ``write`` fills."""
    buffer = logits.new_empty(logits.shape)
    return (buffer if write(buffer, logits * 2) is None else buffer * 2,)


def by_copies(buffer: torch.Tensor, x: torch.Tensor) -> None:
    buffer[..., 8:].copy_(x[..., :-8])
    buffer[..., :8].copy_(x[..., -8:])


def by_items(buffer: torch.Tensor, x: torch.Tensor) -> None:
    buffer.narrow(2, 0, 3).copy_(x[..., -3:])
    buffer[..., 3:] = x[..., :-3]


def half(buffer: torch.Tensor, x: torch.Tensor) -> None:
    buffer.zero_()
    buffer[..., 8:].copy_(x[..., 8:])


def twice(buffer: torch.Tensor, x: torch.Tensor) -> None:
    buffer[..., :8].copy_(x[..., :8])
    buffer[..., 8:].copy_(x[..., 8:])
    buffer[..., 4:12].copy_(x[..., :8])


def read_between(buffer: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    buffer[..., :8].copy_(x[..., :8])
    first = buffer[..., :4] + 0
    buffer[..., 8:].copy_(x[..., 8:])
    buffer[..., :4].copy_(first)
    return buffer


def source_changes(buffer: torch.Tensor, x: torch.Tensor) -> None:
    buffer[..., :8].copy_(x[..., :8])
    x.mul_(3)
    buffer[..., 8:].copy_(x[..., 8:])


@pytest.mark.parametrize("write", [by_copies, by_items], ids=lambda write: write.__name__)
def test_a_buffer_that_is_filled_piece_by_piece_is_a_concatenation(write: Callable[..., Any]) -> None:
    assert not refused(lambda logits: filled(logits, write), lowering="eager")


@pytest.mark.parametrize("write", [half, twice, read_between, source_changes], ids=lambda write: write.__name__)
def test_a_buffer_whose_pieces_are_not_all_of_it_is_refused(write: Callable[..., Any]) -> None:
    warnings.filterwarnings("ignore", "dllm: this graph runs on plain Inductor")
    assert any("in place" in reason for reason in refused(lambda logits: filled(logits, write), lowering="eager"))


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("after", [returned, returned_and_made], ids=lambda after: after.__name__)
def test_a_constant_may_be_returned(after: Callable[[torch.Tensor], Made], lowering: str) -> None:
    assert not refused(after, lowering=lowering)


def refused(after: Callable[[torch.Tensor], Made], **options: Any) -> list[str]:
    """Run a loop of three steps, compare all that it returns with eager, and return why graphs were refused."""
    torch._dynamo.reset()
    model = build()

    def whole(ids: torch.Tensor) -> Made:
        return after(model(ids))

    call = torch.compile(whole, backend="dllm", options={"mask_id": models.MASK, "method": "exact", **options})
    x = start()
    for _ in range(3):
        got, wanted = call(x), whole(x)
        for one, want in zip(got, wanted, strict=True):
            rows = x == models.MASK if want.dim() == 3 else ...
            assert (one - want)[rows].abs().max() < TOLERANCE
        x = fill(wanted[0], x)
    return dllm_compile.stats(model)["refused"]
