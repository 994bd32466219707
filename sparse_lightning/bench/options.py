"""What the commands share: their devices, and the files they write."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def find_device(name: str) -> torch.device:
    """Return the device of a name, "cpu", "cuda" or "cuda:1".

    Raises:
        ValueError: if it is another, or not there.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cuda", "cpu"):
        raise ValueError(f"`--device` must be cuda or cpu; got '{name}'.")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("`--device` must be there; got 'cuda' without a CUDA GPU. Use cpu.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"`--device` must be one of the {torch.cuda.device_count()} that are there; "
            f"got '{device}'."
        )
    return device


def prepare(device: torch.device) -> None:
    """Make a device the current one, and dense fp32 products exact."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and streams are those of the current device
    # Some containers turn it on, and then neither the reference nor the dense product is fp32.
    torch.backends.cuda.matmul.allow_tf32 = False


def check_count(name: str, value: int | None) -> None:
    """Raise ValueError if an option is given and is less than 1."""
    if value is not None and value < 1:
        raise ValueError(f"`--{name}` must be at least 1; got {value}.")


def check_writable(path: Path) -> None:
    """Raise ValueError unless a file can be written there."""
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"'{path}' must be a file in a folder that can be written to.")


def write_text(path: Path, text: str) -> None:
    """Write a file at once: who reads it meanwhile finds the old one, or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)
