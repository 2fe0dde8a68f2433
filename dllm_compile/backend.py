"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch._dynamo.eval_frame import cached_backends
from torch.utils._pytree import tree_leaves

from .breaks import forget as forget_breaks
from .breaks import last_break, tell_of
from .core.axes import attention
from .core.errors import GraphRefused
from .lower import Compiled, lower
from .memory import process_peak_bytes
from .options import Options
from .program import Program
from .run import run
from .session import Session, Step, current, enter, sessions
from .stats import Stats
from .unit_code import forget
from .verify import compare

_REFUSED: list[str] = []
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
        mode: ``"reduce-overhead"`` for the option ``cuda_graphs``; Inductor's other modes are not for this backend.

    Returns:
        A function of the same inputs.

    Raises:
        ValueError: ``mode`` is another one, or an option is unknown or out of range.
    """
    cached_backends.setdefault(id(dllm), dllm)  # a reset of Dynamo forgets whom to tell of the next one
    chosen = Options.of(options)
    if mode not in (None, "reduce-overhead"):
        raise ValueError(
            f"mode={mode!r} is not for this backend; give 'reduce-overhead', or say options={{'method': ...}} instead"
        )
    return Backend(module, replace(chosen, cuda_graphs=chosen.cuda_graphs or mode is not None))


class Backend:
    """One compiled graph: a program per set of input shapes, or plain Inductor with the reason why.

    Models of one class share their graphs, since weights are inputs; each model has a session of its own.
    """

    def __init__(self, module: torch.fx.GraphModule, options: Options) -> None:
        self.module = module
        self.options = options
        self.mine: list[Session] = []
        self.refused: list[str] = []
        self.programs: dict[Any, Program | None] = {}
        self.plain: dict[Any, Compiled] = {}
        self.inputs: list[int] = []
        self.weights: list[int] | None = None
        self.broke = last_break()

    def __call__(self, *args: Any) -> Any:
        """Run the graph as part of the step it belongs to."""
        if self.weights is None:
            self.weights = [i for i, a in enumerate(args) if isinstance(a, torch.nn.Parameter)]
            self.inputs = [i for i in range(len(args)) if i not in self.weights]
        given = [args[i] for i in self.inputs]  # Dynamo guards the shapes of weights
        key = tuple([(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given])
        if key not in self.programs:
            self.programs[key] = self._program(args)
            self._tell_of_break(self.programs[key], args)
        program = self.programs[key]
        if program is None:
            return self._run_plain(key, args)
        session, step = self._step(program, args)
        if session is None or step is None:
            result = self._run_plain(key, args)
        else:
            result = self._run(program, args, session, step)
        if session is not None:
            session.passed = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor) and v.dim() == 3]
        if session is not None and step is not None and _verifies(session.options, step):
            compare(self.module, program, args, result, session, step)
        return result

    def _run(self, program: Program, args: Sequence[Any], session: Session, step: Step) -> Any:
        done = False
        try:
            result = run(program, args, session, step)
            done = True
        finally:
            if not done:
                session.drop()  # an error or an interrupt in the middle leaves rows half written
        return result

    def _program(self, args: Sequence[Any]) -> Program | None:
        try:
            if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
                raise GraphRefused("gradients are on; call the model under torch.no_grad()")
            return Program(self.module, args, self.options)
        except GraphRefused as refusal:
            self._refuse(str(refusal))
            return None

    def _tell_of_break(self, program: Program | None, args: Sequence[Any]) -> None:
        """Say which line cut this graph from the one before it in the step, if a line did."""
        joined = current()
        given = [a for a in args if isinstance(a, torch.Tensor)]
        handed = [a for a in given if joined is not None and joined.hands_on(a)]
        part = program is not None and program.ids is None and bool(program.layers)
        if self.broke is not None and (handed or part):
            tell_of(self.broke, cut=any(joined is not None and a.shape[-1] == joined.vocabulary for a in handed))

    def _refuse(self, reason: str) -> None:
        """Say once why a graph runs on plain Inductor; graphs that never could be cached are only noted."""
        if reason in self.refused:
            return
        self.refused.append(reason)
        _REFUSED.append(reason)
        if any(node.target in _WORTH_SAYING for node in self.module.graph.nodes):
            warnings.warn(f"dllm: this graph runs on plain Inductor: {reason}", stacklevel=2)

    def _step(self, program: Program, args: Sequence[Any]) -> tuple[Session | None, Step | None]:
        """The step that a call belongs to, and the session that keeps its rows."""
        beside = [args[i] for i in program.beside]
        at = program.index[program.seed]
        if program.ids is not None:
            assert self.weights is not None
            session = self._session([args[i] for i in self.weights], self.options)
            session.vocabulary, session.chooses = program.vocabulary, program.chooses
            others = [args[i] for i in program.read if i not in self.weights]
            step = session.begin(args[at], beside, program, others)
            enter(session)
            return session, step
        joined = current()
        if joined is None or not joined.hands_on(args[at]):
            if not program.layers:
                return None, None
            joined = self._session(program.first_weights(args), replace(self.options, mask_id=None))
            joined.begin_hidden(args[at], beside, program)
            enter(joined)
        step = joined.step
        if step is None and program.layers and not joined.idle:
            self._refuse("no graph of this model saw its token ids, and its hidden state does not show what is masked")
        return joined, step if step is not None and step.shape == program.shape else None

    def _session(self, weights: list[torch.Tensor], options: Options) -> Session:
        """The session of a model: by all its weights, or by those of its first layer where layers are traced alone.

        A graph that Dynamo traced anew, for another number among its arguments, goes on with the same session.
        """
        owner = tuple(map(id, weights))
        for session in sessions():
            if session.owner == owner and session.options == options:
                break
        else:
            session = Session(options)
        if session not in self.mine:
            self.mine.append(session)
        session.belongs_to(weights)
        return session

    def _run_plain(self, key: Any, args: Sequence[Any]) -> Any:
        if key not in self.plain:
            self.plain[key] = lower(self.module, args, self.options.lowering)
        return self.plain[key](*args)


def _verifies(options: Options, step: Step) -> bool:
    return options.verify > 0 and step.number % options.verify == 0


def stats(model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Counters of all compiled models, or of one.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.

    Returns:
        The fields of :class:`dllm_compile.stats.Stats` summed over its graphs; ``state_bytes``, of the rows kept of
        layers, and ``logits_bytes``, of logits kept for the rows that are not computed again; ``peak_bytes``, see
        :func:`dllm_compile.memory.process_peak_bytes`.
    """
    mine = None if model is None else {id(parameter) for parameter in model.parameters()}
    total, kept, logits = Stats(), 0, 0
    for session in sessions():
        if mine is None or mine & set(session.owner):
            total.add(session.stats)
            kept += session.state_bytes()
            logits += session.logits_bytes()
    sizes = {"state_bytes": kept, "logits_bytes": logits, "peak_bytes": process_peak_bytes()}
    return {**total.as_dict(), "refused": list(dict.fromkeys(_REFUSED)), **sizes}


def reset() -> None:
    """Drop the state of every session, and code that no graph holds; called by ``torch._dynamo.reset()`` too."""
    enter(None)
    forget()
    forget_breaks()
    _REFUSED.clear()
    for session in sessions():
        session.drop()


dllm.reset = reset  # type: ignore[attr-defined]
