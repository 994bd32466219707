"""The CPU backend, in plain PyTorch: a few large matrix products in place of many small ones.

Three ways to multiply, chosen by `choose` from shape, dtype and density:

- accumulate: one GEMM a block, straight from a view of the input into a view of the output.
  Nothing is copied, but every block re-reads its output, so it needs an fp32 or fp64 output
  (a bf16 one would round after every block) and enough tokens to pay for the calls.
- gather: one GEMM a block row, after copying the inputs of its blocks side by side.
- densify: one dense GEMM, where so many blocks are present that skipping the others cannot pay.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

# Fewer tokens than this do not pay for one call a block (measured; the optimum is flat).
_MIN_TOKENS_TO_ACCUMULATE = 256
# The block norms of the dense gradient are taken a band of block rows at a time, of this size.
_NORMS_BAND_BYTES = 4 << 20


def choose(tokens: int, block_size: int, density: float, dtype: torch.dtype) -> str:
    """Return "accumulate", "gather" or "densify" for one product.

    A small block costs more than its share of the dense product (measured on x86 with MKL at
    1024x1024x1024): about 1 + 32 / block_size times.

    >>> choose(1024, 32, 0.25, torch.float32), choose(1024, 32, 0.25, torch.bfloat16)
    ('accumulate', 'gather')
    >>> choose(1024, 16, 0.5, torch.float32), choose(1024, 64, 0.5, torch.float32)
    ('densify', 'accumulate')
    """
    if density * (1 + 32 / block_size) > 1:
        return "densify"
    if tokens < _MIN_TOKENS_TO_ACCUMULATE or dtype not in (torch.float32, torch.float64):
        return "gather"
    return "accumulate"


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
    y = _multiply(x, values, row_offsets, row_entries, col_offsets.shape[0] - 1, transposed=True)
    return y if bias is None else y.add_(bias)


def block_linear_dx(dy: Tensor, values: Tensor, col_offsets: Tensor, col_entries: Tensor) -> Tensor:
    """Return dy W; see `ops` for shapes."""
    in_blocks = dy.shape[-1] // values.shape[1]
    return _multiply(dy, values, col_offsets, col_entries, in_blocks, transposed=False)


def _multiply(
    x: Tensor,
    values: Tensor,
    offsets: Tensor,
    entries: Tensor,
    in_blocks: int,
    *,
    transposed: bool,
) -> Tensor:
    """Return, for each output block o, the sum over its entries (i, slot) of x[i] @ block[slot].

    `transposed` multiplies by the blocks' transposes: the forward does, dX does not.
    """
    block_size = values.shape[1]
    n_out = offsets.shape[0] - 1
    tokens = x.reshape(-1, x.shape[-1])
    bounds = offsets.tolist()
    n_blocks = bounds[-1]
    index, slots = entries[:n_blocks].long().unbind(1)
    blocks = values.transpose(1, 2) if transposed else values

    method = choose(tokens.shape[0], block_size, n_blocks / max(1, n_out * in_blocks), values.dtype)
    if method == "densify":
        weight = values.new_zeros(in_blocks, block_size, n_out, block_size)
        outputs = torch.repeat_interleave(offsets.diff())
        weight.transpose(1, 2)[index, outputs] = blocks[slots]
        out = tokens @ weight.view(in_blocks * block_size, -1)
    elif method == "gather":
        out = _gather(tokens, blocks[slots], bounds, index)
    else:
        out = _accumulate(tokens, blocks, bounds, index.tolist(), slots.tolist())
    return out.view(*x.shape[:-1], n_out * block_size)


def _accumulate(
    tokens: Tensor, blocks: Tensor, bounds: list[int], index: list[int], slots: list[int]
) -> Tensor:
    block_size = blocks.shape[1]
    out = tokens.new_zeros(tokens.shape[0], (len(bounds) - 1) * block_size)
    inputs, by_slot = tokens.split(block_size, 1), blocks.unbind(0)
    for o, target in enumerate(out.split(block_size, 1)):
        for e in range(bounds[o], bounds[o + 1]):
            target.addmm_(inputs[index[e]], by_slot[slots[e]])
    return out


def _gather(tokens: Tensor, sorted_blocks: Tensor, bounds: list[int], index: Tensor) -> Tensor:
    block_size = sorted_blocks.shape[1]
    out = tokens.new_zeros(tokens.shape[0], (len(bounds) - 1) * block_size)
    stacked = sorted_blocks.reshape(-1, block_size)
    gathered = _Gather(tokens, bounds, index, block_size)
    for o, target in enumerate(out.split(block_size, 1)):
        begin, end = bounds[o], bounds[o + 1]
        if begin < end:
            torch.mm(gathered[o], stacked[begin * block_size : end * block_size], out=target)
    return out


class _Gather:
    """The input blocks of each output block, side by side: `[o]` is `[tokens, n * block_size]`.

    One buffer serves them all: fresh memory for each would cost more in page faults than the copy.
    """

    def __init__(self, tokens: Tensor, bounds: list[int], index: Tensor, block_size: int) -> None:
        longest = max(b - a for a, b in itertools.pairwise(bounds))
        self._blocks = tokens.unflatten(1, (-1, block_size))
        self._buffer = tokens.new_empty(tokens.shape[0] * longest * block_size)
        self._bounds, self._index = bounds, index

    def __getitem__(self, o: int) -> Tensor:
        index = self._index[self._bounds[o] : self._bounds[o + 1]]
        n_tokens, _, block_size = self._blocks.shape
        width = len(index)
        target = self._buffer[: n_tokens * width * block_size].view(n_tokens, width, block_size)
        torch.index_select(self._blocks, 1, index, out=target)
        return target.view(n_tokens, width * block_size)


def block_linear_dw(
    dy: Tensor,
    x: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    block_size: int,
) -> Tensor:
    """Return the present blocks of dy^T x, zeros in empty slots; see `ops` for shapes."""
    out_blocks, in_blocks = row_offsets.shape[0] - 1, x.shape[-1] // block_size
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    bounds = row_offsets.tolist()
    n_blocks = bounds[-1]
    cols, slots = row_entries[:n_blocks].long().unbind(1)
    out = x.new_zeros(coords.shape[0], block_size, block_size)
    density = n_blocks / max(1, out_blocks * in_blocks)
    if choose(x.shape[0], block_size, density, x.dtype) == "densify":
        dense = (dy.T @ x).view(out_blocks, block_size, in_blocks, block_size).transpose(1, 2)
        rows = torch.repeat_interleave(row_offsets.diff())
        out[slots] = dense[rows, cols]
        return out
    # Sorted by row, each block transposed: the product of a block row is then one plain slice.
    product = x.new_empty(n_blocks * block_size, block_size)
    gathered = _Gather(x, bounds, cols, block_size)
    for row, dy_row in enumerate(dy.split(block_size, 1)):
        begin, end = bounds[row] * block_size, bounds[row + 1] * block_size
        if begin < end:
            torch.mm(gathered[row].T, dy_row, out=product[begin:end])
    out[slots] = product.view(n_blocks, block_size, block_size).transpose(1, 2)
    return out


def block_norms_(dy: Tensor, x: Tensor, armed: Tensor, scores: Tensor) -> None:
    """Add the squared norm of each block of dy^T x to `scores`, if armed; see `ops` for shapes."""
    if not armed.item():
        return
    # A product of half-precision inputs is summed and squared in fp32: fp16 would overflow.
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.reshape(-1, dy.shape[-1]).to(dtype), x.reshape(-1, x.shape[-1]).to(dtype)
    out_blocks, in_blocks = scores.shape
    block_size = x.shape[1] // in_blocks
    rows_a_band = max(1, _NORMS_BAND_BYTES // (block_size * x.shape[1] * x.element_size()))
    for first in range(0, out_blocks, rows_a_band):
        band = scores[first : first + rows_a_band]
        rows = slice(first * block_size, (first + band.shape[0]) * block_size)
        gradient = (dy[:, rows].T @ x).view(band.shape[0], block_size, in_blocks, block_size)
        band += gradient.square().sum((1, 3))
