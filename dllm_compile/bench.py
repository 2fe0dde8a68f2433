"""``python -m dllm_compile bench``: a random-weight model, ratios in one run against named baselines."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from . import eviction_bench, frontier, kernel_bench, saliency_bench, shape_bench
from .bench_model import KINDS, SHAPES, Setting, contenders, job_of, random_model
from .contest import Row, finish, play, relative_flops
from .table import print_rows

ALONE: dict[str, tuple[Callable[[], None], str]] = {
    "depth": (shape_bench.depth, "how the time to compile grows with the number of layers"),
    "eviction": (eviction_bench.main, "what evicting entries saves in memory, and in the time of a step"),
    "saliency": (saliency_bench.main, "a step in which a tenth of the response is salient"),
}


def run(setting: Setting, device: str = "cpu") -> list[Row]:
    """Time every contender on one model."""
    model, job = random_model(setting, device=device), job_of(setting, device=device)
    rows: list[Row] = []
    reference: torch.Tensor | None = None
    for contender in contenders(setting):
        every = contender.options is None or contender.name == "neutral"
        row, (ids,) = play(contender, model, [contender.within(job)], setting.baseline_steps if every else None)
        done = (ids != job.mask_id) & (job.ids == job.mask_id)
        row.tokens = int(done.sum())
        reference = ids if reference is None else reference
        both = done & (reference != job.mask_id)
        row.same_tokens = (ids == reference)[both].float().mean().item()
        row.flops = relative_flops(row, model, job, contender.options or {})
        rows.append(row)
        print(f"{row.name}: {row.forwards} forwards in {row.seconds:.1f} s", file=sys.stderr, flush=True)
    return finish(rows)


def _block_cost(setting: Setting, rows: list[Row]) -> str:
    """A dual block's step against its share of a full step."""
    by_name = {row.name: row for row in rows}
    dual, full = by_name["fast-dllm dual"], by_name["inductor"].milliseconds["plain"]
    block = dual.milliseconds.get("block", 0.0)
    active = dual.rows.get("block", 0) / max(dual.steps.get("block", 0), 1)
    part = block / (full * active / (setting.prompt + setting.response))
    return f"dual: a block step takes {block:.1f} ms, {part:.2f} of rows / S of a full step's {full:.1f} ms"


def _write(target: str | None, argv: list[str], content: dict[str, Any]) -> None:
    """Write a report to a file, if one is named."""
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"command": f"python -m dllm_compile bench {shlex.join(argv)}", **content}, file, indent=1)


def _shape(name: str, setting: Setting, grid: shape_bench.Grid, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure a published size; what is there is written after each row, as a time limit may end it."""
    for report in shape_bench.run(setting, grid):
        if report["rows"]:
            print(shape_bench.line(report["rows"][-1]), flush=True)
        else:
            print(shape_bench.title(name, report), flush=True)
        write({"shape": name, **report})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dllm_compile bench", description=__doc__)
    for name, value in asdict(Setting()).items():
        choices = KINDS if name == "kind" else None
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value, choices=choices)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="instead draw accuracy against speed on the embedded model to this PNG file")
    parser.add_argument("--kernels", action="store_true", help="instead measure each operation alone")
    for name, (_, what) in ALONE.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"instead measure {what}")
    shape_bench.add_flags(parser)
    return parser


def main(argv: list[str]) -> None:
    """Command line."""
    parser = _parser()
    shape = parser.parse_known_args(argv)[0].shape
    if shape:
        parser.set_defaults(**asdict(SHAPES[shape]))
    given = vars(parser.parse_args(argv))
    target, picture, device = given.pop("json"), given.pop("plot"), given.pop("device")
    alone = [measure for name, (measure, _) in ALONE.items() if given.pop(name)]
    kernels = given.pop("kernels")
    setting = Setting(**{name: given.pop(name) for name in asdict(Setting())})
    del given["shape"]
    if (alone or kernels) and (target or picture or shape):
        parser.error("--json, --plot and --shape do not go with a measurement of one thing alone")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if device == "cuda" and (alone or picture):
        parser.error("--device cuda is for the bench itself, for --kernels and for --shape")
    if not shape and any(value is not None for value in given.values()):
        parser.error(f"--{next(n for n, v in given.items() if v is not None).replace('_', '-')} goes with --shape")

    def write(content: dict[str, Any]) -> None:
        _write(target, argv, content)

    if alone:
        alone[0]()
    elif kernels:
        kernel_bench.main(device)
    elif picture:
        frontier.main(picture, target)
    elif shape:
        try:
            grid = shape_bench.grid_of({**given, "device": device}, setting, shape)
        except ValueError as error:
            parser.error(str(error))
        _shape(shape, setting, grid, write)
    else:
        rows = run(setting, device)
        print_rows(f"random {setting.kind}, {setting}", rows)
        cached = next(row for row in rows if row.name == "dllm-cache")
        print(f"realised speed-up over FLOP reduction, against eager: {cached.vs_eager * cached.flops:.2f}")
        print(_block_cost(setting, rows))
        write(
            {"setting": asdict(setting), **shape_bench.machine(torch.device(device)), "rows": list(map(asdict, rows))}
        )
