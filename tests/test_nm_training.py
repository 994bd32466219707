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
from sparse_lightning.gathering import NormAccumulator
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


def dense_gradients(model: Net, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each layer's dense weight, by autograd on dense weights."""
    layers = sparse(model)
    weights = {name: layer.dense_weight().requires_grad_() for name, layer in layers.items()}

    def forward(x: Tensor) -> Tensor:
        for name, layer in layers.items():
            x = nn.functional.linear(x, weights[name], layer.bias).relu()
        return model.head(x)  # type: ignore[no-any-return]

    gradients = torch.autograd.grad(loss(forward), [*weights.values()])
    return dict(zip(weights, gradients, strict=True))


class Step:
    """What happens between two steps of the optimizer; returns the loss that counts."""

    def __init__(self, model: Net, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def plain(self) -> Any:
        loss_of(self.model, 1).backward()
        return entropy(1)

    def micro_batches(self) -> Any:
        for number in range(3):
            loss_of(self.model, number).backward()
        return lambda net: sum(entropy(number)(net) for number in range(3))

    def cleared(self, set_to_none: bool = True) -> Any:
        """As a critic does, whose gradients are first filled by its generator."""
        loss_of(self.model, 5).backward()
        self.optimizer.zero_grad(set_to_none)
        loss_of(self.model, 1).backward()
        return entropy(1)

    def zeroed(self) -> Any:
        return self.cleared(set_to_none=False)

    def of_the_input(self) -> Any:
        """A gradient that is returned, and one that is accumulated in the input alone, are none."""
        x, y = batch(1)
        x.requires_grad_()
        torch.autograd.grad(self.model(x).sum(), x)
        torch.autograd.grad(self.model(x).sum(), [*self.model.parameters()])
        self.model(x).sum().backward(inputs=[x])
        nn.functional.cross_entropy(self.model(x), y).backward()
        return entropy(1)

    def by_names(self) -> Any:
        loss_of(self.model, 1).backward(inputs=[*self.model.parameters()])
        return entropy(1)

    def kept_graph(self) -> Any:
        loss = loss_of(self.model, 1)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return lambda net: 3 * entropy(1)(net)

    def penalty(self) -> Any:
        def loss(net: Any) -> Tensor:
            x, _ = batch(1)
            x.requires_grad_()
            (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            return entropy(1)(net) + dx.square().sum()

        loss(self.model).backward()
        return loss

    def checkpointed(self, use_reentrant: bool = False) -> Any:
        x, y = batch(1)
        hidden = checkpoint(self.model.net, x.requires_grad_(), use_reentrant=use_reentrant)
        nn.functional.cross_entropy(self.model.head(hidden), y).backward()
        return entropy(1)

    def reentrant(self) -> Any:
        return self.checkpointed(use_reentrant=True)

    def failed(self) -> Any:
        """A backward runs out of memory, and the batch is tried again."""
        x, y = batch(1)
        x.requires_grad_().register_hook(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            nn.functional.cross_entropy(self.model(x), y).backward(inputs=[x])
        with pytest.raises(torch.OutOfMemoryError):
            nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.zero_grad()
        return self.plain()

    def compiled(self) -> Any:
        torch.compiler.reset()
        x, y = batch(1)
        output = torch.compile(self.model, backend="aot_eager", fullgraph=True)(x)
        nn.functional.cross_entropy(output, y).backward()
        return entropy(1)


def out_of_memory(gradient: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("simulated")


def entropy(number: int) -> Callable[[Any], Tensor]:
    x, y = batch(number)
    return lambda net: nn.functional.cross_entropy(net(x), y)


def test_a_layer_in_and_around_a_reentrant_checkpoint() -> None:
    """The backward of the checkpoint runs, and accumulates, within that of the whole."""
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5, nm="2:4", dtype=torch.float64)
    weight = layer.dense_weight().requires_grad_()
    accumulator = NormAccumulator(layer, layer.values, needs_norms=False, needs_blocks=True)
    accumulator.arm(True)
    x = torch.randn(8, 64, dtype=torch.float64, requires_grad=True)
    dense = lambda x: nn.functional.linear(x, weight, layer.bias).tanh()  # noqa: E731
    ours = lambda x: layer(x).tanh()  # noqa: E731
    ours(checkpoint(ours, ours(x), use_reentrant=True)).square().sum().backward()
    dense(dense(dense(x))).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(accumulator.collect()[1], layer.topology._blocks_of(weight.grad))


@pytest.mark.parametrize("what", [name for name in vars(Step) if not name.startswith("_")])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_gradient_of_whole_blocks_is_that_of_the_step(
    what: str, grow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the gradient of dense weights, for everything that the step applies."""
    seen: dict[str, Tensor] = {}

    def exchange(values: Tensor, positions: Tensor, gradient: Tensor, *_: Any) -> Tensor:
        seen[f"{len(seen)}"] = gradient
        return positions

    monkeypatch.setattr("sparse_lightning.sparsifier.exchange_weights", exchange)
    model, _, optimizer = start(grow=grow, update=EVERY_STEP, drop_fraction=1e-9)
    train(model, optimizer, [0])
    seen.clear()
    expected = dense_gradients(model, getattr(Step(model, optimizer), what)())
    optimizer.step()
    assert len(seen) == 2
    for gradient, (name, layer) in zip(seen.values(), sparse(model).items(), strict=True):
        topology = layer.topology
        torch.testing.assert_close(
            gradient, topology._blocks_of(expected[name]), rtol=1e-4, atol=1e-7
        )
        assert gradient.any(-1).any(-1).sum() >= topology.n_blocks - 1
