"""Features that the blocks of a planned density cannot connect, and what would connect them."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace

from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.distributions import DISTRIBUTIONS, Grid
from sparse_lightning.policy.lookup import find
from sparse_lightning.topology import BLOCK_SIZES


@dataclass(frozen=True)
class DeadFeatures:
    """The features that a layer's final number of blocks leaves unconnected, whichever blocks stay.

    Attributes:
        shape: (out_features, in_features) of the layer.
        outputs: least number of dead outputs: their block rows have no block, so they are constant.
        inputs: least number of unread inputs: their block columns have no block.
        density: density of the layer at which the floor connects all features; a little above the
            least one, as it has three significant digits.
        block_size: largest smaller block size at which it does so with the planned density; None
            if there is none, or if a user's distribution would have to be called for other grids.
    """

    shape: tuple[int, int]
    outputs: int
    inputs: int
    density: float
    block_size: int | None


def find_dead_features(
    budgets: LayerBudgets, names: Collection[str], block_size: int
) -> dict[str, DeadFeatures]:
    """Return the layers whose blocks at the final density are too few to connect all features.

    A floor of 0 for rows or columns allows dead outputs or unread inputs, which then do not count.

    Args:
        budgets: budgets of all layers that share the blocks.
        names: layers to examine, all of which have blocks of `block_size`.
        block_size: 16, 32, 64 or 128.

    >>> from sparse_lightning.policy.distributions import Floor
    >>> grids = {"narrow": (16, 2), "square": (16, 16)}
    >>> budgets = LayerBudgets(grids, lambda _, final: final, 0.25, {}, "uniform", Floor(), True)
    >>> find_dead_features(budgets, grids, 32)
    {'narrow': DeadFeatures(shape=(512, 64), outputs=256, inputs=0, density=0.5, block_size=16)}
    """
    floor, final = budgets.floor, budgets.least_final()
    missing: dict[str, tuple[int, int]] = {}
    for name in names:
        rows, cols = budgets.grids[name]
        dead = (
            max(0, rows - final[name]) if floor.row else 0,
            max(0, cols - final[name]) if floor.column else 0,
        )
        if any(dead):
            missing[name] = dead
    sizes = _connecting_block_sizes(budgets, names, block_size) if missing else {}
    found = {}
    for name, (dead_rows, dead_cols) in missing.items():
        rows, cols = grid = budgets.grids[name]
        found[name] = DeadFeatures(
            shape=(rows * block_size, cols * block_size),
            outputs=dead_rows * block_size,
            inputs=dead_cols * block_size,
            density=_round_up(floor.blocks_to_connect(grid) / (rows * cols)),
            block_size=sizes.get(name),
        )
    return found


def _connecting_block_sizes(
    budgets: LayerBudgets, names: Collection[str], block_size: int
) -> dict[str, int]:
    """Return the largest smaller block size at which the floor connects each layer's features.

    Layers that only a smaller block size would make block-sparse are not considered.
    """
    if find("distribution", budgets.distribution, DISTRIBUTIONS) not in DISTRIBUTIONS.values():
        return {}  # a user's function may accept these grids only
    found: dict[str, int] = {}
    for smaller in sorted(size for size in BLOCK_SIZES if size < block_size):
        factor = block_size // smaller
        finer: dict[str, Grid] = {
            name: (rows * factor, cols * factor)
            for name, (rows, cols) in budgets.grids.items()
            if name in names
        }
        final = replace(budgets, grids={**budgets.grids, **finer}).least_final()
        for name, grid in finer.items():
            if final[name] >= budgets.floor.blocks_to_connect(grid):
                found[name] = smaller
    return found


def _round_up(share: float) -> float:
    """Round a share up to three significant digits.

    >>> _round_up(1 / 3), _round_up(1 / 16), _round_up(0.1), _round_up(1.0)
    (0.334, 0.0625, 0.1, 1.0)
    """
    scale = 10.0 ** (2 - math.floor(math.log10(share)))
    return math.ceil(share * scale - 1e-6) / scale
