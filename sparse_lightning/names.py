"""Name patterns of layers, as in `include`, `exclude` and `layer_density`."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import TypeVar

from sparse_lightning.topology import check_density

K = TypeVar("K", bound=Hashable)

# Usual names of output layers. They stay excluded when `exclude` names other layers.
DEFAULT_EXCLUDE = ("head", "lm_head", "classifier")
_MOST_NAMES = 8  # in a message
# In `exclude`, the first linear layer of the model, whatever its name is.
FIRST = "role:first"


def matches(pattern: str, name: str) -> bool:
    """Return whether a pattern matches a module's name.

    A pattern without a dot matches the last part of the name, and one with a dot the whole name;
    "re:" introduces a regular expression for the whole name.

    >>> matches("fc*", "blocks.0.fc1"), matches("blocks.*.fc1", "blocks.0.fc1")
    (True, True)
    >>> matches("blocks*", "blocks.0.fc1"), matches("re:.*fc[12]", "blocks.0.fc1")
    (False, True)
    """
    if pattern.startswith("re:"):
        return re.fullmatch(pattern[3:], name) is not None
    return fnmatchcase(name if "." in pattern else name.rpartition(".")[2], pattern)


def is_selected(name: str, include: Iterable[str], exclude: Sequence[str]) -> bool:
    """Return whether the patterns of `include` and `exclude` select a module's name.

    The default patterns apply whenever `exclude` is not empty, except to a name that `include`
    lists in full.

    >>> (
    ...     is_selected("fc", ["*"], ["up"]),
    ...     is_selected("up", ["*"], ["up"]),
    ...     is_selected("head", ["*"], []),
    ... )
    (True, False, True)
    >>> is_selected("head", ["*"], ["up"]), is_selected("head", ["*", "head"], ["up"])
    (False, True)
    """
    if not any(matches(pattern, name) for pattern in include):
        return False
    excluding = [pattern for pattern in exclude if pattern not in DEFAULT_EXCLUDE]
    if exclude and name not in include:
        excluding += DEFAULT_EXCLUDE
    return not any(matches(pattern, name) for pattern in excluding)


def common_patterns(names: Sequence[str]) -> list[str]:
    """Return patterns that match all names: "prefix.*" for a common prefix, else the names.

    >>> common_patterns(["target.0.fc", "target.2.fc"]), common_patterns(["up", "down"])
    (['target.*'], ['up', 'down'])
    """
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    prefix = ".".join(part[0] for part in takewhile(lambda part: len({*part}) == 1, parts))
    return [f"{prefix}.*"] if prefix and len(names) > 1 else list(names)


def group_similar(keys: Iterable[tuple[str, K]]) -> list[tuple[str, list[str], K]]:
    """Group names that differ only in numbers and have equal keys.

    Args:
        keys: pairs of a name and its key.

    Returns:
        For each group its label, with "*" for numbers that differ, its names, and their key.

    >>> group_similar([("layers.0.up.1", 8), ("layers.1.up.1", 8), ("layers.2.up.1", 4)])
    [('layers.*.up.1', ['layers.0.up.1', 'layers.1.up.1'], 8), \
('layers.2.up.1', ['layers.2.up.1'], 4)]
    """
    groups: dict[tuple[str, K], list[list[str]]] = {}
    for name, key in keys:
        parts = name.split(".")
        pattern = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault((pattern, key), []).append(parts)
    return [
        (
            ".".join(part[0] if len({*part}) == 1 else "*" for part in zip(*names, strict=True)),
            [".".join(parts) for parts in names],
            key,
        )
        for (_, key), names in groups.items()
    ]


def merge_similar(rows: Iterable[tuple[str, tuple[str, ...]]]) -> list[tuple[str, ...]]:
    """Merge rows of layers whose names differ only in numbers, and insert their count.

    >>> merge_similar(
    ...     [("layers.0.up.1", ("8x4",)), ("layers.1.up.1", ("8x4",)), ("head", ("2x4",))]
    ... )
    [('layers.*.up.1', '2', '8x4'), ('head', '1', '2x4')]
    """
    return [(label, str(len(names)), *cells) for label, names, cells in group_similar(rows)]


def list_names(names: Iterable[str]) -> str:
    """Return names of layers for a message; if they are many, similar ones share an entry.

    >>> list_names(["net.0", "net.2"])
    'net.0, net.2'
    >>> list_names([f"layers.{i}.{name}" for i in range(64) for name in ("up", "down")])
    'layers.*.up (64 layers), layers.*.down (64 layers)'
    """
    names = list(names)
    if len(names) <= _MOST_NAMES:
        return ", ".join(names)
    rows = merge_similar((name, ()) for name in names)
    return _join(label if number == "1" else f"{label} ({number} layers)" for label, number in rows)


def list_reasons(reasons: Mapping[str, str]) -> str:
    """Return names of layers with a reason each; if they are many, similar ones share an entry.

    >>> list_reasons({"net.0": "frozen", "head": "excluded"})
    'net.0: frozen; head: excluded'
    >>> list_reasons({f"net.{i}": "frozen" for i in range(9)})
    'net.* (9 layers): frozen'
    """
    if len(reasons) <= _MOST_NAMES:
        return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    rows = merge_similar((name, (reason,)) for name, reason in reasons.items())
    return _join(
        (
            f"{label}: {reason}" if number == "1" else f"{label} ({number} layers): {reason}"
            for label, number, reason in rows
        ),
        "; ",
    )


def _join(entries: Iterable[str], separator: str = ", ") -> str:
    shown = [*entries]
    rest = len(shown) - _MOST_NAMES
    return separator.join(shown[:_MOST_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def is_exact(pattern: str) -> bool:
    """Return whether a pattern is a plain name, without wildcards."""
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def layer_densities(layer_density: Mapping[str, float], names: Iterable[str]) -> dict[str, float]:
    """Return the density of each layer that a pattern matches; the first match counts.

    >>> layer_densities({"up": 0.5, "*.1.*": 0.1}, ["mlp.0.up", "mlp.1.up", "mlp.1.down"])
    {'mlp.0.up': 0.5, 'mlp.1.up': 0.5, 'mlp.1.down': 0.1}
    """
    densities = {}
    for name in names:
        own = [density for pattern, density in layer_density.items() if matches(pattern, name)]
        densities.update({name: own[0]} if own else {})
    return densities


def check_layer_density(layer_density: Mapping[str, float]) -> None:
    """Raise unless the patterns are valid and each density is in (0, 1]."""
    if not isinstance(layer_density, Mapping):
        raise TypeError(
            f"`layer_density` must map patterns of layers to densities; got {layer_density!r}."
        )
    check_patterns("layer_density", [*layer_density])
    for pattern, density in layer_density.items():
        check_density(density, f"layer_density[{pattern!r}]")


def check_follow(follow: Mapping[str, str]) -> None:
    """Raise unless `follow` maps copies to sources, none of which is a copy itself."""
    is_mapping = isinstance(follow, Mapping)
    if not is_mapping or not all(isinstance(n, str) for n in (*follow, *follow.values())):
        raise TypeError(
            "`follow` must map names of modules to the names that they follow, as in "
            f"{{'target': 'net'}}; got {follow!r}."
        )
    for copy, source in follow.items():
        if source in follow:
            raise ValueError(
                f"`follow` must map each copy to its source; got {copy!r}: {source!r}, which "
                f"is a copy itself. Write {copy!r}: {follow[source]!r}."
            )


def check_layer_density_matches(layer_density: Mapping[str, float], names: Iterable[str]) -> None:
    """Raise unless every pattern of `layer_density` matches at least one layer."""
    names = list(names)
    for pattern in layer_density:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                "`layer_density` must name layers that become block-sparse; got "
                f"{pattern!r}, which matches none of {list_names(names)}."
            )


def check_patterns(argument: str, patterns: Sequence[str]) -> None:
    """Raise unless all patterns are strings, with valid regular expressions after "re:"."""
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


def check_option(argument: str, value: object, options: Iterable[str]) -> None:
    """Raise ValueError unless a value is one of the offered options."""
    if value not in list(options):
        offered = ", ".join(repr(name) for name in options)
        raise ValueError(f"`{argument}` must be one of {offered}; got {value!r}.")
