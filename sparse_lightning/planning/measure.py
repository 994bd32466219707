"""Times on this device: of a model's training step, and of the products of its layers."""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparse_lightning.bench.problem import Problem
from sparse_lightning.bench.timing import device_times, speedup
from sparse_lightning.export.graph import Input, random_inputs
from sparse_lightning.kernels import choice
from sparse_lightning.linear import dense_shape
from sparse_lightning.planning.costs import DenseTimes, Product, Work

Result = TypeVar("Result")

# As Lightning's: the dtype that parameters are brought to, and that of autocast.
PRECISIONS: dict[str, tuple[torch.dtype | None, torch.dtype | None]] = {
    "32-true": (None, None),
    "bf16-mixed": (None, torch.bfloat16),
    "bf16-true": (torch.bfloat16, None),
}

_WARM_UP, _ROUNDS = 2, 5
_MAX_STEPS, _SECONDS_A_ROUND = 10, 0.5
_REPEATS = {"cuda": 11, "cpu": 3}

# The clock of products makes launches slower by less than this factor; and no GPU is faster.
_CLOCKED_LAUNCH, _CYCLES_PER_SECOND = 4, 2e9

# Rows, columns that are summed over, columns, and the dtype.
_Sizes = tuple[int, int, int, torch.dtype]


class Training:
    """A model's training steps on a device, on random inputs.

    The loss is the output's `loss`, if it has one, else the mean square of each float output. The
    optimizer is AdamW, fused on CUDA. Its learning rate is 0, so that nothing can diverge.

    Args:
        model: changed: brought to the device and the precision, in training mode.
        inputs: what its `forward` takes.
        precision: one of `PRECISIONS`.
        device: to train on.
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
        """Make one training step."""
        self.forward().backward()
        self.update()

    def forward(self) -> Tensor:
        """Return the loss.

        Raises:
            ValueError: if the model fails with the inputs, or returns nothing to train by.
            RuntimeError: if memory ends.
        """
        try:
            with self._autocast():
                return _loss(self.model(*self._inputs))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the model is the user's
            shapes = ", ".join(f"{list(x.shape)} {x.dtype}" for x in self._inputs)
            raise ValueError(
                f"`--input` must say what the model takes; got {shapes}, for which it raised "
                f"{type(error).__name__}: {error}"
            ) from error

    def update(self) -> None:
        """Make the optimizer's step."""
        self._optimizer.step()
        self._optimizer.zero_grad()

    def seconds(self) -> float:
        """Return the seconds of a step: the median of rounds of several, which do not wait."""
        for _ in range(_WARM_UP):
            self.step()
        one = self._timed(1)
        steps = max(1, min(_MAX_STEPS, int(_SECONDS_A_ROUND / one)))
        return statistics.median(self._timed(steps) / steps for _ in range(_ROUNDS))

    def _timed(self, steps: int) -> float:
        self._wait()
        begin = time.perf_counter()
        for _ in range(steps):
            self.step()
        self._wait()
        return time.perf_counter() - begin

    def parts(self) -> tuple[float, float]:
        """Return the seconds of the optimizer's step, and those in which the host launches a step.

        The device is waited for between forward, backward and optimizer, so that the host does
        not wait for a place in its queue while it launches.
        """
        optimizer, launch = [], []
        for _ in range(_ROUNDS):
            loss, forward = self._launched(self.forward)
            _, backward = self._launched(loss.backward)
            self._wait()
            begin = time.perf_counter()
            _, update = self._launched(self.update)
            self._wait()
            optimizer.append(time.perf_counter() - begin)
            launch.append(forward + backward + update)
        on_cuda = self.device.type == "cuda"
        return statistics.median(optimizer), statistics.median(launch) if on_cuda else 0.0

    def _launched(self, function: Callable[[], Result]) -> tuple[Result, float]:
        self._wait()
        begin = time.perf_counter()
        result = function()
        return result, time.perf_counter() - begin

    def work(self, layers: Iterable[str]) -> dict[str, Counter[Product]]:
        """Make a forward and a backward, and return the products that linear layers computed.

        What is compiled runs eagerly here, so that each call is seen.
        """
        seen: dict[str, Counter[Product]] = {name: Counter() for name in layers}
        hooks = [
            self.model.get_submodule(name).register_forward_hook(
                _counting(counter), with_kwargs=True
            )
            for name, counter in seen.items()
        ]
        with torch.compiler.set_stance("force_eager"):
            self.forward().backward()
        for hook in hooks:
            hook.remove()
        self._optimizer.zero_grad()
        return seen

    def products(
        self, wanted: Iterable[Product], step: float, launch: float
    ) -> dict[Product, float]:
        """Return the seconds of dense products, as they are within a step.

        Args:
            wanted: those to return.
            step: seconds of a step, and `launch` those of the host for it: if it might fall behind,
                the device is kept from beginning, so that the clock sees nothing of launches.
        """
        clock = _ProductClock(self.device)
        behind = _CLOCKED_LAUNCH * launch - step
        with torch.compiler.set_stance("force_eager"), clock:
            for _ in range(_ROUNDS):
                if behind > 0:
                    torch.cuda._sleep(int(behind * _CYCLES_PER_SECOND))
                self.step()
        self._wait()
        return {product: clock.seconds(product) or self._alone(product) for product in wanted}

    def _alone(self, product: Product) -> float:
        """Return the seconds of a dense product by itself, for one that the clock did not see."""
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
        return _seconds([functions[product.op]], self.device)[0]

    def casts(self, layers: Iterable[str]) -> dict[str, float]:
        """Return the seconds of bringing each weight into autocast's dtype, and a gradient back.

        A frozen weight has none.
        """
        to = self._autocast_dtype
        times: dict[tuple[object, ...], float] = {}
        found = {}
        for name in layers:
            weight = self.model.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            if to is None or weight.dtype == to:
                continue
            key = (weight.shape, weight.dtype, weight.requires_grad)
            if key not in times:
                times[key] = _cast_seconds(weight, to, self.device)
            found[name] = times[key]
        return found

    def _autocast(self) -> AbstractContextManager[Any]:
        if self._autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device.type, self._autocast_dtype)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Speedups:
    """How much faster than dense block-sparse products are on a device, each found out once.

    Attributes:
        measured: whether some were measured here, for want of a table of such a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.measured = False
        self._found: dict[tuple[Product, int, float], float] = {}

    def of(self, product: Product, block_size: int, density: float) -> float:
        """Return dense time / time of a block-sparse product."""
        key = (product, block_size, density)
        if key not in self._found:
            known = self._by_table(*key)
            if known is None:
                self._measure(*key)
            else:
                self._found[key] = known
        return self._found[key]

    def _by_table(self, product: Product, block_size: int, density: float) -> float | None:
        if self.device.type != "cuda":
            return None
        # Tables are relative to exact products of fp32.
        if product.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32:
            return None
        index = torch.cuda.current_device()
        return choice.expected_speedup(
            product.op, product.dtype, block_size, product.shape, density, index
        )

    def _measure(self, product: Product, block_size: int, density: float) -> None:
        """Measure all products of such a layer."""
        self.measured = True
        problem = Problem(
            product.shape, block_size, density, dtype=product.dtype, device=self.device, seed=0
        )
        dense = [problem.dense(op).run for op in choice.STEP]
        ours = [problem.ours(op).run for op in choice.STEP]
        samples = _samples([*dense, *ours], self.device)
        for i, op in enumerate(choice.STEP):
            of = Product(op, product.shape, product.dtype)
            self._found[of, block_size, density] = speedup(samples[i], samples[i + len(dense)])


class _ProductClock(TorchDispatchMode):
    """Times the dense products of what runs under it, where they run, by their sizes.

    Between other work a product takes longer than alone: caches hold other things, and a GPU that
    is busy for long runs slower.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._seen: dict[_Sizes, list[tuple[Any, Any]]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            return func(*args, **(kwargs or {}))
        a, b = args[-2:]
        begin = self._now()
        result = func(*args, **(kwargs or {}))
        self._seen[a.shape[0], a.shape[1], b.shape[1], a.dtype].append((begin, self._now()))
        return result

    def _now(self) -> float | torch.cuda.Event:
        """Return the time, or on CUDA what will know when the device was here."""
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, product: Product) -> float | None:
        """Return the median over what was seen, once the device is done; None if nothing was."""
        tokens, in_features, out_features = product.shape
        of = {
            "fwd": [(tokens, in_features, out_features)],
            "dx": [(tokens, out_features, in_features)],
            # Or the transposed one, as the weight's strides have it.
            "dw": [(out_features, tokens, in_features), (in_features, tokens, out_features)],
        }[product.op]
        seen = [pair for sizes in of for pair in self._seen.get((*sizes, product.dtype), ())]
        if not seen:
            return None
        on_cuda = self._device.type == "cuda"
        return statistics.median(
            float(begin.elapsed_time(end)) / 1e3 if on_cuda else float(end - begin)
            for begin, end in seen
        )


def dense_times(training: Training, layers: Sequence[str]) -> tuple[DenseTimes, Work]:
    """Measure the dense model, and return its times with the products of the layers."""
    work = training.work(layers)
    of_layers = {product for counter in work.values() for product in counter}
    step = training.seconds()
    optimizer, launch = training.parts()
    products = training.products(of_layers, step, launch)
    casts = training.casts(name for name in layers if work[name])
    return DenseTimes(step, optimizer, launch, products, casts), work


def tokens_of(work: Mapping[Product, int]) -> int:
    """Return the tokens that a layer's forward saw in a step."""
    return sum(n * product.shape[0] for product, n in work.items() if product.op == "fwd")


def _seconds(functions: Sequence[Callable[[], object]], device: torch.device) -> list[float]:
    return [statistics.median(ms) / 1e3 for ms in _samples(functions, device)]


def _samples(functions: Sequence[Callable[[], object]], device: torch.device) -> list[list[float]]:
    with torch.no_grad():
        return device_times(functions, _REPEATS[device.type], device)


def _cast_seconds(weight: Tensor, to: torch.dtype, device: torch.device) -> float:
    narrow = weight.detach().to(to)
    casts: list[Callable[[], object]] = [lambda: weight.to(to)]
    if weight.requires_grad:
        casts.append(lambda: narrow.to(weight.dtype))
    return sum(_seconds(casts, device))


def _counting(counter: Counter[Product]) -> Callable[..., None]:
    """Return a forward hook that counts a linear layer's products, also those of the backward."""

    def hook(
        linear: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], y: Tensor
    ) -> None:
        (x,) = (*args, *kwargs.values())
        out_features, in_features = dense_shape(linear)
        shape = (x.numel() // in_features, in_features, out_features)
        backward = [
            Product(op, shape, y.dtype)
            for op, of in (("dx", x), ("dw", linear.weight))
            if of.requires_grad
        ]
        counter[Product("fwd", shape, y.dtype)] += 1
        # Not every forward has a backward: some are made again for it.
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
