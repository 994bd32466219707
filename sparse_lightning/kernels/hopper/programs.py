"""The programs for Hopper (compute capability 9.0): pure functions of dtypes and ints.

Tilings were tuned on an H100; NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch

from sparse_lightning.kernels import epilogues
from sparse_lightning.kernels.programs import (
    DTYPES,
    Program,
    TiledProgram,
    Tiling,
    compiler_options,
)
from sparse_lightning.topology import BLOCK_SIZES, check_block_size

CAPABILITY = (9, 0)
CLUSTER = 2  # thread blocks that multicast W
STRIP = 64  # features in a strip of dy, and of x for wide blocks: the box of one load
TK = 32  # tokens of a k-tile of norms, and of dW of wide blocks
NARROW_TK = 16  # tokens of a k-tile of dW of narrow blocks
# The clusters for dW, as (split_k, multicast): splits of the tokens, and the thread blocks of each
# split, which multicast dy.
DW_CLUSTERS = {
    16: ((1, 1), (2, 1)),
    32: ((1, 1), (2, 1)),
    64: ((1, 1), (2, 1), (4, 1), (8, 1)),
    128: ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2)),
}
PTX_TYPES = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}

# By the tokens and outputs of a tile, the largest first, and by block size. groups_n: consumer
# warpgroups that share the outputs.
_LINEAR = {
    (128, 256): {
        16: Tiling(128, 256, 64, 8, 1, 2),
        32: Tiling(128, 256, 32, 16, 1, 2),
        64: Tiling(128, 256, 64, 16, 1, 4),
        128: Tiling(128, 256, 64, 16, 1, 2),
    },
    (128, 128): {
        16: Tiling(128, 128, 64, 8, 1, 2),
        32: Tiling(128, 128, 32, 16, 1, 2),
        64: Tiling(128, 128, 64, 16, 1, 2),
        128: Tiling(128, 128, 64, 16, 1, 1),
    },
    (64, 128): {
        64: Tiling(64, 128, 64, 16, 1, 2),
        128: Tiling(64, 128, 64, 16, 1, 1),
    },
}


class NarrowDw(NamedTuple):
    """How dW of narrow blocks is computed.

    Attributes:
        x_width: features in a strip of x.
        warps: number of consumer warps.
        warp_blocks: most blocks a consumer warp can hold.
    """

    x_width: int
    warps: int
    warp_blocks: int

    @property
    def max_blocks(self) -> int:
        """Most blocks a work item can hold."""
        return self.warps * self.warp_blocks


NARROW_DW = {16: NarrowDw(64, 16, 8), 32: NarrowDw(32, 8, 4)}
_DY_STRIPS = 16  # most strips of dy in a work item of narrow blocks
_STRIP_PAIRS = 8  # products of a strip of dy and one of x that a thread block's registers hold
# By split_k: how many thread blocks can load at once, each as fast as one alone. Thread blocks that
# pass over the same tokens share reads of L2; split-K spreads them out. Fitted on an H100.
_LOCKSTEP_RATE = {1: 74.0, 2: 59.2, 4: 44.0, 8: 42.0}
_IDLE_PENALTY = 0.3  # relative slowdown of a thread block when almost all multiprocessors are idle
# By block size: most strips in flight (in units of a strip of x), and least number of stages.
_IN_FLIGHT = {16: (56, 4), 32: (100, 4), 64: (40, 4), 128: (24, 5)}
_MIN_STRIPS = 10.5  # strips of narrow blocks that load within the minimum time of a k-tile


def is_supported(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Return whether these programs support a device and a dtype."""
    return capability == CAPABILITY and dtype in PTX_TYPES


def linear_program(
    dtype: torch.dtype,
    block_size: int,
    *,
    forward: bool,
    epilogue: int = 0,
    tile: tuple[int, int] = (128, 256),
) -> TiledProgram:
    """Return the program of `block_linear`: y = x W^T (forward) or dx = dy W.

    `epilogue` is the `KIND` of an epilogue, 0 for none; `tile` is one of `linear_tiles`.
    """
    check_block_size(block_size)
    tiling = _LINEAR[tile][block_size]
    if epilogue and block_size == STRIP:  # registers of four would leave none for the epilogue
        tiling = replace(tiling, groups_n=2)
    defines: dict[str, str | int] = {
        "T": DTYPES[dtype],
        "PTX_TYPE": PTX_TYPES[dtype],
        "B": block_size,
        "FORWARD": int(forward),
        "EPILOGUE": epilogue,
        "TM": tiling.tm,
        "TN": tiling.tn,
        "TK": tiling.tk,
        "STAGES": tiling.stages,
        "CONSUMER_WARPGROUPS": tiling.groups_n,
        "CLUSTER": CLUSTER,
    }
    source = "hopper/linear_narrow.cu" if block_size < STRIP else "hopper/linear.cu"
    return TiledProgram(source, compiler_options(defines), tiling)


def linear_tiles(block_size: int) -> list[tuple[int, int]]:
    """Return the tokens and outputs of each tile of `block_linear`, the largest first."""
    return [tile for tile, tilings in _LINEAR.items() if block_size in tilings]


def linear_tile(block_size: int, tokens: int, out_features: int, sm_count: int) -> tuple[int, int]:
    """Return the tokens and outputs of a tile of `block_linear`.

    Large tiles load the least. But if they would occupy at most half of the multiprocessors, each
    is halved.

    >>> [linear_tile(64, n, 4096, 132) for n in (8192, 512, 256)]
    [(128, 256), (128, 128), (64, 128)]
    """
    cluster = CLUSTER if block_size >= STRIP else 1  # thread blocks with the same outputs
    *larger, smallest = linear_tiles(block_size)
    for tile in larger:
        thread_blocks = cluster * -(-tokens // (tile[0] * cluster)) * -(-out_features // tile[1])
        if 2 * thread_blocks > sm_count:
            return tile
    return smallest


def dw_program(
    dtype: torch.dtype, block_size: int, split_k: int = 1, multicast: int = 1
) -> Program:
    """Return the program of dW, `block_linear_dw`, for clusters as in `DW_CLUSTERS`."""
    check_block_size(block_size)
    in_flight, min_stages = _IN_FLIGHT[block_size]
    defines = {"B": block_size, "SPLIT_K": split_k, "MULTICAST": multicast}
    defines |= {"IN_FLIGHT_STRIPS": in_flight, "MIN_STAGES": min_stages}
    if block_size >= STRIP:
        return _wide_program("hopper/dw.cu", dtype, block_size // STRIP, defines)
    t = NARROW_DW[block_size]
    defines |= {"DY_STRIPS": _DY_STRIPS, "X_STRIPS": 32, "X_WIDTH": t.x_width, "TK": NARROW_TK}
    defines |= {"CONSUMER_WARPS": t.warps, "WARP_BLOCKS": t.warp_blocks}
    return Program("hopper/dw_narrow.cu", _options(dtype, defines))


def norms_program(dtype: torch.dtype) -> Program:
    """Return the program of the block norms of the dense gradient, `block_norms`."""
    defines = {"SPLIT_K": 1, "MULTICAST": 1, "IN_FLIGHT_STRIPS": 0, "MIN_STAGES": 1}
    return _wide_program("hopper/norms.cu", dtype, 2, defines)


def all_programs() -> Iterator[Program]:
    """Yield every program for Hopper."""
    for dtype in PTX_TYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            for split_k, multicast in DW_CLUSTERS[block_size]:
                yield dw_program(dtype, block_size, split_k, multicast)
            for forward, tile in itertools.product((True, False), linear_tiles(block_size)):
                for kind in epilogues.kinds(forward):
                    yield linear_program(
                        dtype, block_size, forward=forward, epilogue=kind, tile=tile
                    )


def _wide_program(
    source: str, dtype: torch.dtype, dy_stride: int, defines: dict[str, int]
) -> Program:
    strips = {"DY_STRIPS": _STRIP_PAIRS * defines["MULTICAST"], "X_STRIPS": _STRIP_PAIRS}
    strips |= {"DY_STRIDE": dy_stride, "X_WIDTH": STRIP, "TK": TK, "CONSUMER_WARPS": 8}
    return Program(source, _options(dtype, defines | strips))


def _options(dtype: torch.dtype, defines: dict[str, int]) -> tuple[str, ...]:
    return compiler_options({"T": DTYPES[dtype], "PTX_TYPE": PTX_TYPES[dtype], **defines})


class Split(NamedTuple):
    """How dW of wide blocks is distributed.

    Attributes:
        split_k: number of splits of the tokens.
        multicast: thread blocks of each split, which multicast dy.
        clusters: number of clusters, of `split_k * multicast` thread blocks.
    """

    split_k: int
    multicast: int
    clusters: int


@functools.lru_cache(maxsize=4096)  # called at every step, for inputs of any length
def dw_split(capacity: int, out_blocks: int, block_size: int, tokens: int, sm_count: int) -> Split:
    """Return how dW of wide blocks is distributed, by a model of its time.

    Args:
        capacity: the most blocks that can be present; only the device knows their number.
        out_blocks: number of block rows.
        block_size: 64 or 128.
        tokens: number of tokens of the input.
        sm_count: number of multiprocessors of the device.

    >>> [tuple(dw_split(n, 32, 128, 8192, 132)) for n in (512, 256, 51, 10)]
    [(1, 1, 132), (1, 2, 66), (2, 1, 51), (8, 1, 10)]
    """
    block_strips, k_tiles = block_size // STRIP, -(-tokens // TK)

    def time(split_k: int, multicast: int, clusters: int) -> float:
        # The time of the best partition that the device can choose. The unit is the time in which
        # a thread block loads TK tokens of a strip as wide as a block; multiplying two such strips
        # takes `block_strips`.
        times = []
        for blocks in range(1, _STRIP_PAIRS * multicast // block_strips**2 + 1):  # per group
            share, more = -(-blocks // multicast), (blocks - 1) / blocks
            # Groups within rows, for random masks, and groups that cross rows, which wait for
            # shared memory and take thread blocks out of lockstep.
            by_row = min(capacity, capacity / blocks + out_blocks * more / 2)
            evenly = capacity / blocks
            for groups, dy, busy, delay in (
                (by_row, by_row, max(share + 1, share * block_strips), 1.0),
                (evenly, evenly + out_blocks * more, 1.4 * share * block_strips, 1.3),
            ):
                lockstep = delay * (dy + capacity) / _LOCKSTEP_RATE[split_k]
                # With few thread blocks each gets a smaller share of the memory bandwidth.
                used = min(groups, clusters) * split_k * min(blocks, multicast)
                alone = busy / split_k * (1 + _IDLE_PENALTY * max(0.0, 1 - used / sm_count))
                times.append(max(lockstep, math.ceil(groups / clusters) * alone))
        return block_strips * k_tiles * min(times) + (100 if split_k > 1 else 0)

    splits = []
    for split_k, multicast in DW_CLUSTERS[block_size]:
        if split_k * multicast <= sm_count:
            clusters = min(capacity, _resident_clusters(sm_count, split_k * multicast))
            splits.append(Split(split_k, multicast, clusters))
    return min(splits, key=lambda split: (time(*split), split))


def _resident_clusters(sm_count: int, size: int) -> int:
    """Return a lower bound of the number of clusters of `size` thread blocks that run at once."""
    # A GPC has 16 or 18 multiprocessors, minus disabled ones, and holds whole clusters only.
    clusters = sm_count // size
    return clusters if size <= 2 else max(1, clusters * 10 // 11)


class Bands(NamedTuple):
    """How dW of narrow blocks is distributed.

    Attributes:
        split_k: number of splits of the tokens, one per thread block of a cluster.
        clusters: number of clusters.
        groups: number of groups of blocks, distributed over the clusters.
        rows: block rows of a band; blocks are grouped by band, then by column.
        cost: cost of loading the dy of a band, in blocks; groups have equal total cost.
    """

    split_k: int
    clusters: int
    groups: int
    rows: int
    cost: int


@functools.lru_cache(maxsize=4096)
def dw_bands(capacity: int, grid: tuple[int, int], block_size: int, sm_count: int) -> Bands:
    """Return how dW of narrow blocks is distributed, by a model of its time.

    Args:
        capacity: the most blocks that can be present; only the device knows their number.
        grid: (block rows, block columns).
        block_size: 16 or 32.
        sm_count: number of multiprocessors of the device.

    >>> dw_bands(4096, (128, 128), 32, 132)
    Bands(split_k=1, clusters=132, groups=132, rows=8, cost=8)
    >>> dw_bands(819, (128, 128), 32, 132)
    Bands(split_k=2, clusters=66, groups=66, rows=2, cost=1)
    """
    program = NARROW_DW[block_size]
    # The model assumes random masks. There may be more slots than blocks in the grid.
    density = min(1.0, capacity / (grid[0] * grid[1]))
    max_rows = _DY_STRIPS // 2 * STRIP // block_size  # a group may have two bands

    def estimate(split_k: int, rows: int) -> tuple[float, float, Bands]:
        clusters = sm_count // split_k
        rounds = -(-capacity // (clusters * program.max_blocks))
        groups, bands = clusters * rounds, -(-grid[0] // rows)
        # The expected number of strips of x that the blocks of a group need.
        columns = program.x_width // block_size  # per strip
        strips = capacity / groups / density / rows / columns
        x = strips * (1 - (1 - density) ** (rows * columns)) + 1 - 1 / columns
        dy_of_band = -(-rows * block_size // STRIP)
        dy = dy_of_band * (1 + bands / groups)
        # As in `dw_split`, but narrow strips load less from L2, in as much time of the TMA unit.
        lockstep = groups * (dy + x * program.x_width / STRIP) / _LOCKSTEP_RATE[split_k]
        alone = max(dy + x, _MIN_STRIPS) / split_k
        room = groups * program.max_blocks - capacity
        cost = min(round(dy_of_band * capacity / groups / x), room // bands)
        result = Bands(split_k, clusters, groups, rows, cost)
        return max(lockstep, rounds * alone), lockstep, result

    all_rows = [2**i for i in range(6) if 2**i <= max_rows]
    estimates = [estimate(1, rows) for rows in all_rows]
    if capacity <= sm_count // 2 * program.max_blocks:  # one group per cluster
        estimates += [estimate(2, rows) for rows in all_rows]
    return min(estimates)[-1]
