"""The ops on PyTorch's dispatcher: schemas, autograd, block norms."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from sparse_lightning import BlockSparseLinear, BlockSparseMLP, BlockTopology, nm_pattern
from sparse_lightning.kernels import cpu, ops, reference


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


def make_layer(
    dtype: torch.dtype = torch.float64, spare: int = 2, bias: bool = True, nm: str | None = None
) -> BlockSparseLinear:
    """A 48x64 layer with an empty row, an empty slot and a bias."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    topology = BlockTopology.from_mask(mask, 16, capacity=5 + spare).with_random_positions(nm)
    return BlockSparseLinear(64, 48, bias, topology=topology, dtype=dtype)


def dense_gradient_norms(layer: BlockSparseLinear, x: Tensor, dy: Tensor) -> Tensor:
    return reference.block_norms(dy.double(), x.detach().double(), layer.topology.grid).float()


def op_arguments(
    op: str,
    dtype: torch.dtype,
    requires_grad: bool = False,
    device: str = "cpu",
    nm: str | None = None,
) -> tuple[Any, ...]:
    layer = make_layer(dtype, nm=nm).to(device)
    topology, values = layer.topology, layer.values.detach()
    x = torch.randn(2, 3, 64, dtype=dtype, device=device)
    dy = torch.randn(2, 3, 48, dtype=dtype, device=device)
    bias = torch.randn(48, dtype=dtype, device=device)
    transposed = BlockTopology.from_mask(topology.mask.T.cpu(), 16).with_random_positions(nm)
    down = BlockSparseLinear(48, 64, topology=transposed, dtype=dtype).to(device)
    indices = topology.indices
    armed = torch.tensor(True, device=device)
    norms, down_norms = (
        torch.zeros(grid, device=device) for grid in (topology.grid, topology.grid[::-1])
    )
    stacked: list[Any] = []
    for in_features, out_features in (64, 64), (32, 48):
        layer = BlockSparseLinear(in_features, out_features, density=0.5, block_size=16, nm=nm)
        own = layer.to(device, dtype).values.detach().requires_grad_(requires_grad)
        stacked += own, None, *layer.topology.indices, None, None, 1
    if requires_grad:
        for leaf in (x, dy, values, bias, norms, down_norms):
            leaf.requires_grad_()
    return {
        "block_linear": (x, values, bias, *indices, norms, armed, 1),
        "block_linear_dx": (dy, values, *indices, norms, armed, 1),
        "block_linear_dw": (dy, x, *indices),
        "block_norms": (dy, x, armed, 16),
        "block_linear_act": (x, values, bias, *indices, "gelu"),
        "block_linear_glu": (x, values, bias, *indices, torch.randn_like(dy), "silu"),
        "block_linear_dh": (dy, values, *indices[3:], torch.randn_like(x), "silu", True),
        "block_linear_dglu": (
            *(dy, values, *indices[3:]),
            *(torch.randn_like(x), torch.randn_like(x), "silu", True),
        ),
        "block_linear_dx_add": (dy, values, *indices[3:], torch.randn_like(x)),
        "block_mlp": (
            *(x, values, bias, *indices, norms, armed, 1),
            *(down.values.detach(), None, *down.topology.indices, down_norms, armed, 1),
            "gelu",
        ),
        "block_stacked_glu": (x, *stacked, "silu"),
        "block_glu": (
            *(x, values, bias, *indices, norms, armed, 1),
            *(torch.randn_like(values), None, *indices, norms, armed, 1),
            *(down.values.detach(), None, *down.topology.indices, down_norms, armed, 1),
            "silu",
        ),
    }[op]


DIFFERENTIABLE = (
    "block_linear",
    "block_linear_dx",
    "block_linear_dw",
    "block_mlp",
    "block_glu",
    "block_stacked_glu",
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "requires_grad"),
    [*((op, False) for op in ops.OPS), *((op, True) for op in DIFFERENTIABLE)],
)
def test_opcheck(op: str, requires_grad: bool, dtype: torch.dtype, device: str) -> None:
    arguments = op_arguments(op, dtype, requires_grad, device)
    results = torch.library.opcheck(getattr(torch.ops.sparse_lightning, op).default, arguments)
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("op", "requires_grad"),
    [*((op, False) for op in ops.OPS), *((op, True) for op in DIFFERENTIABLE)],
)
def test_opcheck_of_two_of_four(op: str, requires_grad: bool, device: str) -> None:
    arguments = op_arguments(op, torch.float32, requires_grad, device, nm="2:4")
    results = torch.library.opcheck(getattr(torch.ops.sparse_lightning, op).default, arguments)
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", [op for op in ops.OPS if op != "block_norms"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_two_of_four_computes_what_whole_blocks_do(
    op: str, dtype: torch.dtype, device: str
) -> None:
    """Bit for bit, where whole blocks hold zeros in place of the weights that are not kept."""
    arguments = op_arguments(op, dtype, device=device, nm="2:4")
    positions = next(t for t in arguments if isinstance(t, Tensor) and t.dtype == torch.uint8)
    is_gradient = op == "block_linear_dw"
    values = arguments[1]
    whole = [
        None
        if tensor is positions
        else nm_pattern.expand(values, positions)
        if tensor is values and not is_gradient
        else tensor
        for tensor in arguments
    ]
    function = getattr(ops, op)
    found, expected = function(*arguments), function(*whole)
    if is_gradient:
        expected = nm_pattern.compress(expected, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_opcheck_without_bias_and_norms() -> None:
    x, values, _, *indices = op_arguments("block_linear", torch.float32, requires_grad=True)[:10]
    op = torch.ops.sparse_lightning.block_linear.default
    results = torch.library.opcheck(op, (x, values, None, *indices, None, None, 1))
    assert set(results.values()) == {"SUCCESS"}


# -- the way around the dispatcher ------------------------------------------------------------


@pytest.mark.parametrize(
    "context",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        torch._C._AutoDispatchBelowAutograd,
        partial(torch.autocast, "cpu", torch.bfloat16),
    ],
)
def test_plain_tensors_go_around_the_dispatcher(
    context: Callable[[], AbstractContextManager[Any]], device: str
) -> None:
    for requires_grad in False, True:
        x, values, *_ = op_arguments("block_linear", torch.float32, requires_grad, device)
        with context():
            for tensor in x, x * 1, x.expand(4, *x.shape):
                assert all(ops._implementation(op, tensor, values) for op in ops.OPS)
                assert ops._implementation("block_mlp", tensor, nn.Parameter(values.detach()))


class Marked(Tensor):
    pass


def test_other_tensors_and_modes_reach_the_dispatcher() -> None:
    x, values, *_ = op_arguments("block_linear", torch.float32)
    found = []

    def look(x: Tensor) -> Tensor:
        found.append(ops._implementation("block_linear", x, values))
        return x.sum()

    look(x)
    assert found.pop() is not None
    look(x.as_subclass(Marked))
    found.append(ops._implementation("block_linear", x, values.as_subclass(Marked)))
    found.append(ops._implementation("block_linear", x, values.to("meta")))
    look(torch.complex(x, x).conj().imag)  # a negative view
    look(torch._efficientzerotensor(x.shape))
    look(x.to("meta"))
    torch.vmap(look)(x)
    torch.func.grad(look)(x)
    torch.func.functionalize(look)(x)
    torch.jit.trace(look, x, check_trace=False)
    make_fx(look)(x)
    with FakeTensorMode() as mode:
        look(mode.from_tensor(x))
    with FlopCounterMode(display=False):
        look(x)
    with torch.device("cpu"):
        look(x)
    with torch.profiler.profile():
        look(x)
    with forward_ad.dual_level():
        look(forward_ad.make_dual(x, x))
    assert found == [None] * 16


# -- autograd ---------------------------------------------------------------------------------


def call(layer: BlockSparseLinear, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    parameters = {"values": values} if bias is None else {"values": values, "bias": bias}
    y: Tensor = torch.func.functional_call(layer, parameters, (x,))
    return y


@pytest.mark.parametrize("method", ["by block", "batched", "densify"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(
    method: str, lead: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    # Without empty slots, whose gradient is zero by definition.
    layer = make_layer(spare=0, bias=bias)
    x = torch.randn(*lead, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: call(layer, *inputs), (x, layer.values, layer.bias), fast_mode=True
    )


def test_gradcheck_of_every_element() -> None:
    layer = BlockSparseLinear(32, 16, topology=_tiny(), dtype=torch.float64)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda *inputs: call(layer, *inputs), (x, layer.values, layer.bias)
    )


def _tiny() -> BlockTopology:
    return BlockTopology.from_mask(torch.tensor([[False, True]]), 16)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)], ids=str)
def test_gradients_equal_the_dense_layers(lead: tuple[int, ...]) -> None:
    layer = make_layer()
    dense = layer.to_linear()
    x = torch.randn(*lead, 64, dtype=torch.float64, requires_grad=True)
    dense_x = x.detach().clone().requires_grad_()
    dy = torch.randn(*lead, 48, dtype=torch.float64)
    layer(x).backward(dy)
    dense(dense_x).backward(dy)
    assert_same_gradients(layer, dense)
    torch.testing.assert_close(x.grad, dense_x.grad)


def assert_same_gradients(layer: BlockSparseLinear, dense: nn.Linear) -> None:
    assert layer.values.grad is not None and dense.weight.grad is not None
    packed = layer.topology.pack(dense.weight.grad)
    assert packed.count_nonzero() > 0
    torch.testing.assert_close(layer.values.grad, packed)
    if layer.bias is not None:
        torch.testing.assert_close(layer.bias.grad, dense.bias.grad)


def test_a_layer_called_twice_in_one_forward() -> None:
    topology = BlockTopology.random(64, 64, 16, 0.5)
    layer = BlockSparseLinear(64, 64, topology=topology, dtype=torch.float64)
    layer.arm(True)
    dense = layer.to_linear()
    x = torch.randn(5, 64, dtype=torch.float64)
    hidden = layer(x)
    hidden.retain_grad()
    y = layer(hidden.tanh())
    y.retain_grad()
    y.square().sum().backward()
    dense(dense(x).tanh()).square().sum().backward()
    assert_same_gradients(layer, dense)
    # Each call adds the norms of its own product: no call overwrites the other's.
    expected = dense_gradient_norms(layer, x, hidden.grad)
    expected += dense_gradient_norms(layer, hidden.detach().tanh(), y.grad)
    torch.testing.assert_close(layer.block_norms.grad, expected)


def test_an_input_without_gradient() -> None:
    layer = make_layer()
    layer(torch.randn(3, 64, dtype=torch.float64)).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.count_nonzero() > 0


def test_frozen_values_still_pass_the_gradient_on() -> None:
    layer = make_layer()
    layer.values.requires_grad_(False)
    layer.arm(True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(3, -1))
    assert layer.values.grad is None
    assert layer.bias is not None and layer.bias.grad is not None
    # A frozen layer is never updated, so its norms cost nothing.
    assert layer.block_norms.grad is None


def test_without_gradients_nothing_is_kept_for_backward() -> None:
    layer = make_layer().requires_grad_(False)
    assert not layer(torch.randn(3, 64, dtype=torch.float64)).requires_grad
    with torch.no_grad():
        assert not make_layer()(torch.randn(3, 64, dtype=torch.float64)).requires_grad


# -- requested gradients ------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """Records the package's ops and sums (the bias gradient) that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if func.namespace == ops.NAMESPACE or name == "sum":
            self.seen.append(name.removeprefix("block_linear_"))
        return func(*args, **(kwargs or {}))


def calls(function: Callable[[], Any]) -> list[str]:
    with Calls() as mode:
        function()
    return sorted(mode.seen)


def make_mlp(device: str) -> BlockSparseMLP:
    """Two armed layers with an activation between them."""
    up = make_layer()
    down = BlockSparseLinear(48, 64, topology=BlockTopology.from_mask(up.topology.mask.T, 16))
    mlp = BlockSparseMLP(up, nn.GELU(), down.double()).to(device)
    up.arm(True), down.arm(True)
    return mlp


@pytest.fixture(params=["layer", "layer without bias", "first of an mlp", "last of an mlp"])
def armed(request: pytest.FixtureRequest, device: str) -> tuple[nn.Module, BlockSparseLinear]:
    """A module, and an armed layer in it."""
    if "mlp" in request.param:
        mlp = make_mlp(device)
        return mlp, mlp[0 if "first" in request.param else 2]
    layer = make_layer(bias="without" not in request.param).to(device)
    layer.arm(True)
    return layer, layer


# Ops that propagate the gradient to a layer, and on to x.
TO_LAYER = {"first of an mlp": ["dh"]}
TO_X = {"first of an mlp": ["dh", "dx"], "last of an mlp": ["dh", "dx"]}


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_of_the_input_compute_nothing_else(
    armed: tuple[nn.Module, BlockSparseLinear],
    checkpointed: bool,
    device: str,
    request: pytest.FixtureRequest,
) -> None:
    """Gradients of the input alone, as for a gradient penalty, compute no norms."""
    module, layer = armed
    x = torch.randn(5, 64, dtype=torch.float64, device=device, requires_grad=True)
    expected = TO_X.get(request.node.callspec.params["armed"], ["dx"])
    forward = ["act", "block_linear"] if len(expected) > 1 else ["block_linear"]
    if not checkpointed:
        forward = []

    def loss() -> Tensor:
        y = checkpoint(module, x, use_reentrant=False) if checkpointed else module(x)
        return y.sin().mean()

    (dx,) = torch.autograd.grad(loss(), x)
    first, second = loss(), loss()
    assert calls(lambda: torch.autograd.grad(first, x)) == sorted(forward + expected)
    assert calls(lambda: second.backward(inputs=[x])) == sorted(forward + expected)
    torch.testing.assert_close(x.grad, dx)
    for part in module.modules():
        if isinstance(part, BlockSparseLinear):
            assert part.block_norms.grad is part.values.grad is None
    loss().backward()
    torch.testing.assert_close(x.grad, 2 * dx)
    assert layer.block_norms.grad is not None and layer.block_norms.grad.any()


@pytest.mark.parametrize(
    ("wanted", "op"), [("values", "dw"), ("bias", "sum"), ("block_norms", "block_norms")]
)
def test_each_gradient_is_computed_alone(
    armed: tuple[nn.Module, BlockSparseLinear],
    wanted: str,
    op: str,
    device: str,
    request: pytest.FixtureRequest,
) -> None:
    module, layer = armed
    leaf = getattr(layer, wanted)
    if leaf is None:
        pytest.skip("has no bias")
    x = torch.randn(5, 64, dtype=torch.float64, device=device, requires_grad=True)
    expected = sorted([*TO_LAYER.get(request.node.callspec.params["armed"], []), op])
    loss = module(x).sin().mean()
    assert calls(lambda: torch.autograd.grad(loss, leaf, retain_graph=True)) == expected
    (alone,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    assert layer.block_norms.grad is None
    if wanted == "values":  # accumulated gradients count towards the norms
        expected = sorted([*expected, "block_norms"])
    assert calls(lambda: loss.backward(inputs=[leaf], retain_graph=True)) == expected
    torch.testing.assert_close(leaf.grad, alone)
    loss.backward()
    torch.testing.assert_close(leaf.grad, 2 * alone)


def test_a_layer_that_is_not_armed_computes_no_norms() -> None:
    layer, x = make_layer(), torch.randn(5, 64, dtype=torch.float64)
    loss = layer(x).sin().mean()
    assert calls(loss.backward) == ["dw", "sum"] and layer.block_norms.grad is None
    layer.arm(True)
    with torch.no_grad():
        layer(x)
    assert layer._operands(x).norms is layer.block_norms
    with torch.no_grad():
        assert layer._operands(x).norm_operands == (None, None, 1)
    layer.arm(False)
    assert layer._operands(x).norm_operands == (None, None, 1)


def test_a_backward_that_is_called_without_the_engine_computes_everything() -> None:
    layer, x = make_layer(), torch.randn(5, 64, dtype=torch.float64, requires_grad=True)
    layer.arm(True)
    y = layer(x)
    assert calls(lambda: y.grad_fn.apply(torch.ones_like(y))) == ["block_norms", "dw", "dx", "sum"]


# -- block norms --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)],
    ids=str,
)
def test_norms_accumulate_over_micro_batches_while_armed(dtype: torch.dtype, rtol: float) -> None:
    layer = make_layer(dtype)
    leaf, expected = layer.block_norms, torch.zeros(3, 4)
    for armed in (False, True, True, False):
        layer.arm(armed)
        x, dy = torch.randn(7, 64).to(dtype), torch.randn(7, 48).to(dtype)
        layer(x).backward(dy)
        if armed:
            expected += dense_gradient_norms(layer, x, dy)
    assert layer.block_norms is leaf and leaf.count_nonzero() == 0
    assert leaf.grad is not None and leaf.grad.dtype == torch.float32
    assert (expected > 0).all()  # including absent blocks and the empty row
    torch.testing.assert_close(leaf.grad, expected, rtol=rtol, atol=0)


def test_norms_of_half_precision_do_not_overflow() -> None:
    x, dy = torch.full((8, 64), 100.0).half(), torch.full((8, 48), 50.0).half()
    # Every element of dy^T x is 8 * 100 * 50 = 40,000; a block has 256.
    expected = torch.full((3, 4), 256 * 40_000.0**2)
    torch.testing.assert_close(ops.block_norms(dy, x, torch.tensor(True), 16), expected)
    torch.testing.assert_close(ops.block_norms(dy, 2 * x, torch.tensor(True), 16), 4 * expected)


@pytest.mark.parametrize("stride", [2, 5, 100])
def test_norms_with_a_token_stride(stride: int, device: str) -> None:
    layer = make_layer().to(device)
    layer.token_stride = stride
    layer.arm(True)
    x = torch.randn(3, 7, 64, dtype=torch.float64, device=device)
    dy = torch.randn(3, 7, 48, dtype=torch.float64, device=device)
    layer(x).backward(dy)
    read = [t.flatten(0, 1)[::stride] for t in (dy, x)]
    expected = reference.block_norms(*read, layer.topology.grid)
    torch.testing.assert_close(layer.block_norms.grad.double(), expected, rtol=1e-5, atol=1e-5)
    whole = reference.block_linear_dw(dy.flatten(0, 1), x.flatten(0, 1), layer.topology.coords, 16)
    torch.testing.assert_close(layer.values.grad, whole)  # over all tokens


def test_norms_of_a_large_layer_equal_those_of_its_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    dy, x = torch.randn(9, 7 * 16), torch.randn(9, 5 * 16)
    expected = ops.block_norms(dy, x, torch.tensor(True), 16)
    monkeypatch.setattr(cpu, "_BAND_BYTES", 3 * 16 * x.shape[1] * 4)  # three block rows
    norms = ops.block_norms(dy, x, torch.tensor(True), 16)
    assert norms.shape == (7, 5) and (expected != 0).all()
    torch.testing.assert_close(norms, expected)


def test_a_flag_that_is_written_after_the_forward() -> None:
    """Autograd must not raise, as it does for saved tensors."""
    layer, x = make_layer(), torch.randn(5, 64, dtype=torch.float64)
    layer.arm(True)
    loss = layer(x).sin().mean()
    layer.arm(False)
    loss.backward()
    assert layer.values.grad is not None and not layer.block_norms.grad.any()


@pytest.mark.parametrize("which", [0, 2], ids=["up", "down"])
def test_an_mlp_reads_each_layers_own_tokens(which: int, device: str) -> None:
    mlp = make_mlp(device)
    x = torch.randn(9, 64, dtype=torch.float64, device=device)
    dy = torch.randn(9, 64, dtype=torch.float64, device=device)
    mlp[which].token_stride = 4
    mlp(x).backward(dy)
    norms = [mlp[i].block_norms.grad for i in (0, 2)]
    for i in (0, 2):
        mlp[i].block_norms.grad = None
    plain = nn.Sequential(*mlp)  # layer by layer
    plain(x).backward(dy)
    for i, fused_norms in zip((0, 2), norms, strict=True):
        torch.testing.assert_close(fused_norms, mlp[i].block_norms.grad)


def test_norms_of_an_mlp(device: str) -> None:
    mlp = make_mlp(device)
    dense = nn.Sequential(mlp[0].to_linear(), nn.GELU(), mlp[2].to_linear())
    x = torch.randn(5, 64, dtype=torch.float64, device=device)
    mlp(x).square().sum().backward()
    dense(x).square().sum().backward()
    for part, reference_part in ((mlp[0], dense[0]), (mlp[2], dense[2])):
        expected = reference.squared_norms(reference_part.weight.grad, part.topology.grid)
        torch.testing.assert_close(part.block_norms.grad, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["mlp", "layer"])
def test_norms_of_a_compiled_model(whole: bool, device: str) -> None:
    """Arming does not recompile."""
    mlp = make_mlp(device)
    model = mlp if whole else mlp[0]
    eager = copy.deepcopy(model)
    first, first_eager = mlp[0], eager[0] if whole else eager
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for armed in (True, False, True):
            for layer in (first, first_eager):
                layer.arm(armed)
            x = torch.randn(5, 64, dtype=torch.float64, device=device)
            known = first.block_norms.grad
            before = 0 if known is None else known.clone()
            compiled(x).square().sum().backward()
            eager(x).square().sum().backward()
            assert bool((first.block_norms.grad != before).any()) == armed
    torch.compiler.reset()
    expected = first_eager.block_norms.grad
    torch.testing.assert_close(first.block_norms.grad, expected, rtol=1e-5, atol=1e-5)


# -- CPU methods, and devices ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, ("by block", "batched", "densify")),
        (torch.float32, ("by block", "batched", "densify")),
        # Half precision is never summed block by block, which would round after every block.
        (torch.bfloat16, ("batched", "densify")),
        (torch.float16, ("batched", "densify")),
    ],
    ids=str,
)
def test_the_methods_of_a_dtype(dtype: torch.dtype, expected: tuple[str, ...]) -> None:
    methods = {
        cpu.choose("fwd", tokens, size, density, dtype)
        for tokens in (0, 1, 255, 256, 100_000)
        for size in (16, 32, 64, 128)
        for density in (0.0, 0.01, 0.3, 0.8, 1.0)
    }
    assert methods == set(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_cpu_input_to_a_cuda_layer_is_rejected() -> None:
    layer = make_layer(torch.float32).cuda()
    with pytest.raises((RuntimeError, TypeError), match=r"device|cuda"):
        layer(torch.randn(3, 64))


@pytest.mark.parametrize("tokens", [4, 300])
def test_training_after_inference_mode(tokens: int) -> None:
    """Training can reuse scratch memory that a validation in inference mode allocated."""
    layer = make_layer(torch.float32)
    x = torch.randn(tokens, layer.in_features)
    with torch.inference_mode():
        expected = layer(x).clone()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert layer.values.grad is not None and layer.values.grad.isfinite().all()
