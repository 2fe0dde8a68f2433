"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.fx
from torch._dynamo.eval_frame import cached_backends
from torch._guards import CompileContext
from torch._inductor.compile_fx import compile_fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from .core.arguments import attention
from .core.errors import GraphRefused, refusing
from .core.graph import numbers
from .lower import Compiled
from .memory import process_peak_bytes
from .options import Options
from .program import Program
from .run import run
from .session import Session, Step, current, enter, sessions
from .stats import Stats
from .unit_code import forget
from .verify import compare

_REFUSED: list[str] = []
_PLAIN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a weight of each model that a graph refused was called with
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
        A function of the same inputs: what Inductor makes of the graph where no cache can serve it.

    Raises:
        ValueError: ``mode`` is another one, or an option is unknown or out of range.
    """
    cached_backends.setdefault(id(dllm), dllm)  # a reset of Dynamo forgets whom to tell of the next one
    chosen = Options.of(options)
    if mode not in (None, "reduce-overhead"):
        raise ValueError(
            f"mode={mode!r} is not for this backend; give 'reduce-overhead', or say options={{'method': ...}} instead"
        )
    _warn_of_last_graph(module, example_inputs)
    made = Backend(module, replace(chosen, cuda_graphs=chosen.cuda_graphs or mode is not None))
    if not made.refuses(example_inputs):
        return made
    return module if chosen.lowering == "eager" else compile_fx(module, list(example_inputs))  # type: ignore[return-value]


def _warn_of_last_graph(module: torch.fx.GraphModule, shown: Sequence[Any]) -> None:
    """Say, once a function, that Dynamo will make no further graph of it: what fits none of them runs in eager."""
    made, limit = CompileContext.current_compile_id(), torch._dynamo.config.recompile_limit
    if made is None or made.frame_compile_id is None or made.frame_compile_id + 1 != limit:
        return
    ids = [a for a in shown if isinstance(a, torch.Tensor) and a.dim() == 2 and a.dtype in (torch.int64, torch.int32)]
    sizes = f", for ids of {' x '.join(map(str, ids[0].shape))}" if ids else ""
    warnings.warn(
        f"dllm: torch.compile made graph {limit} of {limit} that it makes of one function{sizes}; calls of further "
        "sizes run in eager, without a cache. Do not say dynamic=False, or raise torch._dynamo.config.recompile_limit",
        stacklevel=2,
    )


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
        self.ready: dict[Any, Program] = {}
        self.numbers = numbers(module.graph)
        self.plain: Compiled | None = module if options.lowering == "eager" else None
        self.inputs: list[int] = []
        self.weights: list[int] | None = None

    def __call__(self, *args: Any) -> Any:
        """Run the graph as part of the step it belongs to."""
        key = self._key(args)
        if key not in self.programs:
            self.programs[key] = self._program(args)
        program = self.programs[key]
        if program is None:
            return self._run_plain(args)
        session, step = self._step(program, args)
        stepped = session is not None and step is not None
        result = self._run(program, args, session, step) if stepped else self._run_plain(args)  # type: ignore[arg-type]
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
        except GraphRefused as refusal:  # a layer could not be written or compiled, perhaps in the middle of a sequence
            self._refuse(refusal)
            self.programs = {key: None if known is program else known for key, known in self.programs.items()}
            session.drop()
            session.idle = True  # the graphs behind this one belong to no step
            result = self._run_plain(args)
        finally:
            if not done:
                session.drop()  # an error or an interrupt in the middle leaves rows half written
        return result

    def _program(self, args: Sequence[Any]) -> Program | None:
        try:
            program = self.ready.pop(self._key(args), None) or self._analyzed(args)
            with refusing("analyzed"):
                program.check(args)
            return program
        except GraphRefused as refusal:
            self._refuse(refusal)
            return None

    def _analyzed(self, args: Sequence[Any]) -> Program:
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            raise GraphRefused("gradients are on; call the model under torch.no_grad()")
        with refusing("analyzed"):
            return Program(self.module, args, self.options)

    def _key(self, args: Sequence[Any], scalars: Sequence[Any] = ()) -> tuple[Any, ...]:
        """What a program is made for: sizes and numbers of a call's inputs. Dynamo guards the shapes of weights."""
        scalars = scalars or args
        if self.weights is None:
            self.weights = [i for i, a in enumerate(args) if isinstance(a, torch.nn.Parameter)]
            self.inputs = [i for i in range(len(args)) if i not in self.weights]
        given = [args[i] for i in self.inputs]
        read = [scalars[i].item() for i in self.numbers if scalars[i].device.type == "cpu"]
        return (*[(a.shape, a.dtype) if isinstance(a, torch.Tensor) else a for a in given], *read)

    def refuses(self, shown: Sequence[Any]) -> bool:
        """Analyze the graph while Dynamo waits for it, at the sizes that ``shown`` has now.

        What is refused here becomes what Inductor makes of it, with its gradients, guards and dynamic sizes.

        Args:
            shown: fake inputs, one a placeholder.

        Returns:
            Whether no cache can serve the graph. What only a call can tell is left to the first one.
        """
        if any(is_traceable_wrapper_subclass(a) for a in shown) or any(
            isinstance(shown[i], FakeTensor) for i in self.numbers
        ):
            return False
        try:
            program = self._analyzed(shown)
        except GraphRefused as refusal:
            self._refuse(refusal)
            return True
        self.ready[self._key([program.axes.fake[node] for node in program.index], shown)] = program
        return False

    def _refuse(self, refusal: GraphRefused) -> None:
        """Say once why a graph runs on plain Inductor; graphs that never could be cached are only noted."""
        if self.options.verify and refusal.__cause__ is not None and not isinstance(refusal.__cause__, GraphRefused):
            raise refusal.__cause__
        reason = str(refusal)
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
            reason = "no graph of this model saw its token ids, and its hidden state does not show what is masked"
            self._refuse(GraphRefused(reason))
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

    def _run_plain(self, args: Sequence[Any]) -> Any:
        """Run the graph as Inductor alone would: its own Dynamo sees to gradients, and to sizes that change."""
        _PLAIN.update({args[i]: None for i in (self.weights or ())[:1]})
        if self.plain is None:
            self.plain = torch.compile(self.module, backend="inductor")
        return self.plain(*args)


def _verifies(options: Options, step: Step) -> bool:
    return options.verify > 0 and step.number % options.verify == 0


def stats(model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Counters of all compiled models, or of one.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.

    Returns:
        The fields of :class:`dllm_compile.stats.Stats` summed over its graphs; ``state_bytes``, of the rows kept of
        layers, and ``logits_bytes``, of logits kept for the rows that are not computed again; ``peak_bytes``, see
        :func:`dllm_compile.memory.process_peak_bytes`; ``compiled``, whether any call of the model came here: not where
        its methods or ``forward`` are called instead of itself, as the ``generate`` of some classes does.
    """
    mine = None if model is None else {id(parameter) for parameter in model.parameters()}
    total, kept, logits = Stats(), 0, 0
    compiled = any(mine is None or id(weight) in mine for weight in list(_PLAIN))
    for session in sessions():
        if mine is None or mine & set(session.owner):
            compiled = True
            total.add(session.stats)
            kept += session.state_bytes()
            logits += session.logits_bytes()
    sizes = {"state_bytes": kept, "logits_bytes": logits, "peak_bytes": process_peak_bytes()}
    return {**total.as_dict(), "compiled": compiled, "refused": list(dict.fromkeys(_REFUSED)), **sizes}


def reset() -> None:
    """Drop the state of every session, and code that no graph holds; called by ``torch._dynamo.reset()`` too."""
    enter(None)
    forget()
    _REFUSED.clear()
    for session in sessions():
        session.drop()


dllm.reset = reset  # type: ignore[attr-defined]
