"""The CPU backend, in plain PyTorch.

`choose` picks one of three methods from the number of tokens, dtype, block size and density, by
fixed rules or by a table that `sparse-lightning tune` measured on this machine:

- by block: one GEMM per block, added to its output block. Needs enough tokens to amortize the
  calls.
- batched: batched GEMMs over many blocks, whose results are summed by output block. For few tokens,
  and for half-precision outputs, which adding block by block would round at every addition.
- densify: one dense GEMM, for densities at which skipping absent blocks does not pay.
"""

from __future__ import annotations

import functools
import math
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparse_lightning.kernels.epilogues import STORE, Epilogue
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.speedups import (
    Table,
    cpu_name,
    read_rows,
    tokens_bucket,
    tuned_file,
)
from sparse_lightning.nm_pattern import compress as compress
from sparse_lightning.nm_pattern import expand
from sparse_lightning.topology import Indices

METHODS = ("by block", "batched", "densify")
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
# The layer (in_features, out_features) that stands for all in a table. Speed-ups over the dense
# product depend less on a layer's shape than on tokens, block size and density, except those of
# small layers: at 256x256 they differ by up to a factor of 2.3.
MEASURED_FEATURES = (1024, 1024)

# Without a table: the rules below, measured on x86 with MKL at 1024x1024x1024. Smaller blocks have
# more overhead.
# Density above which one dense product is faster, by block size. With blocks of 32 at density .5,
# by block runs at .63 to .8 of the dense speed on an Intel Xeon.
_DENSIFY_ABOVE = {16: 0.4, 32: 0.4, 64: 0.75, 128: 0.85}
_DENSIFY_HALF_ABOVE = {16: 0.15, 32: 0.3, 64: 0.5, 128: 0.55}
# Fewer tokens than these do not amortize building the dense weight, and one call per block.
_MIN_TOKENS_DENSIFY = 128
_MIN_TOKENS_BY_BLOCK = {16: 4096, 32: 512, 64: 256, 128: 128}
# Most tokens of a batch, and the size of what it reads and writes (measured; the optimum is flat).
_BATCH_TOKENS = 256
_BATCH_BYTES = 8 << 20
# Size of the bands of block rows in which a dense weight is built, and in which the dense gradient
# of the block norms is computed.
_BAND_BYTES = 4 << 20

_scratch = threading.local()


def available_methods(op: str, dtype: torch.dtype) -> tuple[str, ...]:
    """Return those of `METHODS` that compute a product ("fwd", "dx" or "dw") accurately.

    Sums of several blocks must not be rounded to half precision. Each block of dW is one product.

    >>> available_methods("fwd", torch.bfloat16)
    ('batched', 'densify')
    """
    is_exact = op == "dw" or dtype.itemsize > 2
    return tuple(method for method in METHODS if is_exact or method != "by block")


def choose(op: str, tokens: int, block_size: int, density: float, dtype: torch.dtype) -> str:
    """Return one of `METHODS` for a product.

    It is the fastest by the table of this machine, if there is one that was measured at such a
    number of tokens. Otherwise it follows from constants.

    Args:
        op: "fwd", "dx" or "dw".
        tokens: number of tokens of the input.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks.
        dtype: dtype of the operands.

    >>> choose("fwd", 4096, 32, 0.25, torch.float32), choose("fwd", 4096, 32, 0.25, torch.bfloat16)
    ('by block', 'batched')
    >>> choose("dx", 4096, 16, 0.5, torch.float32), choose("dx", 4096, 64, 0.5, torch.float32)
    ('densify', 'by block')
    """
    threads = torch.get_num_threads()
    return _cached_choice(op, tokens_bucket(tokens), block_size, density, dtype, threads)


@functools.lru_cache(maxsize=4096)
def _cached_choice(
    op: str, tokens: int, block_size: int, density: float, dtype: torch.dtype, threads: int
) -> str:
    methods = available_methods(op, dtype)
    table, shape = _table(threads), (tokens, *MEASURED_FEATURES)
    name = DTYPES[torch.float32 if dtype == torch.float64 else dtype]
    if table.covers(op, name, block_size, shape):
        fastest = table.fastest(op, name, block_size, shape, density, methods)
        if fastest is not None:
            return fastest
    limits = _DENSIFY_HALF_ABOVE if dtype.itemsize == 2 else _DENSIFY_ABOVE
    if density > limits[block_size] and tokens >= _MIN_TOKENS_DENSIFY:
        return "densify"
    is_exact = "by block" in methods
    return "by block" if is_exact and tokens >= _MIN_TOKENS_BY_BLOCK[block_size] else "batched"


def table_file(threads: int) -> Path:
    """Return the file in which `sparse-lightning tune` saves the table of this CPU."""
    return tuned_file(f"{cpu_name()} {threads} threads")


@functools.cache
def _table(threads: int) -> Table:
    file = table_file(threads)
    return Table(read_rows(file) if os.path.isfile(file) else ())


def clear_table_cache() -> None:
    """Drop cached tables and choices, so that a new table takes effect."""
    _table.cache_clear()
    _cached_choice.cache_clear()


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    *,
    forward: bool,
    epilogue: Epilogue = STORE,
    positions: Tensor | None = None,
    method: str | None = None,
) -> tuple[Tensor, ...]:
    """Return x W^T + bias or x W, or what an epilogue makes of it; see `ops.Backend`.

    2:4 sparse blocks are made whole for the product.

    `method` is one of `METHODS`; if None, it is chosen.
    """
    values = values if positions is None else expand(values, positions)
    return epilogue.compute(_multiply(x, values, bias, lists, forward, method))


def _multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    forward: bool,
    method: str | None,
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
    if x.numel() == 0:
        return x.new_zeros(shape)

    density = n_blocks / max(1, n_out * n_in)
    op = "fwd" if forward else "dx"
    method = method or choose(op, tokens.shape[0], block_size, density, values.dtype)
    if method == "densify":
        weight = _dense_weight(values, lists.slots)
        y = nn.functional.linear(tokens, weight if forward else weight.T, bias)
        return _reshaped(y, shape)

    out = tokens.new_empty(tokens.shape[0], n_out * block_size)
    if method == "batched":
        _multiply_in_batches(out, tokens, values, bias, lists, forward)
    else:
        blocks = values.transpose(1, 2) if forward else values
        targets = _initialized_targets(out, bias, block_size)
        _add_by_block(targets, tokens, blocks, bounds, entries.tolist())
    return _reshaped(out, shape)


def _dense_weight(values: Tensor, slots: Tensor) -> Tensor:
    """Return the dense weight, `[out_features, in_features]`, in scratch memory."""
    (rows, cols), size = slots.shape, values.shape[1]
    weight = _scratch_tensor("weight", values, rows, size, cols, size)
    padded = _scratch_tensor("padded", values, values.shape[0] + 1, size, size)
    padded[0].zero_()  # stands for the absent blocks, whose slot is -1
    padded[1:].copy_(values)
    # Whole blocks are gathered first. In the weight itself, their rows are far apart.
    rows_per_band = max(1, _BAND_BYTES // (size * size * cols * values.element_size()))
    bands = zip(weight.split(rows_per_band), (slots + 1).split(rows_per_band), strict=True)
    for band, index in bands:
        blocks = _gather("blocks", padded, index.flatten())
        band.copy_(blocks.view(-1, cols, size, size).transpose(1, 2))
    return weight.view(rows * size, cols * size)


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


class _Batch(NamedTuple):
    """Blocks of consecutive output blocks, multiplied by one batched GEMM.

    Attributes:
        outputs: the output blocks.
        slots: int32, the slot of each block of the batch; None for every slot, empty ones included.
        inputs: int32, the input block of each.
        order: int32, the blocks of the batch in the order in which they are summed.
        offsets: int32, where the blocks of each output block begin in `order`.
    """

    outputs: slice
    slots: Tensor | None
    inputs: Tensor
    order: Tensor
    offsets: Tensor


def _batches(lists: BlockLists, capacity: int, block_bytes: int, band_bytes: int) -> list[_Batch]:
    """Split the output blocks into batches.

    Args:
        lists: the blocks by output block.
        capacity: number of slots.
        block_bytes: size of a block.
        band_bytes: size of a block's inputs and results.
    """
    offsets, entries, _ = lists
    bounds = offsets.tolist()
    inputs, slots = entries.T.contiguous()
    if capacity * band_bytes <= _BATCH_BYTES and 2 * bounds[-1] > capacity:
        # The values are read where they are, without copying them in the order of the lists. Empty
        # slots are multiplied in vain.
        by_slot = torch.empty_like(inputs)
        by_slot[slots.long()] = inputs.clamp(min=0)
        return [_Batch(slice(None), None, by_slot, slots[: bounds[-1]], offsets)]

    batches = []
    limit = _BATCH_BYTES // (band_bytes + block_bytes)
    positions = torch.arange(bounds[-1], dtype=torch.int32, device=offsets.device)
    first = 0
    for last in range(1, len(bounds)):
        if last == len(bounds) - 1 or bounds[last + 1] - bounds[first] > limit:
            begin, end = bounds[first], bounds[last]
            batch_offsets = offsets[first : last + 1] - begin
            part, order = slice(begin, end), positions[: end - begin]
            batches.append(
                _Batch(slice(first, last), slots[part], inputs[part], order, batch_offsets)
            )
            first = last
    return batches


def _multiply_in_batches(
    out: Tensor,
    tokens: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    forward: bool,
) -> None:
    """Write bias + the sums of products to `out`, in bands of tokens.

    bf16 products are rounded block by block, and summed in fp32. fp16 products could overflow, so
    they are computed in fp32.
    """
    capacity, block_size, _ = values.shape
    dtype = torch.float32 if values.dtype == torch.float16 else values.dtype
    width = max(1, min(tokens.shape[0], _BATCH_TOKENS))
    block_bytes = block_size**2 * dtype.itemsize
    batches = _batches(lists, capacity, block_bytes, 2 * width * block_bytes // block_size)
    biases = None if bias is None else bias.view(-1, block_size)
    for band, out_band in zip(tokens.split(width), out.split(width), strict=True):
        columns = _block_columns("x", band.to(dtype), block_size)
        targets = out_band.unflatten(1, (-1, block_size)).transpose(0, 1)
        for outputs, slots, inputs, order, offsets in batches:
            blocks = (values if slots is None else _gather("blocks", values, slots)).to(dtype)
            x = _gather("inputs", columns, inputs)
            products = _scratch_tensor("products", x, *x.shape)
            torch.bmm(x, blocks.transpose(1, 2) if forward else blocks, out=products)
            sums = _sum_segments(products.flatten(1), order, offsets)
            target = targets[outputs]
            sums = sums.view(target.shape)
            if biases is None:
                target.copy_(sums)
            else:
                torch.add(sums, biases[outputs].unsqueeze(1), out=target)


def _sum_segments(rows: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return the sum of `rows[order[offsets[i] : offsets[i + 1]]]` for each i.

    Half precision is summed in fp32. The order of a sum depends on nothing else.

    >>> rows = torch.tensor([[1.0], [2.0], [4.0]])
    >>> order, offsets = torch.tensor([2, 0, 1]), torch.tensor([0, 2, 2, 3])
    >>> _sum_segments(rows, order, offsets).tolist()
    [[5.0], [0.0], [2.0]]
    """
    return torch.embedding_bag(rows, order, offsets, mode=0, include_last_offset=True)[0]


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
            held = torch.empty(size, dtype=like.dtype, device=like.device)
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
    return _block_columns(name, tokens, block_size).unbind(0)


def _block_columns(name: str, tokens: Tensor, block_size: int) -> Tensor:
    """Return the blocks of columns, `[blocks, tokens, block_size]`, copied to scratch memory."""
    blocks: Tensor = tokens.unflatten(1, (-1, block_size)).transpose(0, 1)
    return _scratch_tensor(name, tokens, *blocks.shape).copy_(blocks)


def _gather(name: str, source: Tensor, index: Tensor) -> Tensor:
    """Return `source[index]` in scratch memory."""
    target = _scratch_tensor(name, source, len(index), *source.shape[1:])
    return torch.index_select(source, 0, index, out=target)


def weight_gradient(dy: Tensor, x: Tensor, indices: Indices, method: str | None = None) -> Tensor:
    """Return the present blocks of dy^T x, with zeros in empty slots; see `ops` for shapes.

    `method` is one of `METHODS`; if None, it is chosen.
    """
    coords, slots = indices.coords, indices.slots
    out_blocks, in_blocks = slots.shape
    block_size = x.shape[-1] // in_blocks
    dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])
    bounds = indices.row_offsets.tolist()
    n_blocks = bounds[-1]
    density = n_blocks / max(1, out_blocks * in_blocks)
    method = method or choose("dw", x.shape[0], block_size, density, x.dtype)
    capacity = coords.shape[0]
    if x.numel() == 0 or n_blocks == 0:
        return x.new_zeros(capacity, block_size, block_size)
    is_full = n_blocks == capacity
    if method == "by block":
        out = x.new_empty(capacity, block_size, block_size)
        if not is_full:
            out.zero_()
        entries, by_slot = indices.row_entries.tolist(), out.unbind(0)
        left_columns, right_columns = _columns("dy", dy, block_size), _columns("x", x, block_size)
        for i, column in enumerate(left_columns):
            transposed = column.contiguous().T  # read once per block of the row
            for j, slot in entries[bounds[i] : bounds[i + 1]]:
                torch.mm(transposed, right_columns[j], out=by_slot[slot])
        return out

    # The present blocks in the order of slots are computed at once. If there are empty slots, they
    # are moved afterwards.
    present = (coords[:, 0] >= 0).nonzero().squeeze(1)
    rows, cols = (coords if is_full else coords[present]).T.contiguous()
    blocks = x.new_empty(n_blocks, block_size, block_size)
    if method == "densify":
        dense = torch.mm(dy.T, x, out=_scratch_tensor("weight", x, dy.shape[1], x.shape[1]))
        # Every row of a block is one row of a matrix of this width.
        first = (rows.long() * block_size * in_blocks + cols).unsqueeze(1)
        index = (first + torch.arange(block_size, device=x.device) * in_blocks).flatten()
        torch.index_select(dense.view(-1, block_size), 0, index, out=blocks.view(-1, block_size))
    else:
        lefts = _block_columns("dy", dy, block_size)
        rights = _block_columns("x", x, block_size)
        size = max(1, _BATCH_BYTES // (2 * lefts[0].nbytes))
        parts = zip(blocks.split(size), rows.split(size), cols.split(size), strict=True)
        for part, row, col in parts:
            left, right = _gather("outputs", lefts, row), _gather("inputs", rights, col)
            torch.bmm(left.transpose(1, 2), right, out=part)
    if is_full:
        return blocks
    return x.new_zeros(capacity, block_size, block_size).index_copy_(0, present, blocks)


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
    rows_per_band = max(1, _BAND_BYTES // (block_size * x.shape[1] * x.element_size()))
    for first in range(0, out_blocks, rows_per_band):
        band = norms[first : first + rows_per_band]
        rows = slice(first * block_size, (first + band.shape[0]) * block_size)
        blocks = (dy[:, rows].T @ x).view(band.shape[0], block_size, in_blocks, block_size)
        # Norms of contiguous rows first: one fast pass, with short sums.
        band.copy_(torch.linalg.vector_norm(blocks, dim=3).square().sum(1))
    return norms
