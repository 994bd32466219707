"""Observation of optimizer steps, through the hooks of the optimizer.

An optimizer calls its own hooks when it steps, in any training loop. They show when its gradients
are final, whether the step is skipped and when it has ended.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any, ClassVar, ParamSpec, TypeVar
from weakref import WeakSet

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

P = ParamSpec("P")
R = TypeVar("R")

_REFUSED = {
    "ZeroRedundancyOptimizer": "it keeps the state of a parameter on one rank only. Use the "
    "optimizer alone under DDP, or shard it with fully_shard",
}


def unwrap_optimizer(optimizer: object) -> Optimizer:
    """Return the optimizer inside wrappers such as those of Accelerate and Lightning.

    A wrapper that has state of its own, such as slow weights, counts as an optimizer itself.

    Raises:
        TypeError: if there is no `torch.optim.Optimizer`.
        ValueError: for a class whose steps cannot be followed, naming it.
    """
    found = optimizer
    while True:
        inner = getattr(found, "optimizer", None)
        if not isinstance(inner, Optimizer) or getattr(found, "state", None) is not inner.state:
            break
        found = inner
    name = type(found).__name__
    if name in _REFUSED:
        raise ValueError(f"`optimizer` must not be a {name}: {_REFUSED[name]}.")
    if not isinstance(found, Optimizer) or not hasattr(found, "_optimizer_step_pre_hooks"):
        raise TypeError(
            "`optimizer` must be a torch.optim.Optimizer, or have one as its attribute "
            f"`optimizer`; got {name}. Pass the optimizer that it steps."
        )
    return found


class StepWatch:
    """Calls functions at each step of one optimizer, until it is removed.

    If the optimizer evaluates a closure that computes the gradients, they are read after each
    evaluation, and the last reading counts. A `step` that calls its base class's counts once.

    Args:
        optimizer: the optimizer to watch.
        before_step: called before each step; returns whether to call `on_gradients` in it.
        on_gradients: called when gradients are final (reduced, clipped and about to be applied),
            with the scale that they still carry: that of a GradScaler if the optimizer is fused,
            else 1; not called in a step that a GradScaler skips.
        on_step: called after each step, with whether it was skipped.
        before_save: called before the optimizer's `state_dict`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        before_step: Callable[[], bool],
        on_gradients: Callable[[float], None],
        on_step: Callable[[bool], None],
        before_save: Callable[[], None],
    ) -> None:
        self._before_step, self._on_gradients = before_step, on_gradients
        self._on_step = on_step
        self._is_stepping = False
        before = optimizer.register_step_pre_hook(not_compiled(self._before))
        after = optimizer.register_step_post_hook(not_compiled(self._after))
        # This hook runs before the others, since they may clear the gradients.
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        save = optimizer.register_state_dict_pre_hook(lambda _: before_save())
        self._handles = [before, after, save]

    def remove(self) -> None:
        """Stop watching."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _check_hooks_can_observe(optimizer)
        self._is_stepping = True
        if not self._before_step():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._read_gradients(optimizer)
            return None

        def closure_then_read() -> Any:
            loss = closure()
            self._read_gradients(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], closure_then_read, *args[2:]), kwargs
        return args, {**kwargs, "closure": closure_then_read}

    def _read_gradients(self, optimizer: Optimizer) -> None:
        if not _overflows(optimizer):
            # A GradScaler sets this attribute only while a fused optimizer steps.
            scale = getattr(optimizer, "grad_scale", None)
            self._on_gradients(1.0 if scale is None else float(scale))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._is_stepping:  # False in the outer call of a `step` that calls its base class
            self._is_stepping = False
            self._on_step(_overflows(optimizer))


class GlobalStepWatch:
    """Calls a function at each step of every optimizer, until it is removed or collected.

    Args:
        on_step: called with the optimizer after each step, after the optimizer's own hooks.
    """

    _active: ClassVar[WeakSet[GlobalStepWatch]] = WeakSet()
    _handle: ClassVar[RemovableHandle | None] = None

    def __init__(self, on_step: Callable[[Optimizer], None]) -> None:
        self._on_step = on_step
        self._active.add(self)
        if GlobalStepWatch._handle is None:
            GlobalStepWatch._handle = register_optimizer_step_post_hook(not_compiled(_notify))

    def remove(self) -> None:
        """Stop watching, and remove PyTorch's global hook if no watch needs it."""
        self._active.discard(self)
        if not self._active and GlobalStepWatch._handle is not None:
            GlobalStepWatch._handle.remove()
            GlobalStepWatch._handle = None


def _notify(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in [*GlobalStepWatch._active]:
        watch._on_step(optimizer)


def is_within(inner: Optimizer, outer: Optimizer) -> bool:
    """Return whether `outer` is `inner`, or wraps it, as SAM and Lookahead do."""
    visited, pending = set(), [outer]
    while pending:
        optimizer = pending.pop()
        if optimizer is inner or optimizer.state is inner.state:
            return True
        if id(optimizer) not in visited:
            visited.add(id(optimizer))
            pending.extend(_optimizers_in(vars(optimizer).values()))
    return False


def _optimizers_in(values: Iterable[object]) -> Iterator[Optimizer]:
    """Yield the optimizers among values and in lists, tuples and mappings of them."""
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Optimizer))
        elif isinstance(value, Mapping):
            yield from (item for item in value.values() if isinstance(item, Optimizer))


def _overflows(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes a fused optimizer skip the step."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(float(overflow))


def loss_scale() -> float:
    """Return the scale of the loss in the step that is being taken: 1 without a GradScaler.

    A GradScaler unscales gradients before it steps an optimizer, but not what else a backward has
    computed. It tells the scale to fused optimizers only, so it is looked for on the call stack.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "step":  # reading the variables of every frame would be slow
            stepping = frame.f_locals.get("self")
            if isinstance(stepping, torch.amp.GradScaler):
                return float(stepping.get_scale())
        frame = frame.f_back
    return 1.0


def not_compiled(hook: Callable[P, R]) -> Callable[P, R]:
    """Return a hook that breaks the graph when compiled code steps an optimizer."""
    disabled = torch.compiler.disable(hook)

    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        # Eager code calls the hook directly, as `disable` adds overhead to each call.
        return (disabled if torch.compiler.is_compiling() else hook)(*args, **kwargs)

    return wrapper


def _check_hooks_can_observe(optimizer: Optimizer) -> None:
    """Raise RuntimeError where hooks would miss gradients or later steps."""
    name = type(optimizer).__name__
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "An optimizer of block-sparse layers must step after backward; got "
            f"{name}.step() within it, when other gradients are not yet computed. Step one "
            "optimizer for all parameters after backward."
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "An optimizer of block-sparse layers must step outside of a CUDA graph, whose replays "
            f"call no hooks; got {name}.step() while one is captured. Capture only forward and "
            "backward."
        )
