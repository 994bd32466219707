"""Which modules of a model are MLPs, so that they can compute as one op.

An MLP is recognized by what its `forward` computes, whatever its class: `find_parts` runs it with
tiny random layers in place of its own, and compares results and gradients with those of an MLP.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_lightning.kernels.activations import ACTIVATIONS, activate, check
from sparse_lightning.linear import BlockSparseLinear, dense_shape
from sparse_lightning.mlp import FusedMLP, MLPParts, dense_class_of, fused_class

_IN, _HIDDEN = 6, 10  # features of the layers that stand for a module's own
_MOST_DIMS = 4
_registered: dict[type[nn.Module], MLPParts] = {}


def register_mlp(
    cls: type[nn.Module], *, up: str, down: str, activation: str, gate: str | None = None
) -> None:
    """State that a class is an MLP whose layers may be computed as one op.

    `sparsify` finds most MLPs by itself. This names one that it cannot try out, for instance
    because its `forward` needs a GPU or certain sizes.

    Args:
        cls: class of modules. With input x, its `forward` must return down(f(up(x))) or, with a
            gate, down(f(gate(x)) * up(x)), and do nothing else.
        up, down, gate: names of the layers, attributes of a module. If `gate` is `up`, that layer
            computes both, the gate in the first half of its output.
        activation: f, one of "relu", "gelu", "gelu_tanh" and "silu".

    >>> class MyMLP(nn.Module):
    ...     pass
    >>> register_mlp(MyMLP, gate="w1", up="w3", down="w2", activation="silu")
    """
    check(activation)
    _registered[cls] = MLPParts(up, down, gate, activation)


def fuse_mlp_(module: nn.Module) -> str | None:
    """Let a module compute as one op if it is an MLP of block-sparse layers; else, as before.

    Returns:
        Why not, if it seems to be an MLP.
    """
    dense_class = dense_class_of(module)
    if dense_class is None:
        return None
    found = find_parts(module)
    if isinstance(found, MLPParts):
        try:
            module.__class__ = fused_class(dense_class, found)
        except TypeError as error:  # for instance from a base's __init_subclass__
            return f"no class can be derived from its own: {error}"
        others = [(n, m) for n, m in module._modules.items() if n not in found.layers]
        vars(module)["_fused_beside"] = tuple(others)
        return None
    if type(module) is not dense_class:
        module.__class__ = dense_class
        vars(module).pop("_fused_beside", None)
    return found


def find_parts(
    module: nn.Module, layers: Mapping[str, nn.Module] | None = None
) -> MLPParts | str | None:
    """Return how a module computes an MLP; else, why it does not, if it seems to be one.

    Args:
        module: any module.
        layers: its children that are layers of the MLP, by name; by default, those that are
            block-sparse.
    """
    if layers is None:
        layers = {n: m for n, m in module.named_children() if type(m) is BlockSparseLinear}
    dense_class = dense_class_of(module)
    if len(layers) not in (2, 3) or dense_class is None or "forward" in vars(module):
        return None
    if parts := _registered.get(dense_class):
        return parts if layers.keys() >= {*parts.layers} else None
    is_container = dense_class.forward in (nn.Module.forward, nn.Sequential.forward)
    if is_container or not _is_simple(module, layers):
        return None
    reason = None
    for names in _candidates(layers):
        try:
            with _preserved_random_state():
                found = _Trial(module, dense_class, layers, names).parts()
        except (Exception, SystemExit) as error:  # the module's own code can raise anything
            found = f"its `forward` cannot be tried out: {type(error).__name__}: {error}"
        if isinstance(found, MLPParts):
            return found
        # Attention has hidden features as wide as its inputs, or more arguments than an MLP. Naming
        # it would help nobody.
        n_hidden, n_in = dense_shape(layers[names[0]])
        reason = reason or (found if n_hidden != n_in else None)
    return reason if reason and _takes_one_input(dense_class) else None


def _takes_one_input(cls: type[nn.Module]) -> bool:
    try:
        return len(inspect.signature(cls.forward).parameters) == 2  # with `self`
    except (TypeError, ValueError):  # not every callable has a signature
        return False


def _is_simple(module: nn.Module, layers: Mapping[str, nn.Module]) -> bool:
    """Return whether a module has no state beside its layers, which a `forward` could use."""
    beside = [m for name, m in module._modules.items() if m is not None and name not in layers]
    state = *module._parameters.values(), *module._buffers.values()
    return (
        all(tensor is None for tensor in state)
        and not any(m._modules or m._parameters or m._buffers for m in beside)
        # Copies and pickles of such classes are not made from their `__dict__`.
        and type(module).__reduce__ is object.__reduce__
        and (isinstance(module, FusedMLP) or type(module).__reduce_ex__ is object.__reduce_ex__)
    )


def _candidates(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """Yield names of layers in the order of the op, where their shapes fit.

    One layer for gate and up is named twice.
    """
    for names in itertools.permutations(layers):
        *inner, down = (dense_shape(layers[name]) for name in names)
        widths = {n_out for n_out, _ in inner}
        if len({n_in for _, n_in in inner}) == 1 and widths == {down[1]}:
            yield names
        elif len(inner) == 1 and widths == {2 * down[1]}:
            yield names[0], *names


class _Trial:
    """A module with tiny random layers, in a certain order, in place of its own."""

    def __init__(
        self,
        module: nn.Module,
        dense_class: type[nn.Module],
        layers: Mapping[str, nn.Module],
        names: Sequence[str],
    ) -> None:
        self._names, self._dense_class = names, dense_class
        self._generator = torch.Generator().manual_seed(0)
        *inner, down = names
        has_residual_shape = dense_shape(layers[down])[0] == dense_shape(layers[inner[0]])[1]
        self._is_stacked = len({*names}) < len(names)
        shapes = dict.fromkeys(inner, (_HIDDEN * (1 + self._is_stacked), _IN))
        shapes[down] = (_IN if has_residual_shape else _IN - 1, _HIDDEN)
        self._layers = {n: self._linear(shapes[n], layers[n].bias is not None) for n in names}
        self._probe = object.__new__(dense_class)
        vars(self._probe).update(_copy_of_state(module))
        vars(self._probe)["_modules"] = {
            name: self._layers[name] if name in self._layers else copy.deepcopy(child)
            for name, child in module._modules.items()
        }

    def _draw(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, dtype=torch.float64, device="cpu")

    def _linear(self, shape: tuple[int, int], bias: bool) -> nn.Linear:
        linear = nn.Linear(*shape[::-1], device="meta")
        # Not by `register_parameter`, which others replace to save memory.
        linear._parameters["weight"] = nn.Parameter(self._draw(*shape))
        linear._parameters["bias"] = nn.Parameter(self._draw(shape[0])) if bias else None
        return linear

    def parts(self) -> MLPParts | str:
        """Return what the module computes; else, why that is no MLP."""
        modules = [self._probe, *self._probe.children()]
        before = [_copy_of_state(module) for module in modules]
        # Large tokens reach limits, such as that of a clamp.
        sizes = torch.tensor([1e-3, 1, 1, 1, 1e2, 1e4], dtype=torch.float64, device="cpu")
        x = self._draw(2, 6, _IN) * sizes[:, None]
        activation = next((f for f in ACTIVATIONS if self._agrees(x, f)), None)
        if activation is None:
            return f"it computes something other than an MLP with {', '.join(ACTIVATIONS)}"
        special = self._draw(4, _IN)
        special[0], special[1, 2] = 0, torch.nan
        for other in special, x.float(), x[:, :4].bfloat16():
            if not self._agrees(other, activation, gradients=False):
                return "it computes something other than an MLP for some values or dtypes"
        with torch.autocast("cpu", torch.bfloat16):
            if self._run(x.float()).dtype != torch.bfloat16:
                return "its result does not have the dtype of autocast"
        dims = [
            n
            for n in range(1, _MOST_DIMS + 1)
            if self._agrees(self._draw(*(_IN,) * n), activation, gradients=False)
        ]
        in_training = self._agrees(x, activation, training=True)
        if not all(map(_is_same_state, before, map(_copy_of_state, modules))):
            return "its `forward` changes the module"
        *inner, down = self._names
        gate = inner[0] if len(inner) == 2 else None
        return MLPParts(inner[-1], down, gate, activation, in_training, tuple(dims))

    def _agrees(
        self, x: Tensor, activation: str, *, training: bool = False, gradients: bool = True
    ) -> bool:
        """Return whether the module computes an MLP of an input, without random numbers."""
        for layer in self._layers.values():
            layer.to(x.dtype)
        leaves = [x.detach().requires_grad_(gradients)]
        leaves += [p for layer in self._layers.values() for p in layer.parameters()]
        with torch.set_grad_enabled(gradients):
            random_state = _random_state()
            theirs = self._run(leaves[0], training)
            if _random_state() != random_state:
                return False
            ours = self._compose(leaves[0], activation)
            if not _are_close(theirs, ours) or theirs.requires_grad != gradients:
                return False
            if not gradients:
                return True
            dy = self._draw(*ours.shape)
            found = [torch.autograd.grad(y, leaves, dy, allow_unused=True) for y in (ours, theirs)]
        return all(b is not None and _are_close(b, a) for a, b in zip(*found, strict=True))

    def _compose(self, x: Tensor, activation: str) -> Tensor:
        *inner, down = (self._layers[name] for name in self._names)
        hidden = inner[0](x).chunk(2, -1) if self._is_stacked else [layer(x) for layer in inner]
        activated = activate(hidden[0], activation)
        y: Tensor = down(activated if len(hidden) == 1 else activated * hidden[1])
        return y

    def _run(self, x: Tensor, training: bool = False) -> Tensor:
        for module in self._probe.modules():
            vars(module)["training"] = training
        found = self._dense_class.forward(self._probe, x)
        if not isinstance(found, Tensor):
            raise TypeError(f"it returns a {type(found).__name__}")
        return found


def _copy_of_state(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes, with copies of containers, but no children."""
    return {
        name: copy.copy(value) if isinstance(value, (list, dict, set)) else value
        for name, value in vars(module).items()
        if name not in ("_modules", "training")
    }


def _is_same_state(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    def is_same(a: Any, b: Any) -> bool:
        if isinstance(a, dict):
            return type(a) is type(b) and [*a] == [*b] and all(a[k] is b[k] for k in a)
        if isinstance(a, (list, set)):
            return type(a) is type(b) and len(a) == len(b)
        return a is b

    return first.keys() == second.keys() and all(is_same(first[k], second[k]) for k in first)


def _random_state() -> tuple[object, ...]:
    """Return the state of the generators that a `forward` may draw from."""
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state()[1:3] if numpy else ()
    return (
        random.getstate(),
        bytes(torch.get_rng_state().numpy()),
        *(bytes(each) if hasattr(each, "tobytes") else each for each in drawn),
    )


@contextmanager
def _preserved_random_state() -> Iterator[None]:
    numpy, python = sys.modules.get("numpy"), random.getstate()
    drawn = numpy.random.get_state() if numpy else None
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        if numpy:
            numpy.random.set_state(drawn)


def _are_close(found: Tensor, expected: Tensor) -> bool:
    """Return whether results are equal but for rounding, relative to the largest of a row."""
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-4}.get(found.dtype, 3e-2)
    scale = expected.abs().nan_to_num().amax(-1, keepdim=True) if expected.dim() else expected
    error = (found - expected).abs()
    both_nan = found.isnan() & expected.isnan()
    return bool(((error <= tolerance * scale) | both_nan).all())
