"""Random small models of the standing search: a plain transformer with many switches, and transformers' own."""

from __future__ import annotations

import random
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import models

PLAIN: dict[str, tuple[Any, ...]] = {
    "layers": (1, 2, 3),
    "heads": (2, 4),
    "groups": (1, 2),
    "head_dim": (4, 6),
    "norm": ("pre", "post"),
    "rms": (True, False),
    "bias": (False, True),
    "positions": ("rotary", "learned", "none"),
    "fused": (False, True),
    "attention": ("sdpa", "keywords", "spelled"),
    "gated": (True, False),
    "experts": (0, 3),
    "cond": (None, "vector", "scale", "scalar"),
    "second": (False, True),
    "mix": (None, "layer", "head"),
    "cut": (None, "embed", "layers", "head"),
    "dropout": (0.0, 0.2),
}
"""Values of each switch of :class:`Plain`, the simplest first."""

RARE = {"experts": 0.2, "cond": 0.3, "second": 0.25, "mix": 0.12, "cut": 0.25, "dropout": 0.15, "layers": 0.7}
"""How often a switch is not at its simplest; 0.4 for those not named."""

NAMES = ("llama", "qwen2", "qwen3", "modernbert", "esm", "esm-learned", "roberta")
LONGEST = 40


def draw(rng: random.Random, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """A random model: what :func:`build` takes. Switches and values named in ``without`` are left alone."""
    if rng.random() < 0.3:
        return {"name": rng.choice(NAMES), "seed": rng.randrange(100), "layers": rng.choice((1, 2))}
    chosen: dict[str, Any] = {"name": "plain", "seed": rng.randrange(100)}
    for switch, values in PLAIN.items():
        moved = rng.random() < RARE.get(switch, 0.4)
        value = rng.choice(values[1:]) if moved else values[0]
        chosen[switch] = values[0] if switch in without or value in without else value
    return chosen


def build(spec: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    """The model of a description; what it does not say is at its simplest."""
    name = spec.get("name", "plain")
    if name != "plain":
        return models.build(name, dtype, spec.get("seed", 0), num_hidden_layers=spec.get("layers", 1))
    return Plain({switch: spec.get(switch, values[0]) for switch, values in PLAIN.items()}, spec.get("seed", 0), dtype)


class Rms(nn.Module):
    """Root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Mlp(nn.Module):
    """One hidden layer, gated or not."""

    def __init__(self, width: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 20, bias=bias), nn.Linear(20, width, bias=bias)
        self.gate = nn.Linear(width, 20, bias=bias) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner = F.gelu(self.up(x)) if self.gate is None else F.silu(self.gate(x)) * self.up(x)
        out: torch.Tensor = self.down(inner)
        return out


class Experts(nn.Module):
    """The likeliest of some MLPs for each token, times its probability."""

    def __init__(self, width: int, count: int, gated: bool, bias: bool) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(Mlp(width, gated, bias) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        probability, best = self.router(x).softmax(-1).max(-1, keepdim=True)
        every = torch.stack([expert(x) for expert in self.experts], -1)
        chosen = F.one_hot(best, len(self.experts)).to(x.dtype)
        return probability * (every * chosen).sum(-1)


class Layer(nn.Module):
    """Attention and an MLP, each beside the residual stream."""

    def __init__(self, how: dict[str, Any]) -> None:
        super().__init__()
        self.how = how
        width, size = how["heads"] * how["head_dim"], how["head_dim"]
        inner = width // how["groups"]
        norm = Rms if how["rms"] else nn.LayerNorm
        self.norms = nn.ModuleList([norm(width), norm(width)])
        if how["fused"]:
            self.qkv = nn.Linear(width, width + 2 * inner, bias=how["bias"])
        else:
            self.q = nn.Linear(width, width, bias=how["bias"])
            self.k, self.v = (nn.Linear(width, inner, bias=how["bias"]) for _ in range(2))
        self.o = nn.Linear(width, width, bias=how["bias"])
        experts = how["experts"]
        self.mlp = (
            Experts(width, experts, how["gated"], how["bias"]) if experts else Mlp(width, how["gated"], how["bias"])
        )
        self.cond = nn.Linear(width, width, bias=False) if how["cond"] in ("vector", "scale") else None
        self.time = nn.Parameter(torch.zeros(1, width)) if how["cond"] == "scalar" else None
        self.split, self.size = [width, inner, inner], size

    def attend(self, x: torch.Tensor, turn: Any, seen: torch.Tensor | None) -> torch.Tensor:
        q, k, v = self.qkv(x).split(self.split, -1) if self.how["fused"] else (self.q(x), self.k(x), self.v(x))
        q, k, v = (t.view(*t.shape[:2], -1, self.size).transpose(1, 2) for t in (q, k, v))
        if turn is not None:
            q, k = (t * turn[0] + torch.cat([-t.chunk(2, -1)[1], t.chunk(2, -1)[0]], -1) * turn[1] for t in (q, k))
        k, v = (t.repeat_interleave(self.how["groups"], 1) for t in (k, v))
        if self.how["attention"] == "sdpa":
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        elif self.how["attention"] == "keywords":
            out = F.scaled_dot_product_attention(query=q, key=k, value=v, attn_mask=seen)
        else:
            scores = q @ k.transpose(-1, -2) / self.size**0.5
            scores = scores if seen is None else scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
            out = scores.softmax(-1) @ v
        mixed: torch.Tensor = self.o(out.transpose(1, 2).reshape(x.shape))
        return mixed

    def forward(self, x: torch.Tensor, turn: Any, seen: torch.Tensor | None, cond: torch.Tensor | None) -> torch.Tensor:
        if cond is not None and self.how["cond"] == "scale":
            x = x * (1 + torch.tanh(self.cond(cond)).unsqueeze(1))
        elif cond is not None and self.cond is not None:
            x = x + self.cond(cond).unsqueeze(1)
        elif cond is not None and self.time is not None:
            x = x + cond * self.time
        first, second = self.norms
        if self.how["norm"] == "pre":
            x = x + self._dropped(self.attend(first(x), turn, seen))
            inner = second(x)
            x = x + self._dropped(self.mlp(inner))
        else:
            x = first(x + self._dropped(self.attend(x, turn, seen)))
            x = second(x + self._dropped(self.mlp(x)))
        return x - 0.3 * x.mean(1, keepdim=True) if self.how["mix"] == "layer" else x

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, self.how["dropout"], self.training) if self.how["dropout"] else x


class Plain(nn.Module):
    """Token ids ``[B, S]`` to logits ``[B, S, V]``, or to a pair of them and values ``[B, S, 2]`` of a second head.

    Args:
        how: a value of each switch in :data:`PLAIN`.
        seed: of the weights.
        dtype: of the weights.
    """

    def __init__(self, how: dict[str, Any], seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.how, width = how, how["heads"] * how["head_dim"]
        torch.manual_seed(seed)
        self.embed = nn.Embedding(models.VOCABULARY, width)
        self.place = nn.Embedding(LONGEST, width) if how["positions"] == "learned" else None
        self.layers = nn.ModuleList(Layer(how) for _ in range(how["layers"]))
        self.norm = Rms(width)
        self.head = nn.Linear(width, models.VOCABULARY)
        self.value = nn.Linear(width, 2) if how["second"] else None
        rates = 100.0 ** (-torch.arange(0, how["head_dim"], 2) / how["head_dim"])
        self.register_buffer("rates", torch.cat([rates, rates]))
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.4) if parameter.dim() > 1 else None
        self.to(dtype).eval()

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None = None, cond: torch.Tensor | None = None) -> Any:
        """``mask`` is ``[B, S]``, 0 where a token is hidden; ``cond`` is ``[B, width]``, or one number in a tensor."""
        turn, x = None, self.embed(ids)
        at = torch.arange(ids.shape[1], device=ids.device)
        if self.place is not None:
            x = x + self.place(at)
        if self.how["positions"] == "rotary":
            angles = at[:, None] * self.get_buffer("rates")
            turn = angles.cos(), angles.sin()
        seen = None if mask is None else mask.bool()[:, None, None, :]
        if self.how["cut"] == "embed":
            torch._dynamo.graph_break()
        for layer in self.layers:
            if self.how["cut"] == "layers":
                torch._dynamo.graph_break()
            x = layer(x, turn, seen, cond)
        if self.how["cut"] == "head":
            torch._dynamo.graph_break()
        x = self.norm(x)
        if self.how["mix"] == "head":
            x = x - 0.3 * x.mean(1, keepdim=True)
        return self.head(x) if self.value is None else (self.head(x), self.value(x))
