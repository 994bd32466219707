"""`sparse-lightning env`: show the versions and devices that a bug report needs."""

from __future__ import annotations

import argparse
import os
import platform
from collections import Counter
from collections.abc import Callable
from functools import partial

import torch

from sparse_lightning.bench.environment import commit, driver_version, installed_version
from sparse_lightning.kernels.compiler import cache_folder, nvrtc_version
from sparse_lightning.kernels.speedups import cpu_name, shipped_file


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options, of which there are none."""


def run(options: argparse.Namespace) -> None:
    """Print one line per package, device and folder."""
    found = describe_installation()
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def describe_installation() -> dict[str, str]:
    """Return versions, devices and folders by name; where one is missing or broken, the reason."""
    finders: dict[str, Callable[[], str]] = {
        "sparse-lightning": _own_version,
        "Python": platform.python_version,
        "torch": _torch_version,
        "lightning": partial(_package, "lightning"),
        "CuPy": _cupy,
        "NVRTC": nvrtc_version,
        "hydra-core": partial(_package, "hydra-core"),
        "transformers": partial(_package, "transformers"),
        "wandb": partial(_package, "wandb"),
        "OS": platform.platform,
        "CPU": lambda: f"{cpu_name()}, {os.cpu_count()} logical cores",
        "GPU": _gpus,
        "driver": lambda: driver_version() or "not found by nvidia-smi",
        "kernel cache": lambda: str(cache_folder()),
    }
    return {name: _found_or_reason(find) for name, find in finders.items()}


def _found_or_reason(find: Callable[[], str]) -> str:
    """Return the result of a function, or the reason why it fails."""
    try:
        return find()
    except Exception as error:  # A broken driver or package can raise anything.
        reason = error.__cause__ or error
        first_line = str(reason).partition("\n")[0]
        return f"not found ({type(reason).__name__}: {first_line})"


def _own_version() -> str:
    found = commit()
    return installed_version("sparse-lightning") + (f", commit {found}" if found else "")


def _torch_version() -> str:
    cuda = torch.version.cuda
    return f"{torch.__version__}, built {f'for CUDA {cuda}' if cuda else 'without CUDA'}"


def _package(name: str) -> str:
    return installed_version(name) or "not installed"


def _cupy() -> str:
    """Return all packages that provide CuPy, as several at once do not work."""
    names = ("cupy-cuda12x", "cupy-cuda13x", "cupy")
    found = [f"{name} {version}" for name in names if (version := installed_version(name))]
    return ", ".join(found) or "not installed"


def _gpus() -> str:
    """Return the GPUs that PyTorch can use; equal ones are counted."""
    torch.cuda.init()  # Without a GPU, its error gives the reason.
    found = Counter(map(_gpu, range(torch.cuda.device_count())))
    return "; ".join(f"{count} x {gpu}" for gpu, count in found.items())


def _gpu(device: int) -> str:
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    table = shipped_file(name, f"sm_{major}{minor}")
    return (
        f"{name}, compute capability {major}.{minor}, "
        f"{f'uses the shipped table {table.name}' if table else 'has no shipped table'}"
    )
