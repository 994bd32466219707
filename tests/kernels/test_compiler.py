"""Every kernel compiles for every architecture, and the cache survives disk failures."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from sparse_lightning.kernels import block_work, compiler, densified, launch, nm_blocks
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.portable import programs as portable_programs
from sparse_lightning.kernels.portable.programs import norms_program
from sparse_lightning.kernels.programs import DTYPES, Program
from tests.processes import Script

# These tests need the compiler, which `make setup` installs, but not on macOS.
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


def test_an_old_device_is_rejected() -> None:
    with pytest.raises(RuntimeError, match=r"8\.0 or newer; got 7\.5.*accelerator='cpu'"):
        compiler.architecture(7, 5)


def test_a_user_without_a_home_has_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in (compiler.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    folder = compiler.cache_folder()
    assert folder.parent == Path(tempfile.gettempdir()) and folder.name.endswith(f"-{os.getuid()}")


def programs_for(capability: tuple[int, int]) -> list[Program]:
    """Every program of an architecture, but one fp16 program per source, since fp16 differs from
    bf16 only in conversions. Programs without tensor cores are compiled for the oldest that can
    run them alone."""
    if capability == hopper_programs.CAPABILITY:
        programs: list[Program] = [*hopper_programs.all_programs()]
    else:
        programs = [
            *portable_programs.all_programs(clusters=capability >= (9, 0)),
            densified.PROGRAM,
        ]
        programs += map(block_work.program, DTYPES)
        programs += map(nm_blocks.program, (2, 4, 8))
    if capability > hopper_programs.CAPABILITY:
        programs = [
            p
            for p in programs
            if not {"-DCONFIG_T=float", "-DCONFIG_T=double"} & {*p.options}
            or "-DCONFIG_SPLITS=2" in p.options
        ]
    # Splits of the tokens beyond two differ in a constant.
    many = {"-DCONFIG_SPLIT_K=4", "-DCONFIG_SPLIT_K=8"}
    programs = [program for program in programs if not many.intersection(program.options)]
    is_fp16 = {program: "-DCONFIG_T=fp16" in program.options for program in programs}
    one_per_source = {program.source: program for program in programs if is_fp16[program]}
    return [p for p in programs if not is_fp16[p]] + [*one_per_source.values()]


@functools.cache
def compiled(program: Program, arch: str) -> compiler.Cubin:
    return compiler.compile_source(program.source, program.options, arch)


def facts_of(program: Program, entry: str) -> compiler.LaunchFacts:
    """They do not depend on the architecture, so one is taken that is compiled anyway."""
    arch = "sm_90a" if program.source.startswith("hopper/") else "sm_80"
    return compiler.launch_facts(compiled(program, arch).code, entry)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_every_kernel_compiles_without_spilling(capability: tuple[int, int]) -> None:
    arch, spilled = ARCHITECTURES[capability], {}
    for program in programs_for(capability):
        cubin = compiled(program, arch)
        assert cubin.code.startswith(b"\x7fELF") and cubin.log.count("Used ") >= 1
        # ptxas warns when it serializes WGMMA.
        assert "serialized" not in cubin.log
        is_hopper = program.source.startswith("hopper/")
        for entry in re.findall(r"Compiling entry function '(\w+)'", cubin.log):
            facts = compiler.launch_facts(cubin.code, entry)
            assert facts.threads % (128 if is_hopper else 32) == 0 < facts.threads <= 1024
            assert facts.shared_bytes <= (227 if is_hopper else 99) * 1024
        if cubin.spilled_bytes:
            spilled[program.source, program.options] = cubin.spilled_bytes
    assert not spilled


def test_shared_memory_by_hand() -> None:
    programs = portable_programs
    # Two stages of (128 x 64 + 64 x 64) bf16: 49,152 bytes; the result, 128 x 64 fp32: 32,768.
    linear = programs.linear_program(torch.bfloat16, 64, forward=True)
    assert facts_of(linear, "block_linear").shared_bytes == 49_152
    # Two stages of 16 x (64 + 128) fp64: 49,152; the result, 64 x 128 fp64: 65,536.
    dw = programs.dw_program(torch.float64, 128)
    assert facts_of(dw, "block_linear_dw").shared_bytes == 65_536
    # The result of norms is 128 x 128 fp32 for every dtype.
    assert facts_of(norms_program(torch.float64), "block_norms").shared_bytes == 65_536


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_shared_memory_of_tilings(dtype: torch.dtype) -> None:
    for block_size, tokens in itertools.product((16, 128), (8, 16, 32, 64, 128, 256)):
        program = portable_programs.linear_program(dtype, block_size, forward=True, tokens=tokens)
        computed = portable_programs.linear_shared_bytes(dtype, program.tiling)
        assert computed == facts_of(program, "block_linear").shared_bytes


@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
def test_forward_on_hopper_uses_the_available_shared_memory(block_size: int) -> None:
    program = hopper_programs.linear_program(torch.bfloat16, block_size, forward=True)
    shared_bytes, limit = facts_of(program, "block_linear").shared_bytes, 227 * 1024
    if block_size >= hopper_programs.STRIP:
        unit = 128 * block_size
        assert limit - unit < shared_bytes <= limit
    else:
        t = program.tiling
        k_tile = 2 * t.tk * (t.tm + t.tn)  # if all blocks are present
        assert 4 * k_tile <= shared_bytes <= limit


BFLOAT16 = torch.bfloat16


@pytest.mark.parametrize(
    "module, builder, arguments",
    [
        (portable, "_linear_kernel", (BFLOAT16, 64, True, 1, 8, 1, False)),
        (portable, "_linear_kernel", (BFLOAT16, 64, True, 0, 1000, 1, False)),
        (portable, "_dw_kernels", (BFLOAT16, 64, 16)),
        (portable, "_dw_kernels", (BFLOAT16, 64, 1000)),
        (portable, "norms_kernel", (BFLOAT16,)),
        (hopper, "_linear_kernel", (BFLOAT16, 16, True, 2, (128, 128))),
        (hopper, "_linear_kernel", (BFLOAT16, 64, True, 0, (128, 256))),
        (hopper, "_narrow_dw_kernel", (BFLOAT16, 32, 1)),
        (hopper, "_wide_dw_kernel", (BFLOAT16, 128, 1, 1)),
        (hopper, "norms_kernel", (BFLOAT16,)),
        (densified, "_kernel", ("pack_blocks",)),
        (densified, "_kernel", ("unpack_blocks",)),
        (block_work, "_kernel", (BFLOAT16,)),
        (nm_blocks, "_kernel", ("expand", 2)),
        (nm_blocks, "_kernel", ("compress", 2)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_every_layout_is_that_of_its_argument(
    module: ModuleType, builder: str, arguments: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`Kernel` checks this when it is built on a device."""
    checked = []

    def check(program: Program, entry: str, layout: str, device: int) -> None:
        launch.check_layout(entry, layout, facts_of(program, entry))
        checked.append(entry)

    monkeypatch.setattr(module, "Kernel", check)
    getattr(module, builder).__wrapped__(*arguments, 0)
    assert checked


@pytest.mark.parametrize(
    "layout", ["PPPqii", "PPPPqi", "PPPPiii", "PPPiPqi", "PPPP4xqii", "PPPPqiP"]
)
def test_a_wrong_layout_is_named(layout: str) -> None:
    facts = compiler.LaunchFacts(256, 0, 48, 8, (0, 8, 16, 24, 32, 40, 44))
    launch.check_layout("some_kernel", "PPPPqii", facts)
    with pytest.raises(RuntimeError, match=rf"kernel 'some_kernel'.*48 bytes.*'{layout}'"):
        launch.check_layout("some_kernel", layout, facts)


def test_trailing_padding_belongs_to_an_argument() -> None:
    launch.check_layout("k", "128sP", compiler.LaunchFacts(256, 0, 192, 64, (0, 128)))


def test_a_kernel_without_launch_facts_is_named(sources: Path) -> None:
    (sources / "bare.cu").write_text('extern "C" __global__ void bare() {}\n')
    code = compiler.compile_source("bare.cu", (), "sm_80").code
    with pytest.raises(ValueError, match="launch facts of kernel 'bare'"):
        compiler.launch_facts(code, "bare")


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that replaces the package's sources."""
    folder = tmp_path / "sources"
    folder.mkdir()
    monkeypatch.setattr(compiler, "FOLDER", folder)
    return folder


def test_a_spill_is_detected(sources: Path) -> None:
    """`test_every_kernel_compiles_without_spilling` relies on this."""
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
    """Record the sources to compile, without compiling them."""
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


def test_a_cubins_name_depends_on_all_inputs(
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
def test_a_damaged_cubin_is_compiled_again(
    damage: str, cache: Path, compilations: list[str]
) -> None:
    path = get()
    whole = path.read_bytes()
    spoiled = {"empty": b"", "cut": whole[:-7], "flipped": b"?" + whole[1:]}[damage]
    path.write_bytes(spoiled)
    assert get() == path and path.read_bytes() == whole
    assert len(compilations) == 2


def test_a_cache_that_cannot_be_created(cache: Path, compilations: list[str]) -> None:
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
    assert not list(cache.iterdir()), "unfinished files must not remain"


def test_without_a_home(monkeypatch: pytest.MonkeyPatch, compilations: list[str]) -> None:
    for name in (compiler.CACHE_VARIABLE, "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    assert get().exists()


@pytest.mark.slow
def test_two_processes_at_once(cache: Path, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(
        "from sparse_lightning.kernels.compiler import cubin_file\n"
        f"print(cubin_file({PROGRAM.source!r}, {PROGRAM.options!r}, 'sm_90a'))\n"
    )
    started = [Script(program) for _ in range(2)]
    done = [script.wait(timeout=120) for script in started]
    assert [process.returncode for process in done] == [0, 0], done
    (path,) = cache.iterdir()
    assert [process.stdout.strip() for process in done] == [str(path)] * 2
    content = path.read_bytes()
    assert content.startswith(b"\x7fELF") and compiler._is_whole(path)


# -- missing packages --------------------------------------------------------------------------


def test_without_cupy_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy_backends.cuda.libs", None)
    with pytest.raises(
        RuntimeError, match=r"need CuPy.*pip install 'sparse-lightning\[cuda1\d\]'.*'cpu'"
    ):
        compiler._nvrtc.__wrapped__()


def test_without_cupy_a_kernel_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without CuPy sees this error first, not an import error from deeper inside."""
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
