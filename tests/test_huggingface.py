"""Small models of Hugging Face's transformers with random weights, trained by Lightning."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, SparsityCallback, densify, sparsify
from sparse_lightning.cli import main
from sparse_lightning.export import dense_state_dict, describe_layers, find_layers
from tests.callbacks.helpers import loader, trainer
from tests.pages import ROOT

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 96, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def bert() -> nn.Module:
    config = transformers.BertConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **SIZES,
    )
    return transformers.BertForMaskedLM(config)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        **SIZES,
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool = True) -> nn.Module:
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        **SIZES,
    )
    return transformers.LlamaForCausalLM(config)


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def tokens() -> Tensor:
    return torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))


class LanguageModel(L.LightningModule):
    """Overfits one batch."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(input_ids=tokens(), labels=tokens()).loss
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


BERT = [
    *("attention.self.query", "attention.self.key", "attention.self.value"),
    *("attention.output.dense", "intermediate.dense", "output.dense"),
]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
LLAMA = ["gate_proj", "up_proj", "down_proj"]

CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str], str]] = {
    "bert": (
        bert,
        {},
        {
            *(f"bert.encoder.layer.{i}.{name}" for i in (0, 1) for name in BERT),
            "cls.predictions.transform.dense",
        },
        "cls.predictions.decoder",
    ),
    "gpt2": (
        gpt2,
        {"exclude": []},
        {f"transformer.h.{i}.{name}" for i in (0, 1) for name in GPT2},
        "lm_head",
    ),
    "llama": (
        llama,
        {"include": [*LLAMA, "lm_*"], "exclude": []},  # A layer named in full must be swappable.
        {f"model.layers.{i}.mlp.{name}" for i in (0, 1) for name in LLAMA},
        "lm_head",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_language_model_trains_and_keeps_its_ties(case: str) -> None:
    build, options, expected, tied = CASES[case]
    model = LanguageModel(build())
    sparsity = SparsityCallback(
        block_size=16,
        density=0.5,
        update={"every_n_steps": 4, "until": 1.0},
        drop_fraction=0.5,
        **options,
    )
    trainer(sparsity, max_steps=24).fit(model, loader())
    assert sparsity.report is not None and sparsity.last_update is not None
    assert {name.removeprefix("net.") for name in sparse(model)} == expected
    assert sparsity.report.skipped[f"net.{tied}"] == "its weight is tied"
    assert model.net.get_output_embeddings().weight is model.net.get_input_embeddings().weight
    assert sparsity.last_update.step == 24
    assert sum(len(update.grown) for update in sparsity.last_update.layers.values()) > 0
    assert model.losses[-1] < 0.7 * model.losses[0]

    model.eval()
    with torch.no_grad():
        logits = model.net(input_ids=tokens()).logits
        expected_logits = densify(model).net(input_ids=tokens()).logits
    torch.testing.assert_close(logits, expected_logits, rtol=1e-4, atol=1e-4)


def test_the_llama_example_of_the_docs() -> None:
    page = (ROOT / "docs" / "how-to" / "hugging-face.md").read_text(encoding="utf-8")
    (include, again) = re.findall(r"include=(\[.*gate_proj.*\])", page)
    assert include == again
    report = sparsify(llama(), block_size=16, include=re.findall(r'"(\w+)"', include))
    assert set(report.layers) == CASES["llama"][2]
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "not included"


def test_layers_whose_weight_t5_reads_stay_dense() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    model = transformers.T5ForConditionalGeneration(config)
    report = sparsify(model, block_size=16)
    assert any(name.endswith(".wi") for name in report.layers)
    assert any(name.endswith(".wo") for name in report.skipped)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    model = transformers.T5ForConditionalGeneration(config)
    sparsify(model, block_size=16, include=[n for n in report.skipped if n.endswith(".wo")])
    with pytest.raises(AttributeError, match=r"has no `weight`.*layer '.*wo'"):
        model(input_ids=tokens(), labels=tokens())


# -- GPT-2's Conv1D, whose weight is [in_features, out_features] --------------------------------

C_FC = "transformer.h.0.mlp.c_fc"


def sparse_gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = gpt2().eval()
    sparsify(model, **{"block_size": 16, "density": 0.5, **options})
    return model


def test_a_conv1d_becomes_sparse_and_dense_again_as_the_same_object() -> None:
    model = gpt2().eval()
    conv, weight = model.get_submodule(C_FC), model.get_submodule(C_FC).weight
    before, kind = weight.detach().clone(), type(conv)
    sparsify(model, block_size=16, density=1.0, init="magnitude")
    assert model.get_submodule(C_FC) is conv and type(conv) is BlockSparseLinear
    assert torch.equal(conv.dense_weight(), before.T)
    densify(model)
    assert type(conv) is kind and conv.weight is weight and torch.equal(weight, before)
    assert weight.shape == (32, 128) and (conv.nx, conv.nf) == (32, 128)
    assert repr(conv) == repr(gpt2().get_submodule(C_FC))
    assert vars(conv).keys() == vars(gpt2().get_submodule(C_FC)).keys()


def test_a_sparse_gpt2_loads_a_dense_checkpoint() -> None:
    torch.manual_seed(1)
    dense, model = gpt2(), sparse_gpt2(density=1.0)
    model.load_state_dict(dense.state_dict())
    with torch.no_grad():
        expected, got = (m.eval()(input_ids=tokens()).logits for m in (dense, model))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)

    some = sparse_gpt2(density=0.5)
    mask = some.get_submodule(C_FC).topology.mask
    some.load_state_dict(dense.state_dict())
    kept = mask.repeat_interleave(16, 0).repeat_interleave(16, 1).T
    weight = densify(some).get_submodule(C_FC).weight
    assert torch.equal(weight, dense.get_submodule(C_FC).weight * kept)


@pytest.mark.parametrize("form", ["dense", "bsr", "safetensors"])
def test_an_exported_sparse_gpt2_loads_into_a_dense_one(form: str, tmp_path: Path) -> None:
    model, dense = sparse_gpt2(), gpt2().eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    arguments = ["--to", form, "--output", str(tmp_path / "out")]
    assert main(["export", str(tmp_path / "weights.pt"), *arguments]) == 0
    if form == "safetensors":
        safetensors_torch = pytest.importorskip("safetensors.torch")
        safetensors_torch.load_model(dense, tmp_path / "out")
    else:
        saved = torch.load(tmp_path / "out", weights_only=True)
        dense.load_state_dict(saved, assign=form == "bsr")
    with torch.no_grad():
        expected, got = (m(input_ids=tokens()).logits for m in (model, dense))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("given", ["density", "topology"])
def test_a_single_conv1d(given: str) -> None:
    torch.manual_seed(0)
    dense = gpt2().get_submodule(C_FC)
    first = BlockSparseLinear.from_linear(dense, block_size=16, density=0.5)
    options: Any = {"density": 0.5} if given == "density" else {"topology": first.topology}
    layer, x = BlockSparseLinear.from_linear(dense, block_size=16, **options), torch.randn(3, 32)
    assert (layer.in_features, layer.out_features, layer.density) == (32, 128, 0.5)
    kept = layer.topology.mask.repeat_interleave(16, 0).repeat_interleave(16, 1)
    assert torch.equal(layer.dense_weight(), dense.weight.T * kept)
    torch.testing.assert_close(densify(layer)(x), layer(x))
    # In a model, it behaves like a layer that was swapped there.
    model, swapped = gpt2(), sparse_gpt2(density=0.5)
    model.transformer.h[0].mlp.c_fc = layer
    shapes = {name: tensor.shape for name, tensor in dense_state_dict(model.state_dict()).items()}
    assert shapes == {n: t.shape for n, t in dense_state_dict(swapped.state_dict()).items()}
    densify(model)
    assert type(layer) is type(dense)
    torch.testing.assert_close(layer(x), x @ (dense.weight * kept.T) + dense.bias)
    with pytest.raises(ValueError, match=r"got a bare Conv1D. Use BlockSparseLinear.from_linear"):
        sparsify(dense, block_size=16)


def test_a_checkpoint_of_a_sparse_gpt2_is_inspected(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = sparse_gpt2()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    assert main(["inspect", str(tmp_path / "weights.pt"), "--layer", C_FC]) == 0
    assert f"{C_FC}: 128x32, 8 of 8x2 blocks" in capsys.readouterr().out
    expected = sparsify(gpt2(), block_size=16, density=0.5).layers
    assert describe_layers(find_layers(model.state_dict())).layers == expected
