"""`sparse-lightning tune`: time every kind of kernel, and save the table for the kernel choice."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch

from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import describe_environment, prepare_device
from sparse_lightning.bench.problem import Contender, Problem
from sparse_lightning.bench.timing import device_times, speedup
from sparse_lightning.files import check_writable, write_text
from sparse_lightning.kernels import choice
from sparse_lightning.kernels.choice import STEP, Measured, Shape
from sparse_lightning.topology import BLOCK_SIZES

# (tokens, in_features, out_features): few, some and many tokens, and the two layers of an MLP.
SHAPES: dict[torch.dtype, tuple[Shape, ...]] = {
    torch.bfloat16: (
        (256, 1024, 1024),
        (2048, 2048, 2048),
        (8192, 4096, 4096),
        (32768, 1024, 4096),
        (32768, 4096, 1024),
    ),
    torch.float32: ((256, 1024, 1024), (2048, 2048, 2048)),
}
DENSITIES = (0.75, 0.5, 0.25, 0.1, 0.05, 0.02)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--device", default="cuda")
    add(
        "--repeats",
        type=int,
        default=11,
        help="rounds of which the median is taken; default: %(default)s",
    )
    add("--output", type=Path, metavar="FILE",
        help="default: the file that training on this machine reads")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Measure, print and save the table.

    Raises:
        ValueError: for wrong options, before anything is measured.
        AssertionError: if the result of a kernel is wrong.
    """
    device = find_device(options.device) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda":
        raise ValueError(
            f"`--device` must be an available CUDA GPU; got '{options.device}'. "
            "On a CPU there is nothing to tune."
        )
    check_count("repeats", options.repeats)
    path = options.output or choice.user_table_file(torch.cuda.get_device_name(device))
    with suppress(OSError):  # reported by the check
        path.parent.mkdir(parents=True, exist_ok=True)
    check_writable(path, "--output")
    prepare_device(device)

    rows = []
    print(f"| op | dtype | B | tokens x in x out | density | {' | '.join(choice.KINDS)} |")
    print("|" + "---|" * (5 + len(choice.KINDS)))
    for row in measure_all(SHAPES, BLOCK_SIZES, DENSITIES, device, options.repeats):
        rows.append(row)
        print(table_row(row), flush=True)
    write_table(path, rows, describe_environment(device))
    choice.clear_table_cache()
    print(f"\nSaved in {path}")


def measure_all(
    shapes: dict[torch.dtype, tuple[Shape, ...]],
    block_sizes: Sequence[int],
    densities: Sequence[float],
    device: torch.device,
    repeats: int,
) -> Iterator[Measured]:
    """Yield the measurement of each product as soon as it is made."""
    for dtype, dtype_shapes in shapes.items():
        for shape in dtype_shapes:
            for block_size in block_sizes:
                for density in densities:
                    problem = Problem(
                        shape, block_size, density, dtype=dtype, device=device, seed=0
                    )
                    for op in STEP:
                        yield measure(problem, op, repeats)
                yield measure(problem, "norms", repeats)


def measure(problem: Problem, op: str, repeats: int) -> Measured:
    """Check every kind of kernel, then time all kinds and the dense product in alternation.

    Raises:
        AssertionError: if the result of a kind is wrong; the message names the kind.
    """
    layer, x = problem.layer, problem.x
    capability = torch.cuda.get_device_capability(x.device)
    kinds = choice.available_kinds(op, x.dtype, capability)
    contenders = {}
    for kind in kinds:
        ours = problem.ours(op)
        contenders[kind] = _forced(kind, ours)
        try:
            problem.check(op, Contender(contenders[kind], ours.read))
        except AssertionError as error:
            raise AssertionError(
                f"{op} by {kind} kernels with blocks of {layer.block_size} at density "
                f"{layer.density:.2f} is wrong: {error}"
            ) from None
    dense, *samples = device_times([problem.dense(op).run, *contenders.values()], repeats, x.device)
    speedups = {kind: speedup(dense, times) for kind, times in zip(kinds, samples, strict=True)}
    return Measured(
        op=op,
        dtype=choice.DTYPES[x.dtype],
        block_size=layer.block_size,
        shape=(x.shape[0], layer.in_features, layer.out_features),
        density=1.0 if op == "norms" else layer.density,
        speedups={kind: round(ratio, 3) for kind, ratio in speedups.items()},
    )


def write_table(path: Path, rows: Sequence[Measured], environment: dict[str, str]) -> None:
    """Write measurements and their environment for `choice.read_table`."""
    lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    write_text(path, f'{{"environment": {json.dumps(environment)},\n "rows": [\n{lines}\n ]}}\n')


def _forced(kind: str, contender: Contender) -> Callable[[], object]:
    def run() -> object:
        with choice.forced(kind):
            return contender.run()

    return run


def table_row(row: Measured) -> str:
    """Return a row of the Markdown table; the last columns are speed-ups over the dense product."""
    shape = "x".join(map(str, row.shape))
    cells = [row.op, row.dtype, str(row.block_size), shape, f"{row.density:.2f}"]
    cells += [f"{row.speedups[k]:.2f}" if k in row.speedups else "n/a" for k in choice.KINDS]
    return f"| {' | '.join(cells)} |"
