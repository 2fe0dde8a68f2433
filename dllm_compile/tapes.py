"""CUDA graphs of partial steps: what a call launches, recorded once and launched as one.

A partial step is hundreds of small launches, and the host takes longer to make them than the device to run them. Calls
of one kind launch the same: the same rows, by number, into the same state. The second call of a kind is recorded, on
memory of the tape's own; a later one copies its ids and positions there and plays the tape. Tapes hold the addresses of
the state, so they go when any of it does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch

from .session import Step

Made = TypeVar("Made")
Record = Callable[[Sequence[Any], Step], Made]


def possible(device: torch.device) -> bool:
    """Whether calls on a device can be recorded."""
    return device.type == "cuda"


def capture(body: Callable[[], Made], pool: Any) -> tuple[Made, torch.cuda.CUDAGraph]:
    """Record what ``body`` launches on the device, which must read nothing back.

    Args:
        body: called once; what it returns is filled by each replay.
        pool: memory shared with other graphs, each of which overwrites what the others made; ``None`` for new memory.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        made = body()
    return made, graph


class Tape:
    """One recorded call, and the memory that it reads.

    Args:
        record: makes the call, for arguments of the program and a step.
        args: of the call to record; parameters are read where they are.
        step: of that call.
        pool: see :func:`capture`.
    """

    def __init__(self, record: Record[Any], args: Sequence[Any], step: Step, pool: Any) -> None:
        with torch.inference_mode(False):  # a later call may write to it outside of inference mode
            self.args = [_own(arg) for arg in args]
            self.step = replace(step, **{name: _own(value) for name, value in _tensors(step).items()})
            self.indices = {name: _own(index) for name, index in step.indices.items()}

        def body() -> Any:
            self.step.layer, self.step.seen = 0, set()
            self.step.indices = dict(self.indices)  # layers decide some of them
            return record(self.args, self.step)

        self.made, self.graph = capture(body, pool)

    def play(self, args: Sequence[Any], step: Step) -> Any:
        """The same for other values of the arguments; what it returns is good until a tape is played again."""
        for mine, given in zip(self.args, args, strict=True):
            if mine is not given and isinstance(mine, torch.Tensor):
                mine.copy_(given)
        for name, index in self.indices.items():
            index.copy_(step.indices[name])
        for name, value in _tensors(step).items():
            getattr(self.step, name).copy_(value)
        self.graph.replay()
        return self.made


Tapes = dict[Any, Tape | None]
"""By kind of call; ``None`` for one that was made once."""


def run(tapes: Tapes, kind: Any, record: Record[Made], args: Sequence[Any], step: Step) -> Made:
    """Make a call: the first of its kind as it is, since it may compile and allocate; the second is recorded.

    Args:
        tapes: of the sequence.
        kind: equal for calls that launch the same.
        record: makes the call.
        args, step: of this call.
    """
    if kind not in tapes:
        made = record(args, step)
        tapes[kind] = None
        return made
    tape = tapes[kind]
    if tape is None:
        pool = next((other.graph.pool() for other in tapes.values() if other is not None), None)
        tape = tapes[kind] = Tape(record, args, step, pool)
    return tape.play(args, step)  # type: ignore[no-any-return]


def _own(value: Any) -> Any:
    """Memory that nobody else holds, for what may differ from call to call."""
    return value.clone() if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter) else value


def _tensors(step: Step) -> dict[str, torch.Tensor]:
    values = {each.name: getattr(step, each.name) for each in fields(step)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
