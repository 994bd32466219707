"""Errors and warnings name a remedy: ONNX, unsupported dtypes, a density that cannot rise."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_lightning import Sparsifier, sparsify
from tests.callbacks.helpers import Classifier


def sparse_classifier() -> Classifier:
    model = Classifier()
    sparsify(model, density=0.5, block_size=16)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=["fused", "separate"])
def test_onnx_export_by_pytorch_is_refused_with_a_remedy(
    activation: Any, dynamo: bool, tmp_path: Path
) -> None:
    pytest.importorskip("onnxscript")
    model = Classifier()
    model.net[1] = activation()
    sparsify(model, density=0.5, block_size=16)
    with pytest.raises(RuntimeError, match=r"sparse-lightning export --to onnx.*write_onnx"):
        model.to_onnx(tmp_path / "model.onnx", torch.randn(2, 64), dynamo=dynamo)
    x = torch.randn(2, 64)
    # `torch.export` works.
    assert torch.equal(torch.export.export(model.eval(), (x,)).module()(x), model(x))


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.complex64),
        lambda model: model.to(dtype=torch.complex128),
        lambda model: model.to(torch.float8_e4m3fn),
        lambda model: model.type(torch.int32),
        lambda model: model.type("torch.LongTensor"),
    ],
)
def test_an_unsupported_dtype_changes_no_layer(convert: Any) -> None:
    net = sparse_classifier().net
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with pytest.raises(TypeError, match=r"must be one of float64.*; got torch\..*densify"):
        convert(net)
    after = net.state_dict()
    for name, value in before.items():
        assert after[name].dtype == value.dtype and torch.equal(after[name], value)
    net(torch.zeros(2, 64))


def test_supported_conversions_work() -> None:
    net = sparse_classifier().net
    x = torch.randn(2, 64)
    y = net(x)
    assert torch.allclose(net.double()(x.double()).float(), y, atol=1e-5)
    assert net.half().bfloat16()[0].values.dtype == torch.bfloat16
    net.float().share_memory()
    assert net.to("meta").to_empty(device="cpu")[0].values.shape == net[0].values.shape


RISING = {"schedule": "linear", "initial": 0.25, "final": 0.5}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"density": RISING}, "0, 2"),
        ({"density": {**RISING, "schedule": "cosine"}}, "0, 2"),
        ({"density": {**RISING, "schedule": lambda p, a, b: 0.25 + p / 4}}, "0, 2"),
        (
            {"density": {**RISING, "initial": 0.5, "final": 0.25}, "layer_density": {"2": 0.75}},
            "2",
        ),
        ({"density": RISING, "grow": "random"}, None),
        ({"density": RISING, "grow": "gradient"}, None),
        ({"density": {**RISING, "initial": 0.5, "final": 0.25}}, None),
        ({"density": 0.5, "drop_fraction": 0}, None),
    ],
)
def test_a_density_that_rises_without_growth_warns_once(
    options: dict[str, Any], named: str | None
) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        made = Sparsifier(model, total_steps=8, block_size=16, **{"grow": "none", **options})
        made.attach(torch.optim.SGD(model[0].parameters(), lr=0.1))
        made.attach(torch.optim.SGD(model[2].parameters(), lr=0.1))
    messages = [str(w.message) for w in caught if "`grow` is 'none'" in str(w.message)]
    assert len(messages) == (named is not None)
    assert named is None or f"stays for {named}. " in messages[0]
