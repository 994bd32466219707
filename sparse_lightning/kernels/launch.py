"""Loads kernels, and launches them on PyTorch's current stream with little host time.

A kernel takes one argument, a C struct. `Kernel.launch` packs it into a thread-local buffer
(autograd launches from its own threads) and passes it to the driver, which copies it immediately.
"""

from __future__ import annotations

import ctypes
import functools
import re
import struct
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparse_lightning.kernels import compiler
from sparse_lightning.kernels.programs import Program

_ARGUMENT_BYTES = 4096  # what every driver accepts

Built = TypeVar("Built")
Result = TypeVar("Result")
AnyProgram = TypeVar("AnyProgram", bound=Program)


class _Thread(threading.local):
    """State of a thread that calls the driver."""

    def __init__(self) -> None:
        self.has_context = False
        self.buffer = ctypes.create_string_buffer(_ARGUMENT_BYTES)
        # The driver takes an array of pointers, one per argument.
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)


_thread = _Thread()


def in_context(driver_function: Callable[..., Result]) -> Callable[..., Result]:
    """Return a function of the driver API that can be called from any thread.

    The driver, unlike the runtime, needs a current context in the calling thread. A thread has none
    before its first CUDA call, which may be this one: an autograd thread gets its memory from
    PyTorch's cache.
    """

    def call(*arguments: Any) -> Result:
        if not _thread.has_context:
            import cupy

            cupy.cuda.Device(torch.cuda.current_device()).use()
            _thread.has_context = True
        return driver_function(*arguments)

    return call


@functools.cache
def sm_count(device: int) -> int:
    """Return the number of multiprocessors of a CUDA device, given its index."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def sm_shared_bytes(device: int) -> int:
    """Return the shared memory of a multiprocessor of a CUDA device, given its index."""
    from cupy.cuda import runtime

    attribute = runtime.cudaDevAttrMaxSharedMemoryPerMultiprocessor
    return int(runtime.deviceGetAttribute(attribute, device))


@functools.cache
def has_clusters(device: int) -> bool:
    """Return whether thread blocks of a CUDA device can form clusters, given its index."""
    return torch.cuda.get_device_capability(device) >= (9, 0)


class Kernel(Generic[AnyProgram]):
    """One kernel of a program, loaded on one device.

    Attributes:
        program: the kernel's program.
        sm_count: number of multiprocessors of the device.

    Args:
        program: program to compile unless it is cached.
        entry: name of the kernel in its source.
        layout: format of its argument for `struct`, with C's alignment: P for a pointer, q and i
            for 64-bit and 32-bit integers, f for a float, 128s for a tensor map.
        device: index of the CUDA device.

    Raises:
        RuntimeError: if the layout does not match the argument's struct.
    """

    def __init__(self, program: AnyProgram, entry: str, layout: str, device: int) -> None:
        path = compiler.device_cubin(program.source, program.options, device)
        facts = compiler.launch_facts(path.read_bytes(), entry)
        check_layout(entry, layout, facts)
        # Imported after compiling, whose error names a missing CuPy.
        import cupy
        from cupy_backends.cuda.api import driver

        self._module = cupy.RawModule(path=str(path))
        self.program = program
        self.sm_count = sm_count(device)
        self._device = device
        self._threads, self._shared_bytes = facts.threads, facts.shared_bytes
        self._pack = struct.Struct(layout).pack_into
        self._driver_launch = in_context(driver.launchKernel)
        with cupy.cuda.Device(device):
            kernel = self._module.get_function(entry)
            kernel.max_dynamic_shared_size_bytes = self._shared_bytes
            self._function = kernel.kernel.ptr

    def launch(self, grid_x: int, grid_y: int, *arguments: float | bytes) -> None:
        """Launch the kernel on its device's current PyTorch stream."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(grid_x, grid_y, *arguments)
            return
        self._pack(_thread.buffer, 0, *arguments)
        # The stream's handle without the overhead of a Stream object.
        stream: Any = torch._C._cuda_getCurrentRawStream(self._device)
        self._driver_launch(
            self._function,
            *(grid_x, grid_y, 1),
            *(self._threads, 1, 1),
            *(self._shared_bytes, stream, _thread.address, 0),
        )


def check_layout(entry: str, layout: str, facts: compiler.LaunchFacts) -> None:
    """Raise RuntimeError unless `struct` lays out a kernel's argument like its C struct."""
    offsets, prefix = [], ""
    for field in re.findall(r"\d*[a-zA-Z]", layout):
        prefix += field
        if not field.endswith("x"):
            offsets.append(struct.calcsize(prefix) - struct.calcsize(field))
    size = -(-struct.calcsize(layout) // facts.argument_alignment) * facts.argument_alignment
    if (size, tuple(offsets)) != (facts.argument_bytes, facts.offsets):
        raise RuntimeError(
            f"The layout of kernel '{entry}' must be that of its argument, {facts.argument_bytes} "
            f"bytes with members at {facts.offsets}; got {size} bytes with members at "
            f"{tuple(offsets)}. Correct the layout '{layout}' in its launcher."
        )


def packed(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy if it is not contiguous and aligned to 16 bytes."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def row_pitch(rows: Tensor) -> int:
    """Return a matrix's row stride in elements; for one row, PyTorch's stride is arbitrary.

    >>> row_pitch(torch.zeros(4, 6)[::2]), row_pitch(torch.zeros(1, 6).as_strided((1, 6), (1, 1)))
    (12, 6)
    """
    n, features = rows.shape
    return rows.stride(0) if n > 1 else features


_lock = threading.Lock()


def build_once(builder: Callable[..., Built]) -> Callable[..., Built]:
    """Cache a function that builds kernels; concurrent calls build each kernel once."""
    built: dict[tuple[Any, ...], Built] = {}

    @functools.wraps(builder)
    def get(*key: Any) -> Built:
        if key not in built:
            with _lock:
                if key not in built:
                    built[key] = builder(*key)
        return built[key]

    return get
