"""Names and dotted paths in a configuration, and the errors for invalid ones."""

import functools
import math
import re

import pytest

from sparse_lightning.policy.criteria import (
    DROP_CRITERIA,
    GROW_CRITERIA,
    movement,
    random,
    saliency,
)
from sparse_lightning.policy.distributions import DISTRIBUTIONS, erdos_renyi
from sparse_lightning.policy.lookup import find
from sparse_lightning.policy.schedules import DENSITY_SCHEDULES, cubic
from tests import extensions

OFFERED = [DROP_CRITERIA, GROW_CRITERIA, DISTRIBUTIONS, DENSITY_SCHEDULES, {}]


class Callable:
    def __call__(self) -> None: ...


@pytest.mark.parametrize("offered", OFFERED, ids=["drop", "grow", "shares", "schedules", "none"])
def test_names_paths_and_callables(offered: dict) -> None:
    for name, option in offered.items():
        assert find("key", name, offered) is option
    for own in (math.hypot, lambda: None, Callable(), Callable, functools.partial(max, 1)):
        assert find("key", own, offered) is own
    assert find("key", "tests.extensions.quadratic", offered) is extensions.quadratic
    assert find("key", "tests.extensions.still", offered) is extensions.still
    assert find("key", "tests.extensions.Still", offered) is extensions.Still


def test_by_hand() -> None:
    assert find("drop", "movement", DROP_CRITERIA) is movement
    assert find("grow", "none", GROW_CRITERIA) is None
    assert find("drop", random, DROP_CRITERIA) is random
    assert find("drop", "sparse_lightning.policy.criteria.saliency", DROP_CRITERIA) is saliency
    assert find("distribution", "erdos_renyi", DISTRIBUTIONS) is erdos_renyi
    assert find("schedule", "cubic", DENSITY_SCHEDULES) is cubic


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("magnitud", r"got 'magnitud'\.$"),
        ("no_such_module.f", r"got 'no_such_module.f': No module named 'no_such_module'\.$"),
        ("tests.extensions.nothing", "has no attribute 'nothing'"),
        ("sparse_lightning.policy.criteria.GATHERED", r", which is a tuple\.$"),
        ("os.path", r", which is a module\.$"),
        (".f", r"got '\.f': "),
        ("f.", r"got 'f\.': "),
        ("", r"got ''\.$"),
        (3, r"got 3\.$"),
        (None, r"got None\.$"),
        (["magnitude"], r"got \['magnitude'\]\.$"),
        ({"magnitude": 1}, r"got \{'magnitude': 1\}\.$"),
    ],
)
def test_invalid_references_are_refused(value: object, says: str) -> None:
    rule = "^`drop` must be one of 'magnitude', .* or the dotted path of a function; "
    with pytest.raises(ValueError, match=rule) as error:
        find("drop", value, DROP_CRITERIA)
    assert re.search(says, str(error.value))
    with pytest.raises(ValueError, match=r"^`rule` must be the dotted path of a function; ") as e:
        find("rule", value, {})
    assert re.search(says, str(e.value))
