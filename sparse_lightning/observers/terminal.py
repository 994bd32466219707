"""What stands in the terminal: the report of the swap, the progress bar, and what came of it.

Tables are for people: where nobody looks, as in a job's log, each is one line of logging.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_info

from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.summary import FitSummary
from sparse_lightning.patching import SparsityReport
from sparse_lightning.policy.evolution import ModelUpdate

if TYPE_CHECKING:
    from rich.console import RenderableType


class Terminal(Observer):
    """Shows density and churn in Lightning's progress bar.

    The density is that of all layers; churn is the share of present blocks that the latest update
    has grown, for each callback where the trainer has several.
    """

    def start(self, fit: Fit) -> None:
        _show_in_bar(fit, {"density": fit.density})

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        grown = sum(len(change.grown) for change in update.layers.values())
        present = sum(change.n_after for change in update.layers.values())
        churn = f"churn {fit.label}" if fit.label else "churn"
        _show_in_bar(fit, {"density": fit.density, churn: grown / max(1, present)})


def _show_in_bar(fit: Fit, metrics: dict[str, float]) -> None:
    # Not by `self.log`, which would offer them to be monitored under these short names too.
    if fit.trainer.progress_bar_callback is not None:
        fit.trainer.progress_bar_metrics.update(metrics)


def show_report(report: SparsityReport, which: str = "") -> None:
    """Show what the swap did, on this rank.

    Args:
        report: of the swap.
        which: callback it is of, where the trainer has several.
    """
    before = sum(layer.parameters_before for layer in report.layers.values())
    after = sum(layer.parameters_after for layer in report.layers.values())
    of = f", {which}" if which else ""
    line = (
        f"Block-sparse layers{of}: {len(report.layers)}; linear layers left dense: "
        f"{len(report.skipped)}; density {report.density:.3f}; parameters {before:,} -> {after:,}."
    )
    copies = "; ".join(f"{copy} follows {of}" for copy, of in report.follows.items())
    line = " ".join(part for part in (line, copies and f"{copies}.", report.uncovered) if part)
    _show(f"{report}\n{which}".rstrip(), line, lambda: _report_table(report, of))


def show_summary(summary: FitSummary, which: str = "") -> None:
    """Show what block sparsity has bought, on this rank.

    Args:
        summary: of a training.
        which: callback it is of, where the trainer has several.
    """
    line = "; ".join(f"{what} {much}" for what, much in summary.rows())
    of = f", {which}" if which else ""
    _show(
        f"{summary}\n{which}".rstrip(),
        f"Block-sparse training{of} has ended: {line}.",
        lambda: _panel(summary, of),
    )


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


def _report_table(report: SparsityReport, of: str) -> RenderableType:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    (first, *others), (*rows, total) = report.table()
    table = Table(title=Text(f"Block-sparse layers{of}"), box=box.SIMPLE_HEAD, title_justify="left")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    for name, *cells in rows:
        table.add_row(Text(name), *cells)
    table.add_section()
    table.add_row(*total, style="bold")
    below = [f"{copy} follows {of}" for copy, of in report.follows.items()]
    if report.skipped:
        counts = Counter(report.skipped.values()).items()
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts)
        below.append(f"Left dense: {reasons} (print the callback's report for names)")
    if report.uncovered:
        below.append(report.uncovered)
    if below:
        table.caption = Text("\n".join(below))
        table.caption_justify = "left"
    return table


def _panel(summary: FitSummary, of: str) -> RenderableType:
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold")
    for what, much in summary.rows():
        table.add_row(what, much)
    title = Text(f"Block-sparse training{of}")
    return Panel(table, title=title, title_align="left", expand=False)
