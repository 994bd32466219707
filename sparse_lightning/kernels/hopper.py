"""The kernels for Hopper: grids, arguments and launch of each product; see `ops` for shapes.

Operands are contiguous, aligned to 16 bytes, of one half-precision dtype, and on the device of
index `device`; there is a token and a slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_lightning.kernels import hopper_programs as programs
from sparse_lightning.kernels.launch import Kernel, build_once
from sparse_lightning.kernels.programs import TiledProgram
from sparse_lightning.kernels.tensor_maps import tensor_map


def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    slots: Tensor,
    y: Tensor,
    device: int,
    *,
    forward: bool,
) -> None:
    """Fill `y` with x W^T + bias, or with x W (not `forward`); `slots` is W's in both cases."""
    capacity, block_size, _ = values.shape
    kernel = _linear_kernel(x.dtype, block_size, forward, device)
    in_features, out_features = x.shape[-1], y.shape[-1]
    tokens = x.numel() // in_features
    tiling, cluster = kernel.program.tiling, programs.CLUSTER
    x_box, block_box = programs.linear_boxes(tiling, block_size)
    token_tiles = -(-tokens // (tiling.tm * cluster))
    output_tiles = -(-out_features // tiling.tn)
    clusters = min(token_tiles * output_tiles, kernel.processors // cluster)
    row, col = slots.stride()
    kernel.launch(
        clusters * cluster,
        1,
        tensor_map(x.data_ptr(), x.dtype, (tokens, in_features), x_box),
        tensor_map(values.data_ptr(), x.dtype, (capacity, block_size, block_size), block_box),
        0 if bias is None else bias.data_ptr(),
        slots.data_ptr(),
        y.data_ptr(),
        *((row, col) if forward else (col, row)),
        out_features // block_size,
        in_features // block_size,
        tokens,
        token_tiles,
        output_tiles,
    )


def linear_dw(
    dy: Tensor,
    x: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    dw: Tensor,
    device: int,
) -> None:
    """Fill `dw` with the present blocks of dy^T x, and zeros in empty slots."""
    capacity, block_size, _ = dw.shape
    kernel, add = _dw_kernels(x.dtype, block_size, device)
    tokens = x.numel() // x.shape[-1]
    workers, out_blocks = kernel.processors, row_offsets.shape[0] - 1
    partial = x.new_empty(workers * programs.PARTIAL_FLOATS_A_WORKER, dtype=torch.float32)
    arguments = (
        *_strip_maps(kernel, dy, x),
        dw.data_ptr(),
        partial.data_ptr(),
        row_entries.data_ptr(),
        row_offsets.data_ptr() + row_offsets.element_size() * out_blocks,  # present blocks
        coords.data_ptr(),
        tokens,
        capacity,
        programs.blocks_a_tile(capacity, out_blocks, block_size, workers),
        workers,
    )
    kernel.launch(workers, 1, *arguments)
    # Fewer tiles than workers are split; a thread block adds up each piece of one.
    add.launch(workers, programs.PIECES_OF_A_TILE, *arguments)


def add_norms(dy: Tensor, x: Tensor, armed: Tensor, scores: Tensor, device: int) -> None:
    """Add the squared norm of each block of dy^T x to `scores`, if armed."""
    kernel = _norms_kernel(x.dtype, device)
    out_features, in_features = dy.shape[-1], x.shape[-1]
    kernel.launch(
        kernel.processors,
        1,
        *_strip_maps(kernel, dy, x),
        armed.data_ptr(),
        scores.data_ptr(),
        x.numel() // in_features,
        out_features,
        in_features,
        in_features // scores.shape[1],
    )


def _strip_maps(kernel: Kernel[TiledProgram], dy: Tensor, x: Tensor) -> tuple[bytes, bytes]:
    box = (kernel.program.tiling.tk, programs.STRIP)
    tokens = x.numel() // x.shape[-1]
    return (
        tensor_map(dy.data_ptr(), dy.dtype, (tokens, dy.shape[-1]), box),
        tensor_map(x.data_ptr(), x.dtype, (tokens, x.shape[-1]), box),
    )


@build_once
def _linear_kernel(
    dtype: torch.dtype, block_size: int, forward: bool, device: int
) -> Kernel[TiledProgram]:
    program = programs.linear_program(dtype, block_size, forward=forward)
    return Kernel(program, "block_linear", "128s128sPPPiiiiqii", device)


@build_once
def _dw_kernels(
    dtype: torch.dtype, block_size: int, device: int
) -> tuple[Kernel[TiledProgram], Kernel[TiledProgram]]:
    program, layout = programs.dw_program(dtype, block_size), "128s128sPPPPPqiii"
    return (
        Kernel(program, "block_linear_dw", layout, device),
        Kernel(program, "add_parts", layout, device, threads=128),
    )


@build_once
def _norms_kernel(dtype: torch.dtype, device: int) -> Kernel[TiledProgram]:
    return Kernel(programs.norms_program(dtype), "block_norms", "128s128sPPqiii", device)
