"""What the compiler did: times of its passes and graphs it wrote, as environment variables ask for.

``DLLM_DEBUG=<folder>`` keeps both there, graphs in files that are numbered in the order they were written, and times in
``log.txt``; ``TORCH_LOGS="+dllm_compile"`` logs the times, and ``TORCH_TRACE=<folder>`` keeps the graphs for tlparse.
On a terminal, :func:`compiling` shows what is being compiled. A profiler sees the ranges of :func:`labelled`.
:func:`steps` records what each step computed.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.fx

from .compat import profiled, trace_structured, traced

log = logging.getLogger("dllm_compile")


def _folder() -> Path | None:
    """The folder that ``DLLM_DEBUG`` names, made where it is missing; ``None`` for none, 0 and 1."""
    named = os.environ.get("DLLM_DEBUG", "")
    if named in ("", "0", "1"):
        return None
    folder = Path(named)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def timed(what: str) -> Iterator[None]:
    """Say how long the block, or the function that this decorates, took, even where it failed."""
    folder, begin = _folder(), time.perf_counter()
    try:
        yield
    finally:
        if folder is not None or log.isEnabledFor(logging.DEBUG):
            spent = time.perf_counter() - begin
            line = f"{what}: {spent:.2f} s" if spent >= 1 else f"{what}: {1000 * spent:.1f} ms"
            log.debug(line)
            if folder is not None:
                with (folder / "log.txt").open("a") as file:
                    file.write(f"{line}\n")


@dataclass
class _Compiled:
    """What was compiled so far in this process: how many times, in how many seconds."""

    count: int = 0
    seconds: float = 0.0


_COMPILED = _Compiled()


@contextmanager
def compiling(unit: str, variant: str) -> Iterator[None]:
    """Time the block as :func:`timed` does, and show meanwhile, on a terminal, what is compiled.

    The line stands on standard error and is wiped off behind the block. ``DLLM_PROGRESS=0`` turns it off; where
    standard error is no terminal, or something else took its place (a notebook, a live display), there is none.

    Args:
        unit: the name of the unit.
        variant: the name of the assignment that it is compiled for.
    """
    out, begin = sys.stderr, time.perf_counter()
    shown = out is sys.__stderr__ and out is not None and out.isatty() and os.environ.get("DLLM_PROGRESS") != "0"
    if shown:
        done = f"{_COMPILED.count} before in {_COMPILED.seconds:.0f} s"
        out.write(f"\r\x1b[Kdllm: compiling {unit} for {variant} ({done}) ...")
        out.flush()
    try:
        with timed(f"compile {unit} for {variant}"):
            yield
    finally:
        _COMPILED.count += 1
        _COMPILED.seconds += time.perf_counter() - begin
        if shown:
            out.write("\r\x1b[K")
            out.flush()


def labelled(label: str, *values: object) -> AbstractContextManager[object]:
    """A range of this name in the traces of ``torch.profiler``; nothing where no profiler runs.

    Args:
        label: a format string, filled in with ``values`` only where a profiler runs.
        values: for its fields.
    """
    if not profiled():
        return _NOTHING
    return torch.profiler.record_function(f"dllm: {label.format(*values)}")


_NOTHING = nullcontext()


def asked() -> bool:
    """Whether graphs are to be written, or traced."""
    return _folder() is not None or traced()


def keep(name: str, module: torch.fx.GraphModule) -> None:
    """Write a graph as Python, where graphs are asked for.

    Args:
        name: of the file behind its number, and of the artifact in a trace.
        module: the graph.
    """
    if not asked():
        return
    text, folder = module.print_readable(print_output=False), _folder()
    trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": f"dllm_{name}", "encoding": "string"},
        payload_fn=lambda: text,
        expect_trace_id=False,  # code is compiled when it is first called, outside of Dynamo
    )
    if folder is not None:
        number = len([*folder.glob("*.py")])  # goes on behind those of an earlier run
        (folder / f"{number:04}-{name}.py").write_text(text)


def part(
    nodes: Iterable[torch.fx.Node],
    values: Mapping[torch.fx.Node, Any],
    entering: Sequence[torch.fx.Node] = (),
    outputs: Sequence[torch.fx.Node] = (),
) -> torch.fx.GraphModule:
    """Nodes of a graph as a module of their own.

    Args:
        nodes: in order; of a whole graph, its placeholders and its output are among them.
        values: of nodes, whose sizes are written beside them.
        entering: values from outside, which become inputs.
        outputs: what it returns.
    """
    graph = torch.fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in entering}
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    for node, copy in copies.items():
        copy.meta["val"] = values.get(node)
    if outputs:
        graph.output(tuple(copies[node] for node in outputs))
    return torch.fx.GraphModule(torch.nn.Module(), graph)


@dataclass(frozen=True)
class Ran:
    """What a step computed, or one graph of it where a model is several.

    Attributes:
        number: of the step in its sequences, from 0.
        name: the kind of step, as in ``stats()["steps"]``.
        rows: by the name of a row set, its positions, ``[B, n]`` int64; ``S`` for no row.
        selected: by the number of a layer, the rows that it chose itself, ``[B, n]`` int64.
        computed: by the number of a layer, how many rows a sequence it computed; with saliency the two halves of a
            layer, attention and MLP, have a number each.
    """

    number: int
    name: str
    rows: Mapping[str, torch.Tensor]
    selected: Mapping[int, torch.Tensor]
    computed: Mapping[int, int]


_RECORDS: list[list[Ran]] = []


@contextmanager
def steps() -> Iterator[list[Ran]]:
    """Record the steps that run in the block, of all models and threads.

    Returns:
        A list that grows by one at each call of a compiled graph, but those that repeat the call before.
    """
    found: list[Ran] = []
    _RECORDS.append(found)
    try:
        yield found
    finally:
        _RECORDS.remove(found)


def note_step(
    number: int,
    name: str,
    rows: Mapping[str, torch.Tensor],
    selected: Mapping[int, torch.Tensor],
    computed: Mapping[int, int],
) -> None:
    """Record a step for every :func:`steps` that is active."""
    for found in _RECORDS:
        copies = {layer: index.clone() for layer, index in selected.items()}  # a recorded call writes to them again
        found.append(
            Ran(number, name, {set_name: index.clone() for set_name, index in rows.items()}, copies, {**computed})
        )
