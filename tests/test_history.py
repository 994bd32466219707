"""Histories are read back as written, whatever happens to processes and files."""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_lightning.history import MAGIC, Gap, History, HistoryWriter, read_history

SIZES = {"a": 16, "b": 32}


def masks(seed: int, density: float = 0.3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(seed)
    return {n: generator.random(g) < density for n, g in (("a", (5, 7)), ("b", (3, 2)))}


def scores_of(number: int) -> dict[str, np.ndarray]:
    """Scores of the blocks of `masks(number)`, from `number` to `number + 34`."""
    grids = {name: np.arange(mask.size).reshape(mask.shape) for name, mask in masks(0).items()}
    return {name: (number + grid).astype(np.float32) for name, grid in grids.items()}


def assert_true(history: History) -> None:
    """Each frame has the masks of its step, `masks(step / 10)`, and their scores, if any."""
    for index, frame in enumerate(history.frames):
        number = frame.step // 10
        for name, layer in history.layers.items():
            mask = masks(number)[name]
            assert (layer.mask(index) == mask).all()
            if index in layer.scores:
                scores = np.where(mask, scores_of(number)[name], np.nan)
                np.testing.assert_allclose(layer.scores[index], scores, atol=35 / 254 / 2)


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


def resumed(path: Path) -> list[int]:
    """Write four updates, and three after a resume at step 20; return the steps of the frames."""
    for first, last in ((0, 4), (2, 5)):
        writer = HistoryWriter(path)
        writer.start(10 * first, masks(first), SIZES, {"first": first})
        for number in range(first + 1, last + 1):
            writer.update(10 * number, number, masks(number))
            writer.scores(scores_of(number))
            writer.metrics(10 * number, {"loss": 1 / number})
        writer.close()
    return [0, 10, 20, 30, 40, 50]


def test_a_flipped_bit_costs_at_most_one_record(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    steps = resumed(path)
    data = path.read_bytes()
    assert read_history(path).gaps == []
    for bit in range(0, 8 * len(data), 37):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        history = read_history(path)
        assert_true(history)
        lost = set(steps) - {frame.step for frame in history.frames}
        assert {frame.step for frame in history.frames} <= set(steps)
        n_scores, n_metrics = len(history.layers["a"].scores), len(history.metrics)
        # Scores are read only with the masks of their frame.
        assert len(lost) + (5 - n_metrics) + (5 - n_scores - len(lost - {0})) <= 1, bit
        assert history.gaps or (n_scores, n_metrics, lost) == (5, 5, set()), bit


def test_records_behind_damage_survive_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written(path)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    frames = read_history(path).frames
    assert [frame.step for frame in frames] != [0, 10, 20, 30] and frames[-1].step == 30
    writer = HistoryWriter(path)
    writer.start(30, masks(3), SIZES, {})
    writer.update(40, 4, masks(4))
    history = read_history(path)
    assert [f.step for f in history.frames] == [*(f.step for f in frames), 40]
    assert_true(history)


def test_gaps_say_what_is_missing(tmp_path: Path) -> None:
    whole, path = tmp_path / "whole", tmp_path / "pattern.history"
    sizes, writer = [len(MAGIC)], HistoryWriter(whole)
    writer.start(0, masks(0), SIZES, {})
    for number in range(1, 4):
        sizes.append(whole.stat().st_size)
        writer.update(10 * number, number, masks(number))
    data = whole.read_bytes()
    for n_bytes, at, gaps in (
        (len(data), [], []),
        (len(data) - 1, [], [Gap(20, None)]),
        (len(data), [sizes[0]], [Gap(None, 10)]),
        (len(data), [sizes[1] + 9], [Gap(0, 20)]),
        (len(data), [sizes[1], sizes[3]], [Gap(0, 20), Gap(20, None)]),
    ):
        damaged = bytearray(data[:n_bytes])
        for place in at:
            damaged[place] ^= 16
        path.write_bytes(damaged)
        assert read_history(path).gaps == gaps
        assert_true(read_history(path))
    # A resume at step 10 replaces what was lost after it. One at step 40 that has other masks than
    # the last ones reveals that updates in between were not recorded.
    writer = HistoryWriter(path)
    writer.start(10, masks(1), SIZES, {})
    writer.update(20, 2, masks(2))
    assert read_history(path).gaps == [Gap(0, 10)]
    writer.start(40, masks(4), SIZES, {})
    assert read_history(path).gaps == [Gap(0, 10), Gap(20, 40)]


def test_a_lost_start_is_named_although_metrics_come_before_the_next_masks(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    writer = HistoryWriter(path)
    writer.start(0, masks(0), SIZES, {})
    end = path.stat().st_size
    writer.metrics(0, {"loss": 1.0})
    writer.update(10, 1, masks(1))
    data = bytearray(path.read_bytes())
    data[end - 1] ^= 1
    path.write_bytes(data)
    history = read_history(path)
    assert [frame.step for frame in history.frames] == [10] and len(history.metrics) == 1
    assert history.gaps == [Gap(None, 0)]


def test_a_file_has_one_writer(tmp_path: Path) -> None:
    path, moved = tmp_path / "pattern.history", tmp_path / "pattern.1.history"
    first = written(path)
    with pytest.raises(BlockingIOError, match=r"one training at a time.*pattern.history"):
        HistoryWriter(path)
    # Renaming the file diverts neither its writer nor a reader.
    earlier = read_history(path)
    path.rename(moved)
    second = written(path, updates=1)
    first.update(40, 4, masks(4))
    assert [frame.step for frame in read_history(moved).frames] == [0, 10, 20, 30, 40]
    assert [frame.step for frame in read_history(path).frames] == [0, 10]
    assert_true(earlier)
    assert_true(read_history(moved))
    second.close()
    HistoryWriter(path)


def hold(ready: Any, end: Any) -> None:
    ready.set()
    end.wait(60)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_process_does_not_hold_the_file(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    writer = written(path)
    context = multiprocessing.get_context("fork")
    ready, end = context.Event(), context.Event()
    worker = context.Process(target=hold, args=(ready, end))
    worker.start()
    try:
        assert ready.wait(60)
        writer.update(40, 4, masks(4))
        writer.close()
        HistoryWriter(path)
    finally:
        end.set()
        worker.join()


def test_without_locks_the_training_that_started_last_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "fcntl", None)
    path = tmp_path / "pattern.history"
    first = written(path)
    second = HistoryWriter(path)
    second.start(20, masks(2), SIZES, {})
    first.update(40, 4, masks(7))
    second.update(30, 3, masks(3))
    first.update(50, 5, masks(8))
    history = read_history(path)
    assert [frame.step for frame in history.frames] == [0, 10, 20, 30]
    assert_true(history)


def test_writing_to_a_deleted_file_is_an_error(tmp_path: Path) -> None:
    writer = written(tmp_path / "pattern.history")
    (tmp_path / "pattern.history").unlink()
    with pytest.raises(FileNotFoundError, match=r"deleted.*pattern.history"):
        writer.update(40, 4, masks(4))


def test_a_new_file_begins_with_a_copy(tmp_path: Path) -> None:
    earlier, path = tmp_path / "earlier", tmp_path / "new" / "pattern.history"
    written(earlier)
    earlier.write_bytes(earlier.read_bytes()[:-1])
    writer = HistoryWriter(path, earlier)
    writer.start(20, masks(2), SIZES, {})
    writer.update(30, 3, masks(3))
    assert [frame.step for frame in read_history(path).frames] == [0, 10, 20, 30]
    assert_true(read_history(path))
    assert len(read_history(earlier).frames) == 4


def test_memory_does_not_grow_with_the_frames(tmp_path: Path) -> None:
    generator, peaks = np.random.default_rng(0), []
    for updates in (10, 100):
        path = tmp_path / f"{updates}"
        writer = HistoryWriter(path)
        writer.start(0, {"a": generator.random((256, 256)) < 0.3}, {"a": 16}, {})
        for number in range(1, updates + 1):
            writer.update(number, number, {"a": generator.random((256, 256)) < 0.3})
            writer.scores({"a": generator.random((256, 256), dtype=np.float32)})
        tracemalloc.start()
        layer = read_history(path).layers["a"]
        for mask, scores in zip(layer.masks(), [None, *layer.scores], strict=True):
            assert scores is None or np.isfinite(layer.scores[scores][mask]).all()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # Their 90 masks alone are 5.9 MB.
    assert peaks[1] < peaks[0] + 400_000, peaks


# -- format 1 -------------------------------------------------------------------------------------


def record_1(head: dict[str, Any], arrays: list[np.ndarray]) -> bytes:
    data = b"".join(array.astype(np.uint8).tobytes() for array in arrays)
    body = zlib.compress(json.dumps({**head, "seconds": 1.5}).encode() + b"\n" + data)
    return struct.pack("<II", len(body), zlib.crc32(body)) + body


def written_1(path: Path) -> list[int]:
    """Write two updates, and two after a resume at step 10; return the offsets of the records."""
    layers = [{"name": n, "grid": m.shape, "block_size": SIZES[n]} for n, m in masks(0).items()]
    data, offsets = b"sparse_lightning history 1\n", []
    for first in (0, 1):
        start = {"kind": "start", "step": 10 * first, "layers": layers, "about": {"first": first}}
        records = [(start, [np.packbits(mask) for mask in masks(first).values()])]
        for number in (first + 1, first + 2):
            before, after = masks(number - 1), masks(number)
            changed = [np.packbits(after[name] ^ before[name]) for name in SIZES]
            levels = [255 * (grid[after[name]] > 9) for name, grid in scores_of(0).items()]
            records += [
                ({"kind": "update", "step": 10 * number, "number": number}, changed),
                ({"kind": "scores", "ranges": [[1.0, 2.0], [3.0, 4.0]]}, levels),
                ({"kind": "metrics", "step": 10 * number, "values": {"loss": 1.0}}, []),
            ]
        for record in records:
            offsets.append(len(data))
            data += record_1(*record)
    path.write_bytes(data)
    return offsets


def masks_and_steps(history: History) -> list[int]:
    for index, frame in enumerate(history.frames):
        for name, layer in history.layers.items():
            assert (layer.mask(index) == masks(frame.step // 10)[name]).all()
    return [frame.step for frame in history.frames]


def test_format_1_is_read_and_continued(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written_1(path)
    before = path.read_bytes()
    history = read_history(path)
    assert path.read_bytes() == before
    assert masks_and_steps(history) == [0, 10, 20, 30]
    assert [m.step for m in history.metrics] == [10, 20, 30] and history.about == {"first": 1}
    assert history.frames[-1].seconds == 1.5 and history.gaps == []
    for name, score in (("a", 2.0), ("b", 4.0)):
        known = (scores_of(0)[name] > 9) & masks(3)[name]
        expected = np.where(known, score, np.nan)
        np.testing.assert_array_equal(history.layers[name].scores[3], expected)
    writer = HistoryWriter(path)
    writer.start(20, masks(2), SIZES, {})
    writer.update(30, 3, masks(3))
    writer.update(40, 4, masks(4))
    assert masks_and_steps(read_history(path)) == [0, 10, 20, 30, 40]
    assert [file.name for file in tmp_path.iterdir()] == ["pattern.history"]


def test_damage_of_format_1_costs_the_records_up_to_the_next_start(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    offsets = written_1(path)
    data = path.read_bytes()
    for record, steps in (
        (1, [0, 10, 20, 30]),
        (4, [0, 10, 20, 30]),
        (8, [0, 10]),
        (0, [10, 20, 30]),
    ):
        damaged = bytearray(data)
        damaged[offsets[record] + 20] ^= 1
        path.write_bytes(damaged)
        history = read_history(path)
        assert masks_and_steps(history) == steps
        assert history.gaps


def test_a_resumed_training_replaces_repeated_steps(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    written(path)
    writer = HistoryWriter(path)
    writer.start(20, masks(2), SIZES, {"block": "again"})
    writer.update(30, 3, masks(7))
    writer.close()
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


def test_patterns_within_blocks_are_known_from_any_record(tmp_path: Path) -> None:
    path = tmp_path / "pattern.history"
    writer = HistoryWriter(path)
    writer.start(0, masks(0), SIZES, {}, {"a": "2:4", "b": None})
    start = path.stat().st_size
    writer.update(10, 1, masks(1))
    writer.close()
    layers = read_history(path).layers
    assert (layers["a"].nm, layers["b"].nm) == ("2:4", None)
    assert layers["a"].weights_per_block == SIZES["a"] ** 2 // 2
    assert layers["b"].weights_per_block == SIZES["b"] ** 2
    data = bytearray(path.read_bytes())
    data[start - 1] ^= 1  # the record of the start
    path.write_bytes(data)
    damaged = read_history(path)
    assert masks_and_steps(damaged) == [10] and damaged.layers["a"].nm == "2:4"
    # The same layers with another pattern are other layers; those of before had none.
    HistoryWriter(path).start(20, masks(2), SIZES, {})
    history = read_history(path)
    assert masks_and_steps(history) == [20] and history.layers["a"].nm is None


def test_another_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "other"
    path.write_text("a text")
    for opened in (read_history, HistoryWriter):
        with pytest.raises(ValueError, match="must be a history"):
            opened(path)
    assert path.read_text() == "a text"


@pytest.mark.slow
@pytest.mark.parametrize(("block_size", "megabytes"), [(32, 120), (64, 30), (128, 8)])
def test_a_thousand_updates_of_a_billion_parameters(
    tmp_path: Path, block_size: int, megabytes: int
) -> None:
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
    assert size < megabytes * 1_000_000, f"{size:,} bytes"
    assert (read_history(path).layers["3"].mask(-1) == now["3"]).all()
