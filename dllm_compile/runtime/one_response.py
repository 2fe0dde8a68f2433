"""Which calls share a response: those of guidance, with the prompt and with masks in its place, and those of sequences
that begin in the middle of a response to the same prompt.

Where the call without the prompt, or without a part of it, comes first, the one with it looks like the next step of the
same loop, which fills the prompt: :func:`may_have_prompt` notes that, and :func:`without_prompt` sees it when the third
call has masks in these places again.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from .evidence import begins_masked
from .ids import masks_prompt

if TYPE_CHECKING:
    from .batch import Batch


def share(batch: Batch, earlier: Batch) -> None:
    """Give sequences that begin, or those of an ``earlier`` call, the response of the other: where one of the two has
    the prompt of the other masked, or where the new ones begin in the middle of a response to the same prompt.
    """
    assert batch.past is not None
    assert earlier.past is not None
    ids, before, mask = batch.past.ids, earlier.past.ids, batch.mask_id
    if ids.shape != before.shape or batch.loop is not earlier.loop or earlier.thread is not None:
        return
    masked, prompt = ids == mask, ~earlier.response
    if without_prompt(earlier, ids):
        assert earlier.filled_second is not None
        evidence = replace(earlier.past.evidence, fills=0, in_order=True, ratios=(0.0,) * 4)
        batch.past = replace(batch.past, evidence=evidence)
        earlier.past = replace(earlier.past, evidence=replace(evidence, begins=True))
        batch.first, earlier.first = earlier.first, torch.where(earlier.filled_second, before, earlier.first)
        earlier.filled_second = None
        earlier.respond_in(earlier.first == mask)
        batch.respond_in(earlier.response)
    elif masks_prompt(ids, before, masked, earlier.response):
        batch.respond_in(earlier.response)
    elif masks_prompt(before, ids, before == mask, batch.response):
        earlier.respond_in(batch.response)
    elif not (begins_masked(masked, ids) or bool((prompt & (masked | (ids != earlier.first))).any())):
        batch.respond_in(earlier.response)


def may_have_prompt(batch: Batch, ids: torch.Tensor) -> None:
    """Note which masks the second call of a sequence, with ``ids`` ``[B, S]``, fills, where it then is a prompt with
    masks behind it: the first call may have been the one without the prompt. Where these are more than a loop fills at
    once, or the first call was masks alone, compute every row, as of a sequence that begins.
    """
    assert batch.past is not None
    before, mask = batch.past.ids, batch.mask_id
    filled, masked = ids != before, ids == mask
    if batch.past.number < 0 or not torch.equal(before, batch.first) or not bool(filled.any()):
        return
    batch.filled_second = None
    behind = masked.cummax(1).values  # the first mask, and all tokens behind it
    if begins_masked(masked, ids) and not bool((filled & (behind | (before != mask))).any()):
        batch.filled_second = filled
        most = batch.options.block_length or int(batch.response.sum(1).max()) // 4
        many = bool((filled.sum(1) > most).any()) or bool((batch.first == mask).all())
        if many and batch.past.evidence.is_loop:
            batch.begin_anew()


def without_prompt(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether a third call with ``ids`` ``[B, S]`` is without the prompt: it puts back all masks that the second one of
    ``batch`` filled, and else only fills other masks. Then the first call was without it, too.
    """
    assert batch.past is not None
    before, mask, filled = batch.past.ids, batch.mask_id, batch.filled_second
    if filled is None or len(batch.past.history) > 2 or torch.equal(ids, batch.first):
        return False
    back = not bool((filled & (ids != mask)).any())
    return back and not bool(((ids != before) & ~filled & (before != mask)).any())


def fills_prompt(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether a call with ``ids`` ``[B, S]`` fills masks outside of a response that was taken over, and does nothing
    else. Then these are no prompt, and the response is all masks again.
    """
    assert batch.past is not None
    changed, masked = ids != batch.past.ids, batch.past.ids == batch.mask_id
    found = batch.taken_over and bool((changed & ~batch.response).any()) and not bool((changed & ~masked).any())
    if found:
        batch.respond_in(batch.first == batch.mask_id)
    return found
