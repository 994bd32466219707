"""Measures the layer shapes that no table covers, once on each machine with a CUDA device.

A layer shape is measured when it is first used, or ahead of that by `prepare`: every kind of
kernels and the dense product, for each product of a step. The measurements are kept in a file;
those that cannot be kept are not made, so that a training that resumes makes the same choices.

Nothing else changes: the random state and memory are as before. Nothing is measured while a CUDA
graph is captured or code is compiled. A measurement that fails is reported by a warning, and the
layer is computed without it. The environment variable `SPARSE_LIGHTNING_MEASURE=0` turns measuring
off.
"""

from __future__ import annotations

import _thread
import math
import os
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor

from sparse_lightning.files import locked
from sparse_lightning.kernels import choice, cpu, cuda
from sparse_lightning.kernels.choice import OPS, STEP
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.speedups import (
    MEASURE_VARIABLE,
    MEASURED_TOKENS,
    DeviceSpeedups,
    Layer,
    Measured,
    merged,
)
from sparse_lightning.kernels.timing import (
    Function,
    count_copies,
    device_times,
    side_stream,
    speedup,
)
from sparse_lightning.topology import BlockTopology, block_grid, count_blocks

# dtype, block size, in_features, out_features
LayerShape = tuple[torch.dtype, int, int, int]
_Result = TypeVar("_Result")


class Ladder(NamedTuple):
    """What is measured of a layer shape.

    Attributes:
        tokens: numbers of tokens, ascending, since the many tokens of a large layer may exhaust
            memory.
        densities: densities of the layer.
        rounds: samples of each time.
        seconds: time that should not be exceeded, except by the compilation of kernels. Numbers of
            tokens for which it does not suffice are predicted from the others.
    """

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    rounds: int
    seconds: float


# Beyond the ends nothing is extrapolated, so one of them is density 1, where many trainings begin.
# An idle H200 takes one to three seconds, and several times as long if other processes share it.
LADDER = Ladder(MEASURED_TOKENS, (1.0, 0.5, 0.25, 0.1), 5, 20.0)
# The factor by which times grow from one number of tokens to the next, at most.
_GROWTH = 4
# Times of more tokens vary little.
_MANY_TOKENS, _ROUNDS_OF_MANY = 16384, 3
# Block norms are computed in updates only, at the number of tokens of a training.
_FEWEST_NORM_TOKENS = 256
_SECONDS_BETWEEN_MESSAGES = 5.0
# How long a process waits for another one that measures: before a message, and then at most.
_SECONDS_OF_WAITING = (10.0, 290.0)

_lock, _is_measuring = threading.RLock(), False


def _forget_other_threads() -> None:
    """Release, in a forked process, the lock that a thread of the other process holds."""
    global _lock, _is_measuring
    _lock, _is_measuring = threading.RLock(), False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_other_threads)


def prepare(layers: Iterable[tuple[BlockTopology, torch.dtype]]) -> None:
    """Measure the layer shapes that no table covers, before a training uses them.

    Args:
        layers: topology and compute dtype of each layer; those that are not on a CUDA device are
            ignored.
    """
    shapes: dict[int, list[LayerShape]] = {}
    for topology, dtype in layers:
        if topology.device.type == "cuda":
            index = topology.device.index
            index = torch.cuda.current_device() if index is None else index
            shape = (dtype, topology.block_size, topology.in_features, topology.out_features)
            shapes.setdefault(index, []).append(shape)
    for device, found in shapes.items():
        measure_missing(device, found)


def measure_missing(device: int, layers: Sequence[LayerShape]) -> None:
    """Measure the layer shapes that are not known, if that is possible now, and keep the result.

    Other processes of this machine wait and then read it.

    Args:
        device: index of the CUDA device.
        layers: layer shapes; those of other dtypes than the tables have are ignored.

    Raises:
        ValueError: if a file of measurements is damaged.
    """
    known = choice.device_speedups(device)
    if not (_missing(known, layers) and _is_possible()):
        return
    with _turn() as is_first, ExitStack() as stack:
        if not is_first:
            return
        stack.callback(choice.clear_choices)
        try:
            with _keeping():
                known.file.parent.mkdir(parents=True, exist_ok=True)
                _wait_for_processes(known, stack)
            known.read_measured()
            if missing := _missing(known, layers):
                _measure(known, device, missing)
        except _CannotKeep as error:
            known.can_keep = False
            warnings.warn(
                f"`{known.file}` should be a file that can be written to, since it keeps which "
                f"kernels are fastest for a layer; got {error}. Layers that no table covers use "
                "the default kernels. Set SPARSE_LIGHTNING_CACHE_DIR to another folder, or "
                f"{MEASURE_VARIABLE}=0.",
                stacklevel=2,
            )


class _CannotKeep(Exception):
    """The file of measurements cannot be locked or written."""


@contextmanager
def _keeping() -> Iterator[None]:
    """Distinguish errors of files from those of signal handlers, such as `TimeoutError`."""
    try:
        yield
    except OSError as error:
        raise _CannotKeep(error) from error


def _missing(known: DeviceSpeedups, layers: Sequence[LayerShape]) -> dict[Layer, LayerShape]:
    """Return the layer shapes to measure, by their names in tables."""
    names = choice.DTYPES
    named: dict[Layer, LayerShape] = {
        (names[shape[0]], *shape[1:]): shape for shape in layers if shape[0] in names
    }
    return {layer: shape for layer, shape in named.items() if not known.knows(layer)}


def _is_possible() -> bool:
    return not (
        torch.compiler.is_compiling()
        or torch._guards.detect_fake_mode() is not None
        or torch.cuda.is_current_stream_capturing()
    )


@contextmanager
def _turn() -> Iterator[bool]:
    """Wait until no other thread measures; yield False if this one does.

    Then it is a signal handler that runs, and uses a layer.
    """
    global _is_measuring
    with _lock:
        if _is_measuring:
            yield False
            return
        _is_measuring = True
        try:
            yield True
        finally:
            _is_measuring = False


def _wait_for_processes(known: DeviceSpeedups, stack: ExitStack) -> None:
    """Lock the file of measurements until the stack unwinds.

    Raises:
        TimeoutError: if another process holds the lock for minutes, as a stopped one does.
    """
    before_message, at_most = _SECONDS_OF_WAITING
    try:
        stack.enter_context(locked(known.file, before_message))
    except TimeoutError:
        _say(f"Waiting for another process that measures kernels and holds {known.file}.lock.")
        stack.enter_context(locked(known.file, at_most))


def _measure(known: DeviceSpeedups, device: int, missing: dict[Layer, LayerShape]) -> None:
    """Measure layer shapes, and write each into the device's file as soon as it is measured.

    What was written is used, also if a later write fails.
    """
    with _keeping():  # an error is noticed before the measurement
        known.write_measured()
    _say(
        f"Measuring which kernels are fastest on {known.name} for {_describe(missing)}. This takes "
        f"a few seconds, once: the result is kept in {known.file}. {MEASURE_VARIABLE}=0 turns it "
        "off."
    )
    message = time.monotonic()
    try:
        for i, (layer, shape) in enumerate(missing.items()):
            if time.monotonic() - message > _SECONDS_BETWEEN_MESSAGES:
                message = time.monotonic()
                _say(f"Measured {i} of {len(missing)} layer shapes.")
            where = torch.device("cuda", device)
            found = _in_fresh_thread(partial(measure_layer, shape, LADDER, where))
            if isinstance(found, torch.OutOfMemoryError):
                known.exhausted.add(layer)
            elif isinstance(found, BaseException):
                known.failed.add(layer)
                _warn(f"Measuring {_describe([layer])} failed", found)
            elif not found:  # every kind has failed, with a warning
                known.failed.add(layer)
            else:
                known.rows = merged(known.rows, found)
            with _keeping():
                known.write_measured()
    finally:
        known.read_measured()


def _in_fresh_thread(function: Callable[[threading.Event], _Result]) -> _Result | BaseException:
    """Return what a function returns or raises in a new thread.

    A new thread has no autocast, modes, hooks, memory pools or capture. If this thread is
    interrupted, it sets the event, on which the function should end, and waits for that.
    """
    stop, done = threading.Event(), threading.Lock()
    found: list[_Result | BaseException] = []

    def work() -> None:
        try:
            found.append(function(stop))
        except BaseException as error:
            found.append(error)
        finally:
            done.release()

    # An exception of a signal handler may interrupt the wait for a plain lock at any time, but
    # corrupts a condition, with which `threading.Thread` starts.
    done.acquire()
    try:
        try:
            _thread.start_new_thread(work, ())
        except RuntimeError as error:  # as there are too many threads, or the interpreter exits
            return error
        done.acquire()
    except BaseException:
        stop.set()
        if not found:
            done.acquire()
        raise
    return found[0]


def _say(text: str) -> None:
    print(f"sparse-lightning: {text}", file=sys.stderr, flush=True)


def _warn(what: str, error: BaseException) -> None:
    rest = "The layers use kernels that were measured, or else the default ones."
    warnings.warn(f"{what}: {error!r}. {rest}", stacklevel=3)


def _describe(layers: Iterable[Layer]) -> str:
    """Return a description of layer shapes.

    >>> _describe([("half", 64, 512, 2048), ("half", 64, 2048, 512)])
    'layers of 512 x 2048, 2048 x 512 (half, blocks of 64)'
    """
    found: dict[tuple[str, int], list[str]] = {}
    for dtype, block_size, *features in layers:
        found.setdefault((dtype, block_size), []).append(" x ".join(map(str, features)))
    return "; ".join(
        f"layers of {', '.join(sizes)} ({dtype}, blocks of {block_size})"
        for (dtype, block_size), sizes in found.items()
    )


def measure_layer(
    shape: LayerShape, ladder: Ladder, device: torch.device, stop: threading.Event
) -> list[Measured]:
    """Measure every kind for each product of a layer, until memory or the time is exhausted.

    Args:
        shape: the layer shape.
        ladder: what to measure.
        device: CUDA device to measure.
        stop: set by another thread to end the measurement.

    Returns:
        The measurements; none if every kind has failed.

    Raises:
        torch.OutOfMemoryError: if there is not enough memory for any.
        Stopped: if `stop` was set.
    """
    rows: list[Measured] = []
    with exact(shape[0]), torch.cuda.stream(side_stream(device.index)):
        try:
            for rung in _climb(shape, ladder, device, stop):
                rows += rung
        except BaseException as error:
            traceback.clear_frames(error.__traceback__)  # they hold tensors
            if not rows or not isinstance(error, Exception):
                raise
            if not isinstance(error, torch.OutOfMemoryError):
                _warn(f"Measuring {_describe([rows[0].layer])} for more tokens failed", error)
        finally:
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    return rows


def _climb(
    shape: LayerShape, ladder: Ladder, device: torch.device, stop: threading.Event
) -> Iterator[Sequence[Measured]]:
    operands = Operands(shape, ladder.densities, device, stop)
    spent = last = 0.0
    for tokens in ladder.tokens:
        if spent + _GROWTH * last <= ladder.seconds:
            rows = blank_rows(shape, tokens, ladder.densities, device)
            last = operands.measure(rows, ladder.rounds)
            spent += last
            yield [row for row in rows if row.speedups]


class Stopped(BaseException):
    """Ends a measurement whose caller was interrupted; no failure, so not an `Exception`."""


@contextmanager
def exact(dtype: torch.dtype) -> Iterator[None]:
    """Run plain products in this context: without autograd, TF32 or the filling of new memory."""
    matmul, deterministic = torch.backends.cuda.matmul, cast(Any, torch.utils.deterministic)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())

        def set_to(owner: Any, name: str, value: object) -> None:
            stack.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, value)

        if torch.are_deterministic_algorithms_enabled():
            # What a kind allocates would be filled.
            set_to(deterministic, "fill_uninitialized_memory", False)
        if dtype == torch.float32:
            # Tables are relative to exact products. Before PyTorch 2.9 there is only the legacy
            # flag, which newer versions refuse to read once the other is set.
            if getattr(matmul, "fp32_precision", None) == "tf32":
                set_to(matmul, "fp32_precision", "ieee")
            elif not hasattr(matmul, "fp32_precision") and matmul.allow_tf32:
                set_to(matmul, "allow_tf32", False)
        yield


def blank_rows(
    shape: LayerShape, tokens: int, densities: Iterable[float], device: torch.device
) -> list[Measured]:
    """Return what there is to measure of a layer at a number of tokens, without speed-ups.

    Densities are rounded to whole blocks; those that become equal are measured once.
    """
    dtype, block_size, in_features, out_features = shape
    name, *_ = name_layer(shape, device)
    sizes = (tokens, in_features, out_features)
    total = math.prod(block_grid(out_features, in_features, block_size))
    found = dict.fromkeys(count_blocks(density, total) / total for density in densities)
    rows = [Measured(op, name, block_size, sizes, density, {}) for op in STEP for density in found]
    # On a CPU, and for a single kind, there is no choice.
    has_choice = device.type == "cuda" and len(available_kinds("norms", dtype, device)) > 1
    if has_choice and tokens >= _FEWEST_NORM_TOKENS:
        rows.append(Measured("norms", name, block_size, sizes, 1.0, {}))
    return rows


def name_layer(shape: LayerShape, device: torch.device) -> Layer:
    """Return a layer shape with the name that tables have for its dtype."""
    names = cpu.DTYPES if device.type == "cpu" else choice.DTYPES
    return (names[shape[0]], *shape[1:])


def available_kinds(op: str, dtype: torch.dtype, device: torch.device) -> Sequence[str]:
    """Return the kinds, or on a CPU the methods, that can compute a product."""
    if device.type == "cpu":
        return cpu.available_methods(op, dtype)
    return choice.available_kinds(op, dtype, torch.cuda.get_device_capability(device))


class Operands:
    """The weights of a layer at several densities, on a device.

    On CUDA there are as many copies of each as exceed the caches. Products dW write into them.

    Attributes:
        dense: copies of the dense weight `[out_features, in_features]`.
        sparse: topology, and copies of the values, by density.
        failed: kinds that have failed, which are not measured any more.

    Args:
        shape: the layer shape.
        densities: densities.
        device: device of all tensors.
        stop: set by another thread to end a measurement.
    """

    def __init__(
        self,
        shape: LayerShape,
        densities: Iterable[float],
        device: torch.device,
        stop: threading.Event | None = None,
    ) -> None:
        self.dtype, self.block_size, self.in_features, self.out_features = self._shape = shape
        self.device = device
        self.failed: set[str] = set()
        self._stop = stop or threading.Event()
        self._generator = torch.Generator(device).manual_seed(0)
        self.dense = self._copies(self.out_features, self.in_features)
        self.sparse: dict[float, tuple[BlockTopology, list[Tensor]]] = {}
        grid = block_grid(self.out_features, self.in_features, self.block_size)
        total = math.prod(grid)
        for n_blocks in dict.fromkeys(count_blocks(density, total) for density in densities):
            mask = torch.zeros(total, dtype=torch.bool, device=device)
            order = torch.randperm(total, generator=self._generator, device=device)
            mask[order[:n_blocks]] = True
            topology = BlockTopology.from_mask(mask.view(grid), self.block_size)
            copies = self._copies(n_blocks, self.block_size, self.block_size)
            self.sparse[n_blocks / total] = topology, copies

    def _copies(self, *size: int) -> list[Tensor]:
        first = self.random(*size)
        n = count_copies(first.nbytes) if self.device.type == "cuda" else 1
        return [first, *(first.clone() for _ in range(n - 1))]

    def random(self, *size: int) -> Tensor:
        """Return a tensor of normally distributed elements."""
        return torch.randn(size, dtype=self.dtype, device=self.device, generator=self._generator)

    def measure(self, rows: Sequence[Measured], rounds: int) -> float:
        """Measure the speed-ups of rows with the same number of tokens, and fill them in.

        On CUDA, a kind that fails is left out from then on, with a warning.

        Args:
            rows: rows of `blank_rows`.
            rounds: samples of each time; fewer suffice for many tokens.

        Returns:
            The seconds that it took, without the compilation of kernels.

        Raises:
            Stopped: if another thread has asked for it.
        """
        if not rows:
            return 0.0
        tokens = rows[0].shape[0]
        rounds = min(rounds, _ROUNDS_OF_MANY) if tokens >= _MANY_TOKENS else rounds
        products = Products(self, tokens)
        cells = {
            op: [
                (row.speedups, kind, products.sparse(kind, op, row.density))
                for row in rows
                if row.op == op
                for kind in available_kinds(op, self.dtype, self.device)
            ]
            for op in OPS
        }
        if self.device.type == "cuda":
            for op in OPS:
                for _, kind, functions in cells[op]:
                    self._try(kind, functions[0])
        begin = time.monotonic()
        for op in OPS:
            timed = [cell for cell in cells[op] if cell[1] not in self.failed]
            if not timed:
                continue
            self._check_stop()
            contenders = [products.dense(op), *(functions for *_, functions in timed)]
            dense, *samples = device_times(contenders, rounds, self.device)
            for (speedups, kind, _), ours in zip(timed, samples, strict=True):
                speedups[kind] = max(0.001, round(speedup(dense, ours), 3))
        return time.monotonic() - begin

    def _try(self, kind: str, function: Function) -> None:
        """Compile and run a kind's kernels."""
        self._check_stop()
        if kind in self.failed:
            return
        try:
            function()
            torch.cuda.synchronize(self.device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.failed.add(kind)
            layer = _describe([name_layer(self._shape, self.device)])
            _warn(f"The {kind} kernels fail for {layer}", error)

    def _check_stop(self) -> None:
        if self._stop.is_set():
            raise Stopped


class Products:
    """The products of a layer at a number of tokens: functions, one for each copy of the weight.

    Attributes:
        x, dy: operands `[tokens, in_features]` and `[tokens, out_features]`, scaled so that the
            elements of dW have unit variance, as those of the weights have.
        y, dx: results of the shapes of dy and x, on CUDA. On a CPU, products allocate them.

    Args:
        operands: weights of the layer.
        tokens: number of tokens.
    """

    def __init__(self, operands: Operands, tokens: int) -> None:
        self._operands = operands
        self._on_cuda = operands.device.type == "cuda"
        self.x = operands.random(tokens, operands.in_features)
        self.dy = operands.random(tokens, operands.out_features).mul_(tokens**-0.5)
        self.y, self.dx = torch.empty_like(self.dy), torch.empty_like(self.x)

    def dense(self, op: str) -> list[Function]:
        """Return the dense product; for "norms" that is dW."""
        copies = self._operands.dense
        if op == "norms":
            return [self._dense("dw", copies[0])]
        return [self._dense(op, copy) for copy in copies]

    def _dense(self, op: str, weight: Tensor) -> Function:
        left, right, out = {
            "fwd": (self.x, weight.t(), self.y),
            "dx": (self.dy, weight, self.dx),
            "dw": (self.dy.t(), self.x, weight),
        }[op]
        return partial(torch.mm, left, right, out=out if self._on_cuda else None)

    def sparse(self, kind: str, op: str, density: float) -> list[Function]:
        """Return a product computed by a kind at one of the densities of the operands."""
        if op == "norms":
            return [self._norms(kind)]
        topology, copies = self._operands.sparse[density]
        return [self._sparse(kind, op, topology, copy) for copy in copies]

    def _sparse(self, kind: str, op: str, topology: BlockTopology, values: Tensor) -> Function:
        left, out = (self.x, self.y) if op == "fwd" else (self.dy, self.dx)
        lists = BlockLists.of(topology.indices, forward=op == "fwd")
        if not self._on_cuda:
            if op == "dw":
                return partial(cpu.weight_gradient, self.dy, self.x, topology.indices, kind)
            forward = op == "fwd"
            return partial(cpu.multiply, left, values, None, lists, forward=forward, method=kind)
        launchers, device = cuda.LAUNCHERS[kind], values.get_device()
        if op == "dw":
            return partial(launchers.linear_dw, self.dy, self.x, topology.indices, values, device)
        return partial(
            launchers.linear, left, values, None, lists, out, device, forward=op == "fwd"
        )

    def compute(self, kind: str, op: str, density: float) -> Tensor:
        """Return the result of one of `STEP`, in memory that held NaN; dW replaces the values."""
        function, *_ = self.sparse(kind, op, density)
        if not self._on_cuda:
            found: Any = function()
            return cast(Tensor, found if op == "dw" else found[0])
        copies = self._operands.sparse[density][1]
        result = {"fwd": self.y, "dx": self.dx, "dw": copies[0]}[op].fill_(torch.nan)
        function()
        return result

    def _norms(self, kind: str) -> Function:
        size, device = self._operands.block_size, self.x.get_device()
        grid = block_grid(self._operands.out_features, self._operands.in_features, size)
        norms = torch.empty(grid, dtype=torch.float32, device=self.x.device)
        armed = torch.ones((), dtype=torch.bool, device=self.x.device)
        return partial(cuda.LAUNCHERS[kind].norms, self.dy, self.x, armed, norms, device)
