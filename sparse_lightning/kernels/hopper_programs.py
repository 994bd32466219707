"""The programs for Hopper (compute capability 9.0) in half precision: pure functions on ints.

How their tiles are cut was chosen on an H100; NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator

import torch

from sparse_lightning.kernels.programs import (
    DTYPES,
    Program,
    TiledProgram,
    Tiling,
    compiler_options,
)
from sparse_lightning.topology import BLOCK_SIZES, check_block_size

CAPABILITY = (9, 0)
MAX_SHARED_BYTES = 227 * 1024
CLUSTER = 2  # thread blocks that share copies of W
STRIP = 64  # features of dy, and of x for wide blocks, that a copy brings for a gradient
STEP = 32  # tokens of such a copy
DW_PARTS = (1, 2, 4, 8)  # of the tokens, one for each thread block of a cluster
PTX_TYPES = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}

# groups_n: warpgroups that share the outputs.
_LINEAR = {
    16: Tiling(128, 256, 64, 8, 1, 2),
    32: Tiling(128, 256, 32, 16, 1, 2),
    64: Tiling(128, 256, 64, 16, 1, 4),
    128: Tiling(128, 256, 64, 16, 1, 2),
}
_RING = 52  # strips of dy and x in shared memory
_DW_SUMS = 8  # strips by strips that a thread block's registers hold
# So many thread blocks copy as fast together as each alone, if all pass over the same tokens: then
# L2 is asked for the same by several at once. In parts of the tokens it is less. Fitted on an H100.
_TOGETHER = {1: 74.0, 2: 59.2, 4: 51.8, 8: 44.4}


def serve(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Return whether these programs serve a device and dtype."""
    return capability == CAPABILITY and dtype in PTX_TYPES


def linear_program(dtype: torch.dtype, block_size: int, *, forward: bool) -> TiledProgram:
    """Return the program of y = x W^T (forward) or dx = dy W: `block_linear`."""
    check_block_size(block_size)
    tiling = _LINEAR[block_size]
    source, shared_bytes, more = (_narrow_linear if block_size < STRIP else _wide_linear)(
        tiling, block_size
    )
    defines: dict[str, str | int] = {
        "T": DTYPES[dtype],
        "PTX_TYPE": PTX_TYPES[dtype],
        "B": block_size,
        "FORWARD": int(forward),
        "TOKENS": tiling.tm,
        "OUTPUTS": tiling.tn,
        "SLAB": tiling.tk,
        "STAGES": tiling.stages,
        "SHARED_BYTES": shared_bytes,
    }
    options = compiler_options({**defines, **more})
    return TiledProgram(source, options, 128 * (1 + tiling.groups_n), shared_bytes, tiling)


def _wide_linear(t: Tiling, block_size: int) -> tuple[str, int, dict[str, int]]:
    # As `Shared` in block_linear_hopper.cu has it, with as many granules as fit.
    warps, rows = 4 * t.groups_n, t.tn // block_size
    results, slabs, plans = warps * 16 * 128, 256 * 16, 4 * (4 + 32 * rows * 4)
    beside = results + slabs + _round_up(plans, 8) + 8 * (2 * t.stages + 2 * 4)
    granule = 2 * t.tk * block_size
    granules = (MAX_SHARED_BYTES - beside) // granule
    more = {"WARPGROUPS": t.groups_n, "CLUSTER": CLUSTER, "GRANULES": granules}
    return "block_linear_hopper.cu", _round_up(granules * granule + beside, 1024), more


def _narrow_linear(t: Tiling, block_size: int) -> tuple[str, int, dict[str, int]]:
    # As `Shared` in block_linear_narrow_hopper.cu has it; the ring of blocks is a power of two.
    x, results, slabs = 2 * t.stages * t.tm * t.tk, 8 * 16 * 128, 128 * 16
    plans = 3 * 4 * (1 + 32 * (t.tn // block_size + 1))
    beside = x + results + slabs + _round_up(plans, 8) + 8 * (2 * 128 + 2 * 3)
    block = 2 * block_size**2
    blocks = 1 << ((MAX_SHARED_BYTES - beside) // block).bit_length() - 1
    more = {"BLOCKS": blocks}
    return "block_linear_narrow_hopper.cu", _round_up(blocks * block + beside, 1024), more


def dw_program(dtype: torch.dtype, block_size: int, parts: int = 1) -> Program:
    """Return the program of dW: `block_linear_dw`; only wide blocks have several `DW_PARTS`."""
    check_block_size(block_size)
    source, options = "block_linear_dw_hopper.cu", {"B": block_size, "PARTS": parts}
    if block_size < STRIP:
        source, options = "block_linear_dw_narrow_hopper.cu", {"B": block_size}
    x_width, dy_stride = min(block_size, STRIP), max(1, block_size // STRIP)
    return _gradient_program(source, dtype, x_width, dy_stride, options)


def norms_program(dtype: torch.dtype) -> Program:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    return _gradient_program("block_norms_hopper.cu", dtype, STRIP, 2, {})


def all_programs() -> Iterator[Program]:
    """Yield every program for Hopper."""
    for dtype in PTX_TYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            for parts in DW_PARTS if block_size >= STRIP else (1,):
                yield dw_program(dtype, block_size, parts)
            yield linear_program(dtype, block_size, forward=True)
            yield linear_program(dtype, block_size, forward=False)


def _gradient_program(
    source: str, dtype: torch.dtype, x_width: int, dy_stride: int, options: dict[str, int]
) -> Program:
    # As `Shared` in gradient_hopper.cuh has it.
    ring = _RING * STRIP // x_width
    dy_strips = _DW_SUMS if x_width == STRIP else 1
    x_strips = _DW_SUMS * STRIP // x_width
    jobs = 2 * 4 * (12 + dy_strips + x_strips)
    results, barriers = 8 * 16 * 128, 8 * (2 * 16 + 2 * 2)
    shared_bytes = _round_up(ring * 2 * x_width * STEP + results + jobs + barriers, 1024)
    defines: dict[str, str | int] = {
        "T": DTYPES[dtype],
        "PTX_TYPE": PTX_TYPES[dtype],
        "STEP": STEP,
        "RING": ring,
        "X_WIDTH": x_width,
        "DY_STRIDE": dy_stride,
        "SHARED_BYTES": shared_bytes,
        **options,
    }
    return Program(source, compiler_options(defines), 384, shared_bytes)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


@functools.lru_cache(maxsize=4096)  # asked at every step, of inputs of any length
def dw_split(
    capacity: int, out_blocks: int, block_size: int, tokens: int, processors: int
) -> tuple[int, int, int]:
    """Return how dW of wide blocks is shared out: token parts, clusters, and groups of blocks.

    A cluster of as many thread blocks as there are parts takes a group; parts pay where there are
    few blocks. The groups are those to cut the blocks into if not by rows, which the device knows.

    Args:
        capacity: blocks that may be present: how many are, only the device knows.
        out_blocks: block rows.
        block_size: 64 or 128.
        tokens: of the input.
        processors: multiprocessors of the device.

    >>> [dw_split(n, 64, 64, 8192, 132) for n in (2048, 1024, 205, 10)]
    [(1, 132, 264), (1, 132, 128), (1, 132, 103), (8, 10, 10)]
    """
    wide, steps = block_size // STRIP, -(-tokens // STEP)

    def cost(parts: int, groups: int) -> float:
        # In strips of dy and x, STEP tokens of them, that one thread block copies.
        blocks = capacity / groups
        rows = min(blocks, 1 + (blocks - 1) * out_blocks / capacity)
        together = groups * (rows + blocks) / _TOGETHER[parts]
        one = math.ceil(blocks) + math.ceil(rows)
        rounds = 1 if parts > 1 else -(-groups // processors)
        return wide * steps * max(together, rounds * one / parts) + (100 if parts > 1 else 0)

    fewest = -(-capacity // (_DW_SUMS // wide**2))
    # One round of thread blocks with as many blocks each as it takes, or several full rounds.
    counts = {min(capacity, _round_up(fewest, processors))}
    counts |= {-(-capacity // blocks) for blocks in range(1, -(-capacity // fewest) + 1)}
    choices = []
    for parts in DW_PARTS:
        clusters = min(capacity, _clusters(processors, parts))
        for groups in {clusters, *counts}:
            full_rounds = parts == 1 and groups % processors == 0
            if groups >= fewest and (groups <= clusters or full_rounds):
                choices.append((parts, clusters, groups))
    return min(choices, key=lambda choice: (cost(choice[0], choice[2]), choice))


def _clusters(processors: int, thread_blocks: int) -> int:
    """Return how many clusters of thread blocks run at once, cautiously."""
    # Multiprocessors come in clusters of 16 or 18, less what is defective.
    clusters = processors // thread_blocks
    return clusters if thread_blocks <= 2 else clusters * 10 // 11


@functools.lru_cache(maxsize=4096)
def dw_slices(capacity: int, grid: tuple[int, int], block_size: int, processors: int) -> int:
    """Return in how many slices dW of narrow blocks cuts the columns of each band of block rows.

    Args:
        capacity: blocks that may be present.
        grid: (block rows, block columns).
        block_size: 16 or 32.
        processors: multiprocessors of the device.

    >>> [dw_slices(n, (128, 128), 32, 132) for n in (4096, 1638, 819)]
    [2, 2, 2]
    """
    rows = STRIP // block_size
    bands = -(-grid[0] // rows)
    # Of a band, for blocks anywhere; slots may be more than there are places for blocks.
    density = min(1.0, capacity / (grid[0] * grid[1]))
    columns = grid[1] * (1 - (1 - density) ** rows)
    most = _DW_SUMS * rows

    def cost(slices: int) -> float:
        # As in `dw_split`, in strips of 64 features: dy's once for every job of a slice.
        jobs = math.ceil(columns / slices / most)
        strips = jobs + columns / slices / rows
        rounds = -(-bands * slices // processors)
        return max(bands * slices * strips / _TOGETHER[1], rounds * strips)

    return min(range(1, math.ceil(columns) + 1), key=lambda slices: (cost(slices), slices))
