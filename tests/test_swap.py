"""The swap keeps the objects: who refers to a layer, or to its weight, goes on."""

from __future__ import annotations

import copy
import pickle
import warnings
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


# -- optimizers that go on ------------------------------------------------------------------------

Optim = torch.optim
GO_ON: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: Optim.AdamW(p, fused=True),
    "foreach": lambda p: Optim.AdamW(p, foreach=True),
    "one by one": lambda p: Optim.Adam(p, foreach=False, amsgrad=True),
    "sgd": lambda p: Optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adagrad": lambda p: Optim.Adagrad(p, fused=True, initial_accumulator_value=0.5),
    "adafactor": Optim.Adafactor,
    "rprop": Optim.Rprop,
}


def loaded(model: nn.Module) -> None:
    """Blocks of another capacity."""
    model.load_state_dict(swapped(Net(), exclude=["head"]).state_dict())


def sparse_anew(model: nn.Module) -> None:
    densify(model)
    swapped(model, exclude=["head"])


def shrunk(model: Any) -> None:
    """As while another optimizer is attached."""
    for layer in sparse(model).values():
        layer.shrink(layer.topology.n_blocks)


CHANGES: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "sparsify": (False, lambda model: swapped(model, exclude=["head"])),
    "densify": (True, densify),
    "load": (True, loaded),
    "sparsify anew": (True, sparse_anew),
    "shrink": (True, shrunk),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("of", GO_ON)
def test_an_optimizer_that_goes_on_begins_anew_for_what_has_another_shape(
    of: str, change: str
) -> None:
    was_sparse, make_other = CHANGES[change]
    model = Net()
    if was_sparse:
        sparsify(model, block_size=16, density=0.25, max_density=0.75, exclude=["head"])
    optimizer = GO_ON[of](model.parameters())
    train(model, optimizer, range(3))
    make_other(model)
    # Hooks of the optimizer's own come after it.
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(fits(optimizer)))
    twin = copy.deepcopy(model)
    usual = GO_ON[of](twin.parameters())
    with pytest.warns(UserWarning, match=r"begins anew for 2 of them") as said:
        train(model, optimizer, [3])
    train(twin, usual, [3])
    assert len(said) == 1 and seen == [True] and fits(optimizer)
    weights = [layer.weight if change == "densify" else layer.values for layer in model.net[::2]]
    others = [layer.weight if change == "densify" else layer.values for layer in twin.net[::2]]
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))
    if of not in ("sgd", "adagrad"):
        assert optimizer.state[weights[0]]["step"] == 1
        assert optimizer.state[model.net[0].bias]["step"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))


def fits(optimizer: torch.optim.Optimizer) -> bool:
    """Whether state has the sizes of its parameter, reduced or not."""
    return all(
        all(size in (1, whole) for size, whole in zip(tensor.shape, p.shape, strict=True))
        for p, state in optimizer.state.items()
        for tensor in state.values()
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.numel() > 1
    )


def restored_before(model: Any, optimizer: Any) -> tuple[Any, Any]:
    other = GO_ON["fused"](model.parameters())
    other.load_state_dict(optimizer.state_dict())
    return swapped(model), other


def restored_after(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """A step has been seen since the swap."""
    saved = copy.deepcopy(optimizer.state_dict())
    other = GO_ON["fused"](swapped(model).parameters())
    train(model, other, [3])
    other.load_state_dict(saved)
    return model, other


def copied(model: Any, optimizer: Any) -> tuple[Any, Any]:
    found: tuple[Any, Any] = copy.deepcopy((swapped(model), optimizer))
    return found


@pytest.mark.parametrize("how", [restored_before, restored_after, copied])
def test_state_of_old_shapes_is_found_wherever_it_comes_from(how: Callable[..., Any]) -> None:
    model = Net()
    optimizer = GO_ON["fused"](model.parameters())
    train(model, optimizer, range(3))
    model, optimizer = how(model, optimizer)
    with pytest.warns(UserWarning, match="begins anew"):
        train(model, optimizer, [3])
    assert fits(optimizer)


def test_a_compiled_step_begins_anew_too() -> None:
    model = Net()
    optimizer = Optim.AdamW(model.parameters())
    take_step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        loss_of(model, number).backward()
        take_step()
        if number == 0:
            swapped(model)
    assert fits(optimizer) and model.net[0].values in optimizer.state


def test_state_of_other_parameters_of_such_shapes_stays() -> None:
    """Of a convolution that has the shape of the blocks, and of means of a dense weight."""
    swapped(Net())  # 64 x 128 has become 16 blocks
    convolution = nn.Parameter(torch.randn(16, 16, 16))
    weight = nn.Parameter(torch.randn(64, 128))
    for of in GO_ON.values():
        optimizer = of([convolution, weight])
        for number in range(2):
            densify(swapped(Net()))
            for each in (convolution, weight):
                each.grad = torch.randn_like(each)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                optimizer.step()
            steps = [state.get("step", number + 1) for state in optimizer.state.values()]
            assert steps == [number + 1] * 2


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
