"""A swap that keeps random blocks of trained weights says so once, and what to do instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_lightning import DensitySchedule, Sparsifier, SparsityCallback, sparsify
from tests.callbacks.helpers import Classifier, loader, trainer

FALLING = DensitySchedule(initial=1.0, final=0.25)


def trained(*names: str) -> Classifier:
    """A classifier, some of whose layers have rows of different norms, as training leaves them."""
    model = Classifier()
    for name in names or ("net.0", "net.2"):
        weight = model.get_submodule(name).weight
        weight.data *= torch.linspace(0.5, 1.5, len(weight))[:, None]
    return model


def by_sparsify(model: Classifier, **options: Any) -> None:
    sparsify(model, **options)


def by_sparsifier(model: Classifier, **options: Any) -> None:
    sparsifier = Sparsifier(model, 10, **options)
    for _ in range(2):  # once, although attached twice
        sparsifier.attach(torch.optim.SGD(model.parameters(), lr=0.1))
        sparsifier.detach()


def by_callback(model: Classifier, **options: Any) -> None:
    trainer(SparsityCallback(**options), max_steps=4).fit(model, loader())


def by_transformers(model: Classifier, **options: Any) -> None:
    transformers = pytest.importorskip("transformers")
    from sparse_lightning.integrations import SparsityTrainerCallback

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.head = model.net, model.head

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": self.head(self.net(x)).square().mean()}

    arguments = transformers.TrainingArguments(
        max_steps=2, report_to="none", save_strategy="no", disable_tqdm=True, use_cpu=True
    )
    transformers.Trainer(
        model=Module(),
        args=arguments,
        train_dataset=[{"x": row} for row in torch.randn(16, 64)],
        callbacks=[SparsityTrainerCallback(**options)],
    ).train()


Swap = Callable[..., None]
SWAPS: list[Swap] = [by_sparsify, by_sparsifier, by_callback, by_transformers]


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


def said(action: Callable[..., object], *arguments: Any, **options: Any) -> list[str]:
    """Return the warnings about trained weights."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action(*arguments, **options)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "look trained" in text]


@pytest.mark.parametrize("swap", SWAPS)
def test_one_warning_names_layers_and_remedy(swap: Swap) -> None:
    (text,) = said(swap, trained(), block_size=16, density=0.25)
    assert "random blocks of weights that look trained: net.0, net.2." in text
    assert "`init='magnitude'`" in text and "callbacks/sparsity=finetune" in text
    assert "`density=DensitySchedule(initial=1.0, final=0.25)`" in text


@pytest.mark.parametrize("swap", SWAPS)
def test_only_trained_layers_are_named(swap: Swap) -> None:
    (text,) = said(swap, trained("net.2"), block_size=16, density=0.25)
    assert "trained: net.2." in text and "net.0" not in text
    assert said(swap, Classifier(), block_size=16, density=0.25) == []


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("options", [{"init": "magnitude"}, {"density": 1.0}])
def test_nothing_is_said_where_no_random_blocks_are_kept(
    swap: Swap, options: dict[str, Any]
) -> None:
    assert said(swap, trained(), **{"block_size": 16, "density": 0.25, **options}) == []


@pytest.mark.parametrize("swap", [by_sparsifier, by_callback, by_transformers])
def test_nothing_is_said_of_a_density_that_falls_from_one(swap: Swap) -> None:
    assert said(swap, trained(), block_size=16, density=FALLING) == []
    (text,) = said(swap, trained(), block_size=16, density=DensitySchedule(initial=0.5, final=0.25))
    assert "trained: net.0, net.2." in text


def test_a_layer_that_keeps_all_blocks_is_not_named() -> None:
    (text,) = said(by_sparsify, trained(), block_size=16, layer_density={"net.0": 1.0})
    assert "trained: net.2." in text


@pytest.mark.parametrize("swap", [by_sparsifier, by_callback, by_transformers])
def test_layers_that_are_already_block_sparse_are_not_named(swap: Swap) -> None:
    model = trained()
    sparsify(model, block_size=16, init="magnitude")
    assert said(swap, model, block_size=16, density=0.25) == []


def test_a_resumed_training_is_silent_and_a_dense_checkpoint_is_not(tmp_path: Path) -> None:
    """The checkpoint replaces the weights that the model was given."""

    def fit(model: Classifier, steps: int, path: str | None = None, **options: Any) -> None:
        callback = SparsityCallback(block_size=16, **options)
        runner = trainer(callback, max_steps=steps)
        runner.fit(model, loader(), ckpt_path=path)
        runner.save_checkpoint(tmp_path / "sparse.ckpt")

    dense = trainer(max_steps=2)
    dense.fit(trained("net.0"), loader())
    dense.save_checkpoint(tmp_path / "dense.ckpt")
    path = str(tmp_path / "dense.ckpt")
    (text,) = said(fit, Classifier(), 4, path)
    assert "trained: net.0." in text
    assert said(fit, Classifier(), 4, path, init="magnitude") == []
    assert said(fit, trained(), 4, path, density=FALLING) == []

    assert len(said(fit, trained(), 4)) == 1
    assert said(fit, trained(), 8, str(tmp_path / "sparse.ckpt")) == []


def test_another_fit_of_the_same_model_is_silent() -> None:
    model, callback = trained(), SparsityCallback(block_size=16)
    assert len(said(trainer(callback, max_steps=4).fit, model, loader())) == 1
    assert said(trainer(callback, max_steps=4).fit, model, loader()) == []


def test_a_model_without_data_is_swapped() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(64, 64))
    assert sparsify(model, block_size=16).trained == ()
