"""Positions of 2:4 patterns, and the exchange of weights, against loops over groups of four."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lightning import nm_pattern
from sparse_lightning.nm_pattern import (
    are_valid,
    compress,
    expand,
    find_moves,
    from_columns,
    largest_positions,
    moved_pairs,
    random_positions,
    to_columns,
)
from sparse_lightning.policy.weights import exchange_weights

quick = settings(deadline=None, derandomize=True, max_examples=30)
SEEDS = st.integers(0, 2**32)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def drawn(seed: int, n_slots: int = 2) -> Tensor:
    return random_positions(n_slots, 16, torch.Generator().manual_seed(seed))


def columns_by_group(positions: Tensor) -> list[list[int]]:
    """Return the two columns of each group, in order, read off the layout that is documented."""
    groups = []
    for byte in positions.flatten().tolist():
        for bits in (byte & 15, byte >> 4):
            groups.append([bits & 3, bits >> 2])
    return groups


def test_every_pair_has_a_code_and_is_drawn_equally_often() -> None:
    pairs = columns_by_group(random_positions(64, 128, torch.Generator().manual_seed(0)))
    counts = {pair: pairs.count([*pair]) for pair in itertools.combinations(range(4), 2)}
    assert sum(counts.values()) == len(pairs) == 64 * 128 * 32
    assert all(abs(6 * n / len(pairs) - 1) < 0.02 for n in counts.values())


def test_the_default_generator_draws_if_none_is_given() -> None:
    torch.manual_seed(3)
    first = random_positions(2, 16)
    torch.manual_seed(3)
    assert torch.equal(first, random_positions(2, 16)) and not torch.equal(
        first, random_positions(2, 16)
    )


@quick
@given(SEEDS, DTYPES)
def test_expanding_and_compressing(seed: int, dtype: torch.dtype) -> None:
    positions = drawn(seed)
    assert are_valid(positions) and torch.equal(from_columns(to_columns(positions)), positions)
    values = torch.randn(2, 16, 8, dtype=torch.float64).to(dtype)
    blocks = expand(values, positions)
    expected = torch.zeros(2 * 16 * 4, 4, dtype=dtype)
    for group, (columns, pair) in enumerate(
        zip(columns_by_group(positions), values.view(-1, 2), strict=True)
    ):
        expected[group, columns] = pair
    assert torch.equal(blocks, expected.view(2, 16, 16))
    assert torch.equal(compress(blocks, positions), values)


@quick
@given(SEEDS, SEEDS)
def test_moved_weights_stay_where_they_are_kept(seed: int, other: int) -> None:
    before, after = drawn(seed), drawn(other)
    values = torch.randn(2, 16, 8)
    moves = find_moves(before, after)
    moved = values.clone()
    moved.view(-1, 2)[moves.groups] = moved_pairs(values, moves, start=7.0)
    is_kept, was_kept = (
        expand(torch.ones(2, 16, 8), positions).bool() for positions in (after, before)
    )
    found, earlier = expand(moved, after), expand(values, before)
    assert torch.equal(found[is_kept & was_kept], earlier[is_kept & was_kept])
    assert (found[is_kept & ~was_kept] == 7.0).all()
    assert len(moves.groups.unique()) == len(moves.groups)
    assert int(moves.is_new.sum()) == int((is_kept & ~was_kept).sum())


@quick
@given(SEEDS)
def test_the_two_largest_of_each_four_are_kept(seed: int) -> None:
    """Among equal ones those on the left; rounding makes many equal."""
    blocks = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(seed)).round()
    groups = columns_by_group(largest_positions(blocks))
    for columns, four in zip(groups, blocks.view(-1, 4).abs().tolist(), strict=True):
        assert columns == sorted(sorted(range(4), key=lambda c: (-four[c], c))[:2])


@quick
@given(SEEDS, st.floats(0, 1), DTYPES, st.booleans())
def test_weights_are_exchanged_as_documented(
    seed: int, fraction: float, dtype: torch.dtype, rounded: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)
    positions = drawn(seed, 3)
    values = torch.randn(3, 16, 8, generator=generator)
    gradient = torch.randn(3, 16, 16, generator=generator)
    if rounded:  # so that many are equal, or zero
        values, gradient = values.round(), gradient.round()
    values = values.to(dtype)
    slots = torch.tensor([True, False, True])
    found = columns_by_group(exchange_weights(values, positions, gradient, slots, fraction))

    expected = columns_by_group(positions)
    sizes = values.double().abs().view(-1, 2).tolist()
    steep = gradient.abs().view(-1, 4).tolist()
    candidates = [group for group in range(len(expected)) if slots[group // 64]]
    n = round(fraction * 2 * len(candidates))
    for group in sorted(candidates, key=lambda group: min(sizes[group]))[:n]:
        which = 0 if sizes[group][0] <= sizes[group][1] else 1
        dropped, other = expected[group][which], expected[group][1 - which]
        best = max((c for c in range(4) if c != other), key=lambda c: steep[group][c])
        if steep[group][best] > steep[group][dropped]:
            expected[group] = sorted([best, other])
    assert found == expected


@pytest.mark.parametrize("bad", [0b0000_0100, 0b0100_0001, 0b0101_0100])
def test_a_pair_out_of_order_is_no_pattern(bad: int) -> None:
    positions = drawn(0)
    positions[1, 3, 1] = bad
    assert not are_valid(positions)


def test_the_first_positions_are_a_pattern() -> None:
    positions = nm_pattern.first_positions(3, 32)
    assert positions.shape == (3, 32, 4) and are_valid(positions)
    assert columns_by_group(positions) == [[0, 1]] * (3 * 32 * 8)
