"""`MaskRecorder`: writes the history of block masks, which `sparse-lightning report` reads."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import version
from itertools import chain, count
from pathlib import Path
from typing import Any

import lightning
import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sparse_lightning.history import HistoryWriter, holds_run
from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.observers.measures import DENSITY
from sparse_lightning.observers.summary import FitSummary
from sparse_lightning.policy.updates import ModelUpdate

HISTORY = "pattern.history"
_ANY = "pattern*.history"  # also those of several callbacks, and those that were moved aside


class MaskRecorder(Observer):
    """Writes each update to a history file on rank 0, in the folder of the run.

    A resumed training goes on in the file that its checkpoint names. If that file is in another
    folder, or another training is writing it, a file of its own begins with a copy of it. If a file
    cannot be written, recording ends with a warning; the training continues.

    Args:
        every_n_updates: how often block scores are written as well.
        config: the configuration of the training, as primitives.

    Attributes:
        history: absolute path ("file") and run ("run", see `HistoryWriter`) of the latest history
            of this training, which checkpoints save; None before the first.
    """

    def __init__(self, every_n_updates: int, config: Mapping[str, Any]) -> None:
        self.every_n_updates = every_n_updates
        self.config = config
        self.history: dict[str, str] | None = None
        self._writer: HistoryWriter | None = None
        self._seen: dict[str, tuple[Any, float]] = {}  # each metric as it was last, and its value

    def __getstate__(self) -> dict[str, Any]:
        # Open files cannot be copied or pickled. A copy records nothing until its own fit starts.
        return {**self.__dict__, "_writer": None, "_seen": {}}

    def start(self, fit: Fit) -> None:
        self._seen = {}
        trainer = fit.trainer
        folder = run_folder(trainer) if trainer.is_global_zero and fit.layers else None
        if folder is None:
            return
        about = {
            "sparse_lightning": version("sparse-lightning"),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "device": _device_name(trainer.strategy.root_device),
            "world_size": trainer.world_size,
            "precision": str(trainer.precision),
            "config": dict(self.config),
        }
        sizes = {name: layer.block_size for name, layer in fit.layers.items()}
        patterns = {name: layer.nm for name, layer in fit.layers.items()}
        with self._stop_on_error():
            path = folder / (f"pattern-{fit.label}.history" if fit.label else HISTORY)
            self._writer = self._open(path.resolve(), fit.step)
            self._writer.start(fit.step, _masks(fit), sizes, about, patterns)
            self.history = {"file": str(self._writer.path), "run": self._writer.run}

    def _open(self, path: Path, step: int) -> HistoryWriter:
        """Return the writer of a training that starts or resumes at a step.

        Args:
            path: path of its history, unless the training already has one in the same folder.
            step: optimizer steps so far.
        """
        earlier = self._find_earlier(path, step) if step else None
        if earlier is None or earlier.parent != path.parent:
            _move_aside(path)
            return _new_writer(path, earlier)
        try:
            return HistoryWriter(earlier)
        except BlockingIOError:
            writer = _new_writer(path, earlier)
        rank_zero_warn(
            f"A history of block masks must be written by one training at a time; another one is "
            f"writing '{earlier}'. This training writes '{writer.path}' instead, which begins with "
            f"the same steps up to {step}."
        )
        return writer

    def _find_earlier(self, path: Path, step: int) -> Path | None:
        """Return the file with the history so far of a training that resumes; None if it is gone.

        The file of a run may have been renamed when another training started in its folder.
        """
        if self.history is None:  # an earlier version saved the checkpoint
            return path if path.exists() else None
        file = Path(self.history["file"])
        renamed = (f for folder in (file.parent, path.parent) for f in sorted(folder.glob(_ANY)))
        for candidate in (file, *renamed):
            if holds_run(candidate, self.history["run"]):
                return candidate.resolve()
        rank_zero_warn(
            f"The history of block masks begins at step {step}: the earlier steps are in '{file}', "
            "which was not found. To have all steps in one report, restore that file and resume "
            "again."
        )
        return None

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        with self._stop_on_error():
            if self._writer is None:
                return
            self._writer.update(update.step, update.number, _masks(fit))
            if (update.number - 1) % self.every_n_updates == 0:
                self._writer.scores(_scores(fit, update))
        self._write_metrics(fit)

    def resume(self, fit: Fit) -> None:
        self._write_metrics(fit)

    def begin_epoch(self, fit: Fit) -> None:
        # What a training logs for an epoch is known only when its hooks have run.
        self._write_metrics(fit)

    def end(self, fit: Fit, summary: FitSummary) -> None:
        self._write_metrics(fit)

    def stop(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _write_metrics(self, fit: Fit) -> None:
        with self._stop_on_error():
            if self._writer is None:
                return
            logged = {
                name: (value, float(value))
                for name, value in fit.trainer.callback_metrics.items()
                if name != DENSITY  # the masks determine it
            }
            new = {
                name: number
                for name, (value, number) in logged.items()
                if math.isfinite(number) and not self._is_seen(name, value, number)
            }
            self._seen = logged
            if new:
                self._writer.metrics(fit.step, new)

    def _is_seen(self, name: str, value: Any, number: float) -> bool:
        """Return whether a metric was not logged again since it was seen, such as a validation's.

        The trainer keeps the latest value of each metric. An equal value that was logged anew is in
        other memory, since the memory of the one that was seen is still held.
        """
        if name not in self._seen:
            return False
        earlier, earlier_number = self._seen[name]
        if isinstance(value, Tensor) and isinstance(earlier, Tensor):
            is_same = value.data_ptr() == earlier.data_ptr()
        else:
            is_same = value is earlier
        # A metric of torchmetrics may change its value in place.
        return is_same and number == earlier_number

    @contextmanager
    def _stop_on_error(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            self.stop()
            rank_zero_warn(f"The history of block masks is no longer recorded: {error}")


def run_folder(trainer: pl.Trainer) -> Path | None:
    """Return the local folder of a run's files; None if there is none.

    This is the version folder of the first logger, or else the folder of the checkpoints.
    """
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    folder = getattr(trainer.checkpoint_callback, "dirpath", None)
    if trainer.loggers:
        logger = trainer.loggers[0]
        run = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        folder = os.path.join(logger.save_dir or trainer.default_root_dir, str(logger.name), run)
    return None if folder is None or "://" in str(folder) else Path(folder)


def _move_aside(path: Path) -> None:
    """Rename the file that an earlier training wrote under this path, if there is one.

    A training that is still writing it goes on in the renamed file. Windows refuses to rename an
    open file, which then keeps its name.
    """
    if path.exists():
        with suppress(PermissionError):
            path.rename(_unused(path))


def _new_writer(path: Path, earlier: Path | None) -> HistoryWriter:
    """Return the writer of a new file, whose name has a number if the path is taken."""
    while True:
        with suppress(BlockingIOError):  # another training has just created the same file
            return HistoryWriter(_unused(path), earlier)


def _unused(path: Path) -> Path:
    """Return the first of 'pattern.history', 'pattern.1.history' and so on that does not exist."""
    numbered = (path.with_suffix(f".{number}{path.suffix}") for number in count(1))
    return next(candidate for candidate in chain([path], numbered) if not candidate.exists())


def _masks(fit: Fit) -> dict[str, np.ndarray[Any, Any]]:
    return {name: mask.numpy() for name, mask in fit.masks.present.items()}


def _scores(fit: Fit, update: ModelUpdate) -> dict[str, np.ndarray[Any, Any]]:
    """Return the drop scores of each layer; NaN for grown blocks and in frozen layers."""
    masks = fit.masks.present
    scores = {name: np.full(mask.shape, np.nan, np.float32) for name, mask in masks.items()}
    for name, drop_scores in update.drop_scores.items():
        scores[name] = drop_scores.numpy().astype(np.float32)
        grown = update.layers[name].coords[update.layers[name].grown]
        scores[name][grown[:, 0], grown[:, 1]] = np.nan
    return scores


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
