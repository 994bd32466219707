"""`Patterns`: which blocks of each layer were present at first, which ever, and which are now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_lightning.gathering import on_cpu
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.evolution import ModelUpdate


class Patterns:
    """The block masks of a training, followed from update to update without asking the device.

    Attributes:
        first: bool `[out_blocks, in_blocks]` on the CPU, the blocks of each layer at first.
        ever: of the same shape, the blocks that have been present at any time.
        present: of the same shape, the blocks that are present.
        grown: blocks that all updates together have grown.
    """

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.ever: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}
        self.grown = 0

    def start(self, layers: Mapping[str, BlockSparseLinear]) -> None:
        """Read the present blocks; what is known of earlier ones stays."""
        slots = on_cpu([layer.topology.slots for layer in layers.values()])
        self.present = {name: of >= 0 for name, of in zip(layers, slots, strict=True)}
        self.first = {name: self.first.get(name, mask) for name, mask in self.present.items()}
        self.ever = {name: self.ever.get(name, mask) | mask for name, mask in self.present.items()}

    def follow(self, update: ModelUpdate) -> None:
        """Take in an update."""
        present = {}
        for name, done in update.layers.items():
            rows, cols = done.coords[done.coords[:, 0] >= 0].long().unbind(1)
            present[name] = torch.zeros_like(self.present[name])
            present[name][rows, cols] = True
        self.ever.update({name: self.ever[name] | mask for name, mask in present.items()})
        self.present.update(present)
        self.grown += sum(len(done.grown) for done in update.layers.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what the layers themselves do not tell: tensors on the CPU and primitives."""
        return {"first": dict(self.first), "ever": dict(self.ever), "grown": self.grown}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.first, self.ever = dict(state["first"]), dict(state["ever"])
        self.grown = state["grown"]
