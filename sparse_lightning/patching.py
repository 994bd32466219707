"""`sparsify` and `densify`: put block-sparse layers where `nn.Linear`s stood, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sparse_lightning.copies import averaged, by_hand, find_copies
from sparse_lightning.coverage import Coverage, coverage
from sparse_lightning.linear import (
    BlockSparseLinear,
    dense_shape,
    dense_weight_of,
    is_conv1d,
    largest_blocks,
    make_dense_,
    make_sparse_,
)
from sparse_lightning.mlp import BlockSparseMLP, can_fuse
from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_choice,
    check_layer_density,
    check_layers_found,
    is_chosen,
    layer_densities,
)
from sparse_lightning.policy.criteria import seeded_generator
from sparse_lightning.policy.distributions import DISTRIBUTIONS, Distribution, Floor, Grid, share
from sparse_lightning.policy.evolution import choose_blocks, within_reach
from sparse_lightning.policy.lookup import find
from sparse_lightning.selection import select_layers, sparse_layers
from sparse_lightning.sharding import is_sharded
from sparse_lightning.tables import text_table
from sparse_lightning.topology import (
    BlockTopology,
    block_grid,
    check_block_size,
    check_density,
)

INITS = ("random", "magnitude")

# Called with each model whose layers have become block-sparse or dense.
when_layers_change: list[Callable[[nn.Module], None]] = []


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
    """What `sparsify` did.

    Attributes:
        layers: the block-sparse layers.
        skipped: why each other linear layer stayed dense.
        follows: the block-sparse layers that are copies, and so no `layers`: `{copy: original}`.
        coverage: which share of the model the block-sparse layers are, and what is dense.
    """

    layers: dict[str, LayerReport] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    coverage: Coverage | None = None

    @property
    def uncovered(self) -> str:
        """What to say where most of the model stays dense; "" elsewhere."""
        most = self.coverage is not None and self.coverage.share < 0.5
        return f"{self.coverage}" if most else ""

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
        if self.follows:
            lines += ["", "Copies"]
            lines += [f"{copy} follows {original}" for copy, original in self.follows.items()]
        if self.skipped:
            lines += ["", "Left dense"]
            lines += [f"{name}: {reason}" for name, reason in self.skipped.items()]
        if self.uncovered:
            lines += ["", self.uncovered]
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
    follow: Mapping[str, str] | None = None,
) -> SparsityReport:
    """Turn a model's `nn.Linear`s into `BlockSparseLinear`s, in place.

    The objects stay: a layer changes its class, and its weight's Parameter becomes `values`, with
    other data. So lists of layers, hooks, attributes and optimizers that hold them go on. Layers
    that already are block-sparse stay as they are. What frozen layers compute does not change: they
    stay dense, unless they are copies of layers that train, as a target network's are. Such a copy
    gets the blocks of its original.

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
            expression that must match the whole name. A layer named in full must be swappable, and
            is taken also where it is frozen, or an output layer.
        exclude: patterns of layers to leave alone, read the same way, beside output layers: those
            called head, lm_head or classifier, and those found by their role. An empty list leaves
            out none.
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
        follow: copies of layers that are not to be told from their weights, as `{"target": "net"}`:
            each layer in the first module gets the blocks of its counterpart in the second.

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

    options = SwapOptions(block_size, include, exclude, init, seed, Floor(), follow or {})
    return swap_layers(model, options, budgets)


@dataclass(frozen=True)
class SwapOptions:
    """How `swap_layers` swaps: as for `sparsify`; random blocks keep to the rows of the floor."""

    block_size: int
    include: Sequence[str] = ("*",)
    exclude: Sequence[str] = DEFAULT_EXCLUDE
    init: str = "random"
    seed: int = 0
    floor: Floor = field(default_factory=Floor)
    follow: Mapping[str, str] = field(default_factory=dict)


def swap_layers(
    model: nn.Module,
    options: SwapOptions,
    budgets: Callable[[Mapping[str, Grid]], tuple[Mapping[str, int], Mapping[str, int]]],
) -> SparsityReport:
    """Do the work of `sparsify`, for budgets of any kind.

    Args:
        model: changed in place.
        options: which layers, and what they begin with.
        budgets: from the block grid of each layer to its blocks and its slots. It is asked about
            all layers that the patterns choose, in the model's order, so about those too that are
            block-sparse already and stay as they are: updates share among the same. Not about
            copies, which have the blocks of their originals.
    """
    block_size = options.block_size
    found = select_layers(model, block_size, options.include, options.exclude, options.follow)
    known = copies_in(model, options)
    grids: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if name in found.layers:
            grids[name] = block_grid(*dense_shape(module), block_size)
        elif (
            isinstance(module, BlockSparseLinear)
            and name not in known
            and is_chosen(name, options.include, options.exclude)
        ):
            grids[name] = module.topology.grid
    n_blocks, capacities = budgets(grids) if found.layers else ({}, {})
    begun = {
        name: _beginning(linear, name, grids[name], n_blocks[name], capacities[name], options)
        for name, linear in found.layers.items()
    }
    # From here on nothing is refused.
    for name, linear in found.layers.items():
        layer = make_sparse_(linear, *begun[name], name)
        layer.lineage = found.lineages.get(name, layer.lineage)
    for name, original in found.follows.items():
        of = model.get_submodule(original)
        assert isinstance(of, BlockSparseLinear)
        _, scale = begun.get(original, (None, 1.0))
        copy = make_sparse_(model.get_submodule(name), of.topology, scale, name)
        copy.lineage = of.lineage
    follows = copies_in(model, options)
    swapped = dict(sparse_layers(model))
    for copy_name, original in follows.items():
        swapped[copy_name].take_blocks_of(swapped[original])
    layers = {n: _report(layer) for n, layer in swapped.items() if n not in follows}
    _fit_containers(model)
    return SparsityReport(layers, found.skipped, follows, coverage(model))


def copies_in(
    model: nn.Module,
    options: SwapOptions,
    trains: Callable[[str, BlockSparseLinear], bool] | None = None,
) -> dict[str, str]:
    """Return the block-sparse layers of a model that are copies of others, `{copy: original}`.

    Args:
        model: that holds them.
        options: say what is excluded, and what follows by the user's word.
        trains: whether a layer is one that is trained; if it is not frozen, by default. What is in
            an `AveragedModel` is not in any case.
    """
    layers, averages = dict(sparse_layers(model)), averaged(model)

    def is_original(name: str) -> bool:
        if any(name.startswith(prefix) for prefix in averages):
            return False
        layer = layers[name]
        return layer.values.requires_grad if trains is None else trains(name, layer)

    lineage = {name: layer.lineage for name, layer in layers.items()}
    shapes = {name: dense_shape(layer) for name, layer in layers.items()}
    found = find_copies(lineage, shapes, is_original)
    found |= {c: o for c, o in by_hand(options.follow, layers).items() if o in layers}
    include = ("*", *options.include)
    return {
        copy: original
        for copy, original in found.items()
        if is_chosen(copy, include, options.exclude)
        and is_chosen(original, options.include, options.exclude)
    }


def convert_to_match(model: nn.Module, topologies: Mapping[str, BlockTopology | None]) -> None:
    """Make layers block-sparse or dense, as those of a state dict are that is about to be loaded.

    Args:
        model: changed in place. Its weights are lost where a layer changes.
        topologies: of each layer, by name, the blocks; None for a dense one.

    Raises:
        ValueError: if there is no linear layer of that name and size.
    """
    # By the module, as one may have several names.
    changes: dict[int, Callable[[], object]] = {}
    for name, topology in topologies.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            continue  # that is for `load_state_dict` to tell
        if topology is None:
            if isinstance(module, BlockSparseLinear):
                changes.setdefault(id(module), partial(make_dense_, module))
            continue
        if isinstance(module, BlockSparseLinear):
            continue  # it takes what it loads
        if type(module) is not nn.Linear and not is_conv1d(module):
            raise ValueError(
                "A block-sparse layer of a checkpoint must be an nn.Linear of the model; got a "
                f"{type(module).__name__} (layer '{name}'). Build the model that it was saved of."
            )
        shape = (topology.out_features, topology.in_features)
        if dense_shape(module) != shape:
            raise ValueError(
                f"The model's layer must be {shape[0]}x{shape[1]}, as the checkpoint's is; got "
                f"{'x'.join(map(str, dense_shape(module)))} (layer '{name}')."
            )
        changes.setdefault(id(module), partial(make_sparse_, module, topology, label=name))
    for change in changes.values():
        change()
    if changes:
        _fit_containers(model)


def densify(model: nn.Module) -> nn.Module:
    """Turn every `BlockSparseLinear` of a model into an equal dense layer, in place.

    The objects stay, as in `sparsify`; where ranks hold parts of a layer, an `nn.Linear` takes its
    place.

    Returns:
        The model; or, if it is itself a `BlockSparseLinear`, an `nn.Linear` that equals it.

    Raises:
        RuntimeError: while a layer is evolved by a Sparsifier that is attached to an optimizer.
    """
    if isinstance(model, BlockSparseLinear):
        return model.to_linear()
    linears: dict[int, nn.Linear] = {}  # a layer that stands under two names stays one layer
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, BlockSparseLinear):
            continue
        if is_sharded(layer.values):
            linear = linears.setdefault(id(layer), layer.to_linear())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        else:
            make_dense_(layer)
    _fit_containers(model)
    return model


def _beginning(
    linear: nn.Module, name: str, grid: Grid, n_blocks: int, capacity: int, options: SwapOptions
) -> tuple[BlockTopology, float]:
    """Return the first blocks of a layer, and the factor for the values that it keeps."""
    if options.init == "magnitude" and next(linear.parameters()).device.type != "meta":
        mask, scale = largest_blocks(dense_weight_of(linear), grid, n_blocks), 1.0
    else:
        # The default dtype may be a half one, which draws otherwise and has many ties.
        drawn = torch.rand(
            grid,
            generator=seeded_generator(options.seed, 0, name),
            dtype=torch.float32,
            device="cpu",
        )
        everywhere = torch.ones_like(drawn, dtype=torch.bool)
        lines = within_reach((options.floor.row, options.floor.column), grid, n_blocks)
        mask = choose_blocks(drawn, everywhere, n_blocks, floor=lines)
        scale = (n_blocks / (grid[0] * grid[1])) ** -0.5
    return BlockTopology.from_mask(mask, options.block_size, capacity=capacity), scale


@torch.no_grad()
def start_from(
    layer: BlockSparseLinear, weight: Tensor, init: str, of: BlockSparseLinear | None = None
) -> None:
    """Give a new layer what `sparsify` would have given it, had the linear layer had this weight.

    Args:
        layer: whose random blocks stay, and whose number of blocks does in any case.
        weight: as the dense layer holds it.
        init: as for `sparsify`.
        of: the original, where the layer is a copy that is to have its blocks.
    """
    weight = weight.T if layer.transposed else weight
    if of is not None:
        layer.take_blocks_of(of)
    at, scale = layer.topology, layer.density**-0.5
    if init == "magnitude" and of is not None:
        scale = 1.0
    elif init == "magnitude":
        mask, scale = largest_blocks(weight, at.grid, at.n_blocks), 1.0
        at.assign_(BlockTopology.from_mask(mask, at.block_size, capacity=at.capacity).coords)
    layer.values.copy_(at.pack(weight.to(layer.values)) * scale)


def _fit_containers(model: nn.Module) -> None:
    """Have the modules around block-sparse layers compute with them, and with dense ones as usual.

    They change their class or a flag, so that the objects stay, with all that refers to them.
    """
    for module in model.modules():
        if type(module) is nn.Sequential or type(module) is BlockSparseMLP:
            module.__class__ = BlockSparseMLP if can_fuse(module) else nn.Sequential
        for of, flag in _FAST_PATHS.items():
            if not isinstance(module, of):
                continue
            kept = f"_dense_{flag}"
            if not any(True for _ in sparse_layers(module)):
                if hasattr(module, kept):
                    setattr(module, flag, vars(module).pop(kept))
            elif value := getattr(module, flag):
                setattr(module, flag, type(value)(0))
                setattr(module, kept, value)
    for tell in when_layers_change:
        tell(model)


# What PyTorch's encoders look at before they take their fused path for inference, which reads the
# `weight` of each layer; in the first, whether there is an activation that it offers.
_FAST_PATHS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}


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
