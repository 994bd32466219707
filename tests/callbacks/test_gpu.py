"""The callback in a real Trainer on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sparse_lightning import BlockSparseLinear, SparsityCallback
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
