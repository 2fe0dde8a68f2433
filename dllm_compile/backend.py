"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.fx

from .core.errors import GraphRefused
from .lower import Compiled, lower
from .options import Options
from .program import Program
from .session import Session, current, enter, sessions


def dllm(
    module: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: dict[str, Any] | Options | None = None,
    mode: str | None = None,
) -> Compiled:
    """TorchDynamo backend for masked-diffusion language models.

    Args:
        module: the graph that Dynamo traced.
        example_inputs: fake inputs, one a placeholder.
        options: see :class:`dllm_compile.Options`.
        mode: refused; Inductor's modes do not describe what is cached.

    Returns:
        A function of the same inputs.

    Raises:
        ValueError: ``mode`` is given, or an option is unknown or out of range.
    """
    chosen = Options.of(options)
    if mode is not None:
        raise ValueError(f"mode={mode!r} is not for this backend; say options={{'method': ...}} instead")
    return Backend(module, chosen)


class Backend:
    """One compiled graph: a program per set of input shapes, or plain Inductor with the reason why."""

    def __init__(self, module: torch.fx.GraphModule, options: Options) -> None:
        self.module = module
        self.options = options
        self.session = Session(options)
        self.programs: dict[Any, Program | None] = {}
        self.plain: dict[Any, Compiled] = {}

    def __call__(self, *args: Any) -> Any:
        key = tuple((tuple(a.shape), a.dtype) if isinstance(a, torch.Tensor) else a for a in args)
        if key not in self.programs:
            self.programs[key] = self._program(args)
        program = self.programs[key]
        if program is None:
            return self._run_plain(key, args)
        session, step = self._step(program, args)
        if session is None or step is None:
            return self._run_plain(key, args)
        return program.run(args, session, step)

    def _program(self, args: Sequence[Any]) -> Program | None:
        try:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                raise GraphRefused("gradients are on; call the model under torch.no_grad()")
            return Program(self.module, args, self.options)
        except GraphRefused as refusal:
            self.session.stats.refused.append(str(refusal))
            warnings.warn(f"dllm: this graph runs on plain Inductor: {refusal}", stacklevel=2)
            return None

    def _step(self, program: Program, args: Sequence[Any]) -> tuple[Session | None, Any]:
        if program.ids is None:
            session = current()
            step = session.step if session is not None else None
            return session, step if step is not None and step.shape == program.shape else None
        self.session.vocabulary = program.vocabulary
        self.session.owner = next((id(a) for a in args if isinstance(a, torch.nn.Parameter)), None)
        beside = [args[i] for i in program.beside]
        step = self.session.begin(args[program.index[program.ids]], beside)
        enter(self.session)
        return self.session, step

    def _run_plain(self, key: Any, args: Sequence[Any]) -> Any:
        if key not in self.plain:
            self.plain[key] = lower(self.module, args, self.options.lowering)
        return self.plain[key](*args)


def reset() -> None:
    """Drop the state of every session; called by ``torch._dynamo.reset()`` too."""
    enter(None)
    for session in sessions():
        session.drop()


dllm.reset = reset  # type: ignore[attr-defined]
