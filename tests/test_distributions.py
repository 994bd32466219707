"""Budgets: hand-worked, then the laws that Webster's divisor method promises."""

from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_lightning.distributions import DISTRIBUTIONS, Grid, erdos_renyi, uniform
from sparse_lightning.topology import count_blocks

quick = settings(deadline=None, max_examples=150, derandomize=True)
GRIDS = st.lists(st.tuples(st.integers(1, 24), st.integers(1, 24)), min_size=1, max_size=8)
DENSITY = st.floats(1e-4, 0.05) | st.floats(1e-4, 1.0)


def blocks(grids: list[Grid]) -> list[int]:
    return [rows * cols for rows, cols in grids]


@pytest.mark.parametrize(
    ("density", "grids", "budgets"),
    [
        # 68 of 272 blocks, shared as 8 : 32.
        (0.25, [(4, 4), (16, 16)], [14, 54]),
        # 32 of 65, shared as 2 : 16 would be 3.6 : 28.4; the single block is full with one.
        (0.5, [(1, 1), (8, 8)], [1, 31]),
        # 40 of 80, shared as 8 : 16 gives 13.3 : 26.7.
        (0.5, [(4, 4), (8, 8)], [13, 27]),
        # The floor of one block: 5 of 257 would be 0.3 : 4.7.
        (0.02, [(1, 1), (16, 16)], [1, 4]),
        # A floor for everyone: never fewer blocks than layers.
        (0.01, [(2, 2)] * 4, [1, 1, 1, 1]),
        # Ties go to the lower index.
        (1 / 3, [(2, 2)] * 3, [2, 1, 1]),
        (0.5, [(3, 3)] * 2, [5, 4]),
        (1.0, [(2, 3), (1, 5)], [6, 5]),
        # 16 of 20, shared as 4 : 10 would be 4.6 : 11.4; the first is full with four.
        (16 / 20, [(2, 2), (2, 8)], [4, 12]),
        (0.3, [(10, 10)], [30]),
        (0.25, [], []),
    ],
)
def test_erdos_renyi_by_hand(density: float, grids: list[Grid], budgets: list[int]) -> None:
    assert erdos_renyi(density, grids) == budgets


@pytest.mark.parametrize(
    ("density", "grids", "budgets"),
    [
        (0.25, [(4, 4), (2, 8), (8, 8)], [4, 4, 16]),
        (0.1, [(2, 2), (10, 10)], [1, 10]),
        (1.0, [(2, 3)], [6]),
        (0.25, [], []),
    ],
)
def test_uniform_by_hand(density: float, grids: list[Grid], budgets: list[int]) -> None:
    assert uniform(density, grids) == budgets


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("density", [0, -0.1, 1.01, float("nan"), True])
def test_a_density_out_of_range_is_refused(distribution, density: float) -> None:
    with pytest.raises(ValueError, match=rf"`density` must .*got {density}"):
        distribution(density, [(4, 4)])


@quick
@given(DENSITY, GRIDS)
def test_the_budgets_sum_to_the_models(density: float, grids: list[Grid]) -> None:
    total = max(count_blocks(density, sum(blocks(grids))), len(grids))
    assert sum(erdos_renyi(density, grids)) == total


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@quick
@given(density=DENSITY, grids=GRIDS)
def test_every_budget_is_between_one_block_and_all(distribution, density, grids) -> None:
    budgets = distribution(density, grids)
    assert len(budgets) == len(grids)
    assert all(
        type(n) is int and 1 <= n <= cap for n, cap in zip(budgets, blocks(grids), strict=True)
    )
    assert distribution(1.0, grids) == blocks(grids)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@quick
@given(densities=st.lists(DENSITY, min_size=2, max_size=6), grids=GRIDS)
def test_no_budget_rises_as_the_density_falls(distribution, densities, grids) -> None:
    falling = [distribution(density, grids) for density in sorted(densities, reverse=True)]
    for higher, lower in pairwise(falling):
        assert all(a >= b for a, b in zip(higher, lower, strict=True))


def test_no_budget_rises_block_by_block() -> None:
    grids = [(1, 1), (3, 5), (5, 3), (2, 2), (8, 8), (1, 7)]
    total = sum(blocks(grids))
    series = [erdos_renyi(n / total, grids) for n in range(len(grids), total + 1)]
    assert [sum(budgets) for budgets in series] == list(range(len(grids), total + 1))
    for fewer, more in pairwise(series):
        steps = [b - a for a, b in zip(fewer, more, strict=True)]
        assert sorted(steps) == [0] * (len(grids) - 1) + [1], "one block more, for one layer"


@quick
@given(DENSITY, GRIDS)
def test_erdos_renyi_is_websters_apportionment(density: float, grids: list[Grid]) -> None:
    """No layer has a block that another has a better claim to: weight / (blocks + 1/2)."""
    budgets = erdos_renyi(density, grids)
    weights = [rows + cols for rows, cols in grids]
    rows = list(zip(weights, budgets, blocks(grids), strict=True))
    claims = [Fraction(2 * w, 2 * n + 1) for w, n, cap in rows if n < cap]
    held = [Fraction(2 * w, 2 * n - 1) for w, n, _ in rows if n > 1]
    assume(claims and held)
    assert max(claims) <= min(held)


@quick
@given(DENSITY, GRIDS, st.randoms(use_true_random=False))
def test_the_order_of_layers_decides_only_ties(density, grids, random) -> None:
    order = list(range(len(grids)))
    random.shuffle(order)
    budgets = erdos_renyi(density, grids)
    shuffled = erdos_renyi(density, [grids[i] for i in order])
    weights = [rows + cols for rows, cols in grids]
    moved = {i: n - budgets[i] for i, n in zip(order, shuffled, strict=True) if n != budgets[i]}
    assert set(moved.values()) <= {-1, 1} and sum(moved.values()) == 0
    # The blocks that changed hands were worth the same: weight / (blocks without it + 1/2).
    worth = {
        Fraction(2 * weights[i], 2 * budgets[i] + (1 if step > 0 else -1))
        for i, step in moved.items()
    }
    assert len(worth) <= 1


def test_wide_layers_keep_more_of_a_small_budget_than_square_ones() -> None:
    wide, square = erdos_renyi(0.1, [(2, 32), (8, 8)])
    assert wide > square and wide + square == round(0.1 * 128)
