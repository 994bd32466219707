"""Options and output of `sparse-lightning report`."""

from __future__ import annotations

import argparse
import webbrowser
from pathlib import Path

from sparse_lightning.files import check_writable
from sparse_lightning.report.film import write_film
from sparse_lightning.report.page import write_report

_HISTORIES = "pattern*.history"

EXAMPLES = """the page:
  an animation of each layer's block mask, coloured by presence, age or score; curves of density,
  churn, survival and the logged metrics; a table of the layers. The single file needs no network
  and can be shared.

keys on the page:
  space starts and stops the animation; left and right change the frame, up and down the layer; in
  the large mask, the arrow keys move from block to block

examples:
  the page of a run, written to RUN_DIR/report.html and opened in a browser:
    sparse-lightning report lightning_logs/version_0 --open
  the page of one history in a folder with several:
    sparse-lightning report outputs/a/pattern.history --output a.html
  the masks of four layers at six steps, and an animation of one layer:
    sparse-lightning report lightning_logs/version_0 --film masks.png
    sparse-lightning report lightning_logs/version_0 --film mask.gif --layer blocks.0.mlp.0
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("run_dir", type=Path, metavar="RUN_DIR",
        help="folder of a training, whose newest history is used, or a history file")  # fmt: skip
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--output", type=Path, metavar="FILE",
        help="default: report.html in RUN_DIR; an existing file is replaced")  # fmt: skip
    files.add_argument("--film", type=Path, metavar="FILE",
        help="instead of the page, write block masks over the training: as a strip if FILE ends in "
        ".png, as an animation if it ends in .gif; needs pillow")  # fmt: skip
    add("--layer", action="append", default=[], metavar="NAME",
        help="show this layer in the film; may be repeated (default: four layers)")  # fmt: skip
    add("--open", action="store_true", help="open what was written in a browser")


def run(options: argparse.Namespace) -> None:
    """Write the page or the film and print a summary.

    Raises:
        ValueError: for wrong options, if there is no history, or if the file cannot be written.
        RuntimeError: if plotly, or pillow for a film, is not installed.
    """
    if options.layer and not options.film:
        raise ValueError("`--layer` must come with `--film`: the page shows all layers.")
    path = options.run_dir
    history, *others = find_histories(path)
    folder = path if path.is_dir() else path.parent
    output = options.film or options.output or folder / "report.html"
    check_writable(output, "--film" if options.film else "--output")
    if options.film:
        data = write_film(history, output, options.layer)
    else:
        data = write_report(history, output)
    first, last = data["steps"]
    print(
        f"Wrote {output}: {len(data['layers'])} layers, {data['updates']} updates, "
        f"steps {first:,} to {last:,}, {output.stat().st_size / 1e6:.1f} MB, from {history}"
    )
    if data["gaps"]:
        print(f"This history is incomplete. {data['gaps']}")
    if others:
        print("Older histories; name a file to show it instead:")
        for other in others:
            print(f"  {other}")
    if options.open and not webbrowser.open(output.resolve().as_uri()):
        print("No browser was found. Open the file manually.")


def find_histories(path: Path) -> list[Path]:
    """Return the histories at or below a path, newest first.

    Raises:
        ValueError: if there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(
            f"`RUN_DIR` must be the folder of a training, or a history file; got '{path}', "
            "which does not exist."
        )
    found = sorted(path.rglob(_HISTORIES), key=lambda file: (-file.stat().st_mtime, str(file)))
    if not found:
        raise ValueError(
            f"`RUN_DIR` must hold a pattern.history, directly or in a subfolder; got '{path}' "
            "without one. SparsityCallback records it during training: keep the defaults of "
            "`monitor` and `monitor.record`, and give the trainer a logger or a checkpoint "
            "callback, in whose folder it is written."
        )
    return found
