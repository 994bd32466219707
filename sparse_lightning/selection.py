"""Which layers of a model become block-sparse, which follow another, and why others stay dense."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_lightning import ranks
from sparse_lightning.copies import averaged, by_hand, lineages, original_of
from sparse_lightning.linear import BlockSparseLinear, check_dtype, dense_shape, is_conv1d
from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_patterns,
    is_chosen,
    is_exact,
    matches,
)
from sparse_lightning.roles import output_heads, weight_readers
from sparse_lightning.sharding import is_sharded


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
        if isinstance(module, nn.Linear) or is_conv1d(module):
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
    if isinstance(model, nn.Linear):
        raise ValueError(
            "`model` must contain the layers to replace; got a bare nn.Linear. "
            "Use BlockSparseLinear.from_linear(...)."
        )
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    _check_names(model, include)
    able, skipped = _able(model, block_size, include, exclude)
    found = _sort_out(model, able, include, _by_hand(model, follow or {}))
    found.skipped.update(skipped)
    if not found.layers and not any(True for _ in sparse_layers(model)):
        raise ValueError(_nothing_to_swap(include, exclude, found.skipped))
    _warn_of_idle_patterns(model, include, exclude)
    order = [name for name, _ in linear_layers(model)]
    reasons = {name: found.skipped[name] for name in order if name in found.skipped}
    return Selection(found.layers, found.follows, reasons, found.lineages)


def _able(
    model: nn.Module, block_size: int, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the layers that are asked for and can be block-sparse, and why others are left."""
    able: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    tied = _tied_weights(model)
    roles = weight_readers(model)
    if exclude:
        roles = {**output_heads(model), **roles}
    for name, module in linear_layers(model):
        if not is_chosen(name, include, ()):
            skipped[name] = "not included"
        elif not is_chosen(name, include, exclude):
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
    include: Sequence[str],
    told: Mapping[str, str],
) -> Selection:
    """Tell the layers that train from their copies, and from others that are frozen."""
    averages = averaged(model)
    # Of a model that is not to be trained at all, the layers are taken as they are.
    trains = any(parameter.requires_grad for parameter in model.parameters())
    found, still = Selection(), []
    for name, module in able.items():
        frozen = trains and not module.weight.requires_grad
        is_copy = name in told or any(name.startswith(prefix) for prefix in averages)
        if (frozen or is_copy) and name not in include:
            still.append(name)
        else:
            found.layers[name] = module
    # A frozen layer that is asked for in full is not taken for a copy.
    weights: dict[str, Any] = {name: module.weight for name, module in able.items()}
    compared: dict[str, Tensor] = {
        name: weight for name, weight in weights.items() if name in still or weight.requires_grad
    }
    found.lineages.update(lineages(compared))
    originals = {**found.layers, **dict(sparse_layers(model))}
    for name in still:
        mates = [
            other for other in found.layers if found.lineages.get(other) == found.lineages[name]
        ]
        original = told.get(name) or original_of(name, mates)
        if original in originals:
            found.follows[name] = original
        elif name in told:
            found.skipped[name] = f"it follows {original}, which stays dense"
        elif mates:
            found.skipped[name] = (
                f"frozen, and equal to {len(mates)} layers; say which one it follows by `follow`"
            )
        else:
            found.skipped[name] = "frozen"
    return found


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
    names = [name for name, _ in model.named_modules()]
    for pattern in include:
        if is_exact(pattern) and "." in pattern and pattern not in names:
            raise ValueError(
                f"`include` must name modules of the model; got {pattern!r}, which is none of them."
            )


def _warn_of_idle_patterns(
    model: nn.Module, include: Iterable[str], exclude: Iterable[str]
) -> None:
    names = [name for name, _ in (*linear_layers(model), *sparse_layers(model))]
    for argument, patterns in (("include", include), ("exclude", exclude)):
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


def _tied_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that are reachable under more than one name."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
