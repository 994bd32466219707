"""Tensor maps, the descriptors by which TMA loads boxes of a tensor.

A map depends only on the address, layout and dtype of a tensor, so maps are cached: a map stays
valid for any later tensor with the same ones.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from typing import Any

import torch

from sparse_lightning.kernels.launch import in_context

BYTES = 128

# The driver's enumerations: CUtensorMapDataType and, by bytes per row of a box, ...Swizzle and
# ...L2promotion. Promotion beyond a row would fetch bytes that no box needs.
_DTYPES = {torch.float16: 6, torch.bfloat16: 9}
_SWIZZLES = {32: 1, 64: 2, 128: 3}
_L2_PROMOTIONS = {32: 0, 64: 1, 128: 2}


@functools.lru_cache(maxsize=4096)
def tensor_map(
    address: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    box: tuple[int, ...],
    pitch: int | None = None,
) -> bytes:
    """Return the tensor map of a tensor on a CUDA device.

    Args:
        address: address of the first element; must be 16-byte aligned.
        dtype: bf16 or fp16.
        shape: shape of the tensor, up to 5 dimensions; the size of a row must be a multiple of 16
            bytes.
        box: shape of the box of one load. Its rows have 32, 64 or 128 bytes, and shared memory is
            swizzled in the mode of that width.
        pitch: elements between the rows of a matrix; None for a contiguous tensor.

    Raises:
        RuntimeError: if the driver rejects the map.
    """
    n = len(shape)
    if pitch is None:
        pitch = shape[-1]
    strides = [pitch * math.prod(shape[i:-1]) * dtype.itemsize for i in range(n - 1, 0, -1)]
    # The driver requires 64-byte alignment, which ctypes does not guarantee.
    memory = ctypes.create_string_buffer(BYTES + 64)
    encoded = ctypes.addressof(memory) + -ctypes.addressof(memory) % 64
    error = _encode()(
        ctypes.c_void_p(encoded),
        _DTYPES[dtype],
        n,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * n)(*reversed(shape)),
        (ctypes.c_uint64 * (n - 1))(*strides),
        (ctypes.c_uint32 * n)(*reversed(box)),
        (ctypes.c_uint32 * n)(*[1] * n),
        0,  # not interleaved
        _SWIZZLES[box[-1] * dtype.itemsize],
        _L2_PROMOTIONS[box[-1] * dtype.itemsize],
        0,  # elements outside the tensor are zero
    )
    if error:
        raise RuntimeError(
            f"The driver rejected a tensor map with error {error}: {dtype} {list(shape)} at "
            f"{address:#x}, boxes of {list(box)}."
        )
    return ctypes.string_at(encoded, BYTES)


@functools.cache
def _encode() -> Any:
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    return in_context(ctypes.CDLL(library).cuTensorMapEncodeTiled)
