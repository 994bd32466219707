"""`MaskTracker`: the blocks of each layer that are present initially, at any time, and now."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_lightning.gathering import copy_to_cpu
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.updates import ModelUpdate


class MaskTracker:
    """Tracks the block masks of a training from its updates, without reading from the device.

    Attributes:
        first: bool `[out_blocks, in_blocks]` on the CPU for each layer, the initial block mask.
        ever: masks of the same shape, the blocks that have been present at any time.
        present: masks of the same shape, the blocks that are present now.
        before: masks of the same shape, the blocks that were present before the latest update.
        grown: number of blocks grown by all updates together.
        exchanged: number of weights that all updates together have exchanged within blocks.
        block_weights: for each layer, how many weights a present block keeps, and of how many.
    """

    def __init__(self) -> None:
        self.first: dict[str, Tensor] = {}
        self.ever: dict[str, Tensor] = {}
        self.present: dict[str, Tensor] = {}
        self.before: dict[str, Tensor] = {}
        self.grown = self.exchanged = 0
        self.block_weights: dict[str, tuple[int, int]] = {}

    def start(self, layers: Mapping[str, BlockSparseLinear]) -> None:
        """Read the present blocks; keep `first` and `ever` of layers that are already known."""
        slots = copy_to_cpu([layer.topology.slots for layer in layers.values()])
        self.present = {name: grid >= 0 for name, grid in zip(layers, slots, strict=True)}
        self.before = dict(self.present)
        self.block_weights = {
            name: (layer.topology.weights_per_block, layer.block_size**2)
            for name, layer in layers.items()
        }
        self.first = {name: self.first.get(name, mask) for name, mask in self.present.items()}
        self.ever = {name: self.ever.get(name, mask) | mask for name, mask in self.present.items()}

    def update(self, update: ModelUpdate) -> None:
        """Apply a topology update to the masks."""
        present = {}
        for name, change in update.layers.items():
            rows, cols = change.coords[change.coords[:, 0] >= 0].long().unbind(1)
            present[name] = torch.zeros_like(self.present[name])
            present[name][rows, cols] = True
        self.ever.update({name: self.ever[name] | mask for name, mask in present.items()})
        self.before = dict(self.present)
        self.present.update(present)
        self.grown += sum(len(change.grown) for change in update.layers.values())
        self.exchanged += sum(change.new_weights for change in update.layers.values())

    def state_dict(self) -> dict[str, Any]:
        """Return what cannot be read from the layers: CPU tensors and primitives."""
        counts = {"grown": self.grown, "exchanged": self.exchanged}
        return {"first": dict(self.first), "ever": dict(self.ever), **counts}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.first, self.ever = dict(state["first"]), dict(state["ever"])
        self.grown = state["grown"]
        self.exchanged = state.get("exchanged", 0)  # earlier versions exchanged none
