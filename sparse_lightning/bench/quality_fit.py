"""How `bench quality` trains: by Lightning, with the real callback, and nothing printed."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from sparse_lightning.bench.quality import COLD_START, METHODS, Run, keywords
from sparse_lightning.callbacks import SparsityCallback
from sparse_lightning.policy.evolution import ModelUpdate
from sparse_lightning.sparsifier import Sparsifier


class Supervised(pl.LightningModule):
    """A network and its loss; AdamW, whose learning rate falls to zero along a cosine.

    Args:
        net: maps inputs to outputs.
        loss: of outputs and targets, to a scalar.
        lr: learning rate of the first step.
    """

    def __init__(
        self, net: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], lr: float = 1e-3
    ) -> None:
        super().__init__()
        self.net, self.loss, self.lr = net, loss, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return self.loss(self.net(inputs), targets)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


class Batches:
    """Batches cut from tensors in memory, in another random order at each pass.

    Args:
        inputs, targets: with the same first dimension.
        size: of a batch; the last one of a pass may be smaller.
        seed: of the order.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, size: int, seed: int) -> None:
        self.inputs, self.targets, self.size = inputs, targets, size
        self.generator = torch.Generator().manual_seed(seed)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(self.inputs), generator=self.generator)
        for rows in order.to(self.inputs.device).split(self.size):
            yield self.inputs[rows], self.targets[rows]


class ColdStart(SparsityCallback):
    """An ablation: a grown block's second moment starts from zero, as its first one does."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Have every update forget which blocks it has grown."""
        super().on_train_start(trainer, pl_module)
        assert self.sparsifier is not None
        self.sparsifier.register_update_hook(_forget_grown)


def _forget_grown(sparsifier: Sparsifier, update: ModelUpdate) -> None:
    for course in sparsifier._courses:
        course.pending.clear()


def fit(
    model: pl.LightningModule,
    batches: Iterable[Any],
    run: Run,
    device: torch.device,
    *,
    include: Sequence[str] = ("*",),
    **options: Any,
) -> pl.Trainer:
    """Train a model in place for the steps of a run; the model ends on the device.

    Args:
        model: dense; a sparse method makes it sparse.
        batches: an iterable that is started anew when it ends.
        run: says by which method.
        device: to train on.
        include: names of the layers to make sparse.
        options: more of them for the trainer.
    """
    on_cuda = device.type == "cuda"
    callbacks: list[pl.Callback] = []
    if run.method in METHODS:
        kind = ColdStart if run.method == COLD_START else SparsityCallback
        callbacks = [kind(include=include, **keywords(run))]
    trainer = pl.Trainer(
        max_steps=run.steps,
        max_epochs=-1,
        accelerator="gpu" if on_cuda else "cpu",
        devices=[device.index or 0] if on_cuda else 1,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(model, batches)
    model.to(device).eval()  # the trainer has put it back on the CPU
    return trainer


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the remarks of Lightning, and the callback's report, from the output."""
    loggers = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
