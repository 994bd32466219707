"""MLPs of models, whatever their class, compute as one op."""

from __future__ import annotations

import copy
import operator
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sparse_lightning import (
    BlockSparseGLU,
    BlockSparseLinear,
    densify,
    fusion,
    register_mlp,
    sparsify,
)
from sparse_lightning.kernels import ops
from sparse_lightning.kernels.activations import ACTIVATIONS, activate
from sparse_lightning.mlp import FusedMLP
from tests.test_mlp import gradients, layer


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ops of MLPs that were called, with their activations."""
    seen: list[str] = []

    def record(name: str, op: Any) -> None:
        def call(*arguments: Any) -> object:
            seen.append(f"{name} {arguments[-1]}")
            return op(*arguments)

        monkeypatch.setattr(ops, name, call)

    record("block_mlp", ops.block_mlp)
    record("block_glu", ops.block_glu)
    record("block_stacked_glu", ops.block_stacked_glu)
    return seen


def make_glu(activation: str = "silu", bias: bool = True) -> BlockSparseGLU:
    torch.manual_seed(0)
    return BlockSparseGLU(layer(32, 48, bias), layer(32, 48, bias), layer(48, 32, bias), activation)


class Gated(nn.Module):
    """A gated MLP in the style of many models; `compute` replaces what it computes."""

    def __init__(self, compute: Callable[[Gated, Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.w1, self.w2, self.w3 = nn.Linear(32, 64), nn.Linear(64, 32), nn.Linear(32, 64)
        self.act, self.drop = nn.SiLU(), nn.Dropout(0.0)
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        if self.compute is not None:
            return self.compute(self, x)
        y: Tensor = self.w2(self.drop(self.act(self.w1(x)) * self.w3(x)))
        return y


def swapped(module: nn.Module) -> Any:
    torch.manual_seed(0)
    sparsify(nn.Sequential(module.double()), block_size=16, density=0.5)
    return module


def one_by_one(module: nn.Module) -> nn.Module:
    """Return a copy whose layers run separately, since they have hooks."""
    plain = copy.deepcopy(module)
    for child in plain.modules():
        if isinstance(child, BlockSparseLinear):
            child.register_forward_hook(lambda *_: None)
    return plain


# -- the op -----------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_gated_mlp_computes_what_its_layers_do(
    activation: str, bias: bool, calls: list[str]
) -> None:
    glu = make_glu(activation, bias)
    x, dy = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    ours, expected = gradients(glu, x, dy), gradients(one_by_one(glu), x, dy)
    assert calls == [f"block_glu {activation}"] and len(ours) == (11 if bias else 8)
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


class Stacked(nn.Module):
    """A gated MLP of which one layer computes gate and up."""

    def __init__(self, activation: str = "silu") -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(32, 96), nn.Linear(48, 32)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        y: Tensor = self.down(up * activate(gate, self.activation))
        return y


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_layer_for_gate_and_up(activation: str, calls: list[str]) -> None:
    module = swapped(Stacked(activation))
    x, dy = torch.randn(2, 5, 32).double(), torch.randn(2, 5, 32).double()
    ours, expected = gradients(module, x, dy), gradients(one_by_one(module), x, dy)
    assert calls == [f"block_stacked_glu {activation}"] and len(ours) == 8
    for mine, theirs in zip(ours, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_an_unknown_activation_is_an_error(requires_grad: bool) -> None:
    x, (up, down) = torch.zeros(2, 32), (layer(32, 96), layer(48, 32))
    for each in up, down:
        each.float().requires_grad_(requires_grad)
    with pytest.raises(ValueError, match=r"must be one of 'relu'.*got 'tanh'"):
        ops.block_stacked_glu(x, *up._operands(x), *down._operands(x), "tanh")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("stacked", [False, True])
def test_first_and_second_derivatives(activation: str, stacked: bool) -> None:
    glu = swapped(Stacked(activation)) if stacked else make_glu(activation)
    x = torch.randn(2, 32, dtype=torch.float64, requires_grad=True)
    parameters = dict(glu.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        named = dict(zip(parameters, values, strict=True))
        y: Tensor = torch.func.functional_call(glu, named, (x,))
        return y

    inputs = x, *parameters.values()
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    if activation != "relu":
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("frozen", ["gate", "up", "down", "gate up", "gate up down"])
@pytest.mark.parametrize("needs_dx", [True, False])
def test_frozen_layers_have_no_gradients(frozen: str, needs_dx: bool) -> None:
    glu = make_glu()
    for name, parameter in glu.named_parameters():
        parameter.requires_grad_(name.partition(".")[0] not in frozen.split())
    plain = one_by_one(glu)
    x, dy = torch.randn(4, 32).double().requires_grad_(needs_dx), torch.randn(4, 32).double()
    if not needs_dx and frozen == "gate up down":
        return
    for module in glu, plain:
        for part in module.children():
            part.arm(True)  # type: ignore[operator]
        module(x).backward(dy)
    for name in "gate", "up", "down":
        ours, theirs = (getattr(module, name) for module in (glu, plain))
        assert (ours.values.grad is None) == (ours.block_norms.grad is None) == (name in frozen)
        if name not in frozen:
            torch.testing.assert_close(ours.values.grad, theirs.values.grad)
            torch.testing.assert_close(ours.block_norms.grad, theirs.block_norms.grad)


def test_what_one_layer_for_gate_and_up_keeps() -> None:
    model, kept = swapped(Stacked()), []
    x = torch.randn(8, 32).double().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    assert sorted(t.shape[1] for t in kept if t.shape[0] == 8 and t.dim() == 2) == [32, 96]


@pytest.mark.parametrize("gated", [True, False])
def test_what_a_forward_keeps_for_its_backward(gated: bool) -> None:
    """Pre-activations, from which the backward computes the hidden activations again."""
    model = swapped(
        Gated() if gated else nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    )
    x, kept = torch.randn(8, 32).double().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        model(x)
    hidden = [t for t in kept if t.shape == (8, 64)]
    assert len(hidden) == (2 if gated else 1)


@pytest.mark.parametrize("gated", [True, False])
def test_compiled_code_follows_updates_without_recompiling(gated: bool) -> None:
    torch.compiler.reset()
    model = swapped(
        Gated() if gated else nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
    )
    compiled = torch.compile(model, fullgraph=True)
    x, dy = torch.randn(3, 32).double(), torch.randn(3, 32).double()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(3):
            for ours, theirs in zip(
                gradients(compiled, x, dy), gradients(one_by_one(model), x, dy), strict=True
            ):
                torch.testing.assert_close(ours, theirs)
            for part in model.modules():
                if isinstance(part, BlockSparseLinear):
                    moved = torch.roll(part.topology.mask, 1, 1)
                    topology = type(part.topology).from_mask(moved, 16)
                    part.topology.assign_(topology.coords)


# -- recognition ------------------------------------------------------------------------------

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, vocab_size=96
)
HEADS = {"num_key_value_heads": 2, "head_dim": 32}
MODELS = {
    "Llama": (HEADS, "block_glu silu"),
    "Mistral": (HEADS, "block_glu silu"),
    "Qwen2": ({"num_key_value_heads": 2}, "block_glu silu"),
    "Qwen3": (HEADS, "block_glu silu"),
    "Gemma2": (HEADS, "block_glu gelu_tanh"),
    "Phi3": ({"num_key_value_heads": 2, "pad_token_id": 0}, "block_stacked_glu silu"),
    "Phi": ({}, "block_mlp gelu_tanh"),
    "GPTNeoX": ({}, "block_mlp gelu"),
}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name: str, calls: list[str]) -> None:
    more, op = MODELS[name]
    config = getattr(transformers, f"{name}Config")(**SIZES, **more)
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config).double()
    classes = {n: type(m) for n, m in model.named_modules()}
    keys = [*model.state_dict()]
    report = sparsify(model, include=["*.mlp.*"], block_size=16, density=0.5)
    assert not report.unfused
    ids = torch.arange(12).view(2, 6)
    found = []
    for each in model, one_by_one(model):
        calls.clear()
        each(ids, labels=ids).loss.backward()
        found.append([each(ids).logits, *(p.grad for p in each.parameters() if p.grad is not None)])
        assert calls == ([op, op] if each is model else [])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert {
        key.replace("values", "weight") for key in model.state_dict() if "extra" not in key
    } == {*keys}
    densify(model)
    assert {n: type(m) for n, m in model.named_modules()} == classes


def test_copies_and_pickles() -> None:
    """The derived class has no name by which it could be found; the one of the tests has."""
    module, x = swapped(Gated()), torch.randn(2, 32).double()
    for other in copy.deepcopy(module), pickle.loads(pickle.dumps(module)), copy.copy(module):
        assert type(other) is type(module) and isinstance(other, Gated)
        assert torch.equal(other(x), module(x))
        assert isinstance(other._layers_to_fuse(x), list)


def test_a_module_is_fused_again_or_not_at_all_as_its_layers_change(calls: list[str]) -> None:
    module, x = swapped(Gated()), torch.randn(2, 32).double()
    module(x)
    assert calls == ["block_glu silu"]
    holder = nn.Sequential(module)
    densify(holder)
    assert type(module) is Gated and "_fused_beside" not in vars(module)
    sparsify(holder, block_size=16, density=0.5)
    sparsify(nn.Sequential(holder, nn.Linear(32, 32).double()), block_size=16)
    module(x)
    assert len(calls) == 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "an activation": lambda m: setattr(m, "act", nn.Tanh()),
    "dropout": lambda m: setattr(m.drop, "p", 1.0),
    "an attribute": lambda m: setattr(m, "compute", plain),
    "a layer": lambda m: setattr(m, "w1", nn.Linear(32, 64).double()),
    "a subclass of a layer": lambda m: setattr(
        m.w1, "__class__", type("X", (BlockSparseLinear,), {})
    ),
    "a forward": lambda m: setattr(m.w1, "forward", lambda x: x.new_ones(*x.shape[:-1], 64)),
    "a hook": lambda m: m.w3.register_forward_hook(lambda *_: torch.ones(2, 64).double()),
    "a hook of the activation": lambda m: m.act.register_forward_hook(
        lambda *_: torch.ones(2, 64).double()
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_after_the_swap_is_obeyed(change: str, calls: list[str]) -> None:
    module, x = swapped(Gated()), torch.randn(2, 32).double()
    CHANGES[change](module)
    expected = module.w2(module.drop(module.act(module.w1(x)) * module.w3(x)))
    assert torch.equal(module(x), expected) and not calls


def test_a_new_attribute_changes_nothing(calls: list[str]) -> None:
    module = swapped(Gated())
    module.name, module.compute = "mlp", None
    module.train()(torch.randn(2, 32).double())
    assert calls == ["block_glu silu"]


def test_a_forward_that_is_patched_later_is_obeyed(
    calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module, x = swapped(Gated()), torch.randn(2, 32).double()
    monkeypatch.setattr(Gated, "forward", lambda self, x: 2 * x)
    assert torch.equal(module(x), 2 * x) and not calls


def test_dropout_by_a_function_is_found(calls: list[str]) -> None:
    def compute(self: Any, x: Tensor) -> Tensor:
        hidden = self.act(self.w1(x)) * self.w3(x)
        y: Tensor = self.w2(nn.functional.dropout(hidden, 0.5, self.training))
        return y

    module, x = swapped(Gated(compute)), torch.randn(2, 32).double()
    module(x)
    assert not calls
    module.eval()(x)
    assert calls == ["block_glu silu"]


def plain(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.w2(m.act(m.w1(x)) * m.w3(x))
    return y


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return -dy


def hooked(m: Any, x: Tensor) -> Tensor:
    hidden = m.act(m.w1(x)) * m.w3(x)
    if hidden.requires_grad:
        hidden.register_hook(lambda gradient: 2 * gradient)
    y: Tensor = m.w2(hidden)
    return y


def limited_in_bf16(m: Any, x: Tensor) -> Tensor:
    return plain(m, x.clamp(-1, 1) if x.dtype == torch.bfloat16 else x)


def remembering(m: Any, x: Tensor) -> Tensor:
    m.last = x
    return plain(m, x)


def logging(m: Any, x: Tensor) -> Tensor:
    m.log.append(1)
    return plain(m, x)


CHANGES_MODULE = "changes the module"
OTHERS: dict[str, tuple[Callable[[Any, Tensor], Tensor], str]] = {
    "a reversed gradient": (lambda m, x: plain(m, Reversed.apply(x)), "something other"),
    "no gradient of x": (lambda m, x: plain(m, x.detach()), "something other"),
    "no gradient": (lambda m, x: plain(m, x).detach(), "something other"),
    "a hook of a tensor": (hooked, "something other"),
    "no NaN": (lambda m, x: plain(m, x.nan_to_num()), "for some values or dtypes"),
    "a mask of zeros": (
        lambda m, x: plain(m, x) * (x.abs().sum(-1, keepdim=True) > 0),
        "for some values or dtypes",
    ),
    "a limit of a dtype": (limited_in_bf16, "for some values or dtypes"),
    "a result in fp64": (lambda m, x: plain(m, x).double(), "for some values or dtypes"),
    "the dtype of x": (lambda m, x: plain(m, x).to(x.dtype), "dtype of autocast"),
    "an attribute": (remembering, CHANGES_MODULE),
    "a list": (logging, CHANGES_MODULE),
    "another activation": (lambda m, x: m.w2(m.w1(x).tanh() * m.w3(x)), "something other"),
    "a residual": (lambda m, x: x + m.w2(m.act(m.w1(x)) * m.w3(x)), "something other"),
    "a limit": (
        lambda m, x: m.w2(m.act(m.w1(x).clamp(max=50)) * m.w3(x)),
        "something other",
    ),
    "a scale": (lambda m, x: 2 * m.w2(m.act(m.w1(x)) * m.w3(x)), "something other"),
    "sizes": (lambda m, x: m.w2(m.act(m.w1(x)) * m.w3(x).view(-1, 64)), "cannot be tried out"),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_modules_run_as_they_are(other: str, calls: list[str]) -> None:
    compute, reason = OTHERS[other]
    module, x = Gated(compute).double(), torch.randn(2, 32).double()
    module.log = []  # type: ignore[assignment]
    report = sparsify(nn.Sequential(module), block_size=16, density=0.5)
    assert type(module) is Gated and reason in report.unfused["0"] and reason in str(report)
    assert module.log == [] and "last" not in vars(module)
    assert torch.equal(module(x), compute(module, x)) and not calls


class Swish(nn.Module):
    """A SiLU, until its parameter is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.beta * x).sigmoid()


def test_a_forward_without_a_signature(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a class that is compiled to machine code."""
    monkeypatch.setattr(Gated, "forward", operator.methodcaller("compute_gated"))
    module = Gated().double()
    report = sparsify(nn.Sequential(module), block_size=16)
    assert type(module) is Gated and not report.unfused and not calls


STATES: dict[str, Callable[[Gated], object]] = {
    "a parameter of a child": lambda m: setattr(m, "act", Swish()),
    "a parameter": lambda m: m.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "a buffer": lambda m: m.register_buffer("calls", torch.zeros(1)),
    "a child of a child": lambda m: setattr(m, "act", nn.Sequential(nn.SiLU())),
}


@pytest.mark.parametrize("state", STATES)
def test_modules_with_state_of_their_own_run_as_they_are(state: str, calls: list[str]) -> None:
    module = Gated()
    STATES[state](module)
    swapped(module)(torch.randn(2, 32).double()).sum().backward()
    assert type(module) is Gated and not calls


def test_random_numbers_of_any_source_are_found(calls: list[str]) -> None:
    """As of a layer that is skipped at random in training."""

    def compute(self: Any, x: Tensor) -> Tensor:
        return x if self.training and random.random() < 0.5 else plain(self, x)

    state = random.getstate()
    module, x = swapped(Gated(compute)), torch.randn(2, 32).double()
    assert random.getstate() == state
    module(x)
    assert not calls
    module.eval()(x)
    assert calls == ["block_glu silu"]


def test_inputs_that_a_module_treats_in_its_own_way(calls: list[str]) -> None:
    def compute(self: Any, x: Any) -> Tensor:
        if isinstance(x, tuple):
            x = x[0]
        return plain(self, x.permute(0, 2, 3, 1) if x.dim() == 4 else x)

    module, x = swapped(Gated(compute)), torch.randn(2, 32).double()
    images = torch.randn(2, 32, 5, 3).double()
    assert torch.equal(module((x,)), module(x=x)) and not calls
    assert torch.equal(module(images), plain(module, images.permute(0, 2, 3, 1))) and not calls
    module(x)
    assert calls == ["block_glu silu"]


def test_methods_and_classes_that_are_kept(calls: list[str]) -> None:
    module, x = swapped(Gated()), torch.randn(2, 32).double()
    forward, fused = module.forward, type(module)
    expected = module(x)
    assert fused()(torch.zeros(1, 32)).shape == (1, 32)  # dense, and so run as it is
    densify(nn.Sequential(module))
    torch.testing.assert_close(forward(x), expected)
    sparsify(nn.Sequential(module), block_size=16, density=1.0)
    # As `fully_shard` and parametrizations do.
    module.__class__ = own = type("Own", (type(module),), {})
    densify(nn.Sequential(module))
    assert type(module) is own
    torch.testing.assert_close(module(x), expected)


def test_a_signature_is_kept() -> None:
    module = swapped(Gated())
    batch = torch.export.Dim("batch", min=1, max=100)
    example = (torch.randn(3, 32).double(),)
    program = torch.export.export(module, example, dynamic_shapes={"x": {0: batch}})
    x = torch.randn(7, 32).double()
    torch.testing.assert_close(program.module()(x), module(x))


def test_a_registered_class_is_not_tried(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(Gated):
        pass

    compute = OTHERS["sizes"][0]
    monkeypatch.setattr(fusion, "_registered", {})
    register_mlp(Own, gate="w1", up="w3", down="w2", activation="silu")
    module, x = swapped(Own(compute)), torch.randn(2, 32).double()
    assert torch.equal(module(x), compute(module, x)) and calls == ["block_glu silu"]
    with pytest.raises(ValueError, match=r"must be one of 'relu'.*got 'tanh'"):
        register_mlp(Own, up="w3", down="w2", activation="tanh")


def test_the_random_state_is_kept() -> None:
    torch.manual_seed(0)
    module, expected = Gated(), torch.rand(3)
    torch.manual_seed(0)
    Gated()
    sparsify(nn.Sequential(module), block_size=16)
    assert isinstance(module, FusedMLP)
    assert torch.equal(torch.rand(3), expected)
    assert activate(torch.zeros(1), "silu") == 0


def losses_of_a_llama(fused: bool, steps: int, device: str) -> Tensor:
    """Train a block-sparse Llama on a Markov chain in bf16-mixed; return its loss at each step."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        vocab_size=128, use_cache=False,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).to(device)
    sparsify(model, include=["*_proj"], block_size=64, density=0.5)
    assert isinstance(model.model.layers[0].mlp, FusedMLP)
    if not fused:
        for module in model.modules():
            if isinstance(module, BlockSparseLinear):
                module.register_forward_hook(lambda *_: None)  # so that it is called
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    chain = torch.rand(128, 128, generator=generator).pow(8)
    found = []
    for _ in range(steps):
        tokens = [torch.randint(128, (16,), generator=generator)]
        for _ in range(31):
            tokens.append(chain[tokens[-1]].multinomial(1, generator=generator)[:, 0])
        ids = torch.stack(tokens, 1).to(device)
        with torch.autocast(device, torch.bfloat16):
            loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.detach())
    return torch.stack(found).cpu()


@pytest.mark.parametrize(
    ("device", "steps"), [("cpu", 5), pytest.param("cuda", 200, marks=pytest.mark.gpu)]
)
def test_a_fused_llama_learns_as_an_unfused_one(device: str, steps: int) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    fused, unfused = (losses_of_a_llama(each, steps, device) for each in (True, False))
    if steps > 100:
        assert unfused[-20:].mean() < 0.9 * unfused[:20].mean()
    # Rounding differs in the last bit of an activation, which a training slowly amplifies.
    torch.testing.assert_close(fused, unfused, rtol=2e-2, atol=0)
