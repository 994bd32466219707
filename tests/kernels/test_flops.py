"""FLOP counts of the ops, against hand-computed numbers for the present blocks."""

from __future__ import annotations

from collections.abc import Callable

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from lightning.pytorch.utilities.model_summary import ModelSummary
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from sparse_lightning import BlockSparseLinear, BlockSparseMLP, BlockTopology
from sparse_lightning.kernels import ops

TOKENS = 2 * 5
BLOCK = 2 * TOKENS * 16 * 16  # operations per block of a product
Forward = Callable[[Tensor], Tensor]


def make_layer(up: bool = True) -> BlockSparseLinear:
    """Five present blocks and two empty slots; 64 -> 48 features, or 48 -> 64."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    topology = BlockTopology.from_mask(mask if up else mask.T, 16, capacity=7)
    return BlockSparseLinear(topology.in_features, topology.out_features, topology=topology)


def counts(module: Forward, x: Tensor, backward: bool = True) -> dict[str, int]:
    """Return the number of operations by op."""
    counter = FlopCounterMode(display=False)
    with counter:
        y = module(x)
        if backward:
            y.sum().backward()
    return {
        str(op).removeprefix("sparse_lightning."): flops
        for op, flops in counter.get_flop_counts()["Global"].items()
    }


def tokens(requires_grad: bool = True) -> Tensor:
    return torch.randn(2, 5, 64, requires_grad=requires_grad)


def test_a_layer() -> None:
    assert counts(make_layer(), tokens()) == {
        "block_linear": 5 * BLOCK,
        "block_linear_dx": 5 * BLOCK,
        "block_linear_dw": 5 * BLOCK,
    }


def fused(x: Tensor) -> Tensor:
    """Call the fused op; the hooks of a counter would make a `BlockSparseMLP` run unfused."""
    up, down = make_layer(), make_layer(up=False)
    y: Tensor = ops.block_mlp(x, *up._operands(x), *down._operands(x), "gelu")
    return y


def test_the_op_of_an_mlp() -> None:
    assert counts(fused, tokens()) == {
        "block_linear_act": 5 * BLOCK,
        "block_linear": 5 * BLOCK,
        "block_linear_dh": 5 * BLOCK,
        "block_linear_dx": 5 * BLOCK,
        "block_linear_dw": 10 * BLOCK,
    }


def test_a_module_of_two_layers() -> None:
    mlp = BlockSparseMLP(make_layer(), nn.GELU(), make_layer(up=False))
    assert sum(counts(mlp, tokens()).values()) == 30 * BLOCK


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("module", "blocks"), [(fused, 10), (make_layer(), 5)])
def test_without_gradients(mode: type, module: Forward, blocks: int) -> None:
    with mode():
        assert sum(counts(module, tokens(False), backward=False).values()) == blocks * BLOCK


@pytest.mark.parametrize(("token_stride", "read"), [(1, 10), (4, 3)])
def test_norms_count_while_armed(token_stride: int, read: int) -> None:
    layer = make_layer()
    layer.token_stride = token_stride
    layer.arm(True)
    assert counts(layer, tokens())["block_norms"] == 2 * read * 48 * 64
    assert "block_norms" not in counts(layer, tokens(), backward=False)


@pytest.mark.parametrize(("armed", "flops"), [(True, 2 * TOKENS * 48 * 64), (False, 0)])
def test_norms_count_by_the_flag_of_the_device(armed: bool, flops: int) -> None:
    """Compiled code always calls the op; the flag alone decides whether it computes."""
    x, dy, flag = tokens(False), torch.randn(2, 5, 48), torch.tensor(armed)
    assert counts(lambda x: ops.block_norms(dy, x, flag, 16), x, backward=False) == {
        "block_norms": flops
    }
    with FakeTensorMode() as mode, FlopCounterMode(display=False) as counter:
        ops.block_norms(*map(mode.from_tensor, (dy, x, flag)), 16)
    assert counter.get_total_flops() == 0  # a fake flag cannot be read


def test_a_topology_update_changes_the_count() -> None:
    layer = make_layer()
    mask = torch.zeros(3, 4, dtype=torch.bool)
    mask[1, :2] = True
    layer.topology.assign_(BlockTopology.from_mask(mask, 16, capacity=7).coords)
    assert counts(layer, tokens())["block_linear_dw"] == 2 * BLOCK


def test_fake_tensors_count_every_slot() -> None:
    layer, x = make_layer(), tokens(False)
    with FakeTensorMode() as mode:
        args = [
            mode.from_tensor(arg) if isinstance(arg, Tensor) else arg for arg in layer._operands(x)
        ]
        with FlopCounterMode(display=False) as counter:
            ops.block_linear(mode.from_tensor(x), *args)
    assert counter.get_total_flops() == 7 * BLOCK


def test_a_dense_layer_and_all_blocks_count_the_same() -> None:
    dense = nn.Linear(64, 48)
    layer = BlockSparseLinear.from_linear(dense, block_size=16, density=1.0)
    for module in (dense, layer):
        fwd = measure_flops(module, lambda module=module: module(tokens()))
        both = measure_flops(module, lambda module=module: module(tokens()), torch.sum)
        assert (fwd, both) == (12 * BLOCK, 36 * BLOCK)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu() -> None:
    found = counts(make_layer().cuda(), torch.randn(2, 5, 64, device="cuda", requires_grad=True))
    assert [*found.values()] == [5 * BLOCK, 5 * BLOCK, 5 * BLOCK]


class Model(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = BlockSparseMLP(make_layer(), nn.ReLU(), make_layer(up=False))
        self.head = nn.Linear(64, 3)
        self.example_input_array = tokens(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


def test_measure_flops_and_the_model_summary() -> None:
    model, head = Model(), 2 * TOKENS * 64 * 3
    forward = lambda: model(model.example_input_array)  # noqa: E731
    assert measure_flops(model, forward) == 10 * BLOCK + head
    # The input requires no gradient; the input of the head does.
    assert measure_flops(model, forward, torch.sum) == 25 * BLOCK + 3 * head
    summary = ModelSummary(model)
    assert summary.total_flops == 10 * BLOCK + head
    assert sum(summary.flop_counts["net"].values()) == 10 * BLOCK
