"""2:4 layers in plain loops: what is recorded of a step, resuming, faults, copies and loading."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, Sparsifier
from sparse_lightning.kernels import block_gradients
from sparse_lightning.policy.updates import ModelUpdate
from tests.callbacks.test_resume import assert_identical
from tests.loops import FALLING, Net, adamw, batch, everything, loss_of, make, sparse, train
from tests.test_sparsifier import load, saved, updates_of

EVERY_STEP = {"every_n_steps": 1, "until": 24}


def start(total: int | None = 24, **options: Any) -> tuple[Net, Sparsifier, Optimizer]:
    """Return a model with 2:4 layers, and its attached optimizer."""
    model, sparsifier = make(total, nm="2:4", **options)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def new_weights(update: ModelUpdate) -> dict[str, int]:
    return {name: of_layer.new_weights for name, of_layer in update.layers.items()}


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the gradient of whole blocks -----------------------------------------------------------------


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(
    "options", [{"update": EVERY_STEP}, {"update": {"every_n_steps": 4}, "grow": "momentum"}]
)
def test_weights_are_exchanged_after_layers_have_shrunk(options: dict[str, Any]) -> None:
    """Layers that stay armed from one update to the next get other positions when they shrink."""
    model, sparsifier, optimizer = start(density=FALLING, drop_fraction=1.0, **options)
    updates, capacities = updates_of(sparsifier), []
    train(model, optimizer, range(18), lambda _: capacities.append(len(model.net[0].values)))
    assert capacities[-1] < capacities[0]
    last = [update for update in updates if update.step > capacities.index(capacities[-1]) + 1]
    assert last and all(all(new_weights(update).values()) for update in last[:-1])


def test_an_abandoned_training_is_freed() -> None:
    """It was armed when it was given up, without a call of `detach`."""
    model, sparsifier, optimizer = start(update=EVERY_STEP)
    train(model, optimizer, range(2))
    assert block_gradients.is_recording()
    layer = weakref.ref(model.net[0])
    del model, sparsifier, optimizer
    gc.collect()
    assert layer() is None and not block_gradients.is_recording()


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_pattern_that_a_state_dict_brings_evolves(grow: str) -> None:
    model, sparsifier = make(24, grow=grow, update={"every_n_steps": 2})
    model.load_state_dict(make(24, nm="2:4", seed=1)[0].state_dict())
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(4))
    assert len(updates) == 2 and all(all(new_weights(update).values()) for update in updates)
