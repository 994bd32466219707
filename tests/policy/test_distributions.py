"""Distributions: hand-worked budgets, then the properties of Webster's divisor method."""

import math
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sparse_lightning.policy.distributions import (
    DISTRIBUTIONS,
    Floor,
    Grid,
    by_score,
    erdos_renyi,
    share,
    uniform,
)
from sparse_lightning.topology import count_blocks
from tests import extensions

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
        # 32 of 65, shared as 2 : 16, would be 3.6 : 28.4, but the first layer has only one block.
        (0.5, [(1, 1), (8, 8)], [1, 31]),
        # 40 of 80, shared as 8 : 16 gives 13.3 : 26.7.
        (0.5, [(4, 4), (8, 8)], [13, 27]),
        # The floor of one block: 5 of 257 would be 0.3 : 4.7.
        (0.02, [(1, 1), (16, 16)], [1, 4]),
        # Every layer has the floor, so there are never fewer blocks than layers.
        (0.01, [(2, 2)] * 4, [1, 1, 1, 1]),
        # Ties go to the lower index.
        (1 / 3, [(2, 2)] * 3, [2, 1, 1]),
        (0.5, [(3, 3)] * 2, [5, 4]),
        (1.0, [(2, 3), (1, 5)], [6, 5]),
        # 16 of 20, shared as 4 : 10, would be 4.6 : 11.4, but the first layer has only four blocks.
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
    """No other layer has a larger quotient, weight / (blocks + 1/2), for a layer's last block."""
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
    # Blocks that moved between layers had equal quotients, weight / (other blocks + 1/2).
    worth = {
        Fraction(2 * weights[i], 2 * budgets[i] + (1 if step > 0 else -1))
        for i, step in moved.items()
    }
    assert len(worth) <= 1


def test_wide_layers_keep_more_of_a_small_budget_than_square_ones() -> None:
    wide, square = erdos_renyi(0.1, [(2, 32), (8, 8)])
    assert wide > square and wide + square == round(0.1 * 128)


# -- floors of layers, and layers with their own density -----------------------------------------


@pytest.mark.parametrize(
    ("floor", "grid", "blocks"),
    [
        (Floor(), (4, 8), 8),
        (Floor(), (9, 2), 9),
        (Floor(row=0, column=0), (4, 8), 1),
        (Floor(row=0, column=0, layer=0.1), (4, 8), 4),
        (Floor(layer=0.5), (4, 8), 16),
        (Floor(row=3, column=0), (4, 8), 12),
        (Floor(row=9), (2, 2), 4),
    ],
)
def test_the_floor_of_a_layer_by_hand(floor: Floor, grid: Grid, blocks: int) -> None:
    assert floor.blocks(grid) == blocks


def test_no_layer_falls_below_its_floor() -> None:
    # Without a floor, 5 of 257 would be 0.3 : 4.7, so [1, 4].
    assert erdos_renyi(0.1, [(4, 4), (16, 16)]) == [5, 22]
    assert erdos_renyi(0.1, [(4, 4), (16, 16)], 0.5) == [8, 128]
    assert erdos_renyi(0.25, [(4, 4), (16, 16)], 0.2) == [14, 54]
    assert erdos_renyi(0.25, [(4, 4), (16, 16)], 0.21) == [14, 54]
    assert uniform(0.1, [(4, 4), (16, 16)], 0.2) == [4, 52]


@quick
@given(DENSITY, GRIDS, st.floats(0, 1))
def test_floors_hold_and_the_rest_is_shared(density: float, grids: list[Grid], least) -> None:
    budgets = erdos_renyi(density, grids, least)
    floors = [max(1, math.ceil(least * n)) for n in blocks(grids)]
    assert all(n >= floor for n, floor in zip(budgets, floors, strict=True))
    assert sum(budgets) == max(count_blocks(density, sum(blocks(grids))), sum(floors))


def test_layers_with_their_own_density_do_not_share_the_budget() -> None:
    grids = {"a": (4, 4), "b": (8, 8), "c": (16, 16)}
    budgets = share("erdos_renyi", 0.25, grids, {"b": 0.5})
    assert budgets == {"a": 14, "b": 32, "c": 54}
    assert list(budgets) == list(grids)
    assert share("uniform", 0.25, grids, {"a": 1.0, "b": 1.0, "c": 0.1}) == {
        "a": 16,
        "b": 64,
        "c": 26,
    }
    assert share("erdos_renyi", 0.25, {}, {}) == {}


# -- user-defined ---------------------------------------------------------------------------------

LAYERS = {"a": (4, 4), "b": (8, 8), "c": (16, 16)}


@pytest.mark.parametrize(
    "distribution",
    [
        extensions.first_full,
        "tests.extensions.first_full",
        lambda density, grids, least: tuple(np.int64(n) for n in (16, 16, 64)),
    ],
)
def test_a_user_defined_distribution(distribution) -> None:
    budgets = share(distribution, 0.25, LAYERS, {})
    assert budgets == {"a": 16, "b": 16, "c": 64}
    assert all(type(blocks) is int for blocks in budgets.values())


def test_a_distribution_receives_only_the_layers_that_share() -> None:
    calls = []

    def note(density: float, grids: list[Grid], least: float) -> list[int]:
        calls.append((density, list(grids), least))
        return [3 for _ in grids]

    assert share(note, 0.25, LAYERS, {"b": 0.5}, 0.1) == {"a": 3, "b": 32, "c": 3}
    assert share(note, 0.25, LAYERS, dict.fromkeys(LAYERS, 0.5)) == {"a": 8, "b": 32, "c": 128}
    assert calls == [(0.25, [(4, 4), (16, 16)], 0.1)], "no call if every layer is fixed"


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([1, 1], r"got \[1, 1\] for 3 layers\."),
        ([1, 1, 1, 1], r"got \[1, 1, 1, 1\] for 3 layers\."),
        ({"a": 1, "b": 1, "c": 1}, r"got \{.*\} for 3 layers\."),
        (None, r"got None for 3 layers\."),
        (5, r"got 5 for 3 layers\."),
        ([1, 0, 1], r"got 0 of 64 \(layer 'b'\)\."),
        ([1, -1, 1], r"got -1 of 64 \(layer 'b'\)\."),
        ([17, 1, 1], r"got 17 of 16 \(layer 'a'\)\."),
        ([1, 1, 1.0], r"got 1\.0 of 256 \(layer 'c'\)\."),
        ([1, 1, math.nan], r"got nan of 256 \(layer 'c'\)\."),
        ([True, 1, 1], r"got True of 16 \(layer 'a'\)\."),
        ("abc", r"got 'a' of 16 \(layer 'a'\)\."),
    ],
)
def test_invalid_results_of_a_distribution(returned: object, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^`distribution` must return one integer .*{says}$"):
        share(lambda density, grids, least: returned, 0.25, LAYERS, {})


def test_a_distribution_that_is_not_found() -> None:
    for wrong in ("erdos", "tests.extensions.nothing", None):
        with pytest.raises(ValueError, match=r"`distribution` must be one of 'uniform', 'erdos_r"):
            share(wrong, 0.25, LAYERS, {})


# -- by score -----------------------------------------------------------------------------------

ONE_ROW = [torch.tensor([[9.0, 5.0, 3.0]]), torch.tensor([[8.0, 7.0, 1.0]])]


@pytest.mark.parametrize(
    ("total", "floors", "budgets"),
    [
        (6, [1, 1], [3, 3]),
        (4, [1, 1], [2, 2]),
        (3, [1, 1], [1, 2]),
        (2, [1, 1], [1, 1]),
        # A floor keeps the best blocks of a layer, however high the scores of other layers are.
        (4, [3, 1], [3, 1]),
        # Floors that exceed the budget are scaled down, to one block per layer at least.
        (3, [3, 3], [1, 2]),
        (1, [1, 1], [1, 1]),
        (0, [3, 3], [1, 1]),
        (-5, [3, 1], [1, 1]),
        # The budget exceeds the number of present blocks.
        (9, [1, 1], [3, 3]),
    ],
)
def test_by_score_by_hand(total: int, floors: list[int], budgets: list[int]) -> None:
    masks = [torch.ones(1, 3, dtype=torch.bool)] * 2
    assert by_score(total, ONE_ROW, masks, floors) == budgets


def test_absent_blocks_do_not_count_and_non_finite_scores_rank_last() -> None:
    masks = [torch.tensor([[False, True, True]]), torch.ones(1, 3, dtype=torch.bool)]
    assert by_score(3, ONE_ROW, masks, [1, 1]) == [1, 2]
    assert by_score(5, ONE_ROW, masks, [3, 1]) == [2, 3]
    nan = [torch.tensor([[math.nan, math.inf, 3.0]]), ONE_ROW[1]]
    everywhere = [torch.ones(1, 3, dtype=torch.bool)] * 2
    assert by_score(4, nan, everywhere, [1, 1]) == [1, 3]
    assert by_score(5, nan, everywhere, [1, 1]) == [2, 3]


def test_a_layer_without_blocks_wins_none() -> None:
    masks = [torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)]
    assert by_score(2, ONE_ROW, masks, [1, 1]) == [0, 2]
    assert by_score(0, ONE_ROW, masks, [1, 1]) == [0, 1]


def test_ties_go_to_the_earlier_layer() -> None:
    same = [torch.zeros(2, 2), torch.zeros(2, 2)]
    everywhere = [torch.ones(2, 2, dtype=torch.bool)] * 2
    assert by_score(5, same, everywhere, [1, 1]) == [4, 1]


@quick
@given(GRIDS, st.integers(0, 2**31), st.floats(0, 1), st.integers(1, 3))
def test_budgets_by_score_sum_to_the_total_and_only_fall(grids, seed, part, floor) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.randint(0, 9, grid, generator=generator).float() for grid in grids]
    masks = [torch.rand(grid, generator=generator) < 0.7 for grid in grids]
    present = [int(mask.sum()) for mask in masks]
    total = round(part * sum(present))
    budgets = by_score(total, scores, masks, [floor] * len(grids))
    assert all(n <= most for n, most in zip(budgets, present, strict=True))
    assert all(n >= min(1, most) for n, most in zip(budgets, present, strict=True))
    least = sum(min(1, most) for most in present)
    assert sum(budgets) == max(total, least) or total < len(grids) * floor
