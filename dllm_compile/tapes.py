"""CUDA graphs of partial steps: what a call launches, recorded once and launched as one.

A partial step is hundreds of small launches, and the host takes longer to make them than the device to run them. Calls
of one kind launch the same: as many rows, into the same state. The third call of a kind is recorded, on memory that the
tapes own; from then on a call copies its ids and positions there and plays the tape. Tapes hold the addresses of the
state, so they go when any of it does.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from .batch import Step

Made = TypeVar("Made")
Record = Callable[[Sequence[Any], "Step"], Made]
CALLS = 2
"""Calls of a kind that are made before one is recorded: the first compiles and allocates, and some kinds never come
again. A recording costs about as much as a call."""


def possible(device: torch.device) -> bool:
    """Whether calls on a device can be recorded."""
    return device.type == "cuda"


def capture(body: Callable[[], Made], device: torch.device, pool: Any) -> tuple[Made, torch.cuda.CUDAGraph]:
    """Record what ``body`` launches on a device, which must read nothing back.

    Args:
        body: called once; what it returns is filled by each replay.
        device: of all that it reads.
        pool: memory shared with other graphs; ``None`` for new memory.

    Raises:
        RuntimeError: it read something back, or launched what cannot be recorded.
    """
    graph = torch.cuda.CUDAGraph()
    mode = "thread_local"  # another thread may allocate meanwhile
    recording = torch.cuda.graph(graph, pool=pool, stream=_stream(device), capture_error_mode=mode)
    with torch.cuda.stream(torch.cuda.current_stream(device)), recording:  # current again even where it fails
        made = body()
    return made, graph


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: each new stream takes workspaces of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Tape:
    """One recorded call, and the positions that it reads.

    Args:
        record: makes the call, for arguments of the program and a step.
        args: memory that the call reads, where later ones copy theirs.
        step: of the call to record.
        pool: see :func:`capture`.
    """

    def __init__(self, record: Record[Any], args: Sequence[Any], step: Step, pool: Any) -> None:
        with torch.inference_mode(False):  # a later call may write to it outside of inference mode
            self.step = replace(step, **{name: value.clone() for name, value in _tensors(step).items()})
            self.indices = {name: index.clone() for name, index in step.indices.items()}

        def body() -> Any:
            self.step.layer, self.step.seen = 0, set()
            self.step.indices = dict(self.indices)  # layers decide some of them
            return record(args, self.step)

        self.made, self.graph = capture(body, step.counts.device, pool)

    def play(self, step: Step) -> Any:
        """The same for another step; what it returns is good until the tape is played again."""
        for name, index in self.indices.items():
            index.copy_(step.indices[name])
        for name, value in _tensors(step).items():
            getattr(self.step, name).copy_(value)
        self.graph.replay()
        return self.made


class Tapes:
    """All tapes of one sequence."""

    def __init__(self) -> None:
        self.kinds: dict[Any, Tape | int | None] = {}  # a tape, or calls made; None where none can be recorded
        self.memory: dict[Any, dict[int, torch.Tensor]] = {}  # of a program's arguments, by place

    def clear(self) -> None:
        """Forget all: an address changed."""
        self.kinds.clear()
        self.memory.clear()

    def run(self, program: Any, kind: Any, record: Record[Made], args: Sequence[Any], step: Step) -> Made:
        """Make a call, or play it.

        Args:
            program: the graph that is called.
            kind: equal for calls of it that launch the same.
            record: makes the call.
            args, step: of this call.
        """
        key = program, kind
        found = self.kinds.get(key, 0)
        if found is None or (isinstance(found, int) and found < CALLS):
            made = record(args, step)
            if found is not None:
                self.kinds[key] = found + 1
            return made
        owned = self._owned(program, args)
        if not isinstance(found, Tape):
            found = self.kinds[key] = self._recorded(record, [owned.get(i, arg) for i, arg in enumerate(args)], step)
        return record(args, step) if found is None else found.play(step)

    def _recorded(self, record: Record[Any], args: Sequence[Any], step: Step) -> Tape | None:
        pool = next((tape.graph.pool() for tape in self.kinds.values() if isinstance(tape, Tape)), None)
        try:
            return Tape(record, args, step, pool)
        except RuntimeError as error:
            warnings.warn(f"dllm: steps run without a CUDA graph, as one cannot be recorded: {error}", stacklevel=2)
            return None

    def _owned(self, program: Any, args: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Memory of a program's arguments that may differ from call to call, brought up to date; not parameters."""
        given = {i: arg for i, arg in enumerate(args) if isinstance(arg, torch.Tensor)}
        given = {i: arg for i, arg in given.items() if not isinstance(arg, torch.nn.Parameter)}
        owned = self.memory.get(program)
        if owned is None:
            with torch.inference_mode(False):
                owned = self.memory[program] = {i: torch.empty_like(arg) for i, arg in given.items()}
        for i, arg in given.items():
            owned[i].copy_(arg)
        return owned


def recordable(args: Sequence[Any], device: torch.device) -> bool:
    """Whether arguments can be copied to memory of the same strides on the device, which code is compiled for."""
    tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
    given = [arg for arg in tensors if not isinstance(arg, torch.nn.Parameter)]
    dense = all(arg.is_contiguous() or torch.empty_like(arg, device="meta").stride() == arg.stride() for arg in given)
    return dense and all(arg.device == device for arg in tensors)


def _tensors(step: Step) -> dict[str, Any]:
    values = {each.name: getattr(step, each.name) for each in fields(step)}
    return {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
