"""Compiled, checkpointed and exported layers equal eager ones and never recompile."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, BlockSparseMLP
from sparse_lightning.policy.updates import update_topology
from sparse_lightning.selection import sparse_layers


@pytest.fixture(autouse=True)
def _no_recompilation() -> Iterator[None]:
    """Make recompilation an error in every test of this file."""
    torch.compiler.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch.compiler.reset()


def make_model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(
        BlockSparseLinear(64, 96, block_size=16, density=0.4),
        nn.GELU(),
        BlockSparseLinear(96, 32, block_size=16, density=0.6),
    ).to(dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randn(*shape, 64, dtype=torch.float64)


def compiled(
    function: Callable[..., Tensor], backend: str = "aot_eager"
) -> tuple[Callable[..., Tensor], CompileCounterWithBackend]:
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def update_all(model: nn.Module, step: int, n_blocks_less: int) -> None:
    """Apply a random topology update to every layer."""
    generator = torch.Generator().manual_seed(step)
    for _, layer in sparse_layers(model):
        grid, target = layer.topology.grid, layer.topology.capacity - n_blocks_less
        scores = [torch.rand(grid, generator=generator).to(layer.values.device) for _ in range(2)]
        before = layer.topology.coords.clone()
        layer.apply_update(update_topology(layer.topology, *scores, target, fraction=0.4))
        assert not torch.equal(layer.topology.coords, before)
        with torch.no_grad():  # zero values of grown blocks would hide errors
            present = (layer.topology.coords[:, 0] >= 0).view(-1, 1, 1)
            drawn = torch.randn(layer.values.shape, generator=generator)
            layer.values.copy_(drawn.to(present.device) * present)


def run(
    model: nn.Module, function: Callable[..., Tensor], x: Tensor, armed: bool
) -> dict[str, Tensor]:
    """Run forward and backward from clean gradients, and return all outputs and gradients.

    Missing norms, as in eager code that is not armed, are returned as zeros.
    """
    model.zero_grad()
    for _, layer in sparse_layers(model):
        layer.arm(armed)
        layer.block_norms.grad = None
    x = x.detach().clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    assert x.grad is not None
    out = {"y": y.detach(), "dx": x.grad}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        out[name] = parameter.grad.clone()
    for name, layer in sparse_layers(model):
        assert layer.block_norms.count_nonzero() == 0
        norms = layer.block_norms.grad
        out[f"{name}.norms"] = torch.zeros_like(layer.block_norms) if norms is None else norms
        assert bool((out[f"{name}.norms"] > 0).any()) == armed
    return out


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], rtol=1e-6, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_topology_updates_and_arming_compile_once(backend: str, device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    model = make_model()
    model.to(device)
    function, counter = compiled(model, backend)
    x = tokens(7).to(device)
    for step in range(31):
        if step:
            update_all(model, step, n_blocks_less=step % 4)
        armed = step % 3 == 1
        actual = run(model, function, x, armed)
        assert_same(actual, run(model, model, x, armed))
    assert counter.frame_count == 1


def test_norms_with_a_token_stride_compile() -> None:
    model = make_model()
    for layer in model.modules():
        if isinstance(layer, BlockSparseLinear):
            layer.token_stride = 3
    function, _ = compiled(model, "aot_eager")
    x = tokens(7)
    assert_same(run(model, function, x, True), run(model, model, x, True))


def test_the_count_sees_a_recompilation() -> None:
    """The tests above rely on this: a changing Python value is detected."""

    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BlockSparseLinear(64, 32, block_size=16, density=0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) * self.layer.topology.n_blocks

    model = Counting()
    function, _ = compiled(model)
    function(torch.randn(3, 64))
    update_all(model, 1, n_blocks_less=1)
    with pytest.raises(torch._dynamo.exc.RecompileError):
        function(torch.randn(3, 64))


def test_a_layer_called_twice_compiles() -> None:
    layer = BlockSparseLinear(64, 64, block_size=16, density=0.5, dtype=torch.float64)
    model = nn.ModuleDict({"layer": layer})

    def twice(x: Tensor) -> Tensor:
        return layer(layer(x).tanh())

    function, counter = compiled(twice)
    x = tokens(7)
    for step, armed in enumerate((True, False, True)):
        update_all(model, step, n_blocks_less=0)
        assert_same(run(model, function, x, armed), run(model, twice, x, armed))
    assert counter.frame_count == 1


def test_arming_compiles_once_while_norms_accumulate() -> None:
    """Over micro-batches, some of them not armed, the sum equals that of eager code."""
    model = make_model()
    eager = copy.deepcopy(model)
    function, counter = compiled(model)
    for armed in (False, True, True, False):
        x = tokens(7)
        for module, forward in ((model, function), (eager, eager)):
            for _, layer in sparse_layers(module):
                layer.arm(armed)
            forward(x).square().sum().backward()
    for (_, ours), (_, expected) in zip(sparse_layers(model), sparse_layers(eager), strict=True):
        assert expected.block_norms.grad is not None and expected.block_norms.grad.any()
        torch.testing.assert_close(ours.block_norms.grad, expected.block_norms.grad)
    assert counter.frame_count == 1


def test_gradients_of_the_input_leave_no_norms_when_compiled() -> None:
    model = make_model()
    for _, layer in sparse_layers(model):
        layer.arm(True)
    function, _ = compiled(model)
    x = tokens(7).requires_grad_()
    (dx,) = torch.autograd.grad(function(x).square().sum(), x)
    function(x).square().sum().backward(inputs=[x])
    torch.testing.assert_close(x.grad, dx)
    torch.testing.assert_close(torch.autograd.grad(model(x).square().sum(), x)[0], dx)
    for _, layer in sparse_layers(model):
        assert layer.block_norms.grad is layer.values.grad is None


def test_a_frozen_layer_has_no_norms_when_compiled() -> None:
    model = make_model()
    model[0].values.requires_grad_(False)
    for _, layer in sparse_layers(model):
        layer.arm(True)
    function, _ = compiled(model)
    function(tokens(7)).square().sum().backward()
    assert model[0].block_norms.grad is None and (model[2].block_norms.grad > 0).any()


def test_dynamic_token_counts_compile_once() -> None:
    model = make_model()
    function, counter = compiled(model)
    for batch, length in ((5, 7), (3, 2), (40, 9), (2, 300)):
        x = tokens(batch, length)
        expected = model(x).sum()
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(x, 1)
        torch.testing.assert_close(function(x).sum(), expected)
    assert counter.frame_count == 1


def test_dynamic_token_counts_compile_once_with_backward() -> None:
    model = make_model()
    function, counter = compiled(model)
    for batch in (5, 3, 300):
        x = tokens(batch).requires_grad_()
        torch._dynamo.mark_dynamic(x, 0)
        function(x).square().sum().backward()
        actual = x.grad
        x.grad = None
        model(x).square().sum().backward()
        torch.testing.assert_close(actual, x.grad)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_inside_the_compiled_function(dtype: torch.dtype) -> None:
    model = make_model(torch.float32)

    def forward(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype):
            return model(x)

    function, counter = compiled(forward)
    x = tokens(7).float()
    for step, armed in enumerate((False, True)):
        update_all(model, step, n_blocks_less=0)
        actual, expected = run(model, function, x, armed), run(model, forward, x, armed)
        assert actual["y"].dtype == dtype
        assert actual["0.values"].dtype == torch.float32
        for name in expected:
            difference = (actual[name].double() - expected[name].double()).norm()
            assert difference <= 0.02 * expected[name].double().norm(), name
    assert counter.frame_count == 1


# -- checkpointing ----------------------------------------------------------------------------


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("armed", [False, True])
def test_checkpointing_in_eager(use_reentrant: bool, armed: bool) -> None:
    model = make_model()

    def checkpointed(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=use_reentrant)
        return y

    x = tokens(7)
    assert_same(run(model, checkpointed, x, armed), run(model, model, x, armed))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_norms_of_checkpointed_micro_batches(use_reentrant: bool) -> None:
    plain = make_model()
    checkpointed = copy.deepcopy(plain)
    for model in (plain, checkpointed):
        for _, layer in sparse_layers(model):
            layer.arm(True)
    for _ in range(2):
        x = tokens(7).requires_grad_()
        plain(x).square().sum().backward()
        y = checkpoint(checkpointed, x, use_reentrant=use_reentrant)
        y.square().sum().backward()
    for ours, expected in ((checkpointed[0], plain[0]), (checkpointed[2], plain[2])):
        torch.testing.assert_close(ours.block_norms.grad, expected.block_norms.grad)


def test_checkpointing_compiled() -> None:
    model = make_model()

    def checkpointed(x: Tensor) -> Tensor:
        y: Tensor = checkpoint(model, x, use_reentrant=False)
        return y

    function, counter = compiled(checkpointed)
    x = tokens(7)
    for step, armed in enumerate((False, True, True, False)):
        update_all(model, step, n_blocks_less=step % 2)
        assert_same(run(model, function, x, armed), run(model, model, x, armed))
    assert counter.frame_count == 1


def test_checkpointing_of_each_layer_compiled() -> None:
    model = make_model()

    def checkpointed(x: Tensor) -> Tensor:
        for module in model:
            x = checkpoint(module, x, use_reentrant=False)
        return x

    function, _ = compiled(checkpointed)
    x = tokens(7)
    assert_same(run(model, function, x, True), run(model, model, x, True))


# -- torch.export -----------------------------------------------------------------------------


def make_mlp() -> BlockSparseMLP:
    return BlockSparseMLP(*make_model(), nn.Tanh(), nn.Linear(32, 8, dtype=torch.float64))


def make_layer() -> BlockSparseLinear:
    return BlockSparseLinear(64, 48, block_size=16, density=0.5, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("make", "op"), [(make_layer, "block_linear"), (make_mlp, "block_mlp")])
def test_export(make: Callable[[], nn.Module], op: str, training: bool) -> None:
    model = make().train(training)
    for _, layer in sparse_layers(nn.Sequential(model)):
        layer.arm(True)  # affects backward only, so not the exported program
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(model, (tokens(3, 5),), dynamic_shapes=({0: batch},))
    assert f"sparse_lightning.{op}.default" in map(str, [n.target for n in program.graph.nodes])
    assert {constant.dtype for constant in program.constants.values()} == {torch.int32}
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    programs = {
        "unchanged": program,
        "decomposed": program.run_decompositions(),
        "from a file": torch.export.load(file),
    }
    for n in (1, 2, 33):
        x = tokens(n, 5)
        for name, exported in programs.items():
            actual = exported.module()(x)
            torch.testing.assert_close(actual, model(x), msg=lambda m, name=name: f"{name}: {m}")


def test_an_exported_program_has_the_gradients_of_the_model() -> None:
    model = make_mlp()
    program = torch.export.export(model, (tokens(3),))
    x = tokens(3)
    parameters = [*model.parameters()]
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    exported = program.module()
    exported_parameters = [exported.get_parameter(name) for name, _ in model.named_parameters()]
    actual = torch.autograd.grad(exported(x).square().sum(), exported_parameters)
    for gradient, expected_gradient in zip(actual, expected, strict=True):
        assert expected_gradient.norm() > 0
        torch.testing.assert_close(gradient, expected_gradient)


def test_a_file_of_an_exported_model_keeps_its_blocks() -> None:
    model, x, file = make_mlp(), tokens(3), io.BytesIO()
    torch.export.save(torch.export.export(model, (x,)), file)
    expected = model(x)
    update_all(model, step=0, n_blocks_less=1)
    assert not torch.allclose(model(x), expected)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), expected)
