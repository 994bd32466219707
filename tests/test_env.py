"""`sparse-lightning env`: what it finds, and that nothing missing or broken makes it fail."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import sparse_lightning
from sparse_lightning.bench import environment
from sparse_lightning.cli import main
from sparse_lightning.kernels import compiler

PACKAGES = ("lightning", "CuPy", "hydra-core", "transformers", "wandb")


@pytest.fixture(autouse=True)
def _nvrtc_is_found_anew() -> Iterator[None]:
    compiler._nvrtc.cache_clear()
    yield
    compiler._nvrtc.cache_clear()


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str]):
    """Runs the command, and returns what it shows by name."""

    def run() -> dict[str, str]:
        assert main(["env"]) == 0
        lines = capsys.readouterr().out.splitlines()
        return dict(re.split("  +", line, maxsplit=1) for line in lines)

    return run


def fail(*_: Any, **__: Any) -> Any:
    raise OSError("it is broken\nand says more")


def test_versions_and_folder(shown, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path))
    found = shown()
    assert found["sparse-lightning"].startswith(sparse_lightning.__version__)
    assert found["Python"] == platform.python_version()
    assert found["torch"].startswith(torch.__version__)
    assert found["lightning"] == importlib.metadata.version("lightning")
    assert found["hydra-core"] == importlib.metadata.version("hydra-core")
    assert found["kernel cache"] == str(tmp_path)


def test_packages_that_are_not_installed(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "sparse-lightning":
            return "1.2.3"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    monkeypatch.setenv("PATH", "")  # neither git nor nvidia-smi
    found = shown()
    assert found["sparse-lightning"] == "1.2.3"
    assert {found[name] for name in PACKAGES} == {"not installed"}
    assert found["NVRTC"].startswith("not found") and "cupy_backends" in found["NVRTC"]
    assert found["driver"].startswith("not found")


@pytest.mark.parametrize("program", ["echo the driver is broken; exit 9", "while :; do :; done"])
def test_a_broken_driver(
    shown, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, program: str
) -> None:
    file = tmp_path / "nvidia-smi"
    file.write_text(f"#!/bin/sh\n{program}\n")
    file.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(environment, "_MOST_SECONDS", 0.2)
    assert shown()["driver"].startswith("not found")


def test_what_is_broken_is_shown_with_its_error(shown, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", fail)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.setattr(platform, "platform", fail)
    monkeypatch.setattr("sparse_lightning.env.cpu_name", fail)
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    monkeypatch.setattr(nvrtc, "getVersion", fail)
    found = shown()
    broken = ("sparse-lightning", *PACKAGES, "NVRTC", "OS", "CPU", "GPU")
    assert {found[name] for name in broken} == {"not found (OSError: it is broken)"}


@pytest.mark.parametrize(
    ("name", "capability", "table"),
    [
        ("NVIDIA H200", (9, 0), "sm_90-NVIDIA-H200.json"),
        ("NVIDIA GeForce RTX 2080 Ti", (7, 5), "no shipped table"),
    ],
)
def test_gpus_and_their_tables(
    shown, monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], table: str
) -> None:
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    gpus = shown()["GPU"]
    assert gpus.startswith(f"2 x {name}, ") and table in gpus


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_gpu_of_this_machine(shown) -> None:
    found = shown()
    assert torch.cuda.get_device_name() in found["GPU"]
    assert found["driver"][0].isdigit()
