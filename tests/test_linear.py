"""`BlockSparseLinear` as a drop-in for `nn.Linear`: building, casting, saving, moving, training."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

from sparse_lightning import BlockSparseLinear, BlockTopology
from sparse_lightning.mlp import BlockSparseMLP
from sparse_lightning.optimizer_state import prepare_slot_removal
from sparse_lightning.policy.updates import update_topology


def make_layer(density: float = 0.5, seed: int = 0, **kwargs: Any) -> BlockSparseLinear:
    generator = torch.Generator().manual_seed(seed)
    topology = BlockTopology.random(48, 64, 16, density, generator=generator)
    return BlockSparseLinear(64, 48, topology=topology, **kwargs)


def update_randomly(layer: BlockSparseLinear) -> None:
    grid = layer.topology.grid
    update = update_topology(
        layer.topology, torch.rand(grid), torch.rand(grid), layer.topology.n_blocks, 0.5
    )
    assert len(update.changed) > 0
    layer.apply_update(update)


def index_tensors(layer: BlockSparseLinear) -> dict[str, Tensor]:
    names = ("coords", "row_offsets", "row_entries", "col_offsets", "col_entries", "slots")
    return {name: getattr(layer.topology, name) for name in names}


def snapshot(layer: BlockSparseLinear) -> dict[str, Tensor]:
    tensors = {**index_tensors(layer), "values": layer.values.detach(), "weight": None}
    tensors["weight"] = layer.dense_weight()
    return {name: tensor.clone() for name, tensor in tensors.items()}


def assert_unchanged(layer: BlockSparseLinear, before: dict[str, Tensor]) -> None:
    for name, tensor in snapshot(layer).items():
        assert torch.equal(tensor, before[name]), name


# -- building ---------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_initial_output_variance_is_that_of_nn_linear(density: float) -> None:
    layer = BlockSparseLinear(512, 512, block_size=16, density=density)
    x = torch.randn(1000, 512)
    expected = nn.Linear(512, 512)(x).var().item()
    assert expected == pytest.approx(1 / 3, rel=0.03)
    assert layer(x).var().item() == pytest.approx(expected, rel=0.05)
    bound = (density * 512) ** -0.5
    assert layer.values.abs().max().item() == pytest.approx(bound, rel=0.01)
    assert layer.values.mean().abs().item() < 0.02 * bound
    assert layer.bias is not None
    assert layer.bias.abs().max().item() == pytest.approx(512**-0.5, rel=0.02)


def test_empty_slots_are_zero_from_the_start() -> None:
    topology = BlockTopology.random(48, 64, 16, n_blocks=3, capacity=8)
    layer = BlockSparseLinear(64, 48, topology=topology)
    assert layer.values.shape == (8, 16, 16)
    assert layer.values.flatten(1).any(1).tolist() == (topology.coords[:, 0] >= 0).tolist()
    layer(torch.randn(3, 64)).sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad[3:].count_nonzero() == 0


def test_layers_built_from_one_topology_do_not_share_it() -> None:
    topology = BlockTopology.random(48, 64, 16, 0.5)
    first = BlockSparseLinear(64, 48, topology=topology)
    second = BlockSparseLinear.from_linear(nn.Linear(64, 48), topology=topology)
    third = BlockSparseLinear(64, 48, topology=topology)
    before = [snapshot(second), snapshot(third)]
    mask = topology.mask
    update_randomly(first)
    assert_unchanged(second, before[0])
    assert_unchanged(third, before[1])
    assert torch.equal(topology.mask, mask)


def test_from_linear_keeps_the_largest_blocks_unscaled() -> None:
    linear = nn.Linear(64, 48)
    with torch.no_grad():
        linear.weight[16:32, 48:64] += 1
        linear.weight[0:16, 16:32] -= 1
        linear.weight[32:48, 0:16] *= 3
    layer = BlockSparseLinear.from_linear(linear, block_size=16, density=0.25)
    expected = torch.zeros(3, 4, dtype=torch.bool)
    expected[1, 3] = expected[0, 1] = expected[2, 0] = True
    assert torch.equal(layer.topology.mask, expected)
    mask = expected.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(layer.dense_weight(), linear.weight * mask)
    assert torch.equal(layer.bias, linear.bias)
    assert layer.bias is not linear.bias


def test_from_linear_with_a_topology() -> None:
    linear = nn.Linear(64, 48, bias=False, dtype=torch.float64)
    topology = BlockTopology.random(48, 64, 16, 0.5, capacity=9)
    layer = BlockSparseLinear.from_linear(linear, topology=topology)
    assert torch.equal(layer.topology.mask, topology.mask)
    assert torch.equal(layer.values, topology.pack(linear.weight))
    assert layer.bias is None and layer.values.dtype == torch.float64


def test_from_linear_keeps_flags_and_the_random_state() -> None:
    linear = nn.Linear(64, 48).eval()
    linear.weight.requires_grad_(False)
    state = torch.get_rng_state()
    layer = BlockSparseLinear.from_linear(linear, block_size=16, density=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    assert not layer.training
    assert not layer.values.requires_grad
    assert layer.bias is not None and layer.bias.requires_grad


@pytest.mark.parametrize("bias", [True, False])
def test_to_linear_and_back(bias: bool) -> None:
    layer = make_layer(bias=bias).eval()
    dense = layer.to_linear()
    assert type(dense) is nn.Linear and not dense.training
    assert torch.equal(dense.weight, layer.dense_weight())
    assert dense.weight.count_nonzero() == layer.values.numel()
    x = torch.randn(5, 64)
    torch.testing.assert_close(dense(x), layer(x))
    again = BlockSparseLinear.from_linear(dense, topology=layer.topology)
    assert torch.equal(again.values, layer.values)
    with torch.no_grad():
        dense.weight.zero_()
    assert layer.values.count_nonzero() == layer.values.numel(), "to_linear must copy"


def test_dense_weight_has_no_gradient_and_is_a_copy() -> None:
    layer = make_layer(density=1.0)
    weight = layer.dense_weight()
    assert not weight.requires_grad
    weight.zero_()
    assert layer.values.count_nonzero() > 0


def test_magnitudes_are_the_norms_of_the_blocks() -> None:
    layer = make_layer()
    blocks = layer.dense_weight().unflatten(0, (3, 16)).unflatten(2, (4, 16))
    expected = blocks.square().sum((1, 3)).sqrt()
    torch.testing.assert_close(layer.magnitudes(), expected)
    assert layer.magnitudes().count_nonzero() == layer.topology.n_blocks


def test_repr() -> None:
    text = repr(BlockSparseLinear(64, 48, False, block_size=16, density=0.25))
    assert text == (
        "BlockSparseLinear(in_features=64, out_features=48, bias=False, block_size=16, blocks=3/12)"
    )


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"Exactly one of `density` and `topology`"),
        ({"density": 0.5, "topology": BlockTopology.random(48, 64, 16, 0.5)}, r"Exactly one of"),
        ({"density": 0.0}, r"`density` must be .*\(0, 1\].*got 0.0"),
        ({"density": 1.5}, r"`density` must be"),
        ({"density": 0.5, "block_size": 24}, r"`block_size` must be one of .*got 24"),
        ({"density": 0.5, "block_size": 32}, r"`out_features` must be .*block_size=32; got 48"),
        (
            {"topology": BlockTopology.random(64, 48, 16, 0.5)},
            r"\[48, 64\]; got one for \[64, 48\]",
        ),
        ({"density": 0.5, "dtype": torch.complex64}, r"`dtype` must be one of .*complex64"),
        ({"density": 0.5, "dtype": torch.float8_e5m2}, r"`dtype` must be one of .*float8"),
    ],
)
def test_wrong_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BlockSparseLinear(64, 48, **{"block_size": 16, **kwargs})


def test_from_linear_requires_exactly_one_of_density_and_topology() -> None:
    with pytest.raises(ValueError, match="Exactly one"):
        BlockSparseLinear.from_linear(nn.Linear(64, 48), block_size=16)


# -- forward ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(64),
        torch.randn(0, 64),
        torch.randn(2, 3, 64),
        torch.randn(64, 5).T,
        torch.randn(4, 6, 128)[::2, 1:4, ::2],
        torch.randn(1, 64).expand(5, 64),
        torch.randn(3, 64).requires_grad_(),
    ],
    ids=["1-d", "no tokens", "3-d", "transposed", "strided", "expanded", "requires grad"],
)
def test_forward_of_any_shape_and_strides(x: Tensor) -> None:
    layer = make_layer()
    y = layer(x)
    torch.testing.assert_close(y, layer.to_linear()(x))
    assert y.shape == (*x.shape[:-1], 48) and y.is_contiguous()


@pytest.mark.parametrize("shape", [(3, 63), (64, 3), (1,), (0,), ()], ids=str)
def test_an_input_of_another_size_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"last dimension must be in_features=64"):
        make_layer()(torch.randn(shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64])
def test_an_input_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    with pytest.raises(TypeError, match=r"dtype torch.float32; got .*autocast"):
        make_layer()(torch.ones(3, 64, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16])
def test_autocast(dtype: torch.dtype, input_dtype: torch.dtype) -> None:
    layer = make_layer()
    layer.arm(True)
    dense = layer.to_linear()
    x = torch.randn(5, 64, dtype=input_dtype)
    with torch.autocast("cpu", dtype):
        y, expected = layer(x), dense(x)
    assert y.dtype == expected.dtype == dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)
    y.float().square().sum().backward()
    expected.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.dtype == torch.float32
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.isfinite().all()
    assert layer.values.grad is not None and dense.weight.grad is not None
    packed = layer.topology.pack(dense.weight.grad)
    torch.testing.assert_close(layer.values.grad, packed, rtol=0.02, atol=0.1)
    norms = layer.block_norms.grad
    assert norms is not None and norms.dtype == torch.float32 and (norms > 0).all()


def test_autocast_leaves_fp64_alone_as_nn_linear_does() -> None:
    layer = make_layer(dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 64, dtype=torch.float64))
    assert y.dtype == torch.float64


def test_autocast_switched_off_inside() -> None:
    layer = make_layer()
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert layer(torch.randn(3, 64)).dtype == torch.float32


# -- updates ----------------------------------------------------------------------------------


def test_apply_update_zeroes_what_changed_and_keeps_every_tensor() -> None:
    topology = BlockTopology.random(48, 64, 16, n_blocks=6, capacity=8)
    layer = BlockSparseLinear(64, 48, topology=topology)
    layer(torch.randn(3, 64)).square().sum().backward()
    grid = layer.topology.grid
    update = update_topology(layer.topology, torch.rand(grid), torch.rand(grid), 5, 0.4)
    assert len(update.dropped) > len(update.grown) > 0
    identities = {n: id(t) for n, t in {**index_tensors(layer), "v": layer.values}.items()}
    gradient = layer.values.grad
    assert gradient is not None
    old_values, old_gradient = layer.values.detach().clone(), gradient.clone()
    layer.apply_update(update)
    assert {n: id(t) for n, t in {**index_tensors(layer), "v": layer.values}.items()} == identities
    assert layer.values.grad is gradient
    assert torch.equal(layer.topology.coords, update.coords)
    changed = torch.zeros(8, dtype=torch.bool)
    changed[update.changed] = True
    for new, old in ((layer.values, old_values), (gradient, old_gradient)):
        assert new[changed].count_nonzero() == 0
        assert torch.equal(new[~changed], old[~changed])
    assert old_values[changed].count_nonzero() > 0 and old_values[~changed].count_nonzero() > 0


# -- state dicts ------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)])
@pytest.mark.parametrize(
    "density", [0.5, 0.25, 0.75], ids=["same capacity", "smaller capacity", "larger capacity"]
)
def test_state_dict_round_trip(wrap: Callable[[nn.Module], nn.Module], density: float) -> None:
    source, target = make_layer(density, seed=1), make_layer(0.5, seed=2)
    identities = id(target.values), id(target.bias)
    target.values.requires_grad_(False)
    result = wrap(target).load_state_dict(wrap(source).state_dict(), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    assert (id(target.values), id(target.bias)) == identities
    assert not target.values.requires_grad
    assert torch.equal(target.dense_weight(), source.dense_weight())
    assert torch.equal(target.topology.coords, source.topology.coords)
    x = torch.randn(5, 64)
    assert torch.equal(target(x), source(x))
    # Loading copies: updates of one layer do not affect the other.
    update_randomly(target)
    assert not torch.equal(target.topology.coords, source.topology.coords)


def test_loading_another_capacity_clears_the_gradient_and_can_train() -> None:
    source, target = make_layer(0.25, seed=1), make_layer(0.75, seed=2)
    target(torch.randn(3, 64)).sum().backward()
    target.load_state_dict(source.state_dict())
    target.zero_grad()
    target.arm(True)
    target(torch.randn(3, 64)).sum().backward()
    assert target.values.grad is not None and target.values.grad.shape == source.values.shape
    assert target.block_norms.grad is not None and (target.block_norms.grad > 0).all()


def test_loading_another_block_size() -> None:
    source = BlockSparseLinear(64, 64, block_size=32, density=0.5)
    target = BlockSparseLinear(64, 64, block_size=16, density=0.5)
    target.load_state_dict(source.state_dict())
    assert target.block_size == 32 and target.block_norms.shape == (2, 2)
    assert torch.equal(target.dense_weight(), source.dense_weight())
    target.arm(True)
    target(torch.randn(3, 64)).sum().backward()
    assert target.block_norms.grad is not None and (target.block_norms.grad > 0).all()


def test_saved_topology_is_one_int32_tensor_of_a_length_fixed_by_the_capacity() -> None:
    layer = make_layer()
    saved = layer.state_dict()["_extra_state"]
    update_randomly(layer)
    again = layer.state_dict()["_extra_state"]
    assert saved.dtype == torch.int32 and saved.dim() == 1
    assert saved.shape == again.shape and not torch.equal(saved, again)


def test_torch_save_and_load_with_weights_only() -> None:
    layer, file = make_layer(seed=1), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = make_layer(seed=2)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other.dense_weight(), layer.dense_weight())


@pytest.mark.parametrize("strict", [True, False])
def test_values_without_topology_are_refused(strict: bool) -> None:
    layer = make_layer(seed=2)
    before = snapshot(layer)
    state = make_layer(seed=1).state_dict()
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match=r"`values` must come with their topology"):
        layer.load_state_dict(state, strict=strict)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("density", [0.5, 0.75], ids=["same capacity", "other capacity"])
def test_topology_without_values_leaves_the_layer_as_it_was(strict: bool, density: float) -> None:
    layer = make_layer(seed=2)
    before = snapshot(layer)
    state = make_layer(density, seed=1).state_dict()
    del state["values"]
    try:
        layer.load_state_dict(state, strict=strict)
    except RuntimeError as error:
        assert "values" in str(error)
    else:
        assert not strict
    # The new topology is never combined with the old values.
    assert_unchanged(layer, before)


def _edit(index: int, value: int) -> Callable[[Tensor], Tensor]:
    def edit(state: Tensor) -> Tensor:
        state = state.clone()
        state[index] = value
        return state

    return edit


@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s[:3],
        lambda s: s[:-2],
        lambda s: s[:-1],
        lambda s: torch.cat([s, s[-2:]]),
        lambda s: s.view(1, -1),
        lambda s: s[:0],
        lambda s: {"coords": s},
        lambda s: "topology",
        _edit(0, 99),
        _edit(1, 17),
        _edit(2, 0),
        _edit(4, -1),
        _edit(5, 3),
        _edit(6, -2),
        lambda s: torch.cat([s[:-2], s[5:7]]),
    ],
    ids=[
        *("short header", "too few slots", "half a slot", "too many slots", "2-d", "empty"),
        *("a dict", "a string", "format", "block size", "grid", "capacity"),
        *("row outside", "column below -1", "a block twice"),
    ],
)
def test_a_damaged_topology_is_refused(damage: Callable[[Tensor], Any]) -> None:
    layer = nn.Sequential(make_layer(seed=2))
    before = snapshot(layer[0])
    state = nn.Sequential(make_layer(seed=1)).state_dict()
    state["0._extra_state"] = damage(state["0._extra_state"])
    with pytest.raises(RuntimeError, match=r"layer '0'"):
        layer.load_state_dict(state, strict=False)
    assert_unchanged(layer[0], before)


def test_values_that_do_not_fit_the_saved_topology_are_refused() -> None:
    layer = make_layer(seed=2)
    before = snapshot(layer)
    state = make_layer(seed=1).state_dict()
    state["values"] = state["values"][:-1]
    with pytest.raises(
        RuntimeError, match=r"`values` must have shape \[6, 16, 16\].*\[5, 16, 16\]"
    ):
        layer.load_state_dict(state)
    assert_unchanged(layer, before)


def test_a_layer_of_another_shape_is_refused() -> None:
    layer = make_layer()
    before = snapshot(layer)
    other = BlockSparseLinear(48, 64, block_size=16, density=0.5)
    with pytest.raises(RuntimeError, match=r"\[48, 64\]; got one for \[64, 48\]"):
        layer.load_state_dict(other.state_dict())
    assert_unchanged(layer, before)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)])
def test_a_dense_checkpoint_is_packed_at_the_present_blocks(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    dense, layer = nn.Linear(64, 48), make_layer()
    mask, state = layer.topology.mask, wrap(dense).state_dict()
    keys = list(state)
    wrap(layer).load_state_dict(state, strict=True)
    assert list(state) == keys, "the user's dict must stay"
    assert torch.equal(layer.topology.mask, mask)
    assert torch.equal(layer.values, layer.topology.pack(dense.weight))
    assert torch.equal(layer.bias, dense.bias)


def test_a_dense_checkpoint_of_another_shape_is_refused() -> None:
    layer = make_layer()
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"`weight` must have shape \[48, 64\]; got \[64, 48\]"):
        layer.load_state_dict(nn.Linear(48, 64).state_dict(), strict=False)
    assert_unchanged(layer, before)


@pytest.mark.parametrize("strict", [True, False])
def test_a_locked_layer_refuses_another_capacity_only(strict: bool) -> None:
    layer = make_layer(0.5, seed=2)
    layer._is_locked = True
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match=r"capacity 6.*has 9.*before the optimizer is built"):
        layer.load_state_dict(make_layer(0.75, seed=1).state_dict(), strict=strict)
    assert_unchanged(layer, before)
    source = make_layer(0.5, seed=1)
    layer.load_state_dict(source.state_dict(), strict=strict)
    assert torch.equal(layer.dense_weight(), source.dense_weight())


def test_loading_in_place_reaches_compiled_indices() -> None:
    """With the same capacity, the index tensors keep their identity."""
    layer = make_layer(seed=2)
    identities = [id(tensor) for tensor in index_tensors(layer).values()]
    layer.load_state_dict(make_layer(seed=1).state_dict())
    assert [id(tensor) for tensor in index_tensors(layer).values()] == identities


def test_load_with_assign() -> None:
    source, target = make_layer(0.75, seed=1), make_layer(0.5, seed=2)
    target.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(target.dense_weight(), source.dense_weight())
    x = torch.randn(3, 64)
    assert torch.equal(target(x), source(x))


# -- moving and copying -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("convert", "dtype"),
    [
        (lambda m: m.double(), torch.float64),
        (lambda m: m.half(), torch.float16),
        (lambda m: m.to(torch.bfloat16), torch.bfloat16),
        (lambda m: m.to("cpu", torch.float64), torch.float64),
        (lambda m: m.type(torch.float16), torch.float16),
    ],
)
def test_conversion_leaves_the_indices_alone(
    convert: Callable[[nn.Module], nn.Module], dtype: torch.dtype
) -> None:
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in index_tensors(layer).items()}
    convert(nn.Sequential(layer))
    assert layer.values.dtype == dtype
    for name, tensor in index_tensors(layer).items():
        assert tensor.dtype == torch.int32 and torch.equal(tensor, before[name]), name
    layer.arm(True)
    layer(torch.randn(3, 64).to(dtype)).sum().backward()
    norms = layer.block_norms.grad
    assert norms is not None and norms.dtype == torch.float32 and (norms > 0).all()


def test_to_meta_and_back_with_to_empty() -> None:
    layer = make_layer()
    before = {name: tensor.clone() for name, tensor in index_tensors(layer).items()}
    values = layer.values.detach().clone()
    layer.to("meta")
    assert layer.values.is_meta
    layer.to_empty(device="cpu")
    assert layer.values.device.type == "cpu"
    for name, tensor in index_tensors(layer).items():
        assert tensor.dtype == torch.int32 and torch.equal(tensor, before[name]), name
    with torch.no_grad():
        layer.values.copy_(values)
    assert layer(torch.randn(3, 64)).shape == (3, 48)


def test_built_on_meta_and_materialised() -> None:
    model = nn.Sequential(make_layer(device="meta"))
    layer = model[0]
    assert layer.values.is_meta
    assert all(tensor.device.type == "cpu" for tensor in index_tensors(layer).values())
    model.to_empty(device="cpu")
    layer.reset_parameters()
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


@pytest.mark.parametrize(
    "build",
    [
        lambda: BlockSparseLinear(64, 48, block_size=16, density=0.5),
        lambda: BlockSparseLinear.from_linear(
            nn.Linear(64, 48), topology=BlockTopology.random(48, 64, 16, 0.5)
        ),
    ],
    ids=["density", "from_linear"],
)
def test_built_where_meta_is_the_default_device(build: Callable[[], BlockSparseLinear]) -> None:
    with torch.device("meta"):
        layer = build()
    assert layer.values.is_meta
    layer.to_empty(device="cpu")
    layer.reset_parameters()
    assert layer.topology.n_blocks == 6
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), layer.to_linear()(x))


def test_forward_and_backward_on_meta() -> None:
    layer = make_layer(device="meta")
    x = torch.randn(2, 3, 64, device="meta", requires_grad=True)
    y = layer(x)
    assert y.is_meta and y.shape == (2, 3, 48)
    y.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape
    assert layer.values.grad is not None and layer.values.grad.shape == layer.values.shape


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied: Callable[[Any], Any]) -> None:
    layer = make_layer().eval()
    other = copied(layer)
    assert not other.training
    x = torch.randn(3, 64)
    assert torch.equal(other(x), layer(x))
    before = snapshot(layer)
    update_randomly(other)
    with torch.no_grad():
        other.values.fill_(1)
    other.arm(True)
    other.train()(x).sum().backward()
    assert other.block_norms.grad is not None and (other.block_norms.grad > 0).all()
    assert_unchanged(layer, before)
    assert not layer.armed and not layer._armed_flag and layer.block_norms.grad is None
    assert layer.values.grad is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_a_copy_of_an_armed_layer_is_not_armed(copied: Callable[[Any], Any]) -> None:
    """The copy does not take part in the training, but it can be armed itself."""
    layer, x = make_layer(), torch.randn(3, 64)
    layer.arm(True)
    layer(x).sum().backward()
    other = copied(layer)
    assert not other.armed and not other._armed_flag and other.block_norms.grad is None
    other(x).sum().backward()
    assert other.block_norms.grad is None and other.block_norms is not layer.block_norms
    other.arm(True)
    other(x).sum().backward()
    assert torch.equal(other.block_norms.grad, layer.block_norms.grad)


@pytest.mark.parametrize("build", [make_layer, lambda: make_layer(device="meta")])
def test_norms_are_fp32_whatever_the_default_dtype(build: Callable[[], BlockSparseLinear]) -> None:
    """Lightning's precision "16-true" changes the default dtype."""
    torch.set_default_dtype(torch.float16)
    try:
        layer = build().to_empty(device="cpu")
        layer.reset_parameters()
        assert layer.values.dtype == torch.float16
        layer.load_state_dict(make_layer(0.75).state_dict())
        layer.arm(True)
        layer(torch.randn(3, 64)).sum().backward()
    finally:
        torch.set_default_dtype(torch.float32)
    norms = layer.block_norms.grad
    assert norms is not None and norms.dtype == torch.float32 and (norms > 0).all()


def test_the_leaf_of_the_norms_stays_if_the_device_stays() -> None:
    layer = make_layer(device="meta")
    leaf = layer.block_norms
    assert leaf.device.type == "cpu" and leaf.is_leaf and leaf.requires_grad
    layer.to_empty(device="cpu").double().float()
    with torch.no_grad():
        layer.to("cpu")
    assert layer.block_norms is leaf


CUDA = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    ],
)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64), (300, 64), (0, 64)])
def test_an_output_may_be_changed_in_place(shape, density: float, device: str) -> None:
    """As with nn.Linear: by `nn.ReLU(inplace=True)`, a residual connection, or indexing."""
    layer = BlockSparseLinear(64, 128, block_size=16, density=density, device=device)
    dense = layer.to_linear()
    x = torch.randn(shape, device=device)
    outputs = []
    for module in (layer, dense):
        y = module(x.requires_grad_())
        y += 1
        y[..., :8] = 0
        outputs.append(nn.functional.relu(y, inplace=True))
        y.square().sum().backward()
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.bias.grad, dense.bias.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_the_leaf_of_the_norms_moves_with_the_values() -> None:
    layer, x = make_layer(), torch.randn(3, 64)
    layer.arm(True)
    with torch.no_grad():
        layer.cuda()
    leaf = layer.block_norms
    assert leaf.is_cuda and leaf.is_leaf and leaf.requires_grad and layer._armed_flag.is_cuda
    layer(x.cuda()).sum().backward()
    assert leaf.grad is not None and (leaf.grad > 0).all()
    norms = leaf.grad.cpu()
    layer.cpu()
    layer(x).sum().backward()
    torch.testing.assert_close(layer.block_norms.grad, norms, rtol=1e-4, atol=1e-5)


def send_results(
    connection: Any, shared: nn.Module, unshared: BlockSparseLinear, x: Tensor
) -> None:
    """Send what another process computes after the topologies have changed."""
    torch.set_num_threads(1)
    connection.send("ready")
    connection.recv()
    with torch.no_grad():
        connection.send((shared(x).tolist(), unshared.topology.coords.tolist()))


@pytest.mark.parametrize("how", ["fork", "spawn"])
def test_share_memory(how: str) -> None:
    """Processes that share a layer see its topology change; others keep their own."""
    torch.manual_seed(0)
    model, unshared, x = nn.Sequential(make_layer()), make_layer(), torch.randn(3, 64)
    expected = model(x)
    assert model.share_memory() is model and torch.equal(model(x), expected)
    context = torch.multiprocessing.get_context(how)
    parent, child = context.Pipe()
    worker = context.Process(target=send_results, args=(child, model, unshared, x), daemon=True)
    worker.start()
    assert parent.poll(60) and parent.recv() == "ready"
    before = unshared.topology.coords.clone()
    for layer in (model[0], unshared):
        coords = layer.topology.coords
        with torch.no_grad():
            layer.values.mul_(2.0)
        layer.topology.assign_(coords.flip(0).clone())
    parent.send("continue")
    assert parent.poll(60)
    y, coords = parent.recv()
    worker.join()
    torch.testing.assert_close(torch.tensor(y), model(x).detach())
    assert not torch.equal(model(x), expected)
    assert coords == before.tolist()


def test_a_layer_that_is_no_longer_shared_has_its_own_topology() -> None:
    layer = make_layer().share_memory()
    assert layer.is_shared and layer.values.is_shared()
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (copy.deepcopy(layer), torch.load(saved, weights_only=False)):
        assert not other.is_shared
        other.shrink(other.topology.n_blocks)
    with pytest.raises(RuntimeError, match="must not be in shared memory when it shrinks"):
        layer.shrink(layer.topology.n_blocks)
    held = layer.topology.coords
    assert not layer.double().is_shared
    assert torch.equal(layer.topology.coords, held) and layer.topology.coords is not held


def test_only_values_and_bias_are_parameters_and_nothing_is_a_buffer() -> None:
    layer = make_layer()
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]
    assert list(layer.buffers()) == []
    assert list(layer.state_dict()) == ["values", "bias", "_extra_state"]


# -- training ---------------------------------------------------------------------------------


def test_training_equals_the_masked_dense_model() -> None:
    """With a fixed topology in fp64, over 50 steps of AdamW with decay and clipping, to 1e-10."""
    sizes, dtype = [(64, 96), (96, 48), (48, 16)], torch.float64
    sparse = nn.Sequential()
    dense = nn.Sequential()
    masks: dict[int, Tensor] = {}
    for i, (n_in, n_out) in enumerate(sizes):
        layer = BlockSparseLinear(n_in, n_out, block_size=16, density=0.6, dtype=dtype)
        masks[2 * i] = layer.topology.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
        sparse.extend([layer, nn.Tanh()])
        dense.extend([layer.to_linear(), nn.Tanh()])
    assert all(0 < mask.double().mean() < 1 for mask in masks.values())
    first = sparse[0].dense_weight()
    optimizers = [
        torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        for model in (sparse, dense)
    ]
    clipped = 0
    for _ in range(50):
        x = torch.randn(32, 64, dtype=dtype)
        target = torch.randn(32, 16, dtype=dtype)
        norms = []
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - target).square().sum().backward()
            if model is dense:
                for i, mask in masks.items():
                    dense[i].weight.grad *= mask
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 5.0).item())
            optimizer.step()
        with torch.no_grad():
            for i, mask in masks.items():
                dense[i].weight *= mask
        assert norms[0] == pytest.approx(norms[1], rel=1e-10)
        clipped += norms[0] > 5.0
    assert clipped > 0
    for i in masks:
        for actual, expected in (
            (sparse[i].dense_weight(), dense[i].weight),
            (sparse[i].bias, dense[i].bias),
        ):
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-10)
    assert (sparse[0].dense_weight() - first).abs().max() > 0.1


# -- removing empty slots -------------------------------------------------------------------------


def roomy(dtype: torch.dtype = torch.float32) -> BlockSparseLinear:
    """Three of 2 x 4 blocks, in slots 4, 0 and 2 of six."""
    coords = torch.tensor([[1, 3], [-1, -1], [0, 1], [-1, -1], [0, 0], [-1, -1]])
    topology = BlockTopology(coords, (2, 4), 16)
    return BlockSparseLinear(64, 32, topology=topology, dtype=dtype)


@pytest.mark.parametrize(
    ("capacity", "kept"),
    [(3, [0, 2, 4]), (4, [0, 1, 2, 4]), (5, [0, 1, 2, 3, 4]), (6, [0, 1, 2, 3, 4, 5])],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_shrinking_changes_nothing_but_the_slots(
    capacity: int, kept: list[int], dtype: torch.dtype
) -> None:
    layer = roomy(dtype)
    x = torch.randn(8, 64, dtype=dtype)
    y = layer(x)
    y.sum().backward()
    parameter, before, bias = layer.values, layer.dense_weight(), layer.bias.grad.clone()
    gradient = layer.topology.unpack(layer.values.grad)
    old_memory = layer.values.untyped_storage().data_ptr()
    assert layer.shrink(capacity).tolist() == kept
    assert layer.values is parameter and layer.values.shape == (capacity, 16, 16)
    assert layer.values.untyped_storage().data_ptr() != old_memory
    assert layer.values.untyped_storage().nbytes() == layer.values.nbytes
    assert layer.topology.capacity == capacity and layer.topology.n_blocks == 3
    assert torch.equal(layer.dense_weight(), before)
    assert torch.equal(layer.topology.unpack(layer.values.grad), gradient)
    assert torch.equal(layer(x), y)
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.topology.unpack(layer.values.grad), gradient)
    assert torch.equal(layer.bias.grad, bias)


def test_shrinking_while_a_graph_is_held() -> None:
    """A kept loss keeps its graph alive; the next backward must work."""
    layer = roomy()
    x = torch.randn(8, 64)
    held = layer(x)
    held.sum().backward(retain_graph=True)
    expected = layer.topology.unpack(layer.values.grad)
    layer.shrink(3)
    layer.zero_grad()
    layer(x).sum().backward()
    assert torch.equal(layer.topology.unpack(layer.values.grad), expected)
    assert held.requires_grad


def test_a_shrunk_layer_in_training_is_saved_and_loaded() -> None:
    layer, other = roomy(), roomy()
    layer._is_locked = True
    layer.shrink(3)
    other.load_state_dict(layer.state_dict())
    assert other.topology.capacity == 3
    assert torch.equal(other.dense_weight(), layer.dense_weight())


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    # With these options the steps do not depend on the RMS over all slots.
    "adafactor": lambda p: torch.optim.Adafactor(p, eps=(None, 10.0), d=10.0),
}


def roomy_mlp() -> BlockSparseMLP:
    torch.manual_seed(1)
    coords = torch.tensor([[-1, -1], [3, 0], [0, 1], [-1, -1], [1, 1]])
    down = BlockSparseLinear(32, 64, topology=BlockTopology(coords, (4, 2), 16))
    return BlockSparseMLP(roomy(), nn.GELU(), down)


def train(model: BlockSparseMLP, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    """Train for two steps; return the last loss, with its graph."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(2):
        optimizer.zero_grad()
        x, target = (torch.randn(8, 64, generator=generator) for _ in range(2))
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
    return loss


def shrink_in_training(layer: BlockSparseLinear, optimizer: torch.optim.Optimizer) -> None:
    layer._is_locked = True
    kept, shrink = layer._prepare_shrink(layer.topology.n_blocks)
    remove_slots = prepare_slot_removal(optimizer, layer.values, kept)
    shrink()
    remove_slots()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_as_if_nothing_had_shrunk(name: str) -> None:
    shrunk, whole = roomy_mlp(), roomy_mlp()
    optimizers = [OPTIMIZERS[name](model.parameters()) for model in (shrunk, whole)]
    held = train(shrunk, optimizers[0], seed=2)
    train(whole, optimizers[1], seed=2)
    for layer in (shrunk[0], shrunk[2]):
        shrink_in_training(layer, optimizers[0])
        assert len(layer.values) == 3
    losses = [train(m, o, seed=3) for m, o in zip((shrunk, whole), optimizers, strict=True)]
    assert torch.equal(losses[0], losses[1]) and held.requires_grad
    for a, b in zip((shrunk[0], shrunk[2]), (whole[0], whole[2]), strict=True):
        assert torch.equal(a.dense_weight(), b.dense_weight()) and torch.equal(a.bias, b.bias)


def test_adafactor_takes_larger_steps_without_the_empty_slots() -> None:
    """Its RMS of the weights is over all slots: with half as many it is sqrt(2) times as large."""
    layers = roomy(), roomy()
    optimizers = [torch.optim.Adafactor([m.values], weight_decay=0.0, d=10.0) for m in layers]
    gradient = torch.randn(3, 16, 16)
    layers[1].load_state_dict(layers[0].state_dict())
    for layer, optimizer in zip(layers, optimizers, strict=True):
        layer.values.grad = torch.zeros_like(layer.values)
        optimizer.step()
        if layer is layers[1]:
            shrink_in_training(layer, optimizer)
        layer.values.grad[layer.topology.coords[:, 0] >= 0] = gradient
    before = layers[0].dense_weight()
    for optimizer in optimizers:
        optimizer.step()
    moved, moved_more = (layer.dense_weight() - before for layer in layers)
    assert moved.count_nonzero() == 3 * 16 * 16
    torch.testing.assert_close(moved_more, 2**0.5 * moved, rtol=1e-4, atol=1e-6)


def test_sharded_values_are_refused() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        layer = roomy()
        fully_shard(layer, mesh=dist.init_device_mesh("cpu", (1,)))
        with pytest.raises(RuntimeError, match=r"`values` must not be sharded.*got a DTensor"):
            layer.shrink(3)
        assert layer.topology.capacity == 6 and len(layer.values) == 6
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("capacity", [2, 7, 0, -1])
def test_shrinking_below_the_blocks_or_above_the_slots_is_refused(capacity: int) -> None:
    layer = roomy()
    with pytest.raises(ValueError, match=rf"`capacity` must be in 3\.\.6.*got {capacity}"):
        layer.shrink(capacity)
    assert layer.topology.capacity == 6 and len(layer.values) == 6
