"""Positions of the row sets of a call, from what its schedule planned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch

from dllm_compile.interface.plan import Call, Plan

from .ids import positions, readable_rows


def positions_of_call(
    call: Call,
    plan: Plan,
    response: torch.Tensor,
    shift: bool | None,
    read: torch.Tensor | None,
    multiple: int,
    every_later: bool,
    capacity: int = 0,
) -> dict[str, torch.Tensor]:
    """Positions ``[B, K]`` int64 of the row sets that change from call to call, by name.

    Args:
        call: what happened.
        plan: rows that it computes.
        response: ``[B, S]`` bool, rows of the response.
        shift: whether samplers read the row before a token; see :class:`dllm_compile.Options`.
        read: ``[B, S]`` bool, positions whose tokens a sampler may choose from this call; ``None`` for all.
        multiple: the number of rows is rounded up to a multiple of this, but is at most ``S``.
        every_later: whether layers may come to compute every row in mid-step; then ``"readable later"`` are the rows
            that are readable then.
        capacity: rows that there is memory for of attention over the keys outside; also the place of no row.
    """
    varying = partial(positions, least=2, multiple=1 if plan.assignment.alone else multiple)  # those are not recorded
    readable = torch.ones_like(call.masked) if read is None else readable_rows(read, shift)
    rows: dict[str, torch.Tensor] = {}
    tokens = none = readable.shape[1]
    slots = torch.arange(tokens).expand_as(readable)
    if plan.fresh is not None:  # keys and values have a place behind the kept entries, in order
        rows["fresh"] = positions(plan.fresh, 2, empty=False)
        slots, none = plan.kept + plan.fresh.long().cumsum(1) - 1, plan.kept + rows["fresh"].shape[1]
        slots = torch.where(plan.fresh, slots, none)
        if plan.active is None:
            rows["response@keyed"] = _at(slots, positions(response), none)
    if plan.block is not None and plan.fresh is not None:
        rows["block"] = positions(plan.block, 2, empty=False)
        rows["outside"] = positions(~plan.fresh, 2, empty=False)
    if plan.active is None or plan.written is None:
        return {**rows, "readable": varying(readable)}
    later = {"readable later": varying(readable)} if every_later else {}
    active, readable = varying(plan.active, empty=False), varying(readable & plan.active)
    rank = plan.active.long().cumsum(1) - 1
    if (
        plan.assignment.alone and plan.block is not None and plan.fresh is not None
    ):  # entries are chosen by their places among the active rows
        rows["outside"] = positions(plan.active & ~plan.fresh, 2, empty=False)
        rows |= {name: _at(rank, rows[name], active.shape[1]) for name in ("block", "outside", "fresh")}
    kept = _at(plan.written, active, False)  # the others are there for samplers alone, and leave nothing behind
    written = torch.where(kept, _at(slots, active, none), none)
    rows |= {"active": active, "written": written, "stored": torch.where(kept, active, tokens), "readable": readable}
    rows |= later
    rows["readable@active"] = _at(rank, readable, active.shape[1])
    if plan.held is not None:
        places = torch.where(plan.held, plan.held.long().cumsum(1) - 1, capacity)
        rows["place"] = _at(places, active, capacity)
    if plan.salient is not None:
        rows["salient"] = varying(_at(plan.salient, active, False), empty=False)
    return rows


def positions_returned(call: Call, shift: bool | None) -> torch.Tensor:
    """Positions ``[B, K]`` int64 of the rows that a sampler may read, whether the call computes them or not."""
    return positions(readable_rows(call.masked, shift))


Places = tuple[tuple[str, torch.dtype, torch.Size], ...]
ALIGNED = 16
"""Bytes at whose multiples compiled code expects its inputs to begin."""
_SPARE = torch.zeros(ALIGNED, dtype=torch.uint8)


def packed(tensors: Mapping[str, torch.Tensor], device: torch.device) -> tuple[torch.Tensor, Places]:
    """Copy tensors ``[B, K]`` of the host into one piece of memory ``[N]`` uint8 on a device: one transfer, without
    waiting.

    Returns:
        The memory, and what lies where in it, for :func:`unpacked`.
    """
    parts = []
    for tensor in tensors.values():
        parts.append(tensor.reshape(-1).view(torch.uint8))
        rest = -tensor.nbytes % ALIGNED
        parts += [_SPARE[:rest]] if rest else []
    places = tuple((name, tensor.dtype, tensor.shape) for name, tensor in tensors.items())
    return sent(torch.cat(parts), device), places


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to a device, without waiting for the transfer."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def unpacked(memory: torch.Tensor, places: Places) -> dict[str, torch.Tensor]:
    """Views of the tensors that were :func:`packed`, by name."""
    found, begin, typed = {}, 0, {torch.uint8: memory}
    for name, dtype, shape in places:
        if dtype not in typed:
            typed[dtype] = memory.view(dtype)
        found[name] = typed[dtype].as_strided(shape, (shape[1], 1), begin // dtype.itemsize)
        begin += _room(shape.numel() * dtype.itemsize)
    return found


def span(places: Places) -> int:
    """Bytes that some tensors take where they are :func:`packed`."""
    return sum(_room(shape.numel() * dtype.itemsize) for _, dtype, shape in places)


def _room(size: int) -> int:
    """``size`` bytes, rounded up so that the next tensor is aligned."""
    return size + -size % ALIGNED


def _at(values: torch.Tensor, index: torch.Tensor, none: int | bool) -> torch.Tensor:
    """Entries ``[B, K]`` of ``values`` ``[B, S]`` at positions ``[B, K]``; ``none`` for ``S``, "no row"."""
    tokens = values.shape[1]
    return torch.where(index < tokens, values.gather(1, index.clamp(max=tokens - 1)), none)
