"""The decoding loop: a step, and another one, until every sequence is done."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch

from dllm_compile.declared import known_ids, reading, wanting

from .progress import Progress, StepFunction
from .settings import Settings
from .stops import Stops


@dataclass
class Generated:
    """What a generation returns where more than ids is asked for; also read as ``result["sequences"]``.

    Attributes:
        sequences: ``[B, P + gen_length]`` int64, prompts and responses.
        nfe: forward calls of the model; one with guidance is one.
        tokens_per_forward: masks filled a sequence and forward call.
        history: ``[nfe + 1, B, P + gen_length]`` int64, the ids before the first call and after each; or ``None``. With
            ``drafts`` those before and after each step, of which one call makes several.
    """

    sequences: torch.Tensor
    nfe: int
    tokens_per_forward: float
    history: torch.Tensor | None = None

    def keys(self) -> list[str]:
        """Names of the fields that are set."""
        return [each.name for each in fields(self) if getattr(self, each.name) is not None]

    def __getitem__(self, key: str | int) -> Any:
        name = self.keys()[key] if isinstance(key, int) else key
        if name not in self.keys():
            raise KeyError(name)
        return getattr(self, name)


IDLE = 64
"""So many calls in a row may write nothing where mechanisms hold candidates back."""


@torch.no_grad()
def decode(
    x: torch.Tensor,
    prompt: int,
    mask_id: int,
    eos: tuple[int, ...],
    step: StepFunction,
    progress: Progress,
    streamer: Any = None,
    output_history: bool = False,
    stops: Stops | None = None,
) -> Generated:
    """Fill the masks of ``x``.

    A sequence whose masks all lie behind an end that is written is done. Its masks stay until all sequences are done
    and are then filled with that end: a cache that follows the ids would take so many new tokens for a new block. So it
    is with stopping criteria, which replace all tokens behind, and with ends that mechanisms find: ``eos[0]`` fills.

    Args:
        x: ``[B, S]`` int64, prompts and masks.
        prompt: tokens of the prompts.
        mask_id: the mask token.
        eos: ids that end a response; may be empty.
        step: runs the model once.
        progress: says what a step may write.
        streamer: see :func:`dllm_compile.generate`.
        output_history: keep the ids after each call.
        stops: stopping criteria.

    Raises:
        RuntimeError: mechanisms hold candidates back or move the block, and :data:`IDLE` calls in a row wrote nothing.
    """
    stream, history = _Stream(streamer, x, prompt), [x]
    host = known = x.cpu()
    masked = start = host == mask_id
    cut = torch.zeros_like(masked)
    alone = streamer is None and stops is None  # nobody else's code runs between two calls
    calls = idle = 0
    while (writable := progress.writable(masked & ~cut & ~_ends_before(host, masked, prompt, eos)[0])) is not None:
        read = reading(writable.candidates if progress.settings.reads_candidates else None)
        with known_ids(x, known if alone else None), wanting(~masked | progress.inside()), read:
            x, ends = step(x, writable.to(x.device))
        progress.cut(ends)
        host = known = x.cpu()
        before, masked = masked, host == mask_id
        calls, idle = calls + 1, idle + 1 if torch.equal(masked, before) else 0
        _check_progress(idle, progress.settings)
        if stops is not None:
            cut = stops.behind(x, masked)
            host = host.masked_fill(cut, stops.fill)
        stream.put(host, masked & ~cut)
        if output_history:
            history.append(x)
    filled = int(start.sum()) - int(masked.sum())
    host = _with_ends(host, masked & ~cut, _ends_before(host, masked, prompt, eos), progress.inside(), eos)
    history[-1] = x = host.to(x.device)
    stream.put(host, host == mask_id)
    stream.end()
    calls = getattr(step, "forwards", calls)
    rate = filled / max(calls * x.shape[0], 1)
    return Generated(x, calls, rate, torch.stack(history) if output_history else None)


def _check_progress(idle: int, settings: Settings) -> None:
    """Raise the error of :func:`decode` where the last ``idle`` calls wrote nothing."""
    if idle < IDLE or not (settings.holds_back or settings.block is not None):
        return
    if not settings.holds_back:
        raise RuntimeError(
            f"nothing was written in {IDLE} calls in a row: the model proposes the mask for every candidate of the "
            "block, which therefore does not move on; leave out the option that moves it, such as sliding"
        )
    names = " and ".join(map(repr, settings.holds_back))
    raise RuntimeError(
        f"nothing was written in {IDLE} calls in a row: the candidates of the mechanism {names} hold none of "
        "the masked tokens, or the model proposes the mask for them; leave at least one in time"
    )


def _with_ends(
    x: torch.Tensor,
    left: torch.Tensor,
    ends: tuple[torch.Tensor, torch.Tensor],
    inside: torch.Tensor,
    eos: tuple[int, ...],
) -> torch.Tensor:
    """``x`` with an end in place of each mask that is ``left`` ``[B, S]`` bool behind one, or not ``inside``."""
    behind, end = ends
    x = torch.where(behind & left, end, x)
    return torch.where(left & ~behind & ~inside, eos[0], x) if eos else x


def _ends_before(
    x: torch.Tensor, masked: torch.Tensor, prompt: int, eos: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences ``[B, 1]`` bool whose masks all lie behind the first end in the response, and that end ``[B, 1]``."""
    tokens = x.shape[1]
    position = torch.arange(tokens)
    ends = torch.isin(x, torch.tensor(eos, dtype=x.dtype)) & (position >= prompt)
    first_end = torch.where(ends, position, tokens).amin(1, keepdim=True)
    first_mask = torch.where(masked, position, tokens).amin(1, keepdim=True)
    return first_end < first_mask, x.gather(1, first_end.clamp(max=tokens - 1))


class _Stream:
    """Hands a streamer of transformers the tokens of one sequence, in order, once nothing before them is open."""

    def __init__(self, streamer: Any, x: torch.Tensor, prompt: int) -> None:
        self.streamer, self.sent = streamer, prompt
        if streamer is not None:
            streamer.put(x[:, :prompt].cpu())

    def put(self, x: torch.Tensor, masked: torch.Tensor) -> None:
        """Hand on what is new in ``x``, ``[1, S]`` on the CPU."""
        if self.streamer is None:
            return
        settled = int(torch.cat([masked[0], masked.new_ones(1)]).long().argmax())
        if settled > self.sent:
            self.streamer.put(x[0, self.sent : settled])
            self.sent = settled

    def end(self) -> None:
        """End the stream."""
        if self.streamer is not None:
            self.streamer.end()
