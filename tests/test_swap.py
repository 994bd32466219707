"""The swap keeps objects: references to layers and their weights stay valid."""

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
    """Its forward uses a plain list of layers, which are also registered as attributes."""

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


def test_layers_in_lists_and_dicts_are_the_trained_layers() -> None:
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


def test_an_optimizer_that_is_built_before_the_swap_trains_the_layers() -> None:
    early, late = Net(), Net()
    optimizer = adamw(early.parameters())
    first = Sparsifier(early, 12, block_size=16, update={"every_n_steps": 4})
    second = Sparsifier(late, 12, block_size=16, update={"every_n_steps": 4})
    first.attach(optimizer)
    late_optimizer = adamw(late.parameters())
    second.attach(late_optimizer)
    assert train(early, optimizer, range(12)) == train(late, late_optimizer, range(12))
    for name, layer in sparse(early).items():
        assert torch.equal(layer.values, sparse(late)[name].values)


def test_optimizer_state_of_dense_weights_is_reset() -> None:
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


# -- optimizers without a sparsifier --------------------------------------------------------------

Optim = torch.optim
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused": lambda p: Optim.AdamW(p, fused=True),
    "foreach": lambda p: Optim.AdamW(p, foreach=True),
    "one by one": lambda p: Optim.Adam(p, foreach=False, amsgrad=True),
    "sgd": lambda p: Optim.SGD(p, 0.1, momentum=0.9, fused=True),
    "adagrad": lambda p: Optim.Adagrad(p, fused=True, initial_accumulator_value=0.5),
    "adafactor": Optim.Adafactor,
    "rprop": Optim.Rprop,
}


def load_other(model: nn.Module) -> None:
    """Load blocks of another capacity."""
    model.load_state_dict(swapped(Net(), exclude=["head"]).state_dict())


def make_sparse_again(model: nn.Module) -> None:
    densify(model)
    swapped(model, exclude=["head"])


def shrink(model: Any) -> None:
    """Shrink the layers, as an update does while another optimizer is attached."""
    for layer in sparse(model).values():
        layer.shrink(layer.topology.n_blocks)


CHANGES: dict[str, tuple[bool, Callable[[Any], Any]]] = {
    "sparsify": (False, lambda model: swapped(model, exclude=["head"])),
    "densify": (True, densify),
    "load": (True, load_other),
    "sparsify again": (True, make_sparse_again),
    "shrink": (True, shrink),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_resets_its_state_of_parameters_whose_shape_changes(
    kind: str, change: str
) -> None:
    was_sparse, apply_change = CHANGES[change]
    model = Net()
    if was_sparse:
        sparsify(model, block_size=16, density=0.25, max_density=0.75, exclude=["head"])
    optimizer = OPTIMIZERS[kind](model.parameters())
    train(model, optimizer, range(3))
    apply_change(model)
    # The state is already reset when other pre-hooks of the optimizer run.
    seen: list[bool] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(fits(optimizer)))
    twin = copy.deepcopy(model)
    new_optimizer = OPTIMIZERS[kind](twin.parameters())
    with pytest.warns(UserWarning, match=r"was reset for 2 of them") as said:
        train(model, optimizer, [3])
    train(twin, new_optimizer, [3])
    assert len(said) == 1 and seen == [True] and fits(optimizer)
    weights = [layer.weight if change == "densify" else layer.values for layer in model.net[::2]]
    others = [layer.weight if change == "densify" else layer.values for layer in twin.net[::2]]
    assert all(torch.equal(*pair) for pair in zip(weights, others, strict=True))
    if kind not in ("sgd", "adagrad"):
        assert optimizer.state[weights[0]]["step"] == 1
        assert optimizer.state[model.net[0].bias]["step"] == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(2))


def fits(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether each state tensor fits its parameter; reduced dimensions have size 1."""
    return all(
        all(size in (1, whole) for size, whole in zip(tensor.shape, p.shape, strict=True))
        for p, state in optimizer.state.items()
        for tensor in state.values()
        if isinstance(tensor, Tensor) and tensor.dim() and tensor.numel() > 1
    )


def restore_before_swap(model: Any, optimizer: Any) -> tuple[Any, Any]:
    other = OPTIMIZERS["fused"](model.parameters())
    other.load_state_dict(optimizer.state_dict())
    return swapped(model), other


def restore_after_swap(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """Restore the state after a step since the swap."""
    saved = copy.deepcopy(optimizer.state_dict())
    other = OPTIMIZERS["fused"](swapped(model).parameters())
    train(model, other, [3])
    other.load_state_dict(saved)
    return model, other


def deepcopy_both(model: Any, optimizer: Any) -> tuple[Any, Any]:
    both: tuple[Any, Any] = copy.deepcopy((swapped(model), optimizer))
    return both


@pytest.mark.parametrize("how", [restore_before_swap, restore_after_swap, deepcopy_both])
def test_state_of_old_shapes_is_found_however_it_was_restored(how: Callable[..., Any]) -> None:
    model = Net()
    optimizer = OPTIMIZERS["fused"](model.parameters())
    train(model, optimizer, range(3))
    model, optimizer = how(model, optimizer)
    with pytest.warns(UserWarning, match="was reset for"):
        train(model, optimizer, [3])
    assert fits(optimizer)


def test_a_compiled_step_resets_state_too() -> None:
    model = Net()
    optimizer = Optim.AdamW(model.parameters())
    take_step = torch.compile(optimizer.step, backend="eager")
    for number in range(2):
        loss_of(model, number).backward()
        take_step()
        if number == 0:
            swapped(model)
    assert fits(optimizer) and model.net[0].values in optimizer.state


def test_state_of_other_parameters_with_equal_shapes_is_kept() -> None:
    """The parameters have the shape of the blocks and of the dense weight."""
    swapped(Net())  # A 64x128 weight becomes 16 blocks.
    convolution = nn.Parameter(torch.randn(16, 16, 16))
    weight = nn.Parameter(torch.randn(64, 128))
    for make_optimizer in OPTIMIZERS.values():
        optimizer = make_optimizer([convolution, weight])
        for number in range(2):
            densify(swapped(Net()))
            for parameter in (convolution, weight):
                parameter.grad = torch.randn_like(parameter)
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
def test_hooks_still_run(where: str) -> None:
    """They run even in an MLP whose layers are otherwise fused."""
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
    """For example, a wrapper may scale or clip the gradients of individual parameters."""
    model, plain = swapped(Net()), Net()
    plain.net[0].weight.register_hook(lambda gradient: gradient * 2)
    swapped(plain)
    for net in (model, plain):
        loss_of(net, 0).backward()
    torch.testing.assert_close(plain.net[0].values.grad, 2 * model.net[0].values.grad)


def test_attributes_are_kept() -> None:
    model = Net()
    model.net[0].lr_scale, model.net[0].weight._no_weight_decay = 0.5, True
    model.net[0].register_buffer("seen", torch.ones(3))
    swapped(model)
    assert model.net[0].lr_scale == 0.5 and model.net[0].values._no_weight_decay
    assert model.net[0].seen.sum() == 3 and "net.0.seen" in model.state_dict()
    densify(model)
    assert model.net[0].lr_scale == 0.5 and model.net[0].weight._no_weight_decay


def test_the_gradient_of_the_dense_weight_is_dropped() -> None:
    model = Net()
    loss_of(model, 0).backward()
    bias = model.net[0].bias.grad.clone()
    swapped(model)
    assert model.net[0].values.grad is None and torch.equal(model.net[0].bias.grad, bias)
    loss_of(model, 0).backward()
    assert model.net[0].values.grad.shape == model.net[0].values.shape


def test_a_compiled_module_is_recompiled() -> None:
    model = Net()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(4, 64)
    torch.testing.assert_close(compiled(x), model(x))
    for change in (swapped, densify):
        change(model)
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_swapped_model_are_independent(how: Callable[[Any], Any]) -> None:
    model = swapped(Net())
    other = how(model)
    assert torch.equal(other(torch.ones(2, 64)), model(torch.ones(2, 64)))
    densify(other)
    assert type(other.net[0]) is nn.Linear and type(model.net[0]) is BlockSparseLinear


def test_a_layer_in_training_cannot_be_densified() -> None:
    model = Net()
    sparsifier = Sparsifier(model, 12, block_size=16)
    sparsifier.attach(adamw(model.parameters()))
    with pytest.raises(RuntimeError, match=r"`detach\(\)` first.*|.*layer 'net.0'"):
        densify(model)
    assert type(model.net[0]) is BlockSparseLinear
    sparsifier.detach()
    densify(model)


def test_layers_that_get_no_gradient_are_named() -> None:
    """A layer gets no gradient if `forward` calls a copy of it instead."""

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
    assert sum("no gradient in 10 steps" in str(w.message) for w in warned) == 1


# -- missing weight -------------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["read", "tie"])
def test_reading_or_tying_the_weight_raises_with_the_layers_name(use: str) -> None:
    model = swapped(Net())
    assert not hasattr(model.net[0], "weight")
    with pytest.raises(AttributeError, match=r"no `weight`.*layer 'net\.0'.*exclude=\['net\.0'\]"):
        if use == "read":
            model.net[0].weight.norm()
        else:
            model.net[0].weight = nn.Parameter(torch.zeros(128, 64))
    assert [n for n, _ in model.net[0].named_parameters()] == ["values", "bias"]
