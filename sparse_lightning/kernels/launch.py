"""Loaded kernels, and launching them on PyTorch's current stream with little host time.

A kernel takes one argument, a C struct. It is packed into a buffer of the calling thread (backward
runs on threads of its own) and handed to the driver by CuPy, which copies it before it returns.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from sparse_lightning.kernels import compiler
from sparse_lightning.kernels.programs import Program

_ARGUMENT_BYTES = 4096  # what every driver takes

Built = TypeVar("Built")
AnyProgram = TypeVar("AnyProgram", bound=Program)


class _Thread(threading.local):
    """What each thread that launches kernels has of its own."""

    def __init__(self) -> None:
        self.has_context = False
        self.buffer = ctypes.create_string_buffer(_ARGUMENT_BYTES)
        # What the driver wants: an array of pointers, one to each argument.
        self._pointers = (ctypes.c_void_p * 1)(ctypes.addressof(self.buffer))
        self.address = ctypes.addressof(self._pointers)


_thread = _Thread()


@functools.cache
def processors(device: int) -> int:
    """Return the number of multiprocessors of the CUDA device of that index."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class Kernel(Generic[AnyProgram]):
    """One kernel of a program, loaded on one device.

    Attributes:
        program: `Program`; of a product with the tiling that a grid is computed from.
        processors: multiprocessors of the device.

    Args:
        program: compiled unless the cache has it.
        entry: name of the kernel in its source.
        layout: of its argument, in the notation of `struct`, with C's alignment: P a pointer,
            q a 64-bit and i a 32-bit integer, f a float, 128s a tensor map.
        device: index of the CUDA device.
        threads: of a thread block; the program's if None, with its shared memory.
    """

    def __init__(
        self, program: AnyProgram, entry: str, layout: str, device: int, threads: int | None = None
    ) -> None:
        # First: it says what is missing.
        self._module = compiler.load_module(program.source, program.options, device)
        import cupy
        from cupy_backends.cuda.api import driver

        self.program = program
        self.processors = processors(device)
        self._device = device
        self._threads = program.threads if threads is None else threads
        self._shared_bytes = program.shared_bytes if threads is None else 0
        self._pack = struct.Struct(layout).pack_into
        self._driver_launch = driver.launchKernel
        self._use_device = cupy.cuda.Device(device).use
        with cupy.cuda.Device(device):
            kernel = self._module.get_function(entry)
            kernel.max_dynamic_shared_size_bytes = self._shared_bytes
            self._function = kernel.kernel.ptr

    def launch(self, grid_x: int, grid_y: int, *arguments: float | bytes) -> None:
        """Put the kernel on PyTorch's current stream of its device."""
        if torch.cuda.current_device() != self._device:
            with torch.cuda.device(self._device):
                self.launch(grid_x, grid_y, *arguments)
            return
        if not _thread.has_context:
            # A thread of autograd may have had no CUDA call before this one: its memory came from
            # PyTorch's cache. The driver, unlike the runtime, then has no context to launch in.
            self._use_device()
            _thread.has_context = True
        self._pack(_thread.buffer, 0, *arguments)
        # The stream's handle, without the cost of a Stream object.
        stream: Any = torch._C._cuda_getCurrentRawStream(self._device)
        self._driver_launch(
            self._function,
            *(grid_x, grid_y, 1),
            *(self._threads, 1, 1),
            *(self._shared_bytes, stream, _thread.address, 0),
        )


def packed(tensor: Tensor) -> Tensor:
    """Return the tensor, or a copy, contiguous and aligned to the 16 bytes that kernels load."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def row_pitch(rows: Tensor) -> int:
    """Return the elements from a row of a matrix to the next; of a single one PyTorch may say any.

    >>> row_pitch(torch.zeros(4, 6)[::2]), row_pitch(torch.zeros(1, 6).as_strided((1, 6), (1, 1)))
    (12, 6)
    """
    n, features = rows.shape
    return rows.stride(0) if n > 1 else features


_lock = threading.Lock()


def build_once(builder: Callable[..., Built]) -> Callable[..., Built]:
    """Cache a function that builds kernels; two threads that ask at once get the same ones."""
    built: dict[tuple[Any, ...], Built] = {}

    @functools.wraps(builder)
    def get(*key: Any) -> Built:
        if key not in built:
            with _lock:
                if key not in built:
                    built[key] = builder(*key)
        return built[key]

    return get
