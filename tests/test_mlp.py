"""`BlockSparseMLP` computes what `nn.Sequential` does, with fewer passes over memory."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, BlockSparseMLP, densify, sparsify
from sparse_lightning.kernels import ops

ACTIVATIONS = [nn.ReLU(), nn.GELU(), nn.GELU(approximate="tanh"), nn.SiLU()]


def layer(
    in_features: int, out_features: int, bias: bool = True, dtype: torch.dtype = torch.float64
) -> BlockSparseLinear:
    return BlockSparseLinear(
        in_features, out_features, bias, block_size=16, density=0.5, dtype=dtype
    )


def make_mlp(
    activation: nn.Module, bias: bool = True, dtype: torch.dtype = torch.float64
) -> BlockSparseMLP:
    torch.manual_seed(0)
    return BlockSparseMLP(layer(32, 48, bias, dtype), activation, layer(48, 32, bias, dtype))


def unfused(mlp: BlockSparseMLP) -> nn.Sequential:
    return nn.Sequential(*copy.deepcopy(list(mlp)))


def gradients(module: nn.Module, x: Tensor, dy: Tensor) -> list[Tensor]:
    """Return the output, the gradients of input and parameters, and the block norms."""
    layers = [part for part in module.modules() if isinstance(part, BlockSparseLinear)]
    for part in layers:
        part.arm(True)
        part.block_norms.grad = None
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = module(x)
    y.backward(dy)
    norms = [part.block_norms.grad for part in layers]
    assert x.grad is not None
    return [
        y.detach(),
        x.grad,
        *(p.grad for p in module.parameters() if p.grad is not None),
        *norms,
    ]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations that were fused with layers."""
    seen: list[str] = []
    original = ops.block_mlp

    def block_mlp(*arguments: object) -> object:
        seen.append(str(arguments[-1]))
        return original(*arguments)

    monkeypatch.setattr(ops, "block_mlp", block_mlp)
    return seen


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_results_equal_those_of_a_sequential(
    activation: nn.Module, bias: bool, calls: list[str]
) -> None:
    mlp = make_mlp(activation, bias)
    plain = unfused(mlp)
    x, dy = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    results, expected = gradients(mlp, x, dy), gradients(plain, x, dy)
    assert len(calls) == 1 and len(results) == len(expected) == (8 if bias else 6)
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_gradcheck(activation: nn.Module) -> None:
    mlp = make_mlp(activation)
    x = torch.randn(3, 32, dtype=torch.float64, requires_grad=True)
    parameters = dict(mlp.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        y: Tensor = torch.func.functional_call(mlp, named, (x,))
        return y

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


@pytest.mark.parametrize("frozen", [(), ("0.values", "0.bias"), ("2.values", "2.bias")], ids=str)
def test_frozen_parameters_have_no_gradients(frozen: tuple[str, ...]) -> None:
    mlp = make_mlp(nn.GELU())
    for name, parameter in mlp.named_parameters():
        parameter.requires_grad_(name not in frozen)
    mlp[0].arm(True), mlp[2].arm(True)
    mlp(torch.randn(4, 32).double()).sum().backward()
    with_gradient = {
        name for name, parameter in mlp.named_parameters() if parameter.grad is not None
    }
    assert with_gradient == {name for name, _ in mlp.named_parameters()} - set(frozen)
    for i in (0, 2):
        assert (mlp[i].block_norms.grad is None) == (f"{i}.values" in frozen)


@pytest.mark.parametrize("armed", [0, 2])
def test_layers_are_armed_independently(armed: int) -> None:
    mlp = make_mlp(nn.GELU())
    mlp[armed].arm(True)
    mlp(torch.randn(4, 32).double()).sum().backward()
    for i in (0, 2):
        assert (mlp[i].block_norms.grad is not None) == (i == armed)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: type, calls: list[str]) -> None:
    mlp = make_mlp(nn.SiLU())
    x = torch.randn(4, 32).double()
    with mode():
        assert torch.equal(mlp(x), unfused(mlp)(x))
    assert calls == ["silu"]


def test_autocast(calls: list[str]) -> None:
    mlp = make_mlp(nn.GELU(), dtype=torch.float32)
    plain = unfused(mlp)
    x, dy = torch.randn(4, 32), torch.randn(4, 32).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        results, expected = gradients(mlp, x, dy), gradients(plain, x, dy)
    assert calls and results[0].dtype == torch.bfloat16
    for ours, theirs in zip(results, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_other_modules_run_unfused(calls: list[str]) -> None:
    torch.manual_seed(0)
    modules = [layer(32, 48), nn.ReLU(), layer(48, 32), nn.Tanh(), nn.Linear(32, 32).double()]
    modules += [nn.GELU(), layer(32, 48), nn.SiLU(), layer(48, 16), nn.ReLU()]
    mlp = BlockSparseMLP(*modules)
    x = torch.randn(3, 32).double()
    assert torch.equal(mlp(x), unfused(mlp)(x))
    assert calls == ["relu", "silu"]


@pytest.mark.parametrize("place", [0, 1, 2])
def test_hooks_are_called(place: int, calls: list[str]) -> None:
    mlp = make_mlp(nn.GELU())
    seen: list[torch.Size] = []
    mlp[place].register_forward_hook(lambda _, __, output: seen.append(output.shape))
    mlp(torch.zeros(3, 32).double())
    assert len(seen) == 1 and not calls


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_forward_set_on_the_instance_is_called_until_it_is_removed(
    place: int, calls: list[str]
) -> None:
    mlp = make_mlp(nn.GELU())
    x = torch.randn(3, 32).double()
    plain, module = unfused(mlp), mlp[place]
    original = module.forward
    module.forward = lambda x: 2 * original(x)
    expected = x
    for i, part in enumerate(plain):
        expected = part(expected) * (2 if i == place else 1)
    assert torch.equal(mlp(x), expected) and not calls
    del module.forward
    assert torch.equal(mlp(x), plain(x)) and calls == ["gelu"]


def test_a_subclass_is_not_fused(calls: list[str]) -> None:
    class Scaled(nn.GELU):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    x = torch.randn(3, 32).double()
    mlp = make_mlp(Scaled())
    assert torch.equal(mlp(x), unfused(mlp)(x)) and not calls


def test_errors_name_the_rule() -> None:
    mlp = make_mlp(nn.GELU())
    with pytest.raises(ValueError, match="in_features=32"):
        mlp(torch.zeros(3, 48).double())
    with pytest.raises(TypeError, match=r"layer's dtype torch\.float64; got torch\.float32"):
        mlp(torch.zeros(3, 32))
    with pytest.raises(ValueError, match="'relu', 'gelu', 'gelu_tanh', 'silu'; got 'tanh'"):
        operands = mlp[0].values, mlp[0].bias, *mlp[0].topology.indices
        ops.block_linear_act(torch.zeros(3, 32).double(), *operands, "tanh")


def test_a_layer_that_runs_twice() -> None:
    mlp = make_mlp(nn.GELU())
    plain = unfused(mlp)
    x, dy = torch.randn(3, 32).double(), torch.randn(3, 32).double()
    for module in (mlp, plain):
        module[0].arm(True), module[2].arm(True)
        module(module(x)).backward(dy)
    for ours, theirs in zip(mlp.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
    for i in (0, 2):
        expected = plain[i].block_norms.grad
        torch.testing.assert_close(mlp[i].block_norms.grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_breaks(training: bool) -> None:
    mlp = make_mlp(nn.GELU(), dtype=torch.float32)
    x, dy = torch.randn(4, 32), torch.randn(4, 32)
    expected = gradients(copy.deepcopy(mlp), x, dy)
    compiled = torch.compile(mlp, fullgraph=True, backend="aot_eager")
    if not training:
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), expected[0])
        return
    x.requires_grad_()
    for part in (mlp[0], mlp[2]):
        part.arm(True)
    compiled(x).backward(dy)
    norms = [mlp[0].block_norms.grad, mlp[2].block_norms.grad]
    results = [x.grad, *(p.grad for p in mlp.parameters()), *norms]
    for ours, theirs in zip(results, expected[1:], strict=True):
        torch.testing.assert_close(ours, theirs)


# -- sparsify and densify -----------------------------------------------------------------------


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32), nn.Dropout(0.0))
    return nn.Sequential(mlp, nn.LayerNorm(32), nn.Sequential(nn.Linear(32, 48), nn.ReLU()))


def test_sparsify_fuses_plain_sequentials_and_densify_undoes_it(calls: list[str]) -> None:
    model = make_model()
    keys, mlp = list(make_model().state_dict()), model[0]
    sparsify(model, block_size=16, density=0.5)
    assert type(model[0]) is BlockSparseMLP and model[0] is mlp
    assert type(model) is type(model[2]) is nn.Sequential
    y = model(torch.ones(2, 32))
    assert calls == ["gelu"]
    densify(model)
    assert type(model[0]) is nn.Sequential and list(model.state_dict()) == keys
    torch.testing.assert_close(model(torch.ones(2, 32)), y)


def test_a_subclass_of_sequential_keeps_its_class() -> None:
    class Own(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input) + 1

    model = nn.ModuleList([Own(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))])
    sparsify(model, block_size=16, density=0.5)
    assert type(model[0]) is Own


def test_saving_and_copying() -> None:
    model = make_model()
    sparsify(model, block_size=16, density=0.5)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(2, 32)
    assert type(loaded[0]) is BlockSparseMLP
    assert torch.equal(loaded(x), model(x)) and torch.equal(copy.deepcopy(model)(x), model(x))
