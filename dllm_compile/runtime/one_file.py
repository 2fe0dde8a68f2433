"""The C++ of a graph in one file: a compiler takes longer to read Inductor's header than for a kernel behind it."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any, NamedTuple

from dllm_compile import compat

Kernel = Callable[..., Any]
Submit = Callable[..., Any]
ENOUGH = 40_000
"""Characters of code that take a compiler about twice as long as the header does."""
_INCLUDE = re.compile(r"^[ \t]*#[ \t]*include[ \t].*$", re.MULTILINE)
_DEFINE = re.compile(r"^[ \t]*#[ \t]*define[ \t]", re.MULTILINE)


class Source(NamedTuple):
    """A kernel as Inductor writes it: the types of its arguments, and C++ of a function named ``kernel``."""

    types: tuple[str, ...]
    code: str


_KEPT: dict[Any, dict[Source, Kernel]] = {}  # by the settings of Inductor


@contextmanager
def joined() -> Iterator[None]:
    """Make Inductor compile the kernels of a graph in one file within the block, or in few files where they are long.

    Otherwise each kernel is a file. Kernels that this process has from another graph are not compiled again. What
    Inductor keeps on disk of a graph stays the same; only the C++ files differ. A process that made other graphs before
    may find no file of just these kernels there, and has them compiled. The caller holds PyTorch's lock of compilation,
    as a method of Inductor's class is replaced.
    """
    own = compat.AsyncCompile.cpp_pybinding
    kept = _KEPT.setdefault(compat.inductor_config.get_hash(), {})

    def deferred(self: Any, types: list[str], code: str) -> Any:
        if compat.get_compile_threads() <= 1 or _DEFINE.search(code):
            return own(self, types, code)
        kernels = vars(self).setdefault("dllm_kernels", _Kernels(self.submit, kept))  # each graph has its own ``self``
        return compat.LambdaFuture(kernels.add(Source(tuple(types), code)))

    if sys.platform == "linux":  # it was not tried elsewhere
        compat.AsyncCompile.cpp_pybinding = deferred
    try:
        yield
    finally:
        compat.AsyncCompile.cpp_pybinding = own


class _Kernels:
    """The kernels of a graph, compiled once the first is asked for: Inductor asks when it has named all."""

    def __init__(self, submit: Submit, kept: dict[Source, Kernel]) -> None:
        self.submit, self.kept, self.sources = submit, kept, list[Source]()

    def add(self, source: Source) -> Callable[[], Kernel]:
        """Take one more kernel; return the function that waits for it."""
        self.sources.append(source)
        return lambda: self._compiled(source)

    def _compiled(self, source: Source) -> Kernel:
        """Return a kernel; compile all that this process does not have if it is not there."""
        missing = [each for each in dict.fromkeys(self.sources) if each not in self.kept]
        if missing:
            self.kept.update(zip(missing, compiled(missing, self.submit), strict=True))
        return self.kept[source]


def compiled(sources: Sequence[Source], submit: Submit) -> list[Kernel]:
    """Compile and load kernels, in one file for every :data:`ENOUGH` characters, at most one file a thread.

    If the compiler refuses such a file, since two kernels define one name, each kernel is compiled alone.

    Args:
        sources: at least one.
        submit: runs a function in one of Inductor's threads.
    """
    total = sum(len(each.code) for each in sources)
    count = min(len(sources), compat.get_compile_threads(), total // ENOUGH + 1)
    files = [sources[i::count] for i in range(count)]
    try:
        return _loaded(files, len(sources), submit)
    except compat.CppCompileError:
        return _loaded([[each] for each in sources], len(sources), submit)


def _loaded(files: Sequence[Sequence[Source]], kernels: int, submit: Submit) -> list[Kernel]:
    """Begin to compile all files, wait for them, and return their kernels in the order of the graph.

    Args:
        files: of ``n`` files, file ``i`` has the kernels ``i``, ``i + n``, ``i + 2 n`` and so on.
        kernels: how many there are in all.
        submit: see :func:`compiled`.
    """
    load, found = compat.CppPythonBindingsCodeCache.load_pybinding_async, dict[int, Kernel]()
    begun = [load([*file[0].types], in_one(file), submit_fn=submit) for file in files]
    for i, (file, wait) in enumerate(zip(files, begun, strict=True)):
        found.update(zip(range(i, kernels, len(files)), _kernels_of(wait(), len(file)), strict=True))
    return [found[i] for i in range(kernels)]


def in_one(sources: Sequence[Source]) -> str:
    """Join the code of kernels, with the bindings to Python of all but the first, whose bindings Inductor adds.

    Every other kernel is in a namespace of its own, and its module is named by its number, for all have the same names.
    """
    first, *others = sources
    texts = [_bound(each) for each in others]
    lines = [line.strip() for text in (first.code, *texts) for line in _INCLUDE.findall(text)]
    out = [*dict.fromkeys(lines)] if texts else []
    for i, text in enumerate(texts, 1):
        names = "kernel", "PyInit_kernel"
        out += [f"#define {name} {name}_{i}" for name in names]
        out += [f"namespace only_{i} {{", _INCLUDE.sub("", text), "}"]
        out += [f"#undef {name}" for name in names]
    return "\n".join([*out, first.code])


def _bound(source: Source) -> str:
    """Return the code of a kernel with the bindings to Python that Inductor adds."""
    found: list[str] = []

    class Text(compat.CppPythonBindingsCodeCache):  # type: ignore[misc]
        @classmethod
        def load_async(cls, main_code: str, *_: Any, **__: Any) -> None:
            found.append(main_code)

    Text.load_pybinding_async([*source.types], source.code)
    return found[0]


def _kernels_of(first: Any, count: int) -> list[Kernel]:
    """Load the other kernels of a file whose first one is loaded, and return all ``count`` of them."""
    module, out = first.__self__, [first]
    for i in range(1, count):
        spec = spec_from_file_location(f"{module.__name__}_{i}", module.__file__)
        assert spec is not None
        assert spec.loader is not None
        another = module_from_spec(spec)
        spec.loader.exec_module(another)
        out.append(another.kernel)
    return out
