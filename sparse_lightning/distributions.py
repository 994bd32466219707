"""How a model's budget of blocks is shared among its layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sparse_lightning.topology import count_blocks

Grid = tuple[int, int]


def uniform(density: float, grids: Sequence[Grid]) -> list[int]:
    """Give every layer the same density, each rounded to its own nearest number of blocks.

    Args:
        density: in (0, 1].
        grids: (out_blocks, in_blocks) of each layer.

    Returns:
        The budget of each layer, in blocks; at least one.

    >>> uniform(0.25, [(4, 4), (2, 8), (8, 8)])
    [4, 4, 16]
    """
    return [count_blocks(density, rows * cols) for rows, cols in grids]


def erdos_renyi(density: float, grids: Sequence[Grid]) -> list[int]:
    """Give a layer a density proportional to (rows + cols) / (rows * cols), never above 1.

    The budgets sum exactly to the model's, `round(density * all blocks)`. Layers that would pass
    density 1 are full, and the rest share what is left. As the density falls no layer's budget
    rises (the shares are rounded by Webster's divisor method, which is house-monotone), so a
    layer's capacity at the highest density always suffices.

    Args:
        density: in (0, 1], of all layers together.
        grids: (out_blocks, in_blocks) of each layer.

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
    total = max(count_blocks(density, sum(caps)), len(grids))

    def budgets(divisor: float) -> list[int]:
        # Webster: half a block rounds up. The floor of one block keeps every layer alive.
        return [
            max(1, min(cap, int(w * divisor + 0.5))) for w, cap in zip(weights, caps, strict=True)
        ]

    low, high = 0.0, float(max(caps))
    for _ in range(100):
        middle = (low + high) / 2
        if sum(budgets(middle)) <= total:
            low = middle
        else:
            high = middle
    shares, upper = budgets(low), budgets(high)
    # Layers that step up at the same divisor are tied: lower index first.
    missing = total - sum(shares)
    for i in range(len(shares)):
        if missing and upper[i] > shares[i]:
            shares[i] += 1
            missing -= 1
    return shares


DISTRIBUTIONS: dict[str, Callable[[float, Sequence[Grid]], list[int]]] = {
    "uniform": uniform,
    "erdos_renyi": erdos_renyi,
}
