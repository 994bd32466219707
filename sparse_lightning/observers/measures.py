"""The numbers that describe block patterns, an update, and what sparsity saves."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.observers.patterns import Patterns
from sparse_lightning.optimizer_state import find_optimizer
from sparse_lightning.policy.evolution import ModelUpdate, TopologyUpdate
from sparse_lightning.selection import sparse_layers


def update_scalars(model: nn.Module, update: ModelUpdate, patterns: Patterns) -> dict[str, float]:
    """Return the numbers that describe an update and the model after it.

    What was dropped and grown is of the layers that the update changed; all else of every layer.
    Densities are shares of blocks; `ever_active` is the share of all blocks that were ever present
    (Rs in Liu et al. 2021, "In-Time Over-Parameterization"); a row or column is dead if it has no
    block; a threshold is the smallest score of a block that stayed, left out where there is none.
    `parameters` counts present weights of the whole model; `flops_per_token` is relative to the
    same model with all its linear layers dense.
    """
    changes = update.layers.values()
    before = sum(change.n_before for change in changes)
    after = sum(change.n_after for change in changes)
    dropped = sum(len(change.dropped) for change in changes)
    grown = sum(len(change.grown) for change in changes)
    present, ever = [*patterns.present.values()], [*patterns.ever.values()]
    done, dense = linear_weights(model)
    scalars = {
        "sparsity/density": share(present),
        "sparsity/blocks_dropped": float(dropped),
        "sparsity/blocks_grown": float(grown),
        "sparsity/survival": 1 - dropped / max(1, before),
        "sparsity/churn": grown / max(1, after),
        "sparsity/ever_active": share(ever),
        "sparsity/dead_rows": float(sum(dead(mask)[0] for mask in present)),
        "sparsity/dead_columns": float(sum(dead(mask)[1] for mask in present)),
        "sparsity/parameters": float(count_parameters(model)),
        "sparsity/flops_per_token": done / max(1, dense),
    }
    if update.density_target is not None:
        scalars["sparsity/density_target"] = update.density_target
    for name, change in update.layers.items():
        rows, columns = dead(patterns.present[name])
        of_layer: dict[str, float | None] = {
            "density": share([patterns.present[name]]),
            "survival": change.survival,
            "churn": change.churn,
            "ever_active": share([patterns.ever[name]]),
            "dead_rows": float(rows),
            "dead_columns": float(columns),
            "threshold": threshold(change, update.drop_scores.get(name)),
        }
        for what, value in of_layer.items():
            if value is not None:
                scalars[f"sparsity_{what}/{name}"] = value
    return scalars


def share(masks: Sequence[Tensor]) -> float:
    """Return the share of places that are set, of several masks together."""
    return sum(int(mask.sum()) for mask in masks) / max(1, sum(mask.numel() for mask in masks))


def dead(mask: Tensor) -> tuple[int, int]:
    """Return how many block rows and block columns have no block.

    >>> dead(torch.tensor([[True, False, False], [True, False, True]]))
    (0, 1)
    """
    return int((~mask.any(1)).sum()), int((~mask.any(0)).sum())


def threshold(update: TopologyUpdate, drop_scores: Tensor | None) -> float | None:
    """Return the smallest finite score of a block that stayed; None if there is none."""
    if drop_scores is None:
        return None
    rows, cols = update.stayed.long().unbind(1)
    scores = drop_scores[rows, cols]
    scores = scores[scores.isfinite()]
    return float(scores.min()) if len(scores) else None


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, without those of empty slots."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in sparse_layers(model):
        empty = layer.topology.capacity - layer.topology.n_blocks
        total -= empty * layer.block_size**2
    return total


def linear_weights(model: nn.Module) -> tuple[int, int]:
    """Return the weights of a model's linear layers, without biases: present, and if all dense."""
    present = dense = 0
    for module in model.modules():
        if isinstance(module, BlockSparseLinear):
            present += module.topology.n_blocks * module.block_size**2
        elif isinstance(module, nn.Linear):
            present += module.in_features * module.out_features
        else:
            continue
        dense += module.in_features * module.out_features
    return present, dense


def relative_flops(model: nn.Module) -> float:
    """Return the FLOPs a token of a model's linear layers, relative to all of them dense."""
    present, dense = linear_weights(model)
    return present / max(1, dense)


def training_bytes(
    layer: BlockSparseLinear, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[int, int]:
    """Return the bytes that a layer's weight takes in training, and would take dense.

    They are those of weight, gradient and optimizer state, and of the sparse layer's indices;
    where it is sharded, of all ranks together.
    """
    tensors = [layer.values] * (2 if layer.values.requires_grad else 1)
    found = find_optimizer(optimizers, layer.values)
    if found is not None:
        tensors += found[0].state.get(layer.values, {}).values()
    values = sum(
        tensor.numel() * tensor.element_size()
        for tensor in tensors
        if isinstance(tensor, Tensor) and tensor.shape == layer.values.shape
    )
    indices = sum(t.nbytes for t in vars(layer.topology).values() if isinstance(t, Tensor))
    dense = values // max(1, layer.values.numel()) * layer.out_features * layer.in_features
    return values + indices + layer.block_norms.nbytes, dense


def predicted_speedup(
    layers: Iterable[tuple[BlockSparseLinear, float]], dtype: torch.dtype
) -> float | None:
    """Return how much faster than dense ones some layers should be together.

    Args:
        layers: each with its density.
        dtype: that they compute in.

    Returns:
        dense time / time, where dense layers take time by their weights; None where nothing was
        measured, as on a CPU.
    """
    dense = sparse = 0.0
    for layer, density in layers:
        speedup = layer.predicted_speedup(density, dtype)
        if speedup is None:
            return None
        weights = layer.in_features * layer.out_features
        dense += weights
        sparse += weights / speedup
    return dense / sparse if sparse else None


@dataclass(frozen=True)
class LayerRow:
    """What became of a layer in a training; parameters include the bias."""

    name: str
    shape: str
    block_size: int
    density: float
    blocks: int
    dead_rows: int
    dead_columns: int
    ever_active: float
    survival: float
    parameters_before: int
    parameters_after: int


def layer_row(name: str, layer: BlockSparseLinear, patterns: Patterns) -> LayerRow:
    """Describe a layer at the end of a training; `survival` is since its beginning."""
    first, present = patterns.first[name], patterns.present[name]
    blocks = int(present.sum())
    bias = 0 if layer.bias is None else layer.bias.numel()
    rows, columns = dead(present)
    return LayerRow(
        name=name,
        shape=f"{layer.out_features}x{layer.in_features}",
        block_size=layer.block_size,
        density=share([present]),
        blocks=blocks,
        dead_rows=rows,
        dead_columns=columns,
        ever_active=share([patterns.ever[name]]),
        survival=int((first & present).sum()) / max(1, int(first.sum())),
        parameters_before=layer.out_features * layer.in_features + bias,
        parameters_after=blocks * layer.block_size**2 + bias,
    )


def compute_dtype(trainer: pl.Trainer, layer: BlockSparseLinear) -> torch.dtype:
    """Return the dtype that a layer computes in."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(str(trainer.precision), layer.values.dtype)
