"""From a `.cu` file to a loaded module: NVRTC, a cache of cubins on disk, CuPy's `RawModule`.

NVRTC is called directly, since CuPy would append an `-arch` of its own; that also compiles for
architectures that are not there, and without any GPU. CuPy is imported when a kernel is first
needed.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent
CACHE_VARIABLE = "SPARSE_LIGHTNING_CACHE_DIR"
OLDEST = (8, 0)  # cp.async, and mma.sync of bf16

_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Cubin:
    """A compiled source: the machine code, and what `ptxas` says of its kernels."""

    code: bytes
    log: str

    @property
    def spilled_bytes(self) -> int:
        """Bytes of registers and local arrays that ended up in slow local memory, all kernels."""
        found = re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", self.log)
        return sum(map(int, found))


def architecture(major: int, minor: int) -> str:
    """Return NVRTC's name of the architecture to compile for, from a compute capability.

    Raises:
        RuntimeError: for a device older than the kernels' instructions.

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
        source: its name.
        options: for NVRTC, as "-DNAME=value".
        arch: as from `architecture`.

    Raises:
        RuntimeError: if it does not compile; the message has NVRTC's lines, with file and line.
    """
    nvrtc = _nvrtc()
    path = FOLDER / source
    program = nvrtc.createProgram(path.read_text(), str(path), [], [])
    flags = [f"-arch={arch}", "-std=c++17", f"-I{FOLDER}", "--ptxas-options=-v", *options]
    if nvrtc.getVersion() >= (12, 9):
        flags.append("--no-cache")  # its own: what comes from there comes without the log
    try:
        try:
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError as error:
            raise RuntimeError(
                f"'{source}' did not compile for {arch}: {error}\n"
                f"{nvrtc.getProgramLog(program)}\n"
                f"options: {' '.join(flags)}\nNVRTC {'.'.join(map(str, nvrtc.getVersion()))}"
            ) from None
        # CuPy's `getCUBIN` drops a trailing NUL, without which the driver refuses a file.
        return Cubin(nvrtc.getCUBIN(program) + b"\0", nvrtc.getProgramLog(program))
    finally:
        nvrtc.destroyProgram(program)


def cubin_file(source: str, options: tuple[str, ...], arch: str) -> Path:
    """Return the file of a compiled source, compiling it unless the cache has it.

    A file is named by a hash of all that goes into it and ends in a hash of what it holds, so one
    that is damaged is compiled anew. It is put in place by renaming: processes that compile the
    same source at once do not disturb each other. Where the cache cannot be written to, a folder
    of this process alone takes its place.
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


def load_module(source: str, options: tuple[str, ...], device: int) -> Any:
    """Return a source's `cupy.RawModule`, to be used on one device only.

    Raises:
        RuntimeError: for a device that is too old, or if CuPy or NVRTC is not there.
    """
    _nvrtc()  # says what is missing
    import cupy

    arch = architecture(*torch.cuda.get_device_capability(device))
    return cupy.RawModule(path=str(cubin_file(source, options, arch)))


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
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def cache_folder() -> Path:
    """Return the folder in which compiled kernels, and what was measured of them, are kept."""
    given = os.environ.get(CACHE_VARIABLE)
    if given:
        return Path(given)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "sparse_lightning"


@functools.cache
def _temporary_directory() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="sparse_lightning-")  # removed at exit


def _private_folder() -> Path:
    return Path(_temporary_directory().name)


@functools.cache
def _nvrtc() -> Any:
    """Return CuPy's module for NVRTC, or say what is missing."""
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
