"""Append-only file with the history of a training's block masks.

The file is a magic line followed by records. A record is the length and the CRC-32 of its body, and
the body: a zlib stream of a JSON object, the head, and then a zlib stream per layer with the binary
data that the head describes. No record needs another, so damage costs only the records it touches,
and a reader finds the next whole one by its checksum. The file is only appended to, so a killed
process leaves at most one incomplete record at its end, which the next writer removes.

Files of format 1, in which updates are stored as changes, are converted when they are read or
continued.
"""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import tempfile
import time
import uuid
import weakref
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.util import register_after_fork
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

MAGIC = b"sparse_lightning history 2\n"
_MAGIC_1 = b"sparse_lightning history 1\n"
_HEAD = struct.Struct("<II")  # length and CRC-32 of the body
_STREAM = re.compile(b"x[\x01\x5e\x9c\xda]")  # the first bytes of a zlib stream, and so of a body
_CHUNK = 1 << 20  # bytes searched or copied at once

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


@dataclass(frozen=True)
class Gap:
    """A part of the training without records: they were damaged, cut off or never written.

    Attributes:
        after: step of the last record before the gap; None if there is none.
        before: step of the first record after it; None if there is none.
    """

    after: int | None
    before: int | None


@dataclass(frozen=True)
class LayerHistory:
    """The block masks of one layer, which are read from the file when they are asked for.

    Attributes:
        grid: (out_blocks, in_blocks).
        block_size: block size of the layer.
        nm: "2:4" if two of each four weights within blocks are kept; None if blocks are whole, as
            in all files of earlier versions.
        scores: drop scores by index of the frame, float32 `[out_blocks, in_blocks]`; NaN where a
            block is absent or not scored.
    """

    grid: tuple[int, int]
    block_size: int
    nm: str | None
    scores: Mapping[int, Floats]
    _reader: _FrameReader = field(repr=False)
    _index: int = field(repr=False)

    @property
    def weights_per_block(self) -> int:
        """Number of weights that a present block keeps."""
        return self.block_size**2 // (1 if self.nm is None else 2)

    def mask(self, frame: int) -> Bools:
        """Return the mask of a frame, bool `[out_blocks, in_blocks]`; -1 is the last."""
        return self._reader.mask(frame % len(self._reader.frames), self._index)

    def masks(self) -> Iterator[Bools]:
        """Yield the mask of every frame in order."""
        return map(self.mask, range(len(self._reader.frames)))


@dataclass
class History:
    """The contents of a history file; it stays open for the masks and scores.

    Attributes:
        about: facts about the training, such as its configuration, as primitives by key.
        frames: frames in the order of their steps.
        layers: histories of the layers by name, in the model's order.
        metrics: metrics in the order of their steps.
        gaps: parts of the training that the file lacks, in the order of their steps.
        runs: identifiers of its starts and resumes in their order, as in `HistoryWriter.run`. The
            copy of a history with which the file of a resumed training begins keeps them.
    """

    about: dict[str, Any] = field(default_factory=dict)
    frames: list[Frame] = field(default_factory=list)
    layers: dict[str, LayerHistory] = field(default_factory=dict)
    metrics: list[Metrics] = field(default_factory=list)
    gaps: list[Gap] = field(default_factory=list)
    runs: list[str] = field(default_factory=list)


class HistoryWriter:
    """Writer that appends complete records to a history file, which it keeps open and locked.

    Another training can therefore neither write into the file nor divert this one by renaming it.
    Without locks, which Windows and some network file systems lack, two writers may share a file.

    Args:
        path: path of the file, which is created if missing. An incomplete last record is removed.
        earlier: path of an existing history; a new file begins with a copy of its records.

    Attributes:
        path: the path given.
        run: identifier of the latest start or resume, which every record has.
        close: closes the file and releases the lock, as does garbage collection of the writer.

    Raises:
        ValueError: if a file is not a history.
        BlockingIOError: if another writer has the file open.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path, earlier: Path | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and path.stat().st_size and _format(path) == 1:
            _replace_by_format_2(path)
        self.path = path
        self._file = path.open("a+b", buffering=0)  # nothing is lost in a buffer
        self.close = weakref.finalize(self, self._file.close)
        # A forked worker of a data loader, which may outlive this process, must not hold the lock.
        register_after_fork(self, lambda writer: writer.close())
        _lock(self._file, path)
        self._layers: dict[str, int] = {}
        self._patterns: dict[str, str] = {}
        self._masks: dict[str, Bools] = {}
        self._frame = 0, 0  # step and number
        self.run, self._since = _new_run(), 0
        if self._file.seek(0, os.SEEK_END) == 0:
            self._write(MAGIC)
            for chunk in () if earlier is None else _complete_records(earlier):
                self._write(chunk)
        else:
            self._continue()

    def _continue(self) -> None:
        end = len(MAGIC)
        for record in _records(self._file):
            if record is not None:
                end = record.end
                # Without a new start, what follows belongs to the run that wrote this record.
                self.run, self._since = record.head["run"], record.head["since"]
        self._file.truncate(end)

    def start(
        self,
        step: int,
        masks: Mapping[str, Bools],
        block_sizes: Mapping[str, int],
        about: Mapping[str, Any],
        patterns: Mapping[str, str | None] | None = None,
    ) -> None:
        """Write all masks when a training starts, or resumes at a step.

        Args:
            step: number of optimizer steps taken; readers discard earlier records of later steps.
            masks: masks by layer, bool `[out_blocks, in_blocks]`.
            block_sizes: block sizes by layer.
            about: facts about the training, as primitives by key.
            patterns: patterns of weights within blocks, "2:4", by layer; None if blocks are whole.
        """
        self._patterns = {name: nm for name, nm in (patterns or {}).items() if nm is not None}
        self.run, self._since = _new_run(), step
        self._layers = {name: block_sizes[name] for name in masks}
        self._append_masks(step, 0, masks, {"about": about})

    def update(self, step: int, number: int, masks: Mapping[str, Bools]) -> None:
        """Write all masks after a topology update.

        Args:
            step: number of optimizer steps taken.
            number: number of the update.
            masks: masks of all layers, bool `[out_blocks, in_blocks]`.
        """
        self._append_masks(step, number, masks, {})

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
        step, number = self._frame
        self._append("scores", step, {"number": number, "ranges": ranges}, levels)

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Write metrics of the training at a step."""
        self._append("metrics", step, {"values": dict(values)}, [])

    def _append_masks(
        self, step: int, number: int, masks: Mapping[str, Bools], more: Mapping[str, Any]
    ) -> None:
        self._masks = {name: np.array(masks[name], dtype=bool) for name in self._layers}
        self._frame = step, number
        layers = [[name, *mask.shape, self._layers[name]] for name, mask in self._masks.items()]
        if self._patterns:  # in each record, as no record needs another
            more = {**more, "patterns": [self._patterns.get(name) for name in self._layers]}
        packed = [np.packbits(mask) for mask in self._masks.values()]
        self._append("masks", step, {"number": number, "layers": layers, **more}, packed)

    def _append(
        self, kind: str, step: int, head: Mapping[str, Any], arrays: list[NDArray[np.uint8]]
    ) -> None:
        ids = {"run": self.run, "since": self._since}
        now = {"step": step, "seconds": round(time.time(), 3)}
        self._write(_encoded({"kind": kind, **ids, **now, **head}, arrays))

    def _write(self, data: bytes) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0:
            # Writing to a deleted file succeeds.
            raise FileNotFoundError(errno.ENOENT, "The file was deleted", str(self.path))
        left = memoryview(data)
        while left:
            left = left[self._file.write(left) :]


def read_history(path: Path) -> History:
    """Read a history file; masks and scores are read later, when they are asked for.

    A training that resumes from a checkpoint repeats steps: their earlier records are discarded.
    Damaged records are left out, and `gaps` says where.

    Raises:
        ValueError: if the file is not a history, or holds no masks.
        OSError: if it cannot be read.
    """
    reader = _FrameReader(path)
    history = History()
    runs = history.runs
    step, is_gap = None, False  # of the latest record, and whether records after it are lost
    for record in _records(reader.file):
        if record is None:
            is_gap = True
            continue
        head = record.head
        if head["run"] in runs[:-1]:
            continue  # without locks, an earlier run may still have been writing
        if head["run"] not in runs:
            # This is the run's start, or the first record after it if that was lost.
            runs.append(head["run"])
            _discard_after(history, reader, head["since"])
            if step is not None and step > head["since"]:
                step, is_gap = head["since"], False
        if head["kind"] == "masks":
            is_gap |= _add_masks(history, reader, record)
        elif head["kind"] == "scores":
            # If the masks of these scores were lost, nobody knows whose scores they are.
            if reader.frames and _is_same_frame(reader.frames[-1].head, head):
                reader.scores[len(reader.frames) - 1] = record
        elif head["kind"] == "metrics":
            history.metrics.append(Metrics(head["step"], head["seconds"], head["values"]))
        if is_gap and not (history.gaps and history.gaps[-1].before == head["step"]):
            history.gaps.append(Gap(step, head["step"]))
        step, is_gap = head["step"], False
    if is_gap:
        history.gaps.append(Gap(step, None))
    if not history.frames:
        raise ValueError(
            f"'{path}' must be a history written by a training; got one without a start. "
            "Was the training stopped before its first step?"
        )
    return history


def holds_run(path: Path, run: str) -> bool:
    """Return whether a file is a history with records of a run, as in `HistoryWriter.run`."""
    try:
        with path.open("rb") as file:
            return any(record and record.head.get("run") == run for record in _records(file))
    except OSError:
        return False


def quantise(scores: Floats) -> tuple[float, float, NDArray[np.uint8]]:
    """Return the lowest and highest score, and each score's level: 1 to 255, 0 if not finite."""
    finite = np.isfinite(scores)
    if not finite.any():
        return 0.0, 0.0, np.zeros(len(scores), dtype=np.uint8)
    lowest, highest = float(scores[finite].min()), float(scores[finite].max())
    shares = (scores - lowest) / ((highest - lowest) or 1.0)
    levels = 1 + np.rint(254 * np.where(finite, shares, 0)).astype(np.uint8)
    return lowest, highest, np.where(finite, levels, 0).astype(np.uint8)


# Building a history from records.


def _add_masks(history: History, reader: _FrameReader, record: _Record) -> bool:
    """Add a frame, and return whether updates before it were not recorded."""
    head = record.head
    history.about = head.pop("about", history.about)
    layers = head.pop("layers")
    patterns = head.pop("patterns", None) or [None] * len(layers)
    if (layers, patterns) != (reader.layers, reader.patterns):
        if reader.layers:  # another model
            reader.keep(0)
            history.frames, history.gaps = [], []
            history.metrics = [m for m in history.metrics if m.step < head["step"]]
        reader.layers, reader.patterns = layers, patterns
        history.layers = {
            name: LayerHistory(
                (rows, columns), block_size, patterns[i], _LayerScores(reader, i), reader, i
            )
            for i, (name, rows, columns, block_size) in enumerate(reader.layers)
        }
    is_resumed = head["number"] == 0 and len(history.frames) > 0
    if is_resumed and reader.are_last_masks(record):
        return False
    history.frames.append(Frame(head["step"], head["number"], head["seconds"]))
    reader.frames.append(record)
    return is_resumed


def _discard_after(history: History, reader: _FrameReader, step: int) -> None:
    kept = sum(frame.step <= step for frame in history.frames)
    history.frames = history.frames[:kept]
    history.metrics = [metrics for metrics in history.metrics if metrics.step <= step]
    history.gaps = [
        replace(gap, before=step if gap.before is None else min(gap.before, step))
        for gap in history.gaps
        if gap.after is None or gap.after <= step  # at the step itself, its scores may be lost
    ]
    reader.keep(kept)


def _is_same_frame(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return all(a[key] == b[key] for key in ("run", "step", "number"))


class _FrameReader:
    """Reads the masks and scores of single layers and frames from a file.

    Attributes:
        file: the open file, which stays the same if another takes its path.
        layers: name, rows, columns and block size of each layer.
        patterns: pattern within the blocks of each layer, or None.
        frames: records of the frames' masks.
        scores: records of scores, by frame.
    """

    def __init__(self, path: Path) -> None:
        self.file = _open(path)
        weakref.finalize(self, self.file.close)
        self.layers: list[list[Any]] = []
        self.patterns: list[str | None] = []
        self.frames: list[_Record] = []
        self.scores: dict[int, _Record] = {}

    def keep(self, n: int) -> None:
        """Discard all but the first `n` frames."""
        del self.frames[n:]
        self.scores = {frame: record for frame, record in self.scores.items() if frame < n}

    def mask(self, frame: int, layer: int) -> Bools:
        _, rows, columns, _ = self.layers[layer]
        bits = np.unpackbits(self._array(self.frames[frame], layer), count=rows * columns)
        return bits.view(np.bool_).reshape(rows, columns)

    def scores_of(self, frame: int, layer: int) -> Floats:
        record, mask = self.scores[frame], self.mask(frame, layer)
        lowest, highest = record.head["ranges"][layer]
        level = self._array(record, layer).astype(np.float32)
        scores = np.full(mask.shape, np.nan, dtype=np.float32)
        scores[mask] = np.where(
            level > 0, lowest + (level - 1) / 254 * (highest - lowest), np.float32("nan")
        )
        return scores

    def are_last_masks(self, record: _Record) -> bool:
        """Return whether a record has the masks of the last frame."""
        last = self.frames[-1]
        layers = range(len(self.layers))
        return all((self._array(record, i) == self._array(last, i)).all() for i in layers)

    def _array(self, record: _Record, layer: int) -> NDArray[np.uint8]:
        sizes = record.head["sizes"]
        self.file.seek(record.data + sum(sizes[:layer]))
        return np.frombuffer(zlib.decompress(self.file.read(sizes[layer])), dtype=np.uint8)


class _LayerScores(Mapping[int, Floats]):
    """Scores of one layer by frame, which are read when they are asked for."""

    def __init__(self, reader: _FrameReader, layer: int) -> None:
        self._reader, self._layer = reader, layer

    def __getitem__(self, frame: int) -> Floats:
        return self._reader.scores_of(frame, self._layer)

    def __iter__(self) -> Iterator[int]:
        return iter(self._reader.scores)

    def __len__(self) -> int:
        return len(self._reader.scores)


# Records in a file.


@dataclass(frozen=True)
class _Record:
    """A whole record in a file.

    Attributes:
        head: what the record says, and what its data is.
        body: offset of the body in the file.
        data: offset of the layers' data.
        end: offset of the next record.
    """

    head: dict[str, Any]
    body: int
    data: int
    end: int


def _records(file: BinaryIO) -> Iterator[_Record | None]:
    """Yield the whole records of a file, and None in place of bytes that are none."""
    at, size = len(MAGIC), file.seek(0, os.SEEK_END)
    while at < size:
        record = _record_at(file, at, size)
        yield record
        at = _next_record(file, at + 1, size) if record is None else record.end


def _record_at(file: BinaryIO, offset: int, size: int) -> _Record | None:
    """Return the record at an offset of a file of `size` bytes; None if there is no whole one."""
    start = offset + _HEAD.size
    if start > size:
        return None
    file.seek(offset)
    length, checksum = _HEAD.unpack(file.read(_HEAD.size))
    if length > size - start:
        return None
    body = file.read(length)
    if zlib.crc32(body) != checksum:
        return None
    stream = zlib.decompressobj()
    try:
        line, _, _ = stream.decompress(body).partition(b"\n")  # the end of the head in format 1
        head = json.loads(line)
    except (zlib.error, ValueError):
        return None
    end = start + length
    return _Record(head, start, end - len(stream.unused_data), end)


def _next_record(file: BinaryIO, offset: int, size: int) -> int:
    """Return the offset of the next whole record; the size of the file if there is none."""
    while offset < size:
        file.seek(offset)
        chunk = file.read(_CHUNK)
        for match in _STREAM.finditer(chunk, _HEAD.size):
            found = offset + match.start() - _HEAD.size
            if _record_at(file, found, size):
                return found
        # A head and the two bytes after it can extend into the next chunk.
        offset += max(1, len(chunk) - _HEAD.size - 1)
    return size


def _complete_records(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a history, without its magic line and an incomplete last record."""
    with _open(path) as file:
        end = max((record.end for record in _records(file) if record), default=len(MAGIC))
        for start in range(len(MAGIC), end, _CHUNK):
            file.seek(start)
            yield file.read(min(_CHUNK, end - start))


def _encoded(head: Mapping[str, Any], arrays: Sequence[NDArray[np.uint8]]) -> bytes:
    """Return a record with a head and an array for each layer."""
    streams = [_compressed(array.tobytes()) for array in arrays]
    text = json.dumps({**head, "sizes": [len(stream) for stream in streams]})
    body = b"".join([zlib.compress(text.encode()), *streams])
    return _HEAD.pack(len(body), zlib.crc32(body)) + body


def _compressed(data: bytes) -> bytes:
    # Repeated bytes and Huffman codes suffice for masks: a general search for matches takes six
    # times as long and more bytes.
    stream = zlib.compressobj(strategy=zlib.Z_RLE)
    return stream.compress(data) + stream.flush()


def _new_run() -> str:
    return uuid.uuid4().hex[:16]


# Files: locks, and the two formats.


def _lock(file: BinaryIO, path: Path) -> None:
    """Lock a file until it is closed, where that is possible.

    Raises:
        BlockingIOError: if another open file has the lock.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise BlockingIOError(
            error.errno,
            "A history must be written by one training at a time; another one is writing this "
            "file. Use another folder, or wait for the end of that training",
            str(path),
        ) from None
    except OSError:  # a file system without locks
        return


def _open(path: Path) -> BinaryIO:
    """Open a history for reading; one of format 1 is converted into a temporary file."""
    if _format(path) == 2:
        return path.open("rb")
    converted = tempfile.TemporaryFile()  # noqa: SIM115
    converted.writelines(_in_format_2(path))
    return converted


def _format(path: Path) -> int:
    """Return the format of a history, 1 or 2.

    Raises:
        ValueError: if the file is not a history.
    """
    with path.open("rb") as file:
        magic = file.read(len(MAGIC))
        if magic in (MAGIC, _MAGIC_1):
            return 2 if magic == MAGIC else 1
        # A history in whose magic line a bit flipped is known by its first record.
        record = _record_at(file, len(MAGIC), file.seek(0, os.SEEK_END))
    if record is None:
        raise ValueError(
            f"'{path}' must be a history of block masks written by a training; got another file."
        )
    return 2 if "run" in record.head else 1


def _replace_by_format_2(path: Path) -> None:
    converted = path.with_name(f".{path.name}")
    with converted.open("wb") as file:
        file.writelines(_in_format_2(path))
    converted.replace(path)


def _in_format_2(path: Path) -> Iterator[bytes]:
    """Yield a file of format 1 in format 2, without the records between damage and the next start.

    In format 1, a body is one stream with a line of JSON and the data of all layers, and the masks
    of an update are stored as the blocks that it changed.
    """
    yield MAGIC
    frame: dict[str, Any] | None = None  # what the latest masks have in common with what follows
    masks: list[NDArray[np.uint8]] = []
    with path.open("rb") as file:
        for record in _records(file):
            if record is None:
                frame = None
                yield b"\0"  # a byte that belongs to no record tells readers of the damage
                continue
            head = dict(record.head)
            file.seek(record.body)
            body = zlib.decompress(file.read(record.end - record.body))
            data = np.frombuffer(body.partition(b"\n")[2], dtype=np.uint8)
            if head["kind"] == "start":
                layers = [
                    [entry["name"], *entry["grid"], entry["block_size"]] for entry in head["layers"]
                ]
                step = head["step"]
                frame = {"run": _new_run(), "since": step, "step": step, "number": 0}
                head |= {"kind": "masks", "layers": layers}
                arrays = masks = _split(
                    data, [-(-rows * columns // 8) for _, rows, columns, _ in layers]
                )
            elif frame is None:
                continue
            elif head["kind"] == "update":
                frame |= {"step": head["step"], "number": head["number"]}
                head |= {"kind": "masks", "layers": layers}
                changes = _split(data, [mask.size for mask in masks])
                arrays = masks = [
                    mask ^ change for mask, change in zip(masks, changes, strict=True)
                ]
            elif head["kind"] == "scores":
                arrays = _split(data, [int(np.unpackbits(mask).sum()) for mask in masks])
            else:
                arrays = []
            yield _encoded({**frame, **head}, arrays)


def _split(data: NDArray[np.uint8], sizes: Sequence[int]) -> list[NDArray[np.uint8]]:
    return np.split(data, np.cumsum(sizes)[:-1])
