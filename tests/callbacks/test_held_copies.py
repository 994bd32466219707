"""Copies of the model, or of a part, that other callbacks hold and average."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn

from sparse_lightning import SparsityCallback
from tests.callbacks.helpers import Classifier, loader, trainer

FALLING = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5}


class Wrapped(nn.Module):
    """Holds a copy of a model as an attribute, as timm's averages do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = copy.deepcopy(model)


HOLD: dict[str, Callable[[L.LightningModule], Any]] = {
    "a part": lambda model: copy.deepcopy(model.net),
    "wrapped": Wrapped,
    "in a dictionary": lambda model: {0.9: copy.deepcopy(model), 0.99: copy.deepcopy(model)},
}


class Average(L.Callback):
    def __init__(self, hold: Callable[[L.LightningModule], Any]) -> None:
        self.hold, self.held, self.truth = hold, None, {}

    def on_fit_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        self.held = self.hold(model)

    def models(self) -> list[nn.Module]:
        return [*self.held.values()] if isinstance(self.held, dict) else [self.held]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, model: Any, *_: Any) -> None:
        for held in self.models():
            source = model.net if self.hold is HOLD["a part"] else model
            for average, now in zip(held.parameters(), source.parameters(), strict=True):
                average.lerp_(now, 0.1)


class WithTarget(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.target = copy.deepcopy(self.net).requires_grad_(False)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for average, now in zip(self.target.parameters(), self.net.parameters(), strict=True):
            average.lerp_(now, 0.1)


@pytest.mark.parametrize("build", [Classifier, WithTarget])
@pytest.mark.parametrize("density", [0.25, FALLING])
@pytest.mark.parametrize("how", HOLD)
def test_held_copies_follow_under_any_names(
    how: str, density: Any, build: type[Classifier]
) -> None:
    model, average = build(), Average(HOLD[how])
    sparsity = SparsityCallback(block_size=16, density=density, update={"every_n_steps": 4})
    trainer(sparsity, average).fit(model, loader())
    assert sparsity.sparsifier is not None and sparsity.sparsifier.n_updates > 2
    for held in average.models():
        layers = [m for m in held.modules() if hasattr(m, "topology")]
        for i, layer in zip((0, 2) * (len(layers) // 2), layers, strict=True):
            assert torch.equal(layer.topology.coords, model.net[i].topology.coords)


@pytest.mark.parametrize("density", [0.25, FALLING])
def test_an_average_of_a_model_that_has_a_target(density: Any) -> None:
    model, ema = WithTarget(), EMAWeightAveraging(decay=0.9)
    sparsity = SparsityCallback(block_size=16, density=density, update={"every_n_steps": 4})
    trainer(sparsity, ema).fit(model, loader())
    for i in (0, 2):  # the model holds the averages now
        assert torch.equal(model.target[i].topology.coords, model.net[i].topology.coords)
        assert not model.target[i].dense_weight()[model.net[i].dense_weight() == 0].any()
