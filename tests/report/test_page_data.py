"""The data of the page, against histories worked out by hand."""

from __future__ import annotations

import base64
import json
import math
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest

from sparse_lightning import history as history_module
from sparse_lightning.history import History, HistoryWriter, read_history
from sparse_lightning.report import page_data as module
from sparse_lightning.report.page_data import (
    BlockCounts,
    count_blocks,
    curves,
    page_data,
    panel_name,
)


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    """Two layers and three updates: 'a' has 2 x 3 blocks, 'b' has one block that never changes."""
    grids = (
        [[1, 1, 0], [0, 1, 0]],
        [[1, 0, 1], [0, 1, 0]],  # block 1 is dropped and 2 grown
        [[0, 0, 0], [0, 1, 0]],  # 0 and 2 are dropped
        [[0, 0, 0], [1, 1, 0]],  # 3 is grown
    )
    writer, b = HistoryWriter(tmp_path / "small"), np.ones((1, 1), dtype=bool)
    for number, grid in enumerate(grids):
        monkeypatch.setattr(history_module.time, "time", lambda number=number: 1000.0 + number)
        masks = {"a": np.array(grid, dtype=bool), "b": b}
        if number == 0:
            writer.start(0, masks, {"a": 16, "b": 32}, {"device": "CPU"})
        else:
            writer.update(10 * number, number, masks)
        if number == 1:
            scores = np.array([[2.0, np.nan, np.nan], [np.nan, 4.0, np.nan]], dtype=np.float32)
            writer.scores({"a": scores, "b": np.full((1, 1), np.nan, dtype=np.float32)})
    return read_history(tmp_path / "small")


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)


def animation(layer: dict, frames: int) -> np.ndarray:
    """The masks drawn by the page."""
    size = math.prod(layer["grid"])
    bits = np.unpackbits(unpacked(layer["animation"]).reshape(frames, -1), axis=1)[:, :size]
    return (np.cumsum(bits, axis=0) % 2).astype(bool).reshape(frames, *layer["grid"])


def test_block_counts_of_a_layer(small: History) -> None:
    counts, last_change = count_blocks(small.layers["a"], [0, 10, 20, 30])
    assert counts == BlockCounts(
        present=[3, 3, 1, 2],
        grown=[0, 1, 0, 1],
        dropped=[0, 1, 2, 0],
        ever=[3, 4, 4, 5],
        dead_outputs=[0, 0, 16, 16],
        unread_inputs=[16, 0, 32, 16],
    )
    assert counts.replaced() == [0, 1, 0, 0]
    assert last_change.tolist() == [20, 10, 20, 30, 0, 0]


def test_the_curves_are_shares(small: History) -> None:
    counts, _ = count_blocks(small.layers["a"], [0, 10, 20, 30])
    assert curves(counts, 6) == {
        "density": [0.5, 0.5, 0.166667, 0.333333],
        "churn": [0, 0.333333, 0, 0],
        "survival": [1, 0.666667, 0.333333, 1],
        "ever": [0.5, 0.666667, 0.666667, 0.833333],
        "dead_outputs": [0, 0, 16, 16],
        "unread_inputs": [16, 0, 32, 16],
    }


def test_all_data_of_the_page(small: History) -> None:
    data = page_data(small, "a run")
    a, b = data["layers"]
    assert a["row"] == {
        "present": 2, "density": 0.333333, "ever": 0.833333,
        "dead_outputs": 16, "unread_inputs": 16, "replaced": 1, "age": 15, "score": 3,
    }  # fmt: skip
    assert b["row"]["age"] == 30 and b["row"]["score"] is None and b["row"]["replaced"] == 0
    assert data["density"] == [(3 * 256 + 1024) / 2560, (2 * 256 + 1024) / 2560]
    assert data["weights"] == {
        "dense": 6 * 256 + 1024,
        "first": 3 * 256 + 1024,
        "last": 2 * 256 + 1024,
    }
    assert data["curves"]["total"]["density"] == [round(n / 7, 6) for n in (4, 4, 2, 3)]
    assert data["curves"]["total"]["unread_inputs"] == [16, 0, 32, 16]
    assert data["updates"] == 3 and data["recorded"] == 4
    assert data["steps"] == [0, 30] and data["seconds"] == [1000, 1003]
    for name, layer in zip("ab", data["layers"], strict=True):
        masks = animation(layer, 4)
        for frame in range(4):
            assert (masks[frame] == small.layers[name].mask(frame)).all()


def test_repeated_layers_have_a_row_together(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "repeated")
    grids = {"up.0": [[1, 1]], "down": [[1]], "up.1": [[1, 0]], "up.2": [[1, 0, 0]]}
    masks = {name: np.array(grid, dtype=bool) for name, grid in grids.items()}
    writer.start(0, masks, dict.fromkeys(masks, 16), {})
    writer.update(10, 1, masks | {"up.1": np.array([[0, 1]], dtype=bool)})
    writer.scores({name: np.full(mask.shape, 3, dtype=np.float32) for name, mask in masks.items()})
    data = page_data(read_history(tmp_path / "repeated"), "")
    together, down, other_shape = data["groups"]
    assert (together["name"], together["layers"]) == ("up.*", [0, 2])
    assert together["row"] == {
        "present": 3, "density": 0.75, "ever": 1, "dead_outputs": 0, "unread_inputs": 16,
        "replaced": 1, "age": 6.66667, "score": 3,
    }  # fmt: skip
    for group, index in ((down, 1), (other_shape, 3)):
        assert group["layers"] == [index] and group["row"] == data["layers"][index]["row"]


def test_the_weights_of_a_pattern_are_those_that_are_kept(tmp_path: Path) -> None:
    """The density stays the share of blocks, and rows say the share of weights as well."""
    writer = HistoryWriter(tmp_path / "h")
    masks = {"a": np.ones((2, 2), dtype=bool), "b": np.ones((1, 1), dtype=bool)}
    writer.start(0, masks, {"a": 16, "b": 32}, {}, {"a": "2:4"})
    masks["a"] = np.array([[1, 0], [0, 1]], dtype=bool)
    writer.update(10, 1, masks)
    data = page_data(read_history(tmp_path / "h"), "")
    assert data["density"] == [1, (2 * 256 + 1024) / (4 * 256 + 1024)]
    assert data["weights"] == {
        "dense": 4 * 256 + 1024,
        "first": 4 * 128 + 1024,
        "last": 2 * 128 + 1024,
    }
    for rows in (data["layers"], data["groups"]):
        a, b = rows
        assert (a["nm"], a["row"]["density"], a["row"]["weight_density"]) == ("2:4", 0.5, 0.25)
        assert b["nm"] is None and "weight_density" not in b["row"]


def test_scores_start_at_their_frame(small: History) -> None:
    scores = page_data(small, "")["layers"][0]["scores"]
    assert scores["from"] == [1] and scores["steps"] == [10] and scores["ranges"] == [[2.0, 4.0]]
    assert unpacked(scores["levels"]).tolist() == [1, 0, 0, 0, 255, 0]


def test_metrics_are_grouped_and_non_finite_values_are_none(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "h")
    writer.start(
        0, {"a": np.ones((2, 2), dtype=bool)}, {"a": 16}, {"config": {"seed": 0, "x": [1, 2]}}
    )
    writer.metrics(3, {"train_loss": 1.5, "val/loss": float("nan")})
    writer.metrics(9, {"train_loss": 0.5})
    writer.metrics(9, {"train_loss": float("inf")})
    data = page_data(read_history(tmp_path / "h"), "")
    assert data["metrics"] == [
        {"panel": "loss", "name": "train_loss", "step": [3, 9], "value": [1.5, None]},
        {"panel": "loss", "name": "val/loss", "step": [3], "value": [None]},
    ]
    assert data["about"] == [["config.seed", "0"], ["config.x", "1, 2"]]
    assert data["updates"] == 0 and data["recorded"] == 1 and data["steps"] == [0, 9]
    json.dumps(data, allow_nan=False)


@pytest.mark.parametrize(
    ("metric", "panel"),
    [
        ("loss", "loss"),
        ("train/loss_epoch", "loss"),
        ("val_accuracy", "accuracy"),
        ("validation.accuracy", "accuracy"),
        ("training_data", "data"),
        ("trainable", "trainable"),
        ("sparsity/density", "sparsity/density"),
        ("sparsity_survival/fc.1", "sparsity_survival"),
        ("step", "step"),
    ],
)
def test_panels_group_comparable_metrics(metric: str, panel: str) -> None:
    assert panel_name(metric) == panel


def test_many_frames_are_merged_only_in_the_animations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FRAMES", 3)
    generator = np.random.default_rng(0)
    writer, mask = HistoryWriter(tmp_path / "h"), generator.random((5, 4)) < 0.5
    writer.start(0, {"a": mask}, {"a": 16}, {})
    for number in range(1, 9):
        mask = mask ^ (generator.random((5, 4)) < 0.3)
        writer.update(number, number, {"a": mask})
        if number == 5:
            writer.scores({"a": np.ones((5, 4), dtype=np.float32)})
    history = read_history(tmp_path / "h")
    layer = history.layers["a"]
    data = page_data(history, "")
    assert [frame["step"] for frame in data["frames"]] == [0, 4, 8]
    assert data["recorded"] == 9 and data["updates"] == 8
    masks = animation(data["layers"][0], 3)
    assert all((masks[i] == layer.mask(4 * i)).all() for i in range(3))
    assert len(data["curves"]["step"]) == 9
    # Scored at step 5: the frame of step 4 must not show later scores.
    assert data["layers"][0]["scores"]["from"] == [2]


def test_an_update_undone_by_a_restart_is_not_shown(tmp_path: Path) -> None:
    writer = HistoryWriter(tmp_path / "h")
    one, other = np.array([[1, 0]], dtype=bool), np.array([[0, 1]], dtype=bool)
    writer.start(0, {"a": one}, {"a": 16}, {})
    writer.update(10, 1, {"a": other})
    writer.start(5, {"a": one}, {"a": 16}, {})
    writer.update(10, 1, {"a": one})
    data = page_data(read_history(tmp_path / "h"), "")
    assert data["updates"] == 1 and data["layers"][0]["row"]["replaced"] == 0


def test_memory_does_not_grow_with_the_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_FRAMES", 5)
    monkeypatch.setattr(module, "_MAX_BLOCKS_IN_SCORES", 1)
    generator, peaks = np.random.default_rng(0), []
    for updates in (10, 100):
        path, mask = tmp_path / f"{updates}", generator.random((256, 256)) < 0.3
        writer = HistoryWriter(path)
        writer.start(0, {"a": mask}, {"a": 16}, {})
        for number in range(1, updates + 1):
            mask = mask ^ (generator.random(mask.shape) < 0.2)
            writer.update(number, number, {"a": mask})
            writer.scores({"a": generator.random(mask.shape, dtype=np.float32)})
        tracemalloc.start()
        assert page_data(read_history(path), "")["updates"] == updates
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # The changed blocks of 90 frames, as int32, are 4.7 MB.
    assert peaks[1] < peaks[0] + 400_000, peaks
