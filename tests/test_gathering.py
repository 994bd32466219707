"""What is gathered about blocks, against sums by hand and dense gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lightning import gathering
from sparse_lightning.criteria import MOMENTUM_DECAY, BlockScores, random, seeded_generator
from sparse_lightning.evolution import TopologyUpdate
from sparse_lightning.gathering import Gatherer, score
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.topology import BlockTopology


def layer() -> BlockSparseLinear:
    """2 x 3 blocks, of which (0, 0) and (1, 2) are present, in slots 1 and 0; slot 2 is empty."""
    torch.manual_seed(0)
    coords = torch.tensor([[1, 2], [0, 0], [-1, -1]])
    return BlockSparseLinear(48, 32, topology=BlockTopology(coords, (2, 3), 16))


def gatherer(fc: BlockSparseLinear, *needs: str, exact: bool = False) -> Gatherer:
    return Gatherer({"fc": fc}, frozenset(needs), exact)


def scores_of(gathering: Gatherer) -> BlockScores:
    return gathering.scores_of("fc", seeded_generator(0, 0, "fc"))


def backward(fc: BlockSparseLinear, seed: int) -> Tensor:
    """Run a batch and return the dense gradient of the weight."""
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(8, n, generator=generator) for n in (48, 32))
    fc(x).backward(dy)
    return dy.T @ x


def norms(dense: Tensor) -> Tensor:
    return dense.unflatten(0, (2, 16)).unflatten(2, (3, 16)).square().sum((1, 3)).sqrt()


def step(gathering: Gatherer, fc: BlockSparseLinear, work: list[float], scale: float = 1.0) -> None:
    """End a step whose gradient has these sums of w * g in slots 0 and 1."""
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.0)
    with torch.no_grad():
        fc.values.zero_()
        fc.values[:, 0, 0] = 2.0
    fc.values.grad = torch.zeros_like(fc.values)
    fc.values.grad[:2, 0, 0] = torch.tensor(work) / 2 * scale
    gathering.before_optimizer_step(optimizer, scale)


# -- the work of present blocks -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_saliency_and_movement_by_hand(scale: float) -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement")
    for work in ([3.0, -1.0], [-1.0, -3.0]):
        step(gathering, fc, work, scale)
        gathering.end_step(False, None)
    scores = scores_of(gathering)
    # Means of |work| and sums of -work, at (1, 2) and (0, 0).
    assert scores.saliency.tolist() == [[2, 0, 0], [0, 0, 2]]
    assert scores.movement.tolist() == [[4, 0, 0], [0, 0, -2]]


def test_a_skipped_step_leaves_no_trace() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement", "gradient")
    step(gathering, fc, [3.0, -1.0])
    gathering.end_step(False, None)
    gathering.arm(True)
    backward(fc, 0)
    step(gathering, fc, [100.0, float("inf")])
    gathering.skip_step()
    assert not fc.armed and fc.block_scores.count_nonzero() == 0
    scores = scores_of(gathering)
    assert scores.saliency.tolist() == [[1, 0, 0], [0, 0, 3]]
    assert scores.movement.tolist() == [[1, 0, 0], [0, 0, -3]]


def test_a_gradient_that_is_not_finite_counts_as_none() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency")
    step(gathering, fc, [float("nan"), 4.0])
    gathering.end_step(False, None)
    assert scores_of(gathering).saliency.tolist() == [[4, 0, 0], [0, 0, 0]]


def test_an_update_begins_anew_and_forgets_changed_blocks() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement")
    step(gathering, fc, [3.0, -1.0])
    gathering.end_step(False, None)
    # The block in slot 1 goes, and one comes into it.
    coords = torch.tensor([[1, 2], [0, 1], [-1, -1]], dtype=torch.int32)
    update = TopologyUpdate(coords, torch.tensor([1]), torch.tensor([1]), 2)
    fc.apply_update(update)
    gathering.begin_anew({"fc": update})
    assert scores_of(gathering).saliency.tolist() == [[0, 0, 0], [0, 0, 0]]
    assert scores_of(gathering).movement.tolist() == [[0, 0, 0], [0, 0, -3]]
    step(gathering, fc, [1.0, 5.0])
    gathering.end_step(False, None)
    assert scores_of(gathering).saliency.tolist() == [[0, 5, 0], [0, 0, 1]]
    assert scores_of(gathering).movement.tolist() == [[0, -5, 0], [0, 0, -4]]


def test_two_optimizers_are_each_asked_for_their_own() -> None:
    one, two = layer(), layer()
    both = Gatherer({"one": one, "two": two}, frozenset({"movement"}), False)
    step(both, one, [1.0, 0.0])
    step(both, two, [7.0, 0.0])
    both.end_step(False, None)
    generator = seeded_generator(0, 0, "")
    assert both.scores_of("one", generator).movement[1, 2] == -1
    assert both.scores_of("two", generator).movement[1, 2] == -7


def test_nothing_is_gathered_that_nobody_needs() -> None:
    fc = layer()
    gathering = gatherer(fc)
    step(gathering, fc, [3.0, -1.0])
    gathering.end_step(False, None)
    assert not gathering.reads_gradients and gathering.window == 0
    assert scores_of(gathering).gathered == {}
    state = gathering.state_dict()
    assert state == {"n_steps": 1, "momentum": {}, "saliency": {}, "movement": {}}


# -- the dense gradient ---------------------------------------------------------------------------


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_of_every_third_token(exact: bool) -> None:
    fc = layer()
    gathering = Gatherer({"fc": fc}, frozenset({"gradient"}), exact, token_stride=3)
    gathering.arm(True)
    x, dy = torch.randn(8, 48), torch.randn(8, 32)
    fc(x).backward(dy)
    gathering.end_step(True, None)
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dy[::3].T @ x[::3]))


@pytest.mark.parametrize("exact", [False, True])
def test_gradients_over_micro_batches(exact: bool) -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient", exact=exact)
    assert gathering.window == 1
    backward(fc, 9)
    assert fc.block_scores.count_nonzero() == 0, "not armed"
    gathering.arm(True)
    first, second = backward(fc, 0), backward(fc, 1)
    gathering.end_step(True, None)
    summed = (norms(first).square() + norms(second).square()).sqrt()
    expected = norms(first + second) if exact else summed
    torch.testing.assert_close(scores_of(gathering).gradient, expected)
    assert not torch.allclose(norms(first + second), summed, rtol=0.02)
    gathering.arm(False)
    assert fc.block_scores.count_nonzero() == 0


@pytest.mark.parametrize("exact", [False, True])
def test_momentum_smooths_the_steps_of_the_window(exact: bool) -> None:
    fc = layer()
    gathering = gatherer(fc, "momentum", "gradient", exact=exact)
    assert gathering.window == 10
    dense = []
    for seed in range(3):
        gathering.arm(True)
        dense.append(backward(fc, seed))
        gathering.end_step(True, None)
        last = scores_of(gathering).gradient
        gathering.arm(False)
    torch.testing.assert_close(last, norms(dense[-1]))
    decays = [MOMENTUM_DECAY**age for age in (2, 1, 0)]
    if exact:
        expected = norms(sum(d * g for d, g in zip(decays, dense, strict=True)))
    else:
        expected = sum(d * norms(g).square() for d, g in zip(decays, dense, strict=True)).sqrt()
    torch.testing.assert_close(scores_of(gathering).momentum, expected)
    gathering.begin_anew({})
    assert scores_of(gathering).momentum.count_nonzero() == 0


@pytest.mark.parametrize("exact", [False, True])
def test_ranks_are_summed(exact: bool) -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient", exact=exact)
    gathering.arm(True)
    mine, other = backward(fc, 0), torch.randn(32, 48)
    gathering.end_step(True, lambda t: t + (other if exact else norms(other).square()))
    expected = norms(mine + other) if exact else (norms(mine) ** 2 + norms(other) ** 2).sqrt()
    torch.testing.assert_close(scores_of(gathering).gradient, expected)


def test_exact_scores_say_their_memory_and_have_a_limit(monkeypatch: Any) -> None:
    fc = layer()
    assert gatherer(fc, "gradient", exact=True).exact_memory == 4 * 32 * 48
    assert gatherer(fc, "gradient").exact_memory == 0 and fc.block_scores.shape == (2, 3)
    assert gatherer(fc, "movement", exact=True).exact_memory == 0, "no dense gradient is needed"
    monkeypatch.setattr(gathering, "MOST_EXACT_MEMORY", 4 * 32 * 48 - 1)
    with pytest.raises(ValueError, match=r"`exact` must need at most .*Leave it out"):
        gatherer(fc, "gradient", exact=True)


def test_it_goes_on_from_its_state() -> None:
    fc = layer()
    needs = ("momentum", "saliency", "movement")
    first = gatherer(fc, *needs)
    first.arm(True)
    backward(fc, 0)
    step(first, fc, [3.0, -1.0])
    first.end_step(True, None)
    first.arm(False)
    second = gatherer(fc, *needs)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        one.arm(True)
        backward(fc, 1)
        step(one, fc, [1.0, 1.0])
        one.end_step(True, None)
        one.arm(False)
    for name, tensor in scores_of(first).gathered.items():
        assert tensor.count_nonzero() > 0
        assert torch.equal(tensor, scores_of(second).gathered[name]), name


def test_slots_that_are_given_up_are_followed() -> None:
    fc = layer()
    gathering = gatherer(fc, "movement")
    step(gathering, fc, [3.0, -1.0])
    gathering.end_step(False, None)
    before = scores_of(gathering).movement
    gathering.keep_slots("fc", fc.shrink(2))
    assert torch.equal(scores_of(gathering).movement, before)


# -- what criteria return -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.zeros(3, 2), r"\[3, 2\]"),
        (torch.zeros(()), r"\[\]"),
        ([[0.0] * 3] * 2, "list"),
        (None, "NoneType"),
    ],
)
def test_a_criterion_returns_one_score_a_block(result: object, got: str) -> None:
    scores = scores_of(gatherer(layer()))
    with pytest.raises(
        ValueError, match=rf"`grow` must return one score a block, \[2, 3\]; got {got}"
    ):
        score("grow", lambda _: result, scores)  # type: ignore[arg-type, return-value]


def test_scores_may_be_of_any_dtype() -> None:
    scores = scores_of(gatherer(layer()))
    for dtype in (torch.float16, torch.int64, torch.bool):
        result = score("drop", lambda s, d=dtype: s.mask.to(d), scores)  # type: ignore[misc]
        assert result.dtype == torch.float32
        assert result.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert score("drop", random, scores).dtype == torch.float32
