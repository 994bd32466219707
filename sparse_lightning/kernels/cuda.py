"""The CUDA backend: checks of each op, and who computes it; see `ops` for shapes.

Nothing here waits for the device, and nothing depends on the number of present blocks, which only
the device knows: grids are made for the capacity. So a step can be captured in a CUDA graph, once
one has run before, which loads its kernels.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from sparse_lightning.kernels import activations, choice, densified
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.launch import packed, row_pitch
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.topology import block_grid

_MOST_PITCH = 2**31 - 1  # kernels count it in 32 bits


def block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    slots: Tensor,
    norms: Tensor | None,
    armed: Tensor | None,
    token_stride: int,
) -> Tensor:
    """Return x W^T + bias; see `ops` for shapes."""
    return _multiply(x, values, bias, row_offsets, row_entries, slots, forward=True)


def block_linear_dx(
    dy: Tensor,
    values: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    slots: Tensor,
    norms: Tensor | None,
    armed: Tensor | None,
    token_stride: int,
) -> Tensor:
    """Return dy W; see `ops` for shapes."""
    return _multiply(dy, values, None, col_offsets, col_entries, slots, forward=False)


def block_linear_act(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    slots: Tensor,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """Return h = x W^T + bias and its activation; see `ops` for shapes."""
    activations.check(activation)
    a = x.new_empty(*x.shape[:-1], slots.shape[0] * values.shape[1])
    h = _multiply(
        x,
        values,
        bias,
        row_offsets,
        row_entries,
        slots,
        forward=True,
        other=a,
        activation=activation,
    )
    return h, a


def block_linear_dh(
    dy: Tensor,
    values: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    slots: Tensor,
    h: Tensor,
    activation: str,
) -> Tensor:
    """Return the gradient of h, if dy is that of the activation of h times W^T; see `ops`."""
    activations.check(activation)
    shape = [*dy.shape[:-1], slots.shape[1] * values.shape[1]]
    if list(h.shape) != shape or h.dtype != dy.dtype:
        raise ValueError(
            f"`h` must be {shape} of {dy.dtype}, as dy and the layer say; "
            f"got {list(h.shape)} of {h.dtype}."
        )
    _device_of(dy, h)
    h = packed(h)
    return _multiply(
        dy,
        values,
        None,
        col_offsets,
        col_entries,
        slots,
        forward=False,
        other=h,
        activation=activation,
    )


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    entries: Tensor,
    slots: Tensor,
    *,
    forward: bool,
    other: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Return the product; with an activation, `other` is its output, to fill, or its input."""
    capacity, block_size, _ = values.shape
    shape = x.shape
    n_out, n_in = slots.shape if forward else reversed(slots.shape)
    in_features, out_features = n_in * block_size, n_out * block_size
    if shape[-1] != in_features:
        raise ValueError(f"The input must have {in_features} features; got {list(shape)}.")
    device = _device_of(x, values, offsets, entries, slots, bias)
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"The input must have the dtype of values and bias, {values.dtype}; got {x.dtype}."
        )
    y = x.new_empty(*shape[:-1], out_features)
    if x.numel() == 0:
        return y
    x, values = packed(x), packed(values)
    bias = None if bias is None else bias.contiguous()
    op, tokens = "fwd" if forward else "dx", x.numel() // in_features
    grid = (slots.shape[0], slots.shape[1])
    kind = choice.choose(op, x.dtype, block_size, capacity, grid, tokens, device)
    if kind == choice.HOPPER:
        hopper.linear(
            x, values, bias, slots, y, device, forward=forward, other=other, activation=activation
        )
        return y
    if kind == choice.DENSE:
        densified.linear(x, values, bias, slots, y, device, forward=forward)
    else:
        portable.linear(x, values, bias, offsets, entries, y, device, forward=forward)
    if activation is not None and other is not None:
        if not forward:
            return activations.go_back(y, other, activation)
        other.copy_(activations.activate(y, activation))
    return y


def block_linear_dw(
    dy: Tensor,
    x: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    col_entries: Tensor,
    slots: Tensor,
) -> Tensor:
    """Return the present blocks of dy^T x, zeros in empty slots; see `ops` for shapes."""
    device = _device_of(x, dy, row_offsets, row_entries, coords, slots)
    capacity, (out_blocks, in_blocks) = coords.shape[0], slots.shape
    block_size = x.shape[-1] // in_blocks
    _check_pair(dy, x, out_blocks * block_size)
    dw = x.new_empty(capacity, block_size, block_size)
    if capacity == 0:
        return dw
    dy, x = packed(dy), packed(x)
    grid, tokens = (out_blocks, in_blocks), x.numel() // x.shape[-1]
    kind = choice.choose("dw", x.dtype, block_size, capacity, grid, tokens, device)
    if kind == choice.HOPPER:
        hopper.linear_dw(dy, x, coords, row_offsets, row_entries, slots, dw, device)
    elif kind == choice.DENSE:
        densified.linear_dw(dy, x, coords, dw, device)
    else:
        portable.linear_dw(dy, x, coords, row_offsets, row_entries, dw, device)
    # A kernel cannot be loaded while a CUDA graph is captured; and a captured step computes norms
    # also where the steps before it did not. So their kernel is loaded with that of dW.
    _norms_family(x.dtype, block_size, grid, tokens, device).norms_kernel(x.dtype, device)
    return dw


def block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    """Return the squared norms of the blocks of dy^T x, or zeros if not armed; see `ops`."""
    device = _device_of(x, dy, armed)
    out_features, in_features = dy.shape[-1], x.shape[-1]
    _check_pair(dy, x, out_features)
    grid = block_grid(out_features, in_features, block_size)
    if x.numel() == 0:
        return x.new_zeros(grid, dtype=torch.float32)
    norms = x.new_empty(grid, dtype=torch.float32)  # the kernels write all of it
    dy, x = _packed_rows(dy), _packed_rows(x)
    family = _norms_family(x.dtype, block_size, grid, x.shape[0], device)
    family.norms(dy, x, armed, norms, device)
    return norms


def _norms_family(
    dtype: torch.dtype, block_size: int, grid: tuple[int, int], tokens: int, device: int
) -> ModuleType:
    """Return the module whose kernel computes the block norms of a layer."""
    blocks = grid[0] * grid[1]
    kind = choice.choose("norms", dtype, block_size, blocks, grid, tokens, device)
    return hopper if kind == choice.HOPPER else portable


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


def _check_pair(dy: Tensor, x: Tensor, out_features: int) -> None:
    """Raise an error unless these are operands of a weight gradient."""
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have the dtype of x, {x.dtype}; got {dy.dtype}.")
    if dy.shape[-1] != out_features or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must have shape {[*x.shape[:-1], out_features]}, as x and the layer say; "
            f"got {list(dy.shape)}."
        )


def _packed_rows(tensor: Tensor) -> Tensor:
    """Return the tensor as aligned rows, `[n, features]`, at any distance from each other.

    A copy only where they are not: that would cost its time also while nobody wants scores.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    pitch = row_pitch(rows)
    whole = pitch * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    in_place = whole and rows.stride(1) == 1 and rows.shape[1] <= pitch <= _MOST_PITCH
    return rows if in_place else packed(rows)
