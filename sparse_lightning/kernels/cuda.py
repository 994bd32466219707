"""The CUDA backend's place on the dispatcher: until its kernels are there, a clear refusal."""

from __future__ import annotations

import importlib.util
from typing import Any, NoReturn

import torch
from torch import Tensor

# Tests that need kernels, and not only a GPU, are skipped while this is False.
HAS_KERNELS = False


def refuse(device: torch.device) -> NoReturn:
    """Raise the RuntimeError that says what is missing on a CUDA device, and what to do."""
    major = (torch.version.cuda or "13").split(".")[0]
    if importlib.util.find_spec("cupy") is None:
        remedy = f"Install CuPy with: pip install 'sparse-lightning[cuda{major}]'"
        missing = "CuPy, which it does not find"
    else:
        remedy = "Move the model to the CPU, or use Trainer(accelerator='cpu')"
        missing = "CUDA kernels, which this version does not have yet"
    raise RuntimeError(
        f"A block-sparse layer on a CUDA device needs {missing}; got a tensor on {device}. "
        f"{remedy}."
    )


def block_linear(x: Tensor, *_: Any) -> Tensor:
    """Refuse; see `refuse`."""
    refuse(x.device)


def block_linear_dx(dy: Tensor, *_: Any) -> Tensor:
    """Refuse; see `refuse`."""
    refuse(dy.device)


def block_linear_dw(dy: Tensor, *_: Any) -> Tensor:
    """Refuse; see `refuse`."""
    refuse(dy.device)


def block_norms_(dy: Tensor, *_: Any) -> None:
    """Refuse; see `refuse`."""
    refuse(dy.device)
