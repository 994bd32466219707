"""`SparsityMonitor`: shows to any logger what a topology update did."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from torch import nn

from sparse_lightning.config import MonitorOptions
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.patching import sparse_layers

if TYPE_CHECKING:
    from sparse_lightning.evolution import ModelUpdate

_SMALLEST_IMAGE = 256  # pixels of the longer side; a mask of few blocks would be a speck


class SparsityMonitor:
    """Logs each update in one call a logger: scalars always, masks and histograms now and then.

    Scalars go to every logger. W&B and TensorBoard also get, for the first `images` layers at
    every `every_n_updates`-th update, the block mask and histograms of how many blocks each
    block row and block column holds.

    Args:
        options: how often, and for how many layers.
    """

    def __init__(self, options: MonitorOptions) -> None:
        self.options = options

    def log(
        self, trainer: pl.Trainer, model: nn.Module, update: ModelUpdate, density_target: float
    ) -> None:
        """Log an update that has just been applied.

        Args:
            trainer: whose loggers are written to, on rank 0.
            model: holds the layers that `update` names.
            update: what was done.
            density_target: the scheduled density of all updated layers together.
        """
        if not trainer.is_global_zero or not trainer.loggers:
            return
        scalars = update_scalars(model, update)
        scalars["sparsity/density_target"] = density_target
        layers: dict[str, BlockSparseLinear] = {}
        if (update.number - 1) % self.options.every_n_updates == 0:
            named = [(n, layer) for n, layer in sparse_layers(model) if n in update.layers]
            layers = dict(named[: self.options.images])
        for logger in trainer.loggers:
            self._log_to(logger, scalars, layers, update.step)

    @staticmethod
    def _log_to(
        logger: Logger,
        scalars: dict[str, float],
        layers: dict[str, BlockSparseLinear],
        step: int,
    ) -> None:
        media: dict[str, Any] = {}
        for name, layer in layers.items():
            if isinstance(logger, WandbLogger):
                media.update(_wandb_media(name, layer, step))
            elif isinstance(logger, TensorBoardLogger):
                _tensorboard_media(logger, name, layer, step)
        logger.log_metrics({**scalars, **media}, step=step)


def update_scalars(model: nn.Module, update: ModelUpdate) -> dict[str, float]:
    """Return the numbers that describe an update and the model after it.

    Densities are shares of blocks; `parameters` counts present weights of the whole model;
    `flops_per_token` is relative to the same model with all its linear layers dense.
    """
    layers = {name: layer for name, layer in sparse_layers(model) if name in update.layers}
    changes = update.layers.values()
    n_before = sum(change.n_before for change in changes)
    n_dropped = sum(len(change.dropped) for change in changes)
    present = sum(layer.topology.n_blocks for layer in layers.values())
    blocks = sum(layer.topology.grid[0] * layer.topology.grid[1] for layer in layers.values())
    scalars = {
        "sparsity/density": present / max(1, blocks),
        "sparsity/blocks_dropped": float(n_dropped),
        "sparsity/blocks_grown": float(sum(len(change.grown) for change in changes)),
        "sparsity/survival": 1 - n_dropped / max(1, n_before),
        "sparsity/parameters": float(count_parameters(model)),
        "sparsity/flops_per_token": relative_flops(model),
    }
    for name, layer in layers.items():
        scalars[f"sparsity_density/{name}"] = layer.density
        scalars[f"sparsity_survival/{name}"] = update.layers[name].survival
    return scalars


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model, without those of empty slots."""
    total = sum(parameter.numel() for parameter in model.parameters())
    for _, layer in sparse_layers(model):
        empty = layer.topology.capacity - layer.topology.n_blocks
        total -= empty * layer.block_size**2
    return total


def relative_flops(model: nn.Module) -> float:
    """Return the FLOPs a token of a model's linear layers, relative to all of them dense."""
    done = dense = 0
    for module in model.modules():
        if isinstance(module, BlockSparseLinear):
            done += module.topology.n_blocks * module.block_size**2
            dense += module.in_features * module.out_features
        elif isinstance(module, nn.Linear):
            done += module.in_features * module.out_features
            dense += module.in_features * module.out_features
    return done / max(1, dense)


def mask_image(layer: BlockSparseLinear) -> np.ndarray[Any, Any]:
    """Return the block mask as a uint8 grey image, white where a block is present."""
    mask = layer.topology.mask.cpu().numpy()
    scale = max(1, _SMALLEST_IMAGE // max(mask.shape))
    return np.kron(mask, np.ones((scale, scale))).astype(np.uint8) * 255


def _occupancy(layer: BlockSparseLinear) -> dict[str, np.ndarray[Any, Any]]:
    mask = layer.topology.mask.cpu().numpy()
    return {"row": mask.sum(1), "column": mask.sum(0)}


def _wandb_media(name: str, layer: BlockSparseLinear, step: int) -> dict[str, Any]:
    import wandb

    caption = f"{name}, step {step}, density {layer.density:.3f}"
    media: dict[str, Any] = {f"mask/{name}": wandb.Image(mask_image(layer), caption=caption)}
    for (side, counts), most in zip(
        _occupancy(layer).items(), reversed(layer.topology.grid), strict=True
    ):
        # One bin for each possible count, as long as they can be told apart.
        histogram = np.histogram(counts, bins=min(most + 1, 64), range=(-0.5, most + 0.5))
        media[f"{side}_occupancy/{name}"] = wandb.Histogram(np_histogram=histogram)
    return media


def _tensorboard_media(
    logger: TensorBoardLogger, name: str, layer: BlockSparseLinear, step: int
) -> None:
    writer = logger.experiment
    writer.add_image(f"mask/{name}", mask_image(layer), step, dataformats="HW")
    for side, counts in _occupancy(layer).items():
        writer.add_histogram(f"{side}_occupancy/{name}", counts, step)
