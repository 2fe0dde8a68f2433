"""What Inductor makes of graphs that write to the rows kept."""

from __future__ import annotations

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import run_and_get_code
from torch.fx.experimental.proxy_tensor import make_fx

from dllm_compile.core.layout import Factor
from dllm_compile.core.rows import changed_rows, merge_rows
from dllm_compile.runtime.lower import lower

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
