"""``explain --html``: what the compiler found in a model, and what a loop computed, as one HTML page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .debug import Ran
from .explain import Explanation, Value

_COLOURS = (
    *("#3b6fb6", "#e08a2e", "#4f9d55", "#b5485d", "#7d5ba6", "#8a6d3b", "#2a9d9d", "#c06ec0", "#6b8e23", "#d2691e"),
)
"""Of row sets, in the order in which they are met; of more sets than colours, some share one."""
_NOTHING = "#eceff1"  # a value that is not computed
_LINE, _COLUMN, _LANES = 16, 104, 90  # heights, widths in pixels; room for the arcs between values
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 80rem; padding: 0 1rem; color: #1d2329 }
h1, h2 { font-weight: 600 } table { border-collapse: collapse } th, td { padding: .2rem .8rem; text-align: left }
tbody tr:nth-child(odd) { background: #f4f6f8 } td.number { text-align: right; font-variant-numeric: tabular-nums }
code, pre, svg text { font-family: ui-monospace, monospace; font-size: 12px } .wide { overflow-x: auto }
pre { white-space: pre-wrap } svg .axis { font-family: system-ui, sans-serif; fill: #56616c }
td.bars { white-space: nowrap }
.bar { display: inline-block; height: .7rem; background: #3b6fb6; margin-right: .4rem }
.key span { display: inline-block; width: .9rem; height: .9rem; margin: 0 .3rem 0 1rem; vertical-align: -.1rem }
"""


def page(title: str, found: Explanation, ran: Sequence[Ran]) -> str:
    """The page.

    Args:
        title: its heading.
        found: what :func:`dllm_compile.explain` returned.
        ran: the steps of a loop, of :func:`dllm_compile.debug.steps`.

    Returns:
        HTML that refers to nothing outside of itself and runs no script.
    """
    parts = [f"<h1>{escape(title)}</h1>", *_lines("Runs on plain Inductor", found.refused)]
    if ran:
        parts += [
            "<h2>Rows that each layer computes at each step</h2>",
            "<p>A row is one token of one sequence. One column a step of a loop that fills one token a step, one line "
            "a layer; the darker, the more rows.</p>",
            f'<div class="wide">{_heat(ran)}</div>',
        ]
    if found.variants:
        parts += ["<h2>Cost of each kind of step</h2>", _costs(found), *_lines("", found.more)]
    colours = _colours(found)
    for name, values in found.layers.items():
        parts += [
            f"<h2>Rows of each value of a layer: <code>{escape(name)}</code></h2>",
            "<p>One line a value, in the order of the computation, with an arc to each value that reads it; one column "
            "a kind of step. Where a value has more rows than what it is computed from, the others are read from what "
            "earlier steps kept.</p>",
            _key(values, colours),
            f'<div class="wide">{_graph(values, colours)}</div>',
        ]
    parts += _lines("Graphs that were found", found.graphs)
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{_head(title)}</head><body>\n{body}\n</body></html>\n'


def _lines(heading: str, lines: Sequence[str]) -> list[str]:
    """Lines of text under a heading; nothing where there are none."""
    if not lines:
        return []
    above = [f"<h2>{escape(heading)}</h2>"] if heading else []
    return [*above, *[f"<pre>{escape(line)}</pre>" for line in lines]]


def _costs(found: Explanation) -> str:
    rows = []
    for name, variant in found.variants.items():
        share = found.relative[name]
        sets = "".join(f"<td>{escape(rows.name)}</td>" for rows in (variant.query, variant.key, variant.value))
        bar = f'<span class="bar" style="width:{120 * min(share, 1.5):.0f}px"></span>'
        peak = f"{found.peak_bytes[name] / 2**20:,.2f}"
        formula = f"<code>{escape(str(found.flops[name]))}</code>"
        rows.append(
            f'<tr><td>{escape(name)}</td>{sets}<td class="bars">{bar}{share:.3f}</td>'
            f'<td class="number">{peak}</td><td>{formula}</td></tr>'
        )
    heads = ("kind of step", "query", "key", "value", "FLOPs relative to eager", "peak MiB", "FLOPs")
    at = ", ".join(found.meanings())
    return (
        f'<div class="wide"><table><thead><tr>{"".join(f"<th>{head}</th>" for head in heads)}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        "<p>Query, key and value: the rows that these are computed for. An eager step computes logits of every row, a "
        f"step of this backend those that a sampler may read. At {escape(at)}. Kept between steps: "
        f"<code>{escape(str(found.state_bytes))}</code> bytes.</p>"
    )


def _head(title: str) -> str:
    return (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style>"
    )


def _colours(found: Explanation) -> dict[str, str]:
    """A colour for each row set that occurs."""
    names = dict.fromkeys(n for values in found.layers.values() for value in values for n in value.rows.values())
    names.pop("none", None)
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)} | {"none": _NOTHING}


def _key(values: Sequence[Value], colours: dict[str, str]) -> str:
    """A legend of the colours of a layer."""
    names = dict.fromkeys(name for value in values for name in value.rows.values())
    marks = [f'<span style="background:{colours[name]}"></span>{escape(name)}' for name in names]
    return f'<p class="key">{"".join(marks)}</p>'


def _graph(values: Sequence[Value], colours: dict[str, str]) -> str:
    """A layer: arcs on the left, names, then a column of colours a kind of step."""
    place = {value.name: i for i, value in enumerate(values)}
    names = max(len(f"{value.name}  {value.operation}") for value in values)
    left = _LANES + 8 + 7.4 * names
    variants = list(values[0].rows)
    drawn = [
        f'<text x="{left + i * _COLUMN + _COLUMN / 2:.0f}" y="12" text-anchor="middle">{escape(name)}</text>'
        for i, name in enumerate(variants)
    ]
    for value in values:
        y = 20 + place[value.name] * _LINE
        drawn.append(f'<text x="{_LANES + 4}" y="{y + 12}">{escape(value.name)}  {escape(value.operation)}</text>')
        drawn += [
            f'<rect x="{left + i * _COLUMN:.0f}" y="{y + 1}" width="{_COLUMN - 3}" height="{_LINE - 2}" '
            f'fill="{colours[rows]}"><title>{escape(f"{value.name} in {name}: {rows}")}</title></rect>'
            for i, (name, rows) in enumerate(value.rows.items())
        ]
        for operand in value.reads:
            if operand not in place:
                continue  # it enters from the part before
            above, below = 20 + place[operand] * _LINE + _LINE / 2, y + _LINE / 2
            out = _LANES - min(8 + 3 * (place[value.name] - place[operand]), _LANES - 4)
            drawn.append(
                f'<path d="M{_LANES} {above:.0f} C{out} {above:.0f} {out} {below:.0f} {_LANES} {below:.0f}" '
                'fill="none" stroke="#9aa5b1"/>'
            )
    width, height = left + len(variants) * _COLUMN, 24 + len(values) * _LINE
    return f'<svg width="{width:.0f}" height="{height}" role="img">{"".join(drawn)}</svg>'


def _heat(ran: Sequence[Ran]) -> str:
    """Steps from left to right, layers from below; the darker a cell, the more rows."""
    layers = max((len(step.computed) for step in ran), default=0)
    most = max((rows for step in ran for rows in step.computed.values()), default=1) or 1
    wide = max(4, min(18, 1000 // max(len(ran), 1)))
    drawn = [
        f'<rect x="{40 + i * wide}" y="{(layers - 1 - layer) * _LINE}" width="{wide - 1}" height="{_LINE - 1}" '
        f'fill="{_shade(rows / most)}">'
        f"<title>step {step.number} ({escape(step.name)}), layer {layer}: {rows} rows a sequence</title></rect>"
        for i, step in enumerate(ran)
        for layer, rows in step.computed.items()
    ]
    drawn += [
        _axis(34, (layers - 1 - layer) * _LINE + 12, "end", str(layer))
        for layer in range(0, layers, 1 if layers <= 16 else 4)
    ]
    bottom = layers * _LINE + 14
    every = next(n for n in (1, 5, 10, 50, 100, 1000) if n * wide >= 30 or n == 1000)
    drawn += [_axis(40 + i * wide + wide // 2, bottom, "middle", str(i)) for i in range(0, len(ran), every)]
    turned = f"translate(12 {layers * _LINE / 2:.0f}) rotate(-90)"
    drawn.append(f'<text class="axis" transform="{turned}" text-anchor="middle">layer</text>')
    drawn.append(_axis(40, bottom + 18, "start", "step"))
    shown = sorted({0, round(most / 4), round(most / 2), most})
    for i, rows in enumerate(shown):
        x = 100 + i * 110
        drawn.append(f'<rect x="{x}" y="{bottom + 7}" width="14" height="14" fill="{_shade(rows / most)}"/>')
        drawn.append(_axis(x + 20, bottom + 18, "start", f"{rows} rows"))
    width = max(44 + len(ran) * wide, 100 + len(shown) * 110)
    return f'<svg width="{width}" height="{bottom + 28}" role="img">{"".join(drawn)}</svg>'


def _shade(share: float) -> str:
    """The colour of a share of all rows."""
    return f"hsl(213 50% {94 - 64 * share:.0f}%)"


def _axis(x: float, y: float, anchor: str, text: str) -> str:
    return f'<text class="axis" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
