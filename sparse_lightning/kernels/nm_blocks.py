"""Expands 2:4 sparse blocks to whole ones on a GPU, and back; see `nm_pattern` for the layout."""

from __future__ import annotations

from torch import Tensor

from sparse_lightning.kernels.launch import Kernel, build_once, packed
from sparse_lightning.kernels.programs import Program, compiler_options

# Elements only move, so that an integer of their size stands for every dtype.
_TYPES = {2: "unsigned short", 4: "unsigned int", 8: "unsigned long long"}
_THREAD_BLOCKS_PER_SM = 16


def expand(values: Tensor, positions: Tensor) -> Tensor:
    """Return whole blocks, `[capacity, B, B]`, of kept weights `[capacity, B, B / 2]`."""
    capacity, block_size, width = values.shape
    blocks = values.new_empty(capacity, block_size, 2 * width)
    _move("expand", packed(values), blocks, positions)
    return blocks


def compress(blocks: Tensor, positions: Tensor) -> Tensor:
    """Return the kept weights, `[capacity, B, B / 2]`, of whole blocks `[capacity, B, B]`."""
    capacity, block_size, width = blocks.shape
    values = blocks.new_empty(capacity, block_size, width // 2)
    _move("compress", values, packed(blocks), positions)
    return values


def _move(entry: str, values: Tensor, blocks: Tensor, positions: Tensor) -> None:
    if not positions.numel():
        return
    kernel = _kernel(entry, values.element_size(), values.get_device())
    kernel.launch(
        _THREAD_BLOCKS_PER_SM * kernel.sm_count,
        1,
        values.data_ptr(),
        blocks.data_ptr(),
        positions.data_ptr(),
        positions.numel(),
    )


def program(element_size: int) -> Program:
    """Return the program for elements of 2, 4 or 8 bytes."""
    return Program("nm_blocks.cu", compiler_options({"T": _TYPES[element_size]}))


@build_once
def _kernel(entry: str, element_size: int, device: int) -> Kernel[Program]:
    return Kernel(program(element_size), entry, "PPPq", device)
