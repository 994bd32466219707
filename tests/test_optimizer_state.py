"""Optimizer state of dropped and grown slots: it starts anew, and no grown block jumps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_lightning.optimizer_state import (
    STATE_RULES,
    StateRule,
    find_optimizer,
    reset_slots,
    state_rule,
    warm_start,
)

LR = 1e-3

ADAMS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "adam": (Adam, {}),
    "adamw": (AdamW, {"weight_decay": 0.0}),
    "adam amsgrad": (Adam, {"amsgrad": True}),
    "adamw amsgrad": (AdamW, {"amsgrad": True, "weight_decay": 0.0}),
    "adam single": (Adam, {"foreach": False}),
    "adam foreach": (Adam, {"foreach": True}),
    "adamw foreach amsgrad": (AdamW, {"foreach": True, "amsgrad": True, "weight_decay": 0.0}),
    "adam fused": (Adam, {"fused": True}),
    "adamw fused amsgrad": (AdamW, {"fused": True, "amsgrad": True, "weight_decay": 0.0}),
    "adamw betas": (AdamW, {"betas": (0.8, 0.95), "weight_decay": 0.0}),
}
OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    **ADAMS,
    "sgd": (SGD, {}),
    "sgd momentum": (SGD, {"momentum": 0.9}),
    "sgd nesterov foreach": (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd momentum fused": (SGD, {"momentum": 0.9, "fused": True}),
    "adamw decay": (AdamW, {"weight_decay": 0.1}),
}


def make(name: str, *parameters: nn.Parameter) -> Optimizer:
    cls, kwargs = OPTIMIZERS[name]
    return cls(parameters, lr=LR, **kwargs)


def make_parameter(slots: int = 4, device: str = "cpu") -> nn.Parameter:
    return nn.Parameter(torch.randn(slots, 16, 16, device=device))


def step(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    parameter.grad = gradient.clone()
    optimizer.step()


def state_tensors(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Whatever state has one number a weight, asked of the optimizer and not of the rule."""
    state = optimizer.state[parameter]
    return {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and value.shape == parameter.shape
    }


# -- resetting --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_zeroes_exactly_the_changed_slots(name: str) -> None:
    parameter, other = make_parameter(), make_parameter()
    optimizer = make(name, parameter, other)
    for _ in range(3):
        other.grad = torch.randn_like(other)
        step(optimizer, parameter, torch.randn_like(parameter))
    before = {n: t.clone() for n, t in state_tensors(optimizer, parameter).items()}
    before_other = {n: t.clone() for n, t in state_tensors(optimizer, other).items()}
    assert len(before) == {"sgd": 0}.get(
        name, 1 if "sgd" in name else 3 if "amsgrad" in name else 2
    )
    reset_slots(optimizer, parameter, torch.tensor([1, 3]))
    after = state_tensors(optimizer, parameter)
    assert after.keys() == before.keys()
    for key, tensor in after.items():
        assert before[key][[1, 3]].count_nonzero() > 0
        assert tensor[[1, 3]].count_nonzero() == 0, key
        assert torch.equal(tensor[[0, 2]], before[key][[0, 2]]), key
    for key, tensor in state_tensors(optimizer, other).items():
        assert torch.equal(tensor, before_other[key])
    if "adam" in name:
        assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_before_the_first_step_leaves_no_state_behind(name: str) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    reset_slots(optimizer, parameter, torch.tensor([0]))
    assert not optimizer.state
    step(optimizer, parameter, torch.randn_like(parameter))


def test_reset_of_no_slots_changes_nothing() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    before = {n: t.clone() for n, t in state_tensors(optimizer, parameter).items()}
    reset_slots(optimizer, parameter, torch.tensor([], dtype=torch.int64))
    assert before
    for name, tensor in state_tensors(optimizer, parameter).items():
        assert torch.equal(tensor, before[name])


# -- the warm start, by hand ------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0, torch.tensor(4.0)], ids=["1", "4", "tensor"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_warm_start_by_hand(scale: float | Tensor, amsgrad: bool) -> None:
    parameter = make_parameter()
    optimizer = Adam([parameter], lr=LR, betas=(0.9, 0.5), amsgrad=amsgrad)
    for _ in range(2):
        step(optimizer, parameter, torch.randn_like(parameter))
    reset_slots(optimizer, parameter, torch.tensor([1, 2]))
    before = {n: t.clone() for n, t in state_tensors(optimizer, parameter).items()}
    # Slot 1: half of the gradients are 3, half -1; the mean of the squares is 5. Slot 2 has none.
    gradient = torch.randn(4, 16, 16)
    gradient[1, :8], gradient[1, 8:], gradient[2] = 3.0, -1.0, 0.0
    parameter.grad = gradient * scale
    pending = torch.tensor([False, True, True, False])
    left = warm_start(optimizer, optimizer.param_groups[0], parameter, pending, grad_scale=scale)
    assert left.tolist() == [False, False, True, False]
    # c = 1 - 0.5^2 = 0.75, of max(9, 5) and of max(1, 5).
    expected = torch.empty(16, 16)
    expected[:8], expected[8:] = 6.75, 3.75
    after = state_tensors(optimizer, parameter)
    assert len(after) == 2 + amsgrad
    for name, tensor in after.items():
        others = [0, 2, 3]
        assert torch.equal(tensor[others], before[name][others]), name
        if name == "exp_avg":
            assert tensor[1].count_nonzero() == 0
        else:
            torch.testing.assert_close(tensor[1], expected)
    assert torch.equal(parameter.grad, gradient * scale)
    assert pending.tolist() == [False, True, True, False], "the argument is not changed"


@pytest.mark.parametrize("bad", [0.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["adam", "adamw amsgrad", "sgd momentum"])
def test_without_a_usable_gradient_a_slot_stays_pending(name: str, bad: float) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    before = {n: t.clone() for n, t in state_tensors(optimizer, parameter).items()}
    gradient = torch.randn_like(parameter)
    if bad == 0.0:
        gradient[2] = 0.0
    else:
        gradient[2, 5, 5] = bad
    parameter.grad = gradient
    pending = torch.tensor([False, False, True, False])
    left = warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
    assert torch.equal(left, pending)
    assert before
    for key, tensor in state_tensors(optimizer, parameter).items():
        assert torch.equal(tensor, before[key]), key


def test_without_any_gradient_everything_stays_pending() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    pending = torch.tensor([True, False, True, False])
    group = optimizer.param_groups[0]
    assert torch.equal(warm_start(optimizer, group, parameter, pending), pending)


def test_before_the_first_step_the_bias_correction_is_enough() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    parameter.grad = torch.randn_like(parameter)
    pending = torch.tensor([True, False, True, False])
    assert not warm_start(optimizer, optimizer.param_groups[0], parameter, pending).any()
    before = parameter.detach().clone()
    optimizer.step()
    assert 0.5 * LR < (parameter - before).abs().max() <= 1.01 * LR


# -- no grown block jumps ---------------------------------------------------------------------


def largest_update(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    ratio: float,
    *,
    warm: bool,
    zeros: int = 0,
    uniform: bool = False,
) -> float:
    """Grow two slots at step 2000; return the largest update of 60 steps, in learning rates.

    The gradient of survivors and grown slots is constant; that of the grown ones is `ratio` times
    as large, after `zeros` steps without any.
    """
    shape, device = parameter.shape, parameter.device
    survivors = torch.randn(shape, device=device)
    if uniform:
        survivors = survivors.sign()
    step(optimizer, parameter, survivors)
    group = optimizer.param_groups[0]
    state = optimizer.state[parameter]
    state["step"].fill_(2000.0)
    correction = 1 - group["betas"][1] ** 2000
    state["exp_avg"].copy_(survivors)
    for name in {"exp_avg_sq", "max_exp_avg_sq"} & state.keys():
        state[name].copy_(correction * survivors.square())

    grown = torch.tensor([1, 2], device=device)
    with torch.no_grad():
        parameter[grown] = 0
    reset_slots(optimizer, parameter, grown)
    pending = torch.zeros(shape[0], dtype=torch.bool, device=device)
    pending[grown] = True
    largest = 0.0
    for i in range(zeros + 60):
        gradient = survivors.clone()
        gradient[grown] *= ratio if i >= zeros else 0.0
        parameter.grad = gradient
        if warm:
            pending = warm_start(optimizer, group, parameter, pending)
            assert bool(pending.any()) == (i < zeros)
        before = parameter.detach().clone()
        optimizer.step()
        update = (parameter - before)[grown].abs().max().item()
        largest = max(largest, update / group["lr"])
    assert state["step"] == 2000 + zeros + 60
    return largest


@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("ratio", [1.0, 10.0])
@pytest.mark.parametrize("uniform", [False, True])
def test_no_update_of_a_grown_slot_exceeds_the_learning_rate(
    name: str, ratio: float, uniform: bool
) -> None:
    parameter = make_parameter()
    largest = largest_update(make(name, parameter), parameter, ratio, warm=True, uniform=uniform)
    # A block that hardly moved would be no success either.
    assert 0.9 < largest <= 1.1


@pytest.mark.parametrize("name", ADAMS)
@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_without_the_warm_start_it_does(name: str, ratio: float) -> None:
    parameter = make_parameter()
    largest = largest_update(make(name, parameter), parameter, ratio, warm=False)
    # The smaller beta2 of "betas" forgets within the 60 steps, so that it jumps less.
    assert largest > (1.1 if name == "adamw betas" else 4.0)


@pytest.mark.parametrize("name", ["adam", "adamw amsgrad", "adam fused"])
def test_a_slot_whose_first_gradients_are_zero_does_not_jump_later(name: str) -> None:
    parameter = make_parameter()
    assert 0.9 < largest_update(make(name, parameter), parameter, 10.0, warm=True, zeros=20) <= 1.1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("kwargs", [{"capturable": True}, {"fused": True}], ids=str)
def test_on_a_gpu_no_update_of_a_grown_slot_exceeds_the_learning_rate(
    kwargs: dict[str, Any],
) -> None:
    parameter = make_parameter(device="cuda")
    optimizer = Adam([parameter], lr=LR, **kwargs)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert 0.9 < largest_update(optimizer, parameter, 10.0, warm=True) <= 1.1


# -- which optimizers -------------------------------------------------------------------------


class Homemade(Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})


class MyAdam(Adam):
    pass


@pytest.mark.parametrize("cls", [Homemade, MyAdam, torch.optim.LBFGS])
def test_an_unknown_optimizer_is_refused_by_name_with_the_remedy(cls: type[Optimizer]) -> None:
    parameter = make_parameter()
    optimizer = cls([parameter])
    message = rf"\(.*Adam, AdamW.*\); got {cls.__name__}\. .*STATE_RULES\[.*\] = StateRule"
    for refused in (
        lambda: state_rule(optimizer),
        lambda: reset_slots(optimizer, parameter, torch.tensor([0])),
        lambda: warm_start(optimizer, {}, parameter, torch.ones(4, dtype=torch.bool)),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


def test_users_can_add_their_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATE_RULES, MyAdam, StateRule(("exp_avg", "exp_avg_sq"), ("exp_avg_sq",)))
    parameter = make_parameter()
    assert 0.9 < largest_update(MyAdam([parameter], lr=LR), parameter, 10.0, warm=True) <= 1.1


def test_find_optimizer_gives_the_group_of_the_very_parameter() -> None:
    first, second, third, stranger = (nn.Parameter(torch.zeros(1, 16, 16)) for _ in range(4))
    one = SGD([first], lr=LR)
    two = AdamW([{"params": [second], "betas": (0.9, 0.95)}, {"params": [third]}], lr=LR)
    assert find_optimizer([one, two], first) == (one, one.param_groups[0])
    assert find_optimizer([one, two], third) == (two, two.param_groups[1])
    found = find_optimizer([one, two], second)
    assert found is not None and found[1]["betas"] == (0.9, 0.95)
    assert find_optimizer([one, two], stranger) is None
    assert find_optimizer([], first) is None
