"""`Observer`: what is told of a training's block patterns, and what it is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import lightning.pytorch as pl

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.observers.patterns import Patterns
from sparse_lightning.policy.evolution import ModelUpdate


@dataclass(frozen=True)
class Fit:
    """A training that is under way.

    Attributes:
        trainer: that runs it.
        model: that is trained.
        layers: of the model, those whose blocks are evolved, by name.
        patterns: their blocks, the latest update included.
        step: optimizer steps so far.
        n_updates: updates so far.
        label: "1", "2" and so on where the trainer has several `SparsityCallback`s, in its order;
            "" where there is one.
        density: present blocks / all blocks of the layers of all of them together.
    """

    trainer: pl.Trainer
    model: pl.LightningModule
    layers: Mapping[str, BlockSparseLinear]
    patterns: Patterns
    step: int
    n_updates: int
    label: str
    density: float


class Observer:
    """Is told, on every rank, of a training: its start, updates, pauses and end."""

    def start(self, fit: Fit) -> None:
        """Everything is built and restored; no step has been taken."""

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        """An update has just been applied."""

    def pause(self, fit: Fit) -> None:
        """A validation begins, in the middle of the training."""

    def go_on(self, fit: Fit) -> None:
        """The validation has ended."""

    def end(self, fit: Fit) -> None:
        """The training has ended by itself; optimizers and loggers are still there."""
