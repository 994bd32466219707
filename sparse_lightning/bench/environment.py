"""The environment of a measurement: device, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import subprocess
from pathlib import Path

import torch

from sparse_lightning.kernels.speedups import cpu_name


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
        found["driver"] = _first_output_line(
            "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
        )
        found["CUDA"] = torch.version.cuda or ""
    else:
        found["threads"] = str(torch.get_num_threads())
    found["torch"] = torch.__version__
    for name in ("cupy-cuda12x", "cupy-cuda13x", "triton", "stanford-stk", "blksprs"):
        found[name] = _version(name)
    found["sparse-lightning"] = _version("sparse-lightning")
    git = ("git", "-C", str(Path(__file__).parent))
    # An installed package can be inside another project's repository, with an unrelated commit.
    if _first_output_line(*git, "ls-files", Path(__file__).name):
        found["commit"] = _first_output_line(*git, "describe", "--always", "--dirty")
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


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _first_output_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    lines = done.stdout.split("\n")
    return lines[0].strip()
