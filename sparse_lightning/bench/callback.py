"""What dynamic sparsity costs in a real training: between updates, and at one."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from sparse_lightning import sparsifier
from sparse_lightning.bench.quality_fit import quiet
from sparse_lightning.callbacks import SparsityCallback
from sparse_lightning.stepping import StepWatch

# The longest window is ten steps, and the steps after an update may still warm up grown blocks.
_EVERY, _UPDATES = 24, 8


class Mlps(pl.LightningModule):
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
        host: seconds that the hooks took in each step, without waiting for the device.
        steps: seconds that each step took, the device included.
    """

    host: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


class Timed(StepWatch):
    """Sees an optimizer's steps, with a clock around what is done at each.

    The closure, which makes the gradients, is not among it.
    """

    clock = Clock()

    def _read_gradients(self, optimizer: Optimizer) -> None:
        begin = time.perf_counter()
        super()._read_gradients(optimizer)
        self.clock.host[-1] += time.perf_counter() - begin

    def _after(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin = time.perf_counter()
        super()._after(optimizer, args, kwargs)
        self.clock.host[-1] += time.perf_counter() - begin


class Steps(pl.Callback):
    """Stands before the other: it sees where a step begins, and so where the last one ended."""

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
    """Train some steps and return what a step and an update cost.

    Returns:
        `host`: microseconds of the host that a step takes beside the training, between updates;
        `step`: milliseconds of such a step; `update`: that an update adds, in such steps; `window`:
        that the steps which gather for an update add, all together, in such steps.
    """
    clock = Clock()
    sparsity = SparsityCallback(
        block_size=block_size,
        density=density,
        drop=drop,
        grow=grow,
        token_stride=token_stride,
        update={"every_n_steps": _EVERY, "until": _EVERY * _UPDATES},
        drop_fraction=0.3,
        monitor=None,
    )
    with quiet():
        trainer = pl.Trainer(
            max_steps=_EVERY * _UPDATES + 2,
            accelerator=device.type if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            precision="bf16-true" if device.type == "cuda" else "32-true",
            callbacks=[Steps(clock), sparsity],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        numbers = torch.arange(trainer.max_steps)
        timed = type("Timed", (Timed,), {"clock": clock})
        with mock.patch.object(sparsifier, "StepWatch", timed):
            trainer.fit(Mlps(width, layers, tokens), DataLoader(TensorDataset(numbers)))

    assert sparsity.sparsifier is not None
    window = sparsity.sparsifier.window
    kinds: dict[str, list[int]] = {"ordinary": [], "window": [], "update": []}
    for i in range(_EVERY, len(clock.steps)):  # the first round compiles kernels
        before = -(i + 1) % _EVERY  # the next update comes after so many steps
        if i < _EVERY * _UPDATES:
            kind = "update" if not before else "window" if before < window else "ordinary"
            kinds[kind].append(i)
    step = statistics.median(clock.steps[i] for i in kinds["ordinary"])

    def extra(kind: str) -> float:
        if not kinds[kind]:
            return 0.0
        return statistics.median(clock.steps[i] for i in kinds[kind]) / step - 1

    return {
        "host": 1e6 * statistics.median(clock.host[i] for i in kinds["ordinary"]),
        "step": 1e3 * step,
        "update": extra("update"),
        "window": extra("window") * max(0, window - 1),
    }
