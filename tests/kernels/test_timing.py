"""Timing: contenders alternate; on CUDA, calls on several copies are captured in a graph."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparse_lightning.kernels import timing
from sparse_lightning.kernels.timing import device_times

CPU = torch.device("cpu")


def test_functions_alternate() -> None:
    calls: list[str] = []
    contenders = [
        [lambda: calls.append("a"), lambda: calls.append("A")],
        [lambda: calls.append("b")],
    ]
    samples = device_times(contenders, 3, CPU)
    warm_up, rounds = calls[:2], calls[2:]
    assert warm_up == ["a", "b"] and rounds == ["A", "b", "a", "b", "A", "b"]
    assert [len(times) for times in samples] == [3, 3]


class FakeGpu:
    """A GPU with a clock in ms, which products advance, and graphs, which record products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.launch = 0.0, 0.02  # an eager call takes 20 us to launch
        self.recorded: list[tuple[str, float]] | None = None
        self.ran: list[str] = []
        self.capture_fails = False
        gpu = self

        class Event:
            def __init__(self, enable_timing: bool) -> None: ...

            def record(self) -> None:
                self.at = gpu.now

            def synchronize(self) -> None: ...

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        class Graph:
            def capture_begin(self, pool: Any, capture_error_mode: str) -> None:
                self.products = gpu.recorded = []

            def capture_end(self) -> None:
                gpu.recorded = None
                if gpu.capture_fails:
                    raise RuntimeError("the capture was invalidated")

            def replay(self) -> None:
                for name, ms in self.products:
                    gpu.ran.append(name)
                    gpu.now += ms

        nothing = SimpleNamespace(wait_stream=lambda _: None)
        for name, value in {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": lambda *_: nothing,
            "current_stream": lambda: nothing,
            "current_device": lambda: 0,
            "stream": lambda _: nullcontext(),
            "device": lambda _: nullcontext(),
            "graph_pool_handle": lambda: (0, 0),
            "_sleep": lambda _: None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        buffer = torch.zeros(8, dtype=torch.int8)
        monkeypatch.setattr(torch, "empty", lambda *_, **__: buffer)
        timing.side_stream.cache_clear()

    def product(self, name: str, ms: float, capturable: bool = True) -> Callable[[], None]:
        def run() -> None:
            if self.recorded is None:
                self.ran.append(name)
                self.now += self.launch + ms
            elif capturable:
                self.recorded.append((name, ms))
            else:
                raise RuntimeError("operation not permitted when stream is capturing")

        return run


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    yield FakeGpu(monkeypatch)
    timing.side_stream.cache_clear()


def test_short_products_are_timed_without_launches_on_all_copies(gpu: FakeGpu) -> None:
    contenders = [
        [gpu.product(f"a{i}", 0.01) for i in range(16)],
        [gpu.product(f"b{i}", 0.03) for i in range(2)],
    ]
    a, b = device_times(contenders, 5, torch.device("cuda"))
    assert a == pytest.approx([0.01] * 5) and b == pytest.approx([0.03] * 5)
    assert timing.speedup(b, a) == pytest.approx(3)
    # Samples of both alternate, and use every copy equally often.
    names = [name[0] for name in gpu.ran[-1000:]]
    assert "".join(names).count("ab") >= 4 and "".join(names).count("ba") >= 4
    assert len({gpu.ran.count(f"a{i}") for i in range(1, 16)}) == 1


def test_long_products_run_a_few_times_only(gpu: FakeGpu) -> None:
    (times,) = device_times(
        [[gpu.product(f"{i}", 5.0) for i in range(16)]], 3, torch.device("cuda")
    )
    assert (
        times == pytest.approx([5.0] * 3, rel=0.01) and set(gpu.ran) == {"0"} and len(gpu.ran) <= 6
    )


@pytest.mark.parametrize("copies", [1, 4])
def test_what_is_not_captured_is_timed_by_events(gpu: FakeGpu, copies: int) -> None:
    functions = [gpu.product("a", 0.5, capturable=False) for _ in range(copies)]
    (times,) = device_times([functions], 3, torch.device("cuda"))
    assert times == pytest.approx([0.52] * 3)


def test_exhausted_memory_is_not_hidden(gpu: FakeGpu) -> None:
    """Neither is it by the capture, which fails, too."""

    def run() -> None:
        if gpu.recorded is not None:
            gpu.capture_fails = True
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        device_times([[run, run]], 3, torch.device("cuda"))


def test_a_capture_that_fails_at_its_end_is_replaced_by_events(gpu: FakeGpu) -> None:
    gpu.capture_fails = True
    functions = [gpu.product("a", 0.5)] * 2
    (times,) = device_times([functions], 3, torch.device("cuda"))
    assert times == pytest.approx([0.52] * 3)


@pytest.mark.gpu(alone=True)
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_and_events_agree_on_a_gpu() -> None:
    weights = [torch.randn(4096, 4096, device="cuda") for _ in range(4)]
    x, y = torch.randn(2048, 4096, device="cuda"), torch.empty(2048, 4096, device="cuda")
    functions = [lambda w=w: torch.mm(x, w, out=y) for w in weights]
    graph, events = (
        device_times([each], 5, torch.device("cuda"))[0] for each in (functions, functions[:1])
    )
    assert min(graph) == pytest.approx(min(events), rel=0.2)
