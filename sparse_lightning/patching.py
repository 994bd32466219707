"""`sparsify` and `densify`: put block-sparse layers where `nn.Linear`s stood, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sparse_lightning.criteria import seeded_generator
from sparse_lightning.distributions import DISTRIBUTIONS, Distribution, Floor, Grid, share
from sparse_lightning.evolution import choose_blocks, within_reach
from sparse_lightning.linear import BlockSparseLinear, check_dtype, largest_blocks
from sparse_lightning.lookup import find
from sparse_lightning.mlp import CALL_HOOKS, BlockSparseMLP, can_fuse
from sparse_lightning.sharding import is_sharded
from sparse_lightning.tables import text_table
from sparse_lightning.topology import (
    BlockTopology,
    block_grid,
    check_block_size,
    check_density,
)

DEFAULT_EXCLUDE = ("head", "lm_head", "classifier")
INITS = ("random", "magnitude")


@dataclass(frozen=True)
class LayerReport:
    """One swapped layer: `shape` is (out_features, in_features); parameters include the bias."""

    shape: tuple[int, int]
    block_size: int
    n_blocks: int
    density: float
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True)
class SparsityReport:
    """What `sparsify` did: the swapped layers, and the linear layers it left with the reason."""

    layers: dict[str, LayerReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Present weights / all weights of the swapped layers together."""
        present = sum(r.n_blocks * r.block_size**2 for r in self.layers.values())
        return present / max(1, sum(r.shape[0] * r.shape[1] for r in self.layers.values()))

    def table(self) -> tuple[Sequence[str], Sequence[tuple[str, ...]]]:
        """Return a header, and a row of cells for each layer; the last row is their total."""
        header = ("layer", "shape", "blocks", "density", "parameters", "before")
        rows = [
            (
                name,
                f"{r.shape[0]}x{r.shape[1]}",
                f"{r.n_blocks} of {r.block_size}x{r.block_size}",
                f"{r.density:.3f}",
                f"{r.parameters_after:,}",
                f"{r.parameters_before:,}",
            )
            for name, r in self.layers.items()
        ]
        before = sum(r.parameters_before for r in self.layers.values())
        after = sum(r.parameters_after for r in self.layers.values())
        rows.append(("total", "", "", f"{self.density:.3f}", f"{after:,}", f"{before:,}"))
        return header, rows

    def __str__(self) -> str:
        lines = ["Block-sparse layers", text_table(*self.table(), total=True)]
        if self.skipped:
            lines += ["", "Left dense"]
            lines += [f"{name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def sparsify(
    model: nn.Module,
    *,
    block_size: int = 64,
    density: float = 0.25,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    distribution: str | Distribution = "uniform",
    layer_density: Mapping[str, float] | None = None,
    init: str = "random",
    seed: int = 0,
    max_density: float | None = None,
) -> SparsityReport:
    """Replace a model's `nn.Linear`s by `BlockSparseLinear`s, in place.

    Layers that already are block-sparse stay as they are. Call it before the optimizer is built.
    Every plain `nn.Sequential` in which swapped layers have an activation between them becomes a
    `BlockSparseMLP`, which computes the same with fewer passes over memory. An
    `nn.TransformerEncoderLayer` with swapped layers computes in eval as in training, since
    PyTorch's fused path reads dense weights; `densify` gives it back.

    Args:
        model: changed in place.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks of the swapped layers, in (0, 1].
        include: patterns of layers to swap. One without a dot matches the last part of a module's
            name, one with a dot the whole name; `*` and `?` are wildcards, "re:..." is a regular
            expression that must match the whole name. A layer named exactly must be swappable.
        exclude: patterns of layers to leave alone, read the same way.
        distribution: how the budget is shared among these layers and the block-sparse ones that
            `include` and `exclude` choose too: "uniform", "erdos_renyi", a function like those in
            `distributions`, or its dotted path.
        layer_density: densities of layers that have their own, by pattern as in `include`; the
            other layers share `density`.
        init: "random" keeps random blocks, scaled by density ** -0.5 so that the variance of the
            output is as before, and one in every block row and column as far as the density
            allows; "magnitude" keeps the largest blocks, unscaled.
        seed: of the random blocks; a layer's draw also depends on its name.
        max_density: the highest density the model shall ever reach, which fixes the slots a layer
            has; `density` if None.

    Returns:
        What was swapped, and what was left alone and why.

    Raises:
        ValueError: if no layer matched, a layer named exactly cannot be taken, or an argument is
            out of range; the model is then unchanged.
        RuntimeError: if the model's weights are already sharded.
    """
    check_block_size(block_size)
    check_density(density)
    if max_density is None:
        max_density = density
    check_density(max_density, "max_density")
    if max_density < density:
        raise ValueError(
            f"`max_density` must be at least `density`; got {max_density} for {density}."
        )
    if distribution == "global":
        raise ValueError(
            "`distribution` must be one that needs no scores: layers compete by them in a training "
            "whose density falls; got 'global'. Take another one, or have SparsityCallback or "
            "Sparsifier swap the layers."
        )
    offered = {name: shares for name, shares in DISTRIBUTIONS.items() if name != "global"}
    find("distribution", distribution, offered)
    check_choice("init", init, INITS)
    own = {} if layer_density is None else layer_density
    check_layer_density(own)

    def budgets(grids: Mapping[str, Grid]) -> tuple[dict[str, int], dict[str, int]]:
        check_layers_found(own, grids)
        fixed = layer_densities(own, grids)
        now, most = (share(distribution, d, grids, fixed) for d in (density, max_density))
        return now, {name: max(now[name], most[name]) for name in grids}

    return swap_layers(model, block_size, include, exclude, budgets, init, seed, Floor())


def swap_layers(
    model: nn.Module,
    block_size: int,
    include: Sequence[str],
    exclude: Sequence[str],
    budgets: Callable[[Mapping[str, Grid]], tuple[Mapping[str, int], Mapping[str, int]]],
    init: str,
    seed: int,
    floor: Floor,
) -> SparsityReport:
    """Do the work of `sparsify`, for budgets of any kind.

    Args:
        model, block_size, include, exclude, init, seed: as for `sparsify`.
        budgets: from the block grid of each layer to its blocks and its slots. It is asked about
            all layers that the patterns choose, in the model's order, so about those too that are
            block-sparse already and stay as they are: updates share among the same.
        floor: whose rows and columns random blocks keep to.
    """
    chosen, skipped = select_layers(model, block_size, include, exclude)
    grids: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if name in chosen:
            linear = chosen[name]
            grids[name] = block_grid(linear.out_features, linear.in_features, block_size)
        elif isinstance(module, BlockSparseLinear) and is_chosen(name, include, exclude):
            grids[name] = module.topology.grid
    n_blocks, capacities = budgets(grids) if chosen else ({}, {})
    layers = {}
    for name, linear in chosen.items():
        mask, scale = _initial_mask(linear, grids[name], n_blocks[name], init, seed, name, floor)
        topology = BlockTopology.from_mask(mask, block_size, capacity=capacities[name])
        layer = BlockSparseLinear.from_linear(linear, topology=topology)
        with torch.no_grad():
            layer.values.mul_(scale)
        _replace(model, name, layer)
        layers[name] = _report(layer)
    for name, layer in sparse_layers(model):
        layers.setdefault(name, _report(layer))
    for module in model.modules():
        if type(module) is nn.Sequential and can_fuse(module):
            _become(module, BlockSparseMLP)
    _leave_fast_paths(model)
    return SparsityReport(layers, skipped)


def densify(model: nn.Module) -> nn.Module:
    """Replace every `BlockSparseLinear` of a model by an equal `nn.Linear`, in place.

    Returns:
        The model; or, if it is itself a `BlockSparseLinear`, its `nn.Linear`.
    """
    if isinstance(model, BlockSparseLinear):
        return model.to_linear()
    linears: dict[int, nn.Linear] = {}  # a layer that stands under two names stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if isinstance(layer, BlockSparseLinear):
            _replace(model, name, linears.setdefault(id(layer), layer.to_linear()))
    for module in model.modules():
        if type(module) is BlockSparseMLP:
            _become(module, nn.Sequential)
    _take_fast_paths(model)
    return model


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, BlockSparseLinear]]:
    """Yield (name, layer) of every `BlockSparseLinear` in a model, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, BlockSparseLinear):
            yield name, module


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


def is_chosen(name: str, include: Iterable[str], exclude: Iterable[str]) -> bool:
    """Tell whether the patterns of `include` and `exclude` choose a module's name."""
    return any(matches(pattern, name) for pattern in include) and not any(
        matches(pattern, name) for pattern in exclude
    )


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


def select_layers(
    model: nn.Module, block_size: int, include: Sequence[str], exclude: Sequence[str]
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Return the layers that `sparsify` would swap, and a reason for every one left alone.

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
    chosen: dict[str, nn.Linear] = {}
    skipped: dict[str, str] = {}
    names = [name for name, _ in model.named_modules()]
    for pattern in include:
        if not _is_exact(pattern) or "." not in pattern or pattern in names:
            continue
        raise ValueError(
            f"`include` must name modules of the model; got {pattern!r}, which is none of them."
        )
    tied = _tied_weights(model)
    for name, module in model.named_modules():
        if not (isinstance(module, nn.Linear) or _is_conv1d(module)):
            continue
        if not is_chosen(name, include, ()):
            skipped[name] = "not included"
        elif is_chosen(name, exclude, ()):
            skipped[name] = "excluded"
        elif reason := _obstacle(module, block_size, tied):
            if name in include:
                raise ValueError(
                    f"`include` must name layers that can be block-sparse; got '{name}': {reason}."
                )
            skipped[name] = reason
        else:
            chosen[name] = module
    if not chosen and not any(True for _ in sparse_layers(model)):
        found = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        if not found:
            found = "none yet; build them in __init__ or, under Lightning, in configure_model"
        raise ValueError(
            f"`include` must match at least one nn.Linear that can be block-sparse; got "
            f"{list(include)} with exclude={list(exclude)}. "
            f"The model's linear layers: {found}. A pattern without a dot matches the last part "
            "of a name, one with a dot the whole name."
        )
    return chosen, skipped


def _is_exact(pattern: str) -> bool:
    return not pattern.startswith("re:") and not any(c in pattern for c in "*?[")


def _is_conv1d(module: nn.Module) -> bool:
    """Tell whether it is what GPT-2 has for linear layers; without importing where it is from."""
    of = type(module)
    return of.__name__ == "Conv1D" and of.__module__ == "transformers.pytorch_utils"


def _obstacle(linear: nn.Linear, block_size: int, tied: set[int]) -> str | None:
    """Return why a layer cannot be block-sparse, or None."""
    if _is_conv1d(linear):
        return "a Conv1D, whose weight is transposed; put an nn.Linear in its place before"
    if is_sharded(linear.weight):
        raise RuntimeError(
            "The model must be sparsified before it is sharded; got a Linear whose weight is a "
            "DTensor. Build it in __init__, or call sparsify in configure_model before "
            "fully_shard."
        )
    if type(linear) is not nn.Linear:
        return f"a subclass of nn.Linear ({type(linear).__name__})"
    if parametrize.is_parametrized(linear):
        return "it has parametrizations"
    if any(getattr(linear, hooks) for hooks in _HOOKS):
        return "it has hooks"
    if "weight" not in linear._parameters:
        return "its weight is not a parameter"
    if id(linear.weight) in tied:
        return "its weight is tied"
    if linear.out_features % block_size or linear.in_features % block_size:
        return (
            f"{linear.out_features}x{linear.in_features} is not divisible by "
            f"block_size={block_size}"
        )
    try:
        check_dtype(linear.weight.dtype)
    except ValueError:
        return f"its dtype {linear.weight.dtype} is not supported"
    return None


_HOOKS = (
    *CALL_HOOKS,
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _tied_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that are reachable under more than one name."""
    seen: set[int] = set()
    tied: set[int] = set()
    for _, parameter in model.named_parameters(remove_duplicate=False):
        (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _initial_mask(
    linear: nn.Linear,
    grid: Grid,
    n_blocks: int,
    init: str,
    seed: int,
    name: str,
    floor: Floor,
) -> tuple[Tensor, float]:
    """Return the first block mask of a layer, and the factor for the values it keeps."""
    if init == "magnitude" and linear.weight.device.type != "meta":
        return largest_blocks(linear.weight, grid, n_blocks), 1.0
    # The default dtype may be a half one, which draws otherwise and has many ties.
    drawn = torch.rand(
        grid, generator=seeded_generator(seed, 0, name), dtype=torch.float32, device="cpu"
    )
    everywhere = torch.ones_like(drawn, dtype=torch.bool)
    density = n_blocks / (grid[0] * grid[1])
    lines = within_reach((floor.row, floor.column), grid, n_blocks)
    return choose_blocks(drawn, everywhere, n_blocks, floor=lines), density**-0.5


@torch.no_grad()
def start_from(layer: BlockSparseLinear, weight: Tensor, init: str) -> None:
    """Give a new layer what `sparsify` would have given it, had the linear layer had this weight.

    Args:
        layer: whose random blocks stay, and whose number of blocks does in any case.
        weight: `[out_features, in_features]`.
        init: as for `sparsify`.
    """
    at, scale = layer.topology, layer.density**-0.5
    if init == "magnitude":
        mask, scale = largest_blocks(weight, at.grid, at.n_blocks), 1.0
        at.assign_(BlockTopology.from_mask(mask, at.block_size, capacity=at.capacity).coords)
    layer.values.copy_(at.pack(weight.to(layer.values)) * scale)


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _become(module: nn.Module, of: type[nn.Module]) -> None:
    """Change the class, so that the object stays, with all that refers to it."""
    module.__class__ = of


# What PyTorch's encoders look at before they take their fused path for inference, which reads the
# `weight` of each layer; in the first, whether there is an activation that it offers.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


def _encoder_flags(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        yield from ((module, flag) for of, flag in _FAST_PATHS.items() if isinstance(module, of))


def _leave_fast_paths(model: nn.Module) -> None:
    """Have encoders with block-sparse layers call their layers, also in inference."""
    for module, flag in _encoder_flags(model):
        value = getattr(module, flag)
        if value and any(True for _ in sparse_layers(module)):
            setattr(module, flag, type(value)(0))
            setattr(module, f"_dense_{flag}", value)


def _take_fast_paths(model: nn.Module) -> None:
    """Undo `_leave_fast_paths`."""
    for module, flag in _encoder_flags(model):
        if hasattr(module, f"_dense_{flag}"):
            setattr(module, flag, getattr(module, f"_dense_{flag}"))
            delattr(module, f"_dense_{flag}")


def _report(layer: BlockSparseLinear) -> LayerReport:
    bias = 0 if layer.bias is None else layer.bias.numel()
    return LayerReport(
        shape=(layer.out_features, layer.in_features),
        block_size=layer.block_size,
        n_blocks=layer.topology.n_blocks,
        density=layer.density,
        parameters_before=layer.out_features * layer.in_features + bias,
        parameters_after=layer.topology.n_blocks * layer.block_size**2 + bias,
    )
