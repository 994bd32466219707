"""The metrics of an update, and what each kind of logger receives."""

from __future__ import annotations

import csv
import inspect
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_lightning import BlockSparseLinear, BlockTopology, SparsityCallback
from sparse_lightning.masks import mask_image
from sparse_lightning.observers import monitor, throughput
from sparse_lightning.observers.loggers import LoggerAdapter
from sparse_lightning.observers.mask_tracker import MaskTracker
from sparse_lightning.observers.measures import layer_row, layer_series, update_scalars
from sparse_lightning.observers.throughput import Throughput
from sparse_lightning.policy.updates import ModelUpdate, TopologyUpdate, with_positions
from sparse_lightning.savings import (
    count_parameters,
    linear_weights,
    relative_flops,
    training_bytes,
)
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.observers.wandb_file import config, history, metrics

LAYERS = ("net.0", "net.2")


def sparsity() -> SparsityCallback:
    return SparsityCallback(
        block_size=16,
        density={"schedule": "cubic", "initial": 1.0, "final": 0.25},
        update={"every_n_steps": 4},  # after 4, 8, 12, 16 and 18 of 24 steps
        monitor={"every_n_updates": 2, "images": 1},
    )


def topology(*rows: str, **kwargs: int) -> BlockTopology:
    mask = torch.tensor([[block == "x" for block in row] for row in rows])
    return BlockTopology.from_mask(mask, 16, **kwargs)


def worked_example() -> tuple[nn.Module, ModelUpdate, MaskTracker]:
    """A 32x64 layer of 8 blocks, 3 present in 4 slots, followed by a dense 4x32 head.

    The update dropped blocks (1, 0) and (0, 2), and grew (0, 0).
    """
    first, now = topology(".xx.", "x..x"), topology("xx..", "...x", capacity=4)
    masks = MaskTracker()
    masks.start({"0": BlockSparseLinear(64, 32, topology=first)})
    model = nn.Sequential(BlockSparseLinear(64, 32, topology=now), nn.Linear(32, 4))
    change = TopologyUpdate(
        now.coords, dropped=torch.tensor([0, 3]), grown=torch.tensor([0]), n_before=4
    )
    scores = torch.tensor([[9.0, 2.0, 0.5, 0.0], [0.1, 0.0, 0.0, 3.0]])
    update = ModelUpdate(7, 1, {"0": change}, {"0": scores}, {"0": scores}, density_target=0.4)
    masks.update(update)
    return model, update, masks


def test_scalars_by_hand() -> None:
    model, update, masks = worked_example()
    parameters = 3 * 256 + 32 + 4 * 32 + 4
    weights = (3 * 256 + 4 * 32, 32 * 64 + 4 * 32)
    assert count_parameters(model) == parameters
    assert linear_weights(model) == weights
    assert relative_flops(model) == pytest.approx(weights[0] / weights[1])
    assert update_scalars(model, update, masks) == pytest.approx(
        {
            "sparsity/density": 3 / 8,
            "sparsity/density_target": 0.4,
            "sparsity/blocks_dropped": 2,
            "sparsity/blocks_grown": 1,
            "sparsity/survival": 2 / 4,
            "sparsity/churn": 1 / 3,
            "sparsity/ever_active": 5 / 8,
            "sparsity/dead_rows": 0,
            "sparsity/dead_columns": 1,
            "sparsity/parameters": parameters,
            "sparsity/flops_per_token": weights[0] / weights[1],
            "sparsity_density/0": 3 / 8,
            "sparsity_survival/0": 2 / 4,
            "sparsity_churn/0": 1 / 3,
            "sparsity_ever_active/0": 5 / 8,
            "sparsity_dead_rows/0": 0,
            "sparsity_dead_columns/0": 1,
            "sparsity_threshold/0": 2,  # the smaller score of (0, 1) and (1, 3)
        }
    )


def patterned_example() -> tuple[nn.Module, ModelUpdate, MaskTracker]:
    """The same with a 2:4 pattern, of which the update has changed a group in slot 1, (0, 1)."""
    model, update, _ = worked_example()
    old = torch.full((4, 16, 2), 0b0100_0100, dtype=torch.uint8)
    new = old.clone()
    new[1, 0, 0] = 0b0100_1101  # in place of the weights 0 and 1 of its first four, 1 and 3
    now, first = model[0].topology, topology(".xx.", "x..x")
    masks = MaskTracker()
    layer = BlockTopology(first.coords, first.grid, 16, old)
    masks.start({"0": BlockSparseLinear(64, 32, topology=layer)})
    layer = BlockTopology(now.coords, now.grid, 16, new)
    model = nn.Sequential(BlockSparseLinear(64, 32, topology=layer), nn.Linear(32, 4))
    update = replace(update, layers={"0": with_positions(update.layers["0"], old, new)})
    masks.update(update)
    return model, update, masks


def test_scalars_of_a_pattern_by_hand() -> None:
    whole, patterned = worked_example(), patterned_example()
    parameters, weights = 3 * 128 + 32 + 4 * 32 + 4, (3 * 128 + 4 * 32, 32 * 64 + 4 * 32)
    assert count_parameters(patterned[0]) == parameters
    assert linear_weights(patterned[0]) == weights
    scalars = update_scalars(*patterned)
    # One weight is new, of 128 in each of the two blocks that stayed.
    expected = {
        "sparsity/weight_density": 3 * 128 / (8 * 256),
        "sparsity/weights_exchanged": 1,
        "sparsity/weight_churn": 1 / (2 * 128),
        "sparsity_weight_churn/0": 1 / (2 * 128),
        "sparsity/parameters": parameters,
        "sparsity/flops_per_token": weights[0] / weights[1],
    }
    assert scalars == pytest.approx({**update_scalars(*whole), **expected})
    assert patterned[2].exchanged == 1


def test_thresholds_ignore_scores_that_are_not_finite() -> None:
    model, update, masks = worked_example()
    scores = update.drop_scores["0"]
    scores[0, 1] = float("nan")
    assert update_scalars(model, update, masks)["sparsity_threshold/0"] == 3
    scores[1, 3] = float("inf")
    assert "sparsity_threshold/0" not in update_scalars(model, update, masks)


def test_a_row_of_the_table_by_hand() -> None:
    model, _, masks = worked_example()
    row = layer_row("0", model[0], masks)
    assert (row.shape, row.block_size, row.blocks) == ("32x64", 16, 3)
    assert (row.density, row.ever_active, row.initial_left) == (3 / 8, 5 / 8, 2 / 4)
    assert (row.dead_rows, row.dead_columns) == (0, 1)
    assert (row.parameters_before, row.parameters_after) == (32 * 64 + 32, 3 * 256 + 32)


def test_the_table_has_the_share_of_weights_if_blocks_have_a_pattern() -> None:
    class Table(LoggerAdapter):
        def _log_table(self, header: list[str], rows: list[list[Any]], step: int) -> None:
            self.seen = [dict(zip(header, row, strict=True)) for row in rows]

    (whole, _, masks), (patterned, _, _) = worked_example(), patterned_example()
    rows = [layer_row("0", model[0], masks) for model in (whole, patterned)]
    table = Table(CSVLogger("."))
    table.log_table(rows, 1)
    assert [row["weight density"] for row in table.seen] == [None, 3 / 16]
    assert [row["parameters after"] for row in table.seen] == [3 * 256 + 32, 3 * 128 + 32]
    table.log_table(rows[:1], 1)
    assert "weight density" not in table.seen[0] and table.seen[0]["density"] == 3 / 8


@pytest.mark.parametrize(
    ("example", "weights", "positions"),
    [(worked_example, 256, 0), (patterned_example, 128, 4 * 16 * 2)],
)
def test_bytes_by_hand(example: Any, weights: int, positions: int) -> None:
    model, _, _ = example()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(2, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()  # the gradient counts although it is None now
    tensors, indices = 4, 4 * (8 + 3 + 8 + 5 + 8 + 8)  # bytes of int32
    sparse = tensors * 4 * (4 * weights) + indices + positions + 4 * 8
    assert training_bytes(model[0], [optimizer]) == (sparse, tensors * 4 * 32 * 64)
    assert training_bytes(model[0].requires_grad_(False), [])[1] == 4 * 32 * 64


# -- tokens and time ---------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that shows `now`, which tests set."""
    fake = SimpleNamespace(now=100.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: fake.now)
    return fake


def test_throughput_by_hand(clock: SimpleNamespace) -> None:
    counted = Throughput(ranks=2, weights=(1000, 4000), peak=1_000_000)
    ids = torch.zeros(4, 25, dtype=torch.int64)
    for batch in (ids, (ids, torch.zeros(4, 25)), {"x": torch.zeros(4, 8), "input_ids": [ids]}):
        counted.count(batch)
    clock.now = 103.0
    counted.pause()
    clock.now = 110.0  # a validation takes seven seconds
    counted.resume()
    clock.now = 111.0
    tokens = 3 * 100 / 4
    assert counted.read((500, 4000)) == pytest.approx(
        {
            "sparsity/samples_per_second": 2 * 3 * 4 / 4,
            "sparsity/tokens_per_second": 2 * tokens,
            "sparsity/mfu": 6 * 1000 * tokens / 1_000_000,
            "sparsity/mfu_dense": 6 * 4000 * tokens / 1_000_000,
        }
    )
    assert counted.read((500, 4000)) == {}, "counting starts anew"
    counted.count(ids)
    clock.now = 112.0
    assert counted.read((0, 0))["sparsity/mfu"] == pytest.approx(6 * 500 * 100 / 1_000_000)


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(5, 7),
        (torch.zeros(5, 3, 8, 8), torch.zeros(5, dtype=torch.int64)),
        {"scale": torch.tensor(1.0), "image": torch.zeros(5, 7, dtype=torch.uint8)},
    ],
)
def test_batches_without_token_ids_are_samples(batch: Any, clock: SimpleNamespace) -> None:
    counted = Throughput(ranks=1, weights=(1, 1), peak=10)
    counted.count(batch)
    counted.count(None)
    clock.now += 2
    assert counted.read((1, 1)) == {"sparsity/samples_per_second": 2.5}


def test_every_batch_between_updates_counts(tmp_path: Path, clock: SimpleNamespace) -> None:
    class Ticking(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += 1.0

        def on_validation_batch_start(self, *_: Any) -> None:
            clock.now += 50.0

    logger = CSVLogger(tmp_path)
    data = DataLoader(TensorDataset(torch.zeros(48, 9, dtype=torch.int64)), batch_size=2)
    callbacks = (Ticking(), sparsity())
    trainer(*callbacks, logger=logger, accumulate_grad_batches=3, val_check_interval=6).fit(
        Classifier(), data, loader(1)
    )
    rows = read_csv(logger)
    assert [row["step"] for row in rows if row.get("sparsity/density")] == [
        "4",
        "8",
        "12",
        "16",
        "18",
    ]
    speeds = [row for row in rows if row["sparsity/tokens_per_second"]]
    assert len(speeds) == 6 and speeds[-1]["step"] == "24", (
        "rates after the last update are logged too"
    )
    for row in speeds:  # a batch takes a second
        assert float(row["sparsity/samples_per_second"]) == pytest.approx(2)
        assert float(row["sparsity/tokens_per_second"]) == pytest.approx(18)
    assert not any("sparsity/mfu" in row for row in rows), "the peak of a CPU is unknown"


def test_utilisation_follows_the_density(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 18 tokens takes a second, on a device with a peak of a million FLOP/s."""
    requests = []

    class Ticking(L.Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            clock.now += 1.0

    def peak(device: torch.device, dtype: torch.dtype) -> int:
        requests.append((device.type, dtype))
        return 1_000_000

    monkeypatch.setattr(monitor, "get_available_flops", peak)
    logger = CSVLogger(tmp_path)
    data = DataLoader(TensorDataset(torch.zeros(48, 9, dtype=torch.int64)), batch_size=2)
    fitting = trainer(Ticking(), sparsity(), logger=logger, precision="bf16-mixed")
    fitting.fit(Classifier(), data)
    assert requests == [("cpu", torch.bfloat16)]
    rows = [row for row in read_csv(logger) if row["sparsity/mfu"]]
    dense = 2 * 64 * 128 + 4 * 64
    densities = [1.0, *(float(row["sparsity/density"]) for row in rows[:-1])]
    for row, density in zip(
        rows, densities, strict=True
    ):  # the rates are those of the steps before the update
        weights = density * 2 * 64 * 128 + 4 * 64
        assert float(row["sparsity/mfu"]) == pytest.approx(6 * weights * 18 / 1e6)
        assert float(row["sparsity/mfu_dense"]) == pytest.approx(6 * dense * 18 / 1e6)


def read_csv(logger: CSVLogger) -> list[dict[str, str]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [row for row in csv.DictReader(file)]


# -- each logger -------------------------------------------------------------------------------


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No W&B account and no network: every connection is refused."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    return tmp_path


def written(logger: WandbLogger, directory: Path) -> Path:
    """Finish a run, and return its file once it is complete."""
    import wandb

    logger.experiment.finish()
    wandb.teardown()  # unlike finish(), this waits for the process that writes the file
    (run_file,) = directory.rglob("*.wandb")
    return run_file


def test_wandb_offline_run_holds_every_update(offline: Path) -> None:
    logger = WandbLogger(project="test", save_dir=offline, offline=True)
    trainer(sparsity(), root=offline, logger=logger).fit(Classifier(), loader())
    run_file = written(logger, offline)
    every_row = history(run_file)
    rows = [row for row in every_row if "sparsity/density" in row]
    # Each update is logged in one call, so that its scalars and media share a row.
    assert [row["trainer/global_step"] for row in rows] == [4, 8, 12, 16, 18]
    assert [row["sparsity/density"] for row in rows] == sorted(
        (row["sparsity/density"] for row in rows), reverse=True
    )
    assert rows[-1]["sparsity/density"] == rows[-1]["sparsity/density_target"] == 0.25
    assert rows[-1]["sparsity/flops_per_token"] < rows[0]["sparsity/flops_per_token"] < 1
    for row in rows:
        assert {f"sparsity_density/{name}" for name in LAYERS} <= row.keys()
        assert 0 <= row["sparsity/survival"] <= 1
    with_images = [row for row in every_row if "mask/net.0" in row]
    assert [row["trainer/global_step"] for row in with_images] == [0, 4, 12, 18, 24]
    assert not any("mask/net.2" in row for row in every_row), "`images` is 1"
    for row in with_images:
        image = row["mask/net.0"]
        assert image["_type"] == "image-file"
        assert image["caption"].startswith(f"net.0, step {row['trainer/global_step']}, density")
        assert "orange: just grown" in image["caption"]
        assert (run_file.parent / "files" / image["path"]).stat().st_size > 0
        for side, blocks in (("row", 8), ("column", 4)):
            histogram = row[f"{side}_occupancy/net.0"]
            assert histogram["_type"] == "histogram" and sum(histogram["values"]) == blocks
            assert histogram["bins"][:3] == [-0.5, 0.5, 1.5], "one bin per count"
        assert ("block_norms/net.0" in row) == (row in rows), "norms are those of updates"
        if row in rows:
            norms = row["block_norms/net.0"]
            assert norms["_type"] == "histogram"
            assert min(norms["bins"]) >= row["sparsity_threshold/net.0"]
    assert {row["sparsity/samples_per_second"] > 0 for row in rows} == {True}
    defined = metrics(run_file)
    assert defined["sparsity/survival"]["summary"] == {"min": True, "mean": True}
    assert defined["sparsity/survival"]["step_metric"] == "trainer/global_step"


def test_wandb_gets_a_table_of_the_layers(offline: Path) -> None:
    logger = WandbLogger(project="test", save_dir=offline, offline=True, prefix="mine")
    callback, model = sparsity(), Classifier()
    trainer(callback, root=offline, logger=logger).fit(model, loader())
    run_file = written(logger, offline)
    assert "mine-sparsity/survival" in metrics(run_file)
    (row,) = [row for row in history(run_file) if "mine-sparsity/layers" in row]
    table = json.loads(
        (run_file.parent / "files" / row["mine-sparsity/layers"]["path"]).read_text()
    )
    columns = table["columns"]
    assert columns[:4] == ["name", "shape", "block size", "density"]
    assert columns[-2:] == ["parameters before", "parameters after"]
    assert [dict(zip(columns, data, strict=True)) for data in table["data"]] == [
        {
            "name": name,
            "shape": shape,
            "block size": 16,
            "density": 0.25,
            "blocks": 8,
            "dead rows": 0,
            "dead columns": 0,
            "ever active": 1,
            "initial left": 0.25,
            "parameters before": 64 * 128 + bias,
            "parameters after": 8 * 256 + bias,
        }
        for name, shape, bias in (("net.0", "128x64", 128), ("net.2", "64x128", 64))
    ]
    assert row["trainer/global_step"] == 24


@pytest.mark.parametrize("fails", ["image", "table", "call", "pillow"])
def test_wandb_media_that_fail_are_a_warning(
    fails: str, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no space")

    class Refusing(WandbLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if fails == "call" and "mask/net.0" in metrics:
                fail()
            super().log_metrics(metrics, step)

    if fails == "pillow":
        monkeypatch.setitem(sys.modules, "PIL", None)
    elif fails != "call":
        monkeypatch.setattr(wandb, fails.title(), fail)
    logger = Refusing(project="test", save_dir=offline, offline=True)
    with pytest.warns(UserWarning, match="Refusing could not log block masks") as warned:
        trainer(sparsity(), root=offline, logger=logger).fit(Classifier(), loader())
    assert len([w for w in warned if "could not log" in str(w.message)]) == 1, "once"
    run_file = written(logger, offline)
    rows = [row for row in history(run_file) if "sparsity/density" in row]
    assert [row["trainer/global_step"] for row in rows] == [4, 8, 12, 16, 18]
    assert [row for row in rows if "mask/net.0" in row] == [] or fails == "table"


def test_csv_gets_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    trainer(sparsity(), root=tmp_path, logger=logger).fit(Classifier(), loader())
    rows = [row for row in read_csv(logger) if row["sparsity/density"]]
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
        logger.log_dir, size_guidance={"images": 0, "histograms": 0, "tensors": 0}
    )
    events.Reload()
    assert [e.step for e in events.Scalars("sparsity/density")] == [4, 8, 12, 16, 18]
    images = events.Images("mask/net.0")
    assert [e.step for e in images] == [0, 4, 12, 18, 24]
    for name in ("row_occupancy", "column_occupancy"):
        assert [e.step for e in events.Histograms(f"{name}/net.0")] == [0, 4, 12, 18, 24]
    assert [e.step for e in events.Histograms("block_norms/net.0")] == [4, 12, 18]
    assert (images[0].height, images[0].width) == (512, 256)
    captions = [e.tensor_proto.string_val[0] for e in events.Tensors("mask/net.0/text_summary")]
    assert len(captions) == 5 and b"net.0, step 0, density 1.000 (dark blue: present" in captions[0]
    (table,) = events.Tensors("sparsity/layers/text_summary")
    lines = table.tensor_proto.string_val[0].decode().splitlines()
    assert table.step == 24 and len(lines) == 2 + len(LAYERS)
    assert lines[2] == "| net.0 | 128x64 | 16 | 0.250 | 8 | 0 | 0 | 1.000 | 0.250 | 8320 | 2176 |"


class Pictures:
    """Keeps the pictures that a TensorBoard logger receives."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.logger = TensorBoardLogger(folder)
        self.steps: list[int] = []
        self.images: list[np.ndarray] = []
        monkeypatch.setattr(self.logger.experiment, "add_image", self.keep)

    def keep(self, tag: str, image: np.ndarray, step: int, dataformats: str) -> None:
        assert (tag, dataformats) == ("mask/net.0", "HWC")
        self.steps.append(step)
        self.images.append(image)


def test_pictures_show_what_an_update_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pictures are compared with masks that another callback reads from the layer."""
    masks: dict[int, np.ndarray] = {}

    class Record(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: Any) -> None:
            masks[trainer.global_step] = module.net[0].topology.mask.numpy()

        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            masks[trainer.global_step] = module.net[0].topology.mask.numpy()

    def run(steps: int, path: Path | None = None) -> Pictures:
        callback = exchanging(monitor={"every_n_updates": 1, "images": 1})
        pictures = Pictures(tmp_path, monkeypatch)
        fitting = trainer(
            callback, Record(), max_steps=steps, root=tmp_path, logger=pictures.logger
        )
        fitting.fit(Classifier(), loader(), ckpt_path=path)
        fitting.save_checkpoint(tmp_path / "last.ckpt")
        return pictures

    first, resumed = run(8), run(14, tmp_path / "last.ckpt")
    assert (masks[3] != masks[4]).any()
    assert first.steps == [0, 4, 8], "the last update is at the end"
    assert resumed.steps == [8, 12, 14]
    for pictures in (first, resumed):
        for step, image in zip(pictures.steps, pictures.images, strict=True):
            is_update = step % 4 == 0 and step != pictures.steps[0]
            before = masks[step - 1] if is_update else masks[step]
            assert (image == mask_image(masks[step], before)).all()


def test_tensorboard_media_that_fail_are_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise TypeError("no images here")

    logger = TensorBoardLogger(tmp_path)
    monkeypatch.setattr(logger.experiment, "add_image", fail)
    callback = sparsity()
    with pytest.warns(UserWarning, match=r"TensorBoardLogger could not .*TypeError: no images"):
        trainer(callback, root=tmp_path, logger=logger).fit(Classifier(), loader())
    assert callback.last_update.number == 5


def test_monitor_null_logs_nothing(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = SparsityCallback(block_size=16, update={"every_n_steps": 4}, monitor=None)
    trainer(callback, root=tmp_path, logger=logger).fit(Classifier(), loader())
    assert callback.last_update is not None
    metrics = Path(logger.log_dir) / "metrics.csv"
    assert not metrics.exists() or "sparsity" not in metrics.read_text()


def test_one_call_per_logger_and_update(tmp_path: Path) -> None:
    calls: list[tuple[int, dict[str, Any]]] = []

    class Counting(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if any(key.startswith("sparsity") for key in metrics):
                calls.append((int(step or 0), dict(metrics)))

    loggers = [Counting(tmp_path), Counting(tmp_path)]
    trainer(sparsity(), root=tmp_path, logger=loggers).fit(Classifier(), loader())
    # The last call logs the rates of the steps after the last update.
    assert [step for step, _ in calls] == [4, 4, 8, 8, 12, 12, 16, 16, 18, 18, 24, 24]
    assert set(calls[-1][1]) == {"sparsity/samples_per_second"}


# -- options and summary ---------------------------------------------------------------------


def test_csv_gets_options_and_summary_as_hyperparameters(tmp_path: Path) -> None:
    logger, callback = CSVLogger(tmp_path), sparsity()
    trainer(callback, root=tmp_path, logger=logger).fit(Classifier(), loader())
    saved = hparams_file(logger)
    assert saved["sparsity/block_size"] == 16 and saved["sparsity/init"] == "random"
    assert saved["sparsity/density.final"] == 0.25 and saved["sparsity/monitor.images"] == 1
    summary = callback.summary
    expected = {
        "density": 0.25,
        "parameters": summary.parameters,
        "dense_parameters": summary.dense_parameters,
        "bytes": summary.nbytes,
        "dense_bytes": summary.dense_nbytes,
        "flops": summary.flops,
        "updates": 5,
        "fit_updates": 5,
        "blocks_dropped": summary.dropped,
        "blocks_grown": summary.grown,
        "ever_active": summary.ever_active,
        "dead_outputs": 0,
        "unread_inputs": 0,
    }
    prefix = "sparsity/summary/"
    found = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
    assert found.pop("samples_per_second") > 0
    assert found == expected


def test_wandb_and_tensorboard_get_options_and_summary(offline: Path) -> None:
    wandb_logger = WandbLogger(project="test", save_dir=offline, offline=True)
    board = TensorBoardLogger(offline)
    loggers = [wandb_logger, board]
    trainer(sparsity(), root=offline, logger=loggers).fit(Classifier(), loader())
    run_file = written(wandb_logger, offline)
    assert config(run_file)["sparsity/density.schedule"] == "cubic"
    (row,) = [row for row in history(run_file) if "sparsity/summary/density" in row]
    assert row["sparsity/summary/density"] == 0.25 and row["trainer/global_step"] == 24
    (event,) = read_events(board).Scalars("sparsity/summary/density")
    assert (event.step, event.value) == (24, 0.25)
    assert b"sparsity/density.schedule" in shown_by_tensorboard(board)


class Saved(Classifier):
    """Saves its hyperparameters, which Lightning logs."""

    def __init__(self, lr: float = 1e-2, momentum: float = 0.9) -> None:
        super().__init__(lr)
        self.save_hyperparameters()


class SavedQuietly(Classifier):
    def __init__(self, momentum: float = 0.9) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)


def read_events(logger: TensorBoardLogger) -> Any:
    logger.finalize("success")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(logger.log_dir)
    events.Reload()
    return events


def shown_by_tensorboard(logger: TensorBoardLogger) -> bytes:
    """Return the run's hyperparameters in TensorBoard, encoded, which are those it reads first."""
    content = read_events(logger).PluginTagToContent("hparams")
    return b"".join(value for tag, value in content.items() if tag.endswith("session_start_info"))


def hparams_file(logger: Any) -> dict[str, Any]:
    return yaml.safe_load((Path(logger.log_dir) / "hparams.yaml").read_text())


@pytest.mark.parametrize(
    ("model", "keywords", "is_shown"),
    [
        (Saved, {}, True),
        (SavedQuietly, {}, False),
        (Saved, {"enable_autolog_hparams": False}, False),
    ],
)
def test_tensorboard_shows_the_options_beside_what_the_model_saved(
    model: Any, keywords: dict[str, Any], is_shown: bool, tmp_path: Path
) -> None:
    if keywords and "enable_autolog_hparams" not in inspect.signature(L.Trainer).parameters:
        pytest.skip("Lightning 2.5 has no such option")
    logger = TensorBoardLogger(tmp_path)
    callbacks = [
        SparsityCallback(block_size=16, include=[f"net.{i}"], density=density)
        for i, density in ((0, 0.25), (2, 0.5))
    ]
    trainer(*callbacks, root=tmp_path, logger=logger, max_steps=2, **keywords).fit(
        model(), loader()
    )
    shown, saved = shown_by_tensorboard(logger), hparams_file(logger)
    for number, density in ((1, 0.25), (2, 0.5)):
        assert f"sparsity/{number}/density.final".encode() in shown
        assert saved[f"sparsity/{number}/density.final"] == density
    assert (b"momentum" in shown, "momentum" in saved) == (is_shown, is_shown)


def test_tensorboard_shows_what_the_datamodule_saved(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        def __init__(self, crop: int = 32) -> None:
            super().__init__()
            self.save_hyperparameters()

        def train_dataloader(self) -> DataLoader[Any]:
            return loader()

    logger = TensorBoardLogger(tmp_path)
    trainer(sparsity(), root=tmp_path, logger=logger, max_steps=2).fit(Saved(), Data())
    shown = shown_by_tensorboard(logger)
    assert all(key in shown for key in (b"crop", b"momentum", b"sparsity/density.final"))


def test_a_csv_logger_that_is_used_again_has_the_options_of_the_latest_fit(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    first = [
        SparsityCallback(block_size=16, include=[f"net.{i}"], layer_density={f"net.{i}": 0.5})
        for i in (0, 2)
    ]
    trainer(*first, root=tmp_path, logger=logger, max_steps=2).fit(Saved(), loader())
    assert "sparsity/2/summary/density" in hparams_file(logger)
    started: dict[str, Any] = {}

    class Read(L.Callback):
        def on_train_start(self, *_: Any) -> None:
            started.update(hparams_file(logger))

    second = SparsityCallback(block_size=16, density=0.25)
    trainer(second, Read(), root=tmp_path, logger=logger, max_steps=2).fit(Saved(), loader())
    options = {key for key in started if key.startswith("sparsity/")}
    assert options == {f"sparsity/{name}" for name in second.config.options()}
    assert started["momentum"] == 0.9
    assert hparams_file(logger)["sparsity/summary/density"] == 0.25


def test_the_options_of_several_callbacks_have_their_own_keys(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callbacks = [
        SparsityCallback(block_size=16, include=[f"net.{i}"], density=density)
        for i, density in ((0, 0.25), (2, 0.5))
    ]
    trainer(*callbacks, root=tmp_path, logger=logger).fit(Classifier(), loader())
    saved = hparams_file(logger)
    assert [saved[f"sparsity/{i}/density.final"] for i in (1, 2)] == [0.25, 0.5]
    assert [saved[f"sparsity/{i}/summary/density"] for i in (1, 2)] == [0.25, 0.5]


def test_options_that_a_logger_refuses_are_a_warning(tmp_path: Path) -> None:
    class Refusing(CSVLogger):
        def log_hyperparams(self, params: Any) -> None:
            raise OSError("no space")

    with pytest.warns(UserWarning, match=r"Refusing could not log .* options \(OSError: no space"):
        trainer(sparsity(), root=tmp_path, logger=Refusing(tmp_path)).fit(Classifier(), loader())


# -- scalars of layers -----------------------------------------------------------------------


class Repeated(Classifier):
    """Two blocks of the same two layers, and one layer of another shape."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64)) for _ in range(2)]
        self.net = nn.Sequential(*blocks, nn.Linear(64, 64))


def logged_layers(root: Path, choice: Any) -> tuple[SparsityCallback, dict[str, float]]:
    """Train `Repeated` with a choice of `monitor.layers`; return its last scalars of layers."""
    logger = CSVLogger(root)
    callback = SparsityCallback(
        block_size=16, grow="random", update={"every_n_steps": 4}, monitor={"layers": choice}
    )
    trainer(callback, root=root, logger=logger).fit(Repeated(), loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    (last,) = [row for row in rows if row["step"] == "18"]
    return callback, {k: float(v) for k, v in last.items() if k.startswith("sparsity_")}


def test_repeated_layers_share_scalars(tmp_path: Path) -> None:
    callback, logged = logged_layers(tmp_path, "groups")
    assert {key.partition("/")[2] for key in logged} == {"net.*.0", "net.*.1", "net.2"}
    layers = callback.sparsifier.layers
    ups = [layers[f"net.{i}.0"].topology for i in range(2)]
    changes = [callback.last_update.layers[f"net.{i}.0"] for i in range(2)]
    assert logged["sparsity_density/net.*.0"] == sum(t.n_blocks for t in ups) / 64
    dead = [(~topology.mask.any(1)).sum() for topology in ups]
    assert logged["sparsity_dead_rows/net.*.0"] == sum(dead)
    grown = sum(len(change.grown) for change in changes)
    assert logged["sparsity_churn/net.*.0"] == pytest.approx(grown / sum(t.n_blocks for t in ups))


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("all", {"net.0.0", "net.0.1", "net.1.0", "net.1.1", "net.2"}),
        ("none", set()),
        (["net.0.*", "2"], {"net.0.0", "net.0.1", "net.2"}),
    ],
)
def test_the_layers_with_scalars_are_chosen(tmp_path: Path, choice: Any, names: set[str]) -> None:
    _, logged = logged_layers(tmp_path, choice)
    assert {key.partition("/")[2] for key in logged} == names


def test_a_choice_of_layers_that_is_wrong() -> None:
    with pytest.raises(
        ValueError, match=r"`monitor.layers` must be one of 'groups', 'all', 'none'"
    ):
        SparsityCallback(monitor={"layers": "each"})
    callback = SparsityCallback(block_size=16, monitor={"layers": ["up", "down"]})
    model = Classifier()
    with pytest.raises(
        ValueError, match=r"got 'up', 'down', which match none of net.0, net.2"
    ) as raised:
        trainer(callback).fit(model, loader())
    assert [entry.name for entry in raised.traceback if entry.name == "setup"], "at the swap"


def test_one_of_several_patterns_that_matches_nothing_is_a_warning(tmp_path: Path) -> None:
    """The training need not stop for it, as the others are logged."""
    with pytest.warns(UserWarning, match=r"`monitor.layers` should .* got 'up', which matches"):
        _, logged = logged_layers(tmp_path, ["up", "2"])
    assert {key.partition("/")[2] for key in logged} == {"net.2"}


def test_groups_of_other_shapes_are_told_apart() -> None:
    layers = {
        f"layers.{i}.up": BlockSparseLinear(n, 32, block_size=16, density=1.0)
        for i, n in enumerate((32, 32, 64, 64))
    }
    assert layer_series("groups", layers) == {
        "layers.*.up (32x32, 16)": ["layers.0.up", "layers.1.up"],
        "layers.*.up (32x64, 16)": ["layers.2.up", "layers.3.up"],
    }


def test_groups_of_several_callbacks_are_told_apart(tmp_path: Path) -> None:
    class Deep(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(*(nn.Linear(64, 64) for _ in range(5)))

    logger = CSVLogger(tmp_path)
    callbacks = [
        SparsityCallback(block_size=16, include=names, density=density, update={"every_n_steps": 4})
        for names, density in ((["net.0", "net.1"], 0.25), (["net.2", "net.3"], 0.5))
    ]
    alone = SparsityCallback(block_size=16, include=["net.4"], update={"every_n_steps": 4})
    trainer(*callbacks, alone, root=tmp_path, logger=logger).fit(Deep(), loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    found = {
        key.partition("/")[2]: {float(row[key]) for row in rows if row[key]}
        for key in rows[0]
        if key.startswith("sparsity_density/")
    }
    assert found == {"1/net.*": {0.25}, "2/net.*": {0.5}, "net.4": {0.25}}


# -- masks over time -----------------------------------------------------------------------


def exchanging(**options: Any) -> SparsityCallback:
    return SparsityCallback(
        block_size=16,
        density=0.25,
        update={"every_n_steps": 4, "until": 20},
        drop_fraction=0.5,
        grow="random",
        **options,
    )


def saved_masks(callback: SparsityCallback) -> dict[str, Any]:
    found: dict[str, Any] = callback.state_dict()["patterns"]
    return found


def test_exchanged_weights_are_counted_over_a_resume(tmp_path: Path) -> None:
    seen: list[int] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            (sparsity,) = [c for c in trainer.callbacks if isinstance(c, SparsityCallback)]
            update = sparsity.last_update
            if update is not None and update.step == trainer.global_step:
                seen.append(sum(change.new_weights for change in update.layers.values()))

    for steps, path in ((10, None), (20, tmp_path / "last.ckpt")):
        callback = exchanging(nm="2:4")
        fitting = trainer(callback, Record(), max_steps=steps, root=tmp_path)
        fitting.fit(Classifier(), loader(), ckpt_path=path)
        fitting.save_checkpoint(tmp_path / "last.ckpt")
    summary = callback.summary
    assert summary.exchanged == sum(seen) > 0 and len(seen) == summary.updates
    assert summary.scalars()["weights_exchanged"] == sum(seen)
    assert (
        f" grown, {sum(seen):,} weights exchanged within blocks" in dict(summary.rows())["updates"]
    )
    assert summary.scalars()["weight_density"] == 0.125


def test_what_was_ever_active_survives_a_resume(tmp_path: Path) -> None:
    """The metric is compared with masks that another callback records."""
    seen: list[torch.Tensor] = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
            seen.append(module.net[0].topology.mask)

    def run(steps: int, path: str | None = None) -> SparsityCallback:
        callback = exchanging()
        fitting = trainer(callback, Record(), max_steps=steps, root=tmp_path)
        model = Classifier()
        fitting.fit(model, loader(), ckpt_path=path)
        seen.insert(0, saved_masks(callback)["first"]["net.0"])
        fitting.save_checkpoint(tmp_path / "last.ckpt")
        return callback

    run(10)
    expected = torch.stack(seen).any(0)
    first = seen[0]
    callback = run(20, str(tmp_path / "last.ckpt"))
    expected |= torch.stack(seen).any(0)
    assert torch.equal(saved_masks(callback)["ever"]["net.0"], expected) and expected.sum() > 8
    assert torch.equal(saved_masks(callback)["first"]["net.0"], first)
    assert callback.summary.grown > 0


def test_a_checkpoint_without_masks_is_refused(tmp_path: Path) -> None:
    fitting = trainer(exchanging(), max_steps=10, root=tmp_path)
    fitting.fit(Classifier(), loader())
    fitting.save_checkpoint(tmp_path / "old.ckpt")
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    del checkpoint["callbacks"]["SparsityCallback"]["patterns"]
    torch.save(checkpoint, tmp_path / "old.ckpt")
    model = Classifier()
    with pytest.raises(ValueError, match=r"must hold 'patterns'; got none.*the version"):
        trainer(exchanging(), max_steps=20).fit(model, loader(), ckpt_path=tmp_path / "old.ckpt")
    assert not model.losses
