"""`BlockSparseMLP`: an `nn.Sequential` that computes activations on the way."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from sparse_lightning.kernels import ops
from sparse_lightning.linear import BlockSparseLinear, in_autocast_dtype

CALL_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class BlockSparseMLP(nn.Sequential):
    """An `nn.Sequential` that computes a layer, an activation and a layer in one go.

    Where a `BlockSparseLinear`, an `nn.ReLU`, `nn.GELU` or `nn.SiLU`, and another
    `BlockSparseLinear` follow each other, the first product's kernel also writes the activation,
    and in backward the second's also multiplies by its slope. All else runs as in `nn.Sequential`,
    as do modules with hooks or a `forward` of their own, which would not be called otherwise.
    Results are the same but for the last bit of an activation: see activations.cuh.

    `sparsify` makes one of every plain `nn.Sequential` that has such layers.

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
            fused = _fused(modules)
            if fused:
                x, modules = _compute(x, *fused), modules[3:]
            else:
                x, modules = modules[0](x), modules[1:]
        return x


def can_fuse(modules: nn.Sequential) -> bool:
    """Tell whether a `BlockSparseMLP` of these modules would compute any of them together."""
    layers = list(modules)
    return any(_fits(layers[i:]) is not None for i in range(len(layers)))


def activation_of(module: nn.Module) -> str | None:
    """Return the name that the ops have for an activation; None if they do not offer it.

    >>> activation_of(nn.GELU(approximate="tanh")), activation_of(nn.Tanh())
    ('gelu_tanh', None)
    """
    if type(module) is nn.GELU:
        return "gelu" if module.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))


def _fused(
    modules: Sequence[nn.Module],
) -> tuple[BlockSparseLinear, str, BlockSparseLinear] | None:
    """Return the first three modules if they are to be computed together in this call."""
    found = _fits(modules)
    if found is None or torch_module._has_any_global_hook():
        return None
    return None if any(map(_has_more_to_call, modules[:3])) else found


def _has_more_to_call(module: nn.Module) -> bool:
    """Tell whether calling a module runs more than its class's `forward`.

    That is a hook, or a `forward` that was put into the instance: some adapters are, and what
    moves weights between devices. Both come and go, so it is asked at each call.
    """
    return "forward" in vars(module) or any(getattr(module, hooks) for hooks in CALL_HOOKS)


def _fits(
    modules: Sequence[nn.Module],
) -> tuple[BlockSparseLinear, str, BlockSparseLinear] | None:
    """Return the first three modules if they are a layer, an activation and a layer to fuse."""
    if len(modules) < 3:
        return None
    up, between, down = modules[:3]
    activation = activation_of(between)
    if activation is None:
        return None
    # Exact classes: a subclass may compute something else.
    if type(up) is not BlockSparseLinear or type(down) is not BlockSparseLinear:
        return None
    if up.out_features != down.in_features or up.values.dtype != down.values.dtype:
        return None
    return up, activation, down


def _compute(x: Tensor, up: BlockSparseLinear, activation: str, down: BlockSparseLinear) -> Tensor:
    up.check_input(x)
    x = in_autocast_dtype(x)
    y: Tensor = ops.block_mlp(x, *up.operands(x), *down.operands(x), activation)
    return y
