"""What a user sees: the numbers of an update, and each logger's share of them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn

from sparse_lightning import BlockSparseLinear, BlockTopology, SparsityCallback
from sparse_lightning.callbacks.monitor import (
    count_parameters,
    mask_image,
    relative_flops,
    update_scalars,
)
from sparse_lightning.evolution import ModelUpdate, TopologyUpdate
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.callbacks.wandb_file import history

LAYERS = ("net.0", "net.2")


def sparsity(**monitor: int) -> SparsityCallback:
    return SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},  # after 4, 8, 12, 16 and 18 of 24 steps
        monitor={"every_n_updates": 2, "images": 1, **monitor},
    )


def by_hand() -> tuple[nn.Module, ModelUpdate]:
    """A 32x64 layer of 8 blocks with 3 present in 4 slots, before a dense 4x32 head."""
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.bool)
    topology = BlockTopology.from_mask(mask, 16, capacity=4)
    model = nn.Sequential(BlockSparseLinear(64, 32, topology=topology), nn.Linear(32, 4))
    slots = torch.tensor
    update = TopologyUpdate(topology.coords, dropped=slots([0, 3]), grown=slots([0]), n_before=4)
    return model, ModelUpdate(step=7, number=1, layers={"0": update})


def test_scalars_by_hand() -> None:
    model, update = by_hand()
    parameters = 3 * 256 + 32 + 4 * 32 + 4
    flops = (3 * 256 + 4 * 32) / (32 * 64 + 4 * 32)
    assert count_parameters(model) == parameters
    assert relative_flops(model) == pytest.approx(flops)
    assert update_scalars(model, update) == pytest.approx(
        {
            "sparsity/density": 3 / 8,
            "sparsity/blocks_dropped": 2,
            "sparsity/blocks_grown": 1,
            "sparsity/survival": 0.5,
            "sparsity/parameters": parameters,
            "sparsity/flops_per_token": flops,
            "sparsity_density/0": 3 / 8,
            "sparsity_survival/0": 0.5,
        }
    )


def test_mask_image_shows_present_blocks_in_white() -> None:
    model, _ = by_hand()
    image = mask_image(model[0])
    assert image.shape == (128, 256) and image.dtype == np.uint8
    assert (image[::64, ::64] == [[255, 255, 0, 0], [0, 0, 0, 255]]).all()


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No account, and no network: every connection is refused."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def test_wandb_offline_run_holds_every_update(offline: Path) -> None:
    import wandb

    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    trainer(sparsity(), root=offline, logger=logger).fit(Classifier(), loader())
    wandb.teardown()  # unlike finish(), it waits for the process that writes the file
    (run_file,) = offline.rglob("*.wandb")
    rows = [row for row in history(run_file) if "sparsity/density" in row]
    # One combined call an update: scalars and media of an update share a row.
    assert [row["trainer/global_step"] for row in rows] == [4, 8, 12, 16, 18]
    assert [row["sparsity/density"] for row in rows] == sorted(
        (row["sparsity/density"] for row in rows), reverse=True
    )
    assert rows[-1]["sparsity/density"] == rows[-1]["sparsity/density_target"] == 0.25
    assert rows[-1]["sparsity/flops_per_token"] < rows[0]["sparsity/flops_per_token"] < 1
    for row in rows:
        assert {f"sparsity_density/{name}" for name in LAYERS} <= row.keys()
        assert 0 <= row["sparsity/survival"] <= 1
    with_images = [row for row in rows if "mask/net.0" in row]
    assert [row["trainer/global_step"] for row in with_images] == [4, 12, 18]
    assert not any("mask/net.2" in row for row in rows), "images of one layer were asked for"
    for row in with_images:
        image = row["mask/net.0"]
        assert image["_type"] == "image-file"
        assert image["caption"].startswith(f"net.0, step {row['trainer/global_step']}, density")
        assert (run_file.parent / "files" / image["path"]).stat().st_size > 0
        for side, blocks in (("row", 8), ("column", 4)):
            histogram = row[f"{side}_occupancy/net.0"]
            assert histogram["_type"] == "histogram" and sum(histogram["values"]) == blocks
            assert histogram["bins"][:3] == [-0.5, 0.5, 1.5], "one bin a count"


def test_csv_gets_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(sparsity(), root=tmp_path, logger=logger).fit(Classifier(), loader())
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["sparsity/density"]]
    assert [int(row["step"]) for row in rows] == [4, 8, 12, 16, 18]
    assert float(rows[-1]["sparsity/density"]) == 0.25


def test_tensorboard_gets_scalars_images_and_histograms(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    logger = TensorBoardLogger(tmp_path)
    trainer(sparsity(), root=tmp_path, logger=logger).fit(Classifier(), loader())
    logger.finalize("success")
    events = event_accumulator.EventAccumulator(
        logger.log_dir, size_guidance={"images": 0, "histograms": 0}
    )
    events.Reload()
    assert [e.step for e in events.Scalars("sparsity/density")] == [4, 8, 12, 16, 18]
    assert [e.step for e in events.Images("mask/net.0")] == [4, 12, 18]
    assert [e.step for e in events.Histograms("row_occupancy/net.0")] == [4, 12, 18]


def test_monitor_null_logs_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = SparsityCallback(block_size=16, update={"every_n_steps": 4}, monitor=None)
    trainer(callback, root=tmp_path, logger=logger).fit(Classifier(), loader())
    assert callback.last_update is not None
    metrics = Path(logger.log_dir) / "metrics.csv"
    assert not metrics.exists() or "sparsity" not in metrics.read_text()


def test_one_call_a_logger_and_update() -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    class Counting(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any(key.startswith("sparsity") for key in metrics):
                calls.append((int(step or 0), dict(metrics)))

    trainer(sparsity(), logger=[Counting("unused"), Counting("unused")]).fit(Classifier(), loader())
    assert [step for step, _ in calls] == [4, 4, 8, 8, 12, 12, 16, 16, 18, 18]
