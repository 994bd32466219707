"""What the configuration accepts, and how it says what it does not."""

import dataclasses
import math
import re
from collections import OrderedDict
from types import MappingProxyType

import pytest
import torch

from sparse_lightning import (
    DensitySchedule,
    DropFractionSchedule,
    MonitorOptions,
    UpdateSchedule,
)
from sparse_lightning.config import SparsityConfig, SparsityNode
from sparse_lightning.criteria import magnitude, random

NAN, INF = math.nan, math.inf


def test_the_defaults() -> None:
    config = SparsityConfig()
    assert config.block_size == 64
    assert config.include == ("*",) and config.exclude == ("head", "lm_head", "classifier")
    assert config.density == DensitySchedule("constant", 0.25, 0.25)
    assert config.update == UpdateSchedule(100, 0, 0.75)
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
    assert config.capacities({"fc": (10, 10)}) == {"fc": density * 100}


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
    assert config.capacities({"fc": (10, 10)}) == {"fc": highest * 100}
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
    ],
    ids=str,
)
def test_accepted(accepted: dict) -> None:
    SparsityConfig(**accepted)


def refused(argument: str, value: object, error: type[Exception] = ValueError, **arguments):
    """A row: the arguments, the error, and the argument and value that it must name."""
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
        *(refused("density.initial", d, density=d) for d in BAD_DENSITIES),
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


@pytest.mark.parametrize("argument", ["density", "update"])
@pytest.mark.parametrize("key", ["begin", "until"])
def test_the_int_1_is_refused_with_a_way_out(argument: str, key: str) -> None:
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
    ("argument", "choices"),
    [
        ("distribution", ["uniform", "erdos_renyi"]),
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
def test_an_unknown_name_is_answered_with_the_known_ones(argument: str, choices: list) -> None:
    name, _, key = argument.partition(".")
    with pytest.raises(ValueError) as error:
        SparsityConfig(**{name: {key: "foo"} if key else "foo"})
    message = str(error.value)
    assert message.startswith(f"`{argument}` must be one of") and "'foo'" in message
    assert all(repr(choice) in message for choice in choices)
    for choice in choices:
        SparsityConfig(**{name: {key: choice} if key else choice})


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
        # Keys of one are no keys of the other.
        ("drop_fraction", "every_n_steps", None),
    ],
)
def test_a_mistyped_key_is_answered_with_the_right_one(argument, typo, meant) -> None:
    accepted = [field.name for field in dataclasses.fields(getattr(SparsityConfig(), argument))]
    with pytest.raises(ValueError) as error:
        SparsityConfig(**{argument: {typo: 0.1}})
    message = str(error.value)
    assert message.startswith(f"`{argument}` has no key {typo!r}")
    assert message.endswith(f"accepted keys: {', '.join(map(repr, accepted))}.")
    assert (f"did you mean {meant!r}?" in message) if meant else ("did you mean" not in message)


# -- budgets ------------------------------------------------------------------------------------

GRIDS = {"up.0": (4, 4), "up.1": (8, 8), "down": (8, 8)}


def test_budgets_follow_the_schedule() -> None:
    config = SparsityConfig(density={"schedule": "linear", "initial": 1.0, "final": 0.5})
    assert config.budgets_at(0.0, GRIDS) == {"up.0": 16, "up.1": 64, "down": 64}
    assert config.budgets_at(0.5, GRIDS) == {"up.0": 12, "up.1": 48, "down": 48}
    assert config.budgets_at(1.0, GRIDS) == {"up.0": 8, "up.1": 32, "down": 32}
    assert config.capacities(GRIDS) == {"up.0": 16, "up.1": 64, "down": 64}


def test_layers_with_a_final_density_of_their_own() -> None:
    own = {"up.*": 0.25, "down": 1.0}
    config = SparsityConfig(density={"schedule": "linear", "final": 0.5}, layer_density=own)
    assert config.budgets_at(0.5, GRIDS) == {"up.0": 10, "up.1": 40, "down": 64}
    assert config.budgets_at(1.0, GRIDS) == {"up.0": 4, "up.1": 16, "down": 64}
    constant = SparsityConfig(density=0.5, layer_density={"down": 0.75})
    assert constant.capacities(GRIDS) == {"up.0": 8, "up.1": 32, "down": 48}
    assert SparsityConfig(density=0.5, layer_density=None).layer_density == {}


def test_a_density_that_rises_has_its_slots_from_the_beginning() -> None:
    config = SparsityConfig(density={"schedule": "cubic", "initial": 0.25, "final": 0.5})
    assert config.budgets_at(0.0, GRIDS) == {"up.0": 4, "up.1": 16, "down": 16}
    assert config.capacities(GRIDS) == {"up.0": 8, "up.1": 32, "down": 32}


def test_budgets_by_score_of_the_global_distribution() -> None:
    config = SparsityConfig(
        density={"schedule": "linear", "initial": 1.0, "final": 0.5},
        distribution="global",
        layer_density={"c": 0.5},
        floor={"row": 0, "column": 0},
    )
    scores = {"a": torch.ones(2, 2), "b": torch.full((2, 2), 2.0), "c": torch.zeros(2, 2)}
    masks = dict.fromkeys(scores, torch.ones(2, 2, dtype=torch.bool))
    assert config.budgets_at(0.0, dict.fromkeys(scores, (2, 2))) == {"a": 4, "b": 4, "c": 4}
    assert config.budgets_by_score(0.5, scores, masks) == {"a": 2, "b": 4, "c": 3}
    assert config.budgets_by_score(1.0, scores, masks) == {"a": 1, "b": 3, "c": 2}
    uniform = SparsityConfig(density=0.5)
    assert uniform.budgets_by_score(1.0, scores, masks) == {"a": 2, "b": 2, "c": 2}


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
        ({"exact": 1}, TypeError, r"`exact` must be true or false; got 1"),
        ({"shrink": None}, TypeError, r"`shrink` must be true or false; got None"),
        ({"drop": "none"}, ValueError, r"`drop` must be one of"),
        ({"drop": None}, ValueError, r"`drop` must be one of"),
    ],
)
def test_what_is_refused_of_the_dynamics(arguments: dict, error, says: str) -> None:
    with pytest.raises(error, match=says):
        SparsityConfig(**arguments)


def test_criteria_may_be_functions_and_paths() -> None:
    config = SparsityConfig(drop=magnitude, grow="sparse_lightning.criteria.random")
    assert config.drop_criterion is magnitude and config.grow_criterion is random
    assert SparsityConfig(grow="none").grow_criterion is None


def test_a_mistyped_argument_is_named() -> None:
    with pytest.raises(TypeError, match="'densty'"):
        SparsityConfig(densty=0.1)


def test_the_schema_for_hydra_has_the_same_keys_and_defaults() -> None:
    node = dataclasses.asdict(SparsityNode())
    assert node.pop("_target_") == "sparse_lightning.SparsityCallback"
    assert list(node) == [field.name for field in dataclasses.fields(SparsityConfig)]
    assert SparsityConfig(**node) == SparsityConfig()
