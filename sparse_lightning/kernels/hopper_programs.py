"""The programs for Hopper (compute capability 9.0) in half precision: pure functions on ints.

How their tiles are cut was chosen on an H100; NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from sparse_lightning.kernels.programs import DTYPES, TiledProgram, Tiling, compiler_options
from sparse_lightning.topology import BLOCK_SIZES, check_block_size

CAPABILITY = (9, 0)
MAX_SHARED_BYTES = 227 * 1024
CLUSTER = 2  # thread blocks that share copies of W
STRIP = 64  # columns of dy and x that a copy brings for a gradient
DW_BLOCK_SIZES = (64, 128)
PTX_TYPES = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}

# groups_n: warpgroups that share the outputs.
_LINEAR = {
    16: Tiling(128, 256, 64, 16, 1, 4),
    32: Tiling(128, 256, 64, 16, 1, 4),
    64: Tiling(128, 256, 64, 16, 1, 4),
    128: Tiling(128, 256, 64, 16, 1, 2),
}
_DW = {64: Tiling(64, 512, 32, 5, 1, 2), 128: Tiling(128, 256, 32, 8, 2, 1)}
_NORMS = Tiling(128, 256, 32, 8, 2, 1)


def serve(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Return whether these programs serve a device and dtype."""
    return capability == CAPABILITY and dtype in PTX_TYPES


def linear_program(dtype: torch.dtype, block_size: int, *, forward: bool) -> TiledProgram:
    """Return the program of y = x W^T (forward) or dx = dy W: `block_linear`."""
    check_block_size(block_size)
    t = _LINEAR[block_size]
    granule, beside = _granule_bytes(t, block_size), _bytes_beside_granules(t, block_size)
    granules = (MAX_SHARED_BYTES - beside) // granule
    shared_bytes = _round_up(granules * granule + beside, 1024)
    defines: dict[str, str | int] = {
        "T": DTYPES[dtype],
        "PTX_TYPE": PTX_TYPES[dtype],
        "B": block_size,
        "FORWARD": int(forward),
        "TOKENS": t.tm,
        "OUTPUTS": t.tn,
        "SLAB": t.tk,
        "STAGES": t.stages,
        "WARPGROUPS": t.groups_n,
        "CLUSTER": CLUSTER,
        "GRANULES": granules,
        "SHARED_BYTES": shared_bytes,
    }
    threads = 128 * (1 + t.groups_n)
    options = compiler_options(defines)
    return TiledProgram("block_linear_hopper.cu", options, threads, shared_bytes, t)


def linear_boxes(t: Tiling, block_size: int) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Return what one copy brings of x, rows and columns, and of the blocks of W."""
    side = min(block_size, t.tk)
    return (_granule_bytes(t, block_size) // (2 * t.tk), t.tk), (1, side, side)


def _granule_bytes(t: Tiling, block_size: int) -> int:
    return max(t.tm * t.tk, 2 * t.tk * block_size)


def _bytes_beside_granules(t: Tiling, block_size: int) -> int:
    """Return the bytes of `Shared` in block_linear_hopper.cu after its first member."""
    warps, rows = 4 * t.groups_n, t.tn // block_size
    results, slabs, plans = warps * 16 * 128, 256 * 16, 4 * (4 + 32 * rows * 4)
    return results + slabs + _round_up(plans, 8) + 8 * (2 * t.stages + 2 * 4)


def dw_program(dtype: torch.dtype, block_size: int) -> TiledProgram:
    """Return the program of dW, for one of `DW_BLOCK_SIZES`: `block_linear_dw`, `add_parts`."""
    options = {"B": block_size}
    return _gradient_program("block_linear_dw_hopper.cu", dtype, _DW[block_size], options)


def norms_program(dtype: torch.dtype) -> TiledProgram:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    return _gradient_program("block_norms_hopper.cu", dtype, _NORMS, {})


def all_programs() -> Iterator[TiledProgram]:
    """Yield every program for Hopper."""
    for dtype in PTX_TYPES:
        yield norms_program(dtype)
        yield from (dw_program(dtype, block_size) for block_size in DW_BLOCK_SIZES)
        for block_size in BLOCK_SIZES:
            yield linear_program(dtype, block_size, forward=True)
            yield linear_program(dtype, block_size, forward=False)


def _gradient_program(
    source: str, dtype: torch.dtype, t: Tiling, options: dict[str, int]
) -> TiledProgram:
    dy_strips, x_strips = t.tm // STRIP, t.tn // STRIP
    # As `Shared` in gradient_hopper.cuh has it.
    strips = t.stages * (dy_strips + x_strips) * 2 * STRIP * t.tk
    results, segments = 8 * 16 * 128, 4 * 4 * (12 + x_strips)
    barriers = 8 * (2 * t.stages + 2 * 4)
    shared_bytes = _round_up(_round_up(strips + results + segments, 8) + barriers, 1024)
    defines: dict[str, str | int] = {
        "T": DTYPES[dtype],
        "PTX_TYPE": PTX_TYPES[dtype],
        "STEP": t.tk,
        "STAGES": t.stages,
        "DY_STRIPS": dy_strips,
        "X_STRIPS": x_strips,
        "SHARED_BYTES": shared_bytes,
        **options,
    }
    return TiledProgram(source, compiler_options(defines), 384, shared_bytes, t)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


# As block_linear_dw_hopper.cu has it: the sums of a part of dW are pieces, a strip by a strip each,
# and the workspace holds two parts a worker.
PIECES_OF_A_TILE = 8
PARTIAL_FLOATS_A_WORKER = 2 * PIECES_OF_A_TILE * STRIP * STRIP


@functools.cache  # a training asks for few combinations, and at every step
def blocks_a_tile(n_blocks: int, out_blocks: int, block_size: int, workers: int) -> int:
    """Return of how many blocks dW makes a tile.

    Large tiles load less of dy; small ones leave fewer workers idle.

    Args:
        n_blocks: that are present, or may be: how many, only the device knows.
        out_blocks: block rows.
        block_size: one of `DW_BLOCK_SIZES`.
        workers: thread blocks that take tiles.

    >>> [blocks_a_tile(n, 64, 64, 132) for n in (2048, 1024, 410, 205)]
    [8, 8, 3, 5]
    """
    most = _DW[block_size].tn // block_size

    def cost(blocks: int) -> float:
        # In strips of dy and x that are copied; dy's once for each block row that a tile meets.
        rows = min(blocks, 1 + (blocks - 1) * out_blocks / max(1, n_blocks))
        return (rows + blocks) * _rounds(-(-n_blocks // blocks), workers)

    return min(range(1, most + 1), key=lambda blocks: (cost(blocks), -blocks))


def _rounds(tiles: int, workers: int) -> float:
    """Return how long the workers take, in units of a tile; as `Shares` in the kernel decides."""
    whole, split = divmod(tiles, workers)
    parts = [p for p in range(1, 9) if p == 1 or split * p <= 2 * workers]
    return whole + min(
        -(-split * p // workers) / p + (6 / 8192 * split * p if p > 1 else 0) for p in parts
    )
