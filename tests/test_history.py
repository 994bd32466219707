"""Histories are read back as written, even after a process was killed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sparse_lightning.history import MAGIC, HistoryWriter, read_history

SIZES = {"a": 16, "b": 32}


def masks(seed: int, density: float = 0.3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {n: generator.random(g) < density for n, g in (("a", (5, 7)), ("b", (3, 2)))}


def written(path: Path, updates: int = 3) -> HistoryWriter:
    writer = HistoryWriter(path)
    writer.start(0, masks(0), SIZES, {"block": "sparse"})
    for number in range(1, updates + 1):
        writer.update(10 * number, number, masks(number))
        writer.metrics(10 * number, {"loss": 1 / number})
    return writer


def test_masks_metrics_and_scores(tmp_path: Path) -> None:
    path = tmp_path / "run" / "pattern.history"
    writer = written(path)
    scores = {name: np.full(mask.shape, np.nan, np.float32) for name, mask in masks(3).items()}
    scores["a"][masks(3)["a"]] = np.linspace(-2, 5, masks(3)["a"].sum())
    writer.scores(scores)
    history = read_history(path)
    assert history.about == {"block": "sparse"}
    assert [(f.step, f.number) for f in history.frames] == [(0, 0), (10, 1), (20, 2), (30, 3)]
    assert [(m.step, m.values) for m in history.metrics][-1] == (30, {"loss": 1 / 3})
    for frame in range(4):
        for name, layer in history.layers.items():
            assert (layer.mask(frame) == masks(frame)[name]).all()
            assert layer.grid == masks(0)[name].shape and layer.block_size == SIZES[name]
    assert (history.layers["a"].mask(-1) == masks(3)["a"]).all()
    np.testing.assert_allclose(history.layers["a"].scores[3], scores["a"], atol=7 / 254 / 2 + 1e-6)
    assert np.isnan(history.layers["b"].scores[3]).all()


def test_a_truncated_file_is_readable_and_can_be_continued(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    written(whole)
    data = whole.read_bytes()
    seen = set()
    for length in range(len(MAGIC), len(data)):
        path = tmp_path / "cut"
        path.write_bytes(data[:length])
        try:
            history = read_history(path)
        except ValueError as error:
            assert "without a start" in str(error)
            continue
        seen.add(len(history.frames))
        for name, layer in history.layers.items():
            assert (layer.mask(-1) == masks(len(history.frames) - 1)[name]).all()
    assert seen == {1, 2, 3, 4}
    path.write_bytes(data[:-1])
    HistoryWriter(path).metrics(40, {"loss": 0.0})
    assert [metrics.step for metrics in read_history(path).metrics] == [10, 20, 40]


def test_reading_stops_at_a_corrupt_record(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written(path)
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert len(read_history(path).metrics) == 2


def test_a_resumed_training_replaces_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written(path)
    writer = HistoryWriter(path)
    writer.start(20, masks(2), SIZES, {"block": "again"})
    writer.update(30, 3, masks(7))
    history = read_history(path)
    assert [f.step for f in history.frames] == [0, 10, 20, 30]
    assert [m.step for m in history.metrics] == [10, 20]
    assert (history.layers["a"].mask(-1) == masks(7)["a"]).all()
    assert history.about == {"block": "again"}
    # A start with a mask that differs from the last one adds a frame.
    HistoryWriter(path).start(35, masks(8), SIZES, {})
    history = read_history(path)
    assert [(f.step, f.number) for f in history.frames][-1] == (35, 0)
    assert (history.layers["b"].mask(-1) == masks(8)["b"]).all()


def test_scores_belong_to_the_masks_after_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    writer = written(path)
    for step, number in ((10, 1), (0, 0)):
        writer.start(step, masks(number), SIZES, {})
        writer.update(step + 5, number + 1, masks(7))
        scores = {n: np.where(mask, 2.0, np.nan).astype(np.float32) for n, mask in masks(7).items()}
        writer.scores(scores)
        history = read_history(path)
        for name, layer in history.layers.items():
            np.testing.assert_array_equal(layer.scores[number + 1], scores[name])
    # A start before all recorded steps begins a new history.
    writer.start(-5, masks(3), SIZES, {})
    assert [frame.step for frame in read_history(path).frames] == [-5]


def test_different_layers_start_a_new_history(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written(path)
    other = {"c": np.ones((2, 2), bool)}
    HistoryWriter(path).start(5, other, {"c": 64}, {})
    history = read_history(path)
    assert list(history.layers) == ["c"] and [f.step for f in history.frames] == [5]


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("a text")
    for opened in (read_history, HistoryWriter):
        with pytest.raises(ValueError, match="must be a history"):
            opened(path)
    assert path.read_text() == "a text"


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [32, 64, 128])
def test_a_thousand_updates_of_a_billion_parameters(tmp_path: Path, block_size: int) -> None:
    # 16 layers of 16384 x 4096 at density .25, of whose blocks a share that falls from .1 by a
    # cosine is replaced by random others. One of ten updates is written, and counts ten times.
    path, generator = tmp_path / "pattern.history", np.random.default_rng(0)
    grid, updates, every = (16384 // block_size, 4096 // block_size), 100, 10
    now = {str(i): generator.random(grid) < 0.25 for i in range(16)}
    writer = HistoryWriter(path)
    writer.start(0, now, dict.fromkeys(now, block_size), {})
    start = path.stat().st_size
    for number in range(1, updates + 1):
        share = 0.1 * (1 + np.cos(np.pi * number / updates)) / 2
        for mask in now.values():
            flat = mask.reshape(-1)
            present, absent = np.flatnonzero(flat), np.flatnonzero(~flat)
            n = int(share * len(present))
            flat[generator.choice(present, n, replace=False)] = False
            flat[generator.choice(absent, n, replace=False)] = True
        writer.update(100 * number, number, now)
    size = start + (path.stat().st_size - start) * every
    assert size < 50_000_000, f"{size:,} bytes"
    assert (read_history(path).layers["3"].mask(-1) == now["3"]).all()
