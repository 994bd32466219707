"""`Observers`: creates the observers of a `SparsityCallback` and forwards its events to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.hooks import RemovableHandle

from sparse_lightning.config import SparsityConfig
from sparse_lightning.linear import density_of
from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.mask_tracker import MaskTracker
from sparse_lightning.observers.measures import DENSITY
from sparse_lightning.observers.monitor import SparsityMonitor
from sparse_lightning.observers.recorder import MaskRecorder
from sparse_lightning.observers.summary import FitSummary
from sparse_lightning.observers.terminal import Terminal
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.sparsifier import Sparsifier

_HISTORIES = "sparse_lightning_histories"  # key of Lightning's checkpoints


class Observers:
    """Forwards the events of a training to the terminal, callback metrics, loggers and recorder.

    Args:
        config: selects the observers.

    Attributes:
        monitor: logs updates; None if nothing is logged.
        masks: block masks that all observers read.
    """

    def __init__(self, config: SparsityConfig) -> None:
        options = config.monitor
        self.monitor = None if options is None else SparsityMonitor(options)
        self.masks = MaskTracker()
        self._observers: list[Observer] = [Terminal(), CallbackMetrics()]
        if self.monitor is not None:
            self._observers.append(self.monitor)
        self._recorder: MaskRecorder | None = None
        if options is not None and options.record:
            self._recorder = MaskRecorder(options.every_n_updates, config.training_options())
            self._observers.append(self._recorder)
        self._running: tuple[pl.Trainer, pl.LightningModule, Sparsifier] | None = None
        self._hook: RemovableHandle | None = None
        self._earlier = 0, 0  # steps and updates before the running fit
        self._epoch = 0

    def reset(self) -> None:
        """Forget the block masks and the history of an earlier schedule."""
        self.masks = MaskTracker()
        if self._recorder is not None:
            self._recorder.history = None

    def start(self, trainer: pl.Trainer, model: pl.LightningModule, sparsifier: Sparsifier) -> None:
        """Begin observing, once everything is built, restored and attached."""
        self.stop()
        self._running = trainer, model, sparsifier
        self._earlier = sparsifier.steps, sparsifier.n_updates
        self._epoch = trainer.current_epoch
        self._hook = sparsifier.register_update_hook(lambda _, update: self._update(update))
        self.masks.start(sparsifier.layers)
        fit = self.fit
        for observer in self._observers:
            observer.start(fit)

    @property
    def fit(self) -> Fit:
        """The state of the running training."""
        assert self._running is not None
        trainer, model, sparsifier = self._running
        engines = sparsifiers(trainer)
        n_blocks = sum(engine.n_blocks for engine in engines)
        earlier_steps, earlier_updates = self._earlier
        return Fit(
            trainer=trainer,
            model=model,
            layers=sparsifier.layers,
            masks=self.masks,
            step=sparsifier.steps,
            n_updates=sparsifier.n_updates,
            earlier_steps=earlier_steps,
            earlier_updates=earlier_updates,
            label=str(engines.index(sparsifier) + 1) if len(engines) > 1 else "",
            density=density_of(layer for engine in engines for layer in engine.layers.values()),
            target_density=sum(engine.final_blocks for engine in engines) / max(1, n_blocks),
            final_density=sparsifier.final_density,
        )

    def _update(self, update: ModelUpdate) -> None:
        self.masks.update(update)
        fit = self.fit
        for observer in self._observers:
            observer.update(fit, update)

    def count(self, batch: Any) -> None:
        """Count a batch that is about to be trained on; it may be the first of an epoch."""
        assert self._running is not None
        epoch = self._running[0].current_epoch
        if epoch != self._epoch:
            self._epoch = epoch
            fit = self.fit
            for observer in self._observers:
                observer.begin_epoch(fit)
        if self.monitor is not None:
            self.monitor.count(batch)

    def pause(self) -> None:
        """Pause the observers of a running training during a validation."""
        if self._running is not None:
            fit = self.fit
            for observer in self._observers:
                observer.pause(fit)

    def resume(self) -> None:
        """Resume the paused observers."""
        if self._running is not None:
            fit = self.fit
            for observer in self._observers:
                observer.resume(fit)

    def end(self, summary: FitSummary) -> None:
        """Signal the normal end of the training; optimizers and loggers still exist."""
        fit = self.fit
        for observer in self._observers:
            observer.end(fit, summary)

    def stop(self) -> None:
        """Stop observing, whether the training has ended normally or failed."""
        if self._hook is not None:
            self._hook.remove()
        self._running = self._hook = None
        for observer in self._observers:
            observer.stop()

    def save_history(self, checkpoint: dict[str, Any], key: str) -> None:
        """Name the history in a checkpoint, for a resume in another folder.

        It is not in the callback's state, which is the same for equal trainings in all folders.

        Args:
            checkpoint: Lightning's checkpoint; it is changed in place.
            key: state key of the callback.
        """
        if self._recorder is not None and self._recorder.history is not None:
            checkpoint.setdefault(_HISTORIES, {})[key] = dict(self._recorder.history)

    def load_history(self, checkpoint: Mapping[str, Any], key: str) -> None:
        """Restore what `save_history` wrote; earlier versions wrote nothing."""
        if self._recorder is not None:
            self._recorder.history = checkpoint.get(_HISTORIES, {}).get(key)


class CallbackMetrics(Observer):
    """Puts the density into `callback_metrics`, where `ModelCheckpoint` and others read metrics.

    The metric is available from the start of training, before a sanity-check validation, and
    changes with an update, before any checkpoint is saved. `log` would set it only after a batch,
    and never under `Trainer(barebones=True)`.
    """

    def start(self, fit: Fit) -> None:
        _set_density_metric(fit)

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        _set_density_metric(fit)


def _set_density_metric(fit: Fit) -> None:
    # On the CPU, so that comparing it does not synchronise with the device.
    density = torch.tensor(fit.density, dtype=torch.float32, device="cpu")
    fit.trainer.callback_metrics[DENSITY] = density


def sparsifiers(trainer: pl.Trainer) -> list[Sparsifier]:
    """Return the engines of all `SparsityCallback`s of a trainer, in its order."""
    engines = (getattr(callback, "sparsifier", None) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    return [engine for engine in engines if isinstance(engine, Sparsifier)]
