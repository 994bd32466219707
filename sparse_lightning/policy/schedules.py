"""Schedules of density and drop fraction over progress, and the steps at which updates run."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

# (progress in [0, 1], initial, final) -> value.
Schedule = Callable[[float, float, float], float]
# total steps of the training -> steps after which updates run.
Times = Callable[[int], Sequence[int]]


def constant(progress: float, initial: float, final: float) -> float:
    """Return `final` at every progress.

    >>> constant(0.0, 1.0, 0.25)
    0.25
    """
    return final


def linear(progress: float, initial: float, final: float) -> float:
    """Move from `initial` to `final` linearly.

    >>> linear(0.25, 1.0, 0.2)
    0.8
    """
    return final + (initial - final) * (1 - progress)


def cubic(progress: float, initial: float, final: float) -> float:
    """Move from `initial` to `final` along a cubic: final + (initial - final) (1 - progress)^3.

    Source: Zhu & Gupta 2017, "To prune, or not to prune", eq. 1.

    >>> cubic(0.0, 1.0, 0.2), cubic(0.5, 1.0, 0.2), cubic(1.0, 1.0, 0.2)
    (1.0, 0.30000000000000004, 0.2)
    """
    return final + (initial - final) * (1 - progress) ** 3


def cosine(progress: float, initial: float, final: float) -> float:
    """Move from `initial` to `final` along half a cosine.

    Source: Evci et al. 2020 (RigL), section 3, eq. for f_decay; Dettmers & Zettlemoyer 2019.

    >>> cosine(0.0, 0.3, 0.0), round(cosine(0.5, 0.3, 0.0), 3), cosine(1.0, 0.3, 0.0)
    (0.3, 0.15, 0.0)
    """
    return final + (initial - final) * (1 + math.cos(math.pi * progress)) / 2


STAGES = 4


def stepwise(progress: float, initial: float, final: float) -> float:
    """Move from `initial` to `final` in `STAGES` steps of the same factor, the last at progress 1.

    Source: Han et al. 2015, iterative pruning, with a constant share per round as in Frankle &
    Carbin 2019.

    >>> [round(stepwise(p, 1.0, 0.0625), 4) for p in (0.0, 0.24, 0.25, 0.5, 0.75, 1.0)]
    [1.0, 1.0, 0.5, 0.25, 0.125, 0.0625]
    """
    if progress >= 1:
        return final
    stages: float = (final / initial) ** (math.floor(progress * STAGES) / STAGES)
    return initial * stages


def one_shot(progress: float, initial: float, final: float) -> float:
    """Stay at `initial` and jump to `final` at progress 1.

    >>> one_shot(0.0, 1.0, 0.25), one_shot(0.99, 1.0, 0.25), one_shot(1.0, 1.0, 0.25)
    (1.0, 1.0, 0.25)
    """
    return final if progress >= 1 else initial


DENSITY_SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
    "cubic": cubic,
    "stepwise": stepwise,
    "one_shot": one_shot,
}
DROP_FRACTION_SCHEDULES: dict[str, Schedule] = {
    "constant": constant,
    "linear": linear,
    "cosine": cosine,
}


MAX_SHRINKS = 5


def should_shrink(
    capacity: int, needed: int, initial: float, final: float, progress: float
) -> bool:
    """Return whether to free slots after the density has fallen, at most `MAX_SHRINKS` times.

    Args:
        capacity: number of slots of all layers.
        needed: the most blocks that all layers will hold from now on.
        initial, final: initial and final density of the schedule.
        progress: progress of the schedule, in [0, 1].

    >>> [should_shrink(100, needed, 1.0, 0.1, 0.5) for needed in (60, 50)]
    [False, True]
    >>> should_shrink(100, 99, 1.0, 0.1, 1.0)
    True
    """
    if progress >= 1:
        return needed < capacity
    ratio: float = min(0.5, (final / initial) ** (1 / MAX_SHRINKS))
    return needed <= ratio * capacity


def progress(step: int, begin: int, until: int) -> float:
    """Return the position of `step` between `begin` and `until`, clamped to [0, 1].

    >>> progress(5, 10, 20), progress(15, 10, 20), progress(30, 10, 20)
    (0.0, 0.5, 1.0)
    """
    if step >= until:
        return 1.0
    return max(0.0, (step - begin) / (until - begin))


def check_time(time: int | float, argument: str) -> None:
    """Raise TypeError or ValueError unless `time` is a step or a fraction of the training.

    An int >= 2, or an integral float above 1 (YAML's 1e3), is a step; a float in (0, 1] is a
    fraction; 0 is both. The int 1 is ambiguous and raises.
    """
    if isinstance(time, bool) or not isinstance(time, (int, float)):
        raise TypeError(
            f"`{argument}` must be a step (int) or a fraction (float in (0, 1]); got {time!r}."
        )
    if isinstance(time, int) and time == 1:
        raise ValueError(
            f"`{argument}` must not be the int 1, which could mean the first step or the whole "
            "training; got 1. Write 1.0 or a step >= 2."
        )
    if not math.isfinite(time) or time < 0 or (time > 1 and time != int(time)):
        raise ValueError(
            f"`{argument}` must be a step (int >= 2), a fraction (float in (0, 1]) or 0; "
            f"got {time!r}."
        )


def is_fraction(time: int | float) -> bool:
    """Return whether a checked time is a fraction of the training.

    >>> is_fraction(0.5), is_fraction(1.0), is_fraction(1e3), is_fraction(0)
    (True, True, False, False)
    """
    return isinstance(time, float) and 0 < time <= 1


def resolve_time(time: int | float, total_steps: int) -> int:
    """Convert a checked time to a step.

    >>> resolve_time(0.75, 1000), resolve_time(200, 1000), resolve_time(1e3, 50)
    (750, 200, 1000)
    """
    return round(time * total_steps) if is_fraction(time) else int(time)


@dataclass(frozen=True)
class Timetable:
    """The resolved optimizer steps at which the density changes and updates run.

    Updates run after `update_begin` + k * `every_n_steps` steps, never before the first step, and
    finally after `update_until` steps, so that a density schedule always reaches its final value;
    or after the steps in `times`. If the training is planned to end earlier, the last update runs
    after the last planned step, so that the schedule gets as far as possible.

    Attributes:
        every_n_steps: interval between updates; not used with `times`.
        update_begin, update_until: first and last step after which an update may run.
        density_begin, density_until: steps at which the density schedule begins and ends.
        total_steps: planned number of steps; None if unknown.
        times: steps after which updates run, ascending; None for a regular interval.
    """

    every_n_steps: int
    update_begin: int
    update_until: int
    density_begin: int
    density_until: int
    total_steps: int | None = None
    times: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        # `as_dict` stores a list.
        if self.times is not None:
            object.__setattr__(self, "times", tuple(self.times))

    def next_update(self, step: int) -> int | None:
        """Return the step of the first update after `step` steps; None if no update remains.

        >>> table = Timetable(100, 0, 250, 0, 200)
        >>> table.next_update(0), table.next_update(100), table.next_update(200)
        (100, 200, 250)
        >>> table.next_update(250) is None
        True
        """
        update = self._next_scheduled(step)
        if update is None or self.total_steps is None:
            return update
        if self.total_steps < self.update_begin:
            return None
        update = min(update, self.total_steps)
        return update if update > step else None

    def _next_scheduled(self, step: int) -> int | None:
        """Return the next update of a training of unlimited length."""
        if self.times is not None:
            i = bisect.bisect_right(self.times, step)
            return self.times[i] if i < len(self.times) else None
        k = max(0, (step - self.update_begin) // self.every_n_steps + 1)
        update = self.update_begin + k * self.every_n_steps
        if update == 0:
            update = self.every_n_steps
        update = min(update, self.update_until)
        return update if update > step else None

    def updates(self) -> list[int]:
        """Return the steps of all updates of the training.

        >>> Timetable(100, 0, 250, 0, 200).updates()
        [100, 200, 250]
        >>> Timetable(100, 0, 250, 0, 200, total_steps=130).updates()
        [100, 130]
        >>> Timetable(100, 0, 250, 0, 200, times=(7, 90)).updates()
        [7, 90]
        """
        steps, step = [], self.next_update(0)
        while step is not None:
            steps.append(step)
            step = self.next_update(step)
        return steps

    def density_progress(self, step: int) -> float:
        """Return the progress of the density schedule after `step` steps, in [0, 1]."""
        return progress(step, self.density_begin, self.density_until)

    def update_progress(self, step: int) -> float:
        """Return the progress of the drop fraction after `step` steps, in [0, 1]."""
        return progress(step, self.update_begin, self.update_until)

    def __str__(self) -> str:
        first = self.next_update(0)
        if first is None:
            text = f"no topology update in its {self.total_steps} steps"
        elif self.next_update(first) is None:
            text = f"one topology update, at step {first}"
        elif self.times is None:
            text = (
                f"topology updates every {self.every_n_steps} steps, "
                f"from step {self.update_begin} to {self.update_until}"
            )
        else:
            steps = ", ".join(map(str, self.times[:_NAMED_TIMES]))
            more = len(self.times) - _NAMED_TIMES
            text = f"topology updates at steps {steps}"
            text += f" and {more} more, to step {self.times[-1]}" if more > 0 else ""
        if (self.density_begin, self.density_until) != (self.update_begin, self.update_until):
            text += f"; density moves from step {self.density_begin} to {self.density_until}"
        return text

    def as_dict(self) -> dict[str, int | list[int] | None]:
        """Return the fields as primitives and lists, for a checkpoint."""
        return {**asdict(self), "times": None if self.times is None else list(self.times)}


_NAMED_TIMES = 8
