"""`Sparsifier`: dynamic block sparsity of a model, driven by the steps of its optimizers.

`policy` makes the decisions, and `patching`, `linear`, `gathering` and `optimizer_state` carry them
out. This module connects them: it counts optimizer steps, gathers statistics, and applies each
update completely or not at all.
"""

from __future__ import annotations

import contextlib
import math
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_lightning import diagnostics, ranks
from sparse_lightning.config import SparsityConfig, build_config
from sparse_lightning.followers import Followers, no_external_copies
from sparse_lightning.gathering import Gatherer, copy_to_cpu
from sparse_lightning.interrupts import deferred_signals
from sparse_lightning.linear import BlockSparseLinear, density_of
from sparse_lightning.names import check_layer_density_matches
from sparse_lightning.nm_pattern import random_positions
from sparse_lightning.optimizer_state import has_slot_state
from sparse_lightning.patching import swap_layers
from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.criteria import BlockScores, collect_needs, seeded_generator
from sparse_lightning.policy.distributions import Grid
from sparse_lightning.policy.lookup import calling
from sparse_lightning.policy.rules import UpdateRequest, check_decision, check_is_data, check_rule
from sparse_lightning.policy.schedules import Timetable, should_shrink
from sparse_lightning.policy.updates import (
    ModelUpdate,
    TopologyUpdate,
    difference,
    place_blocks,
    with_positions,
)
from sparse_lightning.policy.weights import exchange_weights
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sharding import gather_whole, is_sharded, local_part, prepare_slot_change
from sparse_lightning.stepping import (
    GlobalStepWatch,
    StepWatch,
    is_within,
    loss_scale,
    unwrap_optimizer,
)
from sparse_lightning.swap_report import SparsityReport, describe_trained
from sparse_lightning.topology import BlockTopology
from sparse_lightning.tracked_optimizer import TrackedOptimizer, name_layer_in_errors

# Within this many steps, every layer that trains should have had a gradient.
_N_STEPS_WITHOUT_GRADIENT = 10

UpdateHook = Callable[["Sparsifier", ModelUpdate], None]


class Sparsifier:
    """Makes a model's linear layers block-sparse, and evolves their blocks during training.

    The constructor swaps the layers. `attach` connects the sparsifier to the optimizer: from then
    on, the optimizer's hooks count steps and run updates. An update is complete before a scheduler,
    an average or a checkpoint reads the model. A step is a step of the optimizer that holds a
    layer; with several optimizers, each counts its own.

    The training loop may pass functions to `attach`: one that rebuilds what was built for
    parameters of another shape (`rewrap`), one that finds copies of a layer (`copies`), and one
    that returns how many steps an optimizer will take (`planned`). Ranks are synchronised through
    `torch.distributed` if it is initialised. `state_dict` holds what a resumed training needs
    besides the states of the model and the optimizer.

    Args:
        model: model to change in place.
        total_steps: optimizer steps of the training; None if all times are given in steps. A
            resumed training may pass another number, which leaves the resolved times unchanged.
        config: complete configuration, instead of `options`.
        options: keyword arguments of `SparsityCallback`; `monitor` has no effect here.

    Attributes:
        model: as given.
        layers: the `BlockSparseLinear` layers that are evolved, by name.
        report: `SparsityReport` of the swap.
        total_steps: as given.
        last_update: `ModelUpdate` of the latest topology update, or None.
        n_updates: number of updates so far.

    Raises:
        ValueError, TypeError: for an argument out of range, naming it; the model is then unchanged.

    >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    >>> sparsifier = Sparsifier(model, total_steps=100, density=0.25, block_size=16)
    >>> optimizer = torch.optim.AdamW(model.parameters())
    >>> sparsifier.attach(optimizer)
    >>> for step in range(100):
    ...     model(torch.randn(8, 64)).square().mean().backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    >>> sparsifier.density, sparsifier.last_update.step
    (0.25, 75)
    """

    def __init__(
        self,
        model: nn.Module,
        total_steps: int | None = None,
        *,
        config: SparsityConfig | None = None,
        **options: Any,
    ) -> None:
        if config is not None and options:
            raise TypeError("`config` must be given alone; got further options as well.")
        self.config = build_config(**options) if config is None else config
        is_count = isinstance(total_steps, int) and not isinstance(total_steps, bool)
        if total_steps is not None and not (is_count and total_steps >= 1):
            raise ValueError(
                f"`total_steps` must be an integer of at least 1, or None; got {total_steps!r}."
            )
        self.model = model
        self.total_steps = total_steps
        self._rule = self.config.update_rule
        # `total_steps` when fractions were resolved; a resumed training keeps the original.
        self._resolved_by: int | None = None
        self._timetable: Timetable | None = None
        if total_steps is not None:  # raises for invalid times before the model is changed
            self._resolve_times()
        check_rule(self._rule)
        needs = collect_needs([self._rule])
        sparse_before = {id(layer) for _, layer in sparse_layers(model)}
        self.report = self._swap()
        self._followers = Followers(
            model, self.config.swap_options.named(model), self.report.follows
        )
        self.layers = {
            name: layer for name, layer in self._selected_layers() if name not in self.follows
        }
        # The layers that share the budget. Layers that are later found to be copies stay here, so
        # that the budgets of the others do not change.
        self._budgeted = dict(self.layers)
        swapped = {n: entry for n, entry in self.report.layers.items() if n in self.layers}
        self.report = replace(self.report, layers=swapped, final_density=self.final_density)
        self._swapped = [n for n, layer in self.layers.items() if id(layer) not in sparse_before]
        self._is_broadcast = False
        self._broadcast_from_rank_zero()
        self._gatherer = Gatherer(
            self.layers, needs, self.config.token_stride, self.config.regrow_inner
        )
        self._hooks: OrderedDict[int, UpdateHook] = OrderedDict()
        self._tracked: list[TrackedOptimizer] = []
        self._grown_at = self._initial_grown_at()
        self.n_updates = 0
        self.last_update: ModelUpdate | None = None
        self._rewrap: Callable[[], None] | None = None
        self._planned: Callable[[Optimizer, int], int] | None = None
        self._may_shrink = True
        # For layers whose blocks a loaded state dict has replaced since the last step: the topology
        # to which the optimizer's state still belongs.
        self._loaded_over: dict[str, BlockTopology] = {}
        # Those of them whose pending slots were loaded as well, after the blocks.
        self._loaded_pending: set[str] = set()
        self._global_watch: GlobalStepWatch | None = None
        self._warned: set[str] = set()

    # Construction.

    def _resolve_times(self) -> None:
        self._timetable = self.config.timetable(self.total_steps)
        self._resolved_by = self.total_steps

    def _swap(self) -> SparsityReport:
        def budgets(grids: Mapping[str, Grid]) -> tuple[LayerBudgets, dict[str, int]]:
            check_layer_density_matches(self.config.layer_density, grids)
            layer_budgets = self.config.budgets(grids)
            return layer_budgets, layer_budgets.capacities()

        # Python shows equal warnings once in a process, which may train several models one after
        # the other. Entering this context makes it forget which it has shown.
        with warnings.catch_warnings():
            return swap_layers(self.model, self.config.swap_options, budgets)

    def _selected_layers(self) -> Iterator[tuple[str, BlockSparseLinear]]:
        """Yield the model's block-sparse layers that the patterns select, copies included."""
        options = self._followers.options
        yield from (pair for pair in sparse_layers(self.model) if options.selects(pair[0]))

    def _budgets(self) -> LayerBudgets:
        """Return the budgets of the layers over the density schedule."""
        grids = {name: layer.topology.grid for name, layer in self._budgeted.items()}
        return self.config.budgets(grids)

    def _initial_grown_at(self) -> dict[str, Tensor]:
        """Return the initial `_grown_at`, 0 for every slot: int32 `[capacity]` by layer."""
        return {
            name: torch.zeros(layer.topology.capacity, dtype=torch.int32, device="cpu")
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def _broadcast_from_rank_zero(self) -> None:
        """Copy the blocks and values of rank 0 to all ranks, once."""
        if self._is_broadcast or ranks.world_size() == 1:
            return
        for layer in [*self.layers.values(), *map(self._followers.get_layer, self.follows)]:
            # Sharded values were initialised per rank, and values on meta are not initialised yet.
            has_values = layer.values.device.type != "meta" and not is_sharded(layer.values)
            own = layer.topology.to_state(), layer.values.detach().cpu() if has_values else None
            state, values = ranks.broadcast_from_rank_zero((own[0].cpu(), own[1]))
            topology = BlockTopology.from_state(state)
            layer.topology.assign_(topology.coords, topology.positions)
            if values is not None:
                layer.values.copy_(values)
            elif layer.values.device.type != "meta":
                layer._zero_empty_slots()
        self._is_broadcast = True

    # Attaching to optimizers.

    def attach(
        self,
        *optimizers: Any,
        rewrap: Callable[[], None] | None = None,
        copies: Callable[[str], Iterable[BlockSparseLinear]] | None = None,
        planned: Callable[[Optimizer, int], int] | None = None,
        shrink: bool = True,
    ) -> None:
        """Follow the steps of optimizers from now on, until `detach`.

        Call this once everything is built, wrapped and restored, and again to add optimizers. A
        layer follows the first optimizer that holds it. Wrapped optimizers, such as Accelerate's,
        are accepted.

        Args:
            optimizers: optimizers that hold the layers' parameters.
            rewrap: called after layers have shrunk, to rebuild what holds gradients of the old
                shapes, above all `DistributedDataParallel`. On several ranks layers shrink only
                with it.
            copies: maps the name of a layer to further copies of it, such as averages, which then
                follow its blocks.
            planned: maps an optimizer and its number of counted steps to the number expected at the
                end of the training; for a training whose length changes. Without it, that number
                is `total_steps` less the steps that did not count.
            shrink: False if parameters must keep their shape, for example because the whole model
                is compiled.

        Raises:
            ValueError, TypeError, RuntimeError: for an optimizer whose state cannot follow the
                blocks, or whose steps cannot be observed; if a time is a fraction and `total_steps`
                is None; if layers have fewer slots than the schedule needs.
        """
        for argument, value in (("rewrap", rewrap), ("copies", copies), ("planned", planned)):
            if value is not None and not callable(value):
                raise TypeError(f"`{argument}` must be a function, or None; got {value!r}.")
        if not isinstance(shrink, bool):
            raise TypeError(f"`shrink` must be true or false; got {shrink!r}.")
        attached_before = self._attached()
        for name, layer in self.layers.items():
            if layer._is_locked and not attached_before:
                raise RuntimeError(
                    "A layer must be evolved by one Sparsifier at a time; got a layer that another "
                    f"attached Sparsifier evolves (layer '{name}'). Call `detach()` on that one "
                    "first, or use a new model."
                )
        if not self._has_begun and not attached_before:
            self._tracked.clear()  # left by a training that took no step
            self._timetable = None
        if self._timetable is None:
            self._resolve_times()
        self._rewrap, self._planned = rewrap or self._rewrap, planned or self._planned
        self._followers.external_copies = copies or self._followers.external_copies
        self._may_shrink = self._may_shrink and shrink
        if not self._has_begun:
            self._broadcast_from_rank_zero()
        try:
            for optimizer in map(unwrap_optimizer, optimizers):
                self._attach(optimizer)
            self._set_copies(self._detect_copies())
            self._check_layers()
        except BaseException:
            self._release([t for t in self._attached() if t not in attached_before])
            raise
        for layer in self.layers.values():
            layer._is_locked = True
        self._warn_when_attached()
        for tracked in self._attached():
            self._arm(tracked)
        self._warned.discard("unattached optimizer")
        if self._global_watch is None:
            self._global_watch = GlobalStepWatch(self._check_unattached_step)

    def replace_optimizers(self, old: Iterable[Any], new: Iterable[Any]) -> bool:
        """Replace attached optimizers, without a break in the schedule.

        Each new optimizer continues the schedule, the steps and the waiting layers of the old one
        at its position. Additional new optimizers continue those of the last old one.

        Args:
            old: attached optimizers.
            new: the optimizers that replace them.

        Returns:
            True if the optimizers differ; otherwise nothing is done.

        Raises:
            ValueError, TypeError, RuntimeError: as `attach`.
        """
        # A list may contain an optimizer twice.
        before, after = ([*dict.fromkeys(map(unwrap_optimizer, given))] for given in (old, new))
        if before == after:
            return False
        replaced = [t for t in self._attached() if t.optimizer in before]
        remaining = [t for t in self._attached() if t not in replaced and t.optimizer not in after]
        others = [tracked.optimizer for tracked in remaining]
        self._release(self._attached())
        while len(replaced) < len(after):
            replaced.append(
                TrackedOptimizer.from_state(replaced[-1].state_dict())
                if replaced
                else TrackedOptimizer()
            )
        # `attach` assigns the optimizers in this order.
        first = [*replaced[: len(after)], *remaining]
        rest = [tracked for tracked in [*replaced, *self._tracked] if tracked not in first]
        self._tracked = [*first, *dict.fromkeys(rest)]
        self.attach(*after, *others)
        return True

    def _attach(self, optimizer: Optimizer) -> None:
        if any(tracked.optimizer is optimizer for tracked in self._tracked):
            return
        position = len(self._attached())
        if position == len(self._tracked):
            self._tracked.append(TrackedOptimizer())
        tracked = self._tracked[position]
        tracked.optimizer, tracked.groups = optimizer, []
        tracked.state_at_last_step = optimizer.state
        assert self._timetable is not None
        tracked.set_length(self.total_steps, self._timetable)
        self._find_held(tracked)
        tracked.watch = StepWatch(
            optimizer,
            partial(self._before_step, tracked),
            partial(self._on_gradients, tracked),
            partial(self._on_step, tracked),
            self._adapt_to_loaded_blocks,
        )

    def _attached(self) -> list[TrackedOptimizer]:
        return [tracked for tracked in self._tracked if tracked.optimizer is not None]

    @property
    def _has_begun(self) -> bool:
        return any(tracked.steps for tracked in self._tracked)

    def _find_held(self, tracked: TrackedOptimizer) -> None:
        """Find the layers that an optimizer holds, if its parameter groups have changed."""
        earlier = self._tracked[: self._tracked.index(tracked)]
        discarded = tracked.find_held(self.layers, earlier)
        self._warn_about(discarded, diagnostics.discarded_state)

    def _check_layers(self) -> None:
        owners = [tracked for tracked in self._attached() if tracked.owned]
        if self.config.distribution == "global" and len(owners) > 1:
            raise ValueError(
                "`distribution` must not be 'global' where several optimizers hold layers, as each "
                f"counts its own steps; got {len(owners)} that hold some. Use 'uniform' or "
                "'erdos_renyi', or one optimizer."
            )
        needed = self._needed_capacities()
        for name, layer in self.layers.items():
            if needed.get(name, 0) > layer.topology.capacity:
                raise ValueError(
                    f"`density` must leave every layer within its capacity; got a budget of "
                    f"{needed[name]} blocks for {layer.topology.capacity} slots (layer "
                    f"'{name}'). Build the layer at a higher density, or exclude it."
                )
        self._check_ranks((layer.topology.to_state() for layer in self.layers.values()), 0)

    def check_all_held(self) -> None:
        """Raise RuntimeError unless every layer that can train is in an attached optimizer."""
        for name in self._layers_in_no_optimizer():
            raise RuntimeError(
                "`values` must be in an optimizer, or the layer would not train; got none that "
                f"holds it (layer '{name}'). Build the optimizer from the model's parameters once "
                "its layers are block-sparse: under Lightning in configure_optimizers, not in "
                "__init__. If the layer is a copy of another one, declare its source by `follow`."
            )

    def _layers_in_no_optimizer(self) -> list[str]:
        """Return the layers that can train but that no attached optimizer holds."""
        held = {name for tracked in self._attached() for name in tracked.held}
        return [n for n, m in self.layers.items() if m.values.requires_grad and n not in held]

    def _check_ranks(self, tensors: Iterable[Tensor], step: int) -> None:
        if self.layers:
            device = next(iter(self.layers.values())).values.device
            ranks.check_identical(tensors, step, device)

    def _warn_when_attached(self) -> None:
        known = self._budgeted.keys() | self.follows.keys()
        late = [name for name, _ in self._selected_layers() if name not in known]
        self._warn_about(late, diagnostics.late_layers, once="late layers")
        budgets, config = self._budgets(), self.config
        if not self._has_begun:
            frozen = [
                name
                for name in self._swapped
                if name in self.layers
                and not self.layers[name].values.requires_grad
                and name not in config.include
            ]
            self._warn_about(frozen, diagnostics.frozen_layers, once="frozen layers")
            if config.nm is not None:
                whole = [name for name, layer in self.layers.items() if layer.nm is None]
                text = partial(diagnostics.whole_blocks, nm=config.nm)
                self._warn_about(whole, text, once="whole blocks")
            # Only now, since a checkpoint may have replaced the weights that the swap found.
            trained = [name for name in self.report.trained if name in self.layers]
            self._warn_about(trained, describe_trained, once="trained weights")
            if self._timetable is not None and config.density.schedule != "one_shot":
                fall = diagnostics.sudden_fall(budgets, self._timetable)
                self._warn(fall, once="sudden fall")
            if self._timetable is not None:
                reason = config.explain_no_exchange(budgets, self._timetable)
                self._warn(reason and diagnostics.no_exchange(reason), once="no exchange")
        nonfinite = self._not_yet_named("nonfinite", self._nonfinite_layers())
        self._warn_about(nonfinite, diagnostics.nonfinite_values)
        rising = config.rising_without_growth(budgets.grids)
        self._warn_about(rising, diagnostics.rise_without_growth, once="rise without growth")

    def _nonfinite_layers(self) -> list[str]:
        """Return the layers that hold NaN or infinite weights on any rank."""
        if not self.layers:
            return []
        values = [local_part(layer.values.detach()) for layer in self.layers.values()]
        on_meta = torch.ones((), dtype=torch.bool, device="cpu")  # not initialised yet
        is_finite = copy_to_cpu([on_meta if v.is_meta else v.isfinite().all() for v in values])
        flags = ranks.any_over_ranks([not finite for finite in is_finite], values[0].device)
        return [name for name, is_bad in zip(self.layers, flags, strict=True) if is_bad]

    # Copies that follow layers.

    @property
    def follows(self) -> dict[str, str]:
        """The layers that are copies of one of `layers` and keep its blocks, `{copy: source}`.

        Copies equal their source at the swap, and are frozen or in no optimizer. Which layers are
        in no optimizer is known once an optimizer is attached.
        """
        return self._followers.follows

    def _detect_copies(self) -> dict[str, str]:
        """Return which layers are now copies of layers that attached optimizers train."""
        optimizers = [tracked.optimizer for tracked in self._attached() if tracked.optimizer]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        return self._followers.detect(held, self._budgeted, self.layers)

    def _set_copies(self, follows: dict[str, str], all_attached: bool = False) -> None:
        """Make layers follow others from now on, and evolve those that no longer follow.

        Args:
            follows: `{copy: source}`.
            all_attached: whether all optimizers of the training are attached.
        """
        follows_before, self._followers.follows = self.follows, follows
        layers = {name: layer for name, layer in self._budgeted.items() if name not in follows}
        for name in self.layers.keys() - layers.keys():
            self._gatherer.arm([], {name: self.layers[name].values})
            self.layers[name]._is_locked = False
        self.layers.clear()  # in place, as the gatherer shares this dictionary
        self.layers.update(layers)
        for tracked in self._attached():
            tracked.groups = []
            self._find_held(tracked)
            for name in follows:
                tracked.pending.pop(name, None)
            tracked.waiting = [name for name in tracked.waiting if name not in follows]
        for layer in layers.values():
            layer._is_locked = self.is_attached
        for copy, source_name in follows.items():
            layer, source = self._followers.get_layer(copy), self.layers[source_name]
            # A changed copy may have been trained, and an optimizer attached later may hold it.
            if copy not in follows_before and (
                all_attached or self._followers.is_unchanged_copy(layer, source)
            ):
                with name_layer_in_errors(copy):
                    layer._adopt_blocks_of(source)
        swapped = {n: entry for n, entry in self.report.layers.items() if n not in follows}
        self.report = replace(self.report, layers=swapped, follows=dict(follows))
        new = dict(follows.items() - follows_before.items()) if all_attached else {}
        former = sorted(follows_before.keys() - follows.keys() - self._budgeted.keys())
        for text in diagnostics.changed_copies(new, former):
            self._warn(text)

    # State of the training.

    @property
    def is_attached(self) -> bool:
        """Whether the sparsifier follows an optimizer."""
        return bool(self._attached())

    @property
    def density(self) -> float:
        """Present blocks / all blocks of the layers together."""
        return density_of(self.layers.values())

    @property
    def final_density(self) -> float:
        """The density of the layers together when the density schedule is complete."""
        return self.final_blocks / max(1, self.n_blocks)

    @property
    def n_blocks(self) -> int:
        """The number of all blocks of the layers, present or absent."""
        return sum(math.prod(layer.topology.grid) for layer in self.layers.values())

    @property
    def final_blocks(self) -> int:
        """The number of present blocks of the layers when the density schedule is complete."""
        grids = {name: layer.topology.grid for name, layer in self.layers.items()}
        return self.config.budgets(grids).final_total()

    @property
    def is_final(self) -> bool:
        """Whether the density schedule is complete for all layers that train."""
        if self.config.density_is_constant:
            return True
        training = [tracked for tracked in self._attached() if tracked.trainable()]
        # While detached, no optimizer holds layers; those that held some have counted steps.
        training = training or [tracked for tracked in self._tracked if tracked.steps]
        return bool(training) and all(
            tracked.progress >= 1 and not tracked.waiting for tracked in training
        )

    @property
    def timetable(self) -> Timetable | None:
        """The resolved steps of the first optimizer that holds a layer."""
        tracked = self._main()
        return self._timetable if tracked is None else tracked.timetable

    @property
    def steps(self) -> int:
        """Counted steps of the first optimizer that holds a layer."""
        tracked = self._main()
        return 0 if tracked is None else tracked.steps

    @property
    def next_update(self) -> int | None:
        """Step of the next topology update by the first optimizer that holds a layer, or None."""
        tracked = self._main()
        return None if tracked is None else tracked.next_update

    @property
    def has_ended(self) -> bool:
        """Whether steps were taken and no topology update remains, so that the blocks stay."""
        owners = [tracked for tracked in self._attached() if tracked.owned] or self._tracked
        remaining = (t.next_update is not None or t.waiting for t in owners)
        return self._has_begun and not any(remaining)

    def describe_schedule(self) -> str:
        """Return which topology updates a training that starts now will make."""
        if self.has_ended:
            return "the schedule of topology updates has ended, so the blocks stay"
        text = f"{self.timetable}"
        if self.steps and self.next_update is not None:
            text += f"; it continues at step {self.steps}, and the next update is at step "
            text += f"{self.next_update}"
        return text

    @property
    def window(self) -> int:
        """Number of steps, ending with an update, in which dense gradients are gathered."""
        return self._gatherer.window

    def _main(self) -> TrackedOptimizer | None:
        """Return the first optimizer that holds a layer or, while detached, that has held one."""
        owners = [tracked for tracked in self._attached() if tracked.owned]
        stepped = [tracked for tracked in self._tracked if tracked.steps]
        return next(iter([*owners, *stepped, *self._tracked]), None)

    def register_update_hook(self, hook: UpdateHook) -> RemovableHandle:
        """Register a function to call with this object and each `ModelUpdate` once it is applied.

        Returns:
            A handle whose `remove()` removes the hook.
        """
        if not callable(hook):
            raise TypeError(
                "`hook` must be a function of the sparsifier and a ModelUpdate; "
                f"got {type(hook).__name__}."
            )
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    # An optimizer step.

    def _before_step(self, tracked: TrackedOptimizer) -> bool:
        """Prepare for a step, and return whether to call `_on_gradients` in it."""
        self._adapt_to_loaded_blocks()
        assert tracked.optimizer is not None
        tracked.state_at_last_step = tracked.optimizer.state
        # Reading it waits for the device, which a GradScaler has just done; later it would wait for
        # the optimizer's kernels.
        tracked.loss_scale = loss_scale() if tracked.armed else 1.0
        return bool(tracked.pending) or self._gatherer.reads_gradients

    def _on_gradients(self, tracked: TrackedOptimizer, grad_scale: float) -> None:
        """Read the final gradients of an optimizer, right before it applies them."""
        self._find_held(tracked)
        if self._gatherer.reads_gradients:
            if tracked.work is None:
                tracked.work = self._gatherer.make_block_work(tracked.owned)
            self._gatherer.read_gradients(tracked.work, tracked.owned, grad_scale)
        if tracked.pending:
            tracked.warm_up(grad_scale)

    def _on_step(self, tracked: TrackedOptimizer, was_skipped: bool) -> None:
        """Count a step of an optimizer if it applied a gradient of a layer."""
        if not was_skipped:
            self._find_held(tracked)
            if not tracked.held:
                missing = self._layers_in_no_optimizer()
                text = partial(diagnostics.optimizer_without_layers, optimizer=tracked.optimizer)
                self._warn_about(missing, text, once="no optimizer")
            if any(values.grad is not None for values in tracked.held.values()):
                self._count_step(tracked)
                return
            if self._is_copy_trained():
                self._set_copies(self._detect_copies())
                self._count_step(tracked)
                return
        self._skip_step(tracked)

    def _is_copy_trained(self) -> bool:
        """Return whether a copy has a gradient, as happens after it is unfrozen."""
        copies = [self._followers.get_layer(copy).values for copy in self.follows]
        return any(values.requires_grad and values.grad is not None for values in copies)

    def _check_unattached_step(self, optimizer: Optimizer) -> None:
        """Warn if an optimizer that has stepped is not attached but holds layers."""
        attached = [t.optimizer for t in self._attached() if t.optimizer is not None]
        if "unattached optimizer" in self._warned or any(optimizer is a for a in attached):
            return
        known = {id(layer.values): name for name, layer in self._budgeted.items()}
        names = [
            known[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in known and parameter.grad is not None
        ]
        if not names or any(is_within(a, optimizer) or is_within(optimizer, a) for a in attached):
            return
        text = diagnostics.unattached_optimizer(names, optimizer)
        self._warn(text, once="unattached optimizer")

    def _skip_step(self, tracked: TrackedOptimizer) -> None:
        """Discard a step that does not count."""
        tracked.skipped += 1
        self._gatherer.discard_norms(tracked.armed)
        if self._planned is None and tracked.end is not None:
            # The training will have one fewer counted step, so the next update may be earlier.
            self._set_end(tracked, max(tracked.end - 1, tracked.steps))
            self._arm(tracked)

    def _count_step(self, tracked: TrackedOptimizer) -> None:
        """Count a step that an optimizer has taken, and update its layers if they are due."""
        if tracked.steps == 0:
            missing = self._layers_in_no_optimizer()
            self._warn_about(missing, diagnostics.layers_in_no_optimizer, once="no optimizer")
        tracked.count()
        if tracked.observed_steps < _N_STEPS_WITHOUT_GRADIENT:
            self._mark_trained(tracked.owned)
        silent = tracked.find_layers_without_gradient(_N_STEPS_WITHOUT_GRADIENT)
        if silent:
            self._warn(diagnostics.layers_without_gradient(silent, _N_STEPS_WITHOUT_GRADIENT))
        if self._gatherer.reads_gradients:
            self._gatherer.confirm_step(tracked.owned)
        if tracked.armed:
            self._gatherer.collect_norms(tracked.armed, tracked.loss_scale)
        if self._planned is not None:
            assert tracked.optimizer is not None
            self._set_end(tracked, self._planned(tracked.optimizer, tracked.steps))
        is_due = tracked.next_update is not None and tracked.steps >= tracked.next_update
        try:
            if is_due or tracked.waiting:
                self._update(tracked, is_due)
        finally:  # a hook may raise, and the training go on
            self._arm(tracked)

    def _mark_trained(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Mark the layers that had a gradient in a step, so that they do not count as copies."""
        for name, values in parameters.items():
            if values.grad is not None:
                self.layers[name]._has_trained = True

    def _set_end(self, tracked: TrackedOptimizer, end: int) -> None:
        """Adapt the timetable of an optimizer to its expected number of counted steps."""
        if end == tracked.end:
            return
        if isinstance(end, bool) or not isinstance(end, int) or end < tracked.steps:
            raise ValueError(
                f"`planned` must return an integer of at least {tracked.steps}, the number of "
                f"steps taken; got {end!r}."
            )
        total = end
        if self._resolved_by is not None and self.total_steps is not None:
            total = max(1, round(end * self._resolved_by / self.total_steps))
        try:
            timetable = replace(self.config.timetable(total), total_steps=end)
        except ValueError:  # so few steps that the times would be out of order
            return
        tracked.set_end(timetable)

    def _arm(self, tracked: TrackedOptimizer) -> None:
        """Gather dense gradients in the next step for the layers that will need them."""
        window = self._gatherer.window
        if not window:
            return
        next_update = tracked.next_update
        is_near = next_update is not None and tracked.steps + window >= next_update
        if not (is_near or tracked.waiting or tracked.armed):
            return
        names = [name for name in tracked.trainable() if is_near or name in tracked.waiting]
        # Whole blocks take memory, so they are gathered only in a step that exchanges weights.
        step, table = tracked.steps + 1, tracked.timetable
        is_due = tracked.waiting or (next_update is not None and step >= next_update)
        blocks = bool(is_due and table is not None and self.config.exchanged_at(step, table))
        self._gatherer.arm(names, tracked.owned, blocks=blocks)
        tracked.armed = names

    # Other blocks, loaded into the model while optimizers are attached.

    def _adapt_to_loaded_blocks(self) -> None:
        """Bring all that belongs to blocks in line with those that a state dict has replaced.

        This waits for the next step, or for a state dict to be saved, since the optimizer's state
        may be loaded after the model.
        """
        self._find_loaded_blocks()
        if self._loaded_over:
            self._reset_state_of_loaded_blocks()

    def _find_loaded_blocks(self) -> None:
        """Discard what was gathered about replaced blocks, and make copies follow."""
        loaded = [n for n, layer in self.layers.items() if layer._topology_before_load is not None]
        for tracked in self._attached() if loaded else ():
            self._find_held(tracked)
            for name in tracked.owned.keys() & set(loaded):
                before = self.layers[name]._topology_before_load
                assert before is not None
                self._loaded_over.setdefault(name, before)
                update = difference(before, self.layers[name].topology)
                self._gatherer.prepare_clear({name: update})()
                self._grown_at[name][update.changed] = tracked.steps
        for name in loaded:
            for copy in self._followers.copies_of(name):
                copy._adopt_blocks_of(self.layers[name])
            self.layers[name]._topology_before_load = None

    @torch.no_grad()
    def _reset_state_of_loaded_blocks(self) -> None:
        """Reset optimizer state of the replaced blocks, unless it was loaded as well."""
        reset = set()
        for tracked in self._attached():
            optimizer = tracked.optimizer
            assert optimizer is not None
            is_loaded = optimizer.state is not tracked.state_at_last_step
            for name in tracked.held.keys() & self._loaded_over.keys():
                before, topology = self._loaded_over[name], self.layers[name].topology
                if before.values_shape != topology.values_shape:
                    continue  # loaded while no optimizer was attached
                update = difference(before, topology)
                if is_loaded and name in tracked.pending:
                    if name not in self._loaded_pending:  # those of the replaced blocks
                        pending = tracked.pending[name]
                        prepare_slot_change(pending, update.changed, update.moves)()
                elif not update.is_empty and not is_loaded:
                    if has_slot_state(optimizer, tracked.held[name]):
                        reset.add(name)
                    tracked.prepare_block_update(name, update, topology)()
        self._loaded_over.clear()
        self._loaded_pending.clear()
        self._warn_about(sorted(reset), diagnostics.loaded_blocks)

    # A topology update.

    @torch.no_grad()
    def _update(self, tracked: TrackedOptimizer, is_due: bool) -> None:
        """Update the layers that are due or waiting and can be scored."""
        assert tracked.timetable is not None
        self._mark_trained(tracked.owned)
        copies = self._detect_copies()
        if copies != self.follows:
            self._set_copies(copies, all_attached=True)
        due = [name for name in tracked.trainable() if is_due or name in tracked.waiting]
        if "unwritten copies" not in self._warned:
            unwritten = self._followers.find_unwritten(tracked.owned)
            self._warn_about(unwritten, diagnostics.unwritten_copies, once="unwritten copies")
        with _one_thread():
            update = self._decide(tracked, due)
            write = self._prepare_apply(tracked, update)
        updated = tracked.steps if is_due else tracked.updated
        next_update = tracked.timetable.next_update(updated) if is_due else tracked.next_update
        waiting = [name for name in due if name not in update.layers]
        with contextlib.ExitStack() as after:
            with deferred_signals():
                write()
                tracked.updated, tracked.next_update = updated, next_update
                tracked.waiting = waiting
                if update.layers:
                    self.last_update = update
                    # From here on the update is complete, so hooks are called whatever happens: a
                    # deferred interrupt, or shrinking that runs out of memory. `after` calls
                    # its last function first.
                    for hook in reversed(self._hooks.values()):
                        after.callback(hook, self, update)
                    after.callback(self._shrink)
            self._warn_of_unscored_layers(tracked)
            if update.layers:
                self._warn_of_copies(tracked)

    def _warn_of_copies(self, tracked: TrackedOptimizer) -> None:
        """Look, after an update, for copies that change without following the blocks."""
        if "unwritten copies" not in self._warned:
            self._followers.record_sums(tracked.owned)
        if "external copies" not in self._warned:
            # Layers that are now copies or were replaced in the model are not external copies.
            known = self._budgeted.values()
            names = self._followers.find_unregistered_copies(self.layers, known)
            self._warn_about(names, diagnostics.external_copies, once="external copies")

    def _warn_of_unscored_layers(self, tracked: TrackedOptimizer) -> None:
        # A layer that was not armed, since the update was not foreseen, could not be scored.
        armed = tracked.armed if self._gatherer.window else tracked.waiting
        names = self._not_yet_named("unscored", [n for n in tracked.waiting if n in armed])
        if names:
            flaws = {name: self._gatherer.flaw_of(name) for name in names}
            self._warn(diagnostics.unscored_layers(flaws, tracked.steps))

    def _scores(
        self, tracked: TrackedOptimizer, names: list[str], needs: Collection[str]
    ) -> dict[str, BlockScores]:
        """Return the scores of the layers that had a gradient and can be scored."""
        if not names:
            return {}
        parameters = [tracked.owned[name] for name in names]
        has_gradient = [values.grad is not None for values in parameters]
        has_gradient = ranks.any_over_ranks(has_gradient, parameters[0].device)
        step, seed = tracked.steps, self.config.seed
        return self._gatherer.scores_of(
            [name for name, has in zip(names, has_gradient, strict=True) if has],
            needs,
            step,
            lambda name: seeded_generator(seed, step, name),
            {name: (step - self._grown_at[name]).int() for name in names},
        )

    def _decide(self, tracked: TrackedOptimizer, due: list[str]) -> ModelUpdate:
        """Decide the update of the due layers that can be scored, without changing anything."""
        config, table, step = self.config, tracked.timetable, tracked.steps
        assert table is not None
        progress = max(tracked.progress, table.density_progress(step))
        density = config.density_at(progress)
        fraction = config.exchanged_at(step, table)
        is_armed = not self._gatherer.window or set(due) <= set(tracked.armed)
        if step == table.total_steps and not is_armed:
            fraction = 0.0  # this last step was not foreseen, so grown blocks would not be trained
        budgets, needs = self._budgets(), self._gatherer.needs
        if not fraction and self._is_only_dropping(budgets, progress, due):
            needs = getattr(self._rule, "needs_to_drop", needs)
        scores = self._scores(tracked, due, needs)
        if not scores:
            return ModelUpdate(step, self.n_updates, {}, density_target=density)
        frozen = [
            name
            for name, layer in self._budgeted.items()
            if name not in self.layers or not layer.values.requires_grad
        ]
        masks = {
            name: scores[name].mask if name in scores else layer.topology.mask.cpu()
            for name, layer in self._budgeted.items()
        }

        def budgets_by_score(drop: Mapping[str, Tensor]) -> dict[str, int]:
            found = budgets.by_score(progress, drop, masks, frozen)
            return {name: found[name] for name in scores}

        request = UpdateRequest(
            step=step,
            number=self.n_updates + 1,
            density=density,
            fraction=fraction,
            floor=config.floor.of_lines,
            layers=scores,
            capacities={name: self.layers[name].topology.capacity for name in scores},
            budgets=budgets_by_score,
        )
        with calling("rule"):
            decision = self._rule(request)
        check_decision(decision, scores)
        compared = [*decision.masks.values()]
        for layer_scores in scores.values():
            compared += [layer_scores.mask, layer_scores.magnitude]
            compared += layer_scores.gathered.values()
        updates = {}
        for name in scores:
            with name_layer_in_errors(name):
                mask = decision.masks.get(name, scores[name].mask)
                updates[name] = place_blocks(self.layers[name].topology, mask)
        self._check_ranks(compared, step)
        updates = self._choose_weights(updates, fraction, step)
        magnitudes = {name: layer_scores.magnitude for name, layer_scores in scores.items()}
        return ModelUpdate(
            step, self.n_updates + 1, updates, decision.drop_scores, magnitudes, density
        )

    def _choose_weights(
        self, updates: dict[str, TopologyUpdate], fraction: float, step: int
    ) -> dict[str, TopologyUpdate]:
        """Return updates that also say which weights 2:4 sparse blocks keep from now on.

        Within blocks that stay, weights are exchanged; grown blocks keep random ones.
        """
        chosen, unscored = dict(updates), []
        for name, update in updates.items():
            layer, before = self.layers[name], self.layers[name].topology.positions
            if before is None:
                continue
            after = before
            if fraction and self._gatherer.records_blocks(name):
                gradient = self._gatherer.gradient_of_blocks(name)
                if gradient is None:
                    unscored.append(name)
                else:
                    stays = update.coords[:, 0] >= 0
                    stays[update.grown] = False
                    values = gather_whole(layer.values.detach())
                    after = exchange_weights(values, before, gradient, stays, fraction)
            if len(update.grown):
                generator = seeded_generator(self.config.seed, step, f"{name} weights")
                drawn = random_positions(len(update.grown), layer.block_size, generator)
                after = after.index_copy(0, update.grown.to(after.device), drawn.to(after.device))
            chosen[name] = with_positions(update, before, after)
        self._warn_about(unscored, diagnostics.unscored_weights, once="unscored weights")
        positions = [u.positions for u in chosen.values() if u.positions is not None]
        if positions:  # without them, ranks need not wait for each other once more
            self._check_ranks(positions, step)
        return chosen

    def _is_only_dropping(
        self, budgets: LayerBudgets, progress: float, names: Iterable[str]
    ) -> bool:
        """Return whether none of these layers gains blocks."""
        if self.config.distribution == "global":  # its budgets only fall
            return True
        blocks = budgets.at(progress)
        return all(blocks[name] <= self.layers[name].topology.n_blocks for name in names)

    @torch.no_grad()
    def _prepare_apply(self, tracked: TrackedOptimizer, update: ModelUpdate) -> Callable[[], None]:
        """Return a function that applies an update, and neither allocates nor can fail."""
        if not update.layers:
            return lambda: None
        assert tracked.timetable is not None
        writes = [self._gatherer.prepare_clear(update.layers)]
        writes += [
            self._prepare_layer_update(name, layer_update, tracked.steps)
            for name, layer_update in update.layers.items()
            if not layer_update.is_empty
        ]
        progress = max(tracked.progress, tracked.timetable.density_progress(tracked.steps))

        def write_all() -> None:
            for write in writes:
                write()
            tracked.progress = progress
            self.n_updates = update.number

        return write_all

    def _prepare_layer_update(
        self, name: str, update: TopologyUpdate, step: int
    ) -> Callable[[], None]:
        """Return a function that applies a layer's update, and only writes in place."""
        layer, grown_at = self.layers[name], self._grown_at[name]
        writes = [layer._prepare_update(update)]
        for copy in self._followers.copies_of(name):
            copy._adopt_blocks_of(layer)  # `load_state_dict` may have loaded other blocks
            writes.append(copy._prepare_update(update))
        writes += [
            tracked.prepare_block_update(name, update, layer.topology)
            for tracked in self._attached()
            if name in tracked.held
        ]

        def write_all() -> None:
            for write in writes:
                write()
            grown_at.index_fill_(0, update.grown, step)

        return write_all

    # Shrinking memory.

    def _needed_capacities(self) -> dict[str, int]:
        """Return the most blocks that each owned layer may hold from now on."""
        needed = {}
        for tracked in self._attached():
            if self.config.distribution == "global":  # its budgets only fall
                capacities = {name: self.layers[name].topology.n_blocks for name in tracked.owned}
            else:
                capacities = self._budgets().capacities(tracked.progress)
            needed.update({name: capacities[name] for name in tracked.owned})
        return needed

    @torch.no_grad()
    def _shrink(self) -> None:
        """Remove the slots that will stay empty, if it is time to shrink."""
        if not self.config.shrink:
            return
        needed = self._needed_capacities()
        density, attached = self.config.density, self._attached()
        is_time = should_shrink(
            sum(self.layers[name].topology.capacity for name in needed),
            sum(needed.values()),
            density.initial,
            density.final,
            min(tracked.progress for tracked in attached if tracked.owned),
        )
        if not is_time or not self._can_shrink():
            return
        for tracked in attached:
            tracked.work = None  # depends on the capacities
        try:
            for name, capacity in needed.items():
                self._shrink_layer(name, capacity)
        finally:  # even if memory ran out after some layers had shrunk
            if self._rewrap is not None:
                self._rewrap()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # makes the freed memory available to other libraries

    def _shrink_layer(self, name: str, capacity: int) -> None:
        """Remove the slots of a layer beyond the capacity that it needs.

        Layers shrink one after another, each completely or not at all: shrinking all of them at
        once would hold the old and the new slots of all of them in memory.
        """
        layer = self.layers[name]
        # A layer may hold more than its budget: it was frozen, or had too few candidate blocks.
        kept, write_layer = layer._prepare_shrink(
            min(layer.topology.capacity, max(capacity, layer.topology.n_blocks))
        )
        writes = [write_layer, self._gatherer.prepare_slot_removal(name, kept)]
        writes += [copy._prepare_shrink(len(kept))[1] for copy in self._followers.copies_of(name)]
        writes += [
            tracked.prepare_slot_removal(name, kept)
            for tracked in self._attached()
            if name in tracked.held
        ]
        grown_at = self._grown_at[name][kept.cpu()]
        with deferred_signals():
            for write in writes:
                write()
            self._grown_at[name] = grown_at

    def _can_shrink(self) -> bool:
        """Return whether parameters may change shape.

        They may not if they are sharded, compiled, or shared with other processes.
        """
        is_compiled = any(
            isinstance(module, torch._dynamo.OptimizedModule)
            or module._compiled_call_impl is not None
            for module in self.model.modules()
        )
        is_fixed = any(
            is_sharded(layer.values) or layer.is_shared for layer in self.layers.values()
        )
        if is_compiled or is_fixed or not self._may_shrink:
            return False
        if ranks.world_size() > 1 and self._rewrap is None:
            self._warn(diagnostics.fixed_memory(), once="fixed memory")
            return False
        return True

    # Detaching from optimizers.

    def reset_gathered(self) -> None:
        """Release the optimizers and discard gathered statistics, before another training.

        The position in the schedule stays. The capacities of the layers may have changed.
        """
        self._release(self._attached())
        self._gatherer.reset()
        for tracked in self._tracked:
            tracked.pending.clear()
        for name, grown_at in self._initial_grown_at().items():
            if len(self._grown_at[name]) != len(grown_at):
                self._grown_at[name] = grown_at

    def detach(self) -> None:
        """Stop following the optimizers, and forget the functions passed to `attach`.

        Warns if the training has not reached the final density; if no step was seen; or if the
        sparsifier was never attached.
        """
        if not self.is_attached:
            if not self._tracked:
                self._warn(diagnostics.never_attached(), once="never attached")
            return
        text = None
        # When an exception is propagating, do not also warn about its consequences.
        if sys.exc_info()[0] in (None, KeyboardInterrupt):
            attached = self._attached()
            if any(tracked.steps or tracked.skipped for tracked in self._tracked):
                text = diagnostics.density_shortfall(
                    self.layers, self.follows, self._budgets(), attached
                )
            text = text or diagnostics.no_step(self.layers, attached)
        self._release(self._attached())
        self._rewrap, self._planned = None, None
        self._followers.external_copies = no_external_copies
        self._may_shrink = True
        self._warn(text)

    def _release(self, attached: Iterable[TrackedOptimizer]) -> None:
        """Release optimizers and, with the last one, unlock the layers."""
        for tracked in attached:
            self._gatherer.arm([], tracked.owned)
            tracked.detach()
        if not self.is_attached:
            for layer in self.layers.values():
                layer._is_locked = False
            if self._global_watch is not None:
                self._global_watch.remove()
                self._global_watch = None

    def _warn(self, text: str | None, once: str | None = None) -> None:
        """Warn on rank 0 if there is a text; with `once`, only for the first text of that kind."""
        if text is None or once in self._warned:
            return
        if once is not None:
            self._warned.add(once)
        if ranks.is_rank_zero():
            warnings.warn(text, stacklevel=2)

    def _not_yet_named(self, kind: str, names: Iterable[str]) -> list[str]:
        """Return the names that no warning of a kind has named yet, and remember them."""
        new = [name for name in names if f"{kind} {name}" not in self._warned]
        self._warned.update(f"{kind} {name}" for name in new)
        return new

    def _warn_about(
        self, names: Sequence[str], text: Callable[[Sequence[str]], str], once: str | None = None
    ) -> None:
        """Warn with a text about these names, if there are any."""
        self._warn(text(names) if names else None, once)

    # Saving and resuming.

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs: tensors on the CPU and primitives.

        The blocks themselves are in the model's state dict. If another state dict of the model was
        loaded since the last step, the optimizer's state is first brought in line with it.
        """
        self._adapt_to_loaded_blocks()
        return self._current_state()

    def _current_state(self) -> dict[str, Any]:
        """Return `state_dict` without adapting, as the optimizer's state may still be loaded."""
        state = {
            "config": self.config.training_options(),
            "total_steps": self.total_steps,
            "resolved_by": self._resolved_by,
            "timetable": None if self._timetable is None else self._timetable.as_dict(),
            "courses": [tracked.state_dict() for tracked in self._tracked],
            "n_updates": self.n_updates,
            "born": {name: grown_at.clone() for name, grown_at in self._grown_at.items()},
            "gathered": self._gatherer.state_dict(),
        }
        if hasattr(self._rule, "state_dict"):
            state["rule"] = self._rule.state_dict()
            check_is_data(state["rule"])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state of a saved training, after the model's own `load_state_dict`.

        Call this before `attach`, so that layers can still take the saved capacity; or, to roll a
        training back, while attached and with the same capacities.

        Raises:
            ValueError: if the saved training had another configuration, or another version of this
                package wrote the state.
        """
        check_same_training(state, self._current_state())
        self._find_loaded_blocks()
        self._loaded_pending = {*self._loaded_over}
        states = {t.optimizer: t.state_at_last_step for t in self._attached()}
        self._release(self._attached())
        self.total_steps = self.total_steps or state["total_steps"]
        self._resolved_by, self.n_updates = state["resolved_by"], state["n_updates"]
        table = state["timetable"]
        self._timetable = None if table is None else Timetable(**table)
        self._tracked = [TrackedOptimizer.from_state(saved) for saved in state["courses"]]
        restored = {name: grown_at.clone() for name, grown_at in state["born"].items()}
        self._grown_at = {**self._initial_grown_at(), **restored}
        self._gatherer.load_state_dict(state["gathered"])
        if "rule" in state and hasattr(self._rule, "load_state_dict"):
            self._rule.load_state_dict(state["rule"])
        if states:
            self.attach(*states)
            for tracked in self._attached():
                tracked.state_at_last_step = states[tracked.optimizer]


def check_same_training(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a training can be resumed from the saved state of a sparsifier.

    Args:
        saved: state of the saved training.
        current: state of the training that is about to load it.

    Raises:
        ValueError: if another version of this package wrote the state, or if the configuration
            differs: a changed schedule would apply in part only.
    """
    missing = sorted(current.keys() - saved.keys())
    if missing:
        raise ValueError(
            f"The saved state of the sparsity must hold {', '.join(map(repr, missing))}; got none. "
            "Resume with the version of sparse_lightning that wrote it."
        )
    # The saved state may come from before an option existed.
    before = {**SparsityConfig().training_options(), **saved["config"]}
    now = current["config"]
    differing = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    if differing:
        got = ", ".join(f"{key}={now.get(key)!r} (was {before.get(key)!r})" for key in differing)
        remedy = "load only the model's state dict, after `sparsify`"
        if "nm" in differing:  # a state dict brings its own pattern
            remedy = "make them dense by `sparse-lightning export --to dense`"
        raise ValueError(
            "The sparsity must be configured as before when a training is resumed; got "
            f"{got}. Restore the earlier values, or start a new training from the saved weights: "
            f"{remedy}."
        )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Run PyTorch's CPU ops on this thread, as grids are too small to profit from more threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
