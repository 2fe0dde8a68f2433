"""``bench --floor``: a partial step beside its matrix products and attention alone, of the same sizes, in one run.

What a method leaves to compute, no compiler can do without: the rest of a step is what caching and the host cost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from statistics import median

import torch

from dllm_compile import backend
from dllm_compile.declared import loop
from dllm_compile.quota_loop import quota_loop

from .contest import Contender, Job
from .host import milliseconds
from .model import Setting, contenders, job_of, random_model

PROMPTS = 512, 2048, 4096
SETTING = Setting(response=128, prompt_interval=16)
TIMED = 16  # partial steps of a kind
WHOLE = {"full", "evict", "present", "evict present", "none"}
"""Steps that are no partial ones."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = {"aten::scaled_dot_product_attention", "dllm::sparse_attention", "dllm::delta_attention"}

Shapes = tuple[tuple[int, ...], ...]
Work = tuple[tuple[str, Shapes], ...]
"""Products and attention by name, and the shapes of what they read, in order."""


def work_of(call: Callable[[], object]) -> Work:
    """Matrix products and attention that a call computes by operations of PyTorch and of the package."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        call()
    found = []
    for event in seen.events():
        above, inside = event.cpu_parent, False
        while above is not None:
            above, inside = above.cpu_parent, inside or above.name in ATTENTION
        if not inside and event.name in PRODUCTS | ATTENTION:
            shapes = tuple(tuple(shape) for shape in event.input_shapes if shape)
            found.append((event.name, shapes[1:] if event.name in ("aten::addmm", "aten::baddbmm") else shapes))
    return tuple(found)


@cache
def alone(work: Work) -> Callable[[], None]:
    """A function that computes as much and nothing else: each product with a weight of its own that lies as that of a
    linear layer; attention of all its queries and keys by torch's own.
    """
    calls: list[tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = []
    for name, shapes in work:
        if name in ATTENTION:
            calls.append((torch.nn.functional.scaled_dot_product_attention, [*map(torch.randn, shapes[:3])]))
        else:
            calls.append((torch.matmul, [torch.randn(shapes[0]), torch.randn(shapes[1]).mT.contiguous().mT]))

    def run() -> None:
        for function, given in calls:
            function(*given)

    return run


def partial_steps(contender: Contender, model: torch.nn.Module, job: Job) -> Iterator[tuple[str, float, float]]:
    """Run a generation; of each partial step its kind, its milliseconds, and those of its work :func:`alone`."""
    torch.compiler.reset()
    by_operation = replace(contender, options={**(contender.options or {}), "lowering": "eager"})
    shown = by_operation.compiled(model, job.mask_id)
    timed = contender.compiled(model, job.mask_id)
    apart, mine, seen = loop(), loop(), Counter[str]()
    found: list[tuple[str, float, float]] = []

    def logits(ids: torch.Tensor) -> torch.Tensor:
        with apart:
            work = work_of(lambda: shown(ids))
        floor, out = alone(work), list[torch.Tensor]()
        before = Counter(backend.stats(model)["steps"])
        with mine:
            took = milliseconds(lambda: out.append(timed(ids).logits))
        (kind,) = Counter(backend.stats(model)["steps"]) - before or {"none": 1}
        seen[kind] += 1
        if kind not in WHOLE and seen[kind] > 2:  # the first are compiled
            floor()
            found.append((kind, took, milliseconds(floor)))
        return out[0]

    with torch.no_grad():
        for _ in quota_loop(logits, job.ids.clone(), job.prompt, job.response, job.block, job.mask_id):
            yield from found
            found.clear()


def main() -> None:
    """Print, for each method and prompt, the median of a partial step, of its work alone, and of their ratio."""
    print(
        f"{SETTING.layers} layers of width {SETTING.width}; prompt, method, step, its ms, ms of its work alone, ratio"
    )
    for prompt in PROMPTS:
        setting = replace(SETTING, prompt=prompt)
        model, job = random_model(setting), job_of(setting)
        loops = [each for each in contenders(setting)[3:] if each.settings is None and each.steps is None]
        for contender in loops:
            kinds: dict[str, list[tuple[float, float]]] = {}
            for kind, step, floor in partial_steps(contender, model, contender.within(job)):
                kinds.setdefault(kind, []).append((step, floor))
                if len(kinds[kind]) == TIMED:
                    break
            alone.cache_clear()
            for kind, times in kinds.items():
                steps, floors = zip(*times, strict=True)
                ratio = median(step / floor for step, floor in times)
                row = f"{prompt:>6,}  {contender.name:16} {kind:14} {median(steps):8.1f} {median(floors):8.1f}"
                print(f"{row} {ratio:6.2f}  ({len(times)} steps)", flush=True)
