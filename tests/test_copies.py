"""Targets, teachers and averages inside a model keep the blocks of their sources."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from sparse_lightning import BlockSparseLinear, Sparsifier, densify, load_sparse, sparsify
from tests.loops import FALLING, Net, adamw, sparse, train

OPTIONS: dict[str, Any] = {
    "block_size": 16,
    "exclude": ["head"],
    "update": {"every_n_steps": 4},
    "drop_fraction": 0.3,
}
DENSITIES = {"constant": 0.25, "falling": FALLING}


class WithTarget(Net):
    """Holds a copy of its network, and computes with both."""

    def __init__(self, make: Callable[[nn.Module], nn.Module]) -> None:
        super().__init__()
        self.target = make(self.net)

    @property
    def copied(self) -> nn.Module:
        return self.target.module if isinstance(self.target, AveragedModel) else self.target


def frozen(net: nn.Module) -> nn.Module:
    return copy.deepcopy(net).requires_grad_(False)


MAKERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "frozen": frozen,
    "in no optimizer": copy.deepcopy,
    "AveragedModel": lambda net: AveragedModel(
        net, avg_fn=lambda average, now, n: average.lerp(now, 0.1)
    ),
}


@torch.no_grad()
def average(model: WithTarget) -> None:
    if isinstance(model.target, AveragedModel):
        model.target.update_parameters(model.net)
    else:
        for mine, of in zip(model.target.parameters(), model.net.parameters(), strict=True):
            mine.lerp_(of, 0.1)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("maker", MAKERS)
def test_an_average_is_that_of_the_weights(maker: str, density: str) -> None:
    """It is accurate where a block was always present, and zero where no block is."""
    model = WithTarget(MAKERS[maker])
    sparsifier = Sparsifier(model, 32, density=DENSITIES[density], **OPTIONS)
    sparsifier.attach(adamw([*model.net.parameters(), *model.head.parameters()]))
    prefix = "target.module" if maker == "AveragedModel" else "target"
    assert sparsifier.follows == {f"{prefix}.0": "net.0", f"{prefix}.2": "net.2"}
    assert [*sparsifier.layers] == ["net.0", "net.2"]
    assert f"{prefix}.0 follows net.0" in str(sparsifier.report)
    truth = {i: model.net[i].dense_weight() for i in (0, 2)}
    stayed = {i: model.net[i].dense_weight() != 0 for i in (0, 2)}
    first = True

    def after(number: int) -> None:
        nonlocal first
        average(model)
        for i in (0, 2):
            now = model.net[i].dense_weight()
            # PyTorch's average copies the weights when it is first updated.
            at_once = first and maker == "AveragedModel"
            truth[i] = now.clone() if at_once else truth[i].lerp(now, 0.1)
            stayed[i] &= now != 0
            copied = model.copied[i]
            assert torch.equal(copied.topology.coords, model.net[i].topology.coords)
            assert not copied.dense_weight()[now == 0].any()
        first = False

    optimizer = sparsifier._attached()[0].optimizer
    assert optimizer is not None
    train(model, optimizer, range(32), after)
    assert sparsifier.n_updates == 6 and sparsifier.density == 0.25
    for i in (0, 2):
        found = model.copied[i].dense_weight()
        assert stayed[i].any()
        torch.testing.assert_close(found[stayed[i]], truth[i][stayed[i]], rtol=1e-5, atol=1e-6)
        assert len(model.copied[i].values) == len(model.net[i].values)


def test_weights_are_loaded_both_ways_at_any_time() -> None:
    model = WithTarget(frozen)
    sparsifier = Sparsifier(model, 32, density=FALLING, **OPTIONS)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)

    def after(number: int) -> None:
        if number % 3 == 0:
            model.target.load_state_dict(model.net.state_dict())
            for ours, theirs in zip(model.target.parameters(), model.net.parameters(), strict=True):
                assert torch.equal(ours, theirs)
        elif number % 3 == 1:
            model.net.load_state_dict(model.target.state_dict())

    train(model, optimizer, range(32), after)
    assert sparsifier.density == 0.25


def test_a_copy_with_other_blocks_adopts_those_of_its_source() -> None:
    """For example, an earlier state of the network is loaded into a target that stays constant."""
    model = WithTarget(frozen)
    sparsifier = Sparsifier(model, 32, density=0.25, **OPTIONS)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    earlier = copy.deepcopy(model.net.state_dict())
    train(model, optimizer, range(6))
    model.target.load_state_dict(earlier)
    known = model.target[0].dense_weight()
    assert not torch.equal(model.target[0].topology.coords, model.net[0].topology.coords)
    train(model, optimizer, range(6, 9))
    for i in (0, 2):
        assert torch.equal(model.target[i].topology.coords, model.net[i].topology.coords)
    both = model.target[0].dense_weight().ne(0) & known.ne(0)
    assert both.any()
    assert torch.equal(model.target[0].dense_weight()[both], known[both])


def test_a_copy_that_is_made_after_the_swap_follows() -> None:
    model = Net()
    sparsifier = Sparsifier(model, 32, density=0.25, **OPTIONS)
    model.target = frozen(model.net)
    optimizer = adamw(model.net.parameters())
    sparsifier.attach(optimizer)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    train(model, optimizer, range(16))
    assert sparsifier.n_updates > 2
    assert torch.equal(model.target[0].topology.coords, model.net[0].topology.coords)


def encoder() -> nn.Module:
    return nn.TransformerEncoder(
        nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True), 3
    )


@pytest.mark.parametrize("make", [frozen, copy.deepcopy])
def test_clones_are_told_apart_by_their_names(make: Callable[[nn.Module], nn.Module]) -> None:
    """The layers of an encoder are initially equal; each teacher follows its own student."""
    model = nn.ModuleDict({"student": encoder()})
    model["teacher"] = make(model["student"])
    sparsifier = Sparsifier(model, 20, block_size=16, update={"every_n_steps": 4})
    optimizer = adamw(model["student"].parameters())
    sparsifier.attach(optimizer)
    names = [f"layers.{i}.linear{j}" for i in range(3) for j in (1, 2)]
    assert sparsifier.follows == {f"teacher.{name}": f"student.{name}" for name in names}
    coords = [layer.topology.coords for layer in sparsifier.layers.values()]
    assert not torch.equal(coords[0], coords[2]), "students have blocks of their own"
    x = torch.randn(4, 5, 32)
    for _ in range(12):
        (model["student"](x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sparsifier.n_updates == 3
    for copied, original in sparsifier.follows.items():
        mine, of = model.get_submodule(copied), model.get_submodule(original)
        assert torch.equal(mine.topology.coords, of.topology.coords)
    torch.testing.assert_close(
        model["teacher"].eval()(x), densify(copy.deepcopy(model["teacher"]))(x)
    )


def test_two_networks_that_begin_alike_and_both_train_do_not_follow() -> None:
    """A separate call of `attach` for the second optimizer gives the same result."""
    model = nn.ModuleDict({"one": Net()})
    model["two"] = copy.deepcopy(model["one"])
    sparsifier = Sparsifier(model, 16, **OPTIONS)
    first, second = adamw(model["one"].parameters()), adamw(model["two"].parameters())
    sparsifier.attach(first)
    sparsifier.attach(second)
    assert not sparsifier.follows and len(sparsifier.layers) == 4
    train(model["two"], second, range(8))
    assert sparsifier.n_updates == 2
    assert {*sparsifier.last_update.layers} == {"two.net.0", "two.net.2"}


# -- declared by `follow` -------------------------------------------------------------------------


class Pretrained(Net):
    """Its target was trained before, and equals no other network."""

    def __init__(self) -> None:
        super().__init__()
        self.target = nn.Sequential(*(copy.deepcopy(m) for m in self.net)).requires_grad_(False)
        with torch.no_grad():
            for parameter in self.target.parameters():
                parameter.mul_(1.5)


@pytest.mark.parametrize("follow", [{"target": "net"}, {"target.0": "net.0", "target.2": "net.2"}])
def test_follow_declares_copies_that_weights_do_not_reveal(follow: dict[str, str]) -> None:
    model = Pretrained()
    weight = model.target[0].weight.detach().clone()
    sparsifier = Sparsifier(model, 16, density=0.25, follow=follow, **OPTIONS)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    kept = model.target[0].dense_weight()
    torch.testing.assert_close(kept, (kept != 0) * weight * 0.25**-0.5)
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(16))
    for i in (0, 2):
        assert torch.equal(model.target[i].topology.coords, model.net[i].topology.coords)
    again = Sparsifier(model, 16, density=0.25, follow=follow, **OPTIONS)
    assert again.follows == sparsifier.follows


@pytest.mark.parametrize(
    ("follow", "error", "message"),
    [
        ({"taget": "net"}, ValueError, "'taget', which the model does not"),
        ({"target": "ne"}, ValueError, "'ne', which the model does not"),
        ({"target.1": "net.1"}, ValueError, "'target.1', which has none"),
        ({"target.0": "net.2"}, ValueError, r"same shape at 'net\.2' \(layer 'target\.0'\)"),
        ({"target": "net", "net": "head"}, ValueError, "'net', which is a copy itself"),
        (["target"], TypeError, "map names of modules"),
        ({"target": 1}, TypeError, "map names of modules"),
    ],
)
def test_a_wrong_follow_is_refused(follow: Any, error: type[Exception], message: str) -> None:
    model = Pretrained()
    with pytest.raises(error, match=message):
        Sparsifier(model, 16, follow=follow, **OPTIONS)
    assert not sparse(model)


# -- frozen layers that are no copies -------------------------------------------------------------


def test_other_frozen_layers_stay_dense_unless_named_in_full() -> None:
    for include, expected in ((["*"], []), (["*", "target.0"], ["target.0"])):
        model = Pretrained()
        before = model.target(torch.ones(2, 64))
        report = sparsify(model, block_size=16, density=0.25, include=include, exclude=["head"])
        assert [name for name in report.layers if name.startswith("target")] == expected
        left = {n: why for n, why in report.skipped.items() if n.startswith("target")}
        assert left == {n: "frozen" for n in ("target.0", "target.2") if n not in expected}
        assert expected or torch.equal(model.target(torch.ones(2, 64)), before)


def test_layers_of_a_frozen_model_stay_dense() -> None:
    """Only a head or only biases are trained."""
    for trained in ("head", "bias"):
        model = Net()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained in name)
        with pytest.raises(ValueError, match=r"net\.0: frozen.*has its full name"):
            sparsify(model, block_size=16, density=0.25)


def test_a_model_that_is_not_to_be_trained_is_taken_as_it_is() -> None:
    model = Net().requires_grad_(False)
    report = sparsify(model, block_size=16, density=0.25, init="magnitude")
    assert [*report.layers] == ["net.0", "net.2"]


def test_what_is_excluded_does_not_follow() -> None:
    """Its outputs do not change, as a reference model requires."""
    model = WithTarget(frozen)
    before = model.target(torch.ones(2, 64))
    sparsifier = Sparsifier(model, 16, **{**OPTIONS, "exclude": ["target.*"]})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    train(model, optimizer, range(16))
    assert not sparsifier.follows and torch.equal(model.target(torch.ones(2, 64)), before)


def test_constants_and_equals_of_several_are_no_copies() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.zero, self.zeros = nn.Linear(32, 32), nn.Linear(32, 32)
            self.odd = copy.deepcopy(self.a)
            self.b.load_state_dict(self.a.state_dict())
            for layer in (self.zero, self.zeros):
                nn.init.zeros_(layer.weight)
            for layer in (self.odd, self.zeros):
                layer.requires_grad_(False)

    model = Model()
    report = sparsify(model, block_size=16, density=0.5)
    assert [*report.layers] == ["a", "b", "zero"] and not report.follows
    assert report.skipped["zeros"] == "frozen"
    assert "equal to 2 layers" in report.skipped["odd"] and "`follow`" in report.skipped["odd"]


def test_an_encoder_that_is_partly_frozen_stays_as_it_is_there() -> None:
    model = encoder()
    model.layers[0].requires_grad_(False)
    x = torch.randn(2, 3, 32)
    before = model.layers[0](x)
    report = sparsify(model, block_size=16, density=0.5)
    assert [*report.layers] == [f"layers.{i}.linear{j}" for i in (1, 2) for j in (1, 2)]
    assert torch.equal(model.layers[0](x), before)


def test_a_copy_adopts_blocks_whatever_it_had() -> None:
    """Capacities and sizes differ; blocks that both layers have keep their weights."""
    for size, density in ((16, 0.25), (16, 0.75), (32, 0.5)):
        original = BlockSparseLinear(64, 64, block_size=16, density=0.5)
        layer = BlockSparseLinear(64, 64, block_size=size, density=density)
        before, values = layer.dense_weight(), layer.values
        layer._adopt_blocks_of(original)
        assert layer.values is values
        assert torch.equal(layer.topology.coords, original.topology.coords)
        assert layer.topology is not original.topology
        common = (original.dense_weight() != 0) & (before != 0) & (size == 16)
        expected = torch.where(common, before, original.dense_weight())
        assert torch.equal(layer.dense_weight(), expected)


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.dense_weight() for name, layer in sparse(model).items()}


def test_a_training_with_a_copy_resumes_bit_for_bit() -> None:
    def begin() -> tuple[WithTarget, Sparsifier, torch.optim.Optimizer]:
        model = WithTarget(copy.deepcopy)
        sparsifier = Sparsifier(model, 24, density=FALLING, **OPTIONS)
        return model, sparsifier, adamw([*model.net.parameters(), *model.head.parameters()])

    whole, sparsifier, optimizer = begin()
    sparsifier.attach(optimizer)
    train(whole, optimizer, range(10), lambda _: average(whole))
    saved = copy.deepcopy((whole.state_dict(), optimizer.state_dict(), sparsifier.state_dict()))
    train(whole, optimizer, range(10, 24), lambda _: average(whole))

    model, sparsifier, optimizer = begin()
    model.load_state_dict(saved[0])
    sparsifier.load_state_dict(saved[2])
    optimizer.load_state_dict(saved[1])
    sparsifier.attach(optimizer)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    train(model, optimizer, range(10, 24), lambda _: average(model))
    expected = weights_of(whole)
    for name, weight in weights_of(model).items():
        assert torch.equal(weight, expected[name]), name


# -- copies during training -----------------------------------------------------------------------


def attached(model: nn.Module, *parameters: nn.Parameter, **options: Any) -> Any:
    """Return a sparsifier of a model, and the optimizer to which it is attached."""
    sparsifier = Sparsifier(model, 40, **{"density": 0.25, **OPTIONS, **options})
    optimizer = adamw(parameters or model.parameters())
    sparsifier.attach(optimizer)
    return sparsifier, optimizer


def same_blocks(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(sparse(one).values(), sparse(other).values(), strict=True)
    return all(torch.equal(a.topology.coords, b.topology.coords) for a, b in pairs)


@pytest.mark.parametrize("when", ["before attach", "in training"])
def test_a_copy_that_is_frozen_later_follows_from_then_on(when: str) -> None:
    """The optimizer may hold all parameters."""
    model = WithTarget(copy.deepcopy)
    sparsifier = Sparsifier(model, 40, density=0.25, **OPTIONS)
    optimizer = adamw(model.parameters())
    if when == "before attach":
        model.target.requires_grad_(False)
    sparsifier.attach(optimizer)
    train(model, optimizer, range(6))
    model.target.requires_grad_(False)
    train(model, optimizer, range(6, 20))
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    assert [*sparsifier.layers] == ["net.0", "net.2"] and same_blocks(model.net, model.target)


def test_a_copy_that_is_made_in_training_follows_from_the_next_update_on() -> None:
    model = Net()
    sparsifier, optimizer = attached(model)
    train(model, optimizer, range(6))
    model.target = frozen(model.net)
    with pytest.warns(UserWarning, match=r"target\.0 follows net\.0, target\.2 follows net\.2"):
        train(model, optimizer, range(6, 20))
    assert sparsifier.n_updates > 3 and same_blocks(model.net, model.target)


def test_a_copy_that_begins_to_train_keeps_what_it_learns() -> None:
    """It was frozen at the swap, as in gradual unfreezing."""
    model = WithTarget(frozen)
    sparsifier, optimizer = attached(model)
    train(model, optimizer, range(6))
    model.target.requires_grad_(True)
    blocks = [layer.topology.coords.clone() for layer in sparse(model.target).values()]

    def loss_of_both(number: int) -> None:
        for parameter in model.target.parameters():
            parameter.grad = torch.ones_like(parameter)

    with pytest.warns(UserWarning, match=r"are trained now: target\.0, target\.2"):
        for number in range(6, 20):
            loss_of_both(number)
            train(model, optimizer, [number])
    assert not sparsifier.follows
    for layer, before in zip(sparse(model.target).values(), blocks, strict=True):
        assert torch.equal(layer.topology.coords, before)
        assert layer.values.flatten(1).any(1).all()
    assert not same_blocks(model.net, model.target)


def test_networks_that_learnt_before_keep_their_weights_whatever_is_attached_first() -> None:
    model = nn.ModuleDict({"one": Net()})
    model["two"] = copy.deepcopy(model["one"])
    sparsifier = Sparsifier(model, 16, **OPTIONS)
    with torch.no_grad():
        for parameter in model["two"].parameters():
            parameter.mul_(1.5)
    before = weights_of(model)
    sparsifier.attach(adamw(model["one"].parameters()))
    sparsifier.attach(adamw(model["two"].parameters()))
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model).items())
    assert not sparsifier.follows and len(sparsifier.layers) == 4


@pytest.mark.parametrize("way", ["state dict", "file", "built apart"])
def test_who_follows_whom_is_saved_with_the_weights(way: str, tmp_path: Path) -> None:
    """A loaded model is trained again, with a target that equals no other network."""
    model = WithTarget(frozen)
    sparsifier, optimizer = attached(model)
    train(model, optimizer, range(10), lambda _: average(model))
    sparsifier.detach()
    if way == "built apart":  # as reinforcement learning code often does
        other = nn.ModuleDict({"net": Net().net, "target": Net().net, "head": Net().head})
        torch.nn.init.normal_(other["target"][0].weight)
        sparsify(other, block_size=16, density=0.25, exclude=["head"])
        other["target"].load_state_dict(other["net"].state_dict())
        other["target"].requires_grad_(False)
        again = Sparsifier(other, 16, density=0.25, **OPTIONS)
        assert again.follows == {"target.0": "net.0", "target.2": "net.2"}
        return
    if way == "file":
        torch.save(model.state_dict(), tmp_path / "model.pt")
        loaded = load_sparse(WithTarget(frozen), tmp_path / "model.pt")
    else:
        loaded = load_sparse(WithTarget(frozen), model.state_dict())
    sparsifier, optimizer = attached(loaded)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    train(loaded, optimizer, range(10), lambda _: average(loaded))
    assert sparsifier.n_updates > 1 and same_blocks(loaded.net, loaded.target)


def test_one_layer_that_trains_has_no_copies_among_its_clones() -> None:
    for n_layers in (2, 3):
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True)
        model = nn.TransformerEncoder(layer, n_layers).requires_grad_(False)
        model.layers[-1].requires_grad_(True)
        x = torch.randn(2, 3, 32)
        before = model.layers[0](x)
        report = sparsify(model, block_size=16, density=0.5)
        assert not report.follows and torch.equal(model.layers[0](x), before)


def test_zeros_follow_where_the_layers_around_them_do() -> None:
    class Residual(Net):
        def __init__(self) -> None:
            super().__init__()
            nn.init.zeros_(self.net[2].weight)
            self.apart = nn.Linear(64, 64).requires_grad_(False)
            nn.init.eye_(self.apart.weight)
            self.target = frozen(self.net)

    sparsifier = Sparsifier(Residual(), 16, **OPTIONS)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}
    assert sparsifier.report.skipped["apart"] == "frozen"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_copy_may_have_another_dtype(dtype: torch.dtype) -> None:
    model = WithTarget(lambda net: frozen(net).to(dtype))
    sparsifier, optimizer = attached(model)
    train(model, optimizer, range(8))
    assert len(sparsifier.follows) == 2 and same_blocks(model.net, model.target)
    assert model.target[0].values.dtype == dtype


def test_copies_of_included_layers_need_not_be_included() -> None:
    model = WithTarget(frozen)
    options = {**OPTIONS, "include": ["net.*"]}
    sparsifier = Sparsifier(model, 16, **options)
    assert sparsifier.follows == {"target.0": "net.0", "target.2": "net.2"}


@torch.no_grad()
def mix(copied: nn.Module, source: nn.Module) -> None:
    for mine, theirs in zip(copied.parameters(), source.parameters(), strict=True):
        mine.lerp_(theirs, 0.1)


def test_averages_outside_the_model_warn_once_and_snapshots_do_not() -> None:
    model = Net()
    _, optimizer = attached(model)
    outside = copy.deepcopy(model.net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(9))
    with pytest.warns(UserWarning, match=r"outside the model: net\.0, net\.2.*copies=") as warned:
        train(model, optimizer, range(9, 24), lambda _: mix(outside, model.net))
    assert sum("outside the model" in str(each.message) for each in warned) == 1
    known = Net()
    sparsifier = Sparsifier(known, 40, density=0.25, **OPTIONS)
    optimizer, outside = adamw(known.parameters()), copy.deepcopy(known)
    sparsifier.attach(optimizer, copies=lambda name: [outside.get_submodule(name)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(known, optimizer, range(20), lambda _: mix(outside, known))
    assert same_blocks(known, outside)


def test_a_copy_that_is_never_written_to_is_named() -> None:
    model = WithTarget(frozen)
    _, optimizer = attached(model)
    with pytest.warns(UserWarning, match=r"target\.0, target\.2\..*exclude=\['target\.\*'\]"):
        train(model, optimizer, range(20))
    model = WithTarget(frozen)
    _, optimizer = attached(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(20), lambda _: average(model))


# -- equal layers that are no copies --------------------------------------------------------------


class Twins(nn.Module):
    """Two networks that are initially equal."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Net()
        self.b = copy.deepcopy(self.a)


def alternate(model: Twins, steps: range, optimizers: Any, toggle: bool) -> None:
    """Train two networks alternately, optionally freezing the other one meanwhile."""
    for number in steps:
        for net, other, optimizer in zip(
            (model.a, model.b), (model.b, model.a), optimizers, strict=True
        ):
            other.requires_grad_(not toggle)
            train(net, optimizer, [number if net is model.a else 1000 + number])
            other.requires_grad_(True)


def test_a_temporarily_frozen_layer_is_no_copy() -> None:
    """Lightning's `toggle_optimizer` freezes layers like this."""
    results = []
    for toggle in (False, True):
        model = Twins()
        sparsifier = Sparsifier(model, 24, density=0.25, **OPTIONS)
        optimizers = adamw(model.a.parameters()), adamw(model.b.parameters())
        sparsifier.attach(*optimizers)
        alternate(model, range(24), optimizers, toggle)
        assert not sparsifier.follows and sparsifier.n_updates == 10
        results.append(weights_of(model))
    for name, weight in results[0].items():
        assert torch.equal(results[1][name], weight), name


def test_a_layer_that_has_learnt_and_is_frozen_keeps_its_weights() -> None:
    model = Twins()
    sparsifier = Sparsifier(model, 40, density=0.25, **OPTIONS)
    optimizers = adamw(model.a.parameters()), adamw(model.b.parameters())
    sparsifier.attach(*optimizers)
    alternate(model, range(10), optimizers, toggle=False)
    model.a.requires_grad_(False)
    before = weights_of(model.a)
    train(model.b, optimizers[1], range(10, 30))
    assert not sparsifier.follows
    assert all(torch.equal(weight, before[name]) for name, weight in weights_of(model.a).items())


def test_what_another_sparsifier_evolves_is_no_copy() -> None:
    model = Twins()
    sparsify(model, block_size=16, density=0.25, exclude=["head"])
    optimizers = adamw(model.a.parameters()), adamw(model.b.parameters())
    sparsifiers = []
    for name, optimizer in zip("ab", optimizers, strict=True):
        options = {**OPTIONS, "include": [f"{name}.*"]}
        sparsifiers.append(Sparsifier(model, 24, density=0.25, **options))
        sparsifiers[-1].attach(optimizer)
    alternate(model, range(24), optimizers, toggle=False)
    assert all(each.n_updates == 5 and not each.follows for each in sparsifiers)
    assert not same_blocks(model.a.net, model.b.net)


def test_an_unfrozen_copy_in_the_optimizer_is_named() -> None:
    """Student and teacher change roles; the teacher was frozen at the swap."""

    class Changing(WithTarget):
        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(
                self.net(x) if self.net[0].bias.requires_grad else self.target(x)
            )
            return out

    model = Changing(frozen)
    sparsifier, optimizer = attached(model)
    train(model, optimizer, range(6))
    model.net.requires_grad_(False)
    model.target.requires_grad_(True)
    with pytest.warns(UserWarning, match=r"are trained now: target\.0, target\.2"):
        train(model, optimizer, range(6, 20))
    assert not sparsifier.follows
    assert all(layer.values.flatten(1).any(1).all() for layer in sparse(model.target).values())


@pytest.mark.parametrize("density", DENSITIES)
def test_a_copy_follows_while_its_source_is_temporarily_frozen(density: str) -> None:
    """The copy is an average of a generator; its discriminator is updated in between."""
    model = nn.ModuleDict({"g": Net(), "d": Net()})
    with torch.no_grad():
        for parameter in model["d"].parameters():
            parameter.mul_(0.9)
    model["ema"] = copy.deepcopy(model["g"]).requires_grad_(False)
    sparsifier = Sparsifier(model, 24, density=DENSITIES[density], **OPTIONS)
    optimizers = [adamw(model[name].parameters()) for name in "gd"]
    sparsifier.attach(*optimizers)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(copies|Copies|follow)")
        for number in range(24):
            for name, other, optimizer in zip("gd", "dg", optimizers, strict=True):
                model[other].requires_grad_(False)
                train(model[name], optimizer, [number])
                model[other].requires_grad_(True)
            mix(model["ema"], model["g"])
    assert sparsifier.follows == {"ema.net.0": "g.net.0", "ema.net.2": "g.net.2"}
    assert same_blocks(model["ema"], model["g"])


def test_a_mean_of_state_dicts_is_loaded() -> None:
    """PyTorch's tutorial on deep Q-learning averages over all keys like this."""
    model = WithTarget(frozen)
    _, optimizer = attached(model)

    def after(number: int) -> None:
        state, now = model.target.state_dict(), model.net.state_dict()
        for key in now:
            state[key] = now[key] * 0.005 + state[key] * (1 - 0.005)
        model.target.load_state_dict(state)

    train(model, optimizer, range(12), after)
    assert same_blocks(model.target, model.net)
    state = model.target.state_dict()
    state["0._extra_state"] = state["0._extra_state"] * 0.5
    with pytest.raises(RuntimeError, match="averaged state dicts must be equal"):
        model.target.load_state_dict(state)


def test_a_target_that_is_mixed_at_the_end_of_an_iteration_is_no_reference() -> None:
    """Two optimizers step in an iteration, each with its own updates."""
    model = Twins()
    model.target = copy.deepcopy(model.a).requires_grad_(False)
    with torch.no_grad():
        for parameter in model.b.parameters():
            parameter.mul_(0.9)
    sparsifier = Sparsifier(model, 24, density=0.25, **OPTIONS)
    optimizers = adamw(model.a.parameters()), adamw(model.b.parameters())
    sparsifier.attach(*optimizers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for number in range(24):
            alternate(model, range(number, number + 1), optimizers, toggle=False)
            mix(model.target, model.a)


def test_layers_that_are_frozen_after_the_swap_are_named() -> None:
    model = Net()
    sparsifier = Sparsifier(model, 24, density=0.25, **OPTIONS)
    model.net[0].requires_grad_(False)
    with pytest.warns(UserWarning, match=r"layers are frozen: net\.0\. .*before the swap"):
        sparsifier.attach(adamw(model.parameters()))
