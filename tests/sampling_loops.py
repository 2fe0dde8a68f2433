"""A model in a line, and loops that ``generate`` must equal: random ones as published, parallel ones spelled out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dllm_compile import Generated, generate

from . import loops

MASK, END = 30, 7


class Streamer:
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.given: list[list[int]] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.given.append(value.flatten().tolist())

    def end(self) -> None:
        self.ended += 1


def toy(seed: int = 0, sharp: float = 3.0, end: float = 0.0) -> loops.Logits:
    """A bidirectional model in a line: bare logits of ids, position and the average token; the mask is never best."""
    draw = torch.Generator().manual_seed(seed)
    table, place, head = (torch.randn(64, 31, generator=draw, dtype=torch.float64) for _ in range(3))

    def logits(x: torch.Tensor) -> torch.Tensor:
        near = table[x] + place[: x.shape[1]] + 2 * table[x].mean(1, keepdim=True)
        out = sharp * torch.tanh(near) @ head[:31]
        out[..., MASK] = -40.0
        out[..., END] += end
        return out

    return logits


def ids(batch: int, prompt: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(8, MASK, (batch, prompt), generator=torch.Generator().manual_seed(seed))


def start(prompt: torch.Tensor, response: int) -> torch.Tensor:
    return torch.nn.functional.pad(prompt, (0, response), value=MASK)


def run(model: Any, prompt: torch.Tensor, **more: Any) -> Generated:
    result = generate(model, prompt, output_history=True, **{"mask_id": MASK, **more})
    assert isinstance(result, Generated)
    return result


def seeded(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def llada_at_random(
    logits: loops.Logits, x: torch.Tensor, prompt: int, steps: int, block: int, temperature: float, remasking: str
) -> torch.Tensor:
    """LLaDA's loop as published, on PyTorch's own random numbers."""
    blocks = (x.shape[1] - prompt) // block
    for end in range(prompt + block, x.shape[1] + 1, block):
        for count in loops.quota(block, steps // blocks):
            mask = x == MASK
            out = logits(x)
            noise = torch.rand_like(out, dtype=torch.float64)
            best = (out.double().exp() / (-torch.log(noise)) ** temperature).argmax(-1)
            sure = out.softmax(-1).gather(-1, best.unsqueeze(-1)).squeeze(-1)
            if remasking == "random":
                sure = torch.rand(x.shape)
            mask[:, end:] = False
            loops.free(x, mask, sure, best, count)
    return x


def dream_sample(logits: torch.Tensor, temperature: float, top_p: float | None, top_k: int | None) -> torch.Tensor:
    """Dream's probabilities, as published."""
    logits = logits / temperature
    if top_p is not None and top_p < 1:
        ordered, order = torch.sort(logits, descending=True)
        remove = torch.cumsum(ordered.softmax(-1), -1) > top_p
        remove[..., 1:] = remove[..., :-1].clone()
        remove[..., 0] = False
        mask = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, remove)
        logits = logits.masked_fill(mask, torch.finfo(logits.dtype).min)
    if top_k is not None:
        logits = logits.masked_fill(logits < logits.topk(top_k)[0][..., -1, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1)


def dream_at_random(logits: loops.Logits, x: torch.Tensor, steps: int, alg: str, **how: Any) -> torch.Tensor:
    """Dream's loop as published, on PyTorch's own random numbers."""
    alg_temp = how.pop("alg_temp", None)
    times = torch.linspace(1, 1e-3, steps + 1)
    for i in range(steps):
        mask = x == MASK
        out = logits(x)
        out = torch.cat([out[:, :1], out[:, :-1]], 1)
        part = 1 - times[i + 1] / times[i] if i < steps - 1 else 1
        if alg == "origin":
            new = torch.full_like(x[mask], MASK)
            now = torch.rand(new.shape) < part
            new[now] = torch.distributions.Categorical(probs=dream_sample(out[mask][now], **how)).sample()
            x[mask] = new
            continue
        probs = dream_sample(out[mask], **how)
        token = torch.distributions.Categorical(probs=probs).sample()
        sure = probs.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        if alg == "entropy":
            sure = (probs * torch.log(probs + 1e-10)).sum(-1)
        if alg == "topk_margin":
            sure = probs.topk(2).values.diff(dim=-1).neg().squeeze(-1)
        count, every = int(mask.sum() / len(mask) * part), torch.full(x.shape, -torch.inf, dtype=out.dtype)
        every[mask] = sure
        best = torch.full_like(x, MASK)
        best[mask] = token
        if not count:
            continue
        at = every.topk(count).indices
        if alg_temp:
            at = torch.multinomial((every / alg_temp).softmax(-1), count)
        x.scatter_(1, at, best.gather(1, at))
    return x


def parallel(logits: loops.Logits, x: torch.Tensor, prompt: int, block: int, believe: Callable[..., bool]) -> int:
    """One sequence, as many tokens a step as are believed; forward calls."""
    calls = 0
    for end in range(prompt + block, x.shape[1] + 1, block):
        while (x[0, :end] == MASK).any():
            calls += 1
            probability, best = logits(x)[0].softmax(-1).max(-1)
            order = sorted((x[0, :end] == MASK).nonzero()[:, 0].tolist(), key=lambda i: -float(probability[i]))
            for rank, i in enumerate(order):
                if rank and not believe(rank + 1, float(probability[i])):
                    break
                x[0, i] = best[i]
    return calls
