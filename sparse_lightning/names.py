"""Names of layers: the patterns of `include`, `exclude` and `layer_density`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile

from sparse_lightning.topology import check_density

# What an output layer is usually called. They hold for `exclude` too if it names others.
DEFAULT_EXCLUDE = ("head", "lm_head", "classifier")


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern of `include` or `exclude` matches a module's name.

    >>> matches("fc*", "blocks.0.fc1"), matches("blocks.*.fc1", "blocks.0.fc1")
    (True, True)
    >>> matches("blocks*", "blocks.0.fc1"), matches("re:.*fc[12]", "blocks.0.fc1")
    (False, True)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def is_chosen(name: str, include: Iterable[str], exclude: Sequence[str]) -> bool:
    """Tell whether the patterns of `include` and `exclude` choose a module's name.

    A name that `include` has in full is not left out by the defaults of `exclude`, which hold
    wherever it names anything.

    >>> is_chosen("fc", ["*"], ["up"]), is_chosen("up", ["*"], ["up"]), is_chosen("head", ["*"], [])
    (True, False, True)
    >>> is_chosen("head", ["*"], ["up"]), is_chosen("head", ["*", "head"], ["up"])
    (False, True)
    """
    if not any(matches(pattern, name) for pattern in include):
        return False
    left_out = [pattern for pattern in exclude if pattern not in DEFAULT_EXCLUDE]
    if exclude and name not in include:
        left_out += DEFAULT_EXCLUDE
    return not any(matches(pattern, name) for pattern in left_out)


def patterns_of(names: Sequence[str]) -> list[str]:
    """Return patterns that match some names: of what they begin with, if that is the same.

    >>> patterns_of(["target.0.fc", "target.2.fc"]), patterns_of(["up", "down"])
    (['target.*'], ['up', 'down'])
    """
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    first = ".".join(same[0] for same in takewhile(lambda same: len({*same}) == 1, parts))
    return [f"{first}.*"] if first and len(names) > 1 else list(names)


def is_exact(pattern: str) -> bool:
    """Tell whether a pattern is a name, without wildcards."""
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def layer_densities(layer_density: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the density of each layer that has its own; the first pattern that matches counts.

    >>> layer_densities({"up": 0.5, "*.1.*": 0.1}, ["mlp.0.up", "mlp.1.up", "mlp.1.down"])
    {'mlp.0.up': 0.5, 'mlp.1.up': 0.5, 'mlp.1.down': 0.1}
    """
    found = {}
    for name in names:
        own = [density for pattern, density in layer_density.items() if matches(pattern, name)]
        found.update({name: own[0]} if own else {})
    return found


def check_layer_density(layer_density: Mapping[str, float]) -> None:
    """Raise unless patterns are valid and each density is in (0, 1]."""
    if not isinstance(layer_density, Mapping):
        raise TypeError(
            f"`layer_density` must map patterns of layers to densities; got {layer_density!r}."
        )
    check_patterns("layer_density", [*layer_density])
    for pattern, density in layer_density.items():
        check_density(density, f"layer_density[{pattern!r}]")


def check_follow(follow: Mapping[str, str]) -> None:
    """Raise unless it maps names to names, none of which is in turn followed by another."""
    is_mapping = isinstance(follow, Mapping)
    if not is_mapping or not all(isinstance(n, str) for n in (*follow, *follow.values())):
        raise TypeError(
            "`follow` must map names of modules to those that they follow, as "
            f"{{'target': 'net'}}; got {follow!r}."
        )
    for copy, original in follow.items():
        if original in follow:
            raise ValueError(
                f"`follow` must map each copy to an original; got {copy!r} for {original!r}, which "
                f"is a copy itself. Write {copy!r}: {follow[original]!r}."
            )


def check_layers_found(layer_density: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise unless every pattern of `layer_density` matches one of the layers."""
    names = list(names)
    for pattern in layer_density:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                "`layer_density` must name layers that become block-sparse; got "
                f"{pattern!r}, which matches none of {', '.join(map(repr, names))}."
            )


def check_patterns(argument: str, patterns: Sequence[str]) -> None:
    """Raise unless every pattern is a string, and a valid regular expression after "re:"."""
    is_list = isinstance(patterns, Sequence) and not isinstance(patterns, str)
    if not is_list or not all(isinstance(pattern, str) for pattern in patterns):
        remedy = f" Write [{patterns!r}]." if isinstance(patterns, str) else ""
        raise TypeError(f"`{argument}` must be a list of patterns; got {patterns!r}.{remedy}")
    for pattern in patterns:
        if pattern.startswith("re:"):
            try:
                re.compile(pattern[3:])
            except re.error as error:
                raise ValueError(
                    f"`{argument}` must hold valid regular expressions after 're:'; "
                    f"got {pattern!r}: {error}."
                ) from None


def check_choice(argument: str, value: object, choices: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the names offered."""
    if value not in list(choices):
        offered = ", ".join(repr(name) for name in choices)
        raise ValueError(f"`{argument}` must be one of {offered}; got {value!r}.")
