"""The environment of a measurement: device, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

from sparse_lightning.kernels.speedups import cpu_name

_MOST_SECONDS = 30  # With a broken driver, nvidia-smi can hang.


def prepare_device(device: torch.device) -> None:
    """Make a device current, and disable TF32 so that dense fp32 products are exact."""
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)  # events and streams belong to the current device
    # Some containers enable TF32, which makes the reference and the dense product inexact.
    torch.backends.cuda.matmul.allow_tf32 = False


def describe_environment(device: torch.device) -> dict[str, str]:
    """Return the names and versions that a timing on the device depends on, as far as known."""
    found = {"device": _device_name(device)}
    if device.type == "cuda":
        found["driver"] = driver_version()
        found["CUDA"] = torch.version.cuda or ""
    else:
        found["threads"] = str(torch.get_num_threads())
    found["torch"] = torch.__version__
    for name in ("cupy-cuda12x", "cupy-cuda13x", "triton", "stanford-stk", "blksprs"):
        found[name] = installed_version(name)
    found["sparse-lightning"] = installed_version("sparse-lightning")
    found["commit"] = commit()
    return {name: value for name, value in found.items() if value}


def environment_line(environment: dict[str, str]) -> str:
    """Return the result of `describe_environment` as one line.

    >>> environment_line({"device": "NVIDIA H100", "torch": "2.11.0"})
    'NVIDIA H100, torch 2.11.0'
    """
    return ", ".join(f"{k} {v}" if k != "device" else v for k, v in environment.items())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return cpu_name()


def driver_version() -> str:
    """Return the version of the NVIDIA driver; empty if `nvidia-smi` does not give it."""
    return _first_output_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def commit() -> str:
    """Return the commit of this package's repository; empty if it is installed without one."""
    git = ("git", "-C", str(Path(__file__).parent))
    # An installed package can be inside another project's repository, with an unrelated commit.
    if not _first_output_line(*git, "ls-files", Path(__file__).name):
        return ""
    return _first_output_line(*git, "describe", "--always", "--dirty")


def installed_version(package: str) -> str:
    """Return the version of a package, which is not imported; empty if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_output_line(*command: str) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=_MOST_SECONDS
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    lines = done.stdout.split("\n")
    return lines[0].strip()
