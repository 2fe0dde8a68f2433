"""``bench --floor``: a partial step beside its matrix products and attention alone, of the same sizes, in one run.

What a method leaves to compute, no compiler can do without: the rest of a step is what caching and the host cost. Both
are timed in turn, by the clock and by time of this process' threads on a processor, which other work changes less.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache, partial
from statistics import median
from typing import Any, NamedTuple

import torch

from dllm_compile import backend
from dllm_compile.declared import loop
from dllm_compile.sampler.compiled import compiled
from dllm_compile.sampler.step import denoise_step

from .command import Parser, require, whole
from .contest import Contender, Job
from .model import Setting, contenders, job_of, random_model

PROMPTS = 512, 2048, 4096
SETTING = Setting(response=128, prompt_interval=16)
ABOUT = "a partial step of each method beside its matrix products and attention alone"
WHOLE = {"full", "evict", "present", "evict present", "none"}
"""Steps that are no partial ones."""
PRODUCTS = {"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"}
ATTENTION = {"aten::scaled_dot_product_attention", "dllm::sparse_attention", "dllm::delta_attention"}


class Spent(NamedTuple):
    """Milliseconds of a call, by the clock and on a processor."""

    clock: float
    cpu: float


def spent(call: Callable[[], object]) -> Spent:
    """What one call takes."""
    begin, begin_cpu = time.perf_counter(), time.process_time()
    call()
    return Spent(1000 * (time.perf_counter() - begin), 1000 * (time.process_time() - begin_cpu))


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
def _given(shape: tuple[int, ...], number: int, weight: bool) -> torch.Tensor:
    """A random tensor of a shape, one for each number: those that differ do not share memory."""
    return torch.randn(shape).mT.contiguous().mT if weight else torch.randn(shape)


def alone(work: Work) -> Callable[[], None]:
    """A function that computes as much and nothing else: each product with a weight of its own that lies as that of a
    linear layer; attention of all its queries and keys by torch's own. Works share their weights, keys and values: the
    head has fewer rows at each step, and weights for each of these steps were as many models in memory.
    """
    calls: list[tuple[Callable[..., torch.Tensor], list[torch.Tensor]]] = []
    seen = Counter[tuple[tuple[int, ...], bool]]()

    def given(shape: tuple[int, ...], weight: bool = False) -> torch.Tensor:
        seen[shape, weight] += 1
        return _given(shape, seen[shape, weight], weight)

    for name, shapes in work:
        if name in ATTENTION:
            calls.append((torch.nn.functional.scaled_dot_product_attention, [given(shape) for shape in shapes[:3]]))
        else:
            calls.append((torch.matmul, [given(shapes[0]), given(shapes[1], weight=True)]))

    def run() -> None:
        for function, operands in calls:
            function(*operands)

    return run


Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Writes the surest token of the candidates ``[B, S]`` bool into ids ``[B, S]``, and returns the new ids."""


def of_generate(contender: Contender, model: torch.nn.Module, mask_id: int, lowering: str) -> Step:
    """A denoising step that is compiled as a whole, as ``generate`` compiles it: its logits are of candidates alone."""

    def step(model: Any, x: torch.Tensor, candidates: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return denoise_step(model, x, candidates, count, 1, mask_id=mask_id)

    options = {**(contender.options or {}), "mask_id": mask_id, "lowering": lowering}
    return partial(compiled(step, model, options), model, count=torch.ones(1, dtype=torch.int64))


def of_own_loop(contender: Contender, model: torch.nn.Module, mask_id: int, lowering: str) -> Step:
    """The model alone: the caller gets the logits of all rows. What they are read for is not part of the step."""
    call = replace(contender, options={**(contender.options or {}), "lowering": lowering}).compiled(model, mask_id)

    def step(x: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        call(x)
        return torch.where(candidates & (candidates.cumsum(1) == 1), 1, x)

    return step


def partial_steps(
    contender: Contender, model: torch.nn.Module, job: Job, made: Callable[..., Step] = of_generate
) -> Iterator[tuple[str, Spent, Spent]]:
    """Run a generation; of each partial step its kind, what it takes, and what its work :func:`alone` takes."""
    torch.compiler.reset()
    shown, timed = (made(contender, model, job.mask_id, lowering) for lowering in ("eager", "inductor"))
    apart, mine, seen, x = loop(), loop(), Counter[str](), job.ids
    for number in range(job.response):
        begin = job.prompt + number // job.block * job.block
        candidates = x == job.mask_id
        candidates[:, :begin] = candidates[:, begin + job.block :] = False
        with torch.no_grad(), apart:
            work = work_of(partial(shown, x, candidates))
        out = list[torch.Tensor]()
        before = Counter(backend.stats(model)["steps"])
        with torch.no_grad(), mine:
            took = spent(lambda: out.append(timed(x, candidates)))  # noqa: B023  # called here
        (x,) = out
        (kind,) = Counter(backend.stats(model)["steps"]) - before or {"none": 1}
        seen[kind] += 1
        if kind not in WHOLE and seen[kind] > 2:  # the first are compiled
            floor = alone(work)
            floor()
            yield kind, took, spent(floor)


def of_folder(folder: str) -> Any:
    """A model of random weights whose code and sizes (``config.json``) are in a folder, as published ones are."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    made: Any = AutoModelForCausalLM
    return made.from_config(config, trust_remote_code=True).eval()


def line(prompt: int, name: str, kind: str, times: list[tuple[Spent, Spent]]) -> str:
    """Medians of the steps of a kind: of a step, of its work alone, and of their ratio, by both clocks."""
    cells = []
    for clock in ("cpu", "clock"):
        pairs = [(getattr(step, clock), getattr(floor, clock)) for step, floor in times]
        steps, floors = zip(*pairs, strict=True)
        ratio = median(step / floor for step, floor in pairs)
        cells.append(f"{median(steps):8.1f} {median(floors):8.1f} {ratio:6.2f}")
    return f"{prompt:>6,}  {name:16} {kind:14} {'  '.join(cells)}  ({len(times)} steps)"


def names() -> list[str]:
    """The loops that compute fewer rows."""
    return [each.name for each in contenders(SETTING)[3:] if each.settings is None and each.steps is None]


def main(argv: list[str]) -> None:
    """Command line: the words behind ``bench``, of which ``--floor`` is one."""
    parser = Parser(prog="dllm_compile bench --floor", description=ABOUT)
    parser.add_argument("--floor", action="store_true", help="this measurement")
    prompts = " ".join(map(str, PROMPTS))
    about = f"tokens of the prompt; {prompts} by default"
    parser.add_argument("--prompts", type=whole(), nargs="+", default=PROMPTS, metavar="TOKENS", help=about)
    parser.add_argument("--methods", nargs="+", metavar="ROW", help=f"rows of {', '.join(names())}; all by default")
    parser.add_argument("--steps", type=whole(), default=16, help="partial steps of a kind; 16 by default")
    about = "steps that return logits of all rows, as a loop of one's own calls them, in place of generate's"
    parser.add_argument("--own-loop", action="store_true", help=about)
    about = "in place of the model of 12 layers: config.json and code of another, which is run, for random weights"
    parser.add_argument("--model", metavar="FOLDER", help=about)
    asked = parser.parse_args(argv)
    for name in asked.methods or ():
        if name not in names():
            parser.error(f"argument --methods: there is no row {name!r}; give some of {', '.join(map(repr, names()))}")
    require(parser, "demo", "transformers")
    model = of_folder(asked.model) if asked.model else random_model(SETTING)
    made = of_own_loop if asked.own_loop else of_generate
    setting = replace(SETTING, vocabulary=model.config.vocab_size)
    what = asked.model or f"{setting.layers} layers of width {setting.width}"
    print(f"{what}, {torch.get_num_threads()} threads; medians, in ms on a processor, then by the clock:")
    print("prompt  method           step               step    alone  ratio      step    alone  ratio")
    for prompt in asked.prompts:
        longer = replace(setting, prompt=prompt)
        for contender in contenders(longer):
            if contender.name not in (asked.methods or names()):
                continue
            kinds: dict[str, list[tuple[Spent, Spent]]] = {}
            for kind, step, floor in partial_steps(contender, model, contender.within(job_of(longer)), made):
                kinds.setdefault(kind, []).append((step, floor))
                if len(kinds[kind]) == asked.steps:
                    break
            _given.cache_clear()
            for kind, times in kinds.items():
                print(line(prompt, contender.name, kind, times), flush=True)
