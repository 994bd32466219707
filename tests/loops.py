"""A small model and a plain training loop with batches that depend only on their number."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, Sparsifier
from tests.callbacks.helpers import assert_valid

FALLING = {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 0.5}


class Net(nn.Module):
    """Two layers of 32 blocks of 16 x 16 each, and a dense head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.net(x))
        return out


def batch(number: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(16, 64, generator=generator, dtype=torch.float32)
    return x, (x[:, :4] * 3).argmax(1)


def loss_of(model: nn.Module, number: int) -> Tensor:
    x, y = batch(number)
    return nn.functional.cross_entropy(model(x), y)


def make(
    total_steps: int | None = 24, cls: type[Sparsifier] = Sparsifier, **options: Any
) -> tuple[Net, Sparsifier]:
    """Return a model and its engine, which is not attached yet."""
    model = Net()
    return model, cls(model, total_steps, **{"block_size": 16, "exclude": ["head"], **options})


def adamw(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-2)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    numbers: Iterable[int],
    after: Callable[[int], None] = lambda number: None,
) -> list[float]:
    """Take a step for each batch, and return the losses."""
    losses = []
    for number in numbers:
        loss = loss_of(model, number)
        loss.backward()
        optimizer.step()
        after(number)
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def dense_gradients(model: Net, loss: Callable[[Any], Tensor]) -> dict[str, Tensor]:
    """Return the gradient of each layer's dense weight, by autograd on dense weights."""
    layers = sparse(model)
    weights = {name: layer.dense_weight().requires_grad_() for name, layer in layers.items()}

    def forward(x: Tensor) -> Tensor:
        for name, layer in layers.items():
            x = nn.functional.linear(x, weights[name], layer.bias).relu()
        return model.head(x)  # type: ignore[no-any-return]

    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(forward), [*weights.values()])
    return dict(zip(weights, gradients, strict=True))


def masks(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.topology.mask for name, layer in sparse(model).items()}


def blocks(model: nn.Module) -> list[int]:
    return [layer.topology.n_blocks for layer in sparse(model).values()]


def everything(
    model: nn.Module,
    optimizers: Iterable[torch.optim.Optimizer],
    sparsifier: Sparsifier,
    **more: Any,
) -> dict[str, Any]:
    """Return a copy of all that an update may change, including indices outside state dicts."""
    state = {
        "model": dict(model.state_dict()),
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "optimizers": dict(enumerate(o.state_dict()["state"] for o in optimizers)),
        "sparsifier": sparsifier.state_dict(),
        "indices": {n: vars(layer.topology) for n, layer in sparse(model).items()},
    }
    return copy.deepcopy({**state, **more})


def assert_all_valid(
    model: nn.Module, optimizer: torch.optim.Optimizer, expected: int | None = None
) -> None:
    for layer in sparse(model).values():
        assert_valid(layer, optimizer, expected or layer.topology.n_blocks)
