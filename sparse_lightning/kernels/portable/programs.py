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

from sparse_lightning.kernels import epilogues
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
        32: Tiling(64, 32, 64, 4, 2, 1, 2),
        64: Tiling(64, 64, 128, 3, 2, 2, 1),
        128: Tiling(64, 64, 128, 3, 2, 2, 1),
    },
    128: {
        16: Tiling(128, 16, 64, 3, 2, 1, 2),
        32: Tiling(128, 32, 64, 4, 2, 1, 2),
        64: Tiling(64, 64, 64, 3, 2, 1, 2),
        128: Tiling(64, 64, 64, 3, 2, 1, 2),
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
    16: {
        16: Tiling(16, 128, 16, 2, 1, 2),
        32: Tiling(32, 128, 16, 2, 1, 4),
        64: Tiling(32, 64, 16, 2, 1, 2),
        128: Tiling(32, 128, 16, 2, 1, 4),
    },
    64: {
        16: Tiling(16, 64, 32, 2, 1, 2),
        32: Tiling(32, 128, 32, 2, 1, 4),
        64: Tiling(64, 128, 32, 2, 1, 4),
        128: Tiling(64, 128, 64, 2, 1, 4),
    },
    MANY: {
        16: Tiling(16, 256, 64, 2, 1, 4),
        32: Tiling(32, 128, 64, 2, 1, 4),
        64: Tiling(64, 128, 64, 2, 1, 4),
        128: Tiling(128, 128, 32, 4, 2, 2),
    },
}
_DW_SIMT = {
    MANY: {
        16: Tiling(16, 128, 16, 2, 8, 32),
        32: Tiling(32, 128, 16, 2, 8, 32),
        64: Tiling(64, 128, 16, 2, 16, 16),
        128: Tiling(64, 128, 16, 2, 16, 16),
    },
}
_NORMS_MMA = Tiling(128, 128, 64, 2, 2, 4)
_NORMS_SIMT = Tiling(128, 128, 16, 2, 16, 16)

_CLUSTERS = (4, 2)  # sizes of clusters; eight thread blocks are slower than four
# The inputs that a thread block of a cluster has at least, on average. In `linear_skinny.cu`, all
# its warps load that many at once.
_MIN_SHARE_INPUTS, _MIN_SKINNY_SHARE_INPUTS = 64, 512
# The threads that run on a multiprocessor at once, each with about 128 registers, and the shared
# memory that it needs for each of its thread blocks.
_SM_THREADS, _RESERVED_BYTES = 512, 1024


def most_tokens(dtype: torch.dtype, tokens: int) -> int:
    """Return the most tokens for which `linear_program` is the same as for `tokens`.

    >>> most_tokens(torch.bfloat16, 1), most_tokens(torch.bfloat16, 17)
    (8, 32)
    """
    return _most_tokens(_linear_tilings(dtype), tokens)


def linear_program(
    dtype: torch.dtype,
    block_size: int,
    *,
    forward: bool,
    epilogue: int = 0,
    tokens: int = MANY,
    splits: int = 1,
    nm: bool = False,
) -> TiledProgram:
    """Return the program of `block_linear` for a number of tokens, and of thread blocks per tile.

    It computes y = x W^T (forward) or dx = dy W. `epilogue` is the `KIND` of an epilogue, 0 for
    none. With `nm`, it takes the kept weights of 2:4 sparse blocks; see `multiplies_kept_weights`.
    """
    check_block_size(block_size)
    tiling = replace(_linear_tiling(dtype, block_size, tokens), splits=splits)
    return tiled_linear_program(
        dtype, block_size, tiling, forward=forward, epilogue=epilogue, nm=nm
    )


def multiplies_kept_weights(dtype: torch.dtype, tokens: int) -> bool:
    """Return whether a program multiplies by 2:4 sparse blocks without expanding them first.

    >>> multiplies_kept_weights(torch.bfloat16, 16), multiplies_kept_weights(torch.float32, 16)
    (True, False)
    """
    return _has_mma(dtype) and tokens <= _SKINNY_TILE


def linear_splits(
    dtype: torch.dtype,
    block_size: int,
    tokens: int,
    capacity: int,
    out_blocks: int,
    sm_count: int,
    sm_shared_bytes: int,
) -> int:
    """Return how many thread blocks of a cluster share a tile of `block_linear`.

    Where tiles are few, as many as run at once on the device, if each has enough inputs. Clusters
    of four may take half of it: they need four free multiprocessors that are close together.

    Args:
        dtype: dtype of the operands.
        block_size: block size of the layer.
        tokens: number of tokens of the input.
        capacity: the most blocks that can be present; only the device knows their number.
        out_blocks: number of output blocks.
        sm_count: number of multiprocessors of the device.
        sm_shared_bytes: shared memory of a multiprocessor.

    >>> h200 = {"sm_count": 132, "sm_shared_bytes": 228 << 10}
    >>> [linear_splits(torch.bfloat16, 64, 1, 32 * n, n, **h200) for n in (128, 64, 16)]
    [1, 2, 4]
    >>> [linear_splits(torch.bfloat16, 64, 64, 8 * n, n, **h200) for n in (256, 128, 32)]
    [1, 2, 4]
    """
    if dtype == torch.float64:
        return 1  # shares are added in fp32
    tiling = _linear_tiling(dtype, block_size, tokens)
    least = _MIN_SKINNY_SHARE_INPUTS if _is_skinny(dtype, tiling) else _MIN_SHARE_INPUTS
    most = capacity * block_size // (out_blocks * least)
    tiles = -(-tokens // tiling.tm) * out_blocks * (block_size // tiling.tn)
    resident = sm_count * min(
        sm_shared_bytes // (linear_shared_bytes(dtype, tiling) + _RESERVED_BYTES),
        _SM_THREADS // _linear_threads(dtype, tiling),
    )
    return next((n for n in _CLUSTERS if n <= most and n * n * tiles <= 2 * resident), 1)


def linear_shared_bytes(dtype: torch.dtype, tiling: Tiling) -> int:
    """Return the shared memory of a thread block of `block_linear`."""
    t, sum_bytes = tiling, max(4, dtype.itemsize)
    if _is_skinny(dtype, tiling):
        return t.groups_k * t.tm * (t.tn + 4) * sum_bytes
    return max(t.stages * (t.tm + t.tn) * t.tk * dtype.itemsize, t.tm * t.tn * sum_bytes)


def _linear_threads(dtype: torch.dtype, tiling: Tiling) -> int:
    groups = tiling.groups_m * tiling.groups_n * tiling.groups_k
    return 32 * groups if _has_mma(dtype) else groups


def _linear_tiling(dtype: torch.dtype, block_size: int, tokens: int) -> Tiling:
    return _linear_tilings(dtype)[most_tokens(dtype, tokens)][block_size]


def _is_skinny(dtype: torch.dtype, tiling: Tiling) -> bool:
    return _has_mma(dtype) and tiling.tm <= _SKINNY_TILE


def tiled_linear_program(
    dtype: torch.dtype,
    block_size: int,
    tiling: Tiling,
    *,
    forward: bool,
    epilogue: int = 0,
    nm: bool = False,
) -> TiledProgram:
    """Return the program of `block_linear` with a tiling."""
    skinny = "_skinny" if _is_skinny(dtype, tiling) else ""
    source = f"portable/linear{skinny}.cu"
    options = {"B": block_size, "FORWARD": int(forward), "EPILOGUE": epilogue}
    options |= {"GROUPS_K": tiling.groups_k, "SPLITS": tiling.splits}
    if skinny:
        options["NM"] = int(nm)
    return _program(source, dtype, tiling, options)


def _linear_tilings(dtype: torch.dtype) -> dict[int, dict[int, Tiling]]:
    return _LINEAR_MMA if _has_mma(dtype) else _LINEAR_SIMT


def most_dw_tokens(dtype: torch.dtype, tokens: int) -> int:
    """Return the most tokens for which `dw_program` is the same as for `tokens`."""
    return _most_tokens(_dw_tilings(dtype), tokens)


def dw_program(dtype: torch.dtype, block_size: int, tokens: int = MANY) -> TiledProgram:
    """Return the program of dW at present blocks: `block_linear_dw` and `add_partials`."""
    check_block_size(block_size)
    tiling = _dw_tilings(dtype)[most_dw_tokens(dtype, tokens)][block_size]
    return tiled_dw_program(dtype, block_size, tiling)


def tiled_dw_program(dtype: torch.dtype, block_size: int, tiling: Tiling) -> TiledProgram:
    """Return the program of dW with a tiling."""
    return _program("portable/dw.cu", dtype, tiling, {"B": block_size})


def _dw_tilings(dtype: torch.dtype) -> dict[int, dict[int, Tiling]]:
    return _DW_MMA if _has_mma(dtype) else _DW_SIMT


def _most_tokens(tilings: dict[int, dict[int, Tiling]], tokens: int) -> int:
    return next(most for most in tilings if tokens <= most)


def norms_program(dtype: torch.dtype) -> TiledProgram:
    """Return the program of the block norms of the dense gradient: `block_norms`."""
    tiling = _NORMS_MMA if _has_mma(dtype) else _NORMS_SIMT
    return _program("portable/norms.cu", dtype, tiling, {})


def all_programs(*, clusters: bool) -> Iterator[TiledProgram]:
    """Yield every portable program, with `clusters` also for two thread blocks that share a tile.

    Those for more differ in a constant, and those with an epilogue from those without likewise.
    """
    for dtype in DTYPES:
        yield norms_program(dtype)
        for block_size in BLOCK_SIZES:
            for most in _dw_tilings(dtype):
                yield dw_program(dtype, block_size, most)
            for forward in True, False:
                linear = functools.partial(linear_program, dtype, block_size, forward=forward)
                variants = [(0, 1)]  # epilogue, splits
                if clusters and dtype != torch.float64:
                    variants += [(0, 2)]
                if _has_mma(dtype):
                    variants += [(kind, 1) for kind in epilogues.kinds(forward)[1:]]
                for kind, splits in variants:
                    yield from dict.fromkeys(
                        linear(epilogue=kind, tokens=most, splits=splits)
                        for most in _linear_tilings(dtype)
                    )
                kept = [most for most in _LINEAR_MMA if multiplies_kept_weights(dtype, most)]
                yield from (linear(tokens=most, nm=True) for most in kept)


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
