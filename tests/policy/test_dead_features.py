"""Which features the final budgets leave without a block, and what would connect them."""

from __future__ import annotations

import random
from typing import Any

import pytest

from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.dead_features import DeadFeatures, find_dead_features
from sparse_lightning.policy.distributions import Grid
from tests import extensions

GRIDS: dict[str, Grid] = {"tall": (16, 2), "wide": (2, 16), "square": (8, 8)}


def found(grids: dict[str, Grid] = GRIDS, **options: Any) -> dict[str, DeadFeatures]:
    config = SparsityConfig(block_size=32, **options)
    return find_dead_features(config.budgets(grids), grids, config.block_size)


def test_by_hand() -> None:
    # 8 of 32 blocks for 16 rows, or for 16 columns; in blocks of 16, 32 of 128 for 32.
    assert found(density=0.25) == {
        "tall": DeadFeatures((512, 64), outputs=256, inputs=0, density=0.5, block_size=16),
        "wide": DeadFeatures((64, 512), outputs=0, inputs=256, density=0.5, block_size=16),
    }
    # One block leaves dead outputs and unread inputs; blocks of 16 do not suffice.
    tiny = found({"tiny": (3, 5)}, density=0.1)
    assert tiny == {"tiny": DeadFeatures((96, 160), 32, 96, density=0.334, block_size=None)}
    assert found(density=0.5) == {}
    assert found({"one": (1, 1)}, density=0.01) == {}


def test_only_the_final_density_counts() -> None:
    falling = {"schedule": "cubic", "initial": 1.0, "final": 0.25}
    assert found(density=falling) == found(density=0.25)
    assert found(density={"schedule": "linear", "initial": 0.25, "final": 0.5}) == {}


def test_the_density_of_a_layer_counts() -> None:
    assert [*found(density=0.25, layer_density={"tall": 0.5})] == ["wide"]
    assert [*found(density=0.5, layer_density={"tall": 0.25})] == ["tall"]


def test_a_floor_of_0_allows_dead_features() -> None:
    assert [*found(density=0.25, floor={"row": 0})] == ["wide"]
    assert [*found(density=0.25, floor={"column": 0})] == ["tall"]
    assert found(density=0.25, floor={"row": 0, "column": 0}) == {}
    assert found(density=0.25, floor={"layer": 0.5}) == {}


def test_a_higher_floor_needs_more_blocks() -> None:
    (tall,) = found({"tall": (16, 4)}, density=0.125, floor={"row": 2, "column": 0}).values()
    assert (tall.outputs, tall.density) == (256, 0.5)


def test_global_budgets_keep_the_floors_while_they_can() -> None:
    falling = {"schedule": "cubic", "initial": 1.0}
    both = {"distribution": "global", "density": {**falling, "final": 0.25}}
    # The floors are 16, 16 and 8 blocks, of 32 that remain of 128.
    assert {name: dead.outputs for name, dead in found(**both).items()} == {
        "tall": 32 * (16 - 16 * 32 // 40),
        "wide": 0,
        "square": 32 * (8 - 8 * 32 // 40),
    }
    enough = {"distribution": "global", "density": {**falling, "final": 40 / 128}}
    assert found(**enough) == {}


def test_a_distribution_of_a_user_sees_no_other_grids() -> None:
    dead = found({"a": (2, 2), "b": (16, 2)}, density=0.25, distribution=extensions.first_full)
    assert dead == {"b": DeadFeatures((512, 64), 256, 0, density=0.5, block_size=None)}


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_the_advice_suffices_and_less_does_not(distribution: str) -> None:
    draw, sizes = random.Random(0), 0
    for _ in range(60):
        rows, cols = draw.randint(1, 40), draw.randint(1, 40)
        density = draw.choice([0.02, 0.1, 0.25, 0.4])
        options = {"density": density, "distribution": distribution}
        for dead in found({"fc": (rows, cols)}, **options).values():
            least = max(rows, cols) / (rows * cols)
            assert found({"fc": (rows, cols)}, layer_density={"fc": dead.density}) == {}
            assert least <= dead.density <= 1.01 * least
            if max(rows, cols) > 1:
                below = {"fc": least - 0.75 / (rows * cols)}
                assert [*found({"fc": (rows, cols)}, layer_density=below)] == ["fc"]
            if dead.block_size is not None:
                sizes += 1
                assert dead.block_size == 16
                assert found({"fc": (2 * rows, 2 * cols)}, **options) == {}
            else:
                assert found({"fc": (2 * rows, 2 * cols)}, **options) != {}
    assert sizes > 5
