"""`SparsityCallback`: swaps the layers and evolves their blocks while Lightning trains.

This file only wires: what is decided lives in `schedules`, `distributions`, `criteria` and
`evolution`; how it is done in `patching`, `linear` and `optimizer_state`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import BitsandbytesPrecision, TransformerEnginePrecision
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from sparse_lightning.callbacks.monitor import SparsityMonitor
from sparse_lightning.callbacks.observer import Fit, Observer
from sparse_lightning.callbacks.patterns import Patterns
from sparse_lightning.callbacks.recorder import PatternRecorder
from sparse_lightning.callbacks.resume import check_resumable, is_dense, leave_only_weights
from sparse_lightning.callbacks.summary import FitSummary, summarise
from sparse_lightning.callbacks.terminal import Terminal, show_report, show_summary
from sparse_lightning.callbacks.trainer import (
    averaged_copies,
    averaging_callbacks,
    can_shrink,
    check_ranks,
    compute_dtype,
    forget_old_shapes,
    grad_scale,
    planned_steps,
    skips_backward,
    unscale_factor,
)
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    SparsityConfig,
    UpdateSchedule,
)
from sparse_lightning.criteria import Criterion, needed_by, seeded_generator
from sparse_lightning.distributions import Floor, Grid
from sparse_lightning.evolution import ModelUpdate, TopologyUpdate, update_topology
from sparse_lightning.gathering import Gatherer, score
from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.optimizer_state import (
    check_state,
    find_optimizer,
    prepare_keep,
    prepare_reset,
    warm_start,
)
from sparse_lightning.patching import (
    DEFAULT_EXCLUDE,
    SparsityReport,
    check_layers_found,
    is_chosen,
    sparse_layers,
    start_from,
    swap_layers,
)
from sparse_lightning.schedules import Timetable, should_shrink
from sparse_lightning.sharding import check_whole_blocks, is_sharded

_REFUSED_STRATEGIES = ("FSDPStrategy", "DeepSpeedStrategy", "XLAFSDPStrategy")
_FLOOR = Floor()
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
        distribution: how the budget is shared among layers: "uniform", "erdos_renyi", or "global",
            by the drop scores of all layers together, while the density falls.
        layer_density: final densities of layers that have their own, by pattern as in `include`;
            the others share `density`.
        floor: blocks that every layer, block row and block column keeps, a `Floor`.
        update: when blocks are exchanged, an `UpdateSchedule`.
        drop_fraction: share of the blocks that an update exchanges: a number, or a
            `DropFractionSchedule`.
        drop: what a block is kept for: "magnitude", "gradient", "saliency", "movement", "random",
            or a function of yours or its dotted path (see `criteria`).
        grow: what a block is grown for: "gradient" (RigL), "momentum" (SNFS), "random" (SET),
            "none", or a function of yours.
        regrow: whether a block that an update drops may be grown by the same update, and then
            keeps its weights (as in RigL).
        exact: whether gradients are summed over micro-batches and ranks before their norm is
            taken, at the cost of a dense gradient in memory.
        token_stride: dense gradients are read from every so many-th token only, for as much less
            time at an update.
        init: "random" keeps random blocks of the first weights, scaled; "magnitude" the largest.
        shrink: whether memory follows a density that falls, in at most five steps of a fit. Turn
            it off where you captured a CUDA graph yourself.
        seed: of random blocks and random growth.
        monitor: what is logged, a `MonitorOptions`; None for nothing.

    Attributes:
        report: `SparsityReport` of the swap, after `setup`.
        last_update: `ModelUpdate` of the latest topology update, or None.
        summary: `FitSummary` of the latest training, once it has ended by itself.
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
        layer_density: Mapping[str, float] | None = None,
        floor: Floor | Mapping[str, Any] = _FLOOR,
        update: UpdateSchedule | Mapping[str, Any] = _UPDATES,
        drop_fraction: float | DropFractionSchedule | Mapping[str, Any] = _DROP_FRACTION,
        drop: str | Criterion = "magnitude",
        grow: str | Criterion = "gradient",
        regrow: bool = True,
        exact: bool = False,
        token_stride: int = 1,
        init: str = "random",
        shrink: bool = True,
        seed: int = 0,
        monitor: MonitorOptions | Mapping[str, Any] | None = _MONITOR,
    ) -> None:
        self.config = SparsityConfig(
            block_size=block_size,
            include=include,
            exclude=exclude,
            density=density,
            distribution=distribution,
            layer_density=layer_density,
            floor=floor,
            update=update,
            drop_fraction=drop_fraction,
            drop=drop,
            grow=grow,
            regrow=regrow,
            exact=exact,
            token_stride=token_stride,
            init=init,
            shrink=shrink,
            seed=seed,
            monitor=monitor,
        )
        self._drop, self._grow = self.config.drop_criterion, self.config.grow_criterion
        self._observers: list[Observer] = [Terminal()]
        shown = self.config.monitor
        self.monitor = None if shown is None else SparsityMonitor(shown)
        if self.monitor is not None:
            self._observers.append(self.monitor)
        if shown is not None and shown.record:
            recorder = PatternRecorder(shown.every_n_updates, self.config.of_training())
            self._observers.append(recorder)
        self.report: SparsityReport | None = None
        self.summary: FitSummary | None = None
        self._training = False
        # Whether an optimizer has stepped in this batch, and Lightning's scale as last seen.
        self._stepping = False
        self._grad_scale: float | None = None
        self._begin_anew({})

    def _begin_anew(self, layers: dict[str, BlockSparseLinear]) -> None:
        """Forget an earlier training: these layers are at their beginning."""
        self._layers = layers
        needs = needed_by([self._drop, self._grow])
        self._gatherer = Gatherer(layers, needs, self.config.exact, self.config.token_stride)
        self._patterns = Patterns()
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
        self._check_precision(trainer)
        self._check_order(trainer)
        # Optimizers are built anew; and a checkpoint that was tested since an earlier fit may have
        # brought layers of other sizes.
        self._pending.clear()
        self._gatherer.forget()
        self._training = False  # also where an earlier fit was cut off
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

        def budgets(grids: Mapping[str, Grid]) -> tuple[dict[str, int], dict[str, int]]:
            check_layers_found(config.layer_density, [*grids, *self._managed(pl_module)])
            return config.budgets_at(0.0, grids), config.capacities(grids)

        report = swap_layers(
            pl_module,
            config.block_size,
            config.include,
            config.exclude,
            budgets,
            config.init,
            config.seed,
            config.floor,
        )
        layers = self._managed(pl_module)
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
                show_report(report)

    def _managed(self, pl_module: pl.LightningModule) -> dict[str, BlockSparseLinear]:
        include, exclude = self.config.include, self.config.exclude
        return {n: m for n, m in sparse_layers(pl_module) if is_chosen(n, include, exclude)}

    @staticmethod
    @torch.no_grad()
    def _follow_rank_zero(trainer: pl.Trainer, layer: BlockSparseLinear) -> None:
        # Of sharded values each rank has drawn its own part, and values on meta are yet to come.
        has_values = layer.values.device.type != "meta" and not is_sharded(layer.values)
        own = layer.topology.coords.cpu(), layer.values.detach().cpu() if has_values else None
        coords, values = trainer.strategy.broadcast(own)
        layer.topology.assign_(coords)
        if values is not None:
            layer.values.copy_(values)
        elif layer.values.device.type != "meta":
            layer.clear_empty_slots()

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
        if not getattr(trainer.strategy, "_save_distributed_checkpoint", True):
            raise ValueError(
                "`save_distributed_checkpoint` must be True: Lightning loads a checkpoint of one "
                "file into a sharded model without the topology, so this run could not be "
                "resumed; got False. To have one file afterwards, call "
                "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch`."
            )

    @staticmethod
    def _check_precision(trainer: pl.Trainer) -> None:
        plugin = trainer.precision_plugin
        if isinstance(plugin, (BitsandbytesPrecision, TransformerEnginePrecision)):
            raise ValueError(
                "`Trainer(plugins=...)` must leave the model's nn.Linears to SparsityCallback; got "
                f"{type(plugin).__name__}, which puts its own layers in their place. "
                "Use precision='bf16-mixed', '16-mixed' or 'bf16-true'."
            )

    def _check_order(self, trainer: pl.Trainer) -> None:
        # Averaging callbacks copy the model in their own setup, so they must find it swapped.
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        for callback in callbacks[: callbacks.index(self)]:
            if isinstance(callback, averaging_callbacks()):
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
        check_ranks(trainer, (layer.topology.to_state() for layer in self._layers.values()))
        self._warn_of_slow_layers(trainer)
        if self.timetable is None:
            self.timetable = self._resolve_times(trainer)
            self._next_update = self.timetable.next_update(self._step)
        rank_zero_info(f"Block-sparse training: {self.timetable}.")
        if self._gatherer.exact_memory:
            mib = self._gatherer.exact_memory / 2**20
            rank_zero_info(f"Exact scores: dense gradients take {mib:.1f} MiB.")
        self._stepping = False
        self._grad_scale = grad_scale(trainer)
        self._patterns.start(self._layers)
        self.summary, self._training = None, True
        for observer in self._observers:
            observer.start(self._fit(trainer, pl_module))

    def _fit(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Fit:
        return Fit(trainer, pl_module, self._layers, self._patterns, self._step, self._n_updates)

    def _resolve_times(self, trainer: pl.Trainer) -> Timetable:
        total = planned_steps(trainer)
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
        try:
            check_state(found[0], layer.values)
        except RuntimeError as error:
            raise RuntimeError(f"{error} (layer '{name}')") from error
        with _naming(name):
            check_whole_blocks(layer.values)

    def _check_capacities(self) -> None:
        # From here on: memory may have shrunk already, in a run that is resumed.
        needed = self._most_needed(self._progress())
        for name, layer in self._layers.items():
            if needed[name] > layer.topology.capacity:
                raise ValueError(
                    f"`density` must leave every layer within its capacity; got a budget of "
                    f"{needed[name]} blocks for {layer.topology.capacity} slots (layer "
                    f"'{name}'). Build the layer at a higher density, or exclude it."
                )

    def _most_needed(self, progress: float) -> dict[str, int]:
        """Return the most blocks that each layer may hold from here on."""
        if self.config.distribution == "global":  # budgets only fall
            return {name: layer.topology.n_blocks for name, layer in self._layers.items()}
        grids = {name: layer.topology.grid for name, layer in self._layers.items()}
        ends = (self.config.budgets_at(at, grids) for at in (progress, 1.0))
        return {
            name: max(budgets)
            for name, *budgets in zip(grids, *map(dict.values, ends), strict=True)
        }

    def _progress(self) -> float:
        return 0.0 if self.timetable is None else self.timetable.density_progress(self._step)

    def _warn_of_slow_layers(self, trainer: pl.Trainer) -> None:
        # Where the schedule ends: before that, more blocks are present on purpose.
        grids = {name: layer.topology.grid for name, layer in self._layers.items()}
        budgets = self.config.budgets_at(1.0, grids)
        slow = []
        for name, layer in self._layers.items():
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

    # A step.

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._gathers_dense_gradients:
            self._gatherer.arm(True)

    @property
    def _gathers_dense_gradients(self) -> bool:
        """Whether the step that is under way is at an update, or near enough before it."""
        window = self._gatherer.window
        return (
            window > 0
            and self._next_update is not None
            and (self._step + window >= self._next_update)
        )

    def on_before_optimizer_step(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        optimizer: torch.optim.Optimizer,
    ) -> None:
        self._stepping = True
        if not self._pending and not self._gatherer.reads_gradients:
            return
        scale = unscale_factor(trainer, optimizer)
        self._gatherer.before_optimizer_step(optimizer, scale)
        for name, pending in list(self._pending.items()):
            layer = self._layers[name]
            found = find_optimizer([optimizer], layer.values)
            if found is None:
                continue
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
        if self.monitor is not None:
            self.monitor.count(batch)
        if not self._stepped(trainer):
            return
        gathered = self._gathers_dense_gradients
        reduce = None
        if gathered and trainer.world_size > 1:
            reduce = functools.partial(trainer.strategy.reduce, reduce_op="sum")
        self._gatherer.end_step(gathered, reduce)
        self._step += 1
        if self._next_update is not None and self._step >= self._next_update:
            self._update(trainer, pl_module)
        if gathered:
            self._gatherer.arm(False)

    def _stepped(self, trainer: pl.Trainer) -> bool:
        """Whether this batch ended in an optimizer step that a GradScaler did not skip."""
        stepping, self._stepping = self._stepping, False
        if not stepping or skips_backward(trainer):
            return False
        if self._grad_scale is None:
            return True
        scale, self._grad_scale = self._grad_scale, grad_scale(trainer)
        skipped = self._grad_scale is not None and self._grad_scale < scale
        if skipped:
            # What was gathered holds the step's overflow; the next step gathers anew.
            self._gatherer.skip_step()
        return not skipped

    # A topology update.

    @torch.no_grad()
    def _update(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        assert self.timetable is not None
        progress = self._progress()
        # Decide everything, and take all memory, before anything is changed: an error leaves model,
        # optimizer and callback as they were.
        with _one_thread():
            update = self._decide(trainer, progress)
            writes = [self._gatherer.prepare_anew(update.layers), self._patterns.prepare(update)]
            for name, of_layer in update.layers.items():
                if len(of_layer.changed):
                    writes.append(self._prepare(trainer, name, of_layer))
            for write in writes:
                write()
        self._n_updates = update.number
        self._next_update = self.timetable.next_update(self._step)
        self.last_update = update
        if self.config.shrink:
            self._shrink(trainer, progress)
        for observer in self._observers:
            observer.update(self._fit(trainer, pl_module), update)

    def _decide(self, trainer: pl.Trainer, progress: float) -> ModelUpdate:
        assert self.timetable is not None
        config = self.config
        fraction = config.drop_fraction_at(self.timetable.update_progress(self._step))
        layers = {n: layer for n, layer in self._layers.items() if layer.values.requires_grad}
        masks: dict[str, Tensor] = {}
        magnitudes: dict[str, Tensor] = {}
        drop: dict[str, Tensor] = {}
        grow: dict[str, Tensor | None] = dict.fromkeys(layers)
        for name in layers:
            scores = self._gatherer.scores_of(name, seeded_generator(config.seed, self._step, name))
            masks[name], magnitudes[name] = scores.mask, scores.magnitude
            with _naming(name):
                drop[name] = score("drop", self._drop, scores)
                if self._grow is not None:
                    grow[name] = score("grow", self._grow, scores)
        known = (scores for scored in (masks, drop, grow) for scores in scored.values())
        check_ranks(trainer, (scores for scores in known if scores is not None))
        budgets = config.budgets_by_score(progress, drop, masks)
        updates = {}
        for name, layer in layers.items():
            with _naming(name):
                updates[name] = update_topology(
                    layer.topology,
                    drop[name],
                    grow[name],
                    budgets[name],
                    fraction,
                    floor=(config.floor.row, config.floor.column),
                    regrow=config.regrow,
                )
        density = self.config.density_at(progress)
        return ModelUpdate(self._step, self._n_updates + 1, updates, drop, magnitudes, density)

    def _prepare(
        self, trainer: pl.Trainer, name: str, update: TopologyUpdate
    ) -> Callable[[], None]:
        """Return what makes an update of a layer real, and only writes in place."""
        layer = self._layers[name]
        writes = [layer.prepare_update(update)]
        writes += [copy.prepare_update(update) for copy in averaged_copies(trainer, name)]
        found = find_optimizer(trainer.optimizers, layer.values)
        if found is not None:
            writes.append(prepare_reset(found[0], layer.values, update.changed))
        pending = torch.zeros(layer.topology.capacity, dtype=torch.bool)
        if name in self._pending:
            pending.copy_(self._pending[name])
        pending[update.dropped] = False
        pending[update.grown] = True
        is_pending = bool(pending.any())

        def write() -> None:
            for each in writes:
                each()
            self._pending.pop(name, None)
            if is_pending:
                self._pending[name] = pending

        return write

    def _shrink(self, trainer: pl.Trainer, progress: float) -> None:
        """Give up the slots that will stay empty, if it is time for that."""
        needed = self._most_needed(progress)
        capacity = sum(layer.topology.capacity for layer in self._layers.values())
        density = self.config.density
        if not should_shrink(
            capacity, sum(needed.values()), density.initial, density.final, progress
        ) or not can_shrink(trainer, self._layers.values()):
            return
        # One layer after the other, each wholly or not at all: all at once would take the memory
        # that is to become free.
        for name, layer in self._layers.items():
            # A frozen layer, or one that was short of blocks to choose from, keeps what it has.
            kept, write = layer.prepare_shrink(
                min(layer.topology.capacity, max(needed[name], layer.topology.n_blocks))
            )
            writes = [write, self._gatherer.prepare_keep(name, kept)]
            for copy in averaged_copies(trainer, name):
                writes.append(copy.prepare_shrink(len(kept))[1])
            found = find_optimizer(trainer.optimizers, layer.values)
            if found is not None:
                writes.append(prepare_keep(found[0], layer.values, kept))
            pending = {name: self._pending[name].cpu()[kept.cpu()]} if name in self._pending else {}
            for write in writes:
                write()
            self._pending.update(pending)
        forget_old_shapes(trainer)

    # A validation in between.

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._training and not trainer.sanity_checking:
            for observer in self._observers:
                observer.pause(self._fit(trainer, pl_module))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if self._training and not trainer.sanity_checking:
            for observer in self._observers:
                observer.go_on(self._fit(trainer, pl_module))

    # Save, resume, end.

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Validation, test and prediction need the layers only, which come with the model.
        if trainer.state.fn != TrainerFn.FITTING:
            return
        state = checkpoint["callbacks"].get(self.state_key)
        if state is None and is_dense(checkpoint["state_dict"], self._layers):
            self._start_from_dense(pl_module, checkpoint)
        else:
            check_resumable(state, self.state_dict())

    def _start_from_dense(self, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        for name, layer in self._layers.items():
            start_from(layer, checkpoint["state_dict"][f"{name}.weight"], self.config.init)
        self._begin_anew(self._layers)
        # Callbacks that average take the weights from there too.
        checkpoint["state_dict"] = pl_module.state_dict()
        leave_only_weights(checkpoint)
        rank_zero_info(
            "Block-sparse training begins with the dense weights of the checkpoint. Its optimizer, "
            "its progress and the state of callbacks are left out."
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "config": self.config.of_training(),
            "step": self._step,
            "n_updates": self._n_updates,
            "next_update": self._next_update,
            "timetable": None if self.timetable is None else self.timetable.as_dict(),
            "pending": {name: pending.cpu() for name, pending in self._pending.items()},
            "gathered": self._gatherer.state_dict(),
            "patterns": self._patterns.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("config") != self.config.of_training():
            # Not a fit, or it would have been refused: of another training only the layers count.
            self._begin_anew(self._layers)
            return
        self._step = state_dict["step"]
        self._n_updates = state_dict["n_updates"]
        self._next_update = state_dict["next_update"]
        table = state_dict["timetable"]
        self.timetable = None if table is None else Timetable(**table)
        self._pending = dict(state_dict["pending"])
        self._gatherer.load_state_dict(state_dict["gathered"])
        if "patterns" in state_dict:
            self._patterns.load_state_dict(state_dict["patterns"])

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        fit = self._fit(trainer, pl_module)
        self.summary = summarise(fit)
        for observer in self._observers:
            observer.end(fit)

    # Progress bars are still drawn at `on_train_end`; here the model has left its device.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self._training:  # there was no step to take
            return
        self._training = False
        # A run of a few batches, to see that everything works, has bought nothing.
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not fast_dev_run and self.summary is not None:
            show_summary(self.summary)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._gatherer.arm(False)
        if is_overridden("configure_model", pl_module):
            vars(pl_module).pop("configure_model", None)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch's CPU ops on this thread: grids are too small for waking others to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextlib.contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Name the layer in what goes wrong with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{error} (layer '{layer}')") from error
