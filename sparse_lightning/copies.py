"""Which layers are copies of others: targets, teachers and averages inside a model.

A copy is to have the blocks of its original, and to follow them: what averages the two, or loads
one into the other, takes their tensors place by place.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear

_SAMPLE = 16


@torch.no_grad()
def lineages(weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Return a random string for each weight; the same for weights that are equal bit for bit.

    A constant weight is equal to none, since zeros are no sign of a copy, and so is one on meta.

    >>> one = torch.arange(4.0)
    >>> found = lineages({"a": one, "b": one.clone(), "c": one + 1, "zeros": torch.zeros(4)})
    >>> found["a"] == found["b"], len(set(found.values()))
    (True, 3)
    """
    found: dict[str, str] = {}
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, weight in weights.items():
        found[name] = uuid.uuid4().hex
        if weight.device.type == "meta" or not weight.numel():
            continue
        # Few of different weights begin alike, and those are compared.
        sample = weight.detach().flatten()[:_SAMPLE].float().tolist()
        kind = (weight.shape, weight.dtype, weight.device, *sample)
        groups.setdefault(kind, []).append(name)
    for names in groups.values():
        if len(names) == 1 or bool((weights[names[0]] == weights[names[0]].flatten()[0]).all()):
            continue
        firsts: list[str] = []
        for name in names:
            same = (other for other in firsts if torch.equal(weights[other], weights[name]))
            first = next(same, None)
            if first is None:
                firsts.append(name)
            else:
                found[name] = found[first]
    return found


def original_of(name: str, mates: Iterable[str]) -> str | None:
    """Return of which of its equals a layer is the copy; None if that is not to be told.

    That is the only one, or the one whose name has the most parts at its end in common: the layers
    of an encoder may all be equal at first, as clones of one.

    >>> original_of("target.1.fc", ["net.0.fc", "net.1.fc"]), original_of("target", ["a", "b"])
    ('net.1.fc', None)
    """
    common: dict[str, int] = {}
    for mate in mates:
        parts = zip(reversed(name.split(".")), reversed(mate.split(".")), strict=False)
        common[mate] = 0
        for mine, other in parts:
            if mine != other:
                break
            common[mate] += 1
    nearest = [mate for mate, n in common.items() if n == max(common.values())]
    return nearest[0] if len(nearest) == 1 else None


def find_copies(
    layers: Mapping[str, BlockSparseLinear], trains: Callable[[str], bool]
) -> dict[str, str]:
    """Return the original of each layer that is a copy, by name.

    Args:
        layers: all of them, by name.
        trains: whether the layer of a name is one that is trained, and so no copy.
    """
    found = {}
    for name, layer in layers.items():
        if trains(name):
            continue
        mates = [
            other
            for other, of in layers.items()
            if of.lineage == layer.lineage and of.topology.grid == layer.topology.grid
            if trains(other)
        ]
        original = original_of(name, mates)
        if original is not None:
            found[name] = original
    return found


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
