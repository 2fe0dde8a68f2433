"""``python -m dllm_compile bench``: a random-weight model, ratios in one run against named baselines."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, replace

import torch

from . import eviction_bench, frontier, kernel_bench, saliency_bench
from .bench_model import Setting, job_of, random_model
from .contest import Contender, Row, finish, play, relative_flops
from .table import print_rows

ALONE: dict[str, tuple[Callable[[], None], str]] = {
    "confidence": (kernel_bench.main, "the confidence operation"),
    "eviction": (eviction_bench.main, "what evicting entries saves in memory, and in the time of a step"),
    "saliency": (saliency_bench.main, "a step in which a tenth of the response is salient"),
}


def contenders(setting: Setting) -> list[Contender]:
    """Baselines, the neutral setting, and each method; the last frees four tokens a call."""
    intervals = {"prompt_interval": setting.prompt_interval, "response_interval": setting.response_interval}
    blocks = {"method": "fast-dllm", "block_length": setting.cache_block}
    dual = {**blocks, "cache": "dual"}
    return [
        Contender("eager"),
        Contender("inductor", plain=True),
        Contender("neutral", {"prompt_interval": 1, "response_interval": 1}),
        Contender("dllm-cache", intervals, warm=setting.prompt_interval + 2),
        Contender("fast-dllm prefix", {**blocks, "cache": "prefix"}, warm=setting.cache_block + 2),
        Contender("fast-dllm dual", dual, warm=setting.cache_block + 2),
        Contender("sparse-dllm", {**blocks, "method": "sparse-dllm"}, warm=setting.cache_block + 4),
        Contender("dyllm", {"method": "dyllm", "shift": False}, warm=10),
        Contender("dual, 4 a call", dual, steps=setting.response // 4, warm=setting.cache_block // 4 + 2),
    ]


def run(setting: Setting) -> list[Row]:
    """Time every contender on one model."""
    model, job = random_model(setting), job_of(setting)
    rows: list[Row] = []
    reference: torch.Tensor | None = None
    for contender in contenders(setting):
        blocks = contender.options is not None and "block_length" in contender.options
        mine = replace(job, block=setting.cache_block) if blocks else job
        every = contender.options is None or contender.name == "neutral"
        row, (ids,) = play(contender, model, [mine], setting.baseline_steps if every else None)
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


def main(argv: list[str]) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="dllm_compile bench", description=__doc__)
    for name, value in asdict(Setting()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="instead draw accuracy against speed on the embedded model to this PNG file")
    for name, (_, what) in ALONE.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"instead measure {what}")
    given = vars(parser.parse_args(argv))
    target, picture = given.pop("json"), given.pop("plot")
    alone = [measure for name, (measure, _) in ALONE.items() if given.pop(name)]
    if alone:
        alone[0]()
        return
    if picture:
        frontier.main(picture, target)
        return
    setting = Setting(**given)
    rows = run(setting)
    print_rows(f"random Llama, {setting}", rows)
    cached = next(row for row in rows if row.name == "dllm-cache")
    print(f"realised speed-up over FLOP reduction, against eager: {cached.vs_eager * cached.flops:.2f}")
    print(_block_cost(setting, rows))
    if target:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.machine()}
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"setting": asdict(setting), **machine, "rows": [asdict(row) for row in rows]}, file, indent=1)
