"""What a model costs, dense and block-sparse: arithmetic on counts and measured times."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from sparse_lightning.kernels.choice import Shape
from sparse_lightning.linear import dense_shape
from sparse_lightning.selection import linear_layers

# A weight, its gradient, and AdamW's two moments: all of the parameter's dtype.
_TRAINED, _FROZEN = 4, 1
# A multiplication and an addition, in each of forward, dX and dW.
_FLOPS_PER_WEIGHT = 6


@dataclass(frozen=True)
class Cost:
    """What a model costs.

    Attributes:
        parameters: of the whole model.
        trained: of these, those that an optimizer changes.
        memory: bytes of weights, gradients and AdamW's two moments.
        flops: of the linear layers, for one token, in forward and backward.
        step: seconds of a training step, measured of the dense model and expected of a
            block-sparse one; None if no input was given to measure with.
    """

    parameters: int
    trained: int
    memory: int
    flops: int
    step: float | None


@dataclass(frozen=True)
class Choice(Cost):
    """What a model costs with block-sparse layers.

    Attributes:
        block_size: of the layers.
        density: present blocks / all blocks of the layers.
        speedup: step of the dense model / expected step; None without them.
    """

    block_size: int
    density: float
    speedup: float | None


@dataclass(frozen=True)
class Check:
    """A choice that was tried: seconds of a training step, expected and measured."""

    block_size: int
    density: float
    expected: float
    measured: float

    @property
    def error(self) -> float:
        """By which part of the measured step the expected one is too long.

        >>> Check(64, 0.25, expected=0.9, measured=1.0).error
        -0.1
        """
        return round(self.expected / self.measured - 1, 6)


@dataclass(frozen=True)
class Product:
    """One product of a layer: an op of `kernels.choice.STEP`, what it is of, and its dtype."""

    op: str
    shape: Shape
    dtype: torch.dtype


# How often a step computes which products, by layer.
Work = Mapping[str, Mapping[Product, int]]


@dataclass(frozen=True)
class DenseTimes:
    """Seconds of the dense model's training.

    Attributes:
        step: forward, backward and the optimizer's step.
        optimizer: of these, the optimizer's.
        launch: until the host has launched a step's work, below which no step falls; 0 on a CPU.
        products: of each product that block-sparse layers would compute otherwise, in a step.
        casts: of bringing a layer's weight into the dtype of autocast, and its gradient back.
    """

    step: float
    optimizer: float
    launch: float
    products: Mapping[Product, float]
    casts: Mapping[str, float]


def model_cost(
    model: nn.Module,
    block_size: int = 1,
    n_blocks: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
) -> Cost:
    """Return what a model costs, but for time, if some layers had only some of their blocks.

    Args:
        model: dense, on any device; not changed.
        block_size: of those layers.
        n_blocks: by layer.
        dtype: that floating-point parameters would be brought to; None for their own.

    >>> layer = nn.Sequential(nn.Linear(32, 32, bias=False))
    >>> model_cost(layer)
    Cost(parameters=1024, trained=1024, memory=16384, flops=6144, step=None)
    >>> model_cost(layer, block_size=16, n_blocks={"0": 1})
    Cost(parameters=256, trained=256, memory=4096, flops=1536, step=None)
    """

    def memory(parameter: nn.Parameter, numel: int) -> int:
        of = dtype if dtype and parameter.is_floating_point() else parameter.dtype
        return numel * of.itemsize * (_TRAINED if parameter.requires_grad else _FROZEN)

    present = n_blocks or {}
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(memory(p, p.numel()) for p in model.parameters())
    shapes = [dense_shape(layer) for _, layer in linear_layers(model)]
    weights = sum(rows * columns for rows, columns in shapes)
    for name, blocks in present.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        absent = weight.numel() - blocks * block_size**2
        parameters -= absent
        trained -= absent if weight.requires_grad else 0
        total -= memory(weight, absent)
        weights -= absent
    return Cost(parameters, trained, total, _FLOPS_PER_WEIGHT * weights, None)


def expected_step(
    dense: DenseTimes,
    work: Work,
    densities: Mapping[str, float],
    speedup: Callable[[Product, float], float],
    kept: float,
) -> float:
    """Return the seconds that a step should take with block-sparse layers.

    It is the dense step, in which the dense products of these layers are exchanged for block-sparse
    ones; casts shrink with the layers, and the optimizer's part with the model.

    Args:
        dense: times of the dense model.
        work: of its step.
        densities: of the layers that would be block-sparse.
        speedup: dense time / time of a block-sparse product of a density.
        kept: of the parameters that are trained, the part that is left.

    >>> fwd = Product("fwd", (8, 16, 16), torch.float32)
    >>> times = DenseTimes(step=10.0, optimizer=2.0, launch=0.0, products={fwd: 3.0}, casts={})
    >>> expected_step(times, {"up": {fwd: 2}}, {"up": 0.5}, lambda product, density: 3.0, kept=0.5)
    5.0
    """
    before = dense.optimizer
    after = dense.optimizer * kept
    for name, density in densities.items():
        casts = dense.casts.get(name, 0.0)
        before += casts
        after += casts * density
        for product, times in work[name].items():
            before += times * dense.products[product]
            after += times * dense.products[product] / speedup(product, density)
    # Taken one by one, parts may sum to more than the whole.
    return max(max(0.0, dense.step - before) + after, dense.launch)
