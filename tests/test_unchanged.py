"""Writes to tensors are seen, whichever way they go."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter

from dllm_compile.runtime.unchanged import SAMPLE, SMALL, Inputs, Weights, checksum


def matrices() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [Parameter(torch.randn(40, 30)), Parameter(torch.ones(7)), Parameter(torch.randn(300, 300).bfloat16())]


def written(weights: Weights) -> bool:
    return weights.moved() or any(map(bool, weights.written()))


def by_numpy(weight: torch.Tensor) -> None:
    weight.detach().numpy()[:] *= 1.5


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda w: w.detach().mul_(1.5),
    "data": lambda w: w.data.add_(0.1),
    "copied to data": lambda w: w.data.copy_(torch.randn(w.shape)),
    "other data": lambda w: setattr(w, "data", torch.randn(w.shape)),
    "the same in other memory": lambda w: setattr(w, "data", w.data.clone()),
    "numpy": by_numpy,
    "vector": lambda w: torch.nn.utils.vector_to_parameters(torch.randn(w.numel()), [w]),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_seen_by_address_count_or_sample(write: Callable[[torch.Tensor], object]) -> None:
    tensors = matrices()
    weights = Weights(tensors, lambda: None)
    assert not written(weights)
    write(tensors[0])
    assert written(weights)
    weights.look()
    assert not written(weights)


def test_a_single_entry_is_seen_by_the_checksum_alone() -> None:
    tensors = matrices()
    weights = Weights(tensors, lambda: None)
    weights.sum()
    assert not weights.written_anywhere()
    flat = tensors[0].data.view(-1)
    flat[1] += 1e-3  # the sample has every 19th
    assert flat.numel() // SAMPLE > 1
    assert not written(weights)
    assert weights.written_anywhere()


def test_rows_that_change_places_change_the_checksum() -> None:
    x = torch.randn(50, 40)
    before = checksum(x)
    x[[3, 8]] = x[[8, 3]]
    assert before != checksum(x)
    assert checksum(torch.ones(64)) != checksum(torch.full((64,), 2.0))
    assert checksum(torch.zeros(3)) == checksum(torch.zeros(3))
    assert checksum(torch.arange(9).view(3, 3)[:, 1:].t().to(torch.int8)).shape == ()


def test_a_dead_weight_is_told() -> None:
    tensors, told = matrices(), []
    weights = Weights(tensors, lambda: told.append(1))
    del tensors[1]
    gc.collect()
    assert told
    assert weights.moved()


def test_weights_that_come_later_are_watched_too() -> None:
    tensors = matrices()
    weights = Weights(tensors[:1], lambda: None)
    weights.sum()
    assert not weights.include(tensors)
    assert weights.include(tensors)
    assert not weights.written_anywhere()
    tensors[2].data.mul_(2)
    assert written(weights)
    assert weights.written_anywhere()


INPUTS = {
    "scalar": torch.tensor(0.5),
    "vector": torch.randn(2, 8),
    "mask": torch.ones(2, 1, 5, 5).bool(),
    "not a number": torch.full((2, 3), float("nan")),
    "transposed": torch.randn(4, 3).t(),
    "large": torch.randn(SMALL // 200 + 1, 200),
}


@pytest.mark.parametrize("value", INPUTS.values(), ids=INPUTS)
def test_inputs_are_known_by_what_they_hold(value: torch.Tensor) -> None:
    value = value.clone()
    inputs = Inputs([value])
    for same in (value, value.clone()):
        assert inputs.fit([same])
        assert not any(map(bool, inputs.differ([same])))
    other = value.clone()
    other[(-1,) * other.dim()] = 0 if value.dtype == torch.bool else 3
    assert any(map(bool, inputs.differ([other])))
    assert not inputs.fit([value.unsqueeze(0)])


def test_hundreds_of_inputs_are_compared_at_once() -> None:
    """A device is asked once for each dtype, not once for each scale of a quantized weight."""
    scales = [*(torch.rand(1 + i % 3) for i in range(300)), torch.arange(3)]
    inputs = Inputs(scales)
    assert len(inputs.differ(scales)) == 2
    for i in (0, 150, 299, 300):
        others = [each.clone() for each in scales]
        others[i][-1] += 1
        assert any(map(bool, inputs.differ(others)))


def test_inputs_of_some_sequences_of_a_batch() -> None:
    mask, table = torch.arange(12).view(3, 4), torch.randn(5, 2)
    inputs = Inputs([mask, table]).of_sequences(torch.tensor([0, 2]), 3)
    assert inputs is not None
    assert inputs.fit([mask[:2], table])
    assert not any(map(bool, inputs.differ([mask[[0, 2]], table])))
    assert any(map(bool, inputs.differ([mask[[0, 1]], table])))
