"""What a denoising loop is doing, read off the ids it hands to the model.

The loop is the user's; nobody tells the backend where a sequence begins, which tokens are the prompt or what the mask
is. A :class:`Session` keeps the ids of the last call and works it out; one copy of the ids to the host a step is all
it reads.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import tapes
from .ahead import told
from .core.assignment import ACTIVE, Assignment
from .core.plan import Call, Exact, Schedule
from .ids import infer_mask_id, labels, positions, response_rows
from .method import response_of, schedule
from .options import Options
from .outbox import Outbox
from .positions import positions_of_call
from .stats import Stats


@dataclass
class Step:
    """One forward call of a denoising loop.

    Attributes:
        number: calls since the sequence began, from 0.
        repeat: the ids are those of the previous call, so its results are too.
        assignment: rows that layers compute; the schedule may say otherwise of the first.
        indices: positions ``[B, K]`` of each row set, on the device of the ids; ``S`` stands for "no row".
        sizes: ``K`` of each row set.
        counts: ``[B, 1]`` int64, rows each sequence may select.
        bound: ``[B, 1]`` float32, the similarity below which a row of a sequence is salient.
        layer: how many layers have run in this step.
        seen: the layers that have run.
    """

    number: int
    repeat: bool
    assignment: Assignment
    indices: dict[str, torch.Tensor]
    sizes: dict[str, int]
    counts: torch.Tensor
    bound: torch.Tensor | None
    shape: tuple[int, int]
    layer: int = 0
    seen: set[Any] = field(default_factory=set)

    @property
    def signature(self) -> tuple[int, ...]:
        """What a layer's compiled code depends on."""
        return tuple(self.sizes.get(name, 0) for name in ("response", "prompt", "selected"))


class Session:
    """State of one compiled model: the ids it saw, the cached rows of its layers, its last outputs."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.mask_id = options.mask_id
        self.stats = Stats()
        self.owner: tuple[int, ...] = ()
        self.versions: tuple[int, ...] = ()
        self.vocabulary: int | None = None
        self.idle = False
        self.tied: set[Any] = set()  # layers that run more than once in a step
        self.room: int | None = None  # salient rows that a layer may have; on a CPU they are counted instead
        self.records = False  # whether partial steps become CUDA graphs
        self.chooses = False  # whether the graph that is called chooses tokens itself, by a few numbers a row
        self.drop()
        _SESSIONS.add(self)

    def drop(self) -> None:
        """Forget the sequence and free all cached rows."""
        self.ids: torch.Tensor | None = None
        self.caller: object = None
        self.first: torch.Tensor | None = None
        self.beside: list[torch.Tensor] = []
        self.number = -1
        self.layers: dict[Any, list[torch.Tensor]] = {}
        self.outputs: dict[Any, Any] = {}
        self.kept: dict[Any, torch.Tensor] = {}
        self.outboxes: dict[Any, Outbox] = {}
        self.selected: dict[int, torch.Tensor] = {}
        self.step: Step | None = None
        self.others: list[tuple[torch.Tensor, int]] = []
        self.passed: list[torch.Tensor] = []
        self.shadow: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.tapes = tapes.Tapes()  # they hold addresses of rows

    def state_bytes(self) -> int:
        """Bytes of the rows kept of layers between steps."""
        return sum(t.nbytes for tensors in self.layers.values() for t in tensors)

    def logits_bytes(self) -> int:
        """Bytes of what is kept of the graphs' outputs, and of the copies handed out."""
        return sum(t.nbytes for t in self.kept.values()) + sum(box.bytes() for box in self.outboxes.values())

    def belongs_to(self, weights: list[torch.Tensor]) -> None:
        """Tie the session to the parameters of a model: it forgets when they are written to, or when they die."""
        versions = tuple(w._version for w in weights if not w.is_inference())
        if not self.owner and weights:
            weakref.finalize(weights[0], _forget, weakref.ref(self))
        if versions != self.versions:
            self.drop()
        self.owner, self.versions = tuple(map(id, weights)), versions

    def hands_on(self, stream: torch.Tensor) -> bool:
        """Whether ``stream`` is what the last graph of this session returned; it is kept so that no other can be."""
        return any(t.data_ptr() == stream.data_ptr() and t.shape == stream.shape for t in self.passed)

    def begin(
        self, ids: torch.Tensor, beside: list[torch.Tensor], caller: object, others: Sequence[torch.Tensor] = ()
    ) -> Step | None:
        """Read one call.

        Args:
            ids: ``[B, S]`` integer token ids.
            beside: the other inputs that belong to the sequence (padding masks, position ids).
            caller: the graph that is called; a call of another one is no repetition.
            others: further inputs; a call with other values there is none either.

        Returns:
            The step, or ``None`` when these ids are no denoising step (nothing is masked, or nobody knows the mask).
        """
        host = ids.detach().to("cpu", copy=True).long()
        self.idle = self.ids is not None and self.mask_id is not None and not (host == self.mask_id).any()
        if self.idle:
            self.drop()
            return None
        same_beside = len(beside) == len(self.beside) and all(map(_equal, beside, self.beside))
        if self._is_new(host) or not same_beside:
            if not self._start(host, beside):
                return None
            repeat = False
        else:
            assert self.ids is not None
            same = torch.equal(host, self.ids) and _unchanged(others, self.others)
            repeat = same and caller is self.caller
        assert self.mask_id is not None
        masked = host.eq(self.mask_id)
        before = host if self.ids is None else self.ids
        changed = before.ne(host)
        filled = changed & ~masked & before.eq(self.mask_id)
        if not repeat:
            self.outputs.clear()
        self.ids, self.caller = host, caller
        self.others = [(tensor, -1 if tensor.is_inference() else tensor._version) for tensor in others]
        self.number += 1
        self.step = self._step(Call(self.number, repeat, masked, filled, changed, told(masked.shape)), ids.device)
        self.stats.count(self.step)
        return self.step

    def begin_hidden(self, hidden: torch.Tensor, beside: list[torch.Tensor], caller: object) -> Step | None:
        """Read one call off the hidden state ``[B, S, d]`` that enters the first layer: equal rows, equal tokens.

        A model that breaks its graph before the first layer looks its ids up outside of any graph. What is masked is
        then inferred in any case, since a user's mask id says nothing about rows.
        """
        return self.begin(labels(hidden), beside, caller)

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
            if other is not self and other.owner and other.owner == self.owner:
                other.drop()
        self.first = ids
        self.beside = [tensor.detach().clone() for tensor in beside]
        self.response = response_rows(ids, masked)
        self.schedule: Schedule = schedule(self.options, self.response)
        self.answer = response_of(self.options, self.response)
        self.fixed = {"response": positions(self.answer), "prompt": positions(~self.answer)}
        self.stats.sequences += 1
        return True

    def narrows(self) -> bool:
        """Whether the residual stream of this sequence may be carried for fewer rows."""
        return any(variant.enter == ACTIVE for variant in self.schedule.variants)

    def run_whole(self, reason: str) -> None:
        """From the next call on compute every row: some part of the model cannot run for fewer."""
        warnings.warn(f"dllm: {self.options.method} computes every row at every step: {reason}", stacklevel=2)
        self.schedule = Exact()

    def _step(self, call: Call, device: torch.device) -> Step:
        batch, tokens = call.masked.shape
        self.records = self.options.cuda_graphs and tapes.possible(device)
        plan = self.schedule.next(call)
        every = call.number == 0 and not self.chooses  # whoever gets logits gets those of all rows once
        rows = positions_of_call(call, plan, self.answer, self.options.shift, every, MULTIPLE if self.records else 1)
        if call.number == 0:
            self.room = max(self.room or 0, ROOM) if device.type != "cpu" else self.room
            self.fixed = {name: index.to(device) for name, index in self.fixed.items()}
        indices = {**self.fixed, **{name: index.to(device) for name, index in rows.items()}}
        selected = plan.selected if plan.selected is not None else torch.zeros(batch, dtype=torch.int64)
        sizes = {name: index.shape[1] for name, index in indices.items()}
        sizes["selected"] = int(selected.max())
        sizes["kept"] = plan.kept
        counts = selected.unsqueeze(1).to(device)
        bound = plan.bound.unsqueeze(1).to(device) if plan.bound is not None else None
        repeat = call.repeat and plan.same
        return Step(call.number, repeat, plan.assignment, indices, sizes, counts, bound, (batch, tokens))


MULTIPLE = 8  # of which the rows of a recorded call are one, so that there are few kinds of calls
ROOM = 64  # salient rows that a layer has room for at first, where their number stays on the device
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


def _unchanged(now: Sequence[torch.Tensor], before: list[tuple[torch.Tensor, int]]) -> bool:
    """Whether inputs hold what they held at the last call."""
    if len(now) != len(before):
        return False
    for tensor, (old, version) in zip(now, before, strict=True):
        written = not old.is_inference() and old._version != version
        if written or not (tensor is old or _equal(tensor, old)):
            return False
    return True


def _forget(session: weakref.ref[Session]) -> None:
    """The weights died: free the rows kept for them."""
    alive = session()
    if alive is not None:
        alive.drop()


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.equal(a, b))
