"""The programs of one graph: one for all sizes where the graph can be analyzed so, else one for each set of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from dllm_compile import compat
from dllm_compile.compat import FakeTensor, is_traceable_wrapper_subclass
from dllm_compile.core.errors import GraphRefused, refusing
from dllm_compile.core.graph import numbers
from dllm_compile.core.stand_ins import StandIns
from dllm_compile.debug import log
from dllm_compile.options import Options

from .program import Program

Key = tuple[Any, ...]
MOST = 64
"""Sets of sizes whose programs are kept, the last ones; code is shared, and stays."""


class Programs:
    """The programs of one graph.

    Attributes:
        known: by key, the program; ``None`` where the graph is refused at these sizes. Other threads replace it as a
            whole.
        weights: places of the parameters among the arguments; ``None`` before the first call.
    """

    def __init__(self, module: torch.fx.GraphModule, options: Options) -> None:
        self.module, self.options = module, options
        self.known: dict[Key, Program | None] = {}
        self.weights: list[int] | None = None
        self.inputs: list[int] = []
        self.numbers = numbers(module.graph)
        self.ahead: dict[Key, Program] = {}  # analyzed before the first call
        self.any_size: dict[Key, Program | None] = {}  # by the numbers that the graph reads

    def key(self, args: Sequence[Any], scalars: Sequence[Any] = ()) -> Key:
        """What a program is made for: sizes, dtypes and numbers of a call's inputs. Dynamo guards shapes of weights.

        Args:
            args: of a call.
            scalars: what to read numbers from, where ``args`` are fake.
        """
        if self.weights is None:
            self.weights = [i for i, a in enumerate(args) if isinstance(a, torch.nn.Parameter)]
            self.inputs = [i for i in range(len(args)) if i not in self.weights]
        given = [args[i] for i in self.inputs]
        shapes = [(a.shape, a.dtype) if isinstance(a, torch.Tensor) else _literal(a) for a in given]
        return *shapes, *self._read(scalars or args)

    def make(self, key: Key, args: Sequence[Any]) -> Program:
        """The program for the sizes of a call that are not known.

        Raises:
            GraphRefused: no cache can serve the graph at these sizes.
        """
        with compat.compile_lock:
            program = self.ahead.pop(key, None) or self._at(args) or self._analyzed(args)
        with refusing("analyzed"):
            program.check(args)
        return program

    def keep(self, key: Key, program: Program | None) -> None:
        """Know the program for a key from now on."""
        self.known = _with(self.known, key, program)

    def refuse(self, program: Program) -> None:
        """Refuse the graph at the sizes of a program from now on."""
        self.known = {key: None if known is program else known for key, known in self.known.items()}

    def analyze(self, shown: Sequence[Any]) -> None:
        """Analyze the graph before its first call: for all sizes, or at those that fake inputs ``shown`` have.

        What only a call can tell is left to the first one.

        Raises:
            GraphRefused: no cache can serve the graph.
        """
        wrapped = any(is_traceable_wrapper_subclass(a) for a in shown)
        if wrapped or any(isinstance(shown[i], FakeTensor) for i in self.numbers):
            return
        if self._for_any_size(shown) is None:
            program = self._analyzed(shown)
            self.ahead[self.key([program.axes.fake[node] for node in program.index], shown)] = program

    def _at(self, args: Sequence[Any]) -> Program | None:
        """The program for the sizes of a call, where the graph is analyzed for any sizes; else ``None``."""
        found = self._for_any_size(args)
        with refusing("analyzed"):
            return None if found is None else found.at(args)

    def _for_any_size(self, args: Sequence[Any]) -> Program | None:
        """The graph analyzed once for all sizes that Dynamo left open; ``None`` where that cannot be."""
        read = self._read(args)
        if read not in self.any_size:
            found = None
            try:
                with refusing("analyzed"):
                    stand_ins = StandIns.of(self.module.graph)
                found = self._analyzed(args, stand_ins) if stand_ins is not None else None
            except GraphRefused as refusal:  # each size is analyzed for itself, and refused if need be
                log.info("not analyzed for all sizes at once: %s", refusal)
            self.any_size = _with(self.any_size, read, found)
        return self.any_size[read]

    def _analyzed(self, args: Sequence[Any], stand_ins: StandIns | None = None) -> Program:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise GraphRefused("gradients are on; call the model under torch.no_grad()")
        with refusing("analyzed"):
            return Program(self.module, args, self.options, stand_ins)

    def _read(self, args: Sequence[Any]) -> Key:
        """The numbers that the graph reads from scalar tensors among its inputs."""
        return tuple([_literal(args[i].item()) for i in self.numbers if args[i].device.type == "cpu"])


def _with(programs: dict[Key, Program | None], key: Key, program: Program | None) -> dict[Key, Program | None]:
    """A copy of the :data:`MOST` last ``programs``, with one more."""
    return dict([*programs.items()][1 - MOST :]) | {key: program}


def _literal(value: Any) -> Any:
    """A number as part of a key: 0.0 is not -0.0, and NaN is itself."""
    return value.hex() if isinstance(value, float) else value
