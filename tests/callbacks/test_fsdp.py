"""Two ranks that each hold a part of the slots train like two ranks that hold all slots."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import fully_shard

from sparse_lightning import BlockSparseLinear, SparsityCallback, sparsify
from sparse_lightning.sharding import gather_whole, is_sharded
from tests.callbacks.helpers import ACCELERATORS, Classifier, loader, sharded_in_two, trainer
from tests.processes import end_rank, run_ranks

FALLING = {"schedule": "cubic", "initial": 0.5, "final": 0.125, "until": 0.5}
RULES: dict[str, dict[str, Any]] = {
    "rigl": {"density": 0.28},  # nine slots: the ranks hold five and four
    "momentum": {"density": 0.25, "drop": "saliency", "grow": "momentum"},
    "falling": {"density": FALLING, "drop": "saliency"},
    "global": {"density": FALLING, "distribution": "global", "drop": "movement", "grow": "none"},
}


class Built(Classifier):
    """Builds its sparse layers in `configure_model`, and shards them if `sharded`."""

    def __init__(self, density: float, sharded: bool) -> None:
        super().__init__()
        self.density, self.sharded, self.built = density, sharded, False

    def configure_model(self) -> None:
        if self.built:
            return
        self.built = True
        torch.manual_seed(1)
        sparsify(self, block_size=16, density=self.density)
        if self.sharded:
            fully_shard(self.net, mesh=self.device_mesh["data_parallel"])
            fully_shard(self.head, mesh=self.device_mesh["data_parallel"])

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().batch(1000 * int(os.environ.get("LOCAL_RANK", "0")) + number)


@pytest.fixture(scope="module", params=ACCELERATORS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    for strategy in ("ddp", "fsdp"):
        run_ranks(__file__, folder, request.param, strategy)
    return folder


@pytest.mark.parametrize("rule", RULES)
def test_sharded_ranks_train_as_whole_ones(rule: str, results: Path) -> None:
    ddp, fsdp, other = (
        torch.load(results / f"{rule}-{name}.pt", weights_only=True)
        for name in ("ddp-0", "fsdp-0", "fsdp-1")
    )
    assert ddp["moved"] == fsdp["moved"] == other["moved"] > 0
    assert ddp["state"].keys() == fsdp["state"].keys()
    for key, expected in ddp["state"].items():
        assert torch.equal(fsdp["state"][key], other["state"][key]), key
        torch.testing.assert_close(fsdp["state"][key], expected, rtol=1e-4, atol=1e-5)


def fit(out: Path, accelerator: str, strategy: str, rule: str) -> None:
    options = RULES[rule]
    density = options["density"]
    moved = []

    class Counting(SparsityCallback):
        def on_train_start(self, *arguments: Any) -> None:
            super().on_train_start(*arguments)
            assert self.sparsifier is not None
            self.sparsifier.register_update_hook(
                lambda _, update: moved.append(sum(len(u.changed) for u in update.layers.values()))
            )

    sparsity = Counting(
        block_size=16, update={"every_n_steps": 4}, drop_fraction=0.3, shrink=False, **options
    )
    sharded = strategy == "fsdp"
    model = Built(density["initial"] if isinstance(density, dict) else density, sharded)
    sharding = sharded_in_two(accelerator)
    fitting = trainer(
        sparsity,
        root=out,
        accelerator=accelerator,
        devices=2,
        strategy=sharding if sharded else "ddp",
    )
    fitting.fit(model, loader(16))
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    assert len(layers) == 2 and all(is_sharded(layer.values) == sharded for layer in layers)
    state = {
        name: gather_whole(parameter.detach()).cpu() for name, parameter in model.named_parameters()
    }
    state |= {f"{i}.coords": layer.topology.coords.cpu() for i, layer in enumerate(layers)}
    name = f"{rule}-{strategy}-{fitting.global_rank}.pt"
    torch.save({"state": state, "moved": sum(moved)}, out / name)


if __name__ == "__main__":
    for rule in RULES:
        fit(Path(sys.argv[1]), *sys.argv[2:], rule)
    end_rank()
