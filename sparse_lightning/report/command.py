"""Options and output of `sparse-lightning report`."""

from __future__ import annotations

import argparse
import os
import re
import webbrowser
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_lightning.files import check_writable
from sparse_lightning.history import History, read_history
from sparse_lightning.report.film import write_film
from sparse_lightning.report.page import write_comparison, write_report
from sparse_lightning.tables import counted, in_bytes, text_table

_HISTORIES = "pattern*.history"
_NUMBERED = re.compile(r"pattern-(\d+)\.")  # with the number of one of several callbacks

EXAMPLES = """the page of a run:
  an animation of each layer's block mask, coloured by presence, age or score; curves of density,
  churn, survival and the logged metrics; a table of the layers. The single file needs no network
  and can be shared.

the page of several runs:
  a table with the options in which they differ, density, FLOPs, weights, time and a metric; the
  metric over each of these; the runs' curves together, and their masks side by side. A run is a
  folder with a history; of several histories in a folder, the newest counts.

keys on the page of a run:
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
  the comparison of all runs of a sweep, written to the sweep's folder:
    sparse-lightning report multirun/2026-12-01/12-00-00
  the comparison of two runs, written to the folder that holds both:
    sparse-lightning report lightning_logs/version_0 lightning_logs/version_3
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("run_dir", type=Path, nargs="+", metavar="RUN_DIR",
        help="folder of a training or of several, such as a sweep, or a history file; several runs "
        "are compared")  # fmt: skip
    files = parser.add_mutually_exclusive_group()
    files.add_argument("--output", type=Path, metavar="FILE",
        help="default: report.html in RUN_DIR, or in the folder that holds all of several; an "
        "existing file is replaced")  # fmt: skip
    files.add_argument("--film", type=Path, metavar="FILE",
        help="instead of the page, write block masks over the training of one run: as a strip if "
        "FILE ends in .png, as an animation if it ends in .gif; needs pillow")  # fmt: skip
    add("--layer", action="append", default=[], metavar="NAME",
        help="show this layer in the film; may be repeated (default: four layers)")  # fmt: skip
    add("--open", action="store_true", help="open what was written in a browser")


def run(options: argparse.Namespace) -> None:
    """Write the page or the film of a run, or the page of several, and print a summary.

    Raises:
        ValueError: for wrong options, if there is no history, or if the file cannot be written.
        RuntimeError: if plotly, or pillow for a film, is not installed.
    """
    if options.layer and not options.film:
        raise ValueError("`--layer` must come with `--film`: the page shows all layers.")
    found = [find_runs(path) for path in options.run_dir]
    by_file = {run.resolve(): run for each in found for run in each.runs}
    runs = list(by_file.values())
    if options.film and len(runs) > 1:
        raise ValueError(
            f"`--film` must have one run; got {len(runs)}: {', '.join(named_runs(runs))}."
        )
    folder = common_folder(options.run_dir)
    output = options.film or options.output or folder / "report.html"
    check_writable(output, "--film" if options.film else "--output")
    if options.film:
        _print_written(output, runs[0], write_film(runs[0], output, options.layer))
    elif len(runs) == 1:
        _print_written(output, runs[0], write_report(runs[0], output))
    else:
        _write_comparison(runs, folder, output)
    for title, histories in (
        ("Histories of other callbacks of a run", [p for each in found for p in each.others]),
        ("Older histories", [path for each in found for path in each.older]),
    ):
        _print_list(
            f"{title}; name a file to show it instead:",
            list(dict.fromkeys(str(p) for p in histories if p.resolve() not in by_file)),
        )
    _print_list(
        "Histories that were left out, because they cannot be read:",
        list(dict.fromkeys(error for each in found for error in each.errors)),
    )
    if options.open and not webbrowser.open(output.resolve().as_uri()):
        print("No browser was found. Open the file manually.")


def _print_written(output: Path, history: Path, data: Mapping[str, Any]) -> None:
    first, last = data["steps"]
    print(
        f"Wrote {output}: {counted(len(data['layers']), 'layer')}, "
        f"{counted(data['updates'], 'update')}, steps {first:,} to {last:,}, "
        f"{in_bytes(output.stat().st_size)}, from {history}"
    )
    if data["gaps"]:
        print(f"This history is incomplete. {data['gaps']}")


def _write_comparison(histories: Sequence[Path], folder: Path, output: Path) -> None:
    title = "/".join(folder.resolve().parts[-2:])
    data = write_comparison(named_runs(histories), output, title=title)
    runs, metric = data["runs"], data["metric"]
    size = in_bytes(output.stat().st_size)
    print(f"Wrote {output}: {counted(len(runs), 'run')}, {size}, from {folder}")
    # What each run has, by column. A value of None is missing.
    columns: list[dict[str, Any]] = [
        dict(zip(data["options"], run["options"], strict=True))
        | {"density": run["density"]}
        | ({f"last {metric}": run["metrics"].get(metric, {}).get("last")} if metric else {})
        for run in runs
    ]
    rows = [
        (run["name"], *map(_cell, values.values()))
        for run, values in zip(runs, columns, strict=True)
    ]
    print(text_table(("run", *columns[0]), rows))
    if metric is None:
        print("No run logged a metric.")
    lacking: dict[str, list[str]] = {}
    for run, values in zip(runs, columns, strict=True):
        lacks = [
            name for name, value in {**values, "time": run["seconds"]}.items() if value is None
        ]
        if lacks:
            lacking.setdefault(", ".join(lacks), []).append(run["name"])
    _print_list(
        "Values that a history lacks:",
        [f"{lacks}: not in {', '.join(names)}" for lacks, names in lacking.items()],
    )
    _print_list(
        "Incomplete histories:", [f"{run['name']}: {run['gaps']}" for run in runs if run["gaps"]]
    )


def _print_list(title: str, lines: Sequence[str]) -> None:
    """Print a title and its lines, if there are any."""
    if lines:
        print(title, *(f"  {line}" for line in lines), sep="\n")


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class FoundRuns:
    """The histories at or below a path.

    Attributes:
        runs: history of each run, at least one.
        others: histories that other `SparsityCallback`s of these runs wrote, newest first.
        older: other histories that are not runs of their own, newest first.
        errors: a sentence about each run whose history cannot be read.
    """

    runs: list[Path]
    others: list[Path] = field(default_factory=list)
    older: list[Path] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def find_runs(path: Path) -> FoundRuns:
    """Return the runs at or below a path.

    A run is a folder with a history; the newest of several counts. A run that was resumed in
    another folder, whose history begins with a copy of the earlier one, is one run: the longer one.

    Raises:
        ValueError: if there are none, or if the histories of several cannot be read.
    """
    newest: dict[Path, Path] = {}
    others: list[Path] = []
    older: list[Path] = []
    errors: list[str] = []
    for history in find_histories(path):
        first = newest.setdefault(history.parent, history)
        if first != history:
            (others if _is_of_same_run(first, history) else older).append(history)
    if len(newest) == 1:  # it is read once, when it is shown
        return FoundRuns([*newest.values()], others, older)
    starts: dict[Path, list[str]] = {}
    for history in newest.values():
        try:
            starts[history] = read_history(history).runs
        except ValueError as error:
            errors.append(str(error))
    if not starts:
        raise ValueError(errors[0])
    earlier = {start for ids in starts.values() for start in ids[:-1]}
    older += [history for history, ids in starts.items() if ids[-1] in earlier]
    runs = [history for history, ids in starts.items() if ids[-1] not in earlier]
    return FoundRuns(runs, others, older, errors)


def _is_of_same_run(a: Path, b: Path) -> bool:
    """Return whether two callbacks of one training wrote two histories in a folder.

    Several callbacks number their files, and write them at the same time.
    """
    numbers = [_NUMBERED.match(path.name) for path in (a, b)]
    if not all(numbers) or len({match and match[1] for match in numbers}) == 1:
        return False
    try:
        (a_start, a_end), (b_start, b_end) = (_time_span(read_history(path)) for path in (a, b))
    except ValueError:  # one of them cannot be read
        return False
    return a_start < b_end and b_start < a_end


def _time_span(history: History) -> tuple[float, float]:
    """Return the Unix times of the first and the last record."""
    times = [frame.seconds for frame in history.frames]
    times += [metrics.seconds for metrics in history.metrics]
    return min(times), max(times)


def common_folder(paths: Sequence[Path]) -> Path:
    """Return the innermost folder that holds all paths, relative if they are; a single one itself.

    >>> str(common_folder([Path("logs/a"), Path("logs/b")])).replace(os.sep, "/")
    'logs'
    """
    folders = [path if path.is_dir() else path.parent for path in paths]
    if len(folders) == 1:
        return folders[0]
    common = os.path.commonpath([os.path.abspath(folder) for folder in folders])
    is_absolute = any(folder.is_absolute() for folder in folders)
    return Path(common if is_absolute else os.path.relpath(common))


def named_runs(histories: Sequence[Path]) -> dict[str, Path]:
    """Return histories by the names of their runs, in the order of the names.

    A name is the path of the history in the innermost folder that holds all of them, without the
    file name and the folders at its end that it shares with all others.

    >>> sweep = [Path(f"sweep/{i}/logs/version_0/pattern.history") for i in (10, 2)]
    >>> list(named_runs(sweep))
    ['2', '10']
    """
    folder = os.path.commonpath([os.path.abspath(history.parent) for history in histories])
    parts = [Path(os.path.relpath(history, folder)).parts for history in histories]
    shared = 0
    # Only the file name may be all there is of a path: that of a run in the common folder itself.
    while len({path[-shared - 1 :] for path in parts}) == 1 and (
        shared == 0 or shared + 1 < min(map(len, parts))
    ):
        shared += 1
    names = ["/".join(path[: len(path) - shared]) or "." for path in parts]
    named = zip(names, histories, strict=True)
    return dict(sorted(named, key=lambda run: _natural_order(run[0])))


def _natural_order(name: str) -> list[str | float]:
    """Return the key that sorts names with their numbers as numbers: 2 before 10, .05 before .5."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


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
            "callback, in whose folder it is written. A training with Transformers' Trainer or a "
            "loop of your own has none."
        )
    return found
