"""Streaming-dLLM's cache for one sequence, spelled out: the far masked suffix is not there at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from .models import MASK
from .test_properties import Model, turned


class Streaming:
    """A model that runs the near rows of a sequence, the keys and values of the others being cached or absent.

    Args:
        model: a plain transformer.
        prompt, response, block: tokens.
        window: tokens behind the active block that are there, beside the last one.
        dual: whether steps inside a block compute the block alone, and not all from it on.
    """

    def __init__(self, model: Model, prompt: int, response: int, block: int, window: int, dual: bool) -> None:
        self.model, self.layers, self.size = model, list[Any](model.layers), prompt + response
        self.prompt, self.block, self.window, self.dual = prompt, block, window, dual
        self.at = -1  # the block that the cache is of
        self.rows: list[int] = []  # that are computed by the last step
        self.near: list[int] = []  # that the cache has
        self.cached: list[tuple[torch.Tensor, torch.Tensor]] = []  # keys and values of each layer, for ``near``

    def __call__(self, ids: torch.Tensor, number: int) -> torch.Tensor:
        """Logits ``[R, V]`` of ``self.rows``, for ids ``[L]`` in block ``number``."""
        begin = self.prompt + number * self.block
        end = begin + self.block
        if number != self.at:
            self.at, self.cached = number, []
            self.near = sorted({*range(min(end + self.window, self.size)), self.size - 1})
            self.rows = self.near
        else:
            self.rows = [row for row in self.near if row >= begin and (row < end or not self.dual)]
        return self._run(ids)

    def cut(self, size: int) -> None:
        """Only the first ``size`` tokens are left."""
        self.size, self.near = size, [row for row in self.near if row < size]
        self.cached = [(k[: len(self.near)], v[: len(self.near)]) for k, v in self.cached]

    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        at = torch.tensor(self.rows)
        place = torch.tensor([self.near.index(row) for row in self.rows])
        angles = at[:, None] * self.model.get_buffer("rates")
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        x, fresh = self.model.embed(ids[at]), not self.cached
        for number, layer in enumerate(self.layers):
            a, size = layer.norm_a(x), layer.shape.head_dim
            q, k, v = (to(a).unflatten(-1, (-1, size)) for to in (layer.q, layer.k, layer.v))
            q, k = turned(q, cos, sin), turned(k, cos, sin)
            if fresh:
                self.cached.append((k, v))
            else:
                for kept, new in zip(self.cached[number], (k, v), strict=True):
                    kept[place] = new
            keys, values = (kept.repeat_interleave(layer.shape.groups, 1) for kept in self.cached[number])
            weights = (torch.einsum("rhd,lhd->hrl", q, keys) / size**0.5).softmax(-1)
            x = x + layer.o(torch.einsum("hrl,lhd->rhd", weights, values).flatten(1))
            m = layer.norm_m(x)
            x = x + layer.down(F.silu(layer.gate(m)) * layer.up(m))
        logits: torch.Tensor = self.model.head(self.model.norm(x))
        return logits


def generated(
    model: Model,
    ids: torch.Tensor,
    prompt: int,
    block: int,
    window: int | None,
    dual: bool,
    threshold: float,
    fall: float,
    eos: int | None = None,
    sure_end: float | None = None,
    ahead: int = 128,
) -> list[torch.Tensor]:
    """Ids ``[L]`` after each step of the sampler, from a prompt and masks ``[L]``; of the cache alone without a window.

    A step fills the masks of the block that are surer than the threshold, at least the surest; the threshold falls with
    the share of masks among the rows of the block and behind it. A filled block that holds ``eos`` is the last. With
    ``sure_end`` so is the block of the first mask that is ``eos`` with this probability at the first step of a block,
    ``ahead`` tokens behind its beginning or more (without a window).
    """
    ids, size = ids.clone(), len(ids)
    rows = Streaming(model, prompt, size - prompt, block, size if window is None else window, dual)
    out = []
    number, last = -1, (size - prompt) // block
    while number + 1 < last:
        number += 1
        begin, end = prompt + number * block, prompt + (number + 1) * block
        while bool((ids[begin:end] == MASK).any()):
            logits = rows(ids, number)
            counted = [row for row in rows.near if row >= begin]
            ratio = sum(int(ids[row]) == MASK for row in counted) / len(counted)
            masks = {row: place for place, row in enumerate(rows.rows) if begin <= row < end and ids[row] == MASK}
            sure, best = logits.softmax(-1).max(-1)
            if sure_end is not None and int((ids[begin:end] == MASK).sum()) == block:
                found = [
                    row
                    for place, row in enumerate(rows.rows)
                    if row >= begin + ahead and int(best[place]) == eos and float(sure[place]) >= sure_end
                ]
                if found:
                    last = (found[0] - prompt) // block + 1
                    rows.cut(prompt + last * block)
            bound = threshold * (1 - fall * (1 - ratio))
            surest = max(masks, key=lambda row: float(sure[masks[row]]))
            for row, place in masks.items():
                if row == surest or float(sure[place]) >= bound:
                    ids[row] = best[place]
            out.append(ids.clone())
        if eos is not None and bool((ids[begin:end] == eos).any()):
            ids[end:] = eos
            break
    ids[ids == MASK] = MASK if eos is None else eos
    out[-1] = ids
    return out
