"""`SparsityMonitor`: logs topology updates to the trainer's loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from sparse_lightning.config import MonitorOptions
from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.loggers import LayerSnapshot, LoggerAdapter, adapt_logger
from sparse_lightning.observers.measures import (
    compute_dtype,
    layer_row,
    layer_series,
    update_scalars,
)
from sparse_lightning.observers.summary import FitSummary
from sparse_lightning.observers.throughput import Throughput
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.savings import linear_weights

_NO_NORMS = np.empty(0, np.float32)


class SparsityMonitor(Observer):
    """Logs each update with one call per logger, and a summary at the end.

    Every logger gets scalars. W&B and TensorBoard also get the block masks of the first `images`
    layers: at the start of the training, at every `every_n_updates`-th update and at the end. With
    them come histograms of the number of blocks in each block row and block column and, at updates,
    of the norms of the blocks that stayed. At the end they also get a table of all layers.

    Args:
        options: how often to log images and histograms, and for how many layers.
    """

    def __init__(self, options: MonitorOptions) -> None:
        self.options = options
        self._adapters: list[LoggerAdapter] = []
        self._series: Mapping[str, Sequence[str]] = {}
        self._throughput: Throughput | None = None
        self._pictured: dict[str, int] = {}  # the step of each layer's latest picture

    def start(self, fit: Fit) -> None:
        trainer = fit.trainer
        self._adapters, self._throughput = [], None
        self._series = layer_series(self.options.layers, fit.layers, fit.label)
        if not trainer.is_global_zero or not trainer.loggers:
            return
        self._adapters = [adapt_logger(logger, fit.label) for logger in trainer.loggers]
        for adapter in self._adapters:
            adapter.start()
        peak = None
        if fit.layers:
            dtype = compute_dtype(trainer, next(iter(fit.layers.values())))
            peak = get_available_flops(trainer.strategy.root_device, dtype)
        self._pictured = {}
        snapshots = self._unchanged(fit)
        for adapter in self._adapters:
            adapter.log_update({}, snapshots, fit.step)
        self._throughput = Throughput(trainer.world_size, linear_weights(fit.model), peak)

    def count(self, batch: Any) -> None:
        """Count a batch that is about to be trained on."""
        if self._throughput is not None:
            self._throughput.count(batch)

    # Time spent in validation does not count.

    def pause(self, fit: Fit) -> None:
        if self._throughput is not None:
            self._throughput.pause()

    def resume(self, fit: Fit) -> None:
        if self._throughput is not None:
            self._throughput.resume()

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        if self._throughput is None:
            return
        scalars = update_scalars(fit.model, update, fit.masks, self._series)
        scalars.update(self._throughput.read(linear_weights(fit.model)))
        snapshots = []
        if (update.number - 1) % self.options.every_n_updates == 0:
            names = [name for name in self._names(fit) if name in update.layers]
            snapshots = [_snapshot(name, fit, update) for name in names]
            self._pictured.update(dict.fromkeys(names, update.step))
        for adapter in self._adapters:
            adapter.log_update(scalars, snapshots, update.step)

    def end(self, fit: Fit, summary: FitSummary) -> None:
        if self._throughput is None:
            return
        if fit.trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize(fit.trainer.strategy.root_device)
        # These rates cover the steps since the last update, or all steps if there was none.
        scalars = self._throughput.read(linear_weights(fit.model))
        totals = {**summary.scalars(), **self._throughput.mean()}
        rows = [layer_row(name, layer, fit.masks) for name, layer in fit.layers.items()]
        snapshots = self._unchanged(fit)
        for adapter in self._adapters:
            adapter.log_update(scalars, snapshots, fit.step)
            adapter.log_summary(
                {f"sparsity/summary/{name}": value for name, value in totals.items()}, fit.step
            )
            adapter.log_table(rows, fit.step)
        self._adapters, self._throughput = [], None

    def _names(self, fit: Fit) -> list[str]:
        return list(fit.layers)[: self.options.images]

    def _unchanged(self, fit: Fit) -> list[LayerSnapshot]:
        """Return snapshots, in which nothing changes, of layers without a picture of this step."""
        names = [name for name in self._names(fit) if self._pictured.get(name) != fit.step]
        self._pictured.update(dict.fromkeys(names, fit.step))
        masks = {name: fit.masks.present[name].numpy() for name in names}
        return [LayerSnapshot(n, fit.step, mask, mask, _NO_NORMS) for n, mask in masks.items()]


def _snapshot(name: str, fit: Fit, update: ModelUpdate) -> LayerSnapshot:
    mask, before = fit.masks.present[name].numpy(), fit.masks.before[name].numpy()
    norms = _NO_NORMS
    if name in update.magnitudes:
        rows, cols = update.layers[name].stayed.long().unbind(1)
        norms = update.magnitudes[name][rows, cols].numpy()
    return LayerSnapshot(name, update.step, mask, before, norms[np.isfinite(norms)])
