"""`sparse-lightning`: the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from sparse_lightning import inspection
from sparse_lightning.bench import callback_command as callback
from sparse_lightning.bench import command as bench
from sparse_lightning.bench import quality_command as quality
from sparse_lightning.bench import tune
from sparse_lightning.export import command as export
from sparse_lightning.planning import command as planning
from sparse_lightning.report import command as report

WAY = """the way of a model:
  sparse-lightning plan project.model:build --input 8,2048,int64    what would it save?
  (train it, with SparsityCallback among the trainer's callbacks)
  sparse-lightning report lightning_logs/version_0 --open           what became of its blocks?
  sparse-lightning inspect last.ckpt                                what is in the checkpoint?
  sparse-lightning export last.ckpt --to dense                      out of sparsity again

'sparse-lightning COMMAND --help' tells more, with examples.
Exit status: 0; 1 for a failure; 2 for wrong options.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; return the exit status: 0, 1 for a failure, 2 for wrong options."""
    parser = argparse.ArgumentParser(
        prog="sparse-lightning",
        description="Block-sparse training for PyTorch Lightning.",
        epilog=WAY,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add(
        commands,
        "plan",
        planning,
        "say what block-sparse layers would save a model",
        "Say which layers of a model would be block-sparse, and, for each block size and density, "
        "what memory, FLOPs and step would be, before anything is trained. The model is not "
        "changed.",
    )
    benchmarks = commands.add_parser("bench", help="measure this machine").add_subparsers(
        required=True, metavar="WHAT"
    )
    _add(
        benchmarks,
        "kernels",
        bench,
        "time the products of a block-sparse layer",
        "Time the products of a block-sparse layer against the dense ones, and against "
        "other libraries that are installed. A row is printed only after its results are right.",
    )
    _add(
        benchmarks,
        "callback",
        callback,
        "time what topology updates cost",
        "Train MLPs by Lightning with each pair of rules, and time what the callback "
        "takes of the host between updates, and what an update adds to the training.",
    )
    _add(
        benchmarks,
        "quality",
        quality,
        "train sparse and dense networks, and compare what they learn",
        "Train small networks with each sparse method, and dense ones of the same "
        "size or cost, over several seeds, and print mean and spread of what they reach.",
    )
    _add(
        commands,
        "tune",
        tune,
        "find the fastest kernels for this machine's GPU",
        "Time every kind of kernels on this machine's GPU, at every product, block "
        "size and density, and save which is the fastest where: training uses it from then on. "
        "Takes some minutes.",
    )
    _add(
        commands,
        "export",
        export,
        "take a trained model out of block sparsity",
        "Write the weights of a checkpoint with block-sparse layers in a form that needs no "
        "sparse_lightning. No file is replaced unless --force says so.",
    )
    _add(
        commands,
        "inspect",
        inspection,
        "look into a checkpoint",
        "List the block-sparse layers of a checkpoint, and what the training was told; or show "
        "the block mask of one.",
    )
    _add(
        commands,
        "report",
        report,
        "show what became of a training's blocks, as one HTML file",
        "Write an HTML page from what a training recorded: how the block masks of every layer "
        "changed, and everything that was logged beside it. Needs neither a GPU nor a network.",
    )
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except ValueError as error:
        print(f"sparse-lightning: error: {error}", file=sys.stderr)
        return 2
    except (AssertionError, OSError, RuntimeError) as error:
        # A wrong result; a full disk; no CuPy, no memory left.
        print(f"sparse-lightning: {error}", file=sys.stderr)
        return 1
    return 0


def _add(commands: Any, name: str, module: ModuleType, what: str, description: str) -> None:
    """Add a command that a module declares the options of, and runs; perhaps with examples."""
    examples = getattr(module, "EXAMPLES", None)
    style = argparse.RawDescriptionHelpFormatter if examples else argparse.HelpFormatter
    parser = commands.add_parser(
        name, help=what, description=description, epilog=examples, formatter_class=style
    )
    module.add_arguments(parser)
    parser.set_defaults(run=module.run)
