"""Every supported architecture: neutral settings equal eager, partial steps really are partial."""

from __future__ import annotations

import warnings
from collections import Counter

import pytest
import torch

from dllm_compile import debug

from . import loops, models
from .grids import in_turn
from .under_way import under_way

pytestmark = pytest.mark.shares_graphs

NEUTRAL = {"prompt_interval": 1, "response_interval": 1}
PARTIAL = {"prompt_interval": 8, "response_interval": 4, "transfer_ratio": 0.5}


def padding(ids: torch.Tensor) -> torch.Tensor:
    """A mask that hides the first tokens of the last sequence."""
    mask = torch.ones_like(ids)
    mask[-1, :3] = 0
    return mask


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("name", "options"), in_turn(models.BUILD, [NEUTRAL, {"method": "exact"}]))
def test_neutral_equals_eager(name: str, options: dict[str, object], padded: bool) -> None:
    model = models.build(name)
    ids = models.start(9, 8)
    extra = {"attention_mask": padding(ids)} if padded else {}
    call = models.compiled_loop(model, **options)
    worst = 0.0

    def logits(x: torch.Tensor) -> torch.Tensor:
        nonlocal worst
        got, want = call(input_ids=x, **extra).logits, model(input_ids=x, **extra).logits
        rows = x == models.MASK
        worst = max(worst, (got - want)[rows].abs().max().item())
        return got

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for _ in loops.llada(logits, ids, 9, steps=8, block_length=4, mask_id=models.MASK):
            pass
    assert worst < (1e-9 if models.dtype_of(name) == torch.float64 else 1e-4)
    assert under_way().number == 7, "no session saw the eight steps"


@pytest.mark.parametrize("name", models.BUILD)
def test_partial_steps_run_and_stay_close(name: str) -> None:
    model = models.build(name)
    ids = models.start(9, 8)
    call = models.compiled_loop(model, **PARTIAL)

    def logits(x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = call(input_ids=x).logits
        return out

    with torch.no_grad(), warnings.catch_warnings(), debug.steps() as ran:
        warnings.simplefilter("error", UserWarning)
        for _ in loops.llada(logits, ids, 9, steps=8, block_length=8, mask_id=models.MASK):
            pass
    session = under_way(7)
    assert session.stats.steps == {"full": 1, "select": 6, "response": 1} == Counter(each.name for each in ran)
    assert len(session.layers) == 2  # of three: the first is computed at every step
    assert all(each.selected.keys() == ({1, 2} if each.name == "select" else set()) for each in ran)
