"""Compiles `.cu` files with NVRTC, and caches the cubins on disk.

NVRTC is called directly, since CuPy would append its own `-arch`; sources thus compile without a
GPU, and for any architecture. CuPy is imported when a kernel is first needed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sparse_lightning.files import atomic_write

FOLDER = Path(__file__).parent
CACHE_VARIABLE = "SPARSE_LIGHTNING_CACHE_DIR"
OLDEST = (8, 0)  # cp.async, and mma.sync of bf16

_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Cubin:
    """A compiled source: the machine code, and the log of `ptxas`."""

    code: bytes
    log: str

    @property
    def spilled_bytes(self) -> int:
        """Bytes that all kernels keep in local memory: spilled registers and local arrays."""
        found = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", self.log)
        return sum(map(int, found))


def architecture(major: int, minor: int) -> str:
    """Return NVRTC's name of the architecture for a compute capability.

    Raises:
        RuntimeError: if the device is too old for the kernels' instructions.

    >>> architecture(8, 6), architecture(9, 0)
    ('sm_86', 'sm_90a')
    """
    if (major, minor) < OLDEST:
        raise RuntimeError(
            "The CUDA device must have compute capability 8.0 or newer; got "
            f"{major}.{minor}. Use Trainer(accelerator='cpu')."
        )
    return f"sm_{major}{minor}" + ("a" if (major, minor) == (9, 0) else "")


def compile_source(source: str, options: tuple[str, ...], arch: str) -> Cubin:
    """Compile one `.cu` file of this folder.

    Args:
        source: path of the file, relative to this folder.
        options: options for NVRTC, such as "-DNAME=value".
        arch: name of the architecture; see `architecture`.

    Raises:
        RuntimeError: if the file does not compile; the message contains NVRTC's log.
    """
    nvrtc = _nvrtc()
    path = FOLDER / source
    program = nvrtc.createProgram(path.read_text(), str(path), [], [])
    flags = [f"-arch={arch}", "-std=c++17", f"-I{FOLDER}", "--ptxas-options=-v", *options]
    if nvrtc.getVersion() >= (12, 9):
        flags.append("--no-cache")  # NVRTC's own cache returns no log
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"'{source}' did not compile for {arch}: {error}\n"
                f"{nvrtc.getProgramLog(program)}\n"
                f"options: {' '.join(flags)}\nNVRTC {nvrtc_version()}"
            ) from None
        # CuPy's `getCUBIN` drops the trailing NUL, without which the driver rejects the file.
        return Cubin(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def nvrtc_version() -> str:
    """Return the version of NVRTC.

    Raises:
        RuntimeError: if CuPy or NVRTC is missing.
    """
    return ".".join(map(str, _nvrtc().getVersion()))


@dataclass(frozen=True)
class LaunchFacts:
    """What a kernel publishes by `LAUNCH_FACTS` of common.cuh.

    Attributes:
        threads: threads per thread block.
        shared_bytes: bytes of dynamic shared memory per thread block.
        argument_bytes, argument_alignment: size and alignment of the kernel's argument, a struct.
        offsets: offsets of the struct's members.
    """

    threads: int
    shared_bytes: int
    argument_bytes: int
    argument_alignment: int
    offsets: tuple[int, ...]


def launch_facts(cubin: bytes, entry: str) -> LaunchFacts:
    """Read the launch facts of a kernel from the ELF symbol table of a cubin."""
    symbol = f"{entry}_launch\0".encode()
    (table,) = struct.unpack_from("<Q", cubin, 40)
    (n_sections,) = struct.unpack_from("<H", cubin, 60)
    # Section header: name, type, flags, address, offset, size, link, info, alignment, entry size.
    sections = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(n_sections)]
    for _, kind, _, _, offset, size, link, *_ in sections:
        if kind == 2:  # SHT_SYMTAB, whose link is the string table
            symbols = struct.iter_unpack("<IBBHQQ", cubin[offset : offset + size])
            for name, _, _, section, value, length in symbols:
                if cubin.startswith(symbol, sections[link][4] + name):
                    start = sections[section][4] + value
                    threads, shared_bytes, size, alignment, *members = struct.unpack_from(
                        f"<{length // 4}i", cubin, start
                    )
                    offsets, end = [], 0
                    for member_size, member_alignment in zip(
                        members[::2], members[1::2], strict=True
                    ):
                        offsets.append(-(-end // member_alignment) * member_alignment)
                        end = offsets[-1] + member_size
                    return LaunchFacts(threads, shared_bytes, size, alignment, tuple(offsets))
    raise ValueError(f"The cubin must have launch facts of kernel '{entry}'; it has none.")


def cubin_file(source: str, options: tuple[str, ...], arch: str) -> Path:
    """Return the file of a compiled source, compiling it unless the cache has it.

    A file's name contains a hash of all inputs of the compilation, and the file ends in a hash of
    its content, so a damaged file is compiled again. Writes are atomic, so processes that compile
    the same source concurrently do not interfere. If the cache is not writable, a temporary folder
    of this process replaces it.
    """
    stem = source.removesuffix(".cu").replace("/", "-")
    name = f"{stem}-{arch}-{_fingerprint(source, options, arch)}.cubin"
    for folder in (cache_folder, _private_folder):
        path = folder() / name
        if _is_whole(path):
            return path
    code = compile_source(source, options, arch).code
    content = code + hashlib.sha256(code).digest()
    try:
        return _write(cache_folder() / name, content)
    except OSError:
        return _write(_private_folder() / name, content)


def device_cubin(source: str, options: tuple[str, ...], device: int) -> Path:
    """Return the file of a source compiled for a CUDA device, given its index.

    Raises:
        RuntimeError: if the device is too old, or CuPy or NVRTC is missing.
    """
    _nvrtc()  # first, since its error names the missing package
    arch = architecture(*torch.cuda.get_device_capability(device))
    return cubin_file(source, options, arch)


def _fingerprint(source: str, options: tuple[str, ...], arch: str) -> str:
    digest = hashlib.sha256()
    for path in (FOLDER / source, *sorted(FOLDER.rglob("*.cuh"))):
        digest.update(path.read_bytes() + b"\0")
    digest.update("\0".join((arch, str(_nvrtc().getVersion()), *options)).encode())
    return digest.hexdigest()[:32]


def _is_whole(path: Path) -> bool:
    try:
        content = path.read_bytes()
    except OSError:
        return False
    code, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    return hashlib.sha256(code).digest() == digest


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as temporary:
        temporary.write_bytes(content)
    return path


def cache_folder() -> Path:
    """Return the folder for compiled kernels and measured tables.

    A user without a home, as in some containers, has a folder in the system's temporary directory.
    """
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if base.startswith("~"):
        user = os.getuid() if hasattr(os, "getuid") else ""  # Windows has a directory per user
        return Path(tempfile.gettempdir()) / f"sparse_lightning-{user}"
    return Path(base) / "sparse_lightning"


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sparse_lightning-")  # removed at exit


def _private_folder() -> Path:
    return Path(_temporary_directory().name)


@functools.cache
def _nvrtc() -> Any:
    """Return CuPy's NVRTC module; raise an error that names a missing package."""
    major = (torch.version.cuda or "13").split(".")[0]
    install = f"pip install 'sparse-lightning[cuda{major}]'"
    try:
        from cupy_backends.cuda.libs import nvrtc
    except ImportError as error:
        raise RuntimeError(
            f"Block-sparse layers on a CUDA device need CuPy; importing it failed: {error}. "
            f"Install it with: {install}, or use Trainer(accelerator='cpu')."
        ) from error
    try:
        nvrtc.getVersion()
    except (RuntimeError, OSError) as error:
        raise RuntimeError(
            f"Block-sparse layers on a CUDA device need NVRTC; CuPy does not find it: {error}. "
            f"Install it with: {install}, or use Trainer(accelerator='cpu')."
        ) from error
    return nvrtc
