"""What happens to optimizer state when blocks are dropped and grown, and when slots are given up.

A changed slot starts from the optimizer's initial state. That alone would make a grown block jump:
late in training, a second moment that starts from zero without its bias correction lets the first
updates reach several learning rates. So the first gradient that a grown slot sees also
warm-starts its second moment (`warm_start`).

Which state has slots is told by a rule for the optimizer's class (`STATE_RULES`), and otherwise by
its shape. Only what an optimizer keeps in `optimizer.state[parameter]` can be seen.

A layer that becomes block-sparse or dense keeps its parameter, of which optimizers may have state.
Each of them loses, before its next step, what is of a shape that the parameter had
(`shape_has_changed`).
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
from sparse_lightning.sharding import all_slots, at_local_slots, is_sharded, local_part, local_slots
from sparse_lightning.stepping import not_compiled


@dataclass(frozen=True)
class StateRule:
    """How one optimizer class keeps state of slots.

    Attributes:
        tensors: names of the state that follows the slots. These are tensors of the shape of
            `values`, `[capacity, block_size, block_size]`; of that shape with some of the last two
            sizes left out or 1, such as means over rows; or of that shape flattened. Those that an
            option turns off may be missing. State that is not named stays as it is.
        second_moments: those among them that are running means of g^2.
        bias_corrected: whether these begin at zero and have a constant decay, the smallest of
            `betas[1:]` of the parameter's group, so that after `step` steps they hold
            `1 - beta ** step` of the mean. False if they hold all of it at any time.
        starts_at: the option that holds what a tensor begins with, by the tensor's name; the one
            of the parameter's group, but of an Adagrad, which looks at no group, the default. The
            others begin at zero.

    Raises:
        TypeError: if `tensors` or `second_moments` is a string, where a tuple of them is meant.
        ValueError: for a second moment that is not among `tensors`.
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
                        f"`{argument}` must be of state in `tensors`, {list(self.tensors)}; "
                        f"got {name!r}. Name it there, too."
                    )


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
    torch.optim.Adagrad: StateRule(("sum",), starts_at={"sum": "initial_accumulator_value"}),
    # Its beta2 is 0 at the first step, so its means are unbiased from there on.
    torch.optim.Adafactor: StateRule(
        ("row_var", "col_var"), ("row_var", "col_var"), bias_corrected=False
    ),
}

# What is known by name of the state of classes that have no rule. Adafactor's rows and columns are
# called by different names in PyTorch, in transformers and in timm.
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
    "exp_avg_var",  # AdaBelief: of g less its mean, which a grown slot begins without
    "max_exp_avg_var",
    "exp_avg_res_row",
    "exp_avg_res_col",
}
# CAME: means of the squares of what is left of updates less their mean, after division by the root
# of a second moment. A grown slot's first update is about 1 by then, whatever its gradient.
_OF_UNIT_UPDATES = {"exp_avg_res_row", "exp_avg_res_col"}
# By name, as there are several of them: their means begin as the first g^2, and so hold all of it.
_NOT_BIAS_CORRECTED = {"ADOPT", "Adopt"}
_STARTS_AT = {"sum": "initial_accumulator_value", "step_size": "lr"}  # as of Adagrad, and of Rprop

# By name, as there are several of them and not every PyTorch has its own.
_REFUSED = {
    "Muon": "It orthogonalises whole matrices, which packed blocks are not. Put every `values` "
    "into AdamW, and keep Muon for dense matrices.",
    "LBFGS": "It keeps vectors of all parameters together, in which a layer's slots have no "
    "state of their own. Take an optimizer that keeps its state by parameter.",
}


def state_rule(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> StateRule:
    """Return the rule by which the state that an optimizer has of a parameter follows its slots.

    It is that of `STATE_RULES` for the exact class, which is checked against what state there is.
    A class that has none gets one by the shapes of its state: tensors that have slots follow,
    single numbers stay.

    Args:
        optimizer: holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.

    Raises:
        ValueError: for an optimizer that works on all of a matrix, or on all parameters at once,
            or that wraps another;
            for state that cannot follow, naming class, state and shape; and for a rule that is
            not true of the state.
    """
    rule = STATE_RULES.get(type(optimizer))
    if rule is not None:
        _check_rule(rule, optimizer, parameter)
        return rule
    for cls in type(optimizer).__mro__:
        if cls.__name__ in _REFUSED:
            raise ValueError(
                "The optimizer must be one whose state can follow the blocks; "
                f"got {class_of(optimizer)}. {_REFUSED[cls.__name__]}"
            )
    for name, inner in vars(optimizer).items():
        # As Lookahead and SAM do. What the inner one has would stay where it is.
        if isinstance(inner, torch.optim.Optimizer) and inner.state is not optimizer.state:
            raise ValueError(
                "The optimizer must be one whose state can follow the blocks, and not wrap another "
                f"that has a state of its own; got {class_of(optimizer)} around "
                f"{type(inner).__name__}. Unless the outer one keeps averages of weights, attach "
                f"the inner one, `attach(optimizer.{name})`."
            )
    return _rule_by_shape(optimizer, parameter)


def _check_rule(rule: StateRule, optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Raise ValueError if a rule is not true of the state that an optimizer has."""
    state = _state_with_numbers(optimizer, parameter)
    missing = [name for name in rule.tensors if name not in optimizer.state.get(parameter, {})]
    for name, tensors in state.items():
        value = optimizer.state[parameter][name]
        is_by_slot = isinstance(value, Tensor) and _has_slots(value, parameter)
        if name in rule.tensors and not is_by_slot:
            raise ValueError(
                f"The StateRule of {class_of(optimizer)} must name state that has slots, as "
                f"`values` {list(parameter.shape)} has; got `{name}` of {_shapes(tensors)}. Leave "
                "it out of the rule if it is to stay as it is when blocks are dropped and grown."
            )
        # Of few dimensions it may have such a size by chance, and the rule says that it stays.
        if name not in rule.tensors and is_by_slot and value.dim() >= 2:
            if value.dim() == 2 and _is_ambiguous(name, value, parameter):
                continue
            raise ValueError(
                f"The StateRule of {class_of(optimizer)} must name all state that has slots; got "
                f"`{name}` of {_shapes(tensors)}, which it leaves out{_instead(missing)}. Add it "
                "to `tensors` of the rule."
            )
    if state and rule.tensors and len(missing) == len(rule.tensors):
        raise ValueError(
            f"The StateRule of {class_of(optimizer)} must name state that the optimizer has, of "
            f"{list(state)}; got {list(missing)}. Correct `tensors` of the rule."
        )
    for option in rule.starts_at.values():
        if option not in optimizer.defaults:
            raise ValueError(
                f"`starts_at` in the StateRule of {class_of(optimizer)} must name an option of the "
                f"optimizer, of {list(optimizer.defaults)}; got {option!r}. Correct the rule."
            )
    is_warmed = rule.bias_corrected and any(name in state for name in rule.second_moments)
    groups, of_parameter = optimizer.param_groups, optimizer.state.get(parameter, {})
    if is_warmed and not any(_knows_its_decay(group, of_parameter) for group in groups):
        raise ValueError(
            f"`bias_corrected` in the StateRule of {class_of(optimizer)} must be False where the "
            "optimizer has no option `betas`, or no `step` in its state or its groups; got True, "
            f"options {list(optimizer.defaults)} and state {list(of_parameter)}. Correct the rule."
        )


def _rule_by_shape(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> StateRule:
    """Return a rule for a class that has none, by the state that there is."""
    names = []
    for name, tensors in _state_with_numbers(optimizer, parameter).items():
        value = optimizer.state[parameter][name]
        why = _cannot_follow(name, value, parameter)
        if why is not None:
            raise ValueError(
                "The optimizer's state must have slots, as `values` "
                f"{list(parameter.shape)} has, or be single numbers; got `{name}` of "
                f"{_shapes(tensors)} in {class_of(optimizer)}, {why}. Say which of its state has "
                "slots by sparse_lightning.optimizer_state.STATE_RULES"
                f"[{type(optimizer).__name__}] = StateRule(...), or take another optimizer."
            )
        names.append(name)
    starts_at = {n: _STARTS_AT[n] for n in names if _STARTS_AT.get(n) in optimizer.defaults}
    second_moments = tuple(name for name in names if name in _SECOND_MOMENTS)
    classes = {cls.__name__ for cls in type(optimizer).__mro__}
    is_corrected = classes.isdisjoint(_NOT_BIAS_CORRECTED)
    return StateRule(tuple(names), second_moments, is_corrected, starts_at)


def _cannot_follow(name: str, value: object, parameter: nn.Parameter) -> str | None:
    """Return why state cannot follow the slots, or None if it can."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    part = local_part(value)
    if type(part) not in (Tensor, nn.Parameter):
        return f"a {type(part).__name__}, whose parts are not by slot"
    if part.dtype.itemsize == 1 and part.dtype != torch.bool:
        return f"codes of {part.dtype}, of which zero need not be the beginning"
    if not _has_slots(value, parameter):
        return "whose shape does not tell where a slot's part is"
    if _is_ambiguous(name, value, parameter):
        return "where the capacity is the block size, so that slots look like rows"
    return None


def _has_slots(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor's shape is that of `values`, flattened, or with less than its last sizes."""
    slots, size, _ = parameter.shape
    if tensor.dim() == 1 and tensor.numel() == parameter.numel():
        return not is_sharded(tensor)  # ranks would hold parts of blocks
    if tensor.dim() not in (1, 2, 3) or tensor.shape[0] != slots:
        return False
    return all(other in (1, size) for other in tensor.shape[1:])


def _is_ambiguous(name: str, tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Whether the first size of a tensor that has slots may as well be that of a block."""
    slots, size, _ = parameter.shape
    is_known = any(word in name for word in ("row", "col"))
    return (
        slots == size and tensor.dim() < 3 and tensor.numel() < parameter.numel() and not is_known
    )


def _state_with_numbers(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, list[Tensor]]:
    """Return the tensors of more than one element in an optimizer's state, by its names."""
    found = {}
    for name, value in optimizer.state.get(parameter, {}).items():
        tensors = [tensor for tensor in _tensors_in(value) if tensor.numel() > 1]
        if tensors:
            found[name] = tensors
    return found


def _tensors_in(value: object) -> Iterator[Tensor]:
    """Yield a tensor, or those in containers and in plain objects that hold them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors_in(item)
    elif isinstance(value, Iterable):
        # A string holds strings without end, and an iterator can be read once only.
        if not isinstance(value, str | bytes | Iterator):
            for item in value:
                yield from _tensors_in(item)
    elif hasattr(value, "__dict__") and not callable(value):
        # What an object refers to further may be anything, the model too.
        for item in vars(value).values():
            if isinstance(item, Tensor | list | tuple | set | deque):
                yield from _tensors_in(item)


def _shapes(tensors: Iterable[Tensor]) -> str:
    return ", ".join(f"shape {list(tensor.shape)}" for tensor in tensors)


def _instead(missing: list[str]) -> str:
    return f", while there is no {', '.join(f'`{name}`' for name in missing)}" if missing else ""


def class_of(optimizer: object) -> str:
    """Return the full name of an optimizer's class: there is more than one Adafactor."""
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


def check_state(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> None:
    """Check that an optimizer, and state as restored from a checkpoint, can follow a parameter.

    Args:
        optimizer: holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.

    Raises:
        RuntimeError: for a tensor of other slots, naming it.
        ValueError: as `state_rule`.
    """
    rule = STATE_RULES.get(type(optimizer))
    for name, value in optimizer.state.get(parameter, {}).items():
        if not isinstance(value, Tensor) or value.numel() <= 1 or _has_slots(value, parameter):
            continue
        if name in rule.tensors if rule is not None else _has_other_slots(value, parameter):
            raise RuntimeError(
                f"The restored optimizer state `{name}` must have the shape of `values`, "
                f"{list(parameter.shape)}, or less than its last sizes; got {list(value.shape)} "
                f"in {class_of(optimizer)}. "
                "The checkpoint's model and optimizer do not belong together."
            )
    state_rule(optimizer, parameter)


def _has_other_slots(tensor: Tensor, parameter: nn.Parameter) -> bool:
    """Whether a tensor would have slots if `values` had another capacity."""
    if tensor.dim() != 3 or tensor.shape[0] == 1:
        return False
    return all(size in (1, parameter.shape[1]) for size in tensor.shape[1:])


def drop_dense_state(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, dense_shape: tuple[int, int]
) -> bool:
    """Drop state that an optimizer has of a parameter since it was a dense weight.

    So is what it has of any other shape that a parameter of this one is known to have had.

    Args:
        optimizer: holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.
        dense_shape: `(out_features, in_features)` of the weight.

    Returns:
        Whether something that the optimizer has learned is lost.
    """
    earlier = {dense_shape, dense_shape[::-1], *_earlier_shapes.get(tuple(parameter.shape), ())}
    return _drop_if_of(earlier, optimizer, parameter)


def _drop_if_of(
    earlier: Iterable[tuple[int, ...]], optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> bool:
    """Drop the state that an optimizer has of a parameter if it is of an earlier shape of it.

    The optimizer then makes its state anew in its next step, as for a parameter that it has not
    seen. Adagrad, which makes its state when it is built, is given a new one; so is SGD, which
    steps all parameters with a momentum or none where it is fused.

    Returns:
        Whether something that the optimizer has learned is lost.
    """
    found, now = _state_with_numbers(optimizer, parameter), tuple(parameter.shape)
    shapes = {tuple(tensor.shape) for tensors in found.values() for tensor in tensors}
    # By chance, what is kept by rows or slots may fit both shapes.
    old = (shapes & {form for shape in earlier for form in _forms(shape)}) - _forms(now)
    is_whole = not old.isdisjoint(earlier)
    if not is_whole and (not old or now in shapes):
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


def _forms(shape: tuple[int, ...]) -> set[tuple[int, ...]]:
    """Return the shapes of state that an optimizer may keep of a parameter, a matrix or blocks.

    These are its own; flattened; with less than its last sizes, as for means; and of square
    matrices for one of its dimensions, as for preconditioners.
    """
    n, *rest = shape
    forms = {shape, (math.prod(shape),), (n,), *((size, size) for size in shape)}
    if len(shape) == 2:
        return forms | {(n, 1), (1, *rest), (*rest,)}
    size = rest[0]
    return forms | {(n, size), (n, 1), (n, size, 1), (n, 1, size), (n, 1, 1)}


# Which shapes parameters had before they had one, and how many such changes there were. It is not
# told which parameters, so that copies of them and of their optimizers are known, too.
_earlier_shapes: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
_n_changes = 0
# Of each optimizer that has stepped since the first change, with which of them and of which state.
_looked_at: WeakKeyDictionary[torch.optim.Optimizer, tuple[int, int]] = WeakKeyDictionary()


def shape_has_changed(before: torch.Size, now: torch.Size) -> None:
    """Have optimizers lose the state of an earlier shape of a parameter before they next step.

    An optimizer that goes on with such state fails, and a fused one reads and writes beyond the
    memory of its tensors. Which it is can only be seen when it steps. State that has followed, as
    by `prepare_keep`, stays.

    Args:
        before: the shape that some parameter had.
        now: the one that it has.
    """
    global _n_changes
    if before == now:
        return
    if not _n_changes:
        register_optimizer_step_pre_hook(_begin_anew_where_reshaped)
    _n_changes += 1
    earlier = {tuple(before), *_earlier_shapes.get(tuple(before), ())}
    _earlier_shapes.setdefault(tuple(now), set()).update(earlier - {tuple(now)})


linear.when_reshaped.append(shape_has_changed)


@not_compiled
def _begin_anew_where_reshaped(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Drop state of earlier shapes before an optimizer steps, and say so.

    PyTorch calls it before the hooks of the optimizer's own.
    """
    # `load_state_dict` puts another dictionary there.
    known = _n_changes, id(optimizer.state)
    if _looked_at.get(optimizer) == known:
        return
    shapes = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            earlier = _earlier_shapes.get(tuple(parameter.shape))
            if earlier and _drop_if_of(earlier, optimizer, parameter):
                shapes.append(list(parameter.shape))
    _looked_at[optimizer] = known
    if shapes and ranks.is_first():
        warnings.warn(
            f"{class_of(optimizer)} had state of parameters from before their layers became "
            "block-sparse, became dense or took another number of slots, which tells nothing of "
            f"what they are now; it begins anew for {len(shapes)} of them, of shape "
            f"{', '.join(map(str, shapes))}. Change layers before the first step to lose none.",
            stacklevel=4,  # who calls `step`
        )


def prepare_reset(
    optimizer: torch.optim.Optimizer, parameter: nn.Parameter, slots: Tensor
) -> Callable[[], None]:
    """Return what puts the state of some slots back to its beginning, and only writes in place.

    Args:
        optimizer: holds `parameter`.
        parameter: `[capacity, block_size, block_size]`.
        slots: int64 `[n]`.

    Raises:
        ValueError: as `state_rule`.
    """
    rule = state_rule(optimizer, parameter)
    parts = []
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        option = rule.starts_at.get(name)
        start = 0 if option is None else float(_options(optimizer, parameter)[option])
        parts.append((_by_slot(tensor, parameter), at_local_slots(slots, tensor), start))

    @torch.no_grad()
    def write() -> None:
        for part, mine, start in parts:
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
        optimizer: holds `parameter`.
        parameter: `[capacity, block_size, block_size]`, not shrunk yet.
        kept: int64 `[new capacity]`, what `BlockSparseLinear.prepare_shrink` returned.

    Raises:
        ValueError: as `state_rule`.
    """
    left = {}
    rule = state_rule(optimizer, parameter)
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        part = _by_slot(tensor, parameter)[kept]
        left[name] = part.flatten() if tensor.dim() == 1 else part

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
    size would have left there after the steps taken so far. So c is 1 - beta2^step where a mean
    begins at zero and its betas and steps are known (the Adams), and 1 elsewhere (RMSprop,
    Adafactor). The mean guards the elements whose own first gradient happens to be small. Where
    only means over rows and columns are kept (Adafactor) they are those of that moment; an element
    may then begin with up to sqrt(2) times the update that its gradient would have later, where a
    block's gradient is all in a few elements. Call it just before the optimizer steps.

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
    if parameter.grad is None:
        return pending
    rule, state = state_rule(optimizer, parameter), optimizer.state.get(parameter, {})
    squared = (local_part(parameter.grad) / grad_scale).square()
    mean = squared.mean((1, 2), keepdim=True)
    ready = pending[local_slots(parameter)] & (mean.flatten() > 0) & mean.flatten().isfinite()
    for name, tensor in _slot_state(rule, optimizer, parameter).items():
        if name in rule.second_moments:
            moment = torch.maximum(squared, mean)
            if name in _OF_UNIT_UPDATES:
                moment = torch.ones_like(moment)
            if rule.bias_corrected:
                moment *= _held_of_the_mean(group, state)
            if "p0" in state and "d" in group:  # Prodigy squares the gradient times its estimate
                moment *= group["d"] ** 2
            part = _by_slot(tensor, parameter)
            moment = _mean_to(moment, part.shape, name)
            is_ready = ready.view(-1, *[1] * (part.dim() - 1))
            part.copy_(torch.where(is_ready, moment, part))
    return pending & ~all_slots(ready, parameter)


def _options(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> Mapping[str, Any]:
    """Return the options by which an optimizer makes the state of a parameter."""
    found = find_optimizer([optimizer], parameter)
    if found is None or isinstance(optimizer, torch.optim.Adagrad):
        return optimizer.defaults
    return found[1]


def _slot_state(
    rule: StateRule, optimizer: torch.optim.Optimizer, parameter: nn.Parameter
) -> dict[str, Tensor]:
    """Return the state that has slots by a rule that holds, as far as the optimizer has made it."""
    state = _state_with_numbers(optimizer, parameter)
    return {name: optimizer.state[parameter][name] for name in rule.tensors if name in state}


def _by_slot(tensor: Tensor, parameter: nn.Parameter) -> Tensor:
    """Return what this rank holds of state that has slots, `[slots, ...]`, sharing its memory."""
    is_flat = tensor.dim() == 1 and tensor.numel() == parameter.numel()
    return tensor.view(parameter.shape[0], -1) if is_flat else local_part(tensor)


def _knows_its_decay(group: Mapping[str, Any], state: Mapping[str, Any]) -> bool:
    betas = group.get("betas")
    return isinstance(betas, tuple | list) and len(betas) > 1 and ("step" in {**group, **state})


def _held_of_the_mean(group: Mapping[str, Any], state: Mapping[str, Any]) -> Any:
    """Return which share of a mean that began at zero has come in; 1 where that is not known.

    Of several betas after the first the smallest is taken: with too large a moment the first
    updates are small, with too small a one they would jump.
    """
    if not _knows_its_decay(group, state):
        return 1.0
    return 1 - min(group["betas"][1:]) ** {**group, **state}["step"]


def _mean_to(moment: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Return the means of a moment, `[slots, block_size, block_size]`, that state of a shape keeps.

    Of two dimensions that have the same size, only the name tells which of them is left.
    """
    if len(shape) == 3:
        reduced = [d for d, size in enumerate(shape) if size != moment.shape[d]]
        return moment.mean(reduced, keepdim=True) if reduced else moment
    if len(shape) == 1:
        return moment.mean((1, 2))
    if shape[1] == moment[0].numel():
        return moment.flatten(1)
    if shape[1] > 1 and "col" in name:
        return moment.mean(1)
    if shape[1] > 1 and "row" in name:
        return moment.mean(2)
    return moment.mean((1, 2)).unsqueeze(1)
