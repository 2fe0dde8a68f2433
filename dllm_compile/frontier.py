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
SERIES = (
    *("eager", "inductor", "dllm-cache", "fast-dllm prefix", "fast-dllm dual"),
    *(
        "sparse-dllm",
        "dyllm",
        "dkv-cache",
        "threshold, eager",
        "dual + threshold",
        "sparse + threshold",
        "dyllm + threshold",
    ),
    *("dual, sparse, salient + threshold",),
)


def entrants() -> list[Contender]:
    """Every method over the range of its main setting."""
    out = [Contender("eager"), Contender("inductor", plain=True)]
    for interval in (2, 3, 5, 7):
        intervals = {"prompt_interval": 50, "response_interval": interval}
        out.append(Contender(f"dllm-cache {interval}", intervals, warm=52))
    for cache in ("prefix", "dual"):
        out.append(
            Contender(
                f"fast-dllm {cache}", {"method": "fast-dllm", "cache": cache, "block_length": BLOCK}, warm=2 * BLOCK + 2
            )
        )
    blocks = {"block_length": BLOCK}
    for ratio in (0.3, 0.5, 0.7):
        options: dict[str, Any] = {"method": "sparse-dllm", "keep_ratio": ratio, **blocks}
        out.append(Contender(f"sparse-dllm {ratio}", options, warm=2 * BLOCK + 2))
    for tau in (0.98, 0.99, 0.995):
        out.append(Contender(f"dyllm {tau}", {"method": "dyllm", "saliency_threshold": tau, "shift": False}, warm=12))
    out.append(Contender("dkv-cache", {"method": "dkv-cache", **blocks, "shift": False}, warm=2 * BLOCK + 2))
    for threshold in (0.7, 0.9, 0.99):
        out.append(Contender(f"threshold, eager {threshold}", settings={"threshold": threshold}))
        dual = {"method": "fast-dllm", "cache": "dual", "block_length": BLOCK}
        sparse = {"method": "sparse-dllm", **blocks}
        both = {**sparse, "saliency_threshold": 0.99, "full_steps": 1}
        for name, options in (
            ("dual + threshold", dual),
            ("sparse + threshold", sparse),
            ("dyllm + threshold", {"method": "dyllm"}),
            ("dual, sparse, salient + threshold", both),
        ):
            out.append(Contender(f"{name} {threshold}", options, settings={"threshold": threshold}))
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
    for series in SERIES:
        mine = [row for row in rows if row.name.startswith(series)]
        speed, accuracy = [row.vs_eager for row in mine], [100 * (row.accuracy or 0.0) for row in mine]
        axes.plot(speed, accuracy, marker="o", linestyle="-" if len(mine) > 1 else "", label=series)
        for row, at in zip(mine, zip(speed, accuracy, strict=True), strict=True):
            label = row.name[len(series) :].strip()
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
    rows = demo.run(PROBLEMS, BATCH, BLOCK, entrants=entrants())
    print_rows(f"{PROBLEMS} held-out problems, batch {BATCH}, block {BLOCK}", rows)
    draw(rows, picture)
    print(f"drawn to {picture}", file=sys.stderr)
    if target:
        settings: dict[str, Any] = {"problems": PROBLEMS, "batch": BATCH, "block": BLOCK}
        with open(target, "w", encoding="utf-8") as file:
            json.dump({**settings, "rows": [asdict(row) for row in rows]}, file, indent=1)
