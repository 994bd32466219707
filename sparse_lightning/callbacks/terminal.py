"""What stands in the terminal: the report of the swap, the progress bar, and what came of it.

Tables are for people: where nobody looks, as in a job's log, each is one line of logging.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from sparse_lightning.callbacks.observer import Fit, Observer
from sparse_lightning.callbacks.summary import FitSummary
from sparse_lightning.evolution import ModelUpdate
from sparse_lightning.patching import SparsityReport

if TYPE_CHECKING:
    from rich.console import RenderableType


class Terminal(Observer):
    """Shows density and churn in Lightning's progress bar.

    Churn is the share of present blocks that the latest update has grown.
    """

    def start(self, fit: Fit) -> None:
        _show_in_bar(fit, {"density": _density(fit)})

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        grown = sum(len(change.grown) for change in update.layers.values())
        present = sum(change.n_after for change in update.layers.values())
        _show_in_bar(fit, {"density": _density(fit), "churn": grown / max(1, present)})


def _density(fit: Fit) -> float:
    topologies = [layer.topology for layer in fit.layers.values()]
    blocks = sum(at.grid[0] * at.grid[1] for at in topologies)
    return sum(at.n_blocks for at in topologies) / max(1, blocks)


def _show_in_bar(fit: Fit, metrics: dict[str, float]) -> None:
    # Not by `self.log`, which would also make them metrics of callbacks and checkpoints' names.
    if fit.trainer.progress_bar_callback is not None:
        fit.trainer.progress_bar_metrics.update(metrics)


def show_report(report: SparsityReport) -> None:
    """Show what the swap did, on this rank."""
    before = sum(layer.parameters_before for layer in report.layers.values())
    after = sum(layer.parameters_after for layer in report.layers.values())
    line = (
        f"Block-sparse layers: {len(report.layers)}; linear layers left dense: "
        f"{len(report.skipped)}; density {report.density:.3f}; parameters {before:,} -> {after:,}."
    )
    _show(str(report), line, lambda: _report_table(report))


def show_summary(summary: FitSummary) -> None:
    """Show what block sparsity has bought, on this rank."""
    line = "; ".join(f"{what} {much}" for what, much in summary.rows())
    _show(str(summary), f"Block-sparse training has ended: {line}.", lambda: _panel(summary))


def _show(text: str, line: str, pretty: Callable[[], RenderableType]) -> None:
    # A bar of rich's that is drawn stands in for stdout; and in a notebook, too, somebody looks.
    stdout = getattr(sys.stdout, "rich_proxied_file", sys.stdout)
    if not (stdout.isatty() or "ipykernel" in sys.modules):
        rank_zero_info(line)
        return
    try:
        from rich.console import Console
    except ImportError:
        print(text)
        return
    console = Console(force_terminal=True, force_jupyter=False)
    # By print: a progress bar that is drawn, also one of rich's, makes room for it.
    with console.capture() as capture:
        console.print(pretty())
    print(capture.get(), end="", flush=True)


def _report_table(report: SparsityReport) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    (first, *others), (*rows, total) = report.table()
    table = Table(title="Block-sparse layers", box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    table.add_section()
    table.add_row(*total, style="bold")
    if report.skipped:
        counts = Counter(report.skipped.values()).items()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        table.caption = Text(f"Left dense: {reasons} (print the callback's report for names)")
        table.caption_justify = "left"
    return table


def _panel(summary: FitSummary) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for what, much in summary.rows():
        table.add_row(what, much)
    return Panel(table, title="Block-sparse training", title_align="left", expand=False)
