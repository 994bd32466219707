"""The configuration: typed, validated with errors that name the key, and known to Hydra.

`SparsityConfig` is what `SparsityCallback` is built from; `SparsityNode` is its form for Hydra's
config store, registered when `sparse_lightning.configs` is imported (as `pkg://` does).
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor

from sparse_lightning.criteria import DROP_CRITERIA, GROW_CRITERIA, Criterion, find_criterion
from sparse_lightning.distributions import DISTRIBUTIONS, Floor, Grid, by_score, share
from sparse_lightning.patching import (
    DEFAULT_EXCLUDE,
    INITS,
    check_choice,
    check_layer_density,
    check_patterns,
    layer_densities,
)
from sparse_lightning.schedules import (
    DENSITY_SCHEDULES,
    DROP_FRACTION_SCHEDULES,
    Timetable,
    check_time,
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
            factor), "one_shot" (all at `until`), or "constant", which takes either of the next two.
        initial: density at `begin`, in (0, 1]; 1.0 if not given.
        final: density from `until` on, in (0, 1]; 0.25 if not given.
        begin, until: step (int >= 2), fraction of the training (float in (0, 1]) or 0.
    """

    schedule: str = "cubic"
    initial: float | None = None
    final: float | None = None
    begin: int | float = 0
    until: int | float = 0.5

    def __post_init__(self) -> None:
        _fill_in(self, "density", initial=1.0, final=0.25)


@dataclass
class UpdateSchedule:
    """When topology updates run: every `every_n_steps` optimizer steps, within begin..until."""

    every_n_steps: int = 100
    begin: int | float = 0
    until: int | float = 0.75


@dataclass
class DropFractionSchedule:
    """The share of a layer's blocks that an update exchanges, over update.begin..until.

    Attributes:
        schedule: "linear", "cosine", or "constant", which takes either of the next two.
        initial: in [0, 1]; 0.1 if not given.
        final: in [0, 1]; 0.0 if not given.
    """

    schedule: str = "cosine"
    initial: float | None = None
    final: float | None = None

    def __post_init__(self) -> None:
        _fill_in(self, "drop_fraction", initial=0.1, final=0.0)


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
    distribution: str = "uniform"
    layer_density: Any = None
    floor: Any = field(default_factory=Floor)
    update: Any = field(default_factory=UpdateSchedule)
    drop_fraction: Any = field(default_factory=DropFractionSchedule)
    drop: Any = "magnitude"
    grow: Any = "gradient"
    regrow: bool = True
    exact: bool = False
    token_stride: int = 1
    init: str = "random"
    shrink: bool = True
    seed: int = 0
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
        check_choice("distribution", self.distribution, DISTRIBUTIONS)
        find_criterion("drop", self.drop, DROP_CRITERIA)
        find_criterion("grow", self.grow, GROW_CRITERIA)
        check_choice("init", self.init, INITS)
        for key in ("regrow", "exact", "shrink"):
            _check_bool(key, getattr(self, key))
        _check_int("token_stride", self.token_stride, 1)
        _check_int("seed", self.seed, 0)
        _check_int("floor.row", self.floor.row, 0)
        _check_int("floor.column", self.floor.column, 0)
        _check_share("floor.layer", self.floor.layer)
        self.layer_density = {} if self.layer_density is None else self.layer_density
        check_layer_density(self.layer_density)
        self.layer_density = dict(self.layer_density)
        self._check_density()
        self._check_update()
        self._check_drop_fraction()
        if self.monitor is not None:
            _check_int("monitor.every_n_updates", self.monitor.every_n_updates, 1)
            _check_int("monitor.images", self.monitor.images, 0)
            _check_bool("monitor.record", self.monitor.record)

    def _check_density(self) -> None:
        check_choice("density.schedule", self.density.schedule, DENSITY_SCHEDULES)
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
        if not self.density_is_constant and _same_kind(self.density.until, self.update.until):
            _check_reaches(self.density.until, self.update.until)

    def _check_drop_fraction(self) -> None:
        check_choice("drop_fraction.schedule", self.drop_fraction.schedule, DROP_FRACTION_SCHEDULES)
        for key in ("initial", "final"):
            _check_share(f"drop_fraction.{key}", getattr(self.drop_fraction, key))

    def of_training(self) -> dict[str, Any]:
        """Return what a resumed training has to share, by dotted key: primitives and lists of them.

        Criteria are named by their function. Logging (`monitor`), memory (`shrink`) and the first
        blocks (`init`) are left out: they may change.
        """
        values = {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("monitor", "shrink", "init")
        }
        criteria = {"drop": self.drop_criterion, "grow": self.grow_criterion}
        return _flat({**values, **criteria})

    @property
    def drop_criterion(self) -> Criterion:
        """The function that scores present blocks."""
        criterion = find_criterion("drop", self.drop, DROP_CRITERIA)
        assert criterion is not None
        return criterion

    @property
    def grow_criterion(self) -> Criterion | None:
        """The function that scores absent blocks; None for no growth."""
        return find_criterion("grow", self.grow, GROW_CRITERIA)

    @property
    def density_is_constant(self) -> bool:
        """Whether the density never moves."""
        return bool(self.density.schedule == "constant")

    def density_at(self, progress: float, final: float | None = None) -> float:
        """Return the density at a progress in [0, 1] of the density schedule.

        Args:
            progress: of the schedule.
            final: of a layer that has its own, instead of the model's.
        """
        schedule = DENSITY_SCHEDULES[self.density.schedule]
        final = self.density.final if final is None else final
        return schedule(progress, self.density.initial, final)

    def budgets_at(self, progress: float, grids: Mapping[str, Grid]) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1] of the density schedule.

        Under the "global" distribution they are a beginning: scores decide once there are some.

        Args:
            progress: of the schedule.
            grids: (out_blocks, in_blocks) of each layer, by name.
        """
        fixed = {
            name: self.density_at(progress, final)
            for name, final in layer_densities(self.layer_density, grids).items()
        }
        density = self.density_at(progress)
        return share(self.distribution, density, grids, fixed, self.floor.layer)

    def budgets_by_score(
        self, progress: float, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> dict[str, int]:
        """Return the blocks of each layer at a progress in [0, 1], under any distribution.

        Args:
            progress: of the density schedule.
            scores: drop scores `[out_blocks, in_blocks]` of each layer, by name.
            masks: bool, of the same shapes, the present blocks.
        """
        grids = {name: (mask.shape[0], mask.shape[1]) for name, mask in masks.items()}
        budgets = self.budgets_at(progress, grids)
        if self.distribution == "global":
            fixed = layer_densities(self.layer_density, grids)
            others = [name for name in grids if name not in fixed]
            cells = sum(masks[name].numel() for name in others)
            shares = by_score(
                count_blocks(self.density_at(progress), cells) if others else 0,
                [scores[name] for name in others],
                [masks[name] for name in others],
                [self.floor.blocks(grids[name]) for name in others],
            )
            budgets.update(zip(others, shares, strict=True))
        return budgets

    def capacities(self, grids: Mapping[str, Grid]) -> dict[str, int]:
        """Return the most blocks that each layer will ever hold: no budget moves both ways."""
        ends = (self.budgets_at(0.0, grids), self.budgets_at(1.0, grids))
        return {name: max(budgets[name] for budgets in ends) for name in grids}

    def drop_fraction_at(self, progress: float) -> float:
        """Return the drop fraction at a progress in [0, 1] of the updates."""
        schedule = DROP_FRACTION_SCHEDULES[self.drop_fraction.schedule]
        return schedule(progress, self.drop_fraction.initial, self.drop_fraction.final)

    def timetable(self, total_steps: int) -> Timetable:
        """Resolve fractions to steps of a training of `total_steps` optimizer steps.

        Raises:
            ValueError: if the resolved steps are out of order.
        """

        update_begin, update_until = _resolve("update", self.update, total_steps)
        if self.density_is_constant:
            density_begin, density_until = update_begin, update_until
        else:
            density_begin, density_until = _resolve("density", self.density, total_steps)
            _check_reaches(density_until, update_until)
        return Timetable(
            every_n_steps=self.update.every_n_steps,
            update_begin=update_begin,
            update_until=update_until,
            density_begin=density_begin,
            density_until=density_until,
        )

    @property
    def has_fractions(self) -> bool:
        """Whether a time is a fraction, so that the length of the training must be known."""
        times = [self.update.begin, self.update.until]
        if not self.density_is_constant:
            times += [self.density.begin, self.density.until]
        return any(is_fraction(time) for time in times)


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
    exact: bool = False
    token_stride: int = 1
    init: str = "random"
    shrink: bool = True
    seed: int = 0
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


def _coerce(cls: type[T], value: Any, argument: str) -> T:
    """Build one of the nested dataclasses from itself, a mapping or a constant number."""
    if isinstance(value, cls):
        return dataclasses.replace(value)  # type: ignore[type-var]
    accepted = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    if isinstance(value, Mapping):
        for key in value:
            if key not in accepted:
                close = difflib.get_close_matches(str(key), accepted, n=1)
                hint = f" (did you mean {close[0]!r}?)" if close else ""
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
    span: DensitySchedule | DropFractionSchedule, argument: str, *, initial: float, final: float
) -> None:
    """Put in what was not given; a constant schedule has one value, given as either."""
    if span.schedule == "constant":
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
    argument: str, span: UpdateSchedule | DensitySchedule, total_steps: int
) -> tuple[int, int]:
    """Resolve begin and until to steps, in order."""
    begin, until = resolve_time(span.begin, total_steps), resolve_time(span.until, total_steps)
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
