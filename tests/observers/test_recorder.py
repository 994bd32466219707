"""The history file of a fit holds the block masks after each update, and those of no other fit."""

from __future__ import annotations

import copy
import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from sparse_lightning import SparsityCallback
from sparse_lightning.history import HistoryWriter, read_history
from sparse_lightning.observers.recorder import HISTORY
from sparse_lightning.report.page_data import metric_lines
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
    monitor, nm = options.pop("monitor", {"every_n_updates": 2}), options.pop("nm", None)
    sparsity = SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},
        monitor=monitor,
        nm=nm,
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
    assert {layer.nm for layer in history.layers.values()} == {None}
    # Scores are recorded at every second update: the magnitudes of kept blocks only.
    (layer, *_) = history.layers.values()
    assert set(layer.scores) == {1, 3, 5}
    known, mask = np.isfinite(layer.scores[3]), layer.mask(3)
    assert known.any() and (mask | ~known).all() and (layer.scores[3][known] > 0).all()
    grown = mask & ~layer.mask(2)
    assert not known[grown].any() and known[mask & ~grown].all()
    # The loss of the only validation, at the end, is written once.
    assert [(m.step, [*m.values]) for m in history.metrics] == [(24, ["val_loss"])]


def test_a_fit_with_a_pattern_leaves_it_in_its_history(tmp_path: Path) -> None:
    watch = fit(tmp_path, nm="2:4")
    history = read_history(tmp_path / "csv" / "version_0" / HISTORY)
    assert {layer.nm for layer in history.layers.values()} == {"2:4"}
    assert [frame.step for frame in history.frames] == [0, *watch.masks]
    assert history.about["config"]["nm"] == "2:4"


class Plateaus(Classifier):
    """Logs values that never change: for steps, at some steps, for epochs, and in validations."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.log("train/step", 2.0)
        if batch_idx == 1:
            self.log("train/rare", 2.0)
        self.log("train/epoch", 2.0, on_step=False, on_epoch=True)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        for name in ("val/loss", "val/accuracy", "val/f1", "val/auc"):
            self.log(name, 0.8)


def test_a_metric_has_a_point_for_each_time_that_it_was_logged(tmp_path: Path) -> None:
    sparsity = SparsityCallback(block_size=16, density=0.25, update={"times": [2, 5, 7]})
    logger = CSVLogger(tmp_path, name="csv", version=0)
    # Three epochs of eight steps, with validations in the middle of each and at its end.
    fitting = trainer(sparsity, root=tmp_path, logger=logger, val_check_interval=4)
    fitting.fit(Plateaus(), loader(8), loader(1))
    history = read_history(tmp_path / "csv" / "version_0" / HISTORY)
    lines = {name: steps for name, (steps, _) in metric_lines(history).items()}
    updates, validations = {2, 5, 7}, {4, 8, 12, 16, 20, 24}
    for name in ("val/loss", "val/accuracy", "val/f1", "val/auc"):
        assert lines[name] == sorted(validations)
    assert lines["train/step"] == sorted(updates | validations)
    assert lines["train/rare"] == [2, 12, 20]  # logged at steps 2, 10 and 18
    assert lines["train/epoch"] == [8, 16, 24]
    # They are in the order in which they were logged, in whatever order Python hashes their names.
    assert [name for name in lines if "val" in name] == [
        "val/loss",
        "val/accuracy",
        "val/f1",
        "val/auc",
    ]


def saved_at_10(folder: Path) -> Path:
    """Train to the end, and return the checkpoint of step 10."""
    saved = ModelCheckpoint(folder, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    fit(folder, checkpoints=[saved], enable_checkpointing=True)
    return folder / "step=10.ckpt"


def assert_whole(file: Path, masks: dict[int, dict[str, np.ndarray]]) -> None:
    """A history is that of an uninterrupted training: all steps, and the masks of each."""
    history = read_history(file)
    assert [frame.step for frame in history.frames] == [0, *masks] == [0, 4, 8, 12, 16, 18]
    for i, step in enumerate(masks, start=1):
        for name, layer in history.layers.items():
            assert (layer.mask(i) == masks[step][name]).all()
    assert history.gaps == []


def histories(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.history"))


def test_a_resumed_fit_continues_its_history(tmp_path: Path) -> None:
    checkpoint = saved_at_10(tmp_path)
    folder = tmp_path / "csv" / "version_0"
    before = len((folder / HISTORY).read_bytes())
    masks = fit(tmp_path, checkpoint).masks
    assert_whole(folder / HISTORY, {**first_updates(folder / HISTORY), **masks})
    assert len((folder / HISTORY).read_bytes()) > before
    assert histories(folder) == [HISTORY]


def first_updates(file: Path) -> dict[int, dict[str, np.ndarray]]:
    """The masks of the updates before step 10, which a training resumed there does not repeat."""
    history = read_history(file)
    return {
        frame.step: {name: layer.mask(i) for name, layer in history.layers.items()}
        for i, frame in enumerate(history.frames)
        if 0 < frame.step < 10
    }


def test_a_numbered_logger_gets_the_whole_history(tmp_path: Path) -> None:
    checkpoint = saved_at_10(tmp_path)
    first, second = (tmp_path / "csv" / f"version_{n}" / HISTORY for n in (0, 1))
    before = first.read_bytes()
    masks = fit(tmp_path, checkpoint, logger=CSVLogger(tmp_path, name="csv")).masks
    assert_whole(second, {**first_updates(first), **masks})
    assert first.read_bytes() == before


def test_a_history_that_is_gone_is_named(tmp_path: Path) -> None:
    checkpoint = saved_at_10(tmp_path)
    shutil.rmtree(tmp_path / "csv" / "version_0")
    with pytest.warns(UserWarning, match=r"begins at step 10.*version_0.*restore that file"):
        fit(tmp_path, checkpoint, logger=CSVLogger(tmp_path, name="csv", version=1))
    history = read_history(tmp_path / "csv" / "version_1" / HISTORY)
    assert [frame.step for frame in history.frames] == [10, 12, 16, 18]


def test_a_history_that_was_moved_aside_is_continued(tmp_path: Path) -> None:
    checkpoint = saved_at_10(tmp_path)
    folder = tmp_path / "csv" / "version_0"
    other = fit(tmp_path).masks  # a new training in the same folder
    masks = fit(tmp_path, checkpoint).masks
    assert histories(folder) == ["pattern.1.history", HISTORY]
    assert_whole(folder / HISTORY, other)
    moved = folder / "pattern.1.history"
    assert_whole(moved, {**first_updates(moved), **masks})


def test_a_checkpoint_without_a_history_continues_the_file_of_the_folder(tmp_path: Path) -> None:
    path = saved_at_10(tmp_path)
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["sparse_lightning_histories"]
    torch.save(checkpoint, path)
    masks = fit(tmp_path, path).masks
    file = tmp_path / "csv" / "version_0" / HISTORY
    assert_whole(file, {**first_updates(file), **masks})


class Meanwhile(L.Callback):
    """Calls a function before the 15th step of a fit, and keeps its result."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.result = function, None

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 14:
            self.result = self.function()


def test_a_fit_in_the_folder_of_a_running_one(tmp_path: Path) -> None:
    second = Meanwhile(lambda: fit(tmp_path).masks)
    first = fit(tmp_path, checkpoints=[second]).masks
    folder = tmp_path / "csv" / "version_0"
    assert histories(folder) == ["pattern.1.history", HISTORY]
    assert_whole(folder / "pattern.1.history", first)
    assert_whole(folder / HISTORY, second.result)


def test_two_fits_resumed_from_one_checkpoint(tmp_path: Path) -> None:
    checkpoint = saved_at_10(tmp_path)
    folder = tmp_path / "csv" / "version_0"
    early = first_updates(folder / HISTORY)
    second = Meanwhile(lambda: fit(tmp_path, checkpoint).masks)
    with pytest.warns(UserWarning, match=r"another one is writing '.*pattern\.history'") as seen:
        first = fit(tmp_path, checkpoint, checkpoints=[second]).masks
    (text,) = [str(w.message) for w in seen if "another one is writing" in str(w.message)]
    assert f"writes '{folder / 'pattern.1.history'}' instead" in text
    assert histories(folder) == ["pattern.1.history", HISTORY]
    assert_whole(folder / HISTORY, {**early, **first})
    assert_whole(folder / "pattern.1.history", {**early, **second.result})


def test_a_fit_that_failed_releases_its_file(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("no more")

    saved = ModelCheckpoint(tmp_path, every_n_train_steps=10, save_top_k=-1, filename="{step}")
    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path, checkpoints=[saved, Meanwhile(fail)], enable_checkpointing=True)
    file = tmp_path / "csv" / "version_0" / HISTORY
    masks = fit(tmp_path, tmp_path / "step=10.ckpt").masks
    assert histories(file.parent) == [HISTORY]
    assert_whole(file, {**first_updates(file), **masks})


def test_a_file_that_is_deleted_ends_the_recording_with_a_warning(tmp_path: Path) -> None:
    file = tmp_path / "csv" / "version_0" / HISTORY
    with pytest.warns(UserWarning, match=r"no longer recorded: .*deleted.*pattern\.history"):
        masks = fit(tmp_path, checkpoints=[Meanwhile(file.unlink)]).masks
    assert list(masks) == [4, 8, 12, 16, 18] and not file.exists()


def test_a_copy_of_the_callback_records_nothing(tmp_path: Path) -> None:
    found: list[SparsityCallback] = []

    class Copy(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            callbacks = [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
            found[:] = copy.deepcopy(callbacks)

    masks = fit(tmp_path, checkpoints=[Copy()]).masks
    assert len(found) == 1
    assert_whole(tmp_path / "csv" / "version_0" / HISTORY, masks)


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
