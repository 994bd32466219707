"""`load_sparse` and `load_from_checkpoint`: layers become block-sparse or dense as saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_model
from torch import nn

from sparse_lightning import (
    BlockSparseLinear,
    BlockSparseMLP,
    SparsityCallback,
    densify,
    load_from_checkpoint,
    load_sparse,
    sparsify,
)
from tests.callbacks.helpers import Classifier, Late, loader, trainer
from tests.loops import Net, sparse


def trained(density: float = 0.5, block_size: int = 16) -> Net:
    model = Net()
    sparsify(model, block_size=block_size, density=density, exclude=["head"], max_density=1.0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
        for layer in sparse(model).values():
            layer._zero_empty_slots()
    return model


def as_path(model: nn.Module, folder: Path) -> Path:
    torch.save(model.state_dict(), folder / "weights.pt")
    return folder / "weights.pt"


def as_safetensors(model: nn.Module, folder: Path) -> str:
    save_model(model, str(folder / "weights.safetensors"))
    return str(folder / "weights.safetensors")


def as_state_dict(model: nn.Module, folder: Path) -> dict[str, Any]:
    return dict(model.state_dict())


def as_lightning(model: nn.Module, folder: Path) -> dict[str, Any]:
    return {"state_dict": model.state_dict(), "epoch": 3}


SOURCES = (as_path, as_safetensors, as_state_dict, as_lightning)
INITIAL_MODELS = {
    "dense": Net,
    "other blocks": lambda: trained(0.25, 32),
    "fewer layers": lambda: _partly_sparse(),
}


def _partly_sparse() -> Net:
    model = Net()
    sparsify(model, block_size=16, density=0.25, include=["0"])
    return model


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("initial", INITIAL_MODELS)
def test_the_loaded_model_computes_the_same(initial: str, source: Any, tmp_path: Path) -> None:
    saved, x = trained(), torch.randn(3, 64)
    model = INITIAL_MODELS[initial]()
    parameters = [id(parameter) for parameter in model.parameters()]
    assert load_sparse(model, source(saved, tmp_path)) is model
    assert torch.equal(model(x), saved(x))
    assert type(model.net) is BlockSparseMLP
    assert [id(parameter) for parameter in model.parameters()] == parameters
    for name, layer in sparse(saved).items():
        mine = sparse(model)[name]
        assert (mine.block_size, mine.topology.capacity) == (16, layer.topology.capacity)


@pytest.mark.parametrize("source", SOURCES)
def test_layers_become_dense_if_the_checkpoint_is_dense(source: Any, tmp_path: Path) -> None:
    saved, model, x = densify(trained()), trained(), torch.randn(3, 64)
    load_sparse(model, source(saved, tmp_path))
    assert not sparse(model) and type(model.net) is nn.Sequential
    assert torch.equal(model(x), saved(x))


def test_a_prefix_is_removed() -> None:
    saved = nn.ModuleDict({"net": trained(), "other": nn.Linear(3, 3)})
    model, x = Net(), torch.randn(3, 64)
    load_sparse(model, saved.state_dict(), prefix="net.")
    assert torch.equal(model(x), saved["net"](x))
    with pytest.raises(ValueError, match=r"got 'nett\.'. Names begin with net\., "):
        load_sparse(Net(), saved.state_dict(), prefix="nett.")


def test_other_modules_load_their_own_extra_state() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.values, self.seen = nn.Parameter(torch.ones(2)), 0

        def get_extra_state(self) -> torch.Tensor:
            return torch.tensor([self.seen])

        def set_extra_state(self, state: torch.Tensor) -> None:
            self.seen = int(state)

    saved = nn.ModuleDict({"odd": Odd(), "net": trained()})
    saved["odd"].seen = 7
    model = nn.ModuleDict({"odd": Odd(), "net": Net()})
    load_sparse(model, saved.state_dict())
    assert model["odd"].seen == 7 and len(sparse(model)) == 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda m: setattr(m, "net", nn.Sequential(nn.Linear(64, 64))), ValueError, "128x64"),
        (lambda m: setattr(m, "net", nn.Sequential(nn.ReLU())), ValueError, r"ReLU \(layer 'net.0"),
        (lambda m: setattr(m, "net", nn.ReLU()), RuntimeError, "Unexpected.*net.0.values"),
    ],
)
def test_a_different_model_raises(change: Any, error: type[Exception], message: str) -> None:
    model = Net()
    change(model)
    with pytest.raises(error, match=message):
        load_sparse(model, trained().state_dict())
    assert not sparse(model)


def test_a_damaged_file_raises_and_leaves_the_model_unchanged(tmp_path: Path) -> None:
    state = trained().state_dict()
    state["net.2._extra_state"][0] = 9
    model = Net()
    with pytest.raises(ValueError, match=r"saved topology.*layer 'net\.2'"):
        load_sparse(model, state)
    with pytest.raises(ValueError, match="must be an existing file"):
        load_sparse(model, tmp_path / "nothing.ckpt")
    assert not sparse(model)


class Configured(Classifier):
    """Has hyperparameters, and hooks that save and load an attribute."""

    def __init__(self, width: int, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 64))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["noted"] = 5

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.noted = checkpoint["noted"]


def saved_by(model: L.LightningModule, folder: Path, **options: Any) -> Path:
    fitting = trainer(SparsityCallback(block_size=16, **options), max_steps=6)
    fitting.fit(model, loader())
    fitting.save_checkpoint(folder / "last.ckpt")
    return folder / "last.ckpt"


def test_a_module_is_built_from_its_hyperparameters(tmp_path: Path) -> None:
    model = Configured(128, scale=2.0)
    path = saved_by(model, tmp_path)
    loaded = load_from_checkpoint(Configured, path)
    assert type(loaded) is Configured and loaded.hparams == {"width": 128, "scale": 2.0}
    assert loaded.noted == 5
    x = torch.randn(3, 64)
    assert torch.equal(loaded(x), model(x))
    assert load_from_checkpoint(Configured, path, scale=3.0).hparams["scale"] == 3.0
    copy.deepcopy(loaded)


@pytest.mark.parametrize("build", [Classifier, Late])
def test_a_module_that_builds_layers_late(build: type[Classifier], tmp_path: Path) -> None:
    path = saved_by(build(), tmp_path)
    loaded = load_from_checkpoint(build, path)
    assert {*sparse(loaded)} == {"net.0", "net.2"}
    trainer(max_steps=2).fit(loaded, loader())


def test_a_class_that_is_no_lightning_module_raises(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="use load_sparse"):
        load_from_checkpoint(Net, tmp_path)


def test_a_loaded_model_continues_to_train_sparsely(tmp_path: Path) -> None:
    path = saved_by(Classifier(), tmp_path)
    model = load_from_checkpoint(Classifier, path)
    sparsity = SparsityCallback(block_size=16, update={"every_n_steps": 4})
    trainer(sparsity, max_steps=12).fit(model, loader())
    assert sparsity.last_update is not None
    assert all(isinstance(model.net[i], BlockSparseLinear) for i in (0, 2))
