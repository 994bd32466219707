"""The CPU backend, in plain PyTorch.

`choose` picks one of three methods from shape, dtype and density:

- by block: one GEMM per block, added to its output block. Needs enough tokens to amortize the
  calls.
- by row: one GEMM per block row, on the gathered inputs of its blocks. For few tokens, and for
  half-precision outputs, which adding block by block would round at every addition.
- densify: one dense GEMM, for densities at which skipping absent blocks does not pay.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_lightning.kernels import activations
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.topology import Indices

# Density above which one dense product is faster, by block size. Smaller blocks have more overhead
# (measured on x86 with MKL at 1024x1024x1024).
_DENSIFY_ABOVE = {16: 0.2, 32: 0.5, 64: 0.65, 128: 0.85}
# Fewer tokens than this do not amortize one call per block (measured; the optimum is flat).
_MIN_TOKENS_BY_BLOCK = 256
# Size of the bands of block rows in which the dense gradient of the block norms is computed.
_NORMS_BAND_BYTES = 4 << 20

_scratch = threading.local()


def choose(tokens: int, block_size: int, density: float, accumulates_in: torch.dtype) -> str:
    """Return "by block", "by row" or "densify" for one product.

    Args:
        tokens: number of tokens of the input.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks.
        accumulates_in: dtype in which the products of several blocks would be summed.

    >>> choose(1024, 32, 0.25, torch.float32), choose(1024, 32, 0.25, torch.bfloat16)
    ('by block', 'by row')
    >>> choose(1024, 16, 0.5, torch.float32), choose(1024, 64, 0.5, torch.float32)
    ('densify', 'by block')
    """
    if density > _DENSIFY_ABOVE[block_size]:
        return "densify"
    is_exact = accumulates_in in (torch.float32, torch.float64)
    return "by block" if is_exact and tokens >= _MIN_TOKENS_BY_BLOCK else "by row"


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    *,
    forward: bool,
    activation: str | None = None,
    preactivation: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return x W^T + bias or x W, with an activation if one is given; see `ops.Backend`."""
    y = _multiply(x, values, bias, lists, forward=forward)
    if activation is None:
        return y, None
    if preactivation is None:
        return y, activations.activate(y, activation)
    return activations.activation_backward(y, preactivation, activation), None


def _multiply(
    x: Tensor, values: Tensor, bias: Tensor | None, lists: BlockLists, *, forward: bool
) -> Tensor:
    """Return bias + the sum over each output block's entries (i, slot) of x[i] @ block[slot].

    `forward` multiplies by the transposed blocks.
    """
    offsets, entries, _ = lists
    block_size = values.shape[1]
    n_out, n_in = lists.slots.shape if forward else reversed(lists.slots.shape)
    tokens = x.reshape(-1, x.shape[-1])
    bounds = offsets.tolist()
    n_blocks = bounds[-1]
    shape = (*x.shape[:-1], n_out * block_size)

    method = choose(tokens.shape[0], block_size, n_blocks / max(1, n_out * n_in), values.dtype)
    if method == "densify":
        # Built in the orientation of W, so that each row of a block is contiguous in memory.
        inputs, slots = entries[:n_blocks].long().unbind(1)
        outputs = torch.repeat_interleave(offsets.diff())
        block_rows, block_cols = (outputs, inputs) if forward else (inputs, outputs)
        grid = (n_out, n_in) if forward else (n_in, n_out)
        weight = _scratch_tensor("weight", values, grid[0], block_size, grid[1], block_size).zero_()
        weight.transpose(1, 2)[block_rows, block_cols] = values[slots]
        matrix = weight.view(grid[0] * block_size, -1)
        y = nn.functional.linear(tokens, matrix if forward else matrix.T, bias)
        return _reshaped(y, shape)

    blocks = values.transpose(1, 2) if forward else values
    out = tokens.new_empty(tokens.shape[0], n_out * block_size)
    targets = _initialized_targets(out, bias, block_size)
    if method == "by row":
        inputs, slots = entries[:n_blocks].long().unbind(1)
        _add_by_row(targets, tokens, blocks[slots], bounds, inputs)
    else:
        _add_by_block(targets, tokens, blocks, bounds, entries.tolist())
    return _reshaped(out, shape)


def _reshaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return rows in another shape without making the result a view.

    Autograd forbids in-place changes of a view that an op returns, such as those of
    `nn.ReLU(inplace=True)`.
    """
    reshaped: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return reshaped


def _initialized_targets(out: Tensor, bias: Tensor | None, block_size: int) -> Iterator[Tensor]:
    """Yield each output block, set to its bias or zero just before its use, while it is cached."""
    biases = None if bias is None else bias.split(block_size)
    for o, target in enumerate(out.split(block_size, 1)):
        if biases is None:
            target.zero_()
        else:
            target.copy_(biases[o])
        yield target


def _add_by_block(
    targets: Iterator[Tensor],
    tokens: Tensor,
    blocks: Tensor,
    bounds: list[int],
    entries: list[tuple[int, int]],
) -> None:
    """Add one product per block to the output blocks."""
    inputs, by_slot = _columns("x", tokens, blocks.shape[1]), blocks.unbind(0)
    for o, target in enumerate(targets):
        for i, slot in entries[bounds[o] : bounds[o + 1]]:
            target.addmm_(inputs[i], by_slot[slot])


def _add_by_row(
    targets: Iterator[Tensor],
    tokens: Tensor,
    sorted_blocks: Tensor,
    bounds: list[int],
    inputs: Tensor,
) -> None:
    """Add one product per output block, of gathered inputs and the blocks in sorted order."""
    block_size = sorted_blocks.shape[1]
    stacked = sorted_blocks.reshape(-1, block_size)
    for o, target in enumerate(targets):
        begin, end = bounds[o], bounds[o + 1]
        if begin < end:
            gathered = _gather_columns(tokens, block_size, inputs[begin:end])
            target.addmm_(gathered, stacked[begin * block_size : end * block_size])


def _scratch_tensor(name: str, like: Tensor, *shape: int) -> Tensor:
    """Return uninitialized scratch memory, valid until the next call with this name and dtype.

    Every fresh allocation of this size maps new pages, whose faults can cost more than the copies
    made into it.
    """
    size = math.prod(shape)
    held: Tensor | None = getattr(_scratch, f"{name}_{like.dtype}", None)
    if held is None or held.numel() < size:
        # Inference tensors cannot be written to outside inference mode.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=like.dtype)
        setattr(_scratch, f"{name}_{like.dtype}", held)
    return held[:size].view(shape)


def _columns(name: str, tokens: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Return each block of columns, `[tokens, block_size]`.

    Narrow columns are first copied into scratch memory. In place, each of their short rows is on a
    page of its own, and after a few uses address translation costs more than the copy.
    """
    if block_size >= 64:
        in_place: tuple[Tensor, ...] = tokens.split(block_size, 1)
        return in_place
    blocks: Tensor = tokens.unflatten(1, (-1, block_size))
    n_tokens, n_blocks, _ = blocks.shape
    columns = _scratch_tensor(name, tokens, n_blocks, n_tokens, block_size)
    return columns.copy_(blocks.transpose(0, 1)).unbind(0)


def _gather_columns(tokens: Tensor, block_size: int, index: Tensor) -> Tensor:
    """Return the indexed blocks of columns, `[tokens, n * block_size]`, in scratch memory."""
    blocks: Tensor = tokens.unflatten(1, (-1, block_size))
    n_tokens, width = tokens.shape[0], len(index)
    target = _scratch_tensor("gathered", tokens, n_tokens, width, block_size)
    torch.index_select(blocks, 1, index, out=target)
    return target.view(n_tokens, width * block_size)


def weight_gradient(dy: Tensor, x: Tensor, indices: Indices) -> Tensor:
    """Return the present blocks of dy^T x, with zeros in empty slots; see `ops` for shapes."""
    coords, slots = indices.coords, indices.slots
    out_blocks, in_blocks = slots.shape
    block_size = x.shape[-1] // in_blocks
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    bounds = indices.row_offsets.tolist()
    n_blocks = bounds[-1]
    density = n_blocks / max(1, out_blocks * in_blocks)
    # Each block is one product over all tokens, so no sums are rounded to the dtype of x.
    method = choose(x.shape[0], block_size, density, torch.float32)
    if method == "densify":
        dense = torch.mm(dy.T, x, out=_scratch_tensor("weight", x, dy.shape[1], x.shape[1]))
        dense = dense.view(out_blocks, block_size, in_blocks, block_size).transpose(1, 2)
        rows, cols = coords.long().unbind(1)
        blocks: Tensor = dense[rows, cols]
        blocks[rows < 0] = 0
        return blocks

    out = x.new_zeros(coords.shape[0], block_size, block_size)
    if method == "by row":
        # Sorted by row and transposed, the blocks of one row are a contiguous slice of `product`.
        cols, slots = indices.row_entries[:n_blocks].long().unbind(1)
        product = x.new_empty(n_blocks * block_size, block_size)
        for row, dy_row in enumerate(dy.split(block_size, 1)):
            begin, end = bounds[row], bounds[row + 1]
            if begin < end:
                gathered = _gather_columns(x, block_size, cols[begin:end])
                part = product[begin * block_size : end * block_size]
                torch.mm(gathered.T, dy_row, out=part)
        out[slots] = product.view(n_blocks, block_size, block_size).transpose(1, 2)
    else:
        entries, by_slot = indices.row_entries.tolist(), out.unbind(0)
        lefts, rights = _columns("dy", dy, block_size), _columns("x", x, block_size)
        for row, left in enumerate(lefts):
            transposed = left.contiguous().T  # read once per block of the row
            for col, slot in entries[bounds[row] : bounds[row + 1]]:
                torch.mm(transposed, rights[col], out=by_slot[slot])
    return out


def block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    """Return the squared norms of the blocks of dy^T x, or zeros if not `armed`; see `ops`."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    out_blocks, in_blocks = dy.shape[1] // block_size, x.shape[1] // block_size
    norms = x.new_zeros(out_blocks, in_blocks, dtype=torch.float32)
    if not armed.item():
        return norms
    # Products of half-precision inputs are summed and squared in fp32; fp16 would overflow.
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.to(dtype), x.to(dtype)
    rows_per_band = max(1, _NORMS_BAND_BYTES // (block_size * x.shape[1] * x.element_size()))
    for first in range(0, out_blocks, rows_per_band):
        band = norms[first : first + rows_per_band]
        rows = slice(first * block_size, (first + band.shape[0]) * block_size)
        blocks = (dy[:, rows].T @ x).view(band.shape[0], block_size, in_blocks, block_size)
        band.copy_(blocks.square().sum((1, 3)))
    return norms
