"""Logits on a CPU are kept where the head has made them, and callers who read and write them never change them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import dllm_compile
from dllm_compile.compat import address
from dllm_compile.runtime.chain import Chain
from dllm_compile.runtime.shared_rows import SharedRows

from . import models
from .callers import METHODS
from .test_output_buffers import WRITES

TOKENS, WIDTH = 4, 3


def box(batch: int = 1) -> SharedRows:
    return SharedRows((batch, TOKENS, WIDTH), torch.float32)


class Copied(TorchDispatchMode):
    """Numbers of floating tensors that are copied, a tensor made of another among them."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.overloadpacket.__name__ in ("copy_", "clone", "index_copy_", "index_put_")
            and args[0].is_floating_point()
        ):
            self.numbers.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_all_rows_are_not_copied() -> None:
    shared, value = box(), torch.randn(1, TOKENS, WIDTH)
    place, want = address(value), value.clone()
    with Copied() as copied:
        shared.put_all(value)
        del value
        got = shared.hand_out()
        again = shared.hand_out()
    assert not copied.numbers
    assert address(got) == address(again) == place
    got.fill_(7)
    assert torch.equal(again, want)
    assert torch.equal(shared.rows, want)
    assert shared.nbytes == want.nbytes


def test_a_loop_that_holds_the_last_result_has_the_rows_copied_that_are_new() -> None:
    """And once all of them, into a second memory."""
    shared, held, state = box(2), None, torch.zeros(2, TOKENS, WIDTH)
    shared.put_all(state.clone())
    places, copied = set(), Copied()
    for step, at in enumerate([[1, 2], [2, 3], [2, 3], [0, 4], [3, 4], [1, 3], [4, 4]]):
        index, before = torch.tensor([at, at]), held
        want = None if before is None else before.clone()
        fresh = torch.full((2, 2, WIDTH), step + 1.0)
        with copied:
            shared.put(fresh, index)
            held = shared.hand_out()
        for place in at:
            state[:, place : place + 1] = step + 1.0  # 4 is no row
        assert torch.equal(held, state)
        assert before is None or torch.equal(before, want)
        places.add(address(held))
    assert len(places) == 2
    assert shared.nbytes == 2 * state.nbytes
    assert copied.numbers.count(state.numel()) == 1
    assert sum(copied.numbers) < state.numel() + 7 * 2 * 3 * WIDTH


def test_a_loop_that_holds_nothing_has_one_memory() -> None:
    shared = box()
    shared.put_all(torch.zeros(1, TOKENS, WIDTH))
    place = address(shared.rows)
    for step in range(4):
        shared.put(torch.full((1, 2, WIDTH), step + 1.0), torch.tensor([[1, 3]]))
        assert shared.hand_out()[0, :, 0].tolist() == [0, step + 1, 0, step + 1]
    assert address(shared.rows) == place
    assert shared.nbytes == shared.rows.nbytes


MADE: dict[str, Callable[[], torch.Tensor]] = {
    "numpy's": lambda: torch.from_numpy(torch.randn(1, TOKENS, WIDTH).numpy().copy()),
    "shared with processes": lambda: torch.randn(1, TOKENS, WIDTH).share_memory_(),
    "a part": lambda: torch.randn(3, TOKENS, WIDTH)[1:2],
    "in another order": lambda: torch.randn(1, WIDTH, TOKENS).transpose(1, 2),
    "of another dtype": lambda: torch.randn(1, TOKENS, WIDTH).double(),
    "of one sequence": lambda: torch.randn(TOKENS, WIDTH).expand(1, -1, -1),
    "a weight": lambda: torch.nn.Parameter(torch.randn(1, TOKENS, WIDTH)).detach(),
}


@pytest.mark.parametrize("made", MADE.values(), ids=MADE)
def test_who_made_the_rows_may_write_into_them(made: Callable[[], torch.Tensor]) -> None:
    """And what is put among them is not written into what he has."""
    shared, value = box(), made()
    want = value.float().clone()
    shared.put_all(value)
    shared.put(torch.zeros(1, 1, WIDTH), torch.tensor([[2]]))
    assert torch.equal(value.float(), want)
    value.zero_()
    want[:, 2] = 0
    assert torch.equal(shared.hand_out(), want)


@pytest.mark.parametrize("how", [torch.no_grad, torch.inference_mode])
def test_rows_of_inference_mode_are_written_outside_of_it(how: Callable[[], Any]) -> None:
    with how():
        shared = box()
        shared.put_all(torch.ones(1, TOKENS, WIDTH))
        shared.hand_out().fill_(5)
    for _ in range(2):
        shared.put(torch.zeros(1, 1, WIDTH), torch.tensor([[0]]))
        assert shared.hand_out()[0, :, 0].tolist() == [0, 1, 1, 1]


@pytest.mark.parametrize("index", [[4, 4], [2, 3]], ids=["no row", "two rows"])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_the_caller_wrote_is_not_kept(write: Callable[[torch.Tensor], Any], index: list[int]) -> None:
    """Whether PyTorch counts the write or not."""
    shared, value = box(), torch.randn(1, TOKENS, WIDTH)
    shared.put_all(value.clone())
    for step in range(6):
        if index != [4, 4]:
            value[:, index] = step
        shared.put(torch.full((1, 2, WIDTH), float(step)), torch.tensor([index]))
        got = shared.hand_out()
        assert torch.equal(got, value)
        write(got)
        del got


READS: dict[str, Callable[[torch.Tensor], Any]] = {
    "softmax of a block": lambda rows: rows[:, 1:3].softmax(-1).max(-1),
    "argmax": lambda rows: rows.argmax(-1),
    "float64": lambda rows: rows.double().softmax(-1).gather(-1, rows.argmax(-1, keepdim=True)),
    "rows by number": lambda rows: rows[0, [1, 2]].topk(2),
    "rows by mask": lambda rows: rows[rows[:, :, 0] > 0],
    "rows moved": lambda rows: torch.cat([rows[:, :1], rows[:, :-1]], 1),
    "a mask": lambda rows: torch.where(rows > 0, rows, -torch.inf),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_who_only_reads_shares_memory(read: Callable[[torch.Tensor], Any]) -> None:
    shared = box()
    shared.put_all(torch.randn(1, TOKENS, WIDTH))
    got = shared.hand_out()
    read(got)
    assert address(got) == address(shared.rows)


def test_whether_the_last_graph_returned_a_tensor_is_asked_without_writing() -> None:
    shared, chain = box(), Chain()
    shared.put_all(torch.randn(1, TOKENS, WIDTH))
    chain.passed = [shared.hand_out()]
    assert chain.hands_on(chain.passed[0].view(1, TOKENS, WIDTH))
    assert not chain.hands_on(torch.zeros(1, TOKENS, WIDTH))
    assert not chain.hands_on(chain.passed[0][:, 1:])
    assert address(chain.passed[0]) == address(shared.rows)


@pytest.mark.parametrize("use", ["numpy", "in place"])
def test_a_caller_who_asks_for_memory_to_write_into_gets_copies_in_memory_that_is_used_again(use: str) -> None:
    """Sharing with it until it writes is of no use, as it always does."""
    shared, places = box(), set()
    shared.put_all(torch.zeros(1, TOKENS, WIDTH))
    for step in range(6):
        shared.put(torch.full((1, 1, WIDTH), float(step)), torch.tensor([[2]]))
        got = shared.hand_out()
        places.add(got.data_ptr()) if step > 1 else None
        assert got[0, :, 0].tolist() == [0, 0, step, 0]
        got.numpy() if use == "numpy" else got.fill_(7)
        del got
    assert len(places) == 1
    assert shared.nbytes == 2 * shared.rows.nbytes


@pytest.mark.parametrize("name", ["dual", "dllm-cache"])
def test_a_loop_changes_between_inference_mode_and_none(name: str) -> None:
    """Also where one of two sequences leaves."""

    def results(*modes: Any) -> list[torch.Tensor]:
        call, ids, out = models.compiled_loop(models.build("llama"), **METHODS[name]), models.start(9, 8), []
        for step, mode in enumerate(modes):
            ids = (ids if step < 3 else ids[:1]).clone()
            ids[:, 9 : 9 + step] = 5
            with mode():
                out.append(call(ids).logits.clone())
        return out

    other = torch.inference_mode
    want = results(*[torch.no_grad] * 6)
    for modes in ([other, torch.no_grad] * 3, [torch.no_grad, other, other] * 2):
        assert all(map(torch.equal, results(*modes), want))


def test_rows_of_one_sequence_are_those_of_all() -> None:
    shared = box(2)
    shared.put(torch.ones(1, 2, WIDTH), torch.tensor([[0, 1], [2, 4]]))
    assert shared.hand_out()[:, :, 0].tolist() == [[1, 1, 0, 0], [0, 0, 1, 0]]


def test_rows_are_outside_of_autograd() -> None:
    shared = box()
    shared.put_all(torch.ones(1, TOKENS, WIDTH, requires_grad=True) * 2)
    shared.put(torch.ones(1, 1, WIDTH, requires_grad=True), torch.tensor([[1]]))
    assert not shared.hand_out().requires_grad


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_full_step_of_a_model_copies_no_logits(name: str) -> None:
    """And later steps have its memory and one more."""
    model, ids = models.build(name), models.start(9, 8)
    call = models.compiled_loop(model, method="fast-dllm", cache="dual", block_length=4)
    with torch.no_grad():
        held = call(ids).logits
        assert dllm_compile.stats(model)["logits_bytes"] == held.nbytes
        for place in range(9, 15):
            ids[:, place] = 5
            held = call(ids).logits
            assert dllm_compile.stats(model)["logits_bytes"] == 2 * held.nbytes
