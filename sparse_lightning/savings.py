"""What block sparsity saves of a model's parameters, memory, FLOPs and time."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.optimizer_state import find_optimizer
from sparse_lightning.selection import sparse_layers
from sparse_lightning.tables import in_bytes


@dataclass(frozen=True)
class Savings:
    """The sizes of a model and of its training, and what they would be if it were dense.

    Attributes:
        parameters: parameters of the whole model, without absent blocks and weights.
        dense_parameters: parameters of the whole model with every layer dense.
        nbytes: bytes of the layers' weights, gradients, optimizer state and indices.
        dense_nbytes: the same, without indices, if the layers were dense.
        flops: FLOPs of all linear layers, relative to dense ones.
    """

    parameters: int
    dense_parameters: int
    nbytes: int
    dense_nbytes: int
    flops: float

    def rows(self) -> list[tuple[str, str]]:
        """Return lines about the sizes, as pairs of a label and a text."""
        share = f"{self.nbytes / max(1, self.dense_nbytes):.1%}"
        return [
            ("parameters", f"{self.parameters:,} of {self.dense_parameters:,} dense, in the model"),
            (
                "memory",
                f"{in_bytes(self.nbytes)}, {share} of {in_bytes(self.dense_nbytes)} dense, in "
                "these layers",
            ),
            ("FLOPs", f"{self.flops:.1%} of dense, in all linear layers"),
        ]

    def scalars(self) -> dict[str, float]:
        """Return the numbers by name, for loggers."""
        return {
            "parameters": float(self.parameters),
            "dense_parameters": float(self.dense_parameters),
            "bytes": float(self.nbytes),
            "dense_bytes": float(self.dense_nbytes),
            "flops": self.flops,
        }


def measure_savings(
    model: nn.Module,
    layers: Iterable[BlockSparseLinear],
    optimizers: Collection[torch.optim.Optimizer],
) -> Savings:
    """Return the sizes of a model, and the bytes of some of its layers in training."""
    parameters = count_parameters(model)
    absent = 0
    for _, layer in sparse_layers(model):
        topology = layer.topology
        absent += layer.out_features * layer.in_features
        absent -= topology.n_blocks * topology.weights_per_block
    sizes = [training_bytes(layer, optimizers) for layer in layers]
    return Savings(
        parameters=parameters,
        dense_parameters=parameters + absent,
        nbytes=sum(sparse for sparse, _ in sizes),
        dense_nbytes=sum(dense for _, dense in sizes),
        flops=relative_flops(model),
    )


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, without the contents of empty slots."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in sparse_layers(model):
        empty = layer.topology.capacity - layer.topology.n_blocks
        total -= empty * layer.topology.weights_per_block
    return total


def linear_weights(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of weights in present blocks and in dense layers, without biases.

    Products compute with whole blocks, also where a pattern keeps half of their weights.
    """
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
    """Return the FLOPs per token of a model's linear layers, relative to dense ones."""
    present, dense = linear_weights(model)
    return present / max(1, dense)


def training_bytes(
    layer: BlockSparseLinear, optimizers: Iterable[torch.optim.Optimizer]
) -> tuple[int, int]:
    """Return the bytes of a layer's weight in training, and those of a dense weight.

    They include gradient and optimizer state, and the indices of the sparse layer; for a sharded
    layer they are the sum over all ranks.
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


def model_speedup(
    layers: Iterable[tuple[BlockSparseLinear, float]], dtype: torch.dtype
) -> float | None:
    """Return the predicted speed-up of several layers together over dense ones.

    Args:
        layers: pairs of a layer and its density.
        dtype: compute dtype of the layers.

    Returns:
        Dense time / sparse time, where a dense layer's time is assumed proportional to its weights;
        None if a layer has no measured speed-up, as on a CPU.
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
