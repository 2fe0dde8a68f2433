"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx

from .core.axes import attention
from .core.errors import GraphRefused
from .lower import Compiled, lower
from .options import Options
from .program import Program
from .session import Session, Step, current, enter, sessions
from .stats import Stats
from .verify import compare

_WORTH_SAYING = (attention, torch.nn.functional.embedding, torch.nn.functional.softmax)


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
        self.inputs: list[int] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the graph as part of the step it belongs to."""
        if self.inputs is None:  # Dynamo guards the shapes of weights
            self.inputs = [i for i, a in enumerate(args) if not isinstance(a, torch.nn.Parameter)]
        given = [args[i] for i in self.inputs]
        key = tuple([(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given])
        if key not in self.programs:
            self.programs[key] = self._program(args)
        program = self.programs[key]
        if program is None:
            return self._run_plain(key, args)
        session, step = self._step(program, args)
        if session is None or step is None:
            return self._run_plain(key, args)
        result = program.run(args, session, step)
        if session.options.verify and step.number % session.options.verify == 0:
            compare(self.module, program, args, result, session, step)
        return result

    def _program(self, args: Sequence[Any]) -> Program | None:
        try:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                raise GraphRefused("gradients are on; call the model under torch.no_grad()")
            return Program(self.module, args, self.options)
        except GraphRefused as refusal:
            self._refuse(str(refusal))
            return None

    def _refuse(self, reason: str) -> None:
        """Say once why a graph runs on plain Inductor; graphs that never could be cached are only noted."""
        if reason in self.session.stats.refused:
            return
        self.session.stats.refused.append(reason)
        if any(node.target in _WORTH_SAYING for node in self.module.graph.nodes):
            warnings.warn(f"dllm: this graph runs on plain Inductor: {reason}", stacklevel=2)

    def _step(self, program: Program, args: Sequence[Any]) -> tuple[Session | None, Step | None]:
        """The step that a call belongs to, and the session that keeps its rows."""
        beside = [args[i] for i in program.beside]
        if program.ids is not None:
            self.session.vocabulary = program.vocabulary
            self.session.owner = next((id(a) for a in args if isinstance(a, torch.nn.Parameter)), None)
            step = self.session.begin(args[program.index[program.ids]], beside)
            enter(self.session)
            return self.session, step
        session = current()
        if program.layers:
            first = program.first_layer(args)
            if session is None or session.opener == first or (session.step and first in session.step.seen):
                session = self._opened_by(first)
                session.begin_hidden(args[program.index[program.seed]], beside)
                enter(session)
        step = session.step if session is not None else None
        if session is None or step is None or step.shape != program.shape:
            if program.layers:
                self._refuse(
                    "no graph of this model saw its token ids, and its hidden state does not show what is masked"
                )
            return None, None
        return session, step

    def _opened_by(self, layer: Any) -> Session:
        """The session of a model whose ids are looked up outside of any graph: it starts at the first layer."""
        options = replace(self.options, mask_id=None)
        for session in sessions():
            if session.opener == layer and session.options == options:
                return session
        self.session.opener = self.session.owner = layer
        self.session.options = options
        return self.session

    def _run_plain(self, key: Any, args: Sequence[Any]) -> Any:
        if key not in self.plain:
            self.plain[key] = lower(self.module, args, self.options.lowering)
        return self.plain[key](*args)


def stats(model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Counters of all compiled models, or of one.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.

    Returns:
        The fields of :class:`dllm_compile.stats.Stats` summed over its graphs, and ``state_bytes``.
    """
    mine = None if model is None else {id(parameter) for parameter in model.parameters()}
    total, kept = Stats(), 0
    for session in sessions():
        owner = session.owner[1] if isinstance(session.owner, tuple) else (session.owner,)
        if mine is None or mine & set(owner):
            total.add(session.stats)
            kept += session.state_bytes()
    return {**total.as_dict(), "state_bytes": kept}


def reset() -> None:
    """Drop the state of every session; called by ``torch._dynamo.reset()`` too."""
    enter(None)
    for session in sessions():
        session.drop()


dllm.reset = reset  # type: ignore[attr-defined]
