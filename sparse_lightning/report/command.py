"""The options of `sparse-lightning report`, and what it prints."""

from __future__ import annotations

import argparse
import os
import webbrowser
from pathlib import Path

from sparse_lightning.report.page import write_report

_HISTORIES = "pattern*.history"

EXAMPLES = """the page:
  a film of each layer's block mask, by presence, age or score; curves of density, churn, survival
  and all that the training logged; a table of the layers. Everything is in the one file: it opens
  without a network, and can be sent to somebody.

keys on the page:
  space plays; left and right change the frame, up and down the layer; in the large mask, the arrows
  move from block to block

examples:
  of a run, as RUN_DIR/report.html, opened in a browser:
    sparse-lightning report lightning_logs/version_0 --open
  of one of several histories below a folder:
    sparse-lightning report outputs/a/pattern.history --output a.html
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR",
        help="folder of a training: the newest history in it or below is taken. Or a history's "
        "own file")  # fmt: skip
    add("--output", type=Path, metavar="FILE",
        help="default: report.html in RUN_DIR; one that is there is replaced")  # fmt: skip
    add("--open", action="store_true", help="show the page in a browser")


def run(options: argparse.Namespace) -> None:
    """Write the page, and print what it is of.

    Raises:
        ValueError: if there is no history, or no place for the page.
        RuntimeError: if plotly is not installed.
    """
    given = options.run_dir
    history, *others = find_histories(given)
    folder = given if given.is_dir() else given.parent
    output = options.output or folder / "report.html"
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        raise ValueError(
            f"`--output` must be a file in a folder that can be written to; got '{output}'."
        )
    story = write_report(history, output)
    first, last = story["steps"]
    print(
        f"Wrote {output}: {len(story['layers'])} layers, {story['updates']} updates, "
        f"steps {first:,} to {last:,}, {output.stat().st_size / 1e6:.1f} MB, from {history}"
    )
    if others:
        print("Older histories, of which a report can be written by naming the file:")
        for other in others:
            print(f"  {other}")
    if options.open and not webbrowser.open(output.resolve().as_uri()):
        print("No browser was found: open the file yourself.")


def find_histories(path: Path) -> list[Path]:
    """Return the histories at or below a path, the newest first.

    Raises:
        ValueError: if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"`RUN_DIR` must be the folder of a training, or a history's file; got '{path}', "
            "which is not there."
        )
    found = sorted(path.rglob(_HISTORIES), key=lambda file: (-file.stat().st_mtime, str(file)))
    if not found:
        raise ValueError(
            f"`RUN_DIR` must hold a pattern.history, in it or below; got '{path}' without one. "
            "SparsityCallback records it while it trains: leave `monitor` and `monitor.record` as "
            "they are by default, and give the trainer a logger or a checkpoint callback, in whose "
            "folder it lies."
        )
    return found
