"""The backend on tensors that say ``cuda:0``: what the host reads and copies at each step, line by line."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

import dllm_compile
from dllm_compile.runtime import next_step, recordings
from dllm_compile.sampler import stepper
from tests.recorded_calls import Graph

from . import drive, guard
from .device import MixedDevices, Pretended, WhileRecording, held, on_device

pytestmark = [
    pytest.mark.shares_graphs,
    pytest.mark.skipif(bool(guard.missing()), reason=guard.missing() or "none"),
]
READ = "runtime/read.py: host = said.reshape(-1).long() if said is not None and len(parts) == 1 else packed.cpu()"
COUNT = "runtime/graph_call.py: capacity = int(counts.max())"
MOST = (
    "runtime/graph_call.py: "
    "counts: list[int] = torch.stack(self.salient_counts).tolist() if self.salient_counts else []"
)
COPY = "runtime/positions.py: return tensor.to(device, non_blocking=True)"
PARTIAL = {"block", "select", "response", "sparse", "salient", "inside"}


def counts_of_salient_rows(steps: list[drive.StepSeen]) -> list[list[str]]:
    """Reads of each step beside its ids. The first of as many rows counts the salient ones at each of the two layers,
    to know how much memory the others need, which look behind their last layer whether it was enough.
    """
    reads, known = [], set()
    for step in steps:
        salient = step.name == "salient"
        reads.append(([MOST] if step.active in known else [COUNT] * 2) if salient else [])
        known |= {step.active} if salient else set()
    return reads


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("name", drive.METHODS)
def test_a_step_is_one_read_and_one_copy_that_nobody_waits_for(name: str, batch: int) -> None:
    """Results are those of a CPU."""
    seen = drive.run(name, batch, dtype=torch.float64)
    assert not seen.refused
    assert {step.name for step in seen.steps} & PARTIAL
    for step, counted in zip(seen.steps[1:], counts_of_salient_rows(seen.steps[1:]), strict=True):
        assert step.lines("read") == [READ, *counted]
        assert step.lines("copy") == [COPY]
        assert all(each.pinned and not each.waits for each in step.crossings if each.kind == "copy")
    whole = (batch, drive.PROMPT + drive.RESPONSE, drive.model().head.out_features)
    made = [what for step in seen.steps[4:] for what, shape, _ in step.copied if shape == whole]
    assert not made  # rows of logits are copied, not all of them
    on_host = drive.run(name, batch, host=True, dtype=torch.float64)
    for got, want in zip(seen.steps, on_host.steps, strict=True):
        assert got.name == want.name
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", drive.METHODS)
def test_a_mask_is_looked_at_once(name: str) -> None:
    seen = drive.run(name, 2, padded=True, dtype=torch.float64)
    assert not seen.refused
    for step, counted in zip(seen.steps[1:], counts_of_salient_rows(seen.steps[1:]), strict=True):
        assert step.lines("read") == [READ, *counted]
    on_host = drive.run(name, 2, padded=True, host=True, dtype=torch.float64)
    for got, want in zip(seen.steps, on_host.steps, strict=True):
        assert got.name == want.name
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is recorded may neither read nor copy; a replay does it once more."""

    def capture(body: Callable[[], Any], device: torch.device, pool: Any) -> tuple[Any, Graph]:
        mode = Pretended.active
        assert mode is not None
        mode.recording = True
        try:
            graph = Graph(body)
        finally:
            mode.recording = False
        return graph.made, graph

    monkeypatch.setattr(recordings, "capture", capture)
    monkeypatch.setattr(next_step, "MULTIPLE", 4)
    monkeypatch.setattr(Graph, "played", 0)


@pytest.mark.usefixtures("captured")
@pytest.mark.filterwarnings("error:dllm. steps run without a CUDA graph")
@pytest.mark.parametrize(
    "name", ["dual", "intervals", "eviction", "saliency", "eviction and saliency", "skipping", "decoded"]
)
def test_a_recorded_step_neither_reads_nor_copies(name: str) -> None:
    seen = drive.run(name, 1, cuda_graphs=True, dtype=torch.float64)
    assert Graph.played > 1
    plain = drive.run(name, 1, dtype=torch.float64)
    assert [step.name for step in seen.steps] == [step.name for step in plain.steps]
    for got, want in zip(seen.steps, plain.steps, strict=True):
        torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=1e-9)


def test_mixed_devices_are_refused_and_a_recording_ends_with_a_read() -> None:
    """The pretended device itself."""
    with Pretended() as mode:
        here, there = torch.ones(3), on_device(torch.ones(3))
        with pytest.raises(MixedDevices):
            here + there
        assert (there + torch.tensor(2.0)).device.type == "cuda"
        mode.recording = True
        for read in (lambda: bool(there.any()), there.cpu, lambda: here.to("cuda")):
            with pytest.raises(WhileRecording):
                read()


class _Streamer(BaseStreamer):  # type: ignore[misc]
    def put(self, value: torch.Tensor) -> None:
        """Code that is not the package's runs between two calls."""

    def end(self) -> None:
        """Nothing."""


@pytest.mark.parametrize("streams", [False, True])
def test_generate_reads_its_ids_once_a_call(monkeypatch: pytest.MonkeyPatch, streams: bool) -> None:
    """What it may write next depends on them, and it tells the backend. Only where a streamer's code runs between two
    calls does the backend look whether weights were written to.
    """
    monkeypatch.setattr(stepper, "compiled", lambda step, model, options: drive.compiled(step, options))
    ids = torch.randint(3, drive.MASK, (1, 9), generator=torch.Generator().manual_seed(0))
    model = drive.model()
    with Pretended() as mode:
        options = {"method": "fast-dllm", "cache": "dual", "block_length": 8, "threshold": 0.9, "lowering": "eager"}
        streamer = _Streamer() if streams else None
        made = dllm_compile.generate(
            model,
            on_device(ids),
            gen_length=16,
            mask_id=drive.MASK,
            return_dict=True,
            streamer=streamer,
            **options,
        )
    assert not (held(made.sequences) == drive.MASK).any()
    reads = Counter(each.line for each in mode.crossings if each.kind == "read")
    assert reads.pop(READ, 0) == (made.nfe if streams else 0)
    assert sum(number for where, number in reads.items() if where.startswith("sampler/decode.py")) == (
        made.nfe + 1 + streams
    )
    assert sum(reads.values()) == made.nfe + 1 + streams + 3  # before the first call
    copies = [each for each in mode.crossings if each.kind == "copy"]
    assert sum(each.line == COPY for each in copies) == 2 * made.nfe  # the candidates, and positions
    assert all(each.pinned and not each.waits for each in copies if each.line == COPY)
