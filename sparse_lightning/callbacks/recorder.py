"""`PatternRecorder`: keeps what became of the blocks in a file, for `sparse-lightning report`."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from sparse_lightning.history import HistoryWriter
from sparse_lightning.linear import BlockSparseLinear

if TYPE_CHECKING:
    from sparse_lightning.evolution import ModelUpdate

HISTORY = "pattern.history"


class PatternRecorder:
    """Writes each update to a history, on rank 0, where Lightning keeps the run's files.

    A file that cannot be written ends the record with a warning, and not the training.

    Args:
        every_n_updates: how often the scores of blocks are written too.
    """

    def __init__(self, every_n_updates: int) -> None:
        self.every_n_updates = every_n_updates
        self._writer: HistoryWriter | None = None

    def start(
        self,
        trainer: pl.Trainer,
        layers: Mapping[str, BlockSparseLinear],
        step: int,
        config: Mapping[str, Any],
    ) -> None:
        """Begin, or go on from a checkpoint.

        Args:
            trainer: about to train.
            layers: by name.
            step: optimizer steps until now.
            config: what the training was told, as primitives.
        """
        self._writer = None
        folder = run_folder(trainer)
        if not trainer.is_global_zero or folder is None or not layers:
            return
        about = {
            "sparse_lightning": version("sparse-lightning"),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "device": _device_name(trainer.strategy.root_device),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "config": dict(config),
        }
        sizes = {name: layer.block_size for name, layer in layers.items()}
        with self._or_stop():
            path = folder / HISTORY
            if step == 0:
                _move_aside(path)
            self._writer = HistoryWriter(path)
            self._writer.start(step, _masks(layers), sizes, about)

    def update(
        self,
        layers: Mapping[str, BlockSparseLinear],
        update: ModelUpdate,
        metrics: Mapping[str, Any],
    ) -> None:
        """Write an update that has just been applied, and what is known of the training.

        Args:
            layers: the recorded ones, by name.
            update: what was done.
            metrics: numbers by name; what is no finite number is left out.
        """
        with self._or_stop():
            if self._writer is None:
                return
            masks = _masks(layers)
            self._writer.update(update.step, update.number, masks)
            if (update.number - 1) % self.every_n_updates == 0:
                self._writer.scores(_scores(masks, update))
            self._writer.metrics(update.step, _numbers(metrics))

    def metrics(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Write what is known of the training at a step."""
        with self._or_stop():
            if self._writer is not None and (numbers := _numbers(metrics)):
                self._writer.metrics(step, numbers)

    @contextmanager
    def _or_stop(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self._writer = None
            rank_zero_warn(f"The history of block masks is no longer recorded: {error}")


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return where Lightning keeps the files of a run on this machine; None if it keeps none.

    That is the first logger's folder of this version of it, or else that of the checkpoints.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if trainer.loggers:
        logger = trainer.loggers[0]
        named = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), named)
    return None if folder is None or "://" in str(folder) else Path(folder)


def _move_aside(path: Path) -> None:
    """Keep what an earlier training wrote in the same place, under a name of its own."""
    if path.exists():
        number = 1
        while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
            number += 1
        path.rename(aside)


def _masks(layers: Mapping[str, BlockSparseLinear]) -> dict[str, np.ndarray[Any, Any]]:
    return {name: layer.topology.mask.cpu().numpy() for name, layer in layers.items()}


def _scores(
    masks: Mapping[str, np.ndarray[Any, Any]], update: ModelUpdate
) -> dict[str, np.ndarray[Any, Any]]:
    """Return what the blocks were kept for; NaN for those that grew, and in frozen layers."""
    scores = {name: np.full(mask.shape, np.nan, np.float32) for name, mask in masks.items()}
    for name, of_layer in update.drop_scores.items():
        scores[name] = of_layer.numpy().astype(np.float32)
        grown = update.layers[name].coords[update.layers[name].grown]
        scores[name][grown[:, 0], grown[:, 1]] = np.nan
    return scores


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: float(value) for name, value in metrics.items()}
    return {name: value for name, value in numbers.items() if math.isfinite(value)}


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
