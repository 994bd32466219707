"""Two ranks with different seeds end with the same blocks and values."""

from __future__ import annotations

import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sparse_lightning import SparsityCallback
from tests.callbacks.helpers import ACCELERATORS, Classifier, loader, trainer
from tests.processes import end_rank, run_ranks


class Unseeded(Classifier):
    """Has different initial weights and data on each rank."""

    def __init__(self) -> None:
        super().__init__()
        self.rank = int(os.environ.get("LOCAL_RANK", "0"))
        torch.manual_seed(100 + self.rank)
        for module in (self.net[0], self.net[2], self.head):
            module.reset_parameters()

    def batch(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        return super().batch(1000 * self.rank + number)


@pytest.mark.parametrize(
    ("init", "density"),
    [
        *itertools.product(["random", "magnitude"], ["constant", "falling"]),
        ("magnitude", "2:4"),  # of other weights, other positions
    ],
)
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_ranks_end_identical(accelerator: str, init: str, density: str, tmp_path: Path) -> None:
    run_ranks(__file__, tmp_path, accelerator, init, density)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert ranks[0].keys() == ranks[1].keys()
    for key in ranks[0]:
        assert torch.equal(ranks[0][key].cpu(), ranks[1][key].cpu()), key
    moved = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert moved[0] == moved[1] and sum(moved[0]) > 0


@pytest.mark.parametrize("what", ["weights", "blocks"])
@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_rank_that_diverges_is_found_by_the_next_update(
    accelerator: str, what: str, tmp_path: Path
) -> None:
    done = run_ranks(__file__, tmp_path, accelerator, "random", "constant", what, check=False)
    assert done.returncode != 0
    for rank in (0, 1):
        message = (tmp_path / f"{rank}.txt").read_text()
        assert "All ranks must hold the same blocks" in message
        assert f"they differ at step 8 (detected on rank {rank})" in message


class Diverge(L.Callback):
    """Changes weights or blocks on rank 1 between two updates, and saves the error message."""

    def __init__(self, what: str, out: Path) -> None:
        self.what, self.out = what, out

    def on_train_batch_start(self, trainer: L.Trainer, model: Any, *_: Any) -> None:
        if trainer.global_rank == 1 and trainer.global_step == 5:
            layer = model.net[0]
            with torch.no_grad():
                if self.what == "weights":
                    layer.values[3, 2, 1] += 1e-3
                else:
                    layer.topology.assign_(layer.topology.coords.flip(0))

    def on_exception(self, trainer: L.Trainer, _: Any, exception: BaseException) -> None:
        (self.out / f"{trainer.global_rank}.txt").write_text(str(exception))


class Grown(L.Callback):
    """Counts the grown blocks of every update; listed after SparsityCallback."""

    def __init__(self, sparsity: SparsityCallback) -> None:
        self.sparsity = sparsity
        self.counts: list[int] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        last = self.sparsity.last_update
        if last is not None and last.step == trainer.global_step:
            self.counts.append(sum(len(update.grown) for update in last.layers.values()))


def main(out: Path, accelerator: str, init: str, density: str, diverge: str = "") -> None:
    falling = {"schedule": "cubic", "initial": 0.75, "final": 0.25, "until": 0.5}
    sparsity = SparsityCallback(
        block_size=16,
        density=falling if density == "falling" else 0.25,
        nm="2:4" if density == "2:4" else None,
        update={"every_n_steps": 4},
        init=init,
    )
    grown = Grown(sparsity)
    others = [Diverge(diverge, out)] if diverge else []
    fitting = trainer(
        sparsity, grown, *others, root=out, accelerator=accelerator, strategy="ddp", devices=2
    )
    model = Unseeded()
    fitting.fit(model, loader(16))
    torch.save(model.state_dict(), out / f"{fitting.global_rank}.pt")
    (out / f"{fitting.global_rank}.json").write_text(json.dumps(grown.counts))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
    end_rank()
