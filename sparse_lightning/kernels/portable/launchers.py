"""The portable kernels: grid, arguments and launch of each product; see `ops` for shapes.

Operands are contiguous, aligned to 16 bytes, of one dtype, and on the device of index `device`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from sparse_lightning.kernels import epilogues
from sparse_lightning.kernels.epilogues import STORE, Epilogue
from sparse_lightning.kernels.launch import (
    Kernel,
    build_once,
    has_clusters,
    row_pitch,
    sm_count,
    sm_shared_bytes,
)
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.portable.programs import (
    dw_program,
    linear_program,
    linear_splits,
    most_dw_tokens,
    most_tokens,
    norms_program,
    split_k,
)
from sparse_lightning.kernels.programs import TiledProgram
from sparse_lightning.topology import Indices

LINEAR_LAYOUT = f"PPPPPPPqii{epilogues.LAYOUT}"  # of the argument that `launch_linear` packs


def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    y: Tensor,
    device: int,
    *,
    forward: bool,
    epilogue: Epilogue = STORE,
    extra: tuple[Tensor, ...] = (),
    positions: Tensor | None = None,
) -> None:
    """Fill `y` with x W^T + bias if `forward`, else with x W.

    For two-byte dtypes, an epilogue may change the results; `extra` are the tensors that it stores
    besides y. All its tensors are contiguous like y. With `positions`, `values` has the kept
    weights of 2:4 sparse blocks, where `multiplies_kept_weights`.
    """
    (capacity, block_size, _), n_out = values.shape, lists.offsets.shape[0] - 1
    tokens = x.numel() // x.shape[-1]
    variant = linear_variant(x.dtype, block_size, tokens, capacity, n_out, device)
    has_positions = positions is not None
    kernel = _linear_kernel(
        x.dtype, block_size, forward, epilogue.KIND, *variant, has_positions, device
    )
    launch_linear(kernel, x, values, bias, lists, y, epilogue, extra, positions)


def launch_linear(
    kernel: Kernel[TiledProgram],
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    y: Tensor,
    epilogue: Epilogue = STORE,
    extra: tuple[Tensor, ...] = (),
    positions: Tensor | None = None,
) -> None:
    """Launch a kernel of `linear`."""
    block_size, n_out, in_features = values.shape[1], lists.offsets.shape[0] - 1, x.shape[-1]
    tokens = x.numel() // in_features
    tiling = kernel.program.tiling
    kernel.launch(
        -(-tokens // tiling.tm) * n_out * (block_size // tiling.tn) * tiling.splits,
        1,
        x.data_ptr(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        lists.offsets.data_ptr(),
        lists.entries.data_ptr(),
        0 if positions is None else positions.data_ptr(),
        tokens,
        in_features,
        n_out,
        *epilogues.launch_arguments(epilogue, extra),
    )


def linear_dw(dy: Tensor, x: Tensor, indices: Indices, dw: Tensor, device: int) -> None:
    """Fill `dw` with the present blocks of dy^T x, and zeros in empty slots."""
    most = most_dw_tokens(x.dtype, x.numel() // x.shape[-1])
    kernel, add = _dw_kernels(x.dtype, dw.shape[1], most, device)
    launch_dw(kernel, add, dy, x, indices, dw)


def launch_dw(
    kernel: Kernel[TiledProgram],
    add: Kernel[TiledProgram],
    dy: Tensor,
    x: Tensor,
    indices: Indices,
    dw: Tensor,
) -> None:
    """Launch the kernels of `linear_dw`; `add` only where there are several splits."""
    capacity, block_size, _ = dw.shape
    out_blocks, in_features = indices.slots.shape[0], x.shape[-1]
    tokens = x.numel() // in_features
    tiling = kernel.program.tiling
    row_tiles, group = block_size // tiling.tm, tiling.tn // block_size
    groups = -(-(in_features // block_size) // group)
    tiles = -(-capacity // group) * row_tiles
    splits, split_tokens = split_k(tokens, tiles, tiling.tk, kernel.sm_count)
    partial = None
    if splits > 1:
        accumulated = torch.promote_types(x.dtype, torch.float32)
        partial = x.new_empty(splits, *dw.shape, dtype=accumulated)
    kernel.launch(
        (out_blocks + 1) * groups * row_tiles,
        splits,
        dy.data_ptr(),
        x.data_ptr(),
        dw.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        indices.row_offsets.data_ptr(),
        indices.row_entries.data_ptr(),
        tokens,
        split_tokens,
        out_blocks,
        in_features,
        capacity,
        groups,
    )
    if partial is not None:
        coords = indices.coords.data_ptr()
        add.launch(capacity, 1, partial.data_ptr(), dw.data_ptr(), coords, capacity, splits)


def norms(dy: Tensor, x: Tensor, armed: Tensor, out: Tensor, device: int) -> None:
    """Fill `out` with the squared norm of each block of dy^T x, or with zeros if not armed.

    The rows of `dy` and `x` may have any pitch that is a multiple of 16 bytes.
    """
    out_features, in_features = dy.shape[-1], x.shape[-1]
    kernel = norms_kernel(x.dtype, device)
    tiling = kernel.program.tiling
    tiles = -(-out_features // tiling.tm) * -(-in_features // tiling.tn)
    kernel.launch(
        min(tiles, 2 * kernel.sm_count),
        1,
        dy.data_ptr(),
        x.data_ptr(),
        armed.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        row_pitch(dy),
        row_pitch(x),
        out_features,
        in_features,
        in_features // out.shape[1],
    )


@functools.lru_cache(maxsize=4096)  # called at every product, for inputs of any length
def linear_variant(
    dtype: torch.dtype, block_size: int, tokens: int, capacity: int, out_blocks: int, device: int
) -> tuple[int, int]:
    """Return the most tokens and the splits of the program for a product."""
    splits = 1
    if has_clusters(device):
        sizes = sm_count(device), sm_shared_bytes(device)
        splits = linear_splits(dtype, block_size, tokens, capacity, out_blocks, *sizes)
    return most_tokens(dtype, tokens), splits


@build_once
def _linear_kernel(
    dtype: torch.dtype,
    block_size: int,
    forward: bool,
    epilogue: int,
    tokens: int,
    splits: int,
    nm: bool,
    device: int,
) -> Kernel[TiledProgram]:
    program = linear_program(
        dtype,
        block_size,
        forward=forward,
        epilogue=epilogue,
        tokens=tokens,
        splits=splits,
        nm=nm,
    )
    return Kernel(program, "block_linear", LINEAR_LAYOUT, device)


@build_once
def _dw_kernels(
    dtype: torch.dtype, block_size: int, tokens: int, device: int
) -> tuple[Kernel[TiledProgram], Kernel[TiledProgram]]:
    return dw_kernels(dw_program(dtype, block_size, tokens), device)


def dw_kernels(
    program: TiledProgram, device: int
) -> tuple[Kernel[TiledProgram], Kernel[TiledProgram]]:
    """Load the kernels that `launch_dw` takes."""
    return (
        Kernel(program, "block_linear_dw", "PPPPPPqqiiii", device),
        Kernel(program, "add_partials", "PPPii", device),
    )


@build_once
def norms_kernel(dtype: torch.dtype, device: int) -> Kernel[TiledProgram]:
    """Return the loaded kernel of `norms`."""
    return Kernel(norms_program(dtype), "block_norms", "PPPPqiiiii", device)
