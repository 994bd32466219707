"""`sparsify` and `densify`: turn dense linear layers into block-sparse ones and back, in place."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_lightning import ranks
from sparse_lightning.fusion import fuse_mlp_
from sparse_lightning.linear import (
    BlockSparseLinear,
    check_may_become_dense,
    dense_shape,
    dense_weight_of,
    largest_blocks,
    make_dense_,
    make_sparse_,
)
from sparse_lightning.mlp import BlockSparseMLP, can_fuse
from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_layer_density,
    check_layer_density_matches,
    check_option,
    layer_densities,
)
from sparse_lightning.nm_pattern import check_nm
from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.criteria import seeded_generator
from sparse_lightning.policy.dead_features import DeadFeatures, find_dead_features
from sparse_lightning.policy.distributions import DISTRIBUTIONS, Distribution, Floor, Grid
from sparse_lightning.policy.freshness import looks_trained
from sparse_lightning.policy.lookup import find
from sparse_lightning.policy.updates import first_blocks
from sparse_lightning.selection import (
    SwapOptions,
    find_sparse_copies,
    select_layers,
    sparse_layers,
)
from sparse_lightning.sharding import is_sharded
from sparse_lightning.swap_report import (
    LayerReport,
    SparsityReport,
    describe_dead_features,
    describe_trained,
    measure_coverage,
)
from sparse_lightning.topology import (
    BlockTopology,
    block_grid,
    check_block_size,
    check_density,
)

INITS = ("random", "magnitude")

# Functions to call with each model in which layers have become block-sparse or dense.
layer_change_hooks: list[Callable[[nn.Module], None]] = []


def sparsify(
    model: nn.Module,
    *,
    block_size: int = 64,
    density: float = 0.25,
    nm: str | None = None,
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

    Objects keep their identity: a layer changes its class, and the Parameter of its weight becomes
    `values`, with other data. References to layers and parameters, in lists, hooks, attributes and
    optimizers, therefore stay valid. Layers that are already block-sparse do not change. Frozen
    layers stay dense, so that their outputs do not change, unless they are copies of layers that
    are trained, such as a target network's layers. A copy gets the blocks of its source layer.

    Every plain `nn.Sequential` with an activation between two swapped layers becomes a
    `BlockSparseMLP`, which computes the same with fewer passes over memory. A module of another
    class that computes down(f(up(x))) or down(f(gate(x)) * up(x)) with swapped layers becomes an
    instance of a subclass that does so, too; `densify` gives it its class back. In an
    `nn.TransformerEncoderLayer` with swapped layers, PyTorch's fused inference path is disabled,
    since it reads dense weights; `densify` enables it again.

    One warning names the layers that have too few blocks for all block rows or columns, so that
    they have dead outputs or unread inputs, and what would avoid it. Another names the layers whose
    weights look trained and of which only random blocks are kept.

    Args:
        model: model to change in place.
        block_size: 16, 32, 64 or 128.
        density: present blocks / all blocks of the swapped layers, in (0, 1].
        nm: "2:4" to keep two of each four neighbouring weights of a row within blocks, so that half
            of the weights of present blocks remain; None to keep all.
        include: patterns of layers to swap. A pattern without a dot matches the last part of a
            module's name, one with a dot the whole name; `*` and `?` are wildcards, "re:..." is a
            regular expression that must match the whole name. A layer named in full must be
            swappable; it is swapped even if it is frozen or an output layer.
        exclude: patterns of layers to leave dense, in the same syntax. Output layers are excluded
            as well: layers called head, lm_head or classifier, and layers whose role is found to be
            that of an output head. "role:first" is the first linear layer in the model's order. An
            empty list excludes nothing.
        distribution: how the layers share the budget: "uniform", "erdos_renyi", a function like
            those in `distributions`, or its dotted path. Layers that `include` and `exclude` select
            take part even if they are already block-sparse.
        layer_density: densities of individual layers, by pattern as in `include`; the other layers
            share `density`.
        init: "random" keeps random blocks, and with `nm` random weights in them, scaled by the
            share of weights ** -0.5 to preserve the variance of the output; "magnitude" keeps the
            largest, unscaled. Both keep at least one block in each block row and column if the
            density allows.
        seed: seed of the random blocks; each layer draws its own, depending on its name.
        max_density: highest density that the model will ever reach, which determines the number of
            slots of each layer; `density` if None.
        follow: copies that cannot be recognized by their weights, as `{"target": "net"}`: each
            layer in the first module gets the blocks of its counterpart in the second.

    Returns:
        The swapped layers, and the reasons why other layers stay dense.

    Raises:
        ValueError: if no layer matches, a layer named in full cannot be swapped, or an argument is
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
            "`distribution` must not need scores, which exist only in a training; got 'global'. "
            "Use another one, or let SparsityCallback or Sparsifier swap the layers."
        )
    offered = {name: shares for name, shares in DISTRIBUTIONS.items() if name != "global"}
    find("distribution", distribution, offered)
    check_option("init", init, INITS)
    own = {} if layer_density is None else layer_density
    check_layer_density(own)

    options = SwapOptions(
        block_size, include, exclude, init, seed, follow=follow or {}, nm=check_nm(nm)
    )

    def budgets(grids: Mapping[str, Grid]) -> tuple[LayerBudgets, dict[str, int]]:
        check_layer_density_matches(own, grids)
        planned = LayerBudgets(
            grids=grids,
            density_at=lambda progress, final: final,
            final=density,
            own_final=layer_densities(own, grids),
            distribution=distribution,
            floor=options.floor,
            is_monotonic=True,
        )
        n_blocks, highest = planned.at(0.0), replace(planned, final=max_density).at(0.0)
        return planned, {name: max(n_blocks[name], highest[name]) for name in grids}

    report = swap_layers(model, options, budgets)
    if report.trained and ranks.is_rank_zero():
        warnings.warn(describe_trained(report.trained), stacklevel=2)
    return report


def swap_layers(
    model: nn.Module,
    options: SwapOptions,
    budgets: Callable[[Mapping[str, Grid]], tuple[LayerBudgets, Mapping[str, int]]],
) -> SparsityReport:
    """Do the work of `sparsify` with arbitrary budgets.

    It warns about the budgets at the end of the density schedule. The report names layers that keep
    random blocks of weights that look trained; the caller warns of these once it is known that no
    checkpoint replaces the weights.

    Args:
        model: model to change in place.
        options: which layers to swap, and how they start.
        budgets: function that maps the block grid of each layer to the layers' numbers of blocks,
            of which the swap takes those at progress 0, and to their numbers of slots. The grids
            are those of all layers that the patterns select, in the model's order. They include
            layers that are already block-sparse, since topology updates share a budget among the
            same layers, but no copies, which take the blocks of their source layers.
    """
    options, block_size = options.named(model), options.block_size
    found = select_layers(model, options)
    known_copies = find_sparse_copies(model, options)
    grids: dict[str, Grid] = {}
    for name, module in model.named_modules():
        if name in found.layers:
            grids[name] = block_grid(*dense_shape(module), block_size)
        elif (
            isinstance(module, BlockSparseLinear)
            and name not in known_copies
            and options.selects(name)
        ):
            grids[name] = module.topology.grid
    n_blocks: Mapping[str, int] = {}
    capacities: Mapping[str, int] = {}
    dead: Mapping[str, DeadFeatures] = {}
    if found.layers:
        planned, capacities = budgets(grids)
        n_blocks = planned.at(0.0)
        dead = find_dead_features(planned, found.layers, block_size)
    starts = {
        name: _initial_topology(
            linear, name, grids[name], n_blocks[name], capacities[name], options
        )
        for name, linear in found.layers.items()
    }
    trained = tuple(
        name
        for name, (topology, _) in starts.items()
        if discards_training(
            dense_weight_of(found.layers[name]), topology.weight_density, options.init
        )
    )
    # Layers are described now, as that takes memory, and a swap must not fail when it is complete.
    reports = {name: LayerReport.from_layer(layer) for name, layer in sparse_layers(model)}
    for name, (topology, _) in starts.items():
        bias = found.layers[name].bias
        assert bias is None or isinstance(bias, Tensor)
        reports[name] = LayerReport.from_topology(topology, bias)
    if dead and ranks.is_rank_zero():
        warnings.warn(describe_dead_features(dead), stacklevel=3)
    # All checks have passed; from here on, the model changes.
    for name, linear in found.layers.items():
        layer = make_sparse_(linear, *starts[name], name)
        layer._lineage = found.lineages.get(name, layer._lineage)
    for name, source_name in found.follows.items():
        source = model.get_submodule(source_name)
        assert isinstance(source, BlockSparseLinear)
        _, scale = starts.get(source_name, (None, 1.0))
        copy = make_sparse_(model.get_submodule(name), source.topology, scale, name)
        copy._lineage = source._lineage
    follows = find_sparse_copies(model, options)
    swapped = dict(sparse_layers(model))
    for copy_name, source_name in follows.items():
        swapped[copy_name]._adopt_blocks_of(swapped[source_name])
    layers = {name: reports[name] for name in swapped if name not in follows}
    unfused = update_containers(model)
    return SparsityReport(
        layers, found.skipped, follows, measure_coverage(model), unfused, dead, trained
    )


def densify(model: nn.Module) -> nn.Module:
    """Turn every `BlockSparseLinear` of a model into an equal dense layer, in place.

    Objects keep their identity as in `sparsify`, except for sharded layers: a new `nn.Linear`
    replaces each of them.

    Returns:
        The model, or an equal `nn.Linear` if the model is itself a `BlockSparseLinear`.

    Raises:
        RuntimeError: if a Sparsifier that trains a layer is attached to an optimizer.
    """
    if isinstance(model, BlockSparseLinear):
        return model.to_linear()
    linears: dict[int, nn.Linear] = {}  # A layer with two names must stay one layer.
    for _, layer in sparse_layers(model):
        check_may_become_dense(layer)
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(layer, BlockSparseLinear):
            continue
        if is_sharded(layer.values):
            linear = linears.setdefault(id(layer), layer.to_linear())
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
        else:
            make_dense_(layer)
    update_containers(model)
    return model


def _initial_topology(
    linear: nn.Module, name: str, grid: Grid, n_blocks: int, capacity: int, options: SwapOptions
) -> tuple[BlockTopology, float]:
    """Return the initial blocks of a layer, and the factor by which to scale their values."""
    floor, size = options.floor.of_lines, options.block_size
    if options.init == "magnitude" and next(linear.parameters()).device.type != "meta":
        weight = dense_weight_of(linear)
        mask = largest_blocks(weight, grid, n_blocks, floor=floor)
        topology = BlockTopology.from_mask(mask, size, capacity=capacity)
        return topology.with_largest_positions(options.nm, weight), 1.0
    generator = seeded_generator(options.seed, 0, name)
    # The dtype is explicit, as a half-precision default would change the draw and cause ties.
    drawn = torch.rand(grid, generator=generator, dtype=torch.float32, device="cpu")
    mask = first_blocks(drawn, n_blocks, floor=floor)
    topology = BlockTopology.from_mask(mask, size, capacity=capacity)
    topology = topology.with_random_positions(options.nm, generator)
    return topology, topology.weight_density**-0.5


def discards_training(weight: Tensor, density: float, init: str) -> bool:
    """Return whether a layer keeps only random parts of a dense weight that looks trained.

    Args:
        weight: weight of the dense layer, `[out_features, in_features]`.
        density: share of the weights that the layer keeps at first.
        init: as in `sparsify`.
    """
    return init == "random" and density < 1 and looks_trained(weight)


@torch.no_grad()
def initialize_from_dense(
    layer: BlockSparseLinear,
    weight: Tensor,
    init: str,
    source: BlockSparseLinear | None = None,
    *,
    floor: Floor,
) -> None:
    """Initialize a swapped layer as if its dense weight had been `weight` at the swap.

    Args:
        layer: layer to initialize. It keeps its number of blocks, and random blocks stay in place.
        weight: dense weight, in the layout of the dense layer.
        init: as in `sparsify`.
        source: source layer whose blocks to use if the layer is a copy.
        floor: floor of the swap.
    """
    weight = weight.T if layer._is_transposed else weight
    if source is not None:
        layer._adopt_blocks_of(source)
    topology, scale = layer.topology, layer.weight_density**-0.5
    if init == "magnitude" and source is not None:
        scale = 1.0
    elif init == "magnitude":
        grid, n_blocks = topology.grid, topology.n_blocks
        mask = largest_blocks(weight, grid, n_blocks, floor=floor.of_lines)
        scale = 1.0
        largest = BlockTopology.from_mask(mask, topology.block_size, capacity=topology.capacity)
        largest = largest.with_largest_positions(topology.nm, weight)
        topology.assign_(largest.coords, largest.positions)
    layer.values.copy_(topology.pack(weight.to(layer.values)) * scale)


def update_containers(model: nn.Module) -> dict[str, str]:
    """Adapt containers of linear layers after some have become block-sparse or dense.

    Modules change their class or a flag in place, so that references to them stay valid.

    Returns:
        Why MLPs that are not `nn.Sequential`s do not compute as one op, by name.
    """
    unfused = {}
    for name, module in model.named_modules():
        if type(module) in (nn.Sequential, BlockSparseMLP):
            module.__class__ = BlockSparseMLP if can_fuse(module) else nn.Sequential
        elif reason := fuse_mlp_(module):
            unfused[name] = reason
        _set_fast_paths(module)
    for hook in layer_change_hooks:
        hook(model)
    return unfused


def _set_fast_paths(module: nn.Module) -> None:
    """Disable the fast paths of one of PyTorch's encoders with sparse layers; else enable them."""
    for encoder, flag in _FAST_PATH_FLAGS.items():
        if not isinstance(module, encoder):
            continue
        saved = f"_dense_{flag}"
        if not any(True for _ in sparse_layers(module)):
            if hasattr(module, saved):
                setattr(module, flag, vars(module).pop(saved))
        elif value := getattr(module, flag):
            setattr(module, flag, type(value)(0))
            setattr(module, saved, value)


# A false value disables the fused inference path of PyTorch's encoders, which reads the `weight` of
# each layer. In the first flag it stands for an unsupported activation.
_FAST_PATH_FLAGS = {
    nn.TransformerEncoderLayer: "activation_relu_or_gelu",
    nn.TransformerEncoder: "use_nested_tensor",
}
