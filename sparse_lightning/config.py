"""The configuration: typed, validated with errors that name the key, and known to Hydra.

`SparsityConfig` is what `SparsityCallback` is built from; `SparsityNode` is its form for Hydra's
config store, registered when `sparse_lightning.configs` is imported (as `pkg://` does).
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_choice,
    check_follow,
    check_layer_density,
    check_patterns,
    layer_densities,
)
from sparse_lightning.patching import INITS
from sparse_lightning.policy.criteria import (
    DROP_CRITERIA,
    GROW_CRITERIA,
    Criterion,
    gradient,
    magnitude,
)
from sparse_lightning.policy.distributions import DISTRIBUTIONS, Floor, Grid, by_score, share
from sparse_lightning.policy.lookup import calling, find
from sparse_lightning.policy.rules import DropAndGrow, UpdateRule
from sparse_lightning.policy.schedules import (
    DENSITY_SCHEDULES,
    DROP_FRACTION_SCHEDULES,
    Schedule,
    Times,
    Timetable,
    check_time,
    constant,
    is_fraction,
    resolve_time,
)
from sparse_lightning.topology import check_block_size, check_density, count_blocks

T = TypeVar("T")


@dataclass
class DensitySchedule:
    """The model's density over time.

    Attributes:
        schedule: "linear", "cosine", "cubic" (Zhu & Gupta 2017), "stepwise" (four times by the same
            factor), "one_shot" (all at `until`), or "constant", which takes either of the next two;
            or a function of (progress in [0, 1], initial, final) that returns a density in (0, 1],
            or its dotted path.
        initial: density at `begin`, in (0, 1]; 1.0 if not given.
        final: density from `until` on, in (0, 1]; 0.25 if not given.
        begin, until: step (int >= 2), fraction of the training (float in (0, 1]) or 0.
    """

    schedule: str | Schedule = "cubic"
    initial: float | None = None
    final: float | None = None
    begin: int | float = 0
    until: int | float = 0.5

    def __post_init__(self) -> None:
        schedule = find("density.schedule", self.schedule, DENSITY_SCHEDULES)
        _fill_in(self, schedule, "density", initial=1.0, final=0.25)


@dataclass
class UpdateSchedule:
    """When topology updates run, within begin..until.

    Attributes:
        every_n_steps: optimizer steps from one update to the next.
        begin, until: step (int >= 2), fraction of the training (float in (0, 1]) or 0.
        times: instead of every so many steps, the steps to update after: a list of them, or a
            function of the number of steps of the training that returns one, or its dotted path.
    """

    every_n_steps: int = 100
    begin: int | float = 0
    until: int | float = 0.75
    times: Any = None  # a list, a string or a function, which OmegaConf cannot express as a type


@dataclass
class DropFractionSchedule:
    """The share of a layer's blocks that an update exchanges, over update.begin..until.

    Attributes:
        schedule: "linear", "cosine", or "constant", which takes either of the next two; or a
            function of (progress in [0, 1], initial, final) that returns a share in [0, 1], or its
            dotted path.
        initial: in [0, 1]; 0.1 if not given.
        final: in [0, 1]; 0.0 if not given.
    """

    schedule: str | Schedule = "cosine"
    initial: float | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        schedule = find("drop_fraction.schedule", self.schedule, DROP_FRACTION_SCHEDULES)
        _fill_in(self, schedule, "drop_fraction", initial=0.1, final=0.0)


@dataclass
class MonitorOptions:
    """What is logged: numbers at every update; now and then, masks of the first `images` layers.

    With `record`, what becomes of the blocks is kept for `sparse-lightning report`, in a file
    beside the run's other ones.
    """

    every_n_updates: int = 10
    images: int = 8
    record: bool = True


@dataclass
class SparsityConfig:
    """Everything that `SparsityCallback` can be told; its docstring describes the fields.

    Nested values may be given as dataclasses, as mappings of the same keys, or, for `density` and
    `drop_fraction`, as a number that is held constant.

    Raises:
        ValueError, TypeError: naming the key, the rule and the value that broke it.

    >>> SparsityConfig(density={"schedule": "cubic", "fnal": 0.1})
    Traceback (most recent call last):
    ...
    ValueError: `density` has no key 'fnal' (did you mean 'final'?); accepted keys: 'schedule', \
'initial', 'final', 'begin', 'until'.
    """

    block_size: int = 64
    include: Any = ("*",)
    exclude: Any = DEFAULT_EXCLUDE
    density: Any = 0.25
    distribution: Any = "uniform"
    layer_density: Any = None
    floor: Any = field(default_factory=Floor)
    update: Any = field(default_factory=UpdateSchedule)
    drop_fraction: Any = field(default_factory=DropFractionSchedule)
    drop: Any = "magnitude"
    grow: Any = "gradient"
    regrow: bool = True
    rule: Any = None
    token_stride: int = 1
    init: str = "random"
    shrink: bool = True
    seed: int = 0
    follow: Any = None
    monitor: Any = field(default_factory=MonitorOptions)

    def __post_init__(self) -> None:
        self.density = _coerce(DensitySchedule, self.density, "density")
        self.floor = _coerce(Floor, self.floor, "floor")
        self.update = _coerce(UpdateSchedule, self.update, "update")
        self.drop_fraction = _coerce(DropFractionSchedule, self.drop_fraction, "drop_fraction")
        if self.monitor is not None:
            self.monitor = _coerce(MonitorOptions, self.monitor, "monitor")

        check_block_size(self.block_size)
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        self.include, self.exclude = tuple(self.include), tuple(self.exclude)
        find("distribution", self.distribution, DISTRIBUTIONS)
        find("drop", self.drop, DROP_CRITERIA)
        find("grow", self.grow, GROW_CRITERIA)
        check_choice("init", self.init, INITS)
        for key in ("regrow", "shrink"):
            _check_bool(key, getattr(self, key))
        _check_int("token_stride", self.token_stride, 1)
        _check_int("seed", self.seed, 0)
        _check_int("floor.row", self.floor.row, 0)
        _check_int("floor.column", self.floor.column, 0)
        _check_share("floor.layer", self.floor.layer)
        self.layer_density = {} if self.layer_density is None else self.layer_density
        check_layer_density(self.layer_density)
        self.layer_density = dict(self.layer_density)
        self.follow = {} if self.follow is None else self.follow
        check_follow(self.follow)
        self.follow = dict(self.follow)
        self._check_density()
        self._check_update()
        self._check_drop_fraction()
        self._check_rule()
        if self.monitor is not None:
            _check_int("monitor.every_n_updates", self.monitor.every_n_updates, 1)
            _check_int("monitor.images", self.monitor.images, 0)
            _check_bool("monitor.record", self.monitor.record)

    def _check_density(self) -> None:
        check_density(self.density.initial, "density.initial")
        check_density(self.density.final, "density.final")
        check_time(self.density.begin, "density.begin")
        check_time(self.density.until, "density.until")
        _check_order("density", self.density.begin, self.density.until)
        if self.distribution == "global" and not self.density.final < self.density.initial:
            raise ValueError(
                "`distribution` must not be 'global' unless the density falls: layers compete for "
                "what is left, and none grows; got a density from "
                f"{self.density.initial} to {self.density.final}. Take a falling schedule, or "
                "'uniform' or 'erdos_renyi'."
            )

    def _check_update(self) -> None:
        _check_int("update.every_n_steps", self.update.every_n_steps, 1)
        check_time(self.update.begin, "update.begin")
        check_time(self.update.until, "update.until")
        _check_order("update", self.update.begin, self.update.until)
        times = self.update.times
        if isinstance(times, str) or callable(times):
            find("update.times", times, {})
        elif times is not None:
            self.update.times = _checked_times(times)
        if not self.density_is_constant and _same_kind(self.density.until, self.update.until):
            _check_reaches(self.density.until, self.update.until)

    def _check_drop_fraction(self) -> None:
        for key in ("initial", "final"):
            _check_share(f"drop_fraction.{key}", getattr(self.drop_fraction, key))

    def _check_rule(self) -> None:
        ignored = (self.drop_criterion, self.grow_criterion, self.regrow)
        if self.rule is not None and ignored != (magnitude, gradient, True):
            raise ValueError(
                "`rule` must not be given together with `drop`, `grow` or `regrow`, which only the "
                f"usual rule reads; got rule={self.rule!r}, drop={self.drop!r}, "
                f"grow={self.grow!r}, regrow={self.regrow!r}. Leave them as they are by default."
            )
        if not callable(self.update_rule):
            raise ValueError(
                "`rule` must be a class whose objects can be called; got "
                f"{type(self.update_rule).__qualname__}."
            )

    def of_training(self) -> dict[str, Any]:
        """Return what a resumed training has to share, by dotted key: primitives and lists of them.

        A function is named by its module and name, however the configuration names it, and a rule
        that is an object by its class. Logging (`monitor`), memory (`shrink`), the first blocks
        (`init`) and copies (`follow`) are left out: they may change.
        """
        values: dict[str, Any] = {}
        for key in (each.name for each in dataclasses.fields(self)):
            if key not in ("monitor", "shrink", "init", "follow"):
                value = getattr(self, key)
                values[key] = vars(value) if isinstance(value, _NESTED) else value
        functions: dict[str, Any] = {
            "density.schedule": self._density_schedule,
            "drop_fraction.schedule": self._drop_fraction_schedule,
            "drop": self.drop_criterion,
            "grow": self.grow_criterion,
        }
        # "global" begins as another one, and is none of the functions.
        if self.distribution != "global":
            functions["distribution"] = find("distribution", self.distribution, DISTRIBUTIONS)
        if self._times_function is not None:
            functions["update.times"] = self._times_function
        if self.rule is not None:
            functions["rule"] = self.update_rule
        return {**_flat(values), **_flat(functions)}

    @property
    def drop_criterion(self) -> Criterion:
        """The function that scores present blocks."""
        return find("drop", self.drop, DROP_CRITERIA)

    @property
    def grow_criterion(self) -> Criterion | None:
        """The function that scores absent blocks; None for no growth."""
        return find("grow", self.grow, GROW_CRITERIA)

    @functools.cached_property
    def update_rule(self) -> UpdateRule:
        """What decides an update: `rule`, or what follows `drop`, `grow` and `regrow`."""
        if self.rule is None:
            return DropAndGrow(self.drop_criterion, self.grow_criterion, self.regrow)
        if isinstance(self.rule, Mapping):
            raise TypeError(
                "`rule` must be a function, an object or the dotted path of one; got the mapping "
                f"{self.rule!r}. A `_target_` is for Hydra to build: hydra.utils.instantiate(...)."
            )
        rule: Any = find("rule", self.rule, {})
        if not isinstance(rule, type):
            return rule  # type: ignore[no-any-return]
        try:
            return rule()  # type: ignore[no-any-return]
        except TypeError as error:
            raise ValueError(
                "`rule` must be a class that needs no arguments, or an object; got "
                f"{self.rule!r}: {error}."
            ) from error

    @property
    def _density_schedule(self) -> Schedule:
        return find("density.schedule", self.density.schedule, DENSITY_SCHEDULES)

    @property
    def _drop_fraction_schedule(self) -> Schedule:
        schedule = self.drop_fraction.schedule
        return find("drop_fraction.schedule", schedule, DROP_FRACTION_SCHEDULES)

    @property
    def _times_function(self) -> Times | None:
        """What makes the steps of updates, where they are not given themselves."""
        times = self.update.times
        return None if times is None or isinstance(times, list) else find("update.times", times, {})

    @property
    def density_is_constant(self) -> bool:
        """Whether the density never moves."""
        return self._density_schedule is constant

    def density_at(self, progress: float, final: float | None = None) -> float:
        """Return the density at a progress in [0, 1] of the density schedule.

        Args:
            progress: of the schedule.
            final: of a layer that has its own, instead of the model's.

        Raises:
            ValueError: if a schedule of the user's returns something else.
        """
        final = self.density.final if final is None else final
        with calling("density.schedule"):
            density = self._density_schedule(progress, self.density.initial, final)
        if not (_is_number(density) and 0 < density <= 1):
            raise ValueError(
                "`density.schedule` must return a density in (0, 1]; "
                f"got {density!r} at progress {progress:.4g}."
            )
        return float(density)

    def budgets_at(self, progress: float, grids: Mapping[str, Grid]) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1] of the density schedule.

        Under the "global" distribution they are a beginning: scores decide once there are some.

        Args:
            progress: of the schedule.
            grids: (out_blocks, in_blocks) of each layer, by name.

        Raises:
            ValueError: if a schedule or distribution of the user's returns no budget.
        """
        budgets = self._shares_at(progress, grids)
        if not self._is_monotonic:
            # So that capacities hold, whatever is asked for between the points they are made of.
            points = math.floor(progress * _INTERVALS), math.ceil(progress * _INTERVALS)
            around = [self._shares_at(k / _INTERVALS, grids) for k in points]
            for name, blocks in budgets.items():
                budgets[name] = min(blocks, max(shares[name] for shares in around))
        return budgets

    def _shares_at(self, progress: float, grids: Mapping[str, Grid]) -> dict[str, int]:
        """Return what schedule and distribution give each layer at a progress in [0, 1]."""
        fixed = {
            name: self.density_at(progress, final)
            for name, final in layer_densities(self.layer_density, grids).items()
        }
        density = self.density_at(progress)
        return share(self.distribution, density, grids, fixed, self.floor.layer)

    def budgets_by_score(
        self,
        progress: float,
        scores: Mapping[str, Tensor],
        masks: Mapping[str, Tensor],
        frozen: Collection[str] = (),
    ) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1], under any distribution.

        Under "global", layers without scores keep the blocks that they have for now, and the others
        compete for what the model's budget leaves beside a share for these by their sizes. Frozen
        layers are no part of that budget.

        Args:
            progress: of the density schedule.
            scores: drop scores `[out_blocks, in_blocks]` of the layers that may change, by name.
            masks: bool, of the same shapes, the present blocks of all managed layers.
            frozen: names of layers that will not change.

        Returns:
            The budget of each layer in `masks`.
        """
        grids = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
        budgets = self.budgets_at(progress, grids)
        if self.distribution != "global":
            return budgets
        present = {name: int(mask.sum()) for name, mask in masks.items()}
        budgets.update({name: present[name] for name in masks if name not in scores})
        fixed = layer_densities(self.layer_density, grids)
        sharing = {n: masks[n].numel() for n in grids if n not in fixed and n not in frozen}
        rivals = [name for name in sharing if name in scores]
        if rivals:
            density = self.density_at(progress)
            waiting = [name for name in sharing if name not in scores]
            kept = sum(min(present[n], count_blocks(density, sharing[n])) for n in waiting)
            total = count_blocks(density, sum(sharing.values()))
            total = max(
                total, sum(math.ceil(self.floor.layer * cells) for cells in sharing.values())
            )
            shares = by_score(
                total - kept,
                [scores[name] for name in rivals],
                [masks[name] for name in rivals],
                [self.floor.blocks(grids[name]) for name in rivals],
            )
            budgets.update(zip(rivals, shares, strict=True))
        return budgets

    def final_blocks(self, grids: Mapping[str, Grid]) -> int:
        """Return the blocks of all layers together when the schedule has arrived.

        Args:
            grids: (out_blocks, in_blocks) of all managed layers, by name.
        """
        budgets = self.budgets_at(1.0, grids)
        if self.distribution != "global":
            return sum(budgets.values())
        fixed = layer_densities(self.layer_density, grids)
        cells = [rows * cols for name, (rows, cols) in grids.items() if name not in fixed]
        total = count_blocks(self.density_at(1.0), sum(cells)) if cells else 0
        least: int = sum(math.ceil(self.floor.layer * n) for n in cells)
        return max(total, least) + sum(budgets[name] for name in fixed)

    def capacities(self, grids: Mapping[str, Grid], progress: float = 0.0) -> dict[str, int]:
        """Return the most blocks that each layer will hold from a progress in [0, 1] on.

        No budget of the schedules and distributions that are offered moves both ways, so the two
        ends tell. One of the user's may: it is looked at 65 points, and between two of them no
        budget passes the larger of theirs.

        Args:
            grids: (out_blocks, in_blocks) of all managed layers, by name.
            progress: of the density schedule.
        """
        points = [progress, 1.0]
        if not self._is_monotonic:
            first = math.floor(progress * _INTERVALS)
            points = [k / _INTERVALS for k in range(first, _INTERVALS + 1)]
        budgets = [self._shares_at(point, grids) for point in points]
        return {name: max(shares[name] for shares in budgets) for name in grids}

    @property
    def _is_monotonic(self) -> bool:
        """Whether every layer's budget moves one way only."""
        distribution = find("distribution", self.distribution, DISTRIBUTIONS)
        return (
            self._density_schedule in DENSITY_SCHEDULES.values()
            and distribution in DISTRIBUTIONS.values()
        )

    def largest_fall(self, timetable: Timetable, grids: Mapping[str, Grid]) -> tuple[float, int]:
        """Return how much of the model the steepest update drops for good, and when.

        Args:
            timetable: of the training.
            grids: (out_blocks, in_blocks) of all managed layers, by name.

        Returns:
            The share of the present blocks, in [0, 1), by which the update at which the density
            falls by the largest factor leaves fewer, and its step; (0.0, 0) if it never falls.
        """
        if self.density_is_constant:
            return 0.0, 0
        # Densities are quickly compared; budgets are shared for one update only.
        steps, at = [0], [timetable.density_progress(0)]
        while at[-1] < 1 and (step := timetable.next_update(steps[-1])) is not None:
            steps.append(step)
            at.append(timetable.density_progress(step))
        densities = [self.density_at(progress) for progress in at]
        kept = [after / before for before, after in pairwise(densities)]
        if min(kept, default=1.0) >= 1:
            return 0.0, 0
        i = kept.index(min(kept))
        before, after = (sum(self.budgets_at(p, grids).values()) for p in at[i : i + 2])
        return max(0.0, 1 - after / max(1, before)), steps[i + 1]

    def rising_without_growth(self, grids: Mapping[str, Grid]) -> list[str]:
        """Return the layers that are to end with more blocks, where the usual rule grows none.

        Args:
            grids: (out_blocks, in_blocks) of all managed layers, by name.
        """
        rule = self.update_rule
        if not isinstance(rule, DropAndGrow) or rule.grow is not None:
            return []
        first, last = self.budgets_at(0.0, grids), self.budgets_at(1.0, grids)
        return [name for name in grids if last[name] > first[name]]

    def drop_fraction_at(self, progress: float) -> float:
        """Return the drop fraction at a progress in [0, 1] of the updates.

        Raises:
            ValueError: if a schedule of the user's returns something else.
        """
        span = self.drop_fraction
        with calling("drop_fraction.schedule"):
            fraction = self._drop_fraction_schedule(progress, span.initial, span.final)
        if not (_is_number(fraction) and 0 <= fraction <= 1):
            raise ValueError(
                "`drop_fraction.schedule` must return a share in [0, 1]; "
                f"got {fraction!r} at progress {progress:.4g}."
            )
        return float(fraction)

    def timetable(self, total_steps: int | None) -> Timetable:
        """Resolve times to steps.

        Args:
            total_steps: optimizer steps that the training is planned to have; None if unknown.

        Raises:
            ValueError: if the resolved steps are out of order, or depend on a length that is not
                known.
        """
        if total_steps is None and self.has_fractions:
            raise ValueError(
                "`update` and `density` times given as fractions or by a function need a training "
                "of known length; got one without an end. Give steps, or total_steps / max_steps."
            )
        update_begin, update_until = _resolve("update", self.update, total_steps)
        times = self._times_between(update_begin, update_until, total_steps)
        if self.density_is_constant:
            density_begin, density_until = update_begin, update_until
        else:
            density_begin, density_until = _resolve("density", self.density, total_steps)
            _check_reaches(density_until, update_until)
            if times is not None and density_until > times[-1]:
                raise ValueError(
                    "`density.until` must not be after the last of `update.times`, or the density "
                    f"would never arrive; got density.until={density_until}, and {times[-1]} as "
                    f"the last one until {update_until}. Give a later time, or a later "
                    "`update.until`."
                )
        return Timetable(
            every_n_steps=self.update.every_n_steps,
            update_begin=update_begin,
            update_until=update_until,
            density_begin=density_begin,
            density_until=density_until,
            total_steps=total_steps,
            times=times,
        )

    def _times_between(
        self, begin: int, until: int, total_steps: int | None
    ) -> tuple[int, ...] | None:
        """Return the steps of `update.times` within begin..until; None without such."""
        times: list[int] | None = self.update.times
        if self._times_function is not None:
            assert total_steps is not None
            with calling("update.times"):
                given = self._times_function(total_steps)
            times = _checked_times(given)
        if times is None:
            return None
        within = tuple(time for time in times if begin <= time <= until)
        if not within:
            raise ValueError(
                "`update.times` must have a step within update.begin..update.until; got "
                f"{times[0]}..{times[-1]} for {begin}..{until}. Give `update.until` as a step, "
                "or other times."
            )
        return within

    @property
    def has_fractions(self) -> bool:
        """Whether a time depends on the length of the training, which must then be known."""
        times = [self.update.begin, self.update.until]
        if not self.density_is_constant:
            times += [self.density.begin, self.density.until]
        return self._times_function is not None or any(is_fraction(time) for time in times)


_NESTED = (DensitySchedule, UpdateSchedule, DropFractionSchedule, Floor)

# Between the points at which a schedule or distribution of the user's is looked at.
_INTERVALS = 64


def configured(options: Mapping[str, Any]) -> SparsityConfig:
    """Return the configuration that keywords give."""
    accepted = [each.name for each in dataclasses.fields(SparsityConfig)]
    for key in options:
        if key not in accepted:
            hint = _hint(key, accepted)
            raise TypeError(f"There is no option {key!r}{hint}; accepted: {', '.join(accepted)}.")
    return SparsityConfig(**options)


@dataclass
class SparsityNode:
    """`SparsityConfig` as a node of Hydra's config store; unknown keys and wrong types raise."""

    _target_: str = "sparse_lightning.SparsityCallback"
    block_size: int = 64
    include: list[str] = field(default_factory=lambda: ["*"])
    exclude: list[str] = field(default_factory=lambda: list(DEFAULT_EXCLUDE))
    # A number or a mapping, which OmegaConf cannot express as a type.
    density: Any = 0.25
    distribution: str = "uniform"
    layer_density: Any = None  # not a mapping: that would take no new keys from a command line
    floor: Floor = field(default_factory=Floor)
    update: UpdateSchedule = field(default_factory=UpdateSchedule)
    drop_fraction: Any = field(default_factory=lambda: dataclasses.asdict(DropFractionSchedule()))
    drop: str = "magnitude"
    grow: str = "gradient"
    regrow: bool = True
    rule: Any = None  # a dotted path, or a mapping with a `_target_`
    token_stride: int = 1
    init: str = "random"
    shrink: bool = True
    seed: int = 0
    follow: Any = None  # not a mapping, as `layer_density`
    monitor: MonitorOptions | None = field(default_factory=MonitorOptions)


def register() -> None:
    """Put the schema into Hydra's config store, as `callbacks/sparsity/schema`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(
        group="callbacks/sparsity", name="schema", node=SparsityNode, provider="sparse_lightning"
    )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, as primitives and lists of them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flat(value, f"{prefix}{key}."))
        elif isinstance(value, tuple):
            flat[prefix + key] = list(value)
        elif callable(value):
            name = getattr(value, "__qualname__", type(value).__qualname__)
            flat[prefix + key] = f"{value.__module__}.{name}"
        else:
            # A float of NumPy's is a float too, but no primitive to `torch.load`.
            flat[prefix + key] = float(value) if isinstance(value, float) else value
    return flat


def _hint(key: object, accepted: Sequence[str]) -> str:
    """Return the key that was probably meant, for an error; "" if none is near."""
    close = difflib.get_close_matches(str(key), accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(cls: type[T], value: Any, argument: str) -> T:
    """Build one of the nested dataclasses from itself, a mapping or a constant number."""
    if isinstance(value, cls):
        return dataclasses.replace(value)  # type: ignore[type-var]
    accepted = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        for key in value:
            if key not in accepted:
                hint = _hint(key, accepted)
                raise ValueError(
                    f"`{argument}` has no key {key!r}{hint}; "
                    f"accepted keys: {', '.join(map(repr, accepted))}."
                )
        return cls(**value)
    if isinstance(value, (int, float)) and not isinstance(value, bool) and "schedule" in accepted:
        return cls(schedule="constant", initial=value, final=value)  # type: ignore[call-arg]
    number = "a number or " if "schedule" in accepted else ""
    raise TypeError(
        f"`{argument}` must be {number}a mapping with the keys "
        f"{', '.join(map(repr, accepted))}; got {value!r}."
    )


def _fill_in(
    span: DensitySchedule | DropFractionSchedule,
    schedule: Schedule,
    argument: str,
    *,
    initial: float,
    final: float,
) -> None:
    """Put in what was not given; a constant schedule has one value, given as either."""
    if schedule is constant:
        given = [value for value in (span.initial, span.final) if value is not None] or [final]
        if given[0] not in given[-1:]:  # not `!=`, which holds for a NaN and itself
            raise ValueError(
                f"`{argument}` must have one value under the constant schedule; got "
                f"initial={span.initial!r}, final={span.final!r}. Give one of them."
            )
        span.initial = span.final = given[0]
        return
    span.initial = initial if span.initial is None else span.initial
    span.final = final if span.final is None else span.final


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{key}` must be true or false; got {value!r}.")


def _check_int(argument: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"`{argument}` must be an integer of at least {least}; got {value!r}.")


def _check_share(argument: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= 1):
        raise ValueError(f"`{argument}` must be a number in [0, 1]; got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _checked_times(times: Iterable[Any]) -> list[int]:
    """Return the steps of updates in order, each once."""
    rule = "`update.times` must be steps, integers of at least 1, or a function that returns some"
    if not isinstance(times, Iterable):
        raise ValueError(f"{rule}; got {times!r}.")
    steps = set()
    for time in times:
        if not isinstance(time, Integral) or isinstance(time, bool) or time < 1:
            raise ValueError(f"{rule}; got {time!r}.")
        steps.add(int(time))
    if not steps:
        raise ValueError(f"{rule}; got none.")
    return sorted(steps)


def _same_kind(a: int | float, b: int | float) -> bool:
    """Whether two times can be compared before the length of the training is known."""
    return is_fraction(a) == is_fraction(b)


def _check_order(argument: str, begin: int | float, until: int | float) -> None:
    if until == 0 or (_same_kind(begin, until) and begin >= until):
        raise ValueError(
            f"`{argument}.begin` must be before `{argument}.until`; "
            f"got begin={begin!r}, until={until!r}."
        )


def _resolve(
    argument: str, span: UpdateSchedule | DensitySchedule, total_steps: int | None
) -> tuple[int, int]:
    """Resolve begin and until to steps, in order."""
    # Without a known length there are no fractions of it.
    length = 0 if total_steps is None else total_steps
    begin, until = resolve_time(span.begin, length), resolve_time(span.until, length)
    if span.begin == 0 or _same_kind(span.begin, span.until):
        # In order as written; in a very short training they may round to the same step.
        until = max(until, begin + 1)
    _check_order(argument, begin, until)
    return begin, until


def _check_reaches(density_until: int | float, update_until: int | float) -> None:
    if density_until > update_until:
        raise ValueError(
            "`density.until` must not be after `update.until`, or the density would never arrive; "
            f"got density.until={density_until!r}, update.until={update_until!r}."
        )
