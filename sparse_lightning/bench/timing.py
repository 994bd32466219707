"""Time functions in alternation, so that all of them run under the same machine conditions."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Function = Callable[[], object]

_WARM_UP = 2
_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
_FLUSHES = 16  # over a millisecond: longer than the host takes to launch any contender's work
_HOST_CALLS = 100


@dataclass(frozen=True)
class Times:
    """Median, 10th and 90th percentile of one function's times in milliseconds."""

    median: float
    low: float
    high: float

    @classmethod
    def from_samples(cls, samples: Sequence[float]) -> Times:
        """Summarise samples in ms.

        >>> Times.from_samples([3.0, 1.0, 2.0])
        Times(median=2.0, low=1.0, high=3.0)
        """
        ordered = sorted(samples)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[last // 10], ordered[last - last // 10])


def speedup(dense: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median ratio of two functions' samples, paired by round.

    >>> speedup([2.0, 3.0, 8.0], [1.0, 1.0, 1.0])
    3.0
    """
    return statistics.median(d / s for d, s in zip(dense, ours, strict=True))


def device_times(
    functions: Sequence[Function], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the samples in ms of each function's work on a device.

    On CUDA the L2 cache is flushed before each call. Writing a large buffer several times evicts
    the operands and keeps the device busy while the host launches the work, which excludes launch
    times. Reading the buffer afterwards writes its dirty lines back before the work is timed.
    """
    timer = _cuda_ms if device.type == "cuda" else _cpu_ms
    return _alternate(functions, repeats, lambda function: timer(function, device))


def host_times(
    functions: Sequence[Function], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the samples in ms until each call returns, without device synchronization."""

    def ms(function: Function) -> float:
        _wait(device)
        begin = time.perf_counter()
        for _ in range(_HOST_CALLS):
            function()
        elapsed = time.perf_counter() - begin
        _wait(device)
        return 1e3 * elapsed / _HOST_CALLS

    return _alternate(functions, repeats, ms)


def _alternate(
    functions: Sequence[Function], repeats: int, ms: Callable[[Function], float]
) -> list[list[float]]:
    for _ in range(_WARM_UP):
        for function in functions:
            ms(function)
    rounds = [[ms(function) for function in functions] for _ in range(repeats)]
    return [list(samples) for samples in zip(*rounds, strict=True)]


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
