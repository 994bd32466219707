"""Criteria that score a layer's blocks by their usefulness.

A criterion is a function of `BlockScores` that returns `[out_blocks, in_blocks]`, higher for a
more useful block. The scores of a drop criterion are read at present blocks, those of a grow
criterion at absent ones. A user-defined criterion declares with `needs` what must be gathered for
it during training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor

# Statistics that cost time or memory between updates; gathered only for criteria that need them.
GATHERED = ("gradient", "momentum", "saliency", "movement")


def _no_values() -> Tensor:
    raise ValueError("`scores.values` must be given to be read; got scores without them.")


@dataclass(frozen=True)
class BlockScores:
    """The input of a criterion: the blocks of one layer at an update.

    Tensors with one number per block are `[out_blocks, in_blocks]` and share a device.

    Attributes:
        mask: bool, the present blocks.
        magnitude: fp32, Frobenius norm of each present block of the weight; 0 where absent.
        generator: CPU generator in the same state on every rank.
        gathered: the statistics that this training's criteria need, by their names in `GATHERED`.
        layer: name of the layer.
        step: number of steps that the layer's optimizer has taken.
        age: int32, steps since each present block was grown, or since the training began; 0 where
            absent.
        read_values: function that returns `values`.
    """

    mask: Tensor
    magnitude: Tensor
    generator: torch.Generator
    gathered: Mapping[str, Tensor] = field(default_factory=dict)
    layer: str = ""
    step: int = 0
    age: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int32, device="cpu"))
    read_values: Callable[[], Tensor] = _no_values

    @property
    def values(self) -> Tensor:
        """The weights of the present blocks, `[n, block_size, block_size]` on the layer's device.

        The order is that of `mask` in row-major order, so that `block_scores[scores.mask] = ...`
        takes one number per block. With sharded weights every rank gets all blocks.
        """
        return self.read_values()

    @property
    def gradient(self) -> Tensor:
        """fp32, norm of each block of the dense weight gradient at the update's step.

        The gradient is the one that backward has accumulated for this step, before clipping. Over
        micro-batches and ranks the value is the root of the summed squared norms.
        """
        return self._gathered("gradient")

    @property
    def momentum(self) -> Tensor:
        """fp32, `gradient` smoothed over the steps before the update."""
        return self._gathered("momentum")

    @property
    def saliency(self) -> Tensor:
        """fp32, mean of |sum of w * g| of each present block since the last update; 0 if absent.

        g is the gradient that the optimizer applies: clipped and unscaled.
        """
        return self._gathered("saliency")

    @property
    def movement(self) -> Tensor:
        """fp32, -sum of w * g of each block over the steps since it was grown; 0 where absent.

        g is the same as for `saliency`.
        """
        return self._gathered("movement")

    def _gathered(self, name: str) -> Tensor:
        if name not in self.gathered:
            raise ValueError(
                f"`scores.{name}` must be declared before training, so that it is gathered. "
                f"Decorate your criterion with @needs({name!r})."
            )
        return self.gathered[name]


Criterion = Callable[[BlockScores], Tensor]
C = TypeVar("C", bound=Callable[..., object])


def needs(*names: str) -> Callable[[C], C]:
    """Declare which gathered statistics of `BlockScores` a criterion or rule reads.

    Args:
        names: names in `GATHERED`.

    >>> @needs("gradient")
    ... def steepest(scores: BlockScores) -> Tensor:
    ...     return scores.gradient / scores.magnitude.clamp(min=1e-6)
    >>> sorted(collect_needs([steepest]))
    ['gradient']
    """
    for name in names:
        if name not in GATHERED:
            offered = ", ".join(map(repr, GATHERED))
            raise ValueError(f"`needs` must name what can be gathered, {offered}; got {name!r}.")

    def declare(criterion: C) -> C:
        criterion.needs = frozenset(names)  # type: ignore[attr-defined]
        return criterion

    return declare


def collect_needs(functions: Iterable[Callable[..., object] | None]) -> frozenset[str]:
    """Return the names of the statistics that must be gathered for these criteria or rules.

    Raises:
        ValueError: if one of them declares a name that is not in `GATHERED`.
    """
    needed: set[str] = set()
    for function in functions:
        declared: Any = getattr(function, "needs", frozenset())
        is_collection = isinstance(declared, (frozenset, set, tuple, list))
        if not is_collection or not all(name in GATHERED for name in declared):
            offered = ", ".join(map(repr, GATHERED))
            raise ValueError(
                f"`needs` must name what can be gathered, {offered}; got {declared!r}. "
                "Decorate the criterion or rule with @needs(...)."
            )
        needed.update(declared)
    return frozenset(needed)


def magnitude(scores: BlockScores) -> Tensor:
    """Score a block by the Frobenius norm of its weights (Han et al. 2015; SET and RigL drop)."""
    return scores.magnitude


@needs("gradient")
def gradient(scores: BlockScores) -> Tensor:
    """Score a block by the norm of its dense gradient (RigL: Evci et al. 2020, section 3)."""
    return scores.gradient


@needs("momentum")
def momentum(scores: BlockScores) -> Tensor:
    """Score a block by its smoothed dense gradient (SNFS: Dettmers & Zettlemoyer 2019, sec. 3).

    SNFS smooths the dense gradient over the whole training. This criterion uses only the
    `MOMENTUM_STEPS` steps before an update, since each costs a dense product, and smooths the
    squared norms of the blocks.
    """
    return scores.momentum


@needs("saliency")
def saliency(scores: BlockScores) -> Tensor:
    """Score a block by the first-order change in the loss if it were removed: |sum of w * g|.

    Source: Molchanov et al. 2019, "Importance estimation for neural network pruning", eq. 8.
    """
    return scores.saliency


@needs("movement")
def movement(scores: BlockScores) -> Tensor:
    """Score a block by how far training moves its weights away from zero: -sum of w * g.

    Source: Sanh et al. 2020, "Movement pruning", eq. 3; summed by block as in Lagunas et al. 2021.
    """
    return scores.movement


def random(scores: BlockScores) -> Tensor:
    """Score blocks at random (SET: Mocanu et al. 2018)."""
    drawn = torch.rand(
        scores.mask.shape, generator=scores.generator, dtype=torch.float32, device="cpu"
    )
    return drawn.to(scores.mask.device)


DROP_CRITERIA: dict[str, Criterion] = {
    "magnitude": magnitude,
    "gradient": gradient,
    "saliency": saliency,
    "movement": movement,
    "random": random,
}
GROW_CRITERIA: dict[str, Criterion | None] = {
    "gradient": gradient,
    "momentum": momentum,
    "random": random,
    "none": None,
}


def evaluate(argument: str, criterion: Criterion, scores: BlockScores) -> Tensor:
    """Return a criterion's scores of a layer's blocks, on the CPU, in fp32 or fp64.

    Args:
        argument: name of the option that gives the criterion, for errors.
        criterion: function to evaluate.
        scores: input of the criterion for the layer.

    Raises:
        ValueError: if the result is not one real number per block.
    """
    result = criterion(scores)
    grid = scores.mask.shape
    if not isinstance(result, Tensor) or result.shape != grid:
        got = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise ValueError(f"`{argument}` must return one score per block, {list(grid)}; got {got}.")
    if result.is_complex() or result.layout != torch.strided or result.is_meta:
        raise ValueError(
            f"`{argument}` must return real numbers in a dense tensor; got {result.dtype}, "
            f"{result.layout} on {result.device}."
        )
    return result.detach().to("cpu", torch.promote_types(result.dtype, torch.float32))


MOMENTUM_STEPS = 10
MOMENTUM_DECAY = 0.9


def block_magnitudes(values: Tensor) -> Tensor:
    """Return the Frobenius norm of each slot, computed in at least fp32 and returned in fp32.

    Args:
        values: `[capacity, block_size, block_size]`.

    Returns:
        fp32 `[capacity]`.

    >>> block_magnitudes(torch.tensor([[[3.0, 0.0], [0.0, 4.0]]]))
    tensor([5.])
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(values.detach(), dim=(1, 2), dtype=dtype)
    return norms.float()


def dense_block_norms(matrix: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the Frobenius norm of each block of a dense matrix, in fp32 for every dtype.

    Args:
        matrix: `[out_features, in_features]`.
        grid: (out_blocks, in_blocks).

    Returns:
        fp32 `[out_blocks, in_blocks]`.

    >>> dense_block_norms(torch.tensor([[3.0, 1.0], [4.0, 0.0]]), (1, 2))
    tensor([[5., 1.]])
    """
    blocks = matrix.detach().unflatten(1, (grid[1], -1)).unflatten(0, (grid[0], -1))
    dtype = torch.promote_types(matrix.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(blocks, dim=(1, 3), dtype=dtype)
    return norms.float()


def seeded_generator(seed: int, step: int, layer: str) -> torch.Generator:
    """Return a CPU generator that depends only on its arguments, so that ranks draw the same."""
    digest = hashlib.sha256(f"{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
