"""Train MLPs with several pairs of criteria, and time topology updates.

The table shows the callback's host time per step between updates, and the duration that an update
adds to the training.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from quality_tasks import quiet
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from sparse_lightning import SparsityCallback, sparsifier
from sparse_lightning.arguments import check_count, find_device
from sparse_lightning.bench.environment import (
    describe_environment,
    environment_line,
    prepare_device,
)
from sparse_lightning.cli import run_command
from sparse_lightning.stepping import StepWatch
from sparse_lightning.topology import BLOCK_SIZES, block_grid, check_density

# The longest gathering window is ten steps, and the steps after an update can include warm-up.
_UPDATE_INTERVAL, _UPDATES = 24, 8

# (drop, grow, token_stride); criteria differ in the statistics they gather, and so in cost.
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, as `sparse-lightning` does."""
    parser = argparse.ArgumentParser(prog="updates.py", description=__doc__)
    add = parser.add_argument
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--width", type=int, help="width of the MLPs, whose hidden layers are four times as wide; "
        "default: 4096 on CUDA, 256 on a CPU")  # fmt: skip
    add("--layers", type=int, default=4, help="number of MLPs of two layers; default: %(default)s")
    add("--tokens", type=int, help="default: 8192 on CUDA, 256 on a CPU")
    add("--block-size", type=int, choices=BLOCK_SIZES, default=64)
    add("--density", type=float, default=0.25)
    return run_command(measure_rules, parser.parse_args(arguments), parser.prog)


def measure_rules(options: argparse.Namespace) -> None:
    """Measure every pair of criteria and print a table.

    Raises:
        ValueError: for invalid options, before anything is measured.
    """
    device = find_device(options.device)
    on_cuda = device.type == "cuda"
    width = options.width or (4096 if on_cuda else 256)
    tokens = options.tokens or (8192 if on_cuda else 256)
    check_count("layers", options.layers)
    check_count("tokens", options.tokens)
    block_grid(width, width, options.block_size)
    check_density(options.density, "--density")
    prepare_device(device)
    print(environment_line(describe_environment(device)))
    print(
        f"{options.layers} MLPs {width} -> {4 * width} -> {width}, {tokens} tokens, blocks of "
        f"{options.block_size}, density {options.density:g}, AdamW\n"
    )
    print(
        "| drop | grow | token_stride | step, ms | host between updates, us "
        "| an update costs, in steps |\n|---|---|---|---|---|---|"
    )
    for rule in RULES:
        cost = measure(
            *rule,
            width=width,
            layers=options.layers,
            tokens=tokens,
            block_size=options.block_size,
            density=options.density,
            device=device,
        )
        update = f"{cost['update'] + cost['window']:.2f}"
        numbers = f"{cost['step']:.2f} | {cost['host']:.1f} | {update}"
        print(f"| {' | '.join(map(str, rule))} | {numbers} |", flush=True)


class MLPs(pl.LightningModule):
    """`layers` MLPs, width -> 4 * width -> width, on random tokens that stay on the device."""

    def __init__(self, width: int, layers: int, tokens: int) -> None:
        super().__init__()
        self.mlps = nn.Sequential(
            *(
                nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
                for _ in range(layers)
            )
        )
        self.shape = (tokens, width)

    def on_fit_start(self) -> None:
        dtype = next(self.parameters()).dtype
        self.x = torch.randn(self.shape, device=self.device, dtype=dtype)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = (self.mlps(self.x) - self.x).square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, fused=True)


@dataclass
class Clock:
    """Times of one training.

    Attributes:
        host: seconds of host time in the sparsifier's hooks per step, without synchronization.
        steps: seconds per step, including the device.
    """

    host: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class TimedStepWatch(StepWatch):
    """Step watch that times the sparsifier's work, but not the closure that computes gradients."""

    clock = Clock()

    def _read_gradients(self, optimizer: Optimizer) -> None:
        begin = time.perf_counter()
        super()._read_gradients(optimizer)
        self.clock.host[-1] += time.perf_counter() - begin

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin = time.perf_counter()
        super()._after(optimizer, args, kwargs)
        self.clock.host[-1] += time.perf_counter() - begin


class StepTimer(pl.Callback):
    """Times steps from batch start to batch start; it must precede the other callbacks."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.begin = 0.0

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self.clock.host:
            self.clock.steps.append(now - self.begin)
        self.clock.host.append(0.0)
        self.begin = time.perf_counter()


def measure(
    drop: str,
    grow: str,
    token_stride: int,
    *,
    width: int,
    layers: int,
    tokens: int,
    block_size: int,
    density: float,
    device: torch.device,
) -> dict[str, float]:
    """Train some steps and return the cost of a step and of an update.

    Returns:
        `host`: microseconds of the sparsifier's host time per step between updates.
        `step`: milliseconds of an ordinary step.
        `update`: duration added by an update, in ordinary steps.
        `window`: duration added by the gathering steps before an update, in ordinary steps.
    """
    clock = Clock()
    sparsity = SparsityCallback(
        block_size=block_size,
        density=density,
        drop=drop,
        grow=grow,
        token_stride=token_stride,
        update={"every_n_steps": _UPDATE_INTERVAL, "until": _UPDATE_INTERVAL * _UPDATES},
        drop_fraction=0.3,
        monitor=None,
    )
    with quiet():
        trainer = pl.Trainer(
            max_steps=_UPDATE_INTERVAL * _UPDATES + 2,
            accelerator=device.type if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision="bf16-true" if device.type == "cuda" else "32-true",
            callbacks=[StepTimer(clock), sparsity],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        data = TensorDataset(torch.arange(trainer.max_steps))
        watch = type("TimedStepWatch", (TimedStepWatch,), {"clock": clock})
        with mock.patch.object(sparsifier, "StepWatch", watch):
            trainer.fit(MLPs(width, layers, tokens), DataLoader(data))

    assert sparsity.sparsifier is not None
    window = sparsity.sparsifier.window
    steps: dict[str, list[int]] = {"ordinary": [], "window": [], "update": []}
    for i in range(_UPDATE_INTERVAL, len(clock.steps)):  # the first interval compiles kernels
        until_update = -(i + 1) % _UPDATE_INTERVAL
        if i < _UPDATE_INTERVAL * _UPDATES:
            in_window = until_update < window
            kind = "update" if not until_update else "window" if in_window else "ordinary"
            steps[kind].append(i)
    step = statistics.median(clock.steps[i] for i in steps["ordinary"])

    def extra(kind: str) -> float:
        if not steps[kind]:
            return 0.0
        return statistics.median(clock.steps[i] for i in steps[kind]) / step - 1

    return {
        "host": 1e6 * statistics.median(clock.host[i] for i in steps["ordinary"]),
        "step": 1e3 * step,
        "update": extra("update"),
        "window": extra("window") * max(0, window - 1),
    }


if __name__ == "__main__":
    raise SystemExit(main())
