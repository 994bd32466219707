"""The programs for every device and dtype: pure functions of dtypes and ints.

Tilings for many tokens were tuned on an H100, those of two-byte dtypes for few tokens on an H200 by
`benchmarks/tilings.py`; those of fp32 and fp64 for few tokens are estimates. All fit into the 99
KiB of shared memory that a thread block can have on the smallest supported devices.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

import torch

from sparse_lightning.kernels.programs import DTYPES, TiledProgram, Tiling, compiler_options
from sparse_lightning.topology import BLOCK_SIZES, check_block_size

# By the most tokens of an input, then by block size. Tensor cores for two-byte dtypes, SIMT
# arithmetic for fp32 and fp64. Few tokens are bound by reading W, many by arithmetic.
MANY = 2**63
_LINEAR_MMA = {
    8: {
        16: Tiling(8, 16, 32, 2, 1, 1, 8),
        32: Tiling(8, 32, 32, 1, 1, 1, 16),
        64: Tiling(8, 32, 32, 2, 1, 1, 8),
        128: Tiling(8, 32, 32, 4, 1, 1, 8),
    },
    16: {
        16: Tiling(16, 16, 32, 2, 1, 1, 8),
        32: Tiling(16, 32, 32, 2, 1, 1, 8),
        64: Tiling(16, 32, 32, 2, 1, 1, 8),
        128: Tiling(16, 32, 32, 2, 1, 1, 8),
    },
    32: {
        16: Tiling(32, 16, 32, 1, 1, 1, 8),
        32: Tiling(32, 32, 32, 2, 1, 1, 8),
        64: Tiling(32, 32, 32, 1, 1, 1, 8),
        128: Tiling(32, 32, 32, 1, 1, 1, 8),
    },
    64: {
        16: Tiling(32, 16, 32, 1, 1, 1, 8),
        32: Tiling(64, 32, 64, 4, 2, 1, 2, splits=2),
        64: Tiling(64, 64, 128, 3, 2, 2, 1, splits=2),
        128: Tiling(64, 64, 128, 3, 2, 2, 1, splits=2),
    },
    128: {
        16: Tiling(128, 16, 64, 3, 2, 1, 2, splits=2),
        32: Tiling(128, 32, 64, 4, 2, 1, 2),
        64: Tiling(64, 64, 64, 3, 2, 1, 2, splits=2),
        128: Tiling(64, 64, 64, 3, 2, 1, 2, splits=2),
    },
    MANY: {
        16: Tiling(256, 16, 64, 2, 4, 1),
        32: Tiling(256, 32, 64, 2, 4, 1),
        64: Tiling(128, 64, 64, 2, 2, 2),
        128: Tiling(128, 128, 64, 2, 2, 4),
    },
}
_SKINNY_TILE = 32  # the most tokens of a tile that `linear_skinny.cu` computes for two-byte dtypes
_LINEAR_SIMT = {
    32: {
        16: Tiling(16, 16, 64, 2, 8, 8),
        32: Tiling(16, 32, 64, 2, 8, 16),
        64: Tiling(16, 64, 32, 2, 8, 32),
        128: Tiling(16, 128, 32, 2, 8, 16),
    },
    MANY: {
        16: Tiling(256, 16, 16, 2, 64, 4),
        32: Tiling(128, 32, 16, 2, 32, 8),
        64: Tiling(128, 64, 16, 2, 16, 16),
        128: Tiling(64, 128, 16, 2, 16, 16),
    },
}
_DW_MMA = {
    16: Tiling(16, 256, 64, 2, 1, 4),
    32: Tiling(32, 128, 64, 2, 1, 4),
    64: Tiling(64, 128, 64, 2, 1, 4),
    128: Tiling(128, 128, 32, 4, 2, 2),
}
_DW_SIMT = {
    16: Tiling(16, 128, 16, 2, 8, 32),
    32: Tiling(32, 128, 16, 2, 8, 32),
    64: Tiling(64, 128, 16, 2, 16, 16),
    128: Tiling(64, 128, 16, 2, 16, 16),
}
_NORMS_MMA = Tiling(128, 128, 64, 2, 2, 4)
_NORMS_SIMT = Tiling(128, 128, 16, 2, 16, 16)


@functools.lru_cache(maxsize=4096)  # called at every product, for inputs of any length
def most_tokens(dtype: torch.dtype, tokens: int) -> int:
    """Return the most tokens for which `linear_program` is the same as for `tokens`.

    >>> most_tokens(torch.bfloat16, 1), most_tokens(torch.bfloat16, 17)
    (8, 32)
    """
    return next(most for most in _linear_tilings(dtype) if tokens <= most)


def linear_program(
    dtype: torch.dtype,
    block_size: int,
    *,
    forward: bool,
    tokens: int = MANY,
    clusters: bool = True,
) -> TiledProgram:
    """Return the program of `block_linear` for a number of tokens.

    It computes y = x W^T (forward) or dx = dy W. `clusters` says whether the device has clusters.
    """
    check_block_size(block_size)
    tiling = _linear_tilings(dtype)[most_tokens(dtype, tokens)][block_size]
    if not clusters:
        tiling = replace(tiling, splits=1)
    is_skinny = _has_mma(dtype) and tiling.tm <= _SKINNY_TILE
    return tiled_linear_program(dtype, block_size, tiling, forward=forward, is_skinny=is_skinny)


def tiled_linear_program(
    dtype: torch.dtype, block_size: int, tiling: Tiling, *, forward: bool, is_skinny: bool
) -> TiledProgram:
    """Return the program of `block_linear` with a tiling, by `linear_skinny.cu` or `linear.cu`."""
    source = "portable/linear_skinny.cu" if is_skinny else "portable/linear.cu"
    options = {"B": block_size, "FORWARD": int(forward)}
    options |= {"GROUPS_K": tiling.groups_k, "SPLITS": tiling.splits}
    return _program(source, dtype, tiling, options)


def _linear_tilings(dtype: torch.dtype) -> dict[int, dict[int, Tiling]]:
    return _LINEAR_MMA if _has_mma(dtype) else _LINEAR_SIMT


def dw_program(dtype: torch.dtype, block_size: int) -> TiledProgram:
    """Return the program of dW at present blocks: `block_linear_dw` and `add_partials`."""
    check_block_size(block_size)
    tiling = (_DW_MMA if _has_mma(dtype) else _DW_SIMT)[block_size]
    return _program("portable/dw.cu", dtype, tiling, {"B": block_size})


def norms_program(dtype: torch.dtype) -> TiledProgram:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    tiling = _NORMS_MMA if _has_mma(dtype) else _NORMS_SIMT
    return _program("portable/norms.cu", dtype, tiling, {})


def all_programs(*, clusters: bool) -> Iterator[TiledProgram]:
    """Yield every portable program for a device with or without clusters."""
    for dtype in DTYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            yield dw_program(dtype, block_size)
            for forward in (True, False):
                linear = functools.partial(
                    linear_program, dtype, block_size, forward=forward, clusters=clusters
                )
                yield from dict.fromkeys(linear(tokens=most) for most in _linear_tilings(dtype))


_TILES_PER_SM = 3
_MIN_SPLIT_TOKENS = 512


def split_k(tokens: int, tiles: int, tk: int, sm_count: int) -> tuple[int, int]:
    """Return the number of splits of the tokens for dW, and the tokens per split.

    With few tiles, splits keep the whole device busy; if splits have too few tokens, adding their
    results costs more than they gain.

    Args:
        tokens: number of tokens of the layer's input.
        tiles: number of tiles to compute.
        tk: tokens of a k-tile; the tokens per split are a multiple of it.
        sm_count: number of multiprocessors of the device.

    >>> split_k(8192, 1000, 64, 132), split_k(8192, 51, 64, 132), split_k(7, 1, 64, 132)
    ((1, 8192), (8, 1024), (1, 512))
    """
    wanted = -(-_TILES_PER_SM * sm_count // max(1, tiles))
    split_tokens = max(_MIN_SPLIT_TOKENS, -(-tokens // (wanted * tk)) * tk)
    return max(1, -(-tokens // split_tokens)), split_tokens


def _has_mma(dtype: torch.dtype) -> bool:
    return dtype.itemsize == 2


def _program(
    source: str,
    dtype: torch.dtype,
    tiling: Tiling,
    options: dict[str, int],
) -> TiledProgram:
    if dtype not in DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        raise TypeError(f"The input's dtype must be one of {names}; got {dtype}.")
    t, has_mma = tiling, _has_mma(dtype)
    defines = {
        "T": DTYPES[dtype],
        "PRODUCT": '"product_mma.cuh"' if has_mma else '"portable/product_simt.cuh"',
        "TM": t.tm,
        "TN": t.tn,
        "TK": t.tk,
        "STAGES": t.stages,
        "GROUPS_M": t.groups_m,
        "GROUPS_N": t.groups_n,
        **options,
    }
    return TiledProgram(source, compiler_options(defines), tiling)
