"""The usefulness of blocks: from what is known about a layer's blocks to one score a block.

A criterion is a function of `BlockScores` that returns `[out_blocks, in_blocks]`, higher for a
more useful block. Drop criteria are read at present blocks, grow criteria at absent ones. Users
write their own, and say by `needs` what must be gathered for them during training.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

# What costs time or memory between updates, and is gathered only for a criterion that needs it.
GATHERED = ("gradient", "momentum", "saliency", "movement")


@dataclass(frozen=True)
class BlockScores:
    """What a criterion may look at; every tensor is `[out_blocks, in_blocks]` on one device.

    Attributes:
        mask: bool, the present blocks.
        magnitude: fp32, Frobenius norm of each present block of the weight; 0 where absent.
        generator: a CPU generator that is the same on every rank.
        gathered: what the criteria of this training need, by its name in `GATHERED`.
    """

    mask: Tensor
    magnitude: Tensor
    generator: torch.Generator
    gathered: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def gradient(self) -> Tensor:
        """fp32, norm of each block of the dense weight gradient at the update's step.

        Over micro-batches and ranks: the root of the summed squared norms; with exact scores, the
        norm of the summed gradient.
        """
        return self._gathered("gradient")

    @property
    def momentum(self) -> Tensor:
        """fp32, as `gradient`, but smoothed over the steps before the update."""
        return self._gathered("momentum")

    @property
    def saliency(self) -> Tensor:
        """fp32, mean of |sum of w * g| of each present block since the last update; 0 if absent."""
        return self._gathered("saliency")

    @property
    def movement(self) -> Tensor:
        """fp32, -sum of w * g of each block over its time as a present one; 0 where absent."""
        return self._gathered("movement")

    def _gathered(self, name: str) -> Tensor:
        if name not in self.gathered:
            raise ValueError(
                f"`scores.{name}` must be asked for before training, so that it is gathered. "
                f"Decorate your criterion with @needs({name!r})."
            )
        return self.gathered[name]


Criterion = Callable[[BlockScores], Tensor]
C = TypeVar("C", bound=Criterion)


def needs(*names: str) -> Callable[[C], C]:
    """Declare what a criterion reads of `BlockScores` beyond mask and magnitude.

    Args:
        names: of `GATHERED`.

    >>> @needs("gradient")
    ... def steepest(scores: BlockScores) -> Tensor:
    ...     return scores.gradient / scores.magnitude.clamp(min=1e-6)
    >>> sorted(needed_by([steepest]))
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


def needed_by(criteria: Iterable[Criterion | None]) -> frozenset[str]:
    """Return what must be gathered for these criteria."""
    return frozenset().union(*(getattr(criterion, "needs", ()) for criterion in criteria))


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

    SNFS smooths the dense gradient over the whole training. Here it is gathered in the
    `MOMENTUM_STEPS` steps before an update only, as each costs a dense product; and without exact
    scores it is the squared norms of blocks that are smoothed.
    """
    return scores.momentum


@needs("saliency")
def saliency(scores: BlockScores) -> Tensor:
    """Score a block by what the loss would change without it, to first order: |sum of w * g|.

    Source: Molchanov et al. 2019, "Importance estimation for neural network pruning", eq. 8.
    """
    return scores.saliency


@needs("movement")
def movement(scores: BlockScores) -> Tensor:
    """Score a block by how much training grows its weights: -sum of w * g.

    Source: Sanh et al. 2020, "Movement pruning", eq. 3; a block of it as in Lagunas et al. 2021.
    """
    return scores.movement


def random(scores: BlockScores) -> Tensor:
    """Score blocks at random (SET: Mocanu et al. 2018)."""
    drawn = torch.rand(scores.mask.shape, generator=scores.generator, device="cpu")
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


def find_criterion(
    argument: str, value: object, offered: Mapping[str, Criterion | None]
) -> Criterion | None:
    """Return the criterion that a configuration names.

    Args:
        argument: for errors.
        value: a name in `offered`, the dotted path of a function, or a function.
        offered: criteria by name.

    Raises:
        ValueError: if there is no such criterion.

    >>> find_criterion("drop", "sparse_lightning.criteria.saliency", {}) is saliency
    True
    """
    if isinstance(value, str) and value in offered:
        return offered[value]
    if callable(value):
        return value
    names = ", ".join(repr(name) for name in offered)
    rule = f"`{argument}` must be one of {names} or the dotted path of a function; got {value!r}"
    if not isinstance(value, str) or "." not in value:
        raise ValueError(f"{rule}.")
    module, _, name = value.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{rule}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{rule}, which is a {type(found).__name__}.")
    criterion: Criterion = found
    return criterion


MOMENTUM_STEPS = 10
MOMENTUM_DECAY = 0.9


def block_magnitudes(values: Tensor) -> Tensor:
    """Return the Frobenius norm of each slot, in fp32 whatever the dtype of the values.

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
    """Return the Frobenius norm of each block of a dense matrix, in fp32 whatever its dtype.

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
    """Return a CPU generator that depends only on its arguments, so that ranks draw alike."""
    digest = hashlib.sha256(f"{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
