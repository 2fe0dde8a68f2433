"""Fresh compiler state for every test."""

from __future__ import annotations

import os

import pytest
import torch

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each worker of pytest compiles: no pool beside it
os.environ["DLLM_DEBUG"] = "1"  # what fails in the compiler fails the test
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    """Dynamo keeps at most a few graphs a function, shared by all models of a class."""
    torch._dynamo.reset()


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial steps are recorded and replayed as on CUDA, with as few kinds of calls as a small response has."""
    from dllm_compile import session

    from . import recorded_calls

    monkeypatch.setattr(session, "MULTIPLE", 4)
    recorded_calls.stand_in(monkeypatch)
