"""The programs for Hopper (compute capability 9.0) in half precision: pure functions on ints.

How their tiles are cut was chosen on an H100; NOTES.md has the measurements.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from typing import NamedTuple

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
NARROW_STEP = 16  # and for dW of narrow blocks
# Clusters for dW: parts of the tokens, and for each of them thread blocks that share copies of dy.
DW_CLUSTERS = {
    16: ((1, 1), (2, 1)),
    32: ((1, 1), (2, 1)),
    64: ((1, 1), (2, 1), (4, 1), (8, 1)),
    128: ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2)),
}
PTX_TYPES = {torch.bfloat16: '"bf16"', torch.float16: '"f16"'}

# groups_n: warpgroups that share the outputs.
_LINEAR = {
    16: Tiling(128, 256, 64, 8, 1, 2),
    32: Tiling(128, 256, 32, 16, 1, 2),
    64: Tiling(128, 256, 64, 16, 1, 4),
    128: Tiling(128, 256, 64, 16, 1, 2),
}


class NarrowDw(NamedTuple):
    """How dW of narrow blocks is computed.

    Attributes:
        x_width: features of x that a copy brings.
        warps: that multiply.
        own: blocks of a warp, at most.
    """

    x_width: int
    warps: int
    own: int

    @property
    def blocks(self) -> int:
        """Of a job, at most."""
        return self.warps * self.own


NARROW_DW = {16: NarrowDw(64, 16, 8), 32: NarrowDw(32, 8, 4)}
_DY_STRIPS = 16  # of a job of narrow blocks, at most
_DW_SUMS = 8  # strips by strips that a thread block's registers hold
# So many thread blocks copy as fast together as each alone, if all pass over the same tokens: then
# L2 is asked for the same by several at once. In parts of the tokens it is less. Fitted on an H100.
_TOGETHER = {1: 74.0, 2: 59.2, 4: 44.0, 8: 42.0}
_IDLE = 0.3  # so much longer a thread block takes where nearly all multiprocessors are idle
# Strips of x, and of dy by their width, that are under way; and enough steps, if these are more.
_UNDER_WAY = {16: (56, 4), 32: (100, 4), 64: (40, 4), 128: (24, 5)}
_LEAST_STRIPS = 10.5  # of narrow blocks, in the time that a step takes even if it copies fewer


def serve(capability: tuple[int, int], dtype: torch.dtype) -> bool:
    """Return whether these programs serve a device and dtype."""
    return capability == CAPABILITY and dtype in PTX_TYPES


def linear_program(
    dtype: torch.dtype, block_size: int, *, forward: bool, activated: bool = False
) -> TiledProgram:
    """Return the program of `block_linear`: y = x W^T (forward) or dx = dy W.

    If `activated`, also the activation of y, or the gradient of the input of an activation whose
    output's gradient dx is.
    """
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
        "ACTIVATED": int(activated),
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
    return "hopper/linear.cu", _round_up(granules * granule + beside, 1024), more


def _narrow_linear(t: Tiling, block_size: int) -> tuple[str, int, dict[str, int]]:
    # As `Shared` in block_linear_narrow_hopper.cu has it; the ring of blocks is a power of two.
    x, results, slabs = 2 * t.stages * t.tm * t.tk, 8 * 16 * 128, 128 * 16
    plans = 3 * 4 * (1 + 32 * (t.tn // block_size + 1))
    beside = x + results + slabs + _round_up(plans, 8) + 8 * (2 * 128 + 2 * 3)
    block = 2 * block_size**2
    blocks = 1 << ((MAX_SHARED_BYTES - beside) // block).bit_length() - 1
    more = {"BLOCKS": blocks}
    return "hopper/linear_narrow.cu", _round_up(blocks * block + beside, 1024), more


def dw_program(dtype: torch.dtype, block_size: int, parts: int = 1, sharers: int = 1) -> Program:
    """Return the program of dW: `block_linear_dw`, for clusters as in `DW_CLUSTERS`."""
    check_block_size(block_size)
    if block_size < STRIP:
        return _narrow_dw_program(dtype, block_size, parts)
    return _strips_program(
        "hopper/dw.cu", dtype, block_size // STRIP, parts, sharers, {"B": block_size}
    )


def norms_program(dtype: torch.dtype) -> Program:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    return _strips_program("hopper/norms.cu", dtype, 2, 1, 1, {})


def all_programs() -> Iterator[Program]:
    """Yield every program for Hopper."""
    for dtype in PTX_TYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            for parts, sharers in DW_CLUSTERS[block_size]:
                yield dw_program(dtype, block_size, parts, sharers)
            for forward, activated in itertools.product((True, False), repeat=2):
                yield linear_program(dtype, block_size, forward=forward, activated=activated)


def _strips_program(
    source: str,
    dtype: torch.dtype,
    dy_stride: int,
    parts: int,
    sharers: int,
    defines: dict[str, int],
) -> Program:
    strips = {"DY_STRIPS": _DW_SUMS * sharers, "X_STRIPS": _DW_SUMS}
    return _gradient_program(
        source,
        dtype,
        {**defines, **strips, "DY_STRIDE": dy_stride},
        warps=8,
        parts=parts,
        sharers=sharers,
        step=STEP,
        x_width=STRIP,
        under_way=_UNDER_WAY.get(defines.get("B", 0)),
        work=4 * 7,  # as `Runs` in product_strips.cuh has it
    )


def _narrow_dw_program(dtype: torch.dtype, block_size: int, parts: int) -> Program:
    t = NARROW_DW[block_size]
    page = 1024
    defines = {"B": block_size, "OWN": t.own, "PAGE": page}
    defines |= {"DY_STRIPS": _DY_STRIPS, "X_STRIPS": 32}
    # As `Work` and `Memory` in block_linear_dw_narrow_hopper.cu have it.
    return _gradient_program(
        "hopper/dw_narrow.cu",
        dtype,
        defines,
        warps=t.warps,
        parts=parts,
        step=NARROW_STEP,
        x_width=t.x_width,
        under_way=_UNDER_WAY[block_size],
        work=4 * (1 + t.blocks),
        beside=4 * page,
    )


def _gradient_program(
    source: str,
    dtype: torch.dtype,
    defines: dict[str, int],
    *,
    warps: int,
    parts: int,
    step: int,
    x_width: int,
    work: int,
    sharers: int = 1,
    under_way: tuple[int, int] | None = None,
    beside: int = 0,
) -> Program:
    # As `Shared` in gradient_hopper.cuh has it, with as many strips as fit.
    jobs = 2 * (4 * (7 + defines["DY_STRIPS"] + defines["X_STRIPS"]) + work)
    beside += warps * 16 * 128 + jobs + 8 * (2 * 16 + 2 * 2)
    strip = 2 * x_width * step
    ring = (MAX_SHARED_BYTES - beside) // strip
    shared_bytes = _round_up(ring * strip + beside, 1024)
    options = compiler_options(
        {
            "T": DTYPES[dtype],
            "PTX_TYPE": PTX_TYPES[dtype],
            **defines,
            "WARPS": warps,
            "PARTS": parts,
            "SHARERS": sharers,
            "STEP": step,
            "X_WIDTH": x_width,
            "RING": ring,
            "UNDER_WAY": ring if under_way is None else under_way[0],
            "ENOUGH": 1 if under_way is None else under_way[1],
            "SHARED_BYTES": shared_bytes,
        }
    )
    return Program(source, options, 128 + 32 * warps, shared_bytes)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to


class Split(NamedTuple):
    """How dW of wide blocks is shared out.

    Attributes:
        parts: of the tokens.
        sharers: thread blocks that share dy, for each part.
        clusters: of as many thread blocks.
    """

    parts: int
    sharers: int
    clusters: int


@functools.lru_cache(maxsize=4096)  # asked at every step, of inputs of any length
def dw_split(
    capacity: int, out_blocks: int, block_size: int, tokens: int, processors: int
) -> Split:
    """Return how dW of wide blocks is shared out.

    Args:
        capacity: blocks that may be present: how many are, only the device knows.
        out_blocks: block rows.
        block_size: 64 or 128.
        tokens: of the input.
        processors: multiprocessors of the device.

    >>> [tuple(dw_split(n, 32, 128, 8192, 132)) for n in (512, 256, 51, 10)]
    [(1, 1, 132), (1, 2, 66), (2, 1, 51), (8, 1, 10)]
    """
    wide, steps = block_size // STRIP, -(-tokens // STEP)

    def time(parts: int, sharers: int, clusters: int) -> float:
        # Of the ways that the device chooses from, in those of a thread block to copy a strip of
        # STEP tokens, as wide as a block; to multiply one with another takes `wide`.
        times = []
        for blocks in range(1, _DW_SUMS * sharers // wide**2 + 1):  # of a group
            share, more = -(-blocks // sharers), (blocks - 1) / blocks
            # Groups of one row, blocks being anywhere, and groups over the ends of rows: then
            # products wait for shared memory, and thread blocks get out of step.
            by_row = min(capacity, capacity / blocks + out_blocks * more / 2)
            evenly = capacity / blocks
            for groups, dy, busy, delay in (
                (by_row, by_row, max(share + 1, share * wide), 1.0),
                (evenly, evenly + out_blocks * more, 1.4 * share * wide, 1.3),
            ):
                together = delay * (dy + capacity) / _TOGETHER[parts]
                # Few thread blocks get less from memory than all of them.
                used = min(groups, clusters) * parts * min(blocks, sharers)
                alone = busy / parts * (1 + _IDLE * max(0.0, 1 - used / processors))
                times.append(max(together, math.ceil(groups / clusters) * alone))
        return wide * steps * min(times) + (100 if parts > 1 else 0)

    choices = []
    for parts, sharers in DW_CLUSTERS[block_size]:
        if parts * sharers <= processors:
            clusters = min(capacity, _clusters(processors, parts * sharers))
            choices.append(Split(parts, sharers, clusters))
    return min(choices, key=lambda split: (time(*split), split))


def _clusters(processors: int, thread_blocks: int) -> int:
    """Return how many clusters of thread blocks run at once, cautiously."""
    # Multiprocessors come in clusters of 16 or 18, less what is defective.
    clusters = processors // thread_blocks
    return clusters if thread_blocks <= 2 else max(1, clusters * 10 // 11)


class Bands(NamedTuple):
    """How dW of narrow blocks is shared out.

    Attributes:
        parts: of the tokens.
        clusters: of as many thread blocks as there are parts.
        groups: of blocks, which clusters take in turn.
        rows: block rows of a band; blocks are grouped by band, then by column.
        cost: of copying the dy of a band, in blocks; groups are alike when it is counted.
    """

    parts: int
    clusters: int
    groups: int
    rows: int
    cost: int


@functools.lru_cache(maxsize=4096)
def dw_bands(capacity: int, grid: tuple[int, int], block_size: int, processors: int) -> Bands:
    """Return how dW of narrow blocks is shared out.

    Args:
        capacity: blocks that may be present: how many are, only the device knows.
        grid: (block rows, block columns).
        block_size: 16 or 32.
        processors: multiprocessors of the device.

    >>> dw_bands(4096, (128, 128), 32, 132)
    Bands(parts=1, clusters=132, groups=132, rows=8, cost=8)
    >>> dw_bands(819, (128, 128), 32, 132)
    Bands(parts=2, clusters=66, groups=66, rows=2, cost=1)
    """
    program = NARROW_DW[block_size]
    # Of blocks anywhere; slots may be more than there are places for blocks.
    density = min(1.0, capacity / (grid[0] * grid[1]))
    most_rows = _DY_STRIPS // 2 * STRIP // block_size  # a group may have two bands

    def choice(parts: int, rows: int) -> tuple[float, float, Bands]:
        clusters = processors // parts
        rounds = -(-capacity // (clusters * program.blocks))
        groups, bands = clusters * rounds, -(-grid[0] // rows)
        # Strips that the blocks of a group need, if they lie at random.
        columns = program.x_width // block_size  # of a strip
        strips = capacity / groups / density / rows / columns
        x = strips * (1 - (1 - density) ** (rows * columns)) + 1 - 1 / columns
        dy_of_band = -(-rows * block_size // STRIP)
        dy = dy_of_band * (1 + bands / groups)
        # As in `dw_split`; narrow strips ask L2 for less, but take the copy engine as long.
        together = groups * (dy + x * program.x_width / STRIP) / _TOGETHER[parts]
        one = max(dy + x, _LEAST_STRIPS) / parts
        room = groups * program.blocks - capacity
        cost = min(round(dy_of_band * capacity / groups / x), room // bands)
        return max(together, rounds * one), together, Bands(parts, clusters, groups, rows, cost)

    rows = [2**i for i in range(6) if 2**i <= most_rows]
    choices = [choice(1, n) for n in rows]
    if capacity <= processors // 2 * program.blocks:  # a cluster takes one group
        choices += [choice(2, n) for n in rows]
    return min(choices)[-1]
