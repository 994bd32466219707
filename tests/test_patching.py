"""`sparsify` and `densify`: selected layers, their initial blocks and the swap report."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from sparse_lightning import BlockSparseLinear, Sparsifier, SparsityReport, densify, sparsify
from sparse_lightning.config import SparsityConfig
from sparse_lightning.names import matches
from sparse_lightning.patching import initialize_from_dense, swap_layers
from sparse_lightning.policy.budgets import LayerBudgets
from sparse_lightning.policy.distributions import Floor, share
from sparse_lightning.selection import SwapOptions, sparse_layers
from sparse_lightning.topology import count_dead
from tests import extensions


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 128)
        self.fc2 = nn.Linear(128, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.fc2(self.fc1(x).relu())
        return y


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.proj = nn.Linear(64, 32)
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.proj(self.blocks(x)))
        return y


BLOCKS = ["blocks.0.fc1", "blocks.0.fc2", "blocks.1.fc1", "blocks.1.fc2"]


def swapped(model: nn.Module) -> list[str]:
    return [name for name, _ in sparse_layers(model)]


def types_and_state(model: nn.Module) -> tuple[list[Any], dict[str, Any]]:
    modules = [(name, id(module), type(module)) for name, module in model.named_modules()]
    return modules, {name: id(parameter) for name, parameter in model.named_parameters()}


# -- which layers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("*", "blocks.0.fc1", True),
        ("fc1", "blocks.0.fc1", True),
        ("fc?", "blocks.0.fc1", True),
        ("fc", "blocks.0.fc1", False),
        ("FC1", "blocks.0.fc1", False),
        ("blocks*", "blocks.0.fc1", False),
        ("0", "blocks.0.fc1", False),
        ("*mlp*", "blocks.0.mlp_in", True),
        ("blocks.0.fc1", "blocks.0.fc1", True),
        ("blocks.0.*", "blocks.0.fc1", True),
        ("blocks.*", "blocks.0.fc1", True),
        ("*.fc1", "blocks.0.fc1", True),
        ("*.fc1", "fc1", False),
        ("0.fc1", "blocks.0.fc1", False),
        ("fc[12]", "fc2", True),
        ("re:.*fc[12]", "blocks.0.fc1", True),
        ("re:fc1", "blocks.0.fc1", False),
        ("re:blocks.0.fc1", "blocks.0.fc1x", False),
        ("", "blocks.0.fc1", False),
    ],
)
def test_matches(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (["*"], None, [*BLOCKS, "proj"]),
        (["*"], [], [*BLOCKS, "proj", "head"]),
        (["fc1"], None, ["blocks.0.fc1", "blocks.1.fc1"]),
        (["blocks.1.*"], None, ["blocks.1.fc1", "blocks.1.fc2"]),
        (["*"], ["blocks.*"], ["proj"]),
        (["*", "head"], ["blocks.*"], ["proj", "head"]),
        (["*"], ["re:blocks.1.*", "head"], ["blocks.0.fc1", "blocks.0.fc2", "proj"]),
        (["proj", "blocks.0.fc1"], None, ["blocks.0.fc1", "proj"]),
        (["*"], ["role:first"], [*BLOCKS[1:], "proj"]),
        (["blocks.0.fc1", "fc2"], ["role:first"], ["blocks.0.fc2", "blocks.1.fc2"]),
        (["proj"], ["role:first"], ["proj"]),
    ],
)
def test_include_and_exclude(
    include: list[str], exclude: list[str] | None, expected: list[str]
) -> None:
    model = Model()
    kwargs = {} if exclude is None else {"exclude": exclude}
    report = sparsify(model, block_size=16, density=0.5, include=include, **kwargs)
    assert swapped(model) == expected
    assert list(report.layers) == expected
    others = {*BLOCKS, "proj", "head"} - {*expected}
    assert set(report.skipped) == others
    assert set(report.skipped.values()) <= {"excluded", "not included"}
    assert model(torch.randn(3, 64)).shape == (3, 16)


def test_the_first_layer_is_one_layer_whatever_its_kind() -> None:
    """Its name also ends the names of others; and it may be block-sparse already."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 64), nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)))

    options = {"block_size": 16, "density": 0.5, "exclude": ["role:first"]}
    model = build()
    assert Sparsifier(model, 8, **options).layers.keys() == {"1.0", "1.1"}
    sparsify(model, block_size=16, density=0.5)
    assert Sparsifier(model, 8, **options).layers.keys() == {"1.0", "1.1"}


class Subclass(nn.Linear):
    pass


def _subclass() -> nn.Module:
    return Subclass(64, 64)


def _attention() -> nn.Module:
    return nn.MultiheadAttention(64, 4)


def _tied_embedding() -> nn.Module:
    model = nn.ModuleDict({"tokens": nn.Embedding(32, 64), "odd": nn.Linear(64, 32)})
    model["odd"].weight = model["tokens"].weight
    return model


def _parametrized() -> nn.Module:
    linear = nn.Linear(64, 64)
    parametrize.register_parametrization(linear, "weight", nn.Identity())
    return linear


def _parametrized_bias() -> nn.Module:
    linear = nn.Linear(64, 64)
    parametrize.register_parametrization(linear, "bias", nn.Identity())
    return linear


def _weight_norm() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(64, 64))


def _old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return nn.utils.weight_norm(nn.Linear(64, 64))


def _own_forward() -> nn.Module:
    linear = nn.Linear(64, 64)
    linear.forward = lambda x: x
    return linear


def _weight_is_a_buffer() -> nn.Module:
    linear = nn.Linear(64, 64)
    weight = linear.weight.detach()
    del linear.weight
    linear.register_buffer("weight", weight)
    return linear


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "subclass": (_subclass, "odd", "a subclass of nn.Linear (Subclass)"),
    "attention": (_attention, "odd.out_proj", "NonDynamicallyQuantizableLinear"),
    "tied": (_tied_embedding, "odd.odd", "its weight is tied"),
    "parametrized": (_parametrized, "odd", "a subclass of nn.Linear (ParametrizedLinear)"),
    "parametrized bias": (_parametrized_bias, "odd", "ParametrizedLinear"),
    "weight_norm": (_weight_norm, "odd", "ParametrizedLinear"),
    "own forward": (_own_forward, "odd", "its `forward` is overridden"),
    "old weight_norm": (_old_weight_norm, "odd", "its weight is not a parameter"),
    "buffer": (_weight_is_a_buffer, "odd", "its weight is not a parameter"),
    "out_features": (lambda: nn.Linear(64, 10), "odd", "10x64 is not divisible by block_size=16"),
    "in_features": (lambda: nn.Linear(10, 64), "odd", "64x10 is not divisible by block_size=16"),
    "dtype": (
        lambda: nn.Linear(64, 64, dtype=torch.complex64),
        "odd",
        "its dtype torch.complex64 is not supported",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_layer_that_cannot_be_block_sparse_is_skipped_with_the_reason(obstacle: str) -> None:
    build, name, reason = OBSTACLES[obstacle]
    model = nn.ModuleDict({"odd": build(), "even": nn.Linear(64, 64)})
    odd = model.get_submodule(name)
    report = sparsify(model, block_size=16, density=0.5)
    assert list(report.layers) == swapped(model) == ["even"]
    assert reason in report.skipped[name]
    assert model.get_submodule(name) is odd
    assert f"{name}: {report.skipped[name]}" in str(report)


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_a_layer_that_cannot_be_block_sparse_raises_if_named_in_full(obstacle: str) -> None:
    build, name, reason = OBSTACLES[obstacle]
    model = nn.ModuleDict({"odd": build(), "even": nn.Linear(64, 64)})
    before = types_and_state(model)
    with pytest.raises(ValueError, match=rf"`include`.*'{name}'") as error:
        sparsify(model, block_size=16, density=0.5, include=["even", name])
    assert reason in str(error.value)
    assert types_and_state(model) == before


def test_both_names_of_a_tied_pair_of_linears_are_skipped() -> None:
    model = nn.ModuleDict({name: nn.Linear(64, 64) for name in ("a", "b", "free")})
    model["b"].weight = model["a"].weight
    report = sparsify(model, block_size=16, density=0.5)
    assert report.skipped == {"a": "its weight is tied", "b": "its weight is tied"}
    assert swapped(model) == ["free"]


@pytest.mark.parametrize("name", ["blocks.0.fc3", "blocks.2.fc1"])
def test_an_exact_name_that_the_model_does_not_have_raises(name: str) -> None:
    model = Model()
    before = types_and_state(model)
    with pytest.raises(
        ValueError, match=rf"`include` must name modules of the model; got '{name}'"
    ):
        sparsify(model, block_size=16, include=["proj", name])
    assert types_and_state(model) == before


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"include": ["nothing*"]},
            ValueError,
            r"at least one nn.Linear.*blocks.0.fc1: not incl",
        ),
        ({"exclude": ["*"]}, ValueError, r"at least one nn.Linear.*proj: excluded"),
        ({"block_size": 128, "include": ["proj"]}, ValueError, r"'proj'.*not divisible by"),
        ({"include": "fc1"}, TypeError, r"`include` must be a list.*Write \['fc1'\]"),
        ({"exclude": [1]}, TypeError, r"`exclude` must be a list of .*got \[1\]"),
        ({"include": ["re:("]}, ValueError, r"`include` must hold valid regular.*'re:\('"),
        ({"density": 0.0}, ValueError, r"`density` must be .*\(0, 1\].*got 0.0"),
        ({"density": 2}, ValueError, r"`density` must be"),
        ({"density": True}, ValueError, r"`density` must be"),
        ({"max_density": 1.5}, ValueError, r"`max_density` must be .*got 1.5"),
        ({"max_density": 0.0}, ValueError, r"`max_density` must be .*got 0.0"),
        ({"block_size": 24}, ValueError, r"`block_size` must be one of"),
        ({"distribution": "nope"}, ValueError, r"`distribution` must be one of 'uniform'.*'nope'"),
        (
            {"distribution": "global"},
            ValueError,
            r"`distribution` must not need scores.*got 'global'\. Use .*Sparsifier",
        ),
        ({"distribution": extensions.one_too_few}, ValueError, r"`distribution` must return one"),
        ({"distribution": "tests.extensions.no"}, ValueError, r"`distribution` must be .*no"),
        ({"layer_density": {"norm": 0.5}}, ValueError, r"`layer_density` must name layers.*'norm'"),
        (
            {"init": "zeros"},
            ValueError,
            r"`init` must be one of 'random', 'magnitude'; got 'zeros'",
        ),
    ],
)
def test_a_wrong_argument_raises_and_leaves_the_model_unchanged(
    kwargs: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Model()
    before = types_and_state(model)
    with pytest.raises(error, match=message):
        sparsify(model, **{"block_size": 16, "density": 0.5, **kwargs})
    assert types_and_state(model) == before


def test_a_model_without_linear_layers_raises() -> None:
    with pytest.raises(ValueError, match=r"linear layers: none"):
        sparsify(nn.Sequential(nn.Conv2d(3, 3, 1)), block_size=16)


def test_a_bare_linear_cannot_be_replaced_in_place() -> None:
    linear = nn.Linear(64, 64)
    with pytest.raises(ValueError, match=r"BlockSparseLinear\.from_linear"):
        sparsify(linear, block_size=16, density=0.5)
    assert [name for name, _ in linear.named_modules()] == [""]


# -- initial blocks ---------------------------------------------------------------------------


def test_init_random_keeps_the_weights_scaled_at_random_blocks() -> None:
    model = nn.Sequential(nn.Linear(256, 256))
    weight, bias = model[0].weight.detach().clone(), model[0].bias
    sparsify(model, block_size=16, density=0.25)
    layer = model[0]
    assert layer.density == 0.25
    mask = layer.topology.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    torch.testing.assert_close(layer.dense_weight(), 2.0 * weight * mask)
    assert torch.equal(layer.bias, bias)
    # The kept blocks are random rather than the largest, so their share of the norm is the density.
    assert (weight * mask).square().sum() / weight.square().sum() == pytest.approx(0.25, rel=0.02)


def test_init_random_keeps_the_variance_of_the_output() -> None:
    model = nn.Sequential(nn.Linear(512, 512, bias=False))
    x = torch.randn(500, 512)
    expected = model(x).var().item()
    sparsify(model, block_size=16, density=0.1)
    assert model(x).var().item() == pytest.approx(expected, rel=0.05)


def test_init_magnitude_keeps_the_largest_blocks_unscaled() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():  # the largest blocks are in all rows and columns
        model[0].weight.mul_(1 + torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1))
    weight = model[0].weight.detach().clone()
    sparsify(model, block_size=16, density=0.25, init="magnitude")
    assert torch.equal(model[0].topology.mask, torch.eye(4, dtype=torch.bool))
    mask = torch.eye(4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(model[0].dense_weight(), weight * mask)


def concentrated() -> tuple[nn.Sequential, Tensor]:
    """Return a layer with 16x4 blocks, the largest of which are in its first rows, and the norms.

    Its 16 largest blocks are those of the first four rows, which leave 12 rows empty.
    """
    model = nn.Sequential(nn.Linear(64, 256))
    with torch.no_grad():
        model[0].weight[:64] *= 3
    norms = model[0].weight.detach().unflatten(0, (16, 16)).unflatten(2, (4, 16)).square()
    return model, norms.sum((1, 3))


@pytest.mark.parametrize("swap", [sparsify, partial(Sparsifier, total_steps=10)])
def test_init_magnitude_leaves_no_output_dead(swap: Callable[..., Any]) -> None:
    """The floors hold for the largest blocks as they do for random ones, at the same density."""
    model, norms = concentrated()
    swap(model, block_size=16, density=0.25, init="magnitude")
    mask = model[0].topology.mask
    assert int(mask.sum()) == 16 and count_dead(mask) == (0, 0)
    # Among the rows that the largest blocks leave empty, each has its largest one, unless a
    # column needs another.
    assert int((mask & (norms == norms.amax(1, keepdim=True))).sum()) >= 12
    assert mask.flatten()[norms.argmax()]


@pytest.mark.parametrize(
    ("density", "floor", "least"),
    [
        (0.25, Floor(row=0, column=0), 0),
        (0.5, Floor(), 1),
        (0.5, Floor(row=2, column=0), 2),
        (0.1875, Floor(), 0),  # 12 blocks are too few for 16 rows
    ],
)
def test_init_magnitude_respects_the_floors_that_are_set(
    density: float, floor: Floor, least: int
) -> None:
    model, norms = concentrated()
    n_blocks = round(64 * density)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*too few blocks for their features")
        Sparsifier(
            model, block_size=16, density=density, init="magnitude", floor=floor, total_steps=10
        )
    mask = model[0].topology.mask
    assert int(mask.sum()) == n_blocks and int(mask.sum(1).min()) == least
    if least == 0:
        assert torch.equal(mask, norms >= norms.flatten().topk(n_blocks).values.min())


def test_floors_do_not_exchange_weights_for_zeros() -> None:
    """A row or column of zeros is dead in the dense layer already."""
    model, _ = concentrated()
    with torch.no_grad():
        model[0].weight[:, 16:32] = 0
    sparsify(model, block_size=16, density=0.25, init="magnitude")
    mask = model[0].topology.mask
    assert mask.any(0).tolist() == [True, False, True, True] and bool(mask.any(1).all())
    with torch.no_grad():
        model = nn.Sequential(nn.Linear(64, 256))
        model[0].weight[:, 16:] = 0
    sparsify(model, block_size=16, density=0.25, init="magnitude")
    assert bool(model[0].topology.mask[:, 0].all())


@pytest.mark.parametrize("floor", [Floor(), Floor(row=0, column=0), Floor(row=1, column=4)])
def test_dense_weights_that_arrive_later_give_the_blocks_of_a_swap(floor: Floor) -> None:
    """As with a dense checkpoint: the floors hold for its largest blocks, too."""
    model, _ = concentrated()
    weight = model[0].weight.detach().clone()
    options = {"block_size": 16, "density": 0.25, "init": "magnitude", "total_steps": 10}
    Sparsifier(model, floor=floor, **options)
    other = nn.Sequential(nn.Linear(64, 256))
    Sparsifier(other, floor=floor, **options)
    initialize_from_dense(other[0], weight, "magnitude", floor=floor)
    assert torch.equal(other[0].topology.mask, model[0].topology.mask)
    assert torch.equal(other[0].dense_weight(), model[0].dense_weight())


def test_blocks_with_nan_are_the_last_of_the_largest() -> None:
    model, _ = concentrated()
    with torch.no_grad():
        model[0].weight[:16, :48] = torch.nan
    sparsify(model, block_size=16, density=0.25, init="magnitude")
    assert model[0].topology.mask[0].tolist() == [False, False, False, True]
    assert bool(model[0].values.isfinite().all())


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_max_density_gives_empty_slots(init: str) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, block_size=16, density=0.25, max_density=0.75, init=init)
    topology = model[0].topology
    assert (topology.n_blocks, topology.capacity) == (4, 12)
    empty = topology.coords[:, 0] < 0
    assert model[0].values[empty].count_nonzero() == 0 and int(empty.sum()) == 8


def test_without_max_density_there_are_no_empty_slots() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    sparsify(model, block_size=16, density=0.25)
    assert model[0].topology.capacity == model[0].topology.n_blocks == 4


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi"])
def test_the_models_budget_is_met(distribution: str) -> None:
    model = Model()
    report = sparsify(model, block_size=16, density=0.25, distribution=distribution)
    blocks = sum(layer.n_blocks for layer in report.layers.values())
    total = sum(r.shape[0] * r.shape[1] // 256 for r in report.layers.values())
    assert abs(blocks - 0.25 * total) <= len(report.layers) / 2
    densities = {layer.density for layer in report.layers.values()}
    assert (len(densities) == 1) == (distribution == "uniform")


@pytest.mark.parametrize("distribution", [extensions.first_full, "tests.extensions.first_full"])
def test_a_custom_distribution(distribution: Any) -> None:
    report = sparsify(Model(), block_size=16, density=0.25, distribution=distribution)
    densities = [layer.density for layer in report.layers.values()]
    assert densities == [1.0, 0.25, 0.25, 0.25, 0.25]
    again = sparsify(
        Model(), block_size=16, density=0.5, max_density=0.9, distribution=distribution
    )
    assert [layer.density for layer in again.layers.values()] == [1.0, 0.5, 0.5, 0.5, 0.5]


def test_layers_that_are_already_block_sparse_share_the_budget() -> None:
    """As in topology updates, so that both distribute the budget among the same layers."""
    calls: list[dict[str, tuple[int, int]]] = []

    def budgets(grids: Mapping[str, tuple[int, int]]) -> tuple[LayerBudgets, dict[str, int]]:
        calls.append(dict(grids))
        planned = SparsityConfig(density=0.25, distribution="erdos_renyi").budgets(grids)
        return planned, planned.capacities()

    model = Model()
    sparsify(model, block_size=32, density=1.0, include=["blocks.0.fc2", "proj"])
    adopted = model.get_submodule("blocks.0.fc2")
    swap_layers(model, SwapOptions(16, ["fc*"], []), budgets)
    grids = {name: (8, 4) if "fc1" in name else (4, 8) for name in BLOCKS}
    grids["blocks.0.fc2"] = (2, 4)
    assert [*map(list, calls)] == [[*grids]], "in the model's order, without `proj`"
    assert calls == [grids]
    assert model.get_submodule("blocks.0.fc2") is adopted and adopted.density == 1.0
    expected = share("erdos_renyi", 0.25, grids, {})
    for name, layer in sparse_layers(model):
        if name in grids and layer is not adopted:
            assert layer.topology.n_blocks == layer.topology.capacity == expected[name]
    # All of them are block-sparse now, so there is no budget to share.
    swap_layers(model, SwapOptions(16, ["fc*"], []), budgets)
    assert len(calls) == 1


def test_layers_with_their_own_density_may_already_be_block_sparse() -> None:
    model = Model()
    sparsify(model, block_size=16, density=0.5, include=["proj"])
    report = sparsify(model, block_size=16, density=0.25, layer_density={"proj": 1.0, "fc1": 0.5})
    densities = [layer.density for layer in report.layers.values()]
    assert densities == [0.5, 0.25, 0.5, 0.25, 0.5]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_the_first_blocks_do_not_depend_on_the_default_dtype(init: str, dtype: torch.dtype) -> None:
    """Lightning's precision "16-true" changes the default dtype."""
    masks = []
    model = Model()
    for default in (torch.float32, dtype):
        swapped_one = copy.deepcopy(model)
        torch.set_default_dtype(default)
        try:
            sparsify(swapped_one, block_size=16, density=0.25, init=init)
        finally:
            torch.set_default_dtype(torch.float32)
        masks.append([layer.topology.mask for _, layer in sparse_layers(swapped_one)])
        assert all(layer.values.dtype == torch.float32 for _, layer in sparse_layers(swapped_one))
    assert all(torch.equal(*pair) for pair in zip(*masks, strict=True))


def test_random_blocks_depend_on_the_seed_and_the_layer() -> None:
    def masks(seed: int, rng: int) -> list[Tensor]:
        model = Model()
        torch.manual_seed(rng)
        sparsify(model, block_size=16, density=0.5, seed=seed)
        return [layer.topology.mask for _, layer in sparse_layers(model)]

    first, again, other = masks(0, 1), masks(0, 2), masks(1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
    assert not torch.equal(first[0], first[2]), "blocks.0.fc1 and blocks.1.fc1"


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_the_global_random_state_does_not_change(init: str) -> None:
    model = Model()
    state = torch.get_rng_state()
    sparsify(model, block_size=16, density=0.5, init=init)
    densify(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_flags_dtype_and_frozen_weights_are_kept(training: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64, dtype=torch.bfloat16)).train(training)
    model[0].weight.requires_grad_(False)
    for swap in (partial(sparsify, block_size=16, density=0.5, include=["0"]), densify):
        swap(model)
        parameters = dict(model[0].named_parameters())
        bias = parameters.pop("bias")
        (weight,) = parameters.values()
        assert not weight.requires_grad and bias.requires_grad
        assert weight.dtype == bias.dtype == torch.bfloat16
        assert model[0].training is training
    assert type(model[0]) is nn.Linear


def test_a_model_on_meta_keeps_the_same_blocks() -> None:
    masks = []
    for device in ("cpu", "meta"):
        model = nn.Sequential(nn.Linear(64, 64, device=device))
        sparsify(model, block_size=16, density=0.5)
        assert model[0].values.device.type == device
        masks.append(model[0].topology.mask)
    assert torch.equal(*masks)


# -- swap report -----------------------------------------------------------------------------


def test_the_report() -> None:
    model = nn.ModuleDict(
        {
            "body": nn.Sequential(nn.Linear(1024, 64), nn.Linear(64, 64, bias=False)),
            "head": nn.Linear(64, 10),
            "odd": nn.Linear(64, 10),
        }
    )
    report = sparsify(model, block_size=32, density=0.5)
    first, second = report.layers["body.0"], report.layers["body.1"]
    assert list(report.layers) == ["body.0", "body.1"]
    assert (first.shape, first.block_size, first.n_blocks) == ((64, 1024), 32, 32)
    assert first.density == 0.5
    assert (first.parameters_before, first.parameters_after) == (65_600, 32_832)
    assert (second.parameters_before, second.parameters_after) == (4_096, 2_048)
    assert report.skipped == {
        "head": "excluded",
        "odd": "10x64 is not divisible by block_size=32",
    }
    actual = sum(p.numel() for p in model["body"].parameters())
    assert actual == first.parameters_after + second.parameters_after
    assert report.density == 34 / 68  # Biases do not count.
    assert str(report) == "\n".join(
        [
            "Block-sparse layers",
            "layer     shape       blocks  density  parameters  before",
            "---------------------------------------------------------",
            "body.0  64x1024  32 of 32x32    0.500      32,832  65,600",
            "body.1    64x64   2 of 32x32    0.500       2,048   4,096",
            "---------------------------------------------------------",
            "total                           0.500      34,880  69,696",
            "",
            "Left dense",
            "head: excluded",
            "odd: 10x64 is not divisible by block_size=32",
        ]
    )


def test_an_empty_report_can_be_printed() -> None:
    assert "total" in str(SparsityReport())


def test_a_second_call_changes_nothing_and_reports_the_same() -> None:
    model = Model()
    report = sparsify(model, block_size=16, density=0.5)
    before, state = types_and_state(model), copy.deepcopy(model.state_dict())
    again = sparsify(model, block_size=16, density=0.25, seed=3)
    assert types_and_state(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert again.layers == report.layers


def test_a_second_call_may_swap_more_layers() -> None:
    model = Model()
    sparsify(model, block_size=16, density=0.5, include=["fc1"])
    first = model.get_submodule("blocks.0.fc1")
    report = sparsify(model, block_size=32, density=0.25, include=["fc2"])
    assert swapped(model) == BLOCKS
    assert set(report.layers) == set(BLOCKS)
    assert model.get_submodule("blocks.0.fc1") is first
    assert report.layers["blocks.0.fc1"].block_size == 16
    assert report.layers["blocks.0.fc2"].block_size == 32


# -- densify ----------------------------------------------------------------------------------


def test_densify_gives_the_same_outputs() -> None:
    model = Model().eval()
    sparsify(model, block_size=16, density=0.5)
    x = torch.randn(5, 64)
    expected = model(x)
    assert densify(model) is model
    assert swapped(model) == []
    names = [name for name, m in model.named_modules() if type(m) is nn.Linear]
    assert names == [*BLOCKS, "proj", "head"]
    torch.testing.assert_close(model(x), expected)
    Model().load_state_dict(model.state_dict(), strict=True)


def test_densify_of_a_layer_returns_its_linear() -> None:
    layer = BlockSparseLinear(64, 48, block_size=16, density=0.5)
    linear = densify(layer)
    assert type(linear) is nn.Linear
    assert torch.equal(linear.weight, layer.dense_weight())


def test_densify_of_a_dense_model_does_nothing() -> None:
    model = Model()
    before = types_and_state(model)
    densify(model)
    assert types_and_state(model) == before


def test_a_layer_with_two_names_stays_one_layer() -> None:
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5)
    model = nn.ModuleDict({"a": layer, "b": layer})
    densify(model)
    assert type(model["a"]) is nn.Linear and model["b"] is model["a"]


# -- PyTorch's encoders ---------------------------------------------------------------------------


def make_encoder() -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(
        32, 2, 64, dropout=0.0, activation="gelu", batch_first=True, dtype=torch.float64
    )
    return nn.TransformerEncoder(layer, 2)


def fused_calls(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, int]:
    """Return the output, and how many encoder layers PyTorch computed by its fused op."""
    with torch.profiler.profile() as profile:
        y = model(*args, **kwargs)
    return y, sum(e.name == "aten::_transformer_encoder_layer_fwd" for e in profile.events())


@pytest.mark.parametrize("mode", ["train", "eval", "eval, no_grad", "inference_mode"])
@pytest.mark.parametrize("part", ["encoder", "layer"])
def test_encoders_compute_with_sparse_layers(part: str, mode: str) -> None:
    """Compare with the same model after `densify`, which may use PyTorch's fused path."""
    encoder = make_encoder()
    report = sparsify(encoder, block_size=16, density=0.5)
    assert swapped(encoder) == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert "NonDynamicallyQuantizableLinear" in report.skipped["layers.0.self_attn.out_proj"]
    model: nn.Module = encoder if part == "encoder" else encoder.layers[0]
    model.train(mode == "train")
    dense = densify(copy.deepcopy(model))
    x = torch.randn(3, 5, 32, dtype=torch.float64)
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[0, 3:] = padding[1, 4:] = True
    no_grad = {"eval, no_grad": torch.no_grad, "inference_mode": torch.inference_mode}
    with no_grad.get(mode, torch.enable_grad)():
        y, fused = fused_calls(model, x, src_key_padding_mask=padding)
        expected, fused_densely = fused_calls(dense, x, src_key_padding_mask=padding)
    assert fused == 0
    assert (fused_densely > 0) == (mode in no_grad), "densify enables the fused path again"
    torch.testing.assert_close(y[~padding], expected[~padding])
    if mode == "train":
        y.sum().backward()
        assert encoder.layers[0].linear1.values.grad.any()


def test_an_encoder_without_sparse_layers_keeps_its_fused_path() -> None:
    model = nn.ModuleDict({"encoder": make_encoder(), "other": nn.Linear(32, 32)})
    sparsify(model, block_size=16, include=["other"])
    with torch.no_grad():
        _, fused = fused_calls(model["encoder"].eval(), torch.zeros(1, 4, 32, dtype=torch.float64))
    assert fused == 2


class Deep(nn.Module):
    """Repeats layers of 64 x 64 and 64 x 32."""

    def __init__(self, depth: int = 64) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"q": nn.Linear(64, 64), "k": nn.Linear(32, 64)}) for _ in range(depth)
        )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"block_size": 128},
            "blocks.*.q (64 layers): 64x64 is not divisible by block_size=128; blocks.*.k (64 "
            "layers): 64x32 is not divisible by block_size=128. Set `block_size` to 16 or 32.",
        ),
        (
            {"block_size": 128, "include": ["q"]},
            "blocks.*.k (64 layers): not included. Set `block_size` to 16 or 32 or 64.",
        ),
        (
            {"block_size": 128, "include": ["blocks.0.q"]},
            "got 'blocks.0.q': 64x64 is not divisible by block_size=128. Set `block_size` to 16 or "
            "32 or 64.",
        ),
        (
            {"block_size": 16, "include": ["up"]},
            "blocks.*.q (64 layers): not included; blocks.*.k (64 layers): not included. A pattern "
            "without a dot matches the last part of a name, one with a dot the whole name.",
        ),
        (
            {"block_size": 16, "layer_density": {"up": 0.5}},
            "matches none of blocks.*.q (64 layers), blocks.*.k (64 layers).",
        ),
    ],
)
def test_an_error_about_a_deep_model_is_short_and_ends_with_what_helps(
    options: dict[str, Any], text: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(text) + "$") as raised:
        sparsify(Deep(), **options)
    assert len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("shapes", "remedy"),
    [
        ([(64, 10), (32, 32)], "Set `block_size` to 16 or 32, which divides some of them."),
        ([(64, 10)], "No block size divides this: use numbers of features in multiples of 16."),
    ],
)
def test_the_block_sizes_that_an_error_names(shapes: list[tuple[int, int]], remedy: str) -> None:
    model = nn.ModuleList(nn.Linear(*shape) for shape in shapes)
    with pytest.raises(ValueError, match=re.escape(remedy)):
        sparsify(model, block_size=128)
