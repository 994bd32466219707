"""MLPs that compute their layers and the activation between them as one op."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_lightning.kernels import activations, ops
from sparse_lightning.linear import BlockSparseLinear, in_autocast_dtype


class BlockSparseMLP(nn.Sequential):
    """An `nn.Sequential` that fuses a layer, an activation and a layer into one op.

    The op replaces a `BlockSparseLinear`, an `nn.ReLU`, `nn.GELU` or `nn.SiLU`, and another
    `BlockSparseLinear` in sequence. The kernel of the first product also writes the activation, and
    in backward the kernel of the second also multiplies by its derivative. All other modules run as
    in `nn.Sequential`. So do modules with hooks or with a `forward` set on the instance, which the
    op would not call. Results differ from separate modules at most in the last bit of an
    activation; see activations.cuh.

    `sparsify` turns every plain `nn.Sequential` with such layers into a `BlockSparseMLP`.

    >>> import torch
    >>> layers = (
    ...     BlockSparseLinear(64, 128, density=0.5, block_size=16),
    ...     nn.GELU(),
    ...     BlockSparseLinear(128, 64, density=0.5, block_size=16),
    ... )
    >>> BlockSparseMLP(*layers)(torch.zeros(8, 64)).shape
    torch.Size([8, 64])
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the output of the last module."""
        x, modules = input, list(self)
        while modules:
            fusible = _fusible_now(modules)
            if fusible:
                up, activation, down = fusible
                x, modules = _compute(x, activation, up, down), modules[3:]
            else:
                x, modules = modules[0](x), modules[1:]
        return x


def can_fuse(modules: nn.Sequential) -> bool:
    """Return whether a `BlockSparseMLP` of these modules would fuse any of them."""
    layers = list(modules)
    return any(_fusible(layers[i:]) is not None for i in range(len(layers)))


def activation_name(module: nn.Module) -> str | None:
    """Return the name of an activation in the ops; None if they do not support it.

    >>> activation_name(nn.GELU(approximate="tanh")), activation_name(nn.Tanh())
    ('gelu_tanh', None)
    """
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _fusible_now(
    modules: Sequence[nn.Module],
) -> tuple[BlockSparseLinear, str, BlockSparseLinear] | None:
    """Return the first three modules if this call fuses them."""
    found = _fusible(modules)
    if found is None or torch_module._has_any_global_hook():
        return None
    return None if any(map(_has_custom_call, modules[:3])) else found


def _has_custom_call(module: nn.Module) -> bool:
    """Return whether calling a module runs more than the `forward` of its class.

    Hooks do, and so does a `forward` set on the instance, as by some adapters and by code that
    moves weights between devices. Both can be added and removed between calls.
    """
    # Written out, as this takes a quarter of the time of a loop, at each call.
    return bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _fusible(
    modules: Sequence[nn.Module],
) -> tuple[BlockSparseLinear, str, BlockSparseLinear] | None:
    """Return the first three modules if they are a layer, an activation and a matching layer."""
    if len(modules) < 3:
        return None
    up, middle, down = modules[:3]
    activation = activation_name(middle)
    if activation is None:
        return None
    # A subclass may compute something else.
    if type(up) is not BlockSparseLinear or type(down) is not BlockSparseLinear:
        return None
    if up.out_features != down.in_features or up.values.dtype != down.values.dtype:
        return None
    return up, activation, down


def _compute(x: Tensor, activation: str, *layers: BlockSparseLinear) -> Tensor:
    """Return the output of an MLP's two layers or, with a gate first, three.

    The first of two may compute the gate as well, in the first half of its output.
    """
    layers[0]._check_input(x)
    x = in_autocast_dtype(x)
    operands = [operand for layer in layers for operand in layer._operands(x)]
    if len(layers) == 3:
        op = ops.block_glu
    elif layers[0].out_features == layers[1].in_features:
        op = ops.block_mlp
    else:
        op = ops.block_stacked_glu
    y: Tensor = op(x, *operands, activation)
    return y


@dataclass(frozen=True)
class MLPParts:
    """What a module computes with its layers: down(f(up(x))), or down(f(gate(x)) * up(x)).

    Attributes:
        up, down, gate: names of the layers. Without a gate, `gate` is None; if it is `up`, that
            layer computes both, and the gate is the first half of its output.
        activation: f, one of the ops' `ACTIVATIONS`.
        in_training: whether the module computes that in training, too; with dropout it does not.
        dims: the numbers of dimensions of x with which it does.
    """

    up: str
    down: str
    gate: str | None
    activation: str
    in_training: bool = True
    dims: tuple[int, ...] = (1, 2, 3, 4)

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers in the order of the op."""
        return tuple(name for name in dict.fromkeys((self.gate, self.up, self.down)) if name)


class FusedMLP(nn.Module):
    """The base of modules that compute their layers as one op, wherever that is the same.

    It is not while a layer is dense, replaced by another module, or called with hooks, after other
    children, attributes or the code have changed, or with dropout in training.

    Attributes:
        _fused_parts: what the op computes.
        _fused_class, _fused_forward: what the class was derived from, and its `forward`, for
            classes made by `fused_class`.
        _fused_beside: names and children beside the layers; None if an attribute has changed.
    """

    _fused_parts: MLPParts
    _fused_class: type[nn.Module]
    _fused_forward: object
    _fused_beside: tuple[tuple[str, nn.Module | None], ...] | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the output of the last layer."""
        if not isinstance(self, FusedMLP):  # a bound method that was kept, after `densify`
            return type(self).forward(self, *args, **kwargs)
        if len(args) == 1 and not kwargs:
            layers = self._layers_to_fuse(args[0])
            if layers is not None:
                return _compute(args[0], self._fused_parts.activation, *layers)
        return self._forward_unfused(*args, **kwargs)

    def _forward_unfused(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the modules compute one by one."""
        return self._fused_class.forward(self, *args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; if that changes one, the code of the model may do something else."""
        own = name == "training" or name.startswith("_") or name in vars(self).get("_modules", ())
        changes = not own and getattr(self, name, value) is not value
        super().__setattr__(name, value)
        if changes:
            self._fused_beside = None

    def _layers_to_fuse(self, x: Any) -> list[BlockSparseLinear] | None:
        """Return the layers in the order of the op if this call can compute them as one."""
        parts, modules, beside = self._fused_parts, self._modules, self._fused_beside
        if beside is None or not isinstance(x, Tensor) or x.dim() not in parts.dims:
            return None
        if torch_module._has_any_global_hook():
            return None
        if any(_has_custom_call(child) for child in modules.values() if child is not None):
            return None
        if self._fused_class.forward is not self._fused_forward:
            return None
        if any(modules.get(name) is not child for name, child in beside):
            return None
        if self.training and (not parts.in_training or any(map(_drops_out, modules.values()))):
            return None
        layers = [modules.get(name) for name in parts.layers]
        found = [layer for layer in layers if type(layer) is BlockSparseLinear]
        if len(found) < len(layers) or len({layer.values.dtype for layer in found}) > 1:
            return None
        *inner, down = found
        halves = 2 if parts.gate == parts.up else 1
        hidden = {halves * down.in_features, *(layer.out_features for layer in inner)}
        return found if len(hidden) == len({layer.in_features for layer in inner}) == 1 else None


def _drops_out(module: nn.Module | None) -> bool:
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0


class BlockSparseGLU(FusedMLP):
    """A gated MLP, down(f(gate(x)) * up(x)), that is computed as one op.

    `sparsify` lets the gated MLPs of models compute as this op, too; see `register_mlp`.

    Args:
        gate, up: layers from the input to the hidden features.
        down: layer from the hidden features.
        activation: f, one of "relu", "gelu", "gelu_tanh" and "silu".

    >>> import torch
    >>> gate, up = (BlockSparseLinear(64, 128, density=0.5, block_size=16) for _ in range(2))
    >>> down = BlockSparseLinear(128, 64, density=0.5, block_size=16)
    >>> BlockSparseGLU(gate, up, down, "silu")(torch.zeros(8, 64)).shape
    torch.Size([8, 64])
    """

    def __init__(
        self, gate: nn.Module, up: nn.Module, down: nn.Module, activation: str = "silu"
    ) -> None:
        super().__init__()
        activations.check(activation)
        self.gate, self.up, self.down = gate, up, down
        self._fused_parts = MLPParts("up", "down", "gate", activation)
        self._fused_class, self._fused_forward = BlockSparseGLU, BlockSparseGLU.forward
        self._fused_beside = ()

    def _forward_unfused(self, x: Tensor) -> Tensor:
        gate = activations.activate(self.gate(x), self._fused_parts.activation)
        y: Tensor = self.down(gate * self.up(x))
        return y

    def extra_repr(self) -> str:
        """Return the activation, which is no module."""
        return f"activation={self._fused_parts.activation!r}"


_fused_classes: dict[tuple[type[nn.Module], MLPParts, object], type[FusedMLP]] = {}


def fused_class(dense_class: type[nn.Module], parts: MLPParts) -> type[FusedMLP]:
    """Return the class that computes as one op what the parts of a model's MLP compute.

    It derives from the model's class, whose `forward` runs where the op would not do the same.
    """
    key = dense_class, parts, dense_class.forward
    if key in _fused_classes:
        return _fused_classes[key]

    @functools.wraps(dense_class.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return FusedMLP.forward(self, *args, **kwargs)

    def reduce(self: nn.Module, protocol: Any) -> Any:
        # A class that is made at run time cannot be found by its name.
        reduced: Any = object.__reduce_ex__(self, protocol)
        return _new_fused, (dense_class, parts), *reduced[2:]

    found = _fused_classes[key] = type(
        f"BlockSparse{dense_class.__name__}",
        (FusedMLP, dense_class),
        {
            "__doc__": f"A {dense_class.__name__} that computes its layers as one op.",
            "__module__": dense_class.__module__,
            "__reduce_ex__": reduce,
            "forward": forward,
            "_fused_parts": parts,
            "_fused_class": dense_class,
            "_fused_forward": staticmethod(dense_class.forward),
        },
    )
    return found


def dense_class_of(module: nn.Module) -> type[nn.Module] | None:
    """Return a module's class before it was fused; None if another class was put upon that."""
    cls = type(module)
    found: type[nn.Module] | None = vars(cls).get("_fused_class")
    return None if found is None and issubclass(cls, FusedMLP) else found or cls


def _new_fused(dense_class: type[nn.Module], parts: MLPParts) -> nn.Module:
    cls = fused_class(dense_class, parts)
    return object.__new__(cls)
