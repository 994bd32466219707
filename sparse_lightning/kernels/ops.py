"""The ops: their schemas, their shapes (fake tensors) and their autograd formula.

Every op is functional but for `block_norms_`, and takes plain tensors whose sizes depend only on
the capacity of a layer, so that a topology update neither recompiles nor recaptures anything.

    block_linear      y  = x W^T + bias                              (differentiable)
    block_linear_dx   dx = dy W
    block_linear_dw   dW = dy^T x, at the present blocks only; zeros in empty slots
    block_norms_      scores += squared Frobenius norm of each block of dy^T x, if armed

`x` is `[..., in_features]`, `dy` and `y` are `[..., out_features]`, `values` and `dW` are
`[capacity, B, B]`; coords, offsets, entries and slots are int32, as in `BlockTopology`; `armed` is
a 0-dim bool, `scores` is fp32 `[out_blocks, in_blocks]`, both on the device of `x`.

`Library.define` with an `autograd.Function` at the Autograd key is used, rather than
`torch.library.custom_op`, for its host time: about half, and a kernel at low density lasts no
longer than its launch.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAMESPACE = "sparse_lightning"
_library = torch.library.Library(NAMESPACE, "DEF")

_library.define(
    "block_linear(Tensor x, Tensor values, Tensor? bias, Tensor coords, "
    "Tensor row_offsets, Tensor row_entries, Tensor col_offsets, Tensor col_entries, "
    "Tensor slots, Tensor armed, Tensor scores) -> Tensor"
)
_library.define(
    "block_linear_dx(Tensor dy, Tensor values, Tensor col_offsets, Tensor col_entries, "
    "Tensor slots) -> Tensor"
)
_library.define(
    "block_linear_dw(Tensor dy, Tensor x, Tensor coords, Tensor row_offsets, Tensor row_entries, "
    "Tensor slots) -> Tensor"
)
_library.define("block_norms_(Tensor dy, Tensor x, Tensor armed, Tensor(a!) scores) -> ()")

OPS = ("block_linear", "block_linear_dx", "block_linear_dw", "block_norms_")

block_linear = torch.ops.sparse_lightning.block_linear.default
block_linear_dx = torch.ops.sparse_lightning.block_linear_dx.default
block_linear_dw = torch.ops.sparse_lightning.block_linear_dw.default
block_norms_ = torch.ops.sparse_lightning.block_norms_.default


def implement(dispatch_key: str, backend: ModuleType) -> None:
    """Register a backend: a module with one function an op, of the op's name and arguments."""
    for op in OPS:
        _library.impl(op, getattr(backend, op), dispatch_key)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, values, bias, *indices = args[:9]
        ctx.save_for_backward(x, values, *indices)
        # Not saved for backward: the backward of a layer that was called twice would find the
        # scores changed by its own first half, and autograd would refuse them.
        ctx.armed, ctx.scores = args[9:]
        ctx.has_bias = bias is not None
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = block_linear(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, coords, row_offsets, row_entries, *by_column = ctx.saved_tensors
        dx = dvalues = dbias = None
        if ctx.needs_input_grad[0]:
            dx = block_linear_dx(dy, values, *by_column)
        if ctx.needs_input_grad[1]:
            dvalues = block_linear_dw(dy, x, coords, row_offsets, row_entries, by_column[-1])
            block_norms_(dy, x, ctx.armed, ctx.scores)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
        return dx, dvalues, dbias, *[None] * 8


_library.impl("block_linear", _BlockLinear.apply, "Autograd")


def _fake_block_linear(
    x: Tensor,
    values: Tensor,
    bias: Tensor | None,
    coords: Tensor,
    row_offsets: Tensor,
    *_: Tensor,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], (row_offsets.shape[0] - 1) * values.shape[1])


def _fake_block_linear_dx(dy: Tensor, values: Tensor, col_offsets: Tensor, *_: Tensor) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], (col_offsets.shape[0] - 1) * values.shape[1])


def _fake_block_linear_dw(
    dy: Tensor, x: Tensor, coords: Tensor, row_offsets: Tensor, row_entries: Tensor, slots: Tensor
) -> Tensor:
    block_size = x.shape[-1] // slots.shape[1]
    return x.new_empty(coords.shape[0], block_size, block_size)


def _fake_block_norms_(dy: Tensor, x: Tensor, armed: Tensor, scores: Tensor) -> None:
    return None


for _op in OPS:
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)
