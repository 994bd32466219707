"""The ops on PyTorch's dispatcher: schemas, autograd, scores."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, BlockSparseMLP, BlockTopology
from sparse_lightning.kernels import cpu, ops, reference


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    return str(request.param)


def make_layer(
    dtype: torch.dtype = torch.float64, spare: int = 2, bias: bool = True
) -> BlockSparseLinear:
    """A 48x64 layer with an empty row, an empty slot and a bias."""
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [0, 1, 0, 1]]).bool()
    topology = BlockTopology.from_mask(mask, 16, capacity=5 + spare)
    return BlockSparseLinear(64, 48, bias, topology=topology, dtype=dtype)


def dense_gradient_norms(layer: BlockSparseLinear, x: Tensor, dy: Tensor) -> Tensor:
    return reference.block_norms(dy.double(), x.detach().double(), layer.topology.grid).float()


def with_dense_scores(layer: BlockSparseLinear) -> BlockSparseLinear:
    """Have backward add the dense gradient itself to the layer's scores."""
    layer.score_by(exact=True)
    return layer


def op_arguments(
    op: str,
    dtype: torch.dtype,
    requires_grad: bool = False,
    device: str = "cpu",
    dense_scores: bool = False,
) -> tuple[Any, ...]:
    layer = make_layer(dtype).to(device)
    at, values = layer.topology, layer.values.detach()
    x = torch.randn(2, 3, 64, dtype=dtype, device=device)
    dy = torch.randn(2, 3, 48, dtype=dtype, device=device)
    bias = torch.randn(48, dtype=dtype, device=device)
    down = BlockSparseLinear(
        48, 64, topology=BlockTopology.from_mask(at.mask.T.cpu(), 16), dtype=dtype
    ).to(device)
    rows = at.row_offsets, at.row_entries
    cols = at.col_offsets, at.col_entries, at.slots
    if dense_scores:
        with_dense_scores(layer), with_dense_scores(down)
    armed, scores = torch.tensor(True, device=device), torch.rand_like(layer.block_scores)
    if requires_grad:
        x, values, bias = (t.requires_grad_() for t in (x, values, bias))
    return {
        "block_linear": (x, values, bias, at.coords, *rows, *cols, armed, scores, 1),
        "block_linear_dx": (dy, values, *cols),
        "block_linear_dw": (dy, x, at.coords, *rows, at.slots),
        "block_norms_": (dy, x, armed, scores),
        "block_linear_act": (x, values, bias, at.coords, *rows, *cols, "gelu"),
        "block_linear_dh": (dy, values, *cols, torch.randn_like(x), "silu"),
        "block_mlp": (
            *(x, values, bias, at.coords, *rows, *cols, armed, scores, 1),
            *(down.values.detach(), None, *down.operands(x)[2:], "gelu"),
        ),
    }[op]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("op", "requires_grad"),
    [*((op, False) for op in ops.OPS), *((op, True) for op in ("block_linear", "block_mlp"))],
)
def test_opcheck(op: str, requires_grad: bool, dtype: torch.dtype, device: str) -> None:
    arguments = op_arguments(op, dtype, requires_grad, device)
    results = torch.library.opcheck(getattr(ops, op), arguments)
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ["block_linear", "block_norms_", "block_mlp"])
def test_opcheck_with_dense_scores(op: str, dtype: torch.dtype, device: str) -> None:
    arguments = op_arguments(op, dtype, op != "block_norms_", device, dense_scores=True)
    results = torch.library.opcheck(getattr(ops, op), arguments)
    assert len(results) >= 4
    assert set(results.values()) == {"SUCCESS"}


def test_opcheck_without_bias() -> None:
    x, values, _, *rest = op_arguments("block_linear", torch.float32, requires_grad=True)
    results = torch.library.opcheck(ops.block_linear, (x, values, None, *rest))
    assert set(results.values()) == {"SUCCESS"}


# -- autograd ---------------------------------------------------------------------------------


def call(layer: BlockSparseLinear, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    parameters = {"values": values} if bias is None else {"values": values, "bias": bias}
    y: Tensor = torch.func.functional_call(layer, parameters, (x,))
    return y


@pytest.mark.parametrize("method", ["by block", "by row", "densify"])
@pytest.mark.parametrize("lead", [(), (3,), (2, 2), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(
    method: str, lead: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "choose", lambda *_: method)
    # No spare slot: there, the gradient is zero by definition, as is the derivative.
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


def test_double_backward_is_refused() -> None:
    layer = make_layer()
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


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
    layer.armed.fill_(True)
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
    torch.testing.assert_close(layer.block_scores, expected)


def test_an_input_without_gradient() -> None:
    layer = make_layer()
    layer(torch.randn(3, 64, dtype=torch.float64)).sum().backward()
    assert layer.values.grad is not None and layer.values.grad.count_nonzero() > 0


def test_frozen_values_still_pass_the_gradient_on() -> None:
    layer = make_layer()
    layer.values.requires_grad_(False)
    layer.armed.fill_(True)
    x = torch.randn(3, 64, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dense_weight().sum(0).expand(3, -1))
    assert layer.values.grad is None
    assert layer.bias is not None and layer.bias.grad is not None
    # A frozen layer is never updated, so its scores cost nothing.
    assert layer.block_scores.count_nonzero() == 0


def test_without_gradients_nothing_is_kept_for_backward() -> None:
    layer = make_layer().requires_grad_(False)
    assert not layer(torch.randn(3, 64, dtype=torch.float64)).requires_grad
    with torch.no_grad():
        assert not make_layer()(torch.randn(3, 64, dtype=torch.float64)).requires_grad


# -- scores -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "rtol"),
    [(torch.float64, 1e-5), (torch.float32, 1e-4), (torch.bfloat16, 1e-4), (torch.float16, 1e-4)],
    ids=str,
)
def test_scores_accumulate_over_micro_batches_while_armed(dtype: torch.dtype, rtol: float) -> None:
    layer = make_layer(dtype)
    scores, expected = layer.block_scores, torch.zeros(3, 4)
    for armed in (False, True, True, False):
        layer.armed.fill_(armed)
        x, dy = torch.randn(7, 64).to(dtype), torch.randn(7, 48).to(dtype)
        layer(x).backward(dy)
        if armed:
            expected += dense_gradient_norms(layer, x, dy)
    assert layer.block_scores is scores and scores.dtype == torch.float32
    assert (expected > 0).all()  # absent blocks and the empty row too
    torch.testing.assert_close(scores, expected, rtol=rtol, atol=0)


def test_scores_of_half_precision_do_not_overflow() -> None:
    layer = make_layer(torch.float16)
    layer.armed.fill_(True)
    x, dy = torch.full((8, 64), 100.0).half(), torch.full((8, 48), 50.0).half()
    ops.block_norms_(dy, x, layer.armed, layer.block_scores)
    # Every element of dy^T x is 8 * 100 * 50 = 40,000; a block has 256.
    torch.testing.assert_close(layer.block_scores, torch.full((3, 4), 256 * 40_000.0**2))
    scores = torch.zeros(48, 64)
    ops.block_norms_(dy, 2 * x, layer.armed, scores)
    torch.testing.assert_close(scores, torch.full((48, 64), 80_000.0))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("stride", [2, 5, 100])
def test_scores_of_every_few_tokens(stride: int, exact: bool, device: str) -> None:
    layer = make_layer().to(device)
    layer.score_by(exact, stride)
    layer.armed.fill_(True)
    x = torch.randn(3, 7, 64, dtype=torch.float64, device=device)
    dy = torch.randn(3, 7, 48, dtype=torch.float64, device=device)
    layer(x).backward(dy)
    read = [t.flatten(0, 1)[::stride] for t in (dy, x)]
    if exact:
        expected = reference.dense_gradient(*read)
    else:
        expected = reference.block_norms(*read, layer.topology.grid)
    torch.testing.assert_close(layer.block_scores.double(), expected, rtol=1e-5, atol=1e-5)
    whole = reference.block_linear_dw(dy.flatten(0, 1), x.flatten(0, 1), layer.topology.coords, 16)
    torch.testing.assert_close(layer.values.grad, whole)  # of all tokens


@pytest.mark.parametrize("shape", [(7, 5), (7 * 16, 5 * 16)], ids=["norms", "dense"])
def test_scores_of_a_large_layer_equal_those_of_its_bands(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    dy, x = torch.randn(9, 7 * 16), torch.randn(9, 5 * 16)
    expected = torch.zeros(shape)
    ops.block_norms_(dy, x, torch.tensor(True), expected)
    monkeypatch.setattr(cpu, "_NORMS_BAND_BYTES", 3 * 16 * x.shape[1] * 4)  # three block rows
    scores = torch.zeros(shape)
    ops.block_norms_(dy, x, torch.tensor(True), scores)
    assert (expected != 0).all()
    torch.testing.assert_close(scores, expected)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_dense_scores_are_the_gradient_of_all_micro_batches(
    dtype: torch.dtype, device: str
) -> None:
    layer = with_dense_scores(make_layer(dtype).to(device))
    scores, expected = layer.block_scores, torch.zeros(48, 64, dtype=torch.float64, device=device)
    for armed in (False, True, True, False):
        layer.armed.fill_(armed)
        before = scores.clone()
        x = torch.randn(2, 7, 64, device=device).to(dtype)
        dy = torch.randn(2, 7, 48, device=device).to(dtype)
        layer(x).backward(dy)
        assert torch.equal(scores, before) != armed
        if armed:
            expected += reference.dense_gradient(dy.double(), x.double())
    assert layer.block_scores is scores and scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), expected, rtol=1e-5, atol=1e-5)


def make_mlp(device: str) -> BlockSparseMLP:
    """Two armed layers with an activation between them."""
    up = make_layer()
    down = BlockSparseLinear(48, 64, topology=BlockTopology.from_mask(up.topology.mask.T, 16))
    mlp = BlockSparseMLP(up, nn.GELU(), down.double()).to(device)
    up.armed.fill_(True), down.armed.fill_(True)
    return mlp


@pytest.mark.parametrize("which", [0, 2], ids=["up", "down"])
def test_an_mlp_scores_each_layer_by_its_own_tokens(which: int, device: str) -> None:
    mlp = make_mlp(device)
    x = torch.randn(9, 64, dtype=torch.float64, device=device)
    dy = torch.randn(9, 64, dtype=torch.float64, device=device)
    mlp[which].score_by(token_stride=4)
    mlp(x).backward(dy)
    scores = [mlp[i].block_scores.clone() for i in (0, 2)]
    for i in (0, 2):
        mlp[i].score_by(token_stride=4 if i == which else 1)
    plain = nn.Sequential(*mlp)  # layer by layer
    plain(x).backward(dy)
    for i, score in zip((0, 2), scores, strict=True):
        torch.testing.assert_close(score, mlp[i].block_scores)


@pytest.mark.parametrize("which", [0, 2], ids=["up", "down"])
def test_dense_scores_of_an_mlp(which: int, device: str) -> None:
    mlp = make_mlp(device)
    with_dense_scores(mlp[which])
    dense = nn.Sequential(mlp[0].to_linear(), nn.GELU(), mlp[2].to_linear())
    x = torch.randn(5, 64, dtype=torch.float64, device=device)
    mlp(x).square().sum().backward()
    dense(x).square().sum().backward()
    for part, reference_part in ((mlp[0], dense[0]), (mlp[2], dense[2])):
        expected = reference_part.weight.grad
        if part is not mlp[which]:
            expected = reference.squared_norms(expected, part.topology.grid)
        torch.testing.assert_close(part.block_scores, expected.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("whole", [True, False], ids=["mlp", "layer"])
def test_dense_scores_of_a_compiled_model(whole: bool, device: str) -> None:
    """Arming it compiles nothing anew."""
    mlp = make_mlp(device)
    with_dense_scores(mlp[0])
    model = mlp if whole else mlp[0]
    eager = copy.deepcopy(model)
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for armed in (True, False, True):
            for each in (mlp[0], eager[0] if whole else eager):
                each.armed.fill_(armed)
            x = torch.randn(5, 64, dtype=torch.float64, device=device)
            before = mlp[0].block_scores.clone()
            compiled(x).square().sum().backward()
            eager(x).square().sum().backward()
            assert torch.equal(mlp[0].block_scores, before) != armed
    torch.compiler.reset()
    scores = (eager[0] if whole else eager).block_scores
    torch.testing.assert_close(mlp[0].block_scores, scores, rtol=1e-5, atol=1e-5)


# -- the choice of kernel, and devices -------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, ("by block", "by row", "densify")),
        (torch.float32, ("by block", "by row", "densify")),
        # Half precision is never rounded after every block.
        (torch.bfloat16, ("by row", "densify")),
        (torch.float16, ("by row", "densify")),
    ],
    ids=str,
)
def test_the_methods_that_a_dtype_may_take(dtype: torch.dtype, expected: tuple[str, ...]) -> None:
    choices = {
        cpu.choose(tokens, size, density, dtype)
        for tokens in (0, 1, 255, 256, 100_000)
        for size in (16, 32, 64, 128)
        for density in (0.0, 0.01, 0.3, 0.8, 1.0)
    }
    assert choices == set(expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_one_backend_does_not_answer_for_another() -> None:
    layer = make_layer(torch.float32).cuda()
    with pytest.raises((RuntimeError, TypeError), match=r"device|cuda"):
        layer(torch.randn(3, 64))


@pytest.mark.parametrize("tokens", [4, 300])
def test_training_after_inference_mode(tokens: int) -> None:
    """Memory that a validation under inference mode borrowed serves the training after it."""
    layer = make_layer(torch.float32)
    x = torch.randn(tokens, layer.in_features)
    with torch.inference_mode():
        expected = layer(x).clone()
    y = layer(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    assert layer.values.grad is not None and layer.values.grad.isfinite().all()
