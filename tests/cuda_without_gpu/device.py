"""A pretended GPU: tensors say ``cuda:0`` and hold memory of the host.

Whatever mixes devices raises, as there. Each read by the host and each copy between the two is noted with the line of
the package that asked for it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import dllm_compile
from dllm_compile.runtime import output_buffers

from . import guard
from .inductor import DEVICE

PACKAGE = Path(dllm_compile.__file__).parent
READS = {"_local_scalar_dense", "equal", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_consecutive"}
ONE_NUMBER = {"where", "fill_", "masked_fill", "masked_fill_", "add_", "mul_", "scatter", "full_like"}
INDEXED = {"index", "index_put", "index_put_", "_index_put_impl_"}
HOST = torch.device("cpu")


class OnDevice(torch.Tensor):
    """A tensor that says ``cuda:0``; what it holds is ``held``, on the host."""

    held: torch.Tensor

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> OnDevice:
        size = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        made: OnDevice = torch.Tensor._make_wrapper_subclass(cls, held.size(), device=DEVICE, **size)
        made.held = held
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OnDevice({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert Pretended.active is not None, f"{func} outside of the pretended device"
        return Pretended.active.handle(func, args, kwargs or {})

    def tolist(self) -> Any:
        """Read by the host."""
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        """Of the memory that it holds."""
        return self.held.data_ptr()


def on_device(value: Any) -> Any:
    """A tensor there; a parameter stays one."""
    if not isinstance(value, torch.Tensor) or isinstance(value, OnDevice):
        return value
    there = OnDevice(value.detach())
    if isinstance(value, torch.nn.Parameter):
        there._is_param = True  # type: ignore[attr-defined]
    return there


class MixedDevices(RuntimeError):
    """An operation on tensors of both devices, which CUDA refuses."""


class WhileRecording(RuntimeError):
    """What ends a recording on CUDA: the host reads, or copies from memory that is not the device's."""


@dataclass(frozen=True)
class Crossing:
    """Something that passes between host and device.

    Attributes:
        kind: ``"read"`` by the host, which waits for it, or ``"copy"`` to the device.
        line: the innermost of the package, as ``"file: text"``.
        bytes: of the copy or the read.
        pinned: whether a copy comes from pinned memory.
        waits: whether the host waits.
    """

    kind: str
    line: str
    bytes: int
    pinned: bool
    waits: bool


class Pretended(TorchDispatchMode):
    """While it is active, tensors may be made on ``cuda``.

    Attributes:
        crossings: in order; clear them between steps.
        copied: shape and line of each copy that the device makes: ``clone``, ``copy_``.
        recording: whether a read or a copy by the host raises.
    """

    active: Pretended | None = None

    def __init__(self) -> None:
        super().__init__()
        self.crossings: list[Crossing] = []
        self.copied: list[tuple[str, tuple[int, ...], str]] = []
        self.recording = False
        self.pinned: set[int] = set()
        self.patches = contextlib.ExitStack()

    def __enter__(self) -> Any:
        guard.load()
        if Pretended.active is None:
            self.patches = contextlib.ExitStack()
            real = FakeTensorMode.from_tensor

            def from_tensor(mode: FakeTensorMode, value: Any, **more: Any) -> Any:
                if not isinstance(value, OnDevice):
                    return real(mode, value, **more)
                with mode:
                    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=DEVICE)

            def pin(value: torch.Tensor) -> torch.Tensor:
                copy = value.clone()
                self.pinned.add(copy.data_ptr())
                return copy

            put = mock.patch.object
            storage = output_buffers._storage
            self.patches.enter_context(put(output_buffers, "_storage", lambda size, _: storage(size, HOST)))
            over = output_buffers.over
            self.patches.enter_context(put(output_buffers, "over", lambda *of: OnDevice(over(*of))))
            self.patches.enter_context(put(FakeTensorMode, "from_tensor", from_tensor))
            self.patches.enter_context(put(torch.Tensor, "pin_memory", pin))
            self.patches.enter_context(put(torch.cuda, "_lazy_init", lambda: None))
        Pretended.active = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.close()
        Pretended.active = None

    @contextlib.contextmanager
    def left(self) -> Iterator[None]:
        """Calls made inside are the host's own, such as those of Dynamo."""
        with _disable_current_modes():
            yield

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Calls made inside are the device's again."""
        TorchDispatchMode.__enter__(self)
        try:
            yield
        finally:
            TorchDispatchMode.__exit__(self, None, None, None)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self.handle(func, args, kwargs or {})

    def handle(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Run an operation where its tensors are."""
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        named = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        there = [each for each in tensors if isinstance(each, OnDevice)]
        faked = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        faked = faked or any(isinstance(each, FakeTensor) or each.device.type == "meta" for each in tensors)
        to_device = named is not None and named.type == "cuda"
        if faked or (named is not None and named.type == "meta") or not (there or to_device):
            return func(*args, **kwargs)
        to_device |= bool(there) and not (named is not None and named.type == "cpu")
        to_device = self._crosses(func, args, kwargs, tensors, to_device)
        out = self._run(func, args, kwargs)
        if not to_device:
            return out
        name = func.overloadpacket.__name__
        if name in ("clone", "copy_"):
            self.copied.append((name, tuple(tree_leaves(out)[0].shape), line()))
        back = {id(each.held): each for each in there}

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return back[id(value)] if id(value) in back else OnDevice(value)

        return tree_map(wrap, out)

    def _crosses(self, func: Any, args: Any, kwargs: Any, tensors: list[torch.Tensor], to_device: bool) -> bool:
        """Note what passes between the devices, and refuse what cannot; returns whether the result is on the device."""
        name = func.overloadpacket.__name__
        there = [each for each in tensors if isinstance(each, OnDevice)]
        here = [each for each in tensors if not isinstance(each, OnDevice)]
        waits = not kwargs.get("non_blocking", False)
        if name == "_to_copy":
            if there and not to_device:
                self._note("read", there[0], waits)
            elif here and to_device:
                self._note("copy", here[0], waits)
        elif name == "copy_" and there and here:
            to_device = isinstance(args[0], OnDevice)
            self._note("copy" if to_device else "read", args[1], not (len(args) > 2 and args[2]))
        elif name in READS:
            self._note("read", there[0], True)
        elif name in INDEXED:
            for each in (leaf for leaf in tree_leaves(args[1]) if isinstance(leaf, torch.Tensor)):
                if each.dtype == torch.bool:
                    self._note("read", each, True)
                elif not isinstance(each, OnDevice):
                    self._note("copy", each, True)
            given = [leaf for leaf in tree_leaves(args[2:]) if isinstance(leaf, torch.Tensor)]
            if not isinstance(args[0], OnDevice) or any(
                not isinstance(each, OnDevice) and each.dim() for each in given
            ):
                raise MixedDevices(f"{func} at {line()}")
        elif there and here:
            single = torch.Tag.pointwise in func.tags or name in ONE_NUMBER
            if not single or any(each.dim() > 0 for each in here):
                raise MixedDevices(f"{func} at {line()}")
        return to_device

    def _note(self, kind: str, value: torch.Tensor, waits: bool) -> None:
        if self.recording:
            raise WhileRecording(f"a {kind} at {line()}")
        pinned = kind == "copy" and value.data_ptr() in self.pinned
        self.crossings.append(Crossing(kind, line(), value.nbytes, pinned, waits or (kind == "copy" and not pinned)))

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on what the tensors hold."""

        def away(value: Any) -> Any:
            if isinstance(value, OnDevice):
                return value.held
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "cuda" else value

        args, kwargs = tree_map(away, (tuple(args), dict(kwargs)))
        if func.overloadpacket.__name__ == "_to_copy":
            kwargs.pop("non_blocking", None)
        kwargs.pop("pin_memory", None)
        return func(*args, **kwargs)


def line() -> str:
    """The innermost line of the package under way, as ``"runtime/session.py: text"``."""
    import linecache

    frame: Any = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if file.startswith(str(PACKAGE)):
            text = linecache.getline(file, frame.f_lineno).strip()
            return f"{Path(file).relative_to(PACKAGE)}: {text.partition('  #')[0]}"
        frame = frame.f_back
    return "outside of the package"


def held(value: Any) -> Any:
    """The same on the host, by no copy that counts."""
    return tree_map(lambda each: each.held if isinstance(each, OnDevice) else each, value)
