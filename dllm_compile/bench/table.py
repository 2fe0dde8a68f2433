"""Print what contenders did, with rich where it is installed."""

from __future__ import annotations

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
        f"{row.gain:+.1f} +- {row.gain_error:.1f}" if row.right else "-",
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


def print_rows(title: str, rows: list[Row]) -> None:
    """Print a table to standard output."""
    lines = [cells(row) for row in rows]
    widths = [max(len(line[i]) for line in [_COLUMNS, *lines]) for i in range(len(_COLUMNS))]
    print(title)
    for line in [_COLUMNS, *lines]:
        first, *rest = [
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join([first, *rest]))
