"""Optimizer state of dropped and grown slots: it starts anew, and no grown block jumps.

Optimizers that have a rule are tried here; those that have none in the later half, by toys that
keep their state as well-known ones do.
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from sparse_lightning import Sparsifier
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.optimizer_state import (
    STATE_RULES,
    StateRule,
    check_state,
    discard_dense_state,
    find_optimizer,
    prepare_reset,
    prepare_slot_removal,
    state_rule,
    warm_start,
)
from sparse_lightning.policy.updates import ModelUpdate

LR = 1e-3
LATE = 2000  # the step at which slots are grown

Variants = dict[str, tuple[type[Optimizer], dict[str, Any]]]
ADAMS: Variants = {
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
    "adam maximize": (Adam, {"maximize": True}),
    "nadam": (NAdam, {}),
    "nadam foreach": (NAdam, {"foreach": True}),
    "radam": (RAdam, {}),
    "radam foreach": (RAdam, {"foreach": True}),
}
# The optimizers whose second moment is warm-started.
WARMED: Variants = {
    **ADAMS,
    "rmsprop": (RMSprop, {}),
    "rmsprop foreach": (RMSprop, {"foreach": True}),
    "rmsprop momentum": (RMSprop, {"momentum": 0.9}),
    "rmsprop centered": (RMSprop, {"centered": True}),
    "rmsprop centered foreach": (RMSprop, {"centered": True, "foreach": True}),
    "adafactor": (Adafactor, {"weight_decay": 0.0}),
    "adafactor foreach": (Adafactor, {"weight_decay": 0.0, "foreach": True}),
    "adafactor decay": (Adafactor, {"weight_decay": 0.0, "beta2_decay": -0.5}),
}
OTHERS: Variants = {
    "sgd": (SGD, {}),
    "sgd momentum": (SGD, {"momentum": 0.9}),
    "sgd nesterov foreach": (SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
    "sgd momentum fused": (SGD, {"momentum": 0.9, "fused": True}),
    "adagrad": (Adagrad, {}),
    "adagrad foreach": (Adagrad, {"foreach": True}),
    "adagrad fused": (Adagrad, {"fused": True}),
    "adagrad start": (Adagrad, {"initial_accumulator_value": 0.1}),
}
OPTIMIZERS: Variants = {
    **WARMED,
    **OTHERS,
    "adamw decay": (AdamW, {"weight_decay": 0.1}),
    "rmsprop centered momentum": (RMSprop, {"centered": True, "momentum": 0.9}),
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
    """Return the state that has slots, derived from the optimizer instead of its rule."""
    state = optimizer.state[parameter]
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and t.dim()}


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


# -- resetting --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_restores_the_initial_state_of_exactly_the_changed_slots(name: str) -> None:
    parameter, other, fresh = make_parameter(), make_parameter(), make_parameter()
    optimizer = make(name, parameter, other)
    for _ in range(3):
        other.grad = torch.randn_like(other)
        step(optimizer, parameter, torch.randn_like(parameter))
    before = clones(state_tensors(optimizer, parameter))
    before_other = clones(state_tensors(optimizer, other))
    prepare_reset(optimizer, parameter, torch.tensor([1, 3]))()
    # A gradient of zero leaves the optimizer's initial state unchanged.
    beginning = make(name, fresh)
    step(beginning, fresh, torch.zeros_like(fresh))
    after = state_tensors(optimizer, parameter)
    assert after.keys() == before.keys() == state_tensors(beginning, fresh).keys()
    for key, tensor in after.items():
        first = state_tensors(beginning, fresh)[key]
        assert not torch.equal(before[key][[1, 3]], first[[1, 3]]), key
        assert torch.equal(tensor[[1, 3]], first[[1, 3]]), key
        assert torch.equal(tensor[[0, 2]], before[key][[0, 2]]), key
    for key, tensor in state_tensors(optimizer, other).items():
        assert torch.equal(tensor, before_other[key])
    if not name.startswith("sgd"):
        assert optimizer.state[parameter]["step"] == 3


@pytest.mark.parametrize(
    ("name", "names"),
    [
        ("sgd", set()),
        ("sgd momentum", {"momentum_buffer"}),
        ("adam amsgrad", {"exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        ("nadam", {"exp_avg", "exp_avg_sq"}),
        ("radam", {"exp_avg", "exp_avg_sq"}),
        ("rmsprop centered momentum", {"square_avg", "grad_avg", "momentum_buffer"}),
        ("adagrad", {"sum"}),
        ("adafactor", {"row_var", "col_var"}),
    ],
)
def test_the_rules_know_all_state_that_has_slots(name: str, names: set[str]) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    assert state_tensors(optimizer, parameter).keys() == names
    assert names <= {*state_rule(optimizer, parameter).tensors}


def test_reset_uses_adagrads_initial_value() -> None:
    parameter = make_parameter()
    optimizer = Adagrad([parameter], initial_accumulator_value=0.25)
    step(optimizer, parameter, torch.ones_like(parameter))
    assert (optimizer.state[parameter]["sum"] == 1.25).all()
    prepare_reset(optimizer, parameter, torch.tensor([2]))()
    assert optimizer.state[parameter]["sum"][:, 0, 0].tolist() == [1.25, 1.25, 0.25, 1.25]


def test_reset_uses_the_initial_value_of_the_group() -> None:
    of: list[tuple[type[Optimizer], str, str]] = [
        (Rprop, "lr", "step_size"),
        (type("MyRprop", (Rprop,), {}), "lr", "step_size"),
        (Adagrad, "initial_accumulator_value", "sum"),  # it ignores the group's
    ]
    for cls, option, name in of:
        parameter, fresh = make_parameter(), make_parameter()
        optimizer = cls([{"params": [parameter, fresh], option: 0.5}], **{option: 0.25})
        for _ in range(3):
            step(optimizer, parameter, torch.randn_like(parameter))
        prepare_reset(optimizer, parameter, torch.tensor([2]))()
        parameter.grad = None
        step(optimizer, fresh, torch.zeros_like(fresh))
        first = optimizer.state[fresh][name]
        assert first.any() and torch.equal(optimizer.state[parameter][name][2], first[2]), cls


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_before_the_first_step_leaves_no_state_behind(name: str) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    keys = {*optimizer.state[parameter]} if optimizer.state else None
    prepare_reset(optimizer, parameter, torch.tensor([0]))()
    assert ({*optimizer.state[parameter]} if optimizer.state else None) == keys
    step(optimizer, parameter, torch.randn_like(parameter))


def test_reset_of_no_slots_changes_nothing() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    before = clones(state_tensors(optimizer, parameter))
    prepare_reset(optimizer, parameter, torch.tensor([], dtype=torch.int64))()
    assert before
    for name, tensor in state_tensors(optimizer, parameter).items():
        assert torch.equal(tensor, before[name])


# -- the warm start, by hand ------------------------------------------------------------------

# Half of a slot's gradients are 3, half -1: the mean of the squares is 5.
THREES = torch.cat([torch.full((8, 16), 3.0), torch.full((8, 16), -1.0)])


def squares(of_threes: float, of_ones: float) -> Tensor:
    """Return squares with one value in the rows of 3 and another in the rows of -1."""
    return torch.tensor([of_threes] * 8 + [of_ones] * 8).unsqueeze(1).expand(16, 16)


BETAS = {"betas": (0.9, 0.5)}
# c is 1 - 0.5^2 = 0.75 after two steps, or 1; the moment is c * max(9, 5) and c * max(1, 5), with a
# column mean of 7 c. State that is not listed stays at zero.
BY_HAND: dict[str, tuple[type[Optimizer], dict[str, Any], dict[str, Tensor]]] = {
    "adam": (Adam, BETAS, {"exp_avg_sq": squares(6.75, 3.75)}),
    "amsgrad": (
        AdamW,
        {**BETAS, "amsgrad": True},
        {"exp_avg_sq": squares(6.75, 3.75), "max_exp_avg_sq": squares(6.75, 3.75)},
    ),
    "nadam": (NAdam, BETAS, {"exp_avg_sq": squares(6.75, 3.75)}),
    "radam": (RAdam, BETAS, {"exp_avg_sq": squares(6.75, 3.75)}),
    "rmsprop": (
        RMSprop,
        {"centered": True, "momentum": 0.5},
        {"square_avg": squares(9.0, 5.0)},
    ),
    "adafactor": (
        Adafactor,
        {},
        {"row_var": squares(9.0, 5.0)[:, :1], "col_var": torch.full((1, 16), 7.0)},
    ),
    "sgd": (SGD, {"momentum": 0.9}, {}),
    "adagrad": (Adagrad, {}, {}),
}


@pytest.mark.parametrize("scale", [1.0, 4.0, torch.tensor(4.0)], ids=["1", "4", "tensor"])
@pytest.mark.parametrize("name", BY_HAND)
def test_warm_start_by_hand(name: str, scale: float | Tensor) -> None:
    cls, kwargs, expected = BY_HAND[name]
    parameter = make_parameter()
    optimizer = cls([parameter], lr=LR, **kwargs)
    for _ in range(2):
        step(optimizer, parameter, torch.randn_like(parameter))
    prepare_reset(optimizer, parameter, torch.tensor([1, 2]))()
    before = clones(state_tensors(optimizer, parameter))
    gradient = torch.randn(4, 16, 16)
    gradient[1], gradient[2] = THREES, 0.0
    parameter.grad = gradient * scale
    pending = torch.tensor([False, True, True, False])
    left = warm_start(optimizer, optimizer.param_groups[0], parameter, pending, grad_scale=scale)
    assert left.tolist() == [False, False, True, False]
    after = state_tensors(optimizer, parameter)
    assert expected.keys() <= after.keys()
    for key, tensor in after.items():
        others = [0, 2, 3]
        assert torch.equal(tensor[others], before[key][others]), key
        assert tensor.shape == before[key].shape
        torch.testing.assert_close(tensor[1], expected.get(key, torch.zeros(16, 16)))
    assert torch.equal(parameter.grad, gradient * scale)
    assert pending.tolist() == [False, True, True, False], "the argument is not changed"


@pytest.mark.parametrize("count", [2, 2.0, torch.tensor(2.0)], ids=["int", "float", "tensor"])
def test_steps_may_be_numbers_or_tensors(count: float | Tensor) -> None:
    parameter = make_parameter()
    optimizer = Adam([parameter], betas=(0.9, 0.9999))
    step(optimizer, parameter, torch.zeros_like(parameter))
    optimizer.state[parameter]["step"] = count
    parameter.grad = THREES.expand(4, 16, 16)
    pending = torch.tensor([False, True, False, False])
    warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
    # c is 1 - 0.9999^2, which in fp32 would have four digits.
    expected = squares(9 * 0.00019999, 5 * 0.00019999)
    moment = optimizer.state[parameter]["exp_avg_sq"][1]
    torch.testing.assert_close(moment, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_never_waits_for_a_number(name: str) -> None:
    """Reading a number from a meta tensor raises."""
    parameter = make_parameter()
    optimizer = make(name, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    on_meta = nn.Parameter(parameter.detach().to("meta"))
    on_meta.grad = torch.empty_like(on_meta)
    optimizer.param_groups[0]["params"] = [on_meta]
    optimizer.state[on_meta] = {n: t.to("meta") for n, t in optimizer.state[parameter].items()}
    prepare_reset(optimizer, on_meta, torch.ones(1, dtype=torch.int64, device="meta"))()
    pending = torch.ones(4, dtype=torch.bool, device="meta")
    group = optimizer.param_groups[0]
    assert warm_start(optimizer, group, on_meta, pending).device.type == "meta"


@pytest.mark.parametrize("bad", [0.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("name", ["adam", "adamw amsgrad", "sgd momentum", "rmsprop", "adafactor"])
def test_without_a_usable_gradient_a_slot_stays_pending(name: str, bad: float) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    before = clones(state_tensors(optimizer, parameter))
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


def settle(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> None:
    """Set the state that `LATE` steps of a constant gradient (centered: of changing sign) yield."""
    step(optimizer, parameter, gradient)
    group, state = optimizer.param_groups[0], optimizer.state[parameter]
    squared = gradient.square()
    heavy = 1 / (1 - group.get("momentum", 0.0))
    second = squared * (1 - group["betas"][1] ** LATE) if "betas" in group else None
    settled = {
        "step": LATE,
        "mu_product": 0.0,
        "exp_avg": -gradient if group.get("maximize") else gradient,
        "exp_avg_sq": second,
        "max_exp_avg_sq": second,
        "square_avg": squared,
        "grad_avg": 0.0,
        "momentum_buffer": heavy * (gradient if type(optimizer) is SGD else gradient.sign()),
        "sum": LATE * squared + group.get("initial_accumulator_value", 0.0),
        "row_var": squared.mean(2, keepdim=True),
        "col_var": squared.mean(1, keepdim=True),
    }
    for name, tensor in state.items():
        tensor.copy_(torch.as_tensor(settled[name]))


def usual_update(optimizer: Optimizer, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """Return the update that a constant gradient causes once the state has settled."""
    group = optimizer.param_groups[0]
    usual = LR / (1 - group.get("momentum", 0.0))
    if type(optimizer) is SGD:
        return usual * gradient.abs()
    if type(optimizer) is not Adafactor:
        return usual * torch.ones_like(gradient)
    count = float(optimizer.state[parameter]["step"]) + 1
    rms = parameter.detach().square().mean().sqrt()
    alpha = max(group["eps"][1], rms.item()) * min(LR, count**-0.5)
    rows, columns = gradient.square().mean(2, keepdim=True), gradient.square().mean(1, keepdim=True)
    return alpha * gradient.abs() / (rows * columns / rows.mean(1, keepdim=True)).sqrt()


def largest_updates(
    optimizer: Optimizer,
    parameter: nn.Parameter,
    ratio: float,
    *,
    warm: bool,
    zeros: int = 0,
    uniform: bool = False,
) -> list[float]:
    """Grow slots 1 and 2 late; return each slot's largest of 60 updates, relative to the usual one.

    The gradient of survivors and grown slots is constant (if centered: but for its sign); that of
    the grown ones is `ratio` times as large, after `zeros` steps without any.
    """
    shape, device = parameter.shape, parameter.device
    survivors = torch.randn(shape, device=device)
    if uniform:
        survivors = survivors.sign()
    settle(optimizer, parameter, survivors)
    group = optimizer.param_groups[0]
    grown = torch.tensor([1, 2], device=device)
    with torch.no_grad():
        parameter[grown] = 0
    prepare_reset(optimizer, parameter, grown)()
    pending = torch.zeros(shape[0], dtype=torch.bool, device=device)
    pending[grown] = True
    largest = torch.zeros(shape[0], device=device)
    for i in range(zeros + 60):
        gradient = survivors.clone()
        if group.get("centered"):
            gradient *= (-1) ** i
        usual = gradient.clone()
        usual[grown] *= ratio
        usual = usual_update(optimizer, parameter, usual)
        gradient[grown] *= ratio if i >= zeros else 0.0
        parameter.grad = gradient
        if warm:
            pending = warm_start(optimizer, group, parameter, pending)
            assert bool(pending.any()) == (i < zeros)
        before = parameter.detach().clone()
        optimizer.step()
        moved = (parameter.detach() - before).abs() / usual
        largest = torch.maximum(largest, moved.flatten(1).amax(1))
    if not isinstance(optimizer, SGD):
        assert optimizer.state[parameter]["step"] == LATE + zeros + 60
    return largest.tolist()


# Adafactor is exact for gradients of one size; `test_factored_moments` covers other gradients.
GROWTHS = [
    (name, uniform)
    for name in [*WARMED, *OTHERS]
    for uniform in ([True] if "adafactor" in name else [False, True])
]


@pytest.mark.parametrize(("name", "uniform"), GROWTHS)
@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_no_update_of_a_grown_slot_exceeds_the_usual_one(
    name: str, ratio: float, uniform: bool
) -> None:
    parameter = make_parameter()
    largest = largest_updates(make(name, parameter), parameter, ratio, warm=True, uniform=uniform)
    # A block that hardly moves would be wrong, too. RAdam moves by 0.83 at this step.
    assert all(0.8 < largest[slot] <= 1.1 for slot in (1, 2))
    # The survivors show that the state had settled; Adagrad's never does.
    if "adagrad" not in name:
        assert all(0.8 < largest[slot] <= 1.1 for slot in (0, 3))


@pytest.mark.parametrize("name", WARMED)
@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_without_the_warm_start_it_does(name: str, ratio: float) -> None:
    parameter = make_parameter()
    largest = max(
        largest_updates(make(name, parameter), parameter, ratio, warm=False, uniform=True)[1:3]
    )
    # The smaller beta2 of "betas" forgets within the 60 steps, so that it jumps less; with
    # Adafactor everything is scaled down, survivors too, until the RMS of all updates is 1.
    assert largest > (1.1 if name == "adamw betas" or "adafactor" in name else 2.5)


@pytest.mark.parametrize("name", OTHERS)
def test_where_nothing_is_warm_started_nothing_needs_to_be(name: str) -> None:
    parameter = make_parameter()
    cold = largest_updates(make(name, parameter), parameter, 10.0, warm=False, uniform=True)
    assert all(0.8 < cold[slot] <= 1.0001 for slot in (1, 2))


@pytest.mark.parametrize("name", ["adam", "adamw amsgrad", "adam fused", "rmsprop", "adafactor"])
def test_a_slot_whose_first_gradients_are_zero_does_not_jump_later(name: str) -> None:
    parameter = make_parameter()
    largest = largest_updates(
        make(name, parameter), parameter, 10.0, warm=True, zeros=20, uniform=True
    )
    assert all(0.9 < largest[slot] <= 1.1 for slot in (1, 2))


def test_a_constant_gradient_under_centered_rmsprop() -> None:
    """The variance falls from g^2 towards 0, as for any block: 1 - (1 - alpha^k)^2 of g^2."""
    parameter = make_parameter()
    optimizer = RMSprop([parameter], lr=LR, centered=True, eps=0.0)
    gradient = torch.randn_like(parameter).sign()
    step(optimizer, parameter, gradient)
    grown, pending = torch.tensor([1]), torch.tensor([False, True, False, False])
    prepare_reset(optimizer, parameter, grown)()
    for k in range(1, 61):
        before = parameter.detach().clone()
        parameter.grad = gradient
        pending = warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
        optimizer.step()
        moved = (parameter - before)[1].abs() / LR
        expected = (1 - (1 - 0.99**k) ** 2) ** -0.5
        torch.testing.assert_close(moved, torch.full_like(moved, expected), rtol=1e-2, atol=0)
    assert 1.1 < expected < 1.2


@pytest.mark.parametrize("ratio", [1.0, 10.0])
def test_factored_moments(ratio: float) -> None:
    """The worst case is sqrt(2) of the usual update, if one element has the whole gradient."""
    parameter = make_parameter()
    largest = largest_updates(make("adafactor", parameter), parameter, ratio, warm=True)
    assert all(0.8 < largest[slot] <= 2**0.5 for slot in (1, 2))

    # g^2 is 256, the mean 1: the row's and the column's mean of the moment are (256 + 15) / 16,
    # those of the others 1.
    optimizer = make("adafactor", parameter)
    step(optimizer, parameter, torch.zeros_like(parameter))
    optimizer.state[parameter]["step"].fill_(1e9)
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[1, 0, 0] = 16.0 * ratio
    pending = torch.tensor([False, True, False, False])
    warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
    state = optimizer.state[parameter]
    spike = 271 / 16
    torch.testing.assert_close(
        state["row_var"][1].flatten(), ratio**2 * torch.tensor([spike] + [1.0] * 15)
    )
    estimate = spike**2 / ((spike + 15) / 16)
    update = 16 / math.sqrt(estimate)
    assert 1.3 < update < 2**0.5
    usual = usual_update(optimizer, parameter, parameter.grad)[1, 0, 0]
    before = parameter.detach().clone()
    optimizer.step()
    moved = (before - parameter.detach())[1, 0, 0] / usual
    assert moved.item() == pytest.approx(update, rel=1e-2)


GPU_VARIANTS: list[tuple[type[Optimizer], dict[str, Any]]] = [
    *((cls, {"capturable": True}) for cls in (Adam, AdamW, NAdam, RAdam, RMSprop)),
    *((cls, {"fused": True}) for cls in (Adam, AdamW, SGD)),
    (SGD, {"momentum": 0.9}),
    (Adagrad, {}),
    (Adafactor, {"weight_decay": 0.0}),
]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cls", "kwargs"), GPU_VARIANTS, ids=str)
def test_the_host_never_waits_for_a_gpu(cls: type[Optimizer], kwargs: dict[str, Any]) -> None:
    parameter = make_parameter(device="cuda")
    optimizer = cls([parameter], lr=LR, **kwargs)
    step(optimizer, parameter, torch.randn_like(parameter))
    slots = torch.tensor([1], device="cuda")
    pending = torch.ones(4, dtype=torch.bool, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        prepare_reset(optimizer, parameter, slots)()
        warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
        prepare_slot_removal(optimizer, parameter, slots)()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(("cls", "kwargs"), GPU_VARIANTS, ids=str)
def test_on_a_gpu_no_update_of_a_grown_slot_exceeds_the_usual_one(
    cls: type[Optimizer], kwargs: dict[str, Any]
) -> None:
    parameter = make_parameter(device="cuda")
    optimizer = cls([parameter], lr=LR, **kwargs)
    largest = largest_updates(optimizer, parameter, 10.0, warm=True, uniform=True)
    assert all(0.8 < largest[slot] <= 1.1 for slot in (1, 2))


# -- other numbers of slots -------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_restored_state_is_checked_for_its_slots(name: str) -> None:
    parameter = make_parameter()
    optimizer = make(name, parameter)
    check_state(optimizer, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))
    check_state(optimizer, parameter)
    for key, tensor in state_tensors(optimizer, parameter).items():
        shape = list(tensor.shape)
        wrong = [
            tensor[:3],
            tensor[:, :, :1].expand(-1, -1, 8),
            tensor.flatten(1)[:, :8],
            tensor[:1],
            tensor[..., None],
        ]
        for restored in wrong:
            optimizer.state[parameter][key] = restored
            got = str(list(restored.shape)).replace("[", r"\[")
            with pytest.raises(RuntimeError, match=rf"`{key}` must .*\[4, 16, 16\].*got {got}"):
                check_state(optimizer, parameter)
        optimizer.state[parameter][key] = tensor
        assert list(tensor.shape) == shape
    check_state(optimizer, parameter)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_slot_removal_frees_memory(name: str) -> None:
    parameter, other = make_parameter(), make_parameter()
    optimizer = make(name, parameter, other)
    other.grad = torch.randn_like(other)
    step(optimizer, parameter, torch.randn_like(parameter))
    before, before_other = dict(optimizer.state[parameter]), dict(optimizer.state[other])
    kept = torch.tensor([0, 3, 1])
    prepare_slot_removal(optimizer, parameter, kept)()
    assert optimizer.state[parameter].keys() == before.keys()
    for key, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.dim():
            assert torch.equal(value, before[key][kept])
            assert value.untyped_storage().nbytes() == value.nbytes
        else:
            assert value is before[key]
    assert all(value is before_other[key] for key, value in optimizer.state[other].items())
    parameter.grad = None
    parameter.data = parameter.data[kept]
    check_state(optimizer, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))


def test_slot_removal_before_the_first_step_leaves_no_state_behind() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    prepare_slot_removal(optimizer, parameter, torch.tensor([0]))()
    assert not optimizer.state


# -- optimizers without a rule ----------------------------------------------------------------


class Toy(Optimizer):
    """An optimizer whose class has no rule."""

    def __init__(self, params: Any, lr: float = LR, **options: Any) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99), **options})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * self.direction(p, p.grad, self.state[p], group))

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        return g

    @staticmethod
    def mean(state: Any, name: str, of: Tensor, beta: float) -> Any:
        return state.setdefault(name, torch.zeros_like(of)).lerp_(of, 1 - beta)


class Lion(Toy):
    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        sign = state.get("exp_avg", torch.zeros_like(p)).lerp(g, 0.1).sign()
        self.mean(state, "exp_avg", g, 0.99)
        return sign


class Adan(Toy):
    """Its second moment decays by the last of three betas, and its steps are in the group."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        difference = g - state.setdefault("pre_grad", g.clone())
        state["pre_grad"].copy_(g)
        step, (one, two, three) = group["step"], group["betas"]
        m = self.mean(state, "exp_avg", g, one) / (1 - one**step)
        d = self.mean(state, "exp_avg_diff", difference, two) / (1 - two**step)
        n = self.mean(state, "exp_avg_sq", (g + two * difference).square(), three)
        return (m + two * d) / (n / (1 - three**step)).sqrt().add_(1e-8)


class Prodigy(Toy):
    """It squares gradients times its estimate `d`; `s` and the initial weights `p0` are flat."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        state.setdefault("p0", p.flatten().clone() if p.any() else torch.tensor(0.0))
        self.mean(state, "s", g.flatten(), 0.99)
        state["step"] = state.get("step", 0) + 1
        d = group["d"]
        m = self.mean(state, "exp_avg", d * g, 0.9)
        v = self.mean(state, "exp_avg_sq", (d * g).square(), 0.99)
        return m / v.sqrt().add_(1e-30)


class ScheduleFree(Toy):
    """`z` holds the iterate of plain SGD; the parameter follows its average."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        z = state.setdefault("z", p.clone()).sub_(group["lr"] * g)
        return (p - z) / (2 * group["lr"])


class Late(Toy):
    """It creates its momentum at its third step, as after a warm-up."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        state["step"] = state.get("step", 0) + 1
        return g if state["step"] < 3 else self.mean(state, "momentum", g, 0.9)


class Adopt(Toy):
    """It divides by the second moment of earlier steps, which begins as the first g^2."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        is_first = "exp_avg_sq" not in state
        state["step"] = state.get("step", 0) + 1
        second = state.setdefault("exp_avg_sq", g.square())
        update = g / second.sqrt().clamp_min(1e-6)
        second.lerp_(g.square(), 1 - group["betas"][1])
        return torch.zeros_like(g) if is_first else self.mean(state, "exp_avg", update, 0.9)


class Sm3(Toy):
    """It keeps one number per slot, and numbers that are no tensors."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        state.update(kind="sm3", rms=g.norm(), best=None, seen={"steps": group["step"]})
        most = state.setdefault("accumulator", torch.zeros(len(p)))
        most.copy_(torch.maximum(most, g.square().view(len(p), -1).amax(1)))
        return g / most.sqrt().add_(1e-8).view(-1, *[1] * (p.dim() - 1))


class MyAdam(Adam):
    pass


class MyAdafactor(Adafactor):
    pass


def of_transformers(**options: Any) -> Callable[[Any], Optimizer]:
    def make(parameters: Any) -> Optimizer:
        module = pytest.importorskip("transformers.optimization")
        built: Optimizer = module.Adafactor(parameters, **options)
        return built

    return make


FIXED: dict[str, Any] = {"scale_parameter": False, "relative_step": False, "lr": LR}
BY_SHAPE: dict[str, Callable[[Any], Optimizer]] = {
    "lion": Lion,
    "adan": lambda p: Adan(p, betas=(0.98, 0.92, 0.99)),
    "prodigy": lambda p: Prodigy(p, d=1e-3),
    "schedule-free": ScheduleFree,
    "late": Late,
    "adopt": lambda p: Adopt(p, betas=(0.9, 0.9999)),
    "adopt subclass": lambda p: type("MyAdopt", (Adopt,), {})(p, betas=(0.9, 0.9999)),
    "sm3": Sm3,
    "adam subclass": lambda p: MyAdam(p, lr=LR, amsgrad=True),
    "adam subclass fused": lambda p: MyAdam(p, lr=LR, fused=True),
    "adam subclass foreach": lambda p: MyAdam(p, lr=LR, foreach=True),
    "adafactor subclass": lambda p: MyAdafactor(p, lr=LR),
    "transformers": of_transformers(),
    "transformers scaled": of_transformers(scale_parameter=True, relative_step=False, lr=LR),
    "transformers warmup": of_transformers(scale_parameter=False, warmup_init=True),
    "transformers fixed beta1": of_transformers(**FIXED, beta1=0.9),
    "adadelta": Adadelta,
    "adamax": Adamax,
    "asgd": ASGD,
    "rprop": lambda p: Rprop(p, lr=LR),
}
STARTS = {"step_size": LR}  # other state begins at zero


def slots_of(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state that has slots, `[slots, ...]`, derived without a rule."""
    return {
        name: tensor.view(len(parameter), -1)
        for name, tensor in state_tensors(optimizer, parameter).items()
    }


@pytest.mark.parametrize(
    ("name", "slots"),
    # With a single slot, one number may belong to the slot or to the whole parameter.
    [(name, slots) for name in BY_SHAPE for slots in (4, 1) if (name, slots) != ("sm3", 1)],
)
def test_without_a_rule_state_follows_by_its_shape(name: str, slots: int) -> None:
    parameter = make_parameter(slots)
    optimizer = BY_SHAPE[name]([parameter])
    for _ in range(3):
        step(optimizer, parameter, torch.randn_like(parameter))
    check_state(optimizer, parameter)
    before = clones(slots_of(optimizer, parameter))
    scalars = {k: v for k, v in optimizer.state[parameter].items() if k not in before}
    assert before
    changed = torch.tensor([1, 3] if slots == 4 else [0])
    prepare_reset(optimizer, parameter, changed)()
    rest = [slot for slot in range(slots) if slot not in changed]
    for key, state in slots_of(optimizer, parameter).items():
        assert torch.equal(state[rest], before[key][rest]), key
        assert (state[changed] == STARTS.get(key, 0.0)).all(), key
        assert not torch.equal(before[key][changed], state[changed]), key

    before = clones(slots_of(optimizer, parameter))
    kept = torch.tensor([0, 2, 3] if slots == 4 else [0])
    prepare_slot_removal(optimizer, parameter, kept)()
    parameter.grad, parameter.data = None, parameter.data[kept]
    for key, state in slots_of(optimizer, parameter).items():
        assert torch.equal(state, before[key][kept]), key
    assert all(optimizer.state[parameter][key] is value for key, value in scalars.items())
    check_state(optimizer, parameter)
    step(optimizer, parameter, torch.randn_like(parameter))


# -- training through updates that shrink -------------------------------------------------------

TRAINED: dict[str, Callable[[Any], Optimizer]] = {
    **BY_SHAPE,
    "adamw": AdamW,
    "adagrad": lambda p: Adagrad(p, initial_accumulator_value=0.5),
    "adafactor": Adafactor,
}


@pytest.mark.parametrize("name", TRAINED)
def test_in_training_blocks_keep_their_state_and_grown_ones_begin(name: str) -> None:
    """Compared per grid position, after updates that drop and grow blocks and remove slots."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 48))
    density = {"initial": 0.75, "final": 0.4, "schedule": "linear", "begin": 0.0, "until": 0.6}
    sparsifier = Sparsifier(
        model, 16, block_size=16, density=density, update={"every_n_steps": 2, "until": 0.95}
    )
    capacities = {of: len(layer.values) for of, layer in sparsifier.layers.items()}
    optimizer = TRAINED[name](model.parameters())
    starts = {**STARTS, "sum": 0.5}
    before: dict[str, Any] = {}
    grown, given_up = [], []

    def place_of(layer: BlockSparseLinear) -> dict[tuple[int, ...], int]:
        return {tuple(at): slot for slot, at in enumerate(layer.topology.coords.tolist())}

    def remember(*_: Any) -> None:
        for of, layer in sparsifier.layers.items():
            before[of] = place_of(layer), clones(slots_of(optimizer, layer.values))

    def compare(_: Sparsifier, update: ModelUpdate) -> None:
        for of in update.layers:
            layer = sparsifier.layers[of]
            places, states = before[of]
            after = slots_of(optimizer, layer.values)
            assert after.keys() == states.keys()
            for at, slot in place_of(layer).items():
                if at[0] < 0:
                    continue
                for key, state in after.items():
                    if at in places:
                        assert torch.equal(state[slot], states[key][places[at]]), key
                    else:
                        assert (state[slot] == starts.get(key, 0.0)).all(), key
                if at not in places:
                    grown.append(at)
            given_up.append(len(layer.values) < capacities[of])

    sparsifier.attach(optimizer)
    handle = optimizer.register_step_post_hook(remember)
    optimizer._optimizer_step_post_hooks.move_to_end(handle.id, last=False)  # type: ignore[attr-defined]
    sparsifier.register_update_hook(compare)
    generator = torch.Generator().manual_seed(1)
    for _ in range(16):
        x = torch.randn(16, 64, generator=generator)
        (model(x) - x[:, :48]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert grown and any(given_up)
    assert all(layer.values.isfinite().all() for layer in sparsifier.layers.values())


# -- the warm start, known by name --------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "state", "expected"),
    [
        # c is 1 - 0.5^2. Rows of a block are means over its columns.
        (MyAdam, ("exp_avg_sq", (4, 16, 16)), squares(6.75, 3.75)),
        (Toy, ("exp_avg_sq", (4, 16, 16)), squares(6.75, 3.75)),
        (Toy, ("square_avg", (4 * 16 * 16,)), squares(6.75, 3.75).flatten()),
        (Toy, ("exp_avg_sq_row", (4, 16)), 0.75 * torch.tensor([9.0] * 8 + [5.0] * 8)),
        (Toy, ("exp_avg_sq_col", (4, 16)), torch.full((16,), 5.25)),
        (Toy, ("exp_avg_sq", (4,)), torch.tensor(5.25)),
        (Toy, ("row_var", (4, 16, 1)), squares(6.75, 3.75)[:, :1]),
        (Toy, ("col_var", (4, 1, 16)), torch.full((1, 16), 5.25)),
        (Toy, ("exp_avg_var", (4, 16, 16)), squares(6.75, 3.75)),  # AdaBelief
        # CAME: of updates that are divided by the root of a second moment.
        (Toy, ("exp_avg_res_row", (4, 16)), torch.full((16,), 0.75)),
        (Toy, ("exp_avg_res_col", (4, 16)), torch.full((16,), 0.75)),
        # State with an unknown name is not warm-started.
        (Toy, ("hessian", (4, 16, 16)), torch.zeros(16, 16)),
        (Toy, ("exp_avg_diff", (4, 16, 16)), torch.zeros(16, 16)),
    ],
)
def test_second_moments_known_by_name_are_warm_started(
    optimizer: type[Optimizer], state: tuple[str, tuple[int, ...]], expected: Tensor
) -> None:
    key, shape = state
    parameter = make_parameter()
    # Of several betas the one with the larger moment applies, which is safe.
    betas = (0.9, 0.5) if optimizer is MyAdam else (0.9, 0.5, 0.9)
    of = optimizer([parameter], betas=betas)  # type: ignore[call-arg]
    of.state[parameter] = {"step": 2, key: torch.zeros(shape)}
    parameter.grad = torch.zeros_like(parameter)
    parameter.grad[1] = THREES
    pending = torch.tensor([False, True, True, False])
    left = warm_start(of, of.param_groups[0], parameter, pending)
    assert left.tolist() == [False, False, True, False]
    after = of.state[parameter][key]
    assert after.shape == shape
    after = after.view(4, -1)
    torch.testing.assert_close(after[1], expected.flatten())
    assert not after[[0, 2, 3]].any()


@pytest.mark.parametrize(
    "name",
    [
        "adan",
        "prodigy",
        "adam subclass",
        "transformers",
        "transformers fixed beta1",
        "adopt",
        "adopt subclass",
        "sm3",
    ],
)
def test_without_a_rule_no_grown_block_jumps(name: str) -> None:
    """Compared with blocks whose gradient has the same size and whose state has settled."""
    parameter = nn.Parameter(torch.ones(4, 16, 16))
    optimizer = BY_SHAPE[name]([parameter])
    gradient = torch.randn_like(parameter).sign()
    for _ in range(400):
        step(optimizer, parameter, gradient)
    group = optimizer.param_groups[0]
    pending = torch.tensor([False, True, False, False])
    prepare_reset(optimizer, parameter, torch.tensor([1]))()
    largest = torch.zeros(4)
    for _ in range(200):
        before, parameter.grad = parameter.detach().clone(), gradient
        pending = warm_start(optimizer, group, parameter, pending)
        optimizer.step()
        moved = (parameter.detach() - before).abs().flatten(1).amax(1)
        largest = torch.maximum(largest, moved)
    assert 0.9 < largest[1] / largest[0] <= 1.1


# -- state that cannot follow, and wrong rules ----------------------------------------------------


class Keeps(Toy):
    """It keeps the result of a given function of the parameter, from its first step on."""

    def direction(self, p: Tensor, g: Tensor, state: Any, group: Any) -> Tensor:
        for name, make in group["makes"].items():
            state.setdefault(name, make(p))
        return g


class Codes(Tensor):
    """A tensor subclass like those of low-bit optimizers."""


class Holder:
    def __init__(self, tensor: Any) -> None:
        self.factor = tensor


Make = Callable[[Tensor], Any]
UNFIT: dict[str, tuple[Make, str]] = {
    "of a dimension": (lambda p: torch.eye(16), r"shape \[16, 16\]"),
    "of the slots": (lambda p: torch.eye(len(p)), r"shape \[12, 12\]"),
    "a list": (lambda p: [torch.eye(16), torch.eye(16)], r"\[16, 16\], shape \[16, 16\].* list"),
    "a deque": (lambda p: deque([p.detach().clone()], maxlen=4), "deque"),
    "a deque in an object": (lambda p: Holder(deque([torch.zeros_like(p)])), "Holder"),
    "a view": (lambda p: {"a": torch.zeros_like(p)}.values(), "dict_values"),
    "a dict": (lambda p: {"a": {"b": torch.zeros_like(p)}}, "dict"),
    "an object": (lambda p: Holder(torch.eye(16)), "Holder"),
    "all in one": (lambda p: torch.zeros(5000), r"\[5000\]"),
    "shared by slots": (lambda p: torch.zeros(1, 16, 16), r"\[1, 16, 16\]"),
    "slots last": (lambda p: torch.zeros(16, 16, len(p)), r"\[16, 16, 12\]"),
    "bytes": (lambda p: torch.zeros_like(p, dtype=torch.uint8), "codes of torch.uint8"),
    "signed": (lambda p: torch.zeros_like(p, dtype=torch.int8), "codes of torch.int8"),
    "a subclass": (lambda p: torch.zeros_like(p).as_subclass(Codes), "Codes"),
}


def engine(
    optimizer: Callable[[Any], Optimizer], before: int = 0
) -> tuple[Callable[[], None], Sparsifier]:
    """Return a function that takes a step, and the engine; the first layer has 12 slots."""
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    sparsifier = Sparsifier(model, 8, block_size=16, density=1.0, exclude=["2"])
    of = optimizer(model.parameters())

    def take_step() -> None:
        model(torch.randn(4, 64)).square().mean().backward()
        of.step()
        of.zero_grad()

    for _ in range(before):
        take_step()
    sparsifier.attach(of)
    return take_step, sparsifier


@pytest.mark.parametrize("name", UNFIT)
def test_state_that_cannot_follow_is_refused_at_the_first_step(name: str) -> None:
    make, says = UNFIT[name]
    message = rf"`memory` of .*in {Keeps.__module__}\.Keeps.*{says}|{says}.*Keeps"

    def build(parameters: Any) -> Optimizer:
        return Keeps(parameters, makes={"memory": make, "exp_avg": torch.zeros_like})

    take_step, _ = engine(build)
    with pytest.raises(ValueError, match=message) as refused:
        take_step()
    for part in ("`memory`", "Keeps", "StateRule(", "or use another", "(layer '0')"):
        assert part in str(refused.value)
    if not name.startswith("slots"):  # it may belong to another number of slots
        with pytest.raises(ValueError, match=message):
            engine(build, before=1)


def test_a_layer_that_takes_part_later_is_checked_then() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(48, 32))
    sparsifier = Sparsifier(model, 8, block_size=16, density=1.0)
    makes = {"memory": lambda p: torch.eye(16) if len(p) == 6 else None}
    optimizer = Keeps(model.parameters(), makes=makes)
    sparsifier.attach(optimizer)
    model[0](torch.randn(4, 64)).square().mean().backward()
    optimizer.step()
    model(torch.randn(4, 64)).square().mean().backward()
    with pytest.raises(ValueError, match=r"`memory` of .*\(layer '1'\)"):
        optimizer.step()


def test_state_created_later_is_refused_at_an_update() -> None:
    parameter = make_parameter()
    optimizer = Lion([parameter])
    step(optimizer, parameter, torch.randn_like(parameter))
    slots, pending = torch.tensor([0]), torch.ones(4, dtype=torch.bool)
    optimizer.state[parameter]["precond"] = torch.eye(16)
    for refused in (
        lambda: prepare_reset(optimizer, parameter, slots),
        lambda: prepare_slot_removal(optimizer, parameter, slots),
        lambda: warm_start(optimizer, optimizer.param_groups[0], parameter, pending),
    ):
        with pytest.raises(ValueError, match=r"`precond` of shape \[16, 16\]"):
            refused()
    # A rule that leaves it out declares that it stays.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(STATE_RULES, Lion, StateRule(("exp_avg",)))
        prepare_reset(optimizer, parameter, slots)()
    assert not optimizer.state[parameter]["exp_avg"][0].any()
    assert torch.equal(optimizer.state[parameter]["precond"], torch.eye(16))


def test_as_many_slots_as_a_block_has_rows() -> None:
    """Then only names distinguish rows of slots from a matrix of the block's dimensions."""
    parameter = make_parameter(16)
    optimizer = Toy([parameter])
    for name in ("exp_avg_sq_row", "exp_avg_sq_col"):
        optimizer.state[parameter][name] = torch.ones(16, 16)
    optimizer.state[parameter]["exp_avg"] = torch.ones(16, 16, 16)
    prepare_reset(optimizer, parameter, torch.tensor([2]))()
    for state in state_tensors(optimizer, parameter).values():
        assert state.flatten(1).amax(1).tolist() == [1.0, 1.0] + [0.0] + [1.0] * 13
    optimizer.state[parameter]["precond"] = torch.eye(16)
    with pytest.raises(ValueError, match=r"`precond` .*capacity equals the block size.*StateRule"):
        prepare_reset(optimizer, parameter, torch.tensor([2]))


Rules = dict[str, tuple[Callable[[], StateRule], dict[str, Make], str]]
MOMENTS: dict[str, Make] = {"exp_avg": torch.zeros_like, "exp_avg_sq": torch.zeros_like}
ROWS: dict[str, Make] = {"exp_avg": torch.zeros_like, "rows": lambda p: torch.zeros(p.shape[:2])}
WRONG: Rules = {
    "a typo": (
        lambda: StateRule(("exp_avg", "exp_avg_sqr")),
        MOMENTS,
        "must name all.*`exp_avg_sq` of shape.*while there is no `exp_avg_sqr`",
    ),
    "one left out": (lambda: StateRule(("exp_avg",)), MOMENTS, "must name all.*`exp_avg_sq`"),
    "rows left out": (lambda: StateRule(("exp_avg",)), ROWS, "must name all.*`rows`"),
    "none there is": (
        lambda: StateRule(("momentum",)),
        {"precond": lambda p: torch.eye(16)},
        r"must name state that the optimizer has, among \['precond'\]; got \['momentum'\]",
    ),
    "no slots": (
        lambda: StateRule(("exp_avg", "exp_avg_sq", "precond")),
        {**MOMENTS, "precond": lambda p: torch.eye(16)},
        r"must name state that has slots.*`precond` of shape \[16, 16\]",
    ),
    "no betas": (
        lambda: StateRule(("exp_avg", "exp_avg_sq"), ("exp_avg_sq",)),
        MOMENTS,
        "`bias_corrected`.*must be False",
    ),
    "no such option": (
        lambda: StateRule(("exp_avg", "exp_avg_sq"), starts_at={"exp_avg": "initial"}),
        MOMENTS,
        "`starts_at`.*must name an option.*got 'initial'",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_found_at_the_first_step(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule, makes, message = WRONG[name]
    monkeypatch.setitem(STATE_RULES, Keeps, rule())
    with pytest.raises(ValueError, match=rf"{message}.*\(layer '0'\)") as refused:
        take_step, _ = engine(lambda p: Keeps(p, betas=None, makes=makes))
        take_step()
    assert f"{Keeps.__module__}.Keeps" in str(refused.value)


@pytest.mark.parametrize(
    ("rule", "makes"),
    [
        (_ := StateRule(("exp_avg", "max_exp_avg_sq")), {"exp_avg": torch.zeros_like}),
        (_, {}),
        (_, {"rms": lambda p: p.norm(), "seen": lambda p: 1}),
        (StateRule(()), {"precond": lambda p: torch.eye(16)}),
    ],
)
def test_a_rule_may_name_what_an_option_turns_off(
    rule: StateRule, makes: dict[str, Make], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STATE_RULES, Keeps, rule)
    take_step, sparsifier = engine(lambda p: Keeps(p, makes=makes))
    for _ in range(8):
        take_step()
    assert sparsifier.steps == 8


def test_a_rule_is_checked_when_it_is_made() -> None:
    with pytest.raises(TypeError, match=r"`tensors` must be a tuple.*'exp_avg'"):
        StateRule("exp_avg")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"`second_moments` must name .*'exp_avg_sq'"):
        StateRule(("exp_avg",), ("exp_avg_sq",))
    with pytest.raises(ValueError, match=r"`starts_at` must name .*'sum'"):
        StateRule(("exp_avg",), starts_at={"sum": "initial_accumulator_value"})


def test_users_can_add_their_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes precedence over shapes and names: here, nothing is warm-started."""
    monkeypatch.setitem(STATE_RULES, MyAdam, StateRule(("exp_avg", "exp_avg_sq")))
    parameter = make_parameter()
    optimizer = MyAdam([parameter], lr=LR)
    assert max(largest_updates(optimizer, parameter, 1.0, warm=True)[1:3]) > 2.5


def test_state_of_sharded_values_follows_by_its_shape() -> None:
    """The second of two ranks holds the last two of 5 slots."""
    torch.distributed.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (2,))

        def shard(*sizes: int) -> DTensor:
            shape = torch.Size([5, *sizes])
            stride = torch.empty(shape, device="meta").stride()
            part = torch.ones(2, *sizes)
            return DTensor.from_local(part, mesh, [Shard(0)], shape=shape, stride=stride)

        parameter = nn.Parameter(shard(16, 16))
        optimizer = Lion([parameter])
        optimizer.state[parameter] = {"exp_avg": shard(16, 16), "rows": shard(16), "step": 3}
        prepare_reset(optimizer, parameter, torch.tensor([0, 4]))()
        for name in ("exp_avg", "rows"):
            part = optimizer.state[parameter][name].to_local()
            assert part.flatten(1).amax(1).tolist() == [1.0, 0.0]
        # If the state is flat, a shard may split blocks.
        flat = torch.ones(640)
        optimizer.state[parameter]["s"] = DTensor.from_local(flat, mesh, [Shard(0)])
        with pytest.raises(ValueError, match=r"`s` of shape \[1280\]"):
            prepare_reset(optimizer, parameter, torch.tensor([0]))
    finally:
        torch.distributed.destroy_process_group()


# -- refused optimizers ---------------------------------------------------------------------------


class Muon(Toy):
    """An optimizer of a package that treats blocks as matrices."""


class MyMuon(Muon):
    pass


class MyLBFGS(LBFGS):
    pass


REFUSED: list[tuple[type[Optimizer], str]] = [
    *(
        (cls, r"whole matrices.*Put every `values` into AdamW, and keep Muon for dense")
        for cls in (Muon, MyMuon, getattr(torch.optim, "Muon", Muon))
    ),
    *((cls, r"vectors over all parameters together") for cls in (LBFGS, MyLBFGS)),
]


@pytest.mark.parametrize(("cls", "says"), REFUSED)
def test_what_works_on_more_than_blocks_is_refused_with_a_remedy(
    cls: type[Optimizer], says: str
) -> None:
    optimizer, parameter = cls([nn.Parameter(torch.zeros(16, 16))]), make_parameter()
    slots = torch.tensor([0])
    refused: list[Callable[[], Any]] = [
        lambda: check_state(optimizer, parameter),
        lambda: prepare_reset(optimizer, parameter, slots),
        lambda: prepare_slot_removal(optimizer, parameter, slots),
    ]
    message = rf"got {cls.__module__}\.{cls.__name__}\. .*{says}"
    for call in refused:
        with pytest.raises(ValueError, match=message):
            call()


# -- state of the dense weight --------------------------------------------------------------------

DENSE = (64, 48)


def stepped_dense(of: Callable[[Any], Optimizer]) -> tuple[Optimizer, nn.Parameter]:
    """Return an optimizer that stepped a weight which then became the values of 4 blocks."""
    weight = nn.Parameter(torch.randn(DENSE))
    optimizer = of([weight])
    for _ in range(2):
        step(optimizer, weight, torch.randn_like(weight))
    weight.grad, weight.data = None, torch.randn(4, 16, 16)
    return optimizer, weight


def factory(name: str) -> Callable[[Any], Optimizer]:
    return BY_SHAPE[name] if name in BY_SHAPE else lambda p: make(name, *p)


@pytest.mark.parametrize("name", [*OPTIMIZERS, *(name for name in BY_SHAPE if name != "sm3")])
def test_state_of_the_dense_weight_is_dropped(name: str) -> None:
    optimizer, weight = stepped_dense(factory(name))
    has_any = bool(state_tensors(optimizer, weight))
    if name == "late":
        step_of = optimizer.state[weight]
        step_of["momentum"], has_any = torch.zeros(DENSE), True
    assert discard_dense_state(optimizer, weight, DENSE) == has_any
    assert not discard_dense_state(optimizer, weight, DENSE)
    check_state(optimizer, weight)
    # It continues like an optimizer with a new parameter.
    twin = nn.Parameter(weight.detach().clone())
    fresh = factory(name)([twin])
    gradient = torch.randn_like(weight)
    for group in optimizer.param_groups:
        group.pop("step", None)
    for _ in range(2):
        step(optimizer, weight, gradient)
        step(fresh, twin, gradient)
    assert torch.equal(weight, twin)


@pytest.mark.parametrize(
    ("state", "is_dense"),
    [
        ({"buffer": torch.zeros(64, 48)}, True),
        ({"buffer": torch.zeros(48, 64)}, True),
        ({"codes": torch.zeros(64, 48, dtype=torch.uint8), "scale": torch.zeros(12)}, True),
        ({"rows": torch.zeros(64), "columns": torch.zeros(48)}, True),
        ({"columns": torch.zeros(1, 48)}, True),
        ({"GG": [torch.eye(64), torch.eye(48)], "exp_avg": torch.zeros(64, 48)}, True),
        ({"deep": {"buffer": torch.zeros(64, 48)}}, True),
        ({}, False),
        ({"step": torch.tensor(1.0)}, False),
        ({"exp_avg": torch.zeros(4, 16, 16)}, False),
        ({"exp_avg_sq_row": torch.zeros(4, 16), "exp_avg_sq_col": torch.zeros(4, 16)}, False),
        ({"exp_avg": torch.zeros(5, 16, 16)}, False),
    ],
)
def test_which_state_is_that_of_the_dense_weight(state: dict[str, Any], is_dense: bool) -> None:
    parameter, other = make_parameter(), nn.Parameter(torch.zeros(DENSE))
    optimizer = Toy([parameter, other])
    optimizer.state[parameter], optimizer.state[other] = state, {"buffer": torch.zeros(DENSE)}
    assert discard_dense_state(optimizer, parameter, DENSE) == is_dense
    assert (parameter in optimizer.state) == (not is_dense)
    assert other in optimizer.state


def test_as_many_slots_as_rows_are_not_taken_for_the_dense_weight() -> None:
    parameter = make_parameter(256)
    optimizer = Toy([parameter])
    optimizer.state[parameter] = {"a": torch.zeros(256), "b": torch.zeros(256, 16, 16)}
    assert not discard_dense_state(optimizer, parameter, (256, 256))
    optimizer.state[parameter] = {"rows": torch.zeros(256), "columns": torch.zeros(512)}
    assert discard_dense_state(optimizer, parameter, (256, 512))


def test_an_adagrad_that_took_no_step_loses_nothing() -> None:
    weight = nn.Parameter(torch.randn(DENSE))
    optimizer = Adagrad([weight], initial_accumulator_value=0.5)
    weight.data = torch.randn(4, 16, 16)
    assert not discard_dense_state(optimizer, weight, DENSE)
    assert torch.equal(optimizer.state[weight]["sum"], torch.full((4, 16, 16), 0.5))


def test_discarded_optimizer_state_warns_once_with_the_layers() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32))
    sparsifier = Sparsifier(model, 8, block_size=16, density=0.5)
    optimizer = AdamW(model.parameters())
    first, second = (layer.values for layer in sparsifier.layers.values())
    optimizer.state[first] = {"step": torch.tensor(9.0), "exp_avg": torch.zeros(48, 64)}
    optimizer.state[second] = {"step": torch.tensor(9.0), "exp_avg": torch.zeros(32, 48)}
    with pytest.warns(UserWarning, match=r"reset for: 0, 2\.") as said:
        sparsifier.attach(optimizer)
    assert sum("reset for" in str(warning.message) for warning in said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[first]["step"] == 1
    assert optimizer.state[first]["exp_avg"].shape == first.shape


@pytest.mark.parametrize("of", [Toy, AdamW])
def test_state_of_other_slots_is_still_refused(of: type[Optimizer]) -> None:
    parameter = make_parameter()
    optimizer = of([parameter])
    optimizer.state[parameter]["exp_avg"] = torch.zeros(5, 16, 16)
    with pytest.raises(RuntimeError, match=r"`exp_avg` must .*\[4, 16, 16\].*got \[5, 16, 16\]"):
        check_state(optimizer, parameter)


def test_find_optimizer_returns_the_group_of_the_same_parameter_object() -> None:
    first, second, third, stranger = (nn.Parameter(torch.zeros(1, 16, 16)) for _ in range(4))
    one = SGD([first], lr=LR)
    two = AdamW([{"params": [second], "betas": (0.9, 0.95)}, {"params": [third]}], lr=LR)
    assert find_optimizer([one, two], first) == (one, one.param_groups[0])
    assert find_optimizer([one, two], third) == (two, two.param_groups[1])
    found = find_optimizer([one, two], second)
    assert found is not None and found[1]["betas"] == (0.9, 0.95)
    assert find_optimizer([one, two], stranger) is None
    assert find_optimizer([], first) is None
