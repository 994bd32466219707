"""Which modules of a model are MLPs, so that they can compute as one op.

An MLP is recognized by what its `forward` computes, whatever its class: `find_parts` runs it with
tiny random layers in place of its own, in double precision, and compares.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn

from sparse_lightning.kernels.activations import ACTIVATIONS, activate, check
from sparse_lightning.linear import BlockSparseLinear, dense_shape
from sparse_lightning.mlp import FusedMLP, MLPParts, fused_class

_IN, _HIDDEN = 6, 10  # features of the layers that stand for a module's own
_registered: dict[type[nn.Module], MLPParts] = {}


def register_mlp(
    cls: type[nn.Module], *, up: str, down: str, activation: str, gate: str | None = None
) -> None:
    """State that a class is an MLP whose layers may be computed as one op.

    `sparsify` finds most MLPs by itself. This names one that it cannot try out, for instance
    because its `forward` needs a GPU or certain sizes.

    Args:
        cls: class of modules. With input x, its `forward` must return down(f(up(x))) or, with a
            gate, down(f(gate(x)) * up(x)).
        up, down, gate: names of the layers, attributes of a module.
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
        Why not, if it has the layers of an MLP.
    """
    dense_class, found = _dense_class(module), find_parts(module)
    if isinstance(found, MLPParts):
        module.__class__ = fused_class(dense_class, found)
        others = [(n, m) for n, m in module._modules.items() if n not in found.layers]
        vars(module)["_tried"] = dense_class.forward, tuple(others)
        return None
    if type(module) is not dense_class:
        module.__class__ = dense_class
        del vars(module)["_tried"]
    return found


def _dense_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was fused."""
    return module._dense_class if isinstance(module, FusedMLP) else type(module)


def find_parts(
    module: nn.Module, layers: Mapping[str, nn.Module] | None = None
) -> MLPParts | str | None:
    """Return how a module computes an MLP; else, why it does not; None without such layers.

    Args:
        module: any module.
        layers: its children that are layers of the MLP, by name; by default, those that are
            block-sparse.
    """
    if layers is None:
        layers = {n: m for n, m in module.named_children() if type(m) is BlockSparseLinear}
    if isinstance(module, nn.Sequential) or "forward" in vars(module):
        return None
    dense_class = _dense_class(module)
    if issubclass(dense_class, FusedMLP):
        return None
    parts = _registered.get(dense_class)
    if parts is not None:
        return parts if layers.keys() >= {*parts.layers} else None
    reason = None
    for names in _candidates(layers):
        found = _try(module, dense_class, layers, names)
        if isinstance(found, MLPParts):
            return found
        n_hidden, n_in = dense_shape(layers[names[0]])
        if n_hidden != n_in:  # unlike attention
            reason = reason or found
    others = [child for name, child in module.named_children() if name not in layers]
    if not all(map(_has_no_parameters, others)):
        return None  # a larger module, such as a layer of a transformer
    if len(layers) == 2:
        for up, down in itertools.permutations(map(dense_shape, layers.values())):
            if up == (2 * down[1], down[0]):
                return "one layer computes its gate and its hidden features"
    return reason


def _candidates(layers: Mapping[str, nn.Module]) -> Iterator[tuple[str, ...]]:
    """Yield names of layers in the order of the op, where their shapes fit."""
    if len(layers) not in (2, 3):
        return
    for names in itertools.permutations(layers):
        *inner, down = (dense_shape(layers[name]) for name in names)
        hidden = {down[1], *(n_out for n_out, _ in inner)}
        if len(hidden) == len({n_in for _, n_in in inner}) == 1:
            yield names


def _try(
    module: nn.Module,
    dense_class: type[nn.Module],
    layers: Mapping[str, nn.Module],
    names: tuple[str, ...],
) -> MLPParts | str:
    """Return what a module computes with its layers in a certain order, or why that is no MLP."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    *inner, down = names
    n_out = _IN if dense_shape(layers[down])[0] == dense_shape(layers[inner[0]])[1] else _IN - 1
    sizes = {down: (_HIDDEN, n_out), **{name: (_IN, _HIDDEN) for name in inner}}
    stand_ins = {}
    for name, (n_in, n_out) in sizes.items():
        linear = nn.Linear(n_in, n_out, layers[name].bias is not None, device="meta")
        for own, parameter in linear.named_parameters():
            setattr(linear, own, nn.Parameter(draw(*parameter.shape)))
        stand_ins[name] = linear
    probe = dense_class.__new__(dense_class)
    vars(probe).update(vars(module))
    # The other children are copied, as long as they are small.
    others = {
        name: copy.deepcopy(child) if _has_no_parameters(child) else child
        for name, child in module._modules.items()
        if name not in layers
    }
    vars(probe)["_modules"] = {**module._modules, **others, **stand_ins}
    x = draw(2, 3, _IN)

    def run(training: bool) -> Tensor:
        vars(probe)["training"] = training
        for child in filter(_has_no_parameters, probe._modules.values()):
            child.train(training)
        found = dense_class.forward(probe, x)
        if not isinstance(found, Tensor):
            raise TypeError(f"it returns a {type(found).__name__}")
        return found

    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            expected = run(training=False)
            in_training = _are_close(run(training=True), expected)
        except Exception as error:  # the module's own code can raise anything
            return f"its `forward` cannot be tried out: {type(error).__name__}: {error}"
        hidden = [stand_ins[name](x) for name in inner]
        for activation in ACTIVATIONS:
            activated = activate(hidden[0], activation)
            product = activated if len(hidden) == 1 else activated * hidden[1]
            if _are_close(stand_ins[down](product), expected):
                gate = inner[0] if len(inner) == 2 else None
                return MLPParts(inner[-1], down, gate, activation, in_training)
    return f"it computes something other than an MLP with {', '.join(ACTIVATIONS)}"


def _has_no_parameters(module: nn.Module | None) -> TypeGuard[nn.Module]:
    return module is not None and next(module.parameters(), None) is None


def _are_close(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and torch.allclose(first, second, rtol=1e-8, atol=1e-8)
