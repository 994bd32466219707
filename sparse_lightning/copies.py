"""Which layers are copies of others: targets, teachers and averages inside a model.

A copy is to have the blocks of its original, and to follow them: what averages the two, or loads
one into the other, takes their tensors place by place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

# Of weights that say nothing by themselves, as zeros and identities: many layers begin with them.
_PLAIN = "plain "
_SAMPLE = 64
_SPREAD = 4096


@torch.no_grad()
def lineages(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a random string for each weight; the same for weights that are equal bit for bit.

    So are weights of which one is the other in a dtype of less precision. One on meta equals none.

    >>> one = torch.arange(4.0)
    >>> found = lineages({"a": one, "b": one.half(), "c": one + 1})
    >>> found["a"] == found["b"], len(set(found.values()))
    (True, 2)
    """
    found: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, weight in weights.items():
        found[name] = uuid.uuid4().hex
        if weight.device.type == "meta" or not weight.numel():
            continue
        # Few of different weights have the same signs, in any dtype, and those are compared.
        signs = (weight.detach().flatten()[:_SAMPLE] > 0).tolist()
        groups.setdefault((weight.shape, weight.device, *signs), []).append(name)
    for names in groups.values():
        firsts: list[str] = []
        # From the most precise to the least.
        for name in sorted(names, key=lambda name: -weights[name].dtype.itemsize):
            same = (other for other in firsts if _equals(weights[name], weights[other]))
            first = next(same, None)
            if first is not None:
                found[name] = found[first]
                continue
            firsts.append(name)
            if len(names) > 1 and _is_plain(weights[name]):
                found[name] = _PLAIN + found[name]
    return found


def _equals(narrow: Tensor, wide: Tensor) -> bool:
    return torch.equal(narrow, wide if wide.dtype == narrow.dtype else wide.to(narrow.dtype))


def says_nothing(lineage: str) -> bool:
    """Tell whether it is the lineage of a weight that many layers may begin with."""
    return lineage.startswith(_PLAIN)


def _is_plain(weight: Tensor) -> bool:
    flat = weight.detach().flatten()
    return len(flat[:: max(1, len(flat) // _SPREAD)].unique()) <= 2


def original_of(name: str, mates: Iterable[str]) -> str | None:
    """Return of which of its equals a layer is the copy; None if that is not to be told.

    That is the only one, or the one whose name has the most parts at its end in common: the layers
    of an encoder may all be equal at first, as clones of one.

    >>> original_of("target.1.fc", ["net.0.fc", "net.1.fc"]), original_of("target", ["a", "b"])
    ('net.1.fc', None)
    """
    common = {mate: len(_common_end(name, mate)) for mate in mates}
    nearest = [mate for mate, n in common.items() if n == max(common.values())]
    return nearest[0] if len(nearest) == 1 else None


def are_clones(one: str, other: str) -> bool:
    """Tell whether layers stand at two places of one list within a model, as an encoder's do.

    >>> are_clones("layers.0.fc", "layers.5.fc"), are_clones("target.0", "net.0")
    (True, False)
    """
    parts = one.split("."), other.split(".")
    if len(parts[0]) != len(parts[1]):
        return False
    differing = [i for i, pair in enumerate(zip(*parts, strict=True)) if pair[0] != pair[1]]
    # A list of its own, as of a network and its target, is not a part of one network.
    return len(differing) == 1 and differing[0] > 0 and parts[0][differing[0]].isdigit()


def find_copies(
    lineage: Mapping[str, str],
    shapes: Mapping[str, tuple[int, int]],
    trains: Callable[[str], bool],
) -> dict[str, str]:
    """Return the original of each layer that is a copy, by name.

    Args:
        lineage: of all layers, by name.
        shapes: (out_features, in_features) of each.
        trains: whether the layer of a name is one that is trained, and so no copy.
    """
    originals: dict[tuple[object, ...], list[str]] = {}
    for name in filter(trains, lineage):
        originals.setdefault((lineage[name], shapes[name]), []).append(name)
    found: dict[str, str] = {}
    plain = []
    for name in lineage:
        mates = originals.get((lineage[name], shapes[name]), [])
        if not mates or trains(name):
            continue
        if says_nothing(lineage[name]):
            plain.append((name, mates))
            continue
        original = original_of(name, [mate for mate in mates if not are_clones(name, mate)])
        if original is not None:
            found[name] = original
    # What says nothing by itself is a copy where the layers around it are.
    modules = {_heads(copy, original) for copy, original in found.items()}
    for name, mates in plain:
        for copy, original in modules:
            if name.startswith(copy) and original + name[len(copy) :] in mates:
                found[name] = original + name[len(copy) :]
    return found


def _common_end(one: str, other: str) -> list[str]:
    parts: list[str] = []
    for mine, theirs in zip(reversed(one.split(".")), reversed(other.split(".")), strict=False):
        if mine != theirs:
            break
        parts.insert(0, mine)
    return parts


def _heads(copy: str, original: str) -> tuple[str, str]:
    """Return the names of the modules of which one is a copy of the other, as prefixes."""
    end = len(".".join(_common_end(copy, original)))
    return copy[: len(copy) - end], original[: len(original) - end]


def by_hand(follow: Mapping[str, str], names: Iterable[str]) -> dict[str, str]:
    """Return the layers that shall follow others, `{copy: original}`, from those of whole modules.

    >>> by_hand({"target": "net"}, ["net.0", "net.2", "target.0", "target.2", "head"])
    {'target.0': 'net.0', 'target.2': 'net.2'}
    """
    known, found = [*names], {}
    for copy, original in follow.items():
        for name in known:
            if name == copy or name.startswith(f"{copy}."):
                found[name] = original + name[len(copy) :]
    return found


def averaged(model: nn.Module) -> list[str]:
    """Return the names of the modules in a model that hold averages of others, as prefixes."""
    average = torch.optim.swa_utils.AveragedModel
    return [f"{n}." for n, m in model.named_modules() if isinstance(m, average) and n]
