"""A baseline: the same training with masked dense products, as most tools simulate sparsity.

python examples/train.py '+callbacks.masked_dense._target_=masked_dense.MaskedDense'
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor

from sparse_lightning import BlockSparseLinear


class MaskedLinear(BlockSparseLinear):
    """The same parameters and blocks, multiplied as one dense weight with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x` of `[..., in_features]`."""
        weight = self.topology.unpack(self.values)
        if self.armed and weight.requires_grad:
            weight = WithNorms.apply(weight, self.block_norms)
        return F.linear(x, weight, self.bias)


class WithNorms(torch.autograd.Function):
    """Identity on a weight; the squared block norms of its gradient become a leaf's gradient."""

    @staticmethod
    def forward(ctx, weight: Tensor, leaf: Tensor) -> Tensor:
        """Return the weight."""
        ctx.grid = leaf.shape
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the weight and the leaf."""
        rows, cols = ctx.grid
        blocks = gradient.float().unflatten(0, (rows, -1)).unflatten(2, (cols, -1))
        return gradient, blocks.square().sum((1, 3))


class MaskedDense(L.Callback):
    """Makes block-sparse layers multiply densely; place it after the `SparsityCallback`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Replace the forward of the block-sparse layers; nothing else changes."""
        for module in pl_module.modules():
            if isinstance(module, BlockSparseLinear):
                module.__class__ = MaskedLinear
