"""Measured speed-ups over dense products: tables of them, their files, and the tables of a device.

**Which measurements a device uses.** For a layer shape (dtype, block size, in and out features):

1. If a training has measured this very layer shape on this machine, its measurements; see
   `measuring`.
2. Else the table of the device, which is interpolated. It is the table that `sparse-lightning tune`
   wrote on this machine, merged with the table that the package ships for a device of this name.
   If there is none of this name, the one with the most similar name stands in for it, among the
   devices of the same family: GPUs of one compute capability.

Where two of these have the same cell (product, dtype, block size, shape and density), the earlier
one wins; cells that only the later one has are added. A layer shape that a training has measured is
predicted from its own cells only, so that the choice for a layer does not depend on what else was
measured since. If `SPARSE_LIGHTNING_MEASURE` is 0, no, false or off, measurements of trainings are
neither made nor used.

This holds for CUDA devices. A CPU uses the table that `tune` wrote; see `cpu`.
"""

from __future__ import annotations

import bisect
import difflib
import functools
import hashlib
import json
import math
import os
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from sparse_lightning.files import write_text
from sparse_lightning.kernels.compiler import FOLDER, cache_folder

SHIPPED_TABLES = FOLDER / "tables"
MEASURE_VARIABLE = "SPARSE_LIGHTNING_MEASURE"

# Between layer shapes, weights fall with this power of the distance. The distances from the middle
# of a square of a regular grid to its corners and to the next points are as 1 to 2.2, so that each
# corner weighs 25 times as much as one of those.
_POWER = 4
# Layer shapes further away than this multiple of the nearest one's distance are not used.
_REACH = 3.0
# A prediction is an interpolation within this factor of what was measured.
_COVERED_FACTOR = 2

# The numbers of tokens at which a layer shape is measured when it is first used.
MEASURED_TOKENS = (1, 16, 64, 256, 1024, 4096, 16384)

Shape = tuple[int, int, int]  # tokens, in_features, out_features
Layer = tuple[str, int, int, int]  # dtype, block size, in_features, out_features


@dataclass(frozen=True)
class Measured:
    """The speed-up of each kind over the dense product for one product, measured in one run.

    Attributes:
        op: "fwd", "dx", "dw" or "norms". The norms are relative to the dense dW and have density 1.
        dtype: "half" or "fp32" on CUDA; "fp32", "bf16" or "fp16" on a CPU.
        block_size: block size of the layer.
        shape: (tokens, in_features, out_features).
        density: density of the layer.
        speedups: dense time / time of each kind.
    """

    op: str
    dtype: str
    block_size: int
    shape: Shape
    density: float
    speedups: dict[str, float]

    @property
    def cell(self) -> tuple[object, ...]:
        """What was measured: all but the speed-ups."""
        return (self.op, self.dtype, self.block_size, self.shape, round(self.density, 4))

    @property
    def layer(self) -> Layer:
        """The layer shape."""
        return (self.dtype, self.block_size, *self.shape[1:])


_Number = TypeVar("_Number", int, float)
_Logs = Mapping[str, float]  # log of the speed-up of each kind
# By (in_features, out_features), then by tokens, then by density.
_Layers = dict[tuple[int, int], dict[int, dict[float, _Logs]]]


class Table:
    """Measurements, and predictions from them.

    At one layer shape (in_features, out_features), the logs of speed-ups are interpolated linearly
    in the logs of tokens and of density; beyond the ends, the nearest measurement counts. Between
    layer shapes, they are averaged with weights that fall with a power of the distance in the logs
    of both sizes, so a prediction at a measured shape uses its measurements alone.

    Args:
        rows: measurements, in any order.

    >>> rows = [
    ...     Measured("fwd", "half", 64, (8192, 4096, 4096), d, {"portable": s, "dense": 0.9})
    ...     for d, s in ((0.4, 0.8), (0.1, 3.2))
    ... ]
    >>> table = Table(rows)
    >>> table.predict("fwd", "half", 64, (8192, 4096, 4096), 0.2)
    {'portable': 1.6, 'dense': 0.9}
    >>> table.fastest("fwd", "half", 64, (8192, 4096, 4096), 0.4, ["portable", "dense"])
    'dense'
    """

    def __init__(self, rows: Iterable[Measured]) -> None:
        self._rows: dict[tuple[str, str, int], _Layers] = {}
        for row in rows:
            tokens, *features = row.shape
            layers = self._rows.setdefault((row.op, row.dtype, row.block_size), {})
            cells = layers.setdefault((features[0], features[1]), {}).setdefault(tokens, {})
            cells[row.density] = {kind: math.log(ratio) for kind, ratio in row.speedups.items()}

    def predict(
        self, op: str, dtype: str, block_size: int, shape: Shape, density: float
    ) -> dict[str, float]:
        """Return the speed-up of each kind over the dense product; empty if none is measured.

        A kind is predicted only if all measurements that the prediction uses have it.
        """
        layers = self._rows.get((op, dtype, block_size))
        if not layers:
            return {}
        tokens, *features = shape
        distances = {measured: _distance(features, measured) for measured in layers}
        nearest = min(distances.values())
        parts = [
            ((nearest / distance) ** _POWER if nearest else 1.0, layers[measured])
            for measured, distance in distances.items()
            if distance <= _REACH * nearest
        ]
        logs = _mean([(weight, _interpolate(rows, tokens, density)) for weight, rows in parts])
        return {kind: round(math.exp(log), 6) for kind, log in logs.items()}

    def fastest(
        self,
        op: str,
        dtype: str,
        block_size: int,
        shape: Shape,
        density: float,
        kinds: Sequence[str],
    ) -> str | None:
        """Return the fastest of the given kinds; None if none of them was measured."""
        speedups = self.predict(op, dtype, block_size, shape, density)
        return max((k for k in kinds if k in speedups), key=speedups.__getitem__, default=None)

    def covers(self, op: str, dtype: str, block_size: int, shape: Shape) -> bool:
        """Return whether a prediction is an interpolation, rather than a guess.

        It is one if a layer shape was measured that differs by at most a factor of 2 in each of its
        sizes, at numbers of tokens whose range, widened by a factor of 2, contains that of `shape`.

        >>> table = Table([Measured("fwd", "half", 64, (8192, 4096, 4096), 0.4, {"dense": 0.9})])
        >>> table.covers("fwd", "half", 64, (16384, 2048, 8192))
        True
        >>> table.covers("fwd", "half", 64, (8192, 1024, 4096))
        False
        """
        tokens, *features = shape
        for measured, by_tokens in self._rows.get((op, dtype, block_size), {}).items():
            sizes = zip(features, measured, strict=True)
            if (
                all(a <= _COVERED_FACTOR * b and b <= _COVERED_FACTOR * a for a, b in sizes)
                and tokens * _COVERED_FACTOR >= min(by_tokens)
                and tokens <= _COVERED_FACTOR * max(by_tokens)
            ):
                return True
        return False


def _distance(left: Sequence[int], right: Sequence[int]) -> float:
    return math.hypot(*(math.log(a / b) for a, b in zip(left, right, strict=True)))


def _interpolate(
    by_tokens: Mapping[int, Mapping[float, _Logs]], tokens: int, density: float
) -> dict[str, float]:
    """Interpolate along density at the nearest measured numbers of tokens, then between these."""
    return _mean(
        [
            (
                weight,
                _mean([(w, by_tokens[t][d]) for d, w in _neighbours(density, by_tokens[t])]),
            )
            for t, weight in _neighbours(tokens, by_tokens)
        ]
    )


def _neighbours(x: float, measured: Iterable[_Number]) -> list[tuple[_Number, float]]:
    """Return the measured points around x, with their weights for interpolation in logs.

    >>> _neighbours(4, [1, 16, 64]), _neighbours(16, [1, 16, 64]), _neighbours(99, [1, 16, 64])
    ([(1, 0.5), (16, 0.5)], [(16, 1.0)], [(64, 1.0)])
    """
    points = sorted(measured)
    i = bisect.bisect_left(points, x)
    if i == len(points):
        return [(points[-1], 1.0)]
    if i == 0 or points[i] == x:
        return [(points[i], 1.0)]
    low, high = points[i - 1], points[i]
    share = math.log(x / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


def _mean(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    """Return the weighted means of the kinds that all parts have."""
    total = sum(weight for weight, _ in parts)
    return {
        kind: sum(weight * logs[kind] for weight, logs in parts) / total
        for kind in parts[0][1]
        if all(kind in logs for _, logs in parts)
    }


def merged(*sources: Iterable[Measured]) -> list[Measured]:
    """Return the measurements of all sources; of equal cells, that of the last source.

    >>> old = Measured("fwd", "half", 64, (8, 64, 64), 0.5, {"dense": 0.9})
    >>> new = Measured("fwd", "half", 64, (8, 64, 64), 0.5, {"dense": 0.8})
    >>> merged([old], [new]) == [new]
    True
    """
    return list({row.cell: row for source in sources for row in source}.values())


def read_rows(path: Path) -> list[Measured]:
    """Read the measurements in a file of this package.

    Raises:
        ValueError: if the file cannot be read or a row is not a measurement; the message names the
            file and the row.
    """
    return _read(path)[0]


def _read(path: Path) -> tuple[list[Measured], set[Layer]]:
    """Return the measurements in a file, and the layer shapes that exhausted memory."""
    where = ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = []
        for i, row in enumerate(content["rows"]):
            where = f" row {i}"
            rows.append(_measured(row))
        where = ' "exhausted"'
        return rows, {_layer(*layer) for layer in content.get("exhausted", ())}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"'{path}' must be a table that `sparse-lightning tune` or a training wrote; reading "
            f"it failed{where and ' at' + where}: {error!r}. Measure it again, or remove it."
        ) from None


def _measured(row: Mapping[str, Any]) -> Measured:
    """Return a row of a file.

    Raises:
        ValueError, KeyError, TypeError: if it is not a measurement.
    """
    found = Measured(**{**row, "shape": tuple(row["shape"])})
    tokens, *features = found.shape
    _layer(found.dtype, found.block_size, *features)
    ratios = found.speedups
    if not (
        isinstance(found.op, str)
        and _is_size(tokens)
        and _is_positive(found.density)
        and found.density <= 1
        and isinstance(ratios, dict)
        and ratios
        and all(map(_is_positive, ratios.values()))
    ):
        raise ValueError(f"{dict(row)}")
    return found


def _layer(dtype: str, block_size: int, in_features: int, out_features: int) -> Layer:
    sizes = (block_size, in_features, out_features)
    if not (isinstance(dtype, str) and all(map(_is_size, sizes))):
        raise ValueError(f"{(dtype, *sizes)}")
    return (dtype, *sizes)


def _is_size(value: object) -> bool:
    return type(value) is int and value > 0


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < cast(float, value) < math.inf


def write_rows(
    path: Path,
    rows: Iterable[Measured],
    environment: Mapping[str, str],
    exhausted: Iterable[Layer] = (),
) -> None:
    """Write measurements, their environment, and the layers that exhausted memory, atomically."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    layers = json.dumps(sorted(exhausted))
    text = (
        f'{{"environment": {json.dumps(dict(environment))},\n "exhausted": {layers},\n'
        f' "rows": [\n{lines}\n ]}}\n'
    )
    write_text(path, text)


def tuned_file(device_name: str) -> Path:
    """Return the file in which `sparse-lightning tune` saves the table of a device."""
    return cache_folder() / f"choices-{_slug(device_name)}.json"


def measured_file(device_name: str) -> Path:
    """Return the file in which trainings on this machine keep what they have measured.

    Its name contains a digest of the kernels and the version of PyTorch, since others have other
    speeds.
    """
    return cache_folder() / f"measured-{_slug(device_name)}-{_code_digest()}.json"


@functools.cache
def _code_digest() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted(FOLDER.rglob("*")):
        if path.suffix in (".py", ".cu", ".cuh"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:8]


def shipped_file(device_name: str, family: str) -> Path | None:
    """Return the shipped table for a device: that of its name, else of the most similar name.

    Args:
        device_name: name of the device.
        family: the devices among which one may stand in for another, such as "sm_90".
    """
    slug = _slug(device_name)
    files = {path.stem.removeprefix(f"{family}-"): path for path in _shipped_files(family)}
    if slug in files:
        return files[slug]

    def similarity(name: str) -> float:
        return difflib.SequenceMatcher(None, slug, name).ratio()

    return files[max(files, key=similarity)] if files else None


def _shipped_files(family: str) -> list[Path]:
    return sorted(SHIPPED_TABLES.glob(f"{family}-*.json"))


def _slug(name: str) -> str:
    """Return a name as part of a file name.

    >>> _slug("Intel(R) Xeon(R) CPU @ 2.20GHz")
    'Intel-R-Xeon-R-CPU-2-20GHz'
    """
    return re.sub("[^A-Za-z0-9]+", "-", name).strip("-")


class DeviceSpeedups:
    """The measurements that a CUDA device uses, by the rule in the docstring of this module.

    Attributes:
        name: name of the device.
        file: file of the layer shapes that trainings have measured.
        table: the table of the device, which `tune` wrote or the package ships.
        rows: what trainings have measured.
        exhausted: layer shapes whose measurement exhausted memory.
        failed: layer shapes whose measurement failed in this process.
        can_keep: whether the file can be written to, as far as known.

    Args:
        name: name of the device.
        family: as in `shipped_file`.

    Raises:
        ValueError: if a file is damaged; the message names it.
    """

    def __init__(self, name: str, family: str) -> None:
        self.name, self.file = name, measured_file(name)
        files = [shipped_file(name, family), tuned_file(name)]
        self._rows = merged(*(read_rows(file) for file in files if file and os.path.isfile(file)))
        self.table = Table(self._rows)
        self.failed: set[Layer] = set()
        self.can_keep = True
        self.read_measured()

    def read_measured(self) -> None:
        """Read again what trainings on this machine have measured.

        Raises:
            ValueError: if the file is damaged; the message names it.
        """
        self.rows: list[Measured] = []
        self.exhausted: set[Layer] = set()
        if may_measure() and os.path.isfile(self.file):
            self.rows, self.exhausted = _read(self.file)
        by_layer: dict[Layer, list[Measured]] = {row.layer: [] for row in self.rows}
        for row in merged(self._rows, self.rows):
            if row.layer in by_layer:
                by_layer[row.layer].append(row)
        self._measured = {layer: Table(rows) for layer, rows in by_layer.items()}

    def write_measured(self) -> None:
        """Write `rows` and `exhausted` to the file.

        Raises:
            OSError: if it cannot be written.
        """
        environment = {"device": self.name, "torch": torch.__version__}
        write_rows(self.file, self.rows, environment, self.exhausted)

    def knows(self, layer: Layer) -> bool:
        """Return whether there is nothing to measure for a layer shape.

        It was measured, or cannot be, or the table covers its step at few and at many tokens.
        """
        dtype, block_size, *features = layer
        return (
            not (may_measure() and self.can_keep)
            or layer in self._measured
            or layer in self.exhausted
            or layer in self.failed
            or all(
                self.table.covers(op, dtype, block_size, (tokens, features[0], features[1]))
                for op in ("fwd", "dx", "dw")
                for tokens in (MEASURED_TOKENS[0], MEASURED_TOKENS[-1])
            )
        )

    def table_for(self, layer: Layer) -> Table:
        """Return the table that predicts the products of a layer shape."""
        return self._measured.get(layer, self.table)


def may_measure() -> bool:
    """Return whether trainings may measure layer shapes, and use what they have measured."""
    return os.environ.get(MEASURE_VARIABLE, "").lower() not in ("0", "false", "no", "off")


@functools.lru_cache(maxsize=4096)
def tokens_bucket(tokens: int) -> int:
    """Return the nearest number of tokens among the powers of the square root of two.

    Inputs of varying length thus share cached choices.

    >>> [tokens_bucket(n) for n in (0, 1, 2, 16, 18, 20, 70, 8192, 9000)]
    [1, 1, 2, 16, 16, 23, 64, 8192, 8192]
    """
    return round(2 ** (round(2 * math.log2(max(1, tokens))) / 2))


def cpu_name() -> str:
    """Return the model name of the CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
