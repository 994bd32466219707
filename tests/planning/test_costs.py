"""The arithmetic of plans, by hand-worked examples."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from sparse_lightning import sparsify
from sparse_lightning.planning.costs import (
    Check,
    Cost,
    DenseMemory,
    DenseTimes,
    Product,
    StepMemory,
    expected_peak,
    expected_step,
    gradient_bytes,
    model_cost,
)

UP = {op: Product(op, (8, 16, 64), torch.float32) for op in ("fwd", "dx", "dw")}
DOWN = {op: Product(op, (8, 64, 16), torch.float32) for op in ("fwd", "dx", "dw")}
# The first layer's input needs no gradient; the second is called twice.
COUNTS = {"up": {UP["fwd"]: 1, UP["dw"]: 1}, "down": dict.fromkeys(DOWN.values(), 2)}
SECONDS = dict.fromkeys(UP.values(), 3.0) | dict.fromkeys(DOWN.values(), 4.0)


def times(step: float = 50.0, **changes: float) -> DenseTimes:
    return DenseTimes(
        step=step, optimizer=6.0, launch=changes.get("launch", 0.0), products=SECONDS,
        casts={"up": 1.0, "down": 2.0},
    )  # fmt: skip


def test_the_cost_of_a_model() -> None:
    net = nn.Sequential(nn.Embedding(10, 16), nn.Linear(16, 64), nn.Linear(64, 16, bias=False))
    parameters = 160 + 16 * 64 + 64 + 64 * 16
    dense = model_cost(net)
    assert dense == Cost(parameters, parameters, 16 * parameters, 6 * 2 * 16 * 64, None)

    # The first layer keeps one of its four blocks of 16x16, the second keeps two.
    sparse = model_cost(net, 16, {"1": 1, "2": 2})
    parameters -= (3 + 2) * 256
    assert sparse == Cost(parameters, parameters, 16 * parameters, 6 * (1 + 2) * 256, None)


def test_memory_is_of_the_dtype_of_each_parameter() -> None:
    net = nn.Sequential(nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False).bfloat16())
    assert model_cost(net).memory == 256 * (16 + 8)
    assert model_cost(net, dtype=torch.bfloat16).memory == 256 * (8 + 8)
    assert model_cost(net, dtype=torch.float64).memory == 2 * 256 * 32


def test_frozen_parameters_have_no_gradient_and_no_moments() -> None:
    net = nn.Sequential(nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False))
    net[0].weight.requires_grad_(False)
    assert model_cost(net) == Cost(2048, 1024, 1024 * (4 + 16), 6 * 2048, None)
    assert model_cost(net, 16, {"0": 1, "1": 1}) == Cost(512, 256, 256 * (4 + 16), 6 * 512, None)


@pytest.mark.parametrize("nm", [None, "2:4"])
def test_parameters_equal_those_after_sparsify(nm: str | None) -> None:
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))
    planned = model_cost(net, 16, {"0": 8, "2": 8}, nm=nm)
    sparsify(net, block_size=16, density=0.25, nm=nm)
    assert planned.parameters == sum(parameter.numel() for parameter in net.parameters())


def test_a_step_by_hand() -> None:
    # In the dense step, products take 2 * 3 + 6 * 4 = 30, casts 3 and the optimizer 6; 11 remain.
    # At half the density, products take 30 / 2, casts 0.5 + 1, and the optimizer 6 / 3.
    step = expected_step(
        times(), COUNTS, {"up": 0.5, "down": 0.5}, lambda *_: 2.0, trained_share=1 / 3
    )
    assert step == pytest.approx(11 + 15 + 1.5 + 2)


def test_a_pattern_saves_casts_and_the_optimizers_time_but_not_that_of_products() -> None:
    """As above, with half of the weights: casts take 0.25 + 0.5. Making whole blocks takes time in
    the 2 + 6 products."""
    counted: list[tuple[str, str]] = []

    def whole_blocks(name: str, product: Product) -> float:
        counted.append((name, product.op))
        return 0.125

    half = {"up": 0.5, "down": 0.5}
    step = expected_step(times(), COUNTS, half, lambda *_: 2.0, 1 / 3, 0.5, whole_blocks)
    assert step == pytest.approx(11 + 15 + 0.75 + 2 + 8 * 0.125)
    products = [("up", "fwd"), ("up", "dw"), *(("down", op) for op in ("fwd", "dx", "dw"))]
    assert sorted(counted) == sorted(products)


def test_only_block_sparse_layers_change() -> None:
    step = expected_step(times(), COUNTS, {"up": 0.1}, lambda *_: 3.0, trained_share=1.0)
    assert step == pytest.approx(50 - (6 - 2) - (1 - 0.1))


def test_the_speedup_depends_on_product_and_density() -> None:
    def speedup(product: Product, density: float) -> float:
        return {"fwd": 3.0, "dx": 1.0, "dw": 0.5}[product.op] * (1 if density == 0.2 else 100)

    step = expected_step(times(), COUNTS, {"up": 0.2}, speedup, trained_share=1.0)
    assert step == pytest.approx(50 - 6 + (1 + 6) - 0.8)  # slower than dense


def test_the_remaining_time_is_never_negative() -> None:
    step = expected_step(
        times(step=10.0), COUNTS, {"up": 1.0, "down": 1.0}, lambda *_: 3.0, trained_share=0.5
    )
    assert step == pytest.approx(30 / 3 + 3 + 3)


def test_no_step_is_faster_than_its_launch() -> None:
    slow = times(launch=45.0)
    assert expected_step(slow, COUNTS, {"up": 0.1}, lambda *_: 100.0, trained_share=0.1) == 45.0


def test_the_error_of_a_check() -> None:
    assert Check(64, 0.1, expected=1.2, measured=1.0).error == pytest.approx(0.2)


def test_activations_between_two_sparse_layers_are_fused() -> None:
    plain, fused = times(), replace(times(), fusions={("up", "down"): 5.0})
    for densities, saved in (({"up": 0.5, "down": 0.5}, 5.0), ({"up": 0.5}, 0.0)):
        steps = [
            expected_step(dense, COUNTS, densities, lambda *_: 2.0, trained_share=1.0)
            for dense in (plain, fused)
        ]
        assert steps[0] - steps[1] == pytest.approx(saved)


def peak(forward: int, highest: int, update: int, absent: int, **changes: dict) -> int:
    dense = DenseMemory(StepMemory(forward, highest, update), **changes)
    return expected_peak(dense, {"up": 0.25, "down": 0.25}, absent, absent // 4)


def test_the_peak_of_a_step_by_hand() -> None:
    # Three quarters of what is absent exist during the forward: weights and moments.
    assert peak(1000, 1100, 600, absent=400) == 1000 - 300 + 100
    # Where activations are few, the peak is in the optimizer's step, with gradients.
    assert peak(500, 600, 600, absent=400) == 500 - 300
    assert peak(480, 600, 600, absent=400) == 600 - 400
    casts = {"up": 40, "down": 40, "head": 80}
    assert peak(1000, 1000, 600, absent=400, casts=casts) == 1000 - 300 - 60
    fusions = {("up", "down"): 70, ("up", "other"): 90}
    assert peak(1000, 1000, 600, absent=400, fusions=fusions) == 1000 - 300 - 70


def test_gradients_of_absent_blocks() -> None:
    net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32).bfloat16(), nn.Linear(32, 32))
    net[2].weight.requires_grad_(False)
    blocks = {"0": 1, "1": 2, "2": 1}
    assert gradient_bytes(net, 16, blocks, None) == 768 * 4 + 512 * 2
    assert gradient_bytes(net, 16, blocks, torch.bfloat16) == (768 + 512) * 2
    assert gradient_bytes(net, 16, blocks, None, "2:4") == (1024 - 128) * 4 + (1024 - 256) * 2
