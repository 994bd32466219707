"""Options and output of `sparse-lightning bench kernels`."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path

import torch

from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import (
    describe_environment,
    environment_line,
    prepare_device,
)
from sparse_lightning.bench.kernels import Row, measure_all, table_head, table_row
from sparse_lightning.bench.peers import PEERS, installed_peers
from sparse_lightning.bench.problem import OPS
from sparse_lightning.files import check_writable, write_text
from sparse_lightning.nm_pattern import PATTERNS
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_density

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


EXAMPLES = """examples:
  all products, on this machine's GPU or CPU:
    sparse-lightning bench kernels
  the densities at which blocks of 64 are faster than dense, as a plot:
    sparse-lightning bench kernels --block-sizes 64 --plot speed.png
  few tokens, as in generation:
    sparse-lightning bench kernels --ops fwd --tokens 1 16 64 256 1024 8192 --peers none
  2:4 sparse blocks, beside PyTorch's 2:4 sparse matrices:
    sparse-lightning bench kernels --nm 2:4 --densities 1 .5 .25 --block-sizes 64 128
  whole layers of another shape:
    sparse-lightning bench kernels --shape 16384 2048 8192 --ops layer --densities .25 .1
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--shape", type=int, nargs=3, metavar=("TOKENS", "IN", "OUT"),
        help="default: 8192 4096 4096 on CUDA, 1024 1024 1024 on a CPU")  # fmt: skip
    add("--tokens", type=int, nargs="+", metavar="N", help="numbers of tokens, in place of the "
        "shape's")  # fmt: skip
    ops = "; ".join(f"{name}: {description}" for name, description in OPS.items())
    add("--ops", nargs="+", choices=OPS, metavar="OP",
        help=f"default: fwd dx dw on CUDA, layer on a CPU. {ops}")  # fmt: skip
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=BLOCK_SIZES, metavar="B")
    add("--densities", type=float, nargs="+", default=(0.5, 0.25, 0.1, 0.05), metavar="D",
        help="densities in (0, 1]")  # fmt: skip
    add("--nm", choices=PATTERNS, help="keep two of each four weights within blocks")
    add("--dtype", choices=_DTYPES, help="default: bf16 on CUDA, fp32 on a CPU")
    add("--peers", nargs="+", choices=(*PEERS, "none"), metavar="PEER",
        help=f"other libraries to time, on CUDA: {', '.join(PEERS)}, or none; "
        "default: all that are installed")  # fmt: skip
    add(
        "--repeats",
        type=int,
        default=21,
        help="rounds of which the median is taken; default: %(default)s",
    )
    add("--threads", type=int, help="CPU threads; default: PyTorch's")
    add("--seed", type=int, default=0)
    add("--json", type=Path, metavar="FILE", help="write the environment and the rows")
    add("--plot", type=Path, metavar="FILE", help="plot speed-up over density (needs matplotlib)")


def run(options: argparse.Namespace) -> None:
    """Measure, print and write the rows.

    Raises:
        ValueError: for incompatible options, before anything is measured.
        AssertionError: if the result of a kernel is wrong.
    """
    device = find_device(options.device)
    on_cuda = device.type == "cuda"
    shape = tuple(options.shape or ((8192, 4096, 4096) if on_cuda else (1024, 1024, 1024)))
    ops = options.ops or (["fwd", "dx", "dw"] if on_cuda else ["layer"])
    dtype_name = options.dtype or ("bf16" if on_cuda else "fp32")
    peers = (
        []
        if options.peers == ["none"]
        else options.peers or (installed_peers(options.nm) if on_cuda else [])
    )
    tokens = options.tokens or shape[:1]
    _check(options, device, (*tokens, *shape[1:]), peers)
    prepare_device(device)
    if options.threads:
        torch.set_num_threads(options.threads)

    environment = describe_environment(device)
    sizes = [", ".join(map(str, tokens)), *map(str, shape[1:])]
    pattern = "" if options.nm is None else f", {options.nm} within blocks, FLOPs of kept weights"
    title = f"{' x '.join(sizes)} (tokens x in x out), {dtype_name}{pattern}"
    print(environment_line(environment))
    print(f"{title}; speed-up: dense time / time, measured in the same run\n\n{table_head(peers)}")
    rows: list[Row] = []
    for row in measure_all(
        tokens, shape[1:], ops, options.block_sizes, options.densities,
        dtype=_DTYPES[dtype_name], device=device, peers=peers,
        repeats=options.repeats, seed=options.seed, nm=options.nm,
    ):  # fmt: skip
        rows.append(row)
        print(table_row(row), flush=True)
    for remark in dict.fromkeys(f"{k}: {v}" for row in rows for k, v in row.remarks.items()):
        print(f"\nn/a: {remark}", end="")
    print()

    if options.json:
        content = {
            "environment": environment,
            "tokens": tokens,
            "features": shape[1:],
            "dtype": dtype_name,
            "nm": options.nm,
            "repeats": options.repeats,
            "seed": options.seed,
            "rows": [row.as_dict() for row in rows],
        }
        write_text(options.json, json.dumps(content, indent=1) + "\n")
    if options.plot:
        from sparse_lightning.bench.plot import plot

        plot(rows, environment, title, options.plot)


def _check(
    options: argparse.Namespace, device: torch.device, sizes: tuple[int, ...], peers: list[str]
) -> None:
    check_count("repeats", options.repeats)
    check_count("threads", options.threads)
    *tokens, in_features, out_features = sizes
    if min(tokens) < 1:
        name = "--tokens" if options.tokens else "--shape"
        raise ValueError(f"`{name}` must have at least one token; got {min(tokens)}.")
    for block_size in options.block_sizes:
        block_grid(out_features, in_features, block_size)
    for density in options.densities:
        check_density(density, "--densities")
    if peers and device.type != "cuda":
        raise ValueError("`--peers` must be none on a CPU: these libraries run on CUDA only.")
    for name in peers:
        if name not in installed_peers(options.nm) and name in installed_peers("2:4"):
            raise ValueError(f"`--peers` must multiply whole blocks; got '{name}'. Give --nm 2:4.")
        if name not in installed_peers(options.nm):
            raise ValueError(f"`--peers` must be installed; got '{name}', which is not installed.")
    for option, path in (("--json", options.json), ("--plot", options.plot)):
        if path is not None:
            check_writable(path, option)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError(
            "`--plot` needs matplotlib, which is not installed. "
            "Install it with: pip install 'sparse-lightning[examples]'"
        )
    if options.plot and len(tokens) > 1:
        raise ValueError(f"`--plot` must come with one number of tokens; got {tokens}.")
    if options.plot:
        from sparse_lightning.bench.plot import check_format

        check_format(options.plot)
