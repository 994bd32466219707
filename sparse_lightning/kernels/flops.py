"""What the ops count in `torch.utils.flop_counter.FlopCounterMode`.

As for PyTorch's own products, a multiplication with an addition is two operations, and biases and
activations are none. Of a product only present blocks count: what is asked for, however a backend
computes it. How many are present stands in the indices, on their device, which a counter may wait
for; training never calls these formulas. Where there is nothing to read, as in fake tensors, every
slot counts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.utils.flop_counter import register_flop_formula

from sparse_lightning.kernels import ops

_ops = getattr(torch.ops, ops.NAMESPACE)


def _product(x: Tensor, offsets: Tensor, slots: int, block_size: int) -> int:
    """Return the operations of a product with packed blocks, or of their gradient.

    Args:
        x: `[..., features]`, of which the tokens count.
        offsets: int32, rising to the number of present blocks.
        slots: what counts where `offsets` holds no data.
        block_size: rows and columns of a block.
    """
    has_data = not (is_fake(offsets) or offsets.is_meta)
    blocks = int(offsets[-1]) if has_data else slots
    return 2 * x.shape[:-1].numel() * blocks * block_size**2


@register_flop_formula([_ops.block_linear, _ops.block_linear_act], get_raw=True)
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


@register_flop_formula(_ops.block_linear_dh, get_raw=True)
def _dh(dy: Tensor, values: Tensor, col_offsets: Tensor, *_: Any, out_val: Any = None) -> int:
    return _product(dy, col_offsets, *values.shape[:2])


@register_flop_formula(_ops.block_linear_dw, get_raw=True)
def _dw(
    dy: Tensor, x: Tensor, coords: Tensor, row_offsets: Tensor, *_: Any, out_val: Tensor
) -> int:
    return _product(x, row_offsets, *out_val.shape[:2])


@register_flop_formula(_ops.block_norms, get_raw=True)
def _norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int, out_val: Any = None) -> int:
    """A dense product of the tokens that are read, while armed."""
    if is_fake(armed) or armed.is_meta or not armed:
        return 0
    return 2 * x.shape[:-1].numel() * dy.shape[-1] * x.shape[-1]


@register_flop_formula(_ops.block_mlp, get_raw=True)
def _mlp(x: Tensor, *args: Any, out_val: Any = None) -> int:
    # Seen whole in inference mode only; else its two products are.
    return _forward(x, *args[:11]) + _forward(x, *args[11:22])
