"""Compare the training speed and memory of a Llama with dense and with block-sparse layers.

    python benchmarks/llama.py                 # 1B shape, 8 x 2048 tokens, bf16: for a large GPU
    python benchmarks/llama.py --eager         # without torch.compile
    python benchmarks/llama.py --width 256 --hidden 1024 --layers 2 --heads 4 --kv-heads 2 \
        --vocabulary 1000 --batch 2 --context 64 --steps 2    # a quick try

A step is forward, backward and fused AdamW of Transformers' model, with compiled layers. The models
take turns, so that all run under the same conditions of the machine; all of them have to fit into
the device's memory, and the peak memory of a model is what it adds to that of the others. Narrow
models are dense ones whose MLPs have as many parameters as the sparse ones: the limit in time and
memory.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sparse_lightning import sparsify
from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import (
    describe_environment,
    environment_line,
    prepare_device,
)
from sparse_lightning.cli import run_command
from sparse_lightning.topology import BLOCK_SIZES, check_density

# Patterns of the layers that become block-sparse; the output head stays dense.
_MLPS, _ALL = ["gate_proj", "up_proj", "down_proj"], [r"re:model\.layers\..*"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    parser = argparse.ArgumentParser(prog="llama.py", description=__doc__.splitlines()[0])
    for name, default in {
        "width": 2048, "hidden": 8192, "layers": 16, "heads": 32, "kv-heads": 8,
        "vocabulary": 32_000, "batch": 8, "context": 2048, "steps": 10, "rounds": 3,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    add = parser.add_argument
    add("--block-sizes", type=int, nargs="+", choices=BLOCK_SIZES, default=[64, 128])
    add("--densities", type=float, nargs="*", default=[0.25, 0.1], help="of the MLPs")
    add("--all", type=float, nargs="*", default=[0.25, 0.1], help="densities of all layers")
    add("--eager", action="store_true", help="do not compile the layers")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return run_command(run, parser.parse_args(arguments), parser.prog)


def run(options: argparse.Namespace) -> None:
    """Measure every model, and print a table."""
    device = find_device(options.device)
    check_count("steps", options.steps)
    check_count("rounds", options.rounds)
    for density in (*options.densities, *options.all):
        check_density(density)
    prepare_device(device)
    print(environment_line(describe_environment(device)))
    builders: dict[str, Callable[[], nn.Module]] = {"dense": lambda: build(options)}
    for density in options.densities:
        builders |= sparse_builders(options, "MLPs", _MLPS, density)
        narrow = max(1, round(options.hidden * density / 64)) * 64
        builders[f"dense, MLPs {density:g} as wide"] = lambda n=narrow: build(options, hidden=n)
    for density in options.all:
        builders |= sparse_builders(options, "all layers", _ALL, density)

    # The layers of all models are compiled from one piece of code.
    torch._dynamo.config.recompile_limit = 8 * len(builders)
    trainings = {name: train(builder, options, device) for name, builder in builders.items()}
    rounds = [
        {
            name: seconds_per_step(step, options.steps, device)
            for name, (step, _) in trainings.items()
        }
        for _ in range(options.rounds)
    ]
    tokens = options.batch * options.context
    print("| model | tokens per second | speed-up | peak memory |\n|---|---|---|---|")
    for name, (_, memory) in trainings.items():
        seconds = statistics.median(times[name] for times in rounds)
        ratio = statistics.median(times["dense"] / times[name] for times in rounds)
        print(f"| {name} | {tokens / seconds:,.0f} | {ratio:.2f} | {memory / 2**30:.1f} GiB |")


def sparse_builders(
    options: argparse.Namespace, which: str, include: Sequence[str], density: float
) -> dict[str, Callable[[], nn.Module]]:
    """Return a function for each block size that builds a block-sparse model, by its title."""

    def builder(block_size: int) -> Callable[[], nn.Module]:
        def build_sparse() -> nn.Module:
            model = build(options)
            sparsify(model, include=include, block_size=block_size, density=density)
            return model

        return build_sparse

    return {
        f"{which} at {density:g}, blocks of {size}": builder(size) for size in options.block_sizes
    }


def build(options: argparse.Namespace, hidden: int | None = None) -> nn.Module:
    """Return a dense model in bf16."""
    config = LlamaConfig(
        hidden_size=options.width,
        intermediate_size=hidden or options.hidden,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.kv_heads,
        vocab_size=options.vocabulary,
        use_cache=False,
    )
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    return model


def train(
    builder: Callable[[], nn.Module], options: argparse.Namespace, device: torch.device
) -> tuple[Callable[[], None], int]:
    """Return a function that runs a step of a new model, and the model's peak memory in bytes."""
    before = torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
    with device:
        model: Any = builder().train()
    if not options.eager:
        for layer in model.model.layers:
            layer.compile()
    fused = True if device.type == "cuda" else None
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=fused)
    shape = options.batch, options.context
    ids = torch.randint(options.vocabulary, shape, device=device)

    def step() -> None:
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(3):  # compiles, and creates the optimizer's state
        step()
    if device.type != "cuda":
        return step, 0
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    return step, torch.cuda.max_memory_allocated(device) - before


def seconds_per_step(step: Callable[[], None], steps: int, device: torch.device) -> float:
    """Return the mean time of some steps, including the device's work."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    step()
    wait()
    begin = time.perf_counter()
    for _ in range(steps):
        step()
    wait()
    return (time.perf_counter() - begin) / steps


if __name__ == "__main__":
    raise SystemExit(main())
