"""The row before one that is computed, for samplers that read it: no other row comes out otherwise because of it."""

from __future__ import annotations

import random
import warnings
from typing import Any

import pytest
import torch

from .grids import in_turn
from .models import MASK
from .test_properties import Batch, Model, Shape, fresh

pytestmark = pytest.mark.shares_graphs

DUAL: dict[str, Any] = {"cache": "dual"}
PREFIX: dict[str, Any] = {"cache": "prefix"}
DECODED: dict[str, Any] = {"cache": "decoded"}
GREEDY: dict[str, Any] = {"cache": "greedy", "refresh_interval": 4}
SALIENT: dict[str, Any] = {"saliency_threshold": 0.99, "full_steps": 1}
FEATURES: dict[str, Any] = {"prompt_interval": 5, "response_interval": 3}
KEEP: dict[str, Any] = {"keep_ratio": 0.5}

METHODS: dict[str, dict[str, Any]] = {
    "intervals": FEATURES,
    "intervals, kept": {**FEATURES, **KEEP},
    "intervals, salient": {**FEATURES, **SALIENT},
    "intervals, kept, salient": {**FEATURES, **KEEP, **SALIENT},
    "dual": DUAL,
    "dual, intervals": {**DUAL, **FEATURES},
    "dual, kept": {**DUAL, **KEEP},
    "dual, salient": {**DUAL, **SALIENT},
    "dual, kept, salient": {**DUAL, **KEEP, **SALIENT},
    "dual, intervals, salient": {**DUAL, "prompt_interval": 6, **SALIENT},
    "prefix": {**PREFIX, "refresh_interval": 3},
    "prefix, kept": {**PREFIX, **KEEP},
    "prefix, salient": {**PREFIX, **SALIENT},
    "decoded": {**DECODED, "delay": 1, "refresh_interval": 5},
    "decoded, kept": {**DECODED, **KEEP, "refresh_interval": 6},
    "decoded, salient": {**DECODED, **SALIENT},
    "decoded, kept, salient": {**DECODED, **KEEP, **SALIENT},
    "greedy": GREEDY,
    "greedy, salient": {**GREEDY, **SALIENT},
    "salient": SALIENT,
    "salient, whole now and then": {**SALIENT, "whole_interval": 3},
    "salient, always whole": {**SALIENT, "response_only": False},
}


def generation(call: Any, batch: Batch, block: int, edits: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Ids after each step of a sampler that reads the row of each token, and the logits that it read.

    It fills the surest token of the first block with masks, two at every third step, and may rewrite a filled one.
    """
    x, draw = batch.ids(), random.Random(batch.seed)
    ids, read = [], []
    for step in range(batch.response):
        masked = x == MASK
        if not masked.any():
            break
        out = call(x, **batch.extra())
        for row in range(len(x)):
            begin = batch.prompts[row]
            free = masked[row].nonzero()[:, 0].tolist()
            if not free:
                continue
            end = begin + ((free[0] - begin) // block + 1) * block
            free = [at for at in free if at < end]
            read.append(out[row, free].clone())
            sure = out[row, free].softmax(-1).amax(-1)
            for place in sure.topk(min(1 + (step % 3 == 2), len(free))).indices.tolist():
                x[row, free[place]] = out[row, free[place], :MASK].argmax()
            filled = [at for at in range(begin, x.shape[1]) if x[row, at] != MASK]
            if edits and step % 4 == 3 and filled:
                x[row, draw.choice(filled)] = draw.randrange(8, MASK)
        ids.append(x.clone())
    return ids, read


@pytest.mark.parametrize(("method", "count"), in_turn(METHODS, [1, 2]))
def test_a_sampler_that_does_not_read_the_row_before_sees_nothing_of_it(method: str, count: int) -> None:
    seed = 2 * list(METHODS).index(method) + count
    draw = random.Random(seed)
    shape = Shape(layers=2, heads=4, groups=draw.choice([1, 2]), head_dim=4, seed=seed)
    batch = Batch([6] * count, [draw.randint(0, 5) for _ in range(count)], 12, seed)
    block = 4 if METHODS[method].get("cache") in ("dual", "prefix") else 12
    model = Model(shape)

    def played(shift: bool | None) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        own = {"block_length": block} if block < 12 else {}
        return generation(fresh(model, **METHODS[method], **own, shift=shift), batch, block, edits=seed % 3 == 0)

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", "dllm: this loop writes other tokens")
        (ids, read), (want_ids, want_read) = played(None), played(False)
    assert len(ids) == len(want_ids) >= 8  # a step on all rows behind some on the response alone
    for step, (got, want) in enumerate(zip(ids, want_ids, strict=True)):
        assert torch.equal(got, want), f"tokens after step {step}"
    for got, want in zip(read, want_read, strict=True):
        assert (got - want).abs().max() < 1e-9
