"""`Followers`: copies of layers, inside and outside a model, that keep their sources' blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from sparse_lightning.copies import expand_follow
from sparse_lightning.gathering import copy_to_cpu
from sparse_lightning.linear import LIVE_LAYERS, BlockSparseLinear
from sparse_lightning.selection import SwapOptions, find_sparse_copies, sparse_layers
from sparse_lightning.sharding import local_part


class Followers:
    """Finds the copies of a model's layers, and detects changes to them.

    Args:
        model: the model that holds the layers.
        options: options of the model's swap.
        follows: the known copies, `{copy: source}`.

    Attributes:
        follows: the current copies, `{copy: source}`.
        external_copies: maps the name of a layer to its copies outside the model.
    """

    def __init__(self, model: nn.Module, options: SwapOptions, follows: Mapping[str, str]) -> None:
        self.model, self.options = model, options
        self.follows = dict(follows)
        self.external_copies: Callable[[str], Iterable[BlockSparseLinear]] = no_external_copies
        # PyTorch increments the version of a tensor whenever it is written to.
        self._versions = {id(layer): layer.values._version for _, layer in sparse_layers(model)}
        # Sums of the values of copies when last inspected: in the model, by name, and outside it.
        self._sums: dict[str, float] = {}
        self._external_sums: WeakKeyDictionary[BlockSparseLinear, float] = WeakKeyDictionary()

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be pickled, and a copy of the model has other external layers.
        return {key: value for key, value in vars(self).items() if key != "_external_sums"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._external_sums = WeakKeyDictionary()

    def detect(
        self,
        held: Collection[int],
        layers: Mapping[str, BlockSparseLinear],
        evolving: Mapping[str, BlockSparseLinear],
    ) -> dict[str, str]:
        """Return which layers are copies now, `{copy: source}`.

        A layer that has been trained, which may be frozen temporarily, becomes a copy only if
        `follow` declares it. A known copy stays one until it is trained.

        Args:
            held: ids of the parameters that optimizers hold.
            layers: layers that may have copies, by name.
            evolving: those of `layers` that are not copies so far.
        """
        present = dict(sparse_layers(self.model))

        def is_held(layer: BlockSparseLinear) -> bool:
            return id(layer.values) in held

        def is_source(name: str, layer: BlockSparseLinear) -> bool:
            return is_held(layer) and (layer.values.requires_grad or layer._has_trained)

        def is_evolved_elsewhere(name: str) -> bool:  # by another Sparsifier
            return present[name]._is_locked and evolving.get(name) is not present[name]

        def may_train_elsewhere(name: str) -> bool:  # in an optimizer of another Sparsifier
            return present[name].values.requires_grad and not self.options.selects(name)

        def may_be_copy(name: str) -> bool:
            is_elsewhere = is_evolved_elsewhere(name) or may_train_elsewhere(name)
            return not (present[name]._has_trained or is_elsewhere)

        requested = expand_follow(self.options.follow, present)
        found = {
            copy: source
            for copy, source in find_sparse_copies(self.model, self.options, is_source).items()
            if copy in requested or may_be_copy(copy)
        }
        for copy, source in self.follows.items():
            if copy not in present or is_evolved_elsewhere(copy):
                continue
            layer = present[copy]
            if not (is_held(layer) and layer.values.requires_grad):
                found[copy] = source
        return {copy: source for copy, source in found.items() if source in layers}

    def get_layer(self, name: str) -> BlockSparseLinear:
        """Return a block-sparse layer of the model by its name."""
        layer = self.model.get_submodule(name)
        assert isinstance(layer, BlockSparseLinear)
        return layer

    def copies_of(self, name: str) -> Iterator[BlockSparseLinear]:
        """Yield all copies of a layer: in the model, and the external copies of each."""
        yield from self.external_copies(name)
        for copy, source in self.follows.items():
            if source == name:
                yield self.get_layer(copy)
                yield from self.external_copies(copy)

    def is_unchanged_copy(self, copy: BlockSparseLinear, source: BlockSparseLinear) -> bool:
        """Return whether both layers still hold what the swap took from equal weights."""
        if copy._agrees_with(source):
            return True
        # Without a common block, they match as long as neither has been written to.
        common = copy.topology.mask & source.topology.mask.to(copy.topology.device)
        return not common.any() and all(
            self._versions.get(id(layer)) == layer.values._version for layer in (copy, source)
        )

    def find_unwritten(self, names: Collection[str]) -> list[str]:
        """Return the copies of some layers that were not written to since `record_sums`."""
        now = self._sums_of_copies(names)
        return sorted(copy for copy, total in now.items() if self._sums.get(copy) == total)

    def record_sums(self, names: Collection[str]) -> None:
        """Record the sums of the copies of some layers, right after an update of these layers."""
        self._sums.update(self._sums_of_copies(names))

    def _sums_of_copies(self, names: Collection[str]) -> dict[str, float]:
        copies = [copy for copy, source in self.follows.items() if source in names]
        return dict(zip(copies, _value_sums(map(self.get_layer, copies)), strict=True))

    def find_unregistered_copies(
        self, layers: Mapping[str, BlockSparseLinear], excluded: Iterable[BlockSparseLinear]
    ) -> list[str]:
        """Return the layers with copies outside the model that change but do not follow.

        Args:
            layers: layers whose copies to find, by name.
            excluded: layers outside the model that do not count as copies.
        """
        names = {layer._lineage: name for name, layer in layers.items()}
        known = {id(module) for module in (*self.model.modules(), *excluded)}
        known |= {id(copy) for name in layers for copy in self.copies_of(name)}
        outside = [
            copy
            for copy in LIVE_LAYERS
            if copy._lineage in names and id(copy) not in known and not copy._is_locked
        ]
        now = dict(zip(outside, _value_sums(outside), strict=True))
        # A snapshot that is only kept for later does not change.
        before = self._external_sums
        written = [copy for copy, total in now.items() if before.get(copy, total) != total]
        self._external_sums = WeakKeyDictionary(now)
        return sorted({names[copy._lineage] for copy in written})


def _value_sums(layers: Iterable[BlockSparseLinear]) -> list[float]:
    """Return the sum of each layer's values; it changes when they are written to."""
    sums = [local_part(layer.values.detach()).double().sum() for layer in layers]
    return [float(total) for total in copy_to_cpu(sums)]


def no_external_copies(name: str) -> Iterable[BlockSparseLinear]:
    """Return no copies, the default of `Followers.external_copies`."""
    return ()
