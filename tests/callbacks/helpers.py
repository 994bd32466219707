"""A small model whose batch depends on the step alone, and a quiet trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_lightning import BlockSparseLinear, BlockTopology, SparsityCallback
from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.criteria import BlockScores
from sparse_lightning.policy.rules import Decision, UpdateRequest


class Classifier(L.LightningModule):
    """An MLP of two swappable layers and a dense head.

    Its input depends on the number of the batch alone, so that a resumed run sees the same data as
    an uninterrupted one, wherever in an epoch it was interrupted.
    """

    def __init__(self, lr: float = 1e-2, optimizer: type = torch.optim.AdamW) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU())
        self.head = nn.Linear(64, 4)
        self.lr, self.optimizer = lr, optimizer
        self.losses: list[float] = []

    def batch(self, number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(16, 64, generator=generator).to(self.device)
        return x, (x[:, :4] * 3).argmax(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))

    def loss(self, number: int) -> Tensor:
        x, y = self.batch(number)
        return nn.functional.cross_entropy(self(x), y)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loops = self.trainer.fit_loop.epoch_loop
        loss = self.loss(loops.total_batch_idx)
        self.losses.append(float(loss.detach()))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(10_000 + batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters(), lr=self.lr)


class RecordScores(SparsityCallback):
    """Records the scores passed to each update's rule, by layer; applies the default rule."""

    def __init__(self, block_size: int = 16, **options: Any) -> None:
        self.seen: list[dict[str, BlockScores]] = []
        names = ("drop", "grow", "regrow")
        default = SparsityConfig(
            block_size=block_size, **{name: options.pop(name) for name in names if name in options}
        ).update_rule

        def rule(request: UpdateRequest) -> Decision:
            self.seen.append(dict(request.layers))
            return default(request)

        rule.needs = default.needs  # type: ignore[attr-defined]
        super().__init__(block_size, rule=rule, **options)


class Manual(Classifier):
    """Steps its optimizer itself."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch_idx))
        optimizer.step()


class Late(Classifier):
    """Builds its layers in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            self.net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def loader(batches: int = 8) -> DataLoader[Any]:
    return DataLoader(TensorDataset(torch.zeros(batches, 1)), batch_size=1)


def trainer(*callbacks: L.Callback, root: Path | None = None, **kwargs: Any) -> L.Trainer:
    options: dict[str, Any] = {
        "accelerator": "cpu",
        "callbacks": list(callbacks),
        "default_root_dir": root,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "logger": False,
        "max_steps": 24,
    }
    return L.Trainer(**{**options, **kwargs})


ACCELERATORS = [
    "cpu",
    pytest.param(
        "gpu",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs"),
        ],
    ),
]


def sharded_in_two(accelerator: str) -> ModelParallelStrategy:
    """A strategy for models that call `fully_shard` themselves."""
    return ModelParallelStrategy(
        data_parallel_size=2,
        tensor_parallel_size=1,
        process_group_backend="nccl" if accelerator == "gpu" else "gloo",
    )


def assert_valid(layer: BlockSparseLinear, optimizer: torch.optim.Optimizer, blocks: int) -> None:
    """Check the number of blocks, that the indices are correct, and that empty slots are zero."""
    topology = layer.topology
    coords = [tuple(pair) for pair in topology.coords.tolist()]
    present = [pair for pair in coords if pair != (-1, -1)]
    assert len(present) == len(set(present)) == topology.n_blocks == blocks
    (rows, cols), size = topology.grid, topology.block_size
    assert all(0 <= row < rows and 0 <= col < cols for row, col in present)
    positions = None if topology.positions is None else topology.positions.cpu()
    expected = BlockTopology(topology.coords.cpu(), topology.grid, size, positions)
    for name, tensor in vars(expected).items():
        if isinstance(tensor, Tensor):
            assert torch.equal(getattr(topology, name).cpu(), tensor), name
    empty = (topology.coords[:, 0] < 0).nonzero().squeeze(1)
    held = {"values": layer.values.detach(), **optimizer.state[layer.values]}
    for name, tensor in held.items():
        if tensor.dim():
            assert tensor.shape == topology.values_shape, name
            assert not tensor[empty.to(tensor.device)].any(), name
