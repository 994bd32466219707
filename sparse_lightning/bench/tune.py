"""`sparse-lightning tune`: time every kind of kernel, and save the table for the kernel choice.

On a CPU, its methods take the place of the kinds.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import describe_environment, prepare_device
from sparse_lightning.bench.problem import MAX_ERROR, Contender, Problem
from sparse_lightning.files import check_writable
from sparse_lightning.kernels import choice, cpu
from sparse_lightning.kernels.choice import OPS, STEP
from sparse_lightning.kernels.measuring import (
    LayerShape,
    Operands,
    Products,
    available_kinds,
    blank_rows,
    exact,
)
from sparse_lightning.kernels.speedups import (
    Measured,
    merged,
    read_rows,
    tuned_file,
    write_rows,
)
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_density

_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
_DEFAULT_DTYPES = ("bf16", "fp32")


class Grid(NamedTuple):
    """What is measured: all combinations.

    Attributes:
        tokens: numbers of tokens.
        features: (in_features, out_features) of each layer.
        block_sizes: block sizes.
        densities: densities.
    """

    tokens: tuple[int, ...]
    features: tuple[tuple[int, int], ...]
    block_sizes: tuple[int, ...] = BLOCK_SIZES
    densities: tuple[float, ...] = (1.0, 0.5, 0.25, 0.1, 0.05)


_SIZES = (512, 2048, 8192, 16384)
_CPU_GRID = Grid((1, 16, 64, 256, 1024), (cpu.MEASURED_FEATURES,))
GRIDS = {
    # An H200 takes seven minutes.
    "cuda": {
        torch.bfloat16: Grid((1, 16, 64, 256, 1024, 8192, 65536), tuple(product(_SIZES, _SIZES))),
        torch.float32: Grid((1, 64, 1024, 8192), tuple(product(_SIZES[:2], _SIZES[:2]))),
    },
    "cpu": dict.fromkeys(_DTYPES.values(), _CPU_GRID),
}
_MOST_BYTES = 24 << 30  # of the tensors of a product
# The products of which every kind is checked in full, and the part of the others that is checked.
_CHECKED_SHAPE = (256, 512, 512)
_CHECKED_TOKENS, _CHECKED_PARTS = 8192, 64


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--device", default="cuda",
        help="cuda (some minutes), or cpu (half a minute to a minute on a quiet "
        "machine; for its current number of threads); default: %(default)s")  # fmt: skip
    add(
        "--repeats",
        type=int,
        default=5,
        help="rounds of which the median is taken; default: %(default)s",
    )
    add("--output", type=Path, metavar="FILE",
        help="default: the file that training on this machine reads. What it already has is not "
        "measured again")  # fmt: skip
    add("--fresh", action="store_true", help="measure everything again")
    add("--dtypes", nargs="+", choices=_DTYPES, default=_DEFAULT_DTYPES, metavar="DTYPE",
        help="bf16 (on a GPU also for fp16), fp32, or on a CPU fp16; default: the first two",
    )  # fmt: skip
    add("--tokens", type=int, nargs="+", metavar="N", help="numbers of tokens")
    add("--shapes", nargs="+", metavar="INxOUT",
        help="layers, as 2048x8192; on a CPU, one of about 1024x1024 stands for all")  # fmt: skip
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, metavar="B")
    add("--densities", type=float, nargs="+", metavar="D", help="densities in (0, 1]")


def run(options: argparse.Namespace) -> None:
    """Measure, print and save the table, each layer as soon as it is measured.

    Raises:
        ValueError: for wrong options, before anything is measured.
        AssertionError: if the result of a kernel is wrong.
    """
    device = find_device(options.device)
    check_count("repeats", options.repeats)
    defaults, dtypes = GRIDS[device.type], [_DTYPES[name] for name in options.dtypes]
    if not defaults.keys() >= set(dtypes):
        raise ValueError(
            f"`--dtypes` must be bf16 or fp32 on a GPU; got {' '.join(options.dtypes)}. Measure "
            "bf16, which has the same kernels as fp16."
        )
    grids = {dtype: _grid(options, defaults[dtype]) for dtype in dtypes}
    is_cpu = device.type == "cpu"
    kinds = cpu.METHODS if is_cpu else choice.KINDS
    path = options.output or (
        cpu.table_file(torch.get_num_threads())
        if is_cpu
        else tuned_file(torch.cuda.get_device_name(device))
    )
    with suppress(OSError):  # reported by the check
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path, "--output")
    rows = read_rows(path) if path.is_file() and not options.fresh else []
    prepare_device(device)

    environment = describe_environment(device)
    done = {row.cell for row in rows}
    print(f"| op | dtype | B | tokens x in x out | density | {' | '.join(kinds)} |")
    print("|" + "---|" * (5 + len(kinds)))
    for layer in measure_all(grids, done, device, options.repeats):
        for row in layer:
            print(table_row(row, kinds), flush=True)
        rows = merged(rows, layer)
        write_rows(path, rows, environment)
    choice.clear_table_cache()
    cpu.clear_table_cache()
    print(f"\nSaved in {path}")


def _grid(options: argparse.Namespace, grid: Grid) -> Grid:
    """Return a grid with the parts that the options name.

    Raises:
        ValueError: for a wrong option.
    """
    for tokens in options.tokens or ():
        check_count("tokens", tokens)
    for density in options.densities or ():
        check_density(density, "--densities")
    features = grid.features
    if options.shapes:
        found = [re.fullmatch(r"(\d+)x(\d+)", text) for text in options.shapes]
        if not all(found):
            raise ValueError(
                f"`--shapes` must be sizes as 2048x8192; got {' '.join(options.shapes)}."
            )
        features = tuple((int(match[1]), int(match[2])) for match in found if match)
    block_sizes = tuple(options.block_sizes or grid.block_sizes)
    for (in_features, out_features), block_size in product(features, block_sizes):
        block_grid(out_features, in_features, block_size)
    return Grid(
        tuple(options.tokens or grid.tokens),
        features,
        block_sizes,
        tuple(options.densities or grid.densities),
    )


def measure_all(
    grids: dict[torch.dtype, Grid], done: set[tuple[object, ...]], device: torch.device, rounds: int
) -> Iterator[list[Measured]]:
    """Yield the measurements of each layer, without the cells that are done."""
    for dtype, grid in grids.items():
        for block_size in grid.block_sizes:
            is_checked = False
            for features in grid.features:
                shape = (dtype, block_size, *features)
                by_tokens = [
                    [row for row in blank_rows(shape, n, grid.densities, device)
                     if row.cell not in done]
                    for n in grid.tokens
                    if _count_bytes(shape, n) <= _MOST_BYTES
                ]  # fmt: skip
                if not any(by_tokens):
                    continue
                if device.type == "cuda" and not is_checked:
                    check_small(dtype, block_size, grid.densities, device)
                    is_checked = True
                with exact(dtype):
                    operands = Operands(shape, grid.densities, device)
                    check_sample(operands, min(_CHECKED_TOKENS, max(grid.tokens)))
                    for rows in by_tokens:
                        operands.measure(rows, rounds)
                del operands
                yield [row for rows in by_tokens for row in rows]


def _count_bytes(shape: LayerShape, tokens: int) -> int:
    """Return the bytes of the dense products' tensors.

    >>> _count_bytes((torch.bfloat16, 64, 16384, 16384), 65536) >> 30
    9
    """
    dtype, _, in_features, out_features = shape
    activations = 2 * tokens * (in_features + out_features)
    return (activations + 2 * in_features * out_features) * dtype.itemsize


def check_small(
    dtype: torch.dtype, block_size: int, densities: Iterable[float], device: torch.device
) -> None:
    """Check all of the results of every kind, for a small layer.

    Raises:
        AssertionError: if a result is wrong; the message names product and kind.
    """
    for density in densities:
        problem = Problem(_CHECKED_SHAPE, block_size, density, dtype=dtype, device=device, seed=0)
        for op in OPS:
            ours = problem.ours(op)
            for kind in available_kinds(op, dtype, device):
                try:
                    problem.check(op, Contender(_forced(kind, ours), ours.read))
                except AssertionError as error:
                    raise AssertionError(
                        f"{op} by {kind} kernels with blocks of {block_size} at density "
                        f"{density:.2f} is wrong: {error}"
                    ) from None


def _forced(kind: str, contender: Contender) -> Callable[[], object]:
    def run() -> object:
        with choice.forced(kind):
            return contender.run()

    return run


def check_sample(operands: Operands, tokens: int) -> None:
    """Check a part of the results of every kind: rows of y and dx, and blocks of dW.

    Raises:
        AssertionError: if it is wrong; the message names product and kind.
    """
    products = Products(operands, tokens)
    density = sorted(operands.sparse)[len(operands.sparse) // 2]
    topology, (values, *_) = operands.sparse[density]
    generator = torch.Generator(values.device).manual_seed(0)
    pick = partial(torch.randint, size=(_CHECKED_PARTS,), generator=generator, device=values.device)
    rows, slots = pick(0, tokens), pick(0, topology.capacity)
    weight = topology.unpack(values).float()
    tiles = topology.coords[slots].long()[..., None] * topology.block_size
    tiles = tiles + torch.arange(topology.block_size, device=values.device)  # features of blocks
    dy_tiles, x_tiles = products.dy.T[tiles[:, 0]].float(), products.x.T[tiles[:, 1]].float()
    expected: dict[str, tuple[Tensor, Tensor]] = {
        "fwd": (rows, products.x[rows].float() @ weight.T),
        "dx": (rows, products.dy[rows].float() @ weight),
        "dw": (slots, dy_tiles @ x_tiles.transpose(1, 2)),
    }
    for op in STEP:  # dW comes last, since it replaces the values
        index, right = expected[op]
        for kind in available_kinds(op, operands.dtype, operands.device):
            found = products.compute(kind, op, density)[index].float()
            error = float((found - right).norm() / right.norm())
            if not error <= MAX_ERROR[operands.dtype]:  # also true for NaN
                raise AssertionError(
                    f"{op} by {kind} kernels with blocks of {operands.block_size} for {tokens} x "
                    f"{operands.in_features} x {operands.out_features} is wrong: relative error "
                    f"{error:.2g}"
                )


def table_row(row: Measured, kinds: Sequence[str]) -> str:
    """Return a row of the Markdown table; the last columns are speed-ups over the dense product."""
    shape = "x".join(map(str, row.shape))
    cells = [row.op, row.dtype, str(row.block_size), shape, f"{row.density:.2f}"]
    cells += [f"{row.speedups[k]:.2f}" if k in row.speedups else "n/a" for k in kinds]
    return f"| {' | '.join(cells)} |"
