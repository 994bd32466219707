"""`FinalDensityCheckpoint`: a `ModelCheckpoint` that waits for the final density."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from sparse_lightning.callbacks.sparsity import SparsityCallback
from sparse_lightning.observers.observers import sparsifiers


class FinalDensityCheckpoint(ModelCheckpoint):
    """Saves, and compares what it monitors, only once the density is final.

    While the density falls, a checkpoint of more blocks is often the better one by a loss, and a
    plain `ModelCheckpoint` keeps it as the best. This one does nothing until the density of every
    `SparsityCallback` of the trainer has arrived where its schedule ends; from then on it is a
    `ModelCheckpoint`. To be able to resume a training from before that, put a
    `ModelCheckpoint(save_last=True)` beside it: behind it, if `ckpt_path="best"` shall be this
    one's.

    It warns at the end of a training in which it saved nothing.

    Args:
        arguments: as of `ModelCheckpoint`.

    Raises:
        ValueError: when a training begins without a `SparsityCallback`.
    """

    # The value of `monitor` when the density was last seen on its way: of weights that don't count.
    _early: Tensor | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        if stage == "fit" and not any(isinstance(each, SparsityCallback) for each in callbacks):
            raise ValueError(
                "`Trainer(callbacks=...)` must have a SparsityCallback beside "
                "FinalDensityCheckpoint, which waits for its final density; got none. Add one, or "
                "use ModelCheckpoint."
            )
        super().setup(trainer, pl_module, stage)
        self._early = None

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any, **kwargs: Any
    ) -> None:
        # After a validation of denser weights, its value stands there until the next one.
        if _is_final(trainer) and not self._is_early(trainer):
            super().on_train_batch_end(trainer, pl_module, *args, **kwargs)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            self._note(trainer)
        elif not self._is_early(trainer):
            super().on_train_epoch_end(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            self._note(trainer)
        elif not self._is_early(trainer):
            super().on_validation_end(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not _is_final(trainer):
            rank_zero_warn(
                "FinalDensityCheckpoint saved nothing in this training, as the density was still "
                "on its way when it ended. Train longer, or have the density arrive earlier: "
                "`density.until`."
            )
            return
        super().on_train_end(trainer, pl_module)
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not (self.best_model_path or self.last_model_path or fast_dev_run):
            rank_zero_warn(
                "FinalDensityCheckpoint saved nothing, as it was not its time between the step at "
                "which the density arrived and the end. Train longer, have the density arrive "
                "earlier (`density.until`), or save more often."
            )

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        if _is_final(trainer):
            super().on_exception(trainer, pl_module, exception)

    def _note(self, trainer: pl.Trainer) -> None:
        if self.monitor is not None:
            self._early = trainer.callback_metrics.get(self.monitor)

    def _is_early(self, trainer: pl.Trainer) -> bool:
        """Whether what is monitored is still a value of weights at a density that was not final."""
        if self._early is None or self.monitor is None:
            return False
        now = trainer.callback_metrics.get(self.monitor)
        # By memory, not by value: an accuracy may well be the same again.
        return now is not None and now.is_set_to(self._early)


def _is_final(trainer: pl.Trainer) -> bool:
    return all(engine.is_final for engine in sparsifiers(trainer))
