"""DyLLM for one sequence, spelled out: full steps, then steps on the rows whose context turned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from .plain_layers import PlainLayers

SQUARED_NORM_AT_LEAST = 1e-8
FIRST_WHOLE = 4  # in all published versions, also where the interval is 8


@dataclass
class Step:
    """What one step did. Positions ``salient[l]`` enter layer ``l`` and ``salient[l + 1]`` leave it; full: none."""

    kind: str
    """``full``, ``whole`` (sparse, all rows) or ``response`` (sparse, rows of the response)."""
    rows: torch.Tensor
    salient: list[torch.Tensor] = field(default_factory=list)


def cosine(new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
    """One number a row, over all heads side by side."""
    squares = [x.square().sum(-1).clamp(min=SQUARED_NORM_AT_LEAST) for x in (new, old)]
    return (new * old).sum(-1) / (squares[0] * squares[1]).sqrt()


class DyLLM:
    """``step`` takes the tokens of one sequence and returns logits ``[S, V]``: rows not computed keep their last ones.

    ``response_mask`` ``[S]`` says which positions are the response; ``before`` computes the row before the response
    with it, for samplers that read row ``p - 1`` for position ``p``. Steps count from 1 and the first is always full.
    """

    def __init__(
        self,
        model: Any,
        response_mask: torch.Tensor,
        threshold: float,
        full_steps: int,
        response_only: bool = True,
        whole_interval: int = 4,
        *,
        before: bool = False,
    ) -> None:
        length = response_mask.shape[0]
        self.parts = PlainLayers(model, length)
        self.threshold, self.full_steps = threshold, max(full_steps, 1)
        self.response_only, self.whole_interval = response_only, whole_interval
        self.response = response_mask.bool()
        self.all_rows = torch.arange(length)
        given = self.response.clone()
        if before:
            given[:-1] |= self.response[1:]
        self.response_rows = given.nonzero()[:, 0]
        self.steps: list[Step] = []
        self.ids = self.logits = torch.empty(0)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []
        self.context: list[torch.Tensor] = []
        self.mlp: list[torch.Tensor] = []

    @torch.no_grad()
    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """One forward call on ``[S]`` or ``[1, S]``."""
        ids = ids.reshape(-1)
        step = self._plan(len(self.steps) + 1)
        if step.kind == "full":
            self.logits = self._full(ids)
        else:
            self.logits = self.logits.clone()
            self.logits[step.rows] = self._sparse(ids, step)
        self.ids = ids.clone()
        self.steps.append(step)
        return self.logits.clone()

    def _plan(self, t: int) -> Step:
        if t <= self.full_steps:
            return Step("full", self.all_rows)
        if not self.response_only or t <= FIRST_WHOLE or t % self.whole_interval == 0:
            return Step("whole", self.all_rows)
        return Step("response", self.response_rows)

    def _full(self, ids: torch.Tensor) -> torch.Tensor:
        """Everything exact; all four caches are overwritten."""
        self.k, self.v, self.context, self.mlp = [], [], [], []
        x = self.parts.embed(ids)
        for layer in self.parts.layers:
            normed = layer.input_layernorm(x)
            q = self.parts.query(layer, normed, self.all_rows)
            self.k.append(self.parts.key(layer, normed, self.all_rows))
            self.v.append(self.parts.value(layer, normed))
            self.context.append(self.parts.context(q, self.k[-1], self.v[-1]))
            x = x + layer.self_attn.o_proj(self.context[-1])
            self.mlp.append(layer.mlp(layer.post_attention_layernorm(x)))
            x = x + self.mlp[-1]
        return self.parts.head(x)

    def _sparse(self, ids: torch.Tensor, step: Step) -> torch.Tensor:
        """Logits of the rows of ``step``; the salient sets go into it."""
        rows = step.rows
        salient = ((ids != self.ids) & self.response).nonzero()[:, 0]
        step.salient.append(salient)
        x = self.parts.embed(ids[rows])
        for n, layer in enumerate(self.parts.layers):
            normed = layer.input_layernorm(x)
            context = self._context(n, layer, normed, rows, salient)
            turned = self._turned(context, self.context[n][rows])
            salient = rows[turned]
            step.salient.append(salient)
            self.context[n][rows] = context
            x = x + layer.self_attn.o_proj(context)
            self.mlp[n][salient] = layer.mlp(layer.post_attention_layernorm(x[turned]))
            x = x + self.mlp[n][rows]
        return self.parts.head(x)

    def _turned(self, new: torch.Tensor, old: torch.Tensor) -> torch.Tensor:
        return cosine(new, old) < self.threshold

    def _context(
        self, n: int, layer: Any, normed: torch.Tensor, rows: torch.Tensor, salient: torch.Tensor
    ) -> torch.Tensor:
        """Contexts of ``rows``: exact for the salient ones, for the others the old one and what salient values add."""
        fresh = torch.isin(rows, salient)
        old_v = self.v[n].clone()
        self.k[n][salient] = self.parts.key(layer, normed[fresh], salient)
        self.v[n][salient] = self.parts.value(layer, normed[fresh])
        weights = self.parts.weights(self.parts.query(layer, normed, rows), self.k[n])
        exact = self.parts.mix(weights, self.v[n])
        added = self.context[n][rows] + self.parts.mix(weights, self.v[n] - old_v)
        return torch.where(fresh.unsqueeze(-1), exact, added)
