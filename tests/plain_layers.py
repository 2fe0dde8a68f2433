"""The parts of transformers' Llama and Qwen2 models on chosen rows of one sequence, without its forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention


class PlainLayers:
    """A model's own modules, called on rows ``[R]`` (positions, rising) of one sequence of ``length`` tokens."""

    def __init__(self, model: Any, length: int) -> None:
        self.layers: list[Any] = list(model.model.layers)
        self._model = model
        self._heads: int = model.config.num_attention_heads
        self._key_heads: int = model.config.num_key_value_heads
        positions = torch.arange(length).unsqueeze(0)
        cos, sin = model.model.rotary_emb(model.model.embed_tokens.weight, positions)
        self._cos, self._sin = cos[0].unsqueeze(1), sin[0].unsqueeze(1)

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        """Residual stream ``[R, d]`` of tokens ``[R]``."""
        out: torch.Tensor = self._model.model.embed_tokens(ids)
        return out

    def head(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``[R, V]`` of the last residual stream."""
        out: torch.Tensor = self._model.lm_head(self._model.model.norm(x))
        return out

    def query(self, layer: Any, normed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rotated queries ``[R, heads, h]``."""
        return self._rotate(layer.self_attn.q_proj(normed).unflatten(-1, (self._heads, -1)), rows)

    def key(self, layer: Any, normed: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Rotated keys ``[R, key heads, h]``."""
        return self._rotate(layer.self_attn.k_proj(normed).unflatten(-1, (self._key_heads, -1)), rows)

    def value(self, layer: Any, normed: torch.Tensor) -> torch.Tensor:
        """Values ``[R, key heads, h]``."""
        out: torch.Tensor = layer.self_attn.v_proj(normed).unflatten(-1, (self._key_heads, -1))
        return out

    def weights(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Attention of every query to every key, ``[heads, R, L]``."""
        scores = torch.einsum("rhd,lhd->hrl", q, self._every_head(k)) / q.shape[-1] ** 0.5
        out: torch.Tensor = scores.softmax(-1)
        return out

    def mix(self, weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Values summed by weight, heads side by side, ``[R, heads * h]``."""
        return torch.einsum("hrl,lhd->rhd", weights, self._every_head(v)).flatten(1)

    def context(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """``mix(weights(q, k), v)`` as transformers computes it."""
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, self._every_head(k), self._every_head(v)))
        return scaled_dot_product_attention(q, k, v)[0].transpose(0, 1).flatten(1)

    def _every_head(self, x: torch.Tensor) -> torch.Tensor:
        return x.repeat_interleave(self._heads // self._key_heads, dim=1)

    def _rotate(self, x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        left, right = x.chunk(2, dim=-1)
        out: torch.Tensor = x * self._cos[rows] + torch.cat([-right, left], dim=-1) * self._sin[rows]
        return out
