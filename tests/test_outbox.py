"""Copies for the caller share memory with nothing the caller holds, and use memory again when they may."""

from __future__ import annotations

import torch

from dllm_compile.outbox import Outbox


def test_memory_is_used_again_once_it_is_free() -> None:
    box, value = Outbox(), torch.randn(3, 5)
    places = set()
    held = None
    for _ in range(6):
        held = box.copy(value)  # the copy before is alive until this one is there, as in a sampling loop
        places.add(held.data_ptr())
        assert torch.equal(held, value)
    assert len(places) == 2


def test_what_the_caller_holds_is_never_touched() -> None:
    box = Outbox()
    values = [torch.full((4, 3), float(i)) for i in range(5)]
    held = [box.copy(value) for value in values]
    assert all(torch.equal(a, b) for a, b in zip(held, values, strict=True))


def test_a_view_or_a_detached_tensor_keeps_its_memory() -> None:
    box = Outbox()
    view = box.copy(torch.zeros(4, 3))[1:]
    detached = box.copy(torch.ones(4, 3)).detach()
    box.copy(torch.full((4, 3), 7.0))
    box.copy(torch.full((4, 3), 8.0))
    assert torch.equal(view, torch.zeros(3, 3))
    assert torch.equal(detached, torch.ones(4, 3))


def test_writing_into_a_copy_leaves_the_source() -> None:
    box, value = Outbox(), torch.zeros(2, 2)
    box.copy(value).fill_(5)
    assert torch.equal(value, torch.zeros(2, 2))
    assert torch.equal(box.copy(value), value)


def test_shapes_and_strides_may_change() -> None:
    box = Outbox()
    box.copy(torch.zeros(4, 3))
    padded = torch.arange(30.0).reshape(2, 5, 3)[:, :-1]
    got = box.copy(padded)
    assert torch.equal(got, padded)
    assert got.is_contiguous()


def test_only_changed_rows_are_copied_into_memory_nobody_wrote_to() -> None:
    box, value = Outbox(), torch.randn(2, 6, 3)
    held = box.copy(value)
    for step in range(5):
        rows = torch.tensor([[step, 6], [5, 0]])  # 6 is past the last row
        value[:, step] += 1
        value[:, 0] += 1
        value[:, 5] += 1
        rows = torch.cat([rows, torch.tensor([[0], [step]])], 1)
        box.changed(rows)
        held = box.copy(value)
        assert torch.equal(held, value)
    assert len(box.buffers) == 2
    value[:, 2] = 7  # nobody was told
    box.changed(torch.tensor([[0], [1]]))
    assert not box.copy(value)[:, 2].eq(7).any()


def test_memory_the_caller_wrote_into_is_copied_whole() -> None:
    box, value = Outbox(), torch.randn(1, 4, 3)
    box.copy(value)[:, 2] = -torch.inf
    assert torch.equal(box.copy(value), value)
    box.copy(value).add_(1)
    assert torch.equal(box.copy(value), value)
