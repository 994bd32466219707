"""Every kernel compiles for every architecture, and the cache survives what a disk can do."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sparse_lightning.kernels import (
    block_work,
    compiler,
    densified,
)
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.portable import programs as portable_programs
from sparse_lightning.kernels.portable.programs import norms_program
from sparse_lightning.kernels.programs import DTYPES

# Without the compiler these tests would show nothing; `make setup` brings it, but not on macOS.
pytest.importorskip("cupy_backends.cuda.libs.nvrtc")

ARCHITECTURES = {
    (8, 0): "sm_80",
    (8, 6): "sm_86",
    (8, 9): "sm_89",
    (9, 0): "sm_90a",
    (10, 0): "sm_100",
    (12, 0): "sm_120",
}
PROGRAM = norms_program(torch.float32)


def test_the_names_of_architectures() -> None:
    assert {c: compiler.architecture(*c) for c in ARCHITECTURES} == ARCHITECTURES


def test_an_old_device_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"8\.0 or newer; got 7\.5.*accelerator='cpu'"):
        compiler.architecture(7, 5)


@pytest.mark.slow
@pytest.mark.parametrize("capability", ARCHITECTURES)
def test_every_kernel_compiles_without_spilling(capability: tuple[int, int]) -> None:
    arch, spilled = ARCHITECTURES[capability], {}
    programs = [*portable_programs.all_programs(), densified.PROGRAM]
    programs += map(block_work.program, DTYPES)
    if capability == hopper_programs.CAPABILITY:
        programs += hopper_programs.all_programs()
    for program in programs:
        cubin = compiler.compile_source(program.source, program.options, arch)
        assert cubin.code.startswith(b"\x7fELF") and cubin.log.count("Used ") >= 1
        # What ptxas says when it makes warpgroup products wait for each other.
        assert "serialized" not in cubin.log
        if cubin.spilled_bytes:
            spilled[program.source, program.options] = cubin.spilled_bytes
    assert not spilled


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder of sources to write into."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setattr(compiler, "FOLDER", folder)
    return folder


def test_a_spill_is_seen(sources: Path) -> None:
    """What the test above relies on."""
    (sources / "spill.cu").write_text(
        'extern "C" __global__ void k(float* p, int n) {\n'
        "  float a[64];\n"
        "  for (int i = 0; i < 64; ++i) a[i] = p[i * n];\n"
        "  for (int i = 0; i < n; ++i) a[i % 64] += a[i * 7 % 64];\n"
        "  p[n] = a[n % 64];\n}\n"
    )
    assert compiler.compile_source("spill.cu", (), "sm_80").spilled_bytes >= 256


def test_an_error_shows_file_and_line(sources: Path) -> None:
    (sources / "part.cuh").write_text("\n__device__ int f() { return missing; }\n")
    (sources / "wrong.cu").write_text('#include "part.cuh"\n')
    with pytest.raises(RuntimeError) as error:
        compiler.compile_source("wrong.cu", ("-DX=1",), "sm_90a")
    message = str(error.value)
    assert "'wrong.cu' did not compile for sm_90a" in message
    assert f'{sources / "part.cuh"}(2): error: identifier "missing" is undefined' in message
    assert "-DX=1" in message and "NVRTC " in message


# -- the cache ----------------------------------------------------------------------------------


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv(compiler.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _own_private_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(compiler, "_private_folder", lambda: Path(folder))
        yield


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every source that is compiled, instead of compiling it."""
    seen: list[str] = []

    def compile_source(source: str, options: tuple[str, ...], arch: str) -> compiler.Cubin:
        seen.append(source)
        return compiler.Cubin(f"{source} {options} {arch}".encode(), "")

    monkeypatch.setattr(compiler, "compile_source", compile_source)
    return seen


def get(options: tuple[str, ...] = (), arch: str = "sm_80") -> Path:
    return compiler.cubin_file(PROGRAM.source, options, arch)


def test_a_cubin_is_compiled_once(cache: Path, compilations: list[str]) -> None:
    first, again = get(), get()
    assert first == again and first.parent == cache
    assert len(compilations) == 1
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_all_that_goes_into_a_cubin_is_in_its_name(
    cache: Path, sources: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, header = sources / PROGRAM.source, sources / "common.cuh"
    source.parent.mkdir()
    source.write_text("1"), header.write_text("2")
    names = {get(), get(("-DX=1",)), get(arch="sm_90a")}
    header.write_text("3")
    names.add(get())
    source.write_text("4")
    names.add(get())
    monkeypatch.setattr(
        compiler, "_nvrtc", lambda: type("", (), {"getVersion": staticmethod(lambda: (99, 0))})
    )
    names.add(get())
    assert len(names) == len(compilations) == 6


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped"])
def test_a_damaged_cubin_is_compiled_anew(
    damage: str, cache: Path, compilations: list[str]
) -> None:
    path = get()
    whole = path.read_bytes()
    spoiled = {"empty": b"", "cut": whole[:-7], "flipped": b"?" + whole[1:]}[damage]
    path.write_bytes(spoiled)
    assert get() == path and path.read_bytes() == whole
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_made(cache: Path, compilations: list[str]) -> None:
    cache.write_text("a file, where the folder should be")
    path = get()
    assert path.exists() and path.parent != cache
    assert get() == path and len(compilations) == 1


def test_a_full_disk(cache: Path, compilations: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    replace = os.replace

    def full(source: str, target: Path) -> None:
        if target.parent == cache:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    path = get()
    assert path.exists() and path.parent != cache
    assert not list(cache.iterdir()), "what could not be finished must not stay"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    for name in (compiler.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert get().exists()


@pytest.mark.slow
def test_two_processes_at_once(cache: Path) -> None:
    program = (
        "from sparse_lightning.kernels.compiler import cubin_file\n"
        f"print(cubin_file({PROGRAM.source!r}, {PROGRAM.options!r}, 'sm_90a'))\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=120)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    (path,) = cache.iterdir()
    assert printed == [str(path)] * 2
    content = path.read_bytes()
    assert content.startswith(b"\x7fELF") and compiler._is_whole(path)


# -- what may be missing ------------------------------------------------------------------------


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(
        RuntimeError, match=r"need CuPy.*pip install 'sparse-lightning\[cuda1\d\]'.*'cpu'"
    ):
        compiler._nvrtc.__wrapped__()


def test_without_cupy_a_kernel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing a user without CuPy meets, and not an import error from further inside."""
    for module in ("cupy", "cupy_backends.cuda.api", "cupy_backends.cuda.libs"):
        monkeypatch.setitem(sys.modules, module, None)
    compiler._nvrtc.cache_clear()
    with pytest.raises(RuntimeError, match=r"need CuPy.*pip install 'sparse-lightning"):
        portable.norms_kernel(torch.bfloat16, 0)


def test_without_nvrtc_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise RuntimeError("CuPy failed to load libnvrtc.so")

    from cupy_backends.cuda.libs import nvrtc

    monkeypatch.setattr(nvrtc, "getVersion", missing)
    with pytest.raises(RuntimeError, match=r"need NVRTC.*libnvrtc.*pip install"):
        compiler._nvrtc.__wrapped__()
