"""Which calls share a response: those of guidance, with the prompt and with masks in its place, and those of sequences
that begin in the middle of a response to the same prompt.

A call of masks alone may be either: one without its prompt, or one of a loop that has no prompt. It is taken for the
first as soon as a call with a prompt follows, which :func:`goes_on_alone` and :func:`fills_prompt` undo where later
calls show that it was the second.
"""

from __future__ import annotations

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
    if masks_prompt(ids, before, masked, earlier.response):
        batch.respond_in(earlier.response)
    elif masks_prompt(before, ids, before == mask, batch.response):
        earlier.respond_in(batch.response)
        batch.without_prompt = (earlier, earlier.past) if bool((before == mask).all()) else None
    elif not (begins_masked(masked, ids) or bool((prompt & (masked | (ids != earlier.first))).any())):
        batch.respond_in(earlier.response)


def goes_on_alone(batch: Batch, ids: torch.Tensor) -> None:
    """See whether a call of masks alone, behind which ``batch`` began with what looked like a prompt, was the first of
    the same loop: it was, if calls go on with ``batch``, here with other ``ids`` ``[B, S]``, and not with the masks.
    Then what looked like a prompt was filled by the loop, and belongs to the response.
    """
    assert batch.past is not None
    if batch.without_prompt is None or torch.equal(ids, batch.past.ids):
        return
    (masks, past), batch.without_prompt = batch.without_prompt, None
    if masks.past is past:
        batch.respond_in(masks.first == batch.mask_id)


def fills_prompt(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether a call with ``ids`` ``[B, S]`` fills masks outside of a response that was taken over, and does nothing
    else. Then these are no prompt, and the response is all masks again.
    """
    assert batch.past is not None
    changed, masked = ids != batch.past.ids, batch.past.ids == batch.mask_id
    found = batch.taken_over and bool((changed & ~batch.response).any()) and not bool((changed & ~masked).any())
    if found and not begins_prompt(batch, ids):
        batch.respond_in(batch.first == batch.mask_id)
        return True
    return False


def begins_prompt(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether ``ids`` ``[B, S]`` begin a sequence with a prompt, where those of the last call were masks alone."""
    assert batch.past is not None
    alone = bool((batch.past.ids == batch.mask_id).all()) and bool((ids[:, 0] != batch.mask_id).all())
    return alone and begins_masked(ids == batch.mask_id, ids)
