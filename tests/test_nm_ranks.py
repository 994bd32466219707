"""Two ranks that train 2:4 layers, whole or sharded, do what one rank does with both batches."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from sparse_lightning import Sparsifier
from sparse_lightning.sharding import gather_whole, is_sharded
from tests.loops import Net, adamw, loss_of, sparse
from tests.processes import end_rank, run_ranks

STEPS = 14
# The first density has an odd number of slots, so that ranks hold different numbers of them.
RULES: dict[str, dict[str, Any]] = {
    "rigl": {"density": 0.28},
    "momentum": {"density": 0.25, "drop": "movement", "grow": "momentum"},
    "random": {"density": 0.5, "grow": "random"},
}

STRATEGIES = "ddp", "fsdp", "fsdp micro-batches"


def train(rule: str, rank: int | None, strategy: str = "") -> dict[str, Any]:
    """Return all that a training ends with; without a rank, it takes the batches of both."""
    model: nn.Module = Net().double()
    sparsifier = Sparsifier(
        model,
        STEPS,
        nm="2:4",
        block_size=16,
        exclude=["head"],
        update={"every_n_steps": 4, "until": STEPS},
        drop_fraction=0.5,
        shrink=False,
        **RULES[rule],
    )
    layers = sparse(model)
    if strategy.startswith("fsdp"):
        fully_shard(model)
    optimizer = adamw(model.parameters())
    wrapped = DistributedDataParallel(model) if strategy == "ddp" else model
    sparsifier.attach(optimizer)
    moved = []
    sparsifier.register_update_hook(
        lambda _, update: moved.extend(
            (u.new_weights, len(u.grown)) for u in update.layers.values()
        )
    )
    torch.set_default_dtype(torch.float64)  # of the batches
    for number in range(STEPS):
        if rank is None:
            for of in (0, 1):
                (loss_of(double(wrapped), 2 * number + of) / 2).backward()
        elif strategy == "fsdp micro-batches":
            # Each rank takes both batches, in turn; only the second backward synchronises.
            for of in (rank, 1 - rank):
                model.set_requires_gradient_sync(of != rank)
                (loss_of(double(model), 2 * number + of) / 2).backward()
        else:
            loss_of(double(wrapped), 2 * number + rank).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_default_dtype(torch.float32)
    assert all(is_sharded(layer.values) == strategy.startswith("fsdp") for layer in layers.values())
    result: dict[str, Any] = {"moved": moved}
    for name, layer in layers.items():
        assert layer.topology.positions is not None
        result[f"{name}.coords"] = layer.topology.coords
        result[f"{name}.positions"] = layer.topology.positions
        state = optimizer.state[layer.values]
        for key, tensor in (("values", layer.values), *state.items()):
            if tensor.dim():
                result[f"{name}.{key}"] = gather_whole(tensor.detach())
    return result


def double(model: nn.Module) -> Any:
    return lambda x: model(x.double())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(__file__, path)
    return path


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("rule", RULES)
def test_two_ranks_train_as_one(rule: str, strategy: str, folder: Path) -> None:
    expected = train(rule, None)
    ranks = [
        torch.load(folder / f"{rule}-{strategy}-{rank}.pt", weights_only=True) for rank in (0, 1)
    ]
    assert ranks[0]["moved"] == ranks[1]["moved"] == expected["moved"]
    weights, blocks = map(sum, zip(*expected["moved"], strict=True))
    assert weights > 100 and blocks > 0
    for name, tensor in expected.items():
        if isinstance(tensor, Tensor):
            assert torch.equal(ranks[0][name], ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], tensor, rtol=1e-9, atol=1e-12)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    for strategy in STRATEGIES:
        for rule in RULES:
            torch.save(
                train(rule, rank, strategy), Path(sys.argv[1], f"{rule}-{strategy}-{rank}.pt")
            )
    end_rank()
