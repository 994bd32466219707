"""The kernel choice: which kind of kernels computes a product on a CUDA device.

The fastest measured kind is chosen. `sparse-lightning tune` measures every kind on a GPU and saves
a table; the package ships a table for some GPUs. Without a table, the portable kernels compute
everything. A lookup uses the nearest measured shape and interpolates speed-ups between densities.
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
SHIPPED_TABLES = Path(__file__).parent

# bf16 and fp16 share kernels and rates.
DTYPES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "fp32"}
# Number of tokens assumed for a layer whose input is unknown.
_TOKENS = 8192

Shape = tuple[int, int, int]  # tokens, in_features, out_features


@dataclass(frozen=True)
class Measured:
    """The speed-up of each kind over the dense product for one product, measured in one run.

    Attributes:
        op: one of `OPS`. The norms are relative to the dense dW and have density 1.
        dtype: "half" or "fp32".
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


class Table:
    """The measurements of one GPU model.

    Args:
        rows: measurements, in any order.

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
        """Return the speed-up of each kind over the dense product; empty if none is measured."""
        shapes = self._rows.get((op, dtype, block_size))
        if not shapes:
            return {}
        nearest = min(shapes, key=lambda measured: _distance(shape, measured))
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
        """Return the fastest of the given kinds; `PORTABLE` if none of them was measured."""
        speedups = self.predict(op, dtype, block_size, shape, density)
        return max((k for k in kinds if k in speedups), key=speedups.__getitem__, default=PORTABLE)


def read_table(path: Path) -> Table:
    """Read a table that `sparse-lightning tune` wrote.

    Raises:
        ValueError: if the file holds no table; the message names the file.
    """
    try:
        rows = json.loads(path.read_text())["rows"]
        return Table(Measured(**{**row, "shape": tuple(row["shape"])}) for row in rows)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"'{path}' must be a table that `sparse-lightning tune` wrote; reading it failed: "
            f"{error!r}. Measure it again, or remove it."
        ) from None


def user_table_file(device_name: str) -> Path:
    """Return the path of the table measured on this machine for a GPU model."""
    return cache_folder() / f"choices-{re.sub('[^A-Za-z0-9]+', '-', device_name)}.json"


@contextmanager
def forced(kind: str) -> Iterator[None]:
    """Force one kind for all products that it supports; the portable kernels compute the rest."""
    global _forced
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}; got {kind!r}.")
    before, _forced = _forced, kind
    try:
        yield
    finally:
        _forced = before


_forced: str | None = None


def available_kinds(op: str, dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """Return the kinds that can compute a product on a device.

    >>> available_kinds("dw", torch.bfloat16, (9, 0))
    ['portable', 'hopper', 'dense']
    >>> available_kinds("norms", torch.float32, (9, 0))
    ['portable']
    """
    kinds = [PORTABLE]
    if hopper_programs.is_supported(capability, dtype):
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
        dtype: dtype of the operands.
        block_size: block size of the layer.
        capacity: number of slots, used in place of the number of present blocks, which only the
            device knows.
        grid: (out_blocks, in_blocks).
        tokens: number of tokens of the input.
        device: index of the CUDA device.
    """
    if tokens == 0 or capacity == 0:
        return PORTABLE
    if _forced is not None:
        capability = torch.cuda.get_device_capability(device)
        return _forced if _forced in available_kinds(op, dtype, capability) else PORTABLE
    # Tokens are bucketed by bit length, so that inputs of varying length share cached choices.
    return _cached_choice(op, dtype, block_size, capacity, grid, tokens.bit_length(), device)


def step_speedup(
    dtype: torch.dtype, block_size: int, grid: tuple[int, int], density: float, device: int
) -> float | None:
    """Return the predicted speed-up of a layer's step over dense; None if a product is unknown.

    A step is the forward and both products of the backward, at 8192 tokens.
    """
    shape = (_TOKENS, grid[1] * block_size, grid[0] * block_size)
    time = 0.0
    for op in STEP:
        speedup = product_speedup(op, dtype, block_size, shape, density, device)
        if speedup is None:
            return None
        time += 1 / speedup
    return len(STEP) / time


def product_speedup(
    op: str, dtype: torch.dtype, block_size: int, shape: Shape, density: float, device: int
) -> float | None:
    """Return the predicted speed-up of the best kind for one product; None if not measured."""
    table = _table(device)
    if table is None or dtype not in DTYPES:
        return None
    speedups = table.predict(op, DTYPES[dtype], block_size, shape, density)
    kinds = available_kinds(op, dtype, torch.cuda.get_device_capability(device))
    return max((speedups[kind] for kind in kinds if kind in speedups), default=None)


def choose_for_step(
    topology: BlockTopology, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, str]:
    """Return the kernel choice for each product of a step ("fwd", "dx", "dw"), on CUDA or a CPU."""
    block_size, grid = topology.block_size, topology.grid
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return {
            op: choose(op, dtype, block_size, topology.capacity, grid, tokens, index) for op in STEP
        }
    # Each block of dW is a single product, so no sums are rounded to the operands' dtype.
    accumulates_in = {"fwd": dtype, "dx": dtype, "dw": torch.float32}
    return {op: cpu.choose(tokens, block_size, topology.density, accumulates_in[op]) for op in STEP}


@functools.lru_cache(maxsize=4096)
def _cached_choice(
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
    kinds = available_kinds(op, dtype, torch.cuda.get_device_capability(device))
    return table.choose(op, DTYPES[dtype], block_size, shape, density, kinds)


@functools.cache
def _table(device: int) -> Table | None:
    major, minor = torch.cuda.get_device_capability(device)
    for path in (
        user_table_file(torch.cuda.get_device_name(device)),
        SHIPPED_TABLES / f"choices-sm_{major}{minor}.json",
    ):
        if path.is_file():
            return read_table(path)
    return None


def clear_table_cache() -> None:
    """Drop cached tables and choices, so that a newly measured table takes effect."""
    _table.cache_clear()
    _cached_choice.cache_clear()


def _distance(left: Shape, right: Shape) -> float:
    return sum(math.log(a / b) ** 2 for a, b in zip(left, right, strict=True))


def _interpolate(x: float, xs: Sequence[float], ys: Sequence[float]) -> float:
    """Interpolate linearly in log-log space; beyond the ends, return the nearest value."""
    if x <= xs[0]:
        return ys[0]
    for x0, x1, y0, y1 in zip(xs, xs[1:], ys, ys[1:], strict=False):
        if x <= x1:
            share = math.log(x / x0) / math.log(x1 / x0)
            return math.exp((1 - share) * math.log(y0) + share * math.log(y1))
    return ys[-1]
