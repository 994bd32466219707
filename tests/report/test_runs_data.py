"""The data of the page that compares runs, against histories worked out by hand."""

from __future__ import annotations

import base64
import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lightning import history as history_module
from sparse_lightning.history import HistoryWriter
from sparse_lightning.report import runs_data as module
from sparse_lightning.report.runs_data import default_metric, differing_options, runs_data


def bools(*rows: list[int]) -> np.ndarray:
    return np.array(rows, dtype=bool)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that records get."""
    now = [1000.0]
    monkeypatch.setattr(history_module.time, "time", lambda: now[0])
    return now


@pytest.fixture
def falling(tmp_path: Path, clock: list[float]) -> Path:
    """'a' has 4 blocks of 16, of which it loses half at step 10 of 40; 'b' has one of 32."""
    writer = HistoryWriter(tmp_path / "falling")
    b = bools([1])
    about = {"config": {"density": {"final": 0.5}, "drop": "magnitude", "seed": 0}}
    writer.start(0, {"a": bools([1, 1], [1, 1]), "b": b}, {"a": 16, "b": 32}, about)
    clock[0] += 5
    writer.update(10, 1, {"a": bools([1, 0], [0, 1]), "b": b})
    writer.metrics(10, {"val/accuracy": 0.5, "val/loss": 3.0})
    writer.metrics(20, {"val/accuracy": 0.75, "val/loss": 1.0})
    clock[0] += 15
    writer.metrics(40, {"val/accuracy": 0.625, "val/loss": 2.0})
    return tmp_path / "falling"


@pytest.fixture
def started(tmp_path: Path, clock: list[float]) -> Path:
    """One frame of another layer with blocks of 64, and no metric."""
    about = {"config": {"density": {"final": 0.25}, "drop": "magnitude", "rule": "mine"}}
    HistoryWriter(tmp_path / "started").start(7, {"c": bools([0, 1, 0, 0])}, {"c": 64}, about)
    return tmp_path / "started"


def mask(layer: dict[str, Any], frame: int) -> list[int]:
    """A layer's mask as the page computes it: the changes of all frames so far, one by one."""
    blocks = int(np.prod(layer["grid"]))
    bits = np.frombuffer(zlib.decompress(base64.b64decode(layer["animation"])), dtype=np.uint8)
    changes = np.unpackbits(bits.reshape(-1, -(-blocks // 8)), axis=1)[: frame + 1, :blocks]
    return (changes.sum(0) % 2).tolist()


def test_the_values_of_a_run(falling: Path) -> None:
    (run,) = runs_data({"one": falling}, "a title")["runs"]
    assert run["name"] == "one" and run["gaps"] == "" and run["options"] == []
    assert run["density"] == 0.6  # 3 of 5 blocks
    assert (run["weights"], run["dense_weights"]) == (2 * 256 + 1024, 4 * 256 + 1024)
    # All weights for 10 steps, and three quarters of them for 30.
    assert run["flops"] == (10 * 1 + 30 * 0.75) / 40
    assert run["seconds"] == 20
    assert run["curves"] == {"step": [0, 10], "density": [1, 0.6], "churn": [0, 0]}
    accuracy, loss = run["metrics"]["val/accuracy"], run["metrics"]["val/loss"]
    assert accuracy["step"] == [10, 20, 40] and accuracy["value"] == [0.5, 0.75, 0.625]
    assert (accuracy["last"], accuracy["best"]) == (0.625, 0.75)
    assert (loss["last"], loss["best"]) == (2, 1)


def test_weights_and_flops_of_a_pattern_are_those_that_are_kept(tmp_path: Path) -> None:
    for name, nm in (("whole", None), ("half", "2:4")):
        writer = HistoryWriter(tmp_path / name)
        mask, about = bools([1, 0], [0, 1]), {"config": {"nm": nm}}
        writer.start(0, {"a": mask}, {"a": 16}, about, {"a": nm})
        writer.metrics(10, {"val/loss": 1.0})
    paths = {name: tmp_path / name for name in ("whole", "half")}
    data = runs_data(paths, "")
    whole, half = data["runs"]
    assert data["options"] == ["nm"] and [whole["options"], half["options"]] == [["None"], ["2:4"]]
    assert (whole["density"], whole["weights"], whole["flops"]) == (0.5, 2 * 256, 0.5)
    assert (half["density"], half["weights"], half["flops"]) == (0.5, 2 * 128, 0.25)
    assert half["dense_weights"] == whole["dense_weights"] == 4 * 256
    assert (whole["layers"]["a"]["nm"], half["layers"]["a"]["nm"]) == (None, "2:4")


def test_runs_with_nothing_in_common(falling: Path, started: Path) -> None:
    data = runs_data({"one": falling, "two": started}, "a title")
    assert data["title"] == "a title" and data["layers"] == ["a", "b", "c"]
    assert data["options"] == ["density.final", "seed", "rule"]
    one, two = data["runs"]
    assert one["options"] == [0.5, 0, None] and two["options"] == [0.25, None, "mine"]
    assert data["metric"] == "val/accuracy"
    assert data["metrics"] == {"val/accuracy": "highest", "val/loss": "lowest"}
    assert two["metrics"] == {} and two["seconds"] is None
    assert two["density"] == two["flops"] == 0.25 and two["weights"] == 64**2
    assert set(two["frames"]) == {7} and mask(two["layers"]["c"], 40) == [0, 1, 0, 0]
    json.dumps(data, allow_nan=False)


def test_without_any_metric(started: Path) -> None:
    data = runs_data({"two": started, "again": started}, "")
    assert data["metric"] is None and data["metrics"] == {} and data["options"] == []


def test_masks_are_those_of_the_same_share_of_the_steps(falling: Path) -> None:
    (run,) = runs_data({"one": falling}, "")["runs"]
    # 41 frames of 40 steps: the update at step 10 is in the frames from the 10th on.
    assert run["frames"] == [0] * 10 + [10] * 31
    assert mask(run["layers"]["a"], 9) == [1, 1, 1, 1]
    assert mask(run["layers"]["a"], 10) == mask(run["layers"]["a"], 40) == [1, 0, 0, 1]


def test_many_blocks_have_fewer_frames(falling: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # 5 blocks in each of two runs.
    monkeypatch.setattr(module, "MAX_BLOCKS_IN_ANIMATIONS", 50)
    for run in runs_data({"one": falling, "two": falling}, "")["runs"]:
        assert run["frames"] == [0, 10, 10, 10, 10]
    monkeypatch.setattr(module, "MAX_BLOCKS_IN_ANIMATIONS", 0)
    assert runs_data({"one": falling}, "")["runs"][0]["frames"] == [0, 10]  # start and end


def test_damage_is_told_and_the_rest_is_used(falling: Path) -> None:
    data = bytearray(falling.read_bytes())
    falling.write_bytes(data[:-1])
    (run,) = runs_data({"one": falling}, "")["runs"]
    assert run["gaps"] == "Records are damaged or missing after step 20."
    assert run["metrics"]["val/loss"]["last"] == 1 and run["flops"] == (10 + 10 * 0.75) / 20


def test_a_value_that_is_not_finite_is_missing(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "h")
    writer.start(0, {"a": bools([1])}, {"a": 16}, {})
    writer.metrics(1, {"loss": 2.0, "nan": float("nan")})
    writer.metrics(2, {"loss": float("inf")})
    metrics = runs_data({"one": tmp_path / "h"}, "")["runs"][0]["metrics"]
    assert metrics["loss"] == {"step": [1, 2], "value": [2, None], "last": None, "best": 2}
    assert metrics["nan"]["last"] is None and metrics["nan"]["best"] is None


def test_only_options_that_differ_are_columns() -> None:
    configs = [
        {"density": 0.1, "drop": "magnitude", "include": ["*"], "times": None, "regrow": True},
        {"density": 1, "drop": "magnitude", "include": ["a", "b"], "times": 3, "regrow": True},
    ]
    assert differing_options(configs) == {
        "density": [0.1, 1],  # numbers, which are sorted as such
        "include": ["*", "a, b"],
        "times": ["None", "3"],
    }
    constant, falling = ({"d.initial": initial, "d.final": 0.1} for initial in (0.1, 1.0))
    other = {"d.initial": 0.2, "d.final": 0.2}
    assert differing_options([constant, other]) == {"d.final": [0.1, 0.2]}
    assert differing_options([constant, falling]) == {"d.initial": [0.1, 1.0]}
    assert differing_options([{}, {}]) == differing_options([{}, {"seed": 1}]) == {}


@pytest.mark.parametrize(
    ("names", "metric"),
    [
        (["train_loss", "lr", "val_loss"], "val_loss"),
        (["val/time", "eval_loss", "train/accuracy"], "eval_loss"),
        (["interval_loss", "lr"], "interval_loss"),  # 'val' is only a part of a word
        (["val_acc", "val_loss", "val_loss"], "val_loss"),  # most runs have it
        (["val/loss", "val/accuracy"], "val/accuracy"),  # in whatever order they were logged
        (["val/accuracy", "val/loss"], "val/accuracy"),
        (["lr", "val/perplexity"], "val/perplexity"),
        (["Validation/Loss", "loss"], "Validation/Loss"),
        ([], None),
    ],
)
def test_the_metric_that_is_shown_first(names: list[str], metric: str | None) -> None:
    assert default_metric(names) == metric
