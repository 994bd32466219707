"""Values that the configuration accepts, and the errors for those that it refuses."""

import dataclasses
import math
import re
from collections import OrderedDict
from types import MappingProxyType

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

from sparse_lightning import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    UpdateSchedule,
)
from sparse_lightning.config import SparsityConfig, SparsityNode
from sparse_lightning.policy.criteria import gradient, magnitude, random
from sparse_lightning.policy.distributions import erdos_renyi
from sparse_lightning.policy.rules import DropAndGrow
from sparse_lightning.policy.schedules import constant, cubic
from tests import extensions

NAN, INF = math.nan, math.inf


def test_the_defaults() -> None:
    config = SparsityConfig()
    assert config.block_size == 64
    assert config.include == ("*",) and config.exclude == ("head", "lm_head", "classifier")
    assert config.density == DensitySchedule("constant", 0.25, 0.25)
    assert config.update == UpdateSchedule(100, 0, 0.75, None)
    assert config.rule is None
    assert config.drop_fraction == DropFractionSchedule("cosine", 0.1, 0.0)
    assert config.monitor == MonitorOptions(10, 8)


CUBIC = {"schedule": "cubic", "initial": 0.9, "final": 0.1, "begin": 0.1, "until": 0.5}


@pytest.mark.parametrize("kind", [dict, OrderedDict, MappingProxyType, lambda d: d])
def test_mappings_stand_for_the_dataclasses(kind) -> None:
    config = SparsityConfig(
        density=kind(CUBIC),
        update=kind({"every_n_steps": 7, "begin": 20}),
        drop_fraction=kind({"schedule": "constant", "initial": 0.2}),
        monitor=kind({"images": 0}),
    )
    assert config.density == DensitySchedule("cubic", 0.9, 0.1, 0.1, 0.5)
    assert config.update == UpdateSchedule(7, 20, 0.75)
    assert config.drop_fraction == DropFractionSchedule("constant", 0.2)
    assert config.monitor == MonitorOptions(10, 0)


@pytest.mark.parametrize("kind", [DensitySchedule, DropFractionSchedule])
def test_a_constant_schedule_takes_either_value(kind) -> None:
    assert (
        kind("constant", initial=0.1) == kind("constant", final=0.1) == kind("constant", 0.1, 0.1)
    )
    with pytest.raises(ValueError, match=r"one value.*got initial=0.1, final=0.2. Give one"):
        kind("constant", initial=0.1, final=0.2)


def test_a_dataclass_is_taken_as_a_copy() -> None:
    mine = UpdateSchedule(7, 20, 0.75)
    config = SparsityConfig(update=mine)
    assert config.update == mine
    mine.every_n_steps = 0
    assert config.update.every_n_steps == 7
    SparsityConfig().update.every_n_steps = 3
    assert SparsityConfig().update.every_n_steps == 100


@pytest.mark.parametrize("density", [0.1, 1, 1.0])
def test_a_number_is_held_constant(density: float) -> None:
    config = SparsityConfig(density=density, drop_fraction=0)
    assert config.density_is_constant
    assert [config.density_at(p) for p in (0.0, 0.3, 1.0)] == [density] * 3
    assert [config.drop_fraction_at(p) for p in (0.0, 0.3, 1.0)] == [0] * 3
    assert config.budgets({"fc": (10, 10)}).capacities() == {"fc": density * 100}


@pytest.mark.parametrize(
    ("density", "highest"),
    [
        ({"initial": 1.0, "final": 0.25}, 1.0),
        ({"initial": 0.1, "final": 0.5}, 0.5),
        ({"schedule": "constant", "initial": 0.1}, 0.1),
    ],
)
def test_the_highest_density_fixes_the_capacity(density: dict, highest: float) -> None:
    config = SparsityConfig(density=density)
    assert config.budgets({"fc": (10, 10)}).capacities() == {"fc": highest * 100}
    assert max(config.density_at(p / 10) for p in range(11)) == highest


@pytest.mark.parametrize(
    "accepted",
    [
        {"monitor": None},
        {"include": ["fc1", "blocks.*.mlp", "re:.*fc[12]"], "exclude": []},
        {"include": ("fc1",)},
        {"seed": 2**40},
        {"token_stride": 10**6},
        {"density": {"begin": 0, "until": 1e3}, "update": {"until": 2000}},
        {"density": {"until": 0.75}, "update": {"until": 0.75}},
        {"density": {"until": 900}, "update": {"until": 0.75}},
        {"density": 0.5, "update": {"until": 0.1}},
        {"drop_fraction": 1.0},
        {"monitor": {"every_n_updates": 1, "images": 0}},
        {"update": {"times": range(10, 20)}},
        {"update": {"times": (20, 10, 20)}},
        {"update": {"times": "tests.extensions.every_tenth_part"}},
        {"distribution": "tests.extensions.first_full"},
        {"nm": "2:4", "regrow_inner": False},
        {"nm": "2:4", "density": 1.0},
        {"density": {"schedule": "tests.extensions.quadratic"}},
        {"drop_fraction": {"schedule": lambda progress, initial, final: 0.2}},
        {"rule": "tests.extensions.Still", "drop": "magnitude", "drop_fraction": 0.5},
    ],
    ids=extensions.name_of,
)
def test_accepted(accepted: dict) -> None:
    SparsityConfig(**accepted)


def refused(argument: str, value: object, error: type[Exception] = ValueError, **arguments):
    """Return a row of arguments, the error, and the argument and value that it must name."""
    name, got = re.escape(argument), re.escape(repr(value))
    return pytest.param(
        arguments, error, rf"`{name}` must .*got .*{got}", id=f"{argument}={value!r}"
    )


BAD_DENSITIES = [0, 0.0, -0.1, 1.01, 2, NAN, INF]
BAD_TIMES = [-1, -0.5, 1.5, NAN, INF]


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        *(refused("block_size", b, block_size=b) for b in [8, 48, 0, -16, "64", True, None]),
        refused("block_size", 64.0, (ValueError, TypeError), block_size=64.0),
        refused("block_size", [64], (ValueError, TypeError), block_size=[64]),
        # Names.
        *(
            refused(name, value, (ValueError, TypeError), **{name: value})
            for name in ("distribution", "drop", "grow", "init")
            for value in ("foo", "", None, 3, ["random"], {"random": 1})
        ),
        refused("density.schedule", "cosin", density={"schedule": "cosin"}),
        refused("density.schedule", None, density={"schedule": None}),
        refused("drop_fraction.schedule", "cubic", drop_fraction={"schedule": "cubic"}),
        *(
            refused("update.times", t, update={"times": t})
            for t in ("often", "no.such", "os.path", True, 3, 0.5)
        ),
        *(
            refused("update.times", t, update={"times": [10, t]})
            for t in (0, -1, 2.0, 0.5, True, "20", None, NAN)
        ),
        *(refused("nm", nm, nm=nm) for nm in ("1:4", "2:4 ", "", 0, 2.4, True, (2, 4), ["2:4"])),
        *(refused("regrow_inner", r, TypeError, regrow_inner=r) for r in [1, "yes", None]),
        refused("rule", "rigl", rule="rigl"),
        *(refused("rule", r, rule=r) for r in (3, True, ["a.b"], "no.such", "os.path")),
        # Patterns.
        refused("include", "fc1", TypeError, include="fc1"),
        refused("exclude", "head", TypeError, exclude="head"),
        refused("include", [3], TypeError, include=[3]),
        refused("exclude", ["fc", None], TypeError, exclude=["fc", None]),
        refused("include", None, TypeError, include=None),
        refused("exclude", None, TypeError, exclude=None),
        refused("include", 3, TypeError, include=3),
        refused("include", "re:fc(", include=["fc1", "re:fc("]),
        refused("exclude", "re:*", exclude=["re:*"]),
        # Numbers.
        *(refused("token_stride", s, token_stride=s) for s in [0, -1, 0.5, True, "1", None]),
        *(refused("seed", s, seed=s) for s in [-1, 0.5, True, "0", None]),
        *(
            refused(f"density.{key}", d, density={"schedule": "cubic", key: d})
            for key in ("initial", "final")
            for d in [*BAD_DENSITIES, True, "0.1"]
        ),
        # The key that was given is named, although a constant schedule fills in the other.
        *(
            refused(f"density.{key}", d, density={"schedule": "constant", key: d})
            for key in ("initial", "final")
            for d in BAD_DENSITIES
        ),
        *(refused("density", d, density=d) for d in BAD_DENSITIES),
        refused("drop_fraction", 2, drop_fraction=2),
        refused("drop_fraction.final", 2, drop_fraction={"schedule": "constant", "final": 2}),
        *(refused("density", d, TypeError, density=d) for d in [True, "0.1", None, [0.1]]),
        *(
            refused(f"drop_fraction.{key}", f, drop_fraction={key: f})
            for key in ("initial", "final")
            for f in [-0.1, 1.1, NAN, True, "0.3"]
        ),
        *(refused("drop_fraction", f, TypeError, drop_fraction=f) for f in [True, "0.3", None]),
        *(
            refused("update.every_n_steps", n, update={"every_n_steps": n})
            for n in [0, -1, 1.5, 10.0, True, "10", None]
        ),
        *(
            refused("monitor.every_n_updates", n, monitor={"every_n_updates": n})
            for n in [0, -1, 1.5, True, None]
        ),
        *(refused("monitor.images", n, monitor={"images": n}) for n in [-1, 1.5, True, None]),
        *(
            refused("monitor.record", r, TypeError, monitor={"record": r})
            for r in [1, "here", None]
        ),
        *(refused("update", u, TypeError, update=u) for u in [None, 100, 0.5, True, "often", []]),
        *(refused("monitor", m, TypeError, monitor=m) for m in [True, False, 5, "all", []]),
        # Times.
        *(
            refused(f"{argument}.{key}", time, **{argument: {key: time}})
            for argument in ("density", "update")
            for key in ("begin", "until")
            for time in BAD_TIMES
        ),
        *(
            refused(f"{argument}.{key}", time, TypeError, **{argument: {key: time}})
            for argument in ("density", "update")
            for key in ("begin", "until")
            for time in [True, "0.5", None]
        ),
    ],
)
def test_refused(arguments: dict, error, says: str) -> None:
    with pytest.raises(error, match=says):
        SparsityConfig(**arguments)


def test_a_pattern_that_yaml_reads_as_a_number() -> None:
    assert yaml.safe_load("nm: 2:4") == {"nm": 124}
    assert SparsityConfig(nm=124) == SparsityConfig(nm="2:4")
    assert SparsityConfig(nm=124).training_options()["nm"] == "2:4"
    with pytest.raises(ValueError, match=r"`nm` must be '2:4'.*got 123\."):
        SparsityConfig(**yaml.safe_load("nm: 2:3"))


@pytest.mark.parametrize("argument", ["density", "update"])
@pytest.mark.parametrize("key", ["begin", "until"])
def test_the_int_1_is_refused_with_a_remedy(argument: str, key: str) -> None:
    says = rf"`{argument}\.{key}` must not be the int 1.*got 1\. Write 1\.0 or a step >= 2"
    with pytest.raises(ValueError, match=says):
        SparsityConfig(**{argument: {key: 1}})


@pytest.mark.parametrize(
    ("argument", "begin", "until"),
    [
        ("density", 0.5, 0.25),
        ("density", 0.5, 0.5),
        ("density", 300, 200),
        ("density", 0, 0),
        ("density", 0.1, 0),
        ("update", 0.5, 0.25),
        ("update", 300, 300),
        ("update", 1e3, 300),
        ("update", 0, 0),
    ],
)
def test_begin_must_come_before_until(argument: str, begin: float, until: float) -> None:
    rule = rf"`{argument}\.begin` must be before `{argument}\.until`"
    says = rf"{rule}; got begin={begin!r}, until={until!r}"
    with pytest.raises(ValueError, match=says):
        SparsityConfig(**{argument: {"begin": begin, "until": until}})


@pytest.mark.parametrize(("density", "update"), [(0.8, 0.75), (1.0, 0.75), (500, 400), (1e3, 400)])
def test_the_density_must_arrive_before_updates_end(density: float, update: float) -> None:
    says = rf"`density\.until` must not be after `update\.until`.*got .*{density!r}.*{update!r}"
    with pytest.raises(ValueError, match=says):
        SparsityConfig(density={"until": density}, update={"until": update})


@pytest.mark.parametrize(
    ("argument", "options"),
    [
        ("distribution", ["uniform", "erdos_renyi", "global"]),
        ("drop", ["magnitude", "gradient", "saliency", "movement", "random"]),
        ("grow", ["gradient", "momentum", "random", "none"]),
        ("init", ["random", "magnitude"]),
        (
            "density.schedule",
            ["constant", "linear", "cosine", "cubic", "stepwise", "one_shot"],
        ),
        ("drop_fraction.schedule", ["constant", "linear", "cosine"]),
    ],
)
def test_an_unknown_name_raises_with_the_known_ones(argument: str, options: list) -> None:
    name, _, key = argument.partition(".")
    with pytest.raises(ValueError) as error:
        SparsityConfig(**{name: {key: "foo"} if key else "foo"})
    message = str(error.value)
    assert message.startswith(f"`{argument}` must be one of") and "'foo'" in message
    assert all(repr(option) in message for option in options)
    falling = {"density": {"schedule": "cubic"}} if argument == "distribution" else {}
    for option in options:
        SparsityConfig(**falling, **{name: {key: option} if key else option})


@pytest.mark.parametrize(
    ("argument", "typo", "meant"),
    [
        ("density", "fnal", "final"),
        ("density", "shedule", "schedule"),
        ("update", "every_n_step", "every_n_steps"),
        ("update", "untill", "until"),
        ("drop_fraction", "inital", "initial"),
        ("monitor", "image", "images"),
        ("density", "zzz", None),
        ("update", 3, None),
        # A key of one option is not a key of another.
        ("drop_fraction", "every_n_steps", None),
    ],
)
def test_a_mistyped_key_raises_with_a_suggestion(argument, typo, meant) -> None:
    accepted = [field.name for field in dataclasses.fields(getattr(SparsityConfig(), argument))]
    with pytest.raises(ValueError) as error:
        SparsityConfig(**{argument: {typo: 0.1}})
    message = str(error.value)
    assert message.startswith(f"`{argument}` has no key {typo!r}")
    assert message.endswith(f"accepted keys: {', '.join(map(repr, accepted))}.")
    assert (f"did you mean {meant!r}?" in message) if meant else ("did you mean" not in message)


GRIDS = {"up.0": (4, 4), "up.1": (8, 8), "down": (8, 8)}


@pytest.mark.parametrize("density", [0.25, {"schedule": "cubic", "initial": 0.1, "final": 0.25}])
def test_global_needs_a_density_that_falls(density) -> None:
    with pytest.raises(ValueError, match=r"`distribution` must not be 'global' unless .*falls"):
        SparsityConfig(distribution="global", density=density)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"layer_density": {"a": 0.0}}, ValueError, r"`layer_density\['a'\]` must .*got 0\.0"),
        ({"layer_density": {"re:(": 0.5}}, ValueError, r"`layer_density` must hold valid regular"),
        ({"layer_density": 0.5}, TypeError, r"`layer_density` must map patterns.*got 0\.5"),
        ({"floor": {"layer": 1.5}}, ValueError, r"`floor\.layer` must be a number in \[0, 1\]"),
        ({"floor": {"row": -1}}, ValueError, r"`floor\.row` must be an integer of at least 0"),
        ({"floor": {"column": 0.5}}, ValueError, r"`floor\.column` must be an integer"),
        ({"floor": {"col": 1}}, ValueError, r"has no key 'col' \(did you mean 'column'\?\)"),
        ({"floor": 1}, TypeError, r"`floor` must be a mapping"),
        ({"regrow": "no"}, TypeError, r"`regrow` must be true or false; got 'no'"),
        ({"exact": True}, TypeError, "unexpected keyword argument 'exact'"),
        ({"shrink": None}, TypeError, r"`shrink` must be true or false; got None"),
        ({"drop": "none"}, ValueError, r"`drop` must be one of"),
        ({"drop": None}, ValueError, r"`drop` must be one of"),
    ],
)
def test_refused_options_of_the_dynamics(arguments: dict, error, says: str) -> None:
    with pytest.raises(error, match=says):
        SparsityConfig(**arguments)


def test_criteria_may_be_functions_and_paths() -> None:
    config = SparsityConfig(drop=magnitude, grow="sparse_lightning.policy.criteria.random")
    assert config.drop_criterion is magnitude and config.grow_criterion is random
    assert SparsityConfig(grow="none").grow_criterion is None


# -- user-defined functions ----------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [extensions.quadratic, "tests.extensions.quadratic"])
@pytest.mark.parametrize("kind", [DensitySchedule, dict])
def test_a_user_defined_schedule(schedule, kind) -> None:
    config = SparsityConfig(
        density=kind(schedule=schedule, initial=1.0, final=0.2),
        drop_fraction=DropFractionSchedule(schedule),
    )
    assert [config.density_at(p) for p in (0.0, 0.5, 1.0)] == pytest.approx([1.0, 0.4, 0.2])
    assert config.density_at(0.5, final=0.6) == pytest.approx(0.7)
    assert [config.drop_fraction_at(p) for p in (0.0, 0.5)] == pytest.approx([0.1, 0.025])
    assert not config.density_is_constant
    assert config.budgets({"fc": (10, 10)}).at(0.5) == {"fc": 40}


@pytest.mark.parametrize(
    "schedule", ["constant", constant, "sparse_lightning.policy.schedules.constant"]
)
def test_constant_is_constant_however_it_is_named(schedule) -> None:
    config = SparsityConfig(density={"schedule": schedule, "initial": 0.3})
    assert config.density_is_constant
    assert config.density_at(0.2) == 0.3


WRONG_VALUES = [1.01, -0.1, NAN, INF, -INF, None, "0.5", True, 1 + 0j, torch.tensor(0.5)]


@pytest.mark.parametrize("value", [*WRONG_VALUES, 0, 0.0, 2], ids=repr)
def test_invalid_results_of_a_density_schedule(value: object) -> None:
    config = SparsityConfig(density={"schedule": lambda *_: value})
    got = re.escape(repr(value))
    says = rf"`density\.schedule` must return a density in \(0, 1\]; got {got} at progress 0\.25\."
    for ask in (
        lambda: config.density_at(0.25),
        lambda: config.budgets(GRIDS).at(0.25),
        lambda: config.budgets(GRIDS).capacities(0.25),
    ):
        with pytest.raises(ValueError, match=says):
            ask()


@pytest.mark.parametrize("value", [*WRONG_VALUES, 2], ids=repr)
def test_invalid_results_of_a_drop_fraction_schedule(value: object) -> None:
    config = SparsityConfig(drop_fraction={"schedule": lambda *_: value})
    rule = r"`drop_fraction\.schedule` must return a share in \[0, 1\]"
    with pytest.raises(
        ValueError, match=rf"{rule}; got {re.escape(repr(value))} at progress 0\.5\."
    ):
        config.drop_fraction_at(0.5)


@pytest.mark.parametrize("value", [0.25, 1, np.float64(0.25), np.float32(0.25), np.int64(1)])
def test_numbers_of_other_types_become_floats(value: float) -> None:
    def schedule(progress: float, initial: float, final: float) -> float:
        return value

    config = SparsityConfig(density={"schedule": schedule}, drop_fraction={"schedule": schedule})
    for taken in (config.density_at(0.5), config.drop_fraction_at(0.5)):
        assert type(taken) is float and taken == value


def test_an_error_names_the_progress_at_which_a_schedule_fails() -> None:
    config = SparsityConfig(density={"schedule": extensions.too_dense, "initial": 0.5})
    assert config.density_at(0.5) == 1.0
    with pytest.raises(ValueError, match=r"got 1\.25 at progress 0\.75\."):
        config.density_at(0.75)
    with pytest.raises(ValueError, match=r"`density\.schedule` must .* at progress 0\.5156\."):
        config.budgets(GRIDS).capacities()


# -- rules ----------------------------------------------------------------------------------------


def test_the_default_rule_drops_and_grows() -> None:
    rule = SparsityConfig(drop="random", grow="none", regrow=False).update_rule
    assert isinstance(rule, DropAndGrow)
    assert (rule.drop, rule.grow, rule.regrow) == (random, None, False)
    usual = SparsityConfig().update_rule
    assert isinstance(usual, DropAndGrow)
    assert (usual.drop, usual.grow, usual.regrow) == (magnitude, gradient, True)


@pytest.mark.parametrize(
    "rule", [extensions.still, extensions.fewest, "tests.extensions.still", lambda request: None]
)
def test_a_user_defined_rule_is_used_unchanged(rule) -> None:
    config = SparsityConfig(rule=rule)
    found = config.update_rule
    assert found is (extensions.still if isinstance(rule, str) else rule)
    assert found is config.update_rule


@pytest.mark.parametrize("rule", [extensions.Still, "tests.extensions.Still"])
def test_a_class_of_rules_is_instantiated_once(rule) -> None:
    config = SparsityConfig(rule=rule, drop_fraction=0.5, density=0.1)
    found = config.update_rule
    assert type(found) is extensions.Still and found.patience == 3
    assert config.update_rule is found
    assert SparsityConfig(rule=rule).update_rule is not found


@pytest.mark.parametrize(
    ("rule", "says"),
    [
        (extensions.Demanding, r"class that needs no arguments.*'patience'"),
        ("tests.extensions.Demanding", r"class that needs no arguments.*'patience'"),
        (extensions.Uncallable, r"instances can be called; got Uncallable\."),
        ("tests.extensions.Uncallable", r"instances can be called; got Uncallable\."),
        (extensions.Uncallable(), r"dotted path of a function; got <tests"),
        ("tests.extensions.WRONG", r"has no attribute 'WRONG'"),
    ],
)
def test_invalid_rules(rule, says: str) -> None:
    with pytest.raises(ValueError, match=rf"^`rule` must be .*{says}"):
        SparsityConfig(rule=rule)


@pytest.mark.parametrize(
    "ignored", [{"drop": "random"}, {"grow": "none"}, {"regrow": False}, {"drop": random}]
)
def test_options_that_a_rule_ignores_are_refused(ignored: dict) -> None:
    (key, value), *_ = ignored.items()
    says = rf"`rule` must not be given together with `drop`.*{key}={re.escape(repr(value))}"
    with pytest.raises(ValueError, match=says):
        SparsityConfig(rule=extensions.still, **ignored)
    # Defaults that are given explicitly are accepted.
    SparsityConfig(rule=extensions.still, drop=magnitude, grow="gradient", regrow=True)


# -- options that a resumed training shares -------------------------------------------------------


def test_training_options_name_functions_and_hold_primitives() -> None:
    config = SparsityConfig(
        density={"schedule": extensions.quadratic},
        distribution="tests.extensions.first_full",
        update={"times": "tests.extensions.every_tenth_part"},
        drop_fraction={"schedule": lambda progress, initial, final: 0.1},
        rule=extensions.Still(7),
    )
    state = config.training_options()
    own = "tests.extensions"
    assert state["density.schedule"] == f"{own}.quadratic"
    assert state["distribution"] == f"{own}.first_full"
    assert state["update.times"] == f"{own}.every_tenth_part"
    assert state["drop_fraction.schedule"].endswith("<lambda>")
    assert state["rule"] == f"{own}.Still"
    assert state["drop"] == "magnitude"
    assert SparsityConfig(rule=extensions.fewest).training_options()["rule"] == f"{own}.fewest"
    assert SparsityConfig().training_options()["rule"] is None
    assert SparsityConfig().training_options()["update.times"] is None
    times = SparsityConfig(update={"times": (30, np.int64(10), 30)}).training_options()[
        "update.times"
    ]
    assert times == [10, 30] and all(type(time) is int for time in times)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"density": {"schedule": "cubic"}}, {"density": {"schedule": cubic}}),
        ({"distribution": "erdos_renyi"}, {"distribution": erdos_renyi}),
        ({"rule": extensions.Still}, {"rule": "tests.extensions.Still"}),
        ({"rule": extensions.Still}, {"rule": extensions.Still(9)}),
        ({"update": {"times": [20, 10]}}, {"update": {"times": (10, 20, 20)}}),
        ({"drop": "random"}, {"drop": random}),
    ],
)
def test_equivalent_configurations_have_equal_training_options(one: dict, other: dict) -> None:
    assert SparsityConfig(**one).training_options() == SparsityConfig(**other).training_options()


@pytest.mark.parametrize(
    "change",
    [
        {"density": {"schedule": "linear"}},
        {"density": {"schedule": extensions.quadratic}},
        {"distribution": "uniform"},
        {"distribution": extensions.first_full},
        {"update": {"times": [10, 20]}},
        {"update": {"times": extensions.every_tenth_part}},
        {"drop_fraction": {"schedule": extensions.quadratic}},
        {"rule": extensions.fewest},
        {"rule": "tests.extensions.Still"},
    ],
    ids=extensions.name_of,
)
def test_different_configurations_have_different_training_options(change: dict) -> None:
    usual = {"density": {"schedule": "cubic"}, "distribution": "global"}
    mine, other = SparsityConfig(**usual), SparsityConfig(**{**usual, **change})
    assert mine.training_options() != other.training_options()


def has_only_primitives(value: object) -> bool:
    if isinstance(value, list):
        return all(map(has_only_primitives, value))
    return value is None or type(value) in (bool, int, float, str)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"distribution": "global", "density": {"schedule": "cubic"}},
        {"rule": extensions.still, "update": {"times": [10]}},
        {"grow": "none", "layer_density": {"a.*": 0.5}},
    ],
    ids=extensions.name_of,
)
def test_training_options_can_be_saved_in_any_checkpoint(arguments: dict) -> None:
    state = SparsityConfig(**arguments).training_options()
    assert all(map(has_only_primitives, state.values())), state
    assert not {"monitor.images", "shrink", "init"} & state.keys()


def test_a_mistyped_argument_is_named() -> None:
    with pytest.raises(TypeError, match="'densty'"):
        SparsityConfig(densty=0.1)


def test_the_schema_for_hydra_has_the_same_keys_and_defaults() -> None:
    node = OmegaConf.to_container(OmegaConf.structured(SparsityNode))
    assert node.pop("_target_") == "sparse_lightning.SparsityCallback"
    assert list(node) == [field.name for field in dataclasses.fields(SparsityConfig)]
    assert SparsityConfig(**node) == SparsityConfig()
