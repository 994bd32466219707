"""2:4 layers in plain loops: what is recorded of a step, resuming, faults, copies and loading."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, Sparsifier, sparsify
from sparse_lightning.gathering import GradientAccumulator
from sparse_lightning.kernels import block_gradients
from sparse_lightning.policy.updates import ModelUpdate
from tests.callbacks.test_resume import assert_identical
from tests.loops import (
    FALLING,
    Net,
    adamw,
    batch,
    dense_gradients,
    everything,
    loss_of,
    make,
    sparse,
    train,
)
from tests.test_interrupts import Interrupted, is_identical
from tests.test_sparsifier import load, saved, updates_of
from tests.test_sparsifier_faults import Averaged, Starved

EVERY_STEP = {"every_n_steps": 1, "until": 24}


def start(total: int | None = 24, **options: Any) -> tuple[Net, Sparsifier, Optimizer]:
    """Return a model with 2:4 layers, and its attached optimizer."""
    model, sparsifier = make(total, nm="2:4", **options)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    return model, sparsifier, optimizer


def new_weights(update: ModelUpdate) -> dict[str, int]:
    return {name: of_layer.new_weights for name, of_layer in update.layers.items()}


@pytest.fixture
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# -- the gradient of whole blocks -----------------------------------------------------------------


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize(
    "options", [{"update": EVERY_STEP}, {"update": {"every_n_steps": 4}, "grow": "momentum"}]
)
def test_weights_are_exchanged_after_layers_have_shrunk(options: dict[str, Any]) -> None:
    """Layers that stay armed from one update to the next get other positions when they shrink."""
    model, sparsifier, optimizer = start(density=FALLING, drop_fraction=1.0, **options)
    updates, capacities = updates_of(sparsifier), []
    train(model, optimizer, range(18), lambda _: capacities.append(len(model.net[0].values)))
    assert capacities[-1] < capacities[0]
    last = [update for update in updates if update.step > capacities.index(capacities[-1]) + 1]
    assert last and all(all(new_weights(update).values()) for update in last[:-1])


def test_an_abandoned_training_is_freed() -> None:
    """It was armed when it was given up, without a call of `detach`."""
    model, sparsifier, optimizer = start(update=EVERY_STEP)
    train(model, optimizer, range(2))
    assert block_gradients.is_recording()
    layer = weakref.ref(model.net[0])
    del model, sparsifier, optimizer
    gc.collect()
    assert layer() is None and not block_gradients.is_recording()


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_a_pattern_that_a_state_dict_brings_evolves(grow: str) -> None:
    model, sparsifier = make(24, grow=grow, update={"every_n_steps": 2})
    model.load_state_dict(make(24, nm="2:4", seed=1)[0].state_dict())
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(4))
    assert len(updates) == 2 and all(all(new_weights(update).values()) for update in updates)


class Step:
    """What happens between two steps of the optimizer; returns the loss that counts."""

    def __init__(self, model: Net, optimizer: Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def plain(self) -> Any:
        loss_of(self.model, 1).backward()
        return entropy(1)

    def micro_batches(self) -> Any:
        for number in range(3):
            loss_of(self.model, number).backward()
        return lambda net: sum(entropy(number)(net) for number in range(3))

    def cleared(self, set_to_none: bool = True) -> Any:
        """As a critic does, whose gradients are first filled by its generator."""
        loss_of(self.model, 5).backward()
        self.optimizer.zero_grad(set_to_none)
        loss_of(self.model, 1).backward()
        return entropy(1)

    def zeroed(self) -> Any:
        return self.cleared(set_to_none=False)

    def of_the_input(self) -> Any:
        """A gradient that is returned, and one that is accumulated in the input alone, are none."""
        x, y = batch(1)
        x.requires_grad_()
        torch.autograd.grad(self.model(x).sum(), x)
        torch.autograd.grad(self.model(x).sum(), [*self.model.parameters()])
        self.model(x).sum().backward(inputs=[x])
        nn.functional.cross_entropy(self.model(x), y).backward()
        return entropy(1)

    def by_names(self) -> Any:
        loss_of(self.model, 1).backward(inputs=[*self.model.parameters()])
        return entropy(1)

    def kept_graph(self) -> Any:
        loss = loss_of(self.model, 1)
        loss.backward(retain_graph=True)
        (2 * loss).backward()
        return lambda net: 3 * entropy(1)(net)

    def penalty(self) -> Any:
        def loss(net: Any) -> Tensor:
            x, _ = batch(1)
            x.requires_grad_()
            (dx,) = torch.autograd.grad(net(x).square().sum(), x, create_graph=True)
            return entropy(1)(net) + dx.square().sum()

        loss(self.model).backward()
        return loss

    def checkpointed(self, use_reentrant: bool = False) -> Any:
        x, y = batch(1)
        hidden = checkpoint(self.model.net, x.requires_grad_(), use_reentrant=use_reentrant)
        nn.functional.cross_entropy(self.model.head(hidden), y).backward()
        return entropy(1)

    def reentrant(self) -> Any:
        return self.checkpointed(use_reentrant=True)

    def autocast(self) -> Any:
        """A cast is between the parameter and the product."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, 1)
        loss.backward()
        return entropy(1)

    def failed(self) -> Any:
        """A backward runs out of memory, and the batch is tried again."""
        x, y = batch(1)
        x.requires_grad_().register_hook(out_of_memory)
        with pytest.raises(torch.OutOfMemoryError):
            nn.functional.cross_entropy(self.model(x), y).backward(inputs=[x])
        with pytest.raises(torch.OutOfMemoryError):
            nn.functional.cross_entropy(self.model(x), y).backward()
        self.optimizer.zero_grad()
        return self.plain()

    def compiled(self) -> Any:
        torch.compiler.reset()
        x, y = batch(1)
        output = torch.compile(self.model, backend="aot_eager", fullgraph=True)(x)
        nn.functional.cross_entropy(output, y).backward()
        return entropy(1)


def out_of_memory(gradient: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("simulated")


def entropy(number: int) -> Callable[[Any], Tensor]:
    x, y = batch(number)
    return lambda net: nn.functional.cross_entropy(net(x), y)


def test_a_layer_in_and_around_a_reentrant_checkpoint() -> None:
    """The backward of the checkpoint runs, and accumulates, within that of the whole."""
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5, nm="2:4", dtype=torch.float64)
    weight = layer.dense_weight().requires_grad_()
    accumulator = GradientAccumulator(layer, layer.values, needs_norms=False)
    accumulator.arm(True, needs_blocks=True)
    x = torch.randn(8, 64, dtype=torch.float64, requires_grad=True)
    dense = lambda x: nn.functional.linear(x, weight, layer.bias).tanh()  # noqa: E731
    ours = lambda x: layer(x).tanh()  # noqa: E731
    ours(checkpoint(ours, ours(x), use_reentrant=True)).square().sum().backward()
    dense(dense(dense(x))).square().sum().backward()
    assert weight.grad is not None
    torch.testing.assert_close(accumulator.collect()[1], layer.topology._blocks_of(weight.grad))


@pytest.mark.filterwarnings("ignore:No topology update will change a block")
@pytest.mark.parametrize("what", [name for name in vars(Step) if not name.startswith("_")])
@pytest.mark.parametrize("grow", ["gradient", "random"])
def test_the_gradient_of_whole_blocks_is_that_of_the_step(
    what: str, grow: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is compared with the gradient of dense weights, for everything that the step applies."""
    seen: dict[str, Tensor] = {}

    def exchange(values: Tensor, positions: Tensor, gradient: Tensor, *_: Any) -> Tensor:
        seen[f"{len(seen)}"] = gradient
        return positions

    monkeypatch.setattr("sparse_lightning.sparsifier.exchange_weights", exchange)
    model, _, optimizer = start(grow=grow, update=EVERY_STEP, drop_fraction=1e-9)
    train(model, optimizer, [0])
    seen.clear()
    expected = dense_gradients(model, getattr(Step(model, optimizer), what)())
    optimizer.step()
    assert len(seen) == 2
    for gradient, (name, layer) in zip(seen.values(), sparse(model).items(), strict=True):
        topology = layer.topology
        blocks = topology._blocks_of(expected[name])
        error = 0.1 if what == "autocast" else 1e-5
        assert (gradient - blocks).norm() < error * blocks.norm()
        assert gradient.any(-1).any(-1).sum() >= topology.n_blocks - 1


ACTIONS = ("backward", "none", "zeros", "returned", "input", "failed", "named", "twice", "step")


@settings(deadline=None, derandomize=True, max_examples=100)
@given(st.lists(st.sampled_from(ACTIONS), min_size=2, max_size=10))
def test_any_sequence_records_what_a_dense_gradient_would_hold(actions: list[str]) -> None:
    """The accumulator is compared, at each step, with `grad` of a dense weight."""
    torch.manual_seed(0)
    layer = BlockSparseLinear(32, 32, block_size=16, density=0.5, nm="2:4", dtype=torch.float64)
    weight = layer.dense_weight().requires_grad_()
    accumulator = GradientAccumulator(layer, layer.values)
    accumulator.arm(True, needs_blocks=True)
    leaves = layer.values, weight
    models = layer, lambda x: nn.functional.linear(x, weight, layer.bias.detach())
    for action in [*actions, "step"]:
        drawn = torch.randn(5, 32, dtype=torch.float64)
        for leaf, model in zip(leaves, models, strict=True):
            x = drawn.clone().requires_grad_()
            y = model(x).square().sum() if action in ACTIONS[:1] + ACTIONS[3:8] else x.sum()
            if action == "backward":
                y.backward()
            elif action == "none":
                leaf.grad = None
            elif action == "zeros" and leaf.grad is not None:
                leaf.grad.zero_()
            elif action == "returned":
                torch.autograd.grad(y, [leaf, x])
            elif action == "input":
                y.backward(inputs=[x])
            elif action == "failed":
                x.register_hook(out_of_memory)
                with pytest.raises(torch.OutOfMemoryError):
                    y.backward(inputs=[x])
            elif action == "named":
                y.backward(inputs=[leaf])
            elif action == "twice":
                y.backward(retain_graph=True)
                (3 * y).backward()
        if action == "step":
            _, blocks = accumulator.collect()
            expected = torch.zeros_like(weight) if weight.grad is None else weight.grad
            expected = layer.topology._blocks_of(expected)
            found = torch.zeros_like(expected) if blocks is None else blocks
            torch.testing.assert_close(found, expected)
            layer.values.grad = weight.grad = None


# -- scaling and precision ------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaler_makes_no_difference(fused: bool) -> None:
    """Scales are powers of two, and skipped steps are in no recorded gradient."""

    def run(scaler: torch.amp.GradScaler, overflows: bool) -> dict[str, Any]:
        model, sparsifier = make(16, nm="2:4", update={"every_n_steps": 3, "until": 12})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
        sparsifier.attach(optimizer)
        updates = updates_of(sparsifier)
        for number in range(12):
            if overflows and number % 4 == 2:
                scaler.scale(torch.inf * loss_of(model, 99)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
            scaler.scale(loss_of(model, number)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert len(updates) == 4
        assert all(all(new_weights(update).values()) for update in updates[:-1])
        return dict(model.state_dict())

    scaled = run(torch.amp.GradScaler("cpu", init_scale=2.0**20), overflows=True)
    assert_identical(scaled, run(torch.amp.GradScaler("cpu", enabled=False), overflows=False))


@pytest.mark.usefixtures("no_warnings")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_patterns_evolve_under_autocast(dtype: torch.dtype) -> None:
    model, sparsifier, optimizer = start(update={"every_n_steps": 3})
    updates = updates_of(sparsifier)
    for number in range(6):
        x, y = batch(number)
        with torch.autocast("cpu", dtype):
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(updates) == 2 and all(all(new_weights(update).values()) for update in updates)


# -- resuming and loading -------------------------------------------------------------------------

RESUMED: dict[str, dict[str, Any]] = {
    "rigl": {},
    "momentum": {"drop": "saliency", "grow": "momentum"},
    "random": {"drop": "movement", "grow": "random", "distribution": "erdos_renyi"},
    "kept": {"shrink": False, "drop": "gradient", "regrow": False},
}


# 4: right before an update; 5: right after it; 10: after shrinking; 18: after the last update.
@pytest.mark.parametrize("cut", [3, 4, 5, 10, 18])
@pytest.mark.parametrize("rules", RESUMED)
def test_it_resumes_bit_for_bit(rules: str, cut: int) -> None:
    options = {"density": FALLING, "update": {"every_n_steps": 5}, **RESUMED[rules]}
    model, sparsifier, optimizer = start(**options)
    train(model, optimizer, range(cut))
    state = saved(model, optimizer, sparsifier)
    pending = state["sparsifier"]["courses"][0]["pending"]
    assert (cut in (5, 10)) == any(bool(weights.any()) for weights in pending.values())
    losses = train(model, optimizer, range(cut, 24))
    other, resumed = make(24, nm="2:4", **options)
    its_optimizer = adamw(other.parameters())
    load(state, other, its_optimizer, resumed)
    resumed.attach(its_optimizer)
    assert train(other, its_optimizer, range(cut, 24)) == losses
    assert_identical(
        everything(other, [its_optimizer], resumed), everything(model, [optimizer], sparsifier)
    )


def test_a_training_rolled_back_repeats_itself() -> None:
    """Earlier state dicts are loaded during the training, when other weights are pending."""
    model, sparsifier, optimizer = start(update={"every_n_steps": 2, "until": 24})
    parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
    train(model, optimizer, range(4))
    state = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    expected = train(model, optimizer, range(4, 10))
    for name, part in parts.items():
        part.load_state_dict(copy.deepcopy(state[name]))
    assert train(model, optimizer, range(4, 10)) == expected


def test_weights_that_a_state_dict_replaces_begin_anew() -> None:
    """Only the model is rolled back: state moves with weights that stay; new ones have none."""
    options = {"density": FALLING, "shrink": False, "update": {"every_n_steps": 3}}
    model, sparsifier, optimizer = start(**options)
    train(model, optimizer, range(10))
    earlier = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(10, 17))
    before = copy.deepcopy(
        {
            n: (layer.topology, optimizer.state[layer.values]["exp_avg"])
            for n, layer in sparse(model).items()
        }
    )
    model.load_state_dict(earlier)
    with pytest.warns(UserWarning, match="A state dict replaced blocks"):
        optimizer.state_dict()
    for name, layer in sparse(model).items():
        topology, moment = before[name]
        kept, was_kept = (
            t.unpack(torch.ones(t.values_shape, dtype=torch.bool))
            for t in (layer.topology, topology)
        )
        now, then = (
            layer.topology.unpack(optimizer.state[layer.values]["exp_avg"]),
            topology.unpack(moment),
        )
        # A block that left its slot and came back in another one begins anew as a whole.
        stays = kept & was_kept & (now != 0)
        assert torch.equal(now[stays], then[stays]) and stays.sum() > 0.3 * kept.sum()
        assert not now[~was_kept].any()
    train(model, optimizer, [17])
    (tracked,) = sparsifier._tracked
    for name, weights in tracked.pending.items():
        empty = sparsifier.layers[name].topology.coords[:, 0] < 0
        assert not weights[empty].any(), "empty slots wait for no gradient"


def test_pending_weights_move_with_a_model_and_optimizer_that_are_loaded() -> None:
    """Those of the replaced weights are forgotten, since the loaded state is complete."""
    model, sparsifier, optimizer = start(update=EVERY_STEP)
    train(model, optimizer, range(3))
    saved_states = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(3, 5))
    (tracked,) = sparsifier._tracked
    waiting = {
        name: sparsifier.layers[name].topology.unpack(pending)
        for name, pending in tracked.pending.items()
    }
    assert all(weights.any() for weights in waiting.values())
    model.load_state_dict(saved_states[0])
    optimizer.load_state_dict(saved_states[1])
    sparsifier.state_dict()
    for name, weights in waiting.items():
        now = sparsifier.layers[name].topology.unpack(tracked.pending[name])
        assert not (now & ~weights).any()


def test_other_patterns_are_refused_in_training() -> None:
    plain, sparsifier = make(24)
    sparsifier.attach(adamw(plain.parameters()))
    model, _, _ = start()
    with pytest.raises(RuntimeError) as error:
        model.load_state_dict(plain.state_dict())
    assert "must keep its capacity 8, block size 16 and pattern nm='2:4'" in str(error.value)
    assert "has 8, 16 and None. Load it before the optimizer is built" in str(error.value)
    with pytest.raises(RuntimeError, match="pattern nm=None; the state dict has 8, 16 and '2:4'"):
        plain.load_state_dict(model.state_dict())
    assert model.net[0].nm == "2:4" and plain.net[0].nm is None


def test_another_pattern_is_refused_when_resuming() -> None:
    state = start()[1].state_dict()
    _, sparsifier = make(24)
    with pytest.raises(ValueError, match=r"got nm=None \(was '2:4'\)"):
        sparsifier.load_state_dict(state)


def test_a_training_from_before_patterns_existed_resumes() -> None:
    state = make(24)[1].state_dict()
    del state["config"]["nm"], state["config"]["regrow_inner"]
    make(24)[1].load_state_dict(state)
    with pytest.raises(ValueError, match=r"got nm='2:4' \(was None\)"):
        make(24, nm="2:4")[1].load_state_dict(state)


# -- all or nothing -------------------------------------------------------------------------------


def test_an_interrupted_update_is_written_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt arrives at every third line in turn, from the first write on."""

    def update(n: int) -> tuple[Interrupted, bool]:
        monkeypatch.setattr(Interrupted, "n", n)
        model, sparsifier = make(
            12, Interrupted, nm="2:4", density=0.5, update={"every_n_steps": 2}
        )
        assert isinstance(sparsifier, Interrupted)
        optimizer, averaged = adamw(model.parameters()), Averaged(model)
        sparsifier.snapshot = lambda: everything(
            model, [optimizer], sparsifier, average=averaged.average.state_dict()
        )
        sparsifier.attach(optimizer, copies=averaged.copies)
        train(model, optimizer, [0], lambda _: averaged.average.update_parameters(model))
        updates = updates_of(sparsifier)
        with contextlib.suppress(KeyboardInterrupt):
            train(model, optimizer, [1])
        return sparsifier, bool(updates)

    uninterrupted, _ = update(sys.maxsize)
    before, complete = uninterrupted.before, uninterrupted.after
    assert not is_identical(before["model"], complete["model"])
    seen = set()
    for n in itertools.count(0, 3):
        sparsifier, is_written = update(n)
        seen.add(is_written)
        assert_identical(sparsifier.after, complete if is_written else before)
        if sparsifier.interrupt.where == "_warn_of_unscored_layers" or n > 900:
            break
    assert seen == {True, False} and n < 900


def test_an_update_out_of_memory_changes_nothing() -> None:
    """Allocations of each update fail in turn; the training equals one without failures."""

    def run(cls: type[Sparsifier]) -> list[float]:
        model, sparsifier = make(6, cls, nm="2:4", density=0.5, update={"every_n_steps": 2})
        optimizer, averaged = adamw(model.parameters()), Averaged(model)
        if isinstance(sparsifier, Starved):
            sparsifier.watch(optimizer, averaged)
        sparsifier.attach(optimizer, copies=averaged.copies)
        losses = train(
            model, optimizer, range(6), lambda _: averaged.average.update_parameters(model)
        )
        if isinstance(sparsifier, Starved):
            assert sparsifier.failures and min(sparsifier.failures) > 100
        return losses

    assert run(Starved) == run(Sparsifier)


# -- copies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.5, FALLING])
def test_an_average_is_that_of_the_weights(density: Any) -> None:
    """It is accurate where a weight was always kept, and zero where none is."""
    model, sparsifier = make(24, nm="2:4", density=density, update={"every_n_steps": 4})
    optimizer, averaged = adamw(model.parameters()), Averaged(model)
    sparsifier.attach(optimizer, copies=averaged.copies)
    truth: dict[str, Tensor] = {}
    always = {name: layer.dense_weight() != 0 for name, layer in sparse(model).items()}

    def after(_: int) -> None:
        averaged.average.update_parameters(model)
        for name, layer in sparse(model).items():
            now = layer.dense_weight()
            truth[name] = truth[name].lerp(now, 0.1) if name in truth else now
            kept = layer.topology.unpack(torch.ones(layer.values.shape, dtype=torch.bool))
            always[name] &= kept
            (copied,) = averaged.copies(name)
            assert copied.topology.equals(layer.topology)
            assert not copied.dense_weight()[~kept].any()

    train(model, optimizer, range(24), after)
    for name, mask in always.items():
        found = averaged.copies(name)[0].dense_weight()
        assert mask.any()
        torch.testing.assert_close(found[mask], truth[name][mask], rtol=1e-5, atol=1e-6)


def test_a_frozen_copy_in_the_model_follows_whatever_pattern_it_is_given() -> None:
    """A target network, into which an earlier state of the network is loaded."""

    class WithTarget(Net):
        def __init__(self) -> None:
            super().__init__()
            self.target = copy.deepcopy(self.net).requires_grad_(False)

    model = WithTarget()
    sparsifier = Sparsifier(
        model, 24, nm="2:4", block_size=16, exclude=["head"], update={"every_n_steps": 4}
    )
    optimizer = adamw([*model.net.parameters(), *model.head.parameters()])
    sparsifier.attach(optimizer)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    earlier = copy.deepcopy(model.net.state_dict())
    train(model, optimizer, range(6))
    assert all(model.target[i].topology.equals(model.net[i].topology) for i in (0, 2))
    model.target.load_state_dict(earlier)
    known = model.target[0].dense_weight()
    train(model, optimizer, range(6, 9))
    for i in (0, 2):
        assert model.target[i].topology.equals(model.net[i].topology)
    both = model.target[0].dense_weight().ne(0) & known.ne(0)
    assert torch.equal(model.target[0].dense_weight()[both], known[both]) and both.any()


def test_a_pattern_that_loaded_blocks_do_not_have_is_named() -> None:
    plain = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    sparsify(plain, block_size=16, density=0.5)
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    sparsifier = Sparsifier(model, total_steps=10, block_size=16, density=0.5, nm="2:4")
    model.load_state_dict(plain.state_dict())
    with pytest.warns(UserWarning, match=r"whole blocks, although nm='2:4'.*: 0, 2\."):
        sparsifier.attach(torch.optim.SGD(model.parameters(), 0.1))


def test_only_steps_that_exchange_weights_hold_whole_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[int] = []
    recorded: list[int] = []
    record = GradientAccumulator.record_blocks

    def spy(self: GradientAccumulator, blocks: Tensor) -> None:
        recorded.append(steps[-1])
        record(self, blocks)

    monkeypatch.setattr(GradientAccumulator, "record_blocks", spy)
    for options, expected in (
        ({"grow": "momentum"}, [11, 23, 29]),  # its norms are those of ten steps
        ({"grow": "random"}, [11, 23, 29]),
        ({"drop_fraction": 0}, []),
        ({"regrow_inner": False}, []),
    ):
        recorded.clear()
        model = nn.Sequential(BlockSparseLinear(32, 64, block_size=16, density=0.5, nm="2:4"))
        update = {"every_n_steps": 12, "until": 1.0}
        options = {"drop_fraction": {"schedule": "constant", "final": 0.2}, **options}
        sparsifier = Sparsifier(
            *(model, 30), block_size=16, density=0.5, nm="2:4", update=update, **options
        )
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        sparsifier.attach(optimizer)
        for step in range(30):
            steps.append(step)
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert recorded == expected, options


@pytest.mark.parametrize("every", [1, 4])
def test_weights_are_exchanged_after_the_model_is_shared(every: int) -> None:
    update = {"every_n_steps": every, "until": 1.0}
    model, sparsifier = make(20, nm="2:4", drop_fraction=0.3, update=update)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    exchanged: list[int] = []
    sparsifier.register_update_hook(
        lambda _, update: exchanged.append(sum(u.new_weights for u in update.layers.values()))
    )
    train(model, optimizer, range(6))
    with warnings.catch_warnings():  # the step in which it happens may miss its update
        warnings.simplefilter("ignore")
        model.share_memory()
        train(model, optimizer, range(6, 12))
    exchanged.clear()
    train(model, optimizer, range(12, 20))
    assert exchanged and all(exchanged)


@pytest.mark.parametrize("part", ["values", "gradient", "state"])
def test_tensors_of_any_strides_follow_an_exchange(part: str) -> None:
    def strided(tensor: Tensor) -> Tensor:
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)

    results = []
    for is_strided in (False, True):
        torch.manual_seed(0)
        update = {"every_n_steps": 2, "until": 1.0}
        model, sparsifier = make(20, nm="2:4", drop_fraction=0.3, update=update)
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        for i in range(6):
            optimizer.zero_grad()
            loss_of(model, i).backward()
            for layer in sparse(model).values() if is_strided else ():
                if part == "values":
                    layer.values.data = strided(layer.values.data)
                elif part == "gradient":
                    layer.values.grad = strided(layer.values.grad)
                elif "exp_avg" in optimizer.state[layer.values]:
                    state = optimizer.state[layer.values]
                    state["exp_avg"] = strided(state["exp_avg"])
            optimizer.step()
        results.append([layer.dense_weight() for layer in sparse(model).values()])
    for weight, expected in zip(*results, strict=True):
        assert torch.equal(weight != 0, expected != 0)
        torch.testing.assert_close(weight, expected)  # AdamW rounds in another order
