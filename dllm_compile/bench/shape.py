"""``bench --shape``: a model of a published size with random weights, all of it measured in one run.

Tokens a call are forced: with random weights no confidence means anything. One token a call is the plain loop's, more
are ``generate``'s, with fewer ``steps``. Calls of the plain loop are timed one by one, with a synchronised device.

Each contender begins with an empty cache of Inductor's at each length and batch: its first ``compile_seconds`` there
are of a cold compile, those for more tokens a call of what is not among the code before. ``warm_compile_seconds``, of
the first length and batch, are of the same process after ``torch.compiler.reset()``, with what Inductor keeps in memory
cleared: code is read from disk, as in a new process, but nothing is imported again.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import torch

from dllm_compile import compat

from .command import whole
from .contest import Contender, Job, play, wait
from .model import SHAPES, Setting, contenders, job_of, random_model

COPIED = {"cuda": 1 << 31, "cpu": 1 << 27}
"""Bytes of the tensor whose copies give the bandwidth."""
FIELDS = (
    *("tokens", "seconds", "forwards", "tokens_per_second", "compile_seconds", "milliseconds", "state_bytes"),
    *("peak_bytes", "salient", "steps", "rows", "logits"),
)
"""What is written of a :class:`dllm_compile.bench.bench.contest.Row`."""


@dataclass(frozen=True)
class Grid:
    """What is measured of a model.

    Attributes:
        lengths: tokens of prompt and response.
        batches: sequences run together.
        per_call: tokens that a call frees in each sequence.
        methods: names of contenders, with ``-`` for a space; empty for all.
        steps: forwards of the plain loop that are timed, ``None`` for all; of the baselines ``baseline_steps`` are.
        device: ``"cpu"`` or ``"cuda"``.
        cuda_graphs: whether methods record their partial steps, on CUDA.
    """

    lengths: tuple[tuple[int, int], ...] = ((256, 256), (768, 256), (3584, 512))
    batches: tuple[int, ...] = (1, 8)
    per_call: tuple[int, ...] = (1, 2, 4)
    methods: tuple[str, ...] = ()
    steps: int | None = None
    device: str = "cpu"
    cuda_graphs: bool = True


GRIDS = {"tiny": Grid(((64, 64),), (1,), (1, 4))}
"""What is measured of a shape unless flags say otherwise, where not the same as of all others."""


def entrants(setting: Setting) -> dict[str, Contender]:
    """Baselines and methods by name, as the plain loop calls them."""
    plain = [c for c in contenders(setting) if c.steps is None and c.settings is None and c.name != "neutral"]
    return {c.name.replace(" ", "-"): c for c in plain}


def weight_bytes(model: Any) -> int:
    """Bytes of weights that any step reads: all but the table of embeddings, which is looked up, unless tied."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return sum(p.nbytes for p in model.parameters() if p is head or p is not table)


def bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by copies of a large tensor."""
    source = torch.ones(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = []
    for _ in range(5):
        wait(device)
        begin = time.perf_counter()
        for _ in range(5):
            target.copy_(source)
        wait(device)
        spent.append(time.perf_counter() - begin)
    return 5 * 2 * source.nbytes / median(spent)


def measured(model: Any, setting: Setting, grid: Grid) -> Iterator[dict[str, Any]]:
    """One row a contender, length, batch and number of tokens a call, in this order, as it is measured.

    Ratios are to the baselines of the same length and batch at one token a call, ``None`` where there is none. A
    contender that the device has no memory for has a row whose ``out_of_memory`` says so, and no figures.
    """
    every = entrants(setting)
    graphs = {"cuda_graphs": grid.cuda_graphs and grid.device == "cuda"}
    chosen = [every[name] for name in grid.methods or every]
    chosen = [c if c.options is None else replace(c, options={**c.options, **graphs}) for c in chosen]
    places = [(*lengths, batch) for lengths in grid.lengths for batch in grid.batches]
    for prompt, response, batch in places:
        job = job_of(replace(setting, prompt=prompt, response=response), batch, grid.device)
        speed: dict[str, float] = {}
        for contender in chosen:
            with compat.fresh_cache():
                for count in grid.per_call if contender.options is not None else (1,):
                    mine = replace(contender, settings={"steps": response // count}) if count > 1 else contender
                    limit = grid.steps if contender.options is not None else setting.baseline_steps
                    found = _figures(mine, model, job, limit, (prompt, response, batch) == places[0])
                    own = found.get("tokens_per_second")
                    if own is not None and contender.name in ("eager", "inductor"):
                        speed[contender.name] = own
                    for name in ("eager", "inductor"):
                        found[f"vs_{name}"] = own / speed[name] if own is not None and name in speed else None
                    where = {"prompt": prompt, "response": response, "batch": batch, "tokens_per_call": count}
                    yield {"contender": contender.name, **where, **found}


def _figures(contender: Contender, model: Any, job: Job, limit: int | None, twice: bool) -> dict[str, Any]:
    """Figures of one contender; ``twice`` compiles it a second time, from what the first left on disk."""
    job = contender.within(job)
    try:
        row, (ids,) = play(contender, model, [job], limit, memory=True)
        row.tokens = int(((ids != job.mask_id) & (job.ids == job.mask_id)).sum())
        row.tokens_per_second = row.tokens / row.seconds
        found = {name: value for name, value in asdict(row).items() if name in FIELDS}
        compiles = contender.plain or contender.options is not None
        if compiles and twice and contender.settings is None:
            torch.compiler.reset()
            compat.clear_caches()
            found["warm_compile_seconds"] = play(contender, model, [job], row.every_kind)[0].compile_seconds
    except torch.OutOfMemoryError as error:
        found = {"out_of_memory": str(error)}
    torch.compiler.reset()  # frees what is kept of the sequence
    gc.collect()
    torch.cuda.empty_cache()
    return found


def run(setting: Setting, grid: Grid) -> Iterator[dict[str, Any]]:
    """Build the model and measure; gives the report as it grows, first without rows."""
    device = torch.device(grid.device)
    model = random_model(setting, device=device)
    must, speed = weight_bytes(model), bandwidth(device)
    floor = {"copy_bytes_per_second": speed, "weight_bytes": must, "milliseconds": 1000 * must / speed}
    parameters = sum(p.numel() for p in model.parameters())
    about = {"parameters": parameters, "dtype": str(model.dtype).removeprefix("torch."), "floor": floor}
    report: dict[str, Any] = {"setting": asdict(setting), "grid": asdict(grid), **machine(device), **about, "rows": []}
    yield report
    for row in measured(model, setting, grid):
        row["over_floor"] = {name: ms / floor["milliseconds"] for name, ms in row.get("milliseconds", {}).items()}
        report["rows"].append(row)
        yield report


def machine(device: torch.device) -> dict[str, Any]:
    """Versions (``None`` where something is not installed), and on what they run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or device.type
    versions: dict[str, Any] = {"python": platform.python_version()}
    for package in ("torch", "triton", "transformers"):
        try:
            versions[package] = importlib.import_module(package).__version__
        except ImportError:
            versions[package] = None
    return {**versions, "device": name, "machine": platform.machine(), "threads": torch.get_num_threads()}


HEAD = f"{'contender':<18}{'tokens':>12}{'batch':>6}{'a call':>7}{'tokens/s':>10}{'x eager':>9}{'x inductor':>11}"
HEAD += f"{'compile s':>10}{'warm':>7}{'peak MB':>9}{'state MB':>9}  ms of a call (of the floor)"


def title(name: str, report: dict[str, Any]) -> str:
    """What stands above the rows."""
    floor = report["floor"]
    return (
        f"{name}, {report['parameters'] / 1e6:,.1f} million parameters, {report['dtype']}, {report['device']}\n"
        f"copies {floor['copy_bytes_per_second'] / 1e9:.1f} GB/s; a step reads {floor['weight_bytes'] / 1e6:,.1f} MB "
        f"of weights: floor {floor['milliseconds']:.2f} ms\n{HEAD}"
    )


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    where = (
        f"{row['contender']:<18}{row['prompt']:>7} +{row['response']:>4}{row['batch']:>5}{row['tokens_per_call']:>7}"
    )
    if "out_of_memory" in row:
        return f"{where}  out of memory"

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'-' if value is None else f'{value:.{digits}f}':>{width}}"

    calls = [f"{name} {ms:.2f} ({row['over_floor'][name]:.1f}x)" for name, ms in row["milliseconds"].items()]
    return (
        f"{where}{cell(row['tokens_per_second'], 10, 1)}{cell(row['vs_eager'], 9, 2)}{cell(row['vs_inductor'], 11, 2)}"
        f"{cell(row['compile_seconds'], 10, 1)}{cell(row.get('warm_compile_seconds'), 7, 1)}"
        f"{cell(row['peak_bytes'] / 1e6, 9, 1)}{cell(row['state_bytes'] / 1e6, 9, 1)}  "
        + (", ".join(calls) or f"{1000 * row['seconds'] / row['forwards']:.2f} on average")
    )


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of the command, ``None`` where not given."""
    some = whole()

    def pair(text: str) -> tuple[int, int]:
        prompt, comma, response = text.partition(",")
        if not comma:
            raise argparse.ArgumentTypeError(f"{text!r} is no pair such as 256,256")
        return some(prompt), some(response)

    flags = parser.add_argument_group("published sizes", "any number above overrides the shape's own")
    flags.add_argument("--shape", choices=SHAPES, help="measure every method on a random model of this size")
    about = "tokens of prompt and response; without any, and without --shape, measure what a new length costs"
    flags.add_argument("--lengths", nargs="*", type=pair, metavar="P,G", help=about)
    flags.add_argument("--batches", nargs="+", type=some, help="sequences run together")
    flags.add_argument("--per-call", nargs="+", type=some, help="tokens that a call frees: 1 2 4")
    flags.add_argument("--methods", nargs="+", choices=[*entrants(Setting())], help="all of them by default")
    graphs = argparse.BooleanOptionalAction
    flags.add_argument("--cuda-graphs", action=graphs, help="record partial steps on CUDA; as if given by default")
    flags.add_argument("--steps", type=some, help="forwards timed in the plain loop of a method, all by default")


def grid_of(given: dict[str, Any], setting: Setting, shape: str) -> Grid:
    """What is to be measured.

    Raises:
        ValueError: lengths that do not go with the other numbers.
    """
    usual = SHAPES[shape]
    if (setting.prompt, setting.response) != (usual.prompt, usual.response):
        raise ValueError("a shape has several lengths: give --lengths in place of --prompt and --response")
    named: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items() if v is not None}
    grid = replace(GRIDS.get(shape, Grid()), **named)
    for block in (setting.block, setting.cache_block):
        for count in grid.per_call:
            if block % count:
                raise ValueError(f"a block of {block} tokens cannot be freed {count} at a time")
        for _, response in grid.lengths:
            if response % block:
                raise ValueError(f"a response of {response} tokens is no multiple of a block of {block}")
    return grid


def depth() -> None:
    """Print how the cold compile time of dLLM-Cache grows with the number of layers.

    The lesser of two times each, taking turns: what else a machine does only adds to one.
    """
    spent: dict[int, float] = {}
    for layers in (2, 8, 32, 8, 32):  # the first pays for what happens once a process
        setting = replace(SHAPES["tiny"], layers=layers)
        method = entrants(setting)["dllm-cache"]
        with compat.fresh_cache():
            row, _ = play(method, random_model(setting), [job_of(setting)], setting.prompt_interval + 2)
        spent[layers] = min(row.compile_seconds, spent.get(layers, row.compile_seconds))
    print(
        f"dllm-cache, width {SHAPES['tiny'].width}, cold: 8 layers {spent[8]:.1f} s, 32 layers {spent[32]:.1f} s, "
        f"{spent[32] / spent[8]:.2f}x"
    )
