"""Time a block-sparse layer against `nn.Linear`: python -m sparse_lightning.bench.kernels

Forward and backward of one layer, with bias and the gradient of the input, the two layers taking
turns in one process. A row is printed only after the outputs and gradients agree with a dense
layer of the same weights.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sparse_lightning.linear import BlockSparseLinear
from sparse_lightning.topology import BLOCK_SIZES


@dataclass(frozen=True)
class Timing:
    """One row: medians in milliseconds, and the speed-up's median and extremes over the pairs."""

    block_size: int
    density: float
    dense_ms: float
    sparse_ms: float
    speedup: float
    slowest: float
    fastest: float


def measure(
    tokens: int, in_features: int, out_features: int, block_size: int, density: float, repeats: int
) -> Timing:
    """Time forward + backward of both layers in turn, in fp32 on the CPU.

    Raises:
        AssertionError: if the two layers do not agree.
    """
    generator = torch.Generator().manual_seed(0)
    sparse = BlockSparseLinear(in_features, out_features, block_size=block_size, density=density)
    dense = sparse.to_linear()
    x = torch.randn(tokens, in_features, generator=generator, requires_grad=True)
    dy = torch.randn(tokens, out_features, generator=generator)
    check_parity(sparse, dense, x, dy)

    def run(layer: nn.Module) -> Callable[[], None]:
        def step() -> None:
            x.grad = None
            layer.zero_grad()
            layer(x).backward(dy)

        return step

    for _ in range(2):
        run(dense)(), run(sparse)()
    pairs = [(seconds(run(dense)), seconds(run(sparse))) for _ in range(repeats)]
    ratios = sorted(d / s for d, s in pairs)
    return Timing(
        block_size=block_size,
        density=sparse.density,
        dense_ms=1e3 * statistics.median(d for d, _ in pairs),
        sparse_ms=1e3 * statistics.median(s for _, s in pairs),
        speedup=statistics.median(ratios),
        slowest=ratios[0],
        fastest=ratios[-1],
    )


def seconds(step: Callable[[], None]) -> float:
    """Return the time that one call takes."""
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def check_parity(sparse: BlockSparseLinear, dense: nn.Linear, x: Tensor, dy: Tensor) -> None:
    """Raise AssertionError unless output and gradients of the two layers agree."""
    results: list[tuple[Tensor, Tensor]] = []
    for layer in (sparse, dense):
        x.grad = None
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        results.append((y.detach(), x.grad))
    (y, dx), (y_dense, dx_dense) = results
    torch.testing.assert_close(y, y_dense, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(dx, dx_dense, rtol=1e-4, atol=1e-3)
    assert dense.weight.grad is not None
    torch.testing.assert_close(
        sparse.values.grad, sparse.topology.pack(dense.weight.grad), rtol=1e-4, atol=1e-2
    )


def environment() -> str:
    """Return the machine, the versions and the commit, for the table's caption."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":", 1)[1].strip() if names else cpu
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    commit = git.stdout.strip() or "unknown"
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", type=int, nargs=3, default=[1024, 1024, 1024], metavar="N",
                        help="tokens, in_features, out_features")  # fmt: skip
    parser.add_argument("--block-sizes", type=int, nargs="+", default=BLOCK_SIZES)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.5, 0.25, 0.1, 0.05])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=21)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tokens, in_features, out_features = options.shape

    print(f"{environment()}\nfp32, {tokens}x{in_features}x{out_features}, forward + backward\n")
    print("| block size | density | nn.Linear, ms | block-sparse, ms | speed-up (min - max) |")
    print("|---|---|---|---|---|")
    for block_size in options.block_sizes:
        for density in options.densities:
            row = measure(tokens, in_features, out_features, block_size, density, options.repeats)
            print(
                f"| {row.block_size} | {row.density:.2f} | {row.dense_ms:.1f} "
                f"| {row.sparse_ms:.1f} "
                f"| {row.speedup:.2f} ({row.slowest:.2f} - {row.fastest:.2f}) |",
                flush=True,
            )


if __name__ == "__main__":
    main()
