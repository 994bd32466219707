"""The options of `sparse-lightning plan`, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from sparse_lightning.bench.environment import as_line, describe
from sparse_lightning.bench.options import find_device
from sparse_lightning.names import DEFAULT_EXCLUDE
from sparse_lightning.planning.measure import PRECISIONS
from sparse_lightning.planning.planner import CHECKS, DENSITIES, DISTRIBUTIONS, plan
from sparse_lightning.tables import show
from sparse_lightning.targets import builder
from sparse_lightning.topology import BLOCK_SIZES

EXAMPLES = """how:
  With --input, the dense model makes some training steps on the device, and each of its products
  that block-sparse layers would take is timed. How fast these would be is in a table, where
  `sparse-lightning tune` has been on such a GPU; elsewhere they are timed too, one by one, for
  every block size and density. --check says how far off the expected steps are.

examples:
  which layers would be block-sparse, memory and FLOPs; nothing is measured, and no memory needed
  for a model whose build() can run on PyTorch's meta device:
    sparse-lightning plan project.model:build
  also step times, for batches of 8 sequences of 2048 tokens:
    sparse-lightning plan project.model:build --input 8,2048,int64
  only the MLPs, with blocks of 64 and 128; and try the fastest choice:
    sparse-lightning plan project.model:build --input 8,2048,int64 \\
        --include "re:.*mlp.*" --block-sizes 64 128 --check
  how good the expected steps are, for one choice of a model of two inputs:
    sparse-lightning plan project.model:build --input 64,3,224,224 --input 64,10 \\
        --block-sizes 32 --densities .1 --check
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("model", metavar="MODULE:FUNCTION",
        help="what builds the dense model; it is called without arguments. Modules in the current "
        "folder are found")  # fmt: skip
    add("--input", action="append", metavar="SIZES", default=[],
        help="sizes of an input of the model in training, and a dtype, if it is not float32: "
        "8,2048,int64. Once for each input; integers will be 0 and 1")  # fmt: skip
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=BLOCK_SIZES, metavar="B",
        help=f"default: {' '.join(map(str, BLOCK_SIZES))}")  # fmt: skip
    add("--densities", type=float, nargs="+", default=DENSITIES, metavar="D",
        help="shares of present blocks, in (0, 1]; "
        f"default: {' '.join(f'{d:g}' for d in DENSITIES)}")  # fmt: skip
    add("--include", nargs="+", default=("*",), metavar="PATTERN",
        help="layers to take, as the callback's `include`; default: all")  # fmt: skip
    add("--exclude", nargs="*", default=DEFAULT_EXCLUDE, metavar="PATTERN",
        help=f"layers to leave dense; default: {' '.join(DEFAULT_EXCLUDE)}")  # fmt: skip
    add("--distribution", choices=DISTRIBUTIONS, default=DISTRIBUTIONS[0],
        help="how layers share the density; default: %(default)s")  # fmt: skip
    add("--follow", nargs="+", default=(), metavar="COPY=ORIGINAL",
        help="copies of other modules, where weights do not tell: target=net")  # fmt: skip
    add("--precision", choices=PRECISIONS, default=None,
        help="as Lightning's; default: bf16-mixed on CUDA, 32-true on a CPU")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--check", nargs="?", choices=CHECKS, const="best", default=None,
        help="also train with the fastest choice for some steps, or with all, and compare the "
        "measured step with the expected one")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Make a plan, and print it.

    Raises:
        ValueError: for options, or a model, of which no plan can be made.
        RuntimeError: if memory ends, or the model cannot be trained.
    """
    device = find_device(options.device)
    build = builder("MODULE:FUNCTION", options.model)
    if options.input:
        print(f"{as_line(describe(device))}\n", flush=True)
    found = plan(
        build,
        options.input,
        block_sizes=options.block_sizes,
        densities=options.densities,
        include=options.include,
        exclude=options.exclude,
        distribution=options.distribution,
        follow=_pairs(options.follow),
        precision=options.precision,
        device=device,
        check=options.check,
    )
    show(found.sections())


def _pairs(follow: Iterable[str]) -> dict[str, str]:
    """Return what follows what, by module.

    >>> _pairs(["target=net", "teacher=student"])
    {'target': 'net', 'teacher': 'student'}
    """
    pairs = [pair.partition("=") for pair in follow]
    for copy, _, original in pairs:
        if not (copy and original):
            raise ValueError(
                f"`--follow` must be the names of two modules, COPY=ORIGINAL; got '{copy}'. "
                "Write target=net."
            )
    return {copy: original for copy, _, original in pairs}
