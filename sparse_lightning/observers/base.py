"""`Observer`: the base class of everything that watches a training, and its argument `Fit`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import lightning.pytorch as pl

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.observers.mask_tracker import MaskTracker
from sparse_lightning.policy.updates import ModelUpdate

if TYPE_CHECKING:
    from sparse_lightning.observers.summary import FitSummary


@dataclass(frozen=True)
class Fit:
    """The state of a running training.

    Attributes:
        trainer: the trainer that runs it.
        model: the model being trained.
        layers: the model's layers whose blocks evolve, by name.
        masks: the block masks of these layers, including the latest update.
        step: optimizer steps so far.
        n_updates: topology updates so far.
        earlier_steps: optimizer steps before this fit, in earlier fits or before a resume.
        earlier_updates: topology updates before this fit.
        label: "1", "2" and so on, the callback's position among several `SparsityCallback`s; "" if
            the trainer has only one.
        density: present blocks / all blocks over the layers of all `SparsityCallback`s.
        target_density: the same when all density schedules are complete.
        final_density: present blocks / all blocks of `layers` when their schedule is complete.
    """

    trainer: pl.Trainer
    model: pl.LightningModule
    layers: Mapping[str, BlockSparseLinear]
    masks: MaskTracker
    step: int
    n_updates: int
    earlier_steps: int
    earlier_updates: int
    label: str
    density: float
    target_density: float
    final_density: float


class Observer:
    """Base class of observers; its methods are called on every rank and do nothing by default."""

    def start(self, fit: Fit) -> None:
        """Called when everything is built and restored, before the first step."""

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        """Called right after a topology update was applied."""

    def pause(self, fit: Fit) -> None:
        """Called when a validation begins during the training."""

    def resume(self, fit: Fit) -> None:
        """Called when that validation has ended."""

    def begin_epoch(self, fit: Fit) -> None:
        """Called before the first batch of each epoch of the training but the first."""

    def end(self, fit: Fit, summary: FitSummary) -> None:
        """Called when the training ends normally; optimizers and loggers still exist."""

    def stop(self) -> None:
        """Called when the training has ended or failed, and before another one starts."""
