"""`sparse-lightning`: the command-line interface."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

from sparse_lightning import env, inspection
from sparse_lightning.bench import command as bench
from sparse_lightning.bench import tune
from sparse_lightning.export import command as export
from sparse_lightning.planning import command as planning
from sparse_lightning.report import command as report

WORKFLOW = """typical workflow:
  sparse-lightning plan project.model:build --input 8,2048,int64    what would sparsity save?
  (train the model with SparsityCallback among the trainer's callbacks)
  sparse-lightning report lightning_logs/version_0 --open           how did the blocks change?
  sparse-lightning report multirun/2026-12-01/12-00-00 --open       which run of a sweep is best?
  sparse-lightning inspect last.ckpt                                what is in the checkpoint?
  sparse-lightning export last.ckpt --to dense                      back to dense weights

'sparse-lightning COMMAND --help' describes a command, with examples.
Exit status: 0; 1 for a failure; 2 for wrong options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, 1 for a failure, 2 for wrong options."""
    parser = argparse.ArgumentParser(
        prog="sparse-lightning",
        description="Block-sparse training for PyTorch Lightning.",
        epilog=WORKFLOW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(
        commands,
        "plan",
        planning,
        "show what block-sparse layers would save for a model",
        "Show which layers of a model can be block-sparse, and the memory, FLOPs and expected step "
        "time for each block size and density, without training it. The model is not modified.",
    )
    benchmarks = commands.add_parser("bench", help="benchmark this machine").add_subparsers(
        required=True, metavar="BENCHMARK"
    )
    _add(
        benchmarks,
        "kernels",
        bench,
        "time the products of a block-sparse layer",
        "Time the products of a block-sparse layer against the dense products and against other "
        "installed libraries. A row is printed only after its results have been verified.",
    )
    _add(
        commands,
        "tune",
        tune,
        "find the fastest kernels for this machine",
        "Time every kind of kernel on this machine's GPU, or every method of its CPU, for every "
        "product, block size and density, and save the table that training uses to choose among "
        "them. Takes minutes.",
    )
    _add(
        commands,
        "export",
        export,
        "convert a trained model to dense weights",
        "Write the weights of a checkpoint with block-sparse layers in a format that does not need "
        "sparse_lightning. Existing files are replaced only with --force.",
    )
    _add(
        commands,
        "inspect",
        inspection,
        "show the contents of a checkpoint",
        "List the block-sparse layers of a checkpoint and the configuration of the training, or "
        "show the block mask of one layer.",
    )
    _add(
        commands,
        "report",
        report,
        "show how the blocks changed in a training, or compare trainings, as one HTML file",
        "Write an HTML page from the history of a training: how the block masks of all layers "
        "changed, and the metrics that were logged. Several trainings are compared on one page. "
        "Needs neither a GPU nor a network.",
    )
    _add(
        commands,
        "env",
        env,
        "show the versions and devices that a bug report needs",
        "Show the versions of this package and of the packages it uses, the operating system, the "
        "CPU, the GPUs, and the folder of compiled kernels. What is missing or broken is named.",
    )
    options = parser.parse_args(arguments)
    return run_command(options.run, options, parser.prog)


def run_command(
    run: Callable[[argparse.Namespace], None], options: argparse.Namespace, program: str
) -> int:
    """Call `run(options)`; print an expected error, and return the exit status.

    Args:
        run: the command.
        options: its parsed options.
        program: name of the program in error messages.
    """
    try:
        run(options)
    except ValueError as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 2
    except (AssertionError, OSError, RuntimeError) as error:
        # A kernel's result is wrong, the disk is full, CuPy is missing, memory is exhausted, ...
        print(f"{program}: {error}", file=sys.stderr)
        return 1
    return 0


def _add(commands: Any, name: str, module: ModuleType, summary: str, description: str) -> None:
    """Add a command whose module defines `add_arguments`, `run` and, optionally, `EXAMPLES`."""
    examples = getattr(module, "EXAMPLES", None)
    style = argparse.RawDescriptionHelpFormatter if examples else argparse.HelpFormatter
    parser = commands.add_parser(
        name, help=summary, description=description, epilog=examples, formatter_class=style
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)


if __name__ == "__main__":
    sys.exit(main())
