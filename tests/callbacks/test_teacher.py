"""A teacher in the model follows on two ranks, whole or sharded; saved models can be loaded."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from sparse_lightning import BlockSparseLinear, SparsityCallback, load_sparse, sparsify
from sparse_lightning.sharding import gather_whole, is_sharded
from tests.callbacks.helpers import ACCELERATORS, Classifier, loader, sharded_in_two, trainer
from tests.processes import end_rank, run_ranks

FALLING = {"schedule": "cubic", "initial": 0.5, "final": 0.125, "until": 0.5}


class Student(Classifier):
    """Trains `net`, through a list of its layers, and averages it in a teacher after each batch."""

    def __init__(self, sharded: bool = False) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.stages = [*self.net]
        self.sharded, self.n_hooked = sharded, 0
        self.net[2].weight.register_hook(self.count)

    def count(self, gradient: torch.Tensor) -> None:
        self.n_hooked += 1

    def configure_model(self) -> None:
        if self.sharded and not is_sharded(self.head.weight):
            sparsify(self, block_size=16, density=0.5)
            for part in (self.net, self.teacher, self.head):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        # Sharded modules gather their parameters when they are called as a whole.
        for stage in [self.net] if self.sharded else self.stages:
            x = stage(x)
        return self.head(x)

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().batch(1000 * int(os.environ.get("LOCAL_RANK", "0")) + number)

    @torch.no_grad()
    def on_train_batch_end(self, *_: Any) -> None:
        for average, mine in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            average.lerp_(mine, 0.1)


@pytest.fixture(scope="module", params=ACCELERATORS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for strategy in ("ddp", "fsdp"):
        run_ranks(__file__, folder, request.param, strategy)
    return folder


def test_a_teacher_follows_on_every_rank(results: Path) -> None:
    ddp, other, fsdp = (
        torch.load(results / f"{name}.pt", weights_only=True)
        for name in ("ddp-0", "ddp-1", "fsdp-0")
    )
    assert ddp["updates"] == fsdp["updates"] > 2
    assert ddp["state"].keys() == fsdp["state"].keys() == other["state"].keys()
    for key, expected in ddp["state"].items():
        assert torch.equal(other["state"][key], expected), key
        torch.testing.assert_close(fsdp["state"][key], expected, rtol=1e-4, atol=1e-5)
    for result in (ddp, other, fsdp):
        assert result["hooked"] > 0 or result is fsdp
        for i in (0, 2):
            assert torch.equal(
                result["state"][f"net.{i}.coords"], result["state"][f"teacher.{i}.coords"]
            )


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_dense_model_loads_what_ranks_saved(strategy: str, results: Path) -> None:
    saved = torch.load(results / f"{strategy}-0.pt", weights_only=True)
    model = load_sparse(Student(), results / f"{strategy}.ckpt")
    assert isinstance(model.teacher[0], BlockSparseLinear)
    torch.testing.assert_close(model(torch.ones(2, 64)), saved["output"])
    torch.testing.assert_close(model.teacher(torch.ones(2, 64)), saved["teachers"])


def fit(out: Path, accelerator: str, strategy: str) -> None:
    sparsity = SparsityCallback(
        block_size=16, density=FALLING, update={"every_n_steps": 4}, shrink=strategy == "ddp"
    )
    model = Student(strategy == "fsdp")
    sharding = sharded_in_two(accelerator)
    fitting = trainer(
        sparsity,
        root=out,
        accelerator=accelerator,
        devices=2,
        strategy=sharding if strategy == "fsdp" else "ddp",
    )
    fitting.fit(model, loader(24))
    assert sparsity.sparsifier is not None
    assert sparsity.sparsifier.follows == {"teacher.0": "net.0", "teacher.2": "net.2"}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}
    assert len(layers) == 4
    state = {name: layer.dense_weight().cpu() for name, layer in layers.items()}
    state |= {f"{name}.coords": layer.topology.coords.cpu() for name, layer in layers.items()}
    if strategy == "fsdp":  # fully_shard keeps empty slots
        state = {n: t[t[:, 0] >= 0] if n.endswith("coords") else t for n, t in state.items()}
    x = torch.ones(2, 64, device=gather_whole(model.head.weight).device)
    kept = {
        "state": state,
        "updates": sparsity.sparsifier.n_updates,
        "hooked": model.n_hooked,
        "output": model(x).detach().cpu(),
        "teachers": model.teacher(x).detach().cpu(),
    }
    everything = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
    )
    torch.save(kept, out / f"{strategy}-{fitting.global_rank}.pt")
    if fitting.global_rank == 0:
        torch.save(everything, out / f"{strategy}.ckpt")


if __name__ == "__main__":
    fit(Path(sys.argv[1]), *sys.argv[2:])
    end_rank()
