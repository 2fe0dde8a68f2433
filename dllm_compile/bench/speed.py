"""``bench --plot-lengths``: tokens/s of every method against the length of the prompt, on a small random model."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from statistics import median
from typing import Any

import torch

from .contest import Contender, looped
from .frontier import MARKERS, drawn_to_files
from .model import Setting, job_of, random_model
from .shape import entrants
from .timed import Timed

SMALL = Setting(layers=4, width=256, mlp=1024, heads=4, vocabulary=4096, response=64, block=32, baseline_steps=8)
PROMPTS, RUNS = (64, 256, 1024), 3


@dataclass(frozen=True)
class Speed:
    """What one contender did at one length.

    Attributes:
        name: of the contender.
        prompt: tokens of the prompt.
        tokens_per_second: of each of some runs of the loop.
    """

    name: str
    prompt: int
    tokens_per_second: list[float]


def measured(setting: Setting, prompts: Sequence[int], runs: int, names: Sequence[Contender]) -> Iterator[Speed]:
    """Time whole generations of each contender at each length, one token a call; of what computes every row in each
    call, ``setting.baseline_steps`` calls. Code is made once for all lengths, in calls that do not count.

    Args:
        setting: of the model and its generations.
        prompts: tokens of the prompts.
        runs: timed at each length.
        names: the contenders.
    """
    model = random_model(setting)
    for contender in names:
        torch.compiler.reset()
        call, timed = contender.compiled(model, setting.vocabulary - 1), Timed()
        for prompt in prompts:
            job = contender.within(job_of(replace(setting, prompt=prompt)))
            limit = setting.baseline_steps if contender.options is None else None
            found = [timed(prompt, partial(looped, call, model, job, contender, limit))[0] for _ in range(runs)]
            yield Speed(contender.name, prompt, [each.forwards / each.seconds for each in found])


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Rising ``places`` moved apart to at least ``gap`` between neighbors, by as much up as down on average."""
    moved: list[float] = []
    for place in places:
        moved.append(max(place, moved[-1] + gap) if moved else place)
    back = (sum(moved) - sum(places)) / max(len(moved), 1)
    return [each - back for each in moved]


def draw(rows: Sequence[Speed], title: str, path: str) -> None:
    """Write the picture: a line a contender through the medians of its runs, with a bar from the slowest to the fastest
    run, and its name at the end of the line.

    Raises:
        ImportError: matplotlib is not installed.
    """
    matplotlib = drawn_to_files()
    figure, axes = matplotlib.pyplot.subplots(figsize=(10, 6.5))
    ends: list[tuple[float, float, str, Any]] = []
    for i, name in enumerate(dict.fromkeys(row.name for row in rows)):
        mine = sorted((row for row in rows if row.name == name), key=lambda row: row.prompt)
        middle = [median(row.tokens_per_second) for row in mine]
        below = [m - min(row.tokens_per_second) for m, row in zip(middle, mine, strict=True)]
        above = [max(row.tokens_per_second) - m for m, row in zip(middle, mine, strict=True)]
        color, marker = matplotlib.colormaps["tab20"](2 * i % 20 + i // 10), MARKERS[i % len(MARKERS)]
        how = {"color": color, "marker": marker, "markersize": 5, "linewidth": 1, "elinewidth": 0.8, "capsize": 2}
        axes.errorbar([row.prompt for row in mine], middle, [below, above], label=name, **how)
        ends.append((middle[-1], mine[-1].prompt, name, color))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.set_xticks(sorted({row.prompt for row in rows}))
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("tokens/s (bars: slowest and fastest run)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    name_lines(axes, sorted(ends))
    figure.savefig(path, dpi=120, bbox_inches="tight")


def name_lines(axes: Any, ends: Sequence[tuple[float, float, str, Any]]) -> None:
    """Write names beside the plot, none over another, each with a thin line to where its own line ends.

    Args:
        axes: of matplotlib, whose limits are final.
        ends: height, place along the other axis, name and color of each line's end, from below.
    """
    axes.figure.canvas.draw()
    size, pixels = 8, axes.get_window_extent().height
    gap = 1.5 * size * axes.figure.dpi / 72 / pixels
    heights = axes.transAxes.inverted().transform(axes.transData.transform([(x, y) for y, x, _, _ in ends]))[:, 1]
    for (y, x, name, color), height in zip(ends, spread(heights.tolist(), gap), strict=True):
        axes.annotate(
            name,
            (x, y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            verticalalignment="center",
            fontsize=size,
            color=color,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.5},
        )


def main(picture: str, target: str | None) -> None:
    """Measure, print, draw; ``target`` takes the rows as JSON."""
    rows: list[Speed] = []
    title = (
        f"Random Llama, {SMALL.layers} layers, width {SMALL.width}, vocabulary {SMALL.vocabulary}; "
        f"{SMALL.response} tokens, one a call; {torch.get_num_threads()} threads"
    )
    print(f"{title}\ntokens/s, median of {RUNS} runs, by tokens of the prompt", flush=True)
    print(f"{'':<18}" + "".join(f"{prompt:>9}" for prompt in PROMPTS), flush=True)
    for contender in entrants(SMALL).values():
        mine = [*measured(SMALL, PROMPTS, RUNS, [contender])]
        print(f"{contender.name:<18}" + "".join(f"{median(row.tokens_per_second):>9.1f}" for row in mine), flush=True)
        rows += mine
    draw(rows, title, picture)
    print(f"drawn to {picture}", file=sys.stderr)
    if target:
        with open(target, "w", encoding="utf-8") as file:
            json.dump({"setting": asdict(SMALL), "runs": RUNS, "rows": [asdict(row) for row in rows]}, file, indent=1)
