"""Prove by trial that a unit's rows are independent."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
import torch.fx
from torch.fx.node import map_aggregate

from dllm_compile.compat import tree_map
from dllm_compile.core.assignment import EXACT, RESPONSE, Assignment
from dllm_compile.core.axes import Axes
from dllm_compile.core.emit import emit
from dllm_compile.core.errors import GraphRefused
from dllm_compile.core.layout import position
from dllm_compile.core.rows import ALL
from dllm_compile.core.state import allocate
from dllm_compile.core.units import Unit

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_NO_KERNEL = (RuntimeError, TypeError, ValueError, AssertionError, IndexError)
_CASTS = ("half", "bfloat16", "float", "double")
_PROBES = Assignment("probe", RESPONSE, ALL, ALL), Assignment("probe keys", RESPONSE, RESPONSE, RESPONSE)
"""Rows that attend to keys of this call; then rows whose keys enter the state, beside the others that lie there."""


def rows_are_independent(unit: Unit, axes: Axes, stream: Any, inputs: list[Any]) -> bool:
    """Run a unit for all rows, for every third row, and for all rows in another order, and compare.

    Among fewer rows a mean over the tokens changes; in another order, what is done at one place is done to another row.
    Each is run twice: for rows that attend to the keys of all, and for rows whose keys and values join those that the
    first run kept. Each sequence has rows of its own, so that what is done between sequences changes, too.

    Experts that sort tokens, or a custom kernel, are token-wise as a whole although single calls in them are not. The
    comparison is on the real weights and the real hidden state, a little changed, in float64, or in float32 where a
    call has no kernel for that: in half precision a mean over all tokens drowns in rounding. A call that has a kernel
    for neither, such as one that rounds to 8 bits, is made in the dtype that the model calls it in, and must treat
    equal rows equally.

    Args:
        unit: a layer with calls whose rows may mix.
        axes: of its graph.
        stream: the residual stream, ``[B, S, d]``.
        inputs: the unit's other inputs.

    Returns:
        Whether the rows came out the same up to rounding; not where it cannot be run at all.
    """
    layout = axes.layout[unit.outputs[0]]
    tokens = position(layout, "T")
    assert tokens is not None
    count = stream.shape[1]
    try:
        probes = [emit(unit, axes, each) for each in _PROBES]
    except GraphRefused:
        return False
    whole = emit(unit, axes, EXACT)
    state = allocate(unit.anchors(), axes, (stream.shape[0], count), stream.device)
    given = {"stream": _told_apart(stream), "tokens": count, "batch": stream.shape[0]}
    given |= {f"input:{i}": v for i, v in enumerate(inputs)} | {f"state:{i}": v for i, v in enumerate(state)}
    every = torch.arange(count, device=stream.device)
    sequences = torch.arange(stream.shape[0], device=stream.device).unsqueeze(1)
    for dtype, own in ((torch.float64, False), (torch.float32, False), (torch.float64, True)):
        if dtype.itemsize < stream.dtype.itemsize:
            continue
        try:
            with torch.no_grad():
                wide = {id(v): _widened(v, dtype) for v in given.values() if isinstance(v, torch.Tensor)}
                want = _Widened(whole.module, dtype, own, wide).run(*[given[name] for name in whole.takes])[0]
                for rows, probe in product((every[::3], every.roll(1)), probes):
                    at = sequences, (rows + sequences) % count
                    here = {**given, "index:response": at[1]}
                    got = _Widened(probe.module, dtype, own, wide).run(*[here[name] for name in probe.takes])[0]
                    if not _alike(got[at].double(), want[at].double(), dtype):
                        return False
        except _NO_KERNEL:
            continue
        return True
    return False


def _told_apart(stream: torch.Tensor) -> torch.Tensor:
    """The hidden state ``[B, S, d]`` plus noise: rows of masks are all alike, so a layer that mixes them would go
    unseen.
    """
    noise = torch.randn(stream.shape[1:], generator=torch.Generator().manual_seed(0))
    return stream + (noise.to(stream.device) * (stream.float().std() / 10)).to(stream.dtype)


def _alike(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers are the same up to rounding in ``dtype``."""
    scale = want.abs().max().clamp(min=1e-12)
    return bool(((want - got).abs().max() / scale) < 50 * torch.finfo(dtype).eps ** 0.75)


def _widened(value: Any, dtype: Any) -> Any:
    """A floating tensor in ``dtype``; tensors of classes of their own, such as quantized weights, as they are."""
    plain = type(value) in (torch.Tensor, torch.nn.Parameter)
    return value.to(dtype) if plain and value.dtype in _FLOATS else value


class _Widened(torch.fx.Interpreter):
    """Runs a graph with its inputs, and every dtype that its calls name, widened.

    Args:
        module: the graph.
        dtype: the wide one.
        own: whether a call that fails is made again in the dtypes of the graph as it is.
        wide: inputs by identity, widened; of a state that one run writes and the next reads there is one.
    """

    def __init__(self, module: torch.fx.GraphModule, dtype: torch.dtype, own: bool, wide: dict[int, Any]) -> None:
        super().__init__(module)
        self.dtype, self.wide = dtype, wide
        self.plain = torch.fx.Interpreter(module, garbage_collect_values=False) if own else None

    def run(self, *args: Any) -> Any:  # type: ignore[override]
        if self.plain is not None:
            self.plain.run(*args)
        return super().run(*[self.wide.get(id(value), value) for value in args])

    def run_node(self, n: torch.fx.Node) -> Any:
        try:
            return super().run_node(n)
        except _NO_KERNEL:
            if self.plain is None or n.op != "call_function":
                raise
        dtypes = {each: getattr(self.plain.env[each], "dtype", None) for each in n.all_input_nodes}
        args, kwargs = torch.fx.map_arg((n.args, n.kwargs), lambda each: _widened(self.env[each], dtypes[each]))
        return tree_map(lambda value: _widened(value, self.dtype), super().call_function(n.target, args, kwargs))

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        return super().call_function(target, *self._wide(args, kwargs))

    def call_method(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in _CASTS:
            return args[0].to(self.dtype)
        return super().call_method(target, *self._wide(args, kwargs))

    def _wide(self, args: Any, kwargs: Any) -> Any:
        def one(value: Any) -> Any:
            return self.dtype if isinstance(value, torch.dtype) and value in _FLOATS else value

        return map_aggregate((args, kwargs), one)
