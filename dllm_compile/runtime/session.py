"""The sequences that are under way in one model, and which of them a call goes on with.

The loop is the user's, and does not say where a sequence begins, which tokens are the prompt or what the mask is. A
:class:`Session` works it out from the ids of the calls. All that it reads of the device is one tensor a step: the
ids, and behind them a few truth values and sums that were computed there.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Container, Sequence
from operator import is_
from time import perf_counter
from typing import Any

import torch

from dllm_compile.core.ranks import largest
from dllm_compile.declared import NoDrafts, drafts
from dllm_compile.interface.plan import Exact
from dllm_compile.options import Options
from dllm_compile.passes.block_cache import BLOCK, of_drafts

from .batch import Batch, bytes_of
from .evidence import SHORT, Evidence, begins_masked
from .growing import grows, may_grow
from .ids import infer_mask_id, mask_of_changes
from .next_step import next_step
from .one_response import fills_prompt, goes_on_alone, share
from .read import NewCall, Read, read_call
from .shared_rows import can_share
from .stats import Stats
from .step import Past, Step
from .unchanged import Inputs, Weights

BATCHES = 16  # alive in one model at most
SCORED = 64  # prompts that are remembered because texts on them were scored
LEAST_CAPACITY = 64  # salient rows that a recorded layer has memory for at least


class Session:
    """One compiled model: its weights, and the sequences that are under way in it.

    Args:
        options: what the user chose.
        weights: its parameters, or those of its first layer where layers are traced alone; may be empty.
    """

    def __init__(self, options: Options, weights: Sequence[torch.Tensor]) -> None:
        self.options = options
        self.mask_id = options.mask_id
        self.stats = Stats()
        self.vocabulary: int | None = None
        self.tied: set[Any] = set()  # layers that run more than once in a step
        self.depth = 0  # of the model: layers of a step that had attention
        self.salient_capacities: dict[int, int] = {}  # see :meth:`salient_capacity`
        self.records = False  # whether partial steps become CUDA graphs
        self.lock = threading.RLock()
        self.batches: list[Batch] = []  # the one used last comes last
        self.scored: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []  # see :meth:`_scores`
        self.filled_with: dict[int | None, set[int]] = {}  # by mask token, the tokens that were filled in where it was
        self.before: torch.Tensor | None = None  # ids of the last call, where the mask is inferred
        self.left: float | None = None  # when the last call came to its end; see :meth:`took`
        self.group: str | None = None  # the process group whose ranks share the layers
        self.reads_filled = False  # whether the loop writes over tokens it has filled, and so reads their logits
        self.remasks = False  # whether it puts masks back
        self.told: set[str] = set()  # why steps compute every row
        this = weakref.ref(self)
        self.owners = [weakref.ref(weight) for weight in weights]
        self.weights = Weights(weights, lambda: _forget(this))
        _SESSIONS.add(self)

    def mask_seen(self, mask_id: int | None) -> bool:
        """Whether the mask token is certain: the user gave it, or it was seen to be replaced by two different tokens
        (with one, it may be an ordinary token that the text ends in).
        """
        return self.options.mask_id is not None or len(self.filled_with.get(mask_id, ())) > 1

    def agree(self, found: bool, device: torch.device) -> bool:
        """Whether any rank found something: ranks that share layers have to run the same steps.

        Args:
            found: what this one found.
            device: where ranks can exchange a number.
        """
        if self.group is None:
            return found
        return bool(largest(torch.tensor([int(found)], device=device), self.group))

    def shares_logits(self, device: torch.device) -> bool:
        """Whether callers share the memory that keeps logits, so that what they get has all rows up to date."""
        return can_share(device) and not self.records

    def owns(self, weights: Sequence[torch.Tensor]) -> bool:
        """Whether this is the session of these very weights."""
        return len(weights) == len(self.owners) and all(map(is_, map(weakref.ref.__call__, self.owners), weights))

    def lives(self) -> bool:
        """Whether all of its weights are alive."""
        return all(ref() is not None for ref in self.owners)

    def is_of(self, weights: Container[torch.Tensor]) -> bool:
        """Whether one of its weights is in ``weights``."""
        return any(weight in weights for weight in map(weakref.ref.__call__, self.owners) if weight is not None)

    def shares(self, weights: set[int]) -> bool:
        """Whether the ``id`` of one of its weights is in ``weights``."""
        return any(ref() is not None and id(ref()) in weights for ref in self.owners)

    def salient_capacity(self, step: Step) -> int | None:
        """Salient rows that a layer of a step has memory for; ``None`` where the host counts them.

        On a CPU it always does: a row more costs time. On a device it would wait for each layer, so that only the first
        step of as many active rows is counted on the host, and tells what to expect.
        """
        waits = self.records or step.counts.device.type != "cpu"
        return self.salient_capacities.get(step.sizes.get("active", 0)) if waits else None

    def grow_salient_capacity(self, step: Step, rows: int) -> None:
        """From now on have memory for at least so many salient rows in steps of as many active rows."""
        active = step.sizes["active"]
        self.salient_capacities[active] = min(active, max(LEAST_CAPACITY, 1 << (rows - 1).bit_length()))

    def drop(self) -> None:
        """Forget all sequences and free their rows."""
        dropped, self.batches = self.batches, []
        for each in dropped:
            each.drop_rows()
        self.before = None

    def state_bytes(self) -> int:
        """Bytes of the rows kept of layers between steps."""
        return sum(each.state_bytes() for each in self.batches)

    def logits_bytes(self) -> int:
        """Bytes of the kept outputs of graphs, and of the copies handed out."""
        return sum(each.logits_bytes() for each in self.batches)

    # -- one call ----------------------------------------------------------------------------------------------------

    def begin(self, call: NewCall) -> tuple[Batch, Step] | None:
        """The sequences that a call belongs to and the step that it is, to be committed once it has run; ``None`` where
        its ids are no denoising step: nothing is masked, or the mask is not known.
        """
        self.group = call.program.group or self.group
        moved = self.weights.moved()
        if moved and self.group is None:
            self._weights_changed()
        if drafts():
            return self._drafts(call)
        candidates = [each for each in self.batches if self._could_be(each, call)]
        read = read_call(call, candidates, self.weights, moved, self.group)
        if read.weights_written:
            self._weights_changed()
        candidates = [each for each in candidates if read.same_inputs[each]]
        for each in candidates:
            if each.interrupted:
                each.begin_anew()
        before, self.before = self.before, read.ids if self.options.mask_id is None else None
        batch, branched = self._longer(read, call), False
        if batch is None:
            batch, branched = self._found(read.ids, candidates)
        if batch is not None:
            goes_on_alone(batch, read.ids)
        if batch is None and not branched:
            batch = self._smaller(read.ids, call)
        if batch is not None and not bool((read.ids == batch.mask_id).any()):
            batch.finished = True
            return None
        if batch is None:
            batch = self._start(read.ids, before, call, branched)
            if batch is None:
                return None
        if not batch.layers:
            self._free_state_for(batch)
        step = next_step(self, batch, read, call.program)
        step.head_inputs = batch.head_inputs if read.same_head_inputs.get(batch, False) else Inputs(call.head_inputs)
        return batch, step

    def _drafts(self, call: NewCall) -> tuple[Batch, Step]:
        """The step of a call with possible next ids ``[D, S]`` of one sequence under way.

        Raises:
            NoDrafts: there is no such sequence, or its next step does not compute its block alone.
        """
        ids, program, count = call.ids, call.program, len(call.ids)
        for each in reversed(self.batches):
            past, index = each.past, torch.zeros(count, dtype=torch.int64)
            alike = past is not None and past.ids.shape == (1, ids.shape[1]) and each.loop is call.loop
            inputs = each.inputs.of_sequences(index, 1) if alike and not each.interrupted else None
            if inputs is None or each.model.family != program.signature.family or not inputs.fit(call.side_inputs):
                continue
            if self.agree(any(map(bool, inputs.differ(call.side_inputs))), ids.device) or not each.layers:
                continue
            batch = each.of_drafts(count, program.signature)
            batch.inputs = inputs
            read = Read(ids.detach().cpu().long(), ids.detach().long(), {}, {}, {}, weights_written=False)
            step = next_step(self, batch, read, program)
            if step.assignment != BLOCK or step.refresh or program.token_masks or not program.head(self.vocabulary):
                break
            step.assignment, step.head_inputs = of_drafts(step.assignment), Inputs(())
            return batch, step
        raise NoDrafts(
            "drafts are of a sequence whose next step computes its block alone, in a model that is one graph, and "
            "there is none"
        )

    def commit(self, batch: Batch, step: Step) -> None:
        """Make a step, whose first graph has run, the last one of its sequences."""
        if batch.drafts_of is not None:
            batch.last = step
            self.stats.count(step)
            return
        batch.past, batch.head_inputs, batch.last, batch.finished = step.past, step.head_inputs, step, False
        if batch not in self.batches and batch.shorter is None:
            self.stats.sequences += 1
        self.batches = [*(each for each in self.batches if each not in (batch, batch.shorter)), batch]
        batch.shorter = None
        self.stats.count(step)

    def took(self, batch: Batch, step: Step, begin: float) -> None:
        """Note what time a graph of a step has taken, and the loop before it.

        Args:
            batch: the sequences.
            step: that the graph was a part of.
            begin: when the graph was called, in seconds of the host's clock.
        """
        batch, first, step.timed = batch.drafts_of or batch, not step.timed, True
        batch.opened = batch.opened or step
        left, self.left = self.left, perf_counter()
        if left is None or batch.opened is step or step.compiled:
            return
        begin = max(begin, left) if first else left  # what is between two graphs of a step is of the model
        self.stats.seconds_outside += begin - left
        self.stats.seconds_inside += self.left - begin

    def _could_be(self, each: Batch, call: NewCall) -> bool:
        """Whether a call may go on with a batch, as far as sizes, graph, loop and thread tell."""
        alike = each.past is not None and each.past.ids.shape == call.ids.shape and each.model == call.program.signature
        free = each.thread in (None, threading.get_ident())
        return alike and each.loop is call.loop and free and each.inputs.fit(call.side_inputs)

    def _weights_changed(self) -> None:
        """Drop the rows of all sequences: weights changed, so their next calls compute every row."""
        for each in self.batches:
            each.begin_anew()
        self.weights.look()

    # -- which sequence ----------------------------------------------------------------------------------------------

    def _found(self, ids: torch.Tensor, candidates: list[Batch]) -> tuple[Batch | None, bool]:
        """The batch that a call continues, if any, and whether the call instead starts a second loop that branches off
        from an earlier call of a candidate.

        Some of the sequences of a batch may begin anew.
        """
        fitting = [each for each in candidates if bool(each.goes_on(ids).all())]
        if not fitting and (wrong := next((each for each in candidates if fills_prompt(each, ids)), None)) is not None:
            fitting = [wrong]
        fitting.sort(key=lambda each: each.distance(ids))
        best = fitting[0] if fitting else None
        last = self.batches[-1] if self.batches else None
        again = best is not None and last in fitting and torch.equal(last.first, best.first)
        if best is not None and again and best.distance(ids) == (0, 0):
            best = last  # a run on the same prompt comes by where one was left
        if best is not None:
            branched = best.distance(ids)[0] > 0 and best.branches(ids)
            return (None, True) if branched else (best, False)
        for each in reversed(candidates):
            rows = each.replaces(ids)
            if rows is not None:
                each.replace(rows, ids)
                return each, False
        return None, False

    def _smaller(self, ids: torch.Tensor, call: NewCall) -> Batch | None:
        """A larger batch of which ``ids`` ``[b, S]`` are the sequences that are left; the others are dropped."""
        for each in reversed(self.batches):
            past, program = each.past, call.program
            if past is None or past.ids.shape[1] != ids.shape[1] or each.model.family != program.signature.family:
                continue
            if each.loop is not call.loop or each.thread is not None:
                continue
            index = each.rows_of(ids)
            inputs = each.inputs.of_sequences(index, len(past.ids)) if index is not None else None
            if index is None or inputs is None or not inputs.fit(call.side_inputs):
                continue
            if not self.agree(any(inputs.differ(call.side_inputs)), ids.device):
                each.keep_sequences(index, inputs, program.signature)
                return each
        return None

    def _longer(self, read: Read, call: NewCall) -> Batch | None:
        """A sequence that goes on with masks behind its last tokens; see :mod:`.growing`."""
        for each in reversed(self.batches if call.args and self.group is None else []):
            if each.loop is not call.loop or each.thread is not None:
                continue
            if not each.interrupted and may_grow(each, read.ids):
                inputs = grows(each, call.side_inputs, call.program, call.args)
                if inputs is not None:
                    return each.longer(read.ids, read.on_device, inputs, call.program, call.args)
        return None

    def _start(self, ids: torch.Tensor, before: torch.Tensor | None, call: NewCall, branched: bool) -> Batch | None:
        """The batch of sequences that begin with a call; ``None`` where nothing is masked.

        Args:
            ids: ``[B, S]`` int64 of the call, on the CPU.
            before: those of the last call, where the mask is inferred.
            call: the call.
            branched: whether it is known to be another loop on the prompt of a sequence under way.
        """
        fills, begins_with = 0, ids
        if self.options.mask_id is None:
            filled = None if self.mask_seen(self.mask_id) else mask_of_changes(before, ids, self.mask_id)
            if before is not None and filled not in (None, self.mask_id):  # the first call ended in padding, or in text
                self.mask_id, fills, begins_with = filled, 1, before
            elif self.mask_id is None or not bool((ids == self.mask_id).any()):
                found = infer_mask_id(ids)
                self.mask_id = self.mask_id if found is None else found
        mask_id = self.mask_id
        if mask_id is None or not bool((ids == mask_id).any()):
            return None
        inputs = Inputs(call.side_inputs)
        scores = self._scores(ids, inputs)
        self.batches = [each for each in self.batches if not each.finished][-BATCHES + 1 :]
        batch = Batch(self, ids, mask_id, inputs, call.program.signature, call.loop)
        begins = begins_masked(begins_with == mask_id, begins_with)
        short = int(batch.response.sum(1).max()) < SHORT
        plans = batch.new_schedule()
        declared_so = branched or call.loop is not None or call.program.fills or isinstance(plans, Exact)
        evidence = Evidence(declared_so, begins, scores, self.options.shift, short, fills)
        batch.past = Past(ids, ids, -1, plans, None, evidence, missed=False, history=())
        for each in self.batches:
            share(batch, each)
        if begins or evidence.declared:
            self.weights.sum()
        return batch

    def _scores(self, ids: torch.Tensor, inputs: Inputs) -> bool:
        """Whether texts on this prompt seem to be scored: a run on it was given up before it had used up its masks.

        A run beside other inputs is another stream, which may well go on.
        """
        for each in self.batches:
            evidence = each.past.evidence if each.past is not None else None
            given_up = evidence is not None and evidence.fills > 0 and not evidence.is_loop and not each.finished
            if given_up and _agrees(ids, each.first, each.response):
                self.scored = [*self.scored[1 - SCORED :], (each.first, each.response, each.inputs.checksums())]
        alike = [sums for first, response, sums in self.scored if _agrees(ids, first, response)]
        mine = inputs.checksums() if alike else None
        return mine is not None and any(torch.equal(sums, mine) for sums in alike)

    def _free_state_for(self, batch: Batch) -> None:
        """Drop rows of the sequences used longest ago, until one more of the largest has room."""
        others = [each for each in self.batches if each is not batch and each.layers]
        needed = max((bytes_of([each]) for each in others), default=0)
        while others and bytes_of(others) + needed > self.options.max_state_bytes:
            others.pop(0).begin_anew()


def _agrees(ids: torch.Tensor, first: torch.Tensor, response: torch.Tensor) -> bool:
    """Whether ``ids`` equal ``first`` everywhere but in ``response``."""
    return ids.shape == first.shape and bool(((ids == first) | response).all())


_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()


def sessions() -> list[Session]:
    """All live sessions."""
    return list(_SESSIONS)


def _forget(session: weakref.ref[Session]) -> None:
    """Free the rows of a session, one of whose weights died; not at the end of Python, when everything is freed
    anyway.
    """
    alive = session()
    if alive is not None and not sys.is_finalizing():
        alive.drop()
