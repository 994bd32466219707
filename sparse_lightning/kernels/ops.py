"""The ops: their schemas, their shapes (fake tensors) and their autograd formula.

Every op is functional, and takes plain tensors whose sizes depend only on the capacity of a layer,
so that a topology update neither recompiles nor recaptures anything.

    block_linear      y  = x W^T + bias                              (differentiable)
    block_linear_dx   dx = dy W
    block_linear_dw   dW = dy^T x, at the present blocks only; zeros in empty slots
    block_norms       the squared Frobenius norm of each block of dy^T x, absent ones too, if
                      armed; else zeros

and, for two layers with an activation between them, which saves its passes over memory:

    block_mlp         y  = f(x V^T + bias) W^T + bias                (differentiable)
    block_linear_act  h  = x W^T + bias and f(h)
    block_linear_dh   dh = (dy W) * f'(h), elementwise

`x` is `[..., in_features]`, `dy` and `y` are `[..., out_features]`, `values` and `dW` are
`[capacity, B, B]`; coords, offsets, entries and slots are int32, as in `BlockTopology`. The
activation f is one of `activations.ACTIVATIONS`. `block_norms` returns fp32
`[out_blocks, in_blocks]`; `armed` is a 0-dim bool on the device of x.

`norms`, fp32 `[out_blocks, in_blocks]`, is an argument for the sake of its gradient: its elements
are never read, and backward returns as its gradient what `block_norms` returns, of every
`token_stride`-th row of x and dy only. So autograd sums the norms up where it sums up gradients,
and computes them only in a backward that asks for them. `norms` and `armed` are both None where
nobody wants norms.

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
    "Tensor slots, Tensor? norms, Tensor? armed, int token_stride) -> Tensor"
)
_library.define(
    "block_linear_dx(Tensor dy, Tensor values, Tensor col_offsets, Tensor col_entries, "
    "Tensor slots) -> Tensor"
)
_library.define(
    "block_linear_dw(Tensor dy, Tensor x, Tensor coords, Tensor row_offsets, Tensor row_entries, "
    "Tensor slots) -> Tensor"
)
_library.define("block_norms(Tensor dy, Tensor x, Tensor armed, int block_size) -> Tensor")
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
    "Tensor? {0}_norms, Tensor? {0}_armed, int {0}_token_stride"
)
_library.define(
    f"block_mlp(Tensor x, {_LAYER.format('up')}, {_LAYER.format('down')}, str activation) -> Tensor"
)

OPS = (
    "block_linear",
    "block_linear_dx",
    "block_linear_dw",
    "block_norms",
    "block_linear_act",
    "block_linear_dh",
)

block_linear = torch.ops.sparse_lightning.block_linear.default
block_linear_dx = torch.ops.sparse_lightning.block_linear_dx.default
block_linear_dw = torch.ops.sparse_lightning.block_linear_dw.default
block_norms = torch.ops.sparse_lightning.block_norms.default
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
        # Not saved for backward: autograd would refuse a flag that has been written since.
        ctx.scoring = args[10:]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = block_linear(*args)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        wants_dx, *wants = _wanted(ctx)
        dx = block_linear_dx(dy, values, *indices[3:]) if wants_dx else None
        return dx, *_layer_gradients(dy, x, indices, ctx.scoring, wants)


class _BlockMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, up, down, activation = args[0], args[1:12], args[12:23], args[23]
        with torch._C._AutoDispatchBelowAutograd():
            h, a = block_linear_act(x, *up[:8], activation)
            y: Tensor = block_linear(a, *down)
        ctx.save_for_backward(x, h, a, up[0], *up[2:8], down[0], *down[2:8])
        ctx.scoring, ctx.activation = (up[9:], down[9:]), activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, *layers = ctx.saved_tensors
        (up, *up_indices), (down, *down_indices) = layers[:7], layers[7:]
        wanted = _wanted(ctx)
        wants_dx, wants_up, wants_down = wanted[0], wanted[1:12], wanted[12:23]
        dx = None
        of_up: tuple[Tensor | None, ...] = (None,) * 11
        of_down = _layer_gradients(dy, a, down_indices, ctx.scoring[1], wants_down)
        if wants_dx or any(wants_up):
            dh = block_linear_dh(dy, down, *down_indices[3:], h, ctx.activation)
            of_up = _layer_gradients(dh, x, up_indices, ctx.scoring[0], wants_up)
            if wants_dx:
                dx = block_linear_dx(dh, up, *up_indices[3:])
        return dx, *of_up, *of_down, None


def _wanted(ctx: Any) -> list[bool]:
    """Return for each argument whether the backward that runs asks for its gradient.

    `ctx.needs_input_grad` says what any backward may ask for; `autograd.grad(loss, x)` and
    `backward(inputs=[x])` ask for less.
    """
    if torch.compiler.is_compiling():
        return list(ctx.needs_input_grad)
    # The arguments that require a gradient are those that have a node.
    nodes = (node for node, _ in ctx.next_functions if node is not None)
    return [needed and _runs(next(nodes)) for needed in ctx.needs_input_grad]


def _runs(node: torch.autograd.graph.Node) -> bool:
    """Tell whether the backward that runs comes to a node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A leaf that `autograd.grad` asks for; or somebody calls backward without the engine.
        return True


def _layer_gradients(
    dy: Tensor,
    x: Tensor,
    indices: Sequence[Tensor],
    scoring: tuple[Tensor | None, int],
    wants: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a layer's eleven arguments, from values to token_stride.

    `scoring` is armed and token_stride; `wants` says which of the gradients are asked for. All
    arguments but values, bias and norms have none.
    """
    dvalues = dbias = dnorms = None
    coords, row_offsets, row_entries, *_, slots = indices
    if wants[0]:
        dvalues = block_linear_dw(dy, x, coords, row_offsets, row_entries, slots)
    if wants[1]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    if wants[8]:
        armed, token_stride = scoring
        if token_stride > 1:
            dy, x = (t.reshape(-1, t.shape[-1])[::token_stride] for t in (dy, x))
        dnorms = block_norms(dy, x, armed, x.shape[-1] // slots.shape[1])
    return dvalues, dbias, *[None] * 6, dnorms, None, None


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


def _fake_block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    grid = dy.shape[-1] // block_size, x.shape[-1] // block_size
    return x.new_empty(grid, dtype=torch.float32)


for _op in OPS:
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)
