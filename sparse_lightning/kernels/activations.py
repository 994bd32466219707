"""The activations that kernels can fuse, in plain PyTorch for the kernels that do not fuse them."""

from __future__ import annotations

import torch
from torch import Tensor

ACTIVATIONS = ("relu", "gelu", "gelu_tanh", "silu")  # in the order of activations.cuh

_aten = torch.ops.aten


def activate(h: Tensor, activation: str) -> Tensor:
    """Return the activation of `h`.

    >>> activate(torch.tensor([-1.0, 2.0]), "relu")
    tensor([0., 2.])
    """
    if activation == "relu":
        return torch.relu(h)
    if activation == "silu":
        return torch.nn.functional.silu(h)
    return torch.nn.functional.gelu(h, approximate=_approximation(activation))


def activation_backward(gradient: Tensor, h: Tensor, activation: str) -> Tensor:
    """Return the gradient of `h`, given that of its activation.

    >>> activation_backward(torch.tensor([3.0, 3.0]), torch.tensor([-1.0, 2.0]), "relu")
    tensor([0., 3.])
    """
    if activation == "relu":
        out: Tensor = _aten.threshold_backward(gradient, h, 0)
    elif activation == "silu":
        out = _aten.silu_backward(gradient, h)
    else:
        out = _aten.gelu_backward(gradient, h, approximate=_approximation(activation))
    return out


def activation_backward_differentiable(gradient: Tensor, h: Tensor, activation: str) -> Tensor:
    """Return `activation_backward`, differentiable to every order."""
    if activation != "silu":
        return activation_backward(gradient, h, activation)
    gate = h.sigmoid()  # silu_backward has no derivative in PyTorch
    return gradient * gate * (1 + h * (1 - gate))


def check(activation: str) -> None:
    """Raise ValueError unless the activation is supported."""
    if activation not in ACTIVATIONS:
        supported = ", ".join(repr(name) for name in ACTIVATIONS)
        raise ValueError(f"`activation` must be one of {supported}; got {activation!r}.")


def _approximation(activation: str) -> str:
    return "tanh" if activation == "gelu_tanh" else "none"
