"""Products by cuBLAS, on a dense copy of W or of its gradient; see `ops` for shapes.

Used where skipping absent blocks does not pay: at high density, or with small blocks. The copy
lives for one product, and PyTorch's caching allocator reuses its memory for the next layer, so
each stream needs memory for one copy only.

Operands are contiguous, aligned to 16 bytes, of one dtype, and on the device of index `device`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_lightning.kernels.launch import Kernel, build_once
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.programs import Program
from sparse_lightning.topology import Indices

_THREAD_BLOCKS_PER_SM = 16


def linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    y: Tensor,
    device: int,
    *,
    forward: bool,
) -> None:
    """Fill `y` with x W^T + bias if `forward`, else with x W."""
    block_size, slots = values.shape[1], lists.slots
    weight = values.new_empty(slots.shape[0] * block_size, slots.shape[1] * block_size)
    _move("unpack_blocks", values, weight, slots.data_ptr(), 0, device)
    right = weight.t() if forward else weight
    rows, out = x.view(-1, x.shape[-1]), y.view(-1, y.shape[-1])
    if bias is None:
        torch.mm(rows, right, out=out)
    else:
        torch.addmm(bias, rows, right, out=out)


def linear_dw(dy: Tensor, x: Tensor, indices: Indices, dw: Tensor, device: int) -> None:
    """Fill `dw` with the present blocks of dy^T x, and zeros in empty slots."""
    dense = x.new_empty(dy.shape[-1], x.shape[-1])
    torch.mm(dy.view(-1, dy.shape[-1]).t(), x.view(-1, x.shape[-1]), out=dense)
    _move("pack_blocks", dw, dense, 0, indices.coords.data_ptr(), device)


def _move(entry: str, values: Tensor, dense: Tensor, slots: int, coords: int, device: int) -> None:
    capacity, block_size, _ = values.shape
    kernel = _kernel(entry, device)
    kernel.launch(
        _THREAD_BLOCKS_PER_SM * kernel.sm_count,
        1,
        values.data_ptr(),
        dense.data_ptr(),
        slots,
        coords,
        capacity,
        dense.shape[0] // block_size,
        dense.shape[1] // block_size,
        block_size,
        block_size * values.element_size() // 16,
    )


PROGRAM = Program("densify.cu", ())


@build_once
def _kernel(entry: str, device: int) -> Kernel[Program]:
    return Kernel(PROGRAM, entry, "PPPPiiiii", device)
