"""`Sparsifier`: dynamic block sparsity of a model, driven by the steps of its optimizers.

What is decided lives in `schedules`, `distributions`, `criteria`, `rules` and `evolution`; how it
is done in `patching`, `linear`, `gathering` and `optimizer_state`. Here it is put together: a step
is seen at the optimizer, evidence is taken in, and an update is applied wholly or not at all.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_lightning import ranks
from sparse_lightning.config import SparsityConfig, configured
from sparse_lightning.course import Course, naming
from sparse_lightning.following import Following, none_elsewhere
from sparse_lightning.gathering import Gatherer
from sparse_lightning.linear import BlockSparseLinear, density_of
from sparse_lightning.names import check_layers_found, is_chosen, patterns_of
from sparse_lightning.optimizer_state import check_state, class_of, drop_dense_state
from sparse_lightning.patching import SparsityReport, SwapOptions, swap_layers
from sparse_lightning.policy.criteria import BlockScores, needed_by, seeded_generator
from sparse_lightning.policy.distributions import Grid
from sparse_lightning.policy.evolution import ModelUpdate, TopologyUpdate, place_blocks
from sparse_lightning.policy.lookup import calling
from sparse_lightning.policy.rules import UpdateRequest, check_decision, check_is_data, check_rule
from sparse_lightning.policy.schedules import Timetable, should_shrink
from sparse_lightning.resume import check_same_training
from sparse_lightning.selection import sparse_layers
from sparse_lightning.sharding import check_whole_blocks, is_sharded
from sparse_lightning.stepping import AnyStepWatch, StepWatch, innermost, is_within

# In so many steps every layer that trains should have had a gradient.
_SILENT_STEPS = 10

UpdateHook = Callable[["Sparsifier", ModelUpdate], None]


class Sparsifier:
    """Makes a model's linear layers block-sparse, and evolves their blocks while it trains.

    It swaps the layers when it is made. Then `attach` it to the optimizer: from there on steps
    count and updates run by themselves, in the optimizer's hooks, and an update is over before a
    scheduler, an average or a checkpoint looks at the model. A step is one of the optimizer that
    holds a layer; with several optimizers each counts its own.

    Whoever drives the training may offer services, all of them to `attach`: to rebuild what was
    built for parameters of another shape (`rewrap`), to find copies of a layer (`copies`), and to
    say how many steps an optimizer is going to take (`planned`). Everything else is done here:
    ranks agree by `torch.distributed` where it is initialised, updates are all or nothing, and
    `state_dict` holds what a resumed training needs beside those of the model and the optimizer.

    Args:
        model: is changed in place.
        total_steps: optimizer steps of the training; None if all times are given in steps. Of a
            training that is resumed it may be another: what was resolved by it stays.
        config: everything that can be told, instead of `options`.
        options: the keywords of `SparsityCallback`; `monitor` means nothing here.

    Attributes:
        model: as given.
        layers: the `BlockSparseLinear`s that it evolves, by name.
        report: `SparsityReport` of the swap.
        total_steps: as given.
        last_update: `ModelUpdate` of the latest topology update, or None.
        n_updates: updates so far.

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
            raise TypeError("`config` must be given alone; got options beside it.")
        self.config = configured(options) if config is None else config
        is_count = isinstance(total_steps, int) and not isinstance(total_steps, bool)
        if total_steps is not None and not (is_count and total_steps >= 1):
            raise ValueError(
                f"`total_steps` must be an integer of at least 1, or None; got {total_steps!r}."
            )
        self.model = model
        self.total_steps = total_steps
        self._rule = self.config.update_rule
        # The steps that fractions are of: a resumed training keeps those of its beginning.
        self._resolved_by: int | None = None
        self._timetable: Timetable | None = None
        if total_steps is not None:  # an error in the times is told before the model is changed
            self._resolve_times()
        check_rule(self._rule)
        needs = needed_by([self._rule])
        sparse = {id(layer) for _, layer in sparse_layers(model)}
        self.report = self._swap()
        self._following = Following(model, self._options, self.report.follows)
        self.layers = self._managed()
        # Those that share the budget: also copies that are only known as such once there is an
        # optimizer, so that the budgets of the others stay what they were.
        self._sharing = dict(self.layers)
        own = {name: of for name, of in self.report.layers.items() if name in self.layers}
        self.report = replace(self.report, layers=own)
        self._swapped = [name for name, layer in self.layers.items() if id(layer) not in sparse]
        self._agreed = False
        self._agree()
        self._gatherer = Gatherer(self.layers, needs, self.config.token_stride)
        self._hooks: OrderedDict[int, UpdateHook] = OrderedDict()
        self._courses: list[Course] = []
        self._born = self._age_zero()
        self.n_updates = 0
        self.last_update: ModelUpdate | None = None
        self._rewrap: Callable[[], None] | None = None
        self._planned: Callable[[Optimizer, int], int] | None = None
        self._may_shrink = True
        self._others: AnyStepWatch | None = None
        self._told: set[str] = set()

    # Before the training.

    def _resolve_times(self) -> None:
        self._timetable = self.config.timetable(self.total_steps)
        self._resolved_by = self.total_steps

    def _timetable_until(self, end: int) -> Timetable:
        """Return the timetable of a training that is over after so many steps.

        Raises:
            ValueError: if these are so few that its times would be out of order.
        """
        total = end
        if self._resolved_by is not None and self.total_steps is not None:
            total = max(1, round(end * self._resolved_by / self.total_steps))
        return replace(self.config.timetable(total), total_steps=end)

    def _swap(self) -> SparsityReport:
        config = self.config

        def budgets(grids: Mapping[str, Grid]) -> tuple[dict[str, int], dict[str, int]]:
            check_layers_found(config.layer_density, grids)
            return config.budgets_at(0.0, grids), config.capacities(grids)

        return swap_layers(self.model, self._options, budgets)

    @property
    def _options(self) -> SwapOptions:
        config = self.config
        return SwapOptions(
            config.block_size,
            config.include,
            config.exclude,
            config.init,
            config.seed,
            config.floor,
            config.follow,
        )

    def _managed(self) -> dict[str, BlockSparseLinear]:
        """Return the block-sparse layers that the patterns choose, without copies."""
        include, exclude = self.config.include, self.config.exclude
        return {
            name: layer
            for name, layer in sparse_layers(self.model)
            if is_chosen(name, include, exclude) and name not in self.follows
        }

    def _age_zero(self) -> dict[str, Tensor]:
        """Return the step at which the block of each slot was grown: int32 `[capacity]`."""
        return {
            name: torch.zeros(layer.topology.capacity, dtype=torch.int32, device="cpu")
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def _agree(self) -> None:
        """Take over rank 0's blocks and values."""
        if self._agreed or ranks.world_size() == 1:
            return
        for layer in [*self.layers.values(), *map(self._following.layer, self.follows)]:
            # Of sharded values each rank has drawn its own part; those on meta are yet to come.
            has_values = layer.values.device.type != "meta" and not is_sharded(layer.values)
            own = layer.topology.coords.cpu(), layer.values.detach().cpu() if has_values else None
            coords, values = ranks.of_rank_zero(own)
            layer.topology.assign_(coords)
            if values is not None:
                layer.values.copy_(values)
            elif layer.values.device.type != "meta":
                layer.clear_empty_slots()
        self._agreed = True

    def attach(
        self,
        *optimizers: Any,
        rewrap: Callable[[], None] | None = None,
        copies: Callable[[str], Iterable[BlockSparseLinear]] | None = None,
        planned: Callable[[Optimizer, int], int] | None = None,
        shrink: bool = True,
    ) -> None:
        """Follow the steps of optimizers from now on, until `detach`.

        Call it once everything is built, wrapped and restored; again for further optimizers. A
        layer follows the first of those that hold it. Each may be wrapped, as by Accelerate.

        Args:
            optimizers: that hold the layers' parameters.
            rewrap: is called after layers have given up memory, to build anew what holds gradients
                of the old shapes: `DistributedDataParallel` above all. On several ranks nothing
                shrinks without it.
            copies: from a layer's name to further copies of the layer, such as averages, which
                follow its blocks.
            planned: from an optimizer, and the steps that it has taken, to those that it will have
                taken when the training ends; for a training that learns this on its way. Without
                it, these are `total_steps` less those that did not count.
            shrink: False where something keeps parameters in their shape, such as a compiled
                wrapper of the whole model.

        Raises:
            ValueError, TypeError, RuntimeError: for an optimizer whose state cannot follow the
                blocks, or whose steps cannot be seen; if a fraction is given as a time and
                `total_steps` is not; if layers do not have the blocks that the schedule needs.
        """
        for argument, offered in (("rewrap", rewrap), ("copies", copies), ("planned", planned)):
            if offered is not None and not callable(offered):
                raise TypeError(f"`{argument}` must be a function, or None; got {offered!r}.")
        if not isinstance(shrink, bool):
            raise TypeError(f"`shrink` must be true or false; got {shrink!r}.")
        before = self._attached()
        for name, layer in self.layers.items():
            if layer.locked and not before:
                raise RuntimeError(
                    "A layer must be evolved by one Sparsifier at a time; got one that another is "
                    f"attached for (layer '{name}'). Call `detach()` of that one first, or fit a "
                    "new model."
                )
        has_begun = any(course.steps for course in self._courses)
        if not has_begun and not before:
            self._courses.clear()  # of a training that took no step
            self._timetable = None
        if self._timetable is None:
            self._resolve_times()
        self._rewrap, self._planned = rewrap or self._rewrap, planned or self._planned
        self._following.elsewhere = copies or self._following.elsewhere
        self._may_shrink = self._may_shrink and shrink
        if not has_begun:
            self._agree()
        try:
            for optimizer in map(innermost, optimizers):
                self._attach(optimizer)
            self._set_copies(self._copies_now())
            self._check_layers()
        except BaseException:
            self._let_go([course for course in self._attached() if course not in before])
            raise
        for layer in self.layers.values():
            layer.locked = True
        self._warn_of_late_layers()
        self._warn_of_frozen_layers()
        self._warn_of_sudden_falls()
        self._warn_of_rises_without_growth()
        for course in self._attached():
            self._arm(course)
        self._told.discard("others")
        if self._others is None:
            self._others = AnyStepWatch(self._look_at)

    def exchange(self, before: Iterable[Any], now: Iterable[Any]) -> bool:
        """Follow other optimizers from now on, where these have taken the place of attached ones.

        The schedule, its steps and what waits for a step go on: each goes on where the one at its
        place was, and one more than there were where the last one is.

        Args:
            before: optimizers that are attached.
            now: those in their place.

        Returns:
            Whether these are not the same; if they are, nothing is done.

        Raises:
            ValueError, TypeError, RuntimeError: as `attach`.
        """
        # One may stand in a list twice.
        gone, new = ([*dict.fromkeys(map(innermost, each))] for each in (before, now))
        if gone == new:
            return False
        places = [course for course in self._attached() if course.optimizer in gone]
        stay = [c for c in self._attached() if c not in places and c.optimizer not in new]
        others = [course.optimizer for course in stay]
        self._let_go(self._attached())
        while len(places) < len(new):
            places.append(Course.from_state(places[-1].state_dict()) if places else Course())
        # `attach` goes through them in this order.
        first = [*places[: len(new)], *stay]
        rest = [course for course in [*places, *self._courses] if course not in first]
        self._courses = [*first, *dict.fromkeys(rest)]
        self.attach(*new, *others)
        return True

    def _attach(self, optimizer: Optimizer) -> None:
        if any(course.optimizer is optimizer for course in self._courses):
            return
        place = sum(course.optimizer is not None for course in self._courses)
        if place == len(self._courses):
            self._courses.append(Course())
        course = self._courses[place]
        course.optimizer, course.groups = optimizer, []
        if course.timetable is None:
            course.length = course.end = self.total_steps
            course.timetable = self._timetable
            assert course.timetable is not None
            course.next_update = course.timetable.next_update(course.steps)
        elif course.length != self.total_steps and self.total_steps is not None:
            # A training that is resumed ends at another time: no density moves, and no update.
            course.length, course.end = self.total_steps, self.total_steps - course.skipped
            course.timetable = replace(course.timetable, total_steps=course.end)
            course.next_update = course.timetable.next_update(course.updated)
        self._look_up(course)
        course.watch = StepWatch(
            optimizer,
            partial(self._wants_gradients, course),
            partial(self._read, course),
            partial(self._over, course),
        )

    @property
    def follows(self) -> dict[str, str]:
        """The layers that are copies of one of `layers`, and have its blocks, `{copy: original}`.

        They are frozen or in no optimizer, and equal another layer. What is in no optimizer is
        known once an optimizer is attached.
        """
        return self._following.follows

    def _copies_now(self) -> dict[str, str]:
        """Return which layers are copies by now, of layers that attached optimizers train."""
        optimizers = [course.optimizer for course in self._attached() if course.optimizer]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        held = {id(parameter) for group in groups for parameter in group["params"]}
        return self._following.found(held, self._sharing, self.layers)

    def _set_copies(self, follows: dict[str, str], settled: bool = False) -> None:
        """Have layers follow others from here on, and those that no longer do evolve again.

        Args:
            follows: `{copy: original}`.
            settled: whether all optimizers are known.
        """
        before, self._following.follows = self.follows, follows
        layers = {name: layer for name, layer in self._sharing.items() if name not in follows}
        for name in self.layers.keys() - layers.keys():
            self._gatherer.arm([], {name: self.layers[name].values})
            self.layers[name].locked = False
        self.layers.clear()  # the gatherer knows this dictionary
        self.layers.update(layers)
        for course in self._attached():
            course.groups = []
            self._look_up(course)
            for name in follows:
                course.pending.pop(name, None)
            course.waiting = [name for name in course.waiting if name not in follows]
        for layer in layers.values():
            layer.locked = self.is_attached
        for copy, original in follows.items():
            found, of = self._following.layer(copy), self.layers[original]
            # A further optimizer may be attached that holds it, and it may have learnt before.
            if copy not in before and (settled or self._following.is_equal(found, of)):
                with naming(copy):
                    found.take_blocks_of(of)
        of_layers = {n: of for n, of in self.report.layers.items() if n not in follows}
        self.report = replace(self.report, layers=of_layers, follows=dict(follows))
        lost = sorted(before.keys() - follows.keys() - self._sharing.keys())
        new = sorted(follows.items() - before.items())
        if settled and new:
            told = ", ".join(f"{copy} follows {original}" for copy, original in new)
            self._warn(f"Copies of block-sparse layers were found in training: {told}.")
        if lost:
            self._warn(
                f"Block-sparse layers that followed others are trained now: {', '.join(lost)}. "
                "They follow no longer, and their blocks stay."
            )

    def _warn_of_frozen_layers(self) -> None:
        """Name the layers that were frozen after they had lost blocks, and nobody asked for."""
        frozen = [
            name
            for name in self._swapped
            if name in self.layers
            and not self.layers[name].values.requires_grad
            and name not in self.config.include
        ]
        if frozen and not any(course.steps for course in self._courses):
            self._warn(
                f"Block-sparse layers are frozen: {', '.join(frozen)}. As long as they are, they "
                "cannot learn to do with the blocks that they have. Frozen layers stay dense if "
                "they are frozen before they are swapped: under Lightning in __init__ or setup, or "
                "by a callback that stands before SparsityCallback.",
                once="frozen",
            )

    def _warn_of_late_layers(self) -> None:
        include, exclude = self.config.include, self.config.exclude
        late = [
            name
            for name, _ in sparse_layers(self.model)
            if is_chosen(name, include, exclude)
            and name not in self._sharing
            and name not in self.follows
        ]
        if late:
            self._warn(
                "Block-sparse layers are evolved if they are there when the Sparsifier is made; "
                f"their blocks stay: {', '.join(late)}. Make it after them, or freeze those that "
                "are copies of others.",
                once="late",
            )

    @property
    def is_attached(self) -> bool:
        """Whether it follows an optimizer."""
        return bool(self._attached())

    def _attached(self) -> list[Course]:
        return [course for course in self._courses if course.optimizer is not None]

    def _look_up(self, course: Course) -> None:
        """Find the layers that an optimizer holds, if its groups are not as they were."""
        assert course.optimizer is not None
        groups = [(id(g["params"]), len(g["params"])) for g in course.optimizer.param_groups]
        if groups == course.groups:
            return
        ids = {id(p) for group in course.optimizer.param_groups for p in group["params"]}
        held = {n: layer.values for n, layer in self.layers.items() if id(layer.values) in ids}
        anew = []
        for name in (name for name in held if name not in course.held):
            layer = self.layers[name]
            if drop_dense_state(
                course.optimizer, held[name], (layer.out_features, layer.in_features)
            ):
                anew.append(name)
            with naming(name):
                check_state(course.optimizer, held[name])
                check_whole_blocks(held[name])
                _check_steps_after_backward(held[name])
        earlier = self._courses[: self._courses.index(course)]
        others = {name for other in earlier for name in other.held}
        course.groups, course.held, course.work = groups, held, None
        course.unseen = [*held]
        course.own = {name: values for name, values in held.items() if name not in others}
        if anew:
            self._warn(
                "The optimizer had state of layers from before they were block-sparse, or had as "
                "many slots, which tells nothing of their blocks; it begins anew for them: "
                f"{', '.join(anew)}. Make layers block-sparse before its first step, and leave it "
                "attached, to lose none."
            )

    def _check_layers(self) -> None:
        holders = [course for course in self._attached() if course.own]
        if self.config.distribution == "global" and len(holders) > 1:
            raise ValueError(
                "`distribution` must not be 'global' where layers are in several optimizers, which "
                f"step at times of their own; got {len(holders)} that hold some. Take 'uniform' or "
                "'erdos_renyi', or one optimizer."
            )
        needed = self._most_needed()
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
        for name in self._in_no_optimizer():
            raise RuntimeError(
                "`values` must be in an optimizer, or the layer would not train; got none that "
                f"holds it (layer '{name}'). Build the optimizer from the model's parameters once "
                "its layers are block-sparse: under Lightning in configure_optimizers, not in "
                "__init__. If it is a copy of another layer, say of which by `follow`."
            )

    def _in_no_optimizer(self) -> list[str]:
        """Return the layers that can train, but that no attached optimizer holds."""
        held = {name for course in self._attached() for name in course.held}
        return [n for n, m in self.layers.items() if m.values.requires_grad and n not in held]

    def _warn_of_layers_in_no_optimizer(self) -> None:
        missing = self._in_no_optimizer()
        if missing:
            self._warn(
                "Block-sparse layers are in no optimizer that is attached, so their blocks stay: "
                f"{', '.join(missing)}. Call `attach` with the optimizer that holds them; if they "
                "are copies of others, say of which by `follow`.",
                once="held",
            )

    def _check_ranks(self, tensors: Iterable[Tensor], step: int) -> None:
        if self.layers:
            device = next(iter(self.layers.values())).values.device
            ranks.check_alike(tensors, step, device)

    def _warn_of_sudden_falls(self) -> None:
        table, started = self._timetable, any(course.steps for course in self._courses)
        if started or table is None or self.config.density.schedule == "one_shot":
            return
        share, step = self.config.largest_fall(table, self._grids())
        if share > 0.5:
            self._warn(
                f"One topology update, at step {step}, drops {share:.0%} of the blocks, as there "
                "are few updates while the density falls. Give a smaller `update.every_n_steps`, "
                "or let the density fall longer.",
                once="fall",
            )

    def _warn_of_rises_without_growth(self) -> None:
        rising = self.config.rising_without_growth(self._grids())
        if rising:
            self._warn(
                "The density is to rise where `grow` is 'none', so that no block can be added: it "
                f"stays for {', '.join(rising)}. Take grow='gradient', 'momentum' or 'random', or "
                "a density that does not rise.",
                once="rise",
            )

    def _grids(self) -> dict[str, Grid]:
        return {name: layer.topology.grid for name, layer in self._sharing.items()}

    # What a training has come to.

    @property
    def density(self) -> float:
        """Present blocks / all blocks of the layers together."""
        return density_of(self.layers.values())

    @property
    def is_final(self) -> bool:
        """Whether the density is where its schedule ends, for all layers that train."""
        if self.config.density_is_constant:
            return True
        training = [
            course
            for course in self._attached()
            if any(values.requires_grad for values in course.own.values())
        ]
        # While detached nobody holds any; but only of those that did a step has counted.
        training = training or [course for course in self._courses if course.steps]
        return bool(training) and all(
            course.progress >= 1 and not course.waiting for course in training
        )

    @property
    def timetable(self) -> Timetable | None:
        """The resolved steps; of several optimizers, those of the first that holds a layer."""
        course = self._main_course()
        return self._timetable if course is None else course.timetable

    @property
    def steps(self) -> int:
        """Steps that counted so far; of several optimizers, of the first that holds a layer."""
        course = self._main_course()
        return 0 if course is None else course.steps

    @property
    def window(self) -> int:
        """Steps up to an update in which dense gradients are gathered."""
        return self._gatherer.window

    def _main_course(self) -> Course | None:
        holders = [course for course in self._attached() if course.own]
        # While detached nobody holds any; but only of those that did a step has counted.
        counted = [course for course in self._courses if course.steps]
        return next(iter([*holders, *counted, *self._courses]), None)

    def register_update_hook(self, hook: UpdateHook) -> RemovableHandle:
        """Have a function called with this and each `ModelUpdate`, once it has been applied.

        Returns:
            a handle whose `remove()` ends that.
        """
        if not callable(hook):
            raise TypeError(
                "`hook` must be a function of the sparsifier and a ModelUpdate; "
                f"got {type(hook).__name__}."
            )
        handle = RemovableHandle(self._hooks)
        self._hooks[handle.id] = hook
        return handle

    # A step.

    def _wants_gradients(self, course: Course) -> bool:
        return bool(course.pending) or self._gatherer.reads_gradients

    def _read(self, course: Course, scale: float) -> None:
        """Read the final gradients of an optimizer, right before it applies them."""
        self._look_up(course)
        if self._gatherer.reads_gradients:
            if course.work is None:
                course.work = self._gatherer.work_of(course.own)
            self._gatherer.read(course.work, course.own, scale)
        if course.pending:
            course.warm_up(scale)

    def _over(self, course: Course, was_skipped: bool) -> None:
        """Take in a step of an optimizer, if it counts."""
        if not was_skipped:
            self._look_up(course)
            if not course.held:
                self._warn_of_none_held(course)
            for values in course.held.values():
                if values.grad is not None:
                    self._step(course)
                    return
            if self._a_copy_trains():
                self._set_copies(self._copies_now())
                self._step(course)
                return
        self._skip(course)

    def _look_at(self, optimizer: Optimizer) -> None:
        """Look at a step of any optimizer, for one that is not attached and steps the layers."""
        attached = [course.optimizer for course in self._attached() if course.optimizer is not None]
        if "others" in self._told or any(optimizer is each for each in attached):
            return
        known = {id(layer.values): name for name, layer in self._sharing.items()}
        names = [
            known[id(parameter)]
            for group in optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in known and parameter.grad is not None
        ]
        if not names or any(is_within(each, optimizer) for each in attached):
            return
        if any(is_within(optimizer, each) for each in attached):
            return
        self._warn(
            f"Block-sparse layers are stepped by {class_of(optimizer)}, an optimizer that is not "
            f"attached: {', '.join(names)}. Its steps do not count, and its state does not follow "
            "the blocks. If it has taken the place of the one that is attached, call `detach()` "
            "and then `attach` with it; if both step, call `attach` with it, too.",
            once="others",
        )

    def _a_copy_trains(self) -> bool:
        """Whether a layer that is known as a copy has a gradient, as one that is thawed."""
        copies = [self._following.layer(copy).values for copy in self.follows]
        return any(values.requires_grad and values.grad is not None for values in copies)

    def _warn_of_none_held(self, course: Course) -> None:
        missing = self._in_no_optimizer()
        if missing:
            self._warn(
                f"The optimizer that is attached, {class_of(course.optimizer)}, holds none of the "
                "block-sparse layers, so its steps do not count; in no optimizer that is attached "
                f"are: {', '.join(missing)}. Call `attach` with the optimizer that holds them.",
                once="held",
            )

    def _skip(self, course: Course) -> None:
        """Forget a step that did not count."""
        course.skipped += 1
        self._gatherer.drop_evidence(course.armed)
        if self._planned is None and course.end is not None:
            # One of those that were planned is lost.
            self._plan(course, max(course.end - 1, course.steps))
            self._arm(course)  # the next update may have come nearer

    def _step(self, course: Course) -> None:
        """Take in a step that an optimizer has taken."""
        if course.steps == 0:
            self._warn_of_layers_in_no_optimizer()
        course.count()
        if course.seen < _SILENT_STEPS:
            self._note_learning(course.own)
        self._warn_of_silent(course.look_for_silent(_SILENT_STEPS))
        if self._gatherer.reads_gradients:
            self._gatherer.confirm(course.own)
        if course.armed:
            self._gatherer.take(course.armed)
        if self._planned is not None:
            assert course.optimizer is not None
            self._plan(course, self._planned(course.optimizer, course.steps))
        is_due = course.next_update is not None and course.steps >= course.next_update
        if is_due or course.waiting:
            self._update(course, is_due)
        self._arm(course)

    def _note_learning(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Note which layers were trained in a step."""
        for name, values in parameters.items():
            if values.grad is not None:
                self.layers[name].has_learnt = True

    def _plan(self, course: Course, end: int) -> None:
        """Follow what is known of the number of steps by now."""
        if end == course.end:
            return
        if isinstance(end, bool) or not isinstance(end, int) or end < course.steps:
            raise ValueError(
                f"`planned` must return an integer of at least {course.steps}, the steps that were "
                f"taken; got {end!r}."
            )
        try:
            course.timetable = self._timetable_until(end)
        except ValueError:  # so few that the times would be out of order
            return
        course.end = end
        course.next_update = course.timetable.next_update(course.updated)

    def _arm(self, course: Course) -> None:
        """Gather dense gradients in the next step where they will be needed."""
        window = self._gatherer.window
        if not window:
            return
        near = course.next_update is not None and course.steps + window >= course.next_update
        if not (near or course.waiting or course.armed):
            return
        names = [
            name
            for name, values in course.own.items()
            if values.requires_grad and (near or name in course.waiting)
        ]
        self._gatherer.arm(names, course.own)
        course.armed = names

    # A topology update.

    @torch.no_grad()
    def _update(self, course: Course, is_due: bool) -> None:
        """Update the layers that are due, or that waited, as far as they were scored."""
        assert course.timetable is not None
        self._note_learning(course.own)
        copies = self._copies_now()
        if copies != self.follows:
            self._set_copies(copies, settled=True)
        due = [
            name
            for name, values in course.own.items()
            if values.requires_grad and (is_due or name in course.waiting)
        ]
        self._warn_of_references(course)
        with _one_thread():
            update = self._decide(course, due)
            if update.layers:
                self._apply(course, update)
        if is_due:
            course.updated = course.steps
            course.next_update = course.timetable.next_update(course.steps)
        course.waiting = [name for name in due if name not in update.layers]
        # One that was not asked in this step, as nobody knew of the update, is not to blame.
        asked = course.armed if self._gatherer.window else due
        self._warn_of_waiting(course.steps, [name for name in course.waiting if name in asked])
        if update.layers:
            if "reference" not in self._told:
                self._following.note(course.own)
            self._warn_of_copies_elsewhere()
            self.last_update = update
            try:
                self._shrink()
            finally:  # short of memory or not, the update has been applied
                for hook in [*self._hooks.values()]:
                    hook(self, update)

    def _scores(
        self, course: Course, names: list[str], needs: Collection[str]
    ) -> dict[str, BlockScores]:
        """Return what is known of the layers that took part in the step, and were scored."""
        if not names:
            return {}
        parameters = [course.own[name] for name in names]
        has_gradient = [values.grad is not None for values in parameters]
        took_part = ranks.on_any_rank(has_gradient, parameters[0].device)
        step, seed = course.steps, self.config.seed
        return self._gatherer.scores_of(
            [name for name, did in zip(names, took_part, strict=True) if did],
            needs,
            step,
            lambda name: seeded_generator(seed, step, name),
            {name: (step - self._born[name]).int() for name in names},
        )

    def _decide(self, course: Course, due: list[str]) -> ModelUpdate:
        """Decide an update of those due layers that were scored; nothing is changed."""
        config, table, step = self.config, course.timetable, course.steps
        assert table is not None
        progress = max(course.progress, table.density_progress(step))
        density = config.density_at(progress)
        fraction = config.drop_fraction_at(table.update_progress(step))
        asked = not self._gatherer.window or set(due) <= set(course.armed)
        if step == table.total_steps and (step < table.update_until or not asked):
            # The training ends before its schedule, or nobody knew that this is its last step: the
            # density comes as far as it shall, and nothing is grown that would not learn.
            fraction = 0.0
        needs = self._gatherer.needs
        if not fraction and self._only_falls(progress, due):
            needs = getattr(self._rule, "needs_to_drop", needs)
        scores = self._scores(course, due, needs)
        if not scores:
            return ModelUpdate(step, self.n_updates, {}, density_target=density)
        frozen = [
            name
            for name, layer in self._sharing.items()
            if name not in self.layers or not layer.values.requires_grad
        ]
        masks = {
            name: scores[name].mask if name in scores else layer.topology.mask.cpu()
            for name, layer in self._sharing.items()
        }
        request = UpdateRequest(
            step=step,
            number=self.n_updates + 1,
            density=density,
            fraction=fraction,
            floor=(config.floor.row, config.floor.column),
            layers=scores,
            capacities={name: self.layers[name].topology.capacity for name in scores},
            budgets=lambda drop: _only(
                config.budgets_by_score(progress, drop, masks, frozen), scores
            ),
        )
        with calling("rule"):
            decision = self._rule(request)
        check_decision(decision, scores)
        known = [*decision.masks.values()]
        for of in scores.values():
            known += [of.mask, of.magnitude, *of.gathered.values()]
        self._check_ranks(known, step)
        updates = {}
        for name in scores:
            with naming(name):
                mask = decision.masks.get(name, scores[name].mask)
                updates[name] = place_blocks(self.layers[name].topology, mask)
        magnitudes = {name: of.magnitude for name, of in scores.items()}
        return ModelUpdate(
            step, self.n_updates + 1, updates, decision.drop_scores, magnitudes, density
        )

    def _only_falls(self, progress: float, names: Iterable[str]) -> bool:
        """Whether no layer of these is to have more blocks than it has."""
        if self.config.distribution == "global":
            return True
        budgets = self.config.budgets_at(progress, self._grids())
        return all(budgets[name] <= self.layers[name].topology.n_blocks for name in names)

    @torch.no_grad()
    def _apply(self, course: Course, update: ModelUpdate) -> None:
        """Make an update real: what takes memory or can fail comes before anything is written."""
        assert course.timetable is not None
        writes = [self._gatherer.prepare_anew(update.layers)]
        writes += [
            self._prepare(name, of_layer, course.steps)
            for name, of_layer in update.layers.items()
            if len(of_layer.changed)
        ]
        progress = max(course.progress, course.timetable.density_progress(course.steps))
        for write in writes:
            write()
        course.progress = progress
        self.n_updates = update.number

    def _prepare(self, name: str, update: TopologyUpdate, step: int) -> Callable[[], None]:
        """Return what makes an update of a layer real, and only writes in place."""
        layer, born = self.layers[name], self._born[name]
        writes = [layer.prepare_update(update)]
        for copy in self._following.copies_of(name):
            copy.take_blocks_of(layer)  # where it was given others, as by `load_state_dict`
            writes.append(copy.prepare_update(update))
        writes += [
            course.prepare_update(name, update, layer.topology.capacity)
            for course in self._attached()
            if name in course.held
        ]

        def write() -> None:
            for each in writes:
                each()
            born.index_fill_(0, update.grown, step)

        return write

    def _warn_of_silent(self, names: Collection[str]) -> None:
        if names:
            self._warn(
                f"Block-sparse layers had no gradient in {_SILENT_STEPS} steps, while others had: "
                f"{', '.join(sorted(names))}. Does `forward` call these layers, and does the loss "
                "depend on what they return? A copy of other layers, as in a target network, "
                "is to be frozen or in no optimizer: it then follows their blocks."
            )

    def _warn_of_references(self, course: Course) -> None:
        """Name copies to which nobody has written from one update to the next."""
        if "reference" not in self._told and (same := self._following.unwritten(course.own)):
            self._warn(
                "Copies of layers were not written to from one topology update to the next: "
                f"{', '.join(same)}. For a target or a teacher that is written to now and then "
                "that is right: it has the blocks of its original. But a reference that is to "
                f"compute what it did before has to be excluded: exclude={patterns_of(same)}.",
                once="reference",
            )

    def _warn_of_copies_elsewhere(self) -> None:
        """Name the layers of which there are copies that nobody has told of."""
        # What was replaced in the model is still known here.
        others = self._sharing.values()
        if "elsewhere" not in self._told and (
            names := self._following.strangers(self.layers, others)
        ):
            self._warn(
                "There are copies of block-sparse layers outside of the model: "
                f"{', '.join(names)}. They do not follow its blocks, as suits what is kept to look "
                "at later. Hold an average or a target in the model, or give `attach(..., "
                "copies=...)`.",
                once="elsewhere",
            )

    def _warn_of_waiting(self, step: int, names: list[str]) -> None:
        new = [name for name in names if name not in self._told]
        self._told.update(new)
        if new:
            self._warn(
                f"Block-sparse layers were not scored at step {step}, as they had no gradient of "
                f"the loss that was applied, or one that is not finite: {', '.join(new)}. Their "
                "blocks stay until a step scores them."
            )

    # Memory.

    def _most_needed(self) -> dict[str, int]:
        """Return the most blocks that each layer that is evolved may hold from here on."""
        needed = {}
        for course in self._attached():
            if self.config.distribution == "global":  # budgets only fall
                budgets = {name: self.layers[name].topology.n_blocks for name in course.own}
            else:
                budgets = self.config.capacities(self._grids(), course.progress)
            needed.update({name: budgets[name] for name in course.own})
        return needed

    @torch.no_grad()
    def _shrink(self) -> None:
        """Give up the slots that will stay empty, if it is time for that."""
        if not self.config.shrink:
            return
        needed = self._most_needed()
        density, courses = self.config.density, self._attached()
        is_time = should_shrink(
            sum(self.layers[name].topology.capacity for name in needed),
            sum(needed.values()),
            density.initial,
            density.final,
            min(course.progress for course in courses if course.own),
        )
        if not is_time or not self._can_shrink():
            return
        for course in courses:
            course.work = None  # it knows the old sizes
        try:
            for name, most in needed.items():
                self._shrink_layer(name, most)
        finally:  # also where memory was short in between, after some layers
            if self._rewrap is not None:
                self._rewrap()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # so that others, too, can use what is free now

    def _shrink_layer(self, name: str, most: int) -> None:
        """Give up the slots of a layer beyond the most that it will need.

        One layer after the other, each wholly or not at all: all at once would take the memory that
        is to become free.
        """
        layer = self.layers[name]
        # A frozen layer, or one that was short of blocks to choose from, keeps what it has.
        kept, write = layer.prepare_shrink(
            min(layer.topology.capacity, max(most, layer.topology.n_blocks))
        )
        writes = [write, self._gatherer.prepare_keep(name, kept)]
        writes += [copy.prepare_shrink(len(kept))[1] for copy in self._following.copies_of(name)]
        writes += [
            course.prepare_keep(name, kept) for course in self._attached() if name in course.held
        ]
        born = self._born[name][kept.cpu()]
        for each in writes:
            each()
        self._born[name] = born

    def _can_shrink(self) -> bool:
        """Tell whether parameters may change shape.

        They may not where they are sharded, compiled, or shared with other processes.
        """
        compiled = any(
            isinstance(module, torch._dynamo.OptimizedModule)
            or module._compiled_call_impl is not None
            for module in self.model.modules()
        )
        sharded = any(is_sharded(layer.values) for layer in self.layers.values())
        shared = any(layer.is_shared for layer in self.layers.values())
        if compiled or sharded or shared or not self._may_shrink:
            return False
        if ranks.world_size() > 1 and self._rewrap is None:
            self._warn(
                "The memory of block-sparse layers does not follow their density, as their "
                "gradients are reduced over ranks in buckets of fixed sizes. Give "
                "`attach(..., rewrap=...)` a function that wraps the model anew.",
                once="rewrap",
            )
            return False
        return True

    # The end, and going on.

    def forget_gathered(self) -> None:
        """Forget what belongs to optimizers that are gone, as before another training.

        How far the schedule is stays. The layers may have other sizes by now.
        """
        self._let_go(self._attached())
        self._gatherer.forget()
        for course in self._courses:
            course.pending.clear()
        for name, born in self._age_zero().items():
            if len(self._born[name]) != len(born):
                self._born[name] = born

    def detach(self) -> None:
        """Let go of the optimizers: no further step counts, and nothing is gathered or locked.

        What `attach` was offered beside them is forgotten too.

        Warns if steps were taken, and the density is not the one that was asked for; if none was
        seen; or if it never was attached.
        """
        if not self.is_attached:
            if not self._courses:
                self._warn(
                    "The Sparsifier was never attached to an optimizer, so no block has moved. "
                    "Call `attach(optimizer)` before the training.",
                    once="never",
                )
            return
        trained = any(course.steps or course.skipped for course in self._courses)
        shortfall = None
        # Who is told of an error need not be told what it has kept from happening.
        if sys.exc_info()[0] in (None, KeyboardInterrupt):
            shortfall = (self._shortfall() if trained else None) or self._none_seen()
        self._let_go(self._attached())
        self._rewrap, self._planned = None, None
        self._following.elsewhere = none_elsewhere
        self._may_shrink = True
        if shortfall is not None:
            self._warn(shortfall)

    def _let_go(self, courses: Iterable[Course]) -> None:
        for course in courses:
            self._gatherer.arm([], course.own)
            course.let_go()
        if not self._attached():
            for layer in self.layers.values():
                layer.locked = False
            if self._others is not None:
                self._others.remove()
                self._others = None

    def _none_seen(self) -> str | None:
        """Return that no step since `attach` counted, where one would have; None otherwise."""
        courses = self._attached()
        trains = any(layer.values.requires_grad for layer in self.layers.values())
        if not trains or any(course.seen for course in courses):
            return None
        return (
            "No step was seen in which block-sparse layers had a gradient since `attach` was "
            f"called with {', '.join(class_of(course.optimizer) for course in courses)}, so no "
            "block has moved. Attach the very optimizer that steps the layers."
        )

    def _shortfall(self) -> str | None:
        """Return how the density differs from the one asked for, and why; None if it does not."""
        grids = self._grids()
        asked = self.config.final_blocks(grids)
        of = {name: self.layers[self.follows.get(name, name)] for name in self._sharing}
        if self.config.distribution != "global":  # then each layer has a budget
            of = dict(self.layers)
            asked = sum(self.config.budgets_at(1.0, grids)[name] for name in of)
        cells = sum(grids[name][0] * grids[name][1] for name in of)
        present = {name: layer.topology.n_blocks for name, layer in of.items()}
        if sum(present.values()) == asked:
            return None
        courses = [course for course in self._attached() if course.own]
        why = []
        for course in courses:
            table = course.timetable
            if table is None or course.progress >= 1:
                continue
            skipped = f", and {course.skipped} more did not count" if course.skipped else ""
            whose = f" by the optimizer of '{next(iter(course.own))}'" if len(courses) > 1 else ""
            why.append(
                f"{course.steps} steps were taken{whose}{skipped}, where the schedule takes "
                f"{table.density_until}"
            )
        moving = {name for course in courses for name, v in course.own.items() if v.requires_grad}
        still = sorted(self.layers.keys() - moving)
        still += [name for course in courses for name in course.waiting]
        if still:
            why.append(f"layers were frozen, in no optimizer or not scored: {', '.join(still)}")
        reasons = "; ".join(why) or "the update rule chose so"
        return (
            f"The training has ended with block-sparse layers at density "
            f"{sum(present.values()) / cells:.3f}, where {asked / cells:.3f} was asked for: "
            f"{reasons}."
        )

    def _warn(self, text: str, once: str | None = None) -> None:
        """Warn on rank 0; of what has a name, once."""
        if once is not None and once in self._told:
            return
        if once is not None:
            self._told.add(once)
        if ranks.is_first():
            warnings.warn(text, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed training needs: tensors on the CPU and primitives.

        The blocks themselves are in the model's state dict.
        """
        state = {
            "config": self.config.of_training(),
            "total_steps": self.total_steps,
            "resolved_by": self._resolved_by,
            "timetable": None if self._timetable is None else self._timetable.as_dict(),
            "courses": [course.state_dict() for course in self._courses],
            "n_updates": self.n_updates,
            "born": {name: born.clone() for name, born in self._born.items()},
            "gathered": self._gatherer.state_dict(),
        }
        if hasattr(self._rule, "state_dict"):
            state["rule"] = self._rule.state_dict()
            check_is_data(state["rule"])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where a training was saved, after the model's own `load_state_dict`.

        Call it before `attach`, so that layers may still take the capacity that was saved.

        Raises:
            ValueError: if the saved training had another configuration, or another version of this
                package wrote it.
        """
        check_same_training(state, self.state_dict())
        attached = [course.optimizer for course in self._attached()]
        self._let_go(self._attached())
        self.total_steps = self.total_steps or state["total_steps"]
        self._resolved_by, self.n_updates = state["resolved_by"], state["n_updates"]
        table = state["timetable"]
        self._timetable = None if table is None else Timetable(**table)
        self._courses = [Course.from_state(course) for course in state["courses"]]
        self._born = {**self._age_zero(), **{n: born.clone() for n, born in state["born"].items()}}
        self._gatherer.load_state_dict(state["gathered"])
        if "rule" in state and hasattr(self._rule, "load_state_dict"):
            self._rule.load_state_dict(state["rule"])
        if attached:
            self.attach(*attached)


def _only(budgets: Mapping[str, int], names: Iterable[str]) -> dict[str, int]:
    return {name: budgets[name] for name in names}


def _check_steps_after_backward(values: nn.Parameter) -> None:
    if hasattr(values, "_in_backward_optimizers"):
        raise ValueError(
            "`values` must not be in an optimizer that steps within backward, when other gradients "
            "are yet to come; got a parameter with `_in_backward_optimizers`. Leave it out of "
            "`_apply_optimizer_in_backward`, and step one optimizer after backward."
        )


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Keep PyTorch's CPU ops on this thread: grids are too small for waking others to pay."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
