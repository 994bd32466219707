"""How many steps the optimizers take: computed when a training starts, forecast while it runs."""

from __future__ import annotations

import math
from fractions import Fraction

import lightning.pytorch as pl
from lightning.pytorch.callbacks import GradientAccumulationScheduler, StochasticWeightAveraging
from torch.optim import Optimizer


def is_new(trainer: pl.Trainer) -> bool:
    """Return whether a fit starts from the beginning, instead of from a checkpoint."""
    return trainer.fit_loop.epoch_loop.total_batch_idx < 0


def skips_backward(trainer: pl.Trainer) -> bool:
    """Return whether this is the epoch that SWA adds for batch norm, which has no gradients."""
    return trainer.fit_loop._skip_backward


def count_total_steps(trainer: pl.Trainer, steps: int) -> int | None:
    """Return the steps that each optimizer will have taken at the end; None if unknown.

    Under manual optimization, each optimizer is assumed to step once in every batch.

    Args:
        trainer: the trainer, about to train.
        steps: steps counted so far; nonzero if the fit is resumed, or not the model's first.
    """
    by_batches = _count_by_batches(trainer)
    by_steps = None
    if trainer.max_steps >= 0:
        manual = not trainer.lightning_module.automatic_optimization
        # Lightning limits the sum of the steps of all optimizers.
        by_steps = -(-trainer.max_steps // max(1, len(trainer.optimizers) if manual else 1))
    limits = [limit for limit in (by_batches, by_steps) if limit is not None]
    return max(1, min(limits)) + _count_earlier_fits(trainer, steps) if limits else None


def _count_earlier_fits(trainer: pl.Trainer, steps: int) -> int:
    """Return the steps taken in earlier fits, which Lightning does not count."""
    if is_new(trainer):
        return steps
    # Under manual optimization Lightning may count no steps.
    automatic = trainer.lightning_module.automatic_optimization
    return max(0, steps - trainer.global_step) if automatic else 0


def _count_by_batches(trainer: pl.Trainer) -> int | None:
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or math.isinf(batches):
        return None
    if _has_batch_norm_epoch(trainer):
        epochs -= 1
    schedulers = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler)
    ]
    steps = 0
    for epoch in range(epochs):
        batches_per_step = trainer.accumulate_grad_batches
        for scheduler in schedulers:
            batches_per_step = scheduler.get_accumulate_grad_batches(epoch)
        steps += math.ceil(batches / batches_per_step)
    return steps


def _has_batch_norm_epoch(trainer: pl.Trainer) -> bool:
    """Return whether SWA has added a last epoch that only updates batch norm statistics."""
    return any(
        isinstance(callback, StochasticWeightAveraging)
        and callback.pl_module_contains_batch_norm(trainer.lightning_module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


class TotalStepsForecast:
    """Forecasts, while a training runs, the steps that an optimizer will have taken at its end.

    Lightning also counts steps that a GradScaler skips, so fewer are taken than computed. Under
    manual optimization, each optimizer is assumed to keep its pace since the batch of its first
    step.

    Args:
        trainer: the trainer, at the start of a fit that is new or resumed.
        total: the result of `count_total_steps`.
        steps: steps counted so far.
        first: for each optimizer, by its index in the trainer's list: its step count, the trainer's
            step and the trainer's batch right before its first step. The forecast fills it in; it
            must be saved with checkpoints.
    """

    def __init__(
        self, trainer: pl.Trainer, total: int, steps: int, first: dict[int, list[int]]
    ) -> None:
        self.trainer, self.total, self.first = trainer, total, first
        self.automatic = trainer.lightning_module.automatic_optimization
        self.before = _count_earlier_fits(trainer, steps)
        # Like `first`, but right before each optimizer's first step in its latest batch.
        self._latest: dict[int, list[int]] = {}

    def __call__(self, optimizer: Optimizer, steps: int) -> int:
        """Return the forecast for an optimizer that has just taken its `steps`-th step."""
        trainer = self.trainer
        if self.automatic:
            skipped = self.before + trainer.global_step + 1 - steps
            return max(steps, self.total - max(0, skipped))
        index = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        current = [steps - 1, trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx]
        first, latest = self.first.setdefault(index, current), self._latest.get(index, [0, 0, -1])
        if latest[2] != current[2]:
            latest = self._latest[index] = current
        progress, progress_at_first = self._progress(*latest[1:]), self._progress(*first[1:])
        if progress is None or progress_at_first is None:
            return self.total
        # In the optimizer's first batch the pace is unknown: assume one step per batch.
        pace = Fraction(self.total - self.before)
        if progress > progress_at_first:
            pace = (latest[0] - first[0]) / (progress - progress_at_first)
        return max(steps, latest[0] + math.ceil(pace * (1 - progress)))

    def _progress(self, step: int, batch: int) -> Fraction | None:
        """Return the share of the training that is over before a step in a batch; None if unknown.

        The share is exact, since a rounding error of one step would shift the schedule.
        """
        trainer = self.trainer
        shares = []
        if trainer.max_steps > 0:
            shares.append(Fraction(step, trainer.max_steps))
        epochs, batches = trainer.max_epochs, trainer.num_training_batches
        if epochs is not None and epochs > 0 and not math.isinf(batches):
            shares.append(Fraction(batch, int(epochs * batches)))
        return min(Fraction(1), max(shares)) if shares else None


def forecast_total_steps(
    trainer: pl.Trainer, total: int | None, steps: int, first: dict[int, list[int]]
) -> TotalStepsForecast | None:
    """Return a `TotalStepsForecast`, or None if `total` is exact or unknown.

    `total` is exact under automatic optimization without a GradScaler: then Lightning counts
    exactly the steps that the optimizer takes.
    """
    manual = not trainer.lightning_module.automatic_optimization
    has_scaler = getattr(trainer.precision_plugin, "scaler", None) is not None
    if total is None or not (manual or has_scaler):
        return None
    return TotalStepsForecast(trainer, total, steps, first)
