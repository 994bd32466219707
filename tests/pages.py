"""The documentation pages, and the code blocks and commands in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name(page: Path) -> str:
    """A page's path in the repository, as the name of a test."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path, language: str) -> list[str]:
    """A page's ```language blocks, each padded with empty lines to keep its line numbers."""
    text = page.read_text(encoding="utf-8")
    return [
        "\n" * text.count("\n", 0, match.start(1)) + match[1]
        for match in re.finditer(
            rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL
        )
    ]


def outputs(page: Path) -> list[tuple[str, str]]:
    """The ```text blocks of a page that a comment `<!-- prints: ... -->` precedes.

    Each is given with what prints it: a command of this package, or a Python statement that
    follows on the code of docs/start.md.
    """
    text = page.read_text(encoding="utf-8")
    return re.findall(r"^<!-- prints: (.*?) -->\n```text\n(.*?)^```", text, flags=re.M | re.S)


def commands(page: Path) -> Iterator[str]:
    """The commands of a page's ```console blocks, one per line, without comments."""
    for block in blocks(page, "console"):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.sub(r"(^|\s)#.*", "", line).strip()
            if command:
                yield command


def inline_code(page: Path) -> list[str]:
    """The inline code of a page's text."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", text)]


def example(containing: str) -> dict[str, Any]:
    """The names defined by the only Python block that contains a text."""
    found = [code for page in PAGES for code in blocks(page, "python") if containing in code]
    (code,) = found
    defined: dict[str, Any] = {}
    exec(compile(code, containing, "exec"), defined)
    return defined
