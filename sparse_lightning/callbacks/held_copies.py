"""Copies of the model, or of its parts, that other callbacks hold, such as weight averages."""

from __future__ import annotations

from collections.abc import Iterator

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from torch import nn

from sparse_lightning.copies import find_source
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.loading import load_sparse
from sparse_lightning.selection import sparse_layers


def averaging_callbacks() -> tuple[type[Callback], ...]:
    """Return the classes of Lightning's callbacks that copy the model to average its weights."""
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:  # Lightning 2.5
        return (StochasticWeightAveraging,)
    return (StochasticWeightAveraging, WeightAveraging)


def held_models(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the modules that callbacks of a trainer hold, except the model itself."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for value in vars(callback).values():
            items = list(value.values()) if isinstance(value, dict) else value
            for item in items if isinstance(items, list | tuple) else [value]:
                if isinstance(item, torch.optim.swa_utils.AveragedModel):
                    yield item.module
                elif isinstance(item, nn.Module) and item is not trainer.lightning_module:
                    yield item


class CopyFinder:
    """Finds the copies of a layer in the models that callbacks of a trainer hold."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        # All copies by layer name, cached for one step, since an update looks up every layer.
        self._copies: dict[str, list[BlockSparseLinear]] = {}
        self._step = -1

    def __call__(self, name: str) -> list[BlockSparseLinear]:
        """Return the copies of the layer of this name."""
        if self._step != self.trainer.global_step:
            self._step = self.trainer.global_step
            self._copies = self._find_all()
        return self._copies.get(name, [])

    def _find_all(self) -> dict[str, list[BlockSparseLinear]]:
        model = self.trainer.lightning_module
        models = list(held_models(self.trainer))
        # Layers of one lineage, such as clones in an encoder, are distinguished by their names.
        # Trainable layers are searched first, since frozen ones may be copies themselves.
        by_lineage: dict[tuple[str, bool], list[str]] = {}
        for name, layer in sparse_layers(model) if models else ():
            key = (layer._lineage, layer.values.requires_grad)
            by_lineage.setdefault(key, []).append(name)
        copies: dict[str, list[BlockSparseLinear]] = {}
        for held in models:
            for name, copy in sparse_layers(held):
                trainable, frozen = (by_lineage.get((copy._lineage, t), []) for t in (True, False))
                source = find_source(name, trainable) or find_source(name, frozen)
                if type(held) is type(model):
                    source = name
                if source is not None:
                    copies.setdefault(source, []).append(copy)
        return copies


def swap_in_copies(trainer: pl.Trainer) -> None:
    """Load the swapped model into copies that were made before the swap.

    Averaging callbacks copy the model in their `setup`; a model that builds its layers in a hook is
    swapped later.
    """
    model = trainer.lightning_module
    layers = dict(sparse_layers(model))
    for held in held_models(trainer):
        if type(held) is type(model) and dict(sparse_layers(held)).keys() != layers.keys():
            load_sparse(held, model.state_dict())
