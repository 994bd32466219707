"""Dead outputs and unread inputs are announced when layers are swapped, once, and shown."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from sparse_lightning import Sparsifier, SparsityCallback, sparsify
from sparse_lightning.patching import sparse_layers
from tests.callbacks.helpers import Classifier, loader, trainer


class Net(Classifier):
    """A classifier whose first layer has more outputs than it has blocks."""

    def __init__(self, hidden: int = 512, depth: int = 1) -> None:
        L.LightningModule.__init__(self)
        torch.manual_seed(0)
        self.ups = nn.ModuleList(nn.Linear(64, hidden) for _ in range(depth))
        self.down = nn.Linear(hidden, 64)
        self.head = nn.Linear(64, 4)
        self.lr, self.optimizer, self.losses = 1e-2, torch.optim.AdamW, []

    def forward(self, x: Tensor) -> Tensor:
        hidden = sum(up(x).relu() for up in self.ups)
        return self.head(self.down(hidden).relu())


def by_sparsify(model: nn.Module, **options: Any) -> None:
    sparsify(model, **options)


def by_sparsifier(model: nn.Module, **options: Any) -> None:
    sparsifier = Sparsifier(model, 10, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    model.loss(0).backward()
    optimizer.step()
    sparsifier.detach()


def by_callback(model: L.LightningModule, **options: Any) -> None:
    trainer(SparsityCallback(**options), max_steps=4).fit(model, loader())


Swap = Callable[..., None]
SWAPS: list[Swap] = [by_sparsify, by_sparsifier, by_callback]


def said(swap: Swap, model: nn.Module, **options: Any) -> list[str]:
    """Return the warnings of dead outputs and unread inputs."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        swap(model, **options)
    texts = [str(warning.message) for warning in caught]
    return [text for text in texts if "Dead outputs" in text or "Unread inputs" in text]


def dead(model: nn.Module) -> tuple[int, int]:
    """Return the numbers of dead outputs and of unread inputs of a model's block-sparse layers."""
    masks = [(layer.topology.mask, layer.block_size) for _, layer in sparse_layers(model)]
    return (
        sum(size * int((~mask.any(1)).sum()) for mask, size in masks),
        sum(size * int((~mask.any(0)).sum()) for mask, size in masks),
    )


@pytest.mark.parametrize("swap", SWAPS)
def test_one_warning_names_layers_and_numbers(swap: Swap) -> None:
    (text,) = said(swap, Net(), block_size=32, density=0.25)
    outputs, inputs = text.split("Unread inputs")
    remedy = "; density 0.5 or block size 16 would do)"
    assert f"'ups.0' (at least 256 of 512{remedy}" in outputs and "down" not in outputs
    assert f"'down' (at least 256 of 512{remedy}" in inputs and "ups" not in inputs


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 32, "density": 0.5},
        {"block_size": 16, "density": 0.25},
        {"block_size": 32, "density": 0.25, "layer_density": {"ups.*": 0.5, "down": 0.5}},
        {"block_size": 32, "density": 1.0},
    ],
)
def test_what_it_advises_leaves_no_dead_feature(swap: Swap, options: dict[str, Any]) -> None:
    model = Net()
    assert said(swap, model, **options) == []
    assert dead(model) == (0, 0)


@pytest.mark.parametrize("swap", [by_sparsifier, by_callback])
def test_a_falling_density_is_announced_before_anything_has_died(swap: Swap) -> None:
    falling = {"schedule": "cubic", "initial": 1.0, "final": 0.25}
    with pytest.warns(UserWarning, match="Dead outputs") as caught:
        report = Sparsifier(Net(), 10, block_size=32, density=falling).report
    assert "'ups.0' (at least 256 of 512;" in str(caught[0].message)
    assert str(caught[0].message) in str(report)
    assert report.layers["ups.0"].dead_outputs == 0
    assert len(said(swap, Net(), block_size=32, density=falling)) == 1
    rising = {"schedule": "linear", "initial": 0.25, "final": 0.5}
    assert said(swap, Net(), block_size=32, density=rising) == []


def test_no_fewer_die_than_announced() -> None:
    model = Net()
    falling = {"schedule": "cubic", "initial": 1.0, "final": 0.25}
    (text,) = said(by_callback, model, block_size=32, density=falling, update={"every_n_steps": 1})
    announced = [int(n) for n in re.findall(r"at least (\d+) of", text)]
    assert announced == [256, 256]
    assert [*dead(model)] >= announced


@pytest.mark.parametrize("swap", [by_sparsifier, by_callback])
def test_a_floor_of_0_says_that_it_is_intended(swap: Swap) -> None:
    (text,) = said(swap, Net(), block_size=32, density=0.25, floor={"row": 0})
    assert "Dead outputs" not in text and "Unread inputs" in text
    nothing = {"row": 0, "column": 0}
    assert said(swap, Net(), block_size=32, density=0.25, floor=nothing) == []


def test_layers_whose_names_differ_in_numbers_are_named_together() -> None:
    (text,) = said(by_sparsify, Net(depth=3), block_size=32, density=0.25)
    assert "'ups.*', 3 layers (at least 256 of 512 each;" in text and "'down' (at" in text


def test_layers_are_named_when_they_are_swapped_only() -> None:
    model, callback = Net(), SparsityCallback(block_size=32, density=0.25)
    fit = trainer(callback, max_steps=2).fit
    assert len(said(fit, model, train_dataloaders=loader())) == 1
    assert said(fit, model, train_dataloaders=loader()) == []
    assert said(by_sparsifier, model, block_size=32, density=0.25) == []


def test_a_copy_is_not_named() -> None:
    model = Net()
    model.target = nn.Linear(64, 512).requires_grad_(False)
    model.target.load_state_dict(model.ups[0].state_dict())
    (text,) = said(by_sparsify, model, block_size=32, density=0.25)
    assert "'ups.0'" in text and "target" not in text


def test_an_error_leaves_the_model_unchanged() -> None:
    model = Net()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="Dead outputs"):
            sparsify(model, block_size=32, density=0.25)
    assert type(model.ups[0]) is nn.Linear and type(model.down) is nn.Linear


def test_the_report_shows_what_is_dead_now() -> None:
    with pytest.warns(UserWarning, match="Dead outputs"):
        report = sparsify(model := Net(), block_size=32, density=0.25)
    header, (up, down, total) = report.table()
    cells = [dict(zip(header, row, strict=True)) for row in (up, down, total)]
    assert tuple(int(cells[2][kind]) for kind in ("dead outputs", "unread inputs")) == dead(model)
    assert cells[0]["unread inputs"] == cells[1]["dead outputs"] == "0"
    assert "dead" not in str(sparsify(Net(), block_size=32, density=0.5)).lower()


def test_the_training_shows_dead_features(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model = Net()
    falling = {"schedule": "cubic", "initial": 1.0, "final": 0.25}
    callback = SparsityCallback(block_size=32, density=falling, update={"every_n_steps": 2})
    bars: list[dict[str, Any]] = []

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
            bars.append(dict(trainer.progress_bar_metrics))

    fitting = trainer(callback, Watch(), max_steps=8, enable_progress_bar=True)
    with pytest.warns(UserWarning, match="Dead outputs"):
        fitting.fit(model, loader())
    outputs, inputs = dead(model)
    assert "dead outputs" not in bars[0]
    shown = bars[-1]["dead outputs"], bars[-1]["unread inputs"]
    assert shown == (str(outputs), str(inputs))
    assert f"dead outputs {outputs}; unread inputs {inputs}" in caplog.text
    assert callback.summary is not None
    assert dict(callback.summary.rows())["dead outputs"] == f"{outputs}"
    started = [r.getMessage() for r in caplog.records if "left dense" in r.getMessage()]
    assert len(started) == 1 and "dead" not in started[0]
    caplog.clear()
    with pytest.warns(UserWarning, match="Dead outputs"):
        trainer(SparsityCallback(block_size=32), max_steps=1).fit(Net(), loader())
    (start,) = [r.getMessage() for r in caplog.records if "left dense" in r.getMessage()]
    assert re.search(r"density 0.250; dead outputs \d+; unread inputs \d+; parameters", start)


def test_a_training_without_dead_features_shows_none(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    fitting = trainer(SparsityCallback(block_size=16), max_steps=4, enable_progress_bar=True)
    assert said(fitting.fit, Net(), train_dataloaders=loader()) == []
    assert "dead" not in caplog.text and "unread" not in caplog.text
    assert not any("dead" in name for name in fitting.progress_bar_metrics)


def test_each_of_several_trainings_in_a_process_warns(recwarn: pytest.WarningsRecorder) -> None:
    """As in a multirun, although Python shows a text once in each process."""
    warnings.simplefilter("default")
    for _ in range(2):
        by_callback(Net(), block_size=32, density=0.25, include=["*", "typo"])
    texts = [str(warning.message) for warning in recwarn]
    assert sum("Dead outputs" in text for text in texts) == 2
    assert sum("`include` should match" in text for text in texts) == 2
