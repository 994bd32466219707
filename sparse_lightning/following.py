"""`Following`: who has the blocks of whom in a training; copies of layers, in the model and out."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sparse_lightning.copies import by_hand
from sparse_lightning.gathering import on_cpu
from sparse_lightning.linear import LIVING, BlockSparseLinear
from sparse_lightning.names import is_chosen
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
        # What copies held when they were last looked at: those in the model, by name, and others.
        self._sums: dict[str, float] = {}
        self._outside: WeakKeyDictionary[BlockSparseLinear, float] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # What others hold stays here, also since weak references cannot be pickled.
        return {key: value for key, value in vars(self).items() if key != "_outside"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._outside = WeakKeyDictionary()

    def found(
        self,
        held: Collection[int],
        layers: Mapping[str, BlockSparseLinear],
        evolving: Mapping[str, BlockSparseLinear],
    ) -> dict[str, str]:
        """Return which layers are copies by now, `{copy: original}`.

        A layer that has learnt by itself becomes none, also while it is frozen for a moment. A copy
        that is known stays one until it is trained.

        Args:
            held: ids of the parameters that optimizers hold.
            layers: those that may have copies, by name.
            evolving: those among them that are no copies so far.
        """
        there = dict(sparse_layers(self.model))

        def is_held(layer: BlockSparseLinear) -> bool:
            return id(layer.values) in held

        def is_original(name: str, layer: BlockSparseLinear) -> bool:
            return is_held(layer) and (layer.values.requires_grad or layer.has_learnt)

        def is_of_another(name: str) -> bool:  # which another Sparsifier evolves
            return there[name].locked and evolving.get(name) is not there[name]

        def is_for_others(name: str) -> bool:  # it may train in an optimizer of another Sparsifier
            included = is_chosen(name, self.options.include, self.options.exclude)
            return there[name].values.requires_grad and not included

        def may_be_copy(name: str) -> bool:
            return not (there[name].has_learnt or is_of_another(name) or is_for_others(name))

        told = by_hand(self.options.follow, there)
        found = {
            copy: original
            for copy, original in copies_in(self.model, self.options, is_original).items()
            if copy in told or may_be_copy(copy)
        }
        for copy, original in self.follows.items():
            trains = copy in there and is_held(there[copy]) and there[copy].values.requires_grad
            if copy in there and not trains and not is_of_another(copy):
                found[copy] = original
        return {copy: original for copy, original in found.items() if original in layers}

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

    def unwritten(self, names: Collection[str]) -> list[str]:
        """Return the copies of some layers to which nobody has written since `note`."""
        now = self._sums_of_copies(names)
        return sorted(copy for copy, total in now.items() if self._sums.get(copy) == total)

    def note(self, names: Collection[str]) -> None:
        """Note what the copies of some layers hold, right after an update of these."""
        self._sums.update(self._sums_of_copies(names))

    def _sums_of_copies(self, names: Collection[str]) -> dict[str, float]:
        copies = [copy for copy, original in self.follows.items() if original in names]
        return dict(zip(copies, _sums_of(map(self.layer, copies)), strict=True))

    def strangers(
        self, layers: Mapping[str, BlockSparseLinear], others: Iterable[BlockSparseLinear]
    ) -> list[str]:
        """Return the layers of which there are copies that somebody writes to, and do not follow.

        Args:
            layers: that are asked about.
            others: that are no such copies.
        """
        names = {layer.lineage: name for name, layer in layers.items()}
        known = {id(module) for module in (*self.model.modules(), *others)}
        known |= {id(copy) for name in layers for copy in self.copies_of(name)}
        outside = [
            copy
            for copy in LIVING
            if copy.lineage in names and id(copy) not in known and not copy.locked
        ]
        now = dict(zip(outside, _sums_of(outside), strict=True))
        # What is only kept to look at later does not change.
        written = [copy for copy, total in now.items() if self._outside.get(copy, total) != total]
        self._outside = WeakKeyDictionary(now)
        return sorted({names[copy.lineage] for copy in written})


def _sums_of(layers: Iterable[BlockSparseLinear]) -> list[float]:
    """Return a number of each layer that tells whether somebody has written to its values."""
    sums = [local_part(layer.values.detach()).double().sum() for layer in layers]
    return [float(total) for total in on_cpu(sums)]


def none_elsewhere(name: str) -> Iterable[BlockSparseLinear]:
    """Say that a layer has no copies outside of the model."""
    return ()
