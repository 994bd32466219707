"""A vision transformer: PyTorch's encoder on patches of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Layer(nn.TransformerEncoderLayer):
    """PyTorch's layer in a class that `layer.compile()` compiles; it ignores PyTorch's own."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return what PyTorch's layer returns."""
        return super().forward(*args, **kwargs)


class Encoder(nn.Module):
    """Classify images with a pre-norm transformer encoder and the mean over its patches."""

    def __init__(
        self, width: int, layers: int, heads: int, image: int, patch: int, classes: int = 1000
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn((image // patch) ** 2, width))
        layer = Layer(width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(
            layer, layers, nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits [batch, classes] of `images` [batch, 3, image, image]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.encoder(x).mean(1))


def build() -> Encoder:
    """Return a model of ViT-L/16's size, for `sparse-lightning plan examples.encoder:build`."""
    return Encoder(width=1024, layers=24, heads=16, image=224, patch=16)
