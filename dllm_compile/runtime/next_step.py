"""What a call of known sequences computes: the rows that the schedule says, as positions on the device."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from dllm_compile.core.assignment import EXACT
from dllm_compile.declared import to_be_filled, to_be_read, wanted
from dllm_compile.interface.plan import Call, Exact, Plan, copied, rows_before
from dllm_compile.passes.flashblock import renewing

from . import recordings
from .batch import Batch
from .evidence import Evidence
from .positions import packed, positions_of_call, positions_returned
from .program import Program
from .read import Read
from .skipping import widths
from .step import Past, Step

if TYPE_CHECKING:
    from .session import Session

HISTORY = 8  # earlier ids that are remembered, to tell a second loop on the same prompt
MULTIPLE = 32  # of which the rows of a recorded call are one: few kinds of calls, and a GPU is as fast for 32 as for 1


def next_step(session: Session, batch: Batch, read: Read, program: Program) -> Step:
    """The step that a call is.

    Args:
        session: of the model; what the call tells of the mask token is noted there.
        batch: the sequences that the call goes on with.
        read: the call.
        program: the graph that is called.
    """
    past, last = batch.past, batch.last
    assert past is not None
    device = read.on_device.device
    asked = to_be_read(read.ids.shape)
    known = past.read is None or (asked is not None and not bool((asked & ~past.read).any()))
    caller = program if known and read.same_head_inputs.get(batch, False) else None
    said = to_be_filled(read.ids.shape), wanted(read.ids.shape), asked
    follow = not (_reads_any(session, program, batch.mask_id) or session.remasks)
    call = batch.call(read.ids, caller, *said, follow=follow)
    if call.repeat and past.number == 0 and session.agree(session.weights.written_anywhere(), device):
        session.weights.sum()  # a few numbers differ of which the sample has none
        batch.begin_anew()
        past = batch.past
        assert past is not None
        call = batch.call(read.ids, caller, *said, follow=follow)
    if call.repeat and last is not None and not last.delivered and program in batch.outputs:
        # an interrupt came between the step and its result
        return replace(last, repeat=True, layer=0, depth=0, seen=set(), timed=False)
    evidence = _evidence(session, batch, read, call, past)
    lossy = not isinstance(past.schedule, Exact)
    missed = False
    if past.missed and evidence.is_loop:  # the schedule begins here
        plans = batch.new_schedule()
        call = replace(call, number=0, repeat=False, notes={})
    else:
        plans = copied(past.schedule)
    if batch.whole and lossy:
        plans = Exact()
    plan = plans.next(call)
    served = call.repeat and plan.same and batch.thread is None and program in batch.outputs
    known = evidence.is_loop or not lossy or served
    if not known and (plan.warning is not None or not plan.assignment.computes_all):
        missed, plan, plans, call = True, Plan(EXACT), past.schedule, replace(call, number=past.number, repeat=False)
    elif plan.warning is not None:
        warnings.warn(plan.warning, stacklevel=2)
    history = past.history if past.history and torch.equal(past.history[-1], read.ids) else (*past.history, read.ids)
    new = Past(
        read.ids,
        read.on_device,
        call.number,
        plans,
        program,
        evidence,
        missed or (past.missed and not evidence.is_loop),
        history[-HISTORY:],
        asked,
        call.notes,
    )
    return _planned(session, batch, new, call, plan, program, device)


def _evidence(session: Session, batch: Batch, read: Read, call: Call, past: Past) -> Evidence:
    """The evidence after this call that it belongs to a loop; notes the tokens that masks were filled with."""
    evidence = past.evidence
    if not (past.number >= 0 or past.missed):  # there was no call before
        return evidence
    if not session.mask_seen(batch.mask_id) and bool(call.filled.any()):
        session.filled_with.setdefault(batch.mask_id, set()).update(read.ids[call.filled].tolist())
    if bool(call.filled.any()) and not evidence.is_loop:
        found = read.found.get(batch)
        evidence = evidence.after(past.ids == batch.mask_id, call.masked, found, session.vocabulary or 2)
        if evidence.sure and not evidence.is_loop and not past.evidence.sure:
            warnings.warn(
                "dllm: these calls look like a denoising loop that did not begin fully masked behind a prompt, and "
                "run without a cache; if they are one, make them inside of `with dllm_compile.loop():`",
                stacklevel=2,
            )
    return evidence


def _planned(
    session: Session, batch: Batch, past: Past, call: Call, plan: Plan, program: Program, device: torch.device
) -> Step:
    size, tokens = call.masked.shape
    session.records = session.options.cuda_graphs and recordings.possible(device)
    if past.number > 0 and call.rewrites:
        _note_rewriting(session, program, call.remasks)
    if plan.held is not None:
        batch.held = max(batch.held, int(plan.held.sum(1).max()), 2)
        plan = _with_all_renewed(batch, plan)
    every = _reads_any(session, program, batch.mask_id) or session.reads_filled
    every |= (call.number == 0 or past.missed) and not program.chooses  # the first logits are returned in full
    every |= not bool(call.masked.any())  # a call without masks is made for its logits
    multiple = MULTIPLE if session.records else 1
    skips = past.schedule.skips is not None  # by how sure all masked rows are
    rows = positions_of_call(
        call,
        plan,
        batch.answer,
        session.options.shift,
        None if every else call.masked if past.read is None or skips else past.read,
        multiple,
        past.schedule.after_layer is not None,
        batch.held,
    )
    indices = {**batch.fixed, **rows}
    selected = plan.selected if plan.selected is not None else torch.zeros(size, dtype=torch.int64)
    sizes = {name: index.shape[1] for name, index in indices.items()}
    sizes["selected"] = int(selected.max())
    sizes["kept"] = plan.kept
    sizes["held"] = batch.held
    masks = {} if plan.bound is None else {"bound": plan.bound.unsqueeze(1)}
    masks |= {} if plan.visible is None else {"visible": plan.visible}
    masks |= {} if plan.renew is None else {"renew": plan.renew}
    masks |= {} if plan.going is None else _told_of_rows(call, plan.going, session.options.shift)
    sizes |= widths(plan, 8 if session.records else 1)
    every |= session.shares_logits(device)
    read = {} if every else {"returned": positions_returned(call, session.options.shift)}
    memory, places = packed({"counts": selected.unsqueeze(1), **masks, **indices, **read}, device)
    repeat = call.repeat and plan.same
    step = Step.of(memory, places, past, repeat, plan.assignment, sizes, (size, tokens))
    step.refresh = plan.refresh
    return step


def _reads_any(session: Session, program: Program, mask_id: int) -> bool:
    """Whether outputs of rows that are not masked may be read, whatever the loop did so far."""
    every = session.options.readable == "all" or program.reads_all(session.vocabulary)
    return every or not session.mask_seen(mask_id)  # a sampler may read rows of another token


def _with_all_renewed(batch: Batch, plan: Plan) -> Plan:
    """The plan, but all sequences compute attention over the keys outside anew where a layer has none that is good."""
    if not batch.without_outside:
        return plan
    assert plan.renew is not None
    assert plan.refreshed is not None
    batch.without_outside.clear()
    return replace(plan, assignment=renewing(plan.assignment), renew=~plan.refreshed, same=False)


def _told_of_rows(call: Call, going: torch.Tensor, shift: bool | None) -> dict[str, torch.Tensor]:
    """What the choice of the rows that go on reads beside hidden states and confidences."""
    predicts = rows_before(call.masked) if shift else call.masked
    return {"going": going, "predicts": predicts, "filled": call.written & (call.number > 0)}


def _note_rewriting(session: Session, program: Program, masks: bool) -> None:
    """Note that the loop wrote over a token, ``masks``: the mask; tell so once."""
    known, session.reads_filled, session.remasks = session.reads_filled, True, session.remasks or masks
    if not known and session.options.readable != "all" and not program.chooses:
        what = "puts masks back over tokens" if masks else "writes other tokens over those it has filled"
        warnings.warn(
            f"dllm: this loop {what}, so it may read the logits of tokens it has filled, which "
            "so far were those of an earlier step; from here on they are computed at every step. Give "
            "readable='all' to have them from the first call on",
            stacklevel=2,
        )
