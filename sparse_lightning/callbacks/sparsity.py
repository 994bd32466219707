"""`SparsityCallback`: swaps the layers and evolves their blocks while Lightning trains.

This file only wires: what is decided lives in `schedules`, `distributions`, `criteria` and
`evolution`; how it is done in `patching`, `linear` and `optimizer_state`.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor, nn

from sparse_lightning.callbacks.monitor import SparsityMonitor
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    SparsityConfig,
    UpdateSchedule,
)
from sparse_lightning.criteria import (
    DROP_CRITERIA,
    GROW_CRITERIA,
    BlockScores,
    gradient,
    seeded_generator,
)
from sparse_lightning.distributions import DISTRIBUTIONS
from sparse_lightning.evolution import ModelUpdate, TopologyUpdate, update_topology
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.optimizer_state import find_optimizer, reset_slots, state_rule, warm_start
from sparse_lightning.patching import (
    DEFAULT_EXCLUDE,
    SparsityReport,
    matches,
    sparse_layers,
    sparsify,
)
from sparse_lightning.schedules import Timetable

_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
_UPDATES = UpdateSchedule()
_DROP_FRACTION = DropFractionSchedule()
_MONITOR = MonitorOptions()


class SparsityCallback(Callback):
    """Train a model's linear layers with dynamic block sparsity.

    Args:
        block_size: 16, 32, 64 or 128.
        include: patterns of the `nn.Linear`s to swap. One without a dot matches the last part of
            a module's name, one with a dot the whole name; "re:..." is a regular expression.
        exclude: patterns of those to leave alone.
        density: present blocks / all blocks: a number, or a `DensitySchedule`.
        distribution: how the budget is shared among layers: "uniform" or "erdos_renyi".
        update: when blocks are exchanged, an `UpdateSchedule`.
        drop_fraction: share of the blocks that an update exchanges: a number, or a
            `DropFractionSchedule`.
        drop: what a block is kept for: "magnitude".
        grow: what a block is grown for: "gradient" (RigL), "random" (SET) or "none".
        init: "random" keeps random blocks of the first weights, scaled; "magnitude" the largest.
        seed: of random blocks and random growth.
        monitor: what is logged, a `MonitorOptions`; None for nothing.

    Attributes:
        report: `SparsityReport` of the swap, after `setup`.
        last_update: `ModelUpdate` of the latest topology update, or None.
        timetable: the resolved steps, once training has started.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it.
    """

    def __init__(
        self,
        block_size: int = 64,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        density: float | DensitySchedule | Mapping[str, Any] = 0.25,
        distribution: str = "uniform",
        update: UpdateSchedule | Mapping[str, Any] = _UPDATES,
        drop_fraction: float | DropFractionSchedule | Mapping[str, Any] = _DROP_FRACTION,
        drop: str = "magnitude",
        grow: str = "gradient",
        init: str = "random",
        seed: int = 0,
        monitor: MonitorOptions | Mapping[str, Any] | None = _MONITOR,
    ) -> None:
        self.config = SparsityConfig(
            block_size=block_size,
            include=include,
            exclude=exclude,
            density=density,
            distribution=distribution,
            update=update,
            drop_fraction=drop_fraction,
            drop=drop,
            grow=grow,
            init=init,
            seed=seed,
            monitor=monitor,
        )
        self.monitor = None if self.config.monitor is None else SparsityMonitor(self.config.monitor)
        self.report: SparsityReport | None = None
        # Of Lightning's steps and scale, as last seen.
        self._global_step = 0
        self._grad_scale: float | None = None
        self._begin_anew({})

    def _begin_anew(self, layers: dict[str, BlockSparseLinear]) -> None:
        """Forget an earlier training: these layers are at their beginning."""
        self._layers = layers
        self.last_update: ModelUpdate | None = None
        self.timetable: Timetable | None = None
        self._step = 0
        self._n_updates = 0
        self._next_update: int | None = None
        # Slots that were grown and have not seen a gradient yet, by layer.
        self._pending: dict[str, Tensor] = {}

    # Fit start: the layers must be in place before the optimizer and the strategy see the model.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._check_strategy(trainer)
        self._check_order(trainer)
        if is_overridden("configure_model", pl_module):
            self._swap_after_configure_model(trainer, pl_module)
        else:
            self._swap(trainer, pl_module)

    def _swap_after_configure_model(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule
    ) -> None:
        original = pl_module.configure_model

        @functools.wraps(original)
        def wrapped() -> None:
            original()
            self._swap(trainer, pl_module)

        # As an instance attribute it hides the method, until `teardown` takes it away.
        pl_module.configure_model = wrapped  # type: ignore[method-assign]

    def _swap(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        config = self.config
        known = {id(layer) for _, layer in sparse_layers(pl_module)}
        report = sparsify(
            pl_module,
            block_size=config.block_size,
            density=config.density_at(0.0),
            include=config.include,
            exclude=config.exclude,
            distribution=config.distribution,
            init=config.init,
            seed=config.seed,
            max_density=config.max_density,
        )
        layers = {name: layer for name, layer in sparse_layers(pl_module) if self._manages(name)}
        if [*map(id, layers.values())] != [*map(id, self._layers.values())]:
            self._begin_anew(layers)
        for layer in layers.values():
            layer.locked = False
        swapped = [layer for layer in layers.values() if id(layer) not in known]
        if trainer.world_size > 1:
            for layer in self._layers.values():
                self._follow_rank_zero(trainer, layer)
        if swapped:
            self.report = report
            if trainer.is_global_zero:
                print(report)

    def _manages(self, name: str) -> bool:
        return any(matches(p, name) for p in self.config.include) and not any(
            matches(p, name) for p in self.config.exclude
        )

    @staticmethod
    @torch.no_grad()
    def _follow_rank_zero(trainer: pl.Trainer, layer: BlockSparseLinear) -> None:
        coords, values = trainer.strategy.broadcast(
            (layer.topology.coords.cpu(), layer.values.detach().cpu())
        )
        layer.topology.assign_(coords.to(layer.topology.device))
        if layer.values.device.type != "meta":
            layer.values.copy_(values)

    @staticmethod
    def _check_strategy(trainer: pl.Trainer) -> None:
        name = type(trainer.strategy).__name__
        tensor_parallel = getattr(trainer.strategy, "_tensor_parallel_size", 1)
        if name in _REFUSED_STRATEGIES or tensor_parallel != 1:
            what = name if name in _REFUSED_STRATEGIES else f"{name} with tensor parallelism"
            raise ValueError(
                f"`Trainer(strategy=...)` must be one that keeps whole blocks; got {what}. "
                "Use DDP, or ModelParallelStrategy(tensor_parallel_size=1) with fully_shard."
            )

    def _check_order(self, trainer: pl.Trainer) -> None:
        # Averaging callbacks copy the model in their own setup, so they must find it swapped.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, _averaging_callbacks()):
                raise ValueError(
                    "`callbacks` must list SparsityCallback before callbacks that average "
                    f"weights; got it after {type(callback).__name__}. Put it first."
                )

    # Train start: everything is built and restored; check that it belongs together.

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        optimizers = trainer.optimizers
        for name, layer in self._layers.items():
            if layer.values.requires_grad:
                self._check_optimizer(name, layer, optimizers)
            layer.locked = True
        self._check_capacities()
        self._check_ranks(trainer)
        self._warn_of_slow_layers(trainer)
        if self.timetable is None:
            self.timetable = self._resolve_times(trainer)
            self._next_update = self.timetable.next_update(self._step)
        rank_zero_info(f"Block-sparse training: {self.timetable}.")
        self._global_step = trainer.global_step
        self._grad_scale = _grad_scale(trainer)

    def _resolve_times(self, trainer: pl.Trainer) -> Timetable:
        total = trainer.estimated_stepping_batches
        if total == float("inf"):
            if self.config.has_fractions:
                raise ValueError(
                    "`update` and `density` times given as fractions need a training of known "
                    "length; got one without max_steps or max_epochs. Give steps, or max_steps."
                )
            total = 0
        return self.config.timetable(int(total))

    @staticmethod
    def _check_optimizer(
        name: str, layer: BlockSparseLinear, optimizers: Sequence[torch.optim.Optimizer]
    ) -> None:
        found = find_optimizer(optimizers, layer.values)
        if found is None:
            raise RuntimeError(
                "`values` must be in an optimizer, or the layer would not train; got none that "
                f"holds it (layer '{name}'). Build the parameter groups in configure_optimizers "
                "from self.parameters(), not in __init__."
            )
        optimizer, _ = found
        state_rule(optimizer)
        for key, tensor in optimizer.state.get(layer.values, {}).items():
            if isinstance(tensor, Tensor) and tensor.dim() and tensor.shape != layer.values.shape:
                raise RuntimeError(
                    f"The restored optimizer state `{key}` must have the shape of `values`, "
                    f"{list(layer.values.shape)}; got {list(tensor.shape)} (layer '{name}'). "
                    "The checkpoint's model and optimizer do not belong together."
                )

    def _check_capacities(self) -> None:
        budgets = self._budgets(self.config.max_density)
        for name, layer in self._layers.items():
            if budgets[name] > layer.topology.capacity:
                raise ValueError(
                    f"`density` must leave every layer within its capacity; got a budget of "
                    f"{budgets[name]} blocks for {layer.topology.capacity} slots (layer "
                    f"'{name}'). Build the layer at a higher density, or exclude it."
                )

    def _budgets(self, density: float) -> dict[str, int]:
        grids = [layer.topology.grid for layer in self._layers.values()]
        budgets = DISTRIBUTIONS[self.config.distribution](density, grids)
        return dict(zip(self._layers, budgets, strict=True))

    def _check_ranks(self, trainer: pl.Trainer) -> None:
        if trainer.world_size == 1:
            return
        own = hashlib.sha256()
        for layer in self._layers.values():
            own.update(layer.topology.to_state().cpu().numpy().tobytes())
        if trainer.strategy.broadcast(own.hexdigest()) != own.hexdigest():
            raise RuntimeError(
                "All ranks must have the same topology; got another one on rank "
                f"{trainer.global_rank} than on rank 0."
            )

    def _warn_of_slow_layers(self, trainer: pl.Trainer) -> None:
        # Where the schedule ends: before that, more blocks are present on purpose.
        budgets = self._budgets(self.config.density_at(1.0))
        in_half = trainer.precision in ("16-mixed", "bf16-mixed")
        slow = []
        for name, layer in self._layers.items():
            density = budgets[name] / (layer.topology.grid[0] * layer.topology.grid[1])
            dtype = torch.bfloat16 if in_half else layer.values.dtype
            speedup = layer.predicted_speedup(density, dtype)
            if speedup is not None and speedup < 1:
                slow.append(f"{name} ({speedup:.2f} of dense at density {density:.2f})")
        if slow:
            rank_zero_warn(
                "Some layers are predicted to be slower than dense ones, on this GPU, at their "
                f"shape and final density: {', '.join(slow)}. Take larger blocks, a lower density, "
                "or exclude them."
            )

    # A step.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._next_update is not None and self._step + 1 >= self._next_update:
            self._arm(self._needs_gradient)

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        for name, pending in list(self._pending.items()):
            layer = self._layers[name]
            found = find_optimizer([optimizer], layer.values)
            if found is None:
                continue
            scale = _unscale_factor(trainer, optimizer)
            pending = warm_start(*found, layer.values, pending.to(layer.values.device), scale)
            self._pending[name] = pending
            if not pending.any():
                del self._pending[name]

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        if not self._stepped(trainer):
            return
        self._step += 1
        if self._next_update is None or self._step < self._next_update:
            return
        assert self.timetable is not None
        density = self.config.density_at(self.timetable.density_progress(self._step))
        self.last_update = self._update(trainer, density)
        self._arm(False)
        self._next_update = self.timetable.next_update(self._step)
        if self.monitor is not None:
            self.monitor.log(trainer, pl_module, self.last_update, density)

    def _stepped(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ended in an optimizer step that a GradScaler did not skip."""
        advanced = trainer.global_step > self._global_step
        self._global_step = trainer.global_step
        if not advanced:
            return False
        before, self._grad_scale = self._grad_scale, _grad_scale(trainer)
        skipped = before is not None and self._grad_scale is not None and self._grad_scale < before
        if skipped:
            # The scores of a skipped step hold its overflow; the next step gathers them anew.
            self._arm(False)
        return not skipped

    @property
    def _needs_gradient(self) -> bool:
        return GROW_CRITERIA[self.config.grow] is gradient

    def _arm(self, on: bool) -> None:
        """Start or stop the gathering of gradient scores, in every layer at once."""
        for layer in self._layers.values():
            layer.armed.fill_(on)
            if not on:
                layer.block_scores.zero_()

    # A topology update.

    @torch.no_grad()
    def _update(self, trainer: pl.Trainer, density: float) -> ModelUpdate:
        assert self.timetable is not None
        config, step = self.config, self._step
        layers = {n: layer for n, layer in self._layers.items() if layer.values.requires_grad}
        if self._needs_gradient:
            self._reduce_scores(trainer, layers.values())
        fraction = config.drop_fraction_at(self.timetable.update_progress(step))
        budgets = self._budgets(density)
        # Decide everything before anything is changed: an error leaves the model as it was.
        updates = {
            name: self._decide(name, layer, budgets[name], fraction)
            for name, layer in layers.items()
        }
        for name, update in updates.items():
            self._apply(trainer, name, update)
        self._n_updates += 1
        return ModelUpdate(step, self._n_updates, updates)

    @staticmethod
    def _reduce_scores(trainer: pl.Trainer, layers: Iterable[BlockSparseLinear]) -> None:
        if trainer.world_size == 1:
            return
        scores = [layer.block_scores for layer in layers]
        flat = torch.cat([score.flatten() for score in scores])
        flat = trainer.strategy.reduce(flat, reduce_op="sum")
        for score, part in zip(scores, flat.split([s.numel() for s in scores]), strict=True):
            score.copy_(part.view_as(score))

    def _decide(
        self, name: str, layer: BlockSparseLinear, budget: int, fraction: float
    ) -> TopologyUpdate:
        scores = BlockScores(
            mask=layer.topology.mask,
            magnitude=layer.magnitudes(),
            gradient=layer.block_scores.sqrt(),
            generator=seeded_generator(self.config.seed, self._step, name),
        )
        grow = GROW_CRITERIA[self.config.grow]
        try:
            return update_topology(
                layer.topology,
                DROP_CRITERIA[self.config.drop](scores),
                None if grow is None else grow(scores),
                budget,
                fraction,
            )
        except ValueError as error:
            raise ValueError(f"{error} (layer '{name}')") from error

    def _apply(self, trainer: pl.Trainer, name: str, update: TopologyUpdate) -> None:
        layer = self._layers[name]
        layer.apply_update(update)
        for copy in _averaged_copies(trainer, name):
            copy.apply_update(update)
        found = find_optimizer(trainer.optimizers, layer.values)
        if found is not None:
            reset_slots(found[0], layer.values, update.changed)
        pending = self._pending.pop(name, None)
        if pending is None:
            pending = torch.zeros(layer.topology.capacity, dtype=torch.bool)
        pending = pending.to(update.changed.device)
        pending[update.dropped] = False
        pending[update.grown] = True
        if len(update.grown) or pending.any():
            self._pending[name] = pending

    # Save, resume, end.

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self._step,
            "n_updates": self._n_updates,
            "next_update": self._next_update,
            "timetable": None if self.timetable is None else self.timetable.as_dict(),
            "pending": {name: pending.cpu() for name, pending in self._pending.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._step = state_dict["step"]
        self._n_updates = state_dict["n_updates"]
        self._next_update = state_dict["next_update"]
        table = state_dict["timetable"]
        self.timetable = None if table is None else Timetable(**table)
        self._pending = dict(state_dict["pending"])

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        for layer in self._layers.values():
            layer.locked = False
        self._arm(False)
        if is_overridden("configure_model", pl_module):
            vars(pl_module).pop("configure_model", None)


def _averaging_callbacks() -> tuple[type[Callback], ...]:
    """Return the classes of callbacks that copy the model; Lightning 2.5 lacks one of them."""
    try:
        from lightning.pytorch.callbacks import WeightAveraging
    except ImportError:
        return (StochasticWeightAveraging,)
    return (StochasticWeightAveraging, WeightAveraging)


def _averaged_copies(trainer: pl.Trainer, name: str) -> Iterator[BlockSparseLinear]:
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


def _grad_scale(trainer: pl.Trainer) -> float | None:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return None if scaler is None else float(scaler.get_scale())


def _unscale_factor(trainer: pl.Trainer, optimizer: torch.optim.Optimizer) -> float:
    """Return what gradients are still multiplied by: only fused optimizers unscale themselves."""
    scale = _grad_scale(trainer)
    handles_it = getattr(optimizer, "_step_supports_amp_scaling", False)
    return scale if scale is not None and handles_it else 1.0
