"""The host code of every kind of kernels: what it launches, without a GPU."""

from __future__ import annotations

import struct
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from sparse_lightning import BlockTopology
from sparse_lightning.kernels import cuda, densified
from sparse_lightning.kernels.epilogues import (
    Activated,
    ActivationGradient,
    Added,
    Epilogue,
    Gated,
    GatedGradient,
)
from sparse_lightning.kernels.hopper import launchers as hopper
from sparse_lightning.kernels.operands import BlockLists
from sparse_lightning.kernels.portable import launchers as portable
from sparse_lightning.kernels.programs import Program

BFLOAT16, DEVICE = torch.bfloat16, 63  # what is cached for this device serves no other test
KINDS = cuda.LAUNCHERS


class FakeKernel:
    """Records launches; packing their arguments checks number and types."""

    launched: list[tuple[Any, str, int]]

    def __init__(self, program: Program, entry: str, layout: str, device: int) -> None:
        assert device == DEVICE
        self.program, self.entry, self.layout, self.sm_count = program, entry, layout, 132

    def launch(self, grid_x: int, grid_y: int, *arguments: Any) -> None:
        struct.pack(self.layout, *arguments)
        assert grid_x > 0 and grid_y > 0
        FakeKernel.launched.append((self.program, self.entry, grid_x))


@pytest.fixture(params=[True, False], ids=["clusters", "no clusters"])
def launched(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> list[tuple[Any, str, int]]:
    FakeKernel.launched = []
    for module in KINDS.values():
        monkeypatch.setattr(module, "Kernel", FakeKernel)
    for module in portable, hopper:
        monkeypatch.setattr(module, "sm_count", lambda _: 132)
    monkeypatch.setattr(portable, "sm_shared_bytes", lambda _: 228 << 10)
    monkeypatch.setattr(portable, "has_clusters", lambda _: request.param)
    monkeypatch.setattr(hopper, "tensor_map", lambda *_: bytes(128))
    portable.linear_variant.cache_clear()
    return FakeKernel.launched


def operands(
    n: int, grid: tuple[int, int], block_size: int, dtype: torch.dtype
) -> tuple[BlockTopology, Tensor, Tensor, Tensor]:
    topology = BlockTopology.random(grid[0] * block_size, grid[1] * block_size, block_size, 0.5)
    values = torch.zeros(topology.capacity, block_size, block_size, dtype=dtype)
    x, y = (torch.zeros(n, features * block_size, dtype=dtype) for features in grid[::-1])
    return topology, values, x, y


def every_epilogue(like: Tensor, forward: bool) -> list[Epilogue]:
    found = (
        Activated("gelu"),
        Gated("silu", like),
        ActivationGradient("relu", like, recompute=True),
        GatedGradient("silu", like, like, recompute=True),
        Added(like),
    )
    return [epilogue for epilogue in found if forward == epilogue.FORWARD]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128])
@pytest.mark.parametrize("n", [1, 40, 100, 1000])
def test_every_product_is_launched(
    kind: ModuleType, block_size: int, n: int, launched: list[tuple[Any, str, int]]
) -> None:
    topology, values, x, y = operands(n, (4, 6), block_size, BFLOAT16)
    for forward in True, False:
        left, out = (x, y) if forward else (y, x)
        lists = BlockLists.of(topology.indices, forward=forward)
        kind.linear(left, values, None, lists, out, DEVICE, forward=forward)
        for epilogue in () if kind is densified else every_epilogue(out, forward):
            fused = {"epilogue": epilogue, "extra": (out,) * epilogue.extra_outputs}
            kind.linear(left, values, None, lists, out, DEVICE, forward=forward, **fused)
    kind.linear_dw(y, x, topology.indices, values, DEVICE)
    assert len(launched) >= (3 if kind is densified else 8)
    if kind is not densified:
        norms, armed = torch.zeros(topology.grid), torch.tensor(True)
        kind.norms(y, x, armed, norms, DEVICE)
        assert launched[-1][1] == "block_norms"


@pytest.mark.parametrize("dtype", [BFLOAT16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n", [1, 20, 40, 100, 300])
def test_the_grid_has_the_thread_blocks_of_all_tiles(
    n: int, dtype: torch.dtype, launched: list[tuple[Any, str, int]]
) -> None:
    topology, values, x, y = operands(n, (8, 64), 64, dtype)  # few rows of many blocks
    lists = BlockLists.of(topology.indices, forward=True)
    portable.linear(x, values, None, lists, y, DEVICE, forward=True)
    [(program, _, grid_x)] = launched
    tiling = program.tiling
    assert grid_x == -(-n // tiling.tm) * 8 * (64 // tiling.tn) * tiling.splits
    may_share = portable.has_clusters(DEVICE) and dtype != torch.float64
    assert (tiling.splits > 1) == may_share
    assert f"-DCONFIG_SPLITS={tiling.splits}" in program.options
