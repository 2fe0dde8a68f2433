"""Read the recorded models and traces under ``tests/golden``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open

from dllm_compile.runtime.graph_call import GraphCall
from dllm_compile.runtime.step import Step

FOLDER = Path(__file__).parent / "golden"
CONFIGS = {"LlamaForCausalLM": "LlamaConfig", "Qwen2ForCausalLM": "Qwen2Config"}


@dataclass
class Trace:
    """One recorded generation: see the README of the recordings for the tensors."""

    name: str
    meta: dict[str, str]
    tensors: dict[str, torch.Tensor]

    @property
    def settings(self) -> dict[str, Any]:
        return dict(json.loads(self.meta["hyperparameters"]))

    @property
    def mask_id(self) -> int:
        return int(self.meta["mask_token_id"])


def computed(step: Step, tokens: int) -> torch.Tensor:
    """Rows ``[S]`` bool of the first sequence that a step computes."""
    rows = {"full": "all", "response": "response"}.get(step.assignment.name, "active")
    if rows == "all":
        return torch.ones(tokens, dtype=torch.bool)
    index = step.indices[rows][0]
    return torch.zeros(tokens, dtype=torch.bool).index_fill(0, index[index < tokens].cpu(), True)


Salient = dict[int, list[torch.Tensor]]
"""Rows ``[S]`` bool of the first sequence that each layer found salient, by the number of the step."""


def noted_salient(monkeypatch: pytest.MonkeyPatch) -> Salient:
    """Filled by the steps that run from now on; rows that are computed for samplers alone are left out."""
    seen: Salient = {}
    take = GraphCall._take_salient

    def noted(call: Any, *given: Any) -> None:
        take(call, *given)
        step = call.step
        places, stored = step.indices["salient"][0], step.indices["stored"][0]
        at = stored[places[places < len(stored)]]
        tokens = step.shape[1]
        found = torch.zeros(tokens, dtype=torch.bool).index_fill(0, at[at < tokens], True)
        seen.setdefault(step.number, []).append(found)

    monkeypatch.setattr(GraphCall, "_take_salient", noted)
    return seen


def check_salient(trace: Trace, salient: Salient, step: int) -> None:
    """The salient rows of a step, of which a full one has none."""
    want = trace.tensors["salient"][step]
    got = salient.get(step, [])
    if (want == 255).all():
        assert not got, f"step {step} is a full one"
        return
    assert len(got) == len(want)
    for layer, rows in enumerate(got):
        assert torch.equal(rows, want[layer].bool()), f"salient rows at step {step} in layer {layer}"


def names(prefix: str) -> list[str]:
    """Traces whose name begins with ``prefix``."""
    return sorted(path.stem for path in FOLDER.glob(f"{prefix}__*.safetensors"))


def trace(name: str) -> Trace:
    """Read one trace."""
    with safe_open(FOLDER / f"{name}.safetensors", "pt") as file:
        return Trace(name, file.metadata(), {key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118


def model(name: str) -> torch.nn.Module:
    """A recorded model in float64, bidirectional."""
    with safe_open(FOLDER / "weights" / f"{name}.safetensors", "pt") as file:
        meta = file.metadata()
        weights = {key: file.get_tensor(key).double() for key in file.keys()}  # noqa: SIM118
    config = getattr(transformers, CONFIGS[meta["class"]])(**json.loads(meta["config"]))
    built = getattr(transformers, meta["class"])(config).double().eval()
    built.load_state_dict(weights)
    return built
