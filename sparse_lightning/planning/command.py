"""Options and output of `sparse-lightning plan`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable

import torch

from sparse_lightning.arguments import find_builder, find_device
from sparse_lightning.bench.environment import describe_environment, environment_line
from sparse_lightning.names import DEFAULT_EXCLUDE
from sparse_lightning.nm_pattern import PATTERNS
from sparse_lightning.planning.measure import PRECISIONS
from sparse_lightning.planning.planner import CHECKS, DENSITIES, DISTRIBUTIONS, plan
from sparse_lightning.tables import show
from sparse_lightning.topology import BLOCK_SIZES

EXAMPLES = """method:
  With --input, some training steps of the dense model are run on the device, and the products that
  block-sparse layers would replace are timed. The speed of block-sparse products is taken from the
  table of `sparse-lightning tune` if there is one for the GPU; otherwise each product is timed for
  every block size and density. --check measures the error of the expected steps.

examples:
  layers that can be block-sparse, memory and FLOPs; nothing is measured, and no memory is needed
  if build() can run on PyTorch's meta device:
    sparse-lightning plan project.model:build
  also step times, for batches of 8 sequences of 2048 tokens:
    sparse-lightning plan project.model:build --input 8,2048,int64
  only the MLPs, with blocks of 64 and 128; and measure the fastest setting:
    sparse-lightning plan project.model:build --input 8,2048,int64 \\
        --include "re:.*mlp.*" --block-sizes 64 128 --check
  memory with only two of each four weights within blocks:
    sparse-lightning plan project.model:build --nm 2:4
  the error of the expected step for one setting of a model with two inputs:
    sparse-lightning plan project.model:build --input 64,3,224,224 --input 64,10 \\
        --block-sizes 32 --densities .1 --check
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("model", metavar="MODULE:FUNCTION",
        help="a function without arguments that builds the dense model. Modules in the current "
        "folder are found")  # fmt: skip
    add("--input", action="append", metavar="SIZES", default=[],
        help="sizes of a model input in training, and a dtype if it is not float32: "
        "8,2048,int64. Repeat for each input; random integers are 0 or 1")  # fmt: skip
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=BLOCK_SIZES, metavar="B",
        help=f"default: {' '.join(map(str, BLOCK_SIZES))}")  # fmt: skip
    add("--densities", type=float, nargs="+", default=DENSITIES, metavar="D",
        help="densities in (0, 1]; "
        f"default: {' '.join(f'{d:g}' for d in DENSITIES)}")  # fmt: skip
    add("--nm", choices=PATTERNS, default=None,
        help="keep two of each four weights within blocks, which halves parameters and memory; the "
        "expected time is about that of whole blocks, which kernels multiply")  # fmt: skip
    add("--include", nargs="+", default=("*",), metavar="PATTERN",
        help="layers to make block-sparse, as in the callback; default: all")  # fmt: skip
    add("--exclude", nargs="*", default=DEFAULT_EXCLUDE, metavar="PATTERN",
        help=f"layers to keep dense; default: {' '.join(DEFAULT_EXCLUDE)}")  # fmt: skip
    add("--distribution", choices=DISTRIBUTIONS, default=DISTRIBUTIONS[0],
        help="how layers share the density; default: %(default)s")  # fmt: skip
    add("--follow", nargs="+", default=(), metavar="COPY=SOURCE",
        help="copies of other modules that cannot be recognised by their weights: "
        "target=net")  # fmt: skip
    add("--precision", choices=PRECISIONS, default=None,
        help="as in Lightning; default: bf16-mixed on CUDA, 32-true on a CPU")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--check", nargs="?", choices=CHECKS, const="best", default=None,
        help="also measure some training steps with the fastest setting, or with all, and compare "
        "them with the expected step")  # fmt: skip


def run(options: argparse.Namespace) -> None:
    """Make a plan and print it.

    Raises:
        ValueError: for options or a model for which no plan can be made.
        RuntimeError: if memory is exhausted, or the model cannot be trained.
    """
    device = find_device(options.device)
    build = find_builder("MODULE:FUNCTION", options.model)
    if options.input:
        print(f"{environment_line(describe_environment(device))}\n", flush=True)
    result = plan(
        build,
        options.input,
        block_sizes=options.block_sizes,
        densities=options.densities,
        nm=options.nm,
        include=options.include,
        exclude=options.exclude,
        distribution=options.distribution,
        follow=_parse_follow(options.follow),
        precision=options.precision,
        device=device,
        check=options.check,
    )
    show(result.sections())


def _parse_follow(follow: Iterable[str]) -> dict[str, str]:
    """Return the source module of each copy.

    >>> _parse_follow(["target=net", "teacher=student"])
    {'target': 'net', 'teacher': 'student'}
    """
    pairs = [pair.partition("=") for pair in follow]
    for copy, _, source in pairs:
        if not (copy and source):
            raise ValueError(
                f"`--follow` must be the names of two modules, COPY=SOURCE; got '{copy}'. "
                "Write target=net."
            )
    return {copy: source for copy, _, source in pairs}
