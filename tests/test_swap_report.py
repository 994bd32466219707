"""The coverage in a swap report: the block-sparse share and the kinds of dense parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from sparse_lightning import BlockSparseLinear, sparsify
from sparse_lightning.swap_report import measure_coverage


class Bare(nn.Module):
    """A module that has parameters of given shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


@pytest.mark.parametrize(
    ("module", "kinds"),
    [
        (nn.Embedding(8, 4), {"embeddings": 1.0}),
        (nn.EmbeddingBag(8, 4), {"embeddings": 1.0}),
        (nn.Conv2d(2, 4, 3), {"convolutions": 1.0}),
        (nn.ConvTranspose1d(2, 4, 3), {"convolutions": 1.0}),
        (nn.LSTM(4, 8), {"recurrent layers": 1.0}),
        (nn.GRUCell(4, 8), {"recurrent layers": 1.0}),
        (nn.Linear(3, 5), {"linear layers": 0.75, "other": 0.25}),
        (parametrizations.orthogonal(nn.Linear(3, 3, bias=False)), {"linear layers": 1.0}),
        (nn.LayerNorm(4), {"other": 1.0}),
        (Bare(gates=(4, 4), scale=(1, 4, 4)), {"other": 1.0}),
        (nn.MultiheadAttention(8, 2, bias=False),
         {"attention in_proj": 0.75, "linear layers": 0.25}),
        (nn.MultiheadAttention(8, 2, bias=False, kdim=4, vdim=4),
         {"attention in_proj": 2 / 3, "linear layers": 1 / 3}),
        (nn.Linear(3, 5, device="meta").requires_grad_(False),
         {"linear layers": 0.75, "other": 0.25}),
    ],
)  # fmt: skip
def test_kinds(module: nn.Module, kinds: dict[str, float]) -> None:
    found = measure_coverage(nn.Sequential(module))
    assert found.parameters == sum(parameter.numel() for parameter in module.parameters())
    assert found.share == 0
    assert list(found.dense) == list(kinds)
    assert found.dense == pytest.approx(kinds)


def test_a_block_sparse_layer_counts_like_its_dense_layer() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 32))
    dense = measure_coverage(model)
    sparsify(model, include=["0"], block_size=16, density=0.25, max_density=0.5)
    found = measure_coverage(model)
    assert found.parameters == dense.parameters
    assert found.share == pytest.approx(2048 / found.parameters)
    assert found.share + sum(found.dense.values()) == pytest.approx(1)
    assert list(found.dense) == ["linear layers", "other"]


def test_a_parameter_with_several_names_counts_once() -> None:
    embedding, head = nn.Embedding(10, 16), nn.Linear(16, 10, bias=False)
    layer = BlockSparseLinear(16, 16, block_size=16, density=1.0)
    head.weight = embedding.weight
    found = measure_coverage(nn.Sequential(embedding, layer, layer, head))
    assert found.parameters == 160 + 256 + 16
    assert found.dense == pytest.approx({"embeddings": 160 / 432, "other": 16 / 432})


def test_the_coverage_note_omits_small_shares() -> None:
    experts = [Bare(up=(4, 16, 16), down=(4, 16, 8)) for _ in range(2)]
    model = nn.ModuleDict(
        {
            "layers": nn.ModuleList(experts),
            "more2": Bare(a=(2, 2, 2), b=(3, 2, 2)),
            "embedding": nn.Embedding(16, 64),
            "linear": nn.Linear(32, 16),
        }
    )
    sparsify(model, include=["linear"], exclude=(), block_size=16)
    found = measure_coverage(model)
    assert found.experts == ("layers.*.up", "layers.*.down", "more2.b", "more2.a")
    assert str(found) == (
        "Block-sparse layers cover 11 % of the model's 4,644 parameters; dense: 3-D parameters "
        "(experts) 67 % (layers.*.up, layers.*.down, more2.b, …), embeddings 22 %."
    )
    assert "less than 1 %" in str(measure_coverage(nn.Sequential(model, nn.Embedding(1000, 1000))))


def test_a_model_without_parameters() -> None:
    for model in (nn.ReLU(), nn.Sequential(nn.LazyLinear(3))):
        assert (
            str(measure_coverage(model))
            == "Block-sparse layers cover 0 % of the model's 0 parameters."
        )


def test_repeated_layers_share_a_row() -> None:
    blocks = [nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 10)) for _ in range(12)]
    model = nn.ModuleDict({"blocks": nn.Sequential(*blocks), "up": nn.Linear(32, 32)})
    report = sparsify(model, block_size=16, density=0.5, layer_density={"blocks.3.0": 0.75})
    assert len(report.layers) == 13
    assert str(report).splitlines() == [
        "Block-sparse layers",
        "layer       number  shape       blocks      density  parameters  before",
        "-----------------------------------------------------------------------",
        "blocks.*.0      12  64x32  50 of 16x16  0.500-0.750      13,568  25,344",
        "up               1  32x32   2 of 16x16        0.500         544   1,056",
        "-----------------------------------------------------------------------",
        "total           13                            0.520      14,112  26,400",
        "",
        "Left dense",
        "blocks.*.1 (12 layers): 10x64 is not divisible by block_size=16",
        *str(report).splitlines()[10:],
    ]


def test_a_pattern_within_blocks_has_a_column_and_counts_in_the_parameters() -> None:
    model = nn.ModuleDict({"up": nn.Linear(64, 64), "down": nn.Linear(64, 32, bias=False)})
    sparsify(model, block_size=16, density=0.25, include=["up"])
    report = sparsify(model, block_size=16, density=0.5, nm="2:4", include=["up", "down"])
    assert str(report).splitlines()[1:] == [
        "layer  shape             blocks  density  weight density  parameters  before",
        "----------------------------------------------------------------------------",
        "up     64x64         4 of 16x16    0.250           0.250       1,088   4,160",
        "down   32x64  4 of 16x16 at 2:4    0.500           0.250         512   2,048",
        "----------------------------------------------------------------------------",
        "total                              0.333           0.250       1,600   6,208",
    ]
    up, down = report.layers["up"], report.layers["down"]
    assert (up.nm, up.weights, up.weight_density) == (None, 1024, 0.25)
    assert (down.nm, down.weights, down.density, down.weight_density) == ("2:4", 512, 0.5, 0.25)
    assert (report.density, report.weight_density) == (pytest.approx(1 / 3), 0.25)


@pytest.mark.parametrize(
    ("model", "options"),
    [("Mixtral", {"num_local_experts": 4}), ("Qwen3Moe", {"num_experts": 4})],
)
def test_experts_of_transformers(model: str, options: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{model}Config")(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **options,
    )
    with torch.device("meta"):
        found = measure_coverage(getattr(transformers, f"{model}ForCausalLM")(config))
    assert next(iter(found.dense)) == "3-D parameters (experts)"
    assert found.experts[0] == "model.layers.*.mlp.experts.gate_up_proj"


def test_a_notebook_shows_the_table_and_the_notes() -> None:
    model = nn.ModuleDict({"up": nn.Linear(32, 64), "<b>": nn.Linear(32, 10)})
    page = sparsify(model, block_size=16, density=0.5)._repr_html_()
    assert "<td>64x32</td><td>4 of 16x16</td>" in page
    assert "<p>Left dense<br>&lt;b&gt;: 10x32 is not divisible by block_size=16</p>" in page
