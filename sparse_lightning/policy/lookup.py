"""What a configuration may name: one of several choices, or a function of the user's own."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

T = TypeVar("T")


def find(argument: str, value: object, offered: Mapping[str, T]) -> T:
    """Return what a configuration names.

    Args:
        argument: for errors.
        value: a name in `offered`, the dotted path of something that can be called, or it itself.
        offered: choices by name; there may be none, and None may be among them.

    Raises:
        ValueError: if there is nothing of this name, or it cannot be called.

    >>> find("base", "two", {"two": 2, "none": None})
    2
    >>> import math
    >>> find("norm", "math.hypot", {}) is find("norm", math.hypot, {}) is math.hypot
    True
    >>> find("base", "three", {"two": 2, "none": None})
    Traceback (most recent call last):
    ...
    ValueError: `base` must be one of 'two', 'none' or the dotted path of a function; got 'three'.
    """
    if isinstance(value, str) and value in offered:
        return offered[value]
    if callable(value):
        return cast(T, value)
    names = ", ".join(repr(name) for name in offered)
    one_of = f"one of {names} or " if names else ""
    rule = f"`{argument}` must be {one_of}the dotted path of a function; got {value!r}"
    if not isinstance(value, str) or "." not in value:
        raise ValueError(f"{rule}.")
    module, _, name = value.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{rule}: {error}.") from error
    if not callable(found):
        raise ValueError(f"{rule}, which is a {type(found).__name__}.")
    return cast(T, found)


@contextmanager
def calling(argument: str) -> Iterator[None]:
    """Name the argument in what goes wrong within a function that the user gave for it.

    A ValueError is passed on as it is, since it says itself what was wrong.

    Raises:
        RuntimeError: in place of a mistake in the function.

    >>> with calling("density.schedule"):
    ...     1 / 0
    Traceback (most recent call last):
    ...
    RuntimeError: `density.schedule` must be a function that works; it raised ZeroDivisionError: \
division by zero.
    """
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise RuntimeError(
            f"`{argument}` must be a function that works; it raised {what}."
        ) from error
