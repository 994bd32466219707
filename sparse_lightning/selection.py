"""Which layers of a model become block-sparse, which follow another, and why others stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sparse_lightning import ranks
from sparse_lightning.copies import averaged, by_hand, find_copies, lineages, says_nothing
from sparse_lightning.linear import BlockSparseLinear, check_dtype, dense_shape, is_conv1d
from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_patterns,
    is_chosen,
    is_exact,
    matches,
)
from sparse_lightning.roles import is_linear, output_heads, weight_readers
from sparse_lightning.sharding import is_sharded

_NOT_INCLUDED = "not included"


@dataclass(frozen=True)
class Selection:
    """The dense linear layers of a model, by what is to become of them.

    Attributes:
        layers: those that get blocks of their own.
        follows: those that get the blocks of another, `{copy: original}`; the original is one of
            `layers`, or block-sparse already.
        skipped: why each of the others stays dense.
        lineages: as `BlockSparseLinear.lineage`, of those that become block-sparse.
    """

    layers: dict[str, nn.Module] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    lineages: dict[str, str] = field(default_factory=dict)


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, BlockSparseLinear]]:
    """Yield (name, layer) of every `BlockSparseLinear` in a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            yield name, module


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, layer) of every dense linear layer: `nn.Linear`s and transformers' `Conv1D`s."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name, module


def select_layers(
    model: nn.Module,
    block_size: int,
    include: Sequence[str],
    exclude: Sequence[str],
    follow: Mapping[str, str] | None = None,
) -> Selection:
    """Return what `sparsify` would do with each linear layer; nothing is changed.

    Warns of patterns that match none.

    Raises:
        ValueError: as `sparsify` does, if there is none to swap, or a pattern is wrong.
    """
    if is_linear(model):
        kind = "nn.Linear" if isinstance(model, nn.Linear) else type(model).__name__
        raise ValueError(
            f"`model` must contain the layers to replace; got a bare {kind}. "
            "Use BlockSparseLinear.from_linear(...)."
        )
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    _check_names(model, include)
    tied = _tied_weights(model)
    able, skipped = _able(model, block_size, include, exclude, tied)
    # Copies of layers that are included follow them, whatever their names.
    apart = {
        name: module
        for name, module in linear_layers(model)
        if skipped.get(name) == _NOT_INCLUDED
        and is_chosen(name, ("*", *include), exclude)
        and not _obstacle(module, block_size, tied)
    }
    found = _sort_out(model, able, apart, include, _by_hand(model, follow or {}))
    found.skipped.update({n: why for n, why in skipped.items() if n not in found.follows})
    if not found.layers and not any(True for _ in sparse_layers(model)):
        raise ValueError(_nothing_to_swap(include, exclude, found.skipped))
    _warn_of_idle_patterns(model, include, exclude)
    order = [name for name, _ in linear_layers(model)]
    reasons = {name: found.skipped[name] for name in order if name in found.skipped}
    return Selection(found.layers, found.follows, reasons, found.lineages)


def _able(
    model: nn.Module,
    block_size: int,
    include: Sequence[str],
    exclude: Sequence[str],
    tied: set[int],
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that are asked for and can be block-sparse, and why others are left."""
    able: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    names = _all_names(model)
    roles = weight_readers(model)
    if exclude:
        roles = {**output_heads(model), **roles}
    for name, module in linear_layers(model):
        if not is_chosen(name, include, ()):
            skipped[name] = _NOT_INCLUDED
        elif not is_chosen(name, include, exclude) or (
            name not in include
            and not all(is_chosen(n, ("*",), exclude) for n in names[id(module)])
        ):
            skipped[name] = "excluded"
        elif reason := _obstacle(module, block_size, tied):
            if name in include:
                raise ValueError(
                    f"`include` must name layers that can be block-sparse; got '{name}': {reason}."
                )
            skipped[name] = reason
        elif name in roles and name not in include:
            skipped[name] = roles[name]
        else:
            able[name] = module
    return able, skipped


def _sort_out(
    model: nn.Module,
    able: Mapping[str, nn.Module],
    apart: Mapping[str, nn.Module],
    include: Sequence[str],
    told: Mapping[str, str],
) -> Selection:
    """Tell the layers that train from their copies, and from others that are frozen.

    Args:
        model: that has them.
        able: layers that may become block-sparse.
        apart: those that may only as copies.
        include: names layers in full that are taken also where they are frozen.
        told: by the user, `{copy: original}`.
    """
    averages = averaged(model)
    # Of a model that is not to be trained at all, the layers are taken as they are.
    some_train = any(parameter.requires_grad for parameter in model.parameters())
    weights: dict[str, Any] = {n: module.weight for n, module in {**able, **apart}.items()}

    def stands_still(name: str) -> bool:
        if name in include:
            return False
        frozen = some_train and not weights[name].requires_grad
        return frozen or name in told or any(name.startswith(prefix) for prefix in averages)

    found = Selection({n: module for n, module in able.items() if not stands_still(n)})
    # A frozen layer that is asked for in full is not taken for a copy.
    compared = {n: w for n, w in weights.items() if stands_still(n) or w.requires_grad}
    found.lineages.update(lineages(compared))
    shapes = {name: dense_shape(module) for name, module in {**able, **apart}.items()}
    copies = {**find_copies(found.lineages, shapes, found.layers.__contains__), **told}
    originals = {**found.layers, **dict(sparse_layers(model))}
    for name in filter(stands_still, weights):
        original = copies.get(name)
        if original in originals:
            found.follows[name] = original
        elif name in told:
            found.skipped[name] = f"it follows {original}, which stays dense"
        elif name in able:
            found.skipped[name] = _why_frozen(name, found)
    return found


def _why_frozen(name: str, found: Selection) -> str:
    mine = found.lineages[name]
    equal = [other for other in found.layers if found.lineages.get(other) == mine]
    if not equal or says_nothing(mine):
        return "frozen"
    others = equal[0] if len(equal) == 1 else f"{len(equal)} layers"
    return f"frozen, and equal to {others}; if it is a copy, say of which by `follow`"


def _by_hand(model: nn.Module, follow: Mapping[str, str]) -> dict[str, str]:
    """Return what `follow` says of single layers.

    Raises:
        ValueError: if a name is none of the model's, no layer is meant, or sizes differ.
    """
    layers: dict[str, Any] = {**dict(linear_layers(model)), **dict(sparse_layers(model))}
    modules = dict(model.named_modules())
    for copy, original in follow.items():
        for name in (copy, original):
            if name not in modules:
                raise ValueError(
                    f"`follow` must map modules of the model to modules; got {name!r}, which is "
                    "none of them."
                )
        if not by_hand({copy: original}, layers):
            raise ValueError(
                f"`follow` must map modules that hold linear layers; got {copy!r}, which has none."
            )
    found = by_hand(follow, layers)
    for name, original in found.items():
        if original not in layers or dense_shape(layers[original]) != dense_shape(layers[name]):
            raise ValueError(
                "`follow` must map a module to one with the same layers; got one without a linear "
                f"layer of the same shape at '{original}' (layer '{name}')."
            )
    return found


def _check_names(model: nn.Module, include: Iterable[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    first = {id(module): name for name, module in model.named_modules()}
    for pattern in include:
        if not is_exact(pattern) or "." not in pattern:
            continue
        if pattern not in modules:
            raise ValueError(
                f"`include` must name modules of the model; got {pattern!r}, which is none of them."
            )
        name = first[id(modules[pattern])]
        if name != pattern:
            raise ValueError(
                "`include` must have the first name of a module that has several; got "
                f"{pattern!r}. Write {name!r}."
            )


def _warn_of_idle_patterns(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> None:
    layers = [*linear_layers(model), *sparse_layers(model)]
    first, every = [name for name, _ in layers], _all_names(model)
    any_name = [name for _, layer in layers for name in every[id(layer)]]
    for argument, patterns, names in (("include", include, first), ("exclude", exclude, any_name)):
        idle = [
            pattern
            for pattern in patterns
            if pattern not in DEFAULT_EXCLUDE and not any(matches(pattern, n) for n in names)
        ]
        if idle and ranks.is_first():
            warnings.warn(
                f"`{argument}` should match linear layers; got {', '.join(map(repr, idle))}, which "
                "match none. A pattern without a dot is compared with the last part of a layer's "
                "name, one with a dot with the whole name; '*' and '?' are wildcards.",
                stacklevel=2,
            )


def _nothing_to_swap(
    include: Sequence[str], exclude: Sequence[str], skipped: Mapping[str, str]
) -> str:
    found = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
    if not found:
        found = "none yet; build them in __init__ or, under Lightning, in setup or configure_model"
    frozen = ""
    if "frozen" in skipped.values():
        frozen = " A frozen layer is taken if `include` has its name in full."
    return (
        f"`include` must match at least one nn.Linear that can be block-sparse; got "
        f"{list(include)} with exclude={list(exclude)}. "
        f"The model's linear layers: {found}. A pattern without a dot matches the last part "
        f"of a name, one with a dot the whole name.{frozen}"
    )


def _obstacle(linear: Any, block_size: int, tied: set[int]) -> str | None:
    """Return why a layer cannot be block-sparse, or None."""
    if is_sharded(linear.weight):
        raise RuntimeError(
            "The model must be sparsified before it is sharded; got a Linear whose weight is a "
            "DTensor. Build it in __init__, or call sparsify in configure_model before "
            "fully_shard."
        )
    if type(linear) is not nn.Linear and not is_conv1d(linear):
        return f"a subclass of nn.Linear ({type(linear).__name__})"
    if parametrize.is_parametrized(linear):
        return "it has parametrizations"
    if "forward" in vars(linear):
        return "it has a `forward` of its own"
    if "weight" not in linear._parameters:
        return "its weight is not a parameter"
    if type(linear.weight) is not nn.Parameter:
        return f"its weight is a {type(linear.weight).__name__}"
    if id(linear.weight) in tied:
        return "its weight is tied"
    out_features, in_features = dense_shape(linear)
    if out_features % block_size or in_features % block_size:
        return f"{out_features}x{in_features} is not divisible by block_size={block_size}"
    try:
        check_dtype(linear.weight.dtype)
    except ValueError:
        return f"its dtype {linear.weight.dtype} is not supported"
    return None


def _all_names(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of each module, by its id, the first one first."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def _tied_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that stand in more than one place of the model's modules.

    A module that has several names is still one place, and the names go on to mean it.
    """
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
