"""What a denoising loop is doing, read off the ids it hands to the model.

The loop is the user's; nobody tells the backend where a sequence begins, which tokens are the prompt or what the mask
is. A :class:`Session` keeps the ids of the last call and works it out; one copy of the ids to the host a step is all
it reads.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch

from .core.assignment import Assignment
from .options import Options
from .passes.cache_reuse import EXACT, FULL, variant
from .stats import Stats


@dataclass
class Step:
    """One forward call of a denoising loop.

    Attributes:
        number: calls since the sequence began, from 0.
        repeat: the ids are those of the previous call, so its results are too.
        assignment: rows that layers behind the first compute.
        indices: positions ``[B, K]`` of each row set, on the device of the ids; ``S`` stands for "no row".
        sizes: ``K`` of each row set.
        counts: ``[B, 1]`` int64, rows each sequence may select.
        layer: how many layers have run in this step.
        seen: the layers that have run.
        fresh: the layer at hand has no rows kept yet.
    """

    number: int
    repeat: bool
    assignment: Assignment
    indices: dict[str, torch.Tensor]
    sizes: dict[str, int]
    counts: torch.Tensor
    shape: tuple[int, int]
    layer: int = 0
    seen: set[Any] = field(default_factory=set)
    fresh: bool = False

    @property
    def signature(self) -> tuple[int, int, int]:
        """What a layer's compiled code depends on."""
        return self.sizes["response"], self.sizes["prompt"], self.sizes["selected"]


class Session:
    """State of one compiled model: the ids it saw, the cached rows of its layers, its last outputs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.mask_id = options.mask_id
        self.stats = Stats()
        self.owner: Any = None
        self.vocabulary: int | None = None
        self.opener: Any = None
        self.drop()
        _SESSIONS.add(self)

    def drop(self) -> None:
        """Forget the sequence and free all cached rows."""
        self.ids: torch.Tensor | None = None
        self.first: torch.Tensor | None = None
        self.beside: list[torch.Tensor] = []
        self.number = -1
        self.layers: dict[Any, list[torch.Tensor]] = {}
        self.outputs: dict[Any, Any] = {}
        self.logits: dict[Any, torch.Tensor] = {}
        self.selected: dict[int, torch.Tensor] = {}
        self.step: Step | None = None
        self.shadow: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def state_bytes(self) -> int:
        """Bytes of all rows kept between steps, cached logits included."""
        kept = [t for tensors in self.layers.values() for t in tensors] + list(self.logits.values())
        return sum(t.numel() * t.element_size() for t in kept)

    def begin(self, ids: torch.Tensor, beside: list[torch.Tensor]) -> Step | None:
        """Read one call.

        Args:
            ids: ``[B, S]`` integer token ids.
            beside: the other inputs that belong to the sequence (padding masks, position ids).

        Returns:
            The step, or ``None`` when these ids are no denoising step (nothing is masked, or nobody knows the mask).
        """
        host = ids.detach().to("cpu", copy=True).long()
        same_beside = len(beside) == len(self.beside) and all(map(_equal, beside, self.beside))
        if self._is_new(host) or not same_beside:
            if not self._start(host, beside):
                return None
            repeat = False
        else:
            assert self.ids is not None
            repeat = torch.equal(host, self.ids)
        self.ids = host
        self.number += 1
        self.step = self._plan(host, repeat, ids.device)
        self.stats.count(self.step)
        return self.step

    def begin_hidden(self, hidden: torch.Tensor, beside: list[torch.Tensor]) -> Step | None:
        """Read one call off the hidden state ``[B, S, d]`` that enters the first layer: equal rows, equal tokens.

        A model that breaks its graph before the first layer looks its ids up outside of any graph. What is masked is
        then inferred in any case, since a user's mask id says nothing about rows.
        """
        return self.begin(labels(hidden), beside)

    def _is_new(self, ids: torch.Tensor) -> bool:
        if self.ids is None or self.first is None or ids.shape != self.ids.shape:
            return True
        changed = ids != self.ids
        if not changed.any():
            return False
        if (changed & ~self.response).any() or torch.equal(ids, self.first):
            return True
        remasked = (changed & (ids == self.mask_id)).sum(1)
        return bool((remasked * 4 > self.response.sum(1)).any())

    def _start(self, ids: torch.Tensor, beside: list[torch.Tensor]) -> bool:
        self.drop()
        if self.options.mask_id is None and (self.mask_id is None or not (ids == self.mask_id).any()):
            self.mask_id = infer_mask_id(ids)
        if self.mask_id is None:
            return False
        masked = ids == self.mask_id
        if not masked.any():
            return False
        for other in list(_SESSIONS):
            if other is not self and other.owner is not None and other.owner == self.owner:
                other.drop()
        self.first = ids
        self.beside = [tensor.detach().clone() for tensor in beside]
        self.response = _conditional(ids, masked)
        if self.options.shift:
            self.response = self.response | torch.cat([self.response[:, 1:], self.response[:, :1] & False], 1)
        self.stats.sequences += 1
        return True

    def _plan(self, ids: torch.Tensor, repeat: bool, device: torch.device) -> Step:
        batch, tokens = ids.shape
        lengths = self.response.sum(1)
        options = self.options
        counts = (lengths.double() * options.transfer_ratio).long()
        selected = int(counts.max()) if options.transfer_ratio > 0 else None
        if options.method == "exact":
            assignment = EXACT
        else:
            assignment = variant(self.number, options.prompt_interval, options.response_interval, selected)
        if self.number == 0:
            assert assignment in (FULL, EXACT)
            response, prompt = positions(self.response, tokens), positions(~self.response, tokens)
            self.fixed = {"response": response.to(device), "prompt": prompt.to(device)}
            self.fixed_counts = counts.unsqueeze(1).to(device)
        if not self.fixed["prompt"].shape[1]:
            assignment = _without_prompt(assignment, options, self.number, selected)
        assert self.mask_id is not None
        readable = positions(readable_rows(ids.eq(self.mask_id), options.shift), tokens)
        if self.number == 0:
            readable = torch.arange(tokens).expand(batch, tokens)
        indices = {**self.fixed, "readable": readable.to(device)}
        sizes = {name: index.shape[1] for name, index in indices.items()}
        sizes["selected"] = selected or 0
        sizes["prompt+selected"] = sizes["prompt"] + sizes["selected"]
        return Step(self.number, repeat, assignment, indices, sizes, self.fixed_counts, (batch, tokens))


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()
_CURRENT = threading.local()


def sessions() -> list[Session]:
    """All live sessions."""
    return list(_SESSIONS)


def enter(session: Session | None) -> None:
    """Make ``session`` the one that layers and heads compiled apart from the embedding belong to."""
    _CURRENT.session = session


def current() -> Session | None:
    """The session whose ids were seen last on this thread."""
    return getattr(_CURRENT, "session", None)


def labels(hidden: torch.Tensor) -> torch.Tensor:
    """Number the rows of ``[B, S, d]``: ``[B, S]`` int64, the same where rows are bitwise the same (a 63-bit hash)."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[hidden.element_size()]
    words = hidden.detach().contiguous().view(kind).long()
    odd = torch.arange(1, 2 * words.shape[-1], 2, device=words.device) * 0x9E3779B97F4A7C1 | 1
    return (words * odd).sum(-1) & 0x7FFFFFFFFFFFFFFF


def infer_mask_id(ids: torch.Tensor) -> int | None:
    """The id that ends every sequence at least twice in a row, or ``None``.

    Args:
        ids: ``[B, S]`` ids of a first call, whose response is still all masks.
    """
    if ids.shape[1] < 2:
        return None
    last = ids[:, -1]
    alike = bool((ids[:, -2] == last).all()) and bool((last == last[0]).all())
    return int(last[0]) if alike else None


def readable_rows(masked: torch.Tensor, shift: bool | None) -> torch.Tensor:
    """Rows a sampler can read, ``[B, S]`` bool: masked ones and, unless ``shift`` is False, the row before each."""
    if shift is False:
        return masked
    before = torch.zeros_like(masked)
    before[:, :-1] = masked[:, 1:]
    return masked | before


def positions(rows: torch.Tensor, tokens: int) -> torch.Tensor:
    """Positions ``[B, K]`` int64 of the rows set in a ``[B, S]`` bool; the rest of shorter ones is ``tokens``."""
    most = int(rows.sum(1).max())
    where = torch.where(rows, torch.arange(rows.shape[1]), tokens)
    return where.sort(1).values[:, :most].contiguous()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))


def _conditional(ids: torch.Tensor, masked: torch.Tensor) -> torch.Tensor:
    """What is masked at the first call; for ``[x; x with a masked prompt]`` (guidance), what is masked in ``x``."""
    half = ids.shape[0] // 2
    if ids.shape[0] % 2 or not half:
        return masked
    cond, uncond = ids[:half], masked[half:]
    mirrors = (ids[half:] == cond) | uncond
    if bool(mirrors.all()) and bool((uncond | ~masked[:half]).all()) and not torch.equal(uncond, masked[:half]):
        return torch.cat([masked[:half], masked[:half]])
    return masked


def _without_prompt(assignment: Assignment, options: Options, step: int, selected: int | None) -> Assignment:
    """With nothing before the response there is no prompt to refresh or to keep."""
    if assignment is EXACT:
        return assignment
    response = variant(step, -1, options.response_interval, selected) is FULL
    return FULL if response else variant(1, 2, 2, selected)
