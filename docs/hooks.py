"""Adds pages and pictures from the repository's root to the site."""

from __future__ import annotations

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md")
PICTURES = ("examples/masks.png", "examples/speed.png")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files as if they were in `docs/`."""
    root = Path(config.config_file_path).parent
    for name in PAGES:
        text = (root / name).read_text(encoding="utf-8").replace("](docs/", "](")
        files.append(File.generated(config, name, content=text))
    for name in PICTURES:
        files.append(File.generated(config, name, abs_src_path=str(root / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite links to these files, which are one folder further up in the repository."""
    for name in (*PAGES, *PICTURES):
        markdown = markdown.replace(f"../{name}", name)
    return markdown
