"""One HTML file out of the template, its style and script, the story, and the plotting library."""

from __future__ import annotations

import html
import json
import os
import re
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

from sparse_lightning.history import read_history
from sparse_lightning.report.story import tell


def write_report(
    history: str | os.PathLike[str], output: str | os.PathLike[str], *, title: str | None = None
) -> dict[str, Any]:
    """Write the report of a training, all at once: one file that needs neither network nor server.

    Args:
        history: the file that the training recorded.
        output: the HTML file; one that is there is replaced.
        title: of the page; the names of the two folders that `history` lies in, if None.

    Returns:
        What the page shows, as `sparse_lightning.report.tell` returns it.

    Raises:
        ValueError: if `history` is something else, or holds nothing.
        RuntimeError: if plotly is not installed.
        OSError: if a file cannot be read or written.
    """
    history, output = Path(history), Path(output)
    library = plotting_library()
    story = tell(read_history(history), title or "/".join(history.resolve().parent.parts[-2:]))
    _write(output, render(story, library))
    return story


def render(story: dict[str, Any], library: str) -> str:
    """Return the page.

    Args:
        story: as `tell` returns it.
        library: plotly's JavaScript.
    """
    parts = {
        "title": html.escape(story["title"]),
        "style": _part("page.css"),
        "script": _part("page.js"),
        "library": library,
        # A name in it may hold "</script>" or "<!--", which would end the element.
        "story": json.dumps(story, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    # In one pass: what is put in is not looked through for more.
    return re.sub(r"\{\{ (\w+) \}\}", lambda match: parts[match[1]], _part("page.html"))


def plotting_library() -> str:
    """Return plotly's JavaScript.

    Raises:
        RuntimeError: if plotly is not installed.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise RuntimeError(
            "The report needs plotly, which is not installed. "
            "Install it with: pip install 'sparse-lightning[report]'"
        ) from error
    return str(get_plotlyjs())


def _part(name: str) -> str:
    return files("sparse_lightning.report").joinpath(name).read_text(encoding="utf-8")


def _write(path: Path, text: str) -> None:
    """Write a file at once: who opens it meanwhile finds the old one, or the whole new one."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        temporary = Path(folder, path.name)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
