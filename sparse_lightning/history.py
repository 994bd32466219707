"""The history of a training's block masks, on disk: what changed, and nothing twice.

A file is a magic line and then records, each of a length, a checksum and a compressed body. It is
only ever appended to, so a killed process leaves whole records and perhaps a torn last one, which
the next writer cuts off. A body is a line of JSON and the bytes that it announces: every mask when
a training starts or goes on, then the blocks that each update changed.
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
_HEAD = struct.Struct("<II")  # length of the body, its CRC-32

Bools = NDArray[np.bool_]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Frame:
    """One moment of the patterns.

    Attributes:
        step: optimizer steps until then.
        number: of the topology update, from 1; 0 for what a training began with.
        seconds: Unix time.
    """

    step: int
    number: int
    seconds: float


@dataclass(frozen=True)
class Metrics:
    """What was known of the training at a step: a loss, a density, tokens a second."""

    step: int
    seconds: float
    values: dict[str, float]


@dataclass
class LayerHistory:
    """The block masks of one layer.

    Attributes:
        grid: (out_blocks, in_blocks).
        block_size: of the layer.
        first: bool `[out_blocks, in_blocks]`, the mask of the first frame.
        flips: for each frame, int32 `[n]`, ascending: the row-major indices of the blocks that came
            or went with it; none for the first.
        scores: by index of a frame, float32 `[out_blocks, in_blocks]`: what each block was kept
            for, NaN where it is absent or has not been scored.
    """

    grid: tuple[int, int]
    block_size: int
    first: Bools
    flips: list[NDArray[np.int32]] = field(default_factory=list)
    scores: dict[int, Floats] = field(default_factory=dict)
    # The mask of the last frame while a file is read: counting up to it each time takes seconds.
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
        """Yield the mask of every frame in turn: one array, changed in place between them."""
        flat = self.first.reshape(-1).copy()
        for flips in self.flips:
            flat[flips] ^= True
            yield flat.reshape(self.grid)


@dataclass
class History:
    """What `read_history` found.

    Attributes:
        about: what the writer said of the training: primitives, by key.
        frames: the moments, in order of their steps.
        layers: by name, in the model's order.
        metrics: in order of their steps.
    """

    about: dict[str, Any] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    layers: dict[str, LayerHistory] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)


class HistoryWriter:
    """Appends to a file; what it wrote is there whatever becomes of the process.

    Args:
        path: of the file, made if need be. A torn last record is cut off.

    Raises:
        ValueError: if the file is something else.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size:
            with path.open("r+b") as file:
                file.truncate(_whole_length(file, path))
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
        """Write every mask: a training starts, or goes on from this step.

        Args:
            step: optimizer steps until now; what the file knows of later ones counts no more.
            masks: bool `[out_blocks, in_blocks]` by layer.
            block_sizes: by layer.
            about: primitives to keep.
        """
        self._masks = {name: np.array(mask, dtype=bool) for name, mask in masks.items()}
        layers = [
            {"name": name, "grid": mask.shape, "block_size": block_sizes[name]}
            for name, mask in self._masks.items()
        ]
        packed = [np.packbits(mask) for mask in self._masks.values()]
        self._append({"kind": "start", "step": step, "layers": layers, "about": about}, packed)

    def update(self, step: int, number: int, masks: Mapping[str, Bools]) -> None:
        """Write what a topology update changed.

        Args:
            step: optimizer steps until now.
            number: of the update.
            masks: bool `[out_blocks, in_blocks]` of every layer after it.
        """
        changed = [np.packbits(masks[name] ^ mask) for name, mask in self._masks.items()]
        self._masks = {name: np.array(masks[name], dtype=bool) for name in self._masks}
        self._append({"kind": "update", "step": step, "number": number}, changed)

    def scores(self, scores: Mapping[str, Floats]) -> None:
        """Write what the blocks of the latest frame are kept for, in 255 levels.

        Args:
            scores: `[out_blocks, in_blocks]` by layer, read where a block is present; not finite
                where there is none.
        """
        ranges, levels = [], []
        for name, mask in self._masks.items():
            lowest, highest, of_layer = quantise(scores[name][mask])
            ranges.append([lowest, highest])
            levels.append(of_layer)
        self._append({"kind": "scores", "ranges": ranges}, levels)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write numbers of the training at a step."""
        self._append({"kind": "metrics", "step": step, "values": dict(values)}, [])

    def _append(self, head: dict[str, Any], arrays: list[NDArray[np.uint8]]) -> None:
        line = json.dumps({**head, "seconds": round(time.time(), 3)}).encode() + b"\n"
        body = zlib.compress(line + b"".join(array.tobytes() for array in arrays))
        # Opened for each record: nothing is held back, and nothing is to be closed.
        with self._path.open("ab") as file:
            file.write(_HEAD.pack(len(body), zlib.crc32(body)) + body)


def read_history(path: Path) -> History:
    """Read a file as far as it is whole.

    A training that went on from a checkpoint has begun again at an earlier step: what was written
    of later ones is left out.

    Raises:
        ValueError: naming the file, if it is something else, or holds no start.
        OSError: if it cannot be read.
    """
    history = History()
    with path.open("rb") as file:
        for head, body in _records(file, path):
            if head["kind"] == "start":
                _start(history, head, body)
            elif head["kind"] == "update":
                _update(history, head, body)
            elif head["kind"] == "scores":
                _scores(history, head, body)
            elif head["kind"] == "metrics":
                history.metrics.append(Metrics(head["step"], head["seconds"], head["values"]))
    if not history.frames:
        raise ValueError(
            f"'{path}' must be a history that a training wrote; got one without a beginning. "
            "Was the training stopped before its first step?"
        )
    return history


def _start(history: History, head: dict[str, Any], body: bytes) -> None:
    step, masks = head["step"], {}
    for layer in head["layers"]:
        grid, block_size = tuple(layer["grid"]), layer["block_size"]
        n_bytes = -(-grid[0] * grid[1] // 8)
        masks[layer["name"]] = LayerHistory(grid, block_size, _unpack(body[:n_bytes], grid))
        body = body[n_bytes:]
    known = {name: (layer.grid, layer.block_size) for name, layer in history.layers.items()}
    goes_on = known == {name: (layer.grid, layer.block_size) for name, layer in masks.items()}
    if goes_on:
        _forget_after(history, step)
    history.about = head["about"]
    if goes_on and history.frames:
        flips = {
            name: np.flatnonzero(history.layers[name]._last ^ layer.first).astype(np.int32)
            for name, layer in masks.items()
        }
        if any(map(len, flips.values())):
            _add_frame(history, Frame(step, 0, head["seconds"]), flips)
        return
    history.layers, history.frames = masks, []
    history.metrics = [each for each in history.metrics if each.step < step]
    _add_frame(
        history,
        Frame(step, 0, head["seconds"]),
        {name: np.empty(0, dtype=np.int32) for name in masks},
    )


def _update(history: History, head: dict[str, Any], body: bytes) -> None:
    flips = {}
    for name, layer in history.layers.items():
        n_bytes = -(-layer.grid[0] * layer.grid[1] // 8)
        flips[name] = np.flatnonzero(_unpack(body[:n_bytes], layer.grid)).astype(np.int32)
        body = body[n_bytes:]
    _add_frame(history, Frame(head["step"], head["number"], head["seconds"]), flips)


def _scores(history: History, head: dict[str, Any], body: bytes) -> None:
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


def _forget_after(history: History, step: int) -> None:
    kept = sum(frame.step <= step for frame in history.frames)
    history.frames = history.frames[:kept]
    history.metrics = [each for each in history.metrics if each.step <= step]
    for layer in history.layers.values():
        layer.flips = layer.flips[:kept]
        layer._last = layer.mask(-1) if kept else layer.first.copy()
        layer.scores = {frame: scores for frame, scores in layer.scores.items() if frame < kept}


def _unpack(packed: bytes, grid: tuple[int, int]) -> Bools:
    bits = np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=grid[0] * grid[1])
    return bits.astype(bool).reshape(grid)


def quantise(scores: Floats) -> tuple[float, float, NDArray[np.uint8]]:
    """Return the lowest and highest of scores `[n]`, and the level of each: 1 to 255; 0 is none."""
    finite = np.isfinite(scores)
    if not finite.any():
        return 0.0, 0.0, np.zeros(len(scores), dtype=np.uint8)
    lowest, highest = float(scores[finite].min()), float(scores[finite].max())
    shares = (scores - lowest) / ((highest - lowest) or 1.0)
    levels = 1 + np.rint(254 * np.where(finite, shares, 0)).astype(np.uint8)
    return lowest, highest, np.where(finite, levels, 0).astype(np.uint8)


def _records(file: BinaryIO, path: Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield the head and the bytes of each record, up to the first that is not whole."""
    for body in _bodies(file, path):
        line, _, rest = zlib.decompress(body).partition(b"\n")
        yield json.loads(line), rest


def _bodies(file: BinaryIO, path: Path) -> Iterator[bytes]:
    if file.read(len(MAGIC)) != MAGIC:
        raise ValueError(
            f"'{path}' must be a history of block masks that a training wrote; got another file."
        )
    while len(head := file.read(_HEAD.size)) == _HEAD.size:
        length, checksum = _HEAD.unpack(head)
        body = file.read(length)
        if len(body) < length or zlib.crc32(body) != checksum:
            return
        yield body


def _whole_length(file: BinaryIO, path: Path) -> int:
    """Return up to which byte a file is whole."""
    return len(MAGIC) + sum(_HEAD.size + len(body) for body in _bodies(file, path))
