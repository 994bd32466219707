"""SparsityCallback together with other features of Lightning."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import (
    BitsandbytesPrecision,
    Precision,
    TransformerEnginePrecision,
)
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.tuner.lr_finder import _lr_find
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, SparsityCallback, densify
from tests.callbacks.helpers import Classifier, Late, loader, trainer
from tests.callbacks.test_resume import assert_identical
from tests.pages import example

UPDATES = {"every_n_steps": 4}
FALLING = {"schedule": "cubic", "initial": 1.0, "final": 0.25}


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def steps(sparsity: SparsityCallback) -> int:
    assert sparsity.sparsifier is not None
    return sparsity.sparsifier.steps


class Normed(Classifier):
    """Has a BatchNorm, for which weight averaging runs one more epoch without steps."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.BatchNorm1d(64))


# -- averages -------------------------------------------------------------------------------------


class DenseAverage(L.Callback):
    """Averages dense weights as an averaging callback averages slots, and counts changed weights.

    The average of a weight starts at its growth, and is zero after its drop.
    """

    def __init__(self, weight_of_new: Any) -> None:
        self.weight_of_new = weight_of_new
        self.averages: dict[str, Tensor] = {}
        self.masks: dict[str, Tensor] = {}
        self.moved = self.taken = self.compared = 0

    def take(self, model: nn.Module) -> None:
        for name, layer in sparse(model).items():
            weight = layer.dense_weight()
            average = self.averages.setdefault(name, weight.clone())
            average.lerp_(weight, self.weight_of_new(self.taken))
        self.taken += 1

    def follow(self, model: nn.Module) -> None:
        for name, layer in sparse(model).items():
            mask = layer.topology.unpack(torch.ones_like(layer.values.detach())).bool()
            before = self.masks.get(name, mask)
            self.moved += int((mask ^ before).sum())
            if name in self.averages:
                self.averages[name] *= mask & before
            self.masks[name] = mask

    def check(self, model: nn.Module) -> None:
        assert self.moved > 0 and self.taken > 1
        assert set(self.averages) == {"net.0", "net.2"}
        self.compare(model)

    def compare(self, model: nn.Module) -> None:
        self.compared += 1
        for name, layer in sparse(model).items():
            torch.testing.assert_close(layer.dense_weight(), self.averages[name])


class EveryEpoch(DenseAverage):
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if 1 <= trainer.current_epoch <= 3:
            self.take(pl_module)
        if trainer.current_epoch == 4:
            self.check(pl_module)  # SWA has put the average into the model

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.follow(pl_module)


@pytest.mark.parametrize("nm", [None, "2:4"])
@pytest.mark.parametrize("density", [0.25, FALLING])
@pytest.mark.parametrize(
    ("until", "last"), [(1.0, 32), (30, 30), pytest.param(33, 32, id="after the end")]
)
@pytest.mark.parametrize("build", [Classifier, Normed])
def test_swa_ends_with_the_average_of_each_block(
    build: type[Classifier], until: float, last: int, density: Any, nm: str | None
) -> None:
    sparsity = SparsityCallback(
        nm=nm, block_size=16, density=density, update={"every_n_steps": 5, "until": until}
    )
    swa = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2, annealing_epochs=1)
    average = EveryEpoch(lambda taken: 1 / (taken + 1))
    model = build()
    trainer(sparsity, swa, average, max_steps=-1, max_epochs=4).fit(model, loader())
    # The additional epoch for batch norm has no steps and no updates.
    assert (steps(sparsity), sparsity.last_update.step) == (32, last)
    if build is Classifier:
        average.check(model)


class EveryStep(DenseAverage):
    def on_validation_batch_start(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if self.taken:
            self.compare(pl_module)  # validation runs with the averages

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.follow(pl_module)
        self.take(pl_module)


@pytest.mark.parametrize("nm", [None, "2:4"])
@pytest.mark.parametrize("density", [0.25, FALLING])
@pytest.mark.parametrize("build", [Classifier, Late])
@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback with a model")
def test_ema_ends_with_the_average_of_each_block(
    build: type[Classifier], density: Any, nm: str | None
) -> None:
    sparsity = SparsityCallback(block_size=16, density=density, update=UPDATES, nm=nm)
    average = EveryStep(lambda taken: 0.1 if taken else 1.0)
    model = build()
    trainer(
        sparsity, EMAWeightAveraging(decay=0.9), average, val_check_interval=4, limit_val_batches=1
    ).fit(model, loader(), loader(1))
    assert average.compared == 6, "24 steps, a validation every 4"
    average.check(model)


# -- clipping -------------------------------------------------------------------------------------


class Keep(L.Callback):
    """Keeps a dense copy of the modules at the start of training."""

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self.net = densify(copy.deepcopy(pl_module.net))
        self.head = copy.deepcopy(pl_module.head)


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_as_those_of_a_masked_dense_model(algorithm: str) -> None:
    model, keep, limit = Classifier(0.5, torch.optim.SGD), Keep(), 0.02
    sparsity = SparsityCallback(block_size=16, grow="none", update=UPDATES)
    trainer(
        sparsity,
        keep,
        max_steps=10,
        precision="64-true",
        gradient_clip_val=limit,
        gradient_clip_algorithm=algorithm,
    ).fit(model, loader())

    dense = nn.Sequential(keep.net, keep.head)
    clip = getattr(nn.utils, f"clip_grad_{algorithm}_")
    optimizer = torch.optim.SGD(dense.parameters(), lr=0.5)
    clipped = 0
    for number in range(10):
        x, _ = model.batch(number)
        x = torch.randn(
            16, 64, generator=torch.Generator().manual_seed(number), dtype=x.double().dtype
        )
        optimizer.zero_grad()
        nn.functional.cross_entropy(dense(x), (x[:, :4] * 3).argmax(1)).backward()
        for name, layer in sparse(model).items():
            weight = dense.get_submodule(name.replace("net", "0")).weight
            weight.grad *= layer.topology.unpack(torch.ones_like(layer.values))
        before = [p.grad.clone() for p in dense.parameters()]
        clip(dense.parameters(), limit)
        clipped += any(
            not torch.equal(p.grad, g) for p, g in zip(dense.parameters(), before, strict=True)
        )
        optimizer.step()
    assert clipped == 10
    for name, layer in sparse(model).items():
        weight = dense.get_submodule(name.replace("net", "0")).weight
        torch.testing.assert_close(layer.dense_weight(), weight.detach(), rtol=1e-10, atol=1e-10)


# -- trial runs and repeated fits -----------------------------------------------------------------


def state(model: nn.Module, sparsity: SparsityCallback) -> dict[str, Any]:
    return copy.deepcopy({"model": dict(model.state_dict()), "sparsity": sparsity.state_dict()})


@pytest.mark.parametrize("build", [Classifier, Late])
def test_lr_find_leaves_everything_as_it_was(build: type[Classifier], tmp_path: Path) -> None:
    """The following training equals that of a run without `lr_find`, bit for bit."""

    def run(find: bool) -> tuple[Any, SparsityCallback]:
        sparsity, model = SparsityCallback(block_size=16, density=FALLING, update=UPDATES), build()
        fitting = trainer(sparsity, root=tmp_path)
        if find:
            finder = Tuner(fitting).lr_find(model, loader(), num_training=12, update_attr=False)
            assert len(finder.results["loss"]) == 12
            model.losses.clear()
        fitting.fit(model, loader())
        return model, sparsity

    (searched, after), (plain, without) = run(True), run(False)
    assert after.last_update.number == without.last_update.number > 3
    assert len(plain.losses) == 24 and searched.losses == plain.losses
    assert_identical(state(searched, after), state(plain, without))


def test_lr_find_before_the_model_was_swapped(tmp_path: Path) -> None:
    sparsity, model = SparsityCallback(block_size=16, update=UPDATES), Classifier()
    fitting = trainer(sparsity, root=tmp_path)
    Tuner(fitting).lr_find(model, loader(), num_training=12)
    assert list(sparse(model)) == ["net.0", "net.2"]
    assert steps(sparsity) == 0 and sparsity.last_update is None
    fitting.fit(model, loader())
    assert [n.topology.n_blocks for n in sparse(model).values()] == [8, 8]
    assert sparsity.last_update.number > 3


def test_lr_find_in_the_middle_of_a_training(tmp_path: Path) -> None:
    """Scores are gathered at every step, and memory has shrunk already."""

    class Milestone(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            if trainer.current_epoch == 2:
                before, losses = state(pl_module, sparsity), [*pl_module.losses]
                _lr_find(trainer, pl_module, num_training=5)
                assert_identical(state(pl_module, sparsity), before)
                pl_module.losses = losses

    def run(*callbacks: L.Callback) -> Any:
        model = Classifier()
        trainer(sparsity, *callbacks, root=tmp_path, max_steps=-1, max_epochs=4).fit(
            model, loader(6)
        )
        return model

    def new() -> SparsityCallback:
        return SparsityCallback(block_size=16, density=FALLING, drop="movement", update=UPDATES)

    sparsity = new()
    searched = run(Milestone())
    sparsity = new()
    plain = run()
    assert sum(len(layer.values) for layer in sparse(plain).values()) < 64
    assert len(plain.losses) == 24
    assert_identical(dict(searched.state_dict()), dict(plain.state_dict()))


def test_a_learning_rate_finder_in_the_same_fit(tmp_path: Path) -> None:
    sparsity, model = SparsityCallback(block_size=16, update=UPDATES), Classifier()
    finder = LearningRateFinder(num_training_steps=40)
    trainer(sparsity, finder, root=tmp_path).fit(model, loader())
    assert finder.optimal_lr.suggestion() == model.lr != 1e-2
    assert steps(sparsity) == 24 and sparsity.last_update.step == 18


def test_overfit_batches() -> None:
    sparsity, model = SparsityCallback(block_size=16, update=UPDATES), Classifier()
    trainer(sparsity, overfit_batches=2, max_steps=-1, max_epochs=10).fit(model, loader())
    assert steps(sparsity) == len(model.losses) == 20
    assert sparsity.last_update.step == 15, "three quarters of 2 batches for 10 epochs"


def test_a_second_fit_of_the_same_trainer_continues() -> None:
    sparsity, model = SparsityCallback(block_size=16, density=FALLING, update=UPDATES), Classifier()
    fitting = trainer(sparsity, max_steps=-1, max_epochs=3)
    fitting.fit(model, loader())
    first = sparse(model)
    masks = {name: layer.topology.mask for name, layer in first.items()}
    fitting.fit_loop.max_epochs = 5
    fitting.fit(model, loader())
    assert steps(sparsity) == len(model.losses) == 40
    assert sparse(model) == first
    for name, layer in first.items():
        assert layer.density == 0.25
        assert torch.equal(layer.topology.mask, masks[name]), "updates ended in the first fit"


# -- plugins that replace layers ------------------------------------------------------------------


@pytest.mark.parametrize("plugin_class", [BitsandbytesPrecision, TransformerEnginePrecision])
def test_precisions_that_replace_layers_are_refused_by_name(plugin_class: type[Precision]) -> None:
    # The constructor imports a package that needs a GPU.
    plugin = plugin_class.__new__(plugin_class)
    model = Classifier()
    fitting = trainer(SparsityCallback(block_size=16))
    fitting.strategy.precision_plugin = plugin
    with pytest.raises(
        ValueError, match=f"got {plugin_class.__name__}.*Use precision='bf16-mixed'"
    ):
        fitting.fit(model, loader())
    assert not sparse(model) and not model.losses


# -- weight decay ---------------------------------------------------------------------------------


class Still(Classifier):
    """Has zero gradients, so that only weight decay changes weights."""

    def __init__(self) -> None:
        super().__init__()
        self.net.append(nn.LayerNorm(64))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return 0 * super().training_step(batch, batch_idx)


def test_the_readmes_parameter_groups_decay_weights_alone() -> None:
    recipe = example("weight_decay")["configure_optimizers"]

    class Decayed(Still):
        configure_optimizers = recipe

    class Before(L.Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
            self.values = {n: p.detach().clone() for n, p in pl_module.named_parameters()}

    model, before = Decayed(), Before()
    nn.init.ones_(model.net[4].bias)
    fitting = trainer(SparsityCallback(block_size=16, grow="none"), before, max_steps=5)
    fitting.fit(model, loader())
    decayed, rest = fitting.optimizers[0].param_groups
    assert decayed["weight_decay"] > 0 and rest["weight_decay"] == 0
    kept = (1 - decayed["lr"] * decayed["weight_decay"]) ** 5
    assert kept < 0.9999
    for name, p in model.named_parameters():
        factor = kept if name in ("net.0.values", "net.2.values", "head.weight") else 1.0
        torch.testing.assert_close(p.detach(), before.values[name] * factor)
