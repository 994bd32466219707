"""A figure that shows how the block masks change during training."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from torch import Tensor

from sparse_lightning import BlockSparseLinear, SparsityCallback

# States of a block relative to the previous column of the figure.
ABSENT, DROPPED, KEPT, GROWN = range(4)
COLORS = ListedColormap(["#eef1f5", "#f2cfc6", "#27496d", "#f59b23"])


class MaskPicture(Callback):
    """Record the masks of a few layers after every topology update; draw them when the fit ends.

    It must follow `SparsityCallback` in the list of callbacks to see the result of each update.

    Args:
        path: path of the PNG file.
        layers: number of layers to draw, evenly spaced through the model.
        columns: number of recorded steps to draw, evenly spaced from the first to the last.
    """

    def __init__(self, path: str, layers: int = 4, columns: int = 6) -> None:
        self.path, self.layers, self.columns = Path(path), layers, columns
        self.moments: list[tuple[int, dict[str, Tensor]]] = []  # (step, masks by layer)

    def on_train_start(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Record the initial masks."""
        self.record(trainer.global_step, model)

    def on_train_batch_end(self, trainer: L.Trainer, model: L.LightningModule, *_: object) -> None:
        """Record the masks if the topology was updated after this batch."""
        for callback in trainer.callbacks:
            update = callback.last_update if isinstance(callback, SparsityCallback) else None
            if update is not None and update.step > self.moments[-1][0]:
                self.record(update.step, model)

    def record(self, step: int, model: L.LightningModule) -> None:
        """Store a copy of the current masks."""
        sparse = {
            name: module.topology.mask.cpu()
            for name, module in model.named_modules()
            if isinstance(module, BlockSparseLinear)
        }
        self.moments.append((step, {name: sparse[name] for name in evenly(sparse, self.layers)}))

    def on_fit_end(self, trainer: L.Trainer, model: L.LightningModule) -> None:
        """Write the PNG if the model has block-sparse layers."""
        if trainer.is_global_zero and self.moments and self.moments[0][1]:
            figure = draw(evenly(self.moments, self.columns))
            self.path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(self.path, dpi=120)


def evenly(items: object, count: int) -> list:
    """Return at most `count` evenly spaced items, including the first and the last.

    >>> evenly("abcdefgh", 3)
    ['a', 'e', 'h']
    """
    items = list(items)
    positions = np.linspace(0, len(items) - 1, min(count, len(items)))
    return [items[int(position + 0.5)] for position in positions]


def draw(moments: list[tuple[int, dict[str, Tensor]]]) -> Figure:
    """Return a figure with a row for each layer and a column for each (step, masks) pair."""
    names = list(moments[0][1])
    # Tall masks are transposed, so that the rows of the figure have similar heights.
    is_tall = {name: mask.shape[0] > mask.shape[1] for name, mask in moments[0][1].items()}
    shapes = {name: sorted(mask.shape) for name, mask in moments[0][1].items()}
    width = 2.6
    heights = [width * short / long for short, long in shapes.values()]
    figure = Figure(
        figsize=(width * len(moments) + 1.4, sum(heights) + 0.35 * len(names) + 1.2),
        layout="constrained",
    )
    axes = figure.subplots(len(names), len(moments), squeeze=False, height_ratios=heights)
    for row, name in zip(axes, names, strict=True):
        before = None
        for ax, (step, masks) in zip(row, moments, strict=True):
            mask = (masks[name].T if is_tall[name] else masks[name]).numpy()
            before = mask if before is None else before
            state = np.select(
                [mask & ~before, mask, before], [GROWN, KEPT, DROPPED], default=ABSENT
            )
            ax.pcolormesh(
                state, cmap=COLORS, vmin=ABSENT, vmax=GROWN, edgecolor="white", linewidth=0.4
            )
            ax.set(aspect="equal", xticks=[], yticks=[])
            ax.invert_yaxis()
            ax.spines[:].set_visible(False)
            ax.set_title(f"step {step:,}  ·  density {mask.mean():.2f}", fontsize=9)
            before = mask
        down, right = ("in", "out") if is_tall[name] else ("out", "in")
        label = f"{name}\n\n{shapes[name][1]} {right} →\n{shapes[name][0]} {down} ↓"
        row[0].set_ylabel(label, fontsize=9, rotation=0, ha="right", va="center")
    figure.suptitle("The blocks of each weight matrix, and how they change", fontsize=13)
    figure.legend(
        handles=[
            Patch(color=COLORS(KEPT), label="kept"),
            Patch(color=COLORS(GROWN), label="grown since the previous column"),
            Patch(color=COLORS(DROPPED), label="dropped since the previous column"),
            Patch(color=COLORS(ABSENT), label="absent"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    return figure
