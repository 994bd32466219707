"""The callback in a real Trainer on a GPU."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

from sparse_lightning import BlockSparseLinear, SparsityCallback
from tests.callbacks import test_resume
from tests.callbacks.helpers import Classifier, loader, trainer
from tests.examples.test_examples import load

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def fit(*more: Any, **kwargs: Any) -> Classifier:
    model = Classifier()
    sparsity = SparsityCallback(block_size=16, density=0.5, update={"every_n_steps": 5})
    trainer(sparsity, *more, max_steps=40, **kwargs).fit(model, loader())
    assert sparsity.last_update is not None
    return model


def masks(model: Classifier) -> list[torch.Tensor]:
    return [m.topology.mask.cpu() for m in model.modules() if isinstance(m, BlockSparseLinear)]


def test_a_gpu_trains_as_the_cpu_does() -> None:
    gpu, cpu = fit(accelerator="gpu", devices=1), fit(accelerator="cpu")
    torch.testing.assert_close(gpu.losses, cpu.losses, rtol=1e-3, atol=1e-4)
    for on_gpu, on_cpu in zip(masks(gpu), masks(cpu), strict=True):
        assert torch.equal(on_gpu, on_cpu)


@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    model = fit(accelerator="gpu", devices=1, precision=precision)
    assert sum(model.losses[-8:]) < 0.8 * sum(model.losses[:8])
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_loss_is_that_of_masked_dense_layers(precision: str) -> None:
    options = {"accelerator": "gpu", "devices": 1, "precision": precision}
    sparse, masked = fit(**options), fit(load("masked_dense").MaskedDense(), **options)
    tolerance = 1e-3 if precision == "32-true" else 3e-2
    torch.testing.assert_close(sparse.losses, masked.losses, rtol=tolerance, atol=tolerance)


def test_the_summary_predicts_the_speed_on_this_gpu() -> None:
    sparsity = SparsityCallback(block_size=16, density=0.5, include=["net.0"])
    model = Classifier()
    trainer(sparsity, max_steps=2, accelerator="gpu", devices=1).fit(model, loader())
    expected = model.cuda().net[0].predicted_speedup(0.5, torch.float32)
    assert sparsity.summary is not None
    assert sparsity.summary.speedup == (expected and pytest.approx(expected))


@pytest.mark.parametrize("grow", ["gradient", "momentum"])
@pytest.mark.parametrize("drop", ["gradient", "saliency", "movement"])
def test_every_rule_selects_the_same_blocks_as_on_the_cpu(drop: str, grow: str) -> None:
    def run(**kwargs: Any) -> list[torch.Tensor]:
        sparsity = SparsityCallback(
            block_size=16,
            density={"schedule": "cubic", "final": 0.25},
            drop=drop,
            grow=grow,
            update={"every_n_steps": 5},
        )
        model = Classifier()
        trainer(sparsity, **kwargs).fit(model, loader())
        return masks(model)

    for on_gpu, on_cpu in zip(run(accelerator="gpu", devices=1), run(), strict=True):
        assert torch.equal(on_gpu, on_cpu)


@pytest.mark.parametrize("cut", [4, 10])
def test_resume_is_bit_exact(cut: int, tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    options: dict[str, Any] = {"accelerator": "gpu", "devices": 1, "deterministic": True}
    test_resume.run(whole, **options)
    test_resume.run(resumed, whole / f"{cut}.ckpt", **options)
    test_resume.assert_identical(test_resume.final(resumed), test_resume.final(whole))


def test_memory_is_released_as_the_density_falls() -> None:
    """Weights, gradients and two moments are released, as measured by CUDA's allocator."""

    class Wide(Classifier):
        def __init__(self) -> None:
            super().__init__()
            self.body = torch.nn.Sequential(
                torch.nn.Linear(64, 2048), torch.nn.ReLU(), torch.nn.Linear(2048, 64 * 32)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(self.body(x)[:, :64] + x)

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.held: list[tuple[int, int]] = []

        def on_train_batch_end(self, *_: Any) -> None:
            self.held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))

    def run(shrink: bool) -> list[int]:
        gc.collect()  # an earlier run's trainer and model refer to each other
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        sparsity = SparsityCallback(
            block_size=64,
            include=["body.2"],
            density={"schedule": "cubic", "final": 0.125, "until": 12},
            update={"every_n_steps": 3, "until": 15},
            shrink=shrink,
        )
        watch = Watch()
        trainer(sparsity, watch, accelerator="gpu", devices=1).fit(Wide(), loader(24))
        return [now - then for now, then in zip(watch.held[-1], before, strict=True)]

    freed = 4 * 4 * 2048 * 2048 * (1 - 0.125)
    (allocated, reserved), (less_allocated, less_reserved) = run(False), run(True)
    assert allocated - less_allocated >= 0.8 * freed
    # The allocator releases whole segments of 20 MB and more.
    assert reserved - less_reserved >= 0.4 * freed
