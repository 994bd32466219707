"""Block budgets over the density schedule: hand-worked tables and properties."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.distributions import Grid
from tests import extensions

quick = settings(deadline=None, max_examples=150, derandomize=True)

GRIDS = {"up.0": (4, 4), "up.1": (8, 8), "down": (8, 8)}


def grids_of(masks: dict[str, torch.Tensor]) -> dict[str, Grid]:
    return {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}


def test_budgets_follow_the_schedule() -> None:
    config = SparsityConfig(density={"schedule": "linear", "initial": 1.0, "final": 0.5})
    assert config.budgets(GRIDS).at(0.0) == {"up.0": 16, "up.1": 64, "down": 64}
    assert config.budgets(GRIDS).at(0.5) == {"up.0": 12, "up.1": 48, "down": 48}
    assert config.budgets(GRIDS).at(1.0) == {"up.0": 8, "up.1": 32, "down": 32}
    assert config.budgets(GRIDS).capacities() == {"up.0": 16, "up.1": 64, "down": 64}


def test_layers_with_their_own_final_density() -> None:
    own = {"up.*": 0.25, "down": 1.0}
    config = SparsityConfig(density={"schedule": "linear", "final": 0.5}, layer_density=own)
    assert config.budgets(GRIDS).at(0.5) == {"up.0": 10, "up.1": 40, "down": 64}
    assert config.budgets(GRIDS).at(1.0) == {"up.0": 4, "up.1": 16, "down": 64}
    constant = SparsityConfig(density=0.5, layer_density={"down": 0.75})
    assert constant.budgets(GRIDS).capacities() == {"up.0": 8, "up.1": 32, "down": 48}
    assert SparsityConfig(density=0.5, layer_density=None).layer_density == {}


def test_initial_capacities_cover_a_rising_density() -> None:
    config = SparsityConfig(density={"schedule": "cubic", "initial": 0.25, "final": 0.5})
    assert config.budgets(GRIDS).at(0.0) == {"up.0": 4, "up.1": 16, "down": 16}
    assert config.budgets(GRIDS).capacities() == {"up.0": 8, "up.1": 32, "down": 32}


def test_budgets_by_score_of_the_global_distribution() -> None:
    config = SparsityConfig(
        density={"schedule": "linear", "initial": 1.0, "final": 0.5},
        distribution="global",
        layer_density={"c": 0.5},
        floor={"row": 0, "column": 0},
    )
    scores = {"a": torch.ones(2, 2), "b": torch.full((2, 2), 2.0), "c": torch.zeros(2, 2)}
    masks = dict.fromkeys(scores, torch.ones(2, 2, dtype=torch.bool))
    budgets = config.budgets(grids_of(masks))
    assert budgets.at(0.0) == {"a": 4, "b": 4, "c": 4}
    assert budgets.by_score(0.5, scores, masks) == {"a": 2, "b": 4, "c": 3}
    assert budgets.by_score(1.0, scores, masks) == {"a": 1, "b": 3, "c": 2}
    uniform = SparsityConfig(density=0.5)
    assert uniform.budgets(grids_of(masks)).by_score(1.0, scores, masks) == {"a": 2, "b": 2, "c": 2}


def test_under_global_layers_without_scores_keep_their_blocks() -> None:
    config = SparsityConfig(
        density={"schedule": "linear", "initial": 1.0, "final": 0.25},
        distribution="global",
        layer_density={"own*": 0.5},
        floor={"row": 0, "column": 0},
    )
    everywhere = torch.ones(2, 2, dtype=torch.bool)
    masks = dict.fromkeys(["a", "b", "frozen", "own", "own frozen"], everywhere)
    masks["frozen"] = torch.tensor([[True, True], [True, False]])
    scores = {"a": torch.ones(2, 2), "b": torch.full((2, 2), 2.0), "own": torch.zeros(2, 2)}
    budgets = config.budgets(grids_of(masks))
    # Layers a, b and frozen share 7.5 and then 3 of their 12 blocks; frozen accounts for 2 and 1.
    assert budgets.by_score(0.5, scores, masks) == {
        **{"a": 2, "b": 4, "frozen": 3},
        **{"own": 3, "own frozen": 4},
    }
    assert budgets.by_score(1.0, scores, masks) == {
        **{"a": 1, "b": 1, "frozen": 3},
        **{"own": 2, "own frozen": 4},
    }
    # Without the frozen layer, a and b share 5 of their 8 blocks.
    assert budgets.by_score(0.5, scores, masks, ["frozen"]) == {
        **{"a": 1, "b": 4, "frozen": 3},
        **{"own": 3, "own frozen": 4},
    }
    assert budgets.by_score(1.0, {}, masks) == {
        name: int(mask.sum()) for name, mask in masks.items()
    }
    assert budgets.final_total() == 3 + 2 + 2


def test_under_global_no_layer_falls_below_its_floor() -> None:
    config = SparsityConfig(
        density={"schedule": "linear", "final": 0.25},
        distribution="global",
        floor={"layer": 0.5, "row": 0, "column": 0},
    )
    masks = dict.fromkeys(["a", "b"], torch.ones(2, 2, dtype=torch.bool))
    scores = {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}
    budgets = config.budgets(grids_of(masks))
    assert budgets.by_score(1.0, scores, masks) == {"a": 2, "b": 2}
    assert budgets.final_total() == 4


@quick
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6), st.booleans()), min_size=1),
    st.floats(0, 1),
    st.integers(0, 2**31),
)
def test_budgets_under_global_sum_to_those_of_the_layers_that_are_not_frozen(
    layers, progress, seed
) -> None:
    config = SparsityConfig(
        density={"schedule": "linear", "final": 0.1},
        distribution="global",
        floor={"row": 0, "column": 0},
    )
    generator = torch.Generator().manual_seed(seed)
    masks, scores = {}, {}
    for i, (rows, cols, frozen) in enumerate(layers):
        masks[str(i)] = torch.rand(rows, cols, generator=generator) < 0.8
        masks[str(i)][0, 0] = True
        if not frozen:
            scores[str(i)] = torch.rand(rows, cols, generator=generator)
    frozen = masks.keys() - scores.keys()
    budgets = config.budgets(grids_of(masks)).by_score(progress, scores, masks, frozen)
    assert list(budgets) == list(masks)
    present = {name: int(mask.sum()) for name, mask in masks.items()}
    assert all(budgets[name] == present[name] for name in frozen)
    assert all(1 <= budgets[name] <= present[name] for name in scores)
    total = max(1, round(config.density_at(progress) * sum(masks[n].numel() for n in scores)))
    most, least = sum(present[name] for name in scores), len(scores)
    assert sum(budgets[name] for name in scores) == min(most, max(least, total))


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi", extensions.first_full])
def test_other_budgets_are_shared_among_all_layers_at_the_swap_and_at_updates(distribution) -> None:
    """Frozen layers have no scores, but still take their share of the budget."""
    density = {"schedule": "linear", "final": 0.25}
    config = SparsityConfig(density=density, distribution=distribution)
    masks = {name: torch.ones(grid, dtype=torch.bool) for name, grid in GRIDS.items()}
    for progress in (0.0, 0.3, 1.0):
        expected = config.budgets(GRIDS).at(progress)
        for scored in ({}, {"down": torch.ones(8, 8)}):
            assert config.budgets(grids_of(masks)).by_score(progress, scored, masks) == expected
    if distribution == "erdos_renyi":
        assert sum(config.budgets(GRIDS).at(0.5).values()) == 90  # of 144
        alone = config.budgets({"down": (8, 8)}).at(1.0)
        assert config.budgets(GRIDS).at(1.0)["down"] != alone["down"], (
            "otherwise the test proves nothing"
        )


@pytest.mark.parametrize("distribution", [extensions.first_full, "tests.extensions.first_full"])
def test_a_user_defined_distribution(distribution) -> None:
    config = SparsityConfig(density=0.5, distribution=distribution)
    assert config.budgets(GRIDS).at(0.0) == {"up.0": 16, "up.1": 32, "down": 32}
    fixed = SparsityConfig(density=0.5, distribution=distribution, layer_density={"up.0": 0.25})
    assert fixed.budgets(GRIDS).at(0.0) == {"up.0": 4, "up.1": 64, "down": 32}
    every = SparsityConfig(density=0.5, distribution=distribution, layer_density={"*": 0.25})
    assert every.budgets(GRIDS).at(0.0) == {"up.0": 4, "up.1": 16, "down": 16}


def test_a_distribution_receives_the_floor_of_layers() -> None:
    def floored(density: float, grids: list[Grid], least: float) -> list[int]:
        return [round(max(density, least) * rows * cols) for rows, cols in grids]

    config = SparsityConfig(density=0.25, distribution=floored, floor={"layer": 0.5})
    assert config.budgets(GRIDS).at(0.0) == {"up.0": 8, "up.1": 32, "down": 32}


def test_capacities_of_budgets_that_are_not_monotonic() -> None:
    rising = SparsityConfig(density={"schedule": extensions.bump, "initial": 0.5, "final": 0.25})
    assert rising.budgets(GRIDS).capacities() == {"up.0": 16, "up.1": 64, "down": 64}
    # After its peak the schedule only falls, so the capacity is the budget at that progress.
    assert rising.budgets(GRIDS).capacities(0.75) == rising.budgets(GRIDS).at(0.75)
    swinging = SparsityConfig(
        density={"schedule": "linear", "final": 0.1}, distribution=extensions.back_and_forth
    )
    ends = [swinging.budgets(GRIDS).at(p)["down"] for p in (0.0, 1.0)]
    # The distribution asks for 64 blocks only between two samples.
    assert max(ends) == 13 and swinging.budgets(GRIDS).capacities()["down"] == 63


def oscillating(progress: float, initial: float, final: float) -> float:
    """A schedule that oscillates faster than it is sampled."""
    return 0.5 + 0.49 * math.sin(1000 * progress)


@quick
@given(
    st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    st.sampled_from(
        ["linear", "cosine", "cubic", "stepwise", "one_shot", oscillating, extensions.quadratic]
    ),
    st.sampled_from(["uniform", "erdos_renyi", extensions.first_full, extensions.back_and_forth]),
    st.floats(0.05, 1),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0, 1),
)
def test_no_budget_passes_its_capacity(grids, schedule, shares, initial, final, p, since) -> None:
    config = SparsityConfig(
        density={"schedule": schedule, "initial": initial, "final": final}, distribution=shares
    )
    named = {f"fc{i}": grid for i, grid in enumerate(grids)}
    budgets = config.budgets(named).at(max(p, since))
    before, after = config.budgets(named).capacities(), config.budgets(named).capacities(since)
    assert all(budgets[name] <= after[name] <= before[name] for name in named)


@quick
@given(st.floats(0, 1))
def test_a_monotonic_user_schedule_is_followed_to_the_block(progress: float) -> None:
    config = SparsityConfig(density={"schedule": extensions.quadratic, "final": 0.1})
    grids = {"fc": (100, 1000)}
    assert config.budgets(grids).at(progress) == {"fc": round(1e5 * config.density_at(progress))}


@pytest.mark.parametrize(
    ("density", "update", "fall"),
    [
        # The densities are 1.0, 0.55, 0.1 in the first case, and 1.0, 0.91, 0.1 in the second.
        ({"schedule": "linear", "final": 0.1, "until": 100}, {"every_n_steps": 50}, (0.818, 100)),
        ({"schedule": "linear", "final": 0.1, "until": 100}, {"times": [10, 100]}, (0.89, 100)),
        ({"schedule": "cubic", "final": 0.1, "until": 100}, {"every_n_steps": 100}, (0.9, 100)),
        ({"schedule": "one_shot", "final": 0.25, "until": 60}, {"every_n_steps": 10}, (0.75, 60)),
        ({"schedule": "linear", "initial": 0.1, "final": 0.9, "until": 60}, {}, (0.0, 0)),
        (0.25, {}, (0.0, 0)),
    ],
)
def test_the_largest_fall_by_hand(density, update: dict, fall: tuple[float, int]) -> None:
    config = SparsityConfig(density=density, update={"until": 100, **update})
    share, step = config.budgets({"fc": (20, 50)}).largest_fall(config.timetable(1000))
    assert (round(share, 3), step) == fall


@quick
@given(
    st.sampled_from(["linear", "cosine", "cubic", "stepwise", "one_shot", extensions.bump]),
    st.integers(1, 60),
    st.integers(2, 200),
    st.floats(0.05, 0.9),
)
def test_the_largest_fall_equals_a_walk(schedule, every: int, total: int, final: float) -> None:
    density = {"schedule": schedule, "initial": 0.5, "final": final, "until": 1.0}
    config = SparsityConfig(density=density, update={"every_n_steps": every, "until": 1.0})
    table, grids = config.timetable(total), {"fc": (1000, 1000)}
    before, falls = config.budgets(grids).at(0.0)["fc"], {0: 0.0}
    for step in table.updates():
        after = config.budgets(grids).at(table.density_progress(step))["fc"]
        falls[step] = 1 - after / before
        before = after
    share, step = config.budgets(grids).largest_fall(table)
    assert share == pytest.approx(max(falls.values()), abs=1e-4)
    assert falls[step] == pytest.approx(share, abs=1e-4)
