"""A failure during an update leaves everything unchanged, and NaN scores select no block."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_lightning import BlockSparseLinear, Sparsifier, densify, sparsify
from sparse_lightning.policy.updates import ModelUpdate
from tests.callbacks.helpers import assert_valid
from tests.callbacks.test_resume import assert_identical
from tests.loops import (
    Net,
    adamw,
    assert_all_valid,
    batch,
    everything,
    make,
    masks,
    sparse,
    train,
)

FALLING = {"schedule": "linear", "initial": 0.75, "final": 0.25, "until": 0.5}


class OutOfMemory(TorchDispatchMode):
    """Raises in the `n`-th operation that allocates memory, and in all later ones."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.left = n

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        of_arguments = schema.is_mutable or any(r.alias_info for r in schema.returns)
        if schema.returns and not of_arguments:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError(f"simulated, in {func}")
        return func(*args, **(kwargs or {}))


class Averaged:
    """An average of a model's weights, whose layers follow the blocks."""

    def __init__(self, model: nn.Module) -> None:
        self.average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def copies(self, name: str) -> list[BlockSparseLinear]:
        layer = self.average.module.get_submodule(name)
        assert isinstance(layer, BlockSparseLinear)
        return [layer]


class Starved(Sparsifier):
    """Retries every update with more and more allocations allowed, until it succeeds."""

    def watch(self, optimizer: torch.optim.Optimizer, averaged: Averaged) -> None:
        self.optimizer, self.averaged = optimizer, averaged
        self.failures: list[int] = []
        self.done = 0

    def everything(self) -> dict[str, Any]:
        return everything(
            self.model, [self.optimizer], self, average=self.averaged.average.state_dict()
        )

    def _update(self, *arguments: Any) -> None:
        before = self.everything()
        attempts = 0
        while True:
            try:
                with OutOfMemory(attempts):
                    super()._update(*arguments)
            except torch.OutOfMemoryError:
                assert_identical(self.everything(), before)
                attempts += 5  # not every allocation, since each attempt repeats the update
            else:
                break
        self.failures.append(attempts)
        update = self.last_update
        assert update is not None and update.step == self.steps
        assert update.layers.keys() == self.layers.keys()
        for name, update_of_layer in update.layers.items():
            self.done += len(update_of_layer.changed)
            assert_valid(self.layers[name], self.optimizer, update_of_layer.n_after)
            (copied,) = self.averaged.copies(name)
            assert torch.equal(copied.topology.coords, self.layers[name].topology.coords)
            assert not copied.values[update_of_layer.changed].any()


@pytest.mark.slow
@pytest.mark.parametrize(
    "rules",
    [{}, {"drop": "movement", "grow": "momentum"}, {"drop": "saliency", "grow": "random"}],
    ids=["rigl", "gathered", "random"],
)
def test_an_update_out_of_memory_changes_nothing(rules: dict[str, Any]) -> None:
    """Allocations of each update fail in turn; the training equals one without failures."""

    def run(cls: type[Sparsifier]) -> tuple[list[float], Sparsifier]:
        options = {"density": FALLING, "shrink": False, "update": {"every_n_steps": 5}, **rules}
        model, sparsifier = make(12, cls, **options)
        optimizer, averaged = adamw(model.parameters()), Averaged(model)
        if isinstance(sparsifier, Starved):
            sparsifier.watch(optimizer, averaged)
        sparsifier.attach(optimizer, copies=averaged.copies)
        losses = train(
            model, optimizer, range(12), lambda _: averaged.average.update_parameters(model)
        )
        return losses, sparsifier

    losses, starved = run(Starved)
    assert isinstance(starved, Starved)
    assert starved.done > 0 and len(starved.failures) == 2 and min(starved.failures) > 30
    assert run(Sparsifier)[0] == losses


SHRINKING: dict[str, Any] = {
    "density": {**FALLING, "initial": 1.0},
    "drop": "movement",
    "update": {"every_n_steps": 3},
}


def test_shrinking_out_of_memory_leaves_every_layer_whole() -> None:
    failures: list[int] = []

    class Shrinking(Sparsifier):
        def _shrink(self) -> None:
            weights = {n: layer.dense_weight() for n, layer in self.layers.items()}
            n = 0
            while True:
                try:
                    with OutOfMemory(n):
                        super()._shrink()
                except torch.OutOfMemoryError:
                    n += 1
                else:
                    break
                finally:
                    (tracked,) = self._tracked
                    assert tracked.optimizer is not None
                    for name, layer in self.layers.items():
                        assert torch.equal(layer.dense_weight(), weights[name])
                        assert_valid(layer, tracked.optimizer, layer.topology.n_blocks)
                        slots = layer.topology.capacity
                        assert name not in tracked.pending or len(tracked.pending[name]) == slots
                        assert len(self._gatherer._sums_of(name).work) == slots
                        assert len(self._grown_at[name]) == slots
            failures.append(n)

    def run(cls: type[Sparsifier]) -> tuple[list[float], nn.Module]:
        model, sparsifier = make(24, cls, **SHRINKING)
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        return train(model, optimizer, range(24)), model

    losses, model = run(Shrinking)
    assert max(failures) > 10
    assert run(Sparsifier)[0] == losses
    assert [len(layer.values) for layer in sparse(model).values()] == [8, 8]


@pytest.mark.parametrize("failing", ["net.0", "net.2"])
def test_a_training_goes_on_after_a_shrink_that_ran_out_of_memory(
    failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails before any layer or between two of them; a later update makes up for it."""
    original = BlockSparseLinear._prepare_shrink
    failed: list[list[int]] = []

    def run(fails: bool) -> tuple[list[float], nn.Module]:
        model, sparsifier = make(24, **SHRINKING)
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)

        def prepare(layer: BlockSparseLinear, capacity: int) -> Any:
            if fails and not failed and layer is sparse(model)[failing]:
                failed.append([layer.topology.capacity for layer in sparse(model).values()])
                raise torch.OutOfMemoryError("simulated")
            return original(layer, capacity)

        monkeypatch.setattr(BlockSparseLinear, "_prepare_shrink", prepare)
        losses: list[float] = []
        for number in range(24):
            try:
                losses += train(model, optimizer, [number])
            except torch.OutOfMemoryError:
                optimizer.zero_grad()
                losses.append(float("nan"))
        return losses, model

    (losses, model), (whole, _) = run(True), run(False)
    ((first, second),) = failed
    assert (first < second) == (failing == "net.2"), "one shrink stopped between the layers"
    (failed_at,) = (i for i, loss in enumerate(losses) if loss != loss)
    assert (
        losses[:failed_at] == whole[:failed_at]
        and losses[failed_at + 1 :] == whole[failed_at + 1 :]
    )
    assert [len(layer.values) for layer in sparse(model).values()] == [8, 8]


@pytest.mark.parametrize("rules", [{}, {"drop": "movement", "grow": "momentum"}])
@pytest.mark.parametrize("failing", [5, 15])
def test_the_next_step_makes_up_for_an_update_out_of_memory(
    failing: int, rules: dict[str, Any]
) -> None:
    """The next step makes up for it, by its own statistics."""

    class Once(Sparsifier):
        failed = False

        def _prepare_layer_update(self, *arguments: Any) -> Any:
            if self.steps == failing and not self.failed:
                self.failed = True
                raise torch.OutOfMemoryError("simulated")
            return super()._prepare_layer_update(*arguments)

    model, sparsifier = make(24, Once, density=FALLING, update={"every_n_steps": 5}, **rules)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    steps: list[int] = []
    sparsifier.register_update_hook(lambda _, update: steps.append(update.step))
    for number in range(24):
        try:
            train(model, optimizer, [number])
        except torch.OutOfMemoryError:
            assert number == failing - 1
            optimizer.zero_grad()
        assert_all_valid(model, optimizer)
    expected = [5, 10, 15, 18]
    expected[expected.index(failing)] += 1
    assert steps == expected and sparsifier.density == 0.25


# -- NaN ------------------------------------------------------------------------------------------

RULES: list[tuple[dict[str, Any], list[int]]] = [
    # The last update exchanges nothing, so it needs no gradient.
    ({}, [12]),
    # These are the steps before the broken one; later updates have no scores to grow by.
    ({"drop": "saliency", "grow": "momentum"}, [4, 12]),
    ({"drop": "gradient", "grow": "gradient"}, []),
    ({"drop": "movement", "grow": "random"}, [4, 8, 12]),
    ({"grow": "random"}, [4, 8, 12]),
]


@pytest.mark.parametrize(
    ("rules", "expected"), RULES, ids=["-".join(rules.values()) or "rigl" for rules, _ in RULES]
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_at_an_update(
    rules: dict[str, Any], expected: list[int], bad: float
) -> None:
    """Every weight is NaN afterwards. Layers that cannot be scored keep their blocks."""
    model, sparsifier = make(13, update={"every_n_steps": 4, "until": 12}, **rules)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates: list[ModelUpdate] = []
    sparsifier.register_update_hook(lambda _, update: updates.append(update))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for number in range(13):
            x, y = batch(number)
            if number == 3:
                x[0, 0] = bad
            before = masks(model)
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            assert_all_valid(model, optimizer, 8)
            if number + 1 not in expected or number + 1 == 12:
                for name, mask in masks(model).items():
                    assert torch.equal(mask, before[name])
    assert [update.step for update in updates] == expected
    assert all(set(update.layers) == {"net.0", "net.2"} for update in updates)
    texts = [str(w.message) for w in warned if "not scored" in str(w.message)]
    assert len(texts) == (8 not in expected)


class Poisoned(torch.autograd.Function):
    """The identity, with a gradient that is not finite in one element."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        dy = dy.clone()
        dy[0, 0] = float("inf")
        return dy


def test_one_layer_whose_gradient_is_not_finite_waits_alone() -> None:
    """It is updated in the next step, by its scores; the other layer does not wait for it."""
    seen: list[tuple[int, list[str]]] = []

    model, sparsifier = make(20, update={"every_n_steps": 4, "until": 12})
    sparsifier.register_update_hook(lambda _, update: seen.append((update.step, [*update.layers])))
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    with pytest.warns(UserWarning, match=r"not scored at step 4.*not finite: net\.0\.$") as warned:
        for number in range(10):
            x, y = batch(number)
            hidden = model.net[0](x)
            if number == 3:
                hidden = Poisoned.apply(hidden)
            out = model.head(model.net[1:](hidden))
            nn.functional.cross_entropy(out, y).backward()
            for parameter in model.parameters():  # the training loop repairs the gradients
                assert parameter.grad is not None
                parameter.grad.nan_to_num_(0.0, 0.0, 0.0)
            optimizer.step()
            optimizer.zero_grad()
    assert sum("not scored" in str(w.message) for w in warned) == 1
    assert seen == [(4, ["net.2"]), (5, ["net.0"]), (8, ["net.0", "net.2"])]


def test_blocks_of_nan_are_dropped_first() -> None:
    model, sparsifier = make(
        4,
        grow="random",
        drop_fraction=0.5,
        regrow=False,
        update={"every_n_steps": 4, "until": 4},
    )
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    first = sparse(model)["net.0"]
    for number in range(4):
        if number == 3:
            first.values.data[:3] = float("nan")
        x, y = batch(number)
        # This loss does not depend on the weights that are NaN.
        out = model.head(model.net(x).nan_to_num(0.0))
        nn.functional.cross_entropy(out, y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_all_valid(model, optimizer, 8)
    last = sparsifier.last_update
    assert last is not None and last.step == 4
    assert {0, 1, 2} <= set(last.layers["net.0"].dropped.tolist())
    assert bool(first.values[:3].isfinite().all())


def test_weights_that_are_not_finite_are_named_at_the_start() -> None:
    """A damaged checkpoint would otherwise be trained further without a word."""
    model, sparsifier = make()
    state = model.state_dict()
    state["net.2.values"][1, 2, 3] = float("nan")
    model.load_state_dict(state)
    with pytest.warns(UserWarning, match=r"NaN or infinite: net\.2\. .*resume from another"):
        sparsifier.attach(adamw(model.parameters()))


@pytest.mark.parametrize("change", ["sparsify", "densify"])
def test_a_swap_out_of_memory_leaves_every_layer_whole(change: str) -> None:
    """Layers that were swapped before keep their new form, as their memory is freed one by one."""
    kinds = set()
    for n in itertools.count():
        model = Net()
        expected = model(batch(0)[0])
        if change == "densify":
            sparsify(model, block_size=16, density=1.0)
        try:
            with OutOfMemory(n):
                sparsify(model, block_size=16, density=1.0) if change == "sparsify" else densify(
                    model
                )
        except torch.OutOfMemoryError:
            kinds.add(len(sparse(model)))
            torch.testing.assert_close(model(batch(0)[0]), expected)
            loss = model(batch(0)[0]).sum()
            loss.backward()
        else:
            break
    assert len(kinds) == 2
