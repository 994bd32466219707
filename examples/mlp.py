"""A multilayer perceptron that classifies flattened images."""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class MLP(L.LightningModule):
    """Two hidden layers and a head; the metric is accuracy.

    The head stays dense: its 10 outputs are not divisible into blocks, and `SparsityCallback`
    excludes modules called `head` by default.
    """

    def __init__(self, features: int, hidden: int, classes: int = 10, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.first = nn.Linear(features, hidden)
        self.second = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of `images` [batch, features]."""
        return self.head(F.relu(self.second(F.relu(self.first(images)))))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Return the cross-entropy of one batch."""
        images, labels = batch
        loss = F.cross_entropy(self(images), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Log the accuracy on one held-out batch."""
        images, labels = batch
        accuracy = (self(images).argmax(1) == labels).float().mean()
        self.log("val/accuracy", accuracy, prog_bar=True, batch_size=len(labels), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self.hparams.lr)


def build() -> MLP:
    """Return an MLP of 0.3 billion parameters, for `sparse-lightning plan examples.mlp:build`."""
    return MLP(features=4096, hidden=16384)
