"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch._dynamo.eval_frame import cached_backends
from torch.utils._pytree import tree_leaves

from .batch import Batch, Step, current, enter
from .core.axes import attention
from .core.errors import GraphRefused
from .declared import ExactCalls, declared
from .lower import Compiled, lower
from .memory import process_peak_bytes
from .options import Options, check_vocabulary
from .program import Program
from .run import run
from .session import Session, sessions
from .stats import Stats
from .unchanged import Inputs
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
        A function of the same inputs. Where ``mode`` is another one, or an option is unknown or out of range, it raises
        the ``ValueError`` or ``TypeError`` that says so: raised here, Dynamo would wrap it in an error of its own.
    """
    cached_backends.setdefault(id(dllm), dllm)  # a reset of Dynamo forgets whom to tell of the next one
    try:
        chosen = Options.of(options)
        if mode not in (None, "reduce-overhead"):
            raise ValueError(
                f"mode={mode!r} is not for this backend; give 'reduce-overhead', or say "
                "options={'method': ...} instead"
            )
    except (TypeError, ValueError) as error:
        return _raising(error)
    return Backend(module, replace(chosen, cuda_graphs=chosen.cuda_graphs or mode is not None))


def _raising(error: Exception) -> Compiled:
    """A function that raises ``error``, whatever it is given."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse


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

    def __call__(self, *args: Any) -> Any:
        """Run the graph as part of the step it belongs to."""
        if self.weights is None:
            self.weights = [i for i, a in enumerate(args) if isinstance(a, torch.nn.Parameter)]
            self.inputs = [i for i in range(len(args)) if i not in self.weights]
        given = [args[i] for i in self.inputs]  # Dynamo guards the shapes of weights
        key = tuple([(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given])
        if key not in self.programs:
            self.programs[key] = self._program(args)
        program = self.programs[key]
        session = None if program is None else self._session_of(program, args)
        if program is None or session is None:
            return self._run_plain(key, args)
        with session.lock:
            found = self._step(program, args, session)
            if found is None:
                return self._run_plain(key, args)
            return self._run(program, args, session, *found)

    def _run(self, program: Program, args: Sequence[Any], session: Session, batch: Batch, step: Step) -> Any:
        begins = batch.last is not step
        done = False
        try:
            result = run(program, args, batch, step)
            done = True
        finally:
            if not done:
                batch.begin_anew()  # an error or an interrupt in the middle leaves rows half written
        if begins:
            session.commit(batch, step)
        batch.layers_seen = max(batch.layers_seen, step.layer)
        batch.expect(program)
        step.passed = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor) and v.dim() == 3]
        if _verifies(session.options, step):
            compare(self.module, program, args, result, batch, step)
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
        if reason in self.refused:
            return
        self.refused.append(reason)
        _REFUSED.append(reason)
        if any(node.target in _WORTH_SAYING for node in self.module.graph.nodes):
            warnings.warn(f"dllm: this graph runs on plain Inductor: {reason}", stacklevel=2)

    def _session_of(self, program: Program, args: Sequence[Any]) -> Session | None:
        """The session that a call belongs to: of all weights of the model, or of its first layer where layers are alone."""
        if isinstance(declared(), ExactCalls):
            return None
        if program.ids is not None:
            assert self.weights is not None
            return self._session([args[i] for i in self.weights], self.options)
        stream = args[program.index[program.seed]]
        under_way = current()
        if under_way is not None and under_way[1].hands_on(stream):
            return under_way[0].session
        if not program.layers:
            return None
        return self._session(program.first_weights(args), replace(self.options, mask_id=None))

    def _step(self, program: Program, args: Sequence[Any], session: Session) -> tuple[Batch, Step] | None:
        """The batch of sequences that a call belongs to, and the step of it."""
        beside = [args[i] for i in program.beside]
        stream = args[program.index[program.seed]]
        if program.ids is None:
            under_way = current()
            if under_way is not None and under_way[1].hands_on(stream):
                batch, step = under_way
                self._join(program, args, batch, step, beside)
                return under_way if step.shape == program.shape else None
        if program.ids is not None:
            check_vocabulary(self.options.mask_id, program.vocabulary)
            session.vocabulary = program.vocabulary
            found = session.begin(stream, beside, program)
        else:
            found = session.begin_hidden(stream, beside, program)
            if found is None and session.unknown is not None:
                self._refuse(
                    "no graph of this model saw its token ids, and its hidden state does not show what is masked"
                )
        if found is None:
            enter(None)
            return None
        batch, step = found
        if program.ids is None or not program.layers or program.head(session.vocabulary) is None:
            batch.thread = threading.get_ident()  # further graphs of the step follow
        step.inputs = {id(tensor): tensor for tensor in beside}
        session.weights.include([args[i] for i in self.weights or ()])
        enter(found)
        return found

    def _join(
        self, program: Program, args: Sequence[Any], batch: Batch, step: Step, beside: list[torch.Tensor]
    ) -> None:
        """See that the weights and inputs of a graph behind the first are those of the step before."""
        known = batch.session.weights.include([args[i] for i in self.weights or ()])
        new = [tensor for tensor in beside if id(tensor) not in step.inputs]
        step.inputs.update({id(tensor): tensor for tensor in new})
        if new:
            place = program.signature, step.layer
            before = batch.part_inputs.get(place)
            if before is None or not before.fit(new) or any(before.differ(new)):
                batch.part_inputs[place] = Inputs(new)
                known = False
        if not known and step.number > 0:
            step.anew = batch.stale = True

    def _session(self, weights: list[torch.Tensor], options: Options) -> Session:
        """The session of some weights. A graph that Dynamo traced anew goes on with the same session.

        Weights that are no parameters are inputs of the sequences; the graph has a session of its own then.
        """
        known: list[Session] = [*self.mine, *(sessions() if weights else ())]
        for session in known:
            if session.owns(weights) and session.options == options:
                if session not in self.mine:
                    self.mine.append(session)
                return session
        self.mine = [*(session for session in self.mine if session.lives()), Session(options, weights)]
        return self.mine[-1]

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

    Raises:
        TypeError: ``model`` is no module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the module that was compiled, or nothing for all")
    mine = None if model is None else list(model.parameters())
    total, kept, logits = Stats(), 0, 0
    for session in sessions():
        if mine is None or session.shares(mine):
            total.add(session.stats)
            kept += session.state_bytes()
            logits += session.logits_bytes()
    sizes = {"state_bytes": kept, "logits_bytes": logits, "peak_bytes": process_peak_bytes()}
    return {**total.as_dict(), "refused": list(dict.fromkeys(_REFUSED)), **sizes}


def reset() -> None:
    """Drop the state of every session, and code that no graph holds; called by ``torch._dynamo.reset()`` too."""
    enter(None)
    forget()
    _REFUSED.clear()
    for session in sessions():
        session.drop()


dllm.reset = reset  # type: ignore[attr-defined]
