"""FLOP formulas of the ops for `torch.utils.flop_counter.FlopCounterMode`.

As in the formulas of PyTorch's own products, a multiply-add counts as two operations, and biases
and activations count as none. Only present blocks count, even if a backend computes a dense
product. Their number is read from the indices, which synchronizes with the device; training never
calls these formulas. Fake and meta tensors have nothing to read, so there every slot counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from sparse_lightning.kernels import ops
from sparse_lightning.kernels.operands import LayerOperands

_ops = getattr(torch.ops, ops.NAMESPACE)


def _product(x: Tensor, offsets: Tensor, slots: int, block_size: int) -> int:
    """Return the number of operations of a product with the present blocks, or of dW.

    Args:
        x: `[..., features]`; its leading dimensions are the tokens.
        offsets: int32; the last element is the number of present blocks.
        slots: number of blocks to count if `offsets` holds no data.
        block_size: rows and columns of a block.
    """
    has_data = not (is_fake(offsets) or offsets.is_meta)
    blocks = int(offsets[-1]) if has_data else slots
    return 2 * x.shape[:-1].numel() * blocks * block_size**2


@register_flop_formula(
    [_ops.block_linear, _ops.block_linear_act, _ops.block_linear_glu], get_raw=True
)
def _forward(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    coords: Tensor,
    row_offsets: Tensor,
    *_: Any,
    out_val: Any = None,
) -> int:
    return _product(x, row_offsets, *values.shape[:2])


@register_flop_formula(_ops.block_linear_dx, get_raw=True)
def _dx(
    dy: Tensor, values: Tensor, coords: Tensor, row_offsets: Tensor, *_: Any, out_val: Any = None
) -> int:
    return _product(dy, row_offsets, *values.shape[:2])


@register_flop_formula(
    [_ops.block_linear_dh, _ops.block_linear_dglu, _ops.block_linear_dx_add], get_raw=True
)
def _dx_with_epilogue(
    dy: Tensor, values: Tensor, col_offsets: Tensor, *_: Any, out_val: Any = None
) -> int:
    return _product(dy, col_offsets, *values.shape[:2])


@register_flop_formula(_ops.block_linear_dw, get_raw=True)
def _dw(
    dy: Tensor, x: Tensor, coords: Tensor, row_offsets: Tensor, *_: Any, out_val: Tensor
) -> int:
    return _product(x, row_offsets, *out_val.shape[:2])


@register_flop_formula(_ops.block_norms, get_raw=True)
def _norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int, out_val: Any = None) -> int:
    """Count a dense product over the sampled tokens if `armed`."""
    if is_fake(armed) or armed.is_meta or not armed:
        return 0
    return 2 * x.shape[:-1].numel() * dy.shape[-1] * x.shape[-1]


@register_flop_formula([_ops.block_mlp, _ops.block_glu, _ops.block_stacked_glu], get_raw=True)
def _mlp(x: Tensor, *args: Any, out_val: Any = None) -> int:
    # A counter sees these ops only in inference mode; otherwise it sees their products.
    n = len(LayerOperands._fields)
    return sum(_forward(x, *args[i : i + n]) for i in range(0, len(args) - 1, n))
