"""``bench --plot``: accuracy against speed of every method on the embedded model, one point a setting."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import cos, radians, sin
from typing import Any

from . import demo
from .contest import Contender, Row
from .table import print_rows

PROBLEMS, BATCH, BLOCK = 32, 8, 32
MARKERS = "osD^v<>pPXhH*d8x+"


def entrants() -> dict[str, list[tuple[str, Contender]]]:
    """Every method over the range of its main setting: by series, each point with its label."""
    out: dict[str, list[tuple[str, Contender]]] = {}

    def add(series: str, label: object = "", **how: Any) -> None:
        out.setdefault(series, []).append((str(label), Contender(f"{series} {label}".strip(), **how)))

    blocks = {"block_length": BLOCK}
    dual = {"method": "fast-dllm", "cache": "dual", **blocks}
    sparse = {"method": "sparse-dllm", **blocks}
    add("eager")
    add("inductor", plain=True)
    for interval in (2, 3, 5, 7):
        add("dllm-cache", interval, options={"prompt_interval": 50, "response_interval": interval})
    add("fast-dllm prefix", options={**dual, "cache": "prefix"})
    add("fast-dllm dual", options=dual)
    for ratio in (0.3, 0.5, 0.7):
        add("sparse-dllm", ratio, options={**sparse, "keep_ratio": ratio})
    for tau in (0.98, 0.99, 0.995):
        add("dyllm", tau, options={"method": "dyllm", "saliency_threshold": tau, "shift": False})
    add("dkv-cache", options={"method": "dkv-cache", **blocks, "shift": False})
    for threshold in (0.7, 0.9, 0.99):
        for series, options in {
            "threshold, eager": None,
            "dual + threshold": dual,
            "dsb + threshold": {"method": "dsb", **blocks},
            "dinfer + threshold": {"method": "dinfer", **blocks},
            "sparse + threshold": sparse,
            "dyllm + threshold": {"method": "dyllm"},
            "es-dllm + threshold": {"method": "es-dllm"},
            "dual, sparse, salient + threshold": {**sparse, "saliency_threshold": 0.99, "full_steps": 1},
        }.items():
            add(series, threshold, options=options, settings={"threshold": threshold})
    return out | {"fastest": [("", demo.fastest())]}


def drawn_to_files() -> Any:
    """matplotlib, which needs no screen then.

    Raises:
        ImportError: it is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'dllm-compile[plot]'") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib


def draw(rows: list[Row], path: str, problems: int = PROBLEMS) -> None:
    """Write the picture: one marker a method, with the standard error of its accuracy over the ``problems``, and a line
    through the settings that no other beats in both speed and accuracy.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = drawn_to_files()
    pyplot = matplotlib.pyplot
    figure, axes = pyplot.subplots(figsize=(11, 6.5))
    places = {row.name: (row.vs_eager, 100 * (row.accuracy or 0.0)) for row in rows}
    labels: list[tuple[str, tuple[float, float], Any]] = []
    for i, (series, points) in enumerate(entrants().items()):
        color, marker = matplotlib.colormaps["tab20"](2 * i % 20 + i // 10), MARKERS[i % len(MARKERS)]
        mine = {label: places[contender.name] for label, contender in points}
        speed, accuracy = zip(*mine.values(), strict=True)
        errors = [100 * standard_error(share / 100, problems) for share in accuracy]
        below = [min(each, share) for each, share in zip(errors, accuracy, strict=True)]
        above = [min(each, 100 - share) for each, share in zip(errors, accuracy, strict=True)]
        axes.errorbar(speed, accuracy, [below, above], color=color, linestyle="", elinewidth=0.6, label="_")
        line = "-" if len(mine) > 1 else ""
        axes.plot(speed, accuracy, marker=marker, color=color, linestyle=line, linewidth=0.8, label=series)
        labels += [(label, at, color) for label, at in mine.items() if label]
    front = pareto([*places.values()])
    axes.plot(*zip(*front, strict=True), color="black", linestyle=":", linewidth=1.2, zorder=0, label="Pareto front")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xlabel("tokens/s relative to eager")
    axes.set_ylabel("problems answered exactly, % (bars: standard error)")
    axes.set_title(f"Embedded model, {problems} problems, batch {BATCH}, loop in blocks of {BLOCK}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1.0))
    axes.margins(x=0.08, y=0.15)  # room for labels beyond the outermost points
    place(axes, labels, [*places.values()])
    figure.savefig(path, dpi=120, bbox_inches="tight")


def standard_error(share: float, count: int) -> float:
    """Of a share of ``count`` independent answers, by Wilson's estimate: 0 and 1 are not certain either."""
    share = (share * count + 2) / (count + 4)
    return float((share * (1 - share) / (count + 4)) ** 0.5)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points for which no other is better in one coordinate and at least as good in the other, by the first."""
    front: list[tuple[float, float]] = []
    for point in sorted(points, reverse=True):
        if not front or point[1] > front[-1][1]:
            front.append(point)
    return front[::-1]


def place(axes: Any, labels: Sequence[tuple[str, tuple[float, float], Any]], points: Sequence[Any]) -> list[Any]:
    """Write each label in the axes near its point, with a thin line to it, where it covers no other label and no point;
    returns the texts.

    Args:
        axes: of matplotlib, whose limits are final.
        labels: text, point and color of each.
        points: what no label may cover.
    """
    from matplotlib.text import Text

    axes.figure.canvas.draw()
    marks = axes.transData.transform(points)
    renderer = axes.figure.canvas.get_renderer()
    texts: list[Any] = []
    boxes: list[Any] = []
    for text, at, color in labels:
        leader = {"arrowstyle": "-", "color": color, "linewidth": 0.4, "shrinkA": 0, "shrinkB": 0}
        shown = axes.annotate(
            text, at, xytext=(0, 0), textcoords="offset points", fontsize=8, color=color, arrowprops=leader
        )
        for distance, angle in itertools.product(range(12, 120, 4), range(45, 405, 30)):
            shown.set_position((distance * cos(radians(angle)) - 6, distance * sin(radians(angle)) - 3))
            shown.update_positions(renderer)
            box = Text.get_window_extent(shown)  # of the text alone, without its line
            inside = axes.bbox.count_contains([box.min, box.max]) == 2
            if inside and not box.padded(2).count_overlaps(boxes) and not box.padded(3).count_contains(marks):
                break
        texts.append(shown)
        boxes.append(box)
    return texts


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
