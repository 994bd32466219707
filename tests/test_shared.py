"""A module with several names in a model is one layer and keeps its names."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn

from sparse_lightning import (
    BlockSparseMLP,
    Sparsifier,
    SparsityCallback,
    densify,
    load_sparse,
    sparsify,
)
from sparse_lightning.export import dense_state_dict
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.loops import FALLING, adamw, sparse


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


class ActorAndCritic(nn.Module):
    """Two heads on one trunk; if `shared`, the trunk has a second name in each head's module."""

    def __init__(self, shared: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk, self.heads = mlp(), nn.ModuleList([nn.Linear(64, 4), nn.Linear(64, 2)])
        if shared:
            self.actor = nn.Sequential(self.trunk, self.heads[0])
            self.critic = nn.Sequential(self.trunk, self.heads[1])

    def forward(self, x: Tensor) -> Tensor:
        y = self.trunk(x)
        return torch.cat([head(y) for head in self.heads], -1)


class InOrder(nn.Module):
    """Layers that are attributes and also members of a Sequential."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2, self.fc3 = nn.Linear(64, 128), nn.Linear(128, 64), nn.Linear(64, 64)
        self.net = nn.Sequential(self.fc1, nn.ReLU(), self.fc2, nn.ReLU(), self.fc3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.net(x)
        return y


class SecondName(nn.Module):
    """A submodule of a member is also an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.ModuleDict({"encoder": mlp(), "decoder": nn.Linear(64, 64)})
        self.encoder = self.model["encoder"]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.model["decoder"](self.encoder(x))
        return y


def repeated() -> nn.Sequential:
    """The same layer at every depth."""
    layer = nn.Linear(64, 64)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer)


MODELS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a trunk of two": (ActorAndCritic, ["trunk.0", "trunk.2"]),
    "a Sequential of attributes": (InOrder, ["fc1", "fc2", "fc3"]),
    "a second name": (SecondName, ["model.encoder.0", "model.encoder.2", "model.decoder"]),
    "a layer at every depth": (repeated, ["0"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_a_shared_module_is_swapped_once_and_restored(kind: str) -> None:
    build, names = MODELS[kind]
    model, x = build(), torch.randn(3, 64)
    dense_names, before = {*model.state_dict()}, sum(p.numel() for p in model.parameters())
    report = sparsify(model, block_size=16, density=0.5)
    assert list(report.layers) == names
    saved_parameters = sum(
        layer.parameters_before - layer.parameters_after for layer in report.layers.values()
    )
    assert sum(p.numel() for p in model.parameters()) == before - saved_parameters
    y, saved = model(x), copy.deepcopy(model.state_dict())

    other = build()
    other.load_state_dict(dense_state_dict(saved))
    torch.testing.assert_close(other(x), y)
    assert torch.equal(load_sparse(other, saved)(x), y)
    assert [*other.state_dict()] == [*saved]
    # Loading a dense state dict makes the layers dense again.
    load_sparse(other, dense_state_dict(saved))
    assert not sparse(other) and {*other.state_dict()} == dense_names
    assert {*densify(model).state_dict()} == dense_names
    torch.testing.assert_close(model(x), y)


def test_layers_that_run_several_times_can_be_fused() -> None:
    model = repeated()
    sparsify(model, block_size=16, density=0.5)
    assert type(model) is BlockSparseMLP
    dense, x = densify(copy.deepcopy(model)), torch.randn(3, 64)
    model(x).sum().backward(), dense(x).sum().backward()
    torch.testing.assert_close(
        model[0].values.grad, model[0].topology.pack(dense[0].weight.grad), rtol=1e-4, atol=1e-5
    )


def test_a_shared_module_trains_and_resumes_as_if_it_had_one_name() -> None:
    def build(shared: bool) -> tuple[nn.Module, Sparsifier, torch.optim.Optimizer]:
        model = ActorAndCritic(shared)
        sparsifier = Sparsifier(
            model, 20, block_size=16, density=FALLING, update={"every_n_steps": 3}
        )
        return model, sparsifier, adamw(model.parameters())

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
        for step in steps:
            x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            (model(x) - x[:, :6]).square().mean().backward()
            optimizer.step()

    expected, sparsifier, optimizer = build(False)
    sparsifier.attach(optimizer)
    train(expected, optimizer, range(20))

    model, sparsifier, optimizer = build(True)
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10))
    saved: Any = copy.deepcopy(
        (model.state_dict(), optimizer.state_dict(), sparsifier.state_dict())
    )
    model, sparsifier, optimizer = build(True)
    model.load_state_dict(saved[0])
    sparsifier.load_state_dict(saved[2])
    optimizer.load_state_dict(saved[1])
    sparsifier.attach(optimizer)
    train(model, optimizer, range(10, 20))
    assert {*sparsifier.layers} == {"trunk.0", "trunk.2"} and sparsifier.n_updates > 3
    for name, layer in sparse(expected).items():
        assert torch.equal(layer.dense_weight(), sparse(model)[name].dense_weight())


class Encoder(Classifier):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.net


def test_a_fit_is_resumed(tmp_path: Path) -> None:
    def callback() -> SparsityCallback:
        return SparsityCallback(block_size=16, density=FALLING, update={"every_n_steps": 4})

    def weights(model: nn.Module) -> list[Tensor]:
        return [layer.dense_weight() for layer in sparse(model).values()]

    whole, model = Encoder(), Encoder()
    half, resumed = callback(), callback()
    each = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=10, save_top_k=-1)
    trainer(half, each, enable_checkpointing=True).fit(whole, loader())
    trainer(resumed).fit(model, loader(), ckpt_path=tmp_path / "step=10.ckpt")
    assert list(half.report.layers) == list(resumed.sparsifier.layers) == ["net.0", "net.2"]
    assert all(map(torch.equal, weights(model), weights(whole)))


def test_name_patterns_match_any_name() -> None:
    for exclude in (["trunk.*"], ["critic.*"], ["actor.0.0", "critic.0.2"]):
        with pytest.raises(ValueError, match=r"trunk\.0: excluded; trunk\.2: excluded"):
            sparsify(ActorAndCritic(), block_size=16, exclude=exclude)
    with pytest.raises(ValueError, match=r"`include`.*got 'critic\.0\.2'\. Write 'trunk\.2'"):
        sparsify(ActorAndCritic(), block_size=16, include=["critic.0.2"])

    class Named(InOrder):
        def __init__(self) -> None:
            super().__init__()
            self.head = self.net[2]  # only the name marks it as an output layer

    assert sparsify(Named(), block_size=16).skipped == {"fc2": "excluded"}
    assert "fc2" in sparsify(Named(), block_size=16, include=["fc2"]).layers
