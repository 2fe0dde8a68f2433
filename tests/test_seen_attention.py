"""What is not seen to be attention is said, with the call where rows meet, by a loop and by ``generate``."""

from __future__ import annotations

import warnings

import pytest
import torch

import dllm_compile

from . import models
from .callers import RESPONSE, fill, start

CACHED = {"mask_id": models.MASK, "lowering": "eager", "cache": "dual", "block_length": 4}


class Blended(torch.nn.Module):
    """Rows meet in a mean, which is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(models.VOCABULARY, 8)
        self.head = torch.nn.Linear(8, models.VOCABULARY)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits ``[B, S, V]``."""
        x = self.embed(ids)
        logits: torch.Tensor = self.head(x + x.cumsum(1).flip(1))
        return logits


def told(run: object) -> list[str]:
    """Warnings of this package while ``run`` is called."""
    assert callable(run)
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [str(each.message) for each in found if str(each.message).startswith("dllm")]


@pytest.mark.parametrize("how", ["loop", "generate"])
def test_where_rows_meet_is_named_once(how: str) -> None:
    model = Blended().double().eval()

    def loop() -> None:
        call, x = torch.compile(model, backend="dllm", options=CACHED), start()
        for _ in range(3):
            x = fill(call(x), x)

    def generate() -> None:
        more = {name: value for name, value in CACHED.items() if name != "mask_id"}
        dllm_compile.generate(model, start()[:, :-RESPONSE], gen_length=RESPONSE, steps=4, mask_id=models.MASK, **more)

    said, *more = told(loop if how == "loop" else generate)
    assert not more
    assert "computes every row at every step: rows of its graph meet where no attention is seen (at node" in said
    assert "cumsum" in said
