"""ES-dLLM's early skipping for one sequence, spelled out: blocks, lists of rows, and plain numbers."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F

from .models import MASK, VOCABULARY
from .test_properties import Model, turned


@dataclass
class Ran:
    """What one step computed.

    Attributes:
        full: whether it computed every row.
        rows: of each layer, the rows that it computed.
        arrived: the rows whose logits are of this step.
    """

    full: bool
    rows: list[list[int]]
    arrived: list[int]


class EarlySkipping:
    """The model, with rows that are skipped in deeper layers.

    Args:
        model: of the property tests.
        prompt, block: tokens.
        shares, depths: rows, as shares of those of the step, of the layers from each depth on.
        weight: what confidence counts against drift.
        unskipped: steps between those that skip nothing; ``None`` for none but full ones.
        refresh: steps between full ones; ``None`` for a full step where a block begins, and no other.
        shift: row ``i - 1`` predicts token ``i``; then the row before the block is computed, and written nowhere.

    Attributes:
        logits: ``[S, V]``; rows that a step does not compute keep theirs.
        ran: what each step computed.
    """

    def __init__(
        self,
        model: Model,
        tokens: int,
        prompt: int,
        block: int,
        shares: tuple[float, ...] = (0.5, 0.25),
        depths: tuple[float, ...] = (0.125, 0.25),
        weight: float = 0.5,
        unskipped: int | None = None,
        refresh: int | None = None,
        shift: bool = False,
    ) -> None:
        self.model, self.tokens, self.prompt, self.block = model, tokens, prompt, block
        self.weight, self.unskipped, self.refresh, self.shift = weight, unskipped, refresh, shift
        layers, shape = len(model.layers), model.layers[0].shape
        self.shape, self.shares = shape, dict[int, float]()
        for depth, share in zip(depths, shares, strict=True):
            first = next((layer for layer in range(layers) if layer >= depth * layers), None)
            if first is not None:
                assert first == ceil(depth * layers) > 0
                self.shares[first] = share
        heads = shape.heads // shape.groups
        self.keys, self.values = (torch.zeros(layers, tokens, heads, shape.head_dim).double() for _ in range(2))
        self.states = {layer: torch.zeros(tokens, shape.width).double() for layer in self.shares}
        self.logits = torch.zeros(tokens, VOCABULARY).double()
        self.ids: torch.Tensor | None = None
        self.at = -1
        self.ran: list[Ran] = []

    def step(self, ids: torch.Tensor) -> Ran:
        """One call with ids ``[S]``."""
        masks = (ids == MASK).nonzero().flatten().tolist()
        taken = [] if self.ids is None else ((self.ids == MASK) & (ids != MASK)).nonzero().flatten().tolist()
        self.ids = ids.clone()
        at, number = (masks[0] - self.prompt) // self.block, len(self.ran)
        moved, self.at = at != self.at, at
        full = moved if self.refresh is None else number % self.refresh == 0
        first = self.prompt + at * self.block
        end = first + self.block
        first = min([first, *taken]) if moved else first
        rows = list(range(self.tokens)) if full else list(range(first, end))
        written = rows
        if self.shift and not full:
            rows = [first - 1, *rows]
        skips = not full and not (self.unskipped is not None and number % self.unskipped == 0)
        ran, x, every = Ran(full, [], []), self.model.embed(ids[rows]), len(rows)
        for layer in range(len(self.model.layers)):
            if layer in self.shares:
                x, rows = self._narrowed(layer, x, rows, every if skips else None, masks, taken)
                written = [row for row in written if row in rows]
            x = self._layer(layer, x, rows, written)
            ran.rows.append(rows)
        # a full step has logits of the rows that a sampler reads, and all of them at the start
        read = [row for row in rows if row + self.shift in masks]
        ran.arrived = read
        if number == 0:
            read = rows
        self.logits[read] = self.model.head(self.model.norm(x))[[rows.index(row) for row in read]]
        self.ran.append(ran)
        return ran

    def _narrowed(
        self, layer: int, x: torch.Tensor, rows: list[int], every: int | None, masks: list[int], taken: list[int]
    ) -> tuple[torch.Tensor, list[int]]:
        """The rows that go on from a layer, and their hidden states ``[n, d]``; ``every`` is the number of rows of the
        step, ``None`` where all go on.
        """
        old = self.states[layer][rows].clone()
        self.states[layer][rows] = x
        if every is None:
            return x, rows
        drift = [float((a - b).abs().mean() / (b.square().mean().sqrt() + 1e-6)) for a, b in zip(x, old, strict=True)]
        largest = max(1.0, *drift)
        mine = [row for row in rows if row + self.shift in masks]
        sure = {row: float(self.logits[row].softmax(-1).max()) for row in mine}
        best = sorted(mine, key=lambda row: -sure[row])[:2]
        scores = {
            row: self.weight * sure.get(row, 0.0)
            + (1 - self.weight) * change / largest
            + (2 if row in best else 0)
            + (5 if row == min(mine, default=-1) else 0)
            + (3 if row in taken else 0)
            for row, change in zip(rows, drift, strict=True)
        }
        count = max(int(self.shares[layer] * every), min(len(taken) + 2, self.block))
        left = sorted(sorted(rows, key=lambda row: -scores[row])[:count])
        return x[[rows.index(row) for row in left]], left

    def _layer(self, number: int, x: torch.Tensor, rows: list[int], written: list[int]) -> torch.Tensor:
        layer: Any = self.model.layers[number]
        angles = torch.tensor(rows)[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a = layer.norm_a(x)
        q, k, v = (to(a).unflatten(-1, (-1, self.shape.head_dim)) for to in (layer.q, layer.k, layer.v))
        at = [rows.index(row) for row in written]
        self.keys[number][written], self.values[number][written] = turned(k, cos, sin)[at], v[at]
        keys, values = (t[number].repeat_interleave(self.shape.groups, 1) for t in (self.keys, self.values))
        scores = torch.einsum("rhd,lhd->hrl", turned(q, cos, sin), keys) / self.shape.head_dim**0.5
        x = x + layer.o(torch.einsum("hrl,lhd->rhd", scores.softmax(-1), values).flatten(1))
        m = layer.norm_m(x)
        out: torch.Tensor = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        return out


def generated(plain: EarlySkipping, ids: torch.Tensor, threshold: float | None = None) -> list[torch.Tensor]:
    """The ids ``[S]`` after each call of a loop that writes the surest mask of the block whose logits are of the call,
    and all above a threshold.
    """
    out = []
    while bool((ids == MASK).any()):
        masks = (ids == MASK).nonzero().flatten().tolist()
        end = plain.prompt + ((masks[0] - plain.prompt) // plain.block + 1) * plain.block
        ran = plain.step(ids)
        sure = {
            row + plain.shift: float(plain.logits[row].softmax(-1).max())
            for row in ran.arrived
            if row + plain.shift < end
        }
        best = max(sure, key=lambda row: sure[row])
        ids = ids.clone()
        for row, confidence in sure.items():
            if row == best or (threshold is not None and confidence >= threshold):
                ids[row] = plain.logits[row - plain.shift].argmax()
        out.append(ids)
    return out
