"""Inductor as tests of small models need it: it makes the same code in half of the time.

The C++ compiler is called once a graph, not once a kernel, and optimizes less. Of each call three quarters go into the
templates of PyTorch's vector types, whichever kernel it is. So what Inductor writes for each kernel of a graph is
joined to one file, under other names; a kernel that was compiled before is taken from there. Where the compiler refuses
such a file, for what two kernels may both define, each is compiled alone, as outside of tests. It is linked by gold,
where there is one: the usual linker takes half as long as the compiler, to read the names in PyTorch's libraries.

And what Inductor finds out about an index is kept for all graphs: it keeps 128 of its answers, fewer than a model has.

It changes Inductor itself, so it is done with the release it was written for. With another, tests compile as users do.
With any, garbage is seldom looked for: tracing makes many objects that live on, and a fifth of all time went into it.
"""

from __future__ import annotations

import functools
import gc
import re
import shutil
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch._inductor import cpp_builder, sizevars
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.codegen import cpp
from torch._inductor.exc import CppCompileError

BINDING, TABLE, END = "static PyObject* kernel_py(", "static PyMethodDef py_methods[] = {", "{NULL, NULL, 0, NULL}};"
"""Where the parts of a file of Inductor begin that are one for each kernel, a table of kernels, and its last entry."""

RARELY = 100_000, 10, 10
"""Objects before the collector looks at the young ones, and looks at those before it looks at older ones."""

WRITTEN_FOR = torch.__version__.startswith("2.13.")


class Kernel(NamedTuple):
    """What Inductor asks for: a function in C++, by the types of its arguments and its code."""

    types: tuple[str, ...]
    code: str


_COMPILED: dict[Kernel, Callable[..., Any]] = {}


class _Written(CppPythonBindingsCodeCache):
    """The whole file of one kernel, in place of the library that is made of it."""

    @classmethod
    def load_async(cls, main_code: str, *_: Any, **__: Any) -> Any:
        raise _File(main_code)


class _File(Exception):
    """Carries the text of a file."""


def _file(kernel: Kernel) -> str:
    try:
        _Written.load_pybinding_async(kernel.types, kernel.code)
    except _File as file:
        return str(file)
    raise AssertionError("Inductor compiles bindings in another way")


def joined(files: Sequence[str]) -> str:
    """One file that has the kernels of all: ``kernel_0``, ``kernel_1``, and so on; its module is called ``kernel``."""
    functions, tables = [], []
    for i, text in enumerate(files):
        begin, rest = text.split("// Python bindings to call kernel():")
        common, rest = rest.split(BINDING)
        binding, rest = rest.split(TABLE)
        table, end = rest.split(END)
        own = [re.sub(r"\bkernel(_py)?\b", rf"kernel_{i}\1", part) for part in (begin, BINDING + binding, table)]
        functions += [own[0], *([] if i else [common]), own[1]]
        tables.append(own[2])
    return "\n".join([*functions, TABLE, *tables, END, end])


def _compile(kernels: Sequence[Kernel]) -> None:
    if len(kernels) > 1:
        try:
            module = CppPythonBindingsCodeCache.load_async(joined([_file(each) for each in kernels]))()
        except CppCompileError:
            pass
        else:
            _COMPILED.update((kernel, getattr(module, f"kernel_{i}")) for i, kernel in enumerate(kernels))
            return
    _COMPILED.update((each, CppPythonBindingsCodeCache.load_pybinding(*each)) for each in kernels)


def _wait(real: Callable[..., None]) -> Callable[..., None]:
    def wait(self: AsyncCompile, scope: dict[str, Any]) -> None:
        wanted = {name: each for name, each in scope.items() if isinstance(each, Kernel)}
        missing = [each for each in dict.fromkeys(wanted.values()) if each not in _COMPILED]
        if missing:
            _compile(missing)
        scope.update((name, _COMPILED[each]) for name, each in wanted.items())
        real(self, scope)

    return wait


def _quick(real: Callable[..., tuple[list[str], list[str]]]) -> Callable[..., tuple[list[str], list[str]]]:
    def flags(*args: Any, **more: Any) -> tuple[list[str], list[str]]:
        compiler, linker = real(*args, **more)
        gold = ["fuse-ld=gold"] if shutil.which("ld.gold") else []
        return [{"O3": "O1"}.get(flag, flag) for flag in compiler if flag != "g1"] + ["w"], [*linker, *gold]

    return flags


def _noted(self: AsyncCompile, argtypes: list[str], source_code: str) -> Any:
    return Kernel(tuple(argtypes), source_code)


def begin() -> None:
    """From here on, in this process."""
    gc.set_threshold(*RARELY)
    torch._dynamo.config.run_gc_after_compile = False  # a collection a graph takes longer than some graphs
    if not WRITTEN_FOR:
        return
    AsyncCompile.cpp_pybinding = _noted  # type: ignore[method-assign]
    AsyncCompile.wait = _wait(AsyncCompile.wait)  # type: ignore[method-assign]
    cpp_builder._get_optimization_cflags = _quick(cpp_builder._get_optimization_cflags)
    for name in ("stride_at", "simplify_index_in_vec_range", "stride_at_vec_range"):
        known = getattr(sizevars, name)
        kept = functools.cache(known.__wrapped__)
        for where in (sizevars, cpp):
            if getattr(where, name, None) is known:
                setattr(where, name, kept)
