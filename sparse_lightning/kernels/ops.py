"""The ops: their schemas, their shapes (fake tensors) and their autograd formulas.

Every op is functional, and takes plain tensors whose sizes depend only on the capacity of a layer,
so that a topology update neither recompiles nor recaptures anything.

    block_linear      y  = x W^T + bias                              (differentiable)
    block_linear_dx   dx = dy W                                      (differentiable)
    block_linear_dw   dW = dy^T x, at the present blocks only; zeros in empty slots
                                                                     (differentiable)
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

The three products are each other's derivatives, so gradients have gradients of every order. A
backward takes its products below autograd, unless it is itself to be differentiated
(`create_graph`): then they pass autograd as they would in a model.

`Library.define` with an `autograd.Function` at the Autograd key is used, rather than
`torch.library.custom_op`, for its host time: about half, and a kernel at low density lasts no
longer than its launch.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from sparse_lightning.kernels import activations

NAMESPACE = "sparse_lightning"
_library = torch.library.Library(NAMESPACE, "DEF")

_INDICES = (
    "Tensor coords, Tensor row_offsets, Tensor row_entries, Tensor col_offsets, "
    "Tensor col_entries, Tensor slots"
)
_SCORING = "Tensor? norms, Tensor? armed, int token_stride"
_library.define(
    f"block_linear(Tensor x, Tensor values, Tensor? bias, {_INDICES}, {_SCORING}) -> Tensor"
)
_library.define(f"block_linear_dx(Tensor dy, Tensor values, {_INDICES}, {_SCORING}) -> Tensor")
_library.define(f"block_linear_dw(Tensor dy, Tensor x, {_INDICES}) -> Tensor")
_library.define("block_norms(Tensor dy, Tensor x, Tensor armed, int block_size) -> Tensor")
_library.define(
    f"block_linear_act(Tensor x, Tensor values, Tensor? bias, {_INDICES}, str activation) "
    "-> (Tensor, Tensor)"
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


# What a layer's block norms need: norms, armed and token_stride.
_Scoring = tuple[Tensor | None, Tensor | None, int]


def implement(dispatch_key: str, backend: ModuleType) -> None:
    """Register a backend: a module with one function an op, of the op's name and arguments."""
    for op in OPS:
        _library.impl(op, getattr(backend, op), dispatch_key)


class _Formula(torch.autograd.Function):
    """A formula for reverse mode, of every order; other modes are told so."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(_REVERSE_MODE_ONLY)
        return super().apply(*args)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_REVERSE_MODE_ONLY)


_REVERSE_MODE_ONLY = (
    "Derivatives of block-sparse layers must be taken in reverse mode; got a transform of "
    "torch.func, or forward mode. Call torch.autograd.grad, with create_graph=True for higher "
    "derivatives, or torch.autograd.functional."
)


class _BlockLinear(_Formula):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, values, _, *indices = args[:9]
        ctx.save_for_backward(x, values, *indices)
        # Not saved for backward: autograd would refuse a flag that has been written since.
        ctx.scoring = args[9:]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = block_linear(*args)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        wanted = _wanted(ctx)
        with _below_autograd_unless_differentiated():
            dx = block_linear_dx(dy, values, *indices, *ctx.scoring) if wanted[0] else None
            return dx, *_layer_gradients(ctx, wanted, 1, dy, x, indices, ctx.scoring)


class _BlockLinearDx(_Formula):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args[:8])
        ctx.scoring = args[8:]
        with torch._C._AutoDispatchBelowAutograd():
            dx: Tensor = block_linear_dx(*args)
        return dx

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dy, values, *indices = ctx.saved_tensors
        wanted = _wanted(ctx)
        of_dy = of_values = None
        with _below_autograd_unless_differentiated():
            if wanted[0]:
                of_dy = block_linear(gradient, values, None, *indices, *ctx.scoring)
            if wanted[1]:
                of_values = block_linear_dw(dy, gradient, *indices)
            # What values learn by a penalty on gradients is evidence as what they learn by a loss.
            of_norms = _norms_gradient(ctx, wanted, (1, 8), dy, gradient, indices[-1], ctx.scoring)
        return of_dy, of_values, *[None] * 6, of_norms, None, None


class _BlockLinearDw(_Formula):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        ctx.save_for_backward(*args)
        with torch._C._AutoDispatchBelowAutograd():
            dw: Tensor = block_linear_dw(*args)
        return dw

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, *indices = ctx.saved_tensors
        wanted = _wanted(ctx)
        of_dy = of_x = None
        # The gradient stands where a layer has its values. What it has in empty slots is not read.
        with _below_autograd_unless_differentiated():
            if wanted[0]:
                of_dy = block_linear(x, gradient, None, *indices, None, None, 1)
            if wanted[1]:
                of_x = block_linear_dx(dy, gradient, *indices, None, None, 1)
        return of_dy, of_x, *[None] * 6


class _BlockMlp(_Formula):
    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        x, up, down, activation = args[0], args[1:12], args[12:23], args[23]
        with torch._C._AutoDispatchBelowAutograd():
            h, a = block_linear_act(x, *up[:8], activation)
            y: Tensor = block_linear(a, *down)
        ctx.save_for_backward(x, h, a, *up[:8], down[0], *down[2:8])
        ctx.scoring, ctx.activation = (up[8:], down[8:]), activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, a, up, up_bias, *rest = ctx.saved_tensors
        up_indices, down, down_indices = rest[:6], rest[6], rest[7:]
        up_scoring, down_scoring = ctx.scoring
        wanted = _wanted(ctx)
        wants_dh = any(wanted[:12])
        with _below_autograd_unless_differentiated():
            if torch.is_grad_enabled():
                # As the layers do it one by one, from x on: h and a were saved without a graph.
                h = block_linear(x, up, up_bias, *up_indices, *up_scoring)
                a = activations.activate(h, ctx.activation)
                if wants_dh:
                    da = block_linear_dx(dy, down, *down_indices, *down_scoring)
                    dh = activations.go_back_differentiably(da, h, ctx.activation)
            elif wants_dh:
                dh = block_linear_dh(dy, down, *down_indices[3:], h, ctx.activation)
            of_down = _layer_gradients(ctx, wanted, 12, dy, a, down_indices, down_scoring)
            of_up: tuple[Tensor | None, ...] = (None,) * 11
            dx = None
            if wants_dh:
                of_up = _layer_gradients(ctx, wanted, 1, dh, x, up_indices, up_scoring)
            if wanted[0]:
                dx = block_linear_dx(dh, up, *up_indices, *up_scoring)
        return dx, *of_up, *of_down, None


def _below_autograd_unless_differentiated() -> contextlib.AbstractContextManager[Any]:
    """Return what a backward takes its products in: only with `create_graph` they have a graph."""
    if torch.is_grad_enabled():
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def _wanted(ctx: Any) -> list[bool]:
    """Return for each argument whether the backward that runs asks for its gradient.

    `ctx.needs_input_grad` says what any backward may ask for; `autograd.grad(loss, x)` and
    `backward(inputs=[x])` ask for less.
    """
    if torch.compiler.is_compiling():
        return list(ctx.needs_input_grad)
    nodes = _nodes(ctx)
    return [needed and _runs(next(nodes)) for needed in ctx.needs_input_grad]


def _nodes(ctx: Any) -> Iterator[Node]:
    """Return the nodes of the arguments that require a gradient, in their order."""
    return (node for node, _ in ctx.next_functions if node is not None)


def _runs(node: Node) -> bool:
    """Tell whether the backward that runs comes to a node of the graph."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # A leaf that `autograd.grad` asks for; or somebody calls backward without the engine.
        return True


def _layer_gradients(
    ctx: Any,
    wanted: Sequence[bool],
    first: int,
    dy: Tensor,
    x: Tensor,
    indices: Sequence[Tensor],
    scoring: _Scoring,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a layer's eleven arguments, from values to token_stride.

    `first` is the place of values among the op's arguments. All but values, bias and norms have no
    gradient.
    """
    dvalues = dbias = None
    if wanted[first]:
        dvalues = block_linear_dw(dy, x, *indices)
    if wanted[first + 1]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    places = first, first + 8
    dnorms = _norms_gradient(ctx, wanted, places, dy, x, indices[-1], scoring)
    return dvalues, dbias, *[None] * 6, dnorms, None, None


def _norms_gradient(
    ctx: Any,
    wanted: Sequence[bool],
    places: tuple[int, int],
    dy: Tensor,
    x: Tensor,
    slots: Tensor,
    scoring: _Scoring,
) -> Tensor | None:
    """Return the gradient of norms, if it is wanted: the block norms of dy^T x.

    `places` are those of values and norms among the op's arguments. `backward(inputs=parameters)`
    does not ask for that of norms, which are no parameter, but accumulates that of values all the
    same: then the norms are accumulated here.
    """
    of_values, of_norms = places
    by_hand = not wanted[of_norms]
    if by_hand and not (
        ctx.needs_input_grad[of_norms] and wanted[of_values] and _is_accumulated(ctx, of_values)
    ):
        return None
    norms, armed, token_stride = scoring
    if token_stride > 1:
        dy, x = (t.reshape(-1, t.shape[-1])[::token_stride] for t in (dy, x))
    with torch._C._AutoDispatchBelowAutograd():
        found: Tensor = block_norms(dy, x, armed, x.shape[-1] // slots.shape[1])
    if not by_hand:
        return found
    assert norms is not None
    _accumulate(norms, found)
    return None


def _is_accumulated(ctx: Any, place: int) -> bool:
    """Tell whether the backward that runs accumulates an argument's gradient in its leaf's `grad`.

    Casts, as by autocast, may be between the two. `autograd.grad` returns the gradient instead.
    """
    node = next(itertools.islice(_nodes(ctx), sum(ctx.needs_input_grad[:place]), None))
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    try:
        return not node.next_functions and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Do what autograd's engine does at a leaf: call its hooks, and add to its `grad`."""
    for hook in (leaf._backward_hooks or {}).values():
        hook(gradient)
    if leaf.grad is None:
        leaf.grad = gradient
    else:
        leaf.grad += gradient


_library.impl("block_linear", _BlockLinear.apply, "Autograd")
_library.impl("block_linear_dx", _BlockLinearDx.apply, "Autograd")
_library.impl("block_linear_dw", _BlockLinearDw.apply, "Autograd")
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


def _fake_block_linear_dx(
    dy: Tensor,
    values: Tensor,
    coords: Tensor,
    row_offsets: Tensor,
    row_entries: Tensor,
    col_offsets: Tensor,
    *_: Any,
) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], (col_offsets.shape[0] - 1) * values.shape[1])


def _fake_block_linear_act(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    h = _fake_block_linear(x, *args)
    return h, torch.empty_like(h)


def _fake_block_linear_dh(dy: Tensor, values: Tensor, col_offsets: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], (col_offsets.shape[0] - 1) * values.shape[1])


def _fake_block_linear_dw(dy: Tensor, x: Tensor, coords: Tensor, *indices: Tensor) -> Tensor:
    block_size = x.shape[-1] // indices[-1].shape[1]
    return x.new_empty(coords.shape[0], block_size, block_size)


def _fake_block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    grid = dy.shape[-1] // block_size, x.shape[-1] // block_size
    return x.new_empty(grid, dtype=torch.float32)


for _op in OPS:
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)
