"""CUDA graphs of partial steps: the kernels that a call launches are recorded once and replayed with one launch.

A partial step is hundreds of small launches, and the host takes longer to make them than the device to run them. Calls
of one kind launch the same: as many rows, into the same state. The first call of a kind compiles and allocates, and
some kinds never come again: the second is recorded, on memory that the recordings own. From then on a call copies its
ids and positions there and replays it. Recordings hold the addresses of the state, so they go when any of it does.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from dllm_compile.passes.seeds import is_input

if TYPE_CHECKING:
    from .step import Step

Made = TypeVar("Made")
Record = Callable[[Sequence[Any], "Step"], Made]
REPLAYED, FIRST, COUNTED = "replayed", "the first of its kind", "its salient rows are counted on the host"
PARTS, DECIDED = "the model is more than one graph", "a rule decides behind each layer"
EAGER = "a module that breaks graphs runs in eager"
RANKS = "ranks share the layers"
UNLIKE = "an argument overlaps itself in memory, or is on another device"


@dataclass(frozen=True)
class Unfit:
    """Why calls of a kind cannot be recorded; takes the place of their recording."""

    why: str


def note(counts: Counter[str], how: str) -> None:
    """Count a partial step by how it was launched, and say once what keeps every one from being recorded."""
    if how not in (REPLAYED, FIRST, COUNTED) and not counts[how]:
        warnings.warn(f"dllm: steps run without a CUDA graph, as {how}", stacklevel=2)
    counts[how] += 1


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
    """The stream of all recordings on a device: each new stream takes workspaces of its own."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


class Recording:
    """One recorded call, and the positions that it reads.

    Args:
        record: makes the call, for arguments of the program and a step.
        args: memory that the call reads, where later ones copy theirs.
        step: of the call to record.
        pool: see :func:`capture`.
    """

    def __init__(self, record: Record[Any], args: Sequence[Any], step: Step, pool: Any) -> None:
        assert step.memory is not None
        with torch.inference_mode(False):  # a later call may write to it outside of inference mode
            self.memory = step.memory.clone()
        self.made, self.graph = capture(lambda: record(args, step.elsewhere(self.memory)), step.counts.device, pool)

    def replay(self, step: Step) -> Any:
        """Launch the recorded kernels for another step; the result is valid until the next replay."""
        assert step.memory is not None
        self.memory.copy_(step.memory)
        self.graph.replay()
        return self.made


class Recordings:
    """All recordings of one sequence."""

    def __init__(self) -> None:
        self.kinds: dict[Any, Recording | Unfit | None] = {}  # None: one call was made, record the next
        self.memory: dict[Any, dict[int, torch.Tensor]] = {}  # of a program's arguments, by place

    def clear(self) -> None:
        """Forget all: an address changed."""
        self.kinds.clear()
        self.memory.clear()

    def run(
        self, program: Any, kind: Any, record: Record[Made], args: Sequence[Any], step: Step, counts: Counter[str]
    ) -> Made:
        """Make a call, record it, or replay the recording of an earlier one of its kind.

        Args:
            program: the graph that is called.
            kind: equal for calls of it that launch the same.
            record: makes the call.
            args, step: of this call.
            counts: calls by how they were launched; this one is added.
        """
        key, made = (program, kind), None
        if key not in self.kinds:
            made = record(args, step)
            fits = recordable([args[i] for i in program.reads], step.counts.device)
            self.kinds[key] = None if fits else Unfit(UNLIKE)
        elif not isinstance(self.kinds[key], Unfit):
            owned = self._owned(program, args)
            if self.kinds[key] is None:
                self.kinds[key] = self._recorded(record, [owned.get(i, arg) for i, arg in enumerate(args)], step)
        found = self.kinds[key]
        note(counts, found.why if isinstance(found, Unfit) else REPLAYED if made is None else FIRST)
        if made is not None:
            return made
        played: Made = found.replay(step) if isinstance(found, Recording) else record(args, step)
        return played

    def _recorded(self, record: Record[Any], args: Sequence[Any], step: Step) -> Recording | Unfit:
        pool = next(
            (recording.graph.pool() for recording in self.kinds.values() if isinstance(recording, Recording)), None
        )
        try:
            return Recording(record, args, step, pool)
        except RuntimeError as error:
            return Unfit(f"one cannot be recorded: {error}")

    def _owned(self, program: Any, args: Sequence[Any]) -> dict[int, torch.Tensor]:
        """Memory of a program's arguments that may differ from call to call, brought up to date; not parameters."""
        if program not in self.memory:
            with torch.inference_mode(False):
                self.memory[program] = {i: torch.empty_like(args[i]) for i in program.reads if is_input(args[i])}
        for i, owned in self.memory[program].items():
            owned.copy_(args[i])
        return self.memory[program]


def recordable(args: Sequence[Any], device: torch.device) -> bool:
    """Whether arguments can be copied to memory of the same strides on the device, which code is compiled for."""
    given = [arg for arg in args if is_input(arg)]
    dense = all(arg.is_contiguous() or torch.empty_like(arg, device="meta").stride() == arg.stride() for arg in given)
    return dense and all(arg.device == device for arg in args if isinstance(arg, torch.Tensor))
