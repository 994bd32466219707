"""What a user of Transformers' `Trainer` is told: what a training does, and what it has saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from logging import ERROR

from torch.optim import Optimizer
from tqdm.auto import tqdm  # type: ignore[import-untyped, unused-ignore]
from transformers.utils import logging

from sparse_lightning.savings import Savings, measure_savings, weight_density_of
from sparse_lightning.sparsifier import Sparsifier
from sparse_lightning.swap_report import WEIGHT_DENSITY
from sparse_lightning.tables import html_table


@dataclass(frozen=True)
class TrainerSummary(Savings):
    """What block sparsity saved in a training by the `Trainer`, at its end.

    Attributes:
        layers: number of block-sparse layers.
        steps: number of optimizer steps, including those of earlier trainings of these layers.
        density: present blocks / all blocks of these layers.
        final_density: their density when the density schedule is complete.
        updates: number of topology updates in these steps.
    """

    layers: int
    steps: int
    density: float
    final_density: float
    updates: int

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the summary, as pairs of a label and a text."""
        density, final = f"{self.density:.3f}", f"{self.final_density:.3f}"
        return [
            ("layers", f"{self.layers}"),
            ("steps", f"{self.steps:,}"),
            ("density", density if density == final else f"{density}, of {final} planned"),
            *super().rows(),
            ("updates", f"{self.updates}"),
        ]

    def scalars(self) -> dict[str, float]:
        """Return the numbers of the summary by name, for loggers."""
        return {"density": self.density, "updates": float(self.updates), **super().scalars()}

    def _repr_html_(self) -> str:
        """Return the summary for a notebook."""
        return html_table((), self.rows())

    def __str__(self) -> str:
        lines = "; ".join(f"{label} {text}" for label, text in self.rows())
        return f"Block-sparse training has ended: {lines}."


def summarise(sparsifier: Sparsifier, optimizers: Iterable[Optimizer]) -> TrainerSummary:
    """Return the summary of a training at its end."""
    layers = sparsifier.layers.values()
    return TrainerSummary(
        **asdict(measure_savings(sparsifier.model, layers, [*optimizers])),
        layers=len(layers),
        steps=sparsifier.steps,
        density=sparsifier.density,
        final_density=sparsifier.final_density,
        updates=sparsifier.n_updates,
    )


def describe_start(sparsifier: Sparsifier) -> str:
    """Return a line about the layers and the schedule of a training that starts.

    Args:
        sparsifier: the engine, attached to the optimizer.
    """
    report = sparsifier.report
    share = weight_density_of(layer.topology for layer in sparsifier.layers.values())
    weights = "" if share is None else f"{WEIGHT_DENSITY} {share:.3f}; "
    line = (
        f"Block-sparse training: layers {len(sparsifier.layers)}; linear layers left dense "
        f"{len(report.skipped)}; density {sparsifier.density:.3f}; {weights}"
        f"{sparsifier.describe_schedule()}."
    )
    return " ".join(part for part in (line, report.coverage_note) if part)


def show(text: str) -> None:
    """Print a line above the progress bars, as the Trainer does with its logs.

    Transformers hides what is logged as information by default, while the Trainer prints its logs
    at every verbosity. These lines belong to the logs, and are left out only if Transformers is to
    report nothing but errors.
    """
    if logging.get_verbosity() < ERROR:
        tqdm.write(text)
