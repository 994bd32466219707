"""`FinalDensityCheckpoint`: a `ModelCheckpoint` that saves only at the final density."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sparse_lightning.callbacks.sparsity import SparsityCallback
from sparse_lightning.observers.observers import sparsifiers


class FinalDensityCheckpoint(ModelCheckpoint):
    """Saves checkpoints, and compares the monitored metric, only once the density is final.

    While the density falls, a checkpoint with more blocks often has the lower loss, and a plain
    `ModelCheckpoint` keeps it as the best. This one does nothing until the density of every
    `SparsityCallback` of the trainer has reached the end of its schedule; from then on it behaves
    like a `ModelCheckpoint`. To be able to resume a training from an earlier step, also use a
    `ModelCheckpoint(save_last=True)`; list it after this one if `ckpt_path="best"` should refer to
    this one.

    It warns at the end of a training in which it saved nothing.

    Args:
        arguments: the arguments of `ModelCheckpoint`.

    Raises:
        ValueError: if a training starts without a `SparsityCallback`.
    """

    # The latest value of `monitor` from before the final density, which must not be compared.
    _early_value: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(c, SparsityCallback) for c in callbacks):
            raise ValueError(
                "`Trainer(callbacks=...)` must have a SparsityCallback for FinalDensityCheckpoint, "
                "which waits for its final density; got none. Add one, or use ModelCheckpoint."
            )
        super().setup(trainer, pl_module, stage)
        self._early_value = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        # The value of a validation with more blocks remains until the next validation.
        if _is_final(trainer) and not self._is_early(trainer):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            self._remember_value(trainer)
        elif not self._is_early(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            self._remember_value(trainer)
        elif not self._is_early(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            rank_zero_warn(
                "FinalDensityCheckpoint saved nothing, because the training ended before the final "
                "density was reached. Train longer, or reach the final density earlier: "
                "`density.until`."
            )
            return
        super().on_train_end(trainer, pl_module)
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (self.best_model_path or self.last_model_path or fast_dev_run):
            rank_zero_warn(
                "FinalDensityCheckpoint saved nothing, because no save was due between the step at "
                "which the final density was reached and the end. Train longer, reach the final "
                "density earlier (`density.until`), or save more often."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if _is_final(trainer):
            super().on_exception(trainer, pl_module, exception)

    def _remember_value(self, trainer: pl.Trainer) -> None:
        if self.monitor is not None:
            self._early_value = trainer.callback_metrics.get(self.monitor)

    def _is_early(self, trainer: pl.Trainer) -> bool:
        """Return whether the monitored value was computed before the density was final."""
        if self._early_value is None or self.monitor is None:
            return False
        value = trainer.callback_metrics.get(self.monitor)
        # Compare storage, not values: a new accuracy may well equal the old one.
        return value is not None and value.is_set_to(self._early_value)


def _is_final(trainer: pl.Trainer) -> bool:
    return all(engine.is_final for engine in sparsifiers(trainer))
