"""Arguments of the commands: devices, counts, model inputs, and functions that build models."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

DTYPES = {
    name: getattr(torch, name)
    for name in ("float32", "float64", "float16", "int64", "int32", "int8", "uint8", "bool")
}


def find_device(name: str) -> torch.device:
    """Return the device called "cpu", "cuda" or, for instance, "cuda:1".

    Raises:
        ValueError: for any other name, or a device that is not available.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"`--device` must be cuda or cpu; got '{name}'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"`--device` must be available; got '{name}' without a CUDA GPU. Use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`--device` must be one of the {torch.cuda.device_count()} available GPUs; "
            f"got '{device}'."
        )
    return device


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError if the option `--name` has a value below 1."""
    if value is not None and value < 1:
        raise ValueError(f"`--{name}` must be at least 1; got {value}.")


def find_builder(argument: str, target: str) -> Callable[[], nn.Module]:
    """Return a function that calls `target` without arguments and checks its result.

    Args:
        argument: name of the argument in error messages, such as `--model`.
        target: a module and a function in it, as "project.model:build". Modules in the current
            folder are found.

    Raises:
        ValueError: if the function does not exist. The returned function raises it if `target`
            fails or does not return an `nn.Module`.
    """
    module, _, name = target.replace(":", ".").rpartition(".")
    if not module:
        raise ValueError(
            f"`{argument}` must be a module and a function in it, as my_project.model:build; "
            f"got '{target}'."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())

    def failure(error: Exception) -> ValueError:
        return ValueError(
            f"`{argument}` must be a function that builds the dense model without arguments; "
            f"got '{target}', which raised {type(error).__name__}: {error}"
        )

    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # user code can raise anything
        raise failure(error) from error

    def build() -> nn.Module:
        try:
            model = function()
        except Exception as error:
            raise failure(error) from error
        if not isinstance(model, nn.Module):
            raise ValueError(
                f"`{argument}` must build an nn.Module; got a {type(model).__name__} "
                f"from '{target}'."
            )
        return model

    return build


@dataclass(frozen=True)
class Input:
    """The shape and dtype of one input of a model.

    Attributes:
        shape: the sizes; a size that may vary has a name.
        dtype: one of `DTYPES`.
    """

    shape: tuple[int | str, ...]
    dtype: torch.dtype = torch.float32

    @classmethod
    def parse(cls, text: str) -> Input:
        """Parse sizes, names of sizes and an optional dtype, separated by commas.

        Raises:
            ValueError: for any other text.

        >>> Input.parse("batch,16,int64")
        Input(shape=('batch', 16), dtype=torch.int64)
        """
        *sizes, last = text.replace(" ", "").split(",")
        dtype = DTYPES.get(last)
        if dtype is None:
            sizes.append(last)
        # Names contain no digits, so a mistyped dtype, like int46, is not mistaken for one.
        if not all(re.fullmatch("[1-9][0-9]*|[A-Za-z_]+", size) for size in sizes):
            raise ValueError(
                "`--input` must be sizes, or names of sizes that may vary (letters only), "
                f"optionally followed by one of {', '.join(DTYPES)}, separated by commas; "
                f"got '{text}'. Write batch,128 or batch,16,int64."
            )
        shape = tuple(int(size) if size.isdigit() else size for size in sizes)
        return cls(shape, dtype or torch.float32)

    def __str__(self) -> str:
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        return ",".join(map(str, [*self.shape, name]))


def random_inputs(inputs: Sequence[Input], smallest: int) -> tuple[Tensor, ...]:
    """Return random tensors; named sizes become `smallest`, `smallest + 1`, and so on."""
    names = dict.fromkeys(size for spec in inputs for size in spec.shape if isinstance(size, str))
    sizes = {name: smallest + i for i, name in enumerate(names)}
    generator = torch.Generator().manual_seed(smallest)
    tensors = []
    for spec in inputs:
        shape = [sizes[size] if isinstance(size, str) else size for size in spec.shape]
        values = torch.randn(shape, generator=generator)
        # Integers are 0 or 1, which are valid indices of any embedding table.
        is_float = spec.dtype.is_floating_point
        tensors.append((values if is_float else values > 0).to(spec.dtype))
    return tuple(tensors)
