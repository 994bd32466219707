"""Thousands of topology updates: each leaves a valid state, and no memory leaks."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sparse_lightning import SparsityCallback
from tests.callbacks.helpers import Classifier, assert_valid, loader, trainer
from tests.callbacks.test_sparsity import sparse

UPDATES = 1000
# Tensors are counted. Memory outside Python may grow by less than this; more is a leak.
MOST_GROWTH = 4 << 20


def measure() -> tuple[int, int, int]:
    """Return the number of tensors of this process, its resident bytes and its GPU bytes."""
    gc.collect()
    tensors = sum(isinstance(each, torch.Tensor) for each in gc.get_objects())
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    on_gpu = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    return tensors, resident, on_gpu


class Soak(L.Callback):
    """Checks each update, and measures memory after a tenth of the steps and at the end."""

    def __init__(self, sparsity: SparsityCallback) -> None:
        self.sparsity = sparsity
        self.moved = 0
        self.memory: list[tuple[int, int, int]] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        last, step = self.sparsity.last_update, trainer.global_step
        assert last is not None and last.step == last.number == step
        for name, update in last.layers.items():
            assert_valid(sparse(pl_module)[name], trainer.optimizers[0], 8)
            self.moved += len(update.changed)
        pl_module.losses.clear()
        if step in (UPDATES // 10, UPDATES):
            self.memory.append(measure())


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_soak(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    sparsity = SparsityCallback(
        block_size=16,
        include=["net.2"],
        grow="random",
        drop_fraction={"schedule": "constant", "initial": 0.25},
        update={"every_n_steps": 1, "until": UPDATES},
        monitor=None,
    )
    soak = Soak(sparsity)
    accelerator = "gpu" if device == "cuda" else "cpu"
    fitting = trainer(sparsity, soak, accelerator=accelerator, devices=1, max_steps=UPDATES)
    fitting.fit(Classifier(), loader(1000))
    assert soak.moved > UPDATES
    tensors, resident, on_gpu = (late - early for early, late in zip(*soak.memory, strict=True))
    assert tensors <= 0
    assert resident < MOST_GROWTH and on_gpu < MOST_GROWTH
