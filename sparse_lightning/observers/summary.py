"""`FitSummary`: what block sparsity saved, at the end of a training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass

from sparse_lightning.observers.base import Fit
from sparse_lightning.observers.measures import (
    compute_dtype,
    count_dead_features,
    count_set,
    share_set,
)
from sparse_lightning.savings import Savings, measure_savings, model_speedup
from sparse_lightning.swap_report import DEAD_FEATURES
from sparse_lightning.tables import html_table


@dataclass(frozen=True)
class FitSummary(Savings):
    """What block sparsity saved in a training, at its end.

    A training includes the earlier fits of the same layers by the same callback, and what came
    before a resume. The attributes of `Savings` are those at the end, of these layers.

    Attributes:
        layers: number of block-sparse layers.
        steps: number of optimizer steps.
        fit_steps: number of these that the latest fit took.
        first_density: present blocks / all blocks of these layers at the start.
        density: present blocks / all blocks of these layers at the end.
        final_density: their density when the density schedule is complete.
        updates: number of topology updates.
        fit_updates: number of these that the latest fit made.
        dropped: number of blocks that these updates dropped.
        grown: number of blocks that these updates grew.
        exchanged: number of weights that these updates exchanged within blocks that stayed.
        ever_active: blocks that were ever present / all blocks.
        dead: how many "dead outputs" and "unread inputs" these layers have at the end, if any.
        speedup: predicted dense time / time of these layers on this GPU; None if unknown.
    """

    layers: int
    steps: int
    fit_steps: int
    first_density: float
    density: float
    final_density: float
    updates: int
    fit_updates: int
    dropped: int
    grown: int
    exchanged: int
    ever_active: float
    dead: Mapping[str, int]
    speedup: float | None

    def rows(self) -> list[tuple[str, str]]:
        """Return the lines of the summary, as pairs of a label and a text."""
        rows = [
            ("layers", f"{self.layers}"),
            *self._fit(),
            ("density", self._density()),
            *super().rows(),
            ("updates", self._updates()),
            ("ever active", f"{self.ever_active:.1%} of all blocks"),
            *((label, f"{count:,}") for label, count in self.dead.items()),
        ]
        if self.speedup is not None:
            rows.append(("predicted speed-up", f"{self.speedup:.2f} of these layers"))
        return rows

    def _updates(self) -> str:
        text = f"{self.updates}: {self.dropped:,} blocks dropped, {self.grown:,} grown"
        if self.weight_density is None:
            return text
        return f"{text}, {self.exchanged:,} weights exchanged within blocks"

    def _fit(self) -> list[tuple[str, str]]:
        """Return a line about the latest fit, if the other lines cover more than it."""
        if self.fit_steps == self.steps:
            return []
        return [
            (
                "this fit",
                f"{self.fit_steps:,} of {self.steps:,} steps, {self.fit_updates} of "
                f"{self.updates} updates",
            )
        ]

    def _density(self) -> str:
        first, last, final = (
            f"{density:.3f}" for density in (self.first_density, self.density, self.final_density)
        )
        text = last if first == last else f"{first} -> {last}"
        return text if last == final else f"{text}, of {final} planned"

    def scalars(self) -> dict[str, float]:
        """Return the numbers of the summary by name, for loggers."""
        found: dict[str, float] = {
            "density": self.density,
            **super().scalars(),
            "updates": self.updates,
            "fit_updates": self.fit_updates,
            "blocks_dropped": self.dropped,
            "blocks_grown": self.grown,
            "ever_active": self.ever_active,
        }
        if self.weight_density is not None:
            found["weights_exchanged"] = self.exchanged
        found |= {kind.replace(" ", "_"): self.dead.get(kind, 0) for kind in DEAD_FEATURES}
        if self.speedup is not None:
            found["predicted_speedup"] = self.speedup
        return {name: float(value) for name, value in found.items()}

    def _repr_html_(self) -> str:
        """Return the summary for a notebook."""
        return html_table((), self.rows())

    def __str__(self) -> str:
        width = max(len(label) for label, _ in self.rows())
        lines = [f"{label.ljust(width)}  {text}" for label, text in self.rows()]
        return "\n".join(["Block-sparse training", *lines])


def summarise(fit: Fit) -> FitSummary:
    """Return the summary of a training at its end."""
    layers, masks = list(fit.layers.values()), fit.masks
    first, present = [*masks.first.values()], [*masks.present.values()]
    speedup = None
    if layers:
        speedup = model_speedup(
            [(layer, layer.density) for layer in layers],
            compute_dtype(fit.trainer, layers[0]),
        )
    return FitSummary(
        layers=len(layers),
        steps=fit.step,
        fit_steps=fit.step - fit.earlier_steps,
        first_density=share_set(first),
        density=share_set(present),
        final_density=fit.final_density,
        **asdict(measure_savings(fit.model, layers, fit.trainer.optimizers)),
        updates=fit.n_updates,
        fit_updates=fit.n_updates - fit.earlier_updates,
        dropped=count_set(first) + masks.grown - count_set(present),
        grown=masks.grown,
        exchanged=masks.exchanged,
        ever_active=share_set([*masks.ever.values()]),
        dead=count_dead_features(fit.layers, masks),
        speedup=speedup,
    )
