"""Look-up of options by name, and of functions by dotted path."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar, cast

T = TypeVar("T")


def find(argument: str, value: object, offered: Mapping[str, T]) -> T:
    """Return the option or function that a value of the configuration refers to.

    Args:
        argument: name of the argument, for errors.
        value: a name in `offered`, a callable, or the dotted path of a callable.
        offered: options by name, possibly none; an option may be None.

    Raises:
        ValueError: if the name or path does not exist, or does not refer to a callable.

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


def name_of(function: object, offered: Mapping[str, object]) -> str:
    """Return the name under which an option is offered, or the dotted path of another function.

    An object that has no name of its own is given the dotted path of its class.

    >>> import math
    >>> name_of(math.hypot, {"norm": math.hypot}), name_of(math.hypot, {})
    ('norm', 'math.hypot')
    """
    for name, option in offered.items():
        if option is function:
            return name
    qualified = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__}.{qualified}"


@contextmanager
def calling(argument: str) -> Iterator[None]:
    """Name the argument in errors that the user's function for it raises.

    A ValueError propagates unchanged, since its message already explains the problem.

    Raises:
        RuntimeError: in place of an arithmetic, attribute, lookup or type error.

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
