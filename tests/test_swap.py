"""The swap keeps the objects: who refers to a layer, or to its weight, goes on."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, Sparsifier, densify, sparsify
from sparse_lightning.mlp import BlockSparseMLP
from tests.loops import Net, adamw, loss_of, sparse, train


def swapped(model: nn.Module, **options: Any) -> nn.Module:
    sparsify(model, block_size=16, density=0.5, **options)
    return model


class Listed(nn.Module):
    """Its forward goes through a plain list of layers that are registered elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = [nn.Linear(64, 64) for _ in range(3)]
        self.by_name = {f"fc{i}": layer for i, layer in enumerate(self.layers)}
        for name, layer in self.by_name.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def test_layers_in_a_list_or_a_dict_are_those_that_train() -> None:
    model = Listed()
    sparsifier = Sparsifier(model, 20, block_size=16, density=0.5, update={"every_n_steps": 4})
    assert [*model.by_name.values()] == model.layers == [*sparsifier.layers.values()]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier.attach(optimizer)
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(20):
        loss = (model(x) - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("init", ["random", "magnitude"])
def test_parameters_stay_the_same_objects_in_the_same_order(init: str) -> None:
    model = Net()
    before = [id(parameter) for parameter in model.parameters()]
    modules = [id(module) for module in model.modules()]
    swapped(model, init=init, exclude=["head"])
    names = [name for name, _ in model.named_parameters()]
    assert names == ["net.0.values", "net.0.bias", "net.2.values", "net.2.bias", *names[4:]]
    assert [id(parameter) for parameter in model.parameters()] == before
    densify(model)
    assert [id(parameter) for parameter in model.parameters()] == before
    assert [id(module) for module in model.modules()] == modules
    assert (
        type(model.net) is nn.Sequential
        and vars(model.net[0]).keys() == vars(nn.Linear(1, 1)).keys()
    )


def test_an_optimizer_that_was_built_before_trains_the_layers() -> None:
    early, late = Net(), Net()
    optimizer = adamw(early.parameters())
    first = Sparsifier(early, 12, block_size=16, update={"every_n_steps": 4})
    second = Sparsifier(late, 12, block_size=16, update={"every_n_steps": 4})
    first.attach(optimizer)
    usual = adamw(late.parameters())
    second.attach(usual)
    assert train(early, optimizer, range(12)) == train(late, usual, range(12))
    for name, layer in sparse(early).items():
        assert torch.equal(layer.values, sparse(late)[name].values)


def test_an_optimizer_that_has_state_of_dense_weights_begins_anew_for_them() -> None:
    model = Net()
    optimizer = adamw(model.parameters())
    train(model, optimizer, range(3))
    kept = optimizer.state[model.net[0].bias]["exp_avg"].clone()
    sparsifier = Sparsifier(model, 12, block_size=16, update={"every_n_steps": 4})
    with pytest.warns(UserWarning, match=r"net\.0.*net\.2"):
        sparsifier.attach(optimizer)
    assert model.net[0].values not in optimizer.state
    assert torch.equal(optimizer.state[model.net[0].bias]["exp_avg"], kept)
    train(model, optimizer, range(12))
    assert optimizer.state[model.net[0].values]["exp_avg"].shape == model.net[0].values.shape


Register = Callable[[nn.Module, Callable[..., None]], Any]
HOOKS: dict[str, Register] = {
    "forward": lambda layer, hook: layer.register_forward_hook(hook),
    "forward pre": lambda layer, hook: layer.register_forward_pre_hook(hook),
    "backward": lambda layer, hook: layer.register_full_backward_hook(hook),
    "weight": lambda layer, hook: layer.weight.register_hook(hook),
    "weight, accumulated": lambda layer, hook: layer.weight.register_post_accumulate_grad_hook(
        hook
    ),
    "state dict": lambda layer, hook: layer.register_state_dict_post_hook(hook),
    "state dict pre": lambda layer, hook: layer.register_state_dict_pre_hook(hook),
    "load": lambda layer, hook: layer.register_load_state_dict_post_hook(hook),
}


@pytest.mark.parametrize("where", HOOKS)
def test_hooks_go_on(where: str) -> None:
    """Also within a sequence that is computed in one go without them."""
    model, calls = Net(), []
    HOOKS[where](model.net[0], lambda *args: calls.append(args))
    swapped(model)
    assert type(model.net) is BlockSparseMLP and type(model.net[0]) is BlockSparseLinear
    loss_of(model, 0).backward()
    model.load_state_dict(model.state_dict())
    assert len(calls) == 1
    if where == "weight":
        assert calls[0][0].shape == model.net[0].values.shape
    assert model.net[0].values.grad.any()


def test_a_tensor_hook_changes_the_gradient_as_before() -> None:
    """As of a wrapper that scales or clips the gradient of single parameters."""
    model, plain = swapped(Net()), Net()
    plain.net[0].weight.register_hook(lambda gradient: gradient * 2)
    swapped(plain)
    for each in (model, plain):
        loss_of(each, 0).backward()
    torch.testing.assert_close(plain.net[0].values.grad, 2 * model.net[0].values.grad)


def test_attributes_stay() -> None:
    model = Net()
    model.net[0].lr_scale, model.net[0].weight._no_weight_decay = 0.5, True
    model.net[0].register_buffer("seen", torch.ones(3))
    swapped(model)
    assert model.net[0].lr_scale == 0.5 and model.net[0].values._no_weight_decay
    assert model.net[0].seen.sum() == 3 and "net.0.seen" in model.state_dict()
    densify(model)
    assert model.net[0].lr_scale == 0.5 and model.net[0].weight._no_weight_decay


def test_a_gradient_that_is_there_is_of_the_dense_weight_and_goes() -> None:
    model = Net()
    loss_of(model, 0).backward()
    bias = model.net[0].bias.grad.clone()
    swapped(model)
    assert model.net[0].values.grad is None and torch.equal(model.net[0].bias.grad, bias)
    loss_of(model, 0).backward()
    assert model.net[0].values.grad.shape == model.net[0].values.shape


def test_a_compiled_module_follows() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 64)
    torch.testing.assert_close(compiled(x), model(x))
    for change in (swapped, densify):
        change(model)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_swapped_model_stand_by_themselves(how: Callable[[Any], Any]) -> None:
    model = swapped(Net())
    other = how(model)
    assert torch.equal(other(torch.ones(2, 64)), model(torch.ones(2, 64)))
    densify(other)
    assert type(other.net[0]) is nn.Linear and type(model.net[0]) is BlockSparseLinear


def test_a_layer_in_training_is_not_made_dense() -> None:
    model = Net()
    sparsifier = Sparsifier(model, 12, block_size=16)
    sparsifier.attach(adamw(model.parameters()))
    with pytest.raises(RuntimeError, match=r"`detach\(\)` first.*|.*layer 'net.0'"):
        densify(model)
    assert type(model.net[0]) is BlockSparseLinear
    sparsifier.detach()
    densify(model)


def test_layers_that_get_no_gradient_are_named() -> None:
    """As those are that nobody calls, since `forward` has copies of them."""

    class Uncalled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.others = [copy.deepcopy(self.net[2])]

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(self.others[0](self.net[0](x).relu()))
            return out

    model = Uncalled()
    sparsifier = Sparsifier(model, 40, block_size=16, grow="random", update={"until": 1.0})
    optimizer = adamw(model.parameters())
    sparsifier.attach(optimizer)
    with pytest.warns(UserWarning, match=r"no gradient in 10 steps.*: net\.2\. ") as warned:
        train(model, optimizer, range(40))
    assert sum("no gradient in 10 steps" in str(each.message) for each in warned) == 1


# -- a weight that is not there -------------------------------------------------------------------


@pytest.mark.parametrize("use", ["read", "tie"])
def test_who_reads_or_ties_the_weight_learns_which_layer_it_is(use: str) -> None:
    model = swapped(Net())
    assert not hasattr(model.net[0], "weight")
    with pytest.raises(AttributeError, match=r"no `weight`.*layer 'net\.0'.*exclude=\['net\.0'\]"):
        if use == "read":
            model.net[0].weight.norm()
        else:
            model.net[0].weight = nn.Parameter(torch.zeros(128, 64))
    assert [n for n, _ in model.net[0].named_parameters()] == ["values", "bias"]
