"""A product to time: its operands, the ways to compute it, and a check of their results."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparse_lightning.kernels import ops
from sparse_lightning.kernels.reference import squared_norms
from sparse_lightning.linear import BlockSparseLinear

OPS = {
    "fwd": "y = x W^T",
    "dx": "dx = dy W",
    "dw": "dW = dy^T x, at the present blocks",
    "norms": "the norms of all blocks of dy^T x, present and absent",
    "layer": "forward and backward of a layer with bias, through autograd",
    "host": "like layer, but the host time until the calls return",
}

# Largest relative error in the Frobenius norm that rounding of operands and results can cause.
MAX_ERROR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@dataclass(frozen=True)
class Contender:
    """A way to compute an op: `run` is timed, `read` converts its result for comparison."""

    run: Callable[[], Any]
    read: Callable[[Any], tuple[Tensor, ...]] = lambda result: (result,)


class Problem:
    """The operands of a layer's products on a device.

    Attributes:
        layer: `BlockSparseLinear` with bias and uniformly random blocks; all slots are filled.
        linear: `nn.Linear` that computes the same function.
        x: input `[tokens, in_features]`.
        dy: gradient of the output `[tokens, out_features]`.

    Args:
        shape: (tokens, in_features, out_features).
        block_size: block size of the layer.
        density: density of the layer.
        dtype: fp32, bf16 or fp16.
        device: device of all tensors.
        seed: seed of the blocks and the operands.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        block_size: int,
        density: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        seed: int,
        nm: str | None = None,
    ) -> None:
        tokens, in_features, out_features = shape
        torch.manual_seed(seed)
        layer = BlockSparseLinear(
            *(in_features, out_features), block_size=block_size, density=density, nm=nm, dtype=dtype
        )
        self.layer = layer.to(device)
        self.linear = self.layer.to_linear()
        self.x = torch.randn(tokens, in_features, dtype=dtype, device=device)
        self.dy = torch.randn(tokens, out_features, dtype=dtype, device=device)

    def clones(self, n: int) -> list[Problem]:
        """Return `n` problems of the same input and gradient, on copies of both layers."""
        found = []
        for _ in range(n):
            clone = copy.copy(self)
            clone.layer, clone.linear = copy.deepcopy(self.layer), copy.deepcopy(self.linear)
            found.append(clone)
        return found

    def with_tokens(self, n: int) -> Problem:
        """Return the problem of the same layers and the first `n` tokens."""
        found = copy.copy(self)
        found.x, found.dy = self.x[:n], self.dy[:n]
        return found

    def flops(self, op: str) -> float:
        """Return the floating-point operations of an op on the kept weights (norms: on all)."""
        topology = self.layer.topology
        weights = topology.n_blocks * topology.weights_per_block
        if op == "norms":
            weights = topology.mask.numel() * topology.block_size**2
        products = 3 if op in ("layer", "host") else 1
        return 2.0 * products * self.x.shape[0] * weights

    def ours(self, op: str) -> Contender:
        """Return the contender that calls this package's ops."""
        layer, x, dy = self.layer, self.x, self.dy
        topology, values = layer.topology, layer.values.detach()
        indices = topology.indices
        armed = torch.ones((), dtype=torch.bool, device=x.device)
        step = Contender(self._step(layer), lambda out: out)
        return {
            "fwd": Contender(lambda: ops.block_linear(x, values, None, *indices, None, None, 1)),
            "dx": Contender(lambda: ops.block_linear_dx(dy, values, *indices, None, None, 1)),
            "dw": Contender(lambda: ops.block_linear_dw(dy, x, *indices)),
            "norms": Contender(lambda: ops.block_norms(dy, x, armed, topology.block_size)),
            "layer": step,
            "host": step,
        }[op]

    def dense(self, op: str) -> Contender:
        """Return the contender that computes densely, with zeros at absent blocks."""
        x, dy, weight = self.x, self.dy, self.linear.weight.detach()
        step = Contender(self._step(self.linear), lambda out: (*out[:3], self._pack(out[3])))
        return {
            "fwd": Contender(lambda: F.linear(x, weight)),
            "dx": Contender(lambda: dy @ weight),
            "dw": Contender(lambda: dy.T @ x, lambda dw: (self._pack(dw),)),
            # The dense counterpart is dW alone, so the comparison shows the extra cost of norms.
            "norms": Contender(lambda: dy.T @ x, lambda dw: (self._norms(dw.float()),)),
            "layer": step,
            "host": step,
        }[op]

    def expected(self, op: str) -> tuple[Tensor, ...]:
        """Return the results of dense fp32 arithmetic."""
        x, dy, weight = self.x.float(), self.dy.float(), self.linear.weight.detach().float()
        if op == "fwd":
            return (x @ weight.T,)
        if op == "dx":
            return (dy @ weight,)
        dw = dy.T @ x
        if op == "norms":
            return (self._norms(dw),)
        if op == "dw":
            return (self._pack(dw),)
        y = x @ weight.T + self.linear.bias.detach().float()
        return y, dy @ weight, dy.sum(0), self._pack(dw)

    def check(self, op: str, contender: Contender) -> None:
        """Raise AssertionError unless a contender's results are right within rounding."""
        with poisoned_memory():
            results = contender.read(contender.run())
        for actual, expected in zip(results, self.expected(op), strict=True):
            if actual.shape != expected.shape:
                raise AssertionError(f"shape {list(actual.shape)}, not {list(expected.shape)}")
            error = float((actual.detach().float() - expected).norm() / expected.norm())
            if not error <= MAX_ERROR[self.x.dtype]:  # also true for NaN
                raise AssertionError(f"relative error {error:.2g}")

    def _step(self, layer: nn.Module) -> Callable[[], tuple[Tensor, ...]]:
        x = self.x.detach().requires_grad_()
        parameters = dict(layer.named_parameters())
        weights = [x, parameters.pop("bias"), *parameters.values()]

        def step() -> tuple[Tensor, ...]:
            y = layer(x)
            return (y, *torch.autograd.grad(y, weights, self.dy))

        return step

    def _pack(self, dense: Tensor) -> Tensor:
        return self.layer.topology.pack(dense)

    def _norms(self, dw: Tensor) -> Tensor:
        return squared_norms(dw, self.layer.topology.grid)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make PyTorch fill newly allocated memory with NaN (integers: the maximum) in this context.

    Otherwise reused memory can still hold the right result, and a kernel that writes nothing would
    pass the check.
    """
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*eterminis")
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
