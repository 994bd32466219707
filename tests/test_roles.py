"""Finding output heads, and layers whose `weight` the model reads, without running the model."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_lightning import BlockSparseLinear, densify, sparsify
from sparse_lightning.roles import find_output_heads, find_read_weights


class Parts(nn.Module):
    """Base class for models with the methods below."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(16, 16), nn.Linear(16, 16), nn.LayerNorm(16)
        self.stack = nn.Sequential()
        self.stack.add_module("first", nn.Linear(16, 16))


def readers(**methods: Any) -> set[str]:
    return set(find_read_weights(type("Model", (Parts,), methods)()))


def wrapped(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate without `functools.wraps`."""

    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    return wrapper


def inner(self: Any, x: Tensor) -> Tensor:
    def times(y: Tensor) -> Tensor:
        return y @ self.a.weight

    with torch.no_grad():
        return times(x) + sum(y @ self.b.weight for y in x)


def handled(self: Any, x: Tensor) -> Tensor:
    try:
        return self.a(x)
    except RuntimeError:
        return self.a(x.to(self.a.weight.dtype))


def reads_a(self: Any, x: Tensor) -> Tensor:
    return F.linear(x, self.a.weight)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        # Direct access.
        (reads_a, {"a"}),
        (lambda self, x: self.a(x.to(self.a.weight.dtype)), {"a"}),
        (lambda self, x: self.stack.first.weight.T, {"stack.first"}),
        (lambda self, x: self.a.weight if self.training else self.b.weight, {"a", "b"}),
        (inner, {"a", "b"}),
        (handled, {"a"}),
        # In arguments of functions.
        (lambda self, x: checkpoint(lambda y: y @ self.a.weight, x), {"a"}),
        (lambda self, x: isinstance(self.a.weight, Tensor), {"a"}),
        # Decorated.
        (torch.no_grad()(reads_a), {"a"}),
        (torch.compile(reads_a), {"a"}),
        (wrapped(reads_a), {"a"}),
        (functools.wraps(reads_a)(wrapped(wrapped(reads_a))), {"a"}),
        # No weight of a linear layer is read.
        (lambda self, x: self.a(x) + self.norm.weight + self.b.bias, set()),
        (lambda self, x: x @ self.a.weights if x.weight else x, set()),
    ],
)
def test_weights_read_by_forward(forward: Callable[..., Any], expected: set[str]) -> None:
    assert readers(forward=forward) == expected


@pytest.mark.parametrize(
    "methods",
    [
        {
            "forward": lambda self, x: self.first(x),
            "first": wrapped(lambda self, x: self.second(x)),
        },
        {"forward": lambda self, x: checkpoint(self.second, x)},
        {"forward": lambda self, x: self.third, "third": property(lambda self: self.second(0))},
        {"training_step": lambda self, batch, i: self.a.weight.abs().sum()},
        {"on_train_epoch_end": lambda self: self.second(None)},
    ],
)
def test_weights_read_by_called_methods(methods: dict[str, Any]) -> None:
    assert readers(**{"second": reads_a, **methods}) == {"a"}


def test_initializers_and_unused_methods_do_not_count() -> None:
    never = {"reset_parameters": lambda self: nn.init.zeros_(self.a.weight), "unused": reads_a}
    assert readers(forward=lambda self, x: self.reset_parameters() or x, **never) == set()


def test_inherited_forwards() -> None:
    class Reads(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.a.weight)

    class Extends(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    class Replaces(Reads):
        def forward(self, x: Tensor) -> Tensor:
            return self.a(x)

    assert find_read_weights(Extends()) == {"a": "its `weight` is read by Reads.forward"}
    assert find_read_weights(Replaces()) == {}
    assert set(find_read_weights(nn.Sequential(Reads(), torch.compile(Reads())))) == {
        "0.a",
        "1._orig_mod.a",
    }


def test_weights_read_through_other_modules() -> None:
    class Shared(nn.Module):
        """Reads the weight of a submodule's layer."""

        def __init__(self) -> None:
            super().__init__()
            self.body = type("Body", (Parts,), {"forward": reads_a})()

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x) @ self.body.stack.first.weight

    class Penalised(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Shared()

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = self.net(batch).sum() + self.net.body.b.weight.abs().sum()
            self.log("loss", loss)
            return loss  # type: ignore[no-any-return]

    assert find_read_weights(Penalised()) == {
        "net.body.a": "its `weight` is read by Body.forward",
        "net.body.b": "its `weight` is read by Penalised.training_step",
        "net.body.stack.first": "its `weight` is read by Shared.forward",
    }


def test_modules_that_cannot_be_searched_are_ignored() -> None:
    class OwnLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight)

    scripted = torch.jit.script(nn.Sequential(nn.Linear(2, 2)))
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1)
    for module in (
        OwnLinear(2, 2),
        scripted,
        encoder,
        nn.Transformer(16, 2, 1, 1, 32, batch_first=True),
    ):
        assert find_read_weights(nn.Sequential(module)) == {}


SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
GPT2 = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 2}
MAMBA = {"x_proj", "dt_proj", "out_proj", "lm_head"}
VIT = {**SIZES, "image_size": 32, "patch_size": 16}


def build_on_meta(model: str, config: str, **options: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    with torch.device("meta"):
        built: nn.Module = getattr(transformers, model)(getattr(transformers, config)(**options))
    return built


@pytest.mark.parametrize(
    ("model", "options", "read", "head"),
    [
        ("T5Config T5ForConditionalGeneration", T5, {"wo"}, "lm_head"),
        ("MambaConfig MambaForCausalLM", SIZES, MAMBA, "lm_head"),
        ("BertConfig BertForMaskedLM", SIZES, set(), "cls.predictions.decoder"),
        ("BertConfig BertForSequenceClassification", SIZES, set(), "classifier"),
        ("BertConfig BertModel", SIZES, set(), None),
        ("GPTNeoXConfig GPTNeoXForCausalLM", SIZES, set(), "embed_out"),
        ("LlamaConfig LlamaForSequenceClassification", SIZES, set(), "score"),
        ("ViTConfig ViTForImageClassification", VIT, set(), "classifier"),
        ("GPT2Config GPT2LMHeadModel", GPT2, set(), "lm_head"),
        ("RobertaConfig RobertaForSequenceClassification", SIZES, set(), "classifier.out_proj"),
    ],
)  # fmt: skip
def test_models_of_transformers(
    model: str, options: dict[str, Any], read: set[str], head: str | None
) -> None:
    config, kind = model.split()
    built = build_on_meta(kind, config, **options)
    found = find_read_weights(built)
    assert {name.rpartition(".")[2] for name in found} == read
    if head == "embed_out":  # Transformers 5 calls it lm_head.
        head = next(n for n, m in built.named_modules() if m is built.get_output_embeddings())  # type: ignore[operator]
    assert list(find_output_heads(built)) == ([] if head is None else [head])
    # The results are the same if another module contains the model, such as a LightningModule.
    outer = nn.ModuleDict({"net": built})
    assert set(find_read_weights(outer)) == {f"net.{name}" for name in found}
    assert list(find_output_heads(outer)) == ([] if head is None else [f"net.{head}"])


def test_searching_a_large_model_is_fast() -> None:
    model = build_on_meta("BertForMaskedLM", "BertConfig", **{**SIZES, "num_hidden_layers": 24})
    start = time.perf_counter()
    find_read_weights(model)
    find_output_heads(model)
    assert time.perf_counter() - start < 2  # 0.1 s on an idle machine


class Net(nn.Module):
    """Has its arguments as submodules and attributes."""

    def __init__(self, **parts: Any) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)


class Timm(Net):
    def get_classifier(self) -> Any:
        return self.tops


class Fails(Net):
    def get_output_embeddings(self) -> nn.Module:
        raise NotImplementedError


def wide() -> nn.Linear:
    return nn.Linear(32, 64)


@pytest.mark.parametrize(
    ("model", "heads"),
    [
        (Timm(body=wide(), tops=wide()), {"tops": "get_classifier"}),
        (Timm(tops=nn.Sequential(wide(), wide()), rest=wide()), {"tops.1": "get_classifier"}),
        (Net(n=Timm(x=wide(), y=wide(), tops=()), z=wide()), {}),
        (Fails(a=wide(), b=wide()), {}),
        (Net(a=wide(), b=wide(), num_classes=64), {"b": "num_classes = 64"}),
        (nn.Sequential(Net(a=wide(), num_labels=64), wide()), {"0.a": "num_labels = 64"}),
        (Net(a=wide(), b=wide(), num_classes=10), {}),
        (Net(emb=nn.Embedding(64, 32), a=wide(), b=nn.Sequential(wide())), {"b.0": "embedding"}),
        # The number of positions may equal the vocabulary size, and a name resemble theirs.
        (Net(emb=nn.Embedding(64, 32), a=wide(), b=nn.Sequential(wide()),
             config=Net(max_position_embeddings=64, vocab_size=64)), {"b.0": "embedding"}),
        (Net(composer=nn.Embedding(64, 32), a=wide(), b=nn.Sequential(wide())),
         {"b.0": "embedding"}),
        (Net(features=wide(), classifier=nn.Sequential(wide(), nn.ReLU(), wide())),
         {"classifier.2": "within 'classifier'"}),
        (Net(a=wide(), out=nn.Linear(64, 10)), {"out": "narrowest"}),
        # Models without a head.
        *((Net(**{name: nn.Embedding(64, 32)}, a=wide(), b=nn.Sequential(wide())), {})
          for name in ("position_embedding", "embed_positions", "wpe", "relative_attention_bias")),
        (Net(n=Net(emb=nn.Embedding(64, 32)), a=wide(), b=nn.Sequential(wide()),
             config=Net(max_position_embeddings=64)), {}),
        (Net(a=wide(), out=nn.Sequential(nn.Linear(64, 10))), {}),
        (Net(out=nn.Linear(64, 10)), {}),
        (nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)), {}),
        (Net(fc0=nn.Linear(64, 64), fc1=nn.Linear(64, 64), fc2=nn.Linear(64, 64)), {}),
        (nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2), {}),
        (Net(project=nn.Linear(16, 64), up=nn.Linear(64, 128), image=nn.Linear(128, 784)), {}),
        (nn.Sequential(nn.ReLU()), {}),
    ],
)  # fmt: skip
def test_heads_of_plain_models(model: nn.Module, heads: dict[str, str]) -> None:
    found = find_output_heads(model)
    assert list(found) == list(heads)
    assert all(why in found[name] for name, why in heads.items())


def test_a_config_applies_to_the_outermost_module_that_has_it() -> None:
    config = Net(num_labels=64)
    part = Net(inner=wide(), config=config)
    model = Net(part=part, rest=nn.Linear(64, 128), config=config)
    assert find_output_heads(model) == {}
    assert list(find_output_heads(part)) == ["inner"]


def test_heads_do_not_change_when_other_layers_become_block_sparse() -> None:
    model = Net(a=nn.Linear(32, 64), b=nn.Linear(64, 32), out=nn.Linear(32, 16))
    before = find_output_heads(model)
    sparsify(model, include=["a"], block_size=16)
    assert find_output_heads(model) == before and list(before) == ["out"]


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.tanh(self.up(x)))  # type: ignore[no-any-return]


def learns(model: nn.Module) -> None:
    x = torch.randn(64, 32)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append((model(x) - x).square().mean())
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]


def test_lora_on_block_sparse_layers() -> None:
    """Add adapters, sparsify, then densify before PEFT merges."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["up", "down"], r=16)
    model = peft.get_peft_model(TwoLayers(), config)
    assert set(find_read_weights(model).values()) == {"inside a PEFT adapter"}
    bases = [n for n, _ in model.named_modules() if n.endswith("base_layer")]
    report = sparsify(model, include=bases, block_size=16, density=0.5)
    assert list(report.layers) == bases
    learns(model)
    expected = model(torch.ones(2, 32))
    with pytest.raises(AttributeError, match="weight"):
        model.merge_adapter()
    merged = densify(model).merge_and_unload()
    torch.testing.assert_close(merged(torch.ones(2, 32)), expected)


def test_lora_after_sparsify() -> None:
    peft = pytest.importorskip("peft")
    from peft.tuners import lora

    model = TwoLayers()
    sparsify(model, block_size=16, density=0.5)
    config = peft.LoraConfig(target_modules=["up", "down"], r=4)
    with pytest.raises(ValueError, match="not supported"):
        peft.get_peft_model(model, config)
    config._register_custom_module({BlockSparseLinear: lora.Linear})
    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = peft.get_peft_model(model, config)
    learns(model)


@pytest.mark.parametrize("kind", ["dora", "hra", "loha", "ia3"])
def test_other_adapters(kind: str) -> None:
    """Some adapters compute with the base layer's weight; others work on block-sparse layers."""
    peft = pytest.importorskip("peft")
    on = {"target_modules": ["up", "down"]}
    config = {
        "dora": lambda: peft.LoraConfig(use_dora=True, **on),
        "hra": lambda: peft.HRAConfig(**on),
        "loha": lambda: peft.LoHaConfig(**on),
        "ia3": lambda: peft.IA3Config(feedforward_modules=[], **on),
    }[kind]()
    model = peft.get_peft_model(TwoLayers(), config)
    read = {name for name in find_read_weights(model) if name.endswith("base_layer")}
    assert len(read) == (0 if kind == "ia3" else 2)
    sparsify(model, include=[n for n, _ in model.named_modules() if n.endswith("base_layer")],
             block_size=16, density=0.5)  # fmt: skip
    if kind == "ia3":
        learns(model)
    else:
        with pytest.raises(AttributeError, match="weight"):
            model(torch.ones(2, 32))
