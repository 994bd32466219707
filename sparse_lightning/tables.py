"""Tables for people: plain text, and in a terminal what `rich` makes of them."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """Return an aligned table: the first column to the left, the others to the right.

    Args:
        header: a title a column.
        rows: a cell a column.
        total: whether the last row sums up the others, and stands apart.

    >>> print(text_table(("layer", "blocks"), [("fc", "8"), ("total", "8")], total=True))
    layer  blocks
    -------------
    fc          8
    -------------
    total       8
    """
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    rule = "-" * len(line(header))
    lines = [line(header), rule, *map(line, rows)]
    if total:
        lines.insert(-1, rule)
    return "\n".join(lines)


def print_table(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False
) -> None:
    """Print a table: in colours where the output is a terminal and `rich` is installed.

    Args:
        title: a line above it.
        header, rows, total: as for `text_table`.
    """
    if sys.stdout.isatty():
        try:
            from rich import box
            from rich.console import Console
            from rich.table import Table
            from rich.text import Text
        except ImportError:
            pass
        else:
            table = Table(
                title=title,
                title_style="bold",
                title_justify="left",
                box=box.SIMPLE_HEAD,
                pad_edge=False,
            )
            for i, name in enumerate(header):
                table.add_column(
                    name, justify="right" if i else "left", no_wrap=i > 0, overflow="fold"
                )
            for i, row in enumerate(rows):
                if total and i == len(rows) - 1:
                    table.add_section()
                table.add_row(*map(Text, row), style="bold" if total and row is rows[-1] else "")
            Console().print(table)
            return
    print(f"{title}\n{text_table(header, rows, total)}")
