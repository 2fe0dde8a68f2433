"""Print what contenders did, with rich where it is installed."""

from __future__ import annotations

from collections.abc import Sequence

from .contest import Row

_COLUMNS = (
    *("", "exact", "beyond eager", "tokens/s", "x eager", "cheaper calls", "fewer calls", "x inductor", "FLOPs/step"),
    *("forwards", "compile s", "same tokens"),
)


def cells(row: Row) -> tuple[str, ...]:
    """One row as text."""
    return (
        row.name,
        "-" if row.accuracy is None else f"{100 * row.accuracy:.1f} %",
        "-" if not row.right else f"{row.gain:+.1f}" + ("" if row.gain_error is None else f" +- {row.gain_error:.1f}"),
        f"{row.tokens_per_second:.1f}",
        f"{row.vs_eager:.2f}",
        f"{row.cheaper:.2f}",
        f"{row.fewer:.2f}",
        f"{row.vs_inductor:.2f}",
        f"{row.flops:.3f}",
        str(row.forwards),
        f"{row.compile_seconds:.1f}",
        f"{100 * row.same_tokens:.1f} %",
    )


def aligned(lines: Sequence[Sequence[str]], left: Sequence[str] = ("",)) -> str:
    """Lines of cells as text, headings first: to the right, but columns with a heading of ``left`` to the left."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    to_left = [heading in left for heading in lines[0]]
    shown = [
        "  ".join(c.ljust(w) if at else c.rjust(w) for c, w, at in zip(line, widths, to_left, strict=True)).rstrip()
        for line in lines
    ]
    return "\n".join(shown)


def print_rows(title: str, rows: list[Row]) -> None:
    """Print a table to standard output."""
    print(title)
    print(aligned([_COLUMNS, *map(cells, rows)]))
