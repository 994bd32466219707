"""Terminal output: swap report, schedule, metrics in the progress bar, and summary of a training.

The swap report and the summary are tables in a terminal or notebook, and one log line elsewhere.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities import rank_zero_info

from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.measures import count_dead_features, model_churn
from sparse_lightning.observers.summary import FitSummary
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.swap_report import DEAD_FEATURES, WEIGHT_DENSITY, SparsityReport

if TYPE_CHECKING:
    from rich.console import RenderableType


_MOST_LEFT_DENSE = 8  # layers, or groups of layers, that a table's caption names


class Terminal(Observer):
    """Shows density, churn and dead features in Lightning's progress bar.

    The density covers all layers, and is followed by that at the end of the schedule while it
    differs; churn is the share of present blocks that the latest update grew. Churn, and the dead
    outputs and unread inputs if there are any, are shown for each callback if the trainer has
    several.
    """

    def start(self, fit: Fit) -> None:
        _show_in_progress_bar(fit, {})

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        _show_in_progress_bar(fit, {_labelled("churn", fit): model_churn(update)})


def _show_in_progress_bar(fit: Fit, metrics: Mapping[str, float]) -> None:
    # `self.log` would add these short names to the metrics of loggers and callbacks too.
    if fit.trainer.progress_bar_callback is None:
        return
    shown: dict[str, Any] = fit.trainer.progress_bar_metrics
    now, final = f"{fit.density:.3f}", f"{fit.target_density:.3f}"
    shown["density"] = fit.density if now == final else f"{now} → {final}"
    shown.update(metrics)
    for name in DEAD_FEATURES:
        shown.pop(_labelled(name, fit), None)
    dead = count_dead_features(fit.layers, fit.masks)
    # As text, since rich's bar shows numbers with three decimals.
    shown.update({_labelled(name, fit): str(count) for name, count in dead.items()})


def _labelled(name: str, fit: Fit) -> str:
    return f"{name} {fit.label}" if fit.label else name


def show_report(report: SparsityReport, callback: str = "") -> None:
    """Show the swap report on this rank.

    Args:
        report: the report.
        callback: description of the `SparsityCallback` if the trainer has several, else "".
    """
    header, rows = report.table()
    totals = dict(zip(header, rows[-1], strict=True))
    suffix = f" ({callback})" if callback else ""
    more = "".join(
        f"; {name} {totals[name]}" for name in (WEIGHT_DENSITY, *DEAD_FEATURES) if name in totals
    )
    line = (
        f"Block-sparse layers{suffix}: {len(report.layers)}; linear layers left dense: "
        f"{len(report.skipped)}; density {report.density_text}{more}; parameters "
        f"{totals['before']} -> {totals['parameters']}."
    )
    copies = "; ".join(f"{copy} follows {source}" for copy, source in report.follows.items())
    line = " ".join(part for part in (line, copies and f"{copies}.", report.coverage_note) if part)
    _show(f"{report}\n{callback}".rstrip(), line, lambda: _report_table(report, suffix))


def show_schedule(sparsifier: Sparsifier, callback: str = "") -> None:
    """Log, on rank 0, which topology updates a training that starts will make.

    Args:
        sparsifier: the engine, attached to the optimizers.
        callback: description of the `SparsityCallback` if the trainer has several, else "".
    """
    suffix = f" ({callback})" if callback else ""
    text = sparsifier.describe_schedule()
    if sparsifier.has_ended:
        density = f"{sparsifier.density:.3f}"
        text += (
            f" at density {density}. To move them again, fit this model, without `ckpt_path`, with "
            f"a new SparsityCallback whose densities are at most {density}"
        )
    rank_zero_info(f"Block-sparse training{suffix}: {text}.")


def show_summary(summary: FitSummary, callback: str = "") -> None:
    """Show the summary of a training on this rank.

    Args:
        summary: the summary.
        callback: description of the `SparsityCallback` if the trainer has several, else "".
    """
    line = "; ".join(f"{label} {text}" for label, text in summary.rows())
    suffix = f" ({callback})" if callback else ""
    _show(
        f"{summary}\n{callback}".rstrip(),
        f"Block-sparse training{suffix} has ended: {line}.",
        lambda: _summary_panel(summary, suffix),
    )


def _show(text: str, line: str, render: Callable[[], RenderableType]) -> None:
    """Print a rich table, or plain text without rich; log one line if there is no terminal."""
    # An active progress bar of rich replaces stdout; notebooks count as terminals.
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    if not (stdout.isatty() or _is_in_notebook()):
        rank_zero_info(line)
        return
    try:
        from rich.console import Console
    except ImportError:
        print(text)
        return
    console = Console(force_terminal=True, force_jupyter=False)
    # `print` rather than the console: active progress bars make room for printed text.
    with console.capture() as capture:
        console.print(render())
    print(capture.get(), end="", flush=True)


def _is_in_notebook() -> bool:
    """Return whether a Jupyter kernel runs this code, rather than a program that imports one."""
    ipython = sys.modules.get("IPython")
    return ipython is not None and hasattr(ipython.get_ipython(), "kernel")


def _report_table(report: SparsityReport, suffix: str) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    (name_column, *number_columns), (*rows, total) = report.table()
    table = Table(
        title=Text(f"Block-sparse layers{suffix}"), box=box.SIMPLE_HEAD, title_justify="left"
    )
    table.add_column(name_column, overflow="fold")
    for name in number_columns:
        table.add_column(name, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    table.add_section()
    table.add_row(*total, style="bold")
    notes = [f"{copy} follows {source}" for copy, source in report.follows.items()]
    if dense := report.left_dense():
        shown = [f"{names} ({reason})" for names, reason in dense[:_MOST_LEFT_DENSE]]
        rest = len(dense) - len(shown)
        more = f", and {rest} more; print the callback's report for all" if rest else ""
        notes.append(f"Left dense: {', '.join(shown)}{more}.")
    notes += [note for note in (report.dead_note, report.coverage_note) if note]
    if notes:
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table


def _summary_panel(summary: FitSummary, suffix: str) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for label, text in summary.rows():
        table.add_row(label, text)
    title = Text(f"Block-sparse training{suffix}")
    return Panel(table, title=title, title_align="left", expand=False)
