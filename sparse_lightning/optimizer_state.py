"""Optimizer state when blocks are dropped and grown, and when slots are removed.

A changed slot starts from the optimizer's initial state. That alone would make a grown block jump:
late in training, a second moment that starts from zero without its bias correction lets the first
updates reach several learning rates. So the first gradient of a grown slot also warm-starts its
second moment (`warm_start`).

A rule for the optimizer's class (`STATE_RULES`) declares which state has slots; without a rule, the
shapes of the state decide. Only the state in `optimizer.state[parameter]` is considered.

A layer that becomes block-sparse or dense keeps its parameter object, so an optimizer may hold
state of the parameter's earlier shape. That state is discarded before the optimizer's next step
(`record_reshape`).
"""

from __future__ import annotations

import math
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from sparse_lightning import linear, ranks
from sparse_lightning.nm_pattern import Moves
from sparse_lightning.sharding import (
    gather_slots,
    is_sharded,
    local_part,
    local_slots,
    prepare_slot_change,
)
from sparse_lightning.stepping import not_compiled


@dataclass(frozen=True)
class StateRule:
    """The per-slot state of one optimizer class.

    Attributes:
        tensors: names of the state that follows the slots. These are tensors of the shape of
            `values`, `[capacity, rows, columns]`; of that shape with some of the last two
            sizes left out or 1, such as means over rows; or of that shape flattened. Tensors that
            an option turns off may be missing. State that is not named is left unchanged.
        second_moments: names among `tensors` that are running means of g^2.
        bias_corrected: whether the second moments begin at zero and have a constant decay, the
            smallest of the group's `betas[1:]`, so that after `step` steps they hold
            `1 - beta ** step` of the mean. False if they hold the whole mean at any time.
        starts_at: maps the name of a tensor to the option that holds its initial value, read from
            the parameter's group (for Adagrad, which ignores groups, from the defaults). Tensors
            without an entry begin at zero.

    Raises:
        TypeError: if `tensors` or `second_moments` is a string instead of a tuple.
        ValueError: for a name in `second_moments` or `starts_at` that is not in `tensors`.
    """

    tensors: tuple[str, ...]
    second_moments: tuple[str, ...] = ()
    bias_corrected: bool = True
    starts_at: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for argument in ("tensors", "second_moments"):
            if isinstance(getattr(self, argument), str):
                raise TypeError(
                    f"`{argument}` must be a tuple of names; got {getattr(self, argument)!r}. "
                    'Write ("name",) for one.'
                )
        for argument in ("second_moments", "starts_at"):
            for name in getattr(self, argument):
                if name not in self.tensors:
                    raise ValueError(
                        f"`{argument}` must name state in `tensors`, {list(self.tensors)}; "
                        f"got {name!r}. Add it to `tensors`, too."
                    )


_ADAM = StateRule(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), ("exp_avg_sq", "max_exp_avg_sq"))

# By exact class: a subclass may keep other state. Users may add their own.
STATE_RULES: dict[type[torch.optim.Optimizer], StateRule] = {
    torch.optim.SGD: StateRule(("momentum_buffer",)),
    torch.optim.Adam: _ADAM,
    torch.optim.AdamW: _ADAM,
    torch.optim.NAdam: _ADAM,
    torch.optim.RAdam: _ADAM,
    # If RMSprop is centered, `grad_avg` of a grown slot stays at zero: the variance then begins as
    # the whole of g^2, so the first update is the smallest.
    torch.optim.RMSprop: StateRule(
        ("square_avg", "momentum_buffer", "grad_avg"), ("square_avg",), bias_corrected=False
    ),
    # Adagrad's sum needs no warm start: with an empty sum the first update equals the learning
    # rate, and every later one is smaller.
    torch.optim.Adagrad: StateRule(("sum",), starts_at={"sum": "initial_accumulator_value"}),
    # Adafactor's beta2 is 0 at the first step, so its means are unbiased from then on.
    torch.optim.Adafactor: StateRule(
        ("row_var", "col_var"), ("row_var", "col_var"), bias_corrected=False
    ),
}

# Second moments, by name, of classes that have no rule. The row and column means of Adafactor have
# different names in PyTorch, transformers and timm.
_SECOND_MOMENTS = {
    "exp_avg_sq",
    "max_exp_avg_sq",
    "square_avg",
    "exp_avg_sq_row",
    "exp_avg_sq_col",
    "exp_avg_sq_r",
    "exp_avg_sq_c",
    "row_var",
    "col_var",
    "exp_avg_var",  # AdaBelief: variance of g around its mean, which is zero in a grown slot
    "max_exp_avg_var",
    "exp_avg_res_row",
    "exp_avg_res_col",
}
# CAME: mean squared deviations of normalised updates (divided by the root of a second moment) from
# their mean. The normalised first update of a grown slot is about 1, whatever its gradient.
_NORMALISED_MOMENTS = {"exp_avg_res_row", "exp_avg_res_col"}
# Class names, since several libraries have these classes. Their means begin as the first g^2.
_NOT_BIAS_CORRECTED = {"ADOPT", "Adopt"}
_STARTS_AT = {"sum": "initial_accumulator_value", "step_size": "lr"}  # Adagrad's and Rprop's

# Class names, since several libraries have these classes and older PyTorch has no Muon.
_REFUSED = {
    "Muon": "It orthogonalises whole matrices, which packed blocks are not. Put every `values` "
    "into AdamW, and keep Muon for dense matrices.",
    "LBFGS": "It keeps vectors over all parameters together, in which slots have no state of "
    "their own. Use an optimizer that keeps its state per parameter.",
}


def state_rule(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> StateRule:
    """Return the rule by which an optimizer's state of a parameter follows its slots.

    The rule is that of `STATE_RULES` for the exact class, checked against the existing state. For a
    class without a rule, the shapes of its state decide: tensors that have slots follow the slots,
    and single numbers stay.

    Args:
        optimizer: optimizer that holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.

    Raises:
        ValueError: for an optimizer that works on whole matrices or on all parameters at once, or
            that wraps another; for state that cannot follow the slots, naming class, state and
            shape; and for a rule that contradicts the state.
    """
    rule = STATE_RULES.get(type(optimizer))
    if rule is not None:
        _check_rule(rule, optimizer, parameter)
        return rule
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _REFUSED:
            raise ValueError(
                "The optimizer must be one whose state can follow the blocks; "
                f"got {class_name(optimizer)}. {_REFUSED[cls.__name__]}"
            )
    for name, inner in vars(optimizer).items():
        # Lookahead and SAM wrap an optimizer, whose state would not follow.
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
            raise ValueError(
                "The optimizer must be one whose state can follow the blocks, and not wrap another "
                f"that has a state of its own; got {class_name(optimizer)} around "
                f"{type(inner).__name__}. Unless the outer optimizer keeps averages of weights, "
                f"attach the inner one, `attach(optimizer.{name})`."
            )
    return _rule_by_shape(optimizer, parameter)


def _check_rule(rule: StateRule, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Raise ValueError if a rule contradicts the state that an optimizer has."""
    state = _tensors_by_name(optimizer, parameter)
    missing = [name for name in rule.tensors if name not in optimizer.state.get(parameter, {})]
    for name, tensors in state.items():
        value = optimizer.state[parameter][name]
        is_by_slot = isinstance(value, Tensor) and _has_slots(value, parameter)
        if name in rule.tensors and not is_by_slot:
            raise ValueError(
                f"The StateRule of {class_name(optimizer)} must name state that has slots, as "
                f"`values` {list(parameter.shape)} has; got `{name}` of {_shapes(tensors)}. Leave "
                "it out of the rule if dropping and growing blocks must not change it."
            )
        # Tensors of one or two dimensions may match by chance; then the rule decides.
        if name not in rule.tensors and is_by_slot and value.dim() >= 2:
            if value.dim() == 2 and _is_ambiguous(name, value, parameter):
                continue
            raise ValueError(
                f"The StateRule of {class_name(optimizer)} must name all state that has slots; got "
                f"`{name}` of {_shapes(tensors)}, which it leaves out{_missing_note(missing)}. Add "
                "it to `tensors` of the rule."
            )
    if state and rule.tensors and len(missing) == len(rule.tensors):
        raise ValueError(
            f"The StateRule of {class_name(optimizer)} must name state that the optimizer has, "
            f"among {list(state)}; got {list(missing)}. Correct `tensors` of the rule."
        )
    for option in rule.starts_at.values():
        if option not in optimizer.defaults:
            raise ValueError(
                f"`starts_at` in the StateRule of {class_name(optimizer)} must name an option of "
                f"the optimizer, among {list(optimizer.defaults)}; got {option!r}. Correct the "
                "rule."
            )
    is_corrected = rule.bias_corrected and any(name in state for name in rule.second_moments)
    groups, parameter_state = optimizer.param_groups, optimizer.state.get(parameter, {})
    if is_corrected and not any(_has_known_decay(group, parameter_state) for group in groups):
        raise ValueError(
            f"`bias_corrected` in the StateRule of {class_name(optimizer)} must be False where the "
            "optimizer has no option `betas`, or no `step` in its state or its groups; got True, "
            f"options {list(optimizer.defaults)} and state {list(parameter_state)}. Correct the "
            "rule."
        )


def _rule_by_shape(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> StateRule:
    """Return a rule for a class that has none, derived from the shapes of its state."""
    names = []
    for name, tensors in _tensors_by_name(optimizer, parameter).items():
        value = optimizer.state[parameter][name]
        reason = _why_it_cannot_follow(name, value, parameter)
        if reason is not None:
            raise ValueError(
                "The optimizer's state must have slots, as `values` "
                f"{list(parameter.shape)} has, or be single numbers; got `{name}` of "
                f"{_shapes(tensors)} in {class_name(optimizer)}, {reason}. Declare which state has "
                "slots by sparse_lightning.optimizer_state.STATE_RULES"
                f"[{type(optimizer).__name__}] = StateRule(...), or use another optimizer."
            )
        names.append(name)
    starts_at = {n: _STARTS_AT[n] for n in names if _STARTS_AT.get(n) in optimizer.defaults}
    second_moments = tuple(name for name in names if name in _SECOND_MOMENTS)
    classes = {cls.__name__ for cls in type(optimizer).__mro__}
    is_corrected = classes.isdisjoint(_NOT_BIAS_CORRECTED)
    return StateRule(tuple(names), second_moments, is_corrected, starts_at)


def _why_it_cannot_follow(name: str, value: object, parameter: nn.Parameter) -> str | None:
    """Return why state cannot follow the slots, or None if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    part = local_part(value)
    if type(part) not in (Tensor, nn.Parameter):
        return f"a {type(part).__name__}, which is not divided by slots"
    if part.dtype.itemsize == 1 and part.dtype != torch.bool:
        return f"codes of {part.dtype}, whose initial value need not be zero"
    if not _has_slots(value, parameter):
        return "whose shape does not tell which part belongs to a slot"
    if _is_ambiguous(name, value, parameter):
        return "where the capacity equals the block size, so that slots look like rows"
    return None


def _has_slots(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor has the shape of per-slot state, as `StateRule.tensors` describes."""
    if tensor.dim() == 1 and tensor.numel() == parameter.numel():
        return not is_sharded(tensor)  # its shards would split blocks
    if tensor.dim() not in (1, 2, 3) or tensor.shape[0] != parameter.shape[0]:
        return False
    return _has_sizes_of_blocks(tensor, parameter)


def _has_sizes_of_blocks(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether the sizes after the first are 1 or those of a block, in part or in full."""
    rows, columns = parameter.shape[1:]
    sizes = tensor.shape[1:]
    if len(sizes) == 2:
        return sizes[0] in (1, rows) and sizes[1] in (1, columns)
    return all(size in (1, rows, columns) for size in sizes)


def _is_ambiguous(name: str, tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether the first dimension of a tensor may index rows of a block, not slots."""
    slots, *block = parameter.shape
    is_small = tensor.dim() < 3 and tensor.numel() < parameter.numel()
    return slots in block and is_small and "row" not in name and "col" not in name


def _tensors_by_name(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, list[Tensor]]:
    """Return the tensors of more than one element in an optimizer's state, by state name."""
    found = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        tensors = [tensor for tensor in _tensors_in(value) if tensor.numel() > 1]
        if tensors:
            found[name] = tensors
    return found


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield a tensor, or the tensors in a container or in the attributes of an object."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, Iterable):
        # The items of a string are strings again, and an iterator would be consumed.
        if not isinstance(value, str | bytes | Iterator):
            for item in value:
                yield from _tensors_in(item)
    elif hasattr(value, "__dict__") and not callable(value):
        # Other attributes are not searched, as they may refer to anything, such as the model.
        for item in vars(value).values():
            if isinstance(item, Tensor | list | tuple | set | deque):
                yield from _tensors_in(item)


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"shape {list(tensor.shape)}" for tensor in tensors)


def _missing_note(missing: list[str]) -> str:
    return f", while there is no {', '.join(f'`{name}`' for name in missing)}" if missing else ""


def class_name(optimizer: object) -> str:
    """Return the qualified name of an optimizer's class, as several libraries have an Adafactor."""
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def find_optimizer(
    optimizers: Iterable[torch.optim.Optimizer], parameter: nn.Parameter
) -> tuple[torch.optim.Optimizer, dict[str, Any]] | None:
    """Return the optimizer and the parameter group that hold a parameter, or None."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            if any(p is parameter for p in group["params"]):
                return optimizer, group
    return None


def has_slot_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> bool:
    """Return whether an optimizer has state of a parameter's slots."""
    return bool(_slot_state(state_rule(optimizer, parameter), optimizer, parameter))


def check_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Check that an optimizer's state of a parameter, perhaps restored, can follow its slots.

    Args:
        optimizer: optimizer that holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.

    Raises:
        RuntimeError: for a tensor with another number of slots, naming it.
        ValueError: as `state_rule`.
    """
    rule = STATE_RULES.get(type(optimizer))
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() <= 1 or _has_slots(value, parameter):
            continue
        if name in rule.tensors if rule is not None else _has_other_slots(value, parameter):
            raise RuntimeError(
                f"The restored optimizer state `{name}` must have the shape of `values`, "
                f"{list(parameter.shape)}, or that shape without its last sizes; got "
                f"{list(value.shape)} in {class_name(optimizer)}. The checkpoint's model and "
                "optimizer do not belong together."
            )
    state_rule(optimizer, parameter)


def _has_other_slots(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Return whether a tensor would have slots if `values` had another capacity."""
    return tensor.dim() == 3 and tensor.shape[0] > 1 and _has_sizes_of_blocks(tensor, parameter)


def discard_dense_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dense_shape: tuple[int, int]
) -> bool:
    """Discard an optimizer's state of a parameter from when it was a dense weight.

    State of other shapes that `record_reshape` has recorded for this shape is discarded too.

    Args:
        optimizer: optimizer that holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.
        dense_shape: `(out_features, in_features)` of the weight.

    Returns:
        True if learned state was discarded.
    """
    earlier = {dense_shape, dense_shape[::-1], *_earlier_shapes.get(tuple(parameter.shape), ())}
    return _discard_state_of_shapes(earlier, optimizer, parameter)


def _discard_state_of_shapes(
    earlier: Iterable[tuple[int, ...]], optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> bool:
    """Discard an optimizer's state of a parameter if it belongs to an earlier shape of it.

    The optimizer then creates new state in its next step, as for a new parameter. Two classes get
    it here: Adagrad, which creates state only in its constructor, and SGD, which if fused requires
    a momentum buffer for either all parameters or none.

    Returns:
        True if learned state was discarded.
    """
    found, current = _tensors_by_name(optimizer, parameter), tuple(parameter.shape)
    shapes = {tuple(tensor.shape) for tensors in found.values() for tensor in tensors}
    # Means over rows or slots may fit both shapes by chance.
    possible = {state_shape for shape in earlier for state_shape in _state_shapes(shape)}
    outdated = (shapes & possible) - _state_shapes(current)
    if outdated.isdisjoint(earlier) and (not outdated or current in shapes):
        return False
    state = optimizer.state.pop(parameter)
    if isinstance(optimizer, torch.optim.Adagrad):
        start = optimizer.defaults["initial_accumulator_value"]
        optimizer.state[parameter] = {
            "step": torch.zeros_like(state["step"]),
            "sum": torch.full_like(parameter, start, requires_grad=False),
        }
        return bool(state["step"] > 0)
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return True


def _state_shapes(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes of the state that an optimizer may keep of a matrix or of blocks.

    These are the parameter's shape; that shape flattened; that shape without its last sizes, for
    means; and square matrices of one of its sizes, for preconditioners.
    """
    n, *rest = shape
    shapes = {shape, (math.prod(shape),), (n,), *((size, size) for size in shape)}
    if len(shape) == 2:
        return shapes | {(n, 1), (1, *rest), (*rest,)}
    rows, columns = rest
    means = {(n, rows), (n, columns), (n, 1), (n, rows, 1), (n, 1, columns), (n, 1, 1)}
    return shapes | means


# The earlier shapes of parameters, by current shape, and the number of changes. The parameters
# themselves are not recorded, so copies of them and of their optimizers are covered too.
_earlier_shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
_n_changes = 0
# Per optimizer, the number of changes and the id of its state dictionary at the latest check.
_checked: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = WeakKeyDictionary()


def record_reshape(before: torch.Size, now: torch.Size) -> None:
    """Record that a parameter changed shape, so that outdated optimizer state is discarded.

    An optimizer that steps with outdated state fails or, if fused, accesses memory beyond its
    tensors. A pre-step hook checks each optimizer, since the optimizers of a parameter are unknown
    until then. State that already has the new shape stays (`prepare_slot_removal`).

    Args:
        before: earlier shape of the parameter.
        now: current shape of the parameter.
    """
    global _n_changes
    if before == now:
        return
    if not _n_changes:
        register_optimizer_step_pre_hook(_discard_outdated_state)
    _n_changes += 1
    earlier = {tuple(before), *_earlier_shapes.get(tuple(before), ())}
    _earlier_shapes.setdefault(tuple(now), set()).update(earlier - {tuple(now)})


linear.reshape_hooks.append(record_reshape)


@not_compiled
def _discard_outdated_state(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Discard state of earlier shapes before an optimizer steps, with a warning.

    PyTorch calls this global hook before the optimizer's own hooks.
    """
    # `load_state_dict` replaces the dictionary, and so requires another check.
    version = _n_changes, id(optimizer.state)
    if _checked.get(optimizer) == version:
        return
    shapes = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            earlier = _earlier_shapes.get(tuple(parameter.shape))
            if earlier and _discard_state_of_shapes(earlier, optimizer, parameter):
                shapes.append(list(parameter.shape))
    _checked[optimizer] = version
    if shapes and ranks.is_rank_zero():
        warnings.warn(
            f"{class_name(optimizer)} had state of parameters from before their layers became "
            "block-sparse, became dense or changed their number of slots. That state no longer "
            f"applies and was reset for {len(shapes)} of them, of shape "
            f"{', '.join(map(str, shapes))}. Change layers before the first step to lose none.",
            stacklevel=4,  # the caller of `step`
        )


def prepare_reset(
    optimizer: torch.optim.Optimizer,
    parameter: nn.Parameter,
    slots: Tensor,
    moves: Moves | None = None,
) -> Callable[[], None]:
    """Return a function that resets some slots to the optimizer's initial state, in place.

    Args:
        optimizer: optimizer that holds `parameter`.
        parameter: `[capacity, rows, columns]`.
        slots: int64 `[n]`.
        moves: moves of weights within other slots, whose state moves with them; new weights get the
            initial state. Means over the rows or columns of these blocks stay.

    Raises:
        ValueError: as `state_rule`.
    """
    rule = state_rule(optimizer, parameter)
    writes = []
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        option = rule.starts_at.get(name)
        start = 0 if option is None else float(_options(optimizer, parameter)[option])
        is_by_weight = tensor.numel() == parameter.numel()
        if is_by_weight and tensor.dim() < 3:
            tensor = tensor.view(parameter.shape)
        writes.append(prepare_slot_change(tensor, slots, moves if is_by_weight else None, start))

    def write_all() -> None:
        for write in writes:
            write()

    return write_all


@torch.no_grad()
def prepare_slot_removal(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, kept: Tensor
) -> Callable[[], None]:
    """Return a function that removes the state of all slots but those kept, to free memory.

    The returned function allocates no memory and cannot fail. Removing empty slots leaves later
    steps unchanged, except with Adafactor: it takes the RMS of weights and updates over all slots,
    so its steps become larger.

    Args:
        optimizer: optimizer that holds `parameter`.
        parameter: `[capacity, block_size, block_size]`, before it is shrunk.
        kept: int64 `[new capacity]`, the slots that remain.

    Raises:
        ValueError: as `state_rule`.
    """
    kept_state = {}
    rule = state_rule(optimizer, parameter)
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        part = _by_slot(tensor, parameter)[kept]
        kept_state[name] = part.flatten() if tensor.dim() == 1 else part

    def write() -> None:
        if kept_state:
            optimizer.state[parameter].update(kept_state)

    return write


@torch.no_grad()
def warm_start(
    optimizer: torch.optim.Optimizer,
    group: dict[str, Any],
    parameter: nn.Parameter,
    pending: Tensor,
    grad_scale: float | Tensor = 1.0,
) -> Tensor:
    """Initialise the second moment of grown slots from their first gradient.

    The moment becomes c * max(g^2, mean of g^2 over the block): the value that a constant gradient
    of that size would have produced over the steps taken so far. So c is 1 - beta2^step if the
    moment begins at zero and its betas and steps are known (the Adam family), and 1 otherwise
    (RMSprop, Adafactor). The mean protects elements whose first gradient happens to be small. If
    the optimizer keeps means over rows and columns (Adafactor), they are taken of that moment; an
    element may then begin with up to sqrt(2) times the update that its gradient causes later, if
    the block's gradient is concentrated in a few elements. Call this just before the optimizer
    steps.

    Args:
        optimizer: optimizer that holds `parameter`.
        group: parameter group of `parameter`.
        parameter: `[capacity, rows, columns]`, with its gradient.
        pending: bool, the grown slots that have not had a gradient yet, `[capacity]`, or the grown
            weights, in the shape of `parameter`. Means over the rows or columns of a block are
            initialised only where all of its weights are pending.
        grad_scale: scale that the gradient still carries (a fused optimizer under a GradScaler);
            1 otherwise.

    Returns:
        The slots or weights that are still pending, in the shape of `pending`, because the
        gradient of their slot was zero or not finite.
    """
    if parameter.grad is None:
        return pending
    rule, state = state_rule(optimizer, parameter), optimizer.state.get(parameter, {})
    squared = (local_part(parameter.grad) / grad_scale).square()
    mean = squared.mean((1, 2), keepdim=True)
    has_gradient = ((mean > 0) & mean.isfinite()).flatten()
    local = pending[local_slots(parameter)].flatten(1) if pending.dim() > 1 else None
    whole = pending[local_slots(parameter)] if local is None else local.all(1)
    ready = whole & has_gradient
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        if name in rule.second_moments:
            moment = torch.maximum(squared, mean)
            if name in _NORMALISED_MOMENTS:
                moment = torch.ones_like(moment)
            if rule.bias_corrected:
                moment *= _bias_correction(group, state)
            if "p0" in state and "d" in group:  # Prodigy scales gradients by its estimate d
                moment *= group["d"] ** 2
            part = _by_slot(tensor, parameter)
            moment = _reduce_to_shape(moment, part.shape, name)
            is_ready = ready.view(-1, *[1] * (part.dim() - 1))
            if local is not None and part.numel() == moment.numel() == local.numel():
                is_ready = (local & has_gradient.unsqueeze(1)).view(part.shape)
            part.copy_(torch.where(is_ready, moment, part))
    had_gradient = gather_slots(has_gradient, parameter)
    return pending & ~had_gradient.view(-1, *[1] * (pending.dim() - 1))


def _options(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    """Return the options from which an optimizer initialises the state of a parameter."""
    found = find_optimizer([optimizer], parameter)
    if found is None or isinstance(optimizer, torch.optim.Adagrad):
        return optimizer.defaults
    return found[1]


def _slot_state(
    rule: StateRule, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, Tensor]:
    """Return the per-slot state that a rule names and the optimizer has created so far."""
    state = _tensors_by_name(optimizer, parameter)
    return {name: optimizer.state[parameter][name] for name in rule.tensors if name in state}


def _by_slot(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return this rank's part of per-slot state as `[slots, ...]`, sharing its memory."""
    is_flat = tensor.dim() == 1 and tensor.numel() == parameter.numel()
    return tensor.view(parameter.shape[0], -1) if is_flat else local_part(tensor)


def _has_known_decay(group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    betas = group.get("betas")
    return isinstance(betas, tuple | list) and len(betas) > 1 and ("step" in {**group, **state})


def _bias_correction(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """Return 1 - beta^step, the bias of a mean that began at zero; 1 where it is unknown.

    If several betas follow the first, the smallest one applies: too large a moment makes the first
    updates small, too small a one would make them jump.
    """
    if not _has_known_decay(group, state):
        return 1.0
    step = {**group, **state}["step"]
    # Optimizers count in fp32, in which 1 - beta^step would lose most of its digits.
    return 1 - min(group["betas"][1:]) ** (step.double() if isinstance(step, Tensor) else step)


def _reduce_to_shape(moment: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Reduce a moment, `[slots, block_size, block_size]`, to the means stored in a shape.

    If rows and columns have the same size, only the name shows which of them the state keeps.
    """
    if len(shape) == 3:
        reduced = [d for d, size in enumerate(shape) if size != moment.shape[d]]
        return moment.mean(reduced, keepdim=True) if reduced else moment
    if len(shape) == 1:
        return moment.mean((1, 2))
    if shape[1] == moment[0].numel():
        return moment.flatten(1)
    rows, columns = moment.shape[1:]
    if shape[1] > 1 and rows != columns:
        return moment.mean(2 if shape[1] == rows else 1)
    if shape[1] > 1 and "col" in name:
        return moment.mean(1)
    if shape[1] > 1 and "row" in name:
        return moment.mean(2)
    return moment.mean((1, 2)).unsqueeze(1)
