"""What is gathered about blocks, against sums by hand and dense gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sparse_lightning import ranks
from sparse_lightning.gathering import Evidence, Gatherer
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.policy.criteria import (
    MOMENTUM_DECAY,
    BlockScores,
    random,
    score,
    seeded_generator,
)
from sparse_lightning.policy.evolution import TopologyUpdate
from sparse_lightning.topology import BlockTopology


def layer() -> BlockSparseLinear:
    """2 x 3 blocks, of which (0, 0) and (1, 2) are present, in slots 1 and 0; slot 2 is empty."""
    torch.manual_seed(0)
    coords = torch.tensor([[1, 2], [0, 0], [-1, -1]])
    return BlockSparseLinear(48, 32, topology=BlockTopology(coords, (2, 3), 16))


def gatherer(fc: BlockSparseLinear, *needs: str, token_stride: int = 1) -> Gatherer:
    return Gatherer({"fc": fc}, frozenset(needs), token_stride)


def scored(gathering: Gatherer, step: int = 0) -> dict[str, BlockScores]:
    """Return the scores of all layers that were scored."""
    ages = {
        name: torch.arange(layer.topology.capacity, dtype=torch.int32)
        for name, layer in gathering.layers.items()
    }
    return gathering.scores_of(
        gathering.layers,
        gathering.needs,
        step,
        lambda name: seeded_generator(0, step, name),
        ages,
    )


def scores_of(gathering: Gatherer) -> BlockScores:
    return scored(gathering)["fc"]


def arm(gathering: Gatherer, on: bool = True) -> None:
    held = {name: layer.values for name, layer in gathering.layers.items()}
    gathering.arm([*held] if on else [], held)


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
    """Roots of the summed squared norms."""
    return torch.stack([norms(gradient).square() for gradient in dense]).sum(0).sqrt()


def read(
    gathering: Gatherer, fc: BlockSparseLinear, work: list[float], scale: float = 1.0
) -> list[str]:
    """Be about to take a step whose gradient has these sums of w * g in slots 0 and 1."""
    with torch.no_grad():
        fc.values.zero_()
        fc.values[:, 0, 0] = 2.0
    fc.values.grad = torch.zeros_like(fc.values)
    fc.values.grad[:2, 0, 0] = torch.tensor(work) / 2 * scale
    held = {name: layer.values for name, layer in gathering.layers.items() if layer is fc}
    gathering.read(gathering.work_of(held), held, scale)
    return [*held]


def step(gathering: Gatherer, fc: BlockSparseLinear, work: list[float], scale: float = 1.0) -> None:
    """Take a step whose gradient has these sums of w * g in slots 0 and 1."""
    gathering.confirm(read(gathering, fc, work, scale))


# -- the work of present blocks -------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_saliency_and_movement_by_hand(scale: float) -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement")
    assert gathering.reads_gradients and gathering.window == 0
    for work in ([3.0, -1.0], [-1.0, -3.0]):
        step(gathering, fc, work, scale)
    scores = scores_of(gathering)
    # Means of |work| and sums of -work, at (1, 2) and (0, 0).
    assert scores.saliency.tolist() == [[2, 0, 0], [0, 0, 2]]
    assert scores.movement.tolist() == [[4, 0, 0], [0, 0, -2]]


def test_a_skipped_step_leaves_no_trace() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement", "gradient")
    arm(gathering)
    taken = backward(fc, 0)
    step(gathering, fc, [3.0, -1.0])
    gathering.take(["fc"])
    backward(fc, 1)
    read(gathering, fc, [100.0, float("inf")])
    gathering.drop_evidence(["fc"])
    assert fc.block_norms.grad is None
    for _ in range(2):  # a state is saved in between
        scores = scores_of(gathering)
        assert scores.saliency.tolist() == [[1, 0, 0], [0, 0, 3]]
        assert scores.movement.tolist() == [[1, 0, 0], [0, 0, -3]]
        torch.testing.assert_close(scores.gradient, norms(taken))
        state = gathering.state_dict()
        assert state["n_steps"] == {"fc": 1}
        assert state["saliency"]["fc"].tolist() == [3, 1, 0]
        assert state["movement"]["fc"].tolist() == [-3, 1, 0]
    fc.zero_grad()
    later = backward(fc, 2)
    step(gathering, fc, [1.0, 1.0])
    gathering.take(["fc"])
    scores = scores_of(gathering)
    assert scores.saliency.tolist() == [[1, 0, 0], [0, 0, 2]]
    assert scores.movement.tolist() == [[0, 0, 0], [0, 0, -4]]
    torch.testing.assert_close(scores.gradient, norms(later))


def test_of_several_readings_before_a_step_the_last_counts() -> None:
    fc = layer()
    gathering = gatherer(fc, "movement")
    for work in ([5.0, 5.0], [7.0, 7.0]):
        read(gathering, fc, work)
    step(gathering, fc, [3.0, -1.0])
    assert scores_of(gathering).movement.tolist() == [[1, 0, 0], [0, 0, -3]]


def test_work_that_is_not_finite_counts_as_none() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency")
    step(gathering, fc, [float("nan"), 4.0])
    assert scores_of(gathering).saliency.tolist() == [[4, 0, 0], [0, 0, 0]]


def test_without_a_step_nothing_is_scored() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency")
    assert scored(gathering) == {}
    read(gathering, fc, [3.0, -1.0])
    assert scored(gathering) == {}, "the step is not over"


def test_an_update_begins_anew_and_forgets_changed_blocks() -> None:
    fc = layer()
    gathering = gatherer(fc, "saliency", "movement")
    step(gathering, fc, [3.0, -1.0])
    # The block in slot 1 goes, and one comes into it.
    coords = torch.tensor([[1, 2], [0, 1], [-1, -1]], dtype=torch.int32)
    update = TopologyUpdate(coords, torch.tensor([1]), torch.tensor([1]), 2)
    fc.apply_update(update)
    gathering.prepare_anew({"fc": update})()
    assert scored(gathering) == {}, "no step since"
    assert gathering.state_dict()["movement"]["fc"].tolist() == [-3, 0, 0]
    step(gathering, fc, [1.0, 5.0])
    assert scores_of(gathering).saliency.tolist() == [[0, 5, 0], [0, 0, 1]]
    assert scores_of(gathering).movement.tolist() == [[0, -5, 0], [0, 0, -4]]


def test_two_optimizers_are_each_asked_for_their_own() -> None:
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


def test_nothing_is_gathered_that_nobody_needs() -> None:
    fc = layer()
    gathering = gatherer(fc)
    assert not gathering.reads_gradients and gathering.window == 0
    assert scores_of(gathering).gathered == {}
    state = gathering.state_dict()
    assert state == {"n_steps": {}, "momentum": {}, "saliency": {}, "movement": {}}


# -- the dense gradient ---------------------------------------------------------------------------


def test_gradients_of_every_third_token() -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient", token_stride=3)
    arm(gathering)
    x, dy = torch.randn(8, 48), torch.randn(8, 32)
    fc(x).backward(dy)
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dy[::3].T @ x[::3]))


def test_gradients_over_micro_batches() -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient")
    assert gathering.window == 1 and not gathering.reads_gradients
    backward(fc, 9)
    assert fc.block_norms.grad is None, "not armed"
    fc.zero_grad()
    arm(gathering)
    dense = [backward(fc, seed) for seed in range(3)]
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, summed(*dense))
    assert not torch.allclose(norms(sum(dense)), summed(*dense), rtol=0.02)  # type: ignore[arg-type]
    assert fc.block_norms.grad is None
    arm(gathering, False)
    backward(fc, 9)
    assert fc.block_norms.grad is None and not fc.armed


def test_a_step_without_a_backward_has_no_gradient() -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    backward(fc, 0)
    gathering.take(["fc"])
    assert set(scored(gathering)) == {"fc"}
    fc.zero_grad()
    gathering.take(["fc"])
    assert scored(gathering) == {}, "of an earlier step it is not known either"


@pytest.mark.parametrize("calls", [1, 2])
def test_calls_in_one_forward_add_up(calls: int) -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    batches = [batch(seed) for seed in range(calls)]
    torch.autograd.backward([fc(x) for x, _ in batches], [dy for _, dy in batches])
    gathering.take(["fc"])
    torch.testing.assert_close(
        scores_of(gathering).gradient, summed(*(dy.T @ x for x, dy in batches))
    )


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("thrown_away", [1, 2])
def test_gradients_that_are_zeroed_before_the_step_do_not_count(
    set_to_none: bool, thrown_away: int
) -> None:
    """Those that a critic collects while its generator is trained."""
    fc = layer()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    gathering = gatherer(fc, "gradient")
    for each in range(3):  # also in the steps after the first
        arm(gathering)
        for seed in range(thrown_away):
            backward(fc, seed)
        optimizer.zero_grad(set_to_none)
        dense = [backward(fc, 10 + each), backward(fc, 20 + each)]
        optimizer.step()
        gathering.take(["fc"])
        torch.testing.assert_close(scores_of(gathering).gradient, summed(*dense))
        arm(gathering, False)
        optimizer.zero_grad(set_to_none)


def test_however_they_are_zeroed() -> None:
    """As by code that is older than `zero_grad`, of which autograd's versions know nothing."""
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    backward(fc, 0)
    assert fc.values.grad is not None
    fc.values.grad.data.zero_()
    dense = backward(fc, 1)
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dense))
    # And right before the step, nothing is left to grow by.
    backward(fc, 2)
    fc.values.grad.zero_()
    gathering.take(["fc"])
    assert not scored(gathering)


def test_gradients_that_are_clipped_between_micro_batches_count() -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    dense = []
    for seed in range(2):
        dense.append(backward(fc, seed))
        torch.nn.utils.clip_grad_norm_(fc.parameters(), 1e9)
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, summed(*dense))


@pytest.mark.parametrize("reentrant", [True, False])
def test_calls_inside_and_outside_of_a_checkpoint_add_up(reentrant: bool) -> None:
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    (x, dy), (other, d_other) = batch(0), batch(1)
    inside = checkpoint(fc, x.requires_grad_(), use_reentrant=reentrant)
    torch.autograd.backward([inside, fc(other)], [dy, d_other])
    gathering.take(["fc"])
    expected = summed(dy.T @ x.detach(), d_other.T @ other)
    torch.testing.assert_close(scores_of(gathering).gradient, expected)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_from_before_it_was_armed_do_not_count(set_to_none: bool) -> None:
    fc = layer()
    optimizer = torch.optim.SGD(fc.parameters(), lr=0.1)
    gathering = gatherer(fc, "gradient")
    backward(fc, 0)
    arm(gathering)
    optimizer.zero_grad(set_to_none)
    dense = backward(fc, 1)
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dense))


@pytest.mark.parametrize("of", ["values", "input", "both"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_what_only_differentiates_gives_nothing(of: str, create_graph: bool) -> None:
    """Between two micro-batches, and alone."""
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)

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
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, summed(first, second))


def test_an_optimizer_that_holds_another_parameter_is_followed() -> None:
    """As one does that was built anew for the same layer."""
    fc = layer()
    gathering = gatherer(fc, "gradient")
    arm(gathering)
    backward(fc, 0)
    fc.values = torch.nn.Parameter(fc.values.detach().clone())
    arm(gathering)
    dense = backward(fc, 1)
    gathering.take(["fc"])
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dense))


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
    gathering = gatherer(fc, "momentum", "gradient")
    assert gathering.window == 10
    arm(gathering)
    dense = []
    for seed in range(3):
        dense.append(backward(fc, seed))
        gathering.take(["fc"])
        fc.zero_grad()
    torch.testing.assert_close(scores_of(gathering).gradient, norms(dense[-1]))
    decays = [MOMENTUM_DECAY**age for age in (2, 1, 0)]
    expected = sum(d * norms(g).square() for d, g in zip(decays, dense, strict=True))
    assert isinstance(expected, Tensor)
    torch.testing.assert_close(scores_of(gathering).momentum, expected.sqrt())
    unchanged = TopologyUpdate(fc.topology.coords.clone(), torch.tensor([]), torch.tensor([]), 2)
    gathering.prepare_anew({})()
    assert set(scored(gathering)) == {"fc"}, "it was not updated"
    gathering.prepare_anew({"fc": unchanged})()
    assert scored(gathering) == {}


def test_a_step_whose_gradient_is_not_finite_is_not_in_the_momentum() -> None:
    fc = layer()
    gathering = gatherer(fc, "momentum")
    arm(gathering)
    dense = []
    for number, bad in enumerate((torch.nan, 0.0, torch.inf, 0.0)):
        x, dy = batch(number)
        x[3, 20] += bad
        fc(x).backward(dy)
        gathering.take(["fc"])
        fc.zero_grad()
        if bad == 0:
            dense.append(dy.T @ x)
        assert set(scored(gathering)) == ({"fc"} if dense else set()), "nothing known: no zeros"
    expected = (MOMENTUM_DECAY * norms(dense[0]).square() + norms(dense[1]).square()).sqrt()
    torch.testing.assert_close(scores_of(gathering).momentum, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_layer_whose_gradient_is_not_finite_is_not_scored(bad: float) -> None:
    """Not even by the blocks where it is."""
    one, two = layer(), layer()
    both = Gatherer({"one": one, "two": two}, frozenset({"gradient"}))
    arm(both)
    x, dy = batch(0)
    two(x).backward(dy)
    x = x.clone()
    x[0, 0] = bad
    one(x).backward(dy)
    both.take(["one", "two"])
    scores = scored(both)
    assert set(scores) == {"two"}
    torch.testing.assert_close(scores["two"].gradient, norms(dy.T @ batch(0)[0]))
    # The next step shows it.
    one.zero_grad()
    dense = backward(one, 1)
    both.take(["one"])
    torch.testing.assert_close(scored(both)["one"].gradient, norms(dense))


def test_ranks_are_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient that no rank has stays unknown; one that some rank has is known to all."""
    one, two, three = layer(), layer(), layer()
    all_of_them = {"one": one, "two": two, "three": three}
    gathering = Gatherer(all_of_them, frozenset({"gradient"}))
    arm(gathering)
    mine, other = backward(one, 0), torch.randn(32, 48)

    def add_another_rank(flat: Tensor) -> Tensor:
        # It has seen `one` and `two`.
        squares = norms(other).square().flatten()
        return flat + torch.cat([squares, squares, torch.zeros(6), torch.tensor([1.0, 1.0, 0.0])])

    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    monkeypatch.setattr(ranks, "sum_over_ranks", add_another_rank)
    gathering.take(["one", "two", "three"])
    scores = scored(gathering)
    assert set(scores) == {"one", "two"}
    torch.testing.assert_close(scores["one"].gradient, summed(mine, other))
    torch.testing.assert_close(scores["two"].gradient, norms(other))


def test_evidence_is_let_go_of() -> None:
    fc = layer()
    evidence = Evidence(fc, fc.values)
    evidence.arm(True)
    backward(fc, 0)
    evidence.arm(False)
    assert not fc.armed and fc.block_norms.grad is None
    assert not fc.values._backward_hooks and not fc.block_norms._backward_hooks
    evidence.arm(True)
    evidence.arm(True)
    assert evidence.take() is None, "no backward since"


# -- what is known of blocks ----------------------------------------------------------------------


def test_scores_tell_what_they_are_of() -> None:
    fc = layer()
    scores = scored(gatherer(fc), step=7)["fc"]
    assert (scores.layer, scores.step) == ("fc", 7)
    assert scores.mask.tolist() == [[True, False, False], [False, False, True]]
    assert scores.age.tolist() == [[1, 0, 0], [0, 0, 0]] and scores.age.dtype == torch.int32
    assert torch.equal(scores.values, fc.values.detach()[[1, 0]]), "by place, not by slot"
    expected = torch.zeros(2, 3)
    expected[scores.mask] = scores.values.square().sum((1, 2)).sqrt()
    torch.testing.assert_close(scores.magnitude, expected)


# -- going on -------------------------------------------------------------------------------------


def test_it_goes_on_from_its_state() -> None:
    fc = layer()
    needs = ("momentum", "saliency", "movement")
    first = gatherer(fc, *needs)

    def learn(gathering: Gatherer, seed: int, work: list[float]) -> None:
        fc.zero_grad()
        arm(gathering)
        backward(fc, seed)
        step(gathering, fc, work)
        gathering.take(["fc"])
        arm(gathering, False)

    learn(first, 0, [3.0, -1.0])
    second = gatherer(fc, *needs)
    second.load_state_dict(first.state_dict())
    for one in (first, second):
        learn(one, 1, [1.0, 1.0])
    for name, tensor in scores_of(first).gathered.items():
        assert tensor.count_nonzero() > 0
        assert torch.equal(tensor, scores_of(second).gathered[name]), name


def test_slots_that_are_given_up_are_followed() -> None:
    fc = layer()
    gathering = gatherer(fc, "movement")
    step(gathering, fc, [3.0, -1.0])
    before = scores_of(gathering).movement
    gathering.prepare_keep("fc", fc.shrink(2))()
    assert torch.equal(scores_of(gathering).movement, before)
    assert len(gathering.state_dict()["movement"]["fc"]) == 2
    step(gathering, fc, [1.0, 1.0])
    assert torch.equal(
        scores_of(gathering).movement, before - torch.tensor([[1, 0, 0], [0, 0, 1.0]])
    )


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
