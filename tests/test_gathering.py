"""Gathered statistics, compared with sums by hand and dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_lightning import ranks
from sparse_lightning.gathering import Gatherer, GradientAccumulator
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.criteria import (
    MOMENTUM_DECAY,
    BlockScores,
    evaluate,
    random,
    seeded_generator,
)
from sparse_lightning.policy.updates import TopologyUpdate
from sparse_lightning.topology import BlockTopology


def layer() -> BlockSparseLinear:
    """2 x 3 blocks, of which (0, 0) and (1, 2) are present, in slots 1 and 0; slot 2 is empty."""
    torch.manual_seed(0)
    coords = torch.tensor([[1, 2], [0, 0], [-1, -1]])
    return BlockSparseLinear(48, 32, topology=BlockTopology(coords, (2, 3), 16))


def make_gatherer(fc: BlockSparseLinear, *needs: str, token_stride: int = 1) -> Gatherer:
    return Gatherer({"fc": fc}, frozenset(needs), token_stride)


def scored(gatherer: Gatherer, step: int = 0) -> dict[str, BlockScores]:
    """Return the scores of all layers that were scored."""
    ages = {
        name: torch.arange(layer.topology.capacity, dtype=torch.int32)
        for name, layer in gatherer.layers.items()
    }
    return gatherer.scores_of(
        gatherer.layers,
        gatherer.needs,
        step,
        lambda name: seeded_generator(0, step, name),
        ages,
    )


def scores_of(gatherer: Gatherer) -> BlockScores:
    return scored(gatherer)["fc"]


def arm(gatherer: Gatherer, on: bool = True) -> None:
    held = {name: layer.values for name, layer in gatherer.layers.items()}
    gatherer.arm([*held] if on else [], held)


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, dy = (torch.randn(8, n, generator=generator) for n in (48, 32))
    return x, dy


def backward(fc: BlockSparseLinear, seed: int) -> Tensor:
    """Run a batch and return the dense gradient of the weight."""
    x, dy = batch(seed)
    fc(x).backward(dy)
    return dy.T @ x


def norms(dense: Tensor) -> Tensor:
    return dense.unflatten(0, (2, 16)).unflatten(2, (3, 16)).square().sum((1, 3)).sqrt()


def summed(*dense: Tensor) -> Tensor:
    """Return the roots of the summed squared block norms."""
    return torch.stack([norms(gradient).square() for gradient in dense]).sum(0).sqrt()


def read_gradients(
    gatherer: Gatherer, fc: BlockSparseLinear, work: list[float], scale: float = 1.0
) -> list[str]:
    """Read gradients with these sums of w * g in slots 0 and 1, without taking the step."""
    with torch.no_grad():
        fc.values.zero_()
        fc.values[:, 0, 0] = 2.0
    fc.values.grad = torch.zeros_like(fc.values)
    fc.values.grad[:2, 0, 0] = torch.tensor(work) / 2 * scale
    held = {name: layer.values for name, layer in gatherer.layers.items() if layer is fc}
    gatherer.read_gradients(gatherer.make_block_work(held), held, scale)
    return [*held]


def step(gatherer: Gatherer, fc: BlockSparseLinear, work: list[float], scale: float = 1.0) -> None:
    """Take a step whose gradient has these sums of w * g in slots 0 and 1."""
    gatherer.confirm_step(read_gradients(gatherer, fc, work, scale))


# -- the work of present blocks -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_saliency_and_movement_by_hand(scale: float) -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "saliency", "movement")
    assert gatherer.reads_gradients and gatherer.window == 0
    for work in ([3.0, -1.0], [-1.0, -3.0]):
        step(gatherer, fc, work, scale)
    scores = scores_of(gatherer)
    # Means of |work| and sums of -work, at (1, 2) and (0, 0).
    assert scores.saliency.tolist() == [[2, 0, 0], [0, 0, 2]]
    assert scores.movement.tolist() == [[4, 0, 0], [0, 0, -2]]


def test_a_skipped_step_leaves_no_trace() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "saliency", "movement", "gradient")
    arm(gatherer)
    taken = backward(fc, 0)
    step(gatherer, fc, [3.0, -1.0])
    gatherer.collect_norms(["fc"])
    backward(fc, 1)
    read_gradients(gatherer, fc, [100.0, float("inf")])
    gatherer.discard_norms(["fc"])
    assert fc.block_norms.grad is None
    for _ in range(2):  # the second time after saving a state
        scores = scores_of(gatherer)
        assert scores.saliency.tolist() == [[1, 0, 0], [0, 0, 3]]
        assert scores.movement.tolist() == [[1, 0, 0], [0, 0, -3]]
        torch.testing.assert_close(scores.gradient, norms(taken))
        state = gatherer.state_dict()
        assert state["n_steps"] == {"fc": 1}
        assert state["saliency"]["fc"].tolist() == [3, 1, 0]
        assert state["movement"]["fc"].tolist() == [-3, 1, 0]
    fc.zero_grad()
    later = backward(fc, 2)
    step(gatherer, fc, [1.0, 1.0])
    gatherer.collect_norms(["fc"])
    scores = scores_of(gatherer)
    assert scores.saliency.tolist() == [[1, 0, 0], [0, 0, 2]]
    assert scores.movement.tolist() == [[0, 0, 0], [0, 0, -4]]
    torch.testing.assert_close(scores.gradient, norms(later))


def test_the_last_reading_before_a_step_counts() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "movement")
    for work in ([5.0, 5.0], [7.0, 7.0]):
        read_gradients(gatherer, fc, work)
    step(gatherer, fc, [3.0, -1.0])
    assert scores_of(gatherer).movement.tolist() == [[1, 0, 0], [0, 0, -3]]


def test_work_that_is_not_finite_counts_as_zero() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "saliency")
    step(gatherer, fc, [float("nan"), 4.0])
    assert scores_of(gatherer).saliency.tolist() == [[4, 0, 0], [0, 0, 0]]


def test_without_a_step_nothing_is_scored() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "saliency")
    assert scored(gatherer) == {}
    read_gradients(gatherer, fc, [3.0, -1.0])
    assert scored(gatherer) == {}, "the step is not over"


def test_an_update_clears_the_statistics() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "saliency", "movement")
    step(gatherer, fc, [3.0, -1.0])
    # The block in slot 1 is dropped, and another one grows into the slot.
    coords = torch.tensor([[1, 2], [0, 1], [-1, -1]], dtype=torch.int32)
    update = TopologyUpdate(coords, torch.tensor([1]), torch.tensor([1]), 2)
    fc.apply_update(update)
    gatherer.prepare_clear({"fc": update})()
    assert scored(gatherer) == {}, "no step since"
    assert gatherer.state_dict()["movement"]["fc"].tolist() == [-3, 0, 0]
    step(gatherer, fc, [1.0, 5.0])
    assert scores_of(gatherer).saliency.tolist() == [[0, 5, 0], [0, 0, 1]]
    assert scores_of(gatherer).movement.tolist() == [[0, -5, 0], [0, 0, -4]]


def test_each_optimizer_confirms_its_own_layers() -> None:
    one, two = layer(), layer()
    both = Gatherer({"one": one, "two": two}, frozenset({"movement"}))
    step(both, one, [1.0, 0.0])
    assert set(scored(both)) == {"one"}
    step(both, two, [7.0, 0.0])
    step(both, two, [1.0, 0.0])
    scores = scored(both)
    assert scores["one"].movement[1, 2] == -1
    assert scores["two"].movement[1, 2] == -8
    assert both.state_dict()["n_steps"] == {"one": 1, "two": 2}


def test_only_needed_statistics_are_gathered() -> None:
    fc = layer()
    gatherer = make_gatherer(fc)
    assert not gatherer.reads_gradients and gatherer.window == 0
    assert scores_of(gatherer).gathered == {}
    state = gatherer.state_dict()
    assert state == {"n_steps": {}, "momentum": {}, "saliency": {}, "movement": {}}


# -- the dense gradient ---------------------------------------------------------------------------


def test_gradients_of_every_third_token() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient", token_stride=3)
    arm(gatherer)
    x, dy = torch.randn(8, 48), torch.randn(8, 32)
    fc(x).backward(dy)
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, norms(dy[::3].T @ x[::3]))


def test_gradients_over_micro_batches() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    assert gatherer.window == 1 and not gatherer.reads_gradients
    backward(fc, 9)
    assert fc.block_norms.grad is None, "not armed"
    fc.zero_grad()
    arm(gatherer)
    dense = [backward(fc, seed) for seed in range(3)]
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, summed(*dense))
    assert not torch.allclose(norms(sum(dense)), summed(*dense), rtol=0.02)  # type: ignore[arg-type]
    assert fc.block_norms.grad is None
    arm(gatherer, False)
    backward(fc, 9)
    assert fc.block_norms.grad is None and not fc.armed


def test_a_step_without_a_backward_has_no_gradient() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    backward(fc, 0)
    gatherer.collect_norms(["fc"])
    assert set(scored(gatherer)) == {"fc"}
    fc.zero_grad()
    gatherer.collect_norms(["fc"])
    assert scored(gatherer) == {}, "of an earlier step it is not known either"


@pytest.mark.parametrize("calls", [1, 2])
def test_calls_in_one_forward_add_up(calls: int) -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    batches = [batch(seed) for seed in range(calls)]
    torch.autograd.backward([fc(x) for x, _ in batches], [dy for _, dy in batches])
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(
        scores_of(gatherer).gradient, summed(*(dy.T @ x for x, dy in batches))
    )


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("thrown_away", [1, 2])
def test_gradients_that_are_zeroed_before_the_step_do_not_count(
    set_to_none: bool, thrown_away: int
) -> None:
    """A critic receives such gradients while its generator is trained."""
    fc = layer()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    gatherer = make_gatherer(fc, "gradient")
    for each in range(3):  # the steps after the first count as well
        arm(gatherer)
        for seed in range(thrown_away):
            backward(fc, seed)
        optimizer.zero_grad(set_to_none)
        dense = [backward(fc, 10 + each), backward(fc, 20 + each)]
        optimizer.step()
        gatherer.collect_norms(["fc"])
        torch.testing.assert_close(scores_of(gatherer).gradient, summed(*dense))
        arm(gatherer, False)
        optimizer.zero_grad(set_to_none)


def cut_off(fc: BlockSparseLinear, seed: int) -> Tensor:
    """Like `backward`, for inputs of which the present blocks only read zeros."""
    x, dy = batch(seed)
    x[:, :16] = x[:, 32:] = 0.0
    fc(x).backward(dy)
    return dy.T @ x


def test_norms_count_where_only_absent_blocks_have_a_gradient() -> None:
    """The gradient of the present blocks is zero from the start, so it was not cleared."""
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    dense = [cut_off(fc, seed) for seed in range(2)]
    assert fc.values.grad is not None and not fc.values.grad.any()
    gatherer.collect_norms(["fc"])
    gradient = scores_of(gatherer).gradient
    torch.testing.assert_close(gradient, summed(*dense))
    assert bool(gradient[:, 1].all())
    # Also after norms that do not count, and together with those of other passes that do.
    fc.values.grad = None
    backward(fc, 5)
    assert fc.values.grad is not None
    fc.values.grad.zero_()
    dense = [cut_off(fc, 6), backward(fc, 7)]
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, summed(*dense))


def test_gradients_zeroed_by_any_means_do_not_count() -> None:
    """Writes through `.data` do not change autograd's versions."""
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    backward(fc, 0)
    assert fc.values.grad is not None
    fc.values.grad.data.zero_()
    dense = backward(fc, 1)
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, norms(dense))
    # If they are zeroed right before the step, there are no norms.
    backward(fc, 2)
    fc.values.grad.zero_()
    gatherer.collect_norms(["fc"])
    assert not scored(gatherer)


def test_gradients_that_are_clipped_between_micro_batches_count() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    dense = []
    for seed in range(2):
        dense.append(backward(fc, seed))
        torch.nn.utils.clip_grad_norm_(fc.parameters(), 1e9)
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, summed(*dense))


@pytest.mark.parametrize("reentrant", [True, False])
def test_calls_inside_and_outside_of_a_checkpoint_add_up(reentrant: bool) -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    (x, dy), (other, d_other) = batch(0), batch(1)
    inside = checkpoint(fc, x.requires_grad_(), use_reentrant=reentrant)
    torch.autograd.backward([inside, fc(other)], [dy, d_other])
    gatherer.collect_norms(["fc"])
    expected = summed(dy.T @ x.detach(), d_other.T @ other)
    torch.testing.assert_close(scores_of(gatherer).gradient, expected)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_from_before_it_was_armed_do_not_count(set_to_none: bool) -> None:
    fc = layer()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    gatherer = make_gatherer(fc, "gradient")
    backward(fc, 0)
    arm(gatherer)
    optimizer.zero_grad(set_to_none)
    dense = backward(fc, 1)
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, norms(dense))


@pytest.mark.parametrize("of", ["values", "input", "both"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_autograd_grad_accumulates_no_norms(of: str, create_graph: bool) -> None:
    """Called between two micro-batches, and alone."""
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)

    def differentiate() -> None:
        x = batch(5)[0].requires_grad_()
        inputs = {"values": [fc.values], "input": [x], "both": [x, fc.values]}[of]
        torch.autograd.grad(fc(x).square().sum(), inputs, create_graph=create_graph)

    differentiate()
    assert fc.block_norms.grad is None and fc.values.grad is None
    first = backward(fc, 0)
    differentiate()
    second = backward(fc, 1)
    differentiate()
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, summed(first, second))


def test_an_optimizer_that_holds_another_parameter_is_followed() -> None:
    """The optimizer was rebuilt with another parameter of the same layer."""
    fc = layer()
    gatherer = make_gatherer(fc, "gradient")
    arm(gatherer)
    backward(fc, 0)
    fc.values = torch.nn.Parameter(fc.values.detach().clone())
    arm(gatherer)
    dense = backward(fc, 1)
    gatherer.collect_norms(["fc"])
    torch.testing.assert_close(scores_of(gatherer).gradient, norms(dense))


def test_arming_some_leaves_others_alone() -> None:
    one, two = layer(), layer()
    both = Gatherer({"one": one, "two": two}, frozenset({"gradient"}))
    both.arm(["one"], {"one": one.values})
    both.arm(["two"], {"two": two.values})
    assert one.armed and two.armed
    both.arm([], {"one": one.values})
    assert not one.armed and two.armed
    both.disarm()
    assert not two.armed


def test_momentum_smooths_the_steps_of_the_window() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "momentum", "gradient")
    assert gatherer.window == 10
    arm(gatherer)
    dense = []
    for seed in range(3):
        dense.append(backward(fc, seed))
        gatherer.collect_norms(["fc"])
        fc.zero_grad()
    torch.testing.assert_close(scores_of(gatherer).gradient, norms(dense[-1]))
    decays = [MOMENTUM_DECAY**age for age in (2, 1, 0)]
    expected = sum(d * norms(g).square() for d, g in zip(decays, dense, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(scores_of(gatherer).momentum, expected.sqrt())
    unchanged = TopologyUpdate(fc.topology.coords.clone(), torch.tensor([]), torch.tensor([]), 2)
    gatherer.prepare_clear({})()
    assert set(scored(gatherer)) == {"fc"}, "it was not updated"
    gatherer.prepare_clear({"fc": unchanged})()
    assert scored(gatherer) == {}


def test_a_step_whose_gradient_is_not_finite_is_not_in_the_momentum() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "momentum")
    arm(gatherer)
    dense = []
    for number, bad in enumerate((torch.nan, 0.0, torch.inf, 0.0)):
        x, dy = batch(number)
        x[3, 20] += bad
        fc(x).backward(dy)
        gatherer.collect_norms(["fc"])
        fc.zero_grad()
        if bad == 0:
            dense.append(dy.T @ x)
        assert set(scored(gatherer)) == ({"fc"} if dense else set()), "nothing known: no zeros"
    expected = (MOMENTUM_DECAY * norms(dense[0]).square() + norms(dense[1]).square()).sqrt()
    torch.testing.assert_close(scores_of(gatherer).momentum, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_layer_whose_gradient_is_not_finite_is_not_scored(bad: float) -> None:
    """Blocks with a finite gradient are not scored either."""
    one, two = layer(), layer()
    both = Gatherer({"one": one, "two": two}, frozenset({"gradient"}))
    arm(both)
    x, dy = batch(0)
    two(x).backward(dy)
    x = x.clone()
    x[0, 0] = bad
    one(x).backward(dy)
    both.collect_norms(["one", "two"])
    scores = scored(both)
    assert set(scores) == {"two"}
    torch.testing.assert_close(scores["two"].gradient, norms(dy.T @ batch(0)[0]))
    # The next step scores it.
    one.zero_grad()
    dense = backward(one, 1)
    both.collect_norms(["one"])
    torch.testing.assert_close(scored(both)["one"].gradient, norms(dense))


def test_ranks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms that one rank has count on all ranks; norms that no rank has are missing."""
    one, two, three = layer(), layer(), layer()
    all_of_them = {"one": one, "two": two, "three": three}
    gatherer = Gatherer(all_of_them, frozenset({"gradient"}))
    arm(gatherer)
    mine, other = backward(one, 0), torch.randn(32, 48)

    def add_another_rank(flat: Tensor) -> Tensor:
        # The other rank has norms of `one` and `two`.
        squares = norms(other).square().flatten()
        return flat + torch.cat([squares, squares, torch.zeros(6), torch.tensor([1.0, 1.0, 0.0])])

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "sum_over_ranks", add_another_rank)
    gatherer.collect_norms(["one", "two", "three"])
    scores = scored(gatherer)
    assert set(scores) == {"one", "two"}
    torch.testing.assert_close(scores["one"].gradient, summed(mine, other))
    torch.testing.assert_close(scores["two"].gradient, norms(other))


def test_disarming_discards_norms_and_hooks() -> None:
    fc = layer()
    accumulator = GradientAccumulator(fc, fc.values)
    accumulator.arm(True)
    backward(fc, 0)
    accumulator.arm(False)
    assert not fc.armed and fc.block_norms.grad is None
    assert not fc.values._backward_hooks and not fc.block_norms._backward_hooks
    accumulator.arm(True)
    accumulator.arm(True)
    assert accumulator.collect() == (None, None), "no backward since"


# -- scores of blocks -----------------------------------------------------------------------------


def test_scores_know_their_layer_step_and_age() -> None:
    fc = layer()
    scores = scored(make_gatherer(fc), step=7)["fc"]
    assert (scores.layer, scores.step) == ("fc", 7)
    assert scores.mask.tolist() == [[True, False, False], [False, False, True]]
    assert scores.age.tolist() == [[1, 0, 0], [0, 0, 0]] and scores.age.dtype == torch.int32
    assert torch.equal(scores.values, fc.values.detach()[[1, 0]]), "by place, not by slot"
    expected = torch.zeros(2, 3)
    expected[scores.mask] = scores.values.square().sum((1, 2)).sqrt()
    torch.testing.assert_close(scores.magnitude, expected)


# -- resuming -------------------------------------------------------------------------------------


def test_gathering_resumes_from_its_state() -> None:
    fc = layer()
    needs = ("momentum", "saliency", "movement")
    first = make_gatherer(fc, *needs)

    def learn(gatherer: Gatherer, seed: int, work: list[float]) -> None:
        fc.zero_grad()
        arm(gatherer)
        backward(fc, seed)
        step(gatherer, fc, work)
        gatherer.collect_norms(["fc"])
        arm(gatherer, False)

    learn(first, 0, [3.0, -1.0])
    second = make_gatherer(fc, *needs)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        learn(one, 1, [1.0, 1.0])
    for name, tensor in scores_of(first).gathered.items():
        assert tensor.count_nonzero() > 0
        assert torch.equal(tensor, scores_of(second).gathered[name]), name


def test_removed_slots_leave_the_sums() -> None:
    fc = layer()
    gatherer = make_gatherer(fc, "movement")
    step(gatherer, fc, [3.0, -1.0])
    before = scores_of(gatherer).movement
    gatherer.prepare_slot_removal("fc", fc.shrink(2))()
    assert torch.equal(scores_of(gatherer).movement, before)
    assert len(gatherer.state_dict()["movement"]["fc"]) == 2
    step(gatherer, fc, [1.0, 1.0])
    assert torch.equal(
        scores_of(gatherer).movement, before - torch.tensor([[1, 0, 0], [0, 0, 1.0]])
    )


# -- results of criteria --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("result", "got"),
    [
        (torch.zeros(3, 2), r"\[3, 2\]"),
        (torch.zeros(()), r"\[\]"),
        ([[0.0] * 3] * 2, "list"),
        (None, "NoneType"),
    ],
)
def test_a_criterion_returns_one_score_per_block(result: object, got: str) -> None:
    scores = scores_of(make_gatherer(layer()))
    with pytest.raises(
        ValueError, match=rf"`grow` must return one score per block, \[2, 3\]; got {got}"
    ):
        evaluate("grow", lambda _: result, scores)  # type: ignore[arg-type, return-value]


def test_scores_may_be_of_any_dtype() -> None:
    scores = scores_of(make_gatherer(layer()))
    for dtype in (torch.float16, torch.int64, torch.bool):
        result = evaluate("drop", lambda s, d=dtype: s.mask.to(d), scores)  # type: ignore[misc]
        assert result.dtype == torch.float32
        assert result.tolist() == [[1, 0, 0], [0, 0, 1]]
    assert evaluate("drop", random, scores).dtype == torch.float32
