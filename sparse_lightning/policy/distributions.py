"""Distributions, which share a model's budget of blocks among its layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from torch import Tensor

from sparse_lightning.policy.lookup import calling, find
from sparse_lightning.topology import count_blocks

Grid = tuple[int, int]


@dataclass
class Floor:
    """The minimum number of blocks that every layer keeps.

    The first blocks of a layer, random or the largest ones, and updates reach the minima of rows
    and columns whenever the blocks that may be present can reach them within the layer's budget
    (`first_blocks`, `exchange_blocks`).

    Attributes:
        layer: minimum density of a layer, in [0, 1].
        row: minimum number of blocks per block row; 0 allows dead outputs.
        column: minimum number of blocks per block column; 0 allows unread inputs.
    """

    layer: float = 0.0
    row: int = 1
    column: int = 1

    @property
    def of_lines(self) -> tuple[int, int]:
        """Minimum numbers of blocks of (each row, each column), as `exchange_blocks` takes them."""
        return self.row, self.column

    def blocks(self, grid: Grid) -> int:
        """Return the minimum number of blocks of a layer under this floor; at least one.

        >>> Floor(layer=0.1).blocks((4, 8)), Floor(row=2).blocks((8, 8)), Floor(0.5).blocks((4, 4))
        (8, 16, 8)
        """
        rows, cols = grid
        return max(1, math.ceil(self.layer * rows * cols), self.blocks_to_connect(grid))

    def blocks_to_connect(self, grid: Grid) -> int:
        """Return the fewest blocks with which every row and column of a layer has its minimum.

        >>> Floor().blocks_to_connect((16, 2)), Floor(row=0).blocks_to_connect((16, 2))
        (16, 2)
        """
        rows, cols = grid
        return min(max(self.row * rows, self.column * cols), rows * cols)


def uniform(density: float, grids: Sequence[Grid], min_density: float = 0.0) -> list[int]:
    """Give every layer the same density, rounded to a whole number of its blocks.

    Args:
        density: density of every layer, in (0, 1].
        grids: (out_blocks, in_blocks) of each layer.
        min_density: minimum density of a layer, in [0, 1].

    Returns:
        The budget of each layer, in blocks; at least one.

    >>> uniform(0.25, [(4, 4), (2, 8), (8, 8)])
    [4, 4, 16]
    """
    return [
        max(count_blocks(density, rows * cols), floor)
        for (rows, cols), floor in zip(grids, _floors(grids, min_density), strict=True)
    ]


def erdos_renyi(density: float, grids: Sequence[Grid], min_density: float = 0.0) -> list[int]:
    """Give a layer a density proportional to (rows + cols) / (rows * cols), never above 1.

    The budgets sum exactly to `round(density * all blocks)`, or to the minima if those need more.
    Layers that would exceed density 1 are full, and the others share the rest. As the density
    falls, no budget rises (Webster's divisor method, which rounds the shares, is house-monotone),
    so a layer's capacity at the highest density always suffices.

    Args:
        density: density of all layers together, in (0, 1].
        grids: (out_blocks, in_blocks) of each layer.
        min_density: minimum density of a layer, in [0, 1].

    Returns:
        The budget of each layer, in blocks; at least one.

    Source: Mocanu et al. 2018, "Scalable training of artificial neural networks with adaptive
    sparse connectivity", eq. 3; the cap at density 1 as in Evci et al. 2020 (RigL), section 3.

    >>> erdos_renyi(0.25, [(4, 4), (16, 16)])
    [14, 54]
    """
    if not grids:
        return []
    weights = [rows + cols for rows, cols in grids]
    caps = [rows * cols for rows, cols in grids]
    floors = _floors(grids, min_density)
    total = max(count_blocks(density, sum(caps)), sum(floors))

    def budgets(divisor: float) -> list[int]:
        # Webster's method rounds half a block up. The floor of one block keeps every layer alive.
        return [
            max(floor, min(cap, int(w * divisor + 0.5)))
            for w, cap, floor in zip(weights, caps, floors, strict=True)
        ]

    low, high = 0.0, float(max(caps))
    for _ in range(100):
        middle = (low + high) / 2
        if sum(budgets(middle)) <= total:
            low = middle
        else:
            high = middle
    shares, upper = budgets(low), budgets(high)
    # Layers whose budgets step up at the same divisor are tied; the lower index comes first.
    missing = total - sum(shares)
    for i in range(len(shares)):
        if missing and upper[i] > shares[i]:
            shares[i] += 1
            missing -= 1
    return shares


def by_score(
    total: int, scores: Sequence[Tensor], masks: Sequence[Tensor], floors: Sequence[int]
) -> list[int]:
    """Give every layer as many blocks as it has among the most useful ones of the model.

    Args:
        total: blocks of all layers together, capped at the number of present blocks.
        scores: `[out_blocks, in_blocks]` of each layer, read at present blocks.
        masks: bool, of the same shapes, the present blocks.
        floors: minimum number of blocks of each layer, at least one; scaled down proportionally
            if they sum to more than `total`.

    Returns:
        The budget of each layer, in blocks; at least one, at most its present blocks. Ties go to
        the layer, and within it the block, with the lower index. A NaN or infinite score ranks
        lowest.

    >>> scores = [torch.tensor([[5.0, 4.0]]), torch.tensor([[9.0, 1.0]])]
    >>> masks = [torch.ones(1, 2, dtype=torch.bool)] * 2
    >>> by_score(3, scores, masks, [1, 1]), by_score(2, scores, masks, [1, 1])
    ([2, 1], [1, 1])
    """
    if not masks:
        return []
    present = [int(mask.sum()) for mask in masks]
    floors = [min(*pair) for pair in zip(floors, present, strict=True)]
    floors = scale_floors(total, floors)
    # Each layer's best blocks fill its floor; the remaining budget goes to the best other blocks.
    contenders, layers = [], []
    for i, (score, mask, floor) in enumerate(zip(scores, masks, floors, strict=True)):
        present_scores = score[mask].cpu().float().nan_to_num(-torch.inf, -torch.inf, -torch.inf)
        contenders.append(present_scores.sort(descending=True).values[floor:])
        layers.append(torch.full((present[i] - floor,), i))
    order = torch.cat(contenders).argsort(descending=True, stable=True)
    winners = torch.cat(layers)[order[: max(0, total - sum(floors))]]
    won = torch.bincount(winners, minlength=len(masks)).tolist()
    return [floor + extra for floor, extra in zip(floors, won, strict=True)]


def scale_floors(total: int, floors: Sequence[int]) -> list[int]:
    """Return minimum numbers of blocks, scaled down if they sum to more than `total`; at least one.

    >>> scale_floors(12, [4, 8]), scale_floors(6, [4, 8]), scale_floors(1, [4, 8])
    ([4, 8], [2, 4], [1, 1])
    """
    if sum(floors) <= total:
        return list(floors)
    return [min(floor, max(1, floor * total // sum(floors))) for floor in floors]


def _floors(grids: Sequence[Grid], min_density: float) -> list[int]:
    """Return the minimum number of blocks of each layer, at least one."""
    return [max(1, math.ceil(min_density * rows * cols)) for rows, cols in grids]


# (density in (0, 1], (out_blocks, in_blocks) of each layer, minimum density of a layer) -> blocks
# of each layer.
Distribution = Callable[[float, Sequence[Grid], float], list[int]]

# "global" starts as "uniform"; updates then share the budget by scores (`by_score`).
DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "erdos_renyi": erdos_renyi,
    "global": uniform,
}


def share(
    distribution: str | Distribution,
    density: float,
    grids: Mapping[str, Grid],
    fixed: Mapping[str, float],
    min_density: float = 0.0,
) -> dict[str, int]:
    """Return the budget of each layer of a model, in blocks.

    Args:
        distribution: a name in `DISTRIBUTIONS`, a `Distribution`, or its dotted path.
        density: density of all layers without a fixed one together, in (0, 1].
        grids: (out_blocks, in_blocks) of each layer, by name.
        fixed: density of each layer that has its own, by name.
        min_density: minimum density of the other layers, in [0, 1].

    Raises:
        ValueError: if the distribution does not return a valid number of blocks for each layer.

    >>> share("uniform", 0.5, {"a": (4, 4), "b": (4, 4)}, {"b": 1.0})
    {'a': 8, 'b': 16}
    """
    others = {name: grid for name, grid in grids.items() if name not in fixed}
    budgets = {}
    if others:
        shares = find("distribution", distribution, DISTRIBUTIONS)
        with calling("distribution"):
            given = shares(density, list(others.values()), min_density)
        budgets = _check_shares(given, others)
    for name, own_density in fixed.items():
        budgets[name] = count_blocks(own_density, grids[name][0] * grids[name][1])
    return {name: budgets[name] for name in grids}


def _check_shares(shares: object, grids: Mapping[str, Grid]) -> dict[str, int]:
    """Return a distribution's result by layer name, or raise if it is invalid."""
    rule = "`distribution` must return one integer for each layer, from 1 to all its blocks"
    if not isinstance(shares, Sequence) or len(shares) != len(grids):
        raise ValueError(f"{rule}; got {shares!r} for {len(grids)} layers.")
    budgets = {}
    for (name, (rows, cols)), blocks in zip(grids.items(), shares, strict=True):
        is_integer = isinstance(blocks, Integral) and not isinstance(blocks, bool)
        if not is_integer or not 1 <= blocks <= rows * cols:
            raise ValueError(f"{rule}; got {blocks!r} of {rows * cols} (layer '{name}').")
        budgets[name] = int(blocks)
    return budgets
