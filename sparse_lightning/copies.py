"""Which layers are copies of others: targets, teachers and averages inside a model.

A copy has the same blocks in the same slots as its source layer, because code that averages the two
layers, or loads one into the other, combines their tensors elementwise.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

# Prefix of the lineages of trivial weights (zeros, identities), with which unrelated layers start.
_TRIVIAL = "plain "
_N_SIGNS = 64
_N_VALUES = 4096


@torch.no_grad()
def assign_lineages(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a random string for each weight; bitwise equal weights share one.

    A weight also equals another one that rounds to it in a dtype of less precision. A weight on the
    meta device equals no other.

    >>> weight = torch.arange(4.0)
    >>> lineages = assign_lineages({"a": weight, "b": weight.half(), "c": weight + 1})
    >>> lineages["a"] == lineages["b"], len(set(lineages.values()))
    (True, 2)
    """
    lineages: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, weight in weights.items():
        lineages[name] = uuid.uuid4().hex
        if weight.device.type == "meta" or not weight.numel():
            continue
        # The first signs do not depend on the dtype and differ between most unequal weights, so
        # that few pairs are compared in full.
        signs = (weight.detach().flatten()[:_N_SIGNS] > 0).tolist()
        groups.setdefault((weight.shape, weight.device, *signs), []).append(name)
    for names in groups.values():
        distinct: list[str] = []
        # The most precise weights come first, as the others are compared in their own dtype.
        for name in sorted(names, key=lambda name: -weights[name].dtype.itemsize):
            equal = (known for known in distinct if _equals(weights[name], weights[known]))
            first = next(equal, None)
            if first is not None:
                lineages[name] = lineages[first]
                continue
            distinct.append(name)
            if len(names) > 1 and _has_trivial_values(weights[name]):
                lineages[name] = _TRIVIAL + lineages[name]
    return lineages


def _equals(narrow: Tensor, wide: Tensor) -> bool:
    return torch.equal(narrow, wide if wide.dtype == narrow.dtype else wide.to(narrow.dtype))


def is_trivial(lineage: str) -> bool:
    """Return whether a lineage belongs to weights with which unrelated layers may start."""
    return lineage.startswith(_TRIVIAL)


def _has_trivial_values(weight: Tensor) -> bool:
    flat = weight.detach().flatten()
    return len(flat[:: max(1, len(flat) // _N_VALUES)].unique()) <= 2


def find_source(name: str, candidates: Iterable[str]) -> str | None:
    """Return the source of the copy `name` among candidates, or None if it is ambiguous.

    If several layers are equal, as in an encoder of cloned layers, the source is the layer whose
    name has the longest suffix in common with the copy's name.

    >>> find_source("target.1.fc", ["net.0.fc", "net.1.fc"]), find_source("target", ["a", "b"])
    ('net.1.fc', None)
    """
    lengths = {candidate: len(_common_suffix(name, candidate)) for candidate in candidates}
    nearest = [candidate for candidate, n in lengths.items() if n == max(lengths.values())]
    return nearest[0] if len(nearest) == 1 else None


def _are_siblings(first: str, second: str) -> bool:
    """Return whether two layers belong to different items of one list, as an encoder's layers do.

    >>> _are_siblings("layers.0.fc", "layers.5.fc"), _are_siblings("target.0", "net.0")
    (True, False)
    """
    parts = first.split("."), second.split(".")
    if len(parts[0]) != len(parts[1]):
        return False
    differing = [i for i, pair in enumerate(zip(*parts, strict=True)) if pair[0] != pair[1]]
    # A top-level list may hold a network and its target, which are not siblings.
    return len(differing) == 1 and differing[0] > 0 and parts[0][differing[0]].isdigit()


def find_copies(
    lineages: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    is_trained: Callable[[str], bool],
) -> dict[str, str]:
    """Return the layers that are copies, `{copy: source}`.

    Args:
        lineages: lineage of each layer, by name.
        shapes: (out_features, in_features) of each layer.
        is_trained: predicate on names of layers; a trained layer is not a copy.
    """
    sources: dict[tuple[object, ...], list[str]] = {}
    for name in filter(is_trained, lineages):
        sources.setdefault((lineages[name], shapes[name]), []).append(name)
    found: dict[str, str] = {}
    trivial = []
    for name in lineages:
        equal = sources.get((lineages[name], shapes[name]), [])
        if not equal or is_trained(name):
            continue
        if is_trivial(lineages[name]):
            trivial.append((name, equal))
            continue
        source = find_source(name, [other for other in equal if not _are_siblings(name, other)])
        if source is not None:
            found[name] = source
    # A layer with trivial weights is a copy if the layers around it are copies.
    modules = {_differing_prefixes(copy, source) for copy, source in found.items()}
    for name, equal in trivial:
        for copy, source in modules:
            if name.startswith(copy) and source + name[len(copy) :] in equal:
                found[name] = source + name[len(copy) :]
    return found


def _common_suffix(first: str, second: str) -> list[str]:
    parts: list[str] = []
    for part, other in zip(reversed(first.split(".")), reversed(second.split(".")), strict=False):
        if part != other:
            break
        parts.insert(0, part)
    return parts


def _differing_prefixes(copy: str, source: str) -> tuple[str, str]:
    """Return what is left of two names without their common suffix."""
    length = len(".".join(_common_suffix(copy, source)))
    return copy[: len(copy) - length], source[: len(source) - length]


def expand_follow(follow: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the `{copy: source}` of layers for the `{copy: source}` of modules in `follow`.

    >>> expand_follow({"target": "net"}, ["net.0", "net.2", "target.0", "target.2", "head"])
    {'target.0': 'net.0', 'target.2': 'net.2'}
    """
    known, expanded = [*names], {}
    for copy, source in follow.items():
        for name in known:
            if name == copy or name.startswith(f"{copy}."):
                expanded[name] = source + name[len(copy) :]
    return expanded


def find_averaged_prefixes(model: nn.Module) -> list[str]:
    """Return the prefixes of names inside each `AveragedModel` that a model contains."""
    average = torch.optim.swa_utils.AveragedModel
    return [f"{n}." for n, m in model.named_modules() if isinstance(m, average) and n]
