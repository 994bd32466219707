"""Compare the training throughput of a GPT with dense and with block-sparse MLPs in one run.

    python examples/throughput.py          # width 2048, 16 layers, 8 x 2048 tokens: for a GPU
    python examples/throughput.py --width 256 --layers 2 --heads 4 --context 256    # a quick try
    torchrun --nproc-per-node 2 examples/throughput.py    # DDP on two GPUs, one batch on each

A step is forward, backward and fused AdamW in bf16, with compiled layers. For comparison, a dense
GPT whose MLPs are narrowed by the density shows the throughput of ideal sparse MLPs without
overhead.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import time
from collections.abc import Callable

import torch
from gpt import BYTES, GPT
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sparse_lightning import sparsify


def main() -> None:
    """Print a table with one row per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {
        "width": 2048, "layers": 16, "heads": 16, "context": 2048,
        "batch": 8, "block-size": 64, "steps": 10, "rounds": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.1])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("LOCAL_RANK", "0"))
    if ranks > 1:
        if options.device == "cuda":
            options.device = f"cuda:{rank}"
            torch.cuda.set_device(rank)
        torch.distributed.init_process_group()

    steppers = {"dense": stepper(options, 1.0)}
    for density in options.densities:
        steppers[f"block-sparse, density {density}"] = stepper(options, density)
        steppers[f"dense, MLPs {density} as wide"] = stepper(options, density, narrow=True)
    # The models alternate, so that all run under the same conditions of the machine.
    rounds = [
        {name: seconds_per_step(step, options) for name, step in steppers.items()}
        for _ in range(options.rounds)
    ]
    if ranks > 1:
        # Delete the DDP models first: if their destructor destroyed the group, it would wait for a
        # thread of the group that waits for the GIL.
        steppers.clear()
        gc.collect()
        torch.distributed.destroy_process_group()
    if rank:
        return
    tokens = ranks * options.batch * options.context
    print("| MLPs | tokens per second | speed-up |\n|---|---|---|")
    for name in rounds[0]:
        seconds = statistics.median(times[name] for times in rounds)
        speedup = statistics.median(times["dense"] / times[name] for times in rounds)
        print(f"| {name} | {tokens / seconds:,.0f} | {speedup:.2f} |")


class Loss(nn.Module):
    """The loss of a GPT as a module, because DDP must wrap the forward that computes the loss."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, windows: Tensor) -> Tensor:
        """Return bits per byte."""
        return self.model.bits_per_byte(windows)


def stepper(
    options: argparse.Namespace, density: float, *, narrow: bool = False
) -> Callable[[], None]:
    """Return a function that runs one training step of a new model."""
    torch.manual_seed(0)
    model = GPT(options.width, options.layers, options.heads, options.context)
    if narrow:
        hidden = round(4 * options.width * density / options.block_size) * options.block_size
        for block in model.blocks:
            block.mlp[0] = nn.Linear(options.width, hidden)
            block.mlp[2] = nn.Linear(hidden, options.width)
    elif density < 1:
        sparsify(model, block_size=options.block_size, density=density, include=["re:.*mlp.*"])
    device = torch.device(options.device)
    model.to(device, torch.bfloat16)
    for block in model.blocks:
        block.compile()
    loss: nn.Module = Loss(model)
    if torch.distributed.is_initialized():
        loss = DistributedDataParallel(loss, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    shape = (options.batch, options.context + 1)
    windows = torch.randint(0, BYTES, shape, device=device)

    def step() -> None:
        loss(windows).backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # compilation
        step()
    return step


def seconds_per_step(step: Callable[[], None], options: argparse.Namespace) -> float:
    """Return the mean time of some steps, including the device's work."""
    step()
    wait(options.device)
    begin = time.perf_counter()
    for _ in range(options.steps):
        step()
    wait(options.device)
    return (time.perf_counter() - begin) / options.steps


def wait(device: str) -> None:
    """Synchronize the device."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main()
