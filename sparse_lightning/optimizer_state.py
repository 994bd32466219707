"""What happens to optimizer state when blocks are dropped and grown.

A changed slot starts from the optimizer's initial state. That alone would make a grown block jump:
late in training, a second moment that starts from zero without its bias correction lets the first
updates reach several learning rates. So the first gradient that a grown slot sees also
warm-starts its second moment (`warm_start`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StateRule:
    """How one optimizer class keeps state of the parameter's shape.

    Attributes:
        zero: names of the tensors that begin at zero.
        second_moments: those among them that are running means of g^2, each bias-corrected by
            `1 - beta2 ** step` with `betas[1]` of the parameter's group.
    """

    zero: tuple[str, ...]
    second_moments: tuple[str, ...] = ()


_ADAM = StateRule(
    zero=("exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    second_moments=("exp_avg_sq", "max_exp_avg_sq"),
)

# By exact class: a subclass may keep other state. Users may add their own.
STATE_RULES: dict[type[torch.optim.Optimizer], StateRule] = {
    torch.optim.SGD: StateRule(zero=("momentum_buffer",)),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
}


def state_rule(optimizer: torch.optim.Optimizer) -> StateRule:
    """Return the rule of an optimizer's class.

    Raises:
        ValueError: for a class that is not in `STATE_RULES`, by its name.
    """
    rule = STATE_RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(sorted(cls.__name__ for cls in STATE_RULES))
        raise ValueError(
            f"The optimizer must be one whose state can follow the blocks ({known}); got "
            f"{type(optimizer).__name__}. Use one of these, or describe its state: "
            "sparse_lightning.optimizer_state.STATE_RULES[YourOptimizer] = StateRule(...)."
        )
    return rule


def find_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], parameter: nn.Parameter
) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    """Return the optimizer and the parameter group that hold a parameter, or None."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return optimizer, group
    return None


@torch.no_grad()
def reset_slots(optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: Tensor) -> None:
    """Put the state of some slots back to its beginning.

    Args:
        optimizer: holds `parameter`; its class must have a rule.
        parameter: `[capacity, block_size, block_size]`.
        slots: int64 `[n]`.
    """
    rule = state_rule(optimizer)
    state = optimizer.state.get(parameter, {})
    for name in rule.zero:
        if isinstance(state.get(name), Tensor):
            state[name][slots] = 0


@torch.no_grad()
def warm_start(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    pending: Tensor,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Give grown slots a second moment from the first gradient they see.

    The moment becomes c * max(g^2, mean of g^2 over the block), with c = 1 - beta2^step: what a
    constant gradient of that size would have left there after the steps taken so far. The mean
    guards the elements whose own first gradient happens to be small. Call it just before the
    optimizer steps.

    Args:
        optimizer: holds `parameter`; its class must have a rule.
        group: the parameter group of `parameter`.
        parameter: `[capacity, block_size, block_size]`, with its gradient.
        pending: bool `[capacity]`, the grown slots that have not seen a gradient yet.
        grad_scale: what the gradient is still multiplied by (a fused optimizer under a
            GradScaler); 1 otherwise.

    Returns:
        The slots that are still pending: their gradient was zero, or not finite.
    """
    rule = state_rule(optimizer)
    if parameter.grad is None:
        return pending
    squared = (parameter.grad / grad_scale).square()
    mean = squared.mean((1, 2), keepdim=True)
    ready = pending & (mean.flatten() > 0) & mean.flatten().isfinite()
    state = optimizer.state.get(parameter, {})
    for name in rule.second_moments:
        if isinstance(state.get(name), Tensor):
            correction = 1 - group["betas"][1] ** state["step"]
            moment = correction * torch.maximum(squared, mean)
            state[name].copy_(torch.where(ready.view(-1, 1, 1), moment, state[name]))
    return pending & ~ready
