"""How each logger is told: scalars, images, histograms and tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from lightning.pytorch.loggers import Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_warn

from sparse_lightning.masks import mask_image
from sparse_lightning.observers.measures import LayerRow

Array = np.ndarray[Any, Any]
T = TypeVar("T")

_TABLE = "sparsity/layers"
_COLUMNS = {field.name: field.name.replace("_", " ") for field in dataclasses.fields(LayerRow)}
# What W&B keeps of a run, where that is not the last value.
_SUMMARIES = {
    "sparsity/density": "last,min",
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
class Picture:
    """What is shown of a layer at an update.

    Attributes:
        name: of the layer.
        caption: of the image.
        mask: bool `[out_blocks, in_blocks]`.
        norms: fp32 `[n]`, finite, the norms of the blocks that stayed.
    """

    name: str
    caption: str
    mask: Array
    norms: Array

    @property
    def occupancy(self) -> dict[str, Array]:
        """How many blocks each row and each column holds."""
        return {"row": self.mask.sum(1), "column": self.mask.sum(0)}


class Dialect:
    """Tells any logger scalars, and nothing else.

    Args:
        logger: of Lightning's.
        label: of the callback that tells, which stands in the keys of what is of all layers, where
            a trainer has several; "" where there is one.
    """

    def __init__(self, logger: Logger, label: str = "") -> None:
        self.logger = logger
        self._failed = False
        self._label = label

    def start(self) -> None:
        """Say what is to come."""

    def log(self, scalars: Mapping[str, float], pictures: Sequence[Picture], step: int) -> None:
        """Log an update, in one call where the logger allows it.

        What goes wrong with anything but scalars is a warning: a picture is not worth a training.
        """
        scalars = {self._key(name): value for name, value in scalars.items()}
        media = self._try(lambda: self._media(pictures, step)) if pictures else None
        if media and self._try(lambda: self._send({**scalars, **media}, step)):
            return
        self.logger.log_metrics(scalars, step=step)

    def table(self, rows: Sequence[LayerRow], step: int) -> None:
        """Log what became of each layer."""
        self._try(lambda: self._table([dataclasses.astuple(row) for row in rows], step))

    def _key(self, name: str) -> str:
        of_all = name.removeprefix("sparsity/")
        return name if of_all == name or not self._label else f"sparsity/{self._label}/{of_all}"

    def _send(self, metrics: dict[str, Any], step: int) -> bool:
        self.logger.log_metrics(metrics, step=step)
        return True

    def _media(self, pictures: Sequence[Picture], step: int) -> dict[str, Any]:
        """Log media, or return what shall go with the scalars."""
        return {}

    def _table(self, rows: Sequence[tuple[Any, ...]], step: int) -> None:
        pass

    def _try(self, call: Callable[[], T]) -> T | None:
        try:
            return call()
        except Exception as error:
            if not self._failed:
                self._failed = True
                rank_zero_warn(
                    f"{type(self.logger).__name__} could not log block masks, histograms or tables "
                    f"({type(error).__name__}: {error}); training goes on, and numbers are logged."
                )
            return None


class WandbDialect(Dialect):
    """Tells W&B: media share a row with the scalars, so one slider of steps moves all."""

    logger: WandbLogger

    def start(self) -> None:
        self._try(self._define_summaries)

    def _define_summaries(self) -> None:
        prefix = self.logger._prefix
        prefix = f"{prefix}{self.logger.LOGGER_JOIN_CHAR}" if prefix else ""
        by_tensorboard = self.logger._wandb_init.get("sync_tensorboard")
        step = "global_step" if by_tensorboard else "trainer/global_step"
        for name, summary in _SUMMARIES.items():
            # A metric of its own rule is no longer among those that Lightning gives an axis.
            self.logger.experiment.define_metric(
                prefix + self._key(name), step_metric=step, summary=summary
            )

    def _media(self, pictures: Sequence[Picture], step: int) -> dict[str, Any]:
        import wandb

        media: dict[str, Any] = {}
        for shown in pictures:
            name = shown.name
            media[f"mask/{name}"] = wandb.Image(mask_image(shown.mask), caption=shown.caption)
            for side, counts in shown.occupancy.items():
                most = shown.mask.shape[1 if side == "row" else 0]
                # One bin for each possible count, as long as they can be told apart.
                bins = np.histogram(counts, bins=min(most + 1, 64), range=(-0.5, most + 0.5))
                media[f"{side}_occupancy/{name}"] = wandb.Histogram(np_histogram=bins)
            if len(shown.norms):
                bins = np.histogram(shown.norms, bins=64)
                media[f"block_norms/{name}"] = wandb.Histogram(np_histogram=bins)
        return media

    def _table(self, rows: Sequence[tuple[Any, ...]], step: int) -> None:
        import wandb

        table = wandb.Table(columns=list(_COLUMNS.values()), data=[list(row) for row in rows])
        self._send({self._key(_TABLE): table}, step)


class TensorBoardDialect(Dialect):
    """Tells TensorBoard, whose media have calls of their own."""

    logger: TensorBoardLogger

    def _media(self, pictures: Sequence[Picture], step: int) -> dict[str, Any]:
        writer = self.logger.experiment
        for shown in pictures:
            name, image = shown.name, mask_image(shown.mask)
            writer.add_image(f"mask/{name}", image, step, dataformats="HW")
            for side, counts in shown.occupancy.items():
                writer.add_histogram(f"{side}_occupancy/{name}", counts, step)
            if len(shown.norms):
                writer.add_histogram(f"block_norms/{name}", shown.norms, step)
        return {}

    def _table(self, rows: Sequence[tuple[Any, ...]], step: int) -> None:
        cells = [
            [f"{cell:.3f}" if isinstance(cell, float) else str(cell) for cell in row]
            for row in rows
        ]
        lines = [list(_COLUMNS.values()), ["---"] * len(_COLUMNS), *cells]
        text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        self.logger.experiment.add_text(self._key(_TABLE), text, step)


def dialect_of(logger: Logger, label: str) -> Dialect:
    """Return how a logger is told, by the callback of a label."""
    if isinstance(logger, WandbLogger):
        return WandbDialect(logger, label)
    if isinstance(logger, TensorBoardLogger):
        return TensorBoardDialect(logger, label)
    return Dialect(logger, label)
