"""Inductor as tests of small models need it: it makes the same code in half of the time.

The C++ compiler is called once a graph for plain Inductor, too, as this package has it called for its own graphs, and
optimizes less. What it makes is linked by gold, where there is one: the usual linker takes half as long as the
compiler, to read the names in PyTorch's libraries. And what Inductor finds out about an index is kept for all graphs:
it keeps 128 of its answers, fewer than a model has.

It changes Inductor itself, so it is done with the release it was written for. With another, tests compile as users do.
With any, garbage is seldom looked for: tracing makes many objects that live on, and a fifth of all time went into it.
"""

from __future__ import annotations

import functools
import gc
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch._inductor import cpp_builder, sizevars
from torch._inductor.codegen import cpp

from dllm_compile.runtime.one_file import joined

RARELY = 100_000, 10, 10
"""Objects before the collector looks at the young ones, and looks at those before it looks at older ones."""

WRITTEN_FOR = torch.__version__.startswith("2.13.")
_ALWAYS = joined()


def _quick(real: Callable[..., tuple[list[str], list[str]]]) -> Callable[..., tuple[list[str], list[str]]]:
    def flags(*args: Any, **more: Any) -> tuple[list[str], list[str]]:
        compiler, linker = real(*args, **more)
        gold = ["fuse-ld=gold"] if shutil.which("ld.gold") else []
        return [{"O3": "O1"}.get(flag, flag) for flag in compiler if flag != "g1"] + ["w"], [*linker, *gold]

    return flags


def begin() -> None:
    """From here on, in this process."""
    gc.freeze()
    gc.set_threshold(*RARELY)
    torch._dynamo.config.run_gc_after_compile = False  # a collection a graph takes longer than some graphs
    if not WRITTEN_FOR:
        return
    _ALWAYS.__enter__()
    cpp_builder._get_optimization_cflags = _quick(cpp_builder._get_optimization_cflags)
    for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range"):
        known = getattr(sizevars, name)
        kept = functools.cache(known.__wrapped__)
        for where in (sizevars, cpp):
            if getattr(where, name, None) is known:
                setattr(where, name, kept)
