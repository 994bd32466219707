"""Epilogues: what a product does with its results before it stores them.

Kernels that fuse an epilogue save the passes over memory that separate operations take. `compute`
is the same in plain PyTorch, for those that do not fuse. The results r of a product, and all other
tensors of an epilogue, have the shape and dtype of the product's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import ClassVar

from torch import Tensor

from sparse_lightning.kernels.activations import ACTIVATIONS, activate, activation_backward, check


@dataclass(frozen=True)
class Epilogue:
    """Stores the results as they are. All others derive from it.

    Attributes:
        KIND: number in epilogues.cuh.
        FORWARD: whether it is one of x W^T, or of x W; None if of both.
    """

    KIND: ClassVar[int] = 0
    FORWARD: ClassVar[bool | None] = None

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """What it reads, at most two tensors."""
        return ()

    @property
    def extra_outputs(self) -> int:
        """The number of tensors that it stores besides the first, at most two."""
        return 0

    @property
    def activation_number(self) -> int:
        """Its activation, as an index of `ACTIVATIONS`; 0 if it has none."""
        return 0

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        """Return what the product stores."""
        return (results,)

    def map_operands(self, function: Callable[[Tensor], Tensor]) -> Epilogue:
        """Return the epilogue with what a function makes of each of its operands."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: function(v) for k, v in found.items() if isinstance(v, Tensor)})


@dataclass(frozen=True)
class _WithActivation(Epilogue):
    activation: str

    def __post_init__(self) -> None:
        check(self.activation)

    @property
    def activation_number(self) -> int:
        return ACTIVATIONS.index(self.activation)


@dataclass(frozen=True)
class Activated(_WithActivation):
    """Stores the pre-activation h = r, and f(h)."""

    KIND = 1
    FORWARD = True

    @property
    def extra_outputs(self) -> int:
        return 1

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        return results, activate(results, self.activation)


@dataclass(frozen=True)
class Gated(_WithActivation):
    """Stores u = r, and f(gate) u, the hidden activations of a gated MLP."""

    KIND = 2
    FORWARD = True
    gate: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.gate,)

    @property
    def extra_outputs(self) -> int:
        return 1

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        return results, activate(self.gate, self.activation) * results


@dataclass(frozen=True)
class ActivationGradient(_WithActivation):
    """Turns r, the gradient of f(h), into that of h, and stores f(h) again if `recompute`."""

    KIND = 3
    FORWARD = False
    h: Tensor
    recompute: bool

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.h,)

    @property
    def extra_outputs(self) -> int:
        return int(self.recompute)

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        gradient = activation_backward(results, self.h, self.activation)
        return (gradient, activate(self.h, self.activation)) if self.recompute else (gradient,)


@dataclass(frozen=True)
class GatedGradient(_WithActivation):
    """Turns r, the gradient of f(gate) up, into those of gate and up.

    It stores f(gate) up again if `recompute`.
    """

    KIND = 4
    FORWARD = False
    gate: Tensor
    up: Tensor
    recompute: bool

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.gate, self.up

    @property
    def extra_outputs(self) -> int:
        return 1 + self.recompute

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        activated = activate(self.gate, self.activation)
        d_gate = activation_backward(results * self.up, self.gate, self.activation)
        gradients = d_gate, results * activated
        return (*gradients, activated * self.up) if self.recompute else gradients


@dataclass(frozen=True)
class Added(Epilogue):
    """Adds another tensor, for a sum of products."""

    KIND = 5
    FORWARD = False
    other: Tensor

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return (self.other,)

    def compute(self, results: Tensor) -> tuple[Tensor, ...]:
        return (results + self.other,)


STORE = Epilogue()


def kinds(forward: bool) -> list[int]:
    """Return the `KIND` of every epilogue of x W^T (`forward`) or x W.

    >>> kinds(True), kinds(False)
    ([0, 1, 2], [0, 3, 4, 5])
    """
    found = Epilogue, Activated, Gated, ActivationGradient, GatedGradient, Added
    return [epilogue.KIND for epilogue in found if epilogue.FORWARD in (None, forward)]


LAYOUT = "PPPPi"  # of what `launch_arguments` returns


def launch_arguments(epilogue: Epilogue, extra: tuple[Tensor, ...]) -> tuple[int, ...]:
    """Return the members of `EPILOGUE_ARGUMENTS` in epilogues.cuh.

    Args:
        epilogue: epilogue of a product.
        extra: the tensors that it stores besides the first.
    """
    if epilogue is STORE:  # most launches, of which each counts
        return 0, 0, 0, 0, 0
    read, stored = ([t.data_ptr() for t in tensors] for tensors in (epilogue.operands, extra))
    pointers = *read, *[0] * (2 - len(read)), *stored, *[0] * (2 - len(stored))
    return *pointers, epilogue.activation_number
