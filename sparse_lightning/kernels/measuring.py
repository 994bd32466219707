"""Measures the layer shapes that no table covers, once on each machine.

A layer shape is measured when it is first used, or ahead of that by `prepare`: every kind of
kernels and the dense product, for each product of a step. The measurements are kept in a file;
those that cannot be kept are not made, so that a training that resumes makes the same choices.

Nothing else changes: the random state and memory are as before. Nothing is measured while a CUDA
graph is captured or code is compiled. The environment variable `SPARSE_LIGHTNING_MEASURE=0` turns
measuring off.
"""

from __future__ import annotations

import math
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from sparse_lightning.files import locked
from sparse_lightning.kernels import choice, cpu, cuda
from sparse_lightning.kernels.choice import OPS, STEP
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.speedups import (
    MEASURE_VARIABLE,
    DeviceSpeedups,
    Layer,
    Measured,
    may_measure,
    merged,
    write_rows,
)
from sparse_lightning.kernels.timing import Function, count_copies, device_times, speedup
from sparse_lightning.topology import BlockTopology, block_grid, count_blocks

# dtype, block size, in_features, out_features
LayerShape = tuple[torch.dtype, int, int, int]


class Ladder(NamedTuple):
    """What is measured of a layer shape.

    Attributes:
        tokens: numbers of tokens, in the order in which they are measured. On CUDA it ascends,
            since the many tokens of a large layer may exhaust memory.
        densities: densities of the layer.
        rounds: samples of each time.
        seconds: time that should not be exceeded, except by the compilation of kernels.
    """

    tokens: tuple[int, ...]
    densities: tuple[float, ...]
    rounds: int
    seconds: float


# Beyond the ends nothing is extrapolated, so one of them is density 1, where many trainings begin.
LADDERS = {
    "cuda": Ladder((1, 16, 64, 256, 1024, 4096, 16384), (1.0, 0.5, 0.25, 0.1), 5, 2.0),
    "cpu": Ladder((256, 1, 16, 1024, 64), (1.0, 0.5, 0.2, 0.05), 3, 4.0),
}
# The factor by which times grow from one number of tokens to the next, at most.
_GROWTH = 4
# Times of more tokens vary little.
_MANY_TOKENS, _ROUNDS_OF_MANY = 16384, 3
# Block norms are computed in updates only, at the number of tokens of a training.
_FEWEST_NORM_TOKENS = 256
_SECONDS_BETWEEN_MESSAGES = 5.0

_lock = threading.Lock()


def prepare(layers: Iterable[tuple[BlockTopology, torch.dtype]]) -> None:
    """Measure the layer shapes that no table covers, before a training uses them.

    Args:
        layers: topology and compute dtype of each layer.
    """
    shapes: dict[torch.device, list[LayerShape]] = {}
    for topology, dtype in layers:
        features = topology.in_features, topology.out_features
        if topology.device.type == "cpu":
            features = cpu.MEASURED_FEATURES
            dtype = torch.float32 if dtype == torch.float64 else dtype
        shapes.setdefault(topology.device, []).append((dtype, topology.block_size, *features))
    for device, found in shapes.items():
        if device.type in LADDERS and measure_missing(_speedups(device), device, found):
            # Choices made before, as by a sanity check of the model, may have been guesses.
            choice.clear_choices()
            cpu.clear_choices()


def measure_missing(
    known: DeviceSpeedups, device: torch.device, layers: Sequence[LayerShape]
) -> bool:
    """Measure the layer shapes that are not known, and keep the measurements.

    Other processes of this machine wait and then read them.

    Args:
        known: what is known of the device; the measurements are added.
        device: device to measure.
        layers: layer shapes; those of other dtypes than the tables have are ignored.

    Returns:
        Whether there are new measurements.

    Raises:
        ValueError: if a file of measurements is damaged.
    """
    if not (may_measure() and _missing(known, device, layers) and _is_possible(device)):
        return False
    with _lock:
        try:
            known.file.parent.mkdir(parents=True, exist_ok=True)
            with locked(known.file):
                rows = known.read_measured()
                if missing := _missing(known, device, layers):
                    _measure_into(known, rows, device, missing)
        except OSError as error:
            known.can_keep = False
            warnings.warn(
                f"`{known.file}` should be a file that can be written to, since it keeps which "
                f"kernels are fastest for a layer; got {error}. Layers that no table covers use "
                "the default kernels. Set SPARSE_LIGHTNING_CACHE_DIR to another folder, or "
                f"{MEASURE_VARIABLE}=0.",
                stacklevel=2,
            )
            return False
    return True


def _speedups(device: torch.device) -> DeviceSpeedups:
    if device.type == "cpu":
        return cpu.device_speedups(torch.get_num_threads())
    return choice.device_speedups(
        torch.cuda.current_device() if device.index is None else device.index
    )


def _missing(
    known: DeviceSpeedups, device: torch.device, layers: Sequence[LayerShape]
) -> dict[Layer, LayerShape]:
    """Return the layer shapes to measure, by their names in tables."""
    names = cpu.DTYPES if device.type == "cpu" else choice.DTYPES
    named: dict[Layer, LayerShape] = {
        (names[shape[0]], *shape[1:]): shape for shape in layers if shape[0] in names
    }
    return {layer: shape for layer, shape in named.items() if not known.knows(layer)}


def _is_possible(device: torch.device) -> bool:
    if torch.compiler.is_compiling() or torch._guards.detect_fake_mode() is not None:
        return False
    return device.type == "cpu" or not torch.cuda.is_current_stream_capturing()


def _measure_into(
    known: DeviceSpeedups,
    rows: Sequence[Measured],
    device: torch.device,
    missing: dict[Layer, LayerShape],
) -> None:
    """Measure layer shapes, and write each into the device's file as soon as it is measured.

    What was written is used, also if a later write fails.
    """
    environment = {"device": known.name, "torch": torch.__version__}
    # A file that cannot be written is noticed before the measurement.
    write_rows(known.file, rows, environment)
    message = time.monotonic()
    try:
        for i, (layer, shape) in enumerate(missing.items()):
            if i == 0:
                _say(
                    f"Measuring which kernels are fastest on {known.name} for "
                    f"{_describe(device, missing)}. This takes a few seconds, once: the result is "
                    f"kept in {known.file}. {MEASURE_VARIABLE}=0 turns it off."
                )
            elif time.monotonic() - message > _SECONDS_BETWEEN_MESSAGES:
                message = time.monotonic()
                _say(f"Measured {i} of {len(missing)} layer shapes.")
            found = measure_layer(shape, LADDERS[device.type], device)
            if found:
                rows = merged(rows, found)
                write_rows(known.file, rows, environment)
            else:
                known.unmeasurable.add(layer)  # memory is exhausted
    finally:
        known.read_measured()


def _say(text: str) -> None:
    print(f"sparse-lightning: {text}", file=sys.stderr, flush=True)


def _describe(device: torch.device, layers: Iterable[Layer]) -> str:
    """Return a description of layer shapes.

    >>> layers = [("half", 64, 512, 2048), ("half", 64, 2048, 512)]
    >>> _describe(torch.device("cuda"), layers)
    'layers of 512 x 2048, 2048 x 512 (half, blocks of 64)'
    >>> _describe(torch.device("cpu"), [("bf16", 32, 1024, 1024)])
    'layers (bf16, blocks of 32)'
    """
    found: dict[tuple[str, int], list[str]] = {}
    for dtype, block_size, *features in layers:
        found.setdefault((dtype, block_size), []).append(" x ".join(map(str, features)))
    return "; ".join(
        # On a CPU one layer stands for all.
        f"layers{'' if device.type == 'cpu' else ' of ' + ', '.join(sizes)} "
        f"({dtype}, blocks of {block_size})"
        for (dtype, block_size), sizes in found.items()
    )


def measure_layer(shape: LayerShape, ladder: Ladder, device: torch.device) -> list[Measured]:
    """Measure every kind for each product of a layer, until memory or the time is exhausted.

    Args:
        shape: the layer shape.
        ladder: what to measure.
        device: device to measure.

    Returns:
        The measurements; none if there is not enough memory for any.
    """
    rows: list[Measured] = []
    with undisturbed(device, shape[0]):
        with suppress(torch.OutOfMemoryError):
            for rung in _climb(shape, ladder, device):
                rows += rung
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.empty_cache()
    return rows


def _climb(shape: LayerShape, ladder: Ladder, device: torch.device) -> Iterator[Sequence[Measured]]:
    operands = Operands(shape, ladder.densities, device)
    times: dict[int, float] = {}
    for tokens in ladder.tokens:
        if sum(times.values()) + _expected_time(times, tokens) <= ladder.seconds:
            rows = blank_rows(shape, tokens, ladder.densities, device)
            times[tokens] = operands.measure(rows, ladder.rounds)
            yield rows


def _expected_time(times: Mapping[int, float], tokens: int) -> float:
    """Return the time to expect of more tokens than were measured, at most; 0 for fewer.

    >>> _expected_time({}, 1), _expected_time({1: 0.1}, 16), _expected_time({256: 1.0}, 16)
    (0.0, 0.4, 0.0)
    """
    most = max(times, default=tokens)
    return times[most] * min(_GROWTH, tokens / most) if tokens > most else 0.0


@contextmanager
def undisturbed(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Run plain products in this context: no autograd, autocast, modes or TF32."""
    matmul = torch.backends.cuda.matmul
    # Before PyTorch 2.9 there is only the legacy flag, which newer versions refuse to read once the
    # other is set.
    flag = "fp32_precision" if hasattr(matmul, "fp32_precision") else "allow_tf32"
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_disable_current_modes())
        stack.enter_context(torch._C.DisableTorchFunction())
        # Deterministic algorithms would otherwise fill what a kind allocates.
        deterministic: Any = torch.utils.deterministic
        fills = deterministic.fill_uninitialized_memory
        stack.callback(setattr, deterministic, "fill_uninitialized_memory", fills)
        deterministic.fill_uninitialized_memory = False
        if dtype == torch.float32 and device.type == "cuda":
            # Tables are relative to exact products.
            stack.callback(setattr, matmul, flag, getattr(matmul, flag))
            setattr(matmul, flag, "ieee" if flag == "fp32_precision" else False)
        yield


def blank_rows(
    shape: LayerShape, tokens: int, densities: Iterable[float], device: torch.device
) -> list[Measured]:
    """Return what there is to measure of a layer at a number of tokens, without speed-ups.

    Densities are rounded to whole blocks; those that become equal are measured once.
    """
    dtype, block_size, in_features, out_features = shape
    name = (cpu.DTYPES if device.type == "cpu" else choice.DTYPES)[dtype]
    sizes = (tokens, in_features, out_features)
    total = math.prod(block_grid(out_features, in_features, block_size))
    found = dict.fromkeys(count_blocks(density, total) / total for density in densities)
    rows = [Measured(op, name, block_size, sizes, density, {}) for op in STEP for density in found]
    # On a CPU, and for a single kind, there is no choice.
    has_choice = device.type == "cuda" and len(available_kinds("norms", dtype, device)) > 1
    if has_choice and tokens >= _FEWEST_NORM_TOKENS:
        rows.append(Measured("norms", name, block_size, sizes, 1.0, {}))
    return rows


def available_kinds(op: str, dtype: torch.dtype, device: torch.device) -> Sequence[str]:
    """Return the kinds, or on a CPU the methods, that can compute a product."""
    if device.type == "cpu":
        return cpu.METHODS
    return choice.available_kinds(op, dtype, torch.cuda.get_device_capability(device))


class Operands:
    """The weights of a layer at several densities, on a device.

    On CUDA there are as many copies of each as exceed the caches. Products dW write into them.

    Attributes:
        dense: copies of the dense weight `[out_features, in_features]`.
        sparse: topology, and copies of the values, by density.

    Args:
        shape: the layer shape.
        densities: densities.
        device: device of all tensors.
    """

    def __init__(self, shape: LayerShape, densities: Iterable[float], device: torch.device) -> None:
        self.dtype, self.block_size, self.in_features, self.out_features = shape
        self.device = device
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

        Args:
            rows: rows of `blank_rows`.
            rounds: samples of each time; fewer suffice for many tokens.

        Returns:
            The seconds that it took, without the compilation of kernels.
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
                for _, _, functions in cells[op]:
                    functions[0]()
            torch.cuda.synchronize(self.device)
        begin = time.monotonic()
        for op in OPS:
            if not cells[op]:
                continue
            contenders = [products.dense(op), *(functions for *_, functions in cells[op])]
            dense, *samples = device_times(contenders, rounds, self.device)
            for (speedups, kind, _), ours in zip(cells[op], samples, strict=True):
                speedups[kind] = max(0.001, round(speedup(dense, ours), 3))
        return time.monotonic() - begin


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
        lists = _block_lists(topology, op)
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


def _block_lists(topology: BlockTopology, op: str) -> BlockLists:
    if op == "fwd":
        return BlockLists(topology.row_offsets, topology.row_entries, topology.slots)
    return BlockLists(topology.col_offsets, topology.col_entries, topology.slots)
