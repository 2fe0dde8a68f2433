"""Copies for the caller share memory with nothing the caller holds, and use memory again when they may."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from dllm_compile.runtime.output_buffers import OutputBuffers
from dllm_compile.runtime.shared_rows import SharedRows

from . import models


def test_memory_is_used_again_once_it_is_free() -> None:
    box, value = OutputBuffers(), torch.randn(3, 5)
    places = set()
    held = None
    for _ in range(6):
        held = box.copy(value)  # the copy before is alive until this one is there, as in a sampling loop
        places.add(held.data_ptr())
        assert torch.equal(held, value)
    assert len(places) == 2


def test_what_the_caller_holds_is_never_touched() -> None:
    box = OutputBuffers()
    values = [torch.full((4, 3), float(i)) for i in range(5)]
    held = [box.copy(value) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(held, values, strict=True))


def test_a_view_or_a_detached_tensor_keeps_its_memory() -> None:
    box = OutputBuffers()
    view = box.copy(torch.zeros(4, 3))[1:]
    detached = box.copy(torch.ones(4, 3)).detach()
    box.copy(torch.full((4, 3), 7.0))
    box.copy(torch.full((4, 3), 8.0))
    assert torch.equal(view, torch.zeros(3, 3))
    assert torch.equal(detached, torch.ones(4, 3))


def test_writing_into_a_copy_leaves_the_source() -> None:
    box, value = OutputBuffers(), torch.zeros(2, 2)
    box.copy(value).fill_(5)
    assert torch.equal(value, torch.zeros(2, 2))
    assert torch.equal(box.copy(value), value)


def test_shapes_and_strides_may_change() -> None:
    box = OutputBuffers()
    box.copy(torch.zeros(4, 3))
    padded = torch.arange(30.0).reshape(2, 5, 3)[:, :-1]
    got = box.copy(padded)
    assert torch.equal(got, padded)
    assert got.is_contiguous()


def test_rows_that_nobody_reads_are_copied_once_a_memory_and_after_a_write() -> None:
    """As on a GPU: the rows named are of this call, the others of an earlier one, never what a caller made of them."""
    box, rows = OutputBuffers(), torch.tensor([[1, 3], [0, 4]])  # 4: no row, so that the last is current, too
    value = lambda i: torch.full((2, 4, 3), float(i))  # noqa: E731
    assert torch.equal(box.copy(value(1), rows), value(1))
    got = box.copy(value(2), rows)
    assert got[:, :, 0].tolist() == [[1, 2, 1, 2], [2, 1, 1, 2]]
    got[0].div_(0)
    del got
    assert torch.equal(box.copy(value(3), rows), value(3))
    got = box.copy(value(4).double(), rows)
    assert torch.equal(got, value(4).double())


def numbers(storage: torch.UntypedStorage) -> torch.Tensor:
    return torch.empty(0).set_(storage)


def old_storage(copy: torch.Tensor) -> torch.TypedStorage:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch advises against it
        return copy.storage()


def saved(copy: torch.Tensor) -> Callable[[], torch.Tensor]:
    weight = torch.ones(4, 3, requires_grad=True)
    product = weight * copy
    return lambda: torch.autograd.grad(product.sum(), weight)[0]


def shared(copy: torch.Tensor) -> Callable[[], torch.Tensor]:
    file = copy.untyped_storage()._share_filename_cpu_()  # what a queue of torch.multiprocessing sends
    other = torch.UntypedStorage._new_shared_filename_cpu(*file)
    return partial(numbers, other)


HOLDERS: dict[str, Callable[[torch.Tensor], Callable[[], Any]]] = {
    "storage": lambda copy: partial(numbers, copy.untyped_storage()),
    "old storage": lambda copy: partial(list, old_storage(copy)),
    "view": lambda copy: partial(torch.Tensor.view, copy[:, 1:], -1),
    "data": lambda copy: partial(torch.Tensor.view, copy.data, -1),
    "numpy": lambda copy: partial(list, copy.numpy().reshape(-1)),
    "memoryview": lambda copy: memoryview(copy.numpy()).cast("B").cast("f").tolist,
    "dlpack": lambda copy: partial(torch.utils.dlpack.from_dlpack, torch.utils.dlpack.to_dlpack(copy)),
    "backward": saved,
    "another process": shared,
}


def copies() -> Callable[[torch.Tensor], torch.Tensor]:
    return OutputBuffers().copy


def shares() -> Callable[[torch.Tensor], torch.Tensor]:
    """All rows are kept, and written in place but for the first time."""
    box, every = SharedRows((1, 4, 3), torch.float32), torch.tensor([[0, 1, 2, 3]])

    def hand_out(value: torch.Tensor) -> torch.Tensor:
        box.put(value, every)
        return box.hand_out()

    return hand_out


@pytest.mark.parametrize("made", [copies, shares])
@pytest.mark.parametrize("hold", HOLDERS.values(), ids=HOLDERS)
def test_whatever_holds_a_part_keeps_it(
    hold: Callable[[torch.Tensor], Callable[[], Any]], made: Callable[[], Callable[[torch.Tensor], torch.Tensor]]
) -> None:
    hand_out = made()
    hand_out(torch.zeros(1, 4, 3))
    held = hold(hand_out(torch.ones(1, 4, 3)))
    for i in range(2, 6):
        hand_out(torch.full((1, 4, 3), float(i)))
    assert set(torch.as_tensor(held()).reshape(-1).tolist()) == {1.0}


WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda copy: copy.fill_(7),
    "data": lambda copy: copy.data.fill_(7),
    "numpy": lambda copy: copy.numpy().fill(7),
    "dlpack": lambda copy: torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(copy)).fill_(7),
    "storage": lambda copy: torch.empty(0).set_(copy.untyped_storage()).fill_(7),
    "storage's numbers": lambda copy: copy.untyped_storage().__setitem__(0, 7),
    "resized storage": lambda copy: copy.untyped_storage().resize_(4),
    "shared": lambda copy: copy.share_memory_().fill_(7),
}
RESIZED = {"resized": lambda copy: copy.resize_(9, 9).fill_(7)}
"""Which PyTorch refuses for a tensor that shares memory until it is written."""


@pytest.mark.parametrize("write", [*WRITES.values(), *RESIZED.values()], ids=[*WRITES, *RESIZED])
def test_nothing_the_caller_wrote_comes_back(write: Callable[[torch.Tensor], Any]) -> None:
    box, value = OutputBuffers(), torch.randn(4, 3)
    for _ in range(4):
        copy = box.copy(value)
        assert torch.equal(copy, value)
        write(copy)
        del copy


STEPS: dict[str, dict[str, Any]] = {
    "exact": {"method": "exact"},
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": 4},
    "repeat": {"method": "exact"},
}


@pytest.mark.parametrize("kind", STEPS)
def test_logits_of_rows_that_are_not_computed_anew(kind: str) -> None:
    """By a model: a held storage keeps them, and what is written into them by numpy or ``data`` does not come back."""
    model, ids = models.build("llama"), models.start(9, 8)
    call = models.compiled_loop(model, **STEPS[kind])
    with torch.no_grad():
        want = call(ids).logits.clone()
        held = call(ids).logits.untyped_storage()
        for step in range(6):
            if kind != "repeat":
                ids[:, 9 + step] = 5
            logits = call(ids).logits
            assert torch.equal(logits[:, :8], want[:, :8])  # nobody reads the prompt, so it stays as it was
            logits.data.fill_(-torch.inf) if step % 2 else logits.numpy().fill(torch.nan)
            del logits
    assert torch.equal(torch.empty(0, dtype=want.dtype).set_(held, 0, want.shape), want)
