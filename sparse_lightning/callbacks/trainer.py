"""What `SparsityCallback` asks of Lightning's trainer, its strategies and other callbacks."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import (
    Callback,
    GradientAccumulationScheduler,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from sparse_lightning.config import SparsityConfig
from sparse_lightning.linear import BlockSparseLinear

_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")

# Before a fit: what cannot work is refused.


def check_trainer(trainer: pl.Trainer, callback: Callback) -> None:
    """Raise ValueError for a strategy, a precision or an order of callbacks that cannot work."""
    _check_strategy(trainer)
    _check_precision(trainer)
    _check_order(trainer, callback)


def _check_strategy(trainer: pl.Trainer) -> None:
    name = type(trainer.strategy).__name__
    tensor_parallel = getattr(trainer.strategy, "_tensor_parallel_size", 1)
    if name in _REFUSED_STRATEGIES or tensor_parallel != 1:
        what = name if name in _REFUSED_STRATEGIES else f"{name} with tensor parallelism"
        raise ValueError(
            f"`Trainer(strategy=...)` must be one that keeps whole blocks; got {what}. "
            "Use DDP, or ModelParallelStrategy(tensor_parallel_size=1) with fully_shard."
        )
    if not getattr(trainer.strategy, "_save_distributed_checkpoint", True):
        raise ValueError(
            "`save_distributed_checkpoint` must be True: Lightning loads a checkpoint of one "
            "file into a sharded model without the topology, so this run could not be "
            "resumed; got False. To have one file afterwards, call "
            "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
        )


def _check_precision(trainer: pl.Trainer) -> None:
    plugin = trainer.precision_plugin
    if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
        raise ValueError(
            "`Trainer(plugins=...)` must leave the model's nn.Linears to SparsityCallback; got "
            f"{type(plugin).__name__}, which puts its own layers in their place. "
            "Use precision='bf16-mixed', '16-mixed' or 'bf16-true'."
        )


def _check_order(trainer: pl.Trainer, callback: Callback) -> None:
    # Averaging callbacks copy the model in their own setup, so they must find it swapped.
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for other in callbacks[: callbacks.index(callback)]:
        if isinstance(other, averaging_callbacks()):
            raise ValueError(
                "`callbacks` must list SparsityCallback before callbacks that average "
                f"weights; got it after {type(other).__name__}. Put it first."
            )


def after_configure_model(model: pl.LightningModule, call: Callable[[], None]) -> None:
    """Have something called right after `configure_model`, until `leave_configure_model`."""
    original = model.configure_model

    @functools.wraps(original)
    def wrapped() -> None:
        original()
        call()

    # As an instance attribute it hides the method.
    model.configure_model = wrapped  # type: ignore[method-assign]


def leave_configure_model(model: pl.LightningModule) -> None:
    """Undo `after_configure_model`."""
    vars(model).pop("configure_model", None)


# Averages.


def averaging_callbacks() -> tuple[type[Callback], ...]:
    """Return the classes of callbacks that copy the model; Lightning 2.5 lacks one of them."""
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:
        return (StochasticWeightAveraging,)
    return (StochasticWeightAveraging, WeightAveraging)


def averaged_copies(trainer: pl.Trainer, name: str) -> Iterator[BlockSparseLinear]:
    """Yield the copies of a layer in models that other callbacks hold, such as averages."""
    model = trainer.lightning_module
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for held in vars(callback).values():
            if not isinstance(held, nn.Module) or held is model:
                continue
            inner = held.module if isinstance(held, torch.optim.swa_utils.AveragedModel) else held
            try:
                copy = inner.get_submodule(name)
            except AttributeError:
                continue
            if isinstance(copy, BlockSparseLinear):
                yield copy


# The length of a training.


def planned_steps(trainer: pl.Trainer, steps: int) -> int | None:
    """Return how many steps each optimizer will have taken at the end; None if nobody knows.

    Where a training steps its optimizers itself, that is as if each did so in every batch.

    Args:
        trainer: that is about to train.
        steps: that counted before: some, if it is resumed, or fits a model another time.
    """
    by_batches = _planned_by_batches(trainer)
    by_steps = None
    if trainer.max_steps >= 0:
        manual = not trainer.lightning_module.automatic_optimization
        # Lightning's limit is on the steps of all of them together.
        by_steps = -(-trainer.max_steps // max(1, len(trainer.optimizers) if manual else 1))
    known = [steps for steps in (by_batches, by_steps) if steps is not None]
    return max(1, min(known)) + _of_earlier_fits(trainer, steps) if known else None


def is_new(trainer: pl.Trainer) -> bool:
    """Whether nothing of a fit is over: it is not resumed."""
    return trainer.fit_loop.epoch_loop.total_batch_idx < 0


def _of_earlier_fits(trainer: pl.Trainer, steps: int) -> int:
    """Return how many steps were taken in earlier fits, which Lightning does not count."""
    if is_new(trainer):
        return steps
    # It may count none where a training steps its optimizers itself.
    automatic = trainer.lightning_module.automatic_optimization
    return max(0, steps - trainer.global_step) if automatic else 0


def _planned_by_batches(trainer: pl.Trainer) -> int | None:
    epochs, batches = trainer.max_epochs, trainer.num_training_batches
    if epochs is None or epochs < 0 or math.isinf(batches):
        return None
    if _has_batch_norm_epoch(trainer):
        epochs -= 1
    schedules = [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        if isinstance(callback, GradientAccumulationScheduler)
    ]
    steps = 0
    for epoch in range(epochs):
        at_once = trainer.accumulate_grad_batches
        for schedule in schedules:
            at_once = schedule.get_accumulate_grad_batches(epoch)
        steps += math.ceil(batches / at_once)
    return steps


def _has_batch_norm_epoch(trainer: pl.Trainer) -> bool:
    """Whether SWA has put an epoch at the end, to see the statistics of its average."""
    return any(
        isinstance(callback, StochasticWeightAveraging)
        and callback.pl_module_contains_batch_norm(trainer.lightning_module)
        for callback in trainer.callbacks  # type: ignore[attr-defined]
    )


def skips_backward(trainer: pl.Trainer) -> bool:
    """Whether it is that epoch: what steps in it has no gradients of its own."""
    return trainer.fit_loop._skip_backward


class StepsToCome:
    """Says while a training runs how many steps an optimizer will have taken at its end.

    Lightning counts a step that a GradScaler skips, which is lost of what was planned. Where a
    training steps its optimizers itself, each is taken to go on at the pace that it has had since
    the batch of its first step.

    Args:
        trainer: that runs it, from its beginning or from a checkpoint.
        total: what is planned, by `planned_steps`.
        steps: that counted before.
        first: of each optimizer, by its place in the trainer's list, its count and the trainer's
            step and batch right before its first step. It is filled in, and to be saved.
    """

    def __init__(
        self, trainer: pl.Trainer, total: int, steps: int, first: dict[int, list[int]]
    ) -> None:
        self.trainer, self.total, self.first = trainer, total, first
        self.automatic = trainer.lightning_module.automatic_optimization
        self.before = _of_earlier_fits(trainer, steps)
        # The same, right before the first step of each optimizer in its latest batch.
        self._latest: dict[int, list[int]] = {}

    def __call__(self, optimizer: Optimizer, steps: int) -> int:
        """Return the number for an optimizer that has just taken its `steps`-th step."""
        trainer = self.trainer
        if self.automatic:
            lost = self.before + trainer.global_step + 1 - steps
            return max(steps, self.total - max(0, lost))
        place = next(i for i, other in enumerate(trainer.optimizers) if other is optimizer)
        now = [steps - 1, trainer.global_step, trainer.fit_loop.epoch_loop.total_batch_idx]
        first, latest = self.first.setdefault(place, now), self._latest.get(place, [0, 0, -1])
        if latest[2] != now[2]:
            latest = self._latest[place] = now
        over, over_at_first = self._share(*latest[1:]), self._share(*first[1:])
        if over is None or over_at_first is None:
            return self.total
        # In its first batch nobody knows its pace: one step in every batch to come, then.
        pace = Fraction(self.total - self.before)
        if over > over_at_first:
            pace = (latest[0] - first[0]) / (over - over_at_first)
        return max(steps, latest[0] + math.ceil(pace * (1 - over)))

    def _share(self, step: int, batch: int) -> Fraction | None:
        """Return the share of the training that is over before a step in a batch.

        Exactly, as a number that is one off now and then would move the schedule.
        """
        trainer = self.trainer
        shares = []
        if trainer.max_steps > 0:
            shares.append(Fraction(step, trainer.max_steps))
        epochs, batches = trainer.max_epochs, trainer.num_training_batches
        if epochs is not None and epochs > 0 and not math.isinf(batches):
            shares.append(Fraction(batch, int(epochs * batches)))
        return min(Fraction(1), max(shares)) if shares else None


# What the trainer knows of the model.


def compute_dtype(trainer: pl.Trainer, layer: BlockSparseLinear) -> torch.dtype:
    """Return the dtype that a layer computes in."""
    mixed = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
    return mixed.get(str(trainer.precision), layer.values.dtype)


def warn_of_slow_layers(
    trainer: pl.Trainer, config: SparsityConfig, layers: Mapping[str, BlockSparseLinear]
) -> None:
    """Name the layers that are predicted to be slower than dense ones on this GPU."""
    # Where the schedule ends: before that, more blocks are present on purpose.
    budgets = config.budgets_at(1.0, {name: layer.topology.grid for name, layer in layers.items()})
    slow = []
    for name, layer in layers.items():
        density = budgets[name] / (layer.topology.grid[0] * layer.topology.grid[1])
        speedup = layer.predicted_speedup(density, compute_dtype(trainer, layer))
        if speedup is not None and speedup < 1:
            slow.append(f"{name} ({speedup:.2f} of dense at density {density:.2f})")
    if slow:
        rank_zero_warn(
            "Some layers are predicted to be slower than dense ones, on this GPU, at their "
            f"shape and final density: {', '.join(slow)}. Take larger blocks, a lower density, "
            "or exclude them."
        )


def services(
    trainer: pl.Trainer, total: int | None, steps: int, first: dict[int, list[int]]
) -> dict[str, Any]:
    """Return what `Sparsifier.attach` gets from Lightning.

    Args:
        trainer: that is about to train.
        total: steps that are planned; None if nobody knows.
        steps: that counted before.
        first: as `StepsToCome` takes it.
    """
    strategy = trainer.strategy
    manual = not trainer.lightning_module.automatic_optimization
    # Otherwise every step is seen at the optimizer, also one that does not count.
    unseen = manual or getattr(trainer.precision_plugin, "scaler", None) is not None
    planned = StepsToCome(trainer, total, steps, first) if unseen and total is not None else None
    return {
        "rewrap": functools.partial(_rewrap, strategy)
        if isinstance(strategy, DDPStrategy)
        else None,
        "copies": functools.partial(averaged_copies, trainer),
        "planned": planned,
        # Lightning keeps the wrapper of a module that was compiled as a whole apart from it.
        "shrink": not isinstance(strategy.model, torch._dynamo.OptimizedModule),
    }


def _rewrap(strategy: DDPStrategy) -> None:
    """Build DDP's buckets anew, for parameters of other shapes."""
    # The old wrapper must be gone before there is a new one, or both would reduce every gradient.
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
