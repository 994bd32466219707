"""Summaries of times, and the time until a call returns on the host."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from sparse_lightning.kernels.timing import Function, alternate

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


def host_times(
    functions: Sequence[Function], repeats: int, device: torch.device
) -> list[list[float]]:
    """Return the samples in ms until each call returns, without device synchronization."""
    timers: list[Callable[[], float]] = [partial(_host_ms, f, device) for f in functions]
    alternate(timers, 1)  # warm-up
    return alternate(timers, repeats)


def _host_ms(function: Function, device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    for _ in range(_HOST_CALLS):
        function()
    elapsed = time.perf_counter() - begin
    _wait(device)
    return 1e3 * elapsed / _HOST_CALLS


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
