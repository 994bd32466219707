"""Gradients of gradients, against the same model with masked dense weights."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, BlockSparseMLP, BlockTopology
from sparse_lightning.gathering import GradientAccumulator
from sparse_lightning.kernels import activations, cpu, ops, reference

ACTIVATIONS = {
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}
# Block masks of 3x4 blocks.
MASKS = {
    "full": torch.ones(3, 4).bool(),
    "low": torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 1]]).bool(),
    "some": torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool(),
}


def make_layer(
    mask: str = "some",
    spare: int = 2,
    bias: bool = True,
    transposed: bool = False,
    dtype: torch.dtype = torch.float64,
) -> BlockSparseLinear:
    """A layer of 64 -> 48 features, or of 48 -> 64."""
    blocks = MASKS[mask].T if transposed else MASKS[mask]
    topology = BlockTopology.from_mask(blocks, 16, capacity=int(blocks.sum()) + spare)
    return BlockSparseLinear(
        topology.in_features, topology.out_features, bias, topology=topology, dtype=dtype
    )


def make_mlp(activation: str, bias: bool = True) -> BlockSparseMLP:
    up, down = make_layer(bias=bias), make_layer(bias=bias, transposed=True)
    return BlockSparseMLP(up, ACTIVATIONS[activation], down)


def make_chain() -> nn.Sequential:
    """Dense, sparse, tanh, sparse."""
    dense = nn.Linear(32, 64).double()
    return nn.Sequential(dense, make_layer(), nn.Tanh(), make_layer(transposed=True))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Sequential(make_layer(), nn.Tanh()),
    "without bias": lambda: nn.Sequential(make_layer(bias=False), nn.Tanh()),
    "chain": make_chain,
    **{name: lambda name=name: make_mlp(name) for name in ACTIVATIONS},  # type: ignore[misc]
}


class Masked(nn.Module):
    """A layer in plain PyTorch: a dense weight times its mask."""

    def __init__(self, layer: BlockSparseLinear) -> None:
        super().__init__()
        self.weight = nn.Parameter(layer.dense_weight(), layer.values.requires_grad)
        self.register_buffer("mask", layer.topology.unpack(torch.ones_like(layer.values.detach())))
        self.bias = copy.deepcopy(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.mask, self.bias)


def masked(model: nn.Module) -> nn.Sequential:
    """The same model in plain PyTorch."""
    assert isinstance(model, nn.Sequential)
    return nn.Sequential(
        *(Masked(m) if isinstance(m, BlockSparseLinear) else copy.deepcopy(m) for m in model)
    )


def assert_learned_the_same(model: nn.Module, dense: nn.Sequential, error: float = 1e-9) -> None:
    """Fail unless every parameter has the same gradient as in the dense model."""
    compared = 0
    for ours, theirs in zip(model.children(), dense, strict=True):
        pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
        for i, (parameter, expected) in enumerate(pairs):
            gradient = zeros_if_none(expected)
            if isinstance(ours, BlockSparseLinear) and i == 0:
                gradient = ours.topology.pack(gradient)
            assert_near(zeros_if_none(parameter).to(gradient.dtype), gradient, error)
            compared += int(gradient.any())
    assert compared > 0


def zeros_if_none(leaf: Tensor) -> Tensor:
    """Return the gradient of a leaf, or zeros."""
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def assert_near(got: Tensor, expected: Tensor, error: float = 1e-9) -> None:
    assert got.shape == expected.shape
    if expected.any():
        assert (got - expected).norm() < error * expected.norm()
    else:
        assert not got.any()


def tokens(model: nn.Module, *lead: int, dtype: torch.dtype = torch.float64) -> Tensor:
    features = next(m.in_features for m in model.modules() if hasattr(m, "in_features"))
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*lead, features, generator=generator, dtype=dtype, requires_grad=True)


Model = Callable[[Tensor], Tensor]


def slope(model: Model, x: Tensor) -> Tensor:
    """Return the gradient of the sum of the outputs with respect to the input."""
    (dx,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    return dx


# -- objectives: each returns a scalar for backward -----------------------------------------------


def penalty(model: Model, x: Tensor) -> Tensor:
    return (slope(model, x).flatten(1).norm(dim=1) - 1).square().mean()


def loss_and_penalty(model: Model, x: Tensor) -> Tensor:
    """As in WGAN-GP, the penalty is evaluated at other inputs than the loss."""
    return model(x + 1).mean() - model(x).mean() + 10 * penalty(model, x)


def loss_and_penalty_of_one_forward(model: Model, x: Tensor) -> Tensor:
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    return y.sin().mean() + dx.square().sum()


def hessian_vector(model: Model, x: Tensor) -> Tensor:
    """Its gradient is the product of the Hessian of the parameters with the gradient."""
    assert isinstance(model, nn.Module)
    parameters = [p for p in model.parameters() if p.requires_grad]
    loss = model(x).square().mean()
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    return 0.5 * torch.stack([g.square().sum() for g in gradients]).sum()


def jacobian(model: Model, x: Tensor) -> Tensor:
    y = model(x)
    columns = torch.randn(2, *y.shape, generator=torch.Generator().manual_seed(3)).to(y)
    rows = [torch.autograd.grad(y, x, column, create_graph=True)[0] for column in columns]
    return torch.stack(rows).square().sum()


def third(model: Model, x: Tensor) -> Tensor:
    (second,) = torch.autograd.grad(slope(model, x).square().sum(), x, create_graph=True)
    return second.square().sum()


OBJECTIVES = {
    f.__name__: f
    for f in (
        penalty,
        loss_and_penalty,
        loss_and_penalty_of_one_forward,
        hessian_vector,
        jacobian,
        third,
    )
}


# -- gradients ------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("make", MODELS)
def test_gradients_equal_those_of_dense_weights(make: str, objective: str) -> None:
    model = MODELS[make]()
    dense, x = masked(model), tokens(model, 7)
    OBJECTIVES[objective](model, x).backward()
    got, x.grad = zeros_if_none(x), None
    OBJECTIVES[objective](dense, x).backward()
    assert_near(got, zeros_if_none(x))
    if (make, objective) != ("relu", "third"):  # piecewise linear
        assert_learned_the_same(model, dense)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-9), (torch.float32, 1e-3), (torch.bfloat16, 0.05)]
)
@pytest.mark.parametrize("objective", ["hessian_vector", "jacobian", "third"])
@pytest.mark.parametrize("make", ["chain", "gelu", "silu"])
def test_on_a_gpu(make: str, objective: str, dtype: torch.dtype, error: float) -> None:
    if (dtype, objective) == (torch.bfloat16, "third"):
        pytest.skip("is lost to rounding")
    model = MODELS[make]().cuda().to(dtype)
    dense = masked(model).float() if dtype == torch.bfloat16 else masked(model)
    layers, x = arm(model), tokens(model, 300).detach().cuda()
    for variant in (model, dense):
        parameter = next(variant.parameters())
        OBJECTIVES[objective](variant, x.to(parameter.dtype).requires_grad_()).backward()
    assert_learned_the_same(model, dense, error)
    assert all(layer.block_norms.grad.any() for layer in layers)


@pytest.mark.parametrize("method", ["by block", "batched", "densify"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize(("mask", "spare"), [("full", 0), ("low", 0), ("low", 3), ("some", 2)])
@pytest.mark.parametrize("bias", [True, False])
def test_gradgradcheck_of_a_layer(
    method: str,
    lead: tuple[int, ...],
    mask: str,
    spare: int,
    bias: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    layer = make_layer(mask, spare, bias)
    inputs = (tokens(layer, *lead), *layer.parameters())
    assert torch.autograd.gradcheck(run(layer), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run(layer), inputs, fast_mode=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_gradgradcheck_of_an_mlp(activation: str, bias: bool) -> None:
    mlp = make_mlp(activation, bias)
    inputs = (tokens(mlp, 3), *mlp.parameters())
    assert torch.autograd.gradcheck(run(mlp), inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run(mlp), inputs, fast_mode=True)


@pytest.mark.parametrize("make", ["layer", "chain", "gelu", "gelu_tanh", "silu"])
def test_gradgradcheck_of_the_gradient(make: str) -> None:
    """Checks the second and third derivatives for every pair of arguments."""
    model = MODELS[make]()
    inputs = (tokens(model, 2), *model.parameters())

    def gradients(*inputs: Tensor) -> tuple[Tensor, ...]:
        loss = run(model)(*inputs).sin().sum()
        return torch.autograd.grad(loss, inputs, create_graph=True)

    assert torch.autograd.gradcheck(gradients, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(gradients, inputs, fast_mode=True)


def run(model: nn.Module) -> Callable[..., Tensor]:
    """The model as a function of its input and its parameters."""
    names = [name for name, _ in model.named_parameters()]

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(names, parameters, strict=True))
        y: Tensor = torch.func.functional_call(model, named, (x,))
        return y

    return call


def test_gradgradcheck_of_every_element() -> None:
    topology = BlockTopology.from_mask(torch.tensor([[False, True]]), 16)
    layer = BlockSparseLinear(32, 16, topology=topology, dtype=torch.float64)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(run(layer), (x, layer.values, layer.bias))


@pytest.mark.parametrize("activation", activations.ACTIVATIONS)
def test_derivatives_of_activations_are_differentiable(activation: str) -> None:
    h, gradient = (torch.randn(50, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def back(gradient: Tensor, h: Tensor) -> Tensor:
        return activations.activation_backward_differentiable(gradient, h, activation)

    torch.testing.assert_close(
        back(gradient, h), activations.activation_backward(gradient, h, activation)
    )
    assert torch.autograd.gradcheck(back, (gradient, h))
    assert torch.autograd.gradgradcheck(back, (gradient, h))


@pytest.mark.parametrize("frozen", [("1",), ("3",), ("1", "3")], ids=str)
@pytest.mark.parametrize("objective", ["loss_and_penalty", "jacobian", "third"])
def test_frozen_layers(frozen: tuple[str, ...], objective: str) -> None:
    model = make_chain()
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    dense, x = masked(model), tokens(model, 7)
    for name in frozen:
        dense.get_submodule(name).requires_grad_(False)
    for variant in (model, dense):
        OBJECTIVES[objective](variant, x).backward()
    assert_learned_the_same(model, dense)


@pytest.mark.parametrize("make", MODELS)
def test_only_the_input(make: str) -> None:
    """A Hessian with respect to the input; nothing else requires a gradient."""
    model = MODELS[make]().requires_grad_(False)
    dense, x = masked(model).requires_grad_(False), tokens(model, 3)

    def scalar(model: Model) -> Callable[[Tensor], Tensor]:
        return lambda x: model(x).square().sum()

    got = torch.autograd.functional.hessian(scalar(model), x)
    expected = torch.autograd.functional.hessian(scalar(dense), x)
    assert_near(got, expected)
    assert_near(torch.autograd.functional.hessian(scalar(model), x, vectorize=True), expected)


def test_a_linear_function_has_no_second_derivative() -> None:
    layer = make_layer().requires_grad_(False)
    assert not slope(layer, tokens(layer, 3)).requires_grad


def test_values_changed_before_backward_are_refused() -> None:
    layer = make_layer()
    dx = slope(layer, tokens(layer, 3))
    with torch.no_grad():
        layer.values.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        dx.square().sum().backward()


@pytest.mark.parametrize("make", ["layer", "chain", "gelu", "silu"])
@pytest.mark.parametrize("autocast", [False, True])
def test_a_first_derivative_builds_no_graph(
    make: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It calls the products below autograd."""

    def fail(*_: object) -> None:
        raise AssertionError("an autograd formula ran in backward")

    for formula in (ops._BlockLinearDx, ops._BlockLinearDw):
        monkeypatch.setattr(formula, "forward", fail)
    model = MODELS[make]().float()
    dense, x = masked(model), tokens(model, 7, dtype=torch.float32)
    for variant in (model, dense):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = variant(x)
        y.float().square().sum().backward()
    assert_learned_the_same(model, dense, 0.02 if autocast else 1e-5)


def test_a_penalty_under_autocast() -> None:
    model = make_chain().float()
    dense, x = masked(model), tokens(model, 200, dtype=torch.float32)
    for variant in (model, dense):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_and_penalty(variant, x)
        loss.backward()
    assert_learned_the_same(model, dense, 0.05)


# -- checkpointing --------------------------------------------------------------------------------


@pytest.mark.parametrize("objective", ["loss_and_penalty", "hessian_vector", "third"])
@pytest.mark.parametrize("make", ["chain", "gelu", "silu"])
def test_checkpointing(make: str, objective: str) -> None:
    model = MODELS[make]()
    dense, x = masked(model), tokens(model, 7)
    inside = Checkpointed(model)
    OBJECTIVES[objective](inside, x).backward()
    OBJECTIVES[objective](dense, x).backward()
    assert_learned_the_same(model, dense)


class Checkpointed(nn.Module):
    def __init__(self, model: nn.Module, use_reentrant: bool = False) -> None:
        super().__init__()
        self.model, self.use_reentrant = model, use_reentrant

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = checkpoint(self.model, x, use_reentrant=self.use_reentrant)
        return y


def test_the_reentrant_form_of_checkpointing_refuses() -> None:
    model = make_chain()
    with pytest.raises(RuntimeError, match="use_reentrant"):
        penalty(Checkpointed(model, use_reentrant=True), tokens(model, 7))


# -- block norms ----------------------------------------------------------------------------------


def arm(model: nn.Module) -> list[BlockSparseLinear]:
    layers = [m for m in model.modules() if isinstance(m, BlockSparseLinear)]
    for layer in layers:
        layer.arm(True)
    return layers


def norms(layer: BlockSparseLinear, *products: Tensor) -> Tensor:
    """Return the sum of the squared block norms of dense gradients, one per product."""
    squares = [reference.squared_norms(product, layer.topology.grid) for product in products]
    return torch.stack(squares).sum(0).float()


def copies(weight: Tensor, n: int) -> list[Tensor]:
    """Return one leaf per use of a weight, so that each use has its own gradient."""
    return [weight.clone().requires_grad_() for _ in range(n)]


@pytest.mark.parametrize("with_loss", [False, True])
@pytest.mark.parametrize("by_names", [False, True])
def test_a_penalty_counts_towards_the_norms(with_loss: bool, by_names: bool) -> None:
    """The norms sum over each accumulated product: of the forward and of the double backward."""
    model = nn.Sequential(make_layer(), nn.Tanh(), make_layer(transposed=True))
    first, second = arm(model)
    x = tokens(model, 7)
    y = model(x)
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    assert first.block_norms.grad is None and second.block_norms.grad is None
    objective = dx.square().sum() + (y.sin().sum() if with_loss else 0)
    objective.backward(inputs=[*model.parameters()] if by_names else None)

    w, w_back = copies(first.dense_weight(), 2)
    v, v_back = copies(second.dense_weight(), 2)
    assert first.bias is not None and second.bias is not None
    a = (x @ w.T + first.bias).tanh()
    y = a @ v.T + second.bias
    dx = ((2 * y @ v_back) * (1 - a.square())) @ w_back
    objective = dx.square().sum() + (y.sin().sum() if with_loss else 0)
    objective.backward()
    for layer, uses in ((first, (w, w_back)), (second, (v, v_back))):
        expected = norms(layer, *(use.grad for use in uses if use.grad is not None))
        torch.testing.assert_close(layer.block_norms.grad, expected, rtol=1e-5, atol=0)
        assert expected[~layer.topology.mask].any()  # includes absent blocks
        total = sum(use.grad for use in uses if use.grad is not None)
        torch.testing.assert_close(layer.values.grad, layer.topology.pack(total))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_penalty_counts_towards_the_norms_of_an_mlp(activation: str) -> None:
    """The double backward recomputes h, which adds a product to that of the forward."""
    mlp = make_mlp(activation)
    first, second = arm(mlp)
    x = tokens(mlp, 7)
    (dx,) = torch.autograd.grad(mlp(x).square().sum(), x, create_graph=True)
    dx.square().sum().backward()

    w, w_again, w_back = copies(first.dense_weight(), 3)
    v, v_back = copies(second.dense_weight(), 2)
    y = activations.activate(x @ w.T + first.bias, activation) @ v.T + second.bias
    h = x @ w_again.T + first.bias
    dx = activations.activation_backward_differentiable(2 * y @ v_back, h, activation) @ w_back
    dx.square().sum().backward()
    for layer, uses in ((first, (w, w_again, w_back)), (second, (v, v_back))):
        expected = norms(layer, *(use.grad for use in uses if use.grad is not None))
        torch.testing.assert_close(layer.block_norms.grad, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("make", MODELS)
def test_returned_derivatives_leave_no_norms(make: str) -> None:
    model = MODELS[make]()
    layers, x = arm(model), tokens(model, 7)
    for objective in OBJECTIVES.values():
        leaves = [x, *model.parameters()]
        torch.autograd.grad(objective(model, x), leaves, allow_unused=True)
    penalty(model, x).backward(inputs=[x])
    for layer in layers:
        assert layer.block_norms.grad is layer.values.grad is None


def test_norms_of_a_backward_that_keeps_its_graph() -> None:
    """The norms have no graph."""
    model = make_chain()
    layers, x = arm(model), tokens(model, 7)
    loss = model(x).square().sum()
    loss.backward(retain_graph=True)
    expected = [layer.block_norms.grad for layer in layers]
    for layer in layers:
        layer.block_norms.grad = layer.values.grad = None
    loss.backward(create_graph=True)
    for layer, norms in zip(layers, expected, strict=True):
        assert layer.values.grad.requires_grad and not layer.block_norms.grad.requires_grad
        torch.testing.assert_close(layer.block_norms.grad, norms)


def test_norms_with_a_token_stride() -> None:
    layer = make_layer()
    layer.token_stride = 3
    (layer,) = arm(layer)
    x, dy = tokens(layer, 2, 5), torch.randn(2, 5, 48, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x), x, dy, create_graph=True)
    g = torch.randn_like(dx)
    dx.backward(g)
    read = [t.detach().flatten(0, 1)[::3] for t in (dy, g)]
    expected = reference.block_norms(*read, layer.topology.grid).float()
    torch.testing.assert_close(layer.block_norms.grad, expected, rtol=1e-5, atol=0)


# -- backward(inputs=parameters) ------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", ["layer", "chain", "gelu"])
@pytest.mark.parametrize("backwards", ["named", "plain, named", "named, plain", "named, named"])
def test_norms_of_a_backward_that_names_the_parameters(
    make: str, autocast: bool, backwards: str
) -> None:
    """Its inputs do not include `block_norms`, but it accumulates in `values.grad`."""
    model = MODELS[make]()
    model = model.float() if autocast else model
    twin = copy.deepcopy(model)
    x = tokens(model, 7, dtype=torch.float32 if autocast else torch.float64)
    pairs = list(zip(arm(model), arm(twin), strict=True))
    for kind in backwards.split(", "):
        for copied in (model, twin):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = copied(x).float().square().sum()
            named = copied is model and kind == "named"
            loss.backward(inputs=[*copied.parameters()] if named else None)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours.values.grad, theirs.values.grad)
        torch.testing.assert_close(ours.block_norms.grad, theirs.block_norms.grad)
        assert ours.block_norms.grad[~ours.topology.mask].any()


def test_accumulated_norms_against_the_dense_gradient() -> None:
    model = make_chain()
    layers, dense, x = arm(model), make_dense(model), tokens(model, 7)
    for variant in (model, dense):
        variant(x).square().sum().backward(inputs=[*variant.parameters()])
    for place in (1, 3):
        expected = norms(model[place], dense[place].weight.grad)
        torch.testing.assert_close(model[place].block_norms.grad, expected, rtol=1e-5, atol=0)
    assert layers == [model[1], model[3]]


def make_dense(model: nn.Sequential) -> nn.Sequential:
    """Return the model with dense weights, whose absent blocks have gradients as well."""
    parts = (m.to_linear() if isinstance(m, BlockSparseLinear) else copy.deepcopy(m) for m in model)
    return nn.Sequential(*parts)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("make", ["layer", "chain", "gelu"])
def test_returned_gradients_leave_no_norms(make: str, autocast: bool) -> None:
    model = MODELS[make]().float()
    layers, x = arm(model), tokens(model, 7, dtype=torch.float32)
    for create_graph in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(x).float().square().sum()
        parameters = [*model.parameters()]
        torch.autograd.grad(loss, parameters, retain_graph=True, create_graph=create_graph)
        loss.backward(inputs=[x])
    for layer in layers:
        assert layer.block_norms.grad is layer.values.grad is None


@pytest.mark.parametrize("named", [False, True])
def test_norms_of_discarded_gradients_are_dropped(named: bool) -> None:
    """The hooks of the leaf are called, as by the autograd engine."""
    model = make_chain()
    dense, x = make_dense(model), tokens(model, 7)
    accumulator = GradientAccumulator(model[1], model[1].values)
    accumulator.arm(True)
    for scale in (1, 2):
        for variant in (model, dense):
            variant.zero_grad()
            loss = scale * variant(x).square().sum()
            loss.backward(inputs=[*variant.parameters()] if named else None)
    expected = norms(model[1], dense[1].weight.grad)
    torch.testing.assert_close(accumulator.collect()[0], expected, rtol=1e-5, atol=0)


# -- unsupported uses -----------------------------------------------------------------------------


@pytest.mark.parametrize("make", ["layer", "gelu"])
@pytest.mark.parametrize("armed", [False, True])
def test_a_compiled_model_refuses(make: str, armed: bool) -> None:
    model = MODELS[make]()
    if armed:
        arm(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match="does not currently support double backward"):
        penalty(compiled, tokens(model, 7)).backward()
    torch.compiler.reset()


@pytest.mark.parametrize("make", ["layer", "gelu"])
def test_function_transforms_raise_a_helpful_error(make: str) -> None:
    model = MODELS[make]()
    x, says = tokens(model, 7).detach(), r"reverse mode; got .* Call torch\.autograd\.grad"

    def scalar(x: Tensor) -> Tensor:
        return model(x).square().sum()

    for refused in (
        lambda: torch.func.grad(scalar)(x),
        lambda: torch.func.hessian(scalar)(x),
        lambda: torch.func.jvp(model, (x,), (x,)),
        lambda: torch.autograd.functional.jacobian(
            model, x, vectorize=True, strategy="forward-mode"
        ),
    ):
        with pytest.raises(RuntimeError, match=says):
            refused()
        # Only reverse mode is off here.
        with torch.no_grad(), pytest.raises(RuntimeError, match=says):
            refused()
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(RuntimeError, match=says):
        model(forward_ad.make_dual(x, x))
    assert_near(torch.func.vmap(model)(x), model(x))
    with torch.no_grad():
        assert_near(torch.func.vmap(model)(x), model(x))
