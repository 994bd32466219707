"""Cost of a dense or block-sparse model: arithmetic on counts and measured times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from sparse_lightning.kernels.speedups import Shape
from sparse_lightning.linear import dense_shape
from sparse_lightning.nm_pattern import kept_share
from sparse_lightning.selection import linear_layers

# Tensors in memory per parameter: a trained one has a gradient and AdamW's two moments.
_TRAINED, _FROZEN = 4, 1
# A multiplication and an addition in each of forward, dX and dW.
_FLOPS_PER_WEIGHT = 6


@dataclass(frozen=True)
class Cost:
    """Cost of a model.

    Attributes:
        parameters: number of parameters of the whole model.
        trained: number of parameters that an optimizer updates.
        memory: bytes of weights, gradients and AdamW's two moments.
        flops: FLOPs of the linear layers per token, in forward and backward.
        step: seconds of a training step: measured for the dense model, expected for a block-sparse
            one; None if no input was given to measure with.
        peak: most bytes that a step has allocated on a GPU, including activations: measured or
            expected, likewise; None if no GPU was given to measure with.
    """

    parameters: int
    trained: int
    memory: int
    flops: int
    step: float | None
    peak: int | None = field(default=None, kw_only=True)


@dataclass(frozen=True)
class Setting(Cost):
    """Cost of a model with block-sparse layers of one block size and density.

    Attributes:
        block_size: block size of the layers.
        density: density of the layers.
        speedup: measured dense step / expected step; None if no step was measured.
    """

    block_size: int
    density: float
    speedup: float | None


@dataclass(frozen=True)
class Check:
    """Expected and measured seconds, and peak memory in bytes, of a step with one setting."""

    block_size: int
    density: float
    expected: float
    measured: float
    expected_peak: int | None = None
    measured_peak: int | None = None

    @property
    def error(self) -> float:
        """Relative error of the expected step.

        >>> Check(64, 0.25, expected=0.9, measured=1.0).error
        -0.1
        """
        return round(self.expected / self.measured - 1, 6)

    @property
    def peak_error(self) -> float | None:
        """Relative error of the expected peak; None if it was not measured."""
        if not self.expected_peak or not self.measured_peak:
            return None
        return round(self.expected_peak / self.measured_peak - 1, 6)


@dataclass(frozen=True)
class Product:
    """One product of a layer: its op (of `kernels.choice.STEP`), shape and dtype."""

    op: str
    shape: Shape
    dtype: torch.dtype


# How often a step computes each product, by layer.
ProductCounts = Mapping[str, Mapping[Product, int]]


@dataclass(frozen=True)
class DenseTimes:
    """Measured times of the dense model in seconds.

    Attributes:
        step: time of a training step: forward, backward and optimizer.
        optimizer: time of the optimizer within the step.
        launch: time in which the host launches a step, a lower bound of any step; 0 on a CPU.
        products: time of each product that block-sparse layers would replace.
        casts: time to cast a layer's weight to the autocast dtype, and its gradient back.
        fusions: time that computing layers as one op saves, by their names.
    """

    step: float
    optimizer: float
    launch: float
    products: Mapping[Product, float]
    casts: Mapping[str, float]
    fusions: Mapping[tuple[str, ...], float] = field(default_factory=dict)


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a training step has allocated.

    Attributes:
        forward: at the end of the forward: parameters, moments, and what the backward will read.
        peak: at most.
        update: at most in the optimizer's step: parameters, moments and gradients.
    """

    forward: int
    peak: int
    update: int


@dataclass(frozen=True)
class DenseMemory:
    """Bytes of the dense model in a training step.

    Attributes:
        step: what a step has allocated.
        casts: what the backward reads of a layer's weight in the autocast dtype, by layer.
        fusions: what the backward need not read if layers are computed as one op, by their names.
    """

    step: StepMemory
    casts: Mapping[str, int] = field(default_factory=dict)
    fusions: Mapping[tuple[str, ...], int] = field(default_factory=dict)


def model_cost(
    model: nn.Module,
    block_size: int = 1,
    n_blocks: Mapping[str, int] | None = None,
    dtype: torch.dtype | None = None,
    nm: str | None = None,
) -> Cost:
    """Return the cost, except time, of a model in which some layers may be block-sparse.

    Args:
        model: dense model on any device; it is not modified.
        block_size: block size of those layers.
        n_blocks: number of present blocks by layer.
        dtype: dtype to which floating-point parameters are cast; None keeps theirs.
        nm: "2:4" if only two of each four weights within blocks are kept, and count; else None.

    >>> layer = nn.Sequential(nn.Linear(32, 32, bias=False))
    >>> model_cost(layer)
    Cost(parameters=1024, trained=1024, memory=16384, flops=6144, step=None, peak=None)
    >>> model_cost(layer, block_size=16, n_blocks={"0": 1})
    Cost(parameters=256, trained=256, memory=4096, flops=1536, step=None, peak=None)
    >>> model_cost(layer, block_size=16, n_blocks={"0": 1}, nm="2:4")
    Cost(parameters=128, trained=128, memory=2048, flops=768, step=None, peak=None)
    """

    def memory(parameter: nn.Parameter, numel: int) -> int:
        stored = dtype if dtype and parameter.is_floating_point() else parameter.dtype
        return numel * stored.itemsize * (_TRAINED if parameter.requires_grad else _FROZEN)

    present = n_blocks or {}
    parameters = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(memory(p, p.numel()) for p in model.parameters())
    shapes = [dense_shape(layer) for _, layer in linear_layers(model)]
    weights = sum(rows * columns for rows, columns in shapes)
    for weight, absent in _absent_weights(model, block_size, present, nm):
        parameters -= absent
        trained -= absent if weight.requires_grad else 0
        total -= memory(weight, absent)
        weights -= absent
    return Cost(parameters, trained, total, _FLOPS_PER_WEIGHT * weights, None)


def gradient_bytes(
    model: nn.Module,
    block_size: int,
    n_blocks: Mapping[str, int],
    dtype: torch.dtype | None,
    nm: str | None = None,
) -> int:
    """Return the bytes of gradients that the absent weights of layers would have.

    Args:
        model, block_size, n_blocks, dtype, nm: as for `model_cost`.
    """
    return sum(
        absent * (dtype or weight.dtype).itemsize
        for weight, absent in _absent_weights(model, block_size, n_blocks, nm)
        if weight.requires_grad
    )


def _absent_weights(
    model: nn.Module, block_size: int, n_blocks: Mapping[str, int], nm: str | None
) -> Iterator[tuple[nn.Parameter, int]]:
    """Yield the weight of each block-sparse layer, and how many of its elements are absent."""
    for name, blocks in n_blocks.items():
        weight = model.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        yield weight, weight.numel() - round(blocks * block_size**2 * kept_share(nm))


def expected_step(
    dense: DenseTimes,
    counts: ProductCounts,
    densities: Mapping[str, float],
    speedup: Callable[[Product, float], float],
    trained_share: float,
    kept: float = 1.0,
    whole_blocks: Callable[[str, Product], float] = lambda name, product: 0.0,
) -> float:
    """Return the expected seconds of a step with block-sparse layers.

    In the dense step, the dense products of these layers are replaced by block-sparse ones, and
    activations between two of them are fused. The time of casts scales with the density, and that
    of the optimizer with the trained parameters. Kernels multiply whole blocks, also of layers that
    keep only some of the weights of a block.

    Args:
        dense: times of the dense model.
        counts: products of a step.
        densities: densities of the block-sparse layers by name.
        speedup: function that returns dense time / block-sparse time of a product at a density.
        trained_share: share of the trained parameters that remain.
        kept: share of the weights of present blocks that are kept, and cast.
        whole_blocks: function that returns the seconds in which a product of a layer, given by its
            name, makes whole blocks of the kept weights, or takes these out of whole blocks.

    >>> fwd = Product("fwd", (8, 16, 16), torch.float32)
    >>> times = DenseTimes(step=10.0, optimizer=2.0, launch=0.0, products={fwd: 3.0}, casts={})
    >>> expected_step(times, {"up": {fwd: 2}}, {"up": 0.5}, lambda product, density: 3.0, 0.5)
    5.0
    """
    before = dense.optimizer
    after = dense.optimizer * trained_share
    for name, density in densities.items():
        casts = dense.casts.get(name, 0.0)
        before += casts
        after += casts * density * kept
        for product, count in counts[name].items():
            before += count * dense.products[product]
            seconds = dense.products[product] / speedup(product, density)
            after += count * (seconds + whole_blocks(name, product))
    for names, saved in dense.fusions.items():
        if all(name in densities for name in names):
            before += saved
    # Parts measured separately can sum to more than the step.
    return max(max(0.0, dense.step - before) + after, dense.launch)


def expected_peak(
    dense: DenseMemory, densities: Mapping[str, float], absent: int, absent_gradients: int
) -> int:
    """Return the most bytes that a step with block-sparse layers is expected to allocate.

    The peak is at the end of the forward or in the optimizer's step, whichever is higher, and some
    bytes above it, which stay the same. The whole blocks that one product makes of kept weights are
    not included.

    Args:
        dense: memory of the dense model.
        densities: shares of the weights that the block-sparse layers keep, by name.
        absent: bytes of absent weights, of their gradients and moments.
        absent_gradients: bytes of their gradients, which do not exist during the forward.

    >>> dense = DenseMemory(StepMemory(forward=100, peak=110, update=60))
    >>> expected_peak(dense, {}, 40, 10)
    80
    """
    step = dense.step
    forward = step.forward - (absent - absent_gradients)
    forward -= round(sum(dense.casts.get(name, 0) * (1 - d) for name, d in densities.items()))
    for names, saved in dense.fusions.items():
        if all(name in densities for name in names):
            forward -= saved
    above = max(0, step.peak - max(step.forward, step.update))
    return max(forward, step.update - absent) + above
