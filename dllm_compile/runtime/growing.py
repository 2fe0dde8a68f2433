"""A call with more tokens that goes on with a sequence: its rows depend on nothing that is new, by the model's masks.

A sampler of a block-causal model may call it with the prompt and one block, then with one block more. The rows of the
shorter call are those of the longer one where

- the longer call's masks hide the new tokens from all that its old rows depend on,
- its inputs are those of the shorter one, but for entries of the new tokens,
- so is all that the graph makes of them and of its sizes, such as tables of positions,
- both run the same code.

Nothing less is a proof: a longer prompt of a bidirectional model is a new sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from dllm_compile.schedule.active_rows import ActiveRows

from .program import Program
from .unchanged import Inputs

if TYPE_CHECKING:
    from .batch import Batch


def may_grow(batch: Batch, ids: torch.Tensor) -> bool:
    """Whether a call with ``ids`` ``[B, L]`` is that of a sequence under way, with masks behind its last tokens, where
    masks were filled at most.
    """
    past = batch.past
    if past is None or past.ids.shape[0] != ids.shape[0] or past.ids.shape[1] >= ids.shape[1]:
        return False
    plans, tokens = past.schedule, past.ids.shape[1]
    follows = isinstance(plans, ActiveRows) and plans.follows_changes and isinstance(past.caller, Program)
    if not (follows and past.evidence.is_loop):
        return False
    before = ids[:, :tokens]
    kept = (before == past.ids) | (past.ids == batch.mask_id)
    return bool(kept.all()) and bool((ids[:, tokens:] == batch.mask_id).all())


def grows(batch: Batch, side_inputs: Sequence[torch.Tensor], program: Program, args: Sequence[Any]) -> Inputs | None:
    """Go on with a sequence at more tokens, where that is proven.

    Args:
        batch: the sequence; see :func:`may_grow`.
        side_inputs: of the longer call.
        program: the graph that is called.
        args: its arguments.

    Returns:
        The inputs of the longer call; ``None`` where nothing is proven, and the sequence stays as it is.
    """
    assert batch.past is not None
    was = batch.past.caller
    assert isinstance(was, Program)
    size, tokens = program.size[1], batch.past.ids.shape[1]
    if program.stand_ins is None or program.decision is not None:
        return None
    of_head, known = [args[i] for i in program.head_inputs], batch.head_inputs
    if known is None or not known.fit(of_head) or any(map(bool, known.differ(of_head))):
        return None  # logits are kept that were made with others
    found = program.depends(args, batch.session.vocabulary)
    if found is None or bool((found[0][:, :tokens] > tokens).any()):
        return None
    shorter = [_cut(arg, shape, tokens, size) for arg, shape in zip(side_inputs, batch.inputs.shapes(), strict=False)]
    given = [each for each in shorter if each is not None]
    if len(given) != len(side_inputs) or not batch.inputs.fit(given) or any(map(bool, batch.inputs.differ(given))):
        return None
    before = list(args)
    for i, value in zip(program.side_inputs, given, strict=True):
        before[i] = value
    before[program.index[program.seed]] = args[program.index[program.seed]][:, :tokens]
    for i, dim in program.stand_ins.places.values():
        if dim < 0 and args[i] == size:
            before[i] = tokens
    old = program.at(before)
    if old is None or old.size != was.size or old.computes != was.computes:
        return None
    pairs = zip(program.beside_tokens(args), program.beside_tokens(before), strict=True)
    if not all(_same(new, was, tokens, size) for new, was in pairs):
        return None
    inputs = Inputs(side_inputs)
    return inputs if inputs.compare_whole(found[1]) else None


def _cut(value: torch.Tensor, shape: Sequence[int], tokens: int, size: int) -> torch.Tensor | None:
    """The first ``tokens`` entries of an input along each dimension that has ``size`` where ``shape`` has ``tokens``;
    ``None`` where it differs otherwise.
    """
    if value.dim() != len(shape):
        return None
    for dim, (now, was) in enumerate(zip(value.shape, shape, strict=True)):
        if now != was:
            if (now, was) != (size, tokens):
                return None
            value = value.narrow(dim, 0, tokens)
    return value


def _same(new: Any, was: Any, tokens: int, size: int) -> bool:
    """Whether what a longer call reads is, but for the new tokens, what the shorter one read."""
    if not isinstance(new, torch.Tensor) or not isinstance(was, torch.Tensor):
        return type(new) is type(was) and bool(new == was)
    cut = _cut(new, was.shape, tokens, size)
    return cut is not None and cut.dtype == was.dtype and torch.equal(cut, was)
