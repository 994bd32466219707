"""Models of Hugging Face's transformers, small and of random weights, in a real Trainer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import BlockSparseLinear, SparsityCallback, densify, sparsify
from tests.callbacks.helpers import loader, trainer
from tests.pages import ROOT, example

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


def gpt2_of_linears() -> nn.Module:
    model = gpt2()
    example("Conv1D")["use_linears"](model)
    return model


def sparse(model: nn.Module) -> dict[str, BlockSparseLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, BlockSparseLinear)}


def tokens() -> Tensor:
    return torch.randint(3, 96, (4, 12), generator=torch.Generator().manual_seed(0))


class LanguageModel(L.LightningModule):
    """Learns one batch by heart."""

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
        gpt2_of_linears,
        {"exclude": []},
        {f"transformer.h.{i}.{name}" for i in (0, 1) for name in GPT2},
        "lm_head",
    ),
    "llama": (
        llama,
        {"include": [*LLAMA, "lm_*"], "exclude": []},  # an exact name must be one to swap
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


def test_llamas_recipe() -> None:
    page = (ROOT / "docs" / "how-to" / "hugging-face.md").read_text(encoding="utf-8")
    (include, again) = re.findall(r"include=(\[.*gate_proj.*\])", page)
    assert include == again
    report = sparsify(llama(), block_size=16, include=re.findall(r'"(\w+)"', include))
    assert set(report.layers) == CASES["llama"][2]
    assert report.skipped["model.layers.0.self_attn.q_proj"] == "not included"


def test_layers_whose_weight_t5_reads_are_excluded() -> None:
    config = transformers.T5Config(
        d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0, **SIZES
    )
    model = transformers.T5ForConditionalGeneration(config)
    sparsify(model, block_size=16, exclude=["wo", "lm_head"])
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    sparsify(model, block_size=16, include=["wo"])
    with pytest.raises(AttributeError, match="has no attribute 'weight'"):
        model(input_ids=tokens(), labels=tokens())


def test_conv1d_is_reported() -> None:
    model = nn.ModuleDict({"gpt2": gpt2(), "other": nn.Linear(32, 32)})
    report = sparsify(model, block_size=16)
    assert list(report.layers) == ["other"]
    for i in (0, 1):
        for name in GPT2:
            assert "Conv1D" in report.skipped[f"gpt2.transformer.h.{i}.{name}"]
    assert "gpt2.transformer.h.0.mlp.c_fc: a Conv1D" in str(report)


@pytest.mark.parametrize("include", [["*"], ["transformer.h.0.mlp.c_fc"]])
def test_a_model_of_conv1d_alone_is_refused_with_the_remedy(include: list[str]) -> None:
    with pytest.raises(ValueError, match=r"c_fc.*a Conv1D.*put an nn.Linear in its place"):
        sparsify(gpt2(), block_size=16, include=include)


def test_the_recipes_linears_compute_what_conv1ds_did() -> None:
    model = gpt2().eval()
    with torch.no_grad():
        before = model(input_ids=tokens()).logits
        example("Conv1D")["use_linears"](model)
        after = model(input_ids=tokens()).logits
    assert not any(type(module).__name__ == "Conv1D" for module in model.modules())
    torch.testing.assert_close(after, before)
