"""``bench --plot``: accuracy against speed of every method on the embedded model, one point a setting."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import Any

from . import demo
from .contest import Contender, Row
from .table import print_rows

PROBLEMS, BATCH, BLOCK = 32, 8, 32


def entrants() -> dict[str, list[tuple[str, Contender]]]:
    """Every method over the range of its main setting: by series, each point with its label."""
    out: dict[str, list[tuple[str, Contender]]] = {}

    def add(series: str, label: object = "", **how: Any) -> None:
        out.setdefault(series, []).append((str(label), Contender(f"{series} {label}".strip(), **how)))

    blocks, blocks_warm = {"block_length": BLOCK}, 2 * BLOCK + 2
    dual = {"method": "fast-dllm", "cache": "dual", **blocks}
    sparse = {"method": "sparse-dllm", **blocks}
    add("eager")
    add("inductor", plain=True)
    for interval in (2, 3, 5, 7):
        add("dllm-cache", interval, options={"prompt_interval": 50, "response_interval": interval}, warm=52)
    add("fast-dllm prefix", options={**dual, "cache": "prefix"}, warm=blocks_warm)
    add("fast-dllm dual", options=dual, warm=blocks_warm)
    for ratio in (0.3, 0.5, 0.7):
        add("sparse-dllm", ratio, options={**sparse, "keep_ratio": ratio}, warm=blocks_warm)
    for tau in (0.98, 0.99, 0.995):
        add("dyllm", tau, options={"method": "dyllm", "saliency_threshold": tau, "shift": False}, warm=12)
    add("dkv-cache", options={"method": "dkv-cache", **blocks, "shift": False}, warm=blocks_warm)
    for threshold in (0.7, 0.9, 0.99):
        for series, options in {
            "threshold, eager": None,
            "dual + threshold": dual,
            "sparse + threshold": sparse,
            "dyllm + threshold": {"method": "dyllm"},
            "dual, sparse, salient + threshold": {**sparse, "saliency_threshold": 0.99, "full_steps": 1},
        }.items():
            add(series, threshold, options=options, settings={"threshold": threshold})
    return out


def draw(rows: list[Row], path: str) -> None:
    """Write the picture.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'dllm-compile[plot]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    axes.set_prop_cycle(color=[matplotlib.colormaps["tab20"](i) for i in range(20)])
    places = {row.name: (row.vs_eager, 100 * (row.accuracy or 0.0)) for row in rows}
    for series, points in entrants().items():
        mine = {label: places[contender.name] for label, contender in points}
        speed, accuracy = zip(*mine.values(), strict=True)
        axes.plot(speed, accuracy, marker="o", linestyle="-" if len(mine) > 1 else "", label=series)
        for label, at in mine.items():
            axes.annotate(label, at, textcoords="offset points", xytext=(4, 4), fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("tokens/s relative to eager")
    axes.set_ylabel("problems answered exactly, %")
    axes.set_title(f"Embedded model, {PROBLEMS} problems, batch {BATCH}, loop in blocks of {BLOCK}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main(picture: str, target: str | None) -> None:
    """Measure, print, draw; ``target`` takes the rows as JSON."""
    rows = demo.run(PROBLEMS, BATCH, BLOCK, entrants=[each for points in entrants().values() for _, each in points])
    print_rows(f"{PROBLEMS} held-out problems, batch {BATCH}, block {BLOCK}", rows)
    draw(rows, picture)
    print(f"drawn to {picture}", file=sys.stderr)
    if target:
        settings: dict[str, Any] = {"problems": PROBLEMS, "batch": BATCH, "block": BLOCK}
        with open(target, "w", encoding="utf-8") as file:
            json.dump({**settings, "rows": [asdict(row) for row in rows]}, file, indent=1)
