"""`BlockSparseMLP`: an `nn.Sequential` that fuses activations into block-sparse products."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_lightning.kernels import ops
from sparse_lightning.linear import BlockSparseLinear, in_autocast_dtype

_CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


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
                x, modules = _compute(x, *fusible), modules[3:]
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
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in _CALL_HOOKS)


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


def _compute(x: Tensor, up: BlockSparseLinear, activation: str, down: BlockSparseLinear) -> Tensor:
    up._check_input(x)
    x = in_autocast_dtype(x)
    y: Tensor = ops.block_mlp(x, *up._operands(x), *down._operands(x), activation)
    return y
