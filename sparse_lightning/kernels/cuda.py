"""The CUDA backend: checks the operands of each op and calls the chosen kind of kernels.

Each kind defines `linear` and `linear_dw` and, if it computes block norms, `norms` and
`norms_kernel`. A new kind is added to `choice.KINDS` and `LAUNCHERS`. `ops` describes shapes.

Nothing here waits for the device or depends on the number of present blocks, which only the device
knows; grids are sized for the capacity. A step can thus be captured in a CUDA graph once one step
has run, which loads its kernels.
"""

from __future__ import annotations

from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from sparse_lightning.kernels import choice, densified, nm_blocks
from sparse_lightning.kernels.epilogues import STORE, Epilogue
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.launch import packed, row_pitch
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.portable.programs import multiplies_kept_weights
from sparse_lightning.topology import Indices, block_grid

LAUNCHERS: dict[str, ModuleType] = {
    choice.PORTABLE: portable,
    choice.HOPPER: hopper,
    choice.DENSE: densified,
}
_MAX_PITCH = 2**31 - 1  # kernels use 32-bit row pitches


def multiply(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    lists: BlockLists,
    *,
    forward: bool,
    epilogue: Epilogue = STORE,
    positions: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Return x W^T + bias or x W, or what an epilogue makes of it; see `ops.Backend`.

    2:4 sparse blocks are made whole for the product, except by the kernels for few tokens, which
    are bound by reading W.
    """
    capacity, block_size, _ = values.shape
    grid = lists.slots.shape[0], lists.slots.shape[1]
    n_out, n_in = grid if forward else grid[::-1]
    in_features, out_features = n_in * block_size, n_out * block_size
    if x.shape[-1] != in_features:
        raise ValueError(f"The input must have {in_features} features; got {list(x.shape)}.")
    device = _common_device(x, values, *lists, bias, positions, *epilogue.operands)
    if x.dtype != values.dtype or (bias is not None and bias.dtype != x.dtype):
        raise TypeError(
            f"The input must have the dtype of values and bias, {values.dtype}; got {x.dtype}."
        )
    y = x.new_empty(*x.shape[:-1], out_features)
    for operand in epilogue.operands:
        if operand.shape != y.shape or operand.dtype != y.dtype:
            raise ValueError(
                f"The operands of an epilogue must have shape {list(y.shape)} and dtype {y.dtype}, "
                f"as implied by the product; got {list(operand.shape)} and {operand.dtype}."
            )
    if x.numel() == 0:
        return epilogue.compute(y)
    x, values = packed(x), packed(values)
    bias = None if bias is None else bias.contiguous()
    op, tokens = "fwd" if forward else "dx", x.numel() // in_features
    kind = choice.choose(op, x.dtype, block_size, capacity, grid, tokens, device)
    linear = LAUNCHERS[kind].linear
    if positions is not None and multiplies_kept_weights(x.dtype, tokens):
        kind, linear = choice.PORTABLE, partial(portable.linear, positions=positions)
    elif positions is not None:
        values = expand(values, positions)
    # The kernels, but not cuBLAS, fuse epilogues in half precision.
    if epilogue is not STORE and kind != choice.DENSE and x.dtype.itemsize == 2:
        epilogue = epilogue.map_operands(packed)
        extra = tuple(torch.empty_like(y) for _ in range(epilogue.extra_outputs))
        linear(x, values, bias, lists, y, device, forward=forward, epilogue=epilogue, extra=extra)
        return y, *extra
    linear(x, values, bias, lists, y, device, forward=forward)
    return epilogue.compute(y)


def weight_gradient(dy: Tensor, x: Tensor, indices: Indices) -> Tensor:
    """Return the present blocks of dy^T x, with zeros in empty slots; see `ops` for shapes."""
    device = _common_device(x, dy, *indices)
    capacity, (out_blocks, in_blocks) = indices.coords.shape[0], indices.slots.shape
    block_size = x.shape[-1] // in_blocks
    _check_pair(dy, x, out_blocks * block_size)
    dw = x.new_empty(capacity, block_size, block_size)
    if capacity == 0:
        return dw
    dy, x = packed(dy), packed(x)
    grid, tokens = (out_blocks, in_blocks), x.numel() // x.shape[-1]
    kind = choice.choose("dw", x.dtype, block_size, capacity, grid, tokens, device)
    LAUNCHERS[kind].linear_dw(dy, x, indices, dw, device)
    # Kernels cannot be loaded during the capture of a CUDA graph, and a captured step computes
    # norms even if the steps before it did not. So the norms kernel is loaded with dW's.
    launchers = _norms_launchers(x.dtype, block_size, grid, tokens, device)
    launchers.norms_kernel(x.dtype, device)
    return dw


def block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    """Return the squared norms of the blocks of dy^T x, or zeros if not `armed`; see `ops`."""
    device = _common_device(x, dy, armed)
    out_features, in_features = dy.shape[-1], x.shape[-1]
    _check_pair(dy, x, out_features)
    grid = block_grid(out_features, in_features, block_size)
    if x.numel() == 0:
        return x.new_zeros(grid, dtype=torch.float32)
    norms = x.new_empty(grid, dtype=torch.float32)  # the kernels write every element
    dy, x = _packed_rows(dy), _packed_rows(x)
    launchers = _norms_launchers(x.dtype, block_size, grid, x.shape[0], device)
    launchers.norms(dy, x, armed, norms, device)
    return norms


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """Return whole blocks of the kept weights of 2:4 sparse ones, as `nm_pattern.expand`."""
    _common_device(values, positions)
    return nm_blocks.expand(values, positions)


def compress(blocks: Tensor, positions: Tensor) -> Tensor:
    """Return the kept weights of whole blocks; see `ops.Backend`."""
    _common_device(blocks, positions)
    return nm_blocks.compress(blocks, positions)


def _norms_launchers(
    dtype: torch.dtype, block_size: int, grid: tuple[int, int], tokens: int, device: int
) -> ModuleType:
    """Return the launchers of the kind that computes the block norms of a layer."""
    blocks = grid[0] * grid[1]
    return LAUNCHERS[choice.choose("norms", dtype, block_size, blocks, grid, tokens, device)]


def _common_device(first: Tensor, *others: Tensor | None) -> int:
    """Return the index of the CUDA device of all tensors.

    Raises:
        RuntimeError: if the tensors are not on one device.
    """
    device = first.get_device()
    for tensor in others:
        if tensor is not None and tensor.get_device() != device:
            raise RuntimeError(
                "The input and the layer must be on the same device; got "
                f"{first.device} and {tensor.device}. Move one of them with .to(device)."
            )
    return device


def _check_pair(dy: Tensor, x: Tensor, out_features: int) -> None:
    """Raise TypeError or ValueError unless dy and x are the operands of a weight gradient."""
    if dy.dtype != x.dtype:
        raise TypeError(f"dy must have the dtype of x, {x.dtype}; got {dy.dtype}.")
    if dy.shape[-1] != out_features or dy.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"dy must have shape {[*x.shape[:-1], out_features]}, as implied by x and the layer; "
            f"got {list(dy.shape)}."
        )


def _packed_rows(tensor: Tensor) -> Tensor:
    """Return the tensor as aligned rows, `[n, features]`, with any pitch.

    Rows are copied only if kernels cannot read them; a copy takes time even while not armed.
    """
    rows = tensor.reshape(-1, tensor.shape[-1])
    pitch = row_pitch(rows)
    is_aligned = pitch * rows.element_size() % 16 == 0 and rows.data_ptr() % 16 == 0
    in_place = is_aligned and rows.stride(1) == 1 and rows.shape[1] <= pitch <= _MAX_PITCH
    return rows if in_place else packed(rows)
