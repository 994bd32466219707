"""The options of `sparse-lightning bench callback`, and what it prints."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import torch

from sparse_lightning.bench.environment import as_line, describe
from sparse_lightning.bench.options import check_count, find_device, prepare
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_density

# (drop, grow, token_stride): what is gathered differs, and so does what it costs.
RULES = (
    ("magnitude", "none", 1),
    ("magnitude", "random", 1),
    ("magnitude", "gradient", 1),
    ("magnitude", "gradient", 8),
    ("magnitude", "momentum", 1),
    ("magnitude", "momentum", 8),
    ("saliency", "gradient", 1),
    ("movement", "none", 1),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--width", type=int, help="of the MLPs, which are four times as wide within; "
        "4096 on CUDA, 256 on a CPU")  # fmt: skip
    add("--layers", type=int, default=4, help="MLPs of two layers")
    add("--tokens", type=int, help="8192 on CUDA, 256 on a CPU")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=64)
    add("--density", type=float, default=0.25)


def run(options: argparse.Namespace) -> None:
    """Measure and print a table.

    Raises:
        ValueError: for options that do not fit together, before anything is measured.
    """
    device = find_device(options.device)
    on_cuda = device.type == "cuda"
    width = options.width or (4096 if on_cuda else 256)
    tokens = options.tokens or (8192 if on_cuda else 256)
    check_count("layers", options.layers)
    check_count("tokens", options.tokens)
    block_grid(width, width, options.block_size)
    check_density(options.density, "--density")
    prepare(device)
    print(as_line(describe(device)))
    print(
        f"{options.layers} MLPs {width} -> {4 * width} -> {width}, {tokens} tokens, blocks of "
        f"{options.block_size}, density {options.density:g}, AdamW\n"
    )
    for line in _table(
        width=width,
        layers=options.layers,
        tokens=tokens,
        block_size=options.block_size,
        density=options.density,
        device=device,
    ):
        print(line, flush=True)


def _table(**kwargs: Any) -> Iterator[str]:
    # Lightning, which other commands do without.
    from sparse_lightning.bench.callback import measure

    yield (
        "| drop | grow | token_stride | step, ms | host between updates, us "
        "| an update costs, in steps |"
    )
    yield "|---|---|---|---|---|---|"
    for rule in RULES:
        cost = measure(*rule, **kwargs)
        update = f"{cost['update'] + cost['window']:.2f}"
        numbers = f"{cost['step']:.2f} | {cost['host']:.1f} | {update}"
        yield f"| {' | '.join(map(str, rule))} | {numbers} |"
