"""Find the modules of a model that break its graph and whose rows are independent, and make each one call in a graph.

Experts that look up their rows, or split them by counts that they read, break the graph inside of every layer, though
the module as a whole makes each row of that row alone. No class is known by name: Dynamo is asked whether it can trace
a module whole, and a trial on other rows shows what a row depends on.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from traceback import FrameSummary
from typing import Any, NamedTuple

import torch

from . import compat
from .core.opaque import Form, flat_outputs, is_opaque, make_opaque
from .runtime.cost import Counter

CLOSE = 1e-5
"""How much of the largest number a row may move among other rows, by rounding, in float32."""
STRANGE = 1000.0
"""How much larger than a module's own input some of its other rows are in the trial: little of them would be seen."""
CALL_FAILS = (RuntimeError, TypeError, ValueError, AssertionError, IndexError, AttributeError)
"""What a call that does not fit raises."""
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Refused(Exception):
    """A module cannot be made one call; says why."""


class Told(NamedTuple):
    """A module that breaks the graph and stays as it is."""

    name: str
    place: str
    reason: str


def prepare_modules(model: torch.nn.Module, ids: torch.Tensor, more: Mapping[str, Any]) -> list[Told]:
    """Make opaque what breaks the graph inside of the layers.

    Args:
        model: called once as ``model(ids, **more)``, in eager.
        ids: ``[B, S]``, such as the model is called with.
        more: other arguments of the call.

    Returns:
        Modules that break the graph and could not be made opaque: the innermost ones, one of each kind.
    """
    found: dict[str, str | None] = {}
    refused: dict[torch.nn.Module, Told] = {}
    names = {module: name for name, module in model.named_modules()}
    with _evaluating(model):
        for module, x in reversed(_called(model, ids, more).items()):  # those inside come first
            inside = [each for each in module.modules() if each in refused]
            kind = f"{type(module)} {module} {x.dtype} {[is_opaque(each) for each in module.modules()]}"
            if kind not in found:
                found[kind] = _where_it_breaks(module, x)
            place = found[kind]
            if place is None:
                continue
            try:
                _make_opaque(module, x)
            except Refused as why:
                if not inside:
                    refused[module] = Told(names[module], place, str(why))
                continue
            for each in inside:
                del refused[each]
    return [*{(type(module), told.place): told for module, told in refused.items()}.values()]


def some_ids(model: torch.nn.Module) -> torch.Tensor | None:
    """Random ids ``[2, 12]`` for a model that looks its tokens up in a table; ``None`` for another."""
    table = next((each for each in model.modules() if isinstance(each, torch.nn.Embedding)), None)
    if table is None or table.weight.is_meta:
        return None
    drawn = torch.randint(table.num_embeddings, (2, 12), generator=torch.Generator().manual_seed(0))
    return drawn.to(table.weight.device)


@contextmanager
def _evaluating(model: torch.nn.Module) -> Iterator[None]:
    """In ``eval()`` and without gradients, whatever it was; each module is put back."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before.items():
            module.training = training


def _called(model: torch.nn.Module, ids: torch.Tensor, more: Mapping[str, Any]) -> dict[torch.nn.Module, torch.Tensor]:
    """Modules that are called with one tensor, ``[B, S, d]``, and return one such first; in the order of the model."""
    seen: dict[torch.nn.Module, torch.Tensor] = {}

    def look(module: torch.nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = [*args, *kwargs.values()]
        outs = out if isinstance(out, tuple) else (out,)
        if len(given) == 1 and outs and all(isinstance(each, torch.Tensor) for each in (given[0], outs[0])):
            x, first = given[0], outs[0]
            if x.dim() == 3 and x.shape[:2] == ids.shape and x.is_floating_point() and first.shape == x.shape:
                seen[module] = x.detach().clone()

    own = [each for each in model.modules() if type(each).__module__.partition(".")[0] != "torch"]
    hooks = [each.register_forward_hook(look, with_kwargs=True) for each in own if each is not model]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(ids, **more)
    finally:
        for hook in hooks:
            hook.remove()
    return {module: seen[module] for module in model.modules() if module in seen}


def _call(module: Callable[..., Any], x: torch.Tensor) -> Any:
    return module(x)


def _where_it_breaks(module: torch.nn.Module, x: torch.Tensor) -> str | None:
    """The line that breaks the graph of a module; ``None`` if Dynamo traces it whole, with sizes that are known."""
    unknown: list[str] = []

    def look(module: torch.fx.GraphModule, _: Any) -> Any:
        for node in module.graph.nodes:
            if compat.of_values(node.meta.get("example_value")):
                unknown.append(node.stack_trace or "")
        return module.forward

    call = types.FunctionType(_call.__code__.replace(), globals())  # whose code no other trace was of
    try:
        torch.compile(call, backend=look, fullgraph=True, dynamic=False)(module, x)
    except (compat.TorchDynamoException, compat.GuardOnDataDependentSymNode) as error:
        stack = getattr(error, "real_stack", None)
        return _place(stack[-1] if stack else None, module, str(error).splitlines()[0])
    if not unknown:
        return None
    lines = [line.split('"') for line in unknown[0].splitlines() if line.strip().startswith("File")]
    at = FrameSummary(lines[-1][1], int(lines[-1][2].split()[2].rstrip(",")), "") if lines else None
    return _place(at, module, "a size or a number depends on values")


def _place(at: FrameSummary | None, module: torch.nn.Module, reason: str) -> str:
    """A line, by default that of a module's forward, with the reason."""
    code = type(module).forward.__code__
    place = (at.filename, at.lineno) if at is not None else (code.co_filename, code.co_firstlineno)
    return f"{place[0]}:{place[1]} ({reason})"


def _make_opaque(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Make a module one call.

    Raises:
        Refused: something forbids it.
    """
    if is_opaque(module):
        raise Refused("it is one call already, and is not called as when it was prepared")
    if "forward" in vars(module):
        raise Refused("its forward was replaced on the object, as hooks of accelerate do")
    held = [*module.parameters(), *module.buffers()]
    if any(type(each) not in _PLAIN for each in held):
        raise Refused("its weights are of a class of their own, such as quantized ones")
    if not x.isfinite().all():
        raise Refused("the model calls it with rows that are not finite")
    if any(isinstance(value, torch.Tensor) for each in module.modules() for value in vars(each).values()):
        raise Refused("it holds tensors that are neither parameters nor buffers")
    try:
        with torch.compiler.set_stance("force_eager"):
            _try_state(module, x)
            wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
            _try_rows(module if wide is x else copy.deepcopy(module).float(), wide)
            form, nested = _form_of(module, x)
    except CALL_FAILS as error:
        raise Refused(f"it cannot be called on other rows, or in float32: {str(error).splitlines()[0]}") from error
    make_opaque(module, x.shape[-1], x.dtype, form, nested)


def _try_state(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Check that a module keeps nothing from call to call, and draws nothing.

    Raises:
        Refused: it does.
    """
    before, given = _state(module), x.clone()
    random = torch.get_rng_state()
    once, again = (_outs(module, given)[0] for _ in range(2))
    if not torch.equal(random, torch.get_rng_state()):
        raise Refused("it draws random numbers")
    if not torch.equal(given, x):
        raise Refused("it changes its input in place")
    after = _state(module)
    same = (a is b or (type(a) is int and a == b) for a, b in zip(before, after, strict=True))
    if len(before) != len(after) or not all(same):
        raise Refused("it keeps something from call to call")
    if not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)):
        raise Refused("two calls with the same rows differ")


def _state(module: torch.nn.Module) -> list[Any]:
    """What a module holds: the objects themselves, what is in those that hold others, and how often each tensor was
    written to.
    """
    found: list[Any] = []
    for each in module.modules():
        for name, value in vars(each).items():
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, (list, set)) else ()
            found += [name, value, *inside]
    tensors = [each for each in (*module.parameters(), *module.buffers()) if not each.is_inference()]
    return [*found, *map(compat.version, tensors)]


def _outs(module: torch.nn.Module, x: torch.Tensor) -> tuple[list[torch.Tensor], Any]:
    """The tensors that a module returns, one entry a row each, as ``[B S, ...]``; and what they were nested in.

    Raises:
        Refused: it returns something else.
    """
    found = flat_outputs(module.forward(x))
    if found is None:
        raise Refused("it returns more than tensors in tuples")
    rows = x.shape[0] * x.shape[1]
    for out in found[0]:
        if out.shape[:2] != x.shape[:2] and out.shape[:1] != (rows,):
            raise Refused(f"it returns {list(out.shape)} for {list(x.shape)}, which has no entry for each row")
    return [out.reshape(rows, *out.shape[1 + (out.shape[:2] == x.shape[:2]) :]) for out in found[0]], found[1]


def _form_of(module: torch.nn.Module, x: torch.Tensor) -> tuple[Form, Any]:
    """The :class:`Form` of what a module returns for ``x``, and how it is nested."""
    counter = Counter()  # type: ignore[no-untyped-call]
    with counter:
        found = flat_outputs(module.forward(x))
    assert found is not None
    flat = tuple([out.shape[:2] != x.shape[:2] for out in found[0]])
    rest = tuple([tuple(out.shape[1 if each else 2 :]) for out, each in zip(found[0], flat, strict=True)])
    return Form(flat, rest, tuple([out.dtype for out in found[0]]), counter.flops // x[..., 0].numel()), found[1]


def _try_rows(module: torch.nn.Module, x: torch.Tensor) -> None:
    """Check that each row of what a module returns depends on the same row of its input alone, on rows ``[B, S, d]`` of
    the model and on random ones: in another order, fewer, more, all alike, and beside others.

    Raises:
        Refused: one depends on others.
    """
    batch, tokens, width = x.shape
    count = batch * tokens
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn((3, count, width), generator=generator, dtype=x.dtype).to(x.device) * x.std() + x.mean()
    order = torch.randperm(count, generator=generator).to(x.device)
    every = torch.arange(count, device=x.device)
    for rows in (x.flatten(0, 1), *drawn[:2]):
        want, _ = _outs(module, rows.view(x.shape))
        for index, sequences in (
            (order, batch),
            (order.flip(0), 1),
            (every.roll(1), batch),
            (every[::3], 1),
            (every[:2], 1),
            (torch.cat([order, every]), batch),
            (torch.zeros_like(every), 1),
            (every[-1:].expand(4 * count), 2),
        ):
            _compare(_outs(module, rows[index].view(sequences, -1, width))[0], [out[index] for out in want])
        for mine in (every % 2 == 0, every % 5 != 0):
            for others in (drawn[2], STRANGE * drawn[2]):
                got, _ = _outs(module, torch.where(mine[:, None], rows, others).view(x.shape))
                _compare([out[mine] for out in got], [out[mine] for out in want])


def _compare(got: list[torch.Tensor], want: list[torch.Tensor]) -> None:
    """Check that tensors are the same up to rounding.

    Raises:
        Refused: they are not.
    """
    for a, b in zip(got, want, strict=True):
        same = torch.equal(a, b)
        if not same and a.is_floating_point() and a.shape == b.shape:
            same = bool((a - b).abs().max() <= CLOSE * b.abs().max())
        if not same:
            raise Refused("a row of what it returns depends on other rows")
