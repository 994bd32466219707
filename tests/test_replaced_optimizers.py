"""Optimizers that are not attached are named in a warning, or replace attached ones."""

from __future__ import annotations

import copy
import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks

from tests.loops import FALLING, Net, adamw, loss_of, make, masks, sparse, train


def warnings_of(call: Callable[[], Any]) -> list[str]:
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        call()
    return [str(each.message) for each in warned]


@pytest.mark.parametrize("steps", [0, 5])
@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
def test_an_optimizer_that_steps_the_layers_unattached_is_named_once(
    density: Any, steps: int
) -> None:
    model, sparsifier = make(24, density=density, update={"every_n_steps": 2})
    first = adamw(model.parameters())
    sparsifier.attach(first)
    train(model, first, range(steps))
    for n_times in (1, 0):  # the second optimizer causes no further warning
        other = Adam(model.parameters())
        texts = warnings_of(lambda stepped=other: train(model, stepped, range(3)))  # type: ignore[misc]
        assert (
            sum("not attached: net.0, net.2. " in text for text in texts) == n_times == len(texts)
        )
    assert sparsifier.steps == steps
    sparsifier.detach()
    sparsifier.attach(other)
    assert not warnings_of(lambda: train(model, other, range(3)))
    assert sparsifier.steps == steps + 3


def test_an_optimizer_that_steps_besides_the_attached_one_is_named() -> None:
    model, sparsifier = make(24)
    optimizer, beside = adamw(model.parameters()), SGD(model.net[2].parameters(), lr=1e-3)
    sparsifier.attach(optimizer)
    optimizer.register_step_post_hook(lambda *_: beside.step())
    (text,) = warnings_of(lambda: train(model, optimizer, range(3)))
    assert "SGD, an optimizer that is not attached: net.2. " in text


class Around(Optimizer):
    """Wraps optimizers and has state of its own, as Lookahead and SAM do."""

    def __init__(self, inner: Any) -> None:
        first = inner[0] if isinstance(inner, list) else inner
        super().__init__(first.param_groups, {})
        self.inner = inner

    def step(self, closure: Any = None) -> None:
        for each in self.inner if isinstance(self.inner, list) else [self.inner]:
            each.step()


AROUND: dict[str, Callable[[Optimizer], Optimizer]] = {
    "one": Around,
    "two": lambda optimizer: Around(Around(optimizer)),
    "in a list": lambda optimizer: Around([optimizer]),
}


@pytest.mark.parametrize("around", AROUND)
def test_a_wrapper_of_the_attached_optimizer_is_not_named(around: str) -> None:
    model, sparsifier = make(24, update={"every_n_steps": 2})
    optimizer = adamw(model.parameters())
    outer = AROUND[around](optimizer)
    sparsifier.attach(optimizer)
    assert not warnings_of(lambda: train(model, outer, range(6)))
    assert sparsifier.steps == 6


def test_optimizers_of_other_parameters_are_not_named() -> None:
    model, sparsifier = make(24)
    optimizer, of_head = adamw(model.net.parameters()), adamw(model.head.parameters())
    sparsifier.attach(optimizer)
    other, frozen = Net(), adamw(model.parameters())
    of_other = adamw(other.parameters())

    def steps() -> None:
        train(model, optimizer, range(2))
        train(model, of_head, range(2))
        train(other, of_other, range(2))
        model.zero_grad()
        frozen.step()  # nothing has a gradient

    assert not warnings_of(steps)
    sparsifier.detach()
    assert not warnings_of(lambda: train(model, frozen, range(2)))


def of_a_copy(model: Net) -> Optimizer:
    return adamw(copy.deepcopy(model).parameters())


@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
@pytest.mark.parametrize("make_optimizer", [of_a_copy, lambda model: adamw(model.parameters())])
def test_detach_warns_if_no_step_was_seen(
    density: Any, make_optimizer: Callable[[Net], Optimizer]
) -> None:
    model, sparsifier = make(24, density=density)
    sparsifier.attach(make_optimizer(model))
    (text,) = warnings_of(sparsifier.detach)
    assert "No step was seen" in text and "AdamW" in text
    # The same holds after an earlier training that took steps.
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(24))
    assert not warnings_of(sparsifier.detach)
    sparsifier.attach(make_optimizer(model))
    assert len(warnings_of(sparsifier.detach)) == 1


def test_detach_does_not_warn_if_no_step_can_be_expected() -> None:
    model, sparsifier = make(24, update={"every_n_steps": 4})
    optimizer = adamw(model.parameters())

    def fails() -> None:
        sparsifier.attach(optimizer)
        try:
            raise KeyError
        except KeyError:
            sparsifier.detach()

    assert not warnings_of(fails)
    model.net.requires_grad_(False)
    sparsifier.attach(optimizer)
    assert not warnings_of(sparsifier.detach)


@pytest.mark.parametrize("density", [0.25, FALLING], ids=["constant", "falling"])
def test_replacing_optimizers_continue_the_schedule(density: Any) -> None:
    """SGD has no state, so the training equals one with a single optimizer."""
    trained = []
    for is_exchanged in (False, True):
        model, sparsifier = make(24, density=density, grow="momentum", update={"every_n_steps": 3})
        optimizer = SGD(model.parameters(), lr=0.1)
        sparsifier.attach(optimizer)
        for number in range(24):
            if is_exchanged:
                before, optimizer = optimizer, SGD(model.parameters(), lr=0.1)
                assert sparsifier.replace_optimizers([before], [optimizer])
                assert not sparsifier.replace_optimizers([optimizer], [optimizer, optimizer])
                assert not before._optimizer_step_post_hooks
            train(model, optimizer, [number])
        assert not warnings_of(sparsifier.detach)
        trained.append((sparsifier, model))
    (one, first), (other, second) = trained
    assert one.steps == other.steps == 24 and one.n_updates == other.n_updates > 3
    for name, layer in sparse(first).items():
        assert torch.equal(layer.values, sparse(second)[name].values)
    assert all(torch.equal(masks(first)[name], mask) for name, mask in masks(second).items())


def test_more_or_fewer_optimizers_may_replace_others() -> None:
    model, sparsifier = make(24, density=FALLING, update={"every_n_steps": 2})
    one = adamw(model.parameters())
    by_hand = SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    sparsifier.attach(one, by_hand)
    train(model, one, range(8))
    reached = sparsifier.density
    two = [adamw(model.net[0].parameters()), adamw(model.net[2].parameters())]
    sparsifier.replace_optimizers([one], two)
    densities = []
    for number in range(8, 14):
        loss_of(model, number).backward()
        for each in two:
            each.step()
        densities.append(sparsifier.density)
        model.zero_grad()
    falling = [reached, *densities]
    assert 0.25 < reached < 1 and falling == sorted(falling, reverse=True)
    assert sparsifier.density == 0.25 and sparsifier.is_final
    assert by_hand._optimizer_step_post_hooks  # it is in neither list
    with pytest.warns(UserWarning, match=r"reset for: net\.0, net\.2\."):
        sparsifier.replace_optimizers(two, [one])  # its layers have shrunk since
    train(model, one, range(14, 24))
    assert sparsifier.steps == 24
    assert not warnings_of(sparsifier.detach)


def test_the_global_hook_exists_while_a_sparsifier_is_attached() -> None:
    gc.collect()
    before = dict(_global_optimizer_post_hooks)
    (first, one), (second, other) = make(24), make(24)
    for model, sparsifier in ((first, one), (second, other)):
        sparsifier.attach(adamw(model.parameters()))
    assert len(_global_optimizer_post_hooks) <= len(before) + 1
    warnings_of(one.detach)
    stranger = Adam(second.parameters())
    (text,) = warnings_of(lambda: train(second, stranger, range(2)))
    assert "not attached: net.0" in text
    warnings_of(other.detach)
    assert dict(_global_optimizer_post_hooks).keys() <= before.keys()


def test_a_sparsifier_that_was_never_detached_is_collected() -> None:
    import weakref

    model, sparsifier = make(24)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    known = weakref.ref(sparsifier), weakref.ref(model), weakref.ref(optimizer)
    train(model, optimizer, range(2))
    del model, sparsifier, optimizer
    gc.collect()
    assert [each() for each in known] == [None] * 3
