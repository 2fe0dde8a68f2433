"""The sequences of one batch that a denoising loop decodes, and all that is kept of them between calls."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from dllm_compile.core.assignment import ACTIVE
from dllm_compile.core.state import grown
from dllm_compile.declared import Loop
from dllm_compile.interface.plan import Call, Exact, Schedule, copied
from dllm_compile.schedule.method import response_of, schedule

from . import recordings
from .evidence import Expected, begins_masked
from .ids import positions, response_rows
from .one_response import begins_prompt
from .output_buffers import OutputBuffers
from .shared_rows import SharedRows
from .step import Past, Step
from .unchanged import Inputs

if TYPE_CHECKING:
    from .program import Program, Signature
    from .session import Session


class Batch:
    """The sequences of one batch, from a prompt to a response without masks, and what is kept of them.

    Args:
        session: of the model.
        ids: ``[B, S]`` int64 of the first call, on the CPU.
        mask_id: the mask token.
        inputs: the inputs beside the ids.
        model: what tells the graphs of this model from others.
        loop: the loop that the caller declared, if it did.
    """

    def __init__(
        self, session: Session, ids: torch.Tensor, mask_id: int, inputs: Inputs, model: Signature, loop: Loop | None
    ) -> None:
        self.session, self.options, self.mask_id = session, session.options, mask_id
        self.inputs, self.model, self.loop = inputs, model, loop
        self.thread: int | None = None  # that a step in several graphs is under way on
        self.past: Past | None = None
        self.head_inputs: Inputs | None = None  # what only the head read at the last call
        self.part_inputs: dict[Any, Inputs] = {}  # of graphs that are called behind the one with the ids
        self.finished = False  # a call behind the last step filled all masks
        self.whole = False  # some part of the model cannot run for fewer rows
        self.stale = False  # what is kept is not good for the next call
        self.last: Step | None = None
        self.opened: Step | None = None  # the first that ran
        self.shorter: Batch | None = None  # what this one goes on with, where it has more tokens
        self.drafts_of: Batch | None = None  # the batch whose rows are read, where these are drafts
        self.layers_seen = 0  # of a step
        self.told_unskipped = False
        self.depends: torch.Tensor | None = None  # see :class:`.interface.plan.Call`
        self.asked_masks = False  # for it
        self.drop_rows()
        self._start(ids)

    def _start(self, ids: torch.Tensor) -> None:
        masked = ids == self.mask_id
        self.first = ids
        self.response = response_rows(ids, masked)
        self.taken_over = not torch.equal(self.response, masked)  # the response is that of other sequences
        self.without_prompt: tuple[Batch, Past | None] | None = None  # see :func:`.one_response.goes_on_alone`
        self._locate()

    def _locate(self) -> None:
        self.answer = response_of(self.options, self.response)
        self.fixed = {"response": positions(self.answer), "prompt": positions(~self.answer)}

    def respond_in(self, response: torch.Tensor) -> None:
        """Begin anew with another ``response`` ``[B, S]``, where it differs."""
        if not torch.equal(response, self.response):
            self.response, self.taken_over = response, not torch.equal(response, self.first == self.mask_id)
            self._locate()
            self.begin_anew()

    def follow_masks(self, program: Program, args: Sequence[Any]) -> None:
        """Find out how far rows depend on tokens, where attention masks show it; schedules are told from the next call
        on.
        """
        self.asked_masks = True
        found = program.depends(args, self.session.vocabulary)
        if found is not None and self.inputs.compare_whole(found[1]):
            self.depends = found[0]

    def new_schedule(self) -> Schedule:
        """The schedule of a sequence that begins."""
        return Exact() if self.whole else schedule(self.options, self.response)

    def of_drafts(self, count: int, model: Signature) -> Batch:
        """A batch of ``count`` copies of the one sequence, which reads its rows and has none of its own."""
        assert self.past is not None
        new = copy(self)
        new.drop_rows()
        new.layers, new.drafts_of, new.model, new.last = self.layers, self, model, None
        new.first, new.response = self.first.expand(count, -1), self.response.expand(count, -1)
        new._locate()

        def repeated(value: torch.Tensor) -> torch.Tensor:
            return value.expand(count, *value.shape[1:])

        past = self.past
        plans = copied(past.schedule, repeated)
        ids, on_device = repeated(past.ids), repeated(past.on_device)
        new.past = replace(past, ids=ids, on_device=on_device, schedule=plans, history=(), caller=None, read=None)
        return new

    def drop_rows(self) -> None:
        """Free everything that is kept of earlier calls but their ids."""
        self.layers: dict[Any, list[torch.Tensor]] = {}
        self.outputs: dict[Any, Any] = {}
        self.kept: dict[Any, torch.Tensor] = {}
        self.shared: dict[Any, SharedRows] = {}  # the same of logits on a CPU
        self.output_buffers: dict[Any, OutputBuffers] = {}
        self.masked: dict[Any, bool] = {}  # of graphs and layers, whether an attention mask hides something
        self.token_masks: dict[Any, list[torch.Tensor]] = {}  # likewise, what masks made of the tokens were
        self.looked: set[Any] = set()  # graphs and layers whose masks were seen not to be causal
        self.held = 0  # rows that there is memory for of attention over the keys outside
        self.without_outside: set[Any] = set()  # layers that keep none of it that is good
        self.shadow: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.recordings = recordings.Recordings()  # they hold addresses of rows
        self.expected: Expected | None = None  # while it is in doubt whether this is a loop

    def begin_anew(self) -> None:
        """Drop the cached rows, so that the next call computes every row as if the sequence began there. The evidence
        that this is a loop is kept.
        """
        self.drop_rows()
        self.stale, self.last = False, None
        if self.past is not None:
            self.past = replace(self.past, number=-1, schedule=self.new_schedule(), caller=None, missed=False)

    @property
    def interrupted(self) -> bool:
        """Whether the cached rows are invalid: the last step was interrupted before all layers had run, or the weights
        or inputs changed.
        """
        last = self.last
        return self.stale or (
            last is not None and (last.layer < self.layers_seen or (self.thread is not None and not last.delivered))
        )

    def state_bytes(self) -> int:
        """Bytes of the rows kept of layers between steps."""
        return sum(t.nbytes for tensors in self.layers.values() for t in tensors)

    def logits_bytes(self) -> int:
        """Bytes of the kept outputs of graphs, and of the copies handed out."""
        kept = sum(t.nbytes for t in self.kept.values()) + sum(each.nbytes for each in self.shared.values())
        return kept + sum(box.bytes() for box in self.output_buffers.values())

    # -- the ids of a call -------------------------------------------------------------------------------------------

    def goes_on(self, ids: torch.Tensor) -> torch.Tensor:
        """Which sequences, ``[B]`` bool, a call with ``ids`` ``[B, S]`` could be the next of.

        A loop may fill masks, put some back, and edit some tokens; the first ids again after others are a restart. As
        long as it is in doubt whether it is a loop, it may only fill.
        """
        assert self.past is not None
        before = self.past.ids
        changed = ids != before
        filled = changed & (before == self.mask_id)
        if begins_prompt(self, ids):
            return torch.zeros(len(ids), dtype=torch.bool)
        if not self.past.evidence.declared:
            many = filled.sum(1) * 4 > self.response.sum(1)
            if bool(many.all()) and begins_masked(ids == self.mask_id, ids):
                return torch.zeros_like(many)  # rather the start of a longer prompt
        if not self.past.evidence.is_loop:
            return (~changed | filled).all(1)
        remasked = changed & (ids == self.mask_id)
        edited = changed & ~filled & ~remasked
        size = self.response.sum(1)
        inside = ~(changed & ~self.response).any(1)
        again = (ids == self.first).all(1) & changed.any(1)
        few = remasked.sum(1) * 4 <= size
        if not self.past.evidence.declared:
            few &= edited.sum(1) * 2 <= size  # another text on the same prompt
        return inside & ~again & few

    def distance(self, ids: torch.Tensor) -> tuple[int, int]:
        """Distance of ``ids`` from those of the last call: number of changed tokens that were not masks, and of all
        changed tokens.
        """
        assert self.past is not None
        changed = ids != self.past.ids
        return int((changed & (self.past.ids != self.mask_id)).sum()), int(changed.sum())

    def branches(self, ids: torch.Tensor) -> bool:
        """Whether ``ids`` fill masks of an earlier call, not of the last one: another loop on the same prompt.

        Where the last call has another token, or one in place of a mask, the earlier one is as ``ids`` are.
        """
        assert self.past is not None
        undone = (ids != self.past.ids) & (self.past.ids != self.mask_id)
        return any(
            bool(((ids == old) | ((old == self.mask_id) & ~undone)).all() and (ids != old).any())
            and not torch.equal(old, self.first)
            for old in self.past.history[:-1]
        )

    def _fresh(self, ids: torch.Tensor) -> torch.Tensor:
        """Which sequences, ``[B]`` bool, are a prompt with masks behind it, or hold no mask."""
        masked = ids == self.mask_id
        behind = masked.long().cummax(1).values.bool()
        return (masked == behind).all(1)

    def replaces(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Which sequences, ``[B]`` bool, a call with ``ids`` ``[B, S]`` replaces by new ones while others go on;
        ``None`` where it does not.
        """
        assert self.past is not None
        if not self.past.evidence.is_loop or torch.equal(ids, self.first):
            return None
        same = self.goes_on(ids)
        changed = ids != self.past.ids
        pure = ~(changed & (self.past.ids != self.mask_id)).any(1)
        stay = same & pure
        if not bool(stay.any()) or not bool(self._fresh(ids)[~stay].all()):
            return None
        return ~stay

    def replace(self, rows: torch.Tensor, ids: torch.Tensor) -> None:
        """Begin anew for some sequences of the batch.

        Args:
            rows: ``[B]`` bool, which ones.
            ids: ``[B, S]`` int64 of the call that begins them.
        """
        assert self.past is not None
        at = rows.unsqueeze(1)
        self.first = torch.where(at, ids, self.first)
        self.response = torch.where(at, ids == self.mask_id, self.response)
        self.taken_over, self.without_prompt = False, None
        self._locate()
        plans = copied(self.past.schedule)
        old = torch.where(at, ids, self.past.ids)
        self.past = replace(self.past, ids=old, schedule=plans, caller=None, history=())
        self.last = None  # what was noted behind its layers is of the sequences before
        if not plans.begin_anew(rows, self.response):
            self.begin_anew()

    def rows_of(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Which of the sequences a smaller batch ``ids`` ``[b, S]`` goes on with: ``[b]`` int64, or ``None``."""
        assert self.past is not None
        size = len(self.past.ids)
        if not self.past.evidence.is_loop or len(ids) >= size:
            return None
        found: list[int] = []
        for row in ids:
            every = row.unsqueeze(0).expand(size, -1)
            fits = self.goes_on(every) & ~((every != self.past.ids) & (self.past.ids != self.mask_id)).any(1)
            after = [i for i in fits.nonzero().flatten().tolist() if not found or i > found[-1]]
            if not after:
                return None
            found.append(after[0])
        return torch.tensor(found)

    def keep_sequences(self, index: torch.Tensor, inputs: Inputs, model: Signature) -> None:
        """Drop the other sequences of the batch.

        Args:
            index: ``[b]`` int64, those that stay.
            inputs: of those.
            model: what tells the graphs of the smaller batch.
        """
        assert self.past is not None
        past, self.inputs, self.model, self.without_prompt = self.past, inputs, model, None
        size = len(past.ids)

        def some(value: torch.Tensor) -> torch.Tensor:
            return value[index.to(value.device)]

        with torch.inference_mode(False):  # a later call may write to these outside of inference mode
            layers = {key: [some(each) for each in rows] for key, rows in self.layers.items()}
            kept = {key: some(each) for key, each in self.kept.items()}
            shared = {key: each.of(some(each.rows)) for key, each in self.shared.items()}
        outside = self.held, self.without_outside
        self.drop_rows()
        self.layers, self.kept, self.shared = layers, kept, shared
        self.held, self.without_outside = outside
        self.part_inputs.clear()
        self.first, self.response = some(self.first), some(self.response)
        self.depends = None if self.depends is None else some(self.depends)
        self._locate()
        plans = copied(past.schedule, lambda each: some(each) if each.shape[:1] == (size,) else each)
        read = None if past.read is None else some(past.read)
        here = {"ids": some(past.ids), "on_device": some(past.on_device), "read": read}
        self.past = replace(past, **here, schedule=plans, history=())  # type: ignore[arg-type]
        self.last = None  # what was noted behind its layers is of all sequences

    def longer(
        self, ids: torch.Tensor, on_device: torch.Tensor, inputs: Inputs, program: Program, args: Sequence[Any]
    ) -> Batch:
        """The same sequences with masks behind their last tokens, which the rows kept so far do not depend on; see
        :mod:`.growing`. It takes the place of this one when it has run.

        Args:
            ids, on_device: ``[B, L]`` int64 of the longer call, on the CPU and where they came from.
            inputs: of it.
            program: the graph that is called.
            args: its arguments.
        """
        past, new = self.past, copy(self)
        assert past is not None
        tokens = past.ids.shape[1]
        new.drop_rows()
        new.layers = {key: [grown(each, ids.shape[1]) for each in rows] for key, rows in self.layers.items()}
        new.kept = {key: grown(each, ids.shape[1]) for key, each in self.kept.items()}
        new.shared = {key: each.longer(ids.shape[1]) for key, each in self.shared.items()}
        new.shorter, new.inputs, new.model, new.part_inputs = self, inputs, program.signature, {}
        masks = ids[:, tokens:]
        new.first = torch.cat([self.first, masks], 1)
        new.response = torch.cat([self.response, torch.ones_like(masks, dtype=torch.bool)], 1)
        new._locate()
        plans = copied(past.schedule)
        plans.grow(new.response)
        here = torch.cat([past.on_device, on_device[:, tokens:]], 1)
        before = torch.cat([past.ids, masks], 1)
        new.past = replace(past, ids=before, on_device=here, schedule=plans, history=(), caller=None, read=None)
        new.last, new.head_inputs = None, None  # what was noted behind its layers is of fewer rows
        new.depends, new.without_prompt = None, None
        new.follow_masks(program, args)
        return new

    def known_head_inputs(self, ids: torch.Tensor | None, new: Sequence[torch.Tensor]) -> Inputs | None:
        """The inputs that only the head read at the last call, to compare ``new`` ones with; ``None`` where they do not
        fit, or where ``ids`` ``[B, S]``, if given, differ from those of that call: then nothing depends on it.
        """
        known = self.head_inputs
        again = ids is None or (self.past is not None and torch.equal(ids, self.past.ids))
        return known if known is not None and again and known.fit(new) else None

    def call(
        self,
        ids: torch.Tensor,
        caller: object,
        filling: torch.Tensor | None,
        wanted: torch.Tensor | None = None,
        read: torch.Tensor | None = None,
        follow: bool = False,
    ) -> Call:
        """What happened since the last call, as a schedule is told; with ``follow``, also how far rows depend on
        tokens.
        """
        masked, past = ids == self.mask_id, self.past
        before = ids if past is None else past.ids
        changed = before != ids
        filled = changed & ~masked & (before == self.mask_id)
        number = 0 if past is None else past.number + 1
        repeat = past is not None and number > 0 and caller is not None and caller is past.caller
        repeat = repeat and not bool(changed.any())
        last = self.last
        notes = {**last.past.notes, **last.noted} if last is not None else {}
        call = Call(number, repeat, masked, filled, changed, filling, notes, wanted, read)
        if not follow or self.depends is None or call.remasks:
            return call
        reads_more = not bool(masked.any()) or call.rewrites  # than before: what was left as it is has no such logits
        return replace(call, depends=self.depends) if self.session.reads_filled or not reads_more else call

    def expect(self, program: Program) -> None:
        """While it is undecided whether these calls are a loop, keep the logits that are returned: tokens filled next
        are compared with them.
        """
        made = program.logits(self.session.vocabulary)
        logits = self.outputs.get(program, {}).get(made) if made is not None else None
        if self.past is None or self.past.evidence.is_loop:
            self.expected = None
        elif logits is not None:
            places = (self.past.ids == self.mask_id).any(0).nonzero()
            self.expected = Expected(logits, max(int(places[0]) - 1, 0), int(places[-1]) + 1)

    def narrows(self, plans: Schedule) -> bool:
        """Whether the residual stream of this sequence may be carried for fewer rows."""
        return any(variant.enter == ACTIVE for variant in plans.variants)

    def tell_unskipped(self) -> None:
        """Warn once that no row is skipped, since no graph is known to make the logits whose confidence chooses
        rows.
        """
        if not self.told_unskipped:
            warnings.warn(
                "dllm: deeper layers skip no rows, as no graph of this model is seen to make logits, whose confidence "
                "chooses them; compile the model as a whole",
                stacklevel=2,
            )
        self.told_unskipped = True

    def run_whole(self, reason: str) -> None:
        """Compute every row from the next call on, and warn: some part of the model cannot run for fewer."""
        self.tell_whole(reason)
        self.whole = True

    def tell_whole(self, reason: str, where: str = "") -> None:
        """Warn once why every row is computed; ``where`` names the part, if it is not all of the model."""
        if reason not in self.session.told:
            method = self.options.method if self.options.method != "exact" else "this setting"
            warnings.warn(f"dllm: {method} computes every row{where} at every step: {reason}", stacklevel=2)
        self.session.told.add(reason)


def bytes_of(batches: Sequence[Batch]) -> int:
    """Bytes of all that is kept of some batches."""
    return sum(each.state_bytes() + each.logits_bytes() for each in batches)
