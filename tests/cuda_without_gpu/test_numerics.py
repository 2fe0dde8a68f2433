"""What Inductor generates for CUDA computes what eager computes: its Triton kernels run in Triton's interpreter.

Graphs are those of real steps, lowered by the package's own path in float32. Each runs on the arguments of its first
call, and of a later one with the smallest tiles and the programs of each grid in the opposite order. What it returns
and what it writes to the cached rows is compared with the module that was lowered, run in eager on the same arguments.
What a GPU does beside that stays unproven: its own matrix products, attention and functions (they are ATen's here),
bfloat16, and races between programs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernel_runs import alone

from . import drive, guard, inductor
from .device import held

pytestmark = [
    pytest.mark.shares_graphs,
    pytest.mark.skipif(bool(guard.missing()), reason=guard.missing() or "none"),
]
PADDED = {"batch": 2, "padded": True, "shared": True}
CASES: dict[str, dict[str, Any]] = {"dual": {}, "eviction": {}, "intervals": {}, "saliency": PADDED}
"""Methods of which each kind of step is seen, and how they are driven."""
STEPS = ["full", "exact", "block", "select", "response", "evict", "sparse", "salient", "salient"]
"""Of layers; of a salient one the two parts that it is cut in."""
CLOSE = 1e-5
"""Difference of float32 values, as a part of the largest of their tensor."""


@dataclass
class Call:
    """One call of a graph that was lowered.

    Attributes:
        graph: it.
        before, after: its arguments, before and after the call in eager.
        outputs: what that returned.
    """

    graph: drive.Lowered
    before: list[Any]
    after: list[Any]
    outputs: list[Any]

    @property
    def sizes(self) -> list[Any]:
        """Shapes and numbers of the arguments."""
        return [value.shape if isinstance(value, torch.Tensor) else value for value in self.before]


class Calls:
    """Two calls of each graph: the first, and the last of other sizes, else the next, else the first again."""

    def __init__(self) -> None:
        self.of: dict[str, list[Call]] = {}

    def watch(self, graph: drive.Lowered, module: torch.fx.GraphModule) -> Any:
        """The module, of which each call is noted."""

        def run(*args: Any) -> Any:
            before = _copied(args)
            out = module(*args)
            call = Call(graph, before, _copied(args), _copied(out))
            kept = self.of.setdefault(graph.key, [call, call])
            if call.sizes != kept[0].sizes or kept[0] is kept[1]:
                kept[1] = call
            return out

        return run


def _copied(values: Any) -> list[Any]:
    return [each.detach().clone() if isinstance(each, torch.Tensor) else each for each in held(list(values))]


def test_generated_kernels_compute_what_eager_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(inductor, "built", lambda *_: (0, 0))  # cubins are another test's
    calls = Calls()
    for name, how in CASES.items():
        assert not drive.run(name, lowering=True, dtype=torch.float32, watch=calls.watch, **how).refused
    drive.generate(torch.float32, calls.watch)  # with the kernels of ``confidence``
    both = [(call, backwards) for pair in calls.of.values() for backwards, call in enumerate(pair)]
    graphs = [pair[0].graph for pair in calls.of.values()]
    layers = [each.step for each in graphs if each.part == "layer"]
    assert all(layers.count(step) >= STEPS.count(step) for step in STEPS)
    ours = {kernel.name for each in graphs for kernel in each.kernels if not kernel.name.startswith("triton_")}
    assert {"part_kernel", "merge_kernel"} < ours

    file = tmp_path / "calls"
    saved = [{"code": c.graph.code, "before": c.before, "backwards": bool(backwards)} for c, backwards in both]
    torch.save(saved, file)
    done = alone(f"from tests.cuda_without_gpu.interpreted import run; run({str(file)!r})", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    for (call, backwards), got in zip(both, torch.load(file), strict=True):
        what = f"{call.graph.part} of a {call.graph.step} step, {'later' if backwards else 'first'} call"
        for kind, want in (("outputs", call.outputs), ("after", call.after)):
            for place, pair in enumerate(zip(got[kind], want, strict=True)):
                _check(*pair, f"{what}, {kind} {place}")


def _check(got: Any, want: Any, what: str) -> None:
    if isinstance(want, torch.Tensor) and want.is_floating_point() and want.numel():
        torch.testing.assert_close(
            got, want, rtol=0, atol=CLOSE * float(want.abs().max()), msg=lambda text: f"{what}: {text}"
        )
    else:
        torch.testing.assert_close(got, want, rtol=0, atol=0, msg=lambda text: f"{what}: {text}")
