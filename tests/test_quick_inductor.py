"""Kernels that are compiled together are those that are compiled alone."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.codecache import CppPythonBindingsCodeCache

from . import quick_inductor


@pytest.mark.skipif(not quick_inductor.WRITTEN_FOR, reason="written for the Inductor of torch 2.13")
@pytest.mark.parametrize("refused", [False, True])
def test_kernels_of_a_graph_are_compiled_together_or_else_alone(refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone if the compiler refuses the file of all, whose kernels are called by other names."""
    alone, real = [], CppPythonBindingsCodeCache.load_pybinding
    monkeypatch.setattr(quick_inductor, "_COMPILED", {})
    monkeypatch.setattr(
        CppPythonBindingsCodeCache, "load_pybinding", lambda *kernel: alone.append(kernel) or real(*kernel)
    )
    if refused:
        monkeypatch.setattr(quick_inductor, "joined", lambda files: "refuse this")
    x = torch.randn(3, 5, dtype=torch.float64)
    function = lambda x: (x.sin() @ x.mT).cos() - 7  # noqa: E731
    torch.testing.assert_close(torch.compile(function)(x), function(x))
    assert len(quick_inductor._COMPILED) == 2
    assert len(alone) == (2 if refused else 0)
