"""`Following`: who has the blocks of whom in a training; copies of layers, in the model and out."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from torch import nn

from sparse_lightning.linear import LIVING, BlockSparseLinear
from sparse_lightning.patching import SwapOptions, copies_in
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sharding import local_part


class Following:
    """Finds the copies of a model's layers, and gives them their blocks.

    Args:
        model: that holds the layers.
        options: by which it was swapped.
        follows: the copies that are known, `{copy: original}`.

    Attributes:
        follows: as given, or set later.
        elsewhere: from a layer's name to its copies outside of the model.
    """

    def __init__(self, model: nn.Module, options: SwapOptions, follows: Mapping[str, str]) -> None:
        self.model, self.options = model, options
        self.follows = dict(follows)
        self.elsewhere: Callable[[str], Iterable[BlockSparseLinear]] = none_elsewhere
        # What PyTorch counts when a tensor is written to.
        self._versions = {id(layer): layer.values._version for _, layer in sparse_layers(model)}
        self._sums: dict[str, float] = {}

    def found(self, held: Collection[int], originals: Collection[str]) -> dict[str, str]:
        """Return which layers are copies by now, `{copy: original}`.

        Args:
            held: ids of the parameters that optimizers hold: a layer that is held and not frozen
                trains, and so is no copy.
            originals: names of the layers that may have copies.
        """

        def trains(name: str, layer: BlockSparseLinear) -> bool:
            return id(layer.values) in held and layer.values.requires_grad

        found = copies_in(self.model, self.options, trains)
        return {copy: original for copy, original in found.items() if original in originals}

    def layer(self, copy: str) -> BlockSparseLinear:
        """Return the layer of a name."""
        found = self.model.get_submodule(copy)
        assert isinstance(found, BlockSparseLinear)
        return found

    def copies_of(self, name: str) -> Iterator[BlockSparseLinear]:
        """Yield the layers that follow a layer: in the model, and elsewhere, of these too."""
        yield from self.elsewhere(name)
        for copy, original in self.follows.items():
            if original == name:
                yield self.layer(copy)
                yield from self.elsewhere(copy)

    def is_equal(self, copy: BlockSparseLinear, original: BlockSparseLinear) -> bool:
        """Tell whether layers are as the swap has made them of equal weights."""
        if copy.agrees_with(original):
            return True
        # They may have no block in common.
        common = copy.topology.mask & original.topology.mask.to(copy.topology.device)
        return not common.any() and all(
            self._versions.get(id(layer)) == layer.values._version for layer in (copy, original)
        )

    def note(self) -> None:
        """Note what the copies in the model hold, right after an update."""
        self._sums = self._sums_now()

    def unwritten(self) -> list[str]:
        """Return the copies to which nobody has written since `note`."""
        if not self._sums:
            return []
        return sorted(n for n, total in self._sums_now().items() if self._sums.get(n) == total)

    def _sums_now(self) -> dict[str, float]:
        return {
            name: float(local_part(self.layer(name).values.detach()).double().sum())
            for name in self.follows
        }

    def strangers(self, layers: Mapping[str, BlockSparseLinear]) -> list[str]:
        """Return the layers, of those given, of which there are copies that do not follow."""
        names = {layer.lineage: name for name, layer in layers.items()}
        known = {id(module) for module in self.model.modules()}
        known |= {id(copy) for name in layers for copy in self.copies_of(name)}

        def unknown() -> list[str]:
            copies = [copy for copy in LIVING if copy.lineage in names and id(copy) not in known]
            return sorted({names[copy.lineage] for copy in copies if not copy.locked})

        if unknown():
            gc.collect()  # what is left of an earlier training
        return unknown()


def none_elsewhere(name: str) -> Iterable[BlockSparseLinear]:
    """Say that a layer has no copies outside of the model."""
    return ()
