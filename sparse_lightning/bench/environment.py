"""What a measurement was made on: device, driver, versions, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from pathlib import Path

import torch


def describe(device: torch.device) -> dict[str, str]:
    """Return the names and versions of all that a timing depends on; what is not there is left out.

    Args:
        device: that was measured.
    """
    found = {"device": _device_name(device)}
    if device.type == "cuda":
        found["driver"] = _printed_by(
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
    # Installed below somebody else's repository, the package has no commit.
    if _printed_by(*git, "ls-files", Path(__file__).name):
        found["commit"] = _printed_by(*git, "describe", "--always", "--dirty")
    return {name: value for name, value in found.items() if value}


def as_line(environment: dict[str, str]) -> str:
    """Return what `describe` found as one line, the device first.

    >>> as_line({"device": "NVIDIA H100", "torch": "2.11.0"})
    'NVIDIA H100, torch 2.11.0'
    """
    return ", ".join(f"{k} {v}" if k != "device" else v for k, v in environment.items())


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _printed_by(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    lines = done.stdout.split("\n")
    return lines[0].strip()
