"""`SparsityCallback`: drives a `Sparsifier` from Lightning's hooks, and notifies the observers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_lightning.callbacks.checkpoints import (
    check_none_missing,
    find_state,
    keep_only_weights,
    save_density_status,
    start_from_dense_weights,
    warn_if_best_differs,
    warn_if_not_final,
)
from sparse_lightning.callbacks.checks import (
    check_launcher,
    check_no_shared_layers,
    check_trainer,
    warn_of_slow_layers,
)
from sparse_lightning.callbacks.held_copies import CopyFinder, swap_in_copies
from sparse_lightning.callbacks.hooks import call_before_loading, call_when_built, unwrap_hooks
from sparse_lightning.callbacks.steps import (
    count_total_steps,
    forecast_total_steps,
    is_new,
    skips_backward,
)
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    SparsityConfig,
    UpdateSchedule,
    build_config,
)
from sparse_lightning.kernels import measuring
from sparse_lightning.loading import register_conversion_hook
from sparse_lightning.masks import MaskGallery
from sparse_lightning.names import DEFAULT_EXCLUDE, check_patterns, list_names, matches
from sparse_lightning.observers.loggers import log_options
from sparse_lightning.observers.measures import check_layer_series, compute_dtype
from sparse_lightning.observers.observers import Observers
from sparse_lightning.observers.summary import FitSummary, summarise
from sparse_lightning.observers.terminal import show_report, show_schedule, show_summary
from sparse_lightning.policy.criteria import Criterion
from sparse_lightning.policy.distributions import Distribution, Floor
from sparse_lightning.policy.rules import UpdateRule
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.policy.updates import ModelUpdate
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sparsifier import Sparsifier, check_same_training
from sparse_lightning.swap_report import SparsityReport

_FLOOR = Floor()
_UPDATES = UpdateSchedule()
_DROP_FRACTION = DropFractionSchedule()
_MONITOR = MonitorOptions()


class SparsityCallback(Callback):
    """Train a model's linear layers with dynamic block sparsity.

    Args:
        block_size: 16, 32, 64 or 128.
        include: name patterns of the `nn.Linear`s to swap. One without a dot matches the last part
            of a module's name, one with a dot the whole name; "re:..." is a regular expression.
        exclude: name patterns of layers that stay dense, in addition to output layers; see
            `sparsify`.
        density: present blocks / all blocks: a number, or a `DensitySchedule`.
        nm: "2:4" to keep two of each four neighbouring weights of a row within blocks, so that half
            of the weights of present blocks remain; None to keep all.
        distribution: how the budget is shared among layers: "uniform", "erdos_renyi", "global" (by
            the drop scores of all layers together while the density falls), or a function.
        layer_density: final densities of individual layers, by name pattern as in `include`; the
            other layers share `density`.
        floor: a `Floor`, the minimum number of blocks in each layer, block row and block column.
        update: an `UpdateSchedule`, the steps of topology updates.
        drop_fraction: share of the blocks that an update replaces: a number, or a
            `DropFractionSchedule`.
        drop: criterion by which blocks are kept: "magnitude", "gradient", "saliency", "movement",
            "random", or a function or its dotted path (see `criteria`).
        grow: criterion by which blocks are grown: "gradient" (RigL), "momentum" (SNFS), "random"
            (SET), "none", or a function or its dotted path.
        regrow: whether an update may grow a block that it has just dropped, which then keeps its
            weights (as in RigL).
        regrow_inner: whether updates also exchange weights within the blocks that stay, where `nm`
            keeps some of them only: dropped by magnitude, grown by the gradient.
        rule: an `UpdateRule`, or its dotted path, that decides the whole update in place of `drop`
            and `grow`.
        token_stride: dense gradients use only every `token_stride`-th token, which makes updates
            proportionally faster.
        init: "random" keeps random blocks of the initial weights, rescaled; "magnitude" keeps the
            blocks of largest norm.
        shrink: whether memory is released as the density falls, at most five times per fit. Turn
            it off if you capture a CUDA graph yourself.
        seed: seed of random blocks and random growth.
        follow: copies of layers that cannot be recognised by their weights, as
            `{"target": "net"}`. Copies that equal a layer, and are frozen or in no optimizer,
            follow it automatically.
        monitor: a `MonitorOptions`, what is logged; None logs nothing.

    Attributes:
        config: the checked configuration.
        sparsifier: the `Sparsifier` that does the work, after `setup`.
        report: `SparsityReport` of the latest swap.
        summary: `FitSummary` of the latest training, once it has ended normally.

    Raises:
        ValueError, TypeError: if an argument is invalid; the message names it.
    """

    def __init__(
        self,
        block_size: int = 64,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        density: float | DensitySchedule | Mapping[str, Any] = 0.25,
        nm: str | None = None,
        distribution: str | Distribution = "uniform",
        layer_density: Mapping[str, float] | None = None,
        floor: Floor | Mapping[str, Any] = _FLOOR,
        update: UpdateSchedule | Mapping[str, Any] = _UPDATES,
        drop_fraction: float | DropFractionSchedule | Mapping[str, Any] = _DROP_FRACTION,
        drop: str | Criterion = "magnitude",
        grow: str | Criterion = "gradient",
        regrow: bool = True,
        regrow_inner: bool = True,
        rule: str | UpdateRule | None = None,
        token_stride: int = 1,
        init: str = "random",
        shrink: bool = True,
        seed: int = 0,
        follow: Mapping[str, str] | None = None,
        monitor: MonitorOptions | Mapping[str, Any] | None = _MONITOR,
    ) -> None:
        self.config = build_config(
            block_size=block_size,
            include=include,
            exclude=exclude,
            density=density,
            nm=nm,
            distribution=distribution,
            layer_density=layer_density,
            floor=floor,
            update=update,
            drop_fraction=drop_fraction,
            drop=drop,
            grow=grow,
            regrow=regrow,
            regrow_inner=regrow_inner,
            rule=rule,
            token_stride=token_stride,
            init=init,
            shrink=shrink,
            seed=seed,
            follow=follow,
            monitor=monitor,
        )
        self._observers = Observers(self.config)
        self.sparsifier: Sparsifier | None = None
        self.summary: FitSummary | None = None
        self._first_steps: dict[int, list[int]] = {}
        self._optimizers: list[Optimizer] = []
        self.report: SparsityReport | None = None
        self._conversion_hook: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """Key of the saved state, distinct among a trainer's callbacks."""
        include, exclude = self.config.include, self.config.exclude
        if (include, exclude) == (("*",), tuple(DEFAULT_EXCLUDE)):
            return super().state_key
        return self._generate_state_key(include=list(include), exclude=list(exclude))

    @property
    def last_update(self) -> ModelUpdate | None:
        """The latest topology update, or None before the first."""
        return None if self.sparsifier is None else self.sparsifier.last_update

    @property
    def timetable(self) -> Timetable | None:
        """The resolved steps of the schedule, once training has started."""
        return None if self.sparsifier is None else self.sparsifier.timetable

    def show(self, layers: Sequence[str] = ("*",)) -> MaskGallery:
        """Return the block masks, which a notebook shows as pictures and `print` as text.

        Args:
            layers: name patterns of layers, as in `include`; by default four of all layers.

        Raises:
            RuntimeError: before the first fit, which swaps the layers.
            ValueError: if no block-sparse layer matches.
        """
        if self.sparsifier is None:
            raise RuntimeError("There are no block masks before `trainer.fit` has swapped layers.")
        check_patterns("layers", layers)
        masks = {
            name: layer.topology.mask.cpu().numpy()
            for name, layer in self.sparsifier.layers.items()
            if any(matches(pattern, name) for pattern in layers)
        }
        if not masks:
            raise ValueError(
                f"`layers` must match block-sparse layers; got {list(layers)!r}, which match none "
                f"of {list_names(self.sparsifier.layers)}."
            )
        is_all = tuple(layers) == ("*",)
        return MaskGallery(masks) if is_all else MaskGallery(masks, limit=len(masks))

    # Fit start: the layers are swapped before the optimizer and the strategy see the model.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()  # an earlier fit may have been interrupted
        if stage != TrainerFn.FITTING:
            # An evaluation swaps nothing; loading a checkpoint converts the layers to match it.
            self._conversion_hook = register_conversion_hook(pl_module)
            return
        check_trainer(trainer, self)
        self.summary = None
        call_when_built(pl_module, partial(self._sparsify, trainer, pl_module))
        if _sparsity_callbacks(trainer)[0] is self:
            # Check this before the weights are loaded, which fails for layers that stayed dense.
            call_before_loading(pl_module, partial(check_none_missing, configs=_configs(trainer)))

    def _sparsify(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_launcher(trainer, pl_module, self.config)
        callbacks = _sparsity_callbacks(trainer)
        if callbacks[0] is self:
            check_no_shared_layers(pl_module, [callback.config for callback in callbacks])
        sparse = {id(layer) for _, layer in sparse_layers(pl_module)}
        previous, new = self.sparsifier, Sparsifier(pl_module, config=self.config)
        if previous is not None and _are_same_layers(previous.layers, new.layers):
            previous.reset_gathered()  # another fit of the same model continues the schedule
        else:
            self._start_schedule(new)
        if self.config.monitor is not None:
            check_layer_series(self.config.monitor.layers, new.layers)
        if any(id(layer) not in sparse for layer in new.layers.values()):
            swap_in_copies(trainer)
            self.report = new.report
            if callbacks[-1] is not self:  # later callbacks swap more layers
                others = [
                    c.config.swap_options.named(pl_module) for c in callbacks if c is not self
                ]
                skipped = {
                    name: reason
                    for name, reason in new.report.skipped.items()
                    if not any(options.selects(name) for options in others)
                }
                self.report = replace(new.report, coverage=None, skipped=skipped)
            if trainer.is_global_zero:
                show_report(self.report, self._label(trainer))

    def _start_schedule(self, sparsifier: Sparsifier) -> None:
        self.sparsifier = sparsifier
        self._observers.reset()

    # Training: steps and updates run in the hooks that the engine registers with the optimizers.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # The wrapped hooks have run; without wrappers the model can be pickled and copied.
        unwrap_hooks(trainer, pl_module)
        callbacks = _sparsity_callbacks(trainer)
        if callbacks[0] is self:
            log_options(trainer, [callback.config for callback in callbacks])

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sparsifier, strategy = self._engine, trainer.strategy
        steps = sparsifier.steps
        total = sparsifier.total_steps = count_total_steps(trainer, steps)
        if is_new(trainer):
            self._first_steps.clear()
        known = dict(sparsifier.follows)
        sparsifier.attach(
            *trainer.optimizers,
            rewrap=partial(_rebuild_ddp, strategy) if isinstance(strategy, DDPStrategy) else None,
            copies=CopyFinder(trainer),
            planned=forecast_total_steps(trainer, total, steps, self._first_steps),
            # A compiled wrapper of the whole module needs parameters of constant shape.
            shrink=not isinstance(strategy.model, torch._dynamo.OptimizedModule),
        )
        self._optimizers = [*trainer.optimizers]
        if sparsifier.follows != known:
            self.report = sparsifier.report
            found = sparsifier.follows.items() - known.items()
            rank_zero_info("\n".join(f"{copy} follows {source}" for copy, source in sorted(found)))
        sparsifier.check_all_held()
        # Before the first step, which is not interrupted then.
        measuring.prepare(
            (layer.topology, compute_dtype(trainer, layer)) for layer in sparsifier.layers.values()
        )
        warn_of_slow_layers(trainer, self.config, sparsifier.layers)
        show_schedule(sparsifier, self._label(trainer))
        self._observers.start(trainer, pl_module, sparsifier)

    @property
    def _engine(self) -> Sparsifier:
        assert self.sparsifier is not None, "`setup` creates it"
        return self.sparsifier

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if skips_backward(trainer):
            # The model already holds the averaged weights; an update would write zeros into them.
            # Observers stay active until the training ends.
            self._engine.detach()
            return
        if self._engine.is_attached and self._engine.replace_optimizers(
            self._optimizers, trainer.optimizers
        ):
            self._optimizers = [*trainer.optimizers]
            self._engine.check_all_held()
            rank_zero_info(
                "The trainer's optimizers were replaced; block-sparse training continues with them."
            )
        # Count before the step, since an update in it reads the throughput.
        self._observers.count(batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observers.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observers.resume()

    # End of training.

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.summary = summarise(self._observers.fit)
        self._observers.end(self.summary)
        self._release()

    # The summary is computed in `on_train_end`, before the model leaves its device, but shown here,
    # since progress bars are still active there.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A trial run of a few batches has no meaningful summary.
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not fast_dev_run and self.summary is not None:
            show_summary(self.summary, self._label(trainer))
        if _sparsity_callbacks(trainer)[0] is self:
            warn_if_best_differs(trainer)

    def _label(self, trainer: pl.Trainer) -> str:
        """Return a label that distinguishes this callback; "" if the trainer has only one."""
        callbacks = _sparsity_callbacks(trainer)
        if len(callbacks) == 1:
            return ""
        number = callbacks.index(self) + 1
        return f"callback {number} of {len(callbacks)}, include={list(self.config.include)}"

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._release()
        unwrap_hooks(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._release()
        unwrap_hooks(trainer, pl_module)

    def _release(self) -> None:
        self._observers.stop()
        self._optimizers = []
        if self._conversion_hook is not None:
            self._conversion_hook.remove()
            self._conversion_hook = None
        if self.sparsifier is not None and self.sparsifier.is_attached:
            self.sparsifier.detach()

    # Save and resume.

    def state_dict(self) -> dict[str, Any]:
        if self.sparsifier is None:
            return {}
        return {
            **self.sparsifier.state_dict(),
            "first_steps": dict(self._first_steps),
            "patterns": self._observers.masks.state_dict(),
        }

    # Lightning looks at what a method wraps, and takes this one for one that is not overridden. So
    # it saves the state, but does not ask for distinct keys before `setup` can say which layers two
    # callbacks share: keys are equal only for equal patterns.
    state_dict.__wrapped__ = Callback.state_dict  # type: ignore[attr-defined]

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.sparsifier is not None:
            save_density_status(checkpoint, self.state_key, self.sparsifier)
            self._observers.save_history(checkpoint, self.state_key)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Validation, test and prediction need only the layers, which the state dict holds.
        if trainer.state.fn != TrainerFn.FITTING:
            warn_if_not_final(trainer, checkpoint["callbacks"].get(self.state_key))
            return
        callbacks = _sparsity_callbacks(trainer)
        check_none_missing(checkpoint, _configs(trainer))
        other_keys = [callback.state_key for callback in callbacks if callback is not self]
        state = find_state(checkpoint, self.state_key, self.config, other_keys)
        if state is not None:
            check_same_training(state, self.state_dict())
            self._observers.load_history(checkpoint, self.state_key)
            return
        start_from_dense_weights(checkpoint, self._engine)
        self._start_schedule(Sparsifier(pl_module, config=self.config))
        # Averaging callbacks read the weights from the checkpoint too.
        later = callbacks[callbacks.index(self) + 1 :]
        pending = [name for callback in later for name in callback._engine.layers]
        keep_only_weights(checkpoint, pl_module.state_dict(), pending)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.sparsifier is None:
            return
        if state_dict.get("config") != self.config.training_options():
            # This is an evaluation, since a fit refuses another configuration. It needs the layers
            # but not their schedule, and the next fit starts its own schedule.
            self._start_schedule(Sparsifier(self.sparsifier.model, config=self.config))
            return
        self.sparsifier.load_state_dict(state_dict)
        self._first_steps = dict(state_dict["first_steps"])
        self._observers.masks.load_state_dict(state_dict["patterns"])


def _sparsity_callbacks(trainer: pl.Trainer) -> list[SparsityCallback]:
    """Return the `SparsityCallback`s of a trainer, in its order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SparsityCallback)]


def _configs(trainer: pl.Trainer) -> dict[str, SparsityConfig]:
    """Return the configurations of a trainer's `SparsityCallback`s, by state key."""
    return {callback.state_key: callback.config for callback in _sparsity_callbacks(trainer)}


def _are_same_layers(a: Mapping[str, nn.Module], b: Mapping[str, nn.Module]) -> bool:
    """Return whether two mappings hold the same objects under the same names."""
    return a.keys() == b.keys() and all(a[name] is b[name] for name in a)


def _rebuild_ddp(strategy: DDPStrategy) -> None:
    """Rebuild DDP's buckets after parameters have changed shape."""
    # Remove the old wrapper first, or both would reduce every gradient.
    strategy.model = strategy.lightning_module
    strategy.configure_ddp()
