"""Fresh compiler state for every test."""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch._logging._internal import trace_log

import dllm_compile

from . import quick_inductor, shared

os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # each worker of pytest compiles: no pool beside it
os.environ["DLLM_DEBUG"] = "1"  # what fails in the compiler fails the test
torch.set_num_threads(1)  # the models are tiny: a second thread costs more than it brings


quick_inductor.begin()


def _unheard() -> None:
    """Pytest listens to logs that are heard nowhere else; PyTorch writes each graph to this one if anybody listens."""
    trace_log.propagate = True


_unheard()  # for the session; and for each test, as tests that set logs undo it


@pytest.fixture(scope="session", autouse=True)
def _imports_stay() -> Iterator[None]:
    """What is imported is never garbage: the collector need not walk through it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _fresh_compiler(request: pytest.FixtureRequest) -> Iterator[None]:
    """Dynamo keeps at most a few graphs a function, shared by all models of a class; see :mod:`tests.shared`."""
    _unheard()
    shares = [request.module.__name__] if request.node.get_closest_marker("shares_graphs") else []
    if not shares or shares != shared.MODULES:
        torch._dynamo.reset()
    dllm_compile.reset()
    shared.MODULES[:] = shares
    with torch._dynamo.config.patch(**(ANY_NUMBER if shares else {})):
        yield


ANY_NUMBER = {"recompile_limit": 1000, "accumulated_recompile_limit": 10000}


@pytest.fixture
def no_gradients_no_warnings() -> Iterator[None]:
    """No gradients, and no warning but of a break that the test's own model makes."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: a graph broke at ")
        yield


@pytest.fixture
def generate_shares_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a file that is marked ``shares_graphs``, see :func:`tests.shared.steps_of_generate`."""
    shared.steps_of_generate(monkeypatch)


LONG = "test_lowering", "test_numerics", "test_tensor_parallel", "test_commands"
"""Files with tests that take long: the last of them to begin would run while other workers have nothing to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first; each file stays together."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> None:
    """Partial steps are recorded and replayed as on CUDA, with as few kinds of calls as a small response has."""
    from dllm_compile.runtime import next_step

    from . import recorded_calls

    monkeypatch.setattr(next_step, "MULTIPLE", 4)
    recorded_calls.stand_in(monkeypatch)
