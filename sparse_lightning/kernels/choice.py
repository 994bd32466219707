"""Which kind of kernels computes a product on a CUDA device: the one measured to be fastest.

`sparse-lightning tune` measures every kind on a GPU and saves a table of it; without one, and with
none for such a GPU in the package, the portable kernels compute everything. Of the measured shapes
the nearest counts, and between measured densities speed-ups are interpolated.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from sparse_lightning.kernels import cpu
from sparse_lightning.kernels.compiler import cache_folder
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.topology import BlockTopology

PORTABLE, HOPPER, DENSE = KINDS = ("portable", "hopper", "dense")
STEP = ("fwd", "dx", "dw")  # the products of a step
OPS = (*STEP, "norms")
SHIPPED = Path(__file__).parent

# Half precision is one: both dtypes have the same kernels, and the same rates.
DTYPES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "fp32"}
# Of a layer whose input has not been seen.
_TOKENS = 8192

Shape = tuple[int, int, int]  # tokens, in_features, out_features


@dataclass(frozen=True)
class Measured:
    """How fast each kind computed one product, relative to the dense one of the same run.

    Attributes:
        op: one of `OPS`; norms relative to the dense dW, at density 1.
        dtype: "half" or "fp32".
        block_size, shape, density: of the layer and its input.
        speedups: by kind.
    """

    op: str
    dtype: str
    block_size: int
    shape: Shape
    density: float
    speedups: dict[str, float]


class Table:
    """What was measured on one kind of GPU.

    Args:
        rows: in any order.

    >>> rows = [
    ...     Measured("fwd", "half", 64, (8192, 4096, 4096), d, {"portable": s, "dense": 0.9})
    ...     for d, s in ((0.4, 0.8), (0.1, 3.2))
    ... ]
    >>> table = Table(rows)
    >>> table.predict("fwd", "half", 64, (4096, 4096, 4096), 0.2)["portable"]
    1.6
    >>> table.choose("fwd", "half", 64, (8192, 4096, 4096), 0.4, KINDS)
    'dense'
    """

    def __init__(self, rows: Iterable[Measured]) -> None:
        self._rows: dict[tuple[str, str, int], dict[Shape, list[Measured]]] = {}
        for row in sorted(rows, key=lambda row: row.density):
            shapes = self._rows.setdefault((row.op, row.dtype, row.block_size), {})
            shapes.setdefault(row.shape, []).append(row)

    def predict(
        self, op: str, dtype: str, block_size: int, shape: Shape, density: float
    ) -> dict[str, float]:
        """Return the speed-up of each kind over the dense product; {} if none was measured."""
        shapes = self._rows.get((op, dtype, block_size))
        if not shapes:
            return {}
        nearest = min(shapes, key=lambda other: _distance(shape, other))
        rows = shapes[nearest]
        kinds = set.intersection(*(set(row.speedups) for row in rows))
        densities = [row.density for row in rows]
        return {
            kind: round(_interpolate(density, densities, [r.speedups[kind] for r in rows]), 6)
            for kind in KINDS
            if kind in kinds
        }

    def choose(
        self,
        op: str,
        dtype: str,
        block_size: int,
        shape: Shape,
        density: float,
        kinds: Sequence[str],
    ) -> str:
        """Return the fastest of some kinds; the portable one if none of them was measured."""
        predicted = self.predict(op, dtype, block_size, shape, density)
        return max(
            (k for k in kinds if k in predicted), key=predicted.__getitem__, default=PORTABLE
        )


def read_table(path: Path) -> Table:
    """Read what `sparse-lightning tune` wrote.

    Raises:
        ValueError: naming the file, if it is something else.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return Table(Measured(**{**row, "shape": tuple(row["shape"])}) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' must be a table that `sparse-lightning tune` wrote; reading it failed: "
            f"{error!r}. Measure it anew, or remove it."
        ) from None


def user_file(device_name: str) -> Path:
    """Return where a table measured on this machine is kept."""
    return cache_folder() / f"choices-{re.sub('[^A-Za-z0-9]+', '-', device_name)}.json"


@contextmanager
def forced(kind: str) -> Iterator[None]:
    """Have every product that it can serve computed by one kind, the others by the portable one."""
    global _forced
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}; got {kind!r}.")
    before, _forced = _forced, kind
    try:
        yield
    finally:
        _forced = before


_forced: str | None = None


def serving(op: str, dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """Return the kinds that serve a product on a device.

    >>> serving("dw", torch.bfloat16, (9, 0)), serving("norms", torch.float32, (9, 0))
    (['portable', 'hopper', 'dense'], ['portable'])
    """
    kinds = [PORTABLE]
    if hopper_programs.serve(capability, dtype):
        kinds.append(HOPPER)
    if op != "norms":
        kinds.append(DENSE)
    return kinds


def choose(
    op: str,
    dtype: torch.dtype,
    block_size: int,
    capacity: int,
    grid: tuple[int, int],
    tokens: int,
    device: int,
) -> str:
    """Return the kind that computes a product.

    Args:
        op: one of `OPS`.
        dtype: of the operands.
        block_size: of the layer.
        capacity: its slots, which are taken to be filled: how many are, only the device knows.
        grid: its (out_blocks, in_blocks).
        tokens: of its input.
        device: index of the CUDA device.
    """
    if tokens == 0 or capacity == 0:
        return PORTABLE
    if _forced is not None:
        capability = torch.cuda.get_device_capability(device)
        return _forced if _forced in serving(op, dtype, capability) else PORTABLE
    # Within a factor of two of the tokens, so that inputs of any length find their choice made.
    return _chosen(op, dtype, block_size, capacity, grid, tokens.bit_length(), device)


def predicted_speedup(
    dtype: torch.dtype, block_size: int, grid: tuple[int, int], density: float, device: int
) -> float | None:
    """Return how much faster than dense a step of a layer should be; None if nothing is known.

    A step is the forward and both products of the backward, at 8192 tokens.
    """
    shape = (_TOKENS, grid[1] * block_size, grid[0] * block_size)
    time = 0.0
    for op in STEP:
        predicted = expected_speedup(op, dtype, block_size, shape, density, device)
        if predicted is None:
            return None
        time += 1 / predicted
    return 3 / time


def expected_speedup(
    op: str, dtype: torch.dtype, block_size: int, shape: Shape, density: float, device: int
) -> float | None:
    """Return how much faster than dense the best kind computes a product; None if not measured."""
    table = _table(device)
    if table is None or dtype not in DTYPES:
        return None
    predicted = table.predict(op, DTYPES[dtype], block_size, shape, density)
    kinds = serving(op, dtype, torch.cuda.get_device_capability(device))
    return max((predicted[kind] for kind in kinds if kind in predicted), default=None)


def of_a_step(
    at: BlockTopology, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, str]:
    """Return what computes each product of a step: "fwd", "dx" and "dw", on CUDA or a CPU."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return {
            op: choose(op, dtype, at.block_size, at.capacity, at.grid, tokens, index) for op in STEP
        }
    # Blocks of dW are never added up, so its dtype does not matter.
    sums = {"fwd": dtype, "dx": dtype, "dw": torch.float32}
    return {op: cpu.choose(tokens, at.block_size, at.density, of) for op, of in sums.items()}


@functools.lru_cache(maxsize=4096)
def _chosen(
    op: str,
    dtype: torch.dtype,
    block_size: int,
    capacity: int,
    grid: tuple[int, int],
    token_bits: int,
    device: int,
) -> str:
    table = _table(device)
    if table is None or dtype not in DTYPES:
        return PORTABLE
    shape = (3 << token_bits >> 2, grid[1] * block_size, grid[0] * block_size)
    density = 1.0 if op == "norms" else capacity / (grid[0] * grid[1])
    kinds = serving(op, dtype, torch.cuda.get_device_capability(device))
    return table.choose(op, DTYPES[dtype], block_size, shape, density, kinds)


@functools.cache
def _table(device: int) -> Table | None:
    major, minor = torch.cuda.get_device_capability(device)
    for path in (
        user_file(torch.cuda.get_device_name(device)),
        SHIPPED / f"choices-sm_{major}{minor}.json",
    ):
        if path.is_file():
            return read_table(path)
    return None


def forget_tables() -> None:
    """Read the tables anew when they are next needed: one has been measured."""
    _table.cache_clear()
    _chosen.cache_clear()


def _distance(shape: Shape, other: Shape) -> float:
    return sum(math.log(a / b) ** 2 for a, b in zip(shape, other, strict=True))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate positive numbers linearly in their logarithms; beyond the ends, hold them."""
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return ys[-1]
