"""The engine in plain loops: counted steps, times of updates, hooks, warnings and resuming."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

from sparse_lightning import BlockSparseLinear, Sparsifier
from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.criteria import BlockScores, gradient, magnitude, needs
from sparse_lightning.policy.rules import Decision, DropAndGrow, UpdateRequest
from sparse_lightning.policy.updates import ModelUpdate
from tests.callbacks.test_resume import assert_identical
from tests.extensions import fewest
from tests.loops import (
    FALLING,
    Net,
    adamw,
    assert_all_valid,
    batch,
    blocks,
    dense_gradients,
    everything,
    loss_of,
    make,
    masks,
    sparse,
    train,
)


@needs("gradient", "momentum", "saliency", "movement")
class Seeing:
    """Wraps a rule, by default the usual one, and records its requests."""

    def __init__(self, rule: Callable[[UpdateRequest], Decision] | None = None) -> None:
        self.rule = rule or DropAndGrow(magnitude, gradient)
        self.requests: list[UpdateRequest] = []

    def __call__(self, request: UpdateRequest) -> Decision:
        self.requests.append(request)
        return self.rule(request)

    def by_layer(self) -> dict[str, list[int]]:
        """Return the steps at which each layer was updated."""
        steps: dict[str, list[int]] = {}
        for request in self.requests:
            for name in request.layers:
                steps.setdefault(name, []).append(request.step)
        return steps


@needs("gradient")
class SeeingGradients(Seeing):
    """A `Seeing` that needs only the gradient of the step."""


def dense_norms(model: Net, loss: Callable[[Callable[[Tensor], Tensor]], Tensor]) -> dict[str, Any]:
    """Return block norms of the dense weight gradients, by autograd on a dense model."""
    return {
        name: g.unflatten(0, (-1, 16)).unflatten(2, (-1, 16)).square().sum((1, 3)).sqrt()
        for name, g in dense_gradients(model, loss).items()
    }


def updates_of(sparsifier: Sparsifier) -> list[ModelUpdate]:
    """Return a list to which every update from now on is appended."""
    found: list[ModelUpdate] = []
    sparsifier.register_update_hook(lambda _, update: found.append(update))
    return found


def messages_with(warned: Iterable[warnings.WarningMessage], what: str) -> list[str]:
    return [str(w.message) for w in warned if what in str(w.message)]


# -- construction and attaching -------------------------------------------------------------------


@pytest.mark.parametrize("total", [0, -1, 2.5, True, "24"])
def test_an_invalid_number_of_steps_is_refused(total: Any) -> None:
    model = Net()
    with pytest.raises(ValueError, match="`total_steps` must be an integer of at least 1, or None"):
        Sparsifier(model, total, block_size=16)
    assert not sparse(model)


def test_a_configuration_is_given_whole_or_in_parts() -> None:
    model, config = Net(), SparsityConfig(block_size=16, exclude=["head"], density=0.5)
    with pytest.raises(TypeError, match="`config` must be given alone"):
        Sparsifier(model, 24, config=config, density=0.5)
    assert not sparse(model)
    sparsifier = Sparsifier(model, 24, config=config)
    assert sparsifier.config is config and sparsifier.density == 0.5
    assert list(sparsifier.layers) == list(sparsifier.report.layers) == ["net.0", "net.2"]


@pytest.mark.parametrize("times", [{}, {"density": {**FALLING, "until": 10}}])
def test_fractions_need_a_number_of_steps(times: dict[str, Any]) -> None:
    model, sparsifier = make(None, **times)
    optimizer = adamw(model.parameters())
    with pytest.raises(ValueError, match=r"need a training of known length.*total_steps"):
        sparsifier.attach(optimizer)
    assert not optimizer._optimizer_step_post_hooks and not model.net[0]._is_locked
    train(model, optimizer, range(2))
    assert sparsifier.steps == 0


def test_steps_need_no_number_of_steps() -> None:
    model, sparsifier = make(None, update={"every_n_steps": 3, "until": 7})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(12))
    assert [update.step for update in updates] == [3, 6, 7]


def test_the_global_distribution_is_refused_with_several_optimizers() -> None:
    model, sparsifier = make(density=FALLING, distribution="global", update={"every_n_steps": 3})
    first, rest = (
        adamw(model.net[0].parameters()),
        adamw([*model.net[2:].parameters(), *model.head.parameters()]),
    )
    with pytest.raises(ValueError, match=r"must not be 'global'.*got 2 that hold some"):
        sparsifier.attach(first, rest)
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in (first, rest))
    head = adamw(model.head.parameters())
    sparsifier.attach(adamw(model.net.parameters()), head)


class Wrapped(Optimizer):
    """A wrapper like that of Accelerate."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        self.state = optimizer.state


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_an_optimizer_may_be_wrapped(depth: int) -> None:
    model, sparsifier = make(update={"every_n_steps": 4})
    optimizer = wrapped = adamw(model.parameters())
    for _ in range(depth):
        wrapped = Wrapped(wrapped)
    sparsifier.attach(wrapped)
    sparsifier.attach(wrapped, optimizer)  # has no further effect
    train(model, optimizer, range(8))
    assert sparsifier.steps == 8 and sparsifier.n_updates == 2


@pytest.mark.parametrize("holds", ["nothing", "a part"])
def test_layers_in_no_optimizer_are_named_once(holds: str) -> None:
    model, sparsifier = make(update={"every_n_steps": 2})
    optimizer = adamw(model.net[2].parameters() if holds == "a part" else model.head.parameters())
    sparsifier.attach(optimizer)
    with pytest.raises(RuntimeError, match=r"`values` must be in an optimizer.*layer 'net.0'"):
        sparsifier.check_all_held()
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        train(model, optimizer, range(8))
    texts = messages_with(warned, "in no optimizer that is attached")
    assert len(texts) == 1
    if holds == "a part":
        assert ": net.0. " in texts[0]
        assert sparsifier.last_update is not None and [*sparsifier.last_update.layers] == ["net.2"]
    else:
        assert "AdamW, holds none" in texts[0] and "net.0, net.2. " in texts[0]
        assert sparsifier.steps == 0 and sparsifier.last_update is None


# -- steps ----------------------------------------------------------------------------------------


def none_at_all(model: Net, optimizer: Optimizer) -> None:
    optimizer.zero_grad()


def of_the_head_alone(model: Net, optimizer: Optimizer) -> None:
    optimizer.zero_grad()
    x, y = batch(99)
    nn.functional.cross_entropy(model.head(model.net(x).detach()), y).backward()


def a_closure_without_a_backward(model: Net, optimizer: Optimizer) -> Any:
    optimizer.zero_grad()
    return lambda: loss_of(model, 99).detach()


@pytest.mark.parametrize("empty", [none_at_all, of_the_head_alone, a_closure_without_a_backward])
@pytest.mark.parametrize("drop", ["magnitude", "movement"])
def test_steps_without_a_gradient_do_not_count(empty: Any, drop: str) -> None:
    """Updates come after the same number of counted steps, with the same scores."""

    def run(between: Any) -> tuple[list[int], Net]:
        # The steps that do not count are among the planned ones.
        total = 12 if between is None else 24
        model, sparsifier = make(total, drop=drop, update={"every_n_steps": 4, "until": 12})
        # Without decay and momentum, a step without a gradient changes nothing.
        optimizer = SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        head = copy.deepcopy(model.head.state_dict())
        steps = []
        for number in range(12):
            if between is not None:
                optimizer.step(between(model, optimizer))
                model.head.load_state_dict(head)
                optimizer.zero_grad()
            train(model, optimizer, [number])
            head = copy.deepcopy(model.head.state_dict())
            steps.append(sparsifier.steps)
        (course,) = sparsifier.state_dict()["courses"]
        assert course["skipped"] == (0 if between is None else 12)
        assert sparsifier.last_update is not None and sparsifier.last_update.step == 12
        return steps, model

    steps, model = run(empty)
    assert steps == [*range(1, 13)]
    assert_identical(dict(model.state_dict()), dict(run(None)[1].state_dict()))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("drop", ["magnitude", "saliency", "movement"])
def test_steps_that_a_scaler_skips_do_not_count(fused: bool, drop: str) -> None:
    model, sparsifier = make(16, drop=drop, regrow=False, update={"every_n_steps": 4, "until": 12})
    optimizer = AdamW(model.parameters(), lr=1e-2, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    for number in range(16):
        overflows = number in (0, 3, 8, 9)
        loss = loss_of(model, number) * (torch.inf if overflows else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert sparsifier.steps == 12 and [update.step for update in updates] == [4, 8, 12]
    assert (
        sum(
            len(layer_update.grown) for update in updates for layer_update in update.layers.values()
        )
        > 0
    )
    assert_all_valid(model, optimizer, 8)
    assert all(p.isfinite().all() for p in model.parameters())


class WrappedScaler(torch.amp.GradScaler):
    """Its `step` hides its arguments, as those of tracers and profilers do."""

    def step(*arguments: Any, **options: Any) -> Any:
        return torch.amp.GradScaler.step(*arguments, **options)


@pytest.mark.parametrize(
    ("cls", "fused"),
    [(torch.amp.GradScaler, False), (torch.amp.GradScaler, True), (WrappedScaler, False)],
    ids=["plain", "fused", "wrapped"],
)
def test_a_scaler_of_two_optimizers_makes_no_difference(
    cls: type[torch.amp.GradScaler], fused: bool
) -> None:
    """The scale doubles in each step, so sums over steps of scaled gradients would be wrong."""

    def run(scaler: torch.amp.GradScaler) -> tuple[Net, list[Tensor]]:
        seen: list[Tensor] = []

        @needs("gradient", "momentum")
        def grow(scores: BlockScores) -> Tensor:
            seen.extend([scores.gradient, scores.momentum])
            return scores.momentum

        model, sparsifier = make(16, grow=grow, drop="movement", update={"every_n_steps": 4})
        parts = nn.ModuleList([model.net[0]]), nn.ModuleList([model.net[2], model.head])
        optimizers = [AdamW(part.parameters(), lr=1e-2, fused=fused) for part in parts]
        sparsifier.attach(*optimizers)
        for number in range(16):
            scaler.scale(loss_of(model, number)).backward()
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()
            model.zero_grad()
        return model, seen

    growing = cls("cpu", init_scale=2.0, growth_interval=1)
    model, seen = run(growing)
    expected_model, expected = run(torch.amp.GradScaler("cpu", enabled=False))
    assert growing.get_scale() == 2.0**17 and len(seen) == 8
    assert_identical(seen, expected)
    assert_identical(dict(model.state_dict()), dict(expected_model.state_dict()))


@pytest.mark.parametrize(
    "order",
    [
        order
        for order in itertools.permutations(["model", "optimizer", "sparsifier"])
        if order.index("model") < order.index("sparsifier")
    ],
    ids=", ".join,
)
@pytest.mark.parametrize("cut", [4, 5])  # right after an update, when grown blocks are pending
def test_a_training_rolled_back_repeats_itself(order: tuple[str, ...], cut: int) -> None:
    """Earlier state dicts are loaded during the training, without detaching."""
    model, sparsifier = make(
        24, drop="movement", drop_fraction=0.5, update={"every_n_steps": 2, "until": 24}
    )
    parts = {"model": model, "optimizer": adamw(model.parameters()), "sparsifier": sparsifier}
    sparsifier.attach(parts["optimizer"])
    train(model, parts["optimizer"], range(cut))
    saved = copy.deepcopy({name: part.state_dict() for name, part in parts.items()})
    expected = train(model, parts["optimizer"], range(cut, 11))
    changed = {name: layer.topology.coords.clone() for name, layer in sparse(model).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in order:
            parts[name].load_state_dict(copy.deepcopy(saved[name]))
        assert any(
            (changed[n] != layer.topology.coords).any() for n, layer in sparse(model).items()
        )
        assert train(model, parts["optimizer"], range(cut, 11)) == expected


def rolled_back(**options: Any) -> tuple[Net, Sparsifier, Optimizer, Any]:
    """Return a training to which the model's state dict of its second step has been loaded."""
    model, sparsifier = make(24, drop="movement", update={"every_n_steps": 2, "until": 24})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer, **options)
    train(model, optimizer, range(2))
    saved = copy.deepcopy((model.state_dict(), sparsifier.state_dict()))
    train(model, optimizer, range(2, 8))
    model.load_state_dict(saved[0])
    return model, sparsifier, optimizer, saved[1]


def state_of_absent_blocks(model: Net, optimizer: Optimizer, before: dict[str, Tensor]) -> int:
    """Return in how many slots an optimizer has state of another block than the present one."""
    n = 0
    for name, layer in sparse(model).items():
        moment = optimizer.state[layer.values]["exp_avg"].flatten(1).any(1)
        n += int((moment & (before[name] != layer.topology.coords).any(1)).sum())
    return n


@pytest.mark.parametrize("then", ["load", "reattach", "save"])
def test_state_of_replaced_blocks_is_reset_whatever_follows(then: str) -> None:
    model, sparsifier, optimizer, saved = rolled_back()
    before = {n: layer._topology_before_load.coords for n, layer in sparse(model).items()}
    assert state_of_absent_blocks(model, optimizer, before) > 0
    if then == "load":
        sparsifier.load_state_dict(saved)
    elif then == "reattach":
        sparsifier.detach()
        sparsifier.attach(optimizer)
    with pytest.warns(UserWarning, match="A state dict replaced blocks"):
        optimizer.state_dict()
    assert state_of_absent_blocks(model, optimizer, before) == 0


def test_averages_follow_blocks_that_are_loaded() -> None:
    averaged: list[AveragedModel] = []

    def copies(name: str) -> list[BlockSparseLinear]:
        return [averaged[0].module.get_submodule(name)] if averaged else []

    model, _, optimizer, _ = rolled_back(copies=copies)
    averaged.append(AveragedModel(copy.deepcopy(model)))
    averaged[0].module.load_state_dict(make(24, seed=3)[0].state_dict())
    with pytest.warns(UserWarning, match="A state dict replaced blocks"):
        train(model, optimizer, [8])
    for name, layer in sparse(model).items():
        assert torch.equal(copies(name)[0].topology.coords, layer.topology.coords)


def test_gradients_of_replaced_blocks_are_not_applied() -> None:
    model, _ = make()
    saved = make(seed=1)[0].state_dict()
    loss_of(model, 0).backward()
    before = {name: layer.topology.coords.clone() for name, layer in sparse(model).items()}
    model.load_state_dict(saved)
    for name, layer in sparse(model).items():
        changed = (before[name] != layer.topology.coords).any(1)
        assert layer.values.grad is not None and changed.any()
        assert not layer.values.grad[changed].any() and layer.values.grad[~changed].any()


@pytest.mark.parametrize("case", ["before the first step", "no momentum", "added later"])
def test_nothing_is_said_where_no_state_was_reset(case: str) -> None:
    model, sparsifier = make(24)
    later = [*model.net[2].parameters()]
    held = [*model.net[0].parameters(), *([] if case == "added later" else later)]
    optimizer = SGD(held, lr=0.1) if case == "no momentum" else adamw(held)
    sparsifier.attach(optimizer)
    train(model, optimizer, range(0 if case == "before the first step" else 3))
    if case == "added later":
        model.net[2].load_state_dict(make(seed=1)[0].net[2].state_dict())
        train(model, optimizer, [3])
        optimizer.add_param_group({"params": later})
    else:
        model.load_state_dict(make(seed=1)[0].state_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        train(model, optimizer, range(4, 7))
    assert not [w for w in caught if "replaced blocks" in str(w.message)]


@pytest.mark.parametrize("is_second", [False, True], ids=["once", "twice"])
def test_blocks_loaded_without_their_optimizer_state_start_afresh(is_second: bool) -> None:
    model, sparsifier = make(24, drop="movement", update={"every_n_steps": 2, "until": 24})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(2))
    saved = copy.deepcopy(model.state_dict())
    train(model, optimizer, range(2, 8))
    layers = sparse(model)
    before = {name: layer.topology.coords.clone() for name, layer in layers.items()}
    state = copy.deepcopy(optimizer.state_dict()["state"])
    if is_second:  # the blocks of the latest step count
        model.load_state_dict(make(24, drop="movement", seed=1)[0].state_dict())
    model.load_state_dict(saved)
    handle = optimizer.register_step_pre_hook(
        lambda *_: seen.append(copy.deepcopy(optimizer.state))
    )
    seen: list[Any] = []
    with pytest.warns(UserWarning, match=r"replaced blocks .* net\.0, net\.2\. To keep"):
        train(model, optimizer, [8])
    handle.remove()
    for name, layer in layers.items():
        changed = (before[name] != layer.topology.coords).any(1)
        assert changed.any() and not changed.all()
        index = [id(p) for p in model.parameters()].index(id(layer.values))
        moment = [*seen[0].values()][index]["exp_avg"]
        assert not moment[changed].any()
        assert torch.equal(moment[~changed], state[index]["exp_avg"][~changed])
        assert (sparsifier._grown_at[name][changed] == 8).all()
    assert sparsifier._tracked[0].pending == {}, "the second moments were warm-started"
    train(model, optimizer, range(9, 24))
    assert_all_valid(model, optimizer, 8)


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
@pytest.mark.parametrize("drop", ["magnitude", "movement"])
def test_a_closure_makes_no_difference(drop: str, grow: str) -> None:
    def run(closed: bool) -> Net:
        model, sparsifier = make(drop=drop, grow=grow, density=FALLING, update={"every_n_steps": 3})
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        if not closed:
            train(model, optimizer, range(24))
            return model
        for number in range(24):

            def closure(number: int = number) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, number)
                loss.backward()
                return loss

            optimizer.step(closure)
        assert sparsifier.steps == 24
        return model

    assert_identical(dict(run(True).state_dict()), dict(run(False).state_dict()))


@pytest.mark.parametrize("micro", [2, 3])
def test_a_step_of_micro_batches_is_one(micro: int) -> None:
    rule = SeeingGradients()
    model, sparsifier = make(8, rule=rule, update={"every_n_steps": 4, "until": 8})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    expected: list[dict[str, Tensor]] = []
    for step in range(8):
        squares: dict[str, Tensor] = {}
        for number in range(micro * step, micro * (step + 1)):
            (loss_of(model, number) / micro).backward()
            x, y = batch(number)
            found = dense_norms(
                model, lambda net, x=x, y=y: nn.functional.cross_entropy(net(x), y) / micro
            )
            for name, norms in found.items():
                squares[name] = squares.get(name, torch.zeros(())) + norms.square()
        if step in (3, 7):
            expected.append({name: squared.sqrt() for name, squared in squares.items()})
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.steps == 8 and [r.step for r in rule.requests] == [4, 8]
    for request, layer_norms in zip(rule.requests, expected, strict=True):
        for name, scores in request.layers.items():
            torch.testing.assert_close(scores.gradient, layer_norms[name], rtol=1e-4, atol=1e-8)


# -- more than one optimizer ----------------------------------------------------------------------


@pytest.mark.parametrize("every", [2, 3, 4])
@pytest.mark.parametrize("first", ["net.0", "net.2"])
def test_optimizers_update_at_their_own_counts(first: str, every: int) -> None:
    """One optimizer steps in each batch, the other in each second, third or fourth."""
    (second,) = {"net.0", "net.2"} - {first}
    rule = Seeing()
    model, sparsifier = make(None, rule=rule, density={**FALLING, "until": 6}, update=EVERY_THIRD)
    often = adamw(model.get_submodule(first).parameters())
    seldom = SGD(
        [*model.get_submodule(second).parameters(), *model.head.parameters()], 0.1, momentum=0.9
    )
    sparsifier.attach(often, seldom)
    updates = updates_of(sparsifier)
    for number in range(10 * every):
        loss_of(model, number).backward()
        often.step()
        often.zero_grad()
        if number % every == every - 1:
            seldom.step()
            seldom.zero_grad()
    assert rule.by_layer() == {first: [3, 6, 9], second: [3, 6, 9]}
    assert [update.number for update in updates] == [1, 2, 3, 4, 5, 6]
    assert all(len(update.layers) == 1 for update in updates)
    assert [saved["steps"] for saved in sparsifier.state_dict()["courses"]] == [10 * every, 10]
    assert sparsifier.steps == 10 * every and blocks(model) == [8, 8]


EVERY_THIRD = {"every_n_steps": 3, "until": 9}


@pytest.mark.parametrize(
    "classes", [(AdamW, SGD), (SGD, AdamW)], ids=lambda classes: classes[0].__name__
)
@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
def test_a_layer_in_two_optimizers_has_both_states_reset(
    density: Any, classes: tuple[Any, Any]
) -> None:
    """The layer follows the first optimizer; both states follow the layer when it shrinks."""
    options = {AdamW: {"lr": 1e-2}, SGD: {"lr": 1e-2, "momentum": 0.9}}
    model, sparsifier = make(24, density=density, update={"every_n_steps": 4})
    one, two = (cls(model.parameters(), **options[cls]) for cls in classes)
    sparsifier.attach(one, two)
    reset = 0

    def look(_: Sparsifier, update: ModelUpdate) -> None:
        nonlocal reset
        for name, change in update.layers.items():
            layer = sparse(model)[name]
            for optimizer in (one, two):
                for tensor in optimizer.state[layer.values].values():
                    if tensor.dim() and density == 0.25:
                        assert not tensor[change.changed].any()
                        kept = torch.ones(len(tensor), dtype=torch.bool)
                        kept[change.changed] = False
                        assert tensor[kept].any()
            reset += len(change.changed)

    sparsifier.register_update_hook(look)
    for number in range(24):
        loss_of(model, number).backward()
        for optimizer in (one, two):
            optimizer.step()
            assert_all_valid(model, optimizer)
        one.zero_grad()
    assert reset > 0 and sparsifier.steps == 24 and sparsifier.n_updates == 5
    assert [len(layer.values) for layer in sparse(model).values()] == [8, 8]


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("generator_first", [True, False])
def test_what_a_critic_collects_for_its_generator_does_not_count(
    generator_first: bool, set_to_none: bool
) -> None:
    """The gradients of the critic are zeroed before its own step."""
    rule = SeeingGradients()
    critic, sparsifier = make(12, rule=rule, update={"every_n_steps": 3, "until": 12})
    generator = nn.Linear(8, 64)
    of_critic, of_generator = adamw(critic.parameters()), adamw(generator.parameters())
    sparsifier.attach(of_critic)
    expected: dict[int, dict[str, Tensor]] = {}

    def train_generator() -> None:
        of_generator.zero_grad(set_to_none)
        critic(generator(torch.randn(16, 8))).square().mean().backward()
        of_generator.step()

    for step in range(1, 13):
        if generator_first:
            train_generator()
        of_critic.zero_grad(set_to_none)
        x, y = batch(step)
        expected[step] = dense_norms(critic, lambda net, x=x, y=y: (net(x)[:, 0] - y).abs().mean())
        (critic(x)[:, 0] - y).abs().mean().backward()
        of_critic.step()
        if not generator_first:
            train_generator()
    assert rule.by_layer() == {"net.0": [3, 6, 9, 12], "net.2": [3, 6, 9, 12]}
    for request in rule.requests:
        for name, scores in request.layers.items():
            torch.testing.assert_close(
                scores.gradient, expected[request.step][name], rtol=1e-4, atol=1e-8
            )


# -- layers that wait -----------------------------------------------------------------------------


def without(model: Net, name: str, number: int) -> Tensor:
    """Return a loss that does not depend on the layer `name`."""
    x, y = batch(number)
    if name == "net.2":
        return nn.functional.cross_entropy(model.head(model.net[:2](x)[:, :64]), y)
    hidden = model.net[2:](torch.cat([x, x], 1))
    return nn.functional.cross_entropy(model.head(hidden), y)


@pytest.mark.parametrize("away", [1, 2, 4, 6])
@pytest.mark.parametrize("name", ["net.0", "net.2"])
def test_a_layer_without_a_gradient_waits_for_its_next_step_with_one(name: str, away: int) -> None:
    """It has no gradient for `away` steps from step 4 on, and is scored by the first one after."""
    rule = SeeingGradients()
    model, sparsifier = make(16, rule=rule, update={"every_n_steps": 4, "until": 16})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    before = masks(model)[name]
    seen = {}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for step in range(1, 17):
            is_away = 4 <= step < 4 + away
            x, y = batch(step)
            seen[step] = dense_norms(
                model, lambda net, x=x, y=y: nn.functional.cross_entropy(net(x), y)
            )
            loss = without(model, name, step) if is_away else loss_of(model, step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if is_away:
                assert torch.equal(masks(model)[name], before)
    (text,) = messages_with(warned, "not scored")
    assert "not scored at step 4, so their blocks stay until a step scores them. " in text
    assert f" No gradient of the loss that was applied: {name}." in text
    assert "not finite" not in text and "zero" not in text
    (other,) = {"net.0", "net.2"} - {name}
    late = [4 + away] if away != 4 else []  # otherwise it is due again then
    expected = sorted({*late, *(due for due in (4, 8, 12, 16) if not 4 <= due < 4 + away)})
    assert rule.by_layer() == {name: expected, other: [4, 8, 12, 16]}
    request = next(request for request in rule.requests if name in request.layers)
    torch.testing.assert_close(
        request.layers[name].gradient, seen[4 + away][name], rtol=1e-4, atol=1e-8
    )


class Gated(nn.Module):
    """A gated MLP without biases and with a residual connection, as in a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(32, 64, bias=False)
        self.up = nn.Linear(32, 64, bias=False)
        self.down = nn.Linear(64, 32, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return y


def test_layers_that_are_cut_off_are_named_with_a_remedy() -> None:
    """Their gradient exists, and is exactly zero: no output is live in both gate and up."""
    model = nn.Sequential(Gated(), Gated())
    sparsifier = Sparsifier(
        model, 4, block_size=16, density=0.25, update={"every_n_steps": 2, "until": 1.0}
    )
    for block in model:
        for layer, coords in (
            (block.gate, [[0, 0], [0, 1]]),
            (block.up, [[1, 0], [1, 1]]),
            (block.down, [[0, 2], [1, 3]]),
        ):
            layer.topology.assign_(torch.tensor(coords))
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    before = {name: layer.topology.mask for name, layer in sparsifier.layers.items()}
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.randn(8, 32)).square().mean().backward()
            optimizer.step()
    (text,) = messages_with(warned, "not scored at step 2")
    assert ("A gradient of exactly zero: 0.gate, 0.up, 0.down, 1.gate, 1.up, 1.down. ") in text
    assert "No gradient" not in text and "not finite" not in text
    assert "set a higher `density` or `layer_density`, or a smaller `block_size`" in text
    assert all(
        torch.equal(layer.topology.mask, before[name]) for name, layer in sparsifier.layers.items()
    )


def test_layers_that_are_cut_off_grow_the_blocks_that_connect_them() -> None:
    """Gate and up have gradients only at absent blocks, which are the ones to grow."""
    model = nn.Sequential(Gated())
    sparsifier = Sparsifier(
        model,
        4,
        block_size=16,
        density=0.25,
        drop_fraction=0.5,
        update={"every_n_steps": 2, "until": 1.0},
        floor={"row": 0, "column": 0},
    )
    (block,) = model
    block.gate.topology.assign_(torch.tensor([[0, 0], [0, 1]]))
    block.up.topology.assign_(torch.tensor([[1, 0], [1, 1]]))
    block.down.topology.assign_(torch.tensor([[0, 0], [1, 1]]))  # reads what both could compute
    optimizer = SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 32)).square().mean().backward()
            assert not block.gate.values.grad.any() and not block.up.values.grad.any()
            optimizer.step()
    live = block.gate.topology.mask.any(1) & block.up.topology.mask.any(1)
    assert live.tolist() == [True, True, False, False]
    (text,) = messages_with(warned, "not scored at step 2")
    assert "A gradient of exactly zero: 0.down." in text


def test_a_layer_that_never_comes_back_is_named_at_the_end() -> None:
    model, sparsifier = make(12, density=FALLING, update={"every_n_steps": 2})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    for number in range(12):
        without(model, "net.0", number).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert blocks(model) == [32, 8]
    with pytest.warns(UserWarning, match=r"density 0.625, where 0.250 .*not scored: net\.0\.$"):
        sparsifier.detach()


def test_a_layer_that_is_frozen_while_it_waits_is_left_alone() -> None:
    model, sparsifier = make(12, update={"every_n_steps": 4, "until": 12})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(3))
    with pytest.warns(UserWarning, match="not scored"):
        without(model, "net.2", 3).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.net[2].requires_grad_(False)
    train(model, optimizer, range(4, 12))
    assert [(u.step, [*u.layers]) for u in updates] == [
        (4, ["net.0"]),
        (8, ["net.0"]),
        (12, ["net.0"]),
    ]
    assert not model.net[2].armed


# -- user-defined rules ---------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [fewest, "tests.extensions.fewest"], ids=["function", "path"])
@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
def test_a_rule_that_is_a_function(density: Any, rule: Any) -> None:
    model, sparsifier = make(24, rule=rule, density=density, update={"every_n_steps": 4})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    first = masks(model)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(24))
    assert [update.step for update in updates] == [4, 8, 12, 16, 18]
    assert blocks(model) == [8, 8]
    for name, mask in masks(model).items():
        expected = torch.zeros(mask.numel(), dtype=torch.bool)
        expected[first[name].flatten().nonzero()[:8]] = True
        assert torch.equal(mask.flatten(), expected)


class Alternating:
    """Exchanges blocks at every second call only, and counts its calls in its state."""

    def __init__(self) -> None:
        self.calls = 0
        self.usual = DropAndGrow(magnitude, gradient, regrow=False)
        self.needs = self.usual.needs

    def __call__(self, request: UpdateRequest) -> Decision:
        self.calls += 1
        return self.usual(request) if self.calls % 2 == 0 else Decision({})

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.calls = state["calls"]


@pytest.mark.parametrize("cut", [2, 3, 7, 9])
def test_a_rule_that_has_a_state(cut: int) -> None:
    def start() -> tuple[Net, Sparsifier, Optimizer, Alternating]:
        rule = Alternating()
        model, sparsifier = make(
            12, rule=rule, drop_fraction=0.3, update={"every_n_steps": 3, "until": 12}
        )
        return model, sparsifier, adamw(model.parameters()), rule

    model, sparsifier, optimizer, rule = start()
    sparsifier.attach(optimizer)
    moved: list[bool] = []
    sparsifier.register_update_hook(
        lambda _, update: moved.append(
            any(len(layer_update.changed) for layer_update in update.layers.values())
        )
    )
    train(model, optimizer, range(cut))
    state = saved(model, optimizer, sparsifier)
    assert state["sparsifier"]["rule"] == {"calls": cut // 3}
    train(model, optimizer, range(cut, 12))
    assert rule.calls == 4 and moved == [False, True, False, True]
    other, resumed, its_optimizer, its_rule = start()
    load(state, other, its_optimizer, resumed)
    assert its_rule.calls == cut // 3
    resumed.attach(its_optimizer)
    train(other, its_optimizer, range(cut, 12))
    assert_identical(
        everything(other, [its_optimizer], resumed), everything(model, [optimizer], sparsifier)
    )


def no_decision(request: UpdateRequest) -> Any:
    return {name: scores.mask for name, scores in request.layers.items()}


def of_another_layer(request: UpdateRequest) -> Decision:
    return Decision({"net.7": torch.ones(8, 4, dtype=torch.bool)})


def without_a_block(request: UpdateRequest) -> Decision:
    return Decision({"net.0": torch.zeros(8, 4, dtype=torch.bool)})


def of_another_shape(request: UpdateRequest) -> Decision:
    return Decision({"net.0": torch.ones(4, 4, dtype=torch.bool)})


def of_too_many(request: UpdateRequest) -> Decision:
    return Decision(
        {name: torch.ones_like(layer_scores.mask) for name, layer_scores in request.layers.items()}
    )


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (no_decision, TypeError, r"`rule` must return a Decision; got dict"),
        (of_another_layer, ValueError, r"decide only on layers of the request; got 'net\.7'"),
        (without_a_block, ValueError, r"leave every layer at least one block.*layer 'net\.0'"),
        (of_another_shape, ValueError, r"`mask` must be bool \[8, 4\].*layer 'net\.0'"),
        (of_too_many, ValueError, r"`mask` must have at most 8 blocks.*got 32.*layer 'net\.0'"),
    ],
)
def test_an_invalid_decision_is_refused(rule: Any, error: Any, message: str) -> None:
    model, sparsifier = make(12, rule=rule, update={"every_n_steps": 4})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    before = masks(model)
    with pytest.raises(error, match=message):
        train(model, optimizer, range(12))
    assert sparsifier.steps == 4 and sparsifier.last_update is None
    assert_identical(masks(model), before)
    assert_all_valid(model, optimizer, 8)


@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
@pytest.mark.parametrize("resumed", [False, True])
def test_blocks_know_their_age_and_values(density: Any, resumed: bool) -> None:
    """Compared with grow steps recorded per grid position, across a checkpoint and shrinking."""
    births: dict[str, Tensor] = {}
    requested_at: list[int] = []

    def check(request: UpdateRequest) -> None:
        requested_at.append(request.step)
        for name, scores in request.layers.items():
            layer = sparse(held[0])[name]
            assert (scores.layer, scores.step) == (name, request.step)
            assert torch.equal(scores.mask, layer.topology.mask)
            born = births.setdefault(name, torch.zeros_like(scores.age))
            assert torch.equal(scores.age, (request.step - born) * scores.mask)
            places = scores.mask.nonzero()
            dense = layer.dense_weight().unflatten(0, (-1, 16)).unflatten(2, (-1, 16))
            assert torch.equal(scores.values, dense[places[:, 0], :, places[:, 1]])
            norms = torch.zeros(scores.mask.shape)
            norms[scores.mask] = scores.values.square().sum((1, 2)).sqrt()
            torch.testing.assert_close(scores.magnitude, norms)

    def rule(request: UpdateRequest) -> Decision:
        check(request)
        return usual(request)

    def follow(_: Sparsifier, update: ModelUpdate) -> None:
        for name, layer_update in update.layers.items():
            places = layer_update.coords[layer_update.grown].long()
            births[name][places[:, 0], places[:, 1]] = update.step

    usual = SparsityConfig(block_size=16, grow="random").update_rule

    def start() -> tuple[Net, Sparsifier, Optimizer]:
        model, sparsifier = make(
            24, rule=rule, density=density, drop_fraction=0.5, update={"every_n_steps": 2}
        )
        sparsifier.register_update_hook(follow)
        return model, sparsifier, SGD(model.parameters(), 0.1, momentum=0.9)

    model, sparsifier, optimizer = start()
    held = [model]
    sparsifier.attach(optimizer)
    train(model, optimizer, range(11))
    if resumed:
        state = saved(model, optimizer, sparsifier)
        model, sparsifier, optimizer = start()
        held = [model]
        load(state, model, optimizer, sparsifier)
        sparsifier.attach(optimizer)
    train(model, optimizer, range(11, 24))
    assert requested_at == [*range(2, 19, 2)]
    assert len({int(step) for born in births.values() for step in born.unique()}) > 3


# -- hooks ----------------------------------------------------------------------------------------


def test_update_hooks_are_called_after_the_update_and_can_be_removed() -> None:
    model, sparsifier = make(24, density=FALLING, update={"every_n_steps": 4})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    called: list[tuple[str, int]] = []

    def hook(who: Sparsifier, update: ModelUpdate) -> None:
        assert who is sparsifier and who.last_update is update
        assert (who.n_updates, who.steps) == (update.number, update.step)
        for name, layer_update in update.layers.items():
            topology = who.layers[name].topology
            assert topology.n_blocks == layer_update.n_after
            present = {tuple(pair) for pair in layer_update.coords.tolist() if pair[0] >= 0}
            assert {tuple(pair) for pair in topology.mask.nonzero().tolist()} == present
        assert_all_valid(model, optimizer)
        called.append(("first", update.step))
        if update.step == 18:
            # The memory has shrunk by now, too.
            assert [len(layer.values) for layer in who.layers.values()] == [8, 8]

    sparsifier.register_update_hook(hook)
    second = sparsifier.register_update_hook(
        lambda _, update: called.append(("second", update.step))
    )
    # A hook that was registered earlier still runs after the update.
    looked: list[tuple[int, float]] = []
    optimizer.register_step_post_hook(
        lambda *_: looked.append((sparsifier.steps, sparsifier.density))
    )
    train(model, optimizer, range(10))
    second.remove()
    train(model, optimizer, range(10, 24))
    assert called == [
        ("first", 4),
        ("second", 4),
        ("first", 8),
        ("second", 8),
        ("first", 12),
        ("first", 16),
        ("first", 18),
    ]
    assert looked[3] == (4, 0.75) and looked[11] == (12, 0.25)


def test_a_hook_that_raises_stops_no_other_hook_and_spoils_nothing() -> None:
    def run(raises: bool) -> tuple[Net, list[int]]:
        model, sparsifier = make(24, density=FALLING, grow="momentum", update={"every_n_steps": 4})
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        called: list[int] = []

        def fail(_: Sparsifier, update: ModelUpdate) -> None:
            if raises:
                raise LookupError(update.number)

        sparsifier.register_update_hook(fail)
        sparsifier.register_update_hook(lambda _, update: called.append(update.number))
        for number in range(24):
            with contextlib.suppress(LookupError):
                train(model, optimizer, [number])
            optimizer.zero_grad()
        return model, called

    model, called = run(raises=True)
    expected_model, expected = run(raises=False)
    assert called == expected == [*range(1, 6)]
    assert_identical(dict(model.state_dict()), dict(expected_model.state_dict()))


@pytest.mark.parametrize("rules", [{}, {"drop": "movement", "grow": "momentum"}])
@pytest.mark.parametrize("after", [3, 4, 9])
def test_detach_removes_all_hooks_and_locks(after: int, rules: dict[str, Any]) -> None:
    """After 3 steps layers are armed, since the next step has an update."""
    model, sparsifier = make(12, update={"every_n_steps": 4, "until": 12}, **rules)
    one = adamw(model.net[0].parameters())
    two = adamw([*model.net[2].parameters(), *model.head.parameters()])
    sparsifier.attach(one, two)
    for number in range(after):
        loss_of(model, number).backward()
        one.step()
        two.step()
        model.zero_grad()
    assert after != 3 or model.net[0].armed
    sparsifier.detach()
    sparsifier.detach()
    for optimizer in (one, two):
        assert not optimizer._optimizer_step_pre_hooks
        assert not optimizer._optimizer_step_post_hooks
    for layer in sparse(model).values():
        assert not layer.armed and not layer._is_locked and layer.block_norms.grad is None
        assert not layer.values._backward_hooks and not layer.block_norms._backward_hooks
    before, state = masks(model), sparsifier.state_dict()
    for number in range(after, 12):
        loss_of(model, number).backward()
        one.step()
        two.step()
        model.zero_grad()
    assert_identical(masks(model), before)
    assert [saved["steps"] for saved in state["courses"]] == [after, after]
    assert [saved["steps"] for saved in sparsifier.state_dict()["courses"]] == [after, after]
    assert sparsifier.steps == after


def test_steps_and_timetable_stay_after_detach() -> None:
    """They are those of the optimizer that holds layers, which need not be the first."""
    model, sparsifier = make(24, update={"every_n_steps": 4})
    head, body = adamw(model.head.parameters()), adamw(model.net.parameters())
    sparsifier.attach(head, body)
    for number in range(6):
        loss_of(model, number).backward()
        head.step()
        body.step()
        model.zero_grad()
    table = sparsifier.timetable
    assert sparsifier.steps == 6 and table is not None
    sparsifier.detach()
    assert sparsifier.steps == 6 and sparsifier.timetable == table


# -- saved and resumed ----------------------------------------------------------------------------


def saved(model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier) -> dict[str, Any]:
    """Return the states after saving to a file and loading with `weights_only`."""
    file = io.BytesIO()
    state = {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "sparsifier": sparsifier.state_dict(),
    }
    torch.save(state, file)
    file.seek(0)
    read: dict[str, Any] = torch.load(file, weights_only=True)
    return read


def load(
    state: dict[str, Any], model: nn.Module, optimizer: Optimizer, sparsifier: Sparsifier
) -> None:
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    sparsifier.load_state_dict(state["sparsifier"])


RESUMED: dict[str, dict[str, Any]] = {
    "rigl": {},
    "momentum": {"drop": "saliency", "grow": "momentum"},
    "movement": {"drop": "movement", "grow": "random", "distribution": "erdos_renyi"},
    "global": {"drop": "saliency", "grow": "none", "distribution": "global"},
    "kept": {"shrink": False, "drop": "gradient", "regrow": False},
}


# 4: right before an update; 5: right after it; 10: after shrinking; 18: after the last update.
@pytest.mark.parametrize("cut", [1, 4, 5, 8, 10, 13, 17, 18, 21])
@pytest.mark.parametrize("rules", RESUMED)
def test_it_resumes_bit_for_bit(rules: str, cut: int) -> None:
    def start() -> tuple[Net, Sparsifier, Optimizer]:
        model, sparsifier = make(24, density=FALLING, update=EVERY_FIFTH, **RESUMED[rules])
        # Its momentum and its second moments have to follow the blocks.
        return model, sparsifier, adamw(model.parameters())

    model, sparsifier, optimizer = start()
    sparsifier.attach(optimizer)
    train(model, optimizer, range(cut))
    state = saved(model, optimizer, sparsifier)
    slots = [len(layer.values) for layer in sparse(model).values()]
    assert (cut >= 10 and rules != "kept") == (sum(slots) < 64)
    losses = train(model, optimizer, range(cut, 24))
    other, resumed, its_optimizer = start()
    load(state, other, its_optimizer, resumed)
    resumed.attach(its_optimizer)
    assert [len(layer.values) for layer in sparse(other).values()] == slots
    assert train(other, its_optimizer, range(cut, 24)) == losses
    assert_identical(
        everything(other, [its_optimizer], resumed), everything(model, [optimizer], sparsifier)
    )
    assert resumed.n_updates == 4 and resumed.density == 0.25


EVERY_FIFTH = {"every_n_steps": 5}


@pytest.mark.parametrize("cut", [4, 5, 6])
def test_waiting_layers_resume(cut: int) -> None:
    """The state is saved before, at and after the update that the layer missed."""

    def start() -> tuple[Net, Sparsifier, Optimizer]:
        model, sparsifier = make(16, update={"every_n_steps": 5, "until": 15})
        return model, sparsifier, adamw(model.parameters())

    def go(model: Net, optimizer: Optimizer, numbers: Iterable[int]) -> None:
        for number in numbers:
            away = number in (4, 5)
            (without(model, "net.2", number) if away else loss_of(model, number)).backward()
            optimizer.step()
            optimizer.zero_grad()

    model, sparsifier, optimizer = start()
    sparsifier.attach(optimizer)
    steps = updates_of(sparsifier)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(model, optimizer, range(cut))
        state = saved(model, optimizer, sparsifier)
        waiting = state["sparsifier"]["courses"][0]["waiting"]
        assert waiting == ([] if cut == 4 else ["net.2"])
        go(model, optimizer, range(cut, 16))
        assert [(u.step, [*u.layers]) for u in steps][:2] == [(5, ["net.0"]), (7, ["net.2"])]
        other, resumed, its_optimizer = start()
        load(state, other, its_optimizer, resumed)
        resumed.attach(its_optimizer)
        go(other, its_optimizer, range(cut, 16))
    assert_identical(
        everything(other, [its_optimizer], resumed), everything(model, [optimizer], sparsifier)
    )


@pytest.mark.parametrize("cut", [3, 6, 9])
def test_several_optimizers_resume(cut: int) -> None:
    def start() -> tuple[Net, Sparsifier, list[Optimizer]]:
        model, sparsifier = make(
            None, density={**FALLING, "until": 4}, update={"every_n_steps": 2, "until": 6}
        )
        rest = [*model.net[2].parameters(), *model.head.parameters()]
        return model, sparsifier, [adamw(model.net[0].parameters()), SGD(rest, 0.1, momentum=0.9)]

    def go(model: Net, optimizers: list[Optimizer], numbers: Iterable[int]) -> None:
        for number in numbers:
            loss_of(model, number).backward()
            optimizers[0].step()
            optimizers[0].zero_grad()
            if number % 2:
                optimizers[1].step()
                optimizers[1].zero_grad()

    model, sparsifier, optimizers = start()
    sparsifier.attach(*optimizers)
    # Gradients accumulated for a step that is not taken yet are in no state.
    cut -= cut % 2
    go(model, optimizers, range(cut))
    state = copy.deepcopy(
        [model.state_dict(), sparsifier.state_dict(), *(o.state_dict() for o in optimizers)]
    )
    go(model, optimizers, range(cut, 16))
    other, resumed, its_optimizers = start()
    other.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    for optimizer, saved_state in zip(its_optimizers, state[2:], strict=True):
        optimizer.load_state_dict(saved_state)
    resumed.attach(*its_optimizers)
    go(other, its_optimizers, range(cut, 16))
    assert_identical(
        everything(other, its_optimizers, resumed), everything(model, optimizers, sparsifier)
    )
    assert blocks(other) == [8, 8]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block_size": 32}, r"block_size=32 \(was 16\)"),
        ({"density": 0.5}, r"density\.initial=0\.5 \(was 0\.25\), density\.final=0\.5"),
        ({"drop": "movement"}, r"drop='\S*movement' \(was '\S*magnitude'\)"),
        ({"grow": "none"}, r"grow='none' \(was 'gradient'\)"),
        ({"update": {"every_n_steps": 3}}, r"update\.every_n_steps=3 \(was 5\)"),
        ({"drop_fraction": 0.1}, r"drop_fraction\.final=0\.1 \(was 0\.0\)"),
        ({"rule": fewest}, r"rule='tests\.extensions\.fewest' \(was None\)"),
        ({"seed": 3, "regrow": False}, r"regrow=False \(was True\), seed=3 \(was 0\)"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_configuration_is_refused_naming_the_key(
    change: dict[str, Any], message: str
) -> None:
    model, sparsifier = make(24, update=EVERY_FIFTH)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(7))
    _, other = make(24, **{"update": EVERY_FIFTH, **change})
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"configured as before.*; got .*" + message):
        other.load_state_dict(sparsifier.state_dict())
    assert_identical(str(other.state_dict()), str(before))


@pytest.mark.parametrize("key", ["config", "courses", "born", "gathered"])
def test_the_state_of_another_version_is_refused(key: str) -> None:
    _, sparsifier = make()
    state = {name: value for name, value in sparsifier.state_dict().items() if name != key}
    with pytest.raises(ValueError, match=rf"must hold '{key}'; got none.*the version"):
        make()[1].load_state_dict(state)


# -- the length of a training ---------------------------------------------------------------------

WHOLE: dict[str, Any] = {
    "density": {"schedule": "linear", "initial": 1.0, "final": 0.25, "until": 1.0},
    "update": {"every_n_steps": 5, "until": 1.0},
}


@pytest.mark.parametrize(("known_from", "total"), [(1, 6), (6, 13), (9, 10), (12, 13), (13, 18)])
@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi", "global"])
def test_the_density_arrives_at_the_last_step_of_a_shorter_training(
    distribution: str, known_from: int, total: int
) -> None:
    """24 steps were planned; from step `known_from` on, `planned` returns fewer."""
    model, sparsifier = make(24, distribution=distribution, **WHOLE)
    optimizer = adamw(model.parameters())
    requested_at: list[int] = []

    def planned(stepped: Optimizer, steps: int) -> int:
        assert stepped is optimizer
        requested_at.append(steps)
        return 24 if steps < known_from else total

    sparsifier.attach(optimizer, planned=planned)
    densities: list[float] = []
    train(model, optimizer, range(total), lambda _: densities.append(sparsifier.density))
    assert requested_at == [*range(1, total + 1)]
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 0.25 < densities[-2]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.detach()


@pytest.mark.parametrize(("known_from", "total"), [(1, 24), (4, 14), (11, 24)])
def test_a_longer_training_moves_the_rest_of_the_schedule(known_from: int, total: int) -> None:
    """12 steps were planned; the density never rises again."""
    model, sparsifier = make(12, **WHOLE)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer, planned=lambda _, steps: 12 if steps < known_from else total)
    densities: list[float] = []
    train(model, optimizer, range(total), lambda _: densities.append(sparsifier.density))
    assert densities == sorted(densities, reverse=True)
    assert densities[-1] == 0.25 < densities[-2]


@pytest.mark.parametrize("stop", [4, 9, 17])
def test_a_training_that_stopped_early_warns(stop: int) -> None:
    model, sparsifier = make(
        24, density={**FALLING, "until": 18}, update={"every_n_steps": 3, "until": 18}
    )
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(stop))
    optimizer.step()  # without a gradient
    reached = f"{sparsifier.density:.3f}"
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sparsifier.detach()
        sparsifier.detach()
    (text,) = messages_with(warned, "The training has ended")
    assert f"at density {reached}, where 0.250 was asked for" in text
    assert text.endswith(
        f": {stop} steps were taken, and 1 more did not count, where the schedule takes 18."
    )


@pytest.mark.parametrize("rules", [{}, {"drop": "saliency", "grow": "momentum"}])
@pytest.mark.parametrize("lost", [[0], [5, 6], [10, 11, 12], [19], [22, 23], [*range(0, 24, 2)]])
def test_steps_without_gradients_reduce_the_planned_steps(
    lost: list[int], rules: dict[str, Any]
) -> None:
    """The density arrives at the last counted step, and each layer is scored in time."""
    model, sparsifier = make(24, **WHOLE, **rules)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Block-sparse layers were not scored")
        for number in range(24):
            if number in lost:
                optimizer.zero_grad()
                optimizer.step()
            else:
                train(model, optimizer, [number])
    taken = 24 - len(lost)
    assert sparsifier.steps == taken
    # If the last planned step is lost, it is too late for an update.
    if 23 not in lost:
        assert updates[-1].step == taken and sparsifier.density == 0.25
    else:
        assert updates[-1].step == 20 and sparsifier.density > 0.25


@pytest.mark.parametrize("steps", [12, 24])
def test_a_complete_training_does_not_warn(steps: int) -> None:
    model, sparsifier = make(24, density=FALLING, update={"every_n_steps": 3})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(steps))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.detach()


@pytest.mark.parametrize("frozen", ["net.0", "net.2"])
@pytest.mark.parametrize("held", [True, False])
def test_a_frozen_layer_keeps_its_blocks_under_erdos_renyi(held: bool, frozen: str) -> None:
    """The other layer gets its own budget, and `detach` names the frozen one."""
    model, sparsifier = make(
        24, density=FALLING, distribution="erdos_renyi", update={"every_n_steps": 3}
    )
    layer = model.get_submodule(frozen)
    layer.requires_grad_(False)
    mask, values = masks(model)[frozen], layer.values.detach().clone()  # type: ignore[operator]
    optimizer = adamw(
        model.parameters() if held else [p for p in model.parameters() if p.requires_grad]
    )
    sparsifier.attach(optimizer)
    sparsifier.check_all_held()
    updates = updates_of(sparsifier)
    train(model, optimizer, range(24))
    (other,) = {"net.0", "net.2"} - {frozen}
    assert all([*update.layers] == [other] for update in updates) and len(updates) == 6
    grids = {n: m.topology.grid for n, m in sparse(model).items()}
    budgets = sparsifier.config.budgets(grids).at(1.0)
    assert sparse(model)[other].topology.n_blocks == budgets[other] < 32
    assert torch.equal(masks(model)[frozen], mask)
    assert torch.equal(sparse(model)[frozen].values, values)
    reached = (32 + budgets[other]) / 64
    message = rf"density {reached:.3f}, where 0\.250 .*frozen, in no optimizer.*: {frozen}\.$"
    with pytest.warns(UserWarning, match=message):
        sparsifier.detach()


@pytest.mark.parametrize("late", [7, 8, 9])
@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
@pytest.mark.parametrize("rules", [{}, {"drop": "movement", "grow": "momentum"}])
def test_a_layer_added_to_the_optimizer_later_evolves(
    rules: dict[str, Any], density: Any, late: int
) -> None:
    model, sparsifier = make(
        24, density=density, drop_fraction=0.5, regrow=False, update={"every_n_steps": 4}, **rules
    )
    model.net[0].requires_grad_(False)
    optimizer = adamw([p for p in model.parameters() if p.requires_grad])
    sparsifier.attach(optimizer)
    updates = updates_of(sparsifier)
    train(model, optimizer, range(late))
    assert all([*update.layers] == ["net.2"] for update in updates)
    model.net[0].requires_grad_(True)
    optimizer.add_param_group({"params": [*model.net[0].parameters()]})
    with warnings.catch_warnings():
        warnings.simplefilter("error" if late != 7 else "ignore")
        train(model, optimizer, range(late, 24), lambda _: assert_all_valid(model, optimizer))
    both = {update.step: [*update.layers] for update in updates if update.step > 9}
    assert both == {12: ["net.0", "net.2"], 16: ["net.0", "net.2"], 18: ["net.0", "net.2"]}
    assert sum(len(u.layers["net.0"].changed) for u in updates if u.step > 9) > 0
    assert blocks(model) == [8, 8]


@pytest.mark.parametrize(
    ("every", "warns"), [(1, False), (4, False), (8, False), (10, True), (12, True)]
)
def test_an_update_that_drops_more_than_half_warns_in_advance(every: int, warns: bool) -> None:
    model, sparsifier = make(24, density=FALLING, update={"every_n_steps": every})
    optimizer = adamw(model.parameters())
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        sparsifier.attach(optimizer)
        sparsifier.attach(optimizer)
    texts = messages_with(warned, "One topology update")
    assert len(texts) == warns
    held = [64]
    sparsifier.register_update_hook(lambda *_: held.append(sum(blocks(model))))
    train(model, optimizer, range(24))
    falls = [1 - after / before for before, after in itertools.pairwise(held)]
    assert (max(falls) > 0.5) == warns
    if warns:
        assert f"drops {max(falls):.0%} of the blocks" in texts[0]


# -- dtypes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_are_fp32_whatever_the_default(default: torch.dtype) -> None:
    """The training is the same, bit for bit."""

    def run(default: torch.dtype) -> tuple[Net, Seeing]:
        rule = Seeing()
        model = Net()
        x = [batch(number)[0] for number in range(12)]
        before = torch.get_default_dtype()
        torch.set_default_dtype(default)
        try:
            sparsifier = Sparsifier(
                model,
                12,
                block_size=16,
                exclude=["head"],
                rule=rule,
                density=FALLING,
                update={"every_n_steps": 2},
            )
            optimizer = adamw(model.parameters())
            sparsifier.attach(optimizer)
            for number in range(12):
                target = (x[number][:, :4] * 3).argmax(1)
                nn.functional.cross_entropy(model(x[number]), target).backward()
                optimizer.step()
                optimizer.zero_grad()
            sparsifier.detach()
        finally:
            torch.set_default_dtype(before)
        return model, rule

    (model, rule), (plain, seen) = run(default), run(torch.float32)
    assert len(rule.requests) == len(seen.requests) == 5
    for ours, theirs in zip(rule.requests, seen.requests, strict=True):
        for name, scores in ours.layers.items():
            same: BlockScores = theirs.layers[name]
            for tensor, other in [
                (scores.magnitude, same.magnitude),
                *((scores.gathered[need], same.gathered[need]) for need in scores.gathered),
            ]:
                assert tensor.dtype == torch.float32 and torch.equal(tensor, other)
            assert scores.age.dtype == torch.int32 and scores.mask.dtype == torch.bool
    assert_identical(dict(model.state_dict()), dict(plain.state_dict()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_scores_are_fp32_whatever_the_weights(dtype: torch.dtype) -> None:
    rule = Seeing()
    model = Net().to(dtype)
    sparsifier = Sparsifier(
        model, 12, block_size=16, exclude=["head"], rule=rule, update={"every_n_steps": 3}
    )
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    for number in range(12):
        x, y = batch(number)
        nn.functional.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [request.step for request in rule.requests] == [3, 6, 9]
    for request in rule.requests:
        for scores in request.layers.values():
            assert scores.magnitude.dtype == torch.float32 and scores.values.dtype == dtype
            assert all(tensor.dtype == torch.float32 for tensor in scores.gathered.values())
    assert all(isinstance(layer, BlockSparseLinear) for layer in sparsifier.layers.values())


# -- interaction with other code ------------------------------------------------------------------


def test_a_hook_that_throws_gradients_away_hides_no_step() -> None:
    model, sparsifier = make(24, density=FALLING, update={"every_n_steps": 4})
    optimizer = adamw(model.parameters())
    optimizer.register_step_post_hook(lambda it, *_: it.zero_grad())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(24))
    assert sparsifier.steps == 24 and sparsifier.density == 0.25


def test_a_layer_is_evolved_by_one_at_a_time() -> None:
    model, first = make(24)
    optimizer = adamw(model.parameters())
    first.attach(optimizer)
    second = Sparsifier(model, 24, block_size=16, exclude=["head"])
    with pytest.raises(RuntimeError, match=r"one Sparsifier at a time.*'net.0'.*Call `detach\(\)`"):
        second.attach(optimizer)
    assert model.net[0]._is_locked, "the first sparsifier is still attached"
    first.detach()
    second.attach(optimizer)


def test_earlier_optimizers_stay_attached_if_another_attach_fails() -> None:
    model, sparsifier = make(24)
    first = adamw(model.net[0].parameters())
    sparsifier.attach(first)
    with pytest.raises(ValueError, match="LBFGS"):
        sparsifier.attach(torch.optim.LBFGS(model.net[2].parameters()))
    loss_of(model, 0).backward()
    first.step()
    assert sparsifier.steps == 1


def test_a_training_that_took_no_step_leaves_no_schedule() -> None:
    model, sparsifier = make(8, density=FALLING, update={"every_n_steps": 2})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    sparsifier.detach()
    sparsifier.total_steps = 80
    sparsifier.attach(optimizer)
    assert sparsifier.timetable is not None and sparsifier.timetable.density_until == 40


def test_a_replaced_parameter_list_is_noticed() -> None:
    """Training code that unfreezes layers one after the other replaces the list."""
    model, sparsifier = make(24, update={"every_n_steps": 2})
    first, second = model.net[0], model.net[2]
    optimizer = adamw(first.parameters())
    sparsifier.attach(optimizer)
    with pytest.warns(UserWarning, match="in no optimizer"):
        train(model, optimizer, range(4))
    optimizer.param_groups[0]["params"] = list(second.parameters())
    updated: list[str] = []
    sparsifier.register_update_hook(lambda _, update: updated.extend(update.layers))
    train(model, optimizer, range(4, 8))
    assert sparsifier.steps == 8 and set(updated) == {"net.2"}


@pytest.mark.parametrize("make_copy", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_the_model_are_no_part_of_the_training(make_copy: Any) -> None:
    model, sparsifier = make(24, update={"every_n_steps": 2})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(1))
    loss_of(model, 1).backward()
    assert model.net[0].armed and model.net[0]._is_locked
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = make_copy(model)
    loss_of(other, 2).backward()
    for layer in sparse(other).values():
        assert not layer.armed and not layer._is_locked and layer.block_norms.grad is None
    optimizer.step()
    assert sparsifier.last_update is not None, "the training continues"


@pytest.mark.parametrize("n_steps", [0, 2.5, True, None, "8"])
def test_an_invalid_planned_number_is_refused(n_steps: Any) -> None:
    model, sparsifier = make(24)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer, planned=lambda *_: n_steps)
    with pytest.raises(ValueError, match=r"`planned` must return an integer of at least 1.*; got"):
        train(model, optimizer, range(2))


@pytest.mark.parametrize("argument", ["rewrap", "copies", "planned", "shrink"])
def test_arguments_of_attach_are_checked(argument: str) -> None:
    model, sparsifier = make(24)
    with pytest.raises(TypeError, match=rf"`{argument}` must be .*; got 'yes'"):
        sparsifier.attach(adamw(model.parameters()), **{argument: "yes"})
    assert not model.net[0]._is_locked


@pytest.mark.parametrize("declared", ["gradient", ("gradients",), 3])
def test_a_rule_that_needs_what_is_not_offered_is_refused_before_the_swap(declared: Any) -> None:
    def rule(request: UpdateRequest) -> Decision:
        return Decision({})

    rule.needs = declared  # type: ignore[attr-defined]
    model = Net()
    with pytest.raises(ValueError, match=r"`needs` must name what can be gathered, 'gradient'"):
        Sparsifier(model, 24, block_size=16, rule=rule)
    assert not sparse(model)


def test_a_training_without_a_counted_step_warns() -> None:
    model, sparsifier = make(24, density=FALLING)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    for _ in range(3):
        optimizer.step()
    with pytest.warns(UserWarning, match=r"density 1\.000, where 0\.250 was asked for"):
        sparsifier.detach()


def test_a_sparsifier_that_was_never_attached_warns() -> None:
    model, sparsifier = make(4)
    train(model, adamw(model.parameters()), range(4))
    with pytest.warns(UserWarning, match=r"never attached to an optimizer.*Call `attach"):
        sparsifier.detach()


def test_a_mistyped_option_suggests_the_right_one() -> None:
    with pytest.raises(TypeError, match=r"no option 'block_sise' \(did you mean 'block_size'\?\)"):
        Sparsifier(Net(), 4, block_sise=16)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"density": {"schedule": lambda p: p}},
            r"`density.schedule` must be a function that works",
        ),
        ({"distribution": lambda *_: 1 / 0}, r"`distribution` must be .*ZeroDivisionError"),
        ({"update": {"times": lambda: []}}, r"`update.times` must be .*TypeError"),
        ({"rule": lambda request: {}["x"]}, r"`rule` must be .*KeyError: 'x'"),
        ({"drop": lambda scores: scores.x}, r"`drop` must be .*has no attribute 'x'.*'net.0'"),
    ],
)
def test_an_error_in_a_user_function_names_the_option(options: Any, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        model, sparsifier = make(8, **{"update": {"every_n_steps": 2}, **options})
        optimizer = adamw(model.parameters())
        sparsifier.attach(optimizer)
        train(model, optimizer, range(8))


@pytest.mark.parametrize("kept", [{1, 2}, object()])
def test_a_rule_state_that_is_no_data_is_refused(kept: Any) -> None:
    class Rule(Seeing):
        def state_dict(self) -> dict[str, Any]:
            return {"kept": [kept]}

        def load_state_dict(self, state: Any) -> None: ...

    with pytest.raises(
        TypeError, match=r"`rule.state_dict\(\)` must return tensors and primitives"
    ):
        make(4, rule=Rule())


def test_a_rule_state_that_cannot_be_loaded_is_refused() -> None:
    class Rule(Seeing):
        def state_dict(self) -> dict[str, Any]:
            return {}

    with pytest.raises(ValueError, match="both `state_dict` and `load_state_dict`, or neither"):
        make(4, rule=Rule())


def test_an_update_has_a_one_line_repr() -> None:
    model, sparsifier = make(4, update={"every_n_steps": 2})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(2))
    shown = repr(sparsifier.last_update)
    assert shown.startswith(
        "ModelUpdate(step=2, number=1, layers={'net.0': TopologyUpdate(blocks=8 -> 8"
    )
    assert "tensor" not in shown
