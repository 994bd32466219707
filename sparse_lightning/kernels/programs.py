"""Programs: `.cu` files with all their options set.

`portable.programs` has those for every device, `hopper.programs` those for Hopper.
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
    """A `.cu` file with its compiler options."""

    source: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Tiling:
    """How a product is cut into tiles.

    Attributes:
        tm, tn: rows and columns of the result that a thread block computes.
        tk: extent of a k-tile, which one pipeline stage holds.
        stages: pipeline stages.
        groups_m, groups_n: how many warps or warpgroups (threads for fp32 and fp64, which do not
            use tensor cores) share the tile's rows and columns.
        groups_k: how many such groups share the extent along k, and add their results.
        splits: how many thread blocks of a cluster share the k-tiles, and add their results.
    """

    tm: int
    tn: int
    tk: int
    stages: int
    groups_m: int
    groups_n: int
    groups_k: int = 1
    splits: int = 1


@dataclass(frozen=True)
class TiledProgram(Program):
    """The program of a matrix product, with the tiling that its grid is computed from."""

    tiling: Tiling


def compiler_options(defines: dict[str, str | int]) -> tuple[str, ...]:
    """Return the options that define `CONFIG_...` for each name.

    >>> compiler_options({"T": "bf16", "B": 64})
    ('-DCONFIG_T=bf16', '-DCONFIG_B=64')
    """
    return tuple(f"-DCONFIG_{name}={value}" for name, value in defines.items())
