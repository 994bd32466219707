"""Fresh weights count as fresh, whatever initialises them, and trained ones as trained."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from quality_tasks import load_example
from torch import Tensor, nn
from torch.nn import init

from sparse_lightning.policy.freshness import looks_trained

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((16, 16), (32, 32), (16, 256), (256, 16), (384, 128), (2048, 512))
INITIALISERS: dict[str, Callable[[Tensor], Any]] = {
    "torch's default": partial(init.kaiming_uniform_, a=5**0.5),
    "kaiming_normal": init.kaiming_normal_,
    "xavier_uniform": init.xavier_uniform_,
    "xavier_normal": init.xavier_normal_,
    "trunc_normal, .02": partial(init.trunc_normal_, std=0.02),
    "trunc_normal, cut at 2 sd": partial(init.trunc_normal_, std=0.02, a=-0.04, b=0.04),
    "normal, .02 / sqrt(24)": partial(init.normal_, std=0.02 / 24**0.5),
    "orthogonal": init.orthogonal_,
    "sparse": partial(init.sparse_, sparsity=0.9),
    "eye": init.eye_,
    "zeros": init.zeros_,
    "constant": partial(init.constant_, val=0.3),
}


@pytest.mark.parametrize("name", INITIALISERS)
def test_no_initialiser_looks_trained(name: str) -> None:
    for seed in range(30):
        torch.manual_seed(seed)
        for shape in SHAPES if seed < 3 else SHAPES[:-1]:
            weight = torch.empty(shape)
            INITIALISERS[name](weight)
            assert not looks_trained(weight.to(DTYPES[seed % 3])), (name, seed, shape)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Bert", "ViT", "T5", "Mamba2", "DeiT", "Opt"])
def test_no_new_model_of_transformers_looks_trained(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {
        "GPT2": {"n_embd": 128, "n_layer": 2, "n_head": 2, "vocab_size": 128},
        "T5": {"d_model": 128, "num_layers": 2, "d_ff": 512, "vocab_size": 128},
        "Mamba2": {"num_heads": 8, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 128},
    }
    common = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 512}
    options = sizes.get(name, {"hidden_size": 128, **common})
    if name == "Mamba2":
        options["hidden_size"] = 128
    name = {"Opt": "OPT"}.get(name, name)
    model = getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**options))
    linear = (nn.Linear, transformers.pytorch_utils.Conv1D)
    weights = {n: m.weight for n, m in model.named_modules() if isinstance(m, linear)}
    assert len(weights) >= 4
    assert [n for n, w in weights.items() if min(w.shape) >= 16 and looks_trained(w)] == []


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": partial(torch.optim.AdamW, lr=1e-3),
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize(("optimizer", "epochs"), [("adamw", 1), ("adamw", 10), ("sgd", 3)])
def test_an_mlp_that_was_trained_on_digits_looks_trained(optimizer: str, epochs: int) -> None:
    images, labels, *_ = load_example("data").Digits(batch_size=64).load()
    torch.manual_seed(0)
    model = load_example("mlp").MLP(features=256, hidden=256)
    layers = (model.first, model.second)
    assert not any(looks_trained(layer.weight) for layer in layers)
    steps = OPTIMIZERS[optimizer](model.parameters())
    for _ in range(epochs):
        for rows in torch.randperm(len(images)).split(64):
            F.cross_entropy(model(images[rows]), labels[rows]).backward()
            steps.step()
            steps.zero_grad()
    assert all(looks_trained(layer.weight.to(d)) for layer in layers for d in DTYPES)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_mlps_of_a_gpt_look_trained_after_200_steps(optimizer: str) -> None:
    torch.manual_seed(0)
    model = load_example("gpt").GPT(width=128, layers=2, heads=2, context=64)
    weights = [block.mlp[i].weight for block in model.blocks for i in (0, 2)]
    assert not any(map(looks_trained, weights))
    data = load_example("data").StdlibBytes(64, 8, train_windows=200 * 8, val_windows=1)
    data.setup("fit")
    steps = OPTIMIZERS[optimizer](model.parameters())
    for windows in data.train_dataloader():
        model.bits_per_byte(windows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad()
    assert all(map(looks_trained, weights))


def test_neither_scale_nor_orientation_matters() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 96)
    trained = weight * torch.linspace(0.5, 1.5, 64)[:, None]
    for scale in (1e-30, 1.0, 1e30):
        assert not looks_trained(weight * scale)
        assert looks_trained(trained * scale) and looks_trained(trained.T * scale)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_cannot_be_judged_counts_as_fresh(value: float) -> None:
    weight = torch.randn(64, 64) * torch.linspace(0.5, 1.5, 64)
    assert looks_trained(weight)
    weight[0, 0] = value
    assert not looks_trained(weight)
    assert not looks_trained(torch.empty(64, 64, device="meta"))
