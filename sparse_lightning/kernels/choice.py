"""The kernel choice: which kind of kernels computes a product on a CUDA device.

The kind that is predicted to be fastest is chosen; `speedups` defines which measurements a device
uses, and `measuring` makes those that are missing when a layer is first used. Without any, the
portable kernels compute everything.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from sparse_lightning.kernels import cpu
from sparse_lightning.kernels.hopper import programs as hopper_programs
from sparse_lightning.kernels.portable.programs import multiplies_kept_weights
from sparse_lightning.kernels.speedups import (
    DeviceSpeedups,
    Layer,
    Shape,
    tokens_bucket,
)
from sparse_lightning.topology import BlockTopology

PORTABLE, HOPPER, DENSE = KINDS = ("portable", "hopper", "dense")
STEP = ("fwd", "dx", "dw")  # the products of a step
OPS = (*STEP, "norms")

# bf16 and fp16 share kernels and rates.
DTYPES = {torch.bfloat16: "half", torch.float16: "half", torch.float32: "fp32"}
# Number of tokens assumed for a layer whose input is unknown.
_TOKENS = 8192

_forced: str | None = None


@contextmanager
def forced(kind: str) -> Iterator[None]:
    """Force one kind for all products that it supports; the portable kernels compute the rest."""
    global _forced
    if kind not in KINDS:
        raise ValueError(f"`kind` must be one of {KINDS}; got {kind!r}.")
    before, _forced = _forced, kind
    try:
        yield
    finally:
        _forced = before


def available_kinds(op: str, dtype: torch.dtype, capability: tuple[int, int]) -> list[str]:
    """Return the kinds that can compute a product on a device.

    >>> available_kinds("dw", torch.bfloat16, (9, 0))
    ['portable', 'hopper', 'dense']
    >>> available_kinds("norms", torch.float32, (9, 0))
    ['portable']
    """
    kinds = [PORTABLE]
    if hopper_programs.is_supported(capability, dtype):
        kinds.append(HOPPER)
    if op != "norms":
        kinds.append(DENSE)
    return kinds


def choose(
    op: str,
    dtype: torch.dtype,
    block_size: int,
    capacity: int,
    grid: tuple[int, int],
    tokens: int,
    device: int,
) -> str:
    """Return the kind that computes a product.

    A layer shape that no table covers is measured first. While that is impossible, as in the
    capture of a CUDA graph, the table's guess computes it.

    Args:
        op: one of `OPS`.
        dtype: dtype of the operands.
        block_size: block size of the layer.
        capacity: number of slots, used in place of the number of present blocks, which only the
            device knows.
        grid: (out_blocks, in_blocks).
        tokens: number of tokens of the input.
        device: index of the CUDA device.
    """
    if tokens == 0 or capacity == 0:
        return PORTABLE
    if _forced is not None:
        capability = torch.cuda.get_device_capability(device)
        return _forced if _forced in available_kinds(op, dtype, capability) else PORTABLE
    product = (op, dtype, block_size, capacity, grid, tokens_bucket(tokens), device)
    kind, is_known = _cached_choice(*product)
    if not is_known:
        from sparse_lightning.kernels import measuring  # which calls kernels, and so this module

        in_features, out_features = grid[1] * block_size, grid[0] * block_size
        measuring.measure_missing(device, [(dtype, block_size, in_features, out_features)])
        kind, _ = _choice(*product)
    return kind


def step_speedup(
    dtype: torch.dtype, block_size: int, grid: tuple[int, int], density: float, device: int
) -> float | None:
    """Return the predicted speed-up of a layer's step over dense; None if a product is unknown.

    A step is the forward and both products of the backward, at 8192 tokens.
    """
    shape = (_TOKENS, grid[1] * block_size, grid[0] * block_size)
    time = 0.0
    for op in STEP:
        speedup = product_speedup(op, dtype, block_size, shape, density, device)
        if speedup is None:
            return None
        time += 1 / speedup
    return len(STEP) / time


def product_speedup(
    op: str,
    dtype: torch.dtype,
    block_size: int,
    shape: Shape,
    density: float,
    device: int,
    *,
    may_guess: bool = True,
) -> float | None:
    """Return the predicted speed-up of the best kind for one product.

    It is None if nothing was measured or, unless `may_guess`, no similar shape.
    """
    if dtype not in DTYPES:
        return None
    table = device_speedups(device).table_for(_layer(dtype, block_size, shape))
    product = (op, DTYPES[dtype], block_size, shape)
    if not (may_guess or table.covers(*product)):
        return None
    speedups = table.predict(*product, density)
    kinds = available_kinds(op, dtype, torch.cuda.get_device_capability(device))
    return max((speedups[kind] for kind in kinds if kind in speedups), default=None)


def choose_for_step(
    topology: BlockTopology, dtype: torch.dtype, tokens: int, device: torch.device
) -> dict[str, str]:
    """Return the kernel choice for each product of a step ("fwd", "dx", "dw"), on CUDA or a CPU."""
    block_size, grid = topology.block_size, topology.grid
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        kinds = {
            op: choose(op, dtype, block_size, topology.capacity, grid, tokens, index) for op in STEP
        }
        if topology.nm is not None and multiplies_kept_weights(dtype, tokens):
            kinds.update(fwd=PORTABLE, dx=PORTABLE)
        return kinds
    return {op: cpu.choose(op, tokens, block_size, topology.density, dtype) for op in STEP}


def _choice(
    op: str,
    dtype: torch.dtype,
    block_size: int,
    capacity: int,
    grid: tuple[int, int],
    tokens: int,
    device: int,
) -> tuple[str, bool]:
    """Return the kind that is fastest by what is known, and False if the layer shape is unknown."""
    if dtype not in DTYPES:
        return PORTABLE, True
    shape = (tokens, grid[1] * block_size, grid[0] * block_size)
    layer, known = _layer(dtype, block_size, shape), device_speedups(device)
    density = 1.0 if op == "norms" else capacity / (grid[0] * grid[1])
    kinds = available_kinds(op, dtype, torch.cuda.get_device_capability(device))
    fastest = known.table_for(layer).fastest(op, layer[0], block_size, shape, density, kinds)
    return fastest or PORTABLE, known.knows(layer)


_cached_choice = functools.lru_cache(maxsize=4096)(_choice)


def _layer(dtype: torch.dtype, block_size: int, shape: Shape) -> Layer:
    return (DTYPES[dtype], block_size, *shape[1:])


@functools.cache
def device_speedups(device: int) -> DeviceSpeedups:
    """Return the measurements that a CUDA device uses, given its index."""
    major, minor = torch.cuda.get_device_capability(device)
    return DeviceSpeedups(torch.cuda.get_device_name(device), f"sm_{major}{minor}")


def clear_choices() -> None:
    """Drop cached choices, so that new measurements take effect."""
    _cached_choice.cache_clear()


def clear_table_cache() -> None:
    """Drop cached tables and choices, so that a new table takes effect."""
    device_speedups.cache_clear()
    clear_choices()
