"""Which calls share a response: those of guidance, with the prompt and with masks in its place, and those of sequences
that begin in the middle of a response to the same prompt.

Where the call without the prompt, or without a part of it, comes first, the one with it looks like the next step of the
same loop, which fills the prompt: :func:`may_have_prompt` notes that, and :func:`parts` sees it as soon as a call comes
in which these places are masked again.
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
    if parts(earlier, ids):
        assert earlier.filled_second is not None
        evidence = replace(earlier.past.evidence, begins=True, fills=0, in_order=True, ratios=(0.0,) * 4)
        earlier.past, batch.past = replace(earlier.past, evidence=evidence), replace(batch.past, evidence=evidence)
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
    masks behind it: the first may have been without the prompt. Where these are more than a loop fills at once, compute
    every row, as of a sequence that begins.
    """
    assert batch.past is not None
    before, mask = batch.past.ids, batch.mask_id
    filled = ids != before
    if batch.past.number < 0 or not torch.equal(before, batch.first) or not bool(filled.any()):
        return
    batch.filled_second = None
    if not bool((filled & (before != mask)).any()) and begins_masked(ids == mask, ids):
        batch.filled_second = filled
        most = batch.options.block_length or int(batch.response.sum(1).max()) // 4
        if batch.past.evidence.is_loop and _many(batch, filled, most):
            batch.begin_anew()


def parts(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether ``ids`` ``[B, S]`` are those of the call before with all masks back that the second call of ``batch``
    filled, which then was that of a prompt; they may fill others. A single mask may be put back by a sampler later on.
    """
    assert batch.past is not None
    before, mask, filled = batch.past.ids, batch.mask_id, batch.filled_second
    if filled is None or bool((filled & (ids != mask)).any()):
        return False
    known = len(batch.past.history) <= 2 or _many(batch, filled, 1)
    return known and not bool(((ids != before) & ~filled & (before != mask)).any())


def _many(batch: Batch, filled: torch.Tensor, most: int) -> bool:
    """Whether over ``most`` masks of a sequence were ``filled``, ``[B, S]`` bool, or the first were masks alone."""
    return bool((filled.sum(1) > most).any()) or bool((batch.first == batch.mask_id).all())


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
