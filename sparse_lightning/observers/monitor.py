"""`SparsityMonitor`: shows to any logger what topology updates do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from sparse_lightning.config import MonitorOptions
from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.dialects import Dialect, Picture, dialect_of
from sparse_lightning.observers.measures import (
    compute_dtype,
    layer_row,
    linear_weights,
    share,
    update_scalars,
)
from sparse_lightning.observers.throughput import Throughput
from sparse_lightning.policy.evolution import ModelUpdate


class SparsityMonitor(Observer):
    """Logs each update in one call a logger: scalars always, masks and histograms now and then.

    Scalars go to every logger. W&B and TensorBoard also get, for the first `images` layers at
    every `every_n_updates`-th update, the block mask and histograms: how many blocks each block
    row and block column holds, and the norms of the blocks that stayed. When the training ends
    they get a table of all layers.

    Args:
        options: how often, and for how many layers.
    """

    def __init__(self, options: MonitorOptions) -> None:
        self.options = options
        self._dialects: list[Dialect] = []
        self._throughput: Throughput | None = None

    def start(self, fit: Fit) -> None:
        trainer = fit.trainer
        self._dialects, self._throughput = [], None
        if not trainer.is_global_zero or not trainer.loggers:
            return
        self._dialects = [dialect_of(logger, fit.label) for logger in trainer.loggers]
        for dialect in self._dialects:
            dialect.start()
        peak = None
        if fit.layers:
            dtype = compute_dtype(trainer, next(iter(fit.layers.values())))
            peak = get_available_flops(trainer.strategy.root_device, dtype)
        self._throughput = Throughput(trainer.world_size, linear_weights(fit.model), peak)

    def count(self, batch: Any) -> None:
        """Take in a batch that is about to be trained on."""
        if self._throughput is not None:
            self._throughput.count(batch)

    # Validation is no training: its time does not count.

    def pause(self, fit: Fit) -> None:
        if self._throughput is not None:
            self._throughput.pause()

    def go_on(self, fit: Fit) -> None:
        if self._throughput is not None:
            self._throughput.go_on()

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        if self._throughput is None:
            return
        scalars = update_scalars(fit.model, update, fit.patterns)
        scalars.update(self._throughput.read(linear_weights(fit.model)))
        pictures = []
        if (update.number - 1) % self.options.every_n_updates == 0:
            names = list(update.layers)[: self.options.images]
            pictures = [_picture(name, fit, update) for name in names]
        for dialect in self._dialects:
            dialect.log(scalars, pictures, update.step)

    def end(self, fit: Fit) -> None:
        if self._throughput is None:
            return
        if fit.trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(fit.trainer.strategy.root_device)
        # Of the steps since the last update, which are all if there was none.
        scalars = self._throughput.read(linear_weights(fit.model))
        rows = [layer_row(name, layer, fit.patterns) for name, layer in fit.layers.items()]
        for dialect in self._dialects:
            if scalars:
                dialect.log(scalars, [], fit.step)
            dialect.table(rows, fit.step)
        self._dialects, self._throughput = [], None


def _picture(name: str, fit: Fit, update: ModelUpdate) -> Picture:
    mask = fit.patterns.present[name]
    norms = np.empty(0, np.float32)
    if name in update.magnitudes:
        rows, cols = update.layers[name].stayed.long().unbind(1)
        norms = update.magnitudes[name][rows, cols].numpy()
    return Picture(
        name,
        f"{name}, step {update.step}, density {share([mask]):.3f}",
        mask.numpy(),
        norms[np.isfinite(norms)],
    )
