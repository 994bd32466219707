"""The topology: indices against brute force, slots, states, and invalid arguments."""

import copy
import pickle
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lightning import BlockTopology
from sparse_lightning.topology import Indices, block_grid, count_blocks

INDICES = [name for name in Indices._fields if name != "positions"]
B = 16
EMPTY = (-1, -1)

quick = settings(deadline=None, max_examples=80, derandomize=True)


@st.composite
def coordinates(draw: st.DrawFn) -> tuple[list[tuple[int, int]], tuple[int, int]]:
    """Slot coordinates in any order, including empty slots, and their grid."""
    grid = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    blocks = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    present = draw(st.lists(st.sampled_from(blocks), unique=True))
    slots = present + [EMPTY] * draw(st.integers(0, 4))
    return draw(st.permutations(slots)), grid


def build(slots: list[tuple[int, int]], grid: tuple[int, int]) -> BlockTopology:
    return BlockTopology(torch.tensor(slots, dtype=torch.int32).view(-1, 2), grid, B)


def brute_force(slots: list[tuple[int, int]], grid: tuple[int, int]) -> dict[str, list]:
    """Return every index, computed by looping over the grid."""
    empty = [[-1, slot] for slot, block in enumerate(slots) if block == EMPTY]
    rows, row_offsets, cols, col_offsets = [], [0], [], [0]
    for r in range(grid[0]):
        rows += [[c, slots.index((r, c))] for c in range(grid[1]) if (r, c) in slots]
        row_offsets.append(len(rows))
    for c in range(grid[1]):
        cols += [[r, slots.index((r, c))] for r in range(grid[0]) if (r, c) in slots]
        col_offsets.append(len(cols))
    return {
        "coords": [list(block) for block in slots],
        "row_offsets": row_offsets,
        "row_entries": rows + empty,
        "col_offsets": col_offsets,
        "col_entries": cols + empty,
        "slots": [
            [slots.index((r, c)) if (r, c) in slots else -1 for c in range(grid[1])]
            for r in range(grid[0])
        ],
    }


def indices(topology: BlockTopology) -> dict[str, list]:
    return {name: getattr(topology, name).tolist() for name in INDICES}


def assert_indices(topology: BlockTopology, slots: list, grid: tuple[int, int]) -> None:
    assert indices(topology) == brute_force(slots, grid)
    assert {getattr(topology, name).dtype for name in INDICES} == {torch.int32}
    assert topology.capacity == len(slots)
    assert topology.n_blocks == sum(block != EMPTY for block in slots)
    assert topology.grid == grid


def test_indices_of_a_small_table() -> None:
    # x .      slots: 0 holds (2, 0), 1 is empty, 2 holds (0, 0)
    # . .
    # x .
    topology = build([(2, 0), EMPTY, (0, 0)], (3, 2))
    assert indices(topology) == {
        "coords": [[2, 0], [-1, -1], [0, 0]],
        "row_offsets": [0, 1, 1, 2],
        "row_entries": [[0, 2], [0, 0], [-1, 1]],
        "col_offsets": [0, 2, 2],
        "col_entries": [[0, 2], [2, 0], [-1, 1]],
        "slots": [[2, -1], [-1, -1], [0, -1]],
    }
    assert topology.mask.tolist() == [[True, False], [False, False], [True, False]]
    assert (topology.n_blocks, topology.capacity, topology.block_size) == (2, 3, B)
    assert (topology.out_features, topology.in_features) == (48, 32)
    assert topology.density == pytest.approx(1 / 3)
    assert "48x32" in repr(topology) and "n_blocks=2/6" in repr(topology)


@quick
@given(coordinates())
def test_indices_equal_brute_force(case: tuple) -> None:
    slots, grid = case
    assert_indices(build(slots, grid), slots, grid)


@quick
@given(coordinates(), st.integers(0, 3))
def test_from_mask_keeps_the_mask_and_sorts_slots_by_row(case: tuple, spare: int) -> None:
    slots, grid = case
    mask = build(slots, grid).mask
    present = [tuple(block) for block in mask.nonzero().tolist()]
    topology = BlockTopology.from_mask(mask, B, capacity=len(present) + spare)
    assert torch.equal(topology.mask, mask)
    assert_indices(topology, present + [EMPTY] * spare, grid)


@pytest.mark.parametrize("shape", [(1, 1), (3, 2)])
def test_no_block_at_all(shape: tuple[int, int]) -> None:
    for capacity in (0, 2):
        topology = BlockTopology.from_mask(
            torch.zeros(shape, dtype=torch.bool), B, capacity=capacity
        )
        assert_indices(topology, [EMPTY] * capacity, shape)
        assert topology.density == 0 and not topology.mask.any()
        assert topology.pack(torch.ones(shape[0] * B, shape[1] * B)).shape == (capacity, B, B)
        assert not topology.unpack(torch.ones(capacity, B, B)).any()


def test_random_draws_the_requested_number_and_uses_the_generator() -> None:
    def draw(seed: int, **options: object) -> BlockTopology:
        generator = torch.Generator().manual_seed(seed)
        return BlockTopology.random(128, 64, B, generator=generator, **options)

    topology = draw(0, density=0.25)
    assert (topology.n_blocks, topology.capacity, topology.grid) == (8, 8, (8, 4))
    assert int(topology.mask.sum()) == 8
    assert torch.equal(topology.mask, draw(0, density=0.25).mask)
    assert not torch.equal(topology.mask, draw(1, density=0.25).mask)
    assert draw(0, density=0.001).n_blocks == 1
    assert draw(0, n_blocks=0).n_blocks == 0
    assert draw(0, n_blocks=5, capacity=9).capacity == 9
    assert draw(0, density=1.0).mask.all()


def test_random_does_not_use_the_global_generator_when_given_one() -> None:
    before = torch.get_rng_state()
    BlockTopology.random(64, 64, B, 0.5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(torch.get_rng_state(), before)


@quick
@given(coordinates())
def test_state_round_trip(case: tuple) -> None:
    slots, grid = case
    topology = build(slots, grid)
    state = topology.to_state()
    assert state.dtype == torch.int32 and state.dim() == 1
    again = BlockTopology.from_state(state)
    assert_indices(again, slots, grid)
    assert again.block_size == B


def test_length_of_a_state_depends_only_on_the_capacity() -> None:
    few = BlockTopology.random(64, 64, 16, n_blocks=1, capacity=6).to_state()
    many = BlockTopology.random(512, 128, 64, n_blocks=6, capacity=6).to_state()
    assert few.shape == many.shape
    state = few.clone()
    BlockTopology.from_state(state).assign_(torch.full((6, 2), -1))
    assert torch.equal(state, few), "a topology must not share memory with its state"


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:0],
        lambda s: s[:4],
        lambda s: s[:-1],
        lambda s: s[:-2],
        lambda s: torch.cat([s, s[-2:]]),
        lambda s: s.view(1, -1),
        lambda s: torch.cat([s[:1] + 1, s[1:]]),
        lambda s: torch.cat([s[:1], s[1:2] + 1, s[2:]]),
        lambda s: torch.cat([s[:-2], s[-4:-2]]),
        lambda s: torch.cat([s[:-1], s[-1:] + 100]),
    ],
    ids=[
        "nothing",
        "header cut",
        "odd",
        "slot missing",
        "slot too many",
        "2-D",
        "format",
        "block size",
        "twice",
        "outside",
    ],
)
def test_a_damaged_state_is_refused(damage) -> None:
    state = BlockTopology.random(64, 64, B, n_blocks=4).to_state()
    BlockTopology.from_state(state)
    with pytest.raises(ValueError, match=r"must .*got"):
        BlockTopology.from_state(damage(state))


@quick
@given(coordinates(), st.randoms(use_true_random=False))
def test_assign_keeps_every_tensor(case: tuple, random) -> None:
    slots, grid = case
    topology = build(slots, grid)
    before = {name: getattr(topology, name) for name in INDICES}
    addresses = {name: tensor.data_ptr() for name, tensor in before.items()}
    blocks = [(r, c) for r in range(grid[0]) for c in range(grid[1])]
    n = random.randint(0, min(len(slots), len(blocks)))
    new = random.sample(blocks, n) + [EMPTY] * (len(slots) - n)
    random.shuffle(new)

    source = torch.tensor(new, dtype=torch.int64).view(-1, 2)
    assert topology.assign_(source) is topology
    assert_indices(topology, new, grid)
    for name, tensor in before.items():
        assert getattr(topology, name) is tensor
        assert tensor.data_ptr() == addresses[name]
    source.fill_(0)
    assert_indices(topology, new, grid)


@pytest.mark.parametrize(
    ("coords", "got"),
    [
        ([(0, 0), (1, 1), (0, 0)], "repeated"),
        ([(0, 0), (3, 0), EMPTY], r"\(3, 0\) in slot 1"),
        ([(0, 0), (0, 2), EMPTY], r"\(0, 2\) in slot 1"),
        ([(0, 0), (-2, 0), EMPTY], r"\(-2, 0\) in slot 1"),
        ([(0, 0), (-1, 0), EMPTY], r"\(-1, 0\) in slot 1"),
        ([(0, 0), (0, -1), EMPTY], r"\(0, -1\) in slot 1"),
        ([(0, 0), (1, 1)], "2 slots"),
        ([(0, 0), (1, 1), EMPTY, EMPTY], "4 slots"),
    ],
)
def test_assign_refuses_and_changes_nothing(coords: list, got: str) -> None:
    slots = [(2, 1), EMPTY, (0, 1)]
    topology = build(slots, (3, 2))
    with pytest.raises(ValueError, match=rf"`coords` must .*got .*{got}"):
        topology.assign_(torch.tensor(coords))
    assert_indices(topology, slots, (3, 2))
    if len(coords) == 3:
        with pytest.raises(ValueError, match=rf"`coords` must .*got .*{got}"):
            build(coords, (3, 2))


def grid_weight(grid: tuple[int, int]) -> torch.Tensor:
    return torch.randn(grid[0] * B, grid[1] * B, generator=torch.Generator().manual_seed(0))


@quick
@given(coordinates())
def test_pack_extracts_the_blocks_and_unpack_restores_them(case: tuple) -> None:
    slots, grid = case
    topology, weight = build(slots, grid), grid_weight(grid)
    values = topology.pack(weight)
    for slot, (r, c) in enumerate(slots):
        block = weight[r * B : (r + 1) * B, c * B : (c + 1) * B]
        expected = torch.zeros(B, B) if (r, c) == EMPTY else block
        assert torch.equal(values[slot], expected)
    present = topology.mask.repeat_interleave(B, 0).repeat_interleave(B, 1)
    assert torch.equal(topology.unpack(values), torch.where(present, weight, 0))
    # The values of empty slots are not used.
    values[[slot for slot, block in enumerate(slots) if block == EMPTY]] = torch.nan
    assert torch.equal(topology.unpack(values), torch.where(present, weight, 0))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_pack_leaves_zeros_in_empty_slots_whatever_the_weight_holds(poison: float) -> None:
    topology = build([(0, 0), EMPTY], (2, 2))
    weight = torch.full((2 * B, 2 * B), poison)
    weight[:B, :B] = 1.0
    assert torch.equal(topology.pack(weight)[0], torch.ones(B, B))
    assert torch.equal(topology.pack(weight)[1], torch.zeros(B, B))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int32])
def test_pack_and_unpack_keep_the_dtype(dtype: torch.dtype) -> None:
    topology = BlockTopology.from_mask(torch.eye(2, dtype=torch.bool), B, capacity=3)
    values = topology.pack(torch.ones(32, 32).to(dtype))
    assert values.dtype == topology.unpack(values).dtype == dtype
    assert values.sum() == 2 * B * B == topology.unpack(values).sum()


@pytest.mark.parametrize("shape", [(32, 48), (48, 33), (48, 32, 1), (48,)])
def test_pack_refuses_another_shape(shape: tuple[int, ...]) -> None:
    topology = build([(0, 0)], (3, 2))
    with pytest.raises(ValueError, match=rf"`weight` .*\[48, 32\].*got {re.escape(str([*shape]))}"):
        topology.pack(torch.zeros(shape))


def test_scatter_arranges_slots_on_the_grid() -> None:
    topology = build([(2, 0), EMPTY, (0, 1)], (3, 2))
    scattered = topology.scatter(torch.tensor([5.0, 6.0, 7.0]), fill=-1.0)
    assert scattered.tolist() == [[-1, 7], [-1, -1], [5, -1]]
    assert topology.scatter(torch.tensor([5, 6, 7]), fill=0).dtype == torch.int64


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_supported_block_sizes(block_size: int) -> None:
    topology = BlockTopology.random(256, 128, block_size, 1.0)
    assert topology.grid == (256 // block_size, 128 // block_size)


@pytest.mark.parametrize("block_size", [8, 48, 0, -16, 256, 64.0, 32.5, "64", True, None, [16]])
def test_other_block_sizes_are_refused(block_size: object) -> None:
    says = rf"`block_size` must be one of .*16.*128.*got {re.escape(repr(block_size))}"
    calls = [
        lambda: BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), block_size),
        lambda: BlockTopology.random(768, 768, block_size, 0.5),
        lambda: block_grid(768, 768, block_size),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match=says):
            call()


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.uint8])
def test_a_mask_must_be_bool(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=rf"`mask` must be .*bool.*got {dtype}"):
        BlockTopology.from_mask(torch.ones(2, 2, dtype=dtype), B)


@pytest.mark.parametrize("shape", [(4,), (2, 2, 1), ()])
def test_a_mask_must_be_a_matrix(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`mask` must be 2-D.*got {re.escape(str([*shape]))}"):
        BlockTopology.from_mask(torch.ones(shape, dtype=torch.bool), B)


@pytest.mark.parametrize("shape", [(0, 2), (2, 0)])
def test_a_grid_without_blocks_is_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"`grid` must .*got {re.escape(str(shape))}"):
        BlockTopology.from_mask(torch.ones(shape, dtype=torch.bool), B)


@pytest.mark.parametrize("capacity", [3, 0, -1])
def test_a_capacity_below_the_blocks_is_refused(capacity: int) -> None:
    with pytest.raises(ValueError, match=rf"`capacity` must .*got {capacity} for 4 blocks"):
        BlockTopology.from_mask(torch.ones(2, 2, dtype=torch.bool), B, capacity=capacity)


@pytest.mark.parametrize("shape", [(4,), (4, 3), (2, 2, 2)])
def test_coords_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"`coords` must .*got {re.escape(str([*shape]))}"):
        BlockTopology(torch.zeros(shape, dtype=torch.int32), (2, 2), B)


@pytest.mark.parametrize("size", [40, 8, 0, -16])
def test_features_that_blocks_do_not_fill_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match=rf"`out_features` must .*block_size=16; got {size}\."):
        BlockTopology.random(size, 32, B, 0.5)
    with pytest.raises(ValueError, match=rf"`in_features` must .*block_size=16; got {size}\."):
        BlockTopology.random(32, size, B, 0.5)


@pytest.mark.parametrize("density", [0, 0.0, -0.1, 1.5, 2, float("nan"), float("inf"), True, "0.5"])
def test_a_density_outside_0_to_1_is_refused(density: object) -> None:
    says = rf"`density` must be .*\(0, 1\].*got {re.escape(repr(density))}"
    with pytest.raises((ValueError, TypeError), match=says):
        BlockTopology.random(32, 32, B, density)
    with pytest.raises((ValueError, TypeError), match=says):
        count_blocks(density, 16)


def test_random_needs_a_density_or_a_number_of_blocks() -> None:
    for options in ({}, {"density": 0.5, "n_blocks": 2}):
        with pytest.raises(ValueError, match="one of `density` and `n_blocks`"):
            BlockTopology.random(32, 32, B, **options)
    for n_blocks in (-1, 5):
        with pytest.raises(ValueError, match=rf"`n_blocks` must be in 0\.\.4; got {n_blocks}"):
            BlockTopology.random(32, 32, B, n_blocks=n_blocks)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda t: pickle.loads(pickle.dumps(t))])
def test_copies_are_equal_and_independent(again) -> None:
    slots = [(2, 1), EMPTY, (0, 1)]
    topology = build(slots, (3, 2))
    other = again(topology)
    assert_indices(other, slots, (3, 2))
    assert (other.block_size, other.density) == (topology.block_size, topology.density)
    other.assign_(torch.tensor([EMPTY, (1, 0), EMPTY]))
    assert_indices(other, [EMPTY, (1, 0), EMPTY], (3, 2))
    assert_indices(topology, slots, (3, 2))
