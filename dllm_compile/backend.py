"""``torch.compile(model, backend="dllm")``."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch
import torch.fx
from torch.utils.weak import WeakIdKeyDictionary

from . import compat, own_caches
from .breaks import forget as forget_breaks
from .breaks import last_break, tell_of
from .compat import tree_leaves
from .core.errors import GraphRefused, TokensUnseen, describe, refusing
from .debug import labelled
from .declared import ExactCalls, Loop, declared
from .graph_limit import warn_of_last, worth_saying
from .interface.plan import Exact
from .mechanisms import tables, turned_on
from .options import Options, check_vocabulary
from .passes.own_cache import HandedOver, keys_handed_over
from .runtime.batch import Batch
from .runtime.chain import Chain, current, enter
from .runtime.ids import labels
from .runtime.lower import Compiled
from .runtime.memory import process_peak_bytes
from .runtime.program import Program
from .runtime.programs import Key, Programs
from .runtime.read import NewCall
from .runtime.run import run
from .runtime.session import Session, sessions
from .runtime.stats import Stats
from .runtime.step import Step
from .runtime.unchanged import Inputs
from .runtime.unit_code import forget
from .runtime.verify import compare

_REFUSED: list[str] = []
_MAKING = threading.Lock()  # held where a session is looked up or made
_PLAIN: WeakIdKeyDictionary = WeakIdKeyDictionary()  # a weight of each model that a graph refused was called with


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
        A function of the same inputs: what Inductor makes of the graph where no cache can serve it. Where ``mode`` is
        another one, or an option is unknown or out of range, it raises the ``ValueError`` or ``TypeError`` that says
        so: raised here, Dynamo would wrap it in an error of its own.
    """
    try:
        chosen = Options.of(options)
        _tell_of_tokens(chosen)
        if mode not in (None, "reduce-overhead"):
            raise ValueError(
                f"mode={mode!r} is not for this backend; give 'reduce-overhead', or say "
                "options={'method': ...} instead"
            )
    except (TypeError, ValueError) as error:
        return _raising(error)
    return of_generate(module, example_inputs, options=Options.of(chosen, cuda_graphs=chosen.cuda_graphs or bool(mode)))


def of_generate(
    module: torch.fx.GraphModule, example_inputs: Sequence[Any], *, options: dict[str, Any] | Options
) -> Compiled:
    """The backend as :func:`dllm_compile.generate` uses it: mechanisms may decide which tokens are written."""
    compat.cached_backends.setdefault(id(dllm), dllm)  # a reset of Dynamo forgets whom to tell of the next one
    chosen = Options.of(options)
    warn_of_last(module.graph, example_inputs)
    made = Backend(module, chosen)
    if not made.refuses(example_inputs):
        return made
    return module if chosen.lowering == "eager" else compat.compile_fx(module, list(example_inputs))


def _tell_of_tokens(options: Options) -> None:
    """Warn of options that only decide what :func:`dllm_compile.generate` writes, as a loop of one's own does not read
    them.

    Raises:
        ValueError: they decide nothing else.
    """
    for each in turned_on(options):
        found = each.block is not None and options.cache == "none"
        if not (each.unmask or each.candidates or each.threshold or each.ends or found):
            continue
        on = [name for name in each.switches if getattr(options, name) != tables().options[name].default]
        said = (
            f"{' and '.join(f'{name} is {getattr(options, name)!r}' for name in on)}, by which the mechanism "
            f"{each.name!r} decides which tokens dllm_compile.generate writes; a loop of your own does not ask it: "
        )
        rows = (each.widens, each.narrows, each.visible, each.refresh, *each.rules)
        present = (
            each.present and not each.ends
        )  # a loop of one's own looks for no end, behind which rows would be absent
        if found or not (any(rows) or present):
            raise ValueError(f"{said}call dllm_compile.generate, or leave out {' and '.join(on)}")
        warnings.warn(f"dllm: {said}only its other parts apply here", stacklevel=3)


def _raising(error: Exception) -> Compiled:
    """A function that raises ``error``, whatever it is given."""

    def refuse(*_: Any) -> Any:
        raise error

    return refuse


class Backend:
    """One compiled graph: a program per set of input sizes, or plain Inductor with the reason why.

    Models of one class share their graphs, since weights are inputs; each model has a session of its own.
    """

    def __init__(self, module: torch.fx.GraphModule, options: Options) -> None:
        self.module = module
        self.options, self.inferring = options, Options.of(options, mask_id=None)  # of a graph that sees no ids
        self.programs = Programs(module, options)
        self.plain: Compiled | None = module if options.lowering == "eager" else None
        self.sessions: list[Session] = []  # of the models that were called
        self.refused: list[str] = []  # reasons
        self.broke = last_break()
        self.own_cache: HandedOver | None = None  # keys or values that are an input
        self.told_own_cache = False

    def __call__(self, *args: Any) -> Any:
        """Run the graph as part of the step it belongs to."""
        if self.own_cache is not None:
            if own_caches.leave_alone(args) and not self.told_own_cache:
                self.told_own_cache = True
                _REFUSED.append(own_caches.tell(self.own_cache))
            return self._run_plain(args)
        begin, key = perf_counter(), self.programs.key(args)
        known = self.programs.known
        new = key not in known
        program = self._program(key, args) if new else known[key]
        if program is None or isinstance(declared(), ExactCalls):
            return self._run_plain(args)
        stream = args[program.index[program.seed]]
        chain = current() if program.ids is None else None
        if chain is None or not chain.hands_on(stream):
            if program.ids is None and not program.layers:
                return self._run_plain(args)
            chain = Chain()
            session = self._session_of(program, args)
            if own_caches.is_left_alone(session):
                enter(None)
                return self._run_plain(args)
            with session.lock:
                chain.found = self._begin(program, args, session)
                enter(chain)
                result = self._run(program, args, chain, begin, new)
        elif chain.found is None:
            result = self._run(program, args, chain, begin, new)
        else:
            with chain.found[0].session.lock:
                self._join(program, args, *chain.found)
                result = self._run(program, args, chain, begin, new)
        return chain.deliver() or result  # type: ignore[func-returns-value]  # no interrupt comes inside of a line

    def _run(self, program: Program, args: Sequence[Any], chain: Chain, begin: float, looked: bool) -> Any:
        """Run the graph as part of the step that ``chain`` is, or plainly where it is none."""
        result = None
        if chain.found is not None and chain.found[1].shape == program.size:
            try:
                result = self._run_step(program, args, *chain.found, looked)
            except GraphRefused as refusal:  # a layer could not be written or compiled, perhaps in mid-sequence
                self._refuse(refusal, args)
                self.programs.refuse(program)
                chain.found[0].session.drop()
                chain.found = None  # the graphs behind this one belong to no step
        if chain.found is None or chain.found[1].shape != program.size:
            result = self._run_plain(args)
        else:
            chain.found[0].session.took(*chain.found, begin)
        chain.passed = [v for v in tree_leaves(result) if isinstance(v, torch.Tensor) and v.dim() == 3]
        return result

    def _run_step(self, program: Program, args: Sequence[Any], batch: Batch, step: Step, looked: bool) -> Any:
        begins, done, before, depth = batch.last is not step, False, step.layer, step.depth
        try:
            place = program.signature, before
            if not looked and place not in batch.looked:
                with refusing("analyzed"):
                    program.check(args)  # a mask may be another one than at the first call of this size
            batch.looked.add(place)
            with labelled("step {}, {}", step.number, step.assignment.name):
                result = run(program, args, batch, step)
            step.layer, step.depth = before + len(program.layers), depth + program.depth
            if begins:
                batch.session.commit(batch, step)
            done = True
        finally:
            if not done:
                batch.begin_anew()  # an error or an interrupt in the middle leaves rows half written
        batch.layers_seen = max(batch.layers_seen, step.layer)
        batch.session.depth = max(batch.session.depth, step.depth)
        batch.expect(program)
        if self.options.verify and step.number % self.options.verify == 0:
            compare(self.module, program, args, result, batch, step)
        return result

    def _program(self, key: Key, args: Sequence[Any]) -> Program | None:
        """The program for sizes that were not called before; ``None`` where the graph is refused at these."""
        program = None
        try:
            program = self.programs.make(key, args)
        except GraphRefused as refusal:
            self._refuse(refusal, args)
        self.programs.keep(key, program)
        self._tell_of_break(program, args)
        return program

    def refuses(self, shown: Sequence[Any]) -> bool:
        """Analyze the graph while Dynamo waits for it: for all sizes, or at those that ``shown`` has now.

        What is refused here becomes what Inductor makes of it, with its gradients, guards and dynamic sizes.

        Args:
            shown: fake inputs, one a placeholder.

        Returns:
            Whether no cache can serve the graph. What only a call can tell is left to the first one.
        """
        self.own_cache = keys_handed_over(self.module.graph, shown)
        if self.own_cache is not None:
            return False  # each call says which model it is of
        try:
            self.programs.analyze(shown)
        except GraphRefused as refusal:
            self._refuse(refusal, shown)
            return True
        return False

    def _tell_of_break(self, program: Program | None, args: Sequence[Any]) -> None:
        """Warn of the line that cut this graph from the one before it in the step, if a line did."""
        chain = current()
        given = [a for a in args if isinstance(a, torch.Tensor)]
        handed = [a for a in given if chain is not None and chain.hands_on(a)]
        part = program is not None and program.ids is None and bool(program.layers)
        if self.broke is not None and (handed or part):
            found = chain.found if chain is not None else None
            heads = [found is not None and a.shape[-1] == found[0].session.vocabulary for a in handed]
            tell_of(self.broke, args, cut=any(heads))

    def _refuse(self, refusal: GraphRefused, args: Sequence[Any]) -> None:
        """Note why the graph runs on plain Inductor, and warn once if it is one that a cache would have helped.

        Args:
            refusal: the reason; that no tokens are seen has one of its own, where a graph broke.
            args: what the graph is called with.
        """
        if self.options.verify and refusal.__cause__ is not None and not isinstance(refusal.__cause__, GraphRefused):
            raise refusal.__cause__
        reason = str(refusal)
        if reason in self.refused:
            return
        self.refused.append(reason)
        _REFUSED.append(reason)
        worth = worth_saying(self.module.graph)
        if worth and self.broke is not None and isinstance(refusal, TokensUnseen):
            tell_of(self.broke, args)
        elif worth:
            warnings.warn(f"dllm: this graph runs on plain Inductor: {reason}", stacklevel=2)

    def _session_of(self, program: Program, args: Sequence[Any]) -> Session:
        """The session of a model: of all its weights, or of those of the first layer where layers are traced alone."""
        if program.ids is not None:
            return self._session([args[i] for i in self.programs.weights or ()], self.options)
        return self._session(program.first_weights(args), self.inferring)

    def _begin(self, program: Program, args: Sequence[Any], session: Session) -> tuple[Batch, Step] | None:
        """The batch of sequences that a call goes on with, and the step that it is; ``None`` if it is no step."""
        side_inputs = [args[i] for i in program.side_inputs]
        stream, word = args[program.index[program.seed]], declared()
        loop = word if isinstance(word, Loop) else None
        if program.ids is not None:
            check_vocabulary(self.options.mask_id, program.vocabulary)
            session.vocabulary = program.vocabulary
            head_inputs = [args[i] for i in program.head_inputs]
            found = session.begin(NewCall(stream, program, side_inputs, head_inputs, args, loop))
        else:
            found = session.begin(NewCall(labels(stream), program, side_inputs, loop=loop))
            if found is None and session.mask_id is None:
                reason = "no graph of this model saw its token ids, and its hidden state does not show what is masked"
                self._refuse(TokensUnseen(reason), args)
        if found is None:
            return None
        batch, step = found
        meet = program.hides_attention
        if meet is not None and not batch.whole and not isinstance(batch.new_schedule(), Exact):
            batch.run_whole(f"rows of its graph meet where no attention is seen (at {describe(meet)})")
        calls = program.in_one_layer
        if calls and not batch.whole and batch.new_schedule().first is not None:
            batch.run_whole(
                f"its {len(calls)} attention calls are one layer, as more than a hidden state goes from one to the "
                f"next (at {describe(calls[1])}), and of layers the first is computed in full"
            )
        if not batch.asked_masks and program.ids is not None:
            batch.follow_masks(program, args)
        if program.ids is None or not program.layers or program.head(session.vocabulary) is None:
            batch.thread = threading.get_ident()  # further graphs of the step follow
        step.inputs = {id(tensor): tensor for tensor in side_inputs}
        session.weights.include([args[i] for i in self.programs.weights or ()])
        return found

    def _join(self, program: Program, args: Sequence[Any], batch: Batch, step: Step) -> None:
        """For a graph after the first of a step: check that its weights and inputs equal those of the previous step,
        and recompute every row if not.
        """
        known = batch.session.weights.include([args[i] for i in self.programs.weights or ()])
        new = [args[i] for i in program.side_inputs if id(args[i]) not in step.inputs]
        step.inputs.update({id(tensor): tensor for tensor in new})
        if new:
            place = program.signature, step.layer
            before = batch.part_inputs.get(place)
            if before is None or not before.fit(new) or any(before.differ(new)):
                batch.part_inputs[place] = Inputs(new)
                known = False
        batch.session.group = program.group or batch.session.group
        known = not batch.session.agree(not known, args[program.index[program.seed]].device)
        if not known and step.number > 0:
            step.anew = batch.stale = True
            batch.masked.clear()  # the same mask may be read by graphs behind this one
            batch.looked.clear()
            step.repeat = False  # the ids are those of the call before, and the result is not

    def _session(self, weights: list[torch.Tensor], options: Options) -> Session:
        """The session of some weights. A graph that Dynamo traced anew goes on with the same session.

        Weights that are no parameters are inputs of the sequences; the graph has a session of its own then.
        """
        with _MAKING:
            known: list[Session] = [*self.sessions, *(sessions() if weights else ())]
            for session in known:
                if session.owns(weights) and session.options == options:
                    if session not in self.sessions:
                        self.sessions.append(session)
                    return session
            self.sessions = [*(session for session in self.sessions if session.lives()), Session(options, weights)]
            return self.sessions[-1]

    def _run_plain(self, args: Sequence[Any]) -> Any:
        """Run the graph as Inductor alone would: its own Dynamo sees to gradients, and to sizes that change."""
        _PLAIN.update({args[i]: None for i in (self.programs.weights or ())[:1]})
        if self.plain is None:
            self.plain = torch.compile(self.module, backend="inductor")
        return self.plain(*args)


def stats(model: torch.nn.Module | None = None) -> dict[str, Any]:
    """Counters of all compiled models, or of one.

    Args:
        model: the module that was compiled, or what ``torch.compile`` returned for it.

    Returns:
        The fields of :class:`dllm_compile.runtime.stats.Stats` summed over its graphs; ``state_bytes``, of the rows
        kept of layers, and ``logits_bytes``, of logits kept for the rows that are not computed again; ``peak_bytes``,
        see :func:`dllm_compile.runtime.memory.process_peak_bytes`; ``compiled``, whether any call of the model came
        here: not where its methods or ``forward`` are called instead of itself, as the ``generate`` of some classes
        does.

    Raises:
        TypeError: ``model`` is no module.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; give the module that was compiled, or nothing for all")
    mine = None if model is None else {id(weight) for weight in model.parameters()}
    total, kept, logits = Stats(), 0, 0
    compiled = any(mine is None or id(weight) in mine for weight in list(_PLAIN))
    for session in sessions():
        if mine is None or session.shares(mine):
            compiled = True
            total.add(session.stats)
            kept += session.state_bytes()
            logits += session.logits_bytes()
    sizes = {"state_bytes": kept, "logits_bytes": logits, "peak_bytes": process_peak_bytes()}
    return {**total.as_dict(), "compiled": compiled, "refused": list(dict.fromkeys(_REFUSED)), **sizes}


def reset() -> None:
    """Drop the state of every session, and code that no graph holds; called by ``torch.compiler.reset()`` too."""
    enter(None)
    forget()
    forget_breaks()
    _REFUSED.clear()
    own_caches.forget()
    for session in sessions():
        session.drop()
        session.told.clear()


dllm.reset = reset  # type: ignore[attr-defined]
