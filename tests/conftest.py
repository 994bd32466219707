"""Fixtures for all tests: a fixed random seed, one thread, and kernel choices by fixed rules."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
import torch

from sparse_lightning import optimizer_state
from sparse_lightning.bench import problem
from sparse_lightning.kernels.speedups import MEASURE_VARIABLE
from tests import processes


def pytest_configure() -> None:
    # Processes that tests start inherit this: choices do not depend on timings of this machine.
    os.environ[MEASURE_VARIABLE] = "0"
    processes.set_preloads()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start files with slow tests first, so that no worker is left with one at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    # The tensors are small: threads that wait for one another on busy cores take ten times longer.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _isolated() -> None:
    """Remove what other tests leave in the process: random state, and shapes of parameters."""
    torch.manual_seed(0)
    optimizer_state._earlier_shapes.clear()


@pytest.fixture(autouse=True)
def _turn_on_the_gpu(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Tests that time a GPU, marked `gpu(alone=True)`, run while no worker runs another on it."""
    marker = request.node.get_closest_marker("gpu")
    if marker is None:
        yield
        return
    import fcntl  # which Windows lacks

    folder = tmp_path_factory.getbasetemp().parent  # of all workers
    with ExitStack() as stack:
        gate, turn = (
            stack.enter_context((folder / f"gpu.{n}").open("w")) for n in ("gate", "turn")
        )
        # Whoever waits for its turn holds the gate: tests that come later do not overtake it.
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(turn, fcntl.LOCK_EX if marker.kwargs.get("alone") else fcntl.LOCK_SH)
        fcntl.flock(gate, fcntl.LOCK_UN)
        yield


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (integers: the largest), so an element never written is seen."""
    with problem.poisoned_memory():
        assert torch.empty(3).isnan().all(), "PyTorch no longer fills uninitialised memory"
        yield


@pytest.fixture
def spawned_from_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spawned processes come from the server of `tests.processes`, and so need no imports.

    They receive pickled arguments as others do; only the interpreter is not started anew.
    """
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    monkeypatch.setitem(contexts, "spawn", multiprocessing.get_context("forkserver"))
