"""Tables as plain text, as Markdown, in a terminal with `rich`, and as HTML for notebooks."""

from __future__ import annotations

import html
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

_WIDTH = 100


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """Return an aligned text table: the first column left-aligned, the others right-aligned.

    Args:
        header: column titles.
        rows: rows of cells, one per column.
        total: whether the last row is a total, with a rule above it.

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


def range_of(cells: Iterable[str]) -> str:
    """Return the smallest and the largest of some numbers of one format, or the one that all are.

    >>> range_of(["0.500", "0.250"]), range_of(["0.250", "0.250"])
    ('0.250-0.500', '0.250')
    """
    ordered = sorted({*cells})
    return ordered[0] if len(ordered) == 1 else f"{ordered[0]}-{ordered[-1]}"


def counted(number: int, what: str) -> str:
    """Return a number with what is counted.

    >>> counted(1, "run"), counted(1200, "update")
    ('1 run', '1,200 updates')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def in_bytes(number: float) -> str:
    """Return a number of bytes in MB, or in kB where that would be 0.0 MB.

    >>> in_bytes(4_900_000), in_bytes(3_200)
    ('4.9 MB', '3.2 kB')
    """
    return f"{number / 1e6:.1f} MB" if number >= 5e4 else f"{number / 1e3:.1f} kB"


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]], total: bool = False) -> str:
    """Return a table for a notebook, which styles it.

    Args:
        header: column titles; an empty sequence leaves them out.
        rows: rows of cells, one per column.
        total: whether the last row is a total, in bold.

    >>> html_table((), [("a<b", "1")])
    '<table><tr><td style="text-align:left">a&lt;b</td><td>1</td></tr></table>'
    """
    lines = [("th", row) for row in ([header] if header else [])]
    lines += [("td", row) for row in rows]
    if total:
        lines[-1] = ("th", rows[-1])
    return f"<table>{''.join(_html_row(kind, row) for kind, row in lines)}</table>"


def _html_row(kind: str, row: Sequence[str]) -> str:
    styles = [' style="text-align:left"', *[""] * (len(row) - 1)]
    cells = [
        f"<{kind}{style}>{html.escape(cell)}</{kind}>"
        for cell, style in zip(row, styles, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"


@dataclass(frozen=True)
class Section:
    """A title, followed by a table, remarks, or both.

    Attributes:
        title: title of the section.
        header: column titles of the table; empty if there is no table.
        rows: rows of cells, one per column.
        remarks: paragraphs below the table.
    """

    title: str
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    remarks: Sequence[str] = ()


def as_text(sections: Sequence[Section]) -> str:
    """Return sections as text with aligned Markdown tables.

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
            paragraphs.append(_markdown_table(section.header, section.rows))
        paragraphs += [textwrap.fill(remark, _WIDTH) for remark in section.remarks]
    return "\n\n".join(paragraphs)


def show(sections: Sequence[Section]) -> None:
    """Print sections with rich on a terminal; as text elsewhere or if rich is not installed."""
    if not sys.stdout.isatty():
        print(as_text(sections))
        return
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(as_text(sections))
        return
    # Brackets in cells are text, not rich markup.
    console = Console(markup=False, highlight=False)
    for section in sections:
        console.print(section.title, style="bold")
        if section.header:
            table = Table()
            numeric = _numeric_columns(section.rows, len(section.header))
            for name, is_numeric in zip(section.header, numeric, strict=True):
                table.add_column(name, justify="right" if is_numeric else "left")
            for row in section.rows:
                table.add_row(*row)
            console.print(table)
        for remark in section.remarks:
            console.print(remark)
        console.print()


def _markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    numeric = _numeric_columns(rows, len(header))

    def line(row: Sequence[str]) -> str:
        columns = zip(row, widths, numeric, strict=True)
        return f"| {' | '.join(c.rjust(w) if n else c.ljust(w) for c, w, n in columns)} |"

    rule = ["-" * (w + 1) + (":" if n else "-") for w, n in zip(widths, numeric, strict=True)]
    return "\n".join([line(header), f"|{'|'.join(rule)}|", *map(line, rows)])


def _numeric_columns(rows: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Return which columns hold only numbers and empty cells, and at least one number."""
    cells = [[row[i] for row in rows if row[i]] for i in range(columns)]
    return [bool(column) and all(c.lstrip("+-")[0].isdigit() for c in column) for column in cells]
