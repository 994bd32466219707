"""The programs for every device and dtype: pure functions of dtypes and ints.

Tilings were tuned on an H100, and fit into the 99 KiB of shared memory that a thread block can
have on the smallest supported devices.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sparse_lightning.kernels.programs import DTYPES, TiledProgram, Tiling, compiler_options
from sparse_lightning.topology import BLOCK_SIZES, check_block_size

# By block size. Tensor cores for two-byte dtypes, SIMT arithmetic for fp32 and fp64.
_LINEAR_MMA = {
    16: Tiling(256, 16, 64, 2, 4, 1),
    32: Tiling(256, 32, 64, 2, 4, 1),
    64: Tiling(128, 64, 64, 2, 2, 2),
    128: Tiling(128, 128, 64, 2, 2, 4),
}
_LINEAR_SIMT = {
    16: Tiling(256, 16, 16, 2, 64, 4),
    32: Tiling(128, 32, 16, 2, 32, 8),
    64: Tiling(128, 64, 16, 2, 16, 16),
    128: Tiling(64, 128, 16, 2, 16, 16),
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


def linear_program(dtype: torch.dtype, block_size: int, *, forward: bool) -> TiledProgram:
    """Return the program of `block_linear`: y = x W^T (forward) or dx = dy W."""
    check_block_size(block_size)
    tiling = (_LINEAR_MMA if _has_mma(dtype) else _LINEAR_SIMT)[block_size]
    options = {"B": block_size, "FORWARD": int(forward)}
    return _program("portable/linear.cu", dtype, tiling, options)


def dw_program(dtype: torch.dtype, block_size: int) -> TiledProgram:
    """Return the program of dW at present blocks: `block_linear_dw` and `add_partials`."""
    check_block_size(block_size)
    tiling = (_DW_MMA if _has_mma(dtype) else _DW_SIMT)[block_size]
    return _program("portable/dw.cu", dtype, tiling, {"B": block_size})


def norms_program(dtype: torch.dtype) -> TiledProgram:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    tiling = _NORMS_MMA if _has_mma(dtype) else _NORMS_SIMT
    return _program("portable/norms.cu", dtype, tiling, {})


def all_programs() -> Iterator[TiledProgram]:
    """Yield every portable program."""
    for dtype in DTYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            yield linear_program(dtype, block_size, forward=True)
            yield linear_program(dtype, block_size, forward=False)
            yield dw_program(dtype, block_size)


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
