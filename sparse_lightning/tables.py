"""Tables for people: plain text, Markdown, and in a terminal what `rich` makes of them."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH = 100


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


@dataclass(frozen=True)
class Section:
    """A title, and below it a table, remarks, or both.

    Attributes:
        title: of the section.
        header: of the table; none without it.
        rows: as many cells each.
        remarks: sentences, a paragraph each.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()


def as_text(sections: Sequence[Section]) -> str:
    """Return sections as text, with tables that are aligned, and Markdown.

    >>> print(as_text([Section("Costs", ["layer", "size"], [["up", "10"]], ["It is small."])]))
    Costs
    <BLANKLINE>
    | layer | size |
    |-------|-----:|
    | up    |   10 |
    <BLANKLINE>
    It is small.
    """
    paragraphs = []
    for section in sections:
        paragraphs.append(section.title)
        if section.header:
            paragraphs.append(_table(section.header, section.rows))
        paragraphs += [textwrap.fill(remark, _WIDTH) for remark in section.remarks]
    return "\n\n".join(paragraphs)


def show(sections: Sequence[Section]) -> None:
    """Print sections, by rich on a terminal; as text elsewhere, or without rich."""
    if not sys.stdout.isatty():
        print(as_text(sections))
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(as_text(sections))
        return
    # What is in brackets is text, and stays.
    console = Console(markup=False, highlight=False)
    for section in sections:
        console.print(section.title, style="bold")
        if section.header:
            table = Table()
            right = _of_numbers(section.rows, len(section.header))
            for name, is_right in zip(section.header, right, strict=True):
                table.add_column(name, justify="right" if is_right else "left")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for remark in section.remarks:
            console.print(remark)
        console.print()


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    right = _of_numbers(rows, len(header))

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, right, strict=True)
        return f"| {' | '.join(c.rjust(w) if r else c.ljust(w) for c, w, r in columns)} |"

    rule = ["-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def _of_numbers(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Tell which columns hold numbers, and perhaps nothing in some rows."""
    cells = [[row[i] for row in rows if row[i]] for i in range(columns)]
    return [bool(column) and all(c.lstrip("+-")[0].isdigit() for c in column) for column in cells]
