"""Mixtures of experts written as published models write them: their blocks, or their attention, break a graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from torch.torch_version import TorchVersion

from .models import VOCABULARY

WIDTH, HEADS, EXPERTS, CHOSEN, LAYERS = 32, 4, 5, 2, 3


class Expert(torch.nn.Module):
    """A gated MLP on rows ``[n, d]``."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (torch.nn.Linear(WIDTH, 24, bias=False) for _ in range(2))
        self.down = torch.nn.Linear(24, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return out


class Mixture(torch.nn.Module):
    """A router and experts; how rows come to their experts is for each of the classes below."""

    def __init__(self) -> None:
        super().__init__()
        self.router = torch.nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = torch.nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: torch.Tensor) -> Any:
        rows = x.reshape(-1, WIDTH)
        scores = self.router(rows)
        shares, chosen = scores.softmax(-1).topk(CHOSEN, -1)
        return self.given_back(self.mixed(rows, shares, chosen).view_as(x), scores)

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out


class ByWhere(Mixture):
    """Looks up the rows of each expert in turn, and returns the scores beside: ``[B, S, d]`` and ``[B S, experts]``."""

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            row, place = torch.where(chosen == number)
            out.index_add_(0, row, expert(rows[row]) * shares[row, place, None])
        return out

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        return out, scores


class BySplit(Mixture):
    """Sorts the rows by their experts, and splits them by counts that it reads; returns what was chosen, too."""

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=EXPERTS).tolist()
        parts = rows[order // CHOSEN].split(counts)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        back = torch.empty_like(done)
        back[order] = done
        return (back.view(*shares.shape, WIDTH) * shares[..., None]).sum(1)

    def given_back(self, out: torch.Tensor, scores: torch.Tensor) -> Any:
        sequences = out.shape[0]
        return out, (scores.view(sequences, -1, EXPERTS), None, scores.argmax(-1).view(sequences, -1))


class ByItem(Mixture):
    """The same, number by number through ``item()``, and the block returns a tensor alone."""

    def mixed(self, rows: torch.Tensor, shares: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            here = chosen == number
            if here.sum().item() > 0:
                hit = here.any(-1)
                out[hit] += expert(rows[hit]) * (shares * here).sum(-1, keepdim=True)[hit]
        return out


class Attends(torch.nn.Module):
    """Attention over all tokens; ``looks`` into the names of its own attributes, as ``dir`` gives them."""

    def __init__(self, looks: bool, normed: bool) -> None:
        super().__init__()
        self.qkv, self.out = torch.nn.Linear(WIDTH, 3 * WIDTH), torch.nn.Linear(WIDTH, WIDTH)
        self.looks = looks
        if normed:
            self.q_norm = torch.nn.LayerNorm(WIDTH // HEADS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if self.looks and "q_norm" in dir(self):
            q = self.q_norm(q)
        out: torch.Tensor = self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Layer(torch.nn.Module):
    """Norms, attention, and a block."""

    def __init__(self, block: torch.nn.Module, looks: bool, normed: bool) -> None:
        super().__init__()
        self.norm_a, self.norm_m = torch.nn.LayerNorm(WIDTH), torch.nn.LayerNorm(WIDTH)
        self.attends, self.block = Attends(looks, normed), block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attends(self.norm_a(x))
        given = self.block(self.norm_m(x))
        return x + (given[0] if isinstance(given, tuple) else given)


class Model(torch.nn.Module):
    """Embedding, layers, norm, head."""

    def __init__(self, block: type[torch.nn.Module], looks: bool = False, normed: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.layers = torch.nn.ModuleList(Layer(block(), looks, normed) for _ in range(LAYERS))
        self.norm, self.head = torch.nn.LayerNorm(WIDTH), torch.nn.Linear(WIDTH, VOCABULARY)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.25) if parameter.dim() > 1 else None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(self.norm(x))
        return logits


TRACES_DIR = TorchVersion(torch.__version__) >= "2.13"
"""Before, Dynamo iterates over no attributes of a module."""
PUBLISHED = {"where": (ByWhere, False), "split": (BySplit, False), "item": (ByItem, False)}
PUBLISHED |= {"dir": (ByWhere, True)} if TRACES_DIR else {}


def build(name: str, dtype: torch.dtype = torch.float64) -> Model:
    """A random model by short name."""
    block, looks = PUBLISHED[name]
    with torch.no_grad():
        return Model(block, looks).to(dtype).eval()
