"""The configuration: options, checks whose errors name the key, and the schema for Hydra.

`SparsityConfig` holds the keywords of `SparsityCallback`; `SparsityNode` adds the `_target_` that
Hydra instantiates, and is registered when `sparse_lightning.configs` is imported.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import Any, TypeVar

from sparse_lightning.names import (
    DEFAULT_EXCLUDE,
    check_follow,
    check_layer_density,
    check_option,
    check_patterns,
    layer_densities,
)
from sparse_lightning.nm_pattern import check_nm
from sparse_lightning.patching import INITS
from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.criteria import (
    DROP_CRITERIA,
    GROW_CRITERIA,
    Criterion,
    gradient,
    magnitude,
)
from sparse_lightning.policy.distributions import DISTRIBUTIONS, Floor, Grid
from sparse_lightning.policy.lookup import calling, find, name_of
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
from sparse_lightning.selection import SwapOptions
from sparse_lightning.topology import check_block_size, check_density

T = TypeVar("T")

LAYER_SERIES = ("groups", "all", "none")

_SAMPLES = 64  # intervals at whose ends a schedule is sampled


@dataclass
class DensitySchedule:
    """The model's density over time.

    Attributes:
        schedule: "linear", "cosine", "cubic" (Zhu & Gupta 2017), "stepwise" (four reductions by the
            same factor), "one_shot" (a single reduction, at `until`), or "constant", which takes
            either `initial` or `final`; or a function of (progress in [0, 1], initial, final) that
            returns a density in (0, 1], or its dotted path.
        initial: density at `begin`, in (0, 1]; 1.0 by default.
        final: density from `until` on, in (0, 1]; 0.25 by default.
        begin, until: a step (int >= 2), a fraction of the training (float in (0, 1]) or 0.
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
    """When topology updates run, between `begin` and `until`.

    Attributes:
        every_n_steps: optimizer steps from one update to the next.
        begin, until: a step (int >= 2), a fraction of the training (float in (0, 1]) or 0.
        times: steps after which updates run, in place of a regular interval: a list of steps, or a
            function of the training's number of steps that returns one, or its dotted path.
    """

    every_n_steps: int = 100
    begin: int | float = 0
    until: int | float = 0.75
    times: Any = None  # OmegaConf has no type for a list, string or function.


@dataclass
class DropFractionSchedule:
    """The share of a layer's blocks that each update exchanges, over the update schedule.

    Attributes:
        schedule: "linear", "cosine", or "constant", which takes either `initial` or `final`; or a
            function of (progress in [0, 1], initial, final) that returns a share in [0, 1], or its
            dotted path.
        initial: share at `update.begin`, in [0, 1]; 0.1 by default.
        final: share at `update.until`, in [0, 1]; 0.0 by default.
    """

    schedule: str | Schedule = "cosine"
    initial: float | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        schedule = find("drop_fraction.schedule", self.schedule, DROP_FRACTION_SCHEDULES)
        _fill_in(self, schedule, "drop_fraction", initial=0.1, final=0.0)


@dataclass
class MonitorOptions:
    """What is logged during training.

    Attributes:
        every_n_updates: updates between two logged sets of block masks; scalars are logged at each
            update.
        images: number of layers whose block masks are logged, starting from the first.
        layers: which layers have scalars of their own: "groups" (one set for all layers whose names
            differ only in numbers, if their shapes are equal), "all", "none", or a list of patterns
            as in `include`.
        record: whether to write the history of the block masks, which `sparse-lightning report`
            reads, to a file in the run's folder.
    """

    every_n_updates: int = 10
    images: int = 8
    layers: Any = "groups"  # OmegaConf has no type for a string or a list.
    record: bool = True


@dataclass
class SparsityConfig:
    """The options of `SparsityCallback`, whose docstring describes each field.

    Nested values may be dataclasses or mappings of the same keys; for `density` and
    `drop_fraction` also a number, which is held constant. The fields are declared for OmegaConf,
    which reads types and defaults without running `__post_init__`. A field is `Any` where
    OmegaConf cannot express its type: a union with a mapping or a function, or a mapping that may
    gain keys on Hydra's command line.

    Raises:
        ValueError, TypeError: naming the key, the rule and the value that breaks it.

    >>> SparsityConfig(density={"schedule": "cubic", "fnal": 0.1})
    Traceback (most recent call last):
    ...
    ValueError: `density` has no key 'fnal' (did you mean 'final'?); accepted keys: 'schedule', \
'initial', 'final', 'begin', 'until'.
    """

    block_size: int = 64
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    density: Any = 0.25
    nm: Any = None  # YAML reads an unquoted 2:4 as a number
    distribution: Any = "uniform"
    layer_density: Any = None
    floor: Floor = field(default_factory=Floor)
    update: UpdateSchedule = field(default_factory=UpdateSchedule)
    # A mapping, so that a number in a YAML file can replace it.
    drop_fraction: Any = field(default_factory=lambda: dataclasses.asdict(DropFractionSchedule()))
    drop: Any = "magnitude"
    grow: Any = "gradient"
    regrow: bool = True
    regrow_inner: bool = True
    rule: Any = None
    token_stride: int = 1
    init: str = "random"
    shrink: bool = True
    seed: int = 0
    follow: Any = None
    monitor: MonitorOptions | None = field(default_factory=MonitorOptions)

    def __post_init__(self) -> None:
        self.density = _coerce(DensitySchedule, self.density, "density")
        self.floor = _coerce(Floor, self.floor, "floor")
        self.update = _coerce(UpdateSchedule, self.update, "update")
        self.drop_fraction = _coerce(DropFractionSchedule, self.drop_fraction, "drop_fraction")
        if self.monitor is not None:
            self.monitor = _coerce(MonitorOptions, self.monitor, "monitor")

        check_block_size(self.block_size)
        self.nm = check_nm(self.nm)
        check_patterns("include", self.include)
        check_patterns("exclude", self.exclude)
        self.include, self.exclude = tuple(self.include), tuple(self.exclude)
        find("distribution", self.distribution, DISTRIBUTIONS)
        find("drop", self.drop, DROP_CRITERIA)
        find("grow", self.grow, GROW_CRITERIA)
        check_option("init", self.init, INITS)
        for key in ("regrow", "regrow_inner", "shrink"):
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
        self._check_rule()
        if self.monitor is not None:
            _check_int("monitor.every_n_updates", self.monitor.every_n_updates, 1)
            _check_int("monitor.images", self.monitor.images, 0)
            if isinstance(self.monitor.layers, str):
                check_option("monitor.layers", self.monitor.layers, LAYER_SERIES)
            else:
                check_patterns("monitor.layers", self.monitor.layers)
            _check_bool("monitor.record", self.monitor.record)

    def _check_density(self) -> None:
        check_time(self.density.begin, "density.begin")
        check_time(self.density.until, "density.until")
        _check_order("density", self.density.begin, self.density.until)
        if self.distribution == "global" and not self.density.final < self.density.initial:
            raise ValueError(
                "`distribution` must not be 'global' unless the density falls, because layers "
                "compete for the remaining blocks and none grows; got a density from "
                f"{self.density.initial} to {self.density.final}. Use a falling schedule, or "
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
            self.update.times = _sort_times(times)
        if not self.density_is_constant and _same_kind(self.density.until, self.update.until):
            _check_reaches(self.density.until, self.update.until)

    def _check_rule(self) -> None:
        ignored = (self.drop_criterion, self.grow_criterion, self.regrow)
        if self.rule is not None and ignored != (magnitude, gradient, True):
            raise ValueError(
                "`rule` must not be given together with `drop`, `grow` or `regrow`, which only the "
                f"default rule reads; got rule={self.rule!r}, drop={self.drop!r}, "
                f"grow={self.grow!r}, regrow={self.regrow!r}. Leave the others at their defaults."
            )
        if not callable(self.update_rule):
            raise ValueError(
                "`rule` must be a class whose instances can be called; got "
                f"{type(self.update_rule).__qualname__}."
            )

    def training_options(self) -> dict[str, Any]:
        """Return the options that a resumed training must share, by dotted key, as primitives.

        A built-in function is stored by its name (`magnitude`), however the configuration gives it;
        a user's function by its dotted path, and a rule object by that of its class. Logging
        (`monitor`), memory (`shrink`), the initial blocks (`init`) and copies (`follow`) are left
        out, since they may change.
        """
        free = ("monitor", "shrink", "init", "follow")
        options = self.options().items()
        return {key: value for key, value in options if key.partition(".")[0] not in free}

    def options(self) -> dict[str, Any]:
        """Return all options by dotted key, as primitives, with functions as names."""
        values: dict[str, Any] = {}
        for key in (option.name for option in dataclasses.fields(self)):
            value = getattr(self, key)
            values[key] = vars(value) if isinstance(value, _NESTED) else value
        names = {
            "density.schedule": name_of(self._density_schedule, DENSITY_SCHEDULES),
            "drop_fraction.schedule": name_of(
                self._drop_fraction_schedule, DROP_FRACTION_SCHEDULES
            ),
            "drop": name_of(self.drop_criterion, DROP_CRITERIA),
            "grow": name_of(self.grow_criterion, GROW_CRITERIA),
        }
        # "global" and "uniform" share a function, so "global" is recognized by its name only.
        if self.distribution != "global":
            distribution = find("distribution", self.distribution, DISTRIBUTIONS)
            names["distribution"] = name_of(distribution, DISTRIBUTIONS)
        if self._times_function is not None:
            names["update.times"] = name_of(self._times_function, {})
        if self.rule is not None:
            names["rule"] = name_of(self.update_rule, {})
        return {**_flatten(values), **names}

    @property
    def swap_options(self) -> SwapOptions:
        """Options of the swap, as `sparsify` takes them."""
        return SwapOptions(
            self.block_size,
            self.include,
            self.exclude,
            self.init,
            self.seed,
            self.floor,
            self.follow,
            self.nm,
        )

    @property
    def drop_criterion(self) -> Criterion:
        """Function that scores present blocks."""
        return find("drop", self.drop, DROP_CRITERIA)

    @property
    def grow_criterion(self) -> Criterion | None:
        """Function that scores absent blocks; None for no growth."""
        return find("grow", self.grow, GROW_CRITERIA)

    @functools.cached_property
    def update_rule(self) -> UpdateRule:
        """Rule that decides updates: `rule`, or `DropAndGrow` by `drop`, `grow` and `regrow`."""
        if self.rule is None:
            return DropAndGrow(self.drop_criterion, self.grow_criterion, self.regrow)
        if isinstance(self.rule, Mapping):
            raise TypeError(
                "`rule` must be a function, an object or the dotted path of one; got the mapping "
                f"{self.rule!r}. Hydra builds a `_target_`: hydra.utils.instantiate(...)."
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
        """Function that returns the steps of updates; None without one."""
        times = self.update.times
        return None if times is None or isinstance(times, list) else find("update.times", times, {})

    @property
    def density_is_constant(self) -> bool:
        """Whether the density never changes."""
        return self._density_schedule is constant

    def density_at(self, progress: float, final: float | None = None) -> float:
        """Return the density at a progress in [0, 1] of the density schedule.

        Args:
            progress: progress of the schedule.
            final: final density of a layer that has its own; by default the model's.

        Raises:
            ValueError: if a user's schedule returns an invalid value.
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

    def budgets(self, grids: Mapping[str, Grid]) -> LayerBudgets:
        """Return the block budgets of layers over the density schedule.

        Args:
            grids: (out_blocks, in_blocks) of all managed layers, by name.
        """
        distribution = find("distribution", self.distribution, DISTRIBUTIONS)
        return LayerBudgets(
            grids=grids,
            density_at=self.density_at,
            final=self.density.final,
            own_final=layer_densities(self.layer_density, grids),
            distribution=self.distribution,
            floor=self.floor,
            is_monotonic=self._density_schedule in DENSITY_SCHEDULES.values()
            and distribution in DISTRIBUTIONS.values(),
        )

    def rising_without_growth(self, grids: Mapping[str, Grid]) -> list[str]:
        """Return the layers whose budget rises although `DropAndGrow` has no grow criterion.

        Args:
            grids: (out_blocks, in_blocks) of all managed layers, by name.
        """
        rule = self.update_rule
        if not isinstance(rule, DropAndGrow) or rule.grow is not None:
            return []
        budgets = self.budgets(grids)
        initial, final = budgets.at(0.0), budgets.at(1.0)
        return [name for name in grids if final[name] > initial[name]]

    @property
    def exchanges_weights(self) -> bool:
        """Whether updates exchange weights within 2:4 sparse blocks."""
        return self.nm is not None and self.regrow_inner

    @property
    def expects_exchange(self) -> bool:
        """Whether the default rule is to exchange blocks or weights at a constant density.

        A drop fraction that is always 0, as in the preset "static", says that the blocks stay.
        """
        is_default = self.rule is None and self.density_is_constant
        return is_default and any(self.drop_fraction_at(k / _SAMPLES) for k in range(_SAMPLES + 1))

    def explain_no_exchange(self, budgets: LayerBudgets, timetable: Timetable) -> str | None:
        """Return why no update exchanges anything although one should, and what helps, or None.

        Args:
            budgets: block budgets of the layers.
            timetable: resolved steps of the training.
        """
        first = timetable.next_update(0)
        if first is None or not self.expects_exchange or not self._exchanges(budgets, 1.0):
            return None  # no update is planned, none is to change anything, or no block is absent
        final = f"{self.density.final:g}"
        if self.grow_criterion is None and not self.exchanges_weights:
            return (
                f"the density is constant ({final}) and `grow` is 'none'. For a density that "
                "falls, as in the presets for pretrained weights, set `density.final` in place of "
                f"`density`, or density=DensitySchedule(initial=1.0, final={final}); to exchange "
                "blocks, set `grow` to 'gradient', 'momentum' or 'random'"
            )
        share = self._largest_exchange(timetable)
        if self._exchanges(budgets, share):
            return None
        most = self._largest_exchange(replace(timetable, every_n_steps=1, times=None))
        if not most:
            return None  # a trial of a few steps cannot exchange blocks, whatever the options are
        if not self._exchanges(budgets, most):
            remedy = "Set a larger `drop_fraction` or a smaller `block_size`"
        elif timetable.times is not None:
            remedy = "Set more and earlier `update.times`"
        else:
            every = self._more_frequent(budgets, timetable)
            remedy = f"Set a smaller `update.every_n_steps`, such as {every}"
        length = "" if timetable.total_steps is None else f" of {timetable.total_steps}"
        updates = "the only one is" if timetable.next_update(first) is None else "the first one is"
        text = f"{updates} after step {first}{length}"
        if self.exchanges_weights:
            return f"{text}, when the drop fraction has fallen to 0. {remedy}"
        return (
            f"{text}, and at most {100 * share:.2g} % of a layer's blocks are to be exchanged, "
            f"which rounds to no block. {remedy}"
        )

    def _more_frequent(self, budgets: LayerBudgets, timetable: Timetable) -> int:
        """Return an interval between updates at which they exchange blocks."""
        last = min(timetable.update_until, timetable.total_steps or timetable.update_until)
        every = max(1, (last - timetable.update_begin) // 10)
        share = self._largest_exchange(replace(timetable, every_n_steps=every))
        return every if self._exchanges(budgets, share) else 1

    def _exchanges(self, budgets: LayerBudgets, share: float) -> bool:
        """Return whether an update at a drop fraction exchanges a block, or weights within them."""
        return budgets.exchanged(1.0, share) > 0 or (self.exchanges_weights and share > 0)

    def _largest_exchange(self, timetable: Timetable) -> float:
        """Return the largest share of a layer's blocks that an update is to exchange."""
        share, step = 0.0, timetable.next_update(0)
        while step is not None:
            share = max(share, self.exchanged_at(step, timetable))
            step = timetable.next_update(step)
        return share

    def exchanged_at(self, step: int, timetable: Timetable) -> float:
        """Return the share of a layer's blocks that an update after a step is to exchange.

        If the training ends before its updates were to end, it is 0 in the last update: the density
        still follows its schedule, but grown blocks would not be trained.

        Args:
            step: step of the update.
            timetable: resolved steps of the training.
        """
        if step == timetable.total_steps and step < timetable.update_until:
            return 0.0
        return self.drop_fraction_at(timetable.update_progress(step))

    def drop_fraction_at(self, progress: float) -> float:
        """Return the drop fraction at a progress in [0, 1] of the update schedule.

        Raises:
            ValueError: if a user's schedule returns an invalid value.
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
        """Resolve all times to optimizer steps.

        Args:
            total_steps: planned number of optimizer steps of the training; None if unknown.

        Raises:
            ValueError: if the resolved steps are out of order, or depend on an unknown length.
        """
        if total_steps is None and self.has_fractions:
            raise ValueError(
                "`update` and `density` times given as fractions or by a function need a training "
                "of known length; got none. Give steps, or total_steps / max_steps."
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
                    f"would never reach its final value; got density.until={density_until}, and "
                    f"{times[-1]} as the last time before {update_until}. Give a later time, or a "
                    "later `update.until`."
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
        """Return the steps of `update.times` within begin..until; None without `times`."""
        times: list[int] | None = self.update.times
        if self._times_function is not None:
            assert total_steps is not None
            with calling("update.times"):
                given = self._times_function(total_steps)
            times = _sort_times(given)
        if times is None:
            return None
        within = tuple(time for time in times if begin <= time <= until)
        if not within:
            raise ValueError(
                "`update.times` must have a step within update.begin..update.until; got "
                f"{times[0]}..{times[-1]} for {begin}..{until}. Give `update.until` as a step, "
                "or change the times."
            )
        return within

    @property
    def has_fractions(self) -> bool:
        """Whether a time depends on the training's length, which must then be known."""
        times = [self.update.begin, self.update.until]
        if not self.density_is_constant:
            times += [self.density.begin, self.density.until]
        return self._times_function is not None or any(is_fraction(time) for time in times)


_NESTED = (DensitySchedule, UpdateSchedule, DropFractionSchedule, Floor, MonitorOptions)


def build_config(**options: Any) -> SparsityConfig:
    """Build the configuration from the keywords of `Sparsifier` or a callback."""
    accepted = [option.name for option in dataclasses.fields(SparsityConfig)]
    for key in options:
        if key not in accepted:
            hint = _hint(key, accepted)
            raise TypeError(f"There is no option {key!r}{hint}; accepted: {', '.join(accepted)}.")
    return SparsityConfig(**options)


@dataclass
class _Target:
    """The class that Hydra instantiates, as the first key of a node."""

    _target_: str = "sparse_lightning.SparsityCallback"


@dataclass
class SparsityNode(SparsityConfig, _Target):
    """`SparsityConfig` as a node of Hydra's config store, which rejects unknown keys and types."""


def register() -> None:
    """Add the schema to Hydra's config store as `callbacks/sparsity/schema`."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(
        group="callbacks/sparsity", name="schema", node=SparsityNode, provider="sparse_lightning"
    )


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested values by dotted key, with tuples as lists."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        elif isinstance(value, tuple):
            flat[prefix + key] = list(value)
        else:
            # `torch.load` accepts Python floats, but not NumPy's subclass of them.
            flat[prefix + key] = float(value) if isinstance(value, float) else value
    return flat


def _hint(key: object, accepted: Sequence[str]) -> str:
    """Return a suggestion of the closest accepted key for an error; "" if none is close."""
    close = difflib.get_close_matches(str(key), accepted, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _coerce(cls: type[T], value: Any, argument: str) -> T:
    """Build a nested dataclass from an instance, a mapping or a constant number."""
    if isinstance(value, cls):
        return replace(value)  # type: ignore[type-var]
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
        _check_value(argument, argument, value)
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
    """Fill in missing values; a constant schedule takes its one value from either field.

    The given ones are checked before, so that an error names the key that was given.
    """
    for key, value in (("initial", span.initial), ("final", span.final)):
        if value is not None:
            _check_value(argument, f"{argument}.{key}", value)
    if schedule is constant:
        given = [value for value in (span.initial, span.final) if value is not None] or [final]
        if given[0] not in given[-1:]:  # `!=` is also true for a NaN and itself.
            raise ValueError(
                f"`{argument}` must have one value under the constant schedule; got "
                f"initial={span.initial!r}, final={span.final!r}. Give one of them."
            )
        span.initial = span.final = given[0]
        return
    span.initial = initial if span.initial is None else span.initial
    span.final = final if span.final is None else span.final


def _check_value(argument: str, key: str, value: Any) -> None:
    """Check a value of `density` or of `drop_fraction`; errors name it by its key."""
    if argument == "density":
        check_density(value, key)
    else:
        _check_share(key, value)


def _check_bool(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"`{key}` must be true or false; got {value!r}.")


def _check_int(argument: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"`{argument}` must be an integer of at least {minimum}; got {value!r}.")


def _check_share(argument: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and 0 <= value <= 1):
        raise ValueError(f"`{argument}` must be a number in [0, 1]; got {value!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _sort_times(times: Iterable[Any]) -> list[int]:
    """Return the steps of updates sorted, without duplicates."""
    rule = "`update.times` must be steps, integers of at least 1, or a function that returns steps"
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
    # `timetable` has rejected fractions of an unknown length.
    length = 0 if total_steps is None else total_steps
    begin, until = resolve_time(span.begin, length), resolve_time(span.until, length)
    if span.begin == 0 or _same_kind(span.begin, span.until):
        # The options are in order, but may round to the same step in a very short training.
        until = max(until, begin + 1)
    _check_order(argument, begin, until)
    return begin, until


def _check_reaches(density_until: int | float, update_until: int | float) -> None:
    if density_until > update_until:
        raise ValueError(
            "`density.until` must not be after `update.until`, or the density would never reach "
            f"its final value; got density.until={density_until!r}, update.until={update_until!r}."
        )
