"""`Observers`: all who look on at a training, and the patterns that they read."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.hooks import RemovableHandle

from sparse_lightning.config import SparsityConfig
from sparse_lightning.linear import density_of
from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.candidates import Candidates
from sparse_lightning.observers.monitor import SparsityMonitor
from sparse_lightning.observers.patterns import Patterns
from sparse_lightning.observers.recorder import PatternRecorder
from sparse_lightning.observers.terminal import Terminal
from sparse_lightning.policy.evolution import ModelUpdate
from sparse_lightning.sparsifier import Sparsifier


class Observers:
    """Tells the terminal, other callbacks, the loggers and the record of a training.

    Args:
        config: says who looks on.

    Attributes:
        monitor: logs updates; None for nothing.
        patterns: which blocks were present at first, ever, and are now.
    """

    def __init__(self, config: SparsityConfig) -> None:
        shown = config.monitor
        self.monitor = None if shown is None else SparsityMonitor(shown)
        self.patterns = Patterns()
        self._all: list[Observer] = [Terminal(), Candidates()]
        if self.monitor is not None:
            self._all.append(self.monitor)
        if shown is not None and shown.record:
            self._all.append(PatternRecorder(shown.every_n_updates, config.of_training()))
        self._told_of: tuple[pl.Trainer, pl.LightningModule, Sparsifier] | None = None
        self._hook: RemovableHandle | None = None

    def begin_anew(self) -> None:
        """Forget the patterns of an earlier schedule."""
        self.patterns = Patterns()

    def start(self, trainer: pl.Trainer, model: pl.LightningModule, sparsifier: Sparsifier) -> None:
        """Everything is built, restored and attached; no step has been taken."""
        self.stop()
        self._told_of = trainer, model, sparsifier
        self._hook = sparsifier.register_update_hook(lambda _, update: self._update(update))
        self.patterns.start(sparsifier.layers)
        for observer in self._all:
            observer.start(self.fit)

    @property
    def fit(self) -> Fit:
        """The training that is under way."""
        assert self._told_of is not None
        trainer, model, of = self._told_of
        engines = sparsifiers(trainer)
        label = str(engines.index(of) + 1) if len(engines) > 1 else ""
        density = density_of(layer for each in engines for layer in each.layers.values())
        return Fit(trainer, model, of.layers, self.patterns, of.steps, of.n_updates, label, density)

    def _update(self, update: ModelUpdate) -> None:
        self.patterns.follow(update)
        for observer in self._all:
            observer.update(self.fit, update)

    def count(self, batch: Any) -> None:
        """A batch is about to be trained on."""
        if self.monitor is not None:
            self.monitor.count(batch)

    def pause(self) -> None:
        """A validation begins, perhaps in the middle of a training."""
        if self._told_of is not None:
            for observer in self._all:
                observer.pause(self.fit)

    def go_on(self) -> None:
        """The validation has ended."""
        if self._told_of is not None:
            for observer in self._all:
                observer.go_on(self.fit)

    def end(self) -> None:
        """The training has ended by itself; optimizers and loggers are still there."""
        for observer in self._all:
            observer.end(self.fit)

    def stop(self) -> None:
        """There is no training any more."""
        if self._hook is not None:
            self._hook.remove()
        self._told_of = self._hook = None


def sparsifiers(trainer: pl.Trainer) -> list[Sparsifier]:
    """Return the engines of all `SparsityCallback`s of a trainer, in its order."""
    engines = (getattr(callback, "sparsifier", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [engine for engine in engines if isinstance(engine, Sparsifier)]
