"""Runs killed at any point, even during an update or while saving a checkpoint, resume."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from sparse_lightning.history import read_history
from sparse_lightning.observers.recorder import HISTORY
from tests import processes
from tests.callbacks.helpers import Classifier, trainer
from tests.callbacks.test_resume import assert_identical, final, run, sparsity

STEPS = 24
# Functions in which processes are killed, and how the paths of their files end.
WHERE = {
    "update": ("_update", "sparse_lightning/sparsifier.py"),
    "write": ("_atomic_save", ""),
    "step": ("on_train_batch_start", ""),
}
_random = random.Random(0)
KILLS = [
    *(("update", call, _random.randrange(4000)) for call in (1, 2, 3, 4)),
    *(("write", call, _random.randrange(1500)) for call in (2, 5, 10, 14)),
    *(("step", call, _random.randrange(20_000)) for call in (12, 24, 36, 45)),
]


def kill_at(where: str, call: int, events: int) -> None:
    """Kill this process `events` calls or returns after the `call`-th call of a function."""
    left = [call, events]
    name, file = WHERE[where]

    def profile(frame: Any, event: str, arg: Any) -> None:
        is_there = frame.f_code.co_name == name and frame.f_code.co_filename.endswith(file)
        if left[0] > 0:
            left[0] -= event == "call" and is_there
        else:
            left[1] -= 1
            is_over = event == "return" and is_there
            if left[1] < 0 or (is_over and where != "step"):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(profile)


def main(root: Path) -> None:
    """Train in several processes, one after the other, and kill each."""
    torch.set_num_threads(1)
    for where, call, events in KILLS:
        if (child := os.fork()) == 0:
            kill_at(where, call, events)
            run(root / f"{where}-{call}")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status), (where, call, events)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root: Path = tmp_path_factory.mktemp("killed")
    processes.run(__file__, root, timeout=120)
    run(root / "whole")
    return root


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
@pytest.mark.parametrize(("where", "call", "events"), KILLS)
def test_the_newest_checkpoint_is_whole_and_resumes(
    where: str, call: int, events: int, killed: Path
) -> None:
    root = killed / f"{where}-{call}"
    checkpoints = {int(path.stem): path for path in root.glob("*.ckpt")}
    assert 0 < len(checkpoints) < STEPS
    run(root, checkpoints[max(checkpoints)])
    assert_identical(final(root), final(killed / "whole"))
    # The history file is complete too.
    ours, whole = (read_history(folder / HISTORY) for folder in (root, killed / "whole"))
    assert [f.step for f in ours.frames] == [f.step for f in whole.frames] == [0, 5, 10, 15, 18]
    for name, layer in ours.layers.items():
        for frame in range(5):
            assert (layer.mask(frame) == whole.layers[name].mask(frame)).all()


# -- a loader with a state ------------------------------------------------------------------------


class Shuffled(DataLoader[Any]):
    """Eight shuffled batches an epoch; its state is its position."""

    def __init__(self) -> None:
        super().__init__(list(range(64)), batch_size=8)  # type: ignore[arg-type]
        self.epoch, self.at = 0, 0

    def __iter__(self) -> Iterator[Tensor]:  # type: ignore[override]
        order = torch.randperm(64, generator=torch.Generator().manual_seed(self.epoch))
        while self.at < 8:
            self.at += 1
            yield order[8 * self.at - 8 : 8 * self.at]
        self.epoch, self.at = self.epoch + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.at = state["epoch"], state["at"]


class TrainsOnData(Classifier):
    """Trains on the batches of the loader, unlike `Classifier`."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = torch.stack([self.loss(int(number)) for number in batch]).mean()
        self.losses.append(float(loss.detach()))
        return loss


@pytest.mark.parametrize("cut", [4, 8, 11, 15, 16])
def test_resume_with_a_stateful_loader(cut: int, tmp_path: Path) -> None:
    """Epochs end after 8 and 16 steps."""

    def fit(root: Path, ckpt_path: Path | None) -> TrainsOnData:
        model = TrainsOnData()
        checkpoint = ModelCheckpoint(
            root,
            filename="{step}",
            every_n_train_steps=1,
            save_top_k=-1,
            auto_insert_metric_name=False,
        )
        fitting = trainer(sparsity(), checkpoint, enable_checkpointing=True, max_steps=STEPS)
        fitting.fit(model, Shuffled(), ckpt_path=ckpt_path)
        return model

    whole = fit(tmp_path / "whole", None)
    rest = fit(tmp_path / "cut", tmp_path / "whole" / f"{cut}.ckpt")
    assert rest.losses == whole.losses[cut:]
    assert_identical(final(tmp_path / "cut"), final(tmp_path / "whole"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
