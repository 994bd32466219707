"""Topology updates: hand-worked tables, then properties against a slow, independent reference."""

import itertools
import math
import re

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lightning.policy.updates import (
    ModelUpdate,
    TopologyUpdate,
    choose_blocks,
    exchange_blocks,
    update_topology,
)
from sparse_lightning.topology import BlockTopology

NAN, INF = math.nan, math.inf
EMPTY = (-1, -1)

quick = settings(deadline=None, max_examples=150, derandomize=True)


def topology_of(slots: list[tuple[int, int]], grid: tuple[int, int]) -> BlockTopology:
    return BlockTopology(torch.tensor(slots, dtype=torch.int32).view(-1, 2), grid, 16)


def table(*rows: list[float]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)


def outcome(update: TopologyUpdate) -> tuple[list, list, list]:
    coords = [tuple(block) for block in update.coords.tolist()]
    return coords, update.dropped.tolist(), update.grown.tolist()


# A 2 x 3 layer whose three slots hold (0, 0), (0, 1) and (1, 2).
SLOTS, GRID = [(0, 0), (0, 1), (1, 2)], (2, 3)
DROP = table([3, 1, 0], [0, 0, 2])
GROW = table([0, 0, 5], [7, 6, 0])


@pytest.mark.parametrize(
    ("n_target", "fraction", "coords", "dropped", "grown"),
    [
        # Nothing is exchanged.
        (3, 0.0, [(0, 0), (0, 1), (1, 2)], [], []),
        # The weakest block, (0, 1), is replaced by (1, 0).
        (3, 1 / 3, [(0, 0), (1, 0), (1, 2)], [1], [1]),
        # The two weakest are replaced: grown blocks in row-major order take slots in slot order.
        (3, 2 / 3, [(0, 0), (1, 0), (1, 1)], [1, 2], [1, 2]),
        # All are replaced: (0, 2) is third among the absent blocks.
        (3, 1.0, [(0, 2), (1, 0), (1, 1)], [0, 1, 2], [0, 1, 2]),
        # The target falls while one block is exchanged: (0, 0) stays and (1, 0) is grown.
        (2, 0.5, [(0, 0), (1, 0), EMPTY], [1, 2], [1]),
        # The target falls and nothing is exchanged.
        (1, 0.0, [(0, 0), EMPTY, EMPTY], [1, 2], []),
    ],
)
def test_drop_by_magnitude_and_grow_by_gradient(
    n_target: int, fraction: float, coords: list, dropped: list, grown: list
) -> None:
    update = update_topology(topology_of(SLOTS, GRID), DROP, GROW, n_target, fraction)
    assert outcome(update) == (coords, dropped, grown)
    assert (update.n_before, update.n_after) == (3, n_target)
    assert update.survival == pytest.approx(1 - len(dropped) / 3)
    assert update.changed.tolist() == sorted({*dropped, *grown})
    assert {update.dropped.dtype, update.grown.dtype, update.changed.dtype} == {torch.int64}
    assert update.coords.dtype == torch.int32


def test_ties_go_to_the_lower_index() -> None:
    topology = topology_of([(1, 1), (0, 0), (0, 1)], (2, 4))
    same = torch.ones(2, 4)
    # (1, 1), the last of the present blocks, is dropped; (0, 2), the first absent one, is grown.
    expected = ([(0, 2), (0, 0), (0, 1)], [0], [0])
    assert outcome(update_topology(topology, same, same, 3, 1 / 3)) == expected
    # The dropped block also competes by its index: (1, 1) comes before (1, 2).
    growth = table([1, 1, 1, 1], [1, 2, 2, 2])
    expected = ([(1, 1), (0, 0), (0, 1)], [], [])
    assert outcome(update_topology(topology, same, growth, 3, 1 / 3)) == expected


def test_a_regrown_block_keeps_its_slot() -> None:
    grow = table([0, 9, 5], [7, 6, 0])
    # (0, 1) is the weakest, but has the largest gradient, so it keeps its slot.
    update = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1 / 3)
    assert outcome(update) == (SLOTS, [], [])
    assert (update.survival, update.changed.tolist()) == (1.0, [])
    # If two blocks are exchanged, the second, (1, 0), takes the slot of (1, 2).
    update = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 2 / 3)
    assert outcome(update) == ([(0, 0), (0, 1), (1, 0)], [2], [2])


def test_without_growth_blocks_are_only_dropped() -> None:
    topology = topology_of([*SLOTS, EMPTY], GRID)
    assert outcome(update_topology(topology, DROP, None, 3, 1.0))[1:] == ([], [])
    assert outcome(update_topology(topology, DROP, None, 2, 1.0)) == (
        [(0, 0), EMPTY, (1, 2), EMPTY],
        [1],
        [],
    )
    update = update_topology(topology, DROP, None, 4, 0.5)
    assert (outcome(update)[0], update.n_after) == ([*SLOTS, EMPTY], 3), "nothing may be grown"


def test_slots_are_recycled_before_empty_ones_are_filled() -> None:
    topology = topology_of([EMPTY, (0, 0), (0, 1), EMPTY, (1, 2)], GRID)
    # One of three blocks is exchanged and takes the slot of (0, 1), although slot 0 is empty.
    update = update_topology(topology, DROP, GROW, 3, 1 / 3)
    assert outcome(update) == ([EMPTY, (0, 0), (1, 0), EMPTY, (1, 2)], [2], [2])
    # Four blocks, one exchanged: nothing is dropped, and (1, 0) takes the first empty slot.
    update = update_topology(topology, DROP, GROW, 4, 1 / 4)
    assert outcome(update) == ([(1, 0), (0, 0), (0, 1), EMPTY, (1, 2)], [], [0])
    # Four blocks, two exchanged: (0, 1) is dropped, and (1, 0), the first grown, takes its slot.
    update = update_topology(topology, DROP, GROW, 4, 2 / 4)
    assert outcome(update) == ([(1, 1), (0, 0), (1, 0), EMPTY, (1, 2)], [2], [2, 0])
    assert update.changed.tolist() == [0, 2]


def test_when_all_blocks_are_present_nothing_can_be_exchanged() -> None:
    topology = BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), 16)
    scores = table([4, 1], [2, 3])
    assert outcome(update_topology(topology, scores, scores, 4, 1.0))[1:] == ([], [])
    # Three blocks remain, one of them exchanged, for which the dropped blocks compete.
    update = update_topology(topology, scores, table([0, 9], [0, 0]), 3, 1 / 3)
    assert outcome(update) == ([(0, 0), (0, 1), EMPTY, (1, 1)], [2], [])


def test_the_exchange_is_bounded_by_the_absent_blocks() -> None:
    topology = topology_of([(0, 0), (0, 1), (1, 0)], (2, 2))
    # One of four blocks is absent, so two stay by magnitude, however small their gradients are.
    drop, grow = table([3, 2], [1, 0]), table([0, 0], [5, 9])
    update = update_topology(topology, drop, grow, 3, 1.0)
    assert outcome(update) == ([(0, 0), (0, 1), (1, 1)], [2], [2])


def test_the_exchange_is_a_share_of_the_target_rounded() -> None:
    topology = topology_of([(0, c) for c in range(8)], (2, 8))
    drop = table(range(8, 0, -1), [0] * 8)
    grow = table([0] * 8, range(8, 0, -1))

    def n_grown(n_target: int, fraction: float) -> int:
        return len(update_topology(topology, drop, grow, n_target, fraction).grown)

    # 0.3 of 8 is 2.4; 0.3 of 5 is 1.5, which rounds to the even 2; 0.35 of 8 is 2.8.
    assert [n_grown(8, 0.3), n_grown(5, 0.3), n_grown(8, 0.35), n_grown(4, 0.25)] == [2, 2, 3, 1]


def test_many_ties_go_to_the_lower_indices() -> None:
    """An unstable sort would not keep this many equal elements in order."""
    topology = BlockTopology.random(640, 640, 16, n_blocks=800)
    same = torch.ones(40, 40)
    update = update_topology(topology, same, None, 500, 0.0)
    present = topology.mask.flatten().nonzero().flatten().tolist()
    assert sorted(block_indices(update.coords, (40, 40))) == present[:500]
    update = update_topology(topology, same, same, 800, 1.0)
    assert sorted(block_indices(update.coords, (40, 40))) == list(range(800))


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_score_that_is_not_finite_is_never_chosen(bad: float) -> None:
    # (1, 0) would otherwise be grown first.
    grow = table([0, 0, 5], [bad, 6, 0])
    update = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1 / 3)
    assert outcome(update) == ([(0, 0), (1, 1), (1, 2)], [1], [1])
    # (0, 0) would otherwise be kept first; it is dropped and not grown again.
    drop = table([bad, 1, 0], [0, 0, 2])
    update = update_topology(topology_of(SLOTS, GRID), drop, GROW, 3, 1 / 3)
    assert outcome(update) == ([(1, 0), (0, 1), (1, 2)], [0], [0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_present_blocks_fill_what_growth_cannot(bad: float) -> None:
    no_growth = torch.full(GRID, bad)
    update = update_topology(topology_of(SLOTS, GRID), DROP, no_growth, 3, 1.0)
    assert outcome(update) == (SLOTS, [], [])
    # Only one block can be grown, so the two strongest of the other three stay.
    grow = table([bad, bad, bad], [bad, 1, bad])
    update = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1.0)
    assert outcome(update) == ([(0, 0), (1, 1), (1, 2)], [1], [1])
    # Without any finite score the budget is still met, by index.
    update = update_topology(topology_of(SLOTS, GRID), no_growth, no_growth, 2, 0.5)
    assert outcome(update) == ([(0, 0), (0, 1), EMPTY], [2], [])
    # Blocks without a finite score come after those with one.
    drop = table([bad, 1, 0], [0, 0, 2])
    update = update_topology(topology_of(SLOTS, GRID), drop, None, 2, 0.0)
    assert outcome(update) == ([EMPTY, (0, 1), (1, 2)], [0], [])
    update = update_topology(topology_of(SLOTS, GRID), drop, None, 3, 0.0)
    assert outcome(update) == (SLOTS, [], [])


@pytest.mark.parametrize(
    ("argument", "change", "got"),
    [
        ("mask", {"n_target": 4}, "4"),
        ("n_target", {"n_target": 0}, "0"),
        ("n_target", {"n_target": -1}, "-1"),
        ("fraction", {"fraction": -0.1}, "-0.1"),
        ("fraction", {"fraction": 1.1}, "1.1"),
        ("fraction", {"fraction": NAN}, "nan"),
        ("drop_scores", {"drop_scores": torch.zeros(3, 2)}, "[3, 2]"),
        ("drop_scores", {"drop_scores": torch.zeros(6)}, "[6]"),
        ("grow_scores", {"grow_scores": torch.zeros(3, 2)}, "[3, 2]"),
    ],
)
def test_arguments_out_of_range_are_refused(argument: str, change: dict, got: str) -> None:
    arguments = {"drop_scores": DROP, "grow_scores": GROW, "n_target": 3, "fraction": 0.5}
    topology = topology_of(SLOTS, GRID)
    update_topology(topology, **arguments)
    with pytest.raises(ValueError, match=rf"`{argument}` must .*got {re.escape(got)}"):
        update_topology(topology, **arguments | change)


def test_survival_of_a_layer_that_had_no_block() -> None:
    update = update_topology(
        topology_of([EMPTY, EMPTY], (1, 2)), table([0, 0]), table([1, 2]), 1, 0
    )
    assert outcome(update) == ([(0, 1), EMPTY], [], [0])
    assert update.survival == 1.0
    assert ModelUpdate(7, 1, {"fc": update}).layers["fc"].n_after == 1


FINITE = st.sampled_from([0.0, 1.0, 2.0, 3.0, -1.0, 0.5])
ANY = FINITE | st.sampled_from([NAN, INF, -INF])


@st.composite
def cases(draw: st.DrawFn) -> dict:
    grid = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    blocks = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    present = [block for block in blocks if draw(st.booleans())]
    spare = draw(st.integers(0 if present else 1, 4))
    slots = draw(st.permutations(present + [EMPTY] * spare))
    score = draw(st.sampled_from([FINITE, ANY]))

    def scores() -> Tensor:
        n = len(blocks)
        return torch.tensor(draw(st.lists(score, min_size=n, max_size=n))).view(grid)

    return {
        "topology": topology_of(slots, grid),
        "drop_scores": scores(),
        "grow_scores": scores() if draw(st.booleans()) else None,
        "n_target": draw(st.just(len(present)) | st.integers(1, len(slots))) or 1,
        "fraction": draw(st.floats(0, 1)),
    }


def best(scores: Tensor, candidates: set[int], n: int) -> set[int]:
    flat = scores.flatten().tolist()
    finite = [i for i in candidates if math.isfinite(flat[i])]
    return set(sorted(finite, key=lambda i: (-flat[i], i))[: max(n, 0)])


def slow_exchange(case: dict) -> set[int]:
    """Return the blocks present afterwards, computed with sets and sorting instead of tensors."""
    present = set(case["topology"].mask.flatten().nonzero().flatten().tolist())
    total, n_target = case["topology"].mask.numel(), case["n_target"]
    drop, grow = case["drop_scores"], case["grow_scores"]
    k = 0 if grow is None else min(round(case["fraction"] * n_target), max(total - n_target, 0))
    keep = best(drop, present, n_target - k)
    if grow is not None:
        keep |= best(grow, set(range(total)) - keep, n_target - len(keep))
    keep |= best(drop, present - keep, n_target - len(keep))
    return keep | set(sorted(present - keep)[: max(n_target - len(keep), 0)])


def block_indices(coords: Tensor, grid: tuple[int, int]) -> list[int]:
    return [r * grid[1] + c for r, c in coords.tolist() if r >= 0]


@quick
@given(cases())
def test_the_result_equals_the_slow_reference(case: dict) -> None:
    update = update_topology(**case)
    chosen = block_indices(update.coords, case["topology"].grid)
    assert len(chosen) == len(set(chosen))
    assert set(chosen) == slow_exchange(case)


@quick
@given(cases())
def test_the_budget_is_met(case: dict) -> None:
    topology, grow = case["topology"], case["grow_scores"]
    mask = topology.mask
    growable = 0 if grow is None else int((grow.isfinite() & ~mask).sum())
    update = update_topology(**case)
    assert update.n_after == min(case["n_target"], topology.n_blocks + growable)
    assert update.n_after == len(block_indices(update.coords, topology.grid))


@quick
@given(cases())
def test_slots_of_kept_blocks_do_not_move(case: dict) -> None:
    topology = case["topology"]
    before = topology.coords.clone()
    update = update_topology(**case)
    assert torch.equal(topology.coords, before), "deciding must not change the topology"
    old, new = before.tolist(), update.coords.tolist()
    dropped, grown = update.dropped.tolist(), update.grown.tolist()
    for slot in set(range(topology.capacity)) - {*dropped, *grown}:
        assert new[slot] == old[slot]
    gone = {tuple(old[slot]) for slot in dropped}
    new_blocks = {tuple(new[slot]) for slot in grown}
    kept = {tuple(block) for block in old} - gone - {EMPTY}
    assert EMPTY not in gone and EMPTY not in new_blocks
    assert not new_blocks & (gone | kept), "a block that stays or goes is not also grown"
    empty = [slot for slot, block in enumerate(old) if tuple(block) == EMPTY]
    assert grown == (dropped + empty)[: len(grown)], "dropped slots first, in slot order"
    for slot in set(dropped) - set(grown):
        assert tuple(new[slot]) == EMPTY
    assert update.changed.tolist() == sorted({*dropped, *grown})
    assert 0 <= update.survival <= 1


@quick
@given(cases())
def test_a_topology_accepts_the_outcome(case: dict) -> None:
    topology = case["topology"]
    update = update_topology(**case)
    assert update.coords.shape == topology.coords.shape
    topology.assign_(update.coords)
    assert topology.n_blocks == update.n_after


@quick
@given(cases(), st.randoms(use_true_random=False))
def test_only_the_scores_matter_not_the_slots(case: dict, random) -> None:
    torch.manual_seed(random.randint(0, 9))
    topology = case["topology"]
    first, second = update_topology(**case), update_topology(**case)
    assert outcome(first) == outcome(second)
    slots = [tuple(block) for block in topology.coords.tolist()]
    random.shuffle(slots)
    shuffled = update_topology(**case | {"topology": topology_of(slots, topology.grid)})
    assert sorted(shuffled.coords.tolist()) == sorted(first.coords.tolist())
    assert shuffled.survival == first.survival


# -- blocks that were just dropped ---------------------------------------------------------------


def test_regrowth_can_be_disabled() -> None:
    # (0, 1) is dropped; its gradient is the largest of all, then (1, 0)'s.
    grow = table([0, 9, 5], [7, 6, 0])
    again = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1 / 3)
    assert outcome(again) == ([(0, 0), (0, 1), (1, 2)], [], [])
    never = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1 / 3, regrow=False)
    assert outcome(never) == ([(0, 0), (1, 0), (1, 2)], [1], [1])


def test_dropped_blocks_stay_if_no_others_can_grow() -> None:
    grow = table([0, 0, NAN], [NAN, NAN, 0])
    update = update_topology(topology_of(SLOTS, GRID), DROP, grow, 3, 1.0, regrow=False)
    assert outcome(update) == (SLOTS, [], [])


# -- floors of rows and columns ------------------------------------------------------------------

EVERYWHERE = torch.ones(3, 3, dtype=torch.bool)


@pytest.mark.parametrize(
    ("n", "floor", "chosen"),
    [
        # The three best blocks form a row.
        (3, (0, 0), [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
        # One block per row: the best of rows 1 and 2, and the best overall.
        (3, (1, 0), [[1, 0, 0], [0, 0, 1], [1, 0, 0]]),
        # Each column already has a block.
        (3, (0, 1), [[1, 1, 1], [0, 0, 0], [0, 0, 0]]),
        # Both floors: a block that covers a row and a column comes first, so 6 before 5.
        (3, (1, 1), [[0, 1, 0], [0, 0, 1], [1, 0, 0]]),
        (4, (1, 1), [[1, 1, 0], [0, 0, 1], [1, 0, 0]]),
        # Too few blocks for all: they cover as many rows and columns as possible.
        (2, (1, 1), [[1, 0, 0], [0, 0, 1], [0, 0, 0]]),
        (1, (1, 1), [[1, 0, 0], [0, 0, 0], [0, 0, 0]]),
        (0, (1, 1), [[0, 0, 0], [0, 0, 0], [0, 0, 0]]),
    ],
)
def test_floors_by_hand(n: int, floor: tuple[int, int], chosen: list[list[int]]) -> None:
    scores = table([9, 8, 7], [3, 2, 6], [5, 4, 1])
    assert choose_blocks(scores, EVERYWHERE, n, floor=floor).int().tolist() == chosen


def test_the_last_block_of_a_row_and_of_a_column_stays() -> None:
    slots = [(0, 0), (0, 1), (1, 2)]
    drop = table([3, 2, 0], [0, 0, 1])
    free = update_topology(topology_of(slots, GRID), drop, None, 2, 0.0)
    assert outcome(free)[0] == [(0, 0), (0, 1), EMPTY]
    kept = update_topology(topology_of(slots, GRID), drop, None, 2, 0.0, floor=(1, 0))
    assert outcome(kept)[0] == [(0, 0), EMPTY, (1, 2)]


def test_an_infeasible_floor_is_ignored() -> None:
    """Two blocks cannot cover three columns, so the most useful blocks stay."""
    slots = [(0, 0), (0, 1), (1, 2)]
    drop = table([3, 2, 0], [0, 0, 1])
    update = update_topology(topology_of(slots, GRID), drop, None, 2, 0.0, floor=(1, 1))
    assert outcome(update)[0] == [(0, 0), (0, 1), EMPTY]
    update = update_topology(topology_of(slots, GRID), drop, None, 2, 0.0, floor=(1, 0))
    assert outcome(update)[0] == [(0, 0), EMPTY, (1, 2)]


def test_growth_revives_dead_rows_and_columns_first() -> None:
    slots = [(0, 0), (0, 1), EMPTY]
    grow = table([0, 0, 9], [2, 3, 1])
    free = update_topology(topology_of(slots, GRID), DROP, grow, 3, 0.0)
    assert free.n_after == 3 and outcome(free)[0][2] == (0, 2)
    alive = update_topology(topology_of(slots, GRID), DROP, grow, 3, 0.0, floor=(1, 1))
    assert outcome(alive)[0] == [(0, 0), (0, 1), (1, 2)], "row 1 and column 2 at once"


SCORES = st.integers(0, 6).map(float) | st.floats(0, 1, width=32)


@st.composite
def scored_grids(draw: st.DrawFn) -> tuple[Tensor, int]:
    rows, cols = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    flat = draw(st.lists(SCORES, min_size=rows * cols, max_size=rows * cols))
    return torch.tensor(flat).view(rows, cols), draw(st.integers(0, rows * cols))


@quick
@given(scored_grids())
def test_rows_and_columns_are_covered_whenever_the_budget_allows(case) -> None:
    scores, n = case
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    chosen = choose_blocks(scores, everywhere, n, floor=(1, 1))
    assert int(chosen.sum()) == n
    rows, cols = int(chosen.any(1).sum()), int(chosen.any(0).sum())
    plain = choose_blocks(scores, everywhere, n)
    if n >= max(scores.shape):
        assert (rows, cols) == scores.shape
    else:
        assert rows == min(n, scores.shape[0]) and cols == min(n, scores.shape[1])
    if plain.any(1).all() and plain.any(0).all():
        assert torch.equal(chosen, plain), "where nothing is missing, the best are chosen"


@quick
@given(cases(), st.tuples(st.integers(0, 2), st.integers(0, 2)), st.booleans())
def test_floors_and_regrowth_leave_the_budget_exact(case: dict, floor, regrow: bool) -> None:
    plain = update_topology(**case)
    update = update_topology(**case, floor=floor, regrow=regrow)
    assert update.n_after == plain.n_after
    case["topology"].assign_(update.coords)
    assert case["topology"].n_blocks == update.n_after


def reaches(mask: Tensor, needs: tuple[Tensor, Tensor]) -> bool:
    return bool((mask.sum(1) >= needs[0]).all() and (mask.sum(0) >= needs[1]).all())


def fewest_that_reach(needs: tuple[Tensor, Tensor], candidates: Tensor) -> float:
    """Return the fewest candidates that give rows and columns what they need; infinity if none do.

    As many as a maximum flow from rows to columns serve two needs at once.
    """
    if not reaches(candidates, needs):
        return INF
    network = networkx.DiGraph()
    for row, need in enumerate(needs[0].tolist()):
        network.add_edge("source", ("row", row), capacity=need)
    for col, need in enumerate(needs[1].tolist()):
        network.add_edge(("col", col), "sink", capacity=need)
    for row, col in candidates.nonzero().tolist():
        network.add_edge(("row", row), ("col", col), capacity=1)
    total = int(needs[0].sum() + needs[1].sum())
    return total - networkx.maximum_flow_value(network, "source", "sink")


@pytest.mark.parametrize("floor", [(1, 1), (1, 0), (2, 1), (2, 2)])
@pytest.mark.parametrize("grid", [(8, 8), (4, 7), (7, 4)])
def test_no_row_or_column_dies_in_an_update(grid: tuple[int, int], floor: tuple[int, int]) -> None:
    """With every tight budget, the floor is reached where the blocks that may be present can."""
    torch.manual_seed(0)
    n_blocks = math.prod(grid)
    n_rows, n_cols = floor[0] * grid[0], floor[1] * grid[1]
    for n_target, spare, fraction, regrow in itertools.product(
        range(max(n_rows, n_cols), min(n_rows + n_cols, n_blocks - 1) + 1),
        (0.0, 0.3),
        (0.0, 0.1, 0.5),
        (True, False),
    ):
        n_present = n_target + round(spare * (n_blocks - n_target))
        mask = torch.randperm(n_blocks).view(grid) < n_present
        drop, grow = torch.rand(grid), torch.rand(grid)
        grow[torch.rand(grid) < 0.5] = NAN
        after = exchange_blocks(mask, drop, grow, n_target, fraction, floor=floor, regrow=regrow)
        possible = mask | grow.isfinite() if fraction else mask
        # A row or column with too few of these blocks needs all of them.
        needs = possible.sum(1).clamp(max=floor[0]), possible.sum(0).clamp(max=floor[1])
        case = (mask, drop, grow, n_target, fraction, regrow)
        assert reaches(after, needs) or fewest_that_reach(needs, possible) > n_target, case
        n_grown, n_exchanged = int((after & ~mask).sum()), round(fraction * n_target)
        assert n_grown <= n_exchanged or fewest_that_reach(needs, mask) > n_target, case


def test_a_block_that_was_to_grow_makes_way_for_one_that_the_floor_needs() -> None:
    # (1, 1) and (0, 2) stay, and (0, 0) would grow for column 0, but leave none for row 2. (2, 0)
    # serves both, and those that stay are unchanged.
    mask = table([0, 1, 1], [1, 1, 0], [1, 1, 1]).bool()
    drop = table([0, 1, 6], [8, 9, 0], [5, 7, 2])
    grow = table([8, 0, 0], [0, 0, 6], [0, 0, 0])
    after = exchange_blocks(mask, drop, grow, 3, 1 / 3, floor=(1, 1), regrow=False)
    assert after.int().tolist() == [[0, 0, 1], [0, 1, 0], [1, 0, 0]]


def test_no_more_blocks_grow_for_a_floor_that_present_ones_reach() -> None:
    # One block, (2, 1), is exchanged. To grow (0, 2) too would also reach the floor.
    mask = table([1, 1, 0, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]).bool()
    drop = table([13, 94, 0, 85], [13, 70, 4, 0], [12, 0, 56, 4], [90, 44, 20, 28])
    grow = table([0, 0, 30, 0], [0, 0, 0, 65], [0, 35, 0, 0], [0, 0, 0, 0])
    after = exchange_blocks(mask, drop, grow, 8, 1 / 8, floor=(2, 2), regrow=False)
    assert after.int().tolist() == [[0, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 0], [1, 0, 0, 1]]
