"""Optimizer state of dropped and grown slots: it starts anew, and no grown block jumps."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import (
    SGD,
    Adafactor,
    Adagrad,
    Adam,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
)

from sparse_lightning.optimizer_state import (
    STATE_RULES,
    StateRule,
    check_state,
    find_optimizer,
    prepare_keep,
    prepare_reset,
    state_rule,
    warm_start,
)

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
    """Whatever state has slots, asked of the optimizer and not of the rule."""
    state = optimizer.state[parameter]
    return {n: t for n, t in state.items() if isinstance(t, Tensor) and t.dim()}


def clones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


# -- resetting --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_puts_exactly_the_changed_slots_to_their_beginning(name: str) -> None:
    parameter, other, fresh = make_parameter(), make_parameter(), make_parameter()
    optimizer = make(name, parameter, other)
    for _ in range(3):
        other.grad = torch.randn_like(other)
        step(optimizer, parameter, torch.randn_like(parameter))
    before = clones(state_tensors(optimizer, parameter))
    before_other = clones(state_tensors(optimizer, other))
    prepare_reset(optimizer, parameter, torch.tensor([1, 3]))()
    # What the optimizer itself begins with: a gradient of zero adds nothing to it.
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
    assert names <= {*state_rule(optimizer).tensors}


def test_reset_takes_adagrads_start() -> None:
    parameter = make_parameter()
    optimizer = Adagrad([parameter], initial_accumulator_value=0.25)
    step(optimizer, parameter, torch.ones_like(parameter))
    assert (optimizer.state[parameter]["sum"] == 1.25).all()
    prepare_reset(optimizer, parameter, torch.tensor([2]))()
    assert optimizer.state[parameter]["sum"][:, 0, 0].tolist() == [1.25, 1.25, 0.25, 1.25]


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
    """The rows of 3 and those of -1."""
    return torch.tensor([of_threes] * 8 + [of_ones] * 8).unsqueeze(1).expand(16, 16)


BETAS = {"betas": (0.9, 0.5)}
# c is 1 - 0.5^2 = 0.75 after two steps, or 1; the moment is that of max(9, 5) and of max(1, 5).
# A column's mean of it is 7. What is not named stays at zero.
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
    optimizer = Adam([parameter], betas=(0.9, 0.5))
    step(optimizer, parameter, torch.zeros_like(parameter))
    optimizer.state[parameter]["step"] = count
    parameter.grad = THREES.expand(4, 16, 16)
    pending = torch.tensor([False, True, False, False])
    warm_start(optimizer, optimizer.param_groups[0], parameter, pending)
    torch.testing.assert_close(optimizer.state[parameter]["exp_avg_sq"][1], squares(6.75, 3.75))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_host_never_waits_for_a_number(name: str) -> None:
    """On meta there are none: whatever read one would raise."""
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
    """Put state where `LATE` steps of a constant gradient would (if centered: of changing sign)."""
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
    """What a constant gradient moves a weight by, once its state has settled."""
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
    """Grow slots 1 and 2 late; return each slot's largest of 60 updates, in usual ones.

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


# Adafactor is exact for gradients of one size; for others `test_factored_moments` says what holds.
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
    # A block that hardly moved would be no success either. RAdam moves by 0.83 at this step.
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
    """Its variance falls from g^2 towards 0, as that of any block: 1 - (1 - alpha^k)^2 of g^2."""
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
    """At worst sqrt(2) of the usual update: where the gradient is all in one element."""
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
        prepare_keep(optimizer, parameter, slots)()
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


# -- other slots, and fewer -------------------------------------------------------------------


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
            tensor.flatten(1),
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
def test_keeping_slots_gives_up_the_others_with_their_memory(name: str) -> None:
    parameter, other = make_parameter(), make_parameter()
    optimizer = make(name, parameter, other)
    other.grad = torch.randn_like(other)
    step(optimizer, parameter, torch.randn_like(parameter))
    before, before_other = dict(optimizer.state[parameter]), dict(optimizer.state[other])
    kept = torch.tensor([0, 3, 1])
    prepare_keep(optimizer, parameter, kept)()
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


def test_keeping_slots_before_the_first_step_leaves_no_state_behind() -> None:
    parameter = make_parameter()
    optimizer = make("adam", parameter)
    prepare_keep(optimizer, parameter, torch.tensor([0]))()
    assert not optimizer.state


# -- which optimizers -------------------------------------------------------------------------


class Homemade(Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": LR})


class MyAdam(Adam):
    pass


class Muon(Homemade):
    """One of the packages that take blocks for matrices."""


def calls(optimizer: Optimizer, parameter: nn.Parameter) -> list[Any]:
    slots = torch.tensor([0])
    return [
        lambda: state_rule(optimizer),
        lambda: check_state(optimizer, parameter),
        lambda: prepare_reset(optimizer, parameter, slots)(),
        lambda: prepare_keep(optimizer, parameter, slots)(),
        lambda: warm_start(optimizer, {}, parameter, torch.ones(4, dtype=torch.bool)),
    ]


@pytest.mark.parametrize("cls", [Homemade, MyAdam, torch.optim.LBFGS])
def test_an_unknown_optimizer_is_refused_by_name_with_the_remedy(cls: type[Optimizer]) -> None:
    parameter = make_parameter()
    message = rf"\(Adafactor, .*Adam, AdamW.*\); got {cls.__name__}\. .*STATE_RULES\[.*\] = Sta"
    for refused in calls(cls([parameter]), parameter):
        with pytest.raises(ValueError, match=message):
            refused()


@pytest.mark.parametrize("cls", [Muon, getattr(torch.optim, "Muon", Muon)])
def test_muon_is_refused_with_a_remedy_of_its_own(cls: type[Optimizer]) -> None:
    optimizer = cls([nn.Parameter(torch.zeros(16, 16))])
    message = r"got Muon\. .*whole matrices.*Put every `values` into AdamW, and keep Muon for dense"
    for refused in calls(optimizer, make_parameter()):
        with pytest.raises(ValueError, match=message):
            refused()


def test_users_can_add_their_own_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(STATE_RULES, MyAdam, StateRule(("exp_avg", "exp_avg_sq"), ("exp_avg_sq",)))
    parameter = make_parameter()
    largest = largest_updates(MyAdam([parameter], lr=LR), parameter, 10.0, warm=True)
    assert all(0.9 < largest[slot] <= 1.1 for slot in (1, 2))


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
