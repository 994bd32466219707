"""What a *program* is: a `.cu` file with all its options set. Pure functions on dtypes and ints.

Two families of them serve the ops: `portable_programs` on every device, `hopper_programs` in half
precision on compute capability 9.0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

DTYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "float",
    torch.float64: "double",
}


@dataclass(frozen=True)
class Program:
    """A `.cu` file with its options, and what a launch has to know of them."""

    source: str
    options: tuple[str, ...]
    threads: int
    shared_bytes: int


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into tiles.

    Attributes:
        tm, tn: rows and columns of the result that a thread block computes.
        tk: how much of the summed dimension is in shared memory at a time.
        stages: how many such steps are in shared memory, or on their way to it.
        groups_m, groups_n: how many share the tile's rows and columns: warps or warpgroups where
            there are tensor cores for the dtype, threads elsewhere.
    """

    tm: int
    tn: int
    tk: int
    stages: int
    groups_m: int
    groups_n: int


@dataclass(frozen=True)
class TiledProgram(Program):
    """A program of a matrix product."""

    tiling: Tiling


def compiler_options(defines: dict[str, str | int]) -> tuple[str, ...]:
    """Return what makes the compiler define `CONFIG_...` for each name.

    >>> compiler_options({"T": "bf16", "B": 64})
    ('-DCONFIG_T=bf16', '-DCONFIG_B=64')
    """
    return tuple(f"-DCONFIG_{name}={value}" for name, value in defines.items())
