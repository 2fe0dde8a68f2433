"""``python -m dllm_compile bench``: a random-weight model, ratios in one run against named baselines."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from . import antibody, frontier, search_command
from . import eviction as eviction_bench
from . import floor as floor_bench
from . import host as host_bench
from . import kernels as kernel_bench
from . import lengths as length_bench
from . import quantized as quantized_bench
from . import saliency as saliency_bench
from . import shape as shape_bench
from . import speed as speed_bench
from .command import Parser, interval, picture, require, target, whole
from .contest import Row, finish, play
from .model import KINDS, SHAPES, Setting, check_lengths, check_model, contenders, job_of, random_model
from .table import print_rows

ABOUT = "the methods on a model with random weights, or one part of them: time, memory, FLOPs, each against a baseline"
FLAGS = {
    "kind": "architecture of the model",
    "layers": "its layers",
    "width": "size of its hidden state",
    "mlp": "inner size of its MLPs",
    "heads": "attention heads",
    "kv_heads": "heads of keys and values, 0 for as many as of queries",
    "vocabulary": "tokens that it embeds",
    "theta": "base of its rotary positions",
    "prompt": "tokens of the prompt",
    "response": "tokens of the response",
    "block": "block length of the loop",
    "baseline_steps": "forwards timed for eager and Inductor",
    "prompt_interval": "steps from one refresh of the prompt to the next, in dLLM-Cache",
    "response_interval": "the same, of the response",
    "cache_block": "block length of Fast-dLLM's caches, and of their loop",
}
"""What the fields of :class:`Setting` are, as flags."""
WITH_FLAGS: dict[str, tuple[Callable[[list[str]], None], str]] = {
    "search": (search_command.main, f"find {search_command.ABOUT}"),
    "antiberty": (antibody.main, "let a trained model fill antibody sequences"),
    "floor": (floor_bench.main, f"measure {floor_bench.ABOUT}"),
}
"""Measurements that have flags of their own; --search has one by the name of the other."""
ALONE: dict[str, tuple[Callable[[], None], str]] = {
    "depth": (shape_bench.depth, "how the time to compile grows with the number of layers"),
    "eviction": (eviction_bench.main, "what evicting entries saves in memory, and in the time of a step"),
    "sequences": (length_bench.held, "what a process holds behind a thousand sequences of random sizes"),
    "host": (host_bench.main, "a partial step of a narrow model, and how many functions it calls"),
    "quantized": (quantized_bench.main, "weights of fewer bits, by every tool that is installed, beside float32"),
    "saliency": (saliency_bench.main, "a step in which a tenth of the response is salient"),
}

DRAWN: dict[str, tuple[Callable[[str, str | None], None], str]] = {
    "--plot": (frontier.main, "accuracy against speed on the embedded model"),
    "--plot-lengths": (speed_bench.main, "tokens/s against the length of the prompt, one line a method,"),
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


def _write(file_name: str | None, argv: list[str], content: dict[str, Any]) -> None:
    """Write a report to a file, if one is named."""
    if file_name:
        with open(file_name, "w", encoding="utf-8") as file:
            json.dump({"command": f"python -m dllm_compile bench {shlex.join(argv)}", **content}, file, indent=1)


def _shape(name: str, setting: Setting, grid: shape_bench.Grid, write: Callable[[dict[str, Any]], None]) -> None:
    """Measure a published size; what is there is written after each row, as a time limit may end it."""
    for report in shape_bench.run(setting, grid):
        if report["rows"]:
            print(shape_bench.line(report["rows"][-1]), flush=True)
        else:
            print(shape_bench.title(name, report), flush=True)
        write({"shape": name, **report})


def _parser() -> Parser:
    parser = Parser(prog="dllm_compile bench", description=ABOUT)
    kinds: dict[str, Any] = {"kind": str, "kv_heads": whole(0), "vocabulary": whole(2)}
    kinds |= dict.fromkeys(("prompt_interval", "response_interval"), interval)
    for name, value in asdict(Setting()).items():
        choices = KINDS if name == "kind" else None
        flag = f"--{name.replace('_', '-')}"
        about = f"{FLAGS[name]}; %(default)s by default"
        parser.add_argument(flag, type=kinds.get(name, whole()), default=value, choices=choices, help=about)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="float32 on a CPU, bfloat16 on CUDA")
    parser.add_argument("--json", type=target, help="also write the rows to this file")
    for flag, (_, what) in DRAWN.items():
        parser.add_argument(flag, type=picture, help=f"instead draw {what} to this PNG file")
    for name, (_, what) in WITH_FLAGS.items():
        about = f"instead {what}; it has flags of its own: see --{name} --help"
        parser.add_argument(f"--{name}", action="store_true", help=about)
    parser.add_argument("--kernels", action="store_true", help="instead measure each operation alone")
    for name, (_, what) in ALONE.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"instead measure {what}")
    shape_bench.add_flags(parser)
    return parser


def _alone(parser: Parser, given: dict[str, Any]) -> dict[str, Callable[[], None]]:
    """Measurements of one thing that are asked for, by their flags; takes them out of what is ``given``."""
    for name in WITH_FLAGS:
        if given.pop(name):
            parser.error(f"write --{name} in full, as it has flags of its own")
    found = {f"--{name}": measure for name, (measure, _) in ALONE.items() if given.pop(name)}
    if given["lengths"] == []:
        if given["shape"]:
            parser.error("--lengths without pairs such as 256,256 is a measurement of its own, without --shape")
        given["lengths"], found["--lengths"] = None, length_bench.main
    return found


def _drawn(given: dict[str, Any]) -> dict[str, Callable[[str | None], None]]:
    """Pictures that are asked for, by their flags, each drawn from rows that it also writes to a file, if one is named;
    takes them out of what is ``given``.
    """
    paths = {flag: given.pop(flag[2:].replace("-", "_")) for flag in DRAWN}
    return {flag: partial(DRAWN[flag][0], path) for flag, path in paths.items() if path}


def main(argv: list[str]) -> None:
    """Command line."""
    for name, (command, _) in WITH_FLAGS.items():
        if f"--{name}" in argv:
            return command(argv)
    return _main(argv)


def _main(argv: list[str]) -> None:
    """All but what has flags of its own."""
    parser = _parser()
    shape = parser.parse_known_args(argv)[0].shape
    if shape:
        parser.set_defaults(**asdict(SHAPES[shape]))
    given = vars(parser.parse_args(argv))
    report, device = given.pop("json"), given.pop("device")
    alone, drawn = _alone(parser, given), _drawn(given)
    kernels = given.pop("kernels")
    setting = Setting(**{name: given.pop(name) for name in asdict(Setting())})
    del given["shape"]
    apart = [*alone, *(["--kernels"] if kernels else []), *drawn]
    if (alone or kernels) and (report or drawn or shape):
        parser.error("--json, --plot, --plot-lengths and --shape do not go with a measurement of one thing alone")
    if len(apart) > 1:
        parser.error(f"{' and '.join(apart)} are measurements of their own; give one of them")
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: PyTorch finds no CUDA device here")
    if device == "cuda" and (alone or drawn):
        parser.error("--device cuda is for the bench itself, for --kernels and for --shape")
    if not shape and any(value is not None for value in given.values()):
        parser.error(f"--{next(n for n, v in given.items() if v is not None).replace('_', '-')} goes with --shape")
    if apart:
        for name, value in asdict(setting).items():
            if value != getattr(Setting(), name):
                parser.error(f"--{name.replace('_', '-')} is not for {apart[0]}, whose model is fixed; leave it out")
    try:
        check_model(setting)
        if not shape:
            check_lengths(setting)
    except ValueError as error:
        parser.error(str(error))
    require(parser, "demo", "transformers")
    if drawn:
        require(parser, "plot", "matplotlib")

    def write(content: dict[str, Any]) -> None:
        _write(report, argv, content)

    if alone:
        next(iter(alone.values()))()
    elif kernels:
        kernel_bench.main(device)
    elif drawn:
        next(iter(drawn.values()))(report)
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
        where = shape_bench.machine(torch.device(device))
        write({"setting": asdict(setting), **where, "rows": list(map(asdict, rows))})
