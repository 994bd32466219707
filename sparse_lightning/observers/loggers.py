"""`LoggerAdapter`s: how scalars, images, histograms and tables reach each kind of logger."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from sparse_lightning.config import SparsityConfig
from sparse_lightning.masks import LEGEND, mask_image
from sparse_lightning.observers.measures import LayerRow

Array = np.ndarray[Any, Any]
T = TypeVar("T")

_PREFIX = "sparsity/"
_TABLE = "sparsity/layers"
_COLUMNS = [field.name for field in dataclasses.fields(LayerRow)]
# Summaries that W&B computes over a run, for metrics where the last value is not enough.
_SUMMARIES = {
    "sparsity/density": "last,min",
    "sparsity/weight_density": "last,min",
    "sparsity/weight_churn": "max,mean",
    "sparsity/survival": "min,mean",
    "sparsity/churn": "max,mean",
    "sparsity/dead_rows": "last,max",
    "sparsity/dead_columns": "last,max",
    "sparsity/tokens_per_second": "last,mean",
    "sparsity/samples_per_second": "last,mean",
    "sparsity/mfu": "last,mean",
    "sparsity/mfu_dense": "last,mean",
}


@dataclass(frozen=True)
class LayerSnapshot:
    """The data of a layer's images and histograms at a step.

    Attributes:
        name: name of the layer.
        step: optimizer steps so far.
        mask: bool `[out_blocks, in_blocks]`, the block mask.
        before: the same before the update at this step; equal to `mask` if there was none.
        norms: fp32 `[n]`, the finite norms of the blocks that stayed.
    """

    name: str
    step: int
    mask: Array
    before: Array
    norms: Array

    @property
    def image(self) -> Array:
        """The mask in the colours of the run page, uint8 `[height, width, 3]`."""
        return mask_image(self.mask, self.before)

    @property
    def caption(self) -> str:
        """What the image shows, and what its colours mean."""
        return f"{self.name}, step {self.step}, density {self.mask.mean():.3f} ({LEGEND})"

    @property
    def occupancy(self) -> dict[str, Array]:
        """The number of blocks in each block row and each block column."""
        return {"row": self.mask.sum(1), "column": self.mask.sum(0)}


class LoggerAdapter:
    """Adapter for any kind of logger, which logs scalars only.

    Args:
        logger: the Lightning logger.
        label: position of the callback among several `SparsityCallback`s, which becomes part of the
            keys of metrics over all layers; "" if the trainer has only one.
    """

    def __init__(self, logger: Logger, label: str = "") -> None:
        self.logger = logger
        self._failed = False
        self._label = label

    def start(self) -> None:
        """Declare the metrics, where the logger supports that."""

    def log_options(self, options: Mapping[str, Any], trainer: pl.Trainer) -> None:
        """Log the options of all `SparsityCallback`s, by key, as hyperparameters."""
        self._log_hyperparams(options)

    def _log_hyperparams(self, values: Mapping[str, Any]) -> None:
        self._try(lambda: self.logger.log_hyperparams(dict(values)))

    def log_summary(self, scalars: Mapping[str, float], step: int) -> None:
        """Log the summary of a training, once, at its end."""
        self.logger.log_metrics({self._key(name): v for name, v in scalars.items()}, step=step)

    def log_update(
        self, scalars: Mapping[str, float], snapshots: Sequence[LayerSnapshot], step: int
    ) -> None:
        """Log scalars and the snapshots of layers, in one call where the logger allows it.

        A failure to log media only warns: it must not end a training.
        """
        scalars = {self._key(name): value for name, value in scalars.items()}
        media = self._try(lambda: self._media(snapshots, step)) if snapshots else None
        if media and self._try(lambda: self._log_metrics({**scalars, **media}, step)):
            return
        if scalars:
            self.logger.log_metrics(scalars, step=step)

    def log_table(self, rows: Sequence[LayerRow], step: int) -> None:
        """Log a table with one row per layer; a column that is None in all of them is left out."""
        empty = {key for key in _COLUMNS if rows and all(getattr(r, key) is None for r in rows)}
        shown = [key for key in _COLUMNS if key not in empty]
        cells = [[getattr(row, key) for key in shown] for row in rows]
        self._try(lambda: self._log_table([key.replace("_", " ") for key in shown], cells, step))

    def _key(self, name: str) -> str:
        return _labelled(name, self._label)

    def _log_metrics(self, metrics: dict[str, Any], step: int) -> bool:
        self.logger.log_metrics(metrics, step=step)
        return True

    def _media(self, snapshots: Sequence[LayerSnapshot], step: int) -> dict[str, Any]:
        """Log media, or return those to be logged in one call with the scalars."""
        return {}

    def _log_table(self, header: list[str], rows: list[list[Any]], step: int) -> None:
        pass

    def _try(self, call: Callable[[], T]) -> T | None:
        """Return the result of a call, or None if it raises; warn the first time."""
        try:
            return call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                rank_zero_warn(
                    f"{type(self.logger).__name__} could not log block masks, histograms, tables "
                    f"or options ({type(error).__name__}: {error}); training continues, and "
                    "scalars are still logged."
                )
            return None


class CsvAdapter(LoggerAdapter):
    """Adapter for the CSV logger, whose `hparams.yaml` gets the summary as well as the options.

    As metrics these would be columns with one value each, for which the logger would write its file
    anew; that fails if another training has written to the same file.
    """

    logger: CSVLogger

    def log_options(self, options: Mapping[str, Any], trainer: pl.Trainer) -> None:
        # A logger that is used again keeps its hyperparameters, also those that this fit lacks.
        self._try(self._forget_earlier_fit)
        super().log_options(options, trainer)

    def _forget_earlier_fit(self) -> None:
        kept = self.logger.experiment.hparams
        for name in [name for name in kept if name.startswith(_PREFIX)]:
            del kept[name]

    def log_summary(self, scalars: Mapping[str, float], step: int) -> None:
        self._log_hyperparams({self._key(name): value for name, value in scalars.items()})


class WandbAdapter(LoggerAdapter):
    """Adapter for W&B: media share a row with the scalars, so that one slider moves both."""

    logger: WandbLogger

    def start(self) -> None:
        self._try(self._define_summaries)

    def _define_summaries(self) -> None:
        prefix = self.logger._prefix
        prefix = f"{prefix}{self.logger.LOGGER_JOIN_CHAR}" if prefix else ""
        syncs_tensorboard = self.logger._wandb_init.get("sync_tensorboard")
        step = "global_step" if syncs_tensorboard else "trainer/global_step"
        for name, summary in _SUMMARIES.items():
            # Lightning's rule for "*" sets no step axis for metrics that have a rule of their own.
            self.logger.experiment.define_metric(
                prefix + self._key(name), step_metric=step, summary=summary
            )

    def _media(self, snapshots: Sequence[LayerSnapshot], step: int) -> dict[str, Any]:
        import wandb

        media: dict[str, Any] = {}
        for layer in snapshots:
            name = layer.name
            media[f"mask/{name}"] = wandb.Image(layer.image, caption=layer.caption)
            for side, counts in layer.occupancy.items():
                most = layer.mask.shape[1 if side == "row" else 0]
                # One bin per possible count, up to a readable number of bins.
                bins = np.histogram(counts, bins=min(most + 1, 64), range=(-0.5, most + 0.5))
                media[f"{side}_occupancy/{name}"] = wandb.Histogram(np_histogram=bins)
            if len(layer.norms):
                bins = np.histogram(layer.norms, bins=64)
                media[f"block_norms/{name}"] = wandb.Histogram(np_histogram=bins)
        return media

    def _log_table(self, header: list[str], rows: list[list[Any]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=[*header], data=rows)
        self._log_metrics({self._key(_TABLE): table}, step)


class TensorBoardAdapter(LoggerAdapter):
    """Adapter for TensorBoard, which takes each image and histogram in a separate call."""

    logger: TensorBoardLogger

    def log_options(self, options: Mapping[str, Any], trainer: pl.Trainer) -> None:
        # TensorBoard keeps the first hyperparameters of a run, so these include Lightning's.
        self._try(
            lambda: self.logger.log_hyperparams({**_lightnings_hyperparameters(trainer), **options})
        )

    def _media(self, snapshots: Sequence[LayerSnapshot], step: int) -> dict[str, Any]:
        writer = self.logger.experiment
        for layer in snapshots:
            name = layer.name
            writer.add_image(f"mask/{name}", layer.image, step, dataformats="HWC")
            writer.add_text(f"mask/{name}", layer.caption, step)  # images have no captions
            for side, counts in layer.occupancy.items():
                writer.add_histogram(f"{side}_occupancy/{name}", counts, step)
            if len(layer.norms):
                writer.add_histogram(f"block_norms/{name}", layer.norms, step)
        return {}

    def _log_table(self, header: list[str], rows: list[list[Any]], step: int) -> None:
        cells = [
            [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
            for row in rows
        ]
        lines = [header, ["---"] * len(header), *cells]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.logger.experiment.add_text(self._key(_TABLE), text, step)


def adapt_logger(logger: Logger, label: str) -> LoggerAdapter:
    """Return the adapter for a logger; `label` is as in `LoggerAdapter`."""
    if isinstance(logger, WandbLogger):
        return WandbAdapter(logger, label)
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardAdapter(logger, label)
    if isinstance(logger, CSVLogger):
        return CsvAdapter(logger, label)
    return LoggerAdapter(logger, label)


def log_options(trainer: pl.Trainer, configs: Sequence[SparsityConfig]) -> None:
    """Log the options of a trainer's `SparsityCallback`s to its loggers as hyperparameters.

    Call this before Lightning logs the hyperparameters of the module and the datamodule, which it
    does right after `on_fit_start`.

    Args:
        trainer: the trainer that fits.
        configs: configurations of the callbacks, in its order.
    """
    options = {
        _labelled(f"{_PREFIX}{name}", str(i) if len(configs) > 1 else ""): value
        for i, config in enumerate(configs, 1)
        if config.monitor is not None
        for name, value in config.options().items()
    }
    if not options or not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        adapt_logger(logger, "").log_options(options, trainer)


def _lightnings_hyperparameters(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the hyperparameters that Lightning logs: those that were saved, unless turned off."""
    if not getattr(trainer, "enable_autolog_hparams", True):  # Lightning 2.5 has no such option
        return {}
    sources = (trainer.lightning_module, getattr(trainer, "datamodule", None))
    return {
        name: value
        for source in sources
        # `save_hyperparameters(logger=False)` clears the flag.
        if source is not None and getattr(source, "_log_hyperparams", True)
        for name, value in source.hparams_initial.items()
        if name != "_class_path"  # LightningCLI's own
    }


def _labelled(name: str, label: str) -> str:
    """Return a key of a callback's options or of its metrics over all layers.

    >>> _labelled("sparsity/density", "2"), _labelled("sparsity/density", "")
    ('sparsity/2/density', 'sparsity/density')
    >>> _labelled("sparsity_density/net.0", "2")
    'sparsity_density/net.0'
    """
    metric = name.removeprefix(_PREFIX)
    return name if metric == name or not label else f"{_PREFIX}{label}/{metric}"
