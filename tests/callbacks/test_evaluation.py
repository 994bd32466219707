"""Validation, test and prediction give the same results with a SparsityCallback."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from sparse_lightning import BlockSparseLinear, SparsityCallback, densify, sparsify
from tests.callbacks.helpers import Classifier, loader, trainer


class Evaluated(Classifier):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(10_000 + batch_idx))

    def predict_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.loss(10_000 + batch_idx)


class EvaluatedLate(Evaluated):
    """Builds its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.built, self.net = self.net, None

    def configure_model(self) -> None:
        if self.net is None:
            self.net, self.built = self.built, None


def sparsity(**options: Any) -> SparsityCallback:
    return SparsityCallback(block_size=16, update={"every_n_steps": 4}, **options)


def loss_by(verb: str, model: L.LightningModule, *callbacks: L.Callback, **options: Any) -> float:
    run: Any = trainer(*callbacks)
    if verb == "predict":
        return float(torch.stack(run.predict(model, loader(2), **options)).mean())
    return getattr(run, verb)(model, loader(2), verbose=False, **options)[0]["val_loss"]


VERBS = ("validate", "test", "predict")


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("swap", [lambda m: m, densify, lambda m: sparsify(m, block_size=32)])
def test_a_model_in_memory_stays_as_it_is(verb: str, swap: Any) -> None:
    model = Evaluated()
    sparsify(model, block_size=16, density=0.5)
    swap(model)
    kinds = [type(module) for module in model.modules()]
    plain = loss_by(verb, model)
    assert loss_by(verb, model, sparsity()) == plain
    assert [type(module) for module in model.modules()] == kinds
    assert not model._load_state_dict_pre_hooks and "setup" not in vars(model)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A sparse checkpoint, a dense one with the same weights, and the loss of both."""
    folder = tmp_path_factory.mktemp("saved")
    fitting = trainer(sparsity(density=0.5))
    model = Evaluated()
    fitting.fit(model, loader())
    fitting.save_checkpoint(folder / "sparse.ckpt")
    loss = loss_by("test", model)
    checkpoint = torch.load(folder / "sparse.ckpt", weights_only=True)
    checkpoint["state_dict"] = densify(model).state_dict()
    torch.save(checkpoint, folder / "dense.ckpt")
    return {"sparse": folder / "sparse.ckpt", "dense": folder / "dense.ckpt", "loss": loss}


HAD: dict[str, Any] = {
    "dense": Evaluated,
    "built late": EvaluatedLate,
    "sparse": lambda: _sparse(32),
    "sparse of another training": lambda: _sparse(16),
}


def _sparse(block_size: int) -> Evaluated:
    model = Evaluated()
    sparsify(model, block_size=block_size, density=0.25)
    return model


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("holds", ["sparse", "dense"])
@pytest.mark.parametrize("had", HAD)
def test_a_checkpoint_is_evaluated_as_it_was_saved(
    verb: str, holds: str, had: str, saved: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """This does not depend on the callback's configuration, and no swap is reported."""
    model = HAD[had]()
    with caplog.at_level(logging.INFO):
        other = sparsity(density=0.25, include=["2"])
        found = loss_by(verb, model, other, ckpt_path=str(saved[holds]))
    assert found == pytest.approx(saved["loss"], rel=1e-5)
    is_sparse = isinstance(model.net[0], BlockSparseLinear)
    assert is_sparse == (holds == "sparse")
    assert "Block-sparse layers" not in caplog.text


def test_a_fit_after_an_evaluation_trains(saved: dict[str, Any]) -> None:
    model, callback = Evaluated(), sparsity(density=0.5)
    loss_by("validate", model, callback, ckpt_path=str(saved["sparse"]))
    callback_of_fit = sparsity(density=0.5)
    trainer(callback_of_fit).fit(model, loader())
    assert callback_of_fit.last_update is not None


def test_the_best_checkpoint_is_tested_after_a_fit(tmp_path: Path) -> None:
    """The checkpoint has more slots than the model has after the fit."""
    falling = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5}
    best = ModelCheckpoint(tmp_path, monitor="val_loss", mode="max")
    fitting = trainer(
        sparsity(density=falling), best, enable_checkpointing=True, val_check_interval=4
    )
    model = Evaluated()
    fitting.fit(model, loader(), loader(2))
    found = fitting.test(model, loader(2), ckpt_path="best", verbose=False)[0]["val_loss"]
    assert found == pytest.approx(float(best.best_model_score), rel=1e-5)


def test_strategies_are_only_refused_for_a_fit() -> None:
    class FSDPStrategy(L.pytorch.strategies.SingleDeviceStrategy):
        """A fit refuses a strategy of this name."""

    run = trainer(sparsity(), strategy=FSDPStrategy("cpu"))
    assert run.validate(Evaluated(), loader(2), verbose=False)
