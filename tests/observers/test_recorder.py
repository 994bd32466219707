"""The history file of a fit holds the block masks after each update."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sparse_lightning import SparsityCallback
from sparse_lightning.history import HistoryWriter, read_history
from sparse_lightning.observers.recorder import HISTORY
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.callbacks.test_sparsity import sparse


class Watch(L.Callback):
    """Records the masks after every update, by step."""

    def __init__(self, sparsity: SparsityCallback) -> None:
        self.sparsity = sparsity
        self.masks: dict[int, dict[str, np.ndarray]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        last = self.sparsity.last_update
        if last is not None and last.step == trainer.global_step:
            layers = sparse(pl_module).items()
            self.masks[last.step] = {n: m.topology.mask.numpy() for n, m in layers}


def fit(folder: Path, ckpt_path: Path | None = None, **options: Any) -> Watch:
    """Train for 24 steps, with updates after steps 4, 8, 12, 16 and 18."""
    monitor = options.pop("monitor", {"every_n_updates": 2})
    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},
        monitor=monitor,
    )
    watch = Watch(sparsity)
    options = {"logger": CSVLogger(folder, name="csv", version=0), **options}
    checkpoints = options.pop("checkpoints", [])
    fitting = trainer(sparsity, watch, *checkpoints, root=folder, **options)
    fitting.fit(Classifier(), loader(24), loader(1), ckpt_path=ckpt_path)
    return watch


def test_a_fit_leaves_its_history(tmp_path: Path) -> None:
    watch = fit(tmp_path)
    history = read_history(tmp_path / "csv" / "version_0" / HISTORY)
    assert [f.step for f in history.frames] == [0, 4, 8, 12, 16, 18] == [0, *watch.masks]
    assert [f.number for f in history.frames] == [0, 1, 2, 3, 4, 5]
    for i, masks in enumerate(watch.masks.values(), start=1):
        for name, layer in history.layers.items():
            assert (layer.mask(i) == masks[name]).all()
    assert all(layer.mask(0).all() for layer in history.layers.values())
    assert history.about["config"]["density.final"] == 0.25
    # Scores are recorded at every second update: the magnitudes of kept blocks only.
    (layer, *_) = history.layers.values()
    assert set(layer.scores) == {1, 3, 5}
    known, mask = np.isfinite(layer.scores[3]), layer.mask(3)
    assert known.any() and (mask | ~known).all() and (layer.scores[3][known] > 0).all()
    grown = mask & ~layer.mask(2)
    assert not known[grown].any() and known[mask & ~grown].all()
    # The loss of the only validation, at the end, is written once.
    assert [(m.step, [*m.values]) for m in history.metrics] == [(24, ["val_loss"])]


def test_a_resumed_fit_continues_its_history(tmp_path: Path) -> None:
    saved = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    fit(tmp_path, checkpoints=[saved], enable_checkpointing=True)
    whole = read_history(tmp_path / "csv" / "version_0" / HISTORY)
    # Resume in the same folder, and in a new one, whose history starts at the checkpoint.
    fit(tmp_path, tmp_path / "step=10.ckpt")
    other = CSVLogger(tmp_path, name="csv", version=1)
    fit(tmp_path, tmp_path / "step=10.ckpt", logger=other)
    for version, first in ((0, 0), (1, 10)):
        resumed = read_history(tmp_path / "csv" / f"version_{version}" / HISTORY)
        steps = [f.step for f in whole.frames if f.step > first]
        assert [f.step for f in resumed.frames] == [first, *steps]
        for name, layer in whole.layers.items():
            assert (layer.mask(-1) == resumed.layers[name].mask(-1)).all()


def test_an_earlier_training_is_kept(tmp_path: Path) -> None:
    for _ in range(3):
        fit(tmp_path)
    found = sorted(path.name for path in (tmp_path / "csv" / "version_0").glob("*.history"))
    assert found == ["pattern.1.history", "pattern.2.history", "pattern.history"]


@pytest.mark.parametrize(
    ("options", "recorded"),
    [
        ({"logger": False}, None),
        ({"logger": False, "enable_checkpointing": True}, Path("checkpoints", HISTORY)),
        ({"monitor": {"record": False}}, None),
        ({"monitor": None}, None),
        ({"fast_dev_run": True}, None),
    ],
)
def test_where_lightning_keeps_files_and_nowhere_else(
    options: dict, recorded: Path | None, tmp_path: Path
) -> None:
    fit(tmp_path, **options)
    found = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.history")]
    assert found == ([recorded] if recorded else [])


def test_a_training_continues_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    update = HistoryWriter.update

    def on_a_full_disk(self: HistoryWriter, step: int, number: int, masks: Any) -> None:
        if number == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        update(self, step, number, masks)

    monkeypatch.setattr(HistoryWriter, "update", on_a_full_disk)
    with pytest.warns(UserWarning, match="no longer recorded: .*No space left"):
        watch = fit(tmp_path)
    assert list(watch.masks) == [4, 8, 12, 16, 18]
    history = read_history(tmp_path / "csv" / "version_0" / HISTORY)
    assert [f.number for f in history.frames] == [0, 1, 2]
