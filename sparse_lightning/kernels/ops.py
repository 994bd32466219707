"""The ops: their schemas, output shapes (fake tensors), autograd formulas and backends.

Every op is functional and takes plain tensors whose sizes depend only on the capacity of a layer,
so a topology update causes neither recompilation nor recapture.

    block_linear      y  = x W^T + bias                              (differentiable)
    block_linear_dx   dx = dy W                                      (differentiable)
    block_linear_dw   dW = dy^T x at the present blocks only; zeros in empty slots
                                                                     (differentiable)
    block_norms       the squared Frobenius norm of each block of dy^T x, including absent
                      blocks, if `armed`; zeros otherwise

For MLPs, whose layers have an activation between them, fused ops save passes over memory and keep
less of it for the backward:

    block_mlp         y  = down(f(up(x)))                            (differentiable)
    block_glu         y  = down(f(gate(x)) * up(x))                  (differentiable)
    block_stacked_glu the same, with gate and up as the halves of one layer's output
                                                                     (differentiable)

    block_linear_act  h  = x W^T + bias, and f(h)
    block_linear_glu  u  = x W^T + bias, and f(gate) * u
    block_linear_dh   dh = (dy W) * f'(h) and, if `recompute`, f(h)
    block_linear_dglu the gradients of gate and u and, if `recompute`, f(gate) * u
    block_linear_dx_add  dx = dy W + other

`x` is `[..., in_features]`, `dy` and `y` are `[..., out_features]`, `values` and `dW` are
`[capacity, B, B]`. The indices are as in `BlockTopology`; with `positions`, `values` and `dW` are
`[capacity, B, B / 2]`, the kept weights of 2:4 sparse blocks. The activation f is one of
`activations.ACTIVATIONS`. `block_norms` returns fp32 `[out_blocks, in_blocks]`; `armed` is a 0-dim
bool tensor on the device of `x`.

`norms`, fp32 `[out_blocks, in_blocks]`, is an argument only for the sake of its gradient; its
elements are never read. As this gradient, backward returns the `block_norms` of every
`token_stride`-th row of `x` and `dy`. Autograd thus accumulates the norms like any gradient, and
only backwards that request them compute them. `norms` and `armed` are both None if no norms are
requested.

The derivatives of each of the three products are the other two, so gradients of every order exist.
A backward calls the products below autograd. Only if it is itself differentiated (`create_graph`)
do they go through autograd, as they would in a model.

Host time counts, since a kernel at low density runs no longer than its launch takes. So the ops use
`Library.define` with an `autograd.Function` at the Autograd key, because `torch.library.custom_op`
takes about twice as long. And the functions of this module skip the dispatcher where it would do
nothing but call the backend.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import operator
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import Node

from sparse_lightning.kernels import activations, block_gradients
from sparse_lightning.kernels.epilogues import (
    STORE,
    Activated,
    ActivationGradient,
    Added,
    Epilogue,
    Gated,
    GatedGradient,
)
from sparse_lightning.kernels.operands import BlockLists, LayerOperands
from sparse_lightning.topology import Indices

NAMESPACE = "sparse_lightning"
_library = torch.library.Library(NAMESPACE, "DEF")

_INDICES = ", ".join(
    f"Tensor{'?' if name == 'positions' else ''} {name}" for name in Indices._fields
)
_NORM_OPERANDS = "Tensor? norms, Tensor? armed, int token_stride"
_library.define(
    f"block_linear(Tensor x, Tensor values, Tensor? bias, {_INDICES}, {_NORM_OPERANDS}) -> Tensor"
)
_library.define(
    f"block_linear_dx(Tensor dy, Tensor values, {_INDICES}, {_NORM_OPERANDS}) -> Tensor"
)
_library.define(f"block_linear_dw(Tensor dy, Tensor x, {_INDICES}) -> Tensor")
_library.define("block_norms(Tensor dy, Tensor x, Tensor armed, int block_size) -> Tensor")
_library.define(
    f"block_linear_act(Tensor x, Tensor values, Tensor? bias, {_INDICES}, str activation) "
    "-> (Tensor, Tensor)"
)
_library.define(
    f"block_linear_glu(Tensor x, Tensor values, Tensor? bias, {_INDICES}, Tensor gate, "
    "str activation) -> (Tensor, Tensor)"
)
_COLUMNS = (
    "Tensor dy, Tensor values, Tensor col_offsets, Tensor col_entries, Tensor slots, "
    "Tensor? positions"
)
_library.define(
    f"block_linear_dh({_COLUMNS}, Tensor h, str activation, bool recompute) -> (Tensor, Tensor)"
)
_library.define(
    f"block_linear_dglu({_COLUMNS}, Tensor gate, Tensor u, str activation, bool recompute) "
    "-> (Tensor, Tensor, Tensor)"
)
_library.define(f"block_linear_dx_add({_COLUMNS}, Tensor other) -> Tensor")
_LAYER = (
    "Tensor {0}_values, Tensor? {0}_bias, Tensor {0}_coords, Tensor {0}_row_offsets, "
    "Tensor {0}_row_entries, Tensor {0}_col_offsets, Tensor {0}_col_entries, Tensor {0}_slots, "
    "Tensor? {0}_positions, Tensor? {0}_norms, Tensor? {0}_armed, int {0}_token_stride"
)
_library.define(
    f"block_mlp(Tensor x, {_LAYER.format('up')}, {_LAYER.format('down')}, str activation) -> Tensor"
)
_library.define(
    f"block_glu(Tensor x, {_LAYER.format('gate')}, {_LAYER.format('up')}, "
    f"{_LAYER.format('down')}, str activation) -> Tensor"
)
_library.define(
    f"block_stacked_glu(Tensor x, {_LAYER.format('gate_up')}, {_LAYER.format('down')}, "
    "str activation) -> Tensor"
)

OPS = (
    "block_linear",
    "block_linear_dx",
    "block_linear_dw",
    "block_norms",
    "block_linear_act",
    "block_linear_glu",
    "block_linear_dh",
    "block_linear_dglu",
    "block_linear_dx_add",
)

# The backends' implementations, by the dispatch keys of plain tensors and by name of the op.
_implementations: dict[int, dict[str, Callable[..., Any]]] = {}


class Backend(Protocol):
    """The functions that the backend module of a device type must define."""

    def multiply(
        self,
        x: Tensor,
        values: Tensor,
        bias: Tensor | None,
        lists: BlockLists,
        *,
        forward: bool,
        epilogue: Epilogue = STORE,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Compute x W^T + bias (`forward`), or x W.

        Args:
            x: `[..., features]`; dy for the product x W.
            values: `[capacity, B, B]`, or `[capacity, B, B / 2]` with `positions`.
            bias: `[out_features]`; None for the product x W.
            lists: the blocks by output block: by row of W if `forward`, else by column.
            forward: whether to multiply by the transposed weight.
            epilogue: what to do with the product.
            positions: the weights that 2:4 sparse blocks keep; None for whole blocks.

        Returns:
            The product alone, or what the epilogue's `compute` makes of it.
        """

    def weight_gradient(self, dy: Tensor, x: Tensor, indices: Indices) -> Tensor:
        """Return the present blocks of dy^T x, with zeros in empty slots.

        They are whole, `[capacity, B, B]`, even for a 2:4 sparse layer.
        """

    def block_norms(self, dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
        """Return the squared norms of the blocks of dy^T x; zeros if not `armed`."""

    def compress(self, blocks: Tensor, positions: Tensor) -> Tensor:
        """Return the kept weights of whole blocks, as `nm_pattern.compress`."""


def implement(dispatch_key: str, backend: Backend) -> None:
    """Register a backend for all ops."""

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
        positions: Tensor | None,
        *norm_operands: Any,
    ) -> Tensor:
        lists = BlockLists(row_offsets, row_entries, slots)
        return backend.multiply(x, values, bias, lists, forward=True, positions=positions)[0]

    def block_linear_dx(
        dy: Tensor,
        values: Tensor,
        coords: Tensor,
        row_offsets: Tensor,
        row_entries: Tensor,
        col_offsets: Tensor,
        col_entries: Tensor,
        slots: Tensor,
        positions: Tensor | None,
        *norm_operands: Any,
    ) -> Tensor:
        lists = BlockLists(col_offsets, col_entries, slots)
        return backend.multiply(dy, values, None, lists, forward=False, positions=positions)[0]

    def block_linear_dw(dy: Tensor, x: Tensor, *args: Any) -> Tensor:
        indices = Indices(*args)
        blocks = backend.weight_gradient(dy, x, indices)
        if indices.positions is None:
            return blocks
        block_gradients.record(indices.positions, blocks)
        return backend.compress(blocks, indices.positions)

    def multiply_rows(
        x: Tensor, values: Tensor, bias: Tensor | None, args: Sequence[Any], epilogue: Epilogue
    ) -> Any:
        indices = Indices(*args)
        lists, positions = BlockLists.of(indices, forward=True), indices.positions
        return backend.multiply(
            x, values, bias, lists, forward=True, epilogue=epilogue, positions=positions
        )

    def block_linear_act(x: Tensor, values: Tensor, bias: Tensor | None, *args: Any) -> Any:
        *indices, activation = args
        return multiply_rows(x, values, bias, indices, Activated(activation))

    def block_linear_glu(x: Tensor, values: Tensor, bias: Tensor | None, *args: Any) -> Any:
        *indices, gate, activation = args
        return multiply_rows(x, values, bias, indices, Gated(activation, gate))

    def multiply_columns(dy: Tensor, values: Tensor, columns: Any, epilogue: Epilogue) -> Any:
        *lists, positions = columns
        return backend.multiply(
            dy,
            values,
            None,
            BlockLists(*lists),
            forward=False,
            epilogue=epilogue,
            positions=positions,
        )

    def block_linear_dh(dy: Tensor, values: Tensor, *args: Any) -> Any:
        *columns, h, activation, recompute = args
        epilogue = ActivationGradient(activation, h, recompute)
        found = multiply_columns(dy, values, columns, epilogue)
        return found if recompute else (*found, h.new_empty(0))

    def block_linear_dglu(dy: Tensor, values: Tensor, *args: Any) -> Any:
        *columns, gate, u, activation, recompute = args
        epilogue = GatedGradient(activation, gate, u, recompute)
        found = multiply_columns(dy, values, columns, epilogue)
        return found if recompute else (*found, u.new_empty(0))

    def block_linear_dx_add(dy: Tensor, values: Tensor, *args: Any) -> Any:
        *columns, other = args
        return multiply_columns(dy, values, columns, Added(other))[0]

    implementations: dict[str, Callable[..., Any]] = {
        "block_linear": block_linear,
        "block_linear_dx": block_linear_dx,
        "block_linear_dw": block_linear_dw,
        "block_norms": backend.block_norms,
        "block_linear_act": block_linear_act,
        "block_linear_glu": block_linear_glu,
        "block_linear_dh": block_linear_dh,
        "block_linear_dglu": block_linear_dglu,
        "block_linear_dx_add": block_linear_dx_add,
    }
    for op in OPS:
        _library.impl(op, implementations[op], dispatch_key)
    for keys in _plain_keys(dispatch_key):
        _implementations[keys] = implementations | _COMPOSED


def _key_set(*names: str) -> int:
    sets = [torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names]
    return int(functools.reduce(operator.or_, sets).raw_repr())


def _plain_keys(device: str) -> tuple[int, int]:
    """Return the dispatch keys of plain tensors on a device, outside and inside inference mode."""
    inference = device, f"Autocast{device}"
    return (
        _key_set(*inference, f"Autograd{device}", "ADInplaceOrView"),
        _key_set(*inference),
    )


# The keys that a thread adds to those of tensors, likewise.
_PLAIN_THREAD_KEYS = _key_set("BackendSelect", "ADInplaceOrView"), _key_set("BackendSelect")
_PLAIN_TYPES = Tensor, torch.nn.Parameter


def _implementation(name: str, first: Tensor, second: Tensor) -> Callable[..., Any] | None:
    """Return what computes an op if the dispatcher would do nothing but call it, else None.

    It does more for tensors and modes that compute, record or transform ops in their own way, such
    as fake tensors, DTensor, FLOP counters and `torch.func`, and while a profiler lists ops.

    Args:
        name: name of the op.
        first, second: its first arguments. The backend is that of their device.
    """
    if (
        torch.compiler.is_compiling()
        or type(first) not in _PLAIN_TYPES
        or type(second) not in _PLAIN_TYPES
        or first.device != second.device
        or forward_ad._current_level >= 0
        or torch._C._dispatch_tls_local_include_set().raw_repr() not in _PLAIN_THREAD_KEYS
        or torch._C._len_torch_function_stack() > 0
        or torch._C._autograd._profiler_enabled()
    ):
        return None
    found = _implementations.get(torch._C._dispatch_keys(first).raw_repr())
    return None if found is None else found[name]


def _dispatched(name: str) -> Callable[..., Any]:
    op: Callable[..., Any] = getattr(torch.ops.sparse_lightning, name).default
    return op


def _op_function(name: str) -> Callable[..., Any]:
    """Return the function that computes an op, with its derivative if it has a formula."""
    dispatched, formula = _dispatched(name), _FORMULAS.get(name)

    def call(first: Tensor, second: Tensor, *args: Any) -> Any:
        implementation = _implementation(name, first, second)
        if implementation is None:
            return dispatched(first, second, *args)
        if not torch.is_grad_enabled():
            return implementation(first, second, *args)
        return (dispatched if formula is None else formula.apply)(first, second, *args)

    return call


_REVERSE_MODE_ONLY = (
    "Derivatives of block-sparse layers must be taken in reverse mode; got a transform of "
    "torch.func, or forward mode. Call torch.autograd.grad, with create_graph=True for higher "
    "derivatives, or torch.autograd.functional."
)

_NormOperands = tuple[Tensor | None, Tensor | None, int]
_N_INDICES = len(Indices._fields)
_NO_INDEX_GRADIENTS = (None,) * _N_INDICES
_SLOTS = Indices._fields.index("slots")
_N_LAYER_OPERANDS = len(LayerOperands._fields)
# Position of `norms` relative to that of `values`; `block_linear_dx` takes no bias.
_NORMS_OFFSET = LayerOperands._fields.index("norms")
_DX_NORMS_OFFSET = _NORMS_OFFSET - 1


class _Formula(torch.autograd.Function):
    """An autograd formula for reverse mode of every order; other modes raise RuntimeError."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(_REVERSE_MODE_ONLY)
        return super().apply(*args)  # type: ignore[no-untyped-call]

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise RuntimeError(_REVERSE_MODE_ONLY)


class _BlockLinear(_Formula):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, bias: Tensor | None, *args: Any) -> Tensor:
        ctx.save_for_backward(x, values, *args[:_N_INDICES])
        # `armed` may be written before backward, which saved tensors do not permit.
        ctx.norm_operands = args[_N_INDICES:]
        with torch._C._AutoDispatchBelowAutograd():
            y: Tensor = block_linear(x, values, bias, *args)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, values, *indices = ctx.saved_tensors
        requested = _requested_gradients(ctx)
        dx = None
        with _below_autograd_unless_differentiated():
            if requested[0]:
                dx = block_linear_dx(dy, values, *indices, *ctx.norm_operands)
            return dx, *_layer_gradients(ctx, requested, 1, dy, x, indices, ctx.norm_operands)


class _BlockLinearDx(_Formula):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, values: Tensor, *args: Any) -> Tensor:
        ctx.save_for_backward(dy, values, *args[:_N_INDICES])
        ctx.norm_operands = args[_N_INDICES:]
        with torch._C._AutoDispatchBelowAutograd():
            dx: Tensor = block_linear_dx(dy, values, *args)
        return dx

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dy, values, *indices = ctx.saved_tensors
        requested = _requested_gradients(ctx)
        dy_gradient = values_gradient = None
        with _below_autograd_unless_differentiated():
            if requested[0]:
                dy_gradient = block_linear(gradient, values, None, *indices, *ctx.norm_operands)
            if requested[1]:
                values_gradient = _values_gradient(ctx, 1, dy, gradient, indices)
            # The gradient of `values` from a gradient penalty counts towards the norms, too.
            positions = 1, 1 + _DX_NORMS_OFFSET
            norms_gradient = _norms_gradient(
                ctx, requested, positions, dy, gradient, indices[_SLOTS], ctx.norm_operands
            )
        return (
            *(dy_gradient, values_gradient, *_NO_INDEX_GRADIENTS),
            *(norms_gradient, None, None),
        )


class _BlockLinearDw(_Formula):
    @staticmethod
    def forward(ctx: Any, dy: Tensor, x: Tensor, *indices: Tensor) -> Tensor:
        ctx.save_for_backward(dy, x, *indices)
        with torch._C._AutoDispatchBelowAutograd():
            dw: Tensor = block_linear_dw(dy, x, *indices)
        return dw

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        dy, x, *indices = ctx.saved_tensors
        requested = _requested_gradients(ctx)
        dy_gradient = x_gradient = None
        # The gradient takes the place of a layer's values. Its empty slots are not read.
        with _below_autograd_unless_differentiated():
            if requested[0]:
                dy_gradient = block_linear(x, gradient, None, *indices, None, None, 1)
            if requested[1]:
                x_gradient = block_linear_dx(dy, gradient, *indices, None, None, 1)
        return dy_gradient, x_gradient, *_NO_INDEX_GRADIENTS


class _BlockMlp(_Formula):
    """It keeps the pre-activation h, from which the backward computes f(h) again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        (up, down), activation = _split_layers(args)
        with torch._C._AutoDispatchBelowAutograd():
            h, y = _mlp_products(x, up, down, activation)
        ctx.save_for_backward(x, h, up.values, up.bias, down.values, *up.indices, *down.indices)
        ctx.norm_operands = up.norm_operands, down.norm_operands
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, h, up, up_bias, down, *indices = ctx.saved_tensors
        up_indices, down_indices = _split_indices(indices)
        up_norms, down_norms = ctx.norm_operands
        requested = _requested_gradients(ctx)
        needs_dh = any(requested[: 1 + _N_LAYER_OPERANDS])
        needs_a = _needs_input(requested, 1 + _N_LAYER_OPERANDS)
        a: Any = None  # like dh, stays None if no gradient depends on it
        dh: Any = None
        dx = None
        with _below_autograd_unless_differentiated():
            if torch.is_grad_enabled():
                # Recompute from x as separate layers would: h was saved without a graph.
                h = block_linear(x, up, up_bias, *up_indices, *up_norms)
                a = activations.activate(h, ctx.activation)
                if needs_dh:
                    da = block_linear_dx(dy, down, *down_indices, *down_norms)
                    dh = activations.activation_backward_differentiable(da, h, ctx.activation)
            elif needs_dh:
                columns = _columns(down_indices)
                dh, a = block_linear_dh(dy, down, *columns, h, ctx.activation, needs_a)
            elif needs_a:
                a = activations.activate(h, ctx.activation)
            down_gradients = _layer_gradients(
                ctx, requested, 1 + _N_LAYER_OPERANDS, dy, a, down_indices, down_norms
            )
            up_gradients = _layer_gradients(ctx, requested, 1, dh, x, up_indices, up_norms)
            if requested[0]:
                dx = block_linear_dx(dh, up, *up_indices, *up_norms)
        return dx, *up_gradients, *down_gradients, None


class _BlockGlu(_Formula):
    """It keeps the gate before its activation and u, and the backward recomputes their product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        (gate, up, down), activation = _split_layers(args)
        with torch._C._AutoDispatchBelowAutograd():
            g, u, y = _glu_products(x, gate, up, down, activation)
        ctx.save_for_backward(
            *(x, g, u, gate.values, gate.bias, up.values, up.bias, down.values),
            *(*gate.indices, *up.indices, *down.indices),
        )
        ctx.norm_operands = gate.norm_operands, up.norm_operands, down.norm_operands
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, g, u, gate, gate_bias, up, up_bias, down, *indices = ctx.saved_tensors
        gate_indices, up_indices, down_indices = _split_indices(indices)
        gate_norms, up_norms, down_norms = ctx.norm_operands
        requested, activation = _requested_gradients(ctx), ctx.activation
        up_at, down_at = 1 + _N_LAYER_OPERANDS, 1 + 2 * _N_LAYER_OPERANDS
        needs_hidden = any(requested[:down_at])
        needs_a = _needs_input(requested, down_at)
        a: Any = None  # like dg and du, stays None if no gradient depends on it
        dg: Any = None
        du: Any = None
        dx = None
        with _below_autograd_unless_differentiated():
            if torch.is_grad_enabled():
                # Recompute from x as separate layers would: g and u were saved without a graph.
                g = block_linear(x, gate, gate_bias, *gate_indices, *gate_norms)
                u = block_linear(x, up, up_bias, *up_indices, *up_norms)
                activated = activations.activate(g, activation)
                a = activated * u
                if needs_hidden:
                    da = block_linear_dx(dy, down, *down_indices, *down_norms)
                    dg = activations.activation_backward_differentiable(da * u, g, activation)
                    du = da * activated
            elif needs_hidden:
                columns = _columns(down_indices)
                dg, du, a = block_linear_dglu(dy, down, *columns, g, u, activation, needs_a)
            elif needs_a:
                a = activations.activate(g, activation) * u
            down_gradients = _layer_gradients(
                ctx, requested, down_at, dy, a, down_indices, down_norms
            )
            gate_gradients = _layer_gradients(ctx, requested, 1, dg, x, gate_indices, gate_norms)
            up_gradients = _layer_gradients(ctx, requested, up_at, du, x, up_indices, up_norms)
            if requested[0]:
                dx = block_linear_dx(du, up, *up_indices, *up_norms)
                if torch.is_grad_enabled():
                    dx = dx + block_linear_dx(dg, gate, *gate_indices, *gate_norms)
                else:
                    dx = block_linear_dx_add(dg, gate, *_columns(gate_indices), dx)
        return dx, *gate_gradients, *up_gradients, *down_gradients, None


class _BlockStackedGlu(_Formula):
    """It keeps the output s of gate and up, and the backward recomputes the rest."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *args: Any) -> Tensor:
        (gate_up, down), activation = _split_layers(args)
        with torch._C._AutoDispatchBelowAutograd():
            s, y = _stacked_glu_products(x, gate_up, down, activation)
        ctx.save_for_backward(
            *(x, s, gate_up.values, gate_up.bias, down.values),
            *(*gate_up.indices, *down.indices),
        )
        ctx.norm_operands = gate_up.norm_operands, down.norm_operands
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, s, gate_up, bias, down, *indices = ctx.saved_tensors
        up_indices, down_indices = _split_indices(indices)
        up_norms, down_norms = ctx.norm_operands
        requested, activation = _requested_gradients(ctx), ctx.activation
        down_at = 1 + _N_LAYER_OPERANDS
        a: Any = None  # like ds, stays None if no gradient depends on it
        ds: Any = None
        dx = None
        with _below_autograd_unless_differentiated():
            if torch.is_grad_enabled():
                # Recompute from x as separate layers would: s was saved without a graph.
                s = block_linear(x, gate_up, bias, *up_indices, *up_norms)
            if _needs_input(requested, down_at):
                a = _gated(s, activation)
            if any(requested[:down_at]):
                gate, up = s.chunk(2, -1)
                da = block_linear_dx(dy, down, *down_indices, *down_norms)
                backward = activations.activation_backward_differentiable
                d_gate = backward(da * up, gate, activation)
                ds = torch.cat([d_gate, da * activations.activate(gate, activation)], -1)
            down_gradients = _layer_gradients(
                ctx, requested, down_at, dy, a, down_indices, down_norms
            )
            up_gradients = _layer_gradients(ctx, requested, 1, ds, x, up_indices, up_norms)
            if requested[0]:
                dx = block_linear_dx(ds, gate_up, *up_indices, *up_norms)
        return dx, *up_gradients, *down_gradients, None


def _mlp_products(
    x: Tensor, up: LayerOperands, down: LayerOperands, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the pre-activation h, and the output."""
    h, a = block_linear_act(x, up.values, up.bias, *up.indices, activation)
    return h, block_linear(a, *down)


def _glu_products(
    x: Tensor, gate: LayerOperands, up: LayerOperands, down: LayerOperands, activation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gate before its activation, u, and the output."""
    g: Tensor = block_linear(x, *gate)
    u, a = block_linear_glu(x, up.values, up.bias, *up.indices, g, activation)
    return g, u, block_linear(a, *down)


def _stacked_glu_products(
    x: Tensor, gate_up: LayerOperands, down: LayerOperands, activation: str
) -> tuple[Tensor, Tensor]:
    """Return the output of gate and up, and the output."""
    activations.check(activation)
    s: Tensor = block_linear(x, *gate_up)
    return s, block_linear(_gated(s, activation), *down)


def _gated(s: Tensor, activation: str) -> Tensor:
    gate, up = s.chunk(2, -1)
    return activations.activate(gate, activation) * up


def _split_layers(args: Sequence[Any]) -> tuple[list[LayerOperands], str]:
    """Return the arguments of an MLP's op after x: those of each layer, and the activation."""
    n = _N_LAYER_OPERANDS
    *operands, activation = args
    return [LayerOperands(*operands[i : i + n]) for i in range(0, len(operands), n)], activation


def _split_indices(tensors: Sequence[Tensor]) -> list[Indices]:
    n = _N_INDICES
    return [Indices(*tensors[i : i + n]) for i in range(0, len(tensors), n)]


def _columns(indices: Indices) -> tuple[Tensor | None, ...]:
    """Return the indices that the ops take which multiply by W without its transpose."""
    return (*BlockLists.of(indices, forward=False), indices.positions)


def _needs_input(requested: Sequence[bool], position: int) -> bool:
    """Return whether a layer's gradients depend on its input; `position` is that of its values."""
    return requested[position] or requested[position + _NORMS_OFFSET]


def _below_autograd_unless_differentiated() -> contextlib.AbstractContextManager[Any]:
    """Return the context for the products of a backward; they need a graph for `create_graph`."""
    if torch.is_grad_enabled():
        return contextlib.nullcontext()
    guard: contextlib.AbstractContextManager[Any] = torch._C._AutoDispatchBelowAutograd()
    return guard


def _requested_gradients(ctx: Any) -> list[bool]:
    """Return for each argument whether the running backward requests its gradient.

    `ctx.needs_input_grad` is True for whatever any backward may request. `autograd.grad(loss, x)`
    and `backward(inputs=[x])` request less.
    """
    if torch.compiler.is_compiling():
        return list(ctx.needs_input_grad)
    nodes = _nodes(ctx)
    return [needed and _will_execute(next(nodes)) for needed in ctx.needs_input_grad]


def _nodes(ctx: Any) -> Iterator[Node]:
    """Return the graph nodes of the arguments that require a gradient, in order."""
    return (node for node, _ in ctx.next_functions if node is not None)


def _will_execute(node: Node) -> bool:
    """Return whether the running backward executes a graph node."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:
        # The node is a leaf passed to `autograd.grad`, or backward was called without the engine.
        return True


def _layer_gradients(
    ctx: Any,
    requested: Sequence[bool],
    position: int,
    dy: Tensor,
    x: Tensor,
    indices: Sequence[Any],
    norm_operands: _NormOperands,
) -> tuple[Tensor | None, ...]:
    """Return the gradients of a layer's operands; only values, bias and norms have one.

    `position` is that of `values` among the arguments of the op.
    """
    dvalues = dbias = None
    if requested[position]:
        dvalues = _values_gradient(ctx, position, dy, x, indices)
    if requested[position + 1]:
        dbias = dy.reshape(-1, dy.shape[-1]).sum(0)
    positions = position, position + _NORMS_OFFSET
    dnorms = _norms_gradient(ctx, requested, positions, dy, x, indices[_SLOTS], norm_operands)
    return dvalues, dbias, *_NO_INDEX_GRADIENTS, dnorms, None, None


def _values_gradient(
    ctx: Any, position: int, dy: Tensor, x: Tensor, indices: Sequence[Any]
) -> Tensor:
    """Return the gradient of `values`, whose position among the arguments is given.

    Whole blocks of it are recorded if they are wanted, but not for `autograd.grad`, which does not
    accumulate what it returns. Compiled code cannot tell.
    """
    gradient: Tensor
    if (
        torch.compiler.is_compiling()
        or not block_gradients.is_recording()
        or _is_accumulated(ctx, position)
    ):
        gradient = block_linear_dw(dy, x, *indices)
        return gradient
    with block_gradients.paused():
        gradient = block_linear_dw(dy, x, *indices)
    return gradient


def _norms_gradient(
    ctx: Any,
    requested: Sequence[bool],
    positions: tuple[int, int],
    dy: Tensor,
    x: Tensor,
    slots: Tensor,
    norm_operands: _NormOperands,
) -> Tensor | None:
    """Return the gradient of `norms` if it is requested: the block norms of dy^T x.

    `positions` are those of `values` and `norms` among the arguments of the op.
    `backward(inputs=parameters)` accumulates the gradient of `values` but does not request that of
    `norms`, which is not a parameter. In that case the norms are accumulated here.
    """
    values_at, norms_at = positions
    accumulate_here = not requested[norms_at]
    if accumulate_here and not (
        ctx.needs_input_grad[norms_at] and requested[values_at] and _is_accumulated(ctx, values_at)
    ):
        return None
    norms, armed, token_stride = norm_operands
    if token_stride > 1:
        dy, x = (t.reshape(-1, t.shape[-1])[::token_stride] for t in (dy, x))
    with torch._C._AutoDispatchBelowAutograd():
        gradient: Tensor = block_norms(dy, x, armed, x.shape[-1] // slots.shape[1])
    if not accumulate_here:
        return gradient
    assert norms is not None
    _accumulate(norms, gradient)
    return None


def _is_accumulated(ctx: Any, position: int) -> bool:
    """Return whether the running backward accumulates an argument's gradient in its leaf's `grad`.

    Casts, such as those of autocast, may be between argument and leaf. `autograd.grad` returns the
    gradient instead of accumulating it.
    """
    node = next(itertools.islice(_nodes(ctx), sum(ctx.needs_input_grad[:position]), None))
    while len(node.next_functions) == 1 and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
    try:
        return not node.next_functions and torch._C._will_engine_execute_node(node)
    except RuntimeError:
        return False


def _accumulate(leaf: Tensor, gradient: Tensor) -> None:
    """Call the hooks of a leaf and add to its `grad`, as the autograd engine does."""
    for hook in (leaf._backward_hooks or {}).values():
        hook(gradient)
    if leaf.grad is None:
        leaf.grad = gradient
    else:
        leaf.grad += gradient


_FORMULAS: dict[str, type[_Formula]] = {
    "block_linear": _BlockLinear,
    "block_linear_dx": _BlockLinearDx,
    "block_linear_dw": _BlockLinearDw,
    "block_mlp": _BlockMlp,
    "block_glu": _BlockGlu,
    "block_stacked_glu": _BlockStackedGlu,
}

block_linear = _op_function("block_linear")
block_linear_dx = _op_function("block_linear_dx")
block_linear_dw = _op_function("block_linear_dw")
block_norms = _op_function("block_norms")
block_linear_act = _op_function("block_linear_act")
block_linear_glu = _op_function("block_linear_glu")
block_linear_dh = _op_function("block_linear_dh")
block_linear_dglu = _op_function("block_linear_dglu")
block_linear_dx_add = _op_function("block_linear_dx_add")
block_mlp = _op_function("block_mlp")
block_glu = _op_function("block_glu")
block_stacked_glu = _op_function("block_stacked_glu")


def _without_graph(name: str) -> Callable[..., Any]:
    """Return an op that is called below autograd, and so without a derivative."""
    op = _dispatched(name)

    def call(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    return call


def _with_formula(name: str, formula: type[_Formula]) -> Callable[..., Any]:
    """Return an op with its autograd formula, which costs host time and is skipped under no_grad.

    Forward mode and transforms do not depend on grad mode; for them, the formula raises.
    """
    below = _without_graph(name)

    def call(*args: Any) -> Any:
        if (
            torch.is_grad_enabled()
            or forward_ad._current_level >= 0
            or torch._C._are_functorch_transforms_active()
        ):
            return formula.apply(*args)
        return below(*args)

    return call


for _name, _formula in _FORMULAS.items():
    _library.impl(_name, _with_formula(_name, _formula), "Autograd")

# The others have no derivative: formulas call them below autograd. Exported programs, whose MLPs
# were decomposed, call them with parameters that require a gradient.
for _name in OPS:
    if _name not in _FORMULAS:
        _library.impl(_name, _without_graph(_name), "Autograd")


def _block_mlp(x: Tensor, *args: Any) -> Tensor:
    (up, down), activation = _split_layers(args)
    return _mlp_products(x, up, down, activation)[-1]


def _block_glu(x: Tensor, *args: Any) -> Tensor:
    (gate, up, down), activation = _split_layers(args)
    return _glu_products(x, gate, up, down, activation)[-1]


def _block_stacked_glu(x: Tensor, *args: Any) -> Tensor:
    (gate_up, down), activation = _split_layers(args)
    return _stacked_glu_products(x, gate_up, down, activation)[-1]


_COMPOSED: dict[str, Callable[..., Any]] = {
    "block_mlp": _block_mlp,
    "block_glu": _block_glu,
    "block_stacked_glu": _block_stacked_glu,
}
for _name, _composed in _COMPOSED.items():
    _library.impl(_name, _composed, "CompositeExplicitAutograd")


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
    return _fake_block_linear_dx_add(dy, values, col_offsets)


def _fake_block_linear_act(x: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    h = _fake_block_linear(x, *args)
    return h, torch.empty_like(h)


_fake_block_linear_glu = _fake_block_linear_act


def _fake_block_linear_dx_add(dy: Tensor, values: Tensor, col_offsets: Tensor, *_: Any) -> Tensor:
    return dy.new_empty(*dy.shape[:-1], (col_offsets.shape[0] - 1) * values.shape[1])


def _fake_block_linear_dh(
    dy: Tensor, values: Tensor, col_offsets: Tensor, *args: Any
) -> tuple[Tensor, Tensor]:
    dh = _fake_block_linear_dx_add(dy, values, col_offsets)
    return dh, torch.empty_like(dh) if args[-1] else dh.new_empty(0)


def _fake_block_linear_dglu(
    dy: Tensor, values: Tensor, col_offsets: Tensor, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dg, a = _fake_block_linear_dh(dy, values, col_offsets, *args)
    return dg, torch.empty_like(dg), a


def _fake_block_linear_dw(dy: Tensor, x: Tensor, coords: Tensor, *indices: Tensor) -> Tensor:
    *_, slots, positions = indices
    block_size = x.shape[-1] // slots.shape[1]
    width = block_size if positions is None else block_size // 2
    return x.new_empty(coords.shape[0], block_size, width)


def _fake_block_norms(dy: Tensor, x: Tensor, armed: Tensor, block_size: int) -> Tensor:
    grid = dy.shape[-1] // block_size, x.shape[-1] // block_size
    return x.new_empty(grid, dtype=torch.float32)


for _op in OPS:
    torch.library.register_fake(f"{NAMESPACE}::{_op}", globals()[f"_fake_{_op}"], lib=_library)


def _tag_compiled_code() -> None:
    """Let PyTorch's caches tell versions of the ops apart.

    Compiled code contains formulas and calls of ops, but PyTorch identifies it by the graph before
    that, in which an op is a name. It would take code of another version, and call ops that have
    changed.
    """
    try:
        from torch.compiler import config
    except ImportError:  # PyTorch before 2.7
        return
    with contextlib.suppress(OSError, AttributeError):
        version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]
        config.cache_key_tag += f" {NAMESPACE} {version}"


_tag_compiled_code()
