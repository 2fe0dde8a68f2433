"""A method that measures each layer and decides about those behind it, against the same in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import dllm_compile
from dllm_compile import Mechanism
from dllm_compile.mechanisms import register, tables, unregister

from . import shared
from .models import MASK, VOCABULARY
from .test_properties import EXAMPLES, Model, Shape, turned

pytestmark = [pytest.mark.shares_graphs, pytest.mark.usefixtures("no_gradients_no_warnings")]
PROMPT, RESPONSE = 5, 6
TOKENS = PROMPT + RESPONSE


@pytest.fixture(autouse=True, scope="module")
def elastic() -> Iterator[Mechanism]:
    """The example's mechanism."""
    from examples.elastic import ELASTIC

    yield register(ELASTIC)
    for name in tables().registered:
        unregister(name)


class Plain:
    """Elastic-Cache of one sequence, with its state in plain sight.

    Attributes:
        logits: ``[S, V]``; rows that a step does not compute keep theirs.
        restarted: of each step, the layers behind which every row was computed.
    """

    def __init__(self, model: Model, beta: int, gamma: float) -> None:
        self.model, self.beta, self.gamma = model, beta, gamma
        layers, shape = len(model.layers), model.layers[0].shape
        self.shape = shape
        heads = shape.heads // shape.groups
        self.keys, self.values = (torch.zeros(layers, TOKENS, heads, shape.head_dim).double() for _ in range(2))
        self.streams = torch.zeros(layers, TOKENS, shape.width).double()
        self.tracked: list[int] = []
        self.gets: list[dict[int, float]] = []
        self.logits = torch.zeros(TOKENS, VOCABULARY).double()
        self.restarted: list[list[int]] = []

    def step(self, ids: torch.Tensor, filled: list[int]) -> None:
        """One forward call with ids ``[S]``."""
        masks = (ids == MASK).nonzero().flatten().tolist()
        every = list(range(TOKENS))
        rows = sorted({*masks[: self.beta], *filled, *self.tracked}) if self.tracked else every
        x, tracked, gets = self.model.embed(ids[rows]), list[int](), list[dict[int, float]]()
        self.restarted.append([])
        for number, layer in enumerate(self.model.layers):
            x, weights = self._layer(number, layer, x, rows)
            self.streams[number][rows] = x
            drifted = False
            if self.gets:
                token, before = self.tracked[number], self.gets[number]
                both = [(float(weights[i, token]), before[row]) for i, row in enumerate(rows) if row in before]
                now, old = torch.tensor(both, dtype=torch.float64).reshape(-1, 2).T
                drifted = bool(both) and bool(F.cosine_similarity(now, old, 0) < self.gamma)
            tracked.append(int(weights.sum(0).argmax()))
            gets.append({row: float(weights[i, tracked[-1]]) for i, row in enumerate(rows)})
            if drifted and rows != every:
                rows, x = every, self.streams[number]
                self.restarted[-1].append(number)
        self.tracked, self.gets = tracked, gets
        self.logits[rows] = self.model.head(self.model.norm(x))

    def _layer(self, number: int, layer: Any, x: torch.Tensor, rows: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        angles = torch.tensor(rows)[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a = layer.norm_a(x)
        q, k, v = (to(a).unflatten(-1, (-1, self.shape.head_dim)) for to in (layer.q, layer.k, layer.v))
        self.keys[number][rows], self.values[number][rows] = turned(k, cos, sin), v
        keys, values = (t[number].repeat_interleave(self.shape.groups, 1) for t in (self.keys, self.values))
        scores = torch.einsum("rhd,lhd->hrl", turned(q, cos, sin), keys) / self.shape.head_dim**0.5
        weights = scores.softmax(-1)
        x = x + layer.o(torch.einsum("hrl,lhd->rhd", weights, values).flatten(1))
        m = layer.norm_m(x)
        return x + layer.down(F.silu(layer.gate(m)) * layer.up(m)), weights.mean(0)


def follow(model: Model, beta: int, gamma: float, seed: int, lowering: str = "eager") -> list[list[int]]:
    """Run a loop on the backend and in plain sight; returns the layers behind which every row was computed."""
    ids = torch.randint(0, VOCABULARY - 1, (1, TOKENS), generator=torch.Generator().manual_seed(seed))
    ids[ids == MASK] = 0
    ids[:, PROMPT:] = MASK
    options = {"method": "elastic-cache", "beta": beta, "gamma": gamma}
    call = shared.compiled(model, lowering=lowering, mask_id=MASK, shift=False, **options)
    plain, filled, loop = Plain(model, beta, gamma), list[int](), dllm_compile.loop()
    for _ in range(RESPONSE):
        with loop:
            got = call(ids)
        plain.step(ids[0], filled)
        masked = ids[0] == MASK
        torch.testing.assert_close(got[0][masked], plain.logits[masked], rtol=1e-9, atol=1e-9)
        best = torch.where(masked, plain.logits.softmax(-1).amax(-1), -1.0).argmax()
        token = plain.logits[best].clone()
        token[MASK] = -torch.inf
        ids, filled = ids.clone(), [int(best)]
        ids[0, best] = token.argmax()
    assert dllm_compile.stats(model)["refreshes"].get("after_layer", 0) == sum(map(len, plain.restarted))
    return plain.restarted


@EXAMPLES
@given(beta=st.integers(1, 7), gamma=st.sampled_from([-1.0, 0.9, 0.97, 0.999, 1.01]), seed=st.integers(0, 99))
def test_every_step_equals_the_method_spelled_out(beta: int, gamma: float, seed: int) -> None:
    restarted = follow(Model(Shape(3, 2, 2, 4, seed=seed % 3)), beta, gamma, seed)
    assert restarted[0] == []
    assert gamma > -1 or not any(restarted)
    assert gamma <= 1 or all(step == [0] for step in restarted[1:] if step)


def test_some_steps_restart_in_the_middle_of_the_model() -> None:
    steps = [step for seed in range(4) for step in follow(Model(Shape(3, 2, 1, 4, seed)), 2, 0.97, seed)]
    assert {0, 1} <= {layer for step in steps for layer in step}


def test_it_equals_the_method_spelled_out_under_inductor() -> None:
    assert any(follow(Model(Shape(3, 2, 1, 4, 0)), 2, 0.97, 0, "inductor"))


class Broken(Model):
    """Its graph breaks before each layer."""

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        angles = torch.arange(ids.shape[1])[:, None] * self.get_buffer("rates")
        x = self.embed(ids)
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x, angles.cos(), angles.sin(), None)
        torch._dynamo.graph_break()
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.filterwarnings("ignore:dllm. a graph broke")
def test_a_model_that_is_traced_layer_by_layer_restarts_in_its_middle() -> None:
    restarted = follow(Broken(Shape(3, 2, 1, 4, 0)), 2, 0.97, 0)
    assert {0, 1} <= {layer for step in restarted for layer in step}


def test_its_neutral_setting_equals_eager(elastic: Mechanism) -> None:
    model = Model(Shape(2, 2, 1, 4, seed=1))
    ids = torch.tensor([[1, 2, 3, MASK, MASK, MASK], [3, 2, 1, MASK, MASK, MASK]])
    call = shared.compiled(model, lowering="eager", mask_id=MASK, **dict(elastic.neutral or {}))
    for at in (3, 4):
        torch.testing.assert_close(call(ids), model(ids))
        ids = ids.clone()
        ids[:, at] = 2


def test_sequences_that_drift_take_the_others_along() -> None:
    """One sequence of a batch is enough for all to compute every row, which is closer to eager and never further."""
    model = Model(Shape(3, 2, 1, 4, seed=0))
    ids = torch.randint(0, MASK, (3, TOKENS), generator=torch.Generator().manual_seed(5))
    ids[:, PROMPT:] = MASK
    call = shared.compiled(model, lowering="eager", mask_id=MASK, method="elastic-cache", beta=2, gamma=0.97)
    with dllm_compile.loop():
        for at in range(PROMPT, TOKENS):
            got = call(ids)
            assert bool(torch.isfinite(got).all())
            ids = ids.clone()
            ids[:, at] = got[:, at, :MASK].argmax(-1)
    assert not (ids == MASK).any()


@pytest.mark.parametrize("beside", [{"keep_ratio": 0.5}, {"saliency_threshold": 0.9}], ids=str)
def test_it_is_refused_beside_what_keeps_no_whole_layers(beside: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=r"cache 'elastic' measures whole layers .* leave out one of them"):
        dllm_compile.Options(method="elastic-cache", **beside)


@pytest.mark.parametrize(("option", "value"), [("beta", 0), ("gamma", 2.0), ("gamma", "high")])
def test_its_options_are_checked(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{option} is {value!r}; give "):
        dllm_compile.Options(**{"method": "elastic-cache", option: value})


def test_explain_shows_it() -> None:
    model = Model(Shape(2, 2, 1, 4, seed=1))
    ids = torch.tensor([[1, 2, 3, MASK, MASK, MASK]])
    found = str(dllm_compile.explain(model, ids, method="elastic-cache", mask_id=MASK))
    assert "behind each layer: attention_weights" in found
