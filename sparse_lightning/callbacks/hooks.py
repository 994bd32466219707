"""Wrappers around a LightningModule's hooks, at points where callbacks have no hook."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparse_lightning.callbacks.held_copies import held_models

# The hooks in which a model may build its layers, in the order in which Lightning calls them.
_BUILDING = ("setup", "configure_model")
# The hooks that are wrapped from the callback's `setup` until the fit starts.
_WRAPPED = (*_BUILDING, "on_load_checkpoint")


def call_when_built(model: pl.LightningModule, call: Callable[[], None]) -> None:
    """Call a function as soon as a model has all its layers and the weights that it loads itself.

    That is after its last hook among `setup` and `configure_model`, or immediately if it has none.
    """
    hooks = [hook for hook in _BUILDING if is_overridden(hook, model)]
    if not hooks:
        call()
    for hook in hooks:
        # The instance attribute shadows the method until `unwrap_hooks` removes it.
        setattr(model, hook, _wrap(model, hook, call if hook == hooks[-1] else None))


def _wrap(
    model: pl.LightningModule, hook: str, call: Callable[[], None] | None
) -> Callable[..., None]:
    """Return a hook of a model, followed by a call."""
    original = getattr(model, hook)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        # Without the wrappers, a model that copies itself in the hook does not copy them. They are
        # restored because averaging callbacks may call `configure_model` again.
        wrappers = {name: vars(model).pop(name) for name in _WRAPPED if name in vars(model)}
        try:
            original(*args, **kwargs)
        finally:
            vars(model).update(wrappers)
        if call is not None:
            call()

    return wrapped


def call_before_loading(
    model: pl.LightningModule, call: Callable[[Mapping[str, Any]], None]
) -> None:
    """Call a function with the checkpoint before Lightning loads the model's weights from it."""
    original = model.on_load_checkpoint

    @functools.wraps(original)
    def wrapped(checkpoint: dict[str, Any]) -> None:
        call(checkpoint)
        original(checkpoint)

    vars(model)["on_load_checkpoint"] = wrapped


def unwrap_hooks(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Remove the wrappers from a model, and from copies of it that other callbacks hold."""
    for module in (model, *held_models(trainer)):
        for hook in _WRAPPED:
            vars(module).pop(hook, None)
