"""Reference implementations of the ops, in plain PyTorch on a dense weight.

They are deliberately slow and simple. Tests compare every backend and dtype with them in fp64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_weight(values: Tensor, coords: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the `[out_features, in_features]` weight made of the blocks `[capacity, B, B]`."""
    block = values.shape[1]
    weight = values.new_zeros(grid[0] * block, grid[1] * block)
    for slot, (row, col) in enumerate(coords.tolist()):
        if row >= 0:
            rows = slice(row * block, (row + 1) * block)
            weight[rows, col * block : (col + 1) * block] = values[slot]
    return weight


def block_linear(
    x: Tensor, values: Tensor, bias: Tensor | None, coords: Tensor, grid: tuple[int, int]
) -> Tensor:
    """Return x W^T + bias, `[..., out_features]`."""
    return torch.nn.functional.linear(x, dense_weight(values, coords, grid), bias)


def block_linear_dx(dy: Tensor, values: Tensor, coords: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return dy W, `[..., in_features]`."""
    return dy @ dense_weight(values, coords, grid)


def dense_gradient(dy: Tensor, x: Tensor) -> Tensor:
    """Return dy^T x summed over all tokens, `[out_features, in_features]`."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def block_linear_dw(dy: Tensor, x: Tensor, coords: Tensor, block_size: int) -> Tensor:
    """Return the present blocks of dy^T x, `[capacity, B, B]`, with zeros in empty slots."""
    gradient = dense_gradient(dy, x)
    out = x.new_zeros(coords.shape[0], block_size, block_size)
    for slot, (row, col) in enumerate(coords.tolist()):
        if row >= 0:
            rows = slice(row * block_size, (row + 1) * block_size)
            out[slot] = gradient[rows, col * block_size : (col + 1) * block_size]
    return out


def block_norms(dy: Tensor, x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the squared Frobenius norm of each block of dy^T x, `[out_blocks, in_blocks]`."""
    return squared_norms(dense_gradient(dy, x), grid)


def squared_norms(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the squared Frobenius norm of each block of a dense matrix, in the shape `grid`."""
    block_size = matrix.shape[0] // grid[0]
    return matrix.view(grid[0], block_size, grid[1], block_size).square().sum((1, 3))
