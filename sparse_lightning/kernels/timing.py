"""Time functions in alternation, so that all of them run under the same machine conditions.

A contender is a list of functions that do the same work, each on a copy of the operands of its own.
Copies that together exceed the caches make each call find its operands in memory, as a training
does, whose other layers have used the caches since.
"""

from __future__ import annotations

import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

Function = Callable[[], object]
Contender = Sequence[Function]

_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU
_FLUSHES = 16  # over a millisecond: longer than the host takes to launch any contender's work
_MOST_COPIES = 16
# A graph has the calls of about one millisecond, and a sample lasts at least a third of one.
# Events are exact to about a microsecond.
_GRAPH_MS, _SAMPLE_MS = 1.0, 0.3
_MOST_REPLAYS = 16
_SLEEP_CYCLES = 400_000  # about 0.2 ms, in which the host launches the graphs of a sample


def speedup(dense: Sequence[float], ours: Sequence[float]) -> float:
    """Return the median ratio of two contenders' samples, paired by round.

    >>> speedup([2.0, 3.0, 8.0], [1.0, 1.0, 1.0])
    3.0
    """
    return statistics.median(d / s for d, s in zip(dense, ours, strict=True))


def count_copies(n_bytes: int) -> int:
    """Return how many copies of an operand exceed the caches of a GPU: from 2 to 16.

    >>> count_copies(2 << 20), count_copies(64 << 20), count_copies(1 << 30)
    (16, 4, 2)
    """
    return min(_MOST_COPIES, max(2, math.ceil(_FLUSH_BYTES / max(1, n_bytes))))


def device_times(
    contenders: Sequence[Contender], rounds: int, device: torch.device
) -> list[list[float]]:
    """Return the samples in ms of each contender's calls on a device, one for each round.

    On CUDA, calls on several copies are captured in a graph, which excludes launch times and has no
    gaps between the calls, unless one call takes longer than a graph. If all contenders are single
    functions, and where one cannot be captured, calls are timed one by one with the L2 cache
    flushed before. Writing a large buffer several times evicts the operands and keeps the device
    busy while the host launches the work, which excludes launch times. Reading the buffer
    afterwards writes its dirty lines back before the work is timed.
    """
    if device.type != "cuda":
        return alternate([_cpu_timer(functions) for functions in contenders], rounds)
    with torch.cuda.device(device):
        if all(len(functions) == 1 for functions in contenders):
            return alternate([_flushing_timer(f, device) for (f,) in contenders], rounds)
        caller, stream = torch.cuda.current_stream(), side_stream(torch.cuda.current_device())
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            pool = torch.cuda.graph_pool_handle()  # of all graphs, since they take turns
            timers = [_cuda_timer(functions, device, pool) for functions in contenders]
            samples = alternate(timers, rounds)
        caller.wait_stream(stream)
    return samples


@functools.cache
def side_stream(device: int) -> torch.cuda.Stream:
    """Return a stream for captures, which the default stream does not allow, and measurements.

    There is one per device, since cuBLAS reserves memory for every stream that it has seen.
    """
    return torch.cuda.Stream(device)


def alternate(timers: Sequence[Callable[[], float]], rounds: int) -> list[list[float]]:
    """Return the samples of timers that take turns."""
    samples = [[timer() for timer in timers] for _ in range(rounds)]
    return [list(column) for column in zip(*samples, strict=True)]


def _cpu_timer(functions: Contender) -> Callable[[], float]:
    turns = itertools.cycle(functions)

    def sample() -> float:
        function = next(turns)
        begin = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - begin)

    sample()  # warm-up
    return sample


def _cuda_timer(functions: Contender, device: torch.device, pool: Any) -> Callable[[], float]:
    functions[0]()  # loads its kernels
    ms = max(_event_ms(functions[0]), 1e-3)
    if ms > _GRAPH_MS:  # launches and caches hardly matter
        return lambda: _event_ms(functions[0])
    used = functions[: math.ceil(_GRAPH_MS / ms)]
    graph = _capture(used, pool) if len(functions) > 1 else None
    if graph is None:
        return _flushing_timer(functions[0], device)
    return _graph_timer(graph, len(used))


def _flushing_timer(function: Function, device: torch.device) -> Callable[[], float]:
    def sample() -> float:
        buffer = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
        for _ in range(_FLUSHES):
            buffer.zero_()
        buffer.view(torch.int64).max()
        return _event_ms(function)

    for _ in range(2):  # warm-up
        sample()
    return sample


def _graph_timer(graph: torch.cuda.CUDAGraph, n_calls: int) -> Callable[[], float]:
    def replay(times: int) -> float:
        torch.cuda._sleep(_SLEEP_CYCLES)
        return _event_ms(*[graph.replay] * times)

    replays = min(_MOST_REPLAYS, math.ceil(_SAMPLE_MS / max(replay(1), 1e-3)))
    return lambda: replay(replays) / (replays * n_calls)


def _capture(functions: Contender, pool: Any) -> torch.cuda.CUDAGraph | None:
    """Return a CUDA graph of calls, the first warm, or None if they cannot be captured."""
    for function in functions[1:]:
        function()  # what is made for each copy, such as a tensor map, is not made in the capture
    graph = torch.cuda.CUDAGraph()
    try:
        # Other threads, such as those of data loaders, may allocate memory meanwhile.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            results = [function() for function in functions]  # kept, so each has its own memory
            del results
        except BaseException:
            with suppress(RuntimeError):  # that the capture is invalid, which the first error says
                graph.capture_end()
            raise
        graph.capture_end()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        return None
    return graph


def _event_ms(*functions: Function) -> float:
    """Return the ms that calls take together, by events on the current stream."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for function in functions:
        function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))
