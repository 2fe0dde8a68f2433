"""Read one call of a model off the device: its ids, and whether its inputs and weights are those of earlier calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dllm_compile.core.ranks import largest
from dllm_compile.declared import Loop, ids_on_host

from .batch import Batch
from .program import Program
from .unchanged import Weights, checksum


@dataclass(frozen=True, eq=False)
class NewCall:
    """The first graph of a call of the model, before it is known which sequences it is of.

    Attributes:
        ids: ``[B, S]`` integer token ids; or, of a graph that sees none, a number for each row of the hidden state that
            enters its first layer, the same for the same row; see :func:`.ids.labels`.
        program: the graph.
        side_inputs: the other tensors that its stem and layers read, but parameters.
        head_inputs: those that only its head reads; with others the same ids are no repetition.
        args: all its arguments; empty where ``ids`` are none of them.
        loop: what the caller says of it, see :func:`dllm_compile.loop`.
    """

    ids: torch.Tensor
    program: Program
    side_inputs: Sequence[torch.Tensor]
    head_inputs: Sequence[torch.Tensor] = ()
    args: Sequence[Any] = ()
    loop: Loop | None = None


@dataclass
class Read:
    """A call, as the host reads it off its inputs.

    Attributes:
        ids, on_device: ``[B, S]`` int64 token ids, on the host and where they came from.
        same_inputs, same_head_inputs: by the batch that may go on, whether the tensors that the layers read, and those
            that only the head reads, equal those of its last call.
        found: of sequences in doubt, what the call's tokens say against the logits that they expected; see
            :mod:`dllm_compile.runtime.evidence`.
        weights_written: whether a weight was written to since the last call.
    """

    ids: torch.Tensor
    on_device: torch.Tensor
    same_head_inputs: dict[Batch, bool]
    same_inputs: dict[Batch, bool]
    found: dict[Batch, list[float]]
    weights_written: bool


def read_call(call: NewCall, candidates: list[Batch], weights: Weights, moved: bool, group: str | None) -> Read:
    """Read the ids of a call, and what is computed on the device about them, in one transfer; in none where the caller
    says what the ids are and nothing else has to be asked.

    Args:
        call: the call.
        candidates: the batches that it may go on with.
        weights: of the model.
        moved: whether it is known already that a weight changed.
        group: the ranks that share layers: what any of them finds holds for all; ``None`` for one process.

    Raises:
        RuntimeError: ranks that share layers have different ids.
    """
    ids = call.ids
    parts = [ids.detach().reshape(-1).long()]
    device, said = ids.device, ids_on_host(ids)

    def put(values: torch.Tensor) -> None:
        flat = values.reshape(-1)
        parts.append((flat.view(torch.int64) if flat.dtype == torch.float64 else flat.long()).to(device))

    alone = group is None
    written = [] if alone and (moved or said is not None) else weights.written()
    if not alone:
        written.append(torch.tensor(moved, device=device))
    differ = [each.inputs.differ(call.side_inputs, counted=said is not None) for each in candidates]
    of_heads = [each.known_head_inputs(said, call.head_inputs) for each in candidates]
    differ_at_head = [known.differ(call.head_inputs) if known is not None else [] for known in of_heads]
    if not alone:  # ranks may have looked at another number of things
        differ, differ_at_head = ([[_any(flags, device)] for flags in of] for of in (differ, differ_at_head))
        written = [_any(written, device)]
    for flag in (flag for mine in (written, *differ, *differ_at_head) for flag in mine):
        put(flag)
    doubted = [each for each in candidates if each.expected is not None]
    for each in doubted:
        assert each.past is not None
        assert each.expected is not None
        put(each.expected.compare(ids.long(), each.past.on_device, each.mask_id))
    if group is not None:
        parts[1:] = [_of_all_ranks(parts, group)]
    packed, at = torch.cat(parts) if len(parts) > 1 else parts[0], ids.numel()
    host = said.reshape(-1).long() if said is not None and len(parts) == 1 else packed.cpu()
    flags = torch.split(
        host[at:].bool(), [len(written), *map(len, differ), *map(len, differ_at_head), 7 * len(doubted)]
    )
    count = 1 + len(candidates)
    numbers = host[len(host) - 7 * len(doubted) :].view(torch.float64).view(-1, 7).tolist() if doubted else []
    return Read(
        host[:at].view(ids.shape),
        packed[:at].view(ids.shape),
        same_head_inputs={
            each: known is not None and not bool(mine.any())
            for each, known, mine in zip(candidates, of_heads, flags[count:-1], strict=True)
        },
        same_inputs={each: not bool(mine.any()) for each, mine in zip(candidates, flags[1:count], strict=True)},
        weights_written=bool(flags[0].any()),
        found=dict(zip(doubted, numbers, strict=True)),
    )


def _of_all_ranks(parts: list[torch.Tensor], group: str) -> torch.Tensor:
    """Combine ``parts`` but the first over the ranks: true where any rank has it. The first part, the ids, has to
    be the same on all.
    """
    own = checksum(parts[0]).reshape(1)
    *found, most, least = largest(torch.cat([*parts[1:], own, -own]), group)[:, None].unbind()
    if bool(most != -least):
        raise RuntimeError(
            "ranks that share the layers of a model were given different token ids: give each the same, such as by "
            "the same seed where a loop draws"
        )
    return torch.cat([parts[0][:0], *found])


def _any(flags: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    return torch.stack([flag.to(device) for flag in flags]).any() if flags else torch.tensor(False, device=device)
