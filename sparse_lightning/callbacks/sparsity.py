"""`SparsityCallback`: drives a `Sparsifier` with Lightning's trainer.

Nothing is decided here: hooks call the engine, and tell those who look on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_lightning.callbacks.checkpoints import (
    begin_with,
    check_none_missing,
    find_state,
    leave_only_weights,
    save_arrival,
    warn_of_early_best,
    warn_of_early_weights,
)
from sparse_lightning.callbacks.trainer import (
    before_loading,
    check_apart,
    check_launcher,
    check_trainer,
    is_new,
    leave_hooks,
    once_built,
    planned_steps,
    services,
    skips_backward,
    swap_in_copies,
    warn_of_slow_layers,
)
from sparse_lightning.config import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    SparsityConfig,
    UpdateSchedule,
)
from sparse_lightning.loading import match_when_loaded
from sparse_lightning.names import DEFAULT_EXCLUDE
from sparse_lightning.observers.observers import Observers
from sparse_lightning.observers.summary import FitSummary, summarise
from sparse_lightning.observers.terminal import show_report, show_summary
from sparse_lightning.patching import SparsityReport
from sparse_lightning.policy.criteria import Criterion
from sparse_lightning.policy.distributions import Distribution, Floor
from sparse_lightning.policy.evolution import ModelUpdate
from sparse_lightning.policy.rules import UpdateRule
from sparse_lightning.policy.schedules import Timetable
from sparse_lightning.resume import check_same_training
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sparsifier import Sparsifier

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
        exclude: patterns of those to leave alone, beside output layers; see `sparsify`.
        density: present blocks / all blocks: a number, or a `DensitySchedule`.
        distribution: how the budget is shared among layers: "uniform", "erdos_renyi", "global", by
            the drop scores of all layers together while the density falls, or a function of yours.
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
        rule: decides the whole update in place of `drop` and `grow`: an `UpdateRule` of yours, or
            the dotted path of one.
        token_stride: dense gradients are read from every so many-th token only, for as much less
            time at an update.
        init: "random" keeps random blocks of the first weights, scaled; "magnitude" the largest.
        shrink: whether memory follows a density that falls, in at most five steps of a fit. Turn
            it off where you captured a CUDA graph yourself.
        seed: of random blocks and random growth.
        follow: copies of layers that are not to be told from their weights, as `{"target": "net"}`.
            Those that equal a layer, and are frozen or in no optimizer, follow it by themselves.
        monitor: what is logged, a `MonitorOptions`; None for nothing.

    Attributes:
        config: all of this, checked.
        sparsifier: the `Sparsifier` that does the work, after `setup`.
        report: `SparsityReport` of the latest swap.
        summary: `FitSummary` of the latest training, once it has ended by itself.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it.
    """

    def __init__(
        self,
        block_size: int = 64,
        include: Sequence[str] = ("*",),
        exclude: Sequence[str] = DEFAULT_EXCLUDE,
        density: float | DensitySchedule | Mapping[str, Any] = 0.25,
        distribution: str | Distribution = "uniform",
        layer_density: Mapping[str, float] | None = None,
        floor: Floor | Mapping[str, Any] = _FLOOR,
        update: UpdateSchedule | Mapping[str, Any] = _UPDATES,
        drop_fraction: float | DropFractionSchedule | Mapping[str, Any] = _DROP_FRACTION,
        drop: str | Criterion = "magnitude",
        grow: str | Criterion = "gradient",
        regrow: bool = True,
        rule: str | UpdateRule | None = None,
        token_stride: int = 1,
        init: str = "random",
        shrink: bool = True,
        seed: int = 0,
        follow: Mapping[str, str] | None = None,
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
        self._followed: list[Optimizer] = []
        self.report: SparsityReport | None = None
        self._evaluated: RemovableHandle | None = None

    @property
    def state_key(self) -> str:
        """What the state is saved under: of several callbacks of a trainer, each has its own."""
        include, exclude = self.config.include, self.config.exclude
        if (include, exclude) == (("*",), tuple(DEFAULT_EXCLUDE)):
            return super().state_key
        return self._generate_state_key(include=list(include), exclude=list(exclude))

    @property
    def last_update(self) -> ModelUpdate | None:
        """The latest topology update, if there was one."""
        return None if self.sparsifier is None else self.sparsifier.last_update

    @property
    def timetable(self) -> Timetable | None:
        """The resolved steps, once training has started."""
        return None if self.sparsifier is None else self.sparsifier.timetable

    # Fit start: the layers must be in place before the optimizer and the strategy see the model.

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()  # also where an earlier fit was cut off
        if stage != TrainerFn.FITTING:
            # What is evaluated is the model as it is, or as the checkpoint holds it.
            self._evaluated = match_when_loaded(pl_module)
            return
        check_trainer(trainer, self)
        self.summary = None
        once_built(pl_module, partial(self._sparsify, trainer, pl_module))
        if _of(trainer)[0] is self:
            # Before the weights are loaded, as layers that stayed dense would not take theirs.
            before_loading(pl_module, partial(check_none_missing, configs=_configs(trainer)))

    def _sparsify(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        check_launcher(trainer, pl_module, self.config)
        if _of(trainer)[0] is self:
            check_apart(pl_module, [each.config for each in _of(trainer)])
        sparse = {id(layer) for _, layer in sparse_layers(pl_module)}
        known, made = self.sparsifier, Sparsifier(pl_module, config=self.config)
        if known is not None and _same(known.layers, made.layers):
            known.forget_gathered()  # another fit: the schedule stays where it is
        else:
            self._begin(made)
        if any(id(layer) not in sparse for layer in made.layers.values()):
            swap_in_copies(trainer)
            self.report = made.report
            if _of(trainer)[-1] is not self:  # what is dense now may not be when all have swapped
                self.report = replace(made.report, coverage=None)
            if trainer.is_global_zero:
                show_report(self.report, self._which(trainer))

    def _begin(self, sparsifier: Sparsifier) -> None:
        """Begin a schedule."""
        self.sparsifier = sparsifier
        self._observers.begin_anew()

    # A training. Steps and updates run by themselves, in the hooks of the optimizers.

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # From here on the model can be pickled, and copied, as it is.
        leave_hooks(trainer, pl_module)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        sparsifier = self._engine
        sparsifier.total_steps = planned_steps(trainer, sparsifier.steps)
        if is_new(trainer):
            self._first_steps.clear()
        total, steps = sparsifier.total_steps, sparsifier.steps
        offered = services(trainer, total, steps, self._first_steps)
        known = dict(sparsifier.follows)
        sparsifier.attach(*trainer.optimizers, **offered)
        self._followed = [*trainer.optimizers]
        if sparsifier.follows != known:
            self.report = sparsifier.report
            found = sparsifier.follows.items() - known.items()
            rank_zero_info("\n".join(f"{copy} follows {of}" for copy, of in sorted(found)))
        sparsifier.check_all_held()
        warn_of_slow_layers(trainer, self.config, sparsifier.layers)
        rank_zero_info(f"Block-sparse training: {sparsifier.timetable}.")
        self._observers.start(trainer, pl_module, sparsifier)

    @property
    def _engine(self) -> Sparsifier:
        assert self.sparsifier is not None, "`setup` comes first"
        return self.sparsifier

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if skips_backward(trainer):
            # The average is in the model by now, and an update would put zeros into it. Those who
            # look on are still to be told of the end.
            self._engine.detach()
            return
        if self._engine.is_attached and self._engine.exchange(self._followed, trainer.optimizers):
            self._followed = [*trainer.optimizers]
            self._engine.check_all_held()
            rank_zero_info("The optimizers are others; block-sparse training goes on with them.")
        # Here and not when it ends: the update that follows its step reads how many there were.
        self._observers.count(batch)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observers.pause()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._observers.go_on()

    # Its end.

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.summary = summarise(self._observers.fit)
        self._observers.end()
        self._let_go()

    # Progress bars are still drawn at `on_train_end`; here the model has left its device.
    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # A run of a few batches, to see that everything works, has bought nothing.
        fast_dev_run = trainer.fast_dev_run  # type: ignore[attr-defined]
        if trainer.is_global_zero and not fast_dev_run and self.summary is not None:
            show_summary(self.summary, self._which(trainer))
        if _of(trainer)[0] is self:
            warn_of_early_best(trainer)

    def _which(self, trainer: pl.Trainer) -> str:
        """Return what tells this callback from others of the trainer; "" if there is none."""
        callbacks = _of(trainer)
        if len(callbacks) == 1:
            return ""
        return f"{callbacks.index(self) + 1} of {len(callbacks)}: {list(self.config.include)}"

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._let_go()
        leave_hooks(trainer, pl_module)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._let_go()
        leave_hooks(trainer, pl_module)

    def _let_go(self) -> None:
        self._observers.stop()
        self._followed = []
        if self._evaluated is not None:
            self._evaluated.remove()
            self._evaluated = None
        if self.sparsifier is not None and self.sparsifier.is_attached:
            self.sparsifier.detach()

    # Save and resume.

    def state_dict(self) -> dict[str, Any]:
        if self.sparsifier is None:
            return {}
        return {
            **self.sparsifier.state_dict(),
            "first_steps": dict(self._first_steps),
            "patterns": self._observers.patterns.state_dict(),
        }

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self.sparsifier is not None:
            save_arrival(checkpoint, self.state_key, self.sparsifier)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Validation, test and prediction need the layers only, which come with the model.
        if trainer.state.fn != TrainerFn.FITTING:
            warn_of_early_weights(trainer, checkpoint["callbacks"].get(self.state_key))
            return
        others = [each for each in _of(trainer) if each is not self]
        check_none_missing(checkpoint, _configs(trainer))
        keys = [each.state_key for each in others]
        state = find_state(checkpoint, self.state_key, self.config, keys)
        if state is not None:
            check_same_training(state, self.state_dict())
            return
        begin_with(checkpoint, self._engine)
        self._begin(Sparsifier(pl_module, config=self.config))
        # Callbacks that average take the weights from there too.
        waiting = [
            name for each in others[_of(trainer).index(self) :] for name in each._engine.layers
        ]
        leave_only_weights(checkpoint, pl_module.state_dict(), waiting)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if self.sparsifier is None:
            return
        if state_dict.get("config") != self.config.of_training():
            # Not a fit, or it would have been refused: of another training only the layers count.
            self._begin(Sparsifier(self.sparsifier.model, config=self.config))
            return
        self.sparsifier.load_state_dict(state_dict)
        self._first_steps = dict(state_dict["first_steps"])
        self._observers.patterns.load_state_dict(state_dict["patterns"])


def _of(trainer: pl.Trainer) -> list[SparsityCallback]:
    """Return the callbacks of this kind, in the trainer's order."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [each for each in callbacks if isinstance(each, SparsityCallback)]


def _configs(trainer: pl.Trainer) -> dict[str, SparsityConfig]:
    """Return their configurations, by the keys of their states."""
    return {each.state_key: each.config for each in _of(trainer)}


def _same(some: Mapping[str, nn.Module], others: Mapping[str, nn.Module]) -> bool:
    """Whether the layers are the same objects, by the same names."""
    return some.keys() == others.keys() and all(some[name] is others[name] for name in some)
