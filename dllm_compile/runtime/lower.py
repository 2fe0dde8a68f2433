"""Lower an FX module to something fast: the one file that calls Inductor."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from math import prod
from pathlib import Path
from typing import Any

import sympy
import torch
import torch.fx

import dllm_compile
from dllm_compile import compat
from dllm_compile.compat import DimDynamic, FakeTensorMode, ShapeEnv, is_traceable_wrapper_subclass
from dllm_compile.core.sizes import BROADCAST, PACKED, SPARE, Extent, Size, form

Compiled = Callable[..., Any]
IN_ORDER = {"reorder_for_locality": False}
"""A read of the rows kept that moves behind their overwriting costs a copy of all of them, there and back."""


SERVED = 1000
"""Sizes that code remembers to be good for."""


class SizesFixed(RuntimeError):
    """The compiler fixed open sizes to numbers, or they cannot be symbols.

    Attributes:
        names: of these.
    """

    def __init__(self, names: set[str]) -> None:
        super().__init__(f"code for any size was compiled for one: {', '.join(sorted(names))}")
        self.names = names


class Code:
    """Compiled code, and the conditions on its arguments under which it is valid.

    Attributes:
        run: takes the arguments, returns the tuple.
        exact: sizes that are as they were when the code was made: which argument, which dimension, the size. A number
            among the arguments has dimension -1.
        forms: how arguments lie in memory, ``None`` for a contiguous one; see :func:`dllm_compile.core.sizes.form`.
        free: where the sizes that may be any are read.
        assumed: the guards on the free sizes that the compiler assumed.
        tensors, numbers: the arguments that are looked at, by place.
        served: by sizes and strides of these, whether the code is good for them.
    """

    def __init__(self, run: Compiled) -> None:
        self.run = run
        self.exact: list[tuple[int, int, int]] = []
        self.forms: list[tuple[int, Any]] = []
        self.free: list[tuple[int, int, sympy.Symbol]] = []
        self.assumed: list[Any] = []
        self.tensors: tuple[int, ...] = ()
        self.numbers: tuple[int, ...] = ()
        self.served: dict[tuple[Any, ...], bool] = {}

    def serves(self, args: Sequence[Any]) -> bool:
        """Whether the code is valid for the sizes and strides of some arguments; asked once for each set of these."""
        key = (
            *[(args[i].shape, args[i].stride()) for i in self.tensors],
            *[args[i] for i in self.numbers],
        )
        known = self.served.get(key)
        if known is None:
            if len(self.served) == SERVED:
                self.served.clear()
            known = self.served[key] = self._good_for(args)
        return known

    def _good_for(self, args: Sequence[Any]) -> bool:
        if any(_size(args[i], dim) != size for i, dim, size in self.exact):
            return False
        if not all(args[i].is_contiguous() if how is None else form(args[i]) == how for i, how in self.forms):
            return False
        values = {symbol: _size(args[i], dim) for i, dim, symbol in self.free}
        return min(values.values(), default=2) >= 2 and all(
            each.xreplace(values) == sympy.true for each in self.assumed
        )


def _size(value: Any, dim: int) -> int:
    return int(value) if dim < 0 else value.shape[dim]


def lower(
    module: torch.fx.GraphModule,
    args: Sequence[Any],
    how: str,
    extents: Sequence[tuple[Extent, ...] | None] = (),
    writes: bool = False,
    fixed: Collection[str] = (),
) -> Code:
    """Compile ``module`` for arguments like ``args``.

    Args:
        module: a torch-level graph that returns a tuple.
        args: real arguments, tensors and numbers.
        how: ``"inductor"``, or ``"eager"`` to run the module as it is.
        extents: of each tensor its extents, and of each number itself; ``None`` for those that never change. Numbers
            of the same name are the same at every call; those below 2 never change. Without any, all sizes are fixed.
        writes: whether it writes to its arguments.
        fixed: names of sizes to be compiled as they are.

    Returns:
        A function of the same arguments that returns the tuple, and for which sizes it is good.

    Raises:
        SizesFixed: some sizes must be among ``fixed``.
    """
    if how == "eager":
        return Code(module)
    if not extents:
        return Code(_compiled(module, list(args), writes))
    symbols = _Symbols(args, extents, fixed)
    code = Code(_compiled(module, symbols.example, writes))
    replaced = {symbol for symbol, value in symbols.shapes.replacements.items() if value.is_number}
    numbers = {name for name, symbol in symbols.symbols.items() if symbol in replaced}
    if numbers:
        raise SizesFixed(numbers)
    code.exact, code.forms, code.free = symbols.exact, symbols.forms, symbols.free
    code.assumed = [guard.expr for guard in symbols.shapes.guards]
    read = {i: dim for i, dim, _ in (*code.exact, *code.free)} | {i: 0 for i, _ in code.forms}
    code.tensors = tuple(i for i, dim in read.items() if dim >= 0)
    code.numbers = tuple(i for i, dim in read.items() if dim < 0)
    return code


def _compiled(module: torch.fx.GraphModule, example: list[Any], writes: bool) -> Compiled:
    ours = _made_cacheable(module, next((each.device for each in example if isinstance(each, torch.Tensor)), None))
    with torch.no_grad(), trusting_cpu(), compat.inductor_config.patch(unsafe_marked_cacheable_functions=ours):
        return compat.compile_fx(module, example, config_patches=IN_ORDER if writes else None)


def trusting_cpu() -> AbstractContextManager[object]:
    """Let Inductor use the vector instructions that an x86 processor says it has, unless the user decided.

    Inductor else sees to it, of each such set, that the compiler and PyTorch know it, too: it compiles most headers of
    PyTorch and loads the result in a Python of its own. Compilers and builds that do not know AVX2 and AVX-512 are too
    old for this PyTorch. What is newer (VNNI, bfloat16, AMX) Inductor tries all the same, by a few lines each.
    """
    decided = compat.inductor_config.cpp.vec_isa_ok
    said: AbstractContextManager[object] = compat.inductor_config.patch(
        {"cpp.vec_isa_ok": True if decided is None else decided}
    )
    return said


def _made_cacheable(module: torch.fx.GraphModule, device: torch.device | None) -> dict[str, str]:
    """Let PyTorch keep the traced graph on disk, beside Inductor's code.

    It keeps graphs of functions that it knows, or that are named to it, and of methods of values that are noted to be
    tensors, as Dynamo does. Nothing but the passes of an option of Inductor reads more of a note than that it is there.

    Returns:
        The functions of this package in ``module``, with a hash of its source files: other sources, other keys.
    """
    known, found = dict(compat.inductor_config.unsafe_marked_cacheable_functions), {}
    for node in module.graph.nodes:
        if node.op == "call_method" and not compat.inductor_config.pre_grad_fusion_options:
            node.args[0].meta.setdefault("example_value", torch.empty(0, device=device))
        elif (
            node.op == "call_function"
            and _SOURCE
            and (getattr(node.target, "__module__", None) or "").startswith("dllm_compile.")
        ):
            found[f"{node.target.__module__}.{node.target.__name__}"] = _SOURCE
    return {**known, **found}


def _hash_of_sources() -> str:
    """A hash of all source files of the package; empty where there are none to read."""
    folders = [Path(root, part) for root in dllm_compile.__path__ for part in ("passes", "kernels")]
    files = {*Path(__file__).parents[1].rglob("*.py"), *(path for folder in folders for path in folder.glob("*.py"))}
    ordered = sorted(files, key=lambda path: path.parts[-2:])  # the same wherever the folders are
    return hashlib.sha256(b"".join(path.read_bytes() for path in ordered)).hexdigest() if files else ""


_SOURCE = _hash_of_sources()  # at import: of the code that runs


class _Symbols:
    """Fake arguments whose sizes are symbols, one a name.

    Raises:
        SizesFixed: a size that may be any is never an extent or a number of its own, so that code cannot know it.
    """

    def __init__(
        self, args: Sequence[Any], extents: Sequence[tuple[Extent, ...] | None], fixed: Collection[str]
    ) -> None:
        self.shapes = ShapeEnv(duck_shape=False)  # equal by chance is not equal
        self.numbers: dict[str, Any] = {}
        self.exact: list[tuple[int, int, int]] = []
        self.forms: list[tuple[int, Any]] = []
        self.free: list[tuple[int, int, sympy.Symbol]] = []
        self.symbols: dict[str, sympy.Symbol] = {}
        found = [
            (i, dim, extent)
            for i, (value, given) in enumerate(zip(args, extents, strict=True))
            for dim, extent in enumerate(given or ())
            if isinstance(extent, Size)
        ]
        places = [(i, dim if isinstance(args[i], torch.Tensor) else -1, extent) for i, dim, extent in found]
        names = {name for _, _, extent in places for name in extent.names}
        for i, dim, extent in places:
            if extent == Size(extent.names[:1]) and extent.names[0] not in self.numbers:
                self._name(extent.names[0], i, dim, _size(args[i], dim), fixed)
        missing = names - self.numbers.keys() - {*fixed}
        if missing:
            raise SizesFixed(missing)
        for i, dim, extent in places:
            if not isinstance(self._number(extent, _size(args[i], dim)), torch.SymInt):
                self.exact.append((i, dim, _size(args[i], dim)))
        mode = FakeTensorMode(shape_env=self.shapes)
        self.example = [
            self._fake(mode, i, value, given) for i, (value, given) in enumerate(zip(args, extents, strict=True))
        ]

    def _name(self, name: str, i: int, dim: int, value: int, fixed: Collection[str]) -> None:
        """Take a size from where it is an extent of its own: a symbol, if it may be any and is 2 or more."""
        if value < 2 or name in fixed:
            self.numbers[name] = value
            return
        source = compat.ConstantSource(f"number_of_{''.join(c if c.isalnum() else '_' for c in name)}")
        symbol = self.shapes.create_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
        self.numbers[name] = self.shapes.create_symintnode(symbol, hint=value, source=source)
        self.symbols[name] = symbol
        self.free.append((i, dim, symbol))

    def _number(self, extent: Extent, value: int) -> Any:
        """An extent of the value ``value``, where all of its names are known; else that."""
        if isinstance(extent, int) or not self.numbers.keys() >= {*extent.names}:
            return value
        return prod([self.numbers[name] for name in extent.names], start=extent.times) + extent.plus

    def _fake(self, mode: FakeTensorMode, i: int, value: Any, given: tuple[Extent, ...] | None) -> Any:
        if not isinstance(value, torch.Tensor):
            return self._number(given[0], value) if given else value
        if given is None or is_traceable_wrapper_subclass(value):
            return mode.from_tensor(value, static_shapes=True)
        sizes = [self._number(extent, size) for extent, size in zip(given, value.shape, strict=True)]
        if not isinstance(value, torch.nn.Parameter):
            self.forms.append((i, None if value.is_contiguous() else form(value)))
        with mode:
            return torch.empty_strided(sizes, _strides(value, sizes), dtype=value.dtype, device=value.device)


def _strides(value: torch.Tensor, sizes: Sequence[Any]) -> list[Any]:
    """Strides of ``value`` for other sizes, as its form says."""
    strides: list[Any] = [0] * value.dim()
    below: Any = 1
    last = -1
    for i, how in form(value):
        strides[i] = {PACKED: below, SPARE: (sizes[last] + 1) * strides[last]}.get(how, how)
        if how != BROADCAST:
            below, last = strides[i] * sizes[i], i
    for i, extent in enumerate(value.shape):
        if extent <= 1:  # nobody steps along it
            strides[i] = below
    return strides
