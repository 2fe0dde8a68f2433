"""Peaks of known programs, to the byte."""

import pytest
import torch

from dllm_compile.runtime.memory import Peaks, peak_bytes


def held(count, device="cpu"):
    return torch.empty(count, dtype=torch.uint8, device=device)


def test_a_temporary_counts_and_what_follows_its_death_does_not_add_to_it():
    def program():
        held(100_000_000)
        first = held(7_000_000)
        second = held(3_000_000)
        del first
        third = held(1_000_000)
        return second, third

    assert peak_bytes(program) == 100_000_000


def test_stretches_start_from_what_is_held():
    with Peaks() as peaks:
        kept = held(10_000_000)
        peaks.start()
        held(5_000_000)
        peaks.start()
        del kept
        kept = held(12_000_000)
        peaks.start()
        del kept
    assert peaks.held == [10_000_000, 10_000_000, 12_000_000]
    assert peaks.above == [5_000_000, 2_000_000, 0]
    assert peaks.most == 15_000_000


def test_nothing_before_the_first_stretch_counts_as_a_peak():
    with Peaks() as peaks:
        held(50_000_000)
        peaks.start()
        held(1_000_000)
    assert (peaks.held, peaks.above) == ([0], [1_000_000])
    with Peaks() as peaks:
        pass
    assert peaks.most == 0


def test_a_view_and_a_write_in_place_take_nothing():
    x = torch.zeros(1000, 1000)
    assert peak_bytes(lambda: x.view(-1)[5:].t()) == 0
    assert peak_bytes(lambda: x.relu_()) == 0
    assert peak_bytes(lambda: x.relu()) == 4_000_000


def test_buffers_of_inductor_count():
    @torch.compile
    def two_products(x):
        return ((x @ x).relu() @ x).cos()

    x = torch.randn(500, 500)
    two_products(x)
    assert peak_bytes(lambda: two_products(x)) == 2_000_000  # each product; the rest is written in place


def test_an_error_inside_is_passed_on_and_ends_the_recording():
    peaks, kept = Peaks(), []

    def fails():
        with peaks:
            peaks.start()
            kept.append(held(1000))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert peaks.above == [1000]
    assert peak_bytes(lambda: held(3000)) == 3000


def test_one_recording_at_a_time():
    with Peaks(), pytest.raises(RuntimeError, match="profiler is running already"), Peaks():
        pass


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda_what_was_held_before_is_subtracted():
    old = [held(1 << 25, "cuda")]
    with Peaks("cuda") as peaks:
        peaks.start()
        held(1 << 24, "cuda")
        peaks.start()
        old.clear()
        kept = held(1 << 23, "cuda")
    assert peaks.held == [0, 0]
    assert peaks.above == [1 << 24, 0]
    assert kept.is_cuda
