"""Layers built or weights loaded in `LightningModule.setup`, and fits in other processes."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from torch import nn

from sparse_lightning import BlockSparseLinear, SparsityCallback, sparsify
from tests.callbacks.helpers import Classifier, loader, trainer


def sparsity(**options: Any) -> SparsityCallback:
    return SparsityCallback(block_size=16, update={"every_n_steps": 4}, **options)


class BuiltInSetup(Classifier):
    """Builds its layers in `setup`."""

    def __init__(self, configures: bool = False) -> None:
        super().__init__()
        self.net, self.configures = None, configures

    def setup(self, stage: str) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


class BuiltInBoth(BuiltInSetup):
    def configure_model(self) -> None:
        if not hasattr(self, "more"):
            self.more = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.more(self.net(x)))


@pytest.mark.parametrize(
    ("build", "names"),
    [(BuiltInSetup, ["net.0", "net.2"]), (BuiltInBoth, ["net.0", "net.2", "more"])],
)
def test_layers_built_in_setup_are_swapped(build: type[BuiltInSetup], names: list[str]) -> None:
    callback, model = sparsity(density=0.5), build()
    for _ in range(2):
        trainer(callback).fit(model, loader())
        assert {*callback.sparsifier.layers} == {*names}
        assert callback.last_update is not None
        assert not {"setup", "configure_model"} & vars(model).keys()
    pickle.dumps(model), copy.deepcopy(model)


class CopiesItself(Classifier):
    """Copies itself in one of the hooks that Lightning calls before training."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def copy_in(self, where: str) -> None:
        if where == self.where and not hasattr(self, "teacher"):
            self.teacher = copy.deepcopy(self).requires_grad_(False)

    def setup(self, stage: str) -> None:
        self.copy_in("setup")

    def configure_model(self) -> None:
        self.copy_in("configure_model")

    def on_fit_start(self) -> None:
        self.copy_in("on_fit_start")


@pytest.mark.parametrize("where", ["setup", "configure_model", "on_fit_start"])
@pytest.mark.parametrize("average", [False, True])
def test_a_models_copy_of_itself_has_no_wrapped_hooks(where: str, average: bool) -> None:
    callback, model = sparsity(density=0.5), CopiesItself(where)
    others = [AVERAGES["ema"]()] if average else []
    trainer(callback, *others).fit(model, loader())
    assert callback.sparsifier.follows == {f"teacher.net.{i}": f"net.{i}" for i in (0, 2)}
    pickle.dumps(model)
    teacher = model.teacher.requires_grad_(True)
    alone = sparsity(density=0.5)
    trainer(alone).fit(teacher, loader())
    assert {*alone.sparsifier.layers} == {"net.0", "net.2"} and alone.last_update is not None


def test_a_model_can_be_pickled_while_it_trains_and_after_a_fit_that_failed() -> None:
    class Fails(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
            pickle.dumps(pl_module)
            raise InterruptedError

    model, callback = BuiltInSetup(), sparsity(density=0.5)
    with pytest.raises(InterruptedError):
        trainer(callback, Fails()).fit(model, loader())
    pickle.dumps(model)


class LoadsInSetup(Classifier):
    """Loads weights whose largest blocks are in the first block column."""

    def setup(self, stage: str) -> None:
        state = self.state_dict()
        if "net.0.weight" in state:
            state = {name: tensor.clone() for name, tensor in state.items()}
            for name in ("net.0.weight", "net.2.weight"):
                state[name][:, :16] += 3.0
            self.load_state_dict(state)


def test_blocks_are_chosen_by_the_weights_that_setup_loads() -> None:
    floor = {"row": 0, "column": 0}  # so that exactly the largest blocks are chosen
    callback = sparsity(init="magnitude", density=0.25, grow="none", floor=floor)
    model = LoadsInSetup(lr=0.0)
    trainer(callback, max_steps=2).fit(model, loader())
    for i in (0, 2):
        assert model.net[i].topology.mask[:, 0].all()


AVERAGES: dict[str, Any] = {
    "ema": lambda: EMAWeightAveraging(decay=0.9),
    "swa": lambda: StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1),
}


@pytest.mark.parametrize("kind", AVERAGES)
def test_averages_of_a_model_that_has_a_setup(kind: str) -> None:
    """Averaging callbacks copy the model before its `setup`, and so before the swap."""

    class WithSetup(Classifier):
        def setup(self, stage: str) -> None:
            self.was_set_up = True

    models = []
    for build in (Classifier, WithSetup):
        model, average = build(), AVERAGES[kind]()
        trainer(sparsity(density=0.5), average, max_steps=-1, max_epochs=3).fit(model, loader())
        models.append(model)
    usual, model = models
    assert isinstance(model.net[0], BlockSparseLinear)
    for name, tensor in usual.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


# -- other processes --------------------------------------------------------------------------


def test_a_callback_can_be_pickled_before_and_after_a_fit() -> None:
    callback, model = sparsity(density=0.5), Classifier()
    again = pickle.loads(pickle.dumps(callback))
    assert again.config == callback.config
    trainer(callback).fit(model, loader())
    pickle.loads(pickle.dumps((callback, model)))


class Importable(Classifier):
    """Can be unpickled in a spawned process."""


@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn", "ddp_notebook"])
@pytest.mark.usefixtures("spawned_from_server")
def test_a_dense_model_is_refused_in_other_processes(strategy: str, tmp_path: Path) -> None:
    model = Importable()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        Exception, match=r"`Trainer\(strategy=\.\.\.\)`[\s\S]*layer 'net\.0'[\s\S]*"
    ):
        trainer(sparsity(), root=tmp_path, strategy=strategy, devices=2).fit(model, loader())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_fork", "ddp_spawn"])
@pytest.mark.usefixtures("spawned_from_server")
def test_layers_swapped_before_the_fit_return_trained(strategy: str, tmp_path: Path) -> None:
    """The layers have fewer slots than before, since memory follows the density."""
    falling = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5}
    model = Importable()
    sparsify(model, block_size=16, density=1.0)
    before = float(model.loss(999))
    fitting = trainer(
        sparsity(density=falling), root=tmp_path, strategy=strategy, devices=2, max_steps=40
    )
    fitting.fit(model, loader(40))
    assert model.net[0].density == model.net[2].density == 0.25
    assert float(model.loss(999)) < 0.8 * before
    assert isinstance(fitting, L.Trainer)
