"""One sequence of a plain transformer whose state is kept by hand: what a composition of mechanisms must equal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .models import VOCABULARY
from .test_properties import Model, turned


class ByHand:
    """``compute`` runs a step on chosen rows, ``evict`` hides keys from the steps behind it. Rows are positions.

    Attributes:
        logits: ``[S, V]``; rows that a step does not compute keep theirs.
        seen: of each layer, ``[S]`` bool: the keys that are read.
        salient: of the last step, the rows that are salient in each layer and behind the last.
    """

    def __init__(self, model: Model, tokens: int) -> None:
        self.model, self.layers = model, list[Any](model.layers)
        shape = self.layers[0].shape
        heads = shape.heads // shape.groups
        self.groups, self.size = shape.groups, shape.head_dim

        def rows(*extent: int) -> list[torch.Tensor]:
            return [torch.zeros(tokens, *extent, dtype=torch.float64) for _ in self.layers]

        self.keys, self.values = rows(heads, self.size), rows(heads, self.size)
        self.contexts, self.mlp = rows(shape.width), rows(shape.width)
        self.queries = rows(shape.heads, self.size)
        self.seen = [torch.ones(tokens, dtype=torch.bool) for _ in self.layers]
        self.logits = torch.full((tokens, VOCABULARY), torch.nan, dtype=torch.float64)
        self.salient: list[list[int]] = []

    def full(self, ids: torch.Tensor) -> None:
        """Every row, over every key."""
        self.seen = [torch.ones_like(seen) for seen in self.seen]
        self.compute(ids, range(len(ids)))

    def compute(
        self,
        ids: torch.Tensor,
        active: Sequence[int],
        unwritten: Sequence[int] = (),
        changed: Sequence[int] | None = None,
        bound: float = torch.inf,
        first_full: bool = False,
    ) -> None:
        """A step on ``active`` rows.

        Args:
            ids: ``[S]``.
            active: rows of the residual stream.
            unwritten: those of them that are computed exactly and leave nothing behind.
            changed: rows that are salient in the first layer; ``None`` computes every active row exactly.
            bound: cosine with the former context below which a row is salient in the next layer.
            first_full: whether the first layer computes every row over every key.
        """
        at = torch.tensor(list(range(len(ids)) if first_full else active))
        x = self.model.embed(ids[at])
        fresh = torch.ones(len(at), dtype=torch.bool)
        if changed is not None:
            fresh = torch.isin(at, torch.tensor([*changed, *unwritten], dtype=torch.int64))
        self.salient = [at[fresh].tolist()]
        for number, layer in enumerate(self.layers):
            if first_full and number == 1:
                keep = torch.tensor(list(active))
                x, at, fresh = x[keep], keep, fresh[keep]
            x, fresh = self._layer(number, layer, x, at, fresh, unwritten, None if changed is None else bound)
            self.salient.append(at[fresh].tolist())
        self.logits[at] = self.model.head(self.model.norm(x))

    def _layer(
        self,
        number: int,
        layer: Any,
        x: torch.Tensor,
        at: torch.Tensor,
        fresh: torch.Tensor,
        unwritten: Sequence[int],
        bound: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        angles = at[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        a = layer.norm_a(x)
        q, k, v = (to(a).unflatten(-1, (-1, self.size)) for to in (layer.q, layer.k, layer.v))
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        self.queries[number][at] = q
        lasts = ~torch.isin(at, torch.tensor(list(unwritten), dtype=torch.int64))
        writes = fresh & lasts
        before = self.values[number].clone()
        self.keys[number][at[writes]] = k[writes]
        self.values[number][at[writes]] = v[writes]
        keys, values, moved = (
            t.repeat_interleave(self.groups, 1)
            for t in (self.keys[number], self.values[number], self.values[number] - before)
        )
        scores = torch.einsum("rhd,lhd->hrl", q, keys) / self.size**0.5
        weights = scores.masked_fill(~self.seen[number], -torch.inf).softmax(-1)
        exact = torch.einsum("hrl,lhd->rhd", weights, values).flatten(1)
        old = self.contexts[number][at]
        added = old + torch.einsum("hrl,lhd->rhd", weights, moved).flatten(1)
        context = torch.where(fresh[:, None], exact, added)
        self.contexts[number][at[lasts]] = context[lasts]
        turns = torch.ones_like(fresh)
        if bound is not None:
            turns = (F.cosine_similarity(context, old, dim=-1) < bound) | ~lasts
        x = x + layer.o(context)
        m = layer.norm_m(x)
        mlp = layer.down(F.silu(layer.gate(m)) * layer.up(m))
        self.mlp[number][at[turns & lasts]] = mlp[turns & lasts]
        return x + torch.where(turns[:, None], mlp, self.mlp[number][at]), turns

    def evict(
        self,
        asking: Sequence[int],
        fresh: Sequence[int],
        ratio: float,
        window: int | None = None,
        among: Sequence[int] | None = None,
    ) -> None:
        """Hide all keys but the ``ratio`` of those beside ``fresh`` that the rows ``asking`` look at most; with
        ``among``, of those rows.
        """
        free = [i for i in (range(len(self.logits)) if among is None else among) if i not in fresh]
        reach = (window or 1) // 2
        for number in range(len(self.layers)):
            query = self.queries[number][list(asking)].mean(0)
            keys = self.keys[number].repeat_interleave(self.groups, 1)
            score = torch.einsum("hd,lhd->l", query, keys)[free].tolist()
            pooled = [max(score[max(0, i - reach) : i + reach + 1]) for i in range(len(free))]
            best = sorted(range(len(free)), key=lambda i: -pooled[i])[: int(len(free) * ratio)]
            self.seen[number] = torch.zeros_like(self.seen[number])
            self.seen[number][[*fresh, *(free[i] for i in best)]] = True
