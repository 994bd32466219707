"""Times, timetables and schedules, against tables and a step-by-step simulation."""

import dataclasses
import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_lightning.config import SparsityConfig
from sparse_lightning.policy.schedules import (
    DENSITY_SCHEDULES,
    DROP_FRACTION_SCHEDULES,
    MAX_SHRINKS,
    Timetable,
    check_time,
    constant,
    cosine,
    cubic,
    is_fraction,
    linear,
    one_shot,
    progress,
    resolve_time,
    should_shrink,
    stepwise,
)
from tests import extensions

quick = settings(deadline=None, max_examples=150, derandomize=True)


@pytest.mark.parametrize(
    ("time", "fraction", "step_of_1000"),
    [
        (0, False, 0),
        (0.0, False, 0),
        (2, False, 2),
        (200, False, 200),
        (5000, False, 5000),
        (0.1, True, 100),
        (0.75, True, 750),
        (1.0, True, 1000),
        (1e3, False, 1000),
        (2.0, False, 2),
        (1e-9, True, 0),
    ],
)
def test_valid_times(time: int | float, fraction: bool, step_of_1000: int) -> None:
    check_time(time, "update.begin")
    assert is_fraction(time) is fraction
    step = resolve_time(time, 1000)
    assert step == step_of_1000 and type(step) is int


@pytest.mark.parametrize(
    "time", [-1, -0.5, -1e-9, 1.5, 2.5, 1e3 + 0.5, math.nan, math.inf, -math.inf]
)
def test_times_out_of_range_are_refused(time: float) -> None:
    with pytest.raises(ValueError, match=rf"`update.begin` must .*got {re.escape(repr(time))}\."):
        check_time(time, "update.begin")


@pytest.mark.parametrize("time", [True, False, "0.5", "100", None, [2], 2 + 0j])
def test_times_that_are_not_numbers_are_refused(time: object) -> None:
    with pytest.raises(TypeError, match=rf"`update.until` must .*got {re.escape(repr(time))}\."):
        check_time(time, "update.until")


def test_the_int_1_is_ambiguous() -> None:
    with pytest.raises(
        ValueError, match=r"`density.until` must not .*got 1\. Write 1\.0 or a step"
    ):
        check_time(1, "density.until")


@pytest.mark.parametrize(
    ("schedule", "values"),
    [
        (constant, [(0.0, 0.2), (0.5, 0.2), (1.0, 0.2)]),
        # 0.2 + 0.8 (1 - p)^3
        (cubic, [(0.0, 1.0), (0.25, 0.5375), (0.5, 0.3), (0.75, 0.2125), (1.0, 0.2)]),
        # 0.2 + 0.4 (1 + cos(pi p))
        (cosine, [(0.0, 1.0), (1 / 3, 0.8), (0.5, 0.6), (2 / 3, 0.4), (1.0, 0.2)]),
        (linear, [(0.0, 1.0), (0.25, 0.8), (0.5, 0.6), (0.75, 0.4), (1.0, 0.2)]),
        (one_shot, [(0.0, 1.0), (0.5, 1.0), (0.999, 1.0), (1.0, 0.2)]),
        # Each stage multiplies by 0.2^(1/4).
        (
            stepwise,
            [
                (0.0, 1.0),
                (0.2, 1.0),
                (0.25, 0.668740304976422),
                (0.5, 0.447213595499958),
                (0.74, 0.447213595499958),
                (0.75, 0.299069756244724),
                (1.0, 0.2),
            ],
        ),
    ],
)
def test_schedules_by_hand(schedule, values: list[tuple[float, float]]) -> None:
    for at, expected in values:
        assert schedule(at, 1.0, 0.2) == pytest.approx(expected, rel=1e-12)


MOVING = [linear, cosine, cubic, stepwise, one_shot]


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize(("initial", "final"), [(1.0, 0.25), (0.3, 0.1), (0.3, 0.0), (0.1, 0.7)])
def test_schedules_end_exactly_and_are_monotonic(schedule, initial: float, final: float) -> None:
    assert schedule(0.0, initial, final) == pytest.approx(initial)
    assert schedule(1.0, initial, final) == final
    values = [schedule(k / 50, initial, final) for k in range(51)]
    assert values == sorted(values, reverse=initial > final)


def test_offered_schedules() -> None:
    assert set(DENSITY_SCHEDULES.values()) == {constant, *MOVING}
    assert set(DROP_FRACTION_SCHEDULES.values()) == {constant, linear, cosine}


@pytest.mark.parametrize("schedule", MOVING)
@pytest.mark.parametrize("final", [0.5, 0.25, 0.1, 0.031, 0.01, 0.001])
@pytest.mark.parametrize("updates", [1, 3, 40, 1000])
def test_memory_shrinks_at_most_five_times(schedule, final: float, updates: int) -> None:
    """At most five shrinks leave no slot empty at the end, for every falling schedule."""
    capacity, shrinks = 100_000, 0
    for k in range(1, updates + 1):
        needed = round(100_000 * schedule(k / updates, 1.0, final))
        if should_shrink(capacity, needed, 1.0, final, k / updates):
            assert needed < capacity
            capacity, shrinks = needed, shrinks + 1
    assert capacity == round(100_000 * final)
    assert shrinks <= MAX_SHRINKS


def test_a_density_that_does_not_fall_keeps_its_memory() -> None:
    assert not should_shrink(100, 100, 0.25, 0.25, 1.0)
    assert not should_shrink(100, 100, 0.1, 0.25, 0.5)


@pytest.mark.parametrize(
    ("step", "begin", "until", "expected"),
    [
        (0, 0, 10, 0.0),
        (5, 0, 10, 0.5),
        (10, 0, 10, 1.0),
        (99, 0, 10, 1.0),
        (3, 4, 8, 0.0),
        (4, 4, 8, 0.0),
        (7, 4, 8, 0.75),
        (0, 0, 0, 1.0),
    ],
)
def test_progress(step: int, begin: int, until: int, expected: float) -> None:
    assert progress(step, begin, until) == expected


@pytest.mark.parametrize(
    ("every", "begin", "until", "updates"),
    [
        (100, 0, 250, [100, 200, 250]),
        (100, 0, 300, [100, 200, 300]),
        (100, 150, 400, [150, 250, 350, 400]),
        (100, 0, 30, [30]),
        (100, 20, 30, [20, 30]),
        (1, 0, 4, [1, 2, 3, 4]),
        (1, 2, 4, [2, 3, 4]),
    ],
)
def test_updates_by_hand(every: int, begin: int, until: int, updates: list[int]) -> None:
    table = Timetable(every, begin, until, 0, until)
    assert walk(table) == updates
    assert table.next_update(until) is None and table.next_update(until + every) is None


def walk(table: Timetable) -> list[int]:
    """Return the updates of a training as the callback finds them, each from the previous one."""
    updates, step = [], 0
    while (step := table.next_update(step)) is not None:
        updates.append(step)
        assert len(updates) <= table.update_until
    assert table.updates() == updates
    return updates


timetables = st.builds(
    lambda every, begin, length: Timetable(every, begin, begin + length, 0, begin + length),
    st.integers(1, 40),
    st.integers(0, 100),
    st.integers(1, 120),
)


@quick
@given(timetables)
def test_updates_equal_a_simulation(table: Timetable) -> None:
    due = [
        step
        for step in range(1, table.update_until + 1)
        if step == table.update_until
        or (step >= table.update_begin and (step - table.update_begin) % table.every_n_steps == 0)
    ]
    assert walk(table) == due
    # A resumed run may start from any step.
    for step in range(table.update_until + 50):
        assert table.next_update(step) == next((s for s in due if s > step), None)


@quick
@given(timetables, st.integers(0, 300))
def test_the_last_update_is_at_the_last_planned_step(table: Timetable, total: int) -> None:
    """This holds if the training ends before `update_until`, but not before `update_begin`."""
    unbounded, bounded = walk(table), walk(dataclasses.replace(table, total_steps=total))
    if total >= table.update_until:
        assert bounded == unbounded
    elif total < max(1, table.update_begin):
        assert bounded == []
    else:
        assert bounded == [*(step for step in unbounded if step < total), total]


@quick
@given(
    st.lists(st.integers(1, 200), min_size=1),
    st.none() | st.integers(0, 220),
    st.integers(0, 230),
)
def test_given_times_equal_a_simulation(times: list[int], total: int | None, step: int) -> None:
    steps = tuple(sorted({*times}))
    table = Timetable(7, 0, 200, 0, 200, total, steps)
    due = [step for step in steps if total is None or step <= total]
    if total and due != [*steps] and total not in due:
        due.append(total)
    assert walk(table) == due
    assert table.next_update(step) == next((s for s in due if s > step), None)


@pytest.mark.parametrize(
    ("total", "times", "updates"),
    [
        (None, (10, 50, 120), [10, 50, 120]),
        (1000, (10, 50, 120), [10, 50, 120]),
        (100, (10, 50, 120), [10, 50, 100]),
        (50, (10, 50, 120), [10, 50]),
        (5, (10, 50, 120), [5]),
        (100, (10, 50), [10, 50]),
        (None, None, [100, 200, 250]),
        (230, None, [100, 200, 230]),
        (200, None, [100, 200]),
        (250, None, [100, 200, 250]),
        (8, None, [8]),
        (0, None, []),
    ],
)
def test_updates_until_the_training_ends(total: int | None, times, updates: list[int]) -> None:
    assert walk(Timetable(100, 0, 250, 0, 250, total, times)) == updates


def test_a_training_that_ends_before_updates_begin_has_none() -> None:
    table = Timetable(100, 300, 900, 0, 900, total_steps=299)
    assert walk(table) == []
    assert walk(dataclasses.replace(table, total_steps=300)) == [300]


def test_a_timetable_as_text() -> None:
    assert str(Timetable(100, 0, 250, 0, 200)) == (
        "topology updates every 100 steps, from step 0 to 250; density moves from step 0 to 200"
    )
    assert str(Timetable(100, 0, 250, 0, 250, 900)) == (
        "topology updates every 100 steps, from step 0 to 250"
    )
    assert str(Timetable(1, 0, 250, 0, 250, 900, (7, 40))) == "topology updates at steps 7, 40"
    assert str(Timetable(100, 0, 66, 0, 66, 88)) == "one topology update, at step 66"
    assert str(Timetable(5, 0, 66, 0, 66, 3)) == "one topology update, at step 3"
    assert str(Timetable(5, 10, 66, 10, 66, 9)) == "no topology update in its 9 steps"
    many = str(Timetable(1, 0, 250, 0, 250, 900, tuple(range(10, 100, 5))))
    assert many == (
        "topology updates at steps 10, 15, 20, 25, 30, 35, 40, 45 and 10 more, to step 95"
    )


def test_progress_of_a_timetable() -> None:
    table = Timetable(10, 20, 60, 40, 50)
    assert [table.density_progress(s) for s in (0, 40, 45, 50, 99)] == [0, 0, 0.5, 1, 1]
    assert [table.update_progress(s) for s in (0, 20, 30, 60, 99)] == [0, 0, 0.25, 1, 1]
    assert Timetable(**table.as_dict()) == table
    assert [type(value) for value in table.as_dict().values()] == [int] * 5 + [type(None)] * 2


@quick
@given(timetables, st.none() | st.integers(0, 300), st.none() | st.lists(st.integers(1, 300)))
def test_a_timetable_is_read_again_from_what_a_checkpoint_holds(table, total, times) -> None:
    table = dataclasses.replace(table, total_steps=total, times=times and tuple(sorted({*times})))
    state = json.loads(json.dumps(table.as_dict()))
    assert state == table.as_dict(), "primitives, and a list of them"
    assert Timetable(**state) == table
    assert Timetable(**state).updates() == table.updates()
    assert hash(Timetable(**state)) == hash(table)


@pytest.mark.parametrize("until", [200, 199, 201, 250, 7, 0.5, 0.333])
def test_the_density_arrives_at_its_final_value(until: int | float) -> None:
    """`density.until` need not be a multiple of `every_n_steps` or reach the first update."""
    density = {"schedule": "cubic", "initial": 1.0, "final": 0.1, "begin": 0, "until": until}
    config = SparsityConfig(density=density, update={"every_n_steps": 50, "until": 0.75})
    table = config.timetable(400)
    at = {step: config.density_at(table.density_progress(step)) for step in walk(table)}
    assert config.density_at(table.density_progress(table.density_until)) == 0.1
    assert config.density_at(table.density_progress(table.density_until - 1)) > 0.1
    first = min(step for step in at if step >= table.density_until)
    assert all((density == 0.1) == (step >= first) for step, density in at.items())
    assert list(at.values()) == sorted(at.values(), reverse=True)


@quick
@given(st.integers(3, 3000), st.integers(1, 400), st.floats(0.2, 1.0), st.floats(0.0, 1.0))
def test_the_last_update_is_at_the_final_density(
    total: int, every: int, until: float, share: float
) -> None:
    density = {"final": 0.07, "until": max(until * share, 0.19)}
    config = SparsityConfig(density=density, update={"every_n_steps": every, "until": until})
    table = config.timetable(total)
    last = walk(table)[-1]
    assert last == table.update_until <= total
    assert config.density_at(table.density_progress(last)) == 0.07
    assert config.drop_fraction_at(table.update_progress(last)) == 0.0


def test_fractions_and_steps_resolve_together() -> None:
    density = {"begin": 0.1, "until": 500.0}
    config = SparsityConfig(
        density=density, update={"every_n_steps": 30, "begin": 40, "until": 0.75}
    )
    assert config.has_fractions
    assert config.timetable(1000) == Timetable(30, 40, 750, 100, 500, 1000)
    with pytest.raises(
        ValueError, match=r"`density.until` .*got density.until=500, update.until=75"
    ):
        config.timetable(100)


@pytest.mark.parametrize(
    ("update", "says"),
    [
        ({"begin": 900, "until": 0.75}, "`update.begin` must be before.*begin=900, until=750"),
        ({"begin": 0.5, "until": 400}, "`update.begin` must be before.*begin=500, until=400"),
    ],
)
def test_times_out_of_order_once_resolved(update: dict, says: str) -> None:
    config = SparsityConfig(update=update)
    with pytest.raises(ValueError, match=says):
        config.timetable(1000)


def test_steps_need_no_known_length() -> None:
    config = SparsityConfig(density=0.2, update={"begin": 0, "until": 500})
    assert not config.has_fractions, "the times of a constant density do not matter"
    table = config.timetable(None)
    assert walk(table) == [100, 200, 300, 400, 500] and table.total_steps is None
    assert SparsityConfig(density={"until": 0.5}, update={"until": 500}).has_fractions


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"update": {"begin": 0.5, "until": 900}},
        {"density": {"until": 0.5}, "update": {"until": 500}},
        {"density": {"begin": 0.1, "until": 400}, "update": {"until": 500}},
        {"update": {"until": 900, "times": extensions.every_tenth_part}},
        {"update": {"until": 900, "times": "tests.extensions.every_tenth_part"}},
        {"update": {"times": [10, 20]}},
    ],
    ids=extensions.name_of,
)
def test_times_that_depend_on_the_length_need_a_known_length(arguments: dict) -> None:
    config = SparsityConfig(**arguments)
    assert config.has_fractions
    says = (
        r"`update` and `density` times .* need a training of known length; "
        r".*Give steps, or total_steps / max_steps\."
    )
    with pytest.raises(ValueError, match=says):
        config.timetable(None)


def test_a_schedule_beyond_the_end_gets_as_far_as_possible() -> None:
    density = {"schedule": "linear", "initial": 1.0, "final": 0.2, "until": 800}
    config = SparsityConfig(density=density, update={"every_n_steps": 150, "until": 1000})
    table = config.timetable(400)
    assert walk(table) == [150, 300, 400]
    assert config.density_at(table.density_progress(400)) == pytest.approx(0.6)
    longer = dataclasses.replace(table, total_steps=2000)
    assert walk(longer) == [150, 300, 450, 600, 750, 900, 1000]


# -- given times ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("times", "steps"),
    [
        ([30, 10, 30, 20], (10, 20, 30)),
        (range(100, 400, 100), (100, 200, 300)),
        ((5, 600, 700), (5, 600)),
        ([np.int64(40), 7], (7, 40)),
        (extensions.every_tenth_part, (100, 200, 300, 400, 500, 600)),
        ("tests.extensions.every_tenth_part", (100, 200, 300, 400, 500, 600)),
        (lambda total_steps: range(2, total_steps, 300), (2, 302, 602)),
        (lambda total_steps: (step for step in (9, 8)), (8, 9)),
    ],
)
def test_updates_run_at_given_times(times, steps: tuple[int, ...]) -> None:
    """Times within begin..until count, sorted and without duplicates."""
    table = SparsityConfig(update={"times": times, "until": 650}).timetable(1000)
    assert table.times == steps and all(type(step) is int for step in table.times)
    assert walk(table) == [*steps]


def test_given_times_are_limited_to_begin_and_until() -> None:
    update = {"times": [10, 20, 30, 40, 50], "begin": 20, "until": 0.4}
    config = SparsityConfig(update=update)
    assert config.timetable(100).times == (20, 30, 40)
    assert config.timetable(60).times == (20,), "0.4 of 60 is 24"
    with pytest.raises(ValueError, match=r"`update.times` must .*got 10\.\.50 for 51\.\.60\."):
        SparsityConfig(update={**update, "begin": 51, "until": 60}).timetable(100)


def test_given_times_need_no_known_length() -> None:
    config = SparsityConfig(update={"times": [30, 10], "until": 100})
    assert not config.has_fractions
    assert walk(config.timetable(None)) == [10, 30]
    assert walk(config.timetable(20)) == [10, 20]


@pytest.mark.parametrize(
    ("returned", "says"),
    [
        ([], "got none"),
        (None, "got None"),
        (7, "got 7"),
        ([0, 5], "got 0"),
        ([5.0], r"got 5\.0"),
        ([True], "got True"),
        ("soon", "got 's'"),
    ],
)
def test_invalid_results_of_a_times_function(returned: object, says: str) -> None:
    config = SparsityConfig(update={"times": lambda total_steps: returned})
    with pytest.raises(ValueError, match=rf"`update.times` must be steps, .*{says}\."):
        config.timetable(100)


@pytest.mark.parametrize(("times", "until"), [([10, 40], 41), ([10, 40, 90], 60), ([10], 0.5)])
def test_the_density_must_be_final_by_the_last_given_time(times, until) -> None:
    density = {"schedule": "cubic", "until": until}
    config = SparsityConfig(density=density, update={"times": times, "until": 80})
    with pytest.raises(ValueError, match=r"`density.until` must not be after the last of `update"):
        config.timetable(100)
    # A constant density is always final.
    SparsityConfig(density=0.5, update={"times": times, "until": 80}).timetable(100)


def test_the_density_is_final_at_the_last_given_time() -> None:
    density = {"schedule": "cubic", "final": 0.1, "until": 40}
    config = SparsityConfig(density=density, update={"times": [10, 40], "until": 80})
    table = config.timetable(100)
    assert [config.density_at(table.density_progress(step)) for step in walk(table)][-1] == 0.1


@pytest.mark.parametrize("total", [1, 2, 3])
def test_the_shortest_trainings_resolve(total: int) -> None:
    """`Trainer(fast_dev_run=True)` runs a single step."""
    for density in (0.25, {"schedule": "cubic", "initial": 1.0, "final": 0.25, "until": 0.5}):
        config = SparsityConfig(density=density)
        table = config.timetable(total)
        assert walk(table)[-1] <= total
        assert config.density_at(table.density_progress(total)) == 0.25
