"""dLLM-Cache on layers of many shapes, step by step beside the method spelled out."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

import dllm_compile

from . import models
from .callers import PROMPT, RESPONSE, TOLERANCE, fill, start, steps
from .models import MASK, VOCABULARY

pytestmark = pytest.mark.usefixtures("no_gradients_no_warnings")

WIDTH, HEADS, LAYERS = 16, 2, 3
OPTIONS = {"prompt_interval": 5, "response_interval": 3, "transfer_ratio": 0.25}


class Features:
    """dLLM-Cache: what is kept of each layer, and the rows that a step computes.

    Args:
        response: ``[B, S]`` bool.
    """

    def __init__(self, response: torch.Tensor) -> None:
        self.response, self.step, self.kept = response, -1, dict[tuple[int, str], torch.Tensor]()

    def begin(self) -> None:
        self.step += 1
        prompt, response = (self.step % OPTIONS[f"{part}_interval"] == 0 for part in ("prompt", "response"))
        self.rows = (~self.response & prompt) | (self.response & response)
        self.values, self.picks = self.rows | self.response, not response

    def value(self, layer: int, new: torch.Tensor) -> torch.Tensor:
        """The values ``[B, S, W]`` of a layer; which of its rows are computed otherwise is chosen by them."""
        self.now = self.rows if layer else torch.ones_like(self.rows)
        if layer and self.picks:
            turned = F.cosine_similarity(new, self.kept[layer, "value"], dim=-1).masked_fill(~self.response, torch.inf)
            count = int(RESPONSE * OPTIONS["transfer_ratio"])
            self.now = self.rows.scatter(1, turned.argsort(1)[:, :count], True)
        return self._joined(layer, "value", new, self.values if layer else self.now)

    def rest(self, layer: int, name: str, new: torch.Tensor) -> torch.Tensor:
        """Keys, or what a branch adds to the stream, ``[B, S, d]``."""
        return self._joined(layer, name, new, self.now)

    def _joined(self, layer: int, name: str, new: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        old = self.kept.get((layer, name), new)
        self.kept[layer, name] = torch.where(rows.unsqueeze(-1), new, old)
        return self.kept[layer, name]


class Layer(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate = torch.nn.Linear(WIDTH, WIDTH)
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(WIDTH) for _ in range(2))
        self.up, self.down = torch.nn.Linear(WIDTH, 24), torch.nn.Linear(24, WIDTH)


class Model(torch.nn.Module):
    """A random denoiser whose layers join attention and MLP as ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.kind, self.features = kind, None
        self.embed, self.places = torch.nn.Embedding(VOCABULARY, WIDTH), torch.nn.Embedding(PROMPT + RESPONSE, WIDTH)
        self.layers = torch.nn.ModuleList(Layer() for _ in range(1 if kind == "shared" else LAYERS))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)
        for each in self.parameters():
            torch.nn.init.normal_(each, mean=0.6 * (each.dim() == 1), std=0.3)

    features: Features | None

    def _kept(self, layer: int, name: str, new: torch.Tensor) -> torch.Tensor:
        return new if self.features is None else self.features.rest(layer, name, new)

    def attend(self, n: int, own: Layer, x: torch.Tensor) -> torch.Tensor:
        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(-1, (HEADS, -1)).transpose(1, 2)

        value = own.v(x) if self.features is None else self.features.value(n, own.v(x))
        key = self._kept(n, "key", own.k(x))
        out = F.scaled_dot_product_attention(heads(own.q(x)), heads(key), heads(value))
        return self._kept(n, "attended", own.o(out.transpose(1, 2).flatten(2)))

    def mix(self, n: int, own: Layer, x: torch.Tensor) -> torch.Tensor:
        return self._kept(n, "mlp", own.down(F.silu(own.up(x))))

    def layer(self, n: int, own: Layer, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        first, second = own.norms
        if self.kind in ("post", "shared"):
            x = first(x + self.attend(n, own, x))
            return second(x + self.mix(n, own, x))
        if self.kind == "gated":
            gate = own.gate(x).sigmoid()
            x = gate * x + (1 - gate) * self.attend(n, own, first(x))
            return x + self.mix(n, own, second(x))
        if self.kind == "parallel":
            normed = first(x)
            return x + self.attend(n, own, normed) + self.mix(n, own, normed)
        if self.kind == "scaled":
            x = first(0.7 * x + 1.3 * self.attend(n, own, x))
            return second(0.7 * x + self.mix(n, own, x))
        told = self.embed(ids).tanh()
        x = x + self.attend(n, own, first(x)) + told
        return x + self.mix(n, own, second(x))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.places.weight[: ids.shape[1]]
        for n in range(LAYERS):
            x = self.layer(n, self.layers[n % len(self.layers)], x, ids)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


@pytest.mark.parametrize("kind", ["post", "shared", "gated", "parallel", "scaled", "told"])
def test_every_step_equals_the_method_spelled_out(kind: str) -> None:
    model, plain = Model(kind).double().eval(), Model(kind).double().eval()
    call, x = models.compiled(model, **OPTIONS), start()
    plain.features = Features(x == MASK)
    approximated = 0.0
    with dllm_compile.loop():
        while bool((x == MASK).any()):
            got = call(x).clone()
            plain.features.begin()
            want, exact = plain(x), model(x)
            assert (got - want)[x == MASK].abs().max() < TOLERANCE
            approximated = max(approximated, float((want - exact)[x == MASK].abs().max()))
            x = fill(exact, x)
    assert approximated > 1e-3
    assert {"full", "response", "select", "prompt+select"} <= steps(model).keys()


def test_a_refresh_that_is_due_at_a_repeated_call_is_that_of_the_next() -> None:
    """A repeated call computes nothing, but counts."""
    model = Model("post").double().eval()
    call, x = models.compiled(model, prompt_interval=100, response_interval=3, transfer_ratio=0.25), start()
    done: list[str] = []
    with dllm_compile.loop():
        for changes in (True, True, False, True, True, True, True):
            before = steps(model) if done else Counter[str]()
            logits = call(x).clone()
            done += (steps(model) - before).keys()
            x = fill(logits, x) if changes else x
    assert done == ["full", "select", "select", "repeat", "response", "select", "response"]
