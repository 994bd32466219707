"""The CPU backend, in plain PyTorch: a few large matrix products in place of many small ones.

Three ways to multiply, chosen by `choose` from shape, dtype and density:

- by block: one GEMM a block, added to its output block. Needs enough tokens to pay for the calls.
- by row: one GEMM a block row, after copying the inputs of its blocks side by side. For few
  tokens, and for outputs in half precision, which adding block by block would round each time.
- densify: one dense GEMM, where so many blocks are present that skipping the others cannot pay.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparse_lightning.kernels import activations

# The density from which one dense product is faster, by block size: the smaller a block, the more
# it costs over its share (measured on x86 with MKL at 1024x1024x1024).
_DENSIFY_ABOVE = {16: 0.2, 32: 0.5, 64: 0.65, 128: 0.85}
# Fewer tokens than this do not pay for one call a block (measured; the optimum is flat).
_MIN_TOKENS_BY_BLOCK = 256
# The block norms of the dense gradient are taken a band of block rows at a time, of this size.
_NORMS_BAND_BYTES = 4 << 20

_scratch = threading.local()


def choose(tokens: int, block_size: int, density: float, accumulates_in: torch.dtype) -> str:
    """Return "by block", "by row" or "densify" for one product.

    Args:
        tokens: rows of the input.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks.
        accumulates_in: dtype in which products of several blocks would be added up.

    >>> choose(1024, 32, 0.25, torch.float32), choose(1024, 32, 0.25, torch.bfloat16)
    ('by block', 'by row')
    >>> choose(1024, 16, 0.5, torch.float32), choose(1024, 64, 0.5, torch.float32)
    ('densify', 'by block')
    """
    if density > _DENSIFY_ABOVE[block_size]:
        return "densify"
    is_exact = accumulates_in in (torch.float32, torch.float64)
    return "by block" if is_exact and tokens >= _MIN_TOKENS_BY_BLOCK else "by row"


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
    in_blocks = col_offsets.shape[0] - 1
    return _multiply(x, values, bias, row_offsets, row_entries, in_blocks, transposed=True)


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
    return _multiply(dy, values, None, col_offsets, col_entries, slots.shape[0], transposed=False)


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
    in_blocks = col_offsets.shape[0] - 1
    h = _multiply(x, values, bias, row_offsets, row_entries, in_blocks, transposed=True)
    return h, activations.activate(h, activation)


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
    out_blocks = slots.shape[0]
    gradient = _multiply(dy, values, None, col_offsets, col_entries, out_blocks, transposed=False)
    return activations.go_back(gradient, h, activation)


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    entries: Tensor,
    in_blocks: int,
    *,
    transposed: bool,
) -> Tensor:
    """Return bias + the sum over each output block's entries (i, slot) of x[i] @ block[slot].

    `transposed` multiplies by the blocks' transposes: the forward does, dX does not.
    """
    block_size = values.shape[1]
    n_out = offsets.shape[0] - 1
    tokens = x.reshape(-1, x.shape[-1])
    bounds = offsets.tolist()
    n_blocks = bounds[-1]
    shape = (*x.shape[:-1], n_out * block_size)

    method = choose(tokens.shape[0], block_size, n_blocks / max(1, n_out * in_blocks), values.dtype)
    if method == "densify":
        # In the weight's own orientation, so that each row of a block is one run of memory.
        index, slots = entries[:n_blocks].long().unbind(1)
        outputs = torch.repeat_interleave(offsets.diff())
        block_rows, block_cols = (outputs, index) if transposed else (index, outputs)
        grid = (n_out, in_blocks) if transposed else (in_blocks, n_out)
        weight = _borrow("weight", values, grid[0], block_size, grid[1], block_size).zero_()
        weight.transpose(1, 2)[block_rows, block_cols] = values[slots]
        matrix = weight.view(grid[0] * block_size, -1)
        y = nn.functional.linear(tokens, matrix if transposed else matrix.T, bias)
        return _shaped(y, shape)

    blocks = values.transpose(1, 2) if transposed else values
    out = tokens.new_empty(tokens.shape[0], n_out * block_size)
    targets = _begun(out, bias, block_size)
    if method == "by row":
        index, slots = entries[:n_blocks].long().unbind(1)
        _add_by_row(targets, tokens, blocks[slots], bounds, index)
    else:
        _add_by_block(targets, tokens, blocks, bounds, entries.tolist())
    return _shaped(out, shape)


def _shaped(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Return rows in another shape, and not as a view.

    Autograd would let nobody change a view in place that an op returns, as `nn.ReLU(inplace=True)`
    does.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, shape)
    return shaped


def _begun(out: Tensor, bias: Tensor | None, block_size: int) -> Iterator[Tensor]:
    """Yield each output block set to its bias, just before it is used: then the cache holds it."""
    starts = None if bias is None else bias.split(block_size)
    for o, target in enumerate(out.split(block_size, 1)):
        if starts is None:
            target.zero_()
        else:
            target.copy_(starts[o])
        yield target


def _add_by_block(
    targets: Iterator[Tensor],
    tokens: Tensor,
    blocks: Tensor,
    bounds: list[int],
    entries: list[tuple[int, int]],
) -> None:
    inputs, by_slot = _columns("x", tokens, blocks.shape[1]), blocks.unbind(0)
    for o, target in enumerate(targets):
        for i, slot in entries[bounds[o] : bounds[o + 1]]:
            target.addmm_(inputs[i], by_slot[slot])


def _add_by_row(
    targets: Iterator[Tensor],
    tokens: Tensor,
    sorted_blocks: Tensor,
    bounds: list[int],
    index: Tensor,
) -> None:
    block_size = sorted_blocks.shape[1]
    stacked = sorted_blocks.reshape(-1, block_size)
    for o, target in enumerate(targets):
        begin, end = bounds[o], bounds[o + 1]
        if begin < end:
            gathered = _side_by_side(tokens, block_size, index[begin:end])
            target.addmm_(gathered, stacked[begin * block_size : end * block_size])


def _borrow(name: str, like: Tensor, *shape: int) -> Tensor:
    """Return uninitialised memory, which the next borrower of that name and dtype takes over.

    Fresh memory of this size is mapped anew at every call, and its page faults can cost more than
    the copies that are made into it.
    """
    size = math.prod(shape)
    held: Tensor | None = getattr(_scratch, f"{name}_{like.dtype}", None)
    if held is None or held.numel() < size:
        # An inference tensor could not be written to outside of inference mode.
        with torch.inference_mode(False):
            held = torch.empty(size, dtype=like.dtype)
        setattr(_scratch, f"{name}_{like.dtype}", held)
    return held[:size].view(shape)


def _columns(name: str, tokens: Tensor, block_size: int) -> tuple[Tensor, ...]:
    """Return each block of columns, `[tokens, block_size]`.

    Narrow ones are copied into borrowed memory first: in place, each of their short rows lies on
    a page of its own, and address translation costs more than the copy once they are used often.
    """
    if block_size >= 64:
        in_place: tuple[Tensor, ...] = tokens.split(block_size, 1)
        return in_place
    blocks: Tensor = tokens.unflatten(1, (-1, block_size))
    n_tokens, n_blocks, _ = blocks.shape
    columns = _borrow(name, tokens, n_blocks, n_tokens, block_size)
    return columns.copy_(blocks.transpose(0, 1)).unbind(0)


def _side_by_side(tokens: Tensor, block_size: int, index: Tensor) -> Tensor:
    """Return the blocks of columns in `index`, `[tokens, n * block_size]`, in borrowed memory."""
    blocks: Tensor = tokens.unflatten(1, (-1, block_size))
    n_tokens, width = tokens.shape[0], len(index)
    target = _borrow("gathered", tokens, n_tokens, width, block_size)
    torch.index_select(blocks, 1, index, out=target)
    return target.view(n_tokens, width * block_size)


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
    out_blocks, in_blocks = slots.shape
    block_size = x.shape[-1] // in_blocks
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    bounds = row_offsets.tolist()
    n_blocks = bounds[-1]
    density = n_blocks / max(1, out_blocks * in_blocks)
    # Each block is one product over all tokens: nothing is added up in its dtype.
    method = choose(x.shape[0], block_size, density, torch.float32)
    if method == "densify":
        dense = torch.mm(dy.T, x, out=_borrow("weight", x, dy.shape[1], x.shape[1]))
        dense = dense.view(out_blocks, block_size, in_blocks, block_size).transpose(1, 2)
        rows, cols = coords.long().unbind(1)
        blocks: Tensor = dense[rows, cols]
        blocks[rows < 0] = 0
        return blocks

    out = x.new_zeros(coords.shape[0], block_size, block_size)
    if method == "by row":
        # Sorted by row, each block transposed: the product of a block row is then a plain slice.
        cols, slots = row_entries[:n_blocks].long().unbind(1)
        product = x.new_empty(n_blocks * block_size, block_size)
        for row, dy_row in enumerate(dy.split(block_size, 1)):
            begin, end = bounds[row], bounds[row + 1]
            if begin < end:
                gathered = _side_by_side(x, block_size, cols[begin:end])
                part = product[begin * block_size : end * block_size]
                torch.mm(gathered.T, dy_row, out=part)
        out[slots] = product.view(n_blocks, block_size, block_size).transpose(1, 2)
    else:
        entries, by_slot = row_entries.tolist(), out.unbind(0)
        lefts, rights = _columns("dy", dy, block_size), _columns("x", x, block_size)
        for row, left in enumerate(lefts):
            transposed = left.contiguous().T  # read once for each block of the row
            for col, slot in entries[bounds[row] : bounds[row + 1]]:
                torch.mm(transposed, rights[col], out=by_slot[slot])
    return out


def block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    """Return the squared norms of the blocks of dy^T x, or zeros if not armed; see `ops`."""
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    out_blocks, in_blocks = dy.shape[1] // block_size, x.shape[1] // block_size
    norms = x.new_zeros(out_blocks, in_blocks, dtype=torch.float32)
    if not armed.item():
        return norms
    # A product of half-precision inputs is summed and squared in fp32: fp16 would overflow.
    dtype = torch.promote_types(x.dtype, torch.float32)
    dy, x = dy.to(dtype), x.to(dtype)
    rows_a_band = max(1, _NORMS_BAND_BYTES // (block_size * x.shape[1] * x.element_size()))
    for first in range(0, out_blocks, rows_a_band):
        band = norms[first : first + rows_a_band]
        rows = slice(first * block_size, (first + band.shape[0]) * block_size)
        blocks = (dy[:, rows].T @ x).view(band.shape[0], block_size, in_blocks, block_size)
        band.copy_(blocks.square().sum((1, 3)))
    return norms
