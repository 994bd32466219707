"""Times of functions that take turns, so that each meets the machine in the same state."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Function = Callable[[], object]

_WARM_UP = 2
_FLUSH_BYTES = 256 << 20  # several times the L2 of any GPU
_FLUSHES = 16  # over a millisecond: longer than any contender's host takes to launch its work
_HOST_CALLS = 100


@dataclass(frozen=True)
class Times:
    """Milliseconds of the repetitions of one function: median, 10th and 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Times:
        """Summarise samples, in ms.

        >>> Times.of([3.0, 1.0, 2.0])
        Times(median=2.0, low=1.0, high=3.0)
        """
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[last // 10], ordered[last - last // 10])


def speedup(dense: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median of the ratios of two functions' samples, turn by turn.

    >>> speedup([2.0, 3.0, 8.0], [1.0, 1.0, 1.0])
    3.0
    """
    return statistics.median(d / s for d, s in zip(dense, ours, strict=True))


def device_times(
    functions: Sequence[Function], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the ms that each function's work takes on a device, by repetition.

    On CUDA the L2 cache is flushed before each call: of the operands, by writing other memory,
    several times over, which keeps the device busy while the host launches the work, so that launch
    times stay out of the figures; and then of what was written, by reading, so that the work does
    not wait for the write-back of what is not its own.
    """
    timer = _cuda_ms if device.type == "cuda" else _cpu_ms
    return _in_turns(functions, repeats, lambda function: timer(function, device))


def host_times(
    functions: Sequence[Function], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the ms until a call of each function returns, without waiting for the device."""

    def ms(function: Function) -> float:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(_HOST_CALLS):
            function()
        elapsed = time.perf_counter() - begin
        _wait(device)
        return 1e3 * elapsed / _HOST_CALLS

    return _in_turns(functions, repeats, ms)


def _in_turns(
    functions: Sequence[Function], repeats: int, ms: Callable[[Function], float]
) -> list[list[float]]:
    for _ in range(_WARM_UP):
        for function in functions:
            ms(function)
    turns = [[ms(function) for function in functions] for _ in range(repeats)]
    return [list(samples) for samples in zip(*turns, strict=True)]


def _cuda_ms(function: Function, device: torch.device) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    for _ in range(_FLUSHES):
        buffer.zero_()
    buffer.view(torch.int64).max()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _cpu_ms(function: Function, device: torch.device) -> float:
    begin = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - begin)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
