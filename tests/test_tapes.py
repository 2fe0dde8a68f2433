"""Recorded calls: a graph that replays on the CPU stands in for CUDA's, so that what a tape reads is all its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import session, tapes
from dllm_compile.outbox import Outbox

from . import loops, models

PROMPT, RESPONSE, BLOCK = 9, 24, 8
METHODS: dict[str, dict[str, Any]] = {
    "dual": {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK},
    "prefix": {"method": "fast-dllm", "cache": "prefix", "block_length": BLOCK},
    "intervals": {"prompt_interval": 50, "response_interval": 7},
    "eviction": {"method": "sparse-dllm", "block_length": BLOCK},
    "eviction of the prompt": {"method": "dllm-cache", "keep_ratio": 0.5},
    "saliency": {"method": "dyllm", "saliency_threshold": 0.9, "shift": False},
    "all three": {"method": "sparse-dllm", "saliency_threshold": 0.9, "full_steps": 1, "block_length": BLOCK},
    "decoded": {"method": "dkv-cache", "shift": False},
}


def rows() -> list[torch.Tensor]:
    """All that sessions keep between steps."""
    return [t for s in session.sessions() for group in (*s.layers.values(), s.kept.values()) for t in group]


class Graph:
    """What is recorded leaves no trace; a replay does it, and fills what the recording returned."""

    played = 0

    def __init__(self, body: Callable[[], Any]) -> None:
        before = [row.clone() for row in rows()]
        self.body, self.made = body, body()
        for row, value in zip(rows(), before, strict=True):
            row.copy_(value)

    def pool(self) -> None:
        """CUDA's alone."""

    def replay(self) -> None:
        Graph.played += 1
        made = self.body()
        for node, value in self.made.results.items():
            value.copy_(made.results[node])
        for value, now in zip(self.made.turned, made.turned, strict=True):
            value.copy_(now)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    def capture(body: Callable[[], Any], pool: Any) -> tuple[Any, Graph]:
        graph = Graph(body)
        return graph.made, graph

    monkeypatch.setattr(tapes, "possible", lambda device: True)
    monkeypatch.setattr(tapes, "capture", capture)
    monkeypatch.setattr(session, "RECORDED", 4)
    monkeypatch.setattr(Outbox, "copy", lambda self, value: value.clone())  # as on CUDA
    Graph.played = 0


def denoised(model: torch.nn.Module, batch: int, **options: Any) -> list[torch.Tensor]:
    """Logits of the masked rows of each call of two generations."""
    call, out = models.compiled(model, **options), []
    for seed in (1, 2):
        x = models.start(PROMPT, RESPONSE, batch, seed).to(next(model.parameters()).device)

        def logits(ids: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = call(input_ids=ids).logits
            out.append(found[ids == models.MASK].clone())
            return found

        with torch.no_grad():
            for _ in loops.llada(logits, x, PROMPT, steps=RESPONSE, block_length=BLOCK, mask_id=models.MASK):
                pass
    return out


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
@pytest.mark.usefixtures("recording")
def test_recorded_calls_equal_those_that_are_made(options: dict[str, Any], batch: int) -> None:
    model = models.build("llama")
    want = denoised(model, batch, **options)
    assert Graph.played == 0
    got = denoised(model, batch, cuda_graphs=True, **options)
    assert Graph.played > RESPONSE // 2
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.usefixtures("recording")
def test_recorded_calls_of_generate_equal_those_that_are_made() -> None:
    model, x = models.build("qwen2"), models.start(PROMPT, 0)
    settings: dict[str, Any] = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": models.MASK, "cache": "dual"}
    want = dllm_compile.generate(model, x, lowering="eager", **settings)
    assert Graph.played == 0
    got = dllm_compile.generate(model, x, lowering="eager", cuda_graphs=True, **settings)
    assert Graph.played > RESPONSE // 2
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["saliency", "all three"])
@pytest.mark.usefixtures("recording")
def test_a_recorded_call_with_too_many_salient_rows_is_made_again(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, options = models.build("llama"), METHODS[name]
    begin = session.Session._step

    def crowded(self: session.Session, *args: Any) -> session.Step:
        step = begin(self, *args)
        self.room = max(self.room or 0, 2)
        return step

    monkeypatch.setattr(session.Session, "_step", crowded)
    want = denoised(model, 2, **options)
    spills = dllm_compile.stats(model)["spills"]
    assert spills > 0
    got = denoised(model, 2, cuda_graphs=True, **options)
    assert Graph.played > RESPONSE // 2
    assert dllm_compile.stats(model)["spills"] == 2 * spills
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


def test_nothing_is_recorded_on_a_cpu() -> None:
    model = models.build("llama")
    got = denoised(model, 1, cuda_graphs=True, **METHODS["dual"])
    assert all(not each.tapes for each in session.sessions())
    for mine, theirs in zip(got, denoised(model, 1, **METHODS["dual"]), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("options", METHODS.values(), ids=METHODS)
def test_graphs_of_cuda_equal_launches(options: dict[str, Any], lowering: str) -> None:
    model = models.build("llama").cuda()
    want = denoised(model, 2, lowering=lowering, **options)
    got = denoised(model, 2, lowering=lowering, cuda_graphs=True, **options)
    assert any(tape is not None for each in session.sessions() for tape in each.tapes.values())
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-9)
