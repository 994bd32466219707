"""What `SparsityCallback` asks of Lightning's trainer, its strategies and other callbacks."""

from __future__ import annotations

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from lightning.pytorch.strategies.launchers.multiprocessing import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn
from torch.optim import Optimizer

from sparse_lightning.config import SparsityConfig
from sparse_lightning.copies import original_of
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.loading import load_sparse
from sparse_lightning.names import is_chosen
from sparse_lightning.observers.measures import compute_dtype
from sparse_lightning.selection import select_layers, sparse_layers

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


def check_apart(model: nn.Module, configs: Sequence[SparsityConfig]) -> None:
    """Raise ValueError for a layer that the configurations of two callbacks choose.

    Args:
        model: before any of them swaps a layer, or as an earlier fit has left it.
        configs: of all `SparsityCallback`s of a trainer.
    """
    if len(configs) < 2:
        return
    layers = {name for name, _ in sparse_layers(model)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the swap says the same
        for config in configs:
            found = select_layers(
                model, config.block_size, config.include, config.exclude, config.follow
            )
            layers |= found.layers.keys() | found.follows.keys()
    for one, other in itertools.combinations(configs, 2):
        for name in sorted(layers):
            if all(is_chosen(name, each.include, each.exclude) for each in (one, other)):
                patterns = " and ".join(
                    f"include={list(each.include)} with exclude={list(each.exclude)}"
                    for each in (one, other)
                )
                raise ValueError(
                    "`include` and `exclude` must leave each layer to one SparsityCallback; got "
                    f"{patterns}, which both choose one (layer '{name}'). Exclude it from one of "
                    "them."
                )


def check_launcher(trainer: pl.Trainer, model: nn.Module, config: SparsityConfig) -> None:
    """Raise ValueError if a fit in other processes could not give its layers back to this one.

    Lightning loads the weights that they have trained into the model as it was before.
    """
    if not isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        return
    found = select_layers(model, config.block_size, config.include, config.exclude, config.follow)
    for name in (*found.layers, *found.follows):
        start, final = config.density.initial, config.density.final
        most = f", max_density={final}" if final > start else ""
        raise ValueError(
            "`Trainer(strategy=...)` must not train in processes that a script or a notebook forks "
            "or spawns while the model is dense, since their block-sparse layers could not be "
            f"loaded back into it; got one that does, and a dense layer (layer '{name}'). Call "
            f"sparsify(model, block_size={config.block_size}, density={start}{most}) before `fit`, "
            "with the same patterns: SparsityCallback goes on with these layers. Or use "
            "strategy='ddp'."
        )


# Lightning calls them in this order, before it trains.
_BUILDING = ("setup", "configure_model")
# Which a model may have as instance attributes, from the callback's `setup` to the fit's start.
_FOLLOWED = (*_BUILDING, "on_load_checkpoint")


def once_built(model: pl.LightningModule, call: Callable[[], None]) -> None:
    """Call something as soon as a model has all its layers, and weights that it loads itself.

    That is after its `configure_model`, if it has one, or its `setup`, or at once.
    """
    hooks = [hook for hook in _BUILDING if is_overridden(hook, model)]
    if not hooks:
        call()
    for hook in hooks:
        # As an instance attribute it hides the method, until `leave_hooks`.
        setattr(model, hook, _followed(model, hook, call if hook == hooks[-1] else None))


def _followed(
    model: pl.LightningModule, hook: str, call: Callable[[], None] | None
) -> Callable[..., None]:
    """Return a method of a model that is followed by a call of something else."""
    original = getattr(model, hook)

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        # The model may copy itself meanwhile, and the copy is to have its own methods. They are put
        # back since averaging callbacks may call `configure_model` once more.
        held = {name: vars(model).pop(name) for name in _FOLLOWED if name in vars(model)}
        try:
            original(*args, **kwargs)
        finally:
            vars(model).update(held)
        if call is not None:
            call()

    return wrapped


def before_loading(model: pl.LightningModule, call: Callable[[Mapping[str, Any]], None]) -> None:
    """Call something with a checkpoint before Lightning loads the model's weights from it."""
    original = model.on_load_checkpoint

    @functools.wraps(original)
    def wrapped(checkpoint: dict[str, Any]) -> None:
        call(checkpoint)
        original(checkpoint)

    vars(model)["on_load_checkpoint"] = wrapped


def leave_hooks(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    """Undo both, in copies of the model too that other callbacks have made by now."""
    for each in (model, *_copied_models(trainer)):
        for hook in _FOLLOWED:
            vars(each).pop(hook, None)


# Averages.


def averaging_callbacks() -> tuple[type[Callback], ...]:
    """Return the classes of callbacks that copy the model; Lightning 2.5 lacks one of them."""
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:
        return (StochasticWeightAveraging,)
    return (StochasticWeightAveraging, WeightAveraging)


def _copied_models(trainer: pl.Trainer) -> Iterator[nn.Module]:
    """Yield the copies of the model, or of parts, that other callbacks hold, such as averages."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for held in vars(callback).values():
            several = list(held.values()) if isinstance(held, dict) else held
            for each in several if isinstance(several, list | tuple) else [held]:
                if isinstance(each, torch.optim.swa_utils.AveragedModel):
                    yield each.module
                elif isinstance(each, nn.Module) and each is not trainer.lightning_module:
                    yield each


class HeldCopies:
    """Finds the copies of a layer in models that other callbacks of a trainer hold."""

    def __init__(self, trainer: pl.Trainer) -> None:
        self.trainer = trainer
        # By name, as of the step in which they were looked for: an update asks for every layer.
        self._found: dict[str, list[BlockSparseLinear]] = {}
        self._step = -1

    def __call__(self, name: str) -> list[BlockSparseLinear]:
        """Return the copies of the layer of a name."""
        if self._step != self.trainer.global_step:
            self._step = self.trainer.global_step
            self._found = self._look()
        return self._found.get(name, [])

    def _look(self) -> dict[str, list[BlockSparseLinear]]:
        model = self.trainer.lightning_module
        held = list(_copied_models(self.trainer))
        # Equal layers, as clones in an encoder, are told by their names; those that train come
        # first, since the others may be copies themselves.
        equal: dict[tuple[str, bool], list[str]] = {}
        for name, layer in sparse_layers(model) if held else ():
            equal.setdefault((layer.lineage, layer.values.requires_grad), []).append(name)
        found: dict[str, list[BlockSparseLinear]] = {}
        for each in held:
            for name, copy in sparse_layers(each):
                mates = [equal.get((copy.lineage, trains), []) for trains in (True, False)]
                original = original_of(name, mates[0]) or original_of(name, mates[1])
                if type(each) is type(model):
                    original = name
                if original is not None:
                    found.setdefault(original, []).append(copy)
        return found


def swap_in_copies(trainer: pl.Trainer) -> None:
    """Give copies that were made before the swap what the model begins with.

    Averaging callbacks copy the model in their `setup`, and so before it if it has one of its own.
    """
    model = trainer.lightning_module
    layers = dict(sparse_layers(model))
    for copy in _copied_models(trainer):
        if type(copy) is type(model) and dict(sparse_layers(copy)).keys() != layers.keys():
            load_sparse(copy, model.state_dict())


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
        "copies": HeldCopies(trainer),
        "planned": planned,
        # Lightning keeps the wrapper of a module that was compiled as a whole apart from it.
        "shrink": not isinstance(strategy.model, torch._dynamo.OptimizedModule),
    }


def _rewrap(strategy: DDPStrategy) -> None:
    """Build DDP's buckets anew, for parameters of other shapes."""
    # The old wrapper must be gone before there is a new one, or both would reduce every gradient.
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
