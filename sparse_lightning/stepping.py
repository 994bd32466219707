"""The steps of an optimizer, seen at the optimizer itself.

Whatever drives a training, an optimizer's own hooks are called when it steps. Three things have to
be known there: when its gradients are final, whether the step is skipped, and that it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
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


def innermost(optimizer: object) -> Optimizer:
    """Return the optimizer that steps, inside of what wraps it as Accelerate and Lightning do.

    A wrapper that has state of its own, as slow weights, is an optimizer in its own right.

    Raises:
        TypeError: if there is none.
        ValueError: for one whose steps are not what they seem, by its name.
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
            f"`optimizer`; got {name}. Pass the one that it steps."
        )
    return found


class StepWatch:
    """Tells of the steps of one optimizer, until it is removed.

    The optimizer may evaluate a closure that makes the gradients, also more than once; then
    gradients are read after each time, and the last one counts. A subclass whose `step` calls that
    of its base is told of once.

    Args:
        optimizer: to watch.
        wants: is asked before each step whether `read` is to be called in it.
        read: is called when gradients are final: reduced, clipped, and about to be applied, with
            the number that they are still multiplied by (of a GradScaler, if the optimizer is a
            fused one). It is not called in a step that a GradScaler makes the optimizer skip.
        over: is called after each step, with whether it was skipped.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        wants: Callable[[], bool],
        read: Callable[[float], None],
        over: Callable[[bool], None],
    ) -> None:
        self._wants, self._read, self._over = wants, read, over
        self._open = False
        before = optimizer.register_step_pre_hook(not_compiled(self._before))
        after = optimizer.register_step_post_hook(not_compiled(self._after))
        # Before other hooks, which may throw the gradients away.
        optimizer._optimizer_step_post_hooks.move_to_end(after.id, last=False)  # type: ignore[attr-defined]
        self._handles = [before, after]

    def remove(self) -> None:
        """Tell of no further step."""
        for handle in self._handles:
            handle.remove()

    def _before(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        _check_that_hooks_see(optimizer)
        self._open = True
        if not self._wants():
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if closure is None:
            self._read_gradients(optimizer)
            return None

        def read_afterwards() -> Any:
            loss = closure()
            self._read_gradients(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], read_afterwards, *args[2:]), kwargs
        return args, {**kwargs, "closure": read_afterwards}

    def _read_gradients(self, optimizer: Optimizer) -> None:
        if not _overflows(optimizer):
            # It is there only while a GradScaler has a fused optimizer step.
            scale = getattr(optimizer, "grad_scale", None)
            self._read(1.0 if scale is None else float(scale))

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._open:  # otherwise of a base class, within a step that was told of
            self._open = False
            self._over(_overflows(optimizer))


class AnyStepWatch:
    """Tells of the steps of all optimizers that there are, until it is removed or collected.

    Args:
        over: is called with an optimizer after each of its steps, and after the hooks of its own.
    """

    _all: ClassVar[WeakSet[AnyStepWatch]] = WeakSet()
    _handle: ClassVar[RemovableHandle | None] = None

    def __init__(self, over: Callable[[Optimizer], None]) -> None:
        self._over = over
        self._all.add(self)
        if AnyStepWatch._handle is None:
            AnyStepWatch._handle = register_optimizer_step_post_hook(not_compiled(_tell_all))

    def remove(self) -> None:
        """Tell of no further step; without any that watches, PyTorch's hook is removed, too."""
        self._all.discard(self)
        if not self._all and AnyStepWatch._handle is not None:
            AnyStepWatch._handle.remove()
            AnyStepWatch._handle = None


def _tell_all(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for watch in [*AnyStepWatch._all]:
        watch._over(optimizer)


def is_within(inner: Optimizer, outer: Optimizer) -> bool:
    """Tell whether one optimizer is another, or is held by it, as by SAM and Lookahead."""
    known, left = set(), [outer]
    while left:
        found = left.pop()
        if found is inner or found.state is inner.state:
            return True
        if id(found) not in known:
            known.add(id(found))
            left.extend(_optimizers_in(vars(found).values()))
    return False


def _optimizers_in(values: Iterable[object]) -> Iterator[Optimizer]:
    """Yield the optimizers among values, and in lists and dicts among them."""
    for value in values:
        if isinstance(value, Optimizer):
            yield value
        elif isinstance(value, list | tuple):
            yield from (each for each in value if isinstance(each, Optimizer))
        elif isinstance(value, Mapping):
            yield from (each for each in value.values() if isinstance(each, Optimizer))


def _overflows(optimizer: Optimizer) -> bool:
    """Whether a GradScaler has told a fused optimizer to skip the step."""
    overflow = getattr(optimizer, "found_inf", None)
    return overflow is not None and bool(float(overflow))


def not_compiled(hook: Callable[P, R]) -> Callable[P, R]:
    """Return a hook at which compiled code that steps an optimizer leaves its graph."""
    disabled = torch.compiler.disable(hook)

    def either(*args: P.args, **kwargs: P.kwargs) -> R:
        # Eager code does without what `disable` takes of its time at each call.
        return (disabled if torch.compiler.is_compiling() else hook)(*args, **kwargs)

    return either


def _check_that_hooks_see(optimizer: Optimizer) -> None:
    """Raise RuntimeError where a step says nothing of those to come."""
    name = type(optimizer).__name__
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            "An optimizer of block-sparse layers must step after backward; got "
            f"{name}.step() within it, when other gradients are yet to come. Step one optimizer "
            "for all parameters after backward."
        )
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "An optimizer of block-sparse layers must step outside of a CUDA graph, whose replays "
            f"call no hooks; got {name}.step() while one is captured. Capture forward and "
            "backward alone."
        )
