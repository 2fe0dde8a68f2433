"""What Inductor is given, and what it makes of graphs that write to the rows kept."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch._functorch import config as functorch_config
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.graph_module import _format_import_statement
from torch.package.importer import sys_importer

from dllm_compile import compat
from dllm_compile.core.layout import Factor
from dllm_compile.core.rows import changed_rows, merge_rows
from dllm_compile.debug import compiling
from dllm_compile.runtime import lower as lower_module
from dllm_compile.runtime import unit_code
from dllm_compile.runtime.lower import lower

from . import models
from .callers import METHODS, PARTIAL, fill, start
from .kernel_runs import buffers

ROWS, WIDTH, FRESH = 96, 64, 8
LAYOUT = ((Factor("B", 1),), (Factor("T", ROWS),), (Factor("", WIDTH),))


def corrected(state: torch.Tensor, index: torch.Tensor, fresh: torch.Tensor) -> tuple[torch.Tensor]:
    """As a layer with saliency does: how far rows moved is read before they are overwritten, and used after."""
    change = changed_rows(state, index, fresh, LAYOUT)
    rows = merge_rows(state, index, fresh, LAYOUT)
    weights = torch.softmax(rows @ rows.mT, -1)
    return (weights[:, :, :FRESH] @ change,)


def test_rows_that_are_read_before_they_are_overwritten_are_not_copied() -> None:
    state, fresh = torch.randn(1, ROWS + 1, WIDTH), torch.randn(1, FRESH, WIDTH)
    index = torch.arange(3, 3 + FRESH).unsqueeze(0)
    for writes in (True, False):
        args, want = [state.clone(), index, fresh], state.clone()
        module = make_fx(corrected)(state.clone(), index, fresh)
        with functorch_config.patch(enable_autograd_cache=False), inductor_config.patch(fx_graph_cache=False):
            made, (code,) = run_and_get_code(lower, module, args, "inductor", (), writes)
        (got,) = made.run(*args)
        (expected,) = corrected(want, index, fresh)
        torch.testing.assert_close(got, expected)
        assert torch.equal(args[0], want)
        assert ((ROWS + 1) * WIDTH in buffers(code)) == (not writes)


@pytest.mark.parametrize("name", METHODS)
def test_pytorch_keeps_the_graphs_of_every_method_on_disk(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All functions that they call are found by their names. Where one is not, PyTorch traces the graph again in every
    process, and says nothing.
    """
    made: dict[str, torch.fx.GraphModule] = {}

    def noted(unit: str, variant: str) -> Any:
        names.append(variant)
        return real(unit, variant)

    def lowered(module: torch.fx.GraphModule, *more: Any) -> Any:
        made[names[-1]] = module
        return lower(module, *more)

    names, real = list[str](), compiling
    monkeypatch.setattr(unit_code, "compiling", noted)
    monkeypatch.setattr(unit_code, "lower", lowered)
    model, x = models.build("llama"), start()
    call = models.compiled_loop(model, **METHODS[name])
    with torch.no_grad():
        for _ in range(6):
            x = fill(call(x).logits, x)
    assert made.keys() & PARTIAL
    for module in made.values():
        ours = lower_module._made_cacheable(module, torch.device("cpu"))
        with inductor_config.patch(unsafe_marked_cacheable_functions=ours):
            check_cacheable(module)
        for called, function in module.recompile().globals.items():
            _format_import_statement(called, function, sys_importer)


@pytest.mark.parametrize("decided", [None, True, False])
def test_vector_instructions_are_those_that_the_processor_names(decided: bool | None) -> None:
    """Inductor compiles no file of its own to see whether the compiler has them, unless the user wants it to."""
    seen: list[bool | None] = []

    def noted(module: torch.fx.GraphModule, *_: Any, **__: Any) -> torch.fx.GraphModule:
        seen.append(inductor_config.cpp.vec_isa_ok)
        return module

    module, args = make_fx(lambda x: (x + 1,))(torch.ones(3)), [torch.ones(3)]
    with inductor_config.patch({"cpp.vec_isa_ok": decided}), mock.patch.object(compat, "compile_fx", noted):
        lower(module, args, "inductor")
        assert inductor_config.cpp.vec_isa_ok is decided
    assert seen == [decided is not False]
