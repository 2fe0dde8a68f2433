"""What each method launches on CUDA, layer by layer: lowered by the package's own path, each kernel to a cubin."""

from __future__ import annotations

import re

import pytest

from dllm_compile.bench.floors import LAUNCHES

from . import drive, guard, published
from .drive import Lowered

pytestmark = [
    pytest.mark.shares_graphs,
    pytest.mark.skipif(bool(guard.missing()), reason=guard.missing() or "none"),
]
MOST: dict[tuple[str, str], int] = {
    ("full", "7 mm + flash"): 6,
    ("exact", "7 mm + flash"): 5,
    ("block", "7 mm + flash"): 5,
    ("select", "7 mm + flash + topk"): 11,
    ("response", "7 mm + flash"): 7,
    ("evict", "7 mm + flash + topk"): 12,
    ("sparse", "7 mm"): 6,
    ("outside", "7 mm"): 14,
    ("inside", "7 mm"): 7,
    # where the prompt's keys are evicted
    ("select", "7 mm + topk"): 12,
    ("response", "7 mm"): 9,
    # with saliency a layer is cut behind its attention
    ("full", "4 mm + flash"): 5,
    ("exact", "4 mm + flash"): 3,
    ("evict", "4 mm + flash + topk"): 11,
    ("sparse", "4 mm"): 5,
    ("salient", "4 mm"): 15,
    ("full", "3 mm"): 3,
    ("evict", "3 mm"): 3,
    ("exact", "3 mm"): 3,
    ("sparse", "3 mm"): 3,
    ("salient", "3 mm"): 6,
}
"""Triton kernels of a layer, by step and what else is launched: a call that is not here is one too many."""

PADDED = {
    "prefix": {"full", "block"},
    "intervals": {"select", "response"},
    "eviction and saliency": {"evict", "sparse", "salient"},
    "decoded": {"full", "block"},
    "greedy": {"full", "block"},
}
"""Methods that are lowered with padding too, and steps of each."""


@pytest.mark.parametrize("name", [name for name in drive.METHODS if name != "skipping"])  # its layers are those of dual
def test_each_step_of_a_method_compiles_and_launches_no_more_than_it_may(name: str) -> None:
    seen = drive.run(name, lowering=True)
    assert not seen.refused
    assert len({each.step for each in seen.lowered if each.part == "layer"}) > 1
    for each in seen.lowered:
        if each.part == "layer":
            assert each.counts.triton <= MOST[each.step, each.counts.beside]
        assert all(kernel.compiled for kernel in each.kernels)
        assert not copies_of_state(each)


@pytest.mark.parametrize("name", PADDED)
def test_padded_sequences_and_shared_heads_compile(name: str) -> None:
    seen = drive.run(name, 2, lowering=True, padded=True, shared=True)
    assert not seen.refused
    assert all(kernel.compiled for each in seen.lowered for kernel in each.kernels)
    assert {each.step for each in seen.lowered} >= PADDED[name]
    assert not any(map(copies_of_state, seen.lowered))


def test_generate_keeps_of_the_logits_how_sure_they_are() -> None:
    """By the operation ``confidence``: nothing else is as wide as the vocabulary."""
    seen = drive.generate()
    heads = [each for each in seen.lowered if each.part == "head"]
    assert {each.step for each in seen.lowered} >= {"full", "block"}
    for each in heads:
        assert {"part_kernel", "merge_kernel"} <= {kernel.name for kernel in each.kernels}
        assert all(kernel.compiled for kernel in each.kernels)
        assert each.counts.triton <= 4
        assert each.counts.beside == "1 mm"
        assert sum(f", {drive.model().head.out_features})" in shape for shape, _ in each.counts.buffers) == 1
    assert heads


@pytest.mark.parametrize("capability", [80, 100])
def test_other_gpus_compile_a_sample(capability: int) -> None:
    seen = drive.run("dual", lowering=True, capability=capability, steps=5)
    assert {each.step for each in seen.lowered} >= {"full", "block"}
    assert all(kernel.compiled for each in seen.lowered for kernel in each.kernels)


@pytest.mark.parametrize("shape", LAUNCHES)
def test_published_sizes_launch_what_explain_says(shape: str) -> None:
    """With the same number for each graph that goes by one name, and each kernel compiled at these sizes."""
    found = published.launches(shape)
    assert {name: {each.launches for each in counts} for name, counts in found.items()} == {
        name: {count} for name, count in LAUNCHES[shape].items()
    }


def copies_of_state(each: Lowered) -> list[str]:
    """Buffers of the size of what is kept of a layer, which has as many rows as there are tokens, and a spare one."""
    kept = {shape for shape in re.findall(r"assert_size_stride\(arg\d+_1, (\([^)]*\))", each.code) if "1 + s" in shape}
    assert kept or each.part != "layer" or each.step == "exact"
    return [shape for shape, _ in each.counts.buffers if shape in kept]
