"""Which layers of a model become block-sparse, which follow another, and why others stay dense."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sparse_lightning import ranks
from sparse_lightning.copies import (
    assign_lineages,
    expand_follow,
    find_averaged_prefixes,
    find_copies,
    is_trivial,
)
from sparse_lightning.linear import BlockSparseLinear, check_dtype, dense_shape, is_conv1d
from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    FIRST,
    check_patterns,
    is_exact,
    is_selected,
    list_reasons,
    matches,
)
from sparse_lightning.policy.distributions import Floor
from sparse_lightning.roles import find_output_heads, find_read_weights, is_linear
from sparse_lightning.sharding import is_sharded
from sparse_lightning.topology import BLOCK_SIZES

_NOT_INCLUDED = "not included"
_INDIVISIBLE = "is not divisible by block_size="


@dataclass(frozen=True)
class SwapOptions:
    """Which layers a swap selects, and how they start.

    All are keywords of `sparsify`, except for `floor`: the first blocks respect its minimum numbers
    of blocks per block row and column.
    """

    block_size: int
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = DEFAULT_EXCLUDE
    init: str = "random"
    seed: int = 0
    floor: Floor = field(default_factory=Floor)
    follow: Mapping[str, str] = field(default_factory=dict)
    nm: str | None = None

    def selects(self, name: str) -> bool:
        """Return whether `include` and `exclude` select a name."""
        return is_selected(name, self.include, self.exclude)

    def named(self, model: nn.Module) -> SwapOptions:
        """Return the options with the name of the model's first linear layer for `FIRST`."""
        if FIRST not in self.exclude:
            return self
        layers = {id(m): name for name, m in [*linear_layers(model), *sparse_layers(model)]}
        first = next((layers[id(m)] for m in model.modules() if id(m) in layers), None)
        patterns = [] if first is None else [f"re:{re.escape(first)}"]
        return replace(self, exclude=(*(p for p in self.exclude if p != FIRST), *patterns))


@dataclass(frozen=True)
class Selection:
    """What a swap would do with the dense linear layers of a model.

    Attributes:
        layers: layers that get their own blocks.
        follows: layers that get the blocks of another, `{copy: source}`; the source is one of
            `layers`, or already block-sparse.
        skipped: why each of the other layers stays dense.
        lineages: `BlockSparseLinear._lineage` of each layer that becomes block-sparse.
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
    """Yield (name, layer) of every dense linear layer: `nn.Linear`s and Transformers' `Conv1D`s."""
    for name, module in model.named_modules():
        if is_linear(module):
            yield name, module


def select_layers(model: nn.Module, options: SwapOptions) -> Selection:
    """Return what `sparsify` would do with each linear layer, without changing the model.

    Warns about patterns that match no layer.

    Raises:
        ValueError: if there is no layer to swap or an option is wrong.
    """
    if is_linear(model):
        kind = "nn.Linear" if isinstance(model, nn.Linear) else type(model).__name__
        raise ValueError(
            f"`model` must contain the layers to replace; got a bare {kind}. "
            "Use BlockSparseLinear.from_linear(...)."
        )
    options = options.named(model)
    include, exclude = options.include, options.exclude
    check_patterns("include", include)
    check_patterns("exclude", exclude)
    _check_exact_names(model, include)
    tied = _find_tied_weights(model)
    eligible, skipped = _find_eligible(model, options, tied)
    # A copy of an included layer follows it even if its own name is not included.
    eligible_as_copies = {
        name: module
        for name, module in linear_layers(model)
        if skipped.get(name) == _NOT_INCLUDED
        and is_selected(name, ("*", *include), exclude)
        and not _find_obstacle(module, options.block_size, tied)
    }
    followed = _resolve_follow(model, options.follow)
    found = _separate_copies(model, eligible, eligible_as_copies, include, followed)
    found.skipped.update({n: why for n, why in skipped.items() if n not in found.follows})
    if not found.layers and not any(True for _ in sparse_layers(model)):
        raise ValueError(_describe_no_layers(model, options, found.skipped))
    _warn_about_unused_patterns(model, options)
    order = [name for name, _ in linear_layers(model)]
    reasons = {name: found.skipped[name] for name in order if name in found.skipped}
    return Selection(found.layers, found.follows, reasons, found.lineages)


def find_sparse_copies(
    model: nn.Module,
    options: SwapOptions,
    is_trained: Callable[[str, BlockSparseLinear], bool] | None = None,
) -> dict[str, str]:
    """Return the block-sparse layers of a model that are copies of others, `{copy: source}`.

    Args:
        model: model that contains the layers.
        options: options that select the layers and name copies.
        is_trained: predicate on layers; by default, a layer that is not frozen is trained. Layers
            inside an `AveragedModel` never count as trained.
    """
    options = options.named(model)
    layers, averages = dict(sparse_layers(model)), find_averaged_prefixes(model)

    def may_be_source(name: str) -> bool:
        if any(name.startswith(prefix) for prefix in averages):
            return False
        layer = layers[name]
        return layer.values.requires_grad if is_trained is None else is_trained(name, layer)

    lineages = {name: layer._lineage for name, layer in layers.items()}
    shapes = {name: dense_shape(layer) for name, layer in layers.items()}
    found = find_copies(lineages, shapes, may_be_source)
    found |= {c: s for c, s in expand_follow(options.follow, layers).items() if s in layers}
    include = ("*", *options.include)
    return {
        copy: source
        for copy, source in found.items()
        if is_selected(copy, include, options.exclude) and options.selects(source)
    }


def _find_eligible(
    model: nn.Module, options: SwapOptions, tied: set[int]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Return the selected layers that can be block-sparse, and why the others are skipped."""
    include, exclude = options.include, options.exclude
    eligible: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    names = _names_by_id(model)
    roles = find_read_weights(model)
    if exclude:
        roles = {**find_output_heads(model), **roles}
    for name, module in linear_layers(model):
        if not is_selected(name, include, ()):
            skipped[name] = _NOT_INCLUDED
        elif not options.selects(name) or (
            name not in include
            and not all(is_selected(n, ("*",), exclude) for n in names[id(module)])
        ):
            skipped[name] = "excluded"
        elif reason := _find_obstacle(module, options.block_size, tied):
            if name in include:
                sizes = _fitting_sizes([dense_shape(module)]) if _INDIVISIBLE in reason else ""
                raise ValueError(
                    f"`include` must name layers that can be block-sparse; got '{name}': {reason}. "
                    f"{sizes}".rstrip()
                )
            skipped[name] = reason
        elif name in roles and name not in include:
            skipped[name] = roles[name]
        else:
            eligible[name] = module
    return eligible, skipped


def _separate_copies(
    model: nn.Module,
    eligible: Mapping[str, nn.Module],
    eligible_as_copies: Mapping[str, nn.Module],
    include: Sequence[str],
    followed: Mapping[str, str],
) -> Selection:
    """Separate the layers that are trained from their copies and from other frozen layers.

    Args:
        model: model that contains the layers.
        eligible: layers that may become block-sparse.
        eligible_as_copies: layers that may become block-sparse only as copies.
        include: patterns; a layer that they name in full is selected even if it is frozen.
        followed: copies that the user names in `follow`, `{copy: source}`.
    """
    averages = find_averaged_prefixes(model)
    # If no parameter of the model is trained, being frozen does not distinguish its layers.
    is_any_trained = any(parameter.requires_grad for parameter in model.parameters())
    weights: dict[str, Any] = {n: m.weight for n, m in {**eligible, **eligible_as_copies}.items()}

    def is_untrained(name: str) -> bool:
        if name in include:
            return False
        is_frozen = is_any_trained and not weights[name].requires_grad
        return is_frozen or name in followed or any(name.startswith(p) for p in averages)

    found = Selection({n: module for n, module in eligible.items() if not is_untrained(n)})
    # A frozen layer that `include` names in full is neither a copy nor a source.
    compared = {n: w for n, w in weights.items() if is_untrained(n) or w.requires_grad}
    found.lineages.update(assign_lineages(compared))
    shapes = {n: dense_shape(module) for n, module in {**eligible, **eligible_as_copies}.items()}
    copies = {**find_copies(found.lineages, shapes, found.layers.__contains__), **followed}
    sources = {**found.layers, **dict(sparse_layers(model))}
    for name in filter(is_untrained, weights):
        source = copies.get(name)
        if source in sources:
            found.follows[name] = source
        elif name in followed:
            found.skipped[name] = f"it follows {source}, which stays dense"
        elif name in eligible:
            found.skipped[name] = _explain_frozen(name, found)
    return found


def _explain_frozen(name: str, found: Selection) -> str:
    lineage = found.lineages[name]
    equal = [other for other in found.layers if found.lineages.get(other) == lineage]
    if not equal or is_trivial(lineage):
        return "frozen"
    others = equal[0] if len(equal) == 1 else f"{len(equal)} layers"
    return f"frozen, and equal to {others}; if it is a copy, name its source in `follow`"


def _resolve_follow(model: nn.Module, follow: Mapping[str, str]) -> dict[str, str]:
    """Return the layers that `follow` names as copies, `{copy: source}`.

    Raises:
        ValueError: if a module does not exist or has no linear layers, or shapes differ.
    """
    layers: dict[str, Any] = {**dict(linear_layers(model)), **dict(sparse_layers(model))}
    modules = dict(model.named_modules())
    for copy, source in follow.items():
        for name in (copy, source):
            if name not in modules:
                raise ValueError(
                    f"`follow` must map modules of the model to modules; got {name!r}, which the "
                    "model does not have."
                )
        if not expand_follow({copy: source}, layers):
            raise ValueError(
                f"`follow` must map modules that have linear layers; got {copy!r}, which has none."
            )
    found = expand_follow(follow, layers)
    for name, source in found.items():
        if source not in layers or dense_shape(layers[source]) != dense_shape(layers[name]):
            raise ValueError(
                "`follow` must map a module to one with the same layers; got one without a linear "
                f"layer of the same shape at '{source}' (layer '{name}')."
            )
    return found


def _check_exact_names(model: nn.Module, include: Iterable[str]) -> None:
    modules = dict(model.named_modules(remove_duplicate=False))
    first_names = {id(module): name for name, module in model.named_modules()}
    for pattern in include:
        if not is_exact(pattern) or "." not in pattern:
            continue
        if pattern not in modules:
            raise ValueError(
                f"`include` must name modules of the model; got {pattern!r}, which the model does "
                "not have."
            )
        name = first_names[id(modules[pattern])]
        if name != pattern:
            raise ValueError(
                "`include` must use the first name of a module that has several; got "
                f"{pattern!r}. Write {name!r}."
            )


def _warn_about_unused_patterns(model: nn.Module, options: SwapOptions) -> None:
    layers = [*linear_layers(model), *sparse_layers(model)]
    names_by_id = _names_by_id(model)
    first_names = [name for name, _ in layers]
    all_names = [name for _, layer in layers for name in names_by_id[id(layer)]]
    for argument, patterns, names in (
        ("include", options.include, first_names),
        ("exclude", options.exclude, all_names),
    ):
        unused = [
            pattern
            for pattern in patterns
            if pattern not in DEFAULT_EXCLUDE and not any(matches(pattern, n) for n in names)
        ]
        if unused and ranks.is_rank_zero():
            warnings.warn(
                f"`{argument}` should match linear layers; got {', '.join(map(repr, unused))}, "
                "which match none. A pattern without a dot is compared with the last part of a "
                "layer's name, one with a dot with the whole name; '*' and '?' are wildcards.",
                stacklevel=2,
            )


def _describe_no_layers(model: nn.Module, options: SwapOptions, skipped: Mapping[str, str]) -> str:
    found = list_reasons(skipped)
    if not found:
        found = "none yet; build them in __init__ or, under Lightning, in setup or configure_model"
    layers = dict(linear_layers(model))
    indivisible = [name for name, reason in skipped.items() if _INDIVISIBLE in reason]
    remedies = []
    if indivisible:
        remedies.append(_fitting_sizes([dense_shape(layers[name]) for name in indivisible]))
    if "frozen" in skipped.values():
        remedies.append("A frozen layer is swapped only if `include` has its full name.")
    if not remedies:
        remedies.append(
            "A pattern without a dot matches the last part of a name, one with a dot the whole "
            "name."
        )
    return (
        f"`include` must match at least one nn.Linear that can be block-sparse; got "
        f"{list(options.include)} with exclude={list(options.exclude)}. "
        f"The model's linear layers: {found}. {' '.join(remedies)}"
    )


def _fitting_sizes(shapes: Sequence[tuple[int, int]]) -> str:
    """Return a sentence about the block sizes that divide layers of these shapes."""
    fitting = {
        size: [not (rows % size or columns % size) for rows, columns in shapes]
        for size in BLOCK_SIZES
    }
    for fits, note in ((all, ""), (any, ", which divides some of them")):
        if sizes := [str(size) for size, divides in fitting.items() if fits(divides)]:
            return f"Set `block_size` to {' or '.join(sizes)}{note}."
    return f"No block size divides this: use numbers of features in multiples of {BLOCK_SIZES[0]}."


def _find_obstacle(linear: Any, block_size: int, tied: set[int]) -> str | None:
    """Return why a layer cannot be block-sparse, or None if it can."""
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
        return "its `forward` is overridden"
    if "weight" not in linear._parameters:
        return "its weight is not a parameter"
    if type(linear.weight) is not nn.Parameter:
        return f"its weight is a {type(linear.weight).__name__}"
    if id(linear.weight) in tied:
        return "its weight is tied"
    out_features, in_features = dense_shape(linear)
    if out_features % block_size or in_features % block_size:
        return f"{out_features}x{in_features} {_INDIVISIBLE}{block_size}"
    try:
        check_dtype(linear.weight.dtype)
    except ValueError:
        return f"its dtype {linear.weight.dtype} is not supported"
    return None


def _names_by_id(model: nn.Module) -> dict[int, list[str]]:
    """Return all names of each module, by the module's id, in the model's order."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found.setdefault(id(module), []).append(name)
    return found


def _find_tied_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that several modules share.

    One module with several names does not tie its parameters, as the swap keeps the object.
    """
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module._parameters.values():
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied
