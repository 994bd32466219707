"""The kernels for Hopper: grid, arguments and launch of each product; see `ops` for shapes.

Operands are contiguous, aligned to 16 bytes, of one half-precision dtype, and on the device of
index `device`; there is at least one token and one slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_lightning.kernels import epilogues
from sparse_lightning.kernels.epilogues import STORE, Epilogue
from sparse_lightning.kernels.hopper import programs
from sparse_lightning.kernels.hopper.tensor_maps import tensor_map
from sparse_lightning.kernels.launch import Kernel, build_once, row_pitch, sm_count
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.programs import Program, TiledProgram
from sparse_lightning.topology import Indices


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
) -> None:
    """Fill `y` with x W^T + bias if `forward`, else with x W.

    An epilogue may change the results; `extra` are the tensors that it stores besides y. All its
    tensors are contiguous like y.
    """
    block_size = values.shape[1]
    in_features, out_features = x.shape[-1], y.shape[-1]
    tokens = x.numel() // in_features
    tile = programs.linear_tile(block_size, tokens, out_features, sm_count(device))
    kernel = _linear_kernel(x.dtype, block_size, forward, epilogue.KIND, tile, device)
    tiling = kernel.program.tiling
    if block_size < programs.STRIP:
        cluster, x_box = 1, (tiling.tm, tiling.tk)
        blocks: int | bytes = values.data_ptr()
    else:
        cluster, x_box = programs.CLUSTER, (min(block_size, tiling.tm), tiling.tk)
        blocks = tensor_map(values.data_ptr(), x.dtype, tuple(values.shape), (1, 64, 64))
    token_tiles = -(-tokens // (tiling.tm * cluster))
    output_tiles = -(-out_features // tiling.tn)
    clusters = min(token_tiles * output_tiles, kernel.sm_count // cluster)
    row, col = lists.slots.stride()
    kernel.launch(
        clusters * cluster,
        1,
        tensor_map(x.data_ptr(), x.dtype, (tokens, in_features), x_box),
        blocks,
        0 if bias is None else bias.data_ptr(),
        lists.slots.data_ptr(),
        y.data_ptr(),
        *((row, col) if forward else (col, row)),
        out_features // block_size,
        in_features // block_size,
        tokens,
        token_tiles,
        output_tiles,
        *epilogues.launch_arguments(epilogue, extra),
    )


def linear_dw(dy: Tensor, x: Tensor, indices: Indices, dw: Tensor, device: int) -> None:
    """Fill `dw` with the present blocks of dy^T x, and zeros in empty slots."""
    capacity, block_size, _ = dw.shape
    tokens, (out_blocks, in_blocks) = x.numel() // x.shape[-1], indices.slots.shape
    if block_size < programs.STRIP:
        bands = programs.dw_bands(capacity, (out_blocks, in_blocks), block_size, sm_count(device))
        kernel = _narrow_dw_kernel(x.dtype, block_size, bands.split_k, device)
        kernel.launch(
            bands.clusters * bands.split_k,
            1,
            *_strip_maps(dy, x, programs.NARROW_TK, programs.NARROW_DW[block_size].x_width),
            dw.data_ptr(),
            indices.slots.data_ptr(),
            indices.row_entries.data_ptr(),
            indices.row_offsets.data_ptr(),
            indices.coords.data_ptr(),
            tokens,
            capacity,
            out_blocks,
            in_blocks,
            bands.rows,
            bands.cost,
            bands.groups,
        )
        return
    split = programs.dw_split(capacity, out_blocks, block_size, tokens, sm_count(device))
    kernel = _wide_dw_kernel(x.dtype, block_size, split.split_k, split.multicast, device)
    kernel.launch(
        split.clusters * split.split_k * split.multicast,
        1,
        *_strip_maps(dy, x, programs.TK, programs.STRIP),
        dw.data_ptr(),
        indices.row_entries.data_ptr(),
        indices.row_offsets.data_ptr(),
        indices.coords.data_ptr(),
        tokens,
        capacity,
        out_blocks,
    )


def norms(dy: Tensor, x: Tensor, armed: Tensor, out: Tensor, device: int) -> None:
    """Fill `out` with the squared norm of each block of dy^T x, or with zeros if not armed.

    The rows of `dy` and `x` may have any pitch that is a multiple of 16 bytes.
    """
    kernel = norms_kernel(x.dtype, device)
    out_features, in_features = dy.shape[-1], x.shape[-1]
    kernel.launch(
        kernel.sm_count,
        1,
        *_strip_maps(dy, x, programs.TK, programs.STRIP, (row_pitch(dy), row_pitch(x))),
        armed.data_ptr(),
        out.data_ptr(),
        x.shape[0],
        out_features,
        in_features,
        in_features // out.shape[1],
    )


def _strip_maps(
    dy: Tensor,
    x: Tensor,
    tk: int,
    x_width: int,
    pitches: tuple[int | None, int | None] = (None, None),
) -> tuple[bytes, bytes]:
    tokens = x.numel() // x.shape[-1]
    dy_shape, x_shape = (tokens, dy.shape[-1]), (tokens, x.shape[-1])
    return (
        tensor_map(dy.data_ptr(), dy.dtype, dy_shape, (tk, programs.STRIP), pitches[0]),
        tensor_map(x.data_ptr(), x.dtype, x_shape, (tk, x_width), pitches[1]),
    )


@build_once
def _linear_kernel(
    dtype: torch.dtype,
    block_size: int,
    forward: bool,
    epilogue: int,
    tile: tuple[int, int],
    device: int,
) -> Kernel[TiledProgram]:
    program = programs.linear_program(
        dtype, block_size, forward=forward, epilogue=epilogue, tile=tile
    )
    blocks = "P" if block_size < programs.STRIP else "128s"
    return Kernel(program, "block_linear", f"128s{blocks}PPPiiiiqii{epilogues.LAYOUT}", device)


@build_once
def _wide_dw_kernel(
    dtype: torch.dtype, block_size: int, split_k: int, multicast: int, device: int
) -> Kernel[Program]:
    program = programs.dw_program(dtype, block_size, split_k, multicast)
    return Kernel(program, "block_linear_dw", "128s128sPPPPqii", device)


@build_once
def _narrow_dw_kernel(
    dtype: torch.dtype, block_size: int, split_k: int, device: int
) -> Kernel[Program]:
    program = programs.dw_program(dtype, block_size, split_k)
    return Kernel(program, "block_linear_dw", "128s128sPPPPPqiiiiii", device)


@build_once
def norms_kernel(dtype: torch.dtype, device: int) -> Kernel[Program]:
    """Return the loaded kernel of `norms`."""
    return Kernel(programs.norms_program(dtype), "block_norms", "128s128sPPqiii", device)
