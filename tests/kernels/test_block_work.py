"""The work of blocks, against hand-computed values and plain sums, on CPU and GPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparse_lightning.kernels.block_work import BlockWork, WorkSums, block_work
from sparse_lightning.topology import BLOCK_SIZES

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
        ],
    ),
]
BOTH = ("saliency", "movement")


def layer(slots: int, size: int, dtype: torch.dtype, device: str, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    w, g = (torch.randn(slots, size, size, generator=generator) for _ in range(2))
    parameter = nn.Parameter(w.to(device, dtype))
    parameter.grad = g.to(device, dtype)
    return parameter


def sums_of(parameter: nn.Parameter, *wanted: str) -> WorkSums:
    return WorkSums.zeros(len(parameter), parameter.device, wanted or BOTH)


def plain(parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
    """Return the work of each slot, and the root of the sum of its squared terms."""
    assert parameter.grad is not None
    products = parameter.detach().double().cpu() * parameter.grad.double().cpu()
    return products.sum((1, 2)), products.square().sum((1, 2)).sqrt()


def assert_work(sums: WorkSums, parameter: nn.Parameter, scale: float = 1.0) -> None:
    work, size = plain(parameter)
    error = (sums.work.double().cpu() - work / scale).abs()
    assert (error <= 1e-5 * size / scale).all()


def test_work_by_hand() -> None:
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[1.0, 0.0], [0.0, -1.0]]])
    gradients = torch.tensor([[[1.0, 1.0], [-1.0, 0.5]], [[7.0, 9.0], [9.0, 7.0]]])
    assert block_work(values, gradients).tolist() == [1 + 2 - 3 + 2, 0]
    assert block_work(values.bfloat16(), gradients.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", BLOCK_SIZES)
@pytest.mark.parametrize("slots", [1, 7, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_work_is_the_sum_of_products(
    device: str, size: int, slots: int, dtype: torch.dtype
) -> None:
    parameter = layer(slots, size, dtype, device)
    sums = sums_of(parameter)
    BlockWork([(parameter, sums)]).add(1.0)
    assert_work(sums, parameter)
    assert not sums.saliency.any() and not sums.movement.any(), "not before the next step"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_work_in_half_precision(device: str, dtype: torch.dtype) -> None:
    parameter = layer(50, 32, dtype, device)
    sums = sums_of(parameter)
    BlockWork([(parameter, sums)]).add(1.0)
    if device == "cuda":
        assert_work(sums, parameter)  # summed in fp32
    else:
        work, size = plain(parameter)
        assert ((sums.work - work).abs() <= 2 * torch.finfo(dtype).eps * size).all()


@pytest.mark.parametrize("device", DEVICES)
def test_mixed_layers_that_need_several_launches(device: str) -> None:
    dtypes = (torch.float32, torch.float64)
    parameters = [
        layer(1 + i % 5, BLOCK_SIZES[i % 4], dtypes[i % 3 % 2], device, seed=i) for i in range(150)
    ]
    layers = [(parameter, sums_of(parameter)) for parameter in parameters]
    parameters[3].grad = None
    BlockWork(layers).add(8.0)
    for i, (parameter, sums) in enumerate(layers):
        if i == 3:
            assert not sums.work.any()
        else:
            assert_work(sums, parameter, 8.0)


@pytest.mark.parametrize("device", DEVICES)
def test_steps_accumulate_in_the_requested_sums(device: str) -> None:
    parameter = layer(3, 16, torch.float32, device)
    both, one = sums_of(parameter), sums_of(parameter, "movement")
    total, size = torch.zeros(3, device=device), torch.zeros(3, device=device)
    work = BlockWork([(parameter, both), (parameter, one)])
    gradients = [layer(3, 16, torch.float32, device, seed).grad for seed in range(3)]
    for seed in (0, 1, 0, 2, 2):  # including gradients seen before
        parameter.grad = gradients[seed]
        work.add(1.0)
        total, size = total - both.work, size + both.work.abs()
    for sums in (both, one):
        sums.accumulate()
        sums.accumulate()  # the second call adds nothing
    assert one.saliency is None
    assert torch.equal(both.saliency, size)
    assert torch.equal(both.movement, total) and torch.equal(one.movement, total)


@pytest.mark.parametrize("device", DEVICES)
def test_non_finite_work_counts_as_zero(device: str) -> None:
    parameter = layer(3, 16, torch.float32, device)
    parameter.grad[0, 3, 3], parameter.grad[2, 0, 0] = float("nan"), float("inf")
    sums = sums_of(parameter)
    BlockWork([(parameter, sums)]).add(1.0)
    assert sums.work[[0, 2]].tolist() == [0, 0] and sums.work[1] != 0


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_any_address_and_strides(device: str) -> None:
    parameter = layer(5, 16, torch.float32, device)
    expected = parameter.grad
    bucket = torch.empty(1 + expected.numel(), device=device)
    parameter.grad = bucket[1:].view_as(expected).copy_(expected)
    sums = sums_of(parameter)
    work = BlockWork([(parameter, sums)])
    for _ in range(2):
        work.add(1.0)
        assert_work(sums, parameter)
    turned = expected.mT.contiguous()
    for gradient in (turned, turned.mT, turned):
        parameter.grad = gradient
        work.add(1.0)
        assert_work(sums, parameter)


@pytest.mark.parametrize("device", DEVICES)
def test_no_slots_at_all(device: str) -> None:
    parameter = layer(0, 16, torch.float32, device)
    BlockWork([(parameter, sums_of(parameter))]).add(1.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_work_is_deterministic_and_reads_nothing_outside() -> None:
    memory = torch.full((3, 200 * 256 + 64), torch.nan, device="cuda", dtype=torch.bfloat16)
    values, gradient, again = (part[32:-32].view(200, 16, 16) for part in memory)
    values.normal_()
    gradient.normal_()
    again.copy_(gradient)
    parameter = nn.Parameter(values)
    results = []
    for grad in (gradient, again):
        parameter.grad = grad
        sums = sums_of(parameter)
        BlockWork([(parameter, sums)]).add(1.0)
        results.append(sums.work)
    assert results[0].isfinite().all() and torch.equal(*results)
    assert results[0].count_nonzero() == 200
