"""The ops: their schemas, their shapes (fake tensors) and their autograd formula.

Every op is functional but for `block_norms_`, and takes plain tensors whose sizes depend only on
the capacity of a layer, so that a topology update neither recompiles nor recaptures anything.

    block_linear      y  = x W^T + bias                              (differentiable)
    block_linear_dx   dx = dy W
    block_linear_dw   dW = dy^T x, at the present blocks only; zeros in empty slots
    block_norms_      scores += squared Frobenius norm of each block of dy^T x, if armed;
                      of the size of dy^T x, scores += dy^T x itself

and, for two layers with an activation between them, which saves its passes over memory:

    block_mlp         y  = f(x V^T + bias) W^T + bias                (differentiable)
    block_linear_act  h  = x W^T + bias and f(h)
    block_linear_dh   dh = (dy W) * f'(h), elementwise

`x` is `[..., in_features]`, `dy` and `y` are `[..., out_features]`, `values` and `dW` are
`[capacity, B, B]`; coords, offsets, entries and slots are int32, as in `BlockTopology`; `armed` is
a 0-dim bool, `scores` is fp32 and contiguous, both on the device of `x`. The activation f is one of
`activations.ACTIVATIONS`.

Backward gathers scores from every `token_stride`-th row of x and dy only.

In every op `scores` is `[out_blocks, in_blocks]` or, dense, `[out_features, in_features]`: for the
memory of a dense matrix a caller has, over several calls, the norms of the summed gradient in place
of summed norms. No block is a single element, so the shape says which.

`Library.define` with an `autograd.Function` at the Autograd key is used, rather than
`torch.library.custom_op`, for its host time: about half, and a kernel at low density lasts no
longer than its launch.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    "Tensor slots, Tensor armed, Tensor scores, int token_stride) -> Tensor"
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
_library.define(
    "block_linear_act(Tensor x, Tensor values, Tensor? bias, Tensor coords, "
    "Tensor row_offsets, Tensor row_entries, Tensor col_offsets, Tensor col_entries, "
    "Tensor slots, str activation) -> (Tensor, Tensor)"
)
_library.define(
    "block_linear_dh(Tensor dy, Tensor values, Tensor col_offsets, Tensor col_entries, "
    "Tensor slots, Tensor h, str activation) -> Tensor"
)
_LAYER = (
    "Tensor {0}_values, Tensor? {0}_bias, Tensor {0}_coords, Tensor {0}_row_offsets, "
    "Tensor {0}_row_entries, Tensor {0}_col_offsets, Tensor {0}_col_entries, Tensor {0}_slots, "
    "Tensor {0}_armed, Tensor {0}_scores, int {0}_token_stride"
)
_library.define(
    f"block_mlp(Tensor x, {_LAYER.format('up')}, {_LAYER.format('down')}, str activation) -> Tensor"
)

OPS = (
    "block_linear",
    "block_linear_dx",
    "block_linear_dw",
    "block_norms_",
    "block_linear_act",
    "block_linear_dh",
)

block_linear = torch.ops.sparse_lightning.block_linear.default
block_linear_dx = torch.ops.sparse_lightning.block_linear_dx.default
block_linear_dw = torch.ops.sparse_lightning.block_linear_dw.default
block_norms_ = torch.ops.sparse_lightning.block_norms_.default
block_linear_act = torch.ops.sparse_lightning.block_linear_act.default
block_linear_dh = torch.ops.sparse_lightning.block_linear_dh.default
block_mlp = torch.ops.sparse_lightning.block_mlp.default


def implement(dispatch_key: str, backend: ModuleType) -> None:
    """Register a backend: a module with one function an op, of the op's name and arguments."""
    for op in OPS:
        _library.impl(op, getattr(backend, op), dispatch_key)


class _BlockLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, values, _, *indices = args[:9]
        ctx.save_for_backward(x, values, *indices)
        # Not saved for backward: the backward of a layer that was called twice would find the
        # scores changed by its own first half, and autograd would refuse them.
        ctx.scoring = args[9:]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = block_linear(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        needs_dx, *needs = ctx.needs_input_grad[:3]
        dx = block_linear_dx(dy, values, *indices[3:]) if needs_dx else None
        return dx, *_parameter_gradients(dy, x, indices, ctx.scoring, *needs), *[None] * 9


class _BlockMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, up, down, activation = args[0], args[1:12], args[12:23], args[23]
        with torch._C._AutoDispatchBelowAutograd():
            h, a = block_linear_act(x, *up[:8], activation)
            y: Tensor = block_linear(a, *down)
        ctx.save_for_backward(x, h, a, up[0], *up[2:8], down[0], *down[2:8])
        ctx.scoring, ctx.activation = (up[8:], down[8:]), activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, *layers = ctx.saved_tensors
        (up, *up_indices), (down, *down_indices) = layers[:7], layers[7:]
        needs_dx, *needs_up = ctx.needs_input_grad[:3]
        dx = None
        of_up: tuple[Tensor | None, Tensor | None] = None, None
        of_down = _parameter_gradients(
            dy, a, down_indices, ctx.scoring[1], *ctx.needs_input_grad[12:14]
        )
        if needs_dx or any(needs_up):
            dh = block_linear_dh(dy, down, *down_indices[3:], h, ctx.activation)
            of_up = _parameter_gradients(dh, x, up_indices, ctx.scoring[0], *needs_up)
            if needs_dx:
                dx = block_linear_dx(dh, up, *up_indices[3:])
        return dx, *of_up, *[None] * 9, *of_down, *[None] * 10


def _parameter_gradients(
    dy: Tensor,
    x: Tensor,
    indices: Sequence[Tensor],
    scoring: tuple[Tensor, Tensor, int],
    needs_dvalues: bool,
    needs_dbias: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """Return the gradients of values and bias, and add to the scores of the blocks.

    `scoring` is `armed`, `scores` and `token_stride`.
    """
    dvalues = dbias = None
    if needs_dvalues:
        coords, row_offsets, row_entries, *_, slots = indices
        dvalues = block_linear_dw(dy, x, coords, row_offsets, row_entries, slots)
        armed, scores, token_stride = scoring
        if token_stride > 1:
            dy_read, x_read = (t.reshape(-1, t.shape[-1])[::token_stride] for t in (dy, x))
            block_norms_(dy_read, x_read, armed, scores)
        else:
            block_norms_(dy, x, armed, scores)
    if needs_dbias:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    return dvalues, dbias


_library.impl("block_linear", _BlockLinear.apply, "Autograd")
_library.impl("block_mlp", _BlockMlp.apply, "Autograd")


def _block_mlp(*args: Any) -> Tensor:
    _, a = block_linear_act(*args[:9], args[-1])
    y: Tensor = block_linear(a, *args[12:23])
    return y


_library.impl("block_mlp", _block_mlp, "CompositeExplicitAutograd")


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


def _fake_block_linear_act(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    h = _fake_block_linear(x, *args)
    return h, torch.empty_like(h)


def _fake_block_linear_dh(dy: Tensor, *args: Any) -> Tensor:
    return _fake_block_linear_dx(dy, *args)


def _fake_block_linear_dw(
    dy: Tensor, x: Tensor, coords: Tensor, row_offsets: Tensor, row_entries: Tensor, slots: Tensor
) -> Tensor:
    block_size = x.shape[-1] // slots.shape[1]
    return x.new_empty(coords.shape[0], block_size, block_size)


def _fake_block_norms_(dy: Tensor, x: Tensor, armed: Tensor, scores: Tensor) -> None:
    return None


for _op in OPS:
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)
