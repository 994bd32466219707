"""Measure the time of a model's training step, and of its layers' products, on a device."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lightning.arguments import Input, random_inputs
from sparse_lightning.bench.problem import Problem
from sparse_lightning.fusion import find_parts
from sparse_lightning.kernels import choice, cpu, cuda, measuring
from sparse_lightning.kernels.timing import device_times, speedup
from sparse_lightning.linear import dense_shape
from sparse_lightning.mlp import MLPParts, activation_name
from sparse_lightning.nm_pattern import random_positions
from sparse_lightning.planning.costs import (
    DenseMemory,
    DenseTimes,
    Product,
    ProductCounts,
    StepMemory,
)

Result = TypeVar("Result")

# For each of Lightning's precisions, the dtype of the parameters and that of autocast.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "bf16-mixed": (None, torch.bfloat16),
    "bf16-true": (torch.bfloat16, None),
}

_WARM_UP, _ROUNDS = 2, 5
_MAX_STEPS, _SECONDS_PER_ROUND = 10, 0.5
_REPEATS = {"cuda": 11, "cpu": 3}

# Upper bounds: the factor by which the product clock slows launches, and the clock rate of a GPU.
_CLOCKED_LAUNCH, _CYCLES_PER_SECOND = 4, 2e9

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
_ACTIVATIONS = {
    torch.ops.aten.relu.default: "forward",
    torch.ops.aten.gelu.default: "forward",
    torch.ops.aten.silu.default: "forward",
    torch.ops.aten.threshold_backward.default: "backward",
    torch.ops.aten.gelu_backward.default: "backward",
    torch.ops.aten.silu_backward.default: "backward",
}
# Share of the time of a separate activation that a fused one saves; see kernels/NOTES.md.
_SAVED_BY_FUSION = 0.6


class Training:
    """Training steps of a model on a device with random inputs.

    The loss is the output's `loss` if it has one, else the sum of the mean squares of its float
    tensors. The optimizer is AdamW, fused on CUDA, with learning rate 0 to prevent divergence.

    Args:
        model: model to train; it is moved to the device, cast, and put into training mode.
        inputs: inputs of its `forward`.
        precision: one of `PRECISIONS`.
        device: device to train on.
    """

    def __init__(
        self, model: nn.Module, inputs: Sequence[Input], precision: str, device: torch.device
    ) -> None:
        dtype, self._autocast_dtype = PRECISIONS[precision]
        self.model = model.to(device, dtype).train()
        self.device = device
        self._inputs = [
            x.to(device, dtype if x.is_floating_point() else None)
            for x in random_inputs(inputs, smallest=1)
        ]
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trained:
            raise ValueError("The model must have parameters to train; got none.")
        fused = True if device.type == "cuda" else None
        self._optimizer = torch.optim.AdamW(trained, lr=0.0, fused=fused)

    def step(self) -> None:
        """Run one training step."""
        self.forward().backward()
        self.update()

    def forward(self) -> Tensor:
        """Return the loss.

        Raises:
            ValueError: if the model rejects the inputs, or its output has no usable loss.
            torch.OutOfMemoryError: if memory is exhausted.
        """
        try:
            with self._autocast():
                return _loss(self.model(*self._inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # user code can raise anything
            shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in self._inputs)
            raise ValueError(
                f"`--input` must describe the model's inputs; got {shapes}, for which it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def update(self) -> None:
        """Run the optimizer's step."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds(self) -> float:
        """Return the seconds of a step: the median over rounds of unsynchronized steps."""
        for _ in range(_WARM_UP):
            self.step()
        steps = max(1, min(_MAX_STEPS, int(_SECONDS_PER_ROUND / self._time_steps(1))))
        return statistics.median(self._time_steps(steps) / steps for _ in range(_ROUNDS))

    def _time_steps(self, steps: int) -> float:
        self._wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return time.perf_counter() - begin

    def peak_memory(self) -> StepMemory | None:
        """Return the bytes that a step allocates; None on a CPU. Steps must have run before.

        What others have allocated on the device does not count.
        """
        if self.device.type != "cuda":
            return None
        self._wait()
        others = torch.cuda.memory_allocated(self.device) - self._own_bytes()
        torch.cuda.reset_peak_memory_stats(self.device)
        loss = self.forward()
        forward = torch.cuda.memory_allocated(self.device)
        loss.backward()
        peak = torch.cuda.max_memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        self.update()
        update = torch.cuda.max_memory_allocated(self.device)
        return StepMemory(forward - others, max(peak, update) - others, update - others)

    def _own_bytes(self) -> int:
        """Return the bytes of parameters, buffers, inputs and the optimizer's state."""
        state = [x for each in self._optimizer.state.values() for x in each.values()]
        tensors = *self.model.parameters(), *self.model.buffers(), *self._inputs, *state
        found = [x for x in tensors if isinstance(x, Tensor) and x.device.type == self.device.type]
        return sum(unique_storages(found).values())

    def optimizer_and_launch_seconds(self) -> tuple[float, float]:
        """Return the seconds of the optimizer's step, and those in which the host launches a step.

        The device is synchronized between forward, backward and optimizer, so that launches do not
        wait for space in the device's queue.
        """
        optimizer, launch = [], []
        for _ in range(_ROUNDS):
            loss, forward = self._time_launch(self.forward)
            _, backward = self._time_launch(loss.backward)
            self._wait()
            begin = time.perf_counter()
            _, update = self._time_launch(self.update)
            self._wait()
            optimizer.append(time.perf_counter() - begin)
            launch.append(forward + backward + update)
        on_cuda = self.device.type == "cuda"
        return statistics.median(optimizer), statistics.median(launch) if on_cuda else 0.0

    def _time_launch(self, function: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        begin = time.perf_counter()
        result = function()
        return result, time.perf_counter() - begin

    def count_products(self, layers: Iterable[str]) -> dict[str, Counter[Product]]:
        """Run forward and backward, and return the products computed by each linear layer.

        Compiled modules run eagerly here, so that their layers call the hooks.
        """
        counts: dict[str, Counter[Product]] = {name: Counter() for name in layers}
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                _counting_hook(counter), with_kwargs=True
            )
            for name, counter in counts.items()
        ]
        with torch.compiler.set_stance("force_eager"):
            self.forward().backward()
        for hook in hooks:
            hook.remove()
        self._optimizer.zero_grad()
        return counts

    def clock_steps(self, step: float, launch: float) -> StepClock:
        """Run training steps, and return the clock that recorded them.

        Args:
            step: seconds of a step.
            launch: seconds in which the host launches a step. If the host could fall behind the
                device, the device sleeps first, so that launch times do not affect the result.
        """
        clock = StepClock(self.device)
        lag = _CLOCKED_LAUNCH * launch - step
        with torch.compiler.set_stance("force_eager"), clock:
            for _ in range(_ROUNDS):
                if lag > 0:
                    torch.cuda._sleep(int(lag * _CYCLES_PER_SECOND))
                self.step()
        self._wait()
        return clock

    def isolated_seconds(self, product: Product) -> float:
        """Return the seconds of a single dense product that the clock did not record in a step."""
        tokens, in_features, out_features = product.shape
        x, dy, weight = (
            torch.randn(sizes, device=self.device).to(product.dtype)
            for sizes in ((tokens, in_features), (tokens, out_features), product.shape[:0:-1])
        )
        functions: dict[str, Callable[[], object]] = {
            "fwd": lambda: F.linear(x, weight),
            "dx": lambda: dy @ weight,
            "dw": lambda: dy.T @ x,
        }
        return _median_seconds([functions[product.op]], self.device)[0]

    def cast_bytes(self, layers: Iterable[str]) -> dict[str, int]:
        """Return the bytes of each weight in autocast's dtype, if it is cast to that."""
        return {
            name: weight.numel() * dtype.itemsize for name, weight, dtype in self._casts(layers)
        }

    def cast_seconds(self, layers: Iterable[str]) -> dict[str, float]:
        """Return the seconds to cast each weight to autocast's dtype and its gradient back.

        Frozen weights have no gradient. Layers whose weights are not cast are omitted.
        """
        cache: dict[tuple[object, ...], float] = {}
        seconds = {}
        for name, weight, dtype in self._casts(layers):
            key = (weight.shape, weight.dtype, weight.requires_grad)
            if key not in cache:
                cache[key] = _cast_seconds(weight, dtype, self.device)
            seconds[name] = cache[key]
        return seconds

    def _casts(self, layers: Iterable[str]) -> Iterator[tuple[str, Tensor, torch.dtype]]:
        """Yield each layer whose weight is cast, with the weight and autocast's dtype."""
        dtype = self._autocast_dtype
        for name in layers:
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if dtype is not None and weight.dtype != dtype:
                yield name, weight, dtype

    def kept_bytes(self, module: nn.Module, tokens: int, in_features: int) -> int:
        """Return the bytes that a module of the model keeps of a forward, besides its input.

        Parameters and what they are cast to do not count. A module in a compiled one is compiled,
        as what is kept then is the compiler's decision.
        """
        parameters = [*module.parameters()]
        # A number of tokens by which activations differ in size from parameters.
        rows = tokens
        while rows in {size for p in parameters for size in p.shape}:
            rows += 1
        dtype = self._autocast_dtype or parameters[0].dtype
        x = torch.zeros(rows, in_features, dtype=dtype, device=self.device, requires_grad=True)
        own = {*unique_storages([x, *parameters])}
        sizes = {p.numel() for p in parameters}
        kept: list[Tensor] = []

        def pack(tensor: Tensor) -> Tensor:
            if tensor.numel() not in sizes:
                kept.append(tensor)
            return tensor

        function = torch.compile(module) if self._is_compiled(module) else module
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            self._autocast(),
        ):
            y = function(x)
        del y
        storages = unique_storages(kept)
        total = sum(size for address, size in storages.items() if address not in own)
        return round(total * tokens / rows)

    def _is_compiled(self, module: nn.Module) -> bool:
        """Return whether a module or one that contains it is compiled."""
        inside = set(module.modules())
        return any(
            (other._compiled_call_impl is not None or isinstance(other, OptimizedModule))
            and not inside.isdisjoint(other.modules())
            for other in self.model.modules()
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class ProductSpeedups:
    """Speed-ups of block-sparse over dense products on a device, from a table or measured.

    Attributes:
        measured: whether any product was measured here, because no table covers it.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measured = False
        self._cache: dict[tuple[Product, int, float], float] = {}

    def prepare(self, needed: Iterable[tuple[Product, int]]) -> None:
        """Measure and keep the layer shapes that no table covers, as a training would.

        `needed` are the products and the block sizes of their layers.
        """
        if self.device.type == "cuda":
            shapes = [(p.dtype, size, *p.shape[1:]) for p, size in needed if _uses_tables(p)]
            measuring.measure_missing(torch.cuda.current_device(), list(dict.fromkeys(shapes)))

    def get(self, product: Product, block_size: int, density: float) -> float:
        """Return dense time / block-sparse time of a product."""
        key = (product, block_size, density)
        if key not in self._cache:
            from_table = self._from_table(*key)
            if from_table is None:
                self._measure(*key)
            else:
                self._cache[key] = from_table
        return self._cache[key]

    def _from_table(self, product: Product, block_size: int, density: float) -> float | None:
        if self.device.type != "cuda" or not _uses_tables(product):
            return None
        index, op, shape = torch.cuda.current_device(), product.op, product.shape
        return choice.product_speedup(
            op, product.dtype, block_size, shape, density, index, may_guess=False
        )

    def _measure(self, product: Product, block_size: int, density: float) -> None:
        """Measure all products of a layer of the same shape."""
        self.measured = True
        problem = Problem(
            product.shape, block_size, density, dtype=product.dtype, device=self.device, seed=0
        )
        dense = [problem.dense(op).run for op in choice.STEP]
        ours = [problem.ours(op).run for op in choice.STEP]
        samples = _samples([*dense, *ours], self.device)
        for i, op in enumerate(choice.STEP):
            measured = Product(op, product.shape, product.dtype)
            ratio = speedup(samples[i], samples[i + len(dense)])
            self._cache[measured, block_size, density] = ratio


class WholeBlocks:
    """Seconds in which products make whole blocks of 2:4 sparse ones, or the reverse, measured."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cache: dict[tuple[int, int, torch.dtype], tuple[float, float]] = {}

    def seconds(self, product: Product, block_size: int, n_blocks: int) -> float:
        """Return the seconds that a product of a layer with these blocks takes for it.

        The forward and dX make whole blocks of the kept weights; dW, whose result is whole blocks,
        takes the gradients of the kept weights out of them.
        """
        key = (block_size, n_blocks, product.dtype)
        if key not in self._cache:
            self._cache[key] = self._measure(*key)
        expand, compress = self._cache[key]
        return compress if product.op == "dw" else expand

    def _measure(self, size: int, n_blocks: int, dtype: torch.dtype) -> tuple[float, float]:
        backend = cuda if self._device.type == "cuda" else cpu
        positions = random_positions(n_blocks, size).to(self._device)
        blocks = torch.zeros(n_blocks, size, size, dtype=dtype, device=self._device)
        values = backend.compress(blocks, positions)
        functions: list[Callable[[], object]] = [
            lambda: backend.expand(values, positions),
            lambda: backend.compress(blocks, positions),
        ]
        expand, compress = _median_seconds(functions, self._device)
        return expand, compress


def _uses_tables(product: Product) -> bool:
    """Return whether tables predict a product: they are relative to exact fp32 products."""
    return not (product.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32)


class StepClock(TorchDispatchMode):
    """Records the times of dense products and activations in this context by their sizes.

    Within a step a product takes longer than in isolation, because caches hold other data and a GPU
    under sustained load clocks lower.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._recorded: dict[tuple[Any, ...], list[tuple[Any, Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        key: tuple[Any, ...]
        if func in _PRODUCTS:
            a, b = args[-2:]
            key = (a.shape[0], a.shape[1], b.shape[1], a.dtype)
        elif func in _ACTIVATIONS:
            key = (_ACTIVATIONS[func], args[0].numel(), args[0].dtype)
        else:
            return func(*args, **(kwargs or {}))
        begin = self._now()
        result = func(*args, **(kwargs or {}))
        self._recorded[key].append((begin, self._now()))
        return result

    def _now(self) -> float | torch.cuda.Event:
        """Return the current time, or on CUDA an event recorded in the current stream."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def product_seconds(self, product: Product) -> float | None:
        """Return the median time of a product, or None; call it after synchronization."""
        tokens, in_features, out_features = product.shape
        sizes = {
            "fwd": [(tokens, in_features, out_features)],
            "dx": [(tokens, out_features, in_features)],
            # PyTorch computes dW or its transpose, depending on the weight's strides.
            "dw": [(out_features, tokens, in_features), (in_features, tokens, out_features)],
        }[product.op]
        return self._median([(*mkn, product.dtype) for mkn in sizes])

    def activation_seconds(self, direction: str, numel: int, dtype: torch.dtype) -> float | None:
        """Return the median time of an activation ("forward" or "backward"), or None; likewise."""
        return self._median([(direction, numel, dtype)])

    def _median(self, keys: Iterable[tuple[Any, ...]]) -> float | None:
        recorded = [pair for key in keys for pair in self._recorded.get(key, ())]
        if not recorded:
            return None
        on_cuda = self._device.type == "cuda"
        return statistics.median(
            float(begin.elapsed_time(end)) / 1e3 if on_cuda else float(end - begin)
            for begin, end in recorded
        )


def dense_times(
    training: Training, layers: Sequence[str], fused: Iterable[tuple[str, ...]] = ()
) -> tuple[DenseTimes, ProductCounts]:
    """Measure the dense model; return its times and the product counts of the layers.

    Args:
        training: training of the dense model.
        layers: names of the layers that can be block-sparse.
        fused: names of those that would be computed as one op.
    """
    counts = training.count_products(layers)
    products = {product for counter in counts.values() for product in counter}
    step = training.seconds()
    optimizer, launch = training.optimizer_and_launch_seconds()
    clock = training.clock_steps(step, launch)
    seconds = {p: clock.product_seconds(p) or training.isolated_seconds(p) for p in products}
    casts = training.cast_seconds(name for name in layers if counts[name])
    fusions = {
        names: saved_by_fusion(clock, counts[names[0]], counts[names[-1]])
        for names in fused
        if training.device.type == "cuda"
    }
    return DenseTimes(step, optimizer, launch, seconds, casts, fusions), counts


def fused_layers(
    model: nn.Module, layers: Container[str]
) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """Yield the names of layers that `sparsify` lets compute as one op, with their activation.

    The first is the one before the activation, the last the one after it. With them comes a module
    that computes just these layers.

    >>> net = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16), nn.ReLU())
    >>> [*dict(fused_layers(net, ["0", "2"]))]
    [('0', '2')]
    """
    for prefix, module in model.named_modules():
        if type(module) is not nn.Sequential:
            found = {n: f"{prefix}.{n}" if prefix else n for n, _ in module.named_children()}
            own = {n: module.get_submodule(n) for n, name in found.items() if name in layers}
            parts = find_parts(module, own)
            if isinstance(parts, MLPParts) and parts.in_training:
                yield tuple(found[name] for name in parts.layers), module
            continue
        names = [f"{prefix}.{name}" if prefix else name for name, _ in module.named_children()]
        first, modules = 0, list(module)
        while first + 2 < len(modules):
            up, down = names[first], names[first + 2]
            if up in layers and down in layers and activation_name(modules[first + 1]):
                yield (up, down), nn.Sequential(*modules[first : first + 3])
                first += 2
            first += 1


def dense_memory(
    training: Training,
    layers: Sequence[str],
    counts: ProductCounts,
    fused: Mapping[tuple[str, ...], nn.Module],
) -> DenseMemory | None:
    """Measure the memory of the dense model on a GPU; None on a CPU.

    Args:
        training: training of the dense model.
        layers: names of the layers that can be block-sparse.
        counts: products of a step, by layer.
        fused: modules whose layers would be computed as one op, by the names of these.
    """
    step = training.peak_memory()
    if step is None:
        return None
    fusions, known = {}, dict[tuple[object, ...], int]()
    for names, module in fused.items():
        own = counts[names[0]]
        key = type(module), frozenset(own.items()), tuple(p.shape for p in module.parameters())
        if key not in known:
            known[key] = not_kept_by_fusion(training, module, own, len(names) - 1)
        fusions[names] = known[key]
    return DenseMemory(step, training.cast_bytes(layers), fusions)


def not_kept_by_fusion(
    training: Training, module: nn.Module, counts: Mapping[Product, int], n_hidden: int
) -> int:
    """Return the bytes that a dense MLP keeps for the backward, and one op would not.

    The op keeps its input and the results of the layers before the activation.

    Args:
        training: training of the dense model.
        module: the MLP.
        counts: products that its first layer computes in a step.
        n_hidden: number of its layers before the activation.
    """
    saved = 0
    for product, count in counts.items():
        tokens, in_features, out_features = product.shape
        backwards = max(counts.get(replace(product, op=op), 0) for op in ("dx", "dw"))
        # Activation checkpointing runs a forward whose results are not kept.
        if product.op == "fwd" and backwards == count:
            kept = training.kept_bytes(module, tokens, in_features)
            saved += count * (kept - n_hidden * tokens * out_features * product.dtype.itemsize)
    return max(0, saved)


def unique_storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the storages of tensors, by address."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def saved_by_fusion(
    clock: StepClock, up: Mapping[Product, int], down: Mapping[Product, int]
) -> float:
    """Return the seconds of a step that fusing the activation between two layers saves.

    Args:
        clock: clock that has recorded steps.
        up: products that the layer before the activation computes in a step.
        down: products that the layer after it computes.
    """
    saved = 0.0
    for op, direction, counts in (("fwd", "forward", up), ("dx", "backward", down)):
        for product, count in counts.items():
            if product.op == op and product.dtype.itemsize == 2:
                tokens, in_features, out_features = product.shape
                numel = tokens * (out_features if op == "fwd" else in_features)
                seconds = clock.activation_seconds(direction, numel, product.dtype)
                saved += _SAVED_BY_FUSION * count * (seconds or 0.0)
    return saved


def count_tokens(counts: Mapping[Product, int]) -> int:
    """Return the number of tokens in the forward calls of a layer during a step."""
    return sum(n * product.shape[0] for product, n in counts.items() if product.op == "fwd")


def _median_seconds(functions: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    return [statistics.median(ms) / 1e3 for ms in _samples(functions, device)]


def _samples(functions: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    with torch.no_grad():
        return device_times([[function] for function in functions], _REPEATS[device.type], device)


def _cast_seconds(weight: Tensor, dtype: torch.dtype, device: torch.device) -> float:
    gradient = weight.detach().to(dtype)
    casts: list[Callable[[], object]] = [lambda: weight.to(dtype)]
    if weight.requires_grad:
        casts.append(lambda: gradient.to(weight.dtype))
    return sum(_median_seconds(casts, device))


def _counting_hook(counter: Counter[Product]) -> Callable[..., None]:
    """Return a forward hook that counts a linear layer's products in forward and backward."""

    def hook(
        linear: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor
    ) -> None:
        (x,) = (*args, *kwargs.values())
        out_features, in_features = dense_shape(linear)
        shape = (x.numel() // in_features, in_features, out_features)
        backward = [
            Product(op, shape, y.dtype)
            for op, tensor in (("dx", x), ("dw", linear.weight))
            if tensor.requires_grad
        ]
        counter[Product("fwd", shape, y.dtype)] += 1
        # Activation checkpointing runs some forwards without a backward.
        if y.requires_grad:
            y.register_hook(lambda _: counter.update(backward))

    return hook


def _loss(y: Any) -> Tensor:
    loss = y.get("loss") if isinstance(y, Mapping) else getattr(y, "loss", None)
    if isinstance(loss, Tensor):
        return loss
    floats = [
        leaf.float().square().mean()
        for leaf in tree_leaves(y)
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
    ]
    if not floats:
        raise TypeError("its output has no float tensor that depends on its parameters")
    return torch.stack(floats).sum()
