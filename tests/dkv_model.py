"""dKV-Cache for one sequence, spelled out: which rows run is a rule on the token vectors so far, and samplers obey it.

A history is the list of token vectors ``[L]`` before each forward call, the present one last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from .plain_layers import PlainLayers

History = list[torch.Tensor]
Rule = Callable[[History], torch.Tensor]


class CachedRows:
    """A model that runs some rows of a sequence; a row that does not run keeps the keys and values it last had."""

    def __init__(self, model: Any, length: int) -> None:
        self.parts = PlainLayers(model, length)
        self.k: list[torch.Tensor] = []
        self.v: list[torch.Tensor] = []

    @torch.no_grad()
    def __call__(self, ids: torch.Tensor, run: torch.Tensor) -> torch.Tensor:
        """Logits ``[R, V]`` of the rows in ``run`` ``[L]``; the first call runs all of them."""
        rows = run.nonzero()[:, 0]
        x = self.parts.embed(ids[rows])
        for n, layer in enumerate(self.parts.layers):
            normed = layer.input_layernorm(x)
            q, k = self.parts.query(layer, normed, rows), self.parts.key(layer, normed, rows)
            v = self.parts.value(layer, normed)
            if n == len(self.k):
                self.k.append(torch.empty_like(k))
                self.v.append(torch.empty_like(v))
            self.k[n][rows], self.v[n][rows] = k, v
            x = x + layer.self_attn.o_proj(self.parts.context(q, self.k[n], self.v[n]))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        return self.parts.head(x)


def step_in_block(history: History, mask_id: int, block_length: int) -> int:
    """Calls since the block of the first mask began, found from tokens alone: needs a token freed at every step."""
    prompt = _first_mask(history[0], mask_id)
    blocks = [(_first_mask(ids, mask_id) - prompt) // block_length for ids in history]
    return blocks.count(blocks[-1]) - 1


def _first_mask(ids: torch.Tensor, mask_id: int) -> int:
    return int((ids == mask_id).nonzero()[0, 0])


def llada_decode(history: History, mask_id: int, block_length: int, cache_reloading_step: int) -> torch.Tensor:
    """Rows to run: all but those known before the previous step."""
    step = step_in_block(history, mask_id, block_length)
    if step < 2 or step % cache_reloading_step == 0:
        return torch.ones_like(history[-1], dtype=torch.bool)
    return history[-2] == mask_id


def dream_decode(history: History, mask_id: int, cache_steps: int) -> torch.Tensor:
    """Rows to run: all but those whose next position was known before the previous step (``shift_type`` ``un``)."""
    step = len(history) - 1
    if step % cache_steps == 0:
        return torch.ones_like(history[-1], dtype=torch.bool)
    run = history[-2].roll(-1) == mask_id  # the last row looks at position 0
    if step == 1:
        run[-1] = True
    return run


def dream_prefill(history: History, mask_id: int) -> torch.Tensor:
    """Rows to run: after step 0, those from the last of the prompt on."""
    run = history[0].roll(-1) == mask_id
    run[-1] = True
    return run if len(history) > 1 else torch.ones_like(run)


def llada_greedy(history: History, mask_id: int, freed: list[int], freeing: list[int], window: int) -> torch.Tensor:
    """Rows to run between refreshes: those freed last, those about to be freed and masks around each of the latter."""
    run = torch.zeros_like(history[-1], dtype=torch.bool)
    run[freed + freeing] = True
    for at in freeing:
        free = (history[-1] == mask_id) & ~run
        run[_in_turn(free, at)[:window]] = True
    return run


def _in_turn(free: torch.Tensor, at: int) -> list[int]:
    """Positions in ``free`` in the order left, right, two left, two right and so on."""
    length = free.shape[0]
    order = [place for far in range(1, length) for place in (at - far, at + far)]
    return [place for place in order if 0 <= place < length and free[place]]


def quota(masks: int, steps: int) -> list[int]:
    """LLaDA: tokens freed at each step of a block."""
    return [masks // steps + (1 if step < masks % steps else 0) for step in range(steps)]


def best_of(logits: torch.Tensor, run: torch.Tensor, shift: bool, alg: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Best token and confidence of every position; without a row to read, minus infinity."""
    probs = torch.zeros(run.shape[0], logits.shape[1], dtype=torch.float64)
    probs[run] = logits.double().softmax(-1)
    confidence, best = probs.max(-1)
    if alg == "entropy":
        confidence = (probs * torch.log(probs + 1e-10)).sum(-1)
    confidence = torch.where(run, confidence, -torch.inf)
    if shift:
        return best.roll(1), confidence.roll(1)  # position 0 is never masked
    return best, confidence


def free_best(ids: torch.Tensor, candidates: torch.Tensor, best: tuple[torch.Tensor, torch.Tensor], n: int) -> None:
    """Write the ``n`` most confident candidates; one without a row to read must not come so far."""
    confidence = torch.where(candidates, best[1], -torch.inf)
    top = confidence.topk(n)
    assert bool((top.values > -torch.inf).all())
    ids[top.indices] = best[0][top.indices]


@dataclass
class Step:
    """One forward call and the tokens after it."""

    run: torch.Tensor
    logits: torch.Tensor
    ids: torch.Tensor


def sample_llada_decode(model: Any, ids: torch.Tensor, mask_id: int, settings: dict[str, Any]) -> Iterator[Step]:
    """LLaDA's blocks by confidence, from a prompt and masks ``[L]``."""
    rows, ids, history = CachedRows(model, ids.shape[0]), ids.clone(), []
    length, reload = settings["block_length"], settings["cache_reloading_step"]
    blocks = settings["gen_length"] // length
    for end in range(ids.shape[0] - (blocks - 1) * length, ids.shape[0] + 1, length):
        for count in quota(length, settings["steps"] // blocks):
            history.append(ids.clone())
            run = llada_decode(history, mask_id, length, reload)
            logits = rows(ids, run)
            candidates = ids == mask_id
            candidates[end:] = False
            free_best(ids, candidates, best_of(logits, run, False, "confidence"), count)
            yield Step(run, logits, ids.clone())


def sample_llada_greedy(
    model: Any, ids: torch.Tensor, mask_id: int, settings: dict[str, Any], draws: torch.Tensor
) -> Iterator[Step]:
    """LLaDA's blocks in an order set beforehand by ``draws`` ``[blocks, L]``."""
    rows, ids, history = CachedRows(model, ids.shape[0]), ids.clone(), []
    length, reload = settings["block_length"], settings["cache_reloading_step"]
    first = ids.shape[0] - settings["gen_length"]
    for block, draw in enumerate(draws):
        start = first + block * length
        order = (start + draw[start : start + length].sort(descending=True).indices).tolist()
        freed: list[int] = []
        for step, count in enumerate(quota(length, settings["steps"] // len(draws))):
            history.append(ids.clone())
            freeing, order = order[:count], order[count:]
            run = torch.ones_like(ids, dtype=torch.bool)
            if step % reload:
                run = llada_greedy(history, mask_id, freed, freeing, settings["window_size"])
            logits = rows(ids, run)
            best, _ = best_of(logits, run, False, "confidence")
            ids[freeing] = best[freeing]
            freed = freeing
            yield Step(run, logits, ids.clone())


def sample_dream(
    model: Any, ids: torch.Tensor, mask_id: int, settings: dict[str, Any], rule: Rule | None = None
) -> Iterator[Step]:
    """Dream's whole-response schedule."""
    rows, ids, history = CachedRows(model, ids.shape[0]), ids.clone(), []
    rule = rule or dream_rule(mask_id, settings)
    steps = settings["steps"]
    times = torch.linspace(1, settings["eps"], steps + 1)
    for step in range(steps):
        history.append(ids.clone())
        run = rule(history)
        logits = rows(ids, run)
        candidates = ids == mask_id
        part = 1 - times[step + 1] / times[step] if step < steps - 1 else 1
        count = int(candidates.sum() * part)
        free_best(ids, candidates, best_of(logits, run, True, settings["alg"]), count)
        yield Step(run, logits, ids.clone())


def dream_rule(mask_id: int, settings: dict[str, Any]) -> Rule:
    """The rule that Dream's settings name."""
    if settings["cache_type"] == "prefill":
        return lambda history: dream_prefill(history, mask_id)
    return lambda history: dream_decode(history, mask_id, settings["cache_steps"])
