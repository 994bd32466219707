"""Compare the steps that `plan` expects with measured ones, for three models, eager and compiled.

    python benchmarks/plans.py                            # for a large GPU; takes minutes
    python benchmarks/plans.py --models mlp --modes eager

Run it in the repository's root, whose examples have the models.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import nn

from sparse_lightning import plan
from sparse_lightning.arguments import find_builder, find_device
from sparse_lightning.bench.environment import (
    describe_environment,
    environment_line,
    prepare_device,
)
from sparse_lightning.cli import run_command
from sparse_lightning.planning.costs import Check
from sparse_lightning.topology import BLOCK_SIZES

_CLOSE, _CLOSE_PEAK = 0.15, 0.1  # relative errors of an expected step and of its peak memory


class Case(NamedTuple):
    """A model to plan.

    Attributes:
        title: its row in the table.
        build: the function that builds it, as for `sparse-lightning plan`.
        inputs: its inputs, as for `plan`.
        include: patterns of the layers that become block-sparse.
        blocks: the modules that mode "compile" compiles.
    """

    title: str
    build: str
    inputs: str
    include: Sequence[str]
    blocks: Callable[[nn.Module], Iterable[nn.Module]]


CASES = {
    "gpt": Case(
        "GPT, 2048 wide, 16 layers; its MLPs",
        "examples.gpt:build",
        "8,2048,int64",
        ["re:.*mlp.*"],
        lambda model: model.blocks,
    ),
    "mlp": Case(
        "MLP, 4096 -> 16384 -> 16384",
        "examples.mlp:build",
        "8192,4096",
        ["*"],
        lambda model: [model],
    ),
    "encoder": Case(
        "Encoder, 1024 wide, 24 layers; its MLPs",
        "examples.encoder:build",
        "128,3,224,224",
        ["linear1", "linear2"],
        lambda model: model.encoder.layers,
    ),
}
MODES = ("eager", "compile")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    parser = argparse.ArgumentParser(prog="plans.py", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--models", nargs="+", choices=CASES, default=[*CASES])
    add("--modes", nargs="+", choices=MODES, default=MODES)
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=[64, 128])
    add("--densities", type=float, nargs="+", default=[0.25, 0.1])
    return run_command(run, parser.parse_args(arguments), parser.prog)


def run(options: argparse.Namespace) -> None:
    """Plan and measure every model, and print a table."""
    device = find_device(options.device)
    prepare_device(device)
    print(environment_line(describe_environment(device)))
    print(
        "| model | mode | blocks of | density | expected | measured | error | speed-up "
        "| peak memory, expected | measured | error |"
    )
    print("|" + "---|" * 11)
    checks: list[Check] = []
    for name in options.models:
        for mode in options.modes:
            checks += measure(CASES[name], mode, options)
    steps = [check.error for check in checks]
    peaks = [check.peak_error for check in checks if check.peak_error is not None]
    print()
    for what, errors, close in (("steps", steps, _CLOSE), ("peaks", peaks, _CLOSE_PEAK)):
        if not errors:  # memory is not measured on a CPU
            continue
        n = sum(abs(error) <= close for error in errors)
        print(f"{n} of {len(errors)} expected {what} are within {close:.0%} of the measured ones.")


def measure(case: Case, mode: str, options: argparse.Namespace) -> Sequence[Check]:
    """Print the rows of a model, and return its checks."""

    build_eager = find_builder("CASES", case.build)

    def build() -> nn.Module:
        model = build_eager()
        if mode == "compile":
            for block in case.blocks(model):
                block.compile()
        return model

    torch.compiler.reset()
    found = plan(
        build,
        case.inputs,
        block_sizes=options.block_sizes,
        densities=options.densities,
        include=case.include,
        device=options.device,
        check="all",
    )
    assert found.dense.step is not None
    print(
        f"| {case.title} | {mode} | dense | | | {1e3 * found.dense.step:.1f} ms | | 1 "
        f"| | {_gibibytes(found.dense.peak)} | |"
    )
    for check in found.checks:
        print(
            f"| | | {check.block_size} | {check.density:g} | {1e3 * check.expected:.1f} ms "
            f"| {1e3 * check.measured:.1f} ms | {check.error:+.1%} "
            f"| {found.dense.step / check.measured:.2f} "
            f"| {_gibibytes(check.expected_peak)} | {_gibibytes(check.measured_peak)} "
            f"| {'' if check.peak_error is None else f'{check.peak_error:+.1%}'} |",
            flush=True,
        )
    return found.checks


def _gibibytes(size: int | None) -> str:
    return "" if size is None else f"{size / 2**30:.1f} GiB"


if __name__ == "__main__":
    raise SystemExit(main())
