"""Time tilings of the portable kernels for few tokens, on CUDA.

    python benchmarks/tilings.py --tokens 1 16 64 --block-sizes 64 128 --densities .25 .1

For each product, the table shows the fastest tilings and, marked, the one that the package uses;
speed-ups are over the dense product in the same run. Every tiling's result is checked before it is
timed. `portable/programs.py` holds the tilings in use.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple
from functools import partial

import torch

from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import (
    describe_environment,
    environment_line,
    prepare_device,
)
from sparse_lightning.bench.problem import MAX_ERROR
from sparse_lightning.cli import run_command
from sparse_lightning.kernels import compiler
from sparse_lightning.kernels.choice import STEP
from sparse_lightning.kernels.launch import Kernel, has_clusters
from sparse_lightning.kernels.measuring import Operands, Products
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.portable.launchers import (
    LINEAR_LAYOUT,
    dw_kernels,
    launch_dw,
    launch_linear,
    linear_variant,
)
from sparse_lightning.kernels.portable.programs import (
    dw_program,
    linear_program,
    multiplies_kept_weights,
    tiled_dw_program,
    tiled_linear_program,
)
from sparse_lightning.kernels.programs import TiledProgram, Tiling
from sparse_lightning.kernels.timing import Function, device_times, speedup
from sparse_lightning.nm_pattern import PATTERNS
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_density

_DTYPE = torch.bfloat16
_MOST_SKINNY_TOKENS = 64
_MOST_SHARED_BYTES = 99 * 1024


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    parser = argparse.ArgumentParser(prog="tilings.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--tokens", type=int, nargs="+", default=(1, 16, 32, 64, 128))
    add("--features", type=int, nargs=2, default=(8192, 8192), metavar=("IN", "OUT"))
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=BLOCK_SIZES)
    add("--densities", type=float, nargs="+", default=(0.25,))
    add("--products", nargs="+", choices=STEP, default=STEP)
    add(
        "--nm", choices=PATTERNS, help="take the kept weights of 2:4 sparse blocks: fwd and dx only"
    )
    add("--show", type=int, default=5, help="tilings per product; default: %(default)s")
    add("--repeats", type=int, default=5, help="rounds of which the median is taken")
    return run_command(run, parser.parse_args(arguments), parser.prog)


def run(options: argparse.Namespace) -> None:
    """Compile all tilings, then check and time them."""
    device = find_device("cuda")
    check_count("repeats", options.repeats)
    for block_size in options.block_sizes:
        block_grid(*options.features[::-1], block_size)
    for density in options.densities:
        check_density(density, "--densities")
    if options.nm is not None:
        for tokens in options.tokens:
            if not multiplies_kept_weights(_DTYPE, tokens):
                raise ValueError(
                    "`--tokens` must be at most 32 with --nm, as no kernel takes kept weights of "
                    f"more; got {tokens}."
                )
        options.products = [op for op in options.products if op != "dw"]
    prepare_device(device)
    print(environment_line(describe_environment(device)))
    print(
        "| op | tokens | B | density | tm, tn, tk, stages, groups m, n, k, splits | us | speed-up |"
    )
    print("|---|---|---|---|---|---|---|")
    cases = list(itertools.product(options.products, options.tokens, options.block_sizes))
    splits = (1, 2, 4) if has_clusters(torch.cuda.current_device()) else (1,)
    nm = options.nm is not None
    compile_all({p for op, n, size in cases for p in candidates(op, n, size, splits, nm=nm)})
    for op, tokens, block_size in cases:
        for density in options.densities:
            measure(op, tokens, block_size, density, splits, options, device)


def candidates(
    op: str, tokens: int, block_size: int, splits: Sequence[int], *, nm: bool = False
) -> Iterator[TiledProgram]:
    """Yield the programs that can compute a product of a number of tokens.

    `splits` are the numbers of thread blocks that may share a tile of the forward and of dX; with
    `nm`, programs take the kept weights of 2:4 sparse blocks.
    """
    if op == "dw":
        yield from _dw_candidates(tokens, block_size)
        return
    forward = op == "fwd"
    program = partial(tiled_linear_program, _DTYPE, block_size, forward=forward, nm=nm)
    outputs = [tn for tn in (16, 32, 64, 128) if tn <= block_size]
    if tokens <= _MOST_SKINNY_TOKENS:
        fits = [tm for tm in (8, 16, 32) if tm >= min(tokens, 32) and tm <= max(8, 2 * tokens)]
        for tm, tn, stages, warps, shares in itertools.product(
            fits, outputs, (1, 2, 4, 8), (4, 8, 16), splits
        ):
            # A dX load covers 32 outputs, and registers hold all stages and the sums.
            registers = stages * (tn // 2 + tm // 2) + tn * tm // 32
            fits_shared = 4 * warps * tm * (tn + 4) <= _MOST_SHARED_BYTES
            if (forward or tn >= min(32, block_size)) and registers <= 160 and fits_shared:
                yield program(tiling=Tiling(tm, tn, 32, stages, 1, 1, warps, shares))
    if tokens > 16 and not nm:
        pipelines = ((64, 3), (64, 4), (128, 2), (128, 3), (128, 4))
        groups = ((2, 1, 2), (2, 1, 4), (2, 2, 1), (2, 2, 2))
        for tm, tn, (tk, stages), (m, n, k), shares in itertools.product(
            (64, 128), outputs, pipelines, groups, splits
        ):
            tile = tm // m * (tn // n)  # of a warp
            if (
                tm < 2 * tokens
                and tm % (16 * m) == tn % (16 * n) == tk % (16 * k) == 0
                and 512 <= tile <= 2048
                and 32 * 1024 <= 2 * stages * (tm + tn) * tk <= _MOST_SHARED_BYTES
                and 4 * tm * tn <= _MOST_SHARED_BYTES
            ):
                yield program(tiling=Tiling(tm, tn, tk, stages, m, n, k, shares))


def _dw_candidates(tokens: int, block_size: int) -> Iterator[TiledProgram]:
    pipelines = ((16, 2), (32, 2), (64, 2), (16, 4), (32, 4))
    groups = ((1, 1), (1, 2), (1, 4), (1, 8), (2, 2), (2, 4))
    for tm, tn, (tk, stages), (m, n) in itertools.product(
        (16, 32, 64, 128), (32, 64, 128, 256), pipelines, groups
    ):
        tile = tm // m * (tn // n)  # of a warp
        if (
            max(16, block_size // 4) <= tm <= block_size <= tn
            and tk <= 2 * max(tokens, 16)
            and (stages == 2 or tk < tokens)
            and tm % (16 * m) == tn % (16 * n) == 0
            and 256 <= tile <= 4096
            and max(2 * stages * (tm + tn) * tk, 4 * tm * tn) <= _MOST_SHARED_BYTES
        ):
            yield tiled_dw_program(_DTYPE, block_size, Tiling(tm, tn, tk, stages, m, n))


def compile_all(programs: set[TiledProgram]) -> None:
    """Compile programs into the cache, in parallel."""
    arch = compiler.architecture(*torch.cuda.get_device_capability())
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compiler.cubin_file, p.source, p.options, arch) for p in programs]
        for job in jobs:
            job.result()


def measure(
    op: str,
    tokens: int,
    block_size: int,
    density: float,
    splits: Sequence[int],
    options: argparse.Namespace,
    device: torch.device,
) -> None:
    """Print the fastest tilings of a product, and the one in use.

    Raises:
        AssertionError: if a result is wrong.
    """
    shape, nm = (_DTYPE, block_size, *options.features), options.nm is not None
    operands = Operands(shape, [density], device)
    products = Products(operands, tokens)
    [(density, (topology, values))] = operands.sparse.items()
    if nm:
        topology = topology.with_random_positions(options.nm)
        values = [topology.compress(blocks) for blocks in values]
    x, dy, y = products.x, products.dy, products.dx if op == "dx" else products.y
    index = x.get_device()

    if op == "dw":
        expected = topology.pack(dy.float().t() @ x.float())
        used = dw_program(_DTYPE, block_size, tokens)
    else:
        weight = topology.unpack(values[0]).float()
        expected = x.float() @ weight.t() if op == "fwd" else dy.float() @ weight
        lists = BlockLists.of(topology.indices, forward=op == "fwd")
        n_out = lists.offsets.shape[0] - 1
        most, shares = linear_variant(_DTYPE, block_size, tokens, topology.capacity, n_out, index)
        used = linear_program(
            *(_DTYPE, block_size), forward=op == "fwd", tokens=most, splits=shares,
            nm=nm,
        )  # fmt: skip

    def launches(program: TiledProgram) -> list[Function]:
        if op == "dw":
            kernels = dw_kernels(program, index)
            return [partial(launch_dw, *kernels, dy, x, topology.indices, w) for w in values]
        kernel = Kernel(program, "block_linear", LINEAR_LAYOUT, index)
        left = x if op == "fwd" else dy
        launch = partial(launch_linear, positions=topology.positions)
        return [partial(launch, kernel, left, w, None, lists, y) for w in values]

    programs = list(dict.fromkeys([used, *candidates(op, tokens, block_size, splits, nm=nm)]))
    contenders = [products.dense(op)]
    for program in programs:
        runs = launches(program)
        result = values[0] if op == "dw" else y
        result.fill_(torch.nan)
        runs[0]()
        error = float((result.float() - expected).norm() / expected.norm())
        if not error <= MAX_ERROR[_DTYPE]:  # also true for NaN
            raise AssertionError(f"relative error {error:.2g} with {program}")
        contenders.append(runs)
    dense_times, *times = device_times(contenders, options.repeats, device)
    medians = [1e3 * statistics.median(samples) for samples in times]
    ranked = sorted(zip(medians, times, programs, strict=True), key=lambda row: row[0])
    shown = ranked[: options.show]
    for us, samples, program in [
        *shown,
        *(row for row in ranked[options.show :] if row[2] == used),
    ]:
        tiling = ", ".join(map(str, astuple(program.tiling)))
        mark = " (skinny)" if "skinny" in program.source else ""
        mark += " **in use**" if program == used else ""
        ratio = speedup(dense_times, samples)
        print(
            f"| {op} | {tokens} | {block_size} | {density:.2f} | {tiling}{mark} "
            f"| {us:.1f} | {ratio:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    raise SystemExit(main())
