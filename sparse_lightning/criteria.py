"""The usefulness of blocks: from what is known about a layer's blocks to one score a block.

A criterion is a function of `BlockScores` that returns fp32 `[out_blocks, in_blocks]`, higher for
a more useful block. Drop criteria are read at present blocks, grow criteria at absent ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockScores:
    """What a criterion may look at; every tensor is `[out_blocks, in_blocks]` on one device.

    Attributes:
        mask: bool, the present blocks.
        magnitude: fp32, Frobenius norm of each present block of the weight; 0 where absent.
        gradient: fp32, root of the squared block norms of the dense weight gradient, summed over
            the micro-batches and ranks of the update step; zeros unless the criterion asked for it.
        generator: a CPU generator that is the same on every rank.
    """

    mask: Tensor
    magnitude: Tensor
    gradient: Tensor
    generator: torch.Generator


Criterion = Callable[[BlockScores], Tensor]


def magnitude(scores: BlockScores) -> Tensor:
    """Score a block by the Frobenius norm of its weights (Han et al. 2015; SET and RigL drop)."""
    return scores.magnitude


def gradient(scores: BlockScores) -> Tensor:
    """Score a block by the norm of its dense gradient (RigL: Evci et al. 2020, section 3)."""
    return scores.gradient


def random(scores: BlockScores) -> Tensor:
    """Score blocks at random (SET: Mocanu et al. 2018)."""
    drawn = torch.rand(scores.mask.shape, generator=scores.generator, device="cpu")
    return drawn.to(scores.mask.device)


DROP_CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}
GROW_CRITERIA: dict[str, Criterion | None] = {"gradient": gradient, "random": random, "none": None}


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


def seeded_generator(seed: int, step: int, layer: str) -> torch.Generator:
    """Return a CPU generator that depends only on its arguments, so that ranks draw alike."""
    digest = hashlib.sha256(f"{seed}/{step}/{layer}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
