"""Kernels that are compiled in one file are those that are compiled alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import clear_caches, fresh_cache
from torch.fx.experimental.proxy_tensor import make_fx

from dllm_compile import compat
from dllm_compile.runtime import one_file
from dllm_compile.runtime.lower import lower

KERNELS = 4


def in_turns(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor]:
    """Products, which Inductor leaves to a library, with a kernel before each and behind the last."""
    for i in range(KERNELS - 1):
        x = torch.softmax((x.sin() * (i + 2)) @ weight, -1) + i
    return (x,)


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Inductor's, empty, in a process that has no kernel yet, and two threads to compile with."""
    monkeypatch.setattr(one_file, "_KEPT", {})
    monkeypatch.setattr(compat, "get_compile_threads", lambda: 2)
    with fresh_cache():
        yield Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])


def files(folder: Path) -> int:
    return len([*folder.rglob("*.main.cpp")])


def check() -> None:
    args = torch.randn(5, 7, dtype=torch.float64), torch.randn(7, 7, dtype=torch.float64)
    code = lower(make_fx(in_turns)(*args), args, "inductor")
    torch.testing.assert_close(code.run(*args), in_turns(*args))


@pytest.mark.parametrize(("enough", "expected"), [(40_000, 1), (1, 2)])
def test_kernels_of_a_graph_are_in_one_file_or_in_as_many_as_there_are_threads(
    enough: int, expected: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = compat.AsyncCompile.cpp_pybinding
    monkeypatch.setattr(one_file, "ENOUGH", enough)
    check()
    assert files(folder) == expected
    clear_caches()
    one_file._KEPT.clear()
    check()  # from disk
    assert files(folder) == expected
    assert compat.AsyncCompile.cpp_pybinding is before


def test_kernels_whose_file_the_compiler_refuses_are_compiled_alone(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = one_file.in_one
    monkeypatch.setattr(one_file, "in_one", lambda each: real(each) if len(each) == 1 else "refuse this")
    check()
    assert files(folder) == 1 + KERNELS


def test_code_that_defines_names_for_the_preprocessor_is_a_file_of_its_own(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what it defines would be read into the next kernel."""
    with one_file.joined():
        own = compat.AsyncCompile()
        kernels = [
            own.cpp_pybinding(["double*"], f'{define}\nextern "C" void kernel(double* x) {{ *x += {add}; }}')
            for define, add in (("", 1), ("#define MORE 2", "MORE"), ("", 4), ("", 8))
        ]
    x = torch.zeros(1, dtype=torch.float64)
    for each in kernels:
        each.result()(x)
    assert x.item() == 15
    assert files(folder) == 2
