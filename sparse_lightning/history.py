"""Append-only file with the history of a training's block masks, stored as changes.

The file is a magic line followed by records, each a length, a checksum and a compressed body. It is
only appended to: a killed process leaves complete records and at most one truncated last record,
which the next writer removes. A body is a line of JSON and binary data described by it: all masks
when a training starts or resumes, then the blocks changed by each topology update.
"""

from __future__ import annotations

import json
import struct
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"sparse_lightning history 1\n"
_HEAD = struct.Struct("<II")  # length and CRC-32 of the body

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """A step at which the block masks were recorded.

    Attributes:
        step: number of optimizer steps taken before the frame.
        number: number of the topology update, from 1; 0 for the masks of a start or resume.
        seconds: Unix time.
    """

    step: int
    number: int
    seconds: float


@dataclass(frozen=True)
class Metrics:
    """Metrics of the training at a step, such as a loss, a density or tokens per second."""

    step: int
    seconds: float
    values: dict[str, float]


@dataclass
class LayerHistory:
    """The block masks of one layer.

    Attributes:
        grid: (out_blocks, in_blocks).
        block_size: block size of the layer.
        first: mask of the first frame, bool `[out_blocks, in_blocks]`.
        flips: for each frame, the row-major indices of the blocks grown or dropped in it, ascending
            int32 `[n]`; empty for the first frame.
        scores: drop scores by index of the frame, float32 `[out_blocks, in_blocks]`; NaN where a
            block is absent or not scored.
    """

    grid: tuple[int, int]
    block_size: int
    first: Bools
    flips: list[NDArray[np.int32]] = field(default_factory=list)
    scores: dict[int, Floats] = field(default_factory=dict)
    # The mask of the last frame, cached because replaying all flips takes seconds.
    _last: Bools = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self._last = self.first.copy()

    def mask(self, frame: int) -> Bools:
        """Return the mask of a frame, bool `[out_blocks, in_blocks]`; -1 is the last."""
        flat = self.first.reshape(-1).copy()
        for flips in self.flips[: frame % len(self.flips) + 1]:
            flat[flips] ^= True
        return flat.reshape(self.grid)

    def masks(self) -> Iterator[Bools]:
        """Yield the mask of every frame in order; the same array is modified in place."""
        flat = self.first.reshape(-1).copy()
        for flips in self.flips:
            flat[flips] ^= True
            yield flat.reshape(self.grid)


@dataclass
class History:
    """The contents of a history file.

    Attributes:
        about: facts about the training, such as its configuration, as primitives by key.
        frames: frames in the order of their steps.
        layers: histories of the layers by name, in the model's order.
        metrics: metrics in the order of their steps.
    """

    about: dict[str, Any] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    layers: dict[str, LayerHistory] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)


class HistoryWriter:
    """Writer that appends complete records to a history file.

    Args:
        path: path of the file, which is created if missing. A truncated last record is removed.

    Raises:
        ValueError: if the file is not a history.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(_valid_length(file, path))
        else:
            path.write_bytes(MAGIC)
        self._path = path
        self._masks: dict[str, Bools] = {}

    def start(
        self,
        step: int,
        masks: Mapping[str, Bools],
        block_sizes: Mapping[str, int],
        about: Mapping[str, Any],
    ) -> None:
        """Write all masks when a training starts, or resumes at a step.

        Args:
            step: number of optimizer steps taken; readers discard earlier records of later steps.
            masks: masks by layer, bool `[out_blocks, in_blocks]`.
            block_sizes: block sizes by layer.
            about: facts about the training, as primitives by key.
        """
        self._masks = {name: np.array(mask, dtype=bool) for name, mask in masks.items()}
        layers = [
            {"name": name, "grid": mask.shape, "block_size": block_sizes[name]}
            for name, mask in self._masks.items()
        ]
        packed = [np.packbits(mask) for mask in self._masks.values()]
        self._append({"kind": "start", "step": step, "layers": layers, "about": about}, packed)

    def update(self, step: int, number: int, masks: Mapping[str, Bools]) -> None:
        """Write the blocks changed by a topology update.

        Args:
            step: number of optimizer steps taken.
            number: number of the update.
            masks: masks of all layers after the update, bool `[out_blocks, in_blocks]`.
        """
        changed = [np.packbits(masks[name] ^ mask) for name, mask in self._masks.items()]
        self._masks = {name: np.array(masks[name], dtype=bool) for name in self._masks}
        self._append({"kind": "update", "step": step, "number": number}, changed)

    def scores(self, scores: Mapping[str, Floats]) -> None:
        """Write the drop scores of the latest frame's blocks, quantised to 255 levels.

        Args:
            scores: scores by layer, `[out_blocks, in_blocks]`, read at present blocks; a block
                without a score has a non-finite value.
        """
        ranges, levels = [], []
        for name, mask in self._masks.items():
            lowest, highest, layer_levels = quantise(scores[name][mask])
            ranges.append([lowest, highest])
            levels.append(layer_levels)
        self._append({"kind": "scores", "ranges": ranges}, levels)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of the training at a step."""
        self._append({"kind": "metrics", "step": step, "values": dict(values)}, [])

    def _append(self, head: dict[str, Any], arrays: list[NDArray[np.uint8]]) -> None:
        line = json.dumps({**head, "seconds": round(time.time(), 3)}).encode() + b"\n"
        body = zlib.compress(line + b"".join(array.tobytes() for array in arrays))
        # Opening the file for each record leaves no buffered data and nothing to close.
        with self._path.open("ab") as file:
            file.write(_HEAD.pack(len(body), zlib.crc32(body)) + body)


def read_history(path: Path) -> History:
    """Read the complete records of a history file.

    A training that resumes from a checkpoint repeats steps: their earlier records are discarded.

    Raises:
        ValueError: if the file is not a history, or holds no masks.
        OSError: if it cannot be read.
    """
    history = History()
    with path.open("rb") as file:
        for head, body in _records(file, path):
            if head["kind"] == "start":
                _add_start(history, head, body)
            elif head["kind"] == "update":
                _add_update(history, head, body)
            elif head["kind"] == "scores":
                _add_scores(history, head, body)
            elif head["kind"] == "metrics":
                history.metrics.append(Metrics(head["step"], head["seconds"], head["values"]))
    if not history.frames:
        raise ValueError(
            f"'{path}' must be a history written by a training; got one without a start. "
            "Was the training stopped before its first step?"
        )
    return history


def _add_start(history: History, head: dict[str, Any], body: bytes) -> None:
    step, layers = head["step"], {}
    for entry in head["layers"]:
        grid, block_size = tuple(entry["grid"]), entry["block_size"]
        n_bytes = -(-grid[0] * grid[1] // 8)
        layers[entry["name"]] = LayerHistory(grid, block_size, _unpack(body[:n_bytes], grid))
        body = body[n_bytes:]
    known = {name: (layer.grid, layer.block_size) for name, layer in history.layers.items()}
    is_same_model = known == {n: (layer.grid, layer.block_size) for n, layer in layers.items()}
    if is_same_model:
        _discard_after(history, step)
    history.about = head["about"]
    if is_same_model and history.frames:
        flips = {
            name: np.flatnonzero(history.layers[name]._last ^ layer.first).astype(np.int32)
            for name, layer in layers.items()
        }
        if any(map(len, flips.values())):
            _add_frame(history, Frame(step, 0, head["seconds"]), flips)
        return
    history.layers, history.frames = layers, []
    history.metrics = [metrics for metrics in history.metrics if metrics.step < step]
    _add_frame(
        history,
        Frame(step, 0, head["seconds"]),
        {name: np.empty(0, dtype=np.int32) for name in layers},
    )


def _add_update(history: History, head: dict[str, Any], body: bytes) -> None:
    flips = {}
    for name, layer in history.layers.items():
        n_bytes = -(-layer.grid[0] * layer.grid[1] // 8)
        flips[name] = np.flatnonzero(_unpack(body[:n_bytes], layer.grid)).astype(np.int32)
        body = body[n_bytes:]
    _add_frame(history, Frame(head["step"], head["number"], head["seconds"]), flips)


def _add_scores(history: History, head: dict[str, Any], body: bytes) -> None:
    frame = len(history.frames) - 1
    for (lowest, highest), layer in zip(head["ranges"], history.layers.values(), strict=True):
        mask = layer._last
        n = int(mask.sum())
        level = np.frombuffer(body[:n], dtype=np.uint8).astype(np.float32)
        body = body[n:]
        scores = np.full(layer.grid, np.nan, dtype=np.float32)
        scores[mask] = np.where(
            level > 0, lowest + (level - 1) / 254 * (highest - lowest), np.float32("nan")
        )
        layer.scores[frame] = scores


def _add_frame(history: History, frame: Frame, flips: Mapping[str, NDArray[np.int32]]) -> None:
    history.frames.append(frame)
    for name, layer in history.layers.items():
        layer.flips.append(flips[name])
        layer._last.reshape(-1)[flips[name]] ^= True


def _discard_after(history: History, step: int) -> None:
    kept = sum(frame.step <= step for frame in history.frames)
    history.frames = history.frames[:kept]
    history.metrics = [metrics for metrics in history.metrics if metrics.step <= step]
    for layer in history.layers.values():
        layer.flips = layer.flips[:kept]
        layer._last = layer.mask(-1) if kept else layer.first.copy()
        layer.scores = {frame: scores for frame, scores in layer.scores.items() if frame < kept}


def _unpack(packed: bytes, grid: tuple[int, int]) -> Bools:
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=grid[0] * grid[1])
    return bits.astype(bool).reshape(grid)


def quantise(scores: Floats) -> tuple[float, float, NDArray[np.uint8]]:
    """Return the lowest and highest score, and each score's level: 1 to 255, 0 if not finite."""
    finite = np.isfinite(scores)
    if not finite.any():
        return 0.0, 0.0, np.zeros(len(scores), dtype=np.uint8)
    lowest, highest = float(scores[finite].min()), float(scores[finite].max())
    shares = (scores - lowest) / ((highest - lowest) or 1.0)
    levels = 1 + np.rint(254 * np.where(finite, shares, 0)).astype(np.uint8)
    return lowest, highest, np.where(finite, levels, 0).astype(np.uint8)


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the JSON head and the data of each record, up to the first incomplete one."""
    for body in _bodies(file, path):
        line, _, rest = zlib.decompress(body).partition(b"\n")
        yield json.loads(line), rest


def _bodies(file: BinaryIO, path: Path) -> Iterator[bytes]:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError(
            f"'{path}' must be a history of block masks written by a training; got another file."
        )
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, checksum = _HEAD.unpack(head)
        body = file.read(length)
        if len(body) < length or zlib.crc32(body) != checksum:
            return
        yield body


def _valid_length(file: BinaryIO, path: Path) -> int:
    """Return the length in bytes of a file's complete records."""
    return len(MAGIC) + sum(_HEAD.size + len(body) for body in _bodies(file, path))
