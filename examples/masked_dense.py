"""The same training in dense arithmetic, as most tools simulate it: a baseline to compare with.

python examples/train.py '+callbacks.masked_dense._target_=masked_dense.MaskedDense'
"""

from __future__ import annotations

import lightning as L
import torch.nn.functional as F
from torch import Tensor

from sparse_lightning import BlockSparseLinear


class MaskedLinear(BlockSparseLinear):
    """The same parameters and blocks, but multiplied as one dense weight, with zeros."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `[..., out_features]` for `x` of `[..., in_features]`."""
        weight = self.topology.unpack(self.values)
        if weight.requires_grad:
            weight.register_hook(self._add_scores)
        return F.linear(x, weight, self.bias)

    def _add_scores(self, gradient: Tensor) -> None:
        rows, cols = self.topology.grid
        blocks = gradient.float().view(rows, self.block_size, cols, self.block_size)
        self.block_scores += self.armed * blocks.square().sum((1, 3))


class MaskedDense(L.Callback):
    """Makes every block-sparse layer multiply densely; place it after the `SparsityCallback`."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Give the layers that are there another forward; nothing else about them changes."""
        for module in pl_module.modules():
            if isinstance(module, BlockSparseLinear):
                module.__class__ = MaskedLinear
