"""`Candidates`: what other callbacks may monitor of a training's sparsity."""

from __future__ import annotations

import torch

from sparse_lightning.observers.base import Fit, Observer
from sparse_lightning.policy.evolution import ModelUpdate

DENSITY = "sparsity/density"


class Candidates(Observer):
    """Puts the density where `ModelCheckpoint` and `EarlyStopping` look for what they monitor.

    It is there from the start of the training, before a validation that comes first, and changes
    with an update, before anybody saves. `log` would write it after a batch only, and would not
    under `Trainer(barebones=True)`.
    """

    def start(self, fit: Fit) -> None:
        _offer(fit)

    def update(self, fit: Fit, update: ModelUpdate) -> None:
        _offer(fit)


def _offer(fit: Fit) -> None:
    # On the CPU, so that whoever compares it does not wait for the device.
    density = torch.tensor(fit.density, dtype=torch.float32, device="cpu")
    fit.trainer.callback_metrics[DENSITY] = density
