"""What a command line calls by name: `project.model:build`, a function that builds a model."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable

from torch import nn

Build = Callable[[], nn.Module]


def builder(argument: str, target: str) -> Build:
    """Return a function that calls the named one, without arguments, and checks what it returns.

    Args:
        argument: what errors call it, as `--model`.
        target: a module and a function in it. Modules in the current folder are found.

    Raises:
        ValueError: if there is no such function; and from the function that is returned, if the
            named one fails, or returns something else than an `nn.Module`.
    """
    module, _, name = target.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(
            f"`{argument}` must be a module and a function in it, as my_project.model:build; "
            f"got '{target}'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    rule = f"`{argument}` must be a function that builds the dense model, without arguments"
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # of the user's code, any
        raise ValueError(_raised(rule, target, error)) from error

    def build() -> nn.Module:
        try:
            model = function()
        except Exception as error:
            raise ValueError(_raised(rule, target, error)) from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"`{argument}` must build an nn.Module; got a {type(model).__name__} "
                f"from '{target}'."
            )
        return model

    return build


def _raised(rule: str, target: str, error: Exception) -> str:
    return f"{rule}; got '{target}', which raised {type(error).__name__}: {error}"
