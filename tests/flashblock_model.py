"""FlashBlock for one sequence of a plain transformer, spelled out: METHODS 17.7 over Fast-dLLM's dual cache."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .models import MASK
from .test_properties import Model, turned


class FlashBlock:
    """``step`` takes the tokens of one sequence; rows that it does not compute keep their last logits.

    A call at a new block computes every row. The next one computes the rows of the block, keeps of each layer, head and
    row what attention over the keys outside of the block comes to and its log-sum-exp, and joins that to attention over
    the keys of the block. So does every later one, with what is kept; ``interval`` steps behind one that computed it,
    it is computed anew.

    Args:
        model: a model.
        ids: ``[S]`` of the first call, whose masks are the response.
        block_length: tokens of a block.
        interval: or ``None`` for never.
        before: whether the row before those of the block is computed too; its new key and value are dropped.
        hidden: ``[S]`` bool, keys that nobody may see.

    Attributes:
        logits: ``[S, V]``.
        kinds: what each call was: ``"full"``, ``"outside"`` or ``"inside"``.
    """

    def __init__(
        self,
        model: Model,
        ids: torch.Tensor,
        block_length: int,
        interval: int | None = None,
        before: bool = True,
        hidden: torch.Tensor | None = None,
    ) -> None:
        self.model, self.layers, self.interval, self.before = model, list[Any](model.layers), interval, before
        places = (ids == MASK).nonzero()[:, 0]
        self.blocks = [places[i : i + block_length] for i in range(0, len(places), block_length)]
        self.at = -1
        self.age = 0
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.outside: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.hidden = torch.zeros(len(ids), dtype=torch.bool) if hidden is None else hidden
        self.logits = torch.zeros(0)
        self.kinds: list[str] = []

    def readable(self, ids: torch.Tensor) -> list[int]:
        """Rows that a sampler reads: masked ones of the block, and the row before each."""
        block = self.blocks[self.at]
        masked = block[ids[block] == MASK].tolist()
        return sorted({i - back for i in masked for back in range(2 if self.before else 1)} - {-1})

    @torch.no_grad()
    def step(self, ids: torch.Tensor, edited: bool = False) -> torch.Tensor:
        """One call on ``[S]``; ``edited`` says that a token outside of the block is another one."""
        at = next((i for i, block in enumerate(self.blocks) if (ids[block] == MASK).any()), self.at)
        every = torch.arange(len(ids))
        if at != self.at or edited:
            self.at, self.outside, kind = at, [], "full"
            self.keys, self.values = [], []
            self.logits = self._run(ids, every, every, kind)
        else:
            block = self.blocks[at]
            rows = torch.cat([block[:1] - 1, block]) if self.before and block[0] > 0 else block
            kind = "inside" if self.outside and self.age + 1 != self.interval else "outside"
            self.age = 0 if kind == "outside" else self.age + 1
            self.logits = self.logits.clone()
            self.logits[rows] = self._run(ids, rows, block, kind)
        self.kinds.append(kind)
        return self.logits.clone()

    def _run(self, ids: torch.Tensor, rows: torch.Tensor, block: torch.Tensor, kind: str) -> torch.Tensor:
        angles = rows[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x = self.model.embed(ids[rows])
        for number, layer in enumerate(self.layers):
            a = layer.norm_a(x)
            q, k, v = (to(a).unflatten(-1, (-1, layer.shape.head_dim)) for to in (layer.q, layer.k, layer.v))
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            if kind == "full":
                self.keys.append(k)
                self.values.append(v)
            written = torch.isin(rows, block)
            self.keys[number][block], self.values[number][block] = k[written], v[written]
            x = x + layer.o(self._context(number, q, block, kind))
            m = layer.norm_m(x)
            x = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        return self.model.head(self.model.norm(x))

    def _context(self, number: int, q: torch.Tensor, block: torch.Tensor, kind: str) -> torch.Tensor:
        there = ~self.hidden
        own = torch.zeros_like(there)
        own[block] = True
        inner = self._attended(number, q, there & own)
        if kind == "full":
            return inner[0].flatten(1)
        if kind == "outside":
            self.outside[number:] = [self._attended(number, q, there & ~own)]
        outer = self.outside[number]
        weights = [total.exp().unsqueeze(-1) for _, total in (outer, inner)]
        return ((weights[0] * outer[0] + weights[1] * inner[0]) / (weights[0] + weights[1])).flatten(1)

    def _attended(self, number: int, q: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Contexts ``[R, heads, h]`` of attention over the keys that are ``seen``, and log-sum-exps ``[R, heads]``."""
        groups = self.layers[number].shape.groups
        keys, values = (x[seen].repeat_interleave(groups, 1) for x in (self.keys[number], self.values[number]))
        scores = torch.einsum("rhd,lhd->rhl", q, keys) / q.shape[-1] ** 0.5
        total = scores.logsumexp(-1)
        return torch.einsum("rhl,lhd->rhd", (scores - total.unsqueeze(-1)).exp(), values), total
