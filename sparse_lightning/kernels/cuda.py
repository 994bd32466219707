"""The CUDA backend: checks, kernel choice and launch of each op; see `ops` for shapes.

Nothing here waits for the device, and nothing depends on the number of present blocks, which only
the device knows: grids are made for the capacity. So a step can be captured in a CUDA graph, once
each of its kernels has run before and is loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_lightning.kernels.launch import Kernel, build_once
from sparse_lightning.kernels.programs import (
    dw_program,
    linear_program,
    norms_program,
    token_parts,
)

_ADD_THREADS = 256


def block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    armed: Tensor,
    scores: Tensor,
) -> Tensor:
    """Return x W^T + bias; see `ops` for shapes."""
    n_in = col_offsets.shape[0] - 1
    return _multiply(x, values, bias, row_offsets, row_entries, n_in, forward=True)


def block_linear_dx(dy: Tensor, values: Tensor, col_offsets: Tensor, col_entries: Tensor) -> Tensor:
    """Return dy W; see `ops` for shapes."""
    n_in = dy.shape[-1] // values.shape[1]
    return _multiply(dy, values, None, col_offsets, col_entries, n_in, forward=False)


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    entries: Tensor,
    n_in: int,
    *,
    forward: bool,
) -> Tensor:
    block_size = values.shape[1]
    shape = x.shape
    in_features = n_in * block_size
    if shape[-1] != in_features:
        raise ValueError(f"The input must have {in_features} features; got {list(shape)}.")
    device = _device_of(x, values, offsets, entries, bias)
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"The input must have the dtype of values and bias, {values.dtype}; got {x.dtype}."
        )
    n_out = offsets.shape[0] - 1
    y = x.new_empty(*shape[:-1], n_out * block_size)
    tokens = x.numel() // in_features
    if tokens == 0:
        return y
    x, values = _packed(x), _packed(values)
    bias = None if bias is None else bias.contiguous()
    kernel = _linear_kernel(x.dtype, block_size, forward, device)
    kernel.launch(
        -(-tokens // kernel.program.tiling.tm) * n_out,
        1,
        x.data_ptr(),
        values.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        offsets.data_ptr(),
        entries.data_ptr(),
        tokens,
        in_features,
        n_out,
    )
    return y


def block_linear_dw(
    dy: Tensor,
    x: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    block_size: int,
) -> Tensor:
    """Return the present blocks of dy^T x, zeros in empty slots; see `ops` for shapes."""
    device = _device_of(x, dy, row_offsets, row_entries, coords)
    capacity, out_blocks = coords.shape[0], row_offsets.shape[0] - 1
    tokens, in_features = _check_pair(dy, x, out_blocks * block_size)
    dw = x.new_empty(capacity, block_size, block_size)
    if capacity == 0:
        return dw
    dy, x = _packed(dy), _packed(x)
    kernel, add = _dw_kernels(x.dtype, block_size, device)
    tiling = kernel.program.tiling
    row_tiles, group = block_size // tiling.tm, tiling.tn // block_size
    groups = -(-(in_features // block_size) // group)
    tiles = -(-capacity // group) * row_tiles
    parts, tokens_a_part = token_parts(tokens, tiles, tiling.tk, kernel.processors)
    partial = None
    if parts > 1:
        sums = torch.promote_types(x.dtype, torch.float32)
        partial = x.new_empty(parts, *dw.shape, dtype=sums)
    kernel.launch(
        (out_blocks + 1) * groups * row_tiles,
        parts,
        dy.data_ptr(),
        x.data_ptr(),
        dw.data_ptr(),
        0 if partial is None else partial.data_ptr(),
        row_offsets.data_ptr(),
        row_entries.data_ptr(),
        tokens,
        tokens_a_part,
        out_blocks,
        in_features,
        capacity,
        groups,
    )
    if partial is not None:
        add.launch(
            capacity, 1, partial.data_ptr(), dw.data_ptr(), coords.data_ptr(), capacity, parts
        )
    return dw


def block_norms_(dy: Tensor, x: Tensor, armed: Tensor, scores: Tensor) -> None:
    """Add the squared norm of each block of dy^T x to `scores`, if armed; see `ops` for shapes."""
    device = _device_of(x, dy, armed, scores)
    out_blocks, in_blocks = scores.shape
    block_size = x.shape[-1] // in_blocks
    tokens, in_features = _check_pair(dy, x, out_blocks * block_size)
    if tokens == 0:
        return
    dy, x = _packed(dy), _packed(x)
    kernel = _norms_kernel(x.dtype, device)
    tiling = kernel.program.tiling
    out_features = out_blocks * block_size
    tiles = -(-out_features // tiling.tm) * -(-in_features // tiling.tn)
    kernel.launch(
        min(tiles, 2 * kernel.processors),
        1,
        dy.data_ptr(),
        x.data_ptr(),
        armed.data_ptr(),
        scores.data_ptr(),
        tokens,
        out_features,
        in_features,
        block_size,
    )


@build_once
def _linear_kernel(dtype: torch.dtype, block_size: int, forward: bool, device: int) -> Kernel:
    program = linear_program(dtype, block_size, forward=forward)
    return Kernel(program, "block_linear", "PPPPPPqii", device)


@build_once
def _dw_kernels(dtype: torch.dtype, block_size: int, device: int) -> tuple[Kernel, Kernel]:
    program = dw_program(dtype, block_size)
    return (
        Kernel(program, "block_linear_dw", "PPPPPPqqiiii", device),
        Kernel(program, "add_partials", "PPPii", device, _ADD_THREADS),
    )


@build_once
def _norms_kernel(dtype: torch.dtype, device: int) -> Kernel:
    return Kernel(norms_program(dtype), "block_norms", "PPPPqiii", device)


def _device_of(first: Tensor, *others: Tensor | None) -> int:
    """Return the index of the CUDA device that all tensors are on."""
    device = first.get_device()
    for tensor in others:
        if tensor is not None and tensor.get_device() != device:
            raise RuntimeError(
                "The input and the layer must be on the same device; got "
                f"{first.device} and {tensor.device}. Move one of them with .to(device)."
            )
    return device


def _check_pair(dy: Tensor, x: Tensor, out_features: int) -> tuple[int, int]:
    """Return tokens and in_features of the operands of a weight gradient."""
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have the dtype of x, {x.dtype}; got {dy.dtype}.")
    if dy.shape[-1] != out_features or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must have shape {[*x.shape[:-1], out_features]}, as x and the layer say; "
            f"got {list(dy.shape)}."
        )
    in_features = x.shape[-1]
    return x.numel() // in_features, in_features


def _packed(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, contiguous and aligned to the 16 bytes that kernels load."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()
