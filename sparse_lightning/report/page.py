"""Render a page: one HTML file with the template, style, script, data and plotting library."""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparse_lightning.files import write_text
from sparse_lightning.history import read_history
from sparse_lightning.masks import COLOURS
from sparse_lightning.report.page_data import page_data
from sparse_lightning.report.runs_data import runs_data


def write_report(
    history: str | os.PathLike[str], output: str | os.PathLike[str], *, title: str | None = None
) -> dict[str, Any]:
    """Write the page of a training atomically: one file that needs neither network nor server.

    Args:
        history: history file recorded by the training.
        output: HTML file to write; an existing file is replaced.
        title: title of the page; if None, the names of the two innermost folders of `history`.

    Returns:
        The data shown on the page, as primitives.

    Raises:
        ValueError: if `history` is not a history file, or holds no masks.
        RuntimeError: if plotly is not installed.
        OSError: if a file cannot be read or written.
    """
    history, output = Path(history), Path(output)
    library = plotting_library()
    title = title or "/".join(history.resolve().parent.parts[-2:])
    data = page_data(read_history(history), title)
    write_text(output, render(data, library))
    return data


def write_comparison(
    histories: Mapping[str, str | os.PathLike[str]],
    output: str | os.PathLike[str],
    *,
    title: str = "Comparison",
) -> dict[str, Any]:
    """Write the page that compares several trainings atomically, as one file like that of a run.

    Args:
        histories: history files by the name of the run, in the order in which they are shown.
        output: HTML file to write; an existing file is replaced.
        title: title of the page.

    Returns:
        The data shown on the page, as primitives.

    Raises:
        ValueError: if a file is not a history file, or holds no masks.
        RuntimeError: if plotly is not installed.
        OSError: if a file cannot be read or written.
    """
    library = plotting_library()
    data = runs_data({name: Path(history) for name, history in histories.items()}, title)
    write_text(Path(output), render(data, library, "runs.html"))
    return data


def render(data: dict[str, Any], library: str, template: str = "page.html") -> str:
    """Return the HTML of a page.

    Args:
        data: the result of `page_data`, or of `runs_data` for the template "runs.html".
        library: plotly's JavaScript.
        template: name of the file whose placeholders are replaced by values or by other files.
    """
    values = {
        "title": html.escape(data["title"]),
        "colours": _block_colours(),
        "library": library,
        # A name can contain "</script>" or "<!--", which would end the element.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # A single pass does not expand placeholders in the inserted text.
    return re.sub(
        r"\{\{ ([\w.]+) \}\}",
        lambda match: values[match[1]] if match[1] in values else _part(match[1]),
        _part(template),
    )


def plotting_library() -> str:
    """Return plotly's JavaScript.

    Raises:
        RuntimeError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RuntimeError(
            "This page needs plotly, which is not installed. "
            "Install it with: pip install 'sparse-lightning[report]'"
        ) from error
    return str(get_plotlyjs())


def _block_colours() -> str:
    """Return the colours of blocks in each theme as CSS variables."""
    rules = []
    for theme, colours in COLOURS.items():
        variables = " ".join(f"--{state}: {colour};" for state, colour in colours.items())
        rules.append(f':root[data-theme="{theme}"] {{ {variables} }}\n')
    return "".join(rules)


def _part(name: str) -> str:
    return files("sparse_lightning.report").joinpath(name).read_text(encoding="utf-8")
