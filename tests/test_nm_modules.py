"""2:4 layers as modules: derivatives, compiled code, MLPs, conversions, copies and exports."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from sparse_lightning import (
    BlockSparseLinear,
    BlockSparseMLP,
    BlockTopology,
    densify,
    load_sparse,
    sparsify,
)
from sparse_lightning.export import bsr_state_dict, dense_state_dict
from sparse_lightning.kernels import ops
from sparse_lightning.nm_pattern import random_positions
from sparse_lightning.policy.updates import update_topology, with_positions
from sparse_lightning.savings import measure_savings
from tests.test_compile import assert_same, run
from tests.test_second_derivatives import (
    OBJECTIVES,
    assert_learned_the_same,
    assert_near,
    masked,
    tokens,
)

SOME = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()


def make_layer(
    mask: Tensor = SOME, dtype: torch.dtype = torch.float64, bias: bool = True
) -> BlockSparseLinear:
    """A layer with an empty row, two empty slots and a bias."""
    topology = BlockTopology.from_mask(mask, 16, capacity=int(mask.sum()) + 2)
    topology = topology.with_random_positions("2:4")
    return BlockSparseLinear(
        topology.in_features, topology.out_features, bias, topology=topology, dtype=dtype
    )


def make_mlp(activation: nn.Module, dtype: torch.dtype = torch.float64) -> BlockSparseMLP:
    return BlockSparseMLP(make_layer(dtype=dtype), activation, make_layer(SOME.T, dtype))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Sequential(make_layer(), nn.Tanh()),
    "chain": lambda: nn.Sequential(make_layer(), nn.Tanh(), make_layer(SOME.T)),
    "mlp": lambda: make_mlp(nn.SiLU()),
}


def is_zero_in_empty_slots(layer: BlockSparseLinear) -> bool:
    return not layer.values.detach()[layer.topology.coords[:, 0] < 0].any()


# -- derivatives ----------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("make", MODELS)
def test_gradients_of_every_order_are_those_of_masked_dense_weights(
    make: str, objective: str
) -> None:
    model = MODELS[make]()
    dense = masked(model)
    x, x_dense = (tokens(model, 3, 2) for _ in range(2))
    loss, expected = OBJECTIVES[objective](model, x), OBJECTIVES[objective](dense, x_dense)
    assert_near(loss, expected)
    loss.backward()
    expected.backward()
    assert x.grad is not None and x_dense.grad is not None
    assert_near(x.grad, x_dense.grad)
    assert_learned_the_same(model, dense)


# -- compiled code and MLPs -----------------------------------------------------------------------


def exchange(layer: BlockSparseLinear, step: int, n_blocks: int) -> None:
    """Apply a random update of blocks, and of the weights within those that stay."""
    generator, topology = torch.Generator().manual_seed(step), layer.topology
    scores = [torch.rand(topology.grid, generator=generator) for _ in range(2)]
    update = update_topology(topology, *scores, n_blocks, fraction=0.4)
    before = topology.positions
    assert before is not None
    after = random_positions(topology.capacity, topology.block_size, generator)
    update = with_positions(update, before, after)
    kept = topology.unpack(layer.values.detach())
    layer.apply_update(update)
    assert is_zero_in_empty_slots(layer) and update.new_weights > 0
    now = layer.dense_weight()
    assert torch.equal(now[now != 0], kept[now != 0]) and now.any()
    with torch.no_grad():  # zeros of new weights would hide errors
        layer.values.add_(torch.randn(layer.values.shape, generator=generator, dtype=torch.float64))
        layer._zero_empty_slots()


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("make", ["chain", "mlp"])
def test_updates_and_arming_compile_once(make: str, backend: str) -> None:
    torch.compiler.reset()
    model = MODELS[make]()
    counter = CompileCounterWithBackend(backend)
    with torch._dynamo.config.patch(error_on_recompile=True):
        function = torch.compile(model, fullgraph=True, backend=counter)
        for step in range(5):
            for layer in (m for m in model.modules() if isinstance(m, BlockSparseLinear)):
                if step:
                    exchange(layer, step, n_blocks=5 - step % 2)
            x = tokens(model, 7).detach()
            armed = step % 2 == 1
            assert_same(run(model, function, x, armed), run(model, model, x, armed))
    assert counter.frame_count == 1
    torch.compiler.reset()


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(64, 128, bias=False) for _ in range(2))
        self.down_proj, self.act_fn = nn.Linear(128, 64, bias=False), nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
        return y


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))


@pytest.mark.parametrize(
    ("build", "op"), [(sequential, "block_mlp"), (Gated, "block_glu")], ids=["mlp", "glu"]
)
@pytest.mark.parametrize("armed", [False, True])
def test_a_fused_mlp_computes_what_its_layers_do(
    build: Callable[[], nn.Module], op: str, armed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, but for the order in which a gated MLP adds two gradients of its input."""
    fused, plain = (build().double() for _ in range(2))
    for model in (fused, plain):
        sparsify(model, block_size=16, density=0.5, nm="2:4")
    plain.load_state_dict(fused.state_dict())
    for module in plain.modules():  # a hook prevents fusing
        module.register_forward_hook(lambda *_: None)
    calls: list[str] = []
    original = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *args: calls.append(op) or original(*args))
    x = torch.randn(2, 5, 64).double()
    results = run(fused, fused, x, armed)
    assert calls == [op]
    expected = run(plain, plain, x, armed)
    assert calls == [op] and results.keys() == expected.keys() and len(results) > 6
    for name, result in results.items():
        error = 1e-13 if (name, op) == ("dx", "block_glu") else 0
        torch.testing.assert_close(result, expected[name], rtol=error, atol=error)


# -- conversions and copies -----------------------------------------------------------------------


def test_from_linear_keeps_the_two_largest_of_each_four() -> None:
    linear = nn.Linear(64, 48)
    layer = BlockSparseLinear.from_linear(linear, block_size=16, density=1.0, nm="2:4")
    weight = linear.weight.detach()
    order = weight.view(48, 16, 4).abs().argsort(-1, descending=True)
    expected = torch.zeros(48, 16, 4).scatter(-1, order[..., :2], 1.0).view(48, 64) * weight
    assert torch.equal(layer.dense_weight(), expected)
    assert layer.weight_density == 0.5 and layer.values.shape == (12, 16, 8)
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, expected, linear.bias))


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_densify_undoes_sparsify(init: str) -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), conv1d(48, 64)).double()
    weight = model[0].weight.detach().clone()
    sparsify(model, block_size=16, density=0.5, nm="2:4", init=init, exclude=())
    kept = model[0].dense_weight()
    scale = 2.0 if init == "random" else 1.0  # of a quarter of the weights
    torch.testing.assert_close(kept, weight * scale * (kept != 0))
    assert (kept != 0).view(64, 16, 4).sum(-1).max() == 2
    assert (kept != 0).double().mean() == 0.25
    x = torch.randn(3, 64).double()
    expected = model(x)
    densify(model)
    assert type(model[0]) is nn.Linear and type(model[2]) is conv1d
    torch.testing.assert_close(model(x), expected)


def through_a_pickle(layer: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(layer))


def through_a_file(layer: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def through_a_state_dict(layer: nn.Module) -> Any:
    """Into a plain layer of another capacity on the meta device, which takes the tensors."""
    other = BlockSparseLinear(64, 48, block_size=16, density=0.1, device="meta")
    other.load_state_dict(copy.deepcopy(layer.state_dict()), assign=True)
    return other.double()


def through_load_sparse(layer: nn.Module) -> Any:
    return load_sparse(nn.Linear(64, 48).double(), copy.deepcopy(layer.state_dict()))


@pytest.mark.parametrize(
    "make_copy",
    [copy.deepcopy, through_a_pickle, through_a_file, through_a_state_dict, through_load_sparse],
)
def test_copies_compute_the_same_and_are_independent(make_copy: Callable[[Any], Any]) -> None:
    layer = make_layer()
    other = make_copy(layer)
    x = torch.randn(3, 64).double()
    assert other.nm == "2:4" and torch.equal(other(x), layer(x))
    before = layer.dense_weight()
    exchange(other, 1, n_blocks=4)
    assert torch.equal(layer.dense_weight(), before) and not torch.equal(other(x), layer(x))


def test_shared_memory_holds_the_positions() -> None:
    layer = make_layer().share_memory()
    assert layer.topology.positions is not None and layer.topology.positions.is_shared()
    other = through_a_pickle(layer)
    exchange(layer, 1, n_blocks=4)
    assert layer.is_shared and other(torch.ones(2, 64).double()).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_conversion_of_the_dtype_leaves_the_pattern(dtype: torch.dtype) -> None:
    layer = make_layer()
    positions, weight = layer.topology.positions, layer.dense_weight()
    assert positions is not None
    layer.to(dtype)
    assert layer.topology.positions is positions and positions.dtype == torch.uint8
    assert torch.equal(layer.dense_weight(), weight.to(dtype))
    assert layer(torch.randn(3, 64, dtype=dtype)).dtype == dtype


def test_a_layer_on_meta_is_initialized_later() -> None:
    with torch.device("meta"):
        layer = BlockSparseLinear(64, 48, block_size=16, density=0.5, nm="2:4")
    assert layer.values.is_meta and layer.topology.positions.device.type == "cpu"
    layer.to_empty(device="cpu").reset_parameters()
    bound = (layer.weight_density * 64) ** -0.5
    assert 0.9 * bound < layer.values.abs().max() <= bound


def test_savings_count_the_weights_that_are_kept() -> None:
    model = sequential()
    dense = sum(parameter.numel() for parameter in model.parameters())
    sparsify(model, block_size=16, density=0.5, max_density=0.75, nm="2:4")
    savings = measure_savings(model, [model[0], model[2]], [])
    assert savings.parameters == dense - 2 * 64 * 128 * 3 // 4
    assert savings.dense_parameters == dense
    assert savings.flops == 0.25
    # Slots hold three eighths of the weights and of their gradients; then there are the indices.
    assert 0.375 < savings.nbytes / savings.dense_nbytes < 0.45


# -- exports --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_exported_state_dicts_hold_the_weights(dtype: torch.dtype) -> None:
    layer = make_layer(dtype=dtype)
    state = layer.state_dict()
    assert torch.equal(dense_state_dict(state)["weight"], layer.dense_weight())
    bsr = bsr_state_dict(state)["weight"]
    assert bsr.layout == torch.sparse_bsr and bsr.values().shape == (5, 16, 16)
    assert torch.equal(bsr.to_dense(), layer.dense_weight())


@pytest.mark.parametrize("form", ["safetensors", "onnx"])
def test_a_checkpoint_is_exported(form: str, tmp_path: Path, monkeypatch: Any) -> None:
    from sparse_lightning.cli import main

    torch.manual_seed(1)
    model = sequential()
    sparsify(model, block_size=16, density=0.5, nm="2:4")
    torch.save(model.state_dict(), tmp_path / "last.pt")
    (tmp_path / "project_nm.py").write_text(
        "from torch import nn\n"
        "build = lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    x = torch.randn(3, 64)
    if form == "onnx":
        runtime = pytest.importorskip("onnxruntime")
        more = ["--model", "project_nm:build", "--input", "batch,64"]
        assert main(["export", "last.pt", "--to", "onnx", *more]) == 0
        session = runtime.InferenceSession("last.onnx", providers=["CPUExecutionProvider"])
        (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        y = torch.from_numpy(y)
    else:
        library = pytest.importorskip("safetensors.torch")
        assert main(["export", "last.pt", "--to", "safetensors"]) == 0
        dense = sequential()
        library.load_model(dense, "last.safetensors")
        y = dense(x)
    torch.testing.assert_close(y, model(x), rtol=1e-4, atol=1e-5)


def test_an_exported_program_computes_the_same() -> None:
    layer = make_layer().eval()
    x = torch.randn(3, 64).double()
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x), rtol=0, atol=0)


# -- wrong input ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nm", ["4:8", "", True, 0, 4, 1.5, ["2:4"]])
def test_other_patterns_are_refused_by_name(nm: Any) -> None:
    model = sequential()
    calls: list[Callable[[], Any]] = [
        lambda: BlockSparseLinear(64, 64, block_size=16, density=0.5, nm=nm),
        lambda: BlockSparseLinear.from_linear(nn.Linear(64, 64), block_size=16, density=1, nm=nm),
        lambda: sparsify(model, block_size=16, nm=nm),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=rf"`nm` must be '2:4'.*got {re.escape(repr(nm))}"):
            call()
    assert type(model[0]) is nn.Linear


def test_two_weights_of_one_column_are_refused() -> None:
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    state = copy.deepcopy(before)
    state["_extra_state"][-1] = 0  # twice the first column of each four
    with pytest.raises(RuntimeError, match=r"keep two of each four weights.*checkpoint is damaged"):
        layer.load_state_dict(state)
    for key, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[key])
    with pytest.raises(ValueError, match=r"keep two of each four weights.*checkpoint is damaged"):
        dense_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(7, 16, 16)}, r"must have shape \[7, 16, 8\].*got \[7, 16, 16\]"),
        ({"_extra_state": None}, "must come with their topology"),
        ({"_extra_state": "short"}, "must hold 7 slots by its header; got 6"),
    ],
)
def test_what_does_not_belong_together_is_refused(change: dict[str, Any], message: str) -> None:
    layer = make_layer()
    state = {**layer.state_dict(), **change}
    if state["_extra_state"] is None:
        del state["_extra_state"]
    elif isinstance(state["_extra_state"], str):
        state["_extra_state"] = layer.state_dict()["_extra_state"][:-1]
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    "positions",
    [
        torch.zeros(7, 16, 4, dtype=torch.uint8),
        torch.zeros(7, 16, 2, dtype=torch.int32),
    ],
)
def test_wrong_positions_of_a_topology_are_refused(positions: Tensor) -> None:
    coords = make_layer().topology.coords
    with pytest.raises(ValueError, match="`positions` must"):
        BlockTopology(coords, (3, 4), 16, positions)


def test_a_pattern_is_read_as_yaml_writes_it() -> None:
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5, nm=124)  # type: ignore[arg-type]
    assert layer.nm == "2:4" and "nm='2:4'" in repr(layer) and "nm='2:4'" in repr(layer.topology)
