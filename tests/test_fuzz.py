"""Any configuration or saved topology either works or raises an error that names the problem."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest
import torch
from hydra.errors import HydraException
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparse_lightning import BlockTopology, SparsityCallback
from tests.callbacks.helpers import Classifier, assert_valid, loader, trainer
from tests.callbacks.test_sparsity import sparse
from tests.test_hydra import composed, messages

fuzz = settings(deadline=None, derandomize=True, max_examples=150)

# -- configurations -------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.sampled_from([0, 1, 2, 3, 5, 0.0, 0.01, 0.25, 0.5, 0.75, 1.0, 1e3, 10**20, True, None, "1"]),
    st.floats(-0.5, 1.5),
    st.sampled_from([float("nan"), float("inf"), -float("inf"), -1]),
)
COUNTS = st.sampled_from([0, 1, 2, 3, 16, 32, 64, 128, -1, 2**40, 1.5, True, None, "16"])
PATTERNS = st.lists(
    st.sampled_from(["*", "net.*", "net.0", "0", "head", "re:net", "re:(", "", "none", "[", None]),
    max_size=3,
)


def some_of(**keys: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keys)


def names(*known: str) -> st.SearchStrategy[Any]:
    return st.sampled_from([*known, "", "x", "no.such", "os.path", None, 3])


OWN = "tests.extensions"
SCHEDULES = names(
    *("constant", "linear", "cosine", "cubic", "stepwise", "one_shot"),
    *(f"{OWN}.{schedule}" for schedule in ("quadratic", "bump", "too_dense")),
)
TIMES = st.one_of(
    st.lists(COUNTS, max_size=3), names(f"{OWN}.every_tenth_part", f"{OWN}.first_full")
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "block_size": COUNTS,
    "include": st.one_of(PATTERNS, st.sampled_from(["*", None, 3])),
    "exclude": st.one_of(PATTERNS, st.sampled_from(["*", None, 3])),
    "density": st.one_of(
        NUMBERS,
        some_of(schedule=SCHEDULES, initial=NUMBERS, final=NUMBERS, begin=NUMBERS, until=NUMBERS),
    ),
    "nm": names("2:4", "4:8") | st.sampled_from([124, None, "", 2.4, True, ["2:4"]]),
    "distribution": names(
        *("uniform", "erdos_renyi", "global"),
        *(f"{OWN}.{shares}" for shares in ("first_full", "back_and_forth", "one_too_few")),
    ),
    "layer_density": st.one_of(
        st.none(),
        NUMBERS,
        st.dictionaries(st.sampled_from(["net.0", "*", "re:(", "x"]), NUMBERS, max_size=2),
    ),
    "floor": st.one_of(some_of(layer=NUMBERS, row=COUNTS, column=COUNTS), NUMBERS),
    "update": st.one_of(
        some_of(every_n_steps=COUNTS, begin=NUMBERS, until=NUMBERS, times=TIMES), NUMBERS
    ),
    "drop_fraction": st.one_of(
        NUMBERS, some_of(schedule=SCHEDULES, initial=NUMBERS, final=NUMBERS)
    ),
    "drop": names("magnitude", "gradient", "saliency", "movement", "random"),
    "grow": names("gradient", "momentum", "random", "none"),
    "regrow": names("x") | st.booleans(),
    "regrow_inner": names("x") | st.booleans(),
    "rule": names(f"{OWN}.Still", f"{OWN}.still", f"{OWN}.fewest", f"{OWN}.Demanding"),
    "token_stride": COUNTS,
    "init": names("random", "magnitude"),
    "shrink": names("x") | st.booleans(),
    "seed": COUNTS,
    "follow": st.one_of(
        st.none(),
        NUMBERS,
        st.dictionaries(
            st.sampled_from(["net", "net.0", "head", "x", ""]),
            st.sampled_from(["net", "net.2", "head", "x", ""]) | NUMBERS,
            max_size=2,
        ),
    ),
    "monitor": st.one_of(
        st.none(),
        NUMBERS,
        some_of(every_n_updates=COUNTS, images=COUNTS, record=names("x") | st.booleans()),
    ),
}


def train(callback: SparsityCallback) -> None:
    """Train five steps, after which every layer is valid."""
    model = Classifier()
    fitting = trainer(callback, max_steps=5)
    fitting.fit(model, loader())
    for layer in sparse(model).values():
        assert_valid(layer, fitting.optimizers[0], layer.topology.n_blocks)


def assert_names(message: str, keys: Any) -> None:
    assert any(re.search(rf"`{key}[.`\[]|\b{key}=", message) for key in keys), message


def test_every_field_is_fuzzed() -> None:
    assert FIELDS.keys() == inspect.signature(SparsityCallback).parameters.keys()


@pytest.mark.parametrize("key", FIELDS)
def test_one_field(key: str) -> None:
    """The other options let updates happen within a few steps."""
    seen = {"works": 0}

    @settings(deadline=None, derandomize=True, max_examples=30)
    @given(FIELDS[key])
    def check(value: Any) -> None:
        base: dict[str, Any] = {"block_size": 16, "update": {"every_n_steps": 2}}
        try:
            train(SparsityCallback(**{**base, key: value}))
            seen["works"] += 1
        except (ValueError, TypeError) as error:
            assert_names(str(error), [key])

    check()
    assert seen["works"] > 0


@fuzz
@given(
    st.lists(st.sampled_from(sorted(FIELDS)), max_size=3, unique=True).flatmap(
        lambda keys: st.fixed_dictionaries({key: FIELDS[key] for key in keys})
    )
)
def test_many_fields_together(arguments: dict[str, Any]) -> None:
    try:
        train(SparsityCallback(**{"block_size": 16, **arguments}))
    except (ValueError, TypeError) as error:
        assert_names(str(error), [*arguments, "update", "density", "include"])


def spelled(value: Any) -> str:
    """Write a value in the syntax of Hydra's command line."""
    if isinstance(value, dict):
        # Hydra's syntax has no quoted keys.
        known = {k: v for k, v in value.items() if re.fullmatch(r"[\w.]+", k)}
        return "{" + ",".join(f"{k}:{spelled(v)}" for k, v in known.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelled, value)) + "]"
    if isinstance(value, str):
        return f"'{value}'"
    return "null" if value is None else str(value).lower()


@pytest.mark.slow
@settings(deadline=None, derandomize=True, max_examples=40)
@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda k: st.tuples(st.just(k), FIELDS[k])))
def test_overrides(override: tuple[str, Any]) -> None:
    key, value = override
    overrides = ["callbacks.sparsity.block_size=16", f"callbacks.sparsity.{key}={spelled(value)}"]
    try:
        node = composed("callbacks/sparsity=rigl", *overrides)
        callback = instantiate(node)
    except HydraException as error:
        assert key in messages(error)
        return
    try:
        train(callback)
    except (ValueError, TypeError) as error:
        assert_names(str(error), [key, "include"])


# -- saved topologies -----------------------------------------------------------------------------

INT32 = st.integers(-(2**31), 2**31 - 1)
VECTORS = st.one_of(
    st.lists(INT32, max_size=20),
    # A nearly valid header, followed by coordinates that may be valid.
    st.tuples(
        st.sampled_from([1, 1, 1, 0, 2]),
        st.sampled_from([16, 16, 32, 17, -16]),
        st.sampled_from([1, 2, 4, 0, -1, 2**31 - 1]),
        st.sampled_from([1, 2, 4, 0, -1, 2**31 - 1]),
        st.sampled_from([0, 1, 2, 3, -1, 2**30, 2**31 - 1]),
    ).flatmap(
        lambda header: st.lists(st.integers(-2, 4), max_size=8).map(lambda rest: [*header, *rest])
    ),
)


@settings(deadline=None, derandomize=True, max_examples=500)
@given(
    VECTORS,
    st.sampled_from([torch.int32] * 5 + [torch.int64, torch.float32, torch.bool, torch.complex64]),
)
def test_saved_topologies(numbers: list[int], dtype: torch.dtype) -> None:
    vector: Tensor = torch.tensor(numbers, dtype=torch.int64).to(dtype)
    try:
        topology = BlockTopology.from_state(vector)
    except ValueError as error:
        assert "must" in str(error)
    else:
        assert dtype == torch.int32 and topology.to_state().tolist() == numbers
