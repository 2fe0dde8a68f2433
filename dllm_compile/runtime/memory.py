"""Peak memory of steps: bytes that the allocator holds for tensors, above what it held before.

On CUDA the caching allocator counts (``torch.cuda.max_memory_allocated``). On CPU nothing counts, so the profiler
records each allocation and each free (``[memory]`` events of ``torch.autograd.profiler``). That is 20 to 50
microseconds an event: count memory and time steps in separate runs. It sees every block that the calling thread asks
PyTorch's CPU allocator for, buffers of Inductor's code included; not the scratch memory of MKL and oneDNN, nor other
threads. A block that was there before the profiler cannot be subtracted when it dies (``CPUAllocator.cpp`` warns of
"unknown size"), so enter before anything is made that is to be replaced: for a generation, before its first step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch

from dllm_compile.compat import DeviceType, profiler_enabled

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]

_START = "dllm_compile.runtime.memory: start"


class Peaks:
    """Peaks of stretches of a ``with`` block; each stretch lasts to the next, the last to the end of the block.

    Example::

        with Peaks(ids.device) as peaks:
            for _ in range(3):
                peaks.start()
                step()
        print(peaks.held, peaks.above, peaks.most)

    Attributes:
        held: bytes held at the start of each stretch, above those held on entry; filled on leaving.
        above: peak bytes of each stretch above ``held``; filled on leaving.
    """

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self.held: list[int] = []
        self.above: list[int] = []
        self._open = False
        self._entry = 0
        self._profile: Any = None

    def __enter__(self) -> Peaks:
        if self.device.type == "cuda":
            self._entry = torch.cuda.memory_allocated(self.device)
        elif profiler_enabled():
            raise RuntimeError("a profiler is running already, and PyTorch records for one at a time; end it first")
        else:
            self._profile = torch.autograd.profiler.profile(use_kineto=True, profile_memory=True)
            self._profile.__enter__()
        return self

    def start(self) -> None:
        """End the stretch before, if any, and begin the next."""
        if self.device.type == "cuda":
            self._read()
            torch.cuda.reset_peak_memory_stats(self.device)
            self.held.append(torch.cuda.memory_allocated(self.device) - self._entry)
            self._open = True
        else:
            with torch.autograd.profiler.record_function(_START):
                pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type == "cuda":
            self._read()
            return
        self._profile.__exit__(kind, error, trace)
        results, self._profile = self._profile.kineto_results, None
        self._replay(results.events())

    @property
    def most(self) -> int:
        """Peak bytes of all stretches, above those held on entry; 0 without any."""
        return max((held + above for held, above in zip(self.held, self.above, strict=True)), default=0)

    def _read(self) -> None:
        """The peak of the stretch that ends, on CUDA."""
        if self._open:
            peak = torch.cuda.max_memory_allocated(self.device) - self._entry
            self.above.append(max(0, peak - self.held[-1]))
        self._open = False

    def _replay(self, events: list[Any]) -> None:
        """Add up allocations and frees in the order they happened."""
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            if event.name() == _START:
                self.held.append(now)
                self.above.append(0)
            elif event.name() == "[memory]" and event.device_type() == DeviceType.CPU:
                now += event.nbytes()
                if self.held:
                    self.above[-1] = max(self.above[-1], now - self.held[-1])


def peak_bytes(call: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """Peak bytes of tensors during ``call``, above those held before; what it returns is dropped inside."""
    with Peaks(device) as peaks:
        peaks.start()
        call()
    return peaks.most


def process_peak_bytes() -> int:
    """Most bytes held so far: by tensors on the GPU where there is one in use, else by the whole process (0: unknown).

    Source: ``torch.cuda.max_memory_allocated``, and ``ru_maxrss`` of ``getrusage(2)``, in KiB but on macOS.
    """
    if torch.cuda.is_available() and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return torch.cuda.max_memory_allocated()
    if resource is None:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
