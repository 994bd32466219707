"""A model, its batches and its sparsity options, shared by the tests of all training loops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from sparse_lightning import Sparsifier

STEPS, ACCUMULATE, BATCH, CLIP = 24, 2, 8, 0.5
SGD = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}

# The falling density makes updates move blocks and shrink layers.
RIGL: dict[str, Any] = {
    "block_size": 16,
    "exclude": ["head"],
    "density": {"schedule": "cubic", "initial": 1.0, "final": 0.25, "begin": 0, "until": 0.75},
    "update": {"every_n_steps": 3, "until": 0.9},
}


class Net(nn.Module):
    """Three layers, the last of which stays dense; forward returns the loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(64, 96), nn.Linear(96, 64)
        self.head = nn.Linear(64, 4)

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        out = self.head(torch.tanh(self.down(torch.relu(self.up(x)))))
        return {"loss": (out - y).square().mean()}


class Examples(Dataset[dict[str, Tensor]]):
    """Each example is drawn with its index as the seed; `first` selects other examples."""

    def __init__(self, batches: int = STEPS * ACCUMULATE, first: int = 0) -> None:
        self.count, self.first = batches * BATCH, first

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        if number >= self.count:
            raise IndexError(number)
        generator = torch.Generator().manual_seed(self.first + number)
        x = torch.randn(64, generator=generator)
        return {"x": x, "y": 3 * x[:4]}


def loader(batches: int = STEPS * ACCUMULATE, first: int = 0) -> DataLoader[dict[str, Tensor]]:
    return DataLoader(Examples(batches, first), batch_size=BATCH)


def outcome(model: nn.Module) -> dict[str, Tensor]:
    """Return copies of the weights and the blocks; the state dict holds both."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Compare bit for bit."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.shape == other[name].shape, name
        assert torch.equal(tensor, other[name]), name


def plain(
    model: nn.Module, sparsifier: Sparsifier, optimizer: torch.optim.Optimizer, steps: range
) -> None:
    """Train in a plain loop over the batches of these steps."""
    batches = list(loader())
    for step in steps:
        for batch in batches[step * ACCUMULATE : (step + 1) * ACCUMULATE]:
            (model(**batch)["loss"] / ACCUMULATE).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
