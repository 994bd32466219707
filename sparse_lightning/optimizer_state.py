"""What happens to optimizer state when blocks are dropped and grown, and when slots are given up.

A changed slot starts from the optimizer's initial state. That alone would make a grown block jump:
late in training, a second moment that starts from zero without its bias correction lets the first
updates reach several learning rates. So the first gradient that a grown slot sees also
warm-starts its second moment (`warm_start`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning.sharding import all_slots, at_local_slots, local_part, local_slots


@dataclass(frozen=True)
class StateRule:
    """How one optimizer class keeps state of slots.

    Attributes:
        tensors: names of the state that follows the slots: tensors of the parameter's shape, or
            with 1 in place of some sizes but the first.
        second_moments: those among them that are running means of g^2.
        bias_corrected: whether the optimizer divides these by `1 - beta2 ** step`, with `betas[1]`
            of the parameter's group.
        starts_at: the option that holds what the tensors begin with; None if they begin at zero.
    """

    tensors: tuple[str, ...]
    second_moments: tuple[str, ...] = ()
    bias_corrected: bool = True
    starts_at: str | None = None


_ADAM = StateRule(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("exp_avg_sq", "max_exp_avg_sq"))

# By exact class: a subclass may keep other state. Users may add their own.
STATE_RULES: dict[type[torch.optim.Optimizer], StateRule] = {
    torch.optim.SGD: StateRule(("momentum_buffer",)),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    # Where RMSprop is centered, `grad_avg` stays at zero: the variance then begins as all of g^2,
    # so that the first update is the smallest.
    torch.optim.RMSprop: StateRule(
        ("square_avg", "momentum_buffer", "grad_avg"), ("square_avg",), bias_corrected=False
    ),
    # Its sum needs no warm start: the first update of an empty one is the learning rate, and
    # every later one is smaller.
    torch.optim.Adagrad: StateRule(("sum",), starts_at="initial_accumulator_value"),
    # Its beta2 is 0 at the first step, so its means are unbiased from there on.
    torch.optim.Adafactor: StateRule(
        ("row_var", "col_var"), ("row_var", "col_var"), bias_corrected=False
    ),
}

# By name, as there are several of them and not every PyTorch has its own.
_REMEDIES = {
    "Muon": "It orthogonalises whole matrices, which packed blocks are not. Put every `values` "
    "into AdamW, and keep Muon for dense matrices."
}
_REMEDY = (
    "Use one of these, or describe its state: "
    "sparse_lightning.optimizer_state.STATE_RULES[YourOptimizer] = StateRule(...)."
)


def state_rule(optimizer: torch.optim.Optimizer) -> StateRule:
    """Return the rule of an optimizer's class.

    Raises:
        ValueError: for a class that is not in `STATE_RULES`, by its name.
    """
    rule = STATE_RULES.get(type(optimizer))
    if rule is None:
        known = ", ".join(sorted(cls.__name__ for cls in STATE_RULES))
        name = type(optimizer).__name__
        raise ValueError(
            f"The optimizer must be one whose state can follow the blocks ({known}); got {name}. "
            f"{_REMEDIES.get(name, _REMEDY)}"
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


def check_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Check that state, as restored from a checkpoint, has the slots of a parameter.

    Args:
        optimizer: holds `parameter`; its class must have a rule.
        parameter: `[capacity, block_size, block_size]`.

    Raises:
        RuntimeError: for a tensor of another shape, naming it.
    """
    slots, *sizes = parameter.shape
    allowed = [{slots}, *({1, size} for size in sizes)]
    for name, tensor in _slot_state(optimizer, parameter).items():
        pairs = zip(tensor.shape, allowed, strict=False)
        if tensor.dim() != len(allowed) or any(size not in choices for size, choices in pairs):
            raise RuntimeError(
                f"The restored optimizer state `{name}` must have the shape of `values`, "
                f"{list(parameter.shape)}, or 1 in place of its last sizes; "
                f"got {list(tensor.shape)}. "
                "The checkpoint's model and optimizer do not belong together."
            )


def prepare_reset(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: Tensor
) -> Callable[[], None]:
    """Return what puts the state of some slots back to its beginning, and only writes in place.

    Args:
        optimizer: holds `parameter`; its class must have a rule.
        parameter: `[capacity, block_size, block_size]`.
        slots: int64 `[n]`.
    """
    starts_at = state_rule(optimizer).starts_at
    # PyTorch, too, takes the default and not the group's option.
    start = 0.0 if starts_at is None else optimizer.defaults[starts_at]
    parts = [
        (local_part(tensor), at_local_slots(slots, tensor))
        for tensor in _slot_state(optimizer, parameter).values()
    ]

    @torch.no_grad()
    def write() -> None:
        for part, mine in parts:
            # `part[mine] = start` would have the host wait for a GPU.
            part.index_fill_(0, mine, start)

    return write


@torch.no_grad()
def prepare_keep(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: Tensor
) -> Callable[[], None]:
    """Return what gives up the state of all slots but some, and its memory.

    The function that is returned takes no memory and cannot fail. With Adafactor alone it changes
    what follows: that takes the RMS of weights and updates over all slots, and so its steps are
    larger without the empty ones.

    Args:
        optimizer: holds `parameter`; its class must have a rule.
        parameter: may have its new shape already; only its identity counts.
        kept: int64 `[capacity]`, what `BlockSparseLinear.shrink` returned.
    """
    left = {name: tensor[kept] for name, tensor in _slot_state(optimizer, parameter).items()}

    def write() -> None:
        if left:
            optimizer.state[parameter].update(left)

    return write


@torch.no_grad()
def warm_start(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    pending: Tensor,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Give grown slots a second moment from the first gradient they see.

    The moment becomes c * max(g^2, mean of g^2 over the block): what a constant gradient of that
    size would have left there after the steps taken so far. So c is 1 - beta2^step where the
    optimizer corrects that bias (the Adams), and 1 where it does not (RMSprop, Adafactor). The
    mean guards the elements whose own first gradient happens to be small. Where only means over
    rows and columns are kept (Adafactor) they are those of that moment; an element may then begin
    with up to sqrt(2) times the update that its gradient would have later, where a block's
    gradient is all in a few elements. Call it just before the optimizer steps.

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
    squared = (local_part(parameter.grad) / grad_scale).square()
    mean = squared.mean((1, 2), keepdim=True)
    ready = pending[local_slots(parameter)] & (mean.flatten() > 0) & mean.flatten().isfinite()
    for name, tensor in _slot_state(optimizer, parameter).items():
        if name in rule.second_moments:
            tensor = local_part(tensor)
            moment = torch.maximum(squared, mean)
            if rule.bias_corrected:
                moment *= 1 - group["betas"][1] ** optimizer.state[parameter]["step"]
            moment = _mean_to(moment, tensor.shape)
            tensor.copy_(torch.where(ready.view(-1, 1, 1), moment, tensor))
    return pending & ~all_slots(ready, parameter)


def _slot_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return the state that has slots by the rule, as far as the optimizer has made it."""
    rule, state = state_rule(optimizer), optimizer.state.get(parameter, {})
    return {name: state[name] for name in rule.tensors if isinstance(state.get(name), Tensor)}


def _mean_to(tensor: Tensor, shape: torch.Size) -> Tensor:
    """Return the means over those dimensions in which `shape` has 1 instead."""
    reduced = [d for d, size in enumerate(shape) if size != tensor.shape[d]]
    return tensor.mean(reduced, keepdim=True) if reduced else tensor
