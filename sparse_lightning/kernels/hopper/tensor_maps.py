"""Tensor maps: how the bulk copy engine of Hopper is told of a matrix and of the boxes it copies.

A map says where a tensor is and how it is laid out, no more: one that was made for the same
address, shape and dtype describes any later tensor there just as well, so maps are kept.
"""

from __future__ import annotations

import ctypes
import functools
import math
import sys
from typing import Any

import torch

BYTES = 128

# The driver's enumerations: CUtensorMapDataType, and by the bytes of a box's row ...Swizzle and
# ...L2promotion: the cache is asked for no more than a row, or the rest would come in vain.
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
    """Return the map of a tensor on a CUDA device.

    Args:
        address: of its first element, a multiple of 16 bytes.
        dtype: bf16 or fp16.
        shape: of the tensor, up to 5 dimensions; rows are multiples of 16 bytes.
        box: what a copy brings, as many dimensions; its rows have 32, 64 or 128 bytes, and lie
            swizzled over as many in shared memory.
        pitch: elements from a row of a matrix to the next; None for a contiguous tensor.

    Raises:
        RuntimeError: if the driver refuses it.
    """
    n = len(shape)
    if pitch is None:
        pitch = shape[-1]
    strides = [pitch * math.prod(shape[i:-1]) * dtype.itemsize for i in range(n - 1, 0, -1)]
    # The driver wants 64-byte alignment, which ctypes does not promise.
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
        0,  # what lies outside is zero
    )
    if error:
        raise RuntimeError(
            f"The driver refused a tensor map with error {error}: {dtype} {list(shape)} at "
            f"{address:#x}, boxes of {list(box)}."
        )
    return ctypes.string_at(encoded, BYTES)


@functools.cache
def _encode() -> Any:
    library = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
    return ctypes.CDLL(library).cuTensorMapEncodeTiled
