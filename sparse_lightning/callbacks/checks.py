"""Checks before a fit: unsupported setups raise an error, slow layers a warning."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from sparse_lightning.callbacks.held_copies import averaging_callbacks
from sparse_lightning.config import SparsityConfig
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.names import list_reasons
from sparse_lightning.observers.measures import compute_dtype
from sparse_lightning.selection import select_layers, sparse_layers

_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")


def check_trainer(trainer: pl.Trainer, callback: Callback) -> None:
    """Raise ValueError for a strategy, precision or callback order that is not supported."""
    _check_strategy(trainer)
    _check_precision(trainer)
    _check_order(trainer, callback)


def _check_strategy(trainer: pl.Trainer) -> None:
    name = type(trainer.strategy).__name__
    tensor_parallel = getattr(trainer.strategy, "_tensor_parallel_size", 1)
    if name in _REFUSED_STRATEGIES or tensor_parallel != 1:
        refused = name if name in _REFUSED_STRATEGIES else f"{name} with tensor parallelism"
        raise ValueError(
            f"`Trainer(strategy=...)` must be one that keeps whole blocks; got {refused}. "
            "Use DDP, or ModelParallelStrategy(tensor_parallel_size=1) with fully_shard."
        )
    if not getattr(trainer.strategy, "_save_distributed_checkpoint", True):
        raise ValueError(
            "`save_distributed_checkpoint` must be True: Lightning loads a single-file checkpoint "
            "into a sharded model without the topology, so this run could not be "
            "resumed; got False. To convert a checkpoint to a single file afterwards, call "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
        )


def _check_precision(trainer: pl.Trainer) -> None:
    plugin = trainer.precision_plugin
    if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise ValueError(
            "`Trainer(plugins=...)` must leave the model's nn.Linears to SparsityCallback; got "
            f"{type(plugin).__name__}, which replaces them with its own layers. "
            "Use precision='bf16-mixed', '16-mixed' or 'bf16-true'."
        )


def _check_order(trainer: pl.Trainer, callback: Callback) -> None:
    # Averaging callbacks copy the model in their `setup`, which must come after the swap.
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, averaging_callbacks()):
            raise ValueError(
                "`callbacks` must list SparsityCallback before callbacks that average "
                f"weights; got it after {type(other).__name__}. Put it first."
            )


def check_no_shared_layers(model: nn.Module, configs: Sequence[SparsityConfig]) -> None:
    """Raise ValueError if two `SparsityCallback`s select the same layer.

    Args:
        model: the model, before any of the callbacks swaps a layer, or after an earlier fit.
        configs: the configurations of all `SparsityCallback`s of a trainer.
    """
    if len(configs) < 2:
        return
    layers = {name for name, _ in sparse_layers(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the swap repeats these warnings
        for config in configs:
            found = select_layers(model, config.swap_options)
            layers |= found.layers.keys() | found.follows.keys()
    named = [(config, config.swap_options.named(model)) for config in configs]
    for pair in itertools.combinations(named, 2):
        for name in sorted(layers):
            if all(options.selects(name) for _, options in pair):
                patterns = " and ".join(
                    f"include={list(config.include)} with exclude={list(config.exclude)}"
                    for config, _ in pair
                )
                raise ValueError(
                    "`include` and `exclude` must leave each layer to one SparsityCallback; got "
                    f"{patterns}, which both select the same one (layer '{name}'). Exclude it from "
                    "one of them."
                )


def check_launcher(trainer: pl.Trainer, model: nn.Module, config: SparsityConfig) -> None:
    """Raise ValueError if a fit runs in other processes while the model is still dense here.

    Lightning then loads the trained weights into this process's model, which has no block-sparse
    layers for them.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    found = select_layers(model, config.swap_options)
    for name in (*found.layers, *found.follows):
        start, final = config.density.initial, config.density.final
        max_density = f", max_density={final}" if final > start else ""
        raise ValueError(
            "`Trainer(strategy=...)` must not train a dense model in forked or spawned processes, "
            "since their block-sparse layers could not be loaded back into it; got "
            f"{type(trainer.strategy).__name__} and a dense layer (layer '{name}'). Call "
            f"sparsify(model, block_size={config.block_size}, density={start}{max_density}) before "
            "`fit`, with the same patterns: SparsityCallback continues with these layers. Or use "
            "strategy='ddp'."
        )


def warn_of_slow_layers(
    trainer: pl.Trainer, config: SparsityConfig, layers: Mapping[str, BlockSparseLinear]
) -> None:
    """Warn about layers that are predicted to be slower than dense ones on this GPU."""
    # Only the final density counts: the schedule is meant to pass through higher ones.
    grids = {name: layer.topology.grid for name, layer in layers.items()}
    budgets = config.budgets(grids).at(1.0)
    slow = {}
    for name, layer in layers.items():
        density = budgets[name] / (layer.topology.grid[0] * layer.topology.grid[1])
        speedup = layer.predicted_speedup(density, compute_dtype(trainer, layer))
        if speedup is not None and speedup < 1:
            slow[name] = f"{speedup:.2f} of dense at density {density:.2f}"
    if slow:
        rank_zero_warn(
            "Some layers are predicted to be slower than dense ones on this GPU at their shape and "
            f"final density: {list_reasons(slow)}. Use larger blocks or a lower density, or "
            "exclude them."
        )
