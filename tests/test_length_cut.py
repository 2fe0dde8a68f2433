"""ODB-dLLM's length prediction: a response ends with the block of a mask far ahead that is surely its end."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dllm_compile
from dllm_compile import Confidences
from dllm_compile.passes import length_cut
from dllm_compile.passes.falling_threshold import falling
from dllm_compile.passes.length_cut import sure_ends
from dllm_compile.sampler.step import ending

from . import models
from .models import MASK
from .streaming_model import generated
from .test_properties import Model, Shape

pytestmark = pytest.mark.usefixtures("no_gradients_no_warnings")
PROMPT, RESPONSE, BLOCK, AHEAD = 4, 30, 6, 12
END, SURE = 51, 0.3


def build(seed: int = 1) -> Model:
    """One that takes token ``END`` for likely, with ``SURE``, from the fourth block on."""
    model = Model(Shape(layers=2, heads=4, groups=2, head_dim=4, seed=seed))
    model.head.weight.data.mul_(2)
    return model


def run(model: Model, prompt: torch.Tensor, **more: Any) -> Any:
    given: dict[str, Any] = {"gen_length": RESPONSE, "block_length": BLOCK, "mask_id": MASK, "shift": False}
    given |= {"lowering": "eager", "threshold": 0.6, "eos_id": END, "output_history": True, **more}
    return dllm_compile.generate(model, prompt, **given)


@pytest.fixture(autouse=True)
def _ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(length_cut, "AHEAD", AHEAD)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_every_step_is_that_of_a_plain_sampler(cache: str) -> None:
    """Which computes what is left, from the second step of the first block on; with a threshold that falls, too."""
    model, ids = build(), models.start(PROMPT, RESPONSE, 1)
    plain = partial(generated, model, ids[0], PROMPT, BLOCK, None, cache == "dual", 0.6, 0.4, END)
    want, whole = plain(SURE, AHEAD), plain()
    got = run(model, ids[:, :PROMPT], cache=cache, length_cut=SURE, threshold_fall=0.4)
    assert torch.equal(got.history[1:, 0], torch.stack(want))
    assert len(want) < len(whole)
    assert not torch.equal(want[-1], whole[-1])
    assert (want[-1][PROMPT + 4 * BLOCK :] == END).all()
    stats = dllm_compile.stats(model)
    assert stats["rows"]["present"] == sum(PROMPT + 4 * BLOCK for _ in range(stats["steps"]["present"]))
    assert stats["steps"]["full"] == 1  # the one that found the end


@pytest.mark.parametrize(
    "beside",
    [
        {"cache": "prefix", "suffix_window": 7, "threshold_fall": 0.3},
        {"cache": "dual", "keep_ratio": 0.5},
        {"cache": "prefix", "saliency_threshold": 0.9, "full_steps": 1},
        {"cache": "decoded", "refresh_interval": 4},
        {"cache": "dual", "top_k": 3, "remasking": "maskgit_plus"},
    ],
    ids=str,
)
def test_sequences_of_a_batch_end_where_they_do_alone(beside: dict[str, Any]) -> None:
    """With ``keep_ratio`` the sequences refresh together, so that only what is behind is compared."""
    model, prompt = build(), models.start(PROMPT, RESPONSE, 3, 2)[:, :PROMPT]
    together = run(model, prompt, length_cut=SURE, **beside).sequences
    assert not (together == MASK).any()
    for row in range(3):
        alone = run(model, prompt[row : row + 1], length_cut=SURE, **beside).sequences[0]
        if "keep_ratio" not in beside:
            assert torch.equal(alone, together[row])


def test_what_decides_is_compiled_to_what_it_says() -> None:
    """By Inductor, in one graph: the ends of two sequences, and a threshold that falls."""
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 64, 17, generator=generator)
    masked, block = torch.rand(2, 64, generator=generator) < 0.7, torch.zeros(2, 64, dtype=torch.bool)
    block[0, 8:16], block[1, 24:32] = True, True
    told = SimpleNamespace(length_cut=0.2, threshold_fall=0.3, suffix_window=9)

    def decide(logits: torch.Tensor, masked: torch.Tensor, block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rule = lambda sure, c, m, b: sure_ends(Confidences(sure, c, m, told, b))  # noqa: E731
        found = ending(logits, masked, (3, 5), rule, block)
        bound = torch.full_like(logits[:, :1, 0], 0.9)
        return found, falling(Confidences(logits[..., 0], masked, masked, told, block, bound))

    want, got = decide(logits, masked, block), torch.compile(decide, fullgraph=True)(logits, masked, block)
    assert want[0].any()
    assert torch.equal(got[0], want[0])
    torch.testing.assert_close(got[1], want[1])


def test_nobody_is_as_sure_as_that() -> None:
    model, prompt = build(), models.start(PROMPT, RESPONSE, 2)[:, :PROMPT]
    a, b = (run(model, prompt, cache="dual", **more) for more in ({"length_cut": 1.0}, {}))
    assert torch.equal(a.history, b.history)


def test_the_first_positions_from_a_block_on_are_not_looked_at() -> None:
    masked, block = torch.ones(2, 40, dtype=torch.bool), torch.zeros(2, 40, dtype=torch.bool)
    block[0, 4:10], block[1, 16:22] = True, True
    found = torch.zeros_like(masked)
    found[:, [3, 15, 16, 27, 28, 39]] = True
    sure = torch.where(found, torch.tensor([0.9] * 28 + [0.8] * 11 + [0.95]), -torch.inf)
    told = dllm_compile.Options(length_cut=0.9, cache="dual")
    got = sure_ends(Confidences(sure, found, masked, told, block))
    assert [row.nonzero()[:, 0].tolist() for row in got] == [[16, 27, 39], [39]]


def test_it_needs_an_end_and_a_cache() -> None:
    model, prompt = build(), models.start(PROMPT, RESPONSE, 1)[:, :PROMPT]
    with pytest.raises(
        ValueError, match="length_cut looks for the end of a response, and no token is known to end one"
    ):
        run(model, prompt, length_cut=0.9, cache="dual", eos_id=None)
    with pytest.raises(
        ValueError, match=r"length_cut is 0\.9, which leaves out what is behind a block, and there is no"
    ):
        run(model, prompt, length_cut=0.9)
    with pytest.raises(
        ValueError, match=r"length_cut is 0\.9, by which the mechanism 'length-cut' decides which tokens"
    ):
        torch.compile(model, backend="dllm", options={"length_cut": 0.9, "cache": "dual", "mask_id": MASK})(prompt)
    for option in ("length_cut", "threshold_fall"):
        with pytest.raises(ValueError, match=f"{option} .* sliding ones .*; leave out one of them"):
            dllm_compile.Options(**{option: 0.5}, cache="dual", sliding="greedy")
